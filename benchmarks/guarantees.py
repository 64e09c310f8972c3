"""Measure what exactness costs, against the time of the plain formula: python -m benchmarks.guarantees

The weights are float32, with one vector in each row. The plain formula is norm, clamp and multiply, in PyTorch in place
and in JAX jitted, as is projgd's. Both take turns. A figure is the median of their round-by-round quotients and half
its quartile distance. With `--fronts` the command measures one half of the record in `benchmarks/results/` again.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import record
from benchmarks.timing import interleaved, ratio, summary
from projgd import MaxNorm
from projgd.optax import project
from projgd.torch.engines.base import Job
from projgd.torch.engines.eager import Eager

CASES = ((1, 64, 64), (200, 64, 64), (1, 512, 512), (1, 1024, 1024), (1, 2048, 4096), (1, 64, 262144))
"""How many arrays in one call, and their shape."""
BINDING = {"nothing binds": 0.0, "half binds": 0.5}
C = 1.0
SET = MaxNorm(C, axis=1)


def rows(shape: tuple[int, int], share: float) -> np.ndarray:
    """Return rows of norm c / 2, except for a `share` of them of norm 2 c."""
    x = np.random.default_rng(0).standard_normal(shape)
    norms = np.where(np.arange(shape[0]) % 2 < 2 * share, 2 * C, C / 2)
    return (x * (norms / np.linalg.norm(x, axis=1))[:, None]).astype(np.float32)


def in_torch(start: np.ndarray, count: int) -> tuple[Mapping[str, Callable[[], object]], Callable[[], object]]:
    original = torch.from_numpy(start)
    ws = [original.clone() for _ in range(count)]

    def plain() -> None:
        for w in ws:
            w.mul_((C / w.norm(dim=1, keepdim=True)).clamp(max=1))

    def again() -> None:
        for w in ws:
            w.copy_(original)

    engine = Eager()
    job = Job(torch.optim.SGD(ws), torch.optim.SGD, {}, SET)
    prepared = engine.prepare(job, ws)
    return {"plain": plain, "projgd": lambda: engine.run(prepared, job, ws)}, again


def in_jax(start: np.ndarray, count: int) -> tuple[Mapping[str, Callable[[], object]], Callable[[], object]]:
    ws = [jnp.array(start) for _ in range(count)]
    formula = lambda w: w * jnp.minimum(1.0, C / jnp.linalg.norm(w, axis=1, keepdims=True))  # noqa: E731
    plain, ours = jax.jit(lambda ws: [formula(w) for w in ws]), jax.jit(lambda ws: project(ws, SET))
    steps = {"plain": lambda: jax.block_until_ready(plain(ws)), "projgd": lambda: jax.block_until_ready(ours(ws))}
    return steps, lambda: None


FRONTS = {"PyTorch": in_torch, "JAX": in_jax}


@torch.no_grad()
def measured(front: str, seconds: float) -> Iterator[record.Row]:
    for (count, *shape), (binding, share) in itertools.product(CASES, BINDING.items()):
        steps, before = FRONTS[front](rows((shape[0], shape[1]), share), count)
        taken = interleaved(steps, seconds, rounds=(5, 5000), before=before)
        ms, r = summary(taken["plain"]), ratio(taken["projgd"], taken["plain"])
        numbers = {"R": round(r.median, 3), "R_spread": round(r.spread, 3), "plain_ms": round(ms.median, 4)}
        yield {"front": front, "case": [count, *shape], "binding": binding, **numbers}


def table(found: list[record.Row]) -> str:
    columns = [(f, b) for f in FRONTS for b in BINDING if any(r["front"] == f for r in found)]
    lines = ["| | " + " | ".join(f"{f}, {b}" for f, b in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for case in CASES:
        mine = {(r["front"], r["binding"]): r for r in found if tuple(r["case"]) == case}
        cells = [f"{mine[c]['R']:.2f} ± {mine[c]['R_spread']:.2f}" for c in columns]
        several = f"{case[0]} times " if case[0] > 1 else ""
        lines.append(f"| {several}{case[1]:,} rows of {case[2]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="for each figure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--fronts", nargs="+", choices=list(FRONTS), default=list(FRONTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    here, out = record.machine(args.threads), record.RESULTS / "guarantees"
    for front in args.fronts:
        found = record.merged(out.with_suffix(".json"), here, list(measured(front, args.seconds)), ("front",))
    print(table(found))
    out.with_suffix(".md").write_text(f"{table(found)}\n\n{record.described(here, found)}\n")


if __name__ == "__main__":
    main()
