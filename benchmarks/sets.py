"""Measure what sets other than MaxNorm, and GradScaler, cost on the same engine: python -m benchmarks.sets

Every set bounds the same weights. Half of them are pushed outwards at every step. The others are inside of all sets,
except for "initial", which keeps every norm as it is. R is the time of a step over that of the plain one. The last
column is R over that of MaxNorm on the same engine, or over that of the step without GradScaler.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import record
from benchmarks.timing import interleaved, ratio
from benchmarks.torch_step import OPTIMIZERS, PLAIN, Step, tensors
from benchmarks.workloads import WORKLOADS, shapes
from projgd import MaxNorm, MinMaxNorm, Sphere, UnitNorm

ENGINES: dict[str, dict[str, Any]] = {
    "cpu": {"fused": True},
    "eager after the fused step": {"fused": True, "engine": "eager"},
    "eager after the default step": {},
}
SETS = {
    "MaxNorm(1)": MaxNorm(1.0),
    "UnitNorm()": UnitNorm(),
    "Sphere(1.2)": Sphere(1.2),
    'Sphere("initial")': Sphere("initial"),
    "MinMaxNorm(0.5, 1)": MinMaxNorm(0.5, 1.0),
}
SCALED = "MaxNorm(1), GradScaler"


def scaled(optimizer: Any) -> Step:
    """Return a step as `GradScaler.step` calls it, if the optimizer supports that; otherwise a plain one."""
    if not any(group.get("fused") for group in optimizer.param_groups):
        return optimizer.step  # type: ignore[no-any-return]
    scale, found = torch.ones(()), torch.zeros(())

    def step() -> None:
        optimizer.grad_scale, optimizer.found_inf = scale, found
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    return step


def measured(workload: str, name: str, seconds: float) -> list[record.Row]:
    stock, ours, options = OPTIMIZERS[name]
    plain: Any = None
    steps: dict[Any, Step] = {}
    for engine, extra in ENGINES.items():
        for what, constraint in {**SETS, SCALED: SETS["MaxNorm(1)"]}.items():
            params = tensors(shapes(workload))  # the first set would project shared ones
            optimizer = ours(params, constraint=constraint, **options, **extra)
            steps[engine, what] = scaled(optimizer) if what == SCALED else optimizer.step
    params = tensors(shapes(workload))
    plain = stock(params, fused=True, **options)
    taken = interleaved({(PLAIN, PLAIN): plain.step, **steps}, seconds)
    base = taken[PLAIN, PLAIN]
    rows = []
    for engine, what in steps:
        r, beside = ratio(taken[engine, what], base), ratio(taken[engine, what], taken[engine, "MaxNorm(1)"])
        numbers = {"R": r.median, "R_spread": r.spread, "to_maxnorm": beside.median}
        rounded = {k: round(v, 3) for k, v in numbers.items()}
        rows.append({"workload": workload, "optimizer": name, "engine": engine, "set": what, **rounded})
    return rows


def table(rows: list[record.Row]) -> str:
    lines = ["| workload | optimizer | engine | set | R | R over MaxNorm's |", "|---|---|---|---|---|---|"]
    for r in rows:
        where = f"{r['workload']} | {r['optimizer']} | {r['engine']} | {r['set']}"
        lines.append(f"| {where} | {r['R']:.2f} ± {r['R_spread']:.2f} | {r['to_maxnorm']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sets", description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["mlp", "small"])
    parser.add_argument("--optimizers", nargs="+", choices=list(OPTIMIZERS), default=["SGD", "Adam"])
    parser.add_argument("--seconds", type=float, default=15.0, help="for every workload and optimizer")
    args = parser.parse_args()
    here, out = record.machine(torch.get_num_threads()), record.RESULTS / "sets"
    rows: list[record.Row] = []
    for workload in args.workloads:
        for name in args.optimizers:
            found = measured(workload, name, args.seconds)
            rows = record.merged(out.with_suffix(".json"), here, found, ("workload", "optimizer"))
            print(table(found), flush=True)
    out.with_suffix(".md").write_text(f"{table(rows)}\n\n{record.described(here, rows)}\n")


if __name__ == "__main__":
    main()
