"""The ways to take one projected step in JAX: one jitted step with donated buffers.

`python -m benchmarks.jax_step` also prints what XLA says of temporary memory, for Adam on ResNet-50's shapes.
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

from benchmarks.timing import interleaved, ratio, summary
from benchmarks.workloads import BOUNDS, WORKLOADS, outputs_last, shapes, start
from projgd import MaxNorm
from projgd.optax import apply_updates, maxnorm_projection

OPTIMIZERS = {
    "SGD": optax.sgd(1e-3),
    "momentum": optax.sgd(1e-3, momentum=0.9),
    "Adam": optax.adam(1e-5),
    "AdamW": optax.adamw(1e-5, weight_decay=0.01),
}
PLAIN = "plain, jitted"
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
    """What `optax.chain(tx, maxnorm_projection(c))` does, but that all contenders can share the state of `tx`."""
    projection = maxnorm_projection(c)

    def move(p: Any, u: Any) -> Any:
        u, _ = projection.update(u, projection.init(p), p)
        return optax.apply_updates(p, u)

    return move


PROJECTED = {"projgd, apply_updates": in_place, "projgd, chained": chained, "three lines by hand": by_hand}
OTHERS = {"optax.projections": of_optax, "Keras constraint": of_keras}


@dataclass
class Steps:
    """Contenders that take turns on one set of parameters and state, for each donates them to the next."""

    held: tuple[Any, Any]
    gradients: list[jax.Array]
    taken: dict[Any, Callable[[], object]] = field(default_factory=dict)
    extra: dict[Any, int] = field(default_factory=dict)  # bytes of temporary memory

    def add(self, name: Any, tx: optax.GradientTransformation, move: Move) -> None:
        def step(p: Any, s: Any, g: Any) -> tuple[Any, Any]:
            u, s = tx.update(g, s, p)
            return move(p, u), s

        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*self.held, self.gradients).compile()

        def take() -> None:
            self.held = jax.block_until_ready(compiled(*self.held, self.gradients))

        self.taken[name] = take
        self.extra[name] = compiled.memory_analysis().temp_size_in_bytes


def jax_steps(workload: str, optimizer: str, ways: Mapping[Any, tuple[Callable[[float], Move], float]]) -> Steps:
    """The plain step, and by the name of each way its move with its c."""
    pairs = [[jnp.asarray(outputs_last(x)) for x in start(s)] for s in shapes(workload)]
    params, tx = [p for p, _ in pairs], OPTIMIZERS[optimizer]
    steps = Steps((params, tx.init(params)), [g for _, g in pairs])
    steps.add((PLAIN, None), tx, optax.apply_updates)
    for name, (way, c) in ways.items():
        steps.add(name, tx, way(c))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="resnet")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="Adam")
    parser.add_argument("--bound", choices=list(BOUNDS), default="half binds")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    ways = {(name, args.bound): (way, BOUNDS[args.bound]) for name, way in (PROJECTED | OTHERS).items()}
    steps = jax_steps(args.workload, args.optimizer, ways)
    times = interleaved(steps.taken, 0, rounds=(args.rounds, args.rounds))
    print(f"{args.optimizer} on {args.workload}, {args.bound}, {args.rounds} rounds, {jax.devices()[0].device_kind}")
    print("| | ms | R | extra MB |\n|---|---|---|---|")
    for way, took in times.items():
        r, extra = ratio(took, times[PLAIN, None]), steps.extra[way] / 1e6
        print(f"| {way[0]} | {summary(took).median:.2f} | {r.median:.2f} ± {r.spread:.2f} | {extra:.1f} |")


if __name__ == "__main__":
    main()
