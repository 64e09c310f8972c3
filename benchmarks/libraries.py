"""Compare sets of vectors and of entries with other libraries on a CPU: python -m benchmarks.libraries

The study "rows" projects 4,096 rows of 4,096 float32 numbers onto the simplex and onto an L1 ball. Each library has the
same rows: PyTorch with projgd and with the usual formula (sort, running sum), JAX with projgd, with optax and with
JAXopt, each jitted. optax and JAXopt project one vector, so `jax.vmap` maps them over the rows. Rows "at random" are
standard normal numbers. Rows "after a step" are in the set, but for an SGD step of 1e-3 times normal numbers.

The study "steps" runs fused SGD of torch on the shapes of GPT-2 small. R is the time of a step with a set of entries by
that of the step alone. It is compared with the same step and torch's own `clamp_` behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import jaxopt.projection
import numpy as np
import optax.projections
import torch
from torch import Tensor

from benchmarks import record
from benchmarks.timing import interleaved, ratio, summary
from benchmarks.torch_step import OPTIMIZERS, PLAIN, Step, tensors
from benchmarks.workloads import WORKLOADS, shapes
from projgd import Box, Constraint, KeepSign, L1Ball, NonNegative, Simplex

SIDE = 4096
RADIUS = 8.0  # of the L1 ball; a row at random has a sum of 3,268
SETS: dict[str, tuple[Constraint, Constraint]] = {  # in PyTorch's layout and in JAX's: a row is a vector in both
    "Simplex()": (Simplex(axis=1), Simplex(axis=1)),
    f"L1Ball({RADIUS:g})": (L1Ball(RADIUS, axis=1), L1Ball(RADIUS, axis=1)),
}
OURS = ("projgd, PyTorch", "projgd, JAX")
BOX = 0.02


def sorted_simplex(x: Tensor, total: float) -> Tensor:
    """Project rows onto the simplex by the formula of Duchi et al. (2008): sort, running sum, count."""
    falling = x.sort(dim=1, descending=True).values
    over = falling.cumsum(1) - total
    count = (falling * torch.arange(1, x.shape[1] + 1) > over).sum(1, keepdim=True)
    return (x - over.gather(1, count - 1) / count).clamp_(min=0)


def sorted_l1_ball(x: Tensor, c: float) -> Tensor:
    size = x.abs()
    y = sorted_simplex(size, c).copysign_(x)
    return torch.where(size.sum(1, keepdim=True) > c, y, x)


def projections(what: str) -> dict[str, tuple[str, Callable[[Any], Any]]]:
    """Return the framework and the function of every contender for a set."""
    in_torch, in_jax = SETS[what]
    if isinstance(in_torch, Simplex):
        by_hand: Any = lambda x: sorted_simplex(x, 1.0)  # noqa: E731
        others = {"optax": optax.projections.projection_simplex, "JAXopt": jaxopt.projection.projection_simplex}
        mapped = {name: jax.vmap(project) for name, project in others.items()}
    else:
        by_hand = lambda x: sorted_l1_ball(x, RADIUS)  # noqa: E731
        others = {"optax": optax.projections.projection_l1_ball, "JAXopt": jaxopt.projection.projection_l1_ball}
        mapped = {name: jax.vmap(lambda row, project=project: project(row, RADIUS)) for name, project in others.items()}
    return {
        OURS[0]: ("torch", in_torch.project),
        "sort and running sum, PyTorch": ("torch", by_hand),
        OURS[1]: ("jax", jax.jit(in_jax.project)),
        **{f"{name} under vmap": ("jax", jax.jit(project)) for name, project in mapped.items()},
    }


def by_rows(what: str, seconds: float, side: int) -> list[record.Row]:
    rng, rows = np.random.default_rng(0), []
    anywhere = rng.standard_normal((side, side), np.float32)
    near = SETS[what][0].project(anywhere) + 1e-3 * rng.standard_normal((side, side), np.float32)
    for start, x in (("at random", anywhere), ("after a step", near)):
        inputs = {"torch": torch.from_numpy(x), "jax": jnp.asarray(x)}
        calls: dict[str, Step] = {}
        answers = {}
        for name, (framework, project) in projections(what).items():
            calls[name] = lambda p=project, given=inputs[framework]: jax.block_until_ready(p(given))
            answers[name] = np.asarray(calls[name]())
        taken = interleaved(calls, seconds, rounds=(5, 200))
        wide = SETS[what][0].project(x.astype(np.float64))
        for name in calls:
            ms, answer = summary(taken[name]), answers[name].astype(np.float64)
            numbers = {"ms": ms.median, "ms_spread": ms.spread, "error": np.abs(answer - wide).max()}
            numbers["over"] = np.abs(answer).sum(1).max() - (RADIUS if "L1" in what else 1.0)
            rounded = {key: float(f"{value:.3g}") for key, value in numbers.items()}
            rows.append({"study": "rows", "workload": what, "start": start, "way": name, **rounded})
    return rows


def by_steps(workload: str, seconds: float) -> list[record.Row]:
    """Return R of every step, and of the same step with `clamp_`; all of them share one set of parameters."""
    stock, ours, options = OPTIMIZERS["SGD"]
    params, rows = tensors(shapes(workload)), []
    plain: Any = stock(params, fused=True, **options)

    def with_clamp(least: float | None, most: float | None) -> Step:
        @torch.no_grad()
        def step() -> None:
            plain.step()
            for p in params:
                p.clamp_(least, most)

        return step

    sets: list[tuple[Constraint, float, float | None]] = [
        (Box(-BOX, BOX), -BOX, BOX),
        (NonNegative(), 0.0, None),
        (KeepSign(), 0.0, None),
    ]
    for constraint, least, most in sets:
        optimizer = ours(params, constraint=constraint, fused=True, **options)
        steps = {PLAIN: plain.step, "clamp_": with_clamp(least, most), "projgd": optimizer.step}
        taken = interleaved(steps, seconds / len(sets), rounds=(7, 200))
        r, base = (ratio(taken[way], taken[PLAIN]) for way in ("projgd", "clamp_"))
        beside = ratio(taken["projgd"], taken["clamp_"])
        numbers = {"R": r.median, "R_spread": r.spread, "R_clamp": base.median, "to_clamp": beside.median}
        numbers |= {"to_clamp_spread": beside.spread}
        rounded = {name: round(value, 3) for name, value in numbers.items()}
        rows.append({"study": "steps", "workload": workload, "set": str(constraint), **rounded})
    return rows


def table(rows: list[record.Row]) -> str:
    parts = []
    if found := [r for r in rows if r["study"] == "rows"]:
        lines = ["| set | rows | projection | ms | largest error of an entry | largest Σ \\|w\\| - bound |"]
        for r in found:
            where = f"`{r['workload']}` | {r['start']} | {r['way']}"
            numbers = f"{r['ms']:.0f} ± {r['ms_spread']:.0f} | {r['error']:.0e} | {r['over']:+.0e}"
            lines.append(f"| {where} | {numbers} |")
        parts.append([lines[0], "|---" * 6 + "|", *lines[1:]])
    if found := [r for r in rows if r["study"] == "steps"]:
        lines = ["| workload | set | R | R with `clamp_` | quotient |", "|---" * 5 + "|"]
        for r in found:
            numbers = f"{r['R']:.2f} ± {r['R_spread']:.2f} | {r['R_clamp']:.2f}"
            quotient = f"{r['to_clamp']:.2f} ± {r['to_clamp_spread']:.2f}"
            lines.append(f"| {r['workload']} | `{r['set']}` | {numbers} | {quotient} |")
        parts.append(lines)
    return "\n\n".join("\n".join(lines) for lines in parts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.libraries", description=__doc__)
    parser.add_argument("--studies", nargs="+", choices=("rows", "steps"), default=["rows", "steps"])
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["small", "gpt"], help="of the steps")
    parser.add_argument("--seconds", type=float, default=30.0, help="for every set and start, and for the steps")
    parser.add_argument("--side", type=int, default=SIDE, help="rows, and entries of each")
    args = parser.parse_args()
    here, out = record.machine(torch.get_num_threads()), record.RESULTS / "libraries"
    rows: list[record.Row] = []
    parts = [partial(by_rows, what, args.seconds, args.side) for what in SETS if "rows" in args.studies]
    parts += [partial(by_steps, workload, args.seconds) for workload in args.workloads if "steps" in args.studies]
    for measure in parts:
        found = measure()
        rows = record.merged(out.with_suffix(".json"), here, found, ("study", "workload"))
        print(table(found), flush=True)
    used = f"jaxopt {metadata.version('jaxopt')}. {record.described(here, rows)}"
    out.with_suffix(".md").write_text(f"{table(rows)}\n\n{used}\n")


if __name__ == "__main__":
    main()
