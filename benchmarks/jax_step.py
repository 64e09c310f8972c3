"""Measure projected steps in JAX: one jitted step with donated buffers, for several implementations.

`python -m benchmarks.jax_step` uses Adam and ResNet-50's shapes by default, and reads the temporary memory from XLA.
Figures go to `benchmarks/results/jax_step.json`, where each part can be measured again on its own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import optax

from benchmarks import record
from benchmarks.timing import interleaved, ratio, summary
from benchmarks.workloads import BINDING, BOUNDS, WORKLOADS, outputs_last, shapes, start
from projgd import MaxNorm
from projgd.optax import apply_updates, maxnorm_projection

OPTIMIZERS = {
    "SGD": optax.sgd(1e-3),
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "Adam": optax.adam(1e-5),
    "AdamW": optax.adamw(1e-5, weight_decay=0.01),
}
PLAIN = "plain, jitted"
KEY = ("workload", "optimizer", "bound", "scheduler")
SCHEDULERS = {"default": {}, "memory": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}}
Move = Callable[[Any, Any], Any]  # parameters and updates to parameters


def by_hand(c: float) -> Move:
    def project(q: jax.Array) -> jax.Array:
        return q * jnp.minimum(1.0, c / jnp.linalg.norm(q.reshape(-1, q.shape[-1]), axis=0))

    return _then(project)


def of_optax(c: float) -> Move:
    def project(q: jax.Array) -> jax.Array:
        rows = q.reshape(-1, q.shape[-1]).T
        return jax.vmap(lambda row: optax.projections.projection_l2_ball(row, c))(rows).T.reshape(q.shape)

    return _then(project)


def of_keras(c: float) -> Move:
    norms = {n: keras.constraints.MaxNorm(c, axis=tuple(range(n - 1))) for n in (2, 4)}
    return _then(lambda q: norms[q.ndim](q))


def _then(project: Callable[[jax.Array], jax.Array]) -> Move:
    def move(p: Any, u: Any) -> Any:
        return [project(q) if q.ndim > 1 else q for q in optax.apply_updates(p, u)]

    return move


def in_place(c: float) -> Move:
    return lambda p, u: apply_updates(p, u, MaxNorm(c))


def chained(c: float) -> Move:
    """Do what `optax.chain(tx, maxnorm_projection(c))` does, with the state of `tx`, so that all can share it."""
    projection = maxnorm_projection(c)

    def move(p: Any, u: Any) -> Any:
        u, _ = projection.update(u, projection.init(p), p)
        return optax.apply_updates(p, u)

    return move


PROJECTED = {"projgd, apply_updates": in_place, "projgd, chained": chained, "three lines by hand": by_hand}
OTHERS = {"optax.projections": of_optax, "Keras constraint": of_keras}


@dataclass
class Steps:
    """Hold steps that take turns on one set of parameters and state, because each donates them to the next."""

    held: tuple[Any, Any]
    gradients: list[jax.Array]
    options: dict[str, Any] = field(default_factory=dict)  # of XLA
    taken: dict[Any, Callable[[], object]] = field(default_factory=dict)
    extra: dict[Any, int] = field(default_factory=dict)  # bytes of temporary memory

    def add(self, name: Any, tx: optax.GradientTransformation, move: Move) -> None:
        def step(p: Any, s: Any, g: Any) -> tuple[Any, Any]:
            u, s = tx.update(g, s, p)
            return move(p, u), s

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*self.held, self.gradients).compile(self.options)

        def take() -> None:
            self.held = jax.block_until_ready(compiled(*self.held, self.gradients))

        self.taken[name] = take
        self.extra[name] = compiled.memory_analysis().temp_size_in_bytes


def jax_steps(
    workload: str,
    optimizer: str,
    ways: Mapping[Any, tuple[Callable[[float], Move], float]],
    options: dict[str, Any] | None = None,
) -> Steps:
    """Return the plain step, and by the name of each projected one its move with its c."""
    pairs = [[jnp.asarray(outputs_last(x)) for x in start(s)] for s in shapes(workload)]
    params, tx = [p for p, _ in pairs], OPTIMIZERS[optimizer]
    steps = Steps((params, tx.init(params)), [g for _, g in pairs], options or {})
    steps.add((PLAIN, None), tx, optax.apply_updates)
    for name, (way, c) in ways.items():
        steps.add(name, tx, way(c))
    return steps


def measured(workload: str, optimizer: str, bound: str, scheduler: str, rounds: int) -> list[record.Row]:
    ways = {name: (way, BOUNDS[bound]) for name, way in (PROJECTED | OTHERS).items()}
    steps = jax_steps(workload, optimizer, ways, SCHEDULERS[scheduler])
    times = interleaved(steps.taken, 0, rounds=(rounds, rounds))
    rows = []
    for name, took in times.items():
        ms, r = summary(took), ratio(took, next(iter(times.values())))
        numbers = {"ms": round(ms.median, 3), "R": round(r.median, 3), "R_spread": round(r.spread, 3)}
        where = {"workload": workload, "optimizer": optimizer, "bound": bound, "scheduler": scheduler}
        way = PLAIN if name == (PLAIN, None) else name
        rows.append({**where, "way": way, **numbers, "extra_MB": round(steps.extra[name] / 1e6, 2), "rounds": rounds})
    return rows


def table(rows: list[record.Row]) -> str:
    """Return Markdown: R by scheduler and bound, and XLA's temporary memory by scheduler; one table per optimizer."""
    parts = []
    for workload, optimizer in dict.fromkeys((r["workload"], r["optimizer"]) for r in rows):
        mine = [r for r in rows if (r["workload"], r["optimizer"]) == (workload, optimizer)]
        columns = list(dict.fromkeys((r["scheduler"], r["bound"]) for r in mine))
        head = [f"R, {bound}, {scheduler}" for scheduler, bound in columns]
        schedulers = list(dict.fromkeys(scheduler for scheduler, _ in columns))
        head += [f"extra MB, {scheduler}" for scheduler in schedulers]
        parts.append(
            f"### {optimizer} on {workload}\n\n| | " + " | ".join(head) + " |\n" + "|---" * (len(head) + 1) + "|"
        )
        for way in dict.fromkeys(r["way"] for r in mine):
            found = {(r["scheduler"], r["bound"]): r for r in mine if r["way"] == way}
            cells = [f"{found[c]['R']:.2f} ± {found[c]['R_spread']:.2f}" if c in found else "" for c in columns]
            cells += [f"{next(r['extra_MB'] for r in found.values() if r['scheduler'] == s):.1f}" for s in schedulers]
            parts.append(f"| {way} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="resnet")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="Adam")
    parser.add_argument("--bound", choices=list(BOUNDS), default=BINDING)
    parser.add_argument("--scheduler", choices=list(SCHEDULERS), default="default", help="of XLA on a CPU")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    rows = measured(args.workload, args.optimizer, args.bound, args.scheduler, args.rounds)
    print(table(rows))
    here, out = record.machine(os.cpu_count() or 1), record.RESULTS / "jax_step"
    rows = record.merged(out.with_suffix(".json"), here, rows, KEY)
    out.with_suffix(".md").write_text(f"{table(rows)}\n{record.described(here, rows)}\n")


if __name__ == "__main__":
    main()
