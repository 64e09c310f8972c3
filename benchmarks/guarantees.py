"""What exactness costs: time of the projection over time of the plain formula: python -m benchmarks.guarantees

float32, one vector a row. The plain formula is norm, clamp and multiply, in PyTorch in place and in JAX jitted, as is
projgd's. Both take turns; a figure is the median of their round-by-round quotients and half its quartile distance.
With `--fronts` one half of the record in `benchmarks/results/` is measured anew.
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
from projgd.torch.project import project_params

SHAPES = ((64, 64), (512, 512), (1024, 1024), (2048, 4096), (64, 262144))
BINDING = {"nothing binds": 0.0, "half binds": 0.5}
C = 1.0
SET = MaxNorm(C, axis=1)


def rows(shape: tuple[int, int], share: float) -> np.ndarray:
    """Rows of norm c / 2, but for a `share` of them of norm 2 c."""
    x = np.random.default_rng(0).standard_normal(shape)
    norms = np.where(np.arange(shape[0]) % 2 < 2 * share, 2 * C, C / 2)
    return (x * (norms / np.linalg.norm(x, axis=1))[:, None]).astype(np.float32)


def in_torch(start: np.ndarray) -> tuple[Mapping[str, Callable[[], object]], Callable[[], object]]:
    original = torch.from_numpy(start)
    w = original.clone()
    steps = {
        "plain": lambda: w.mul_((C / w.norm(dim=1, keepdim=True)).clamp(max=1)),
        "projgd": lambda: project_params([w], SET),
    }
    return steps, lambda: w.copy_(original)


def in_jax(start: np.ndarray) -> tuple[Mapping[str, Callable[[], object]], Callable[[], object]]:
    w = jnp.asarray(start)
    plain = jax.jit(lambda w: w * jnp.minimum(1.0, C / jnp.linalg.norm(w, axis=1, keepdims=True)))
    ours = jax.jit(lambda w: project(w, SET))
    steps = {"plain": lambda: plain(w).block_until_ready(), "projgd": lambda: ours(w).block_until_ready()}
    return steps, lambda: None


FRONTS = {"PyTorch": in_torch, "JAX": in_jax}


@torch.no_grad()
def measured(front: str, seconds: float) -> Iterator[record.Row]:
    for shape, (binding, share) in itertools.product(SHAPES, BINDING.items()):
        steps, before = FRONTS[front](rows(shape, share))
        taken = interleaved(steps, seconds, rounds=(5, 5000), before=before)
        ms, r = summary(taken["plain"]), ratio(taken["projgd"], taken["plain"])
        numbers = {"R": round(r.median, 3), "R_spread": round(r.spread, 3), "plain_ms": round(ms.median, 4)}
        yield {"front": front, "shape": list(shape), "binding": binding, **numbers}


def table(found: list[record.Row]) -> str:
    columns = [(f, b) for f in FRONTS for b in BINDING if any(r["front"] == f for r in found)]
    lines = ["| | " + " | ".join(f"{f}, {b}" for f, b in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for shape in SHAPES:
        mine = {(r["front"], r["binding"]): r for r in found if tuple(r["shape"]) == shape}
        cells = [f"{mine[c]['R']:.2f} ± {mine[c]['R_spread']:.2f}" for c in columns]
        lines.append(f"| {shape[0]:,} rows of {shape[1]:,} | " + " | ".join(cells) + " |")
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
