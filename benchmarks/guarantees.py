"""What exactness costs: time of the projection over time of the plain formula: python -m benchmarks.guarantees

float32, one vector a row. The plain formula is norm, clamp and multiply, in PyTorch in place and in JAX jitted, as is
projgd's. Both take turns; a figure is the median of their round-by-round quotients and half its quartile distance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.timing import interleaved, machine, ratio
from projgd import MaxNorm
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
    ours = jax.jit(SET.project)
    steps = {"plain": lambda: plain(w).block_until_ready(), "projgd": lambda: ours(w).block_until_ready()}
    return steps, lambda: None


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3, help="for each figure")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fronts = {"PyTorch": in_torch, "JAX": in_jax}
    print("| | " + " | ".join(f"{front}, {binding}" for front in fronts for binding in BINDING) + " |")
    print("|---" * (1 + len(fronts) * len(BINDING)) + "|")
    for shape in SHAPES:
        cells = []
        for front in fronts.values():
            for share in BINDING.values():
                steps, before = front(rows(shape, share))
                taken = interleaved(steps, args.seconds, rounds=(5, 5000), before=before)
                r = ratio(taken["projgd"], taken["plain"])
                cells.append(f"{r.median:.2f} ± {r.spread:.2f}")
        print(f"| {shape[0]:,} rows of {shape[1]:,} | " + " | ".join(cells) + " |", flush=True)
    print(f"\n{machine(args.threads)}")


if __name__ == "__main__":
    main()
