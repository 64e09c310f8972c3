"""Measure R = time of a projected step / time of the plain one: `python -m benchmarks [--quick]`.

The plain step is torch's fused optimizer, the jitted step of optax with donated buffers, or Keras's own training step
without a constraint. The command writes a table, JSON and a plot to `benchmarks/results/`. With `--fronts`,
`--workloads` or `--optimizers` it measures only these rows again. It asserts nothing: the figures are the machine's.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures, keras_step, record
from benchmarks.timing import interleaved, ratio, summary
from benchmarks.torch_step import OPTIMIZERS, Contenders, tensors
from benchmarks.workloads import BINDING, BOUNDS, WORKLOADS, shapes

Times = Mapping[Any, list[float]]
KEY = ("front", "workload", "optimizer")
QUICK = {
    "torch": {"mlp": ("SGD", "Adam"), "small": ("SGD", "Adam"), "resnet": ("SGD",), "gpt": ("SGD",)},
    "jax": {"mlp": ("SGD", "Adam")},
    "keras": {"mlp": ("SGD",)},
}


def in_torch(workload: str, optimizer: str, seconds: float, rounds: tuple[int, int], compiled: bool) -> Times:
    contenders = Contenders(optimizer, tensors(shapes(workload)))
    steps: dict[Any, Any] = {(way, None): step for way, step in contenders.plain(compiled).items()}
    for bound, c in BOUNDS.items():
        ways = contenders.projected(c, compiled and bound == BINDING)
        steps |= {(way, bound): step for way, step in ways.items()}
    return interleaved(steps, seconds, rounds)


def in_jax(workload: str, optimizer: str, seconds: float, rounds: tuple[int, int]) -> Times:
    from benchmarks.jax_step import PROJECTED, jax_steps

    ways = {(way, bound): (move, c) for bound, c in BOUNDS.items() for way, move in PROJECTED.items()}
    return interleaved(jax_steps(workload, optimizer, ways).taken, seconds, rounds)


def rows_of(times: Times, **where: str) -> list[record.Row]:
    """Return a row of the record for every step and bound; the first is the plain step."""
    base = next(iter(times.values()))
    rows = []
    for (way, bound), taken in times.items():
        ms, r = summary(taken), ratio(taken, base)
        numbers = {"ms": ms.median, "ms_spread": ms.spread, "R": r.median, "R_spread": r.spread}
        rounded = {name: float(f"{x:.4g}") for name, x in numbers.items()}
        rows.append({**where, "way": way, "bound": bound, **rounded, "rounds": len(taken)})
    return rows


def measured(front: str, workload: str, optimizer: str, args: argparse.Namespace) -> list[record.Row]:
    where = {"workload": workload, "optimizer": optimizer}
    if front == "torch":
        compiled = not args.eager and (not args.quick or workload == "mlp")  # 400 tensors take minutes to compile
        return rows_of(in_torch(workload, optimizer, args.seconds, args.rounds, compiled), front="PyTorch", **where)
    if front == "jax":
        return rows_of(in_jax(workload, optimizer, args.seconds, args.rounds), front="JAX", **where)
    rows = []
    for backend in keras_step.BACKENDS if workload in keras_step.WORKLOADS else ():
        times = keras_step.measured(backend, workload, optimizer, args.seconds, args.threads)
        rows += rows_of(times, front=f"Keras on {backend}", **where)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="under two minutes: fewer rounds, optimizers and workloads"
    )
    parser.add_argument("--fronts", nargs="+", choices=("torch", "jax", "keras"), default=("torch", "jax", "keras"))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS)
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS))
    parser.add_argument("--eager", action="store_true", help="without torch.compile, which takes minutes to warm up")
    parser.add_argument("--seconds", type=float, help="for every workload and optimizer of a front")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    args.seconds = args.seconds or (0.7 if args.quick else 10.0)
    args.rounds = (3, 200) if args.quick else (7, 200)
    out = args.out or record.RESULTS / ("quick" if args.quick else "cpu")
    here = record.machine(args.threads)
    rows: list[record.Row] = []
    for front, workload in itertools.product(args.fronts, args.workloads):
        for optimizer in args.optimizers or (QUICK[front].get(workload, ()) if args.quick else OPTIMIZERS):
            found = measured(front, workload, optimizer, args)
            rows = record.merged(out.with_suffix(".json"), here, found, KEY)
            print(figures.table(found), flush=True)
    text = figures.table(rows)
    out.with_suffix(".md").write_text(f"{text}\n{record.described(here, rows)}\n")
    figures.plot(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
