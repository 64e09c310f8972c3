"""Measure the cost of projecting in the adaptive metric against the plain fused step: python -m benchmarks.adaptive

The weights are those of a 784-1024-1024-2048-10 network under Adam, with c that binds on half of the neurons and with c
that never binds. The Euclidean projection is measured, too. "fused": one numba kernel updates and projects; "without
numba": plain operations project after torch's own fused step. All optimizers share parameters and state, and take
turns. R is the median of the rounds. The ratio of the fastest steps is beside it, because a busy machine disturbs it
less.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

from benchmarks import record
from benchmarks.timing import interleaved, ratio, summary
from benchmarks.torch_step import PLAIN
from benchmarks.workloads import BOUNDS, Shape, shapes
from projgd.torch import ProjectedAdam


def parameter(shape: Shape) -> torch.Tensor:
    """Return a parameter with half of the rows on the unit ball, pushed outwards by gradients of all sizes."""
    generator = torch.Generator().manual_seed(len(shape))
    p = torch.randn(shape, generator=generator)
    gradient = torch.rand(shape, generator=generator) * 10 ** (-3 * torch.rand(shape, generator=generator))
    if len(shape) > 1:
        p.div_(p.norm(dim=1, keepdim=True))
        p[shape[0] // 2 :] *= 0.5
        gradient.mul_(-p.sign())
        gradient[shape[0] // 2 :].neg_()
    p.requires_grad_()
    p.grad = gradient
    return p


def steps(rate: float) -> dict[str, Callable[[], object]]:
    """Return functions that take one step, by name; the plain one first."""
    params = [parameter(s) for s in shapes("mlp")]
    plain = torch.optim.Adam(params, lr=rate, fused=True)
    plain.step()
    found: dict[str, Callable[[], object]] = {PLAIN: plain.step}
    for bound, c in BOUNDS.items():
        for metric in ("euclidean", "adaptive"):
            engines = {"fused": None, "without numba": "diagonal" if metric == "adaptive" else "eager"}
            for name, engine in engines.items():
                ours = ProjectedAdam(params, lr=rate, fused=True, c=c, metric=metric, engine=engine)
                ours.state = plain.state
                found[f"{metric}, {bound}: {name}"] = ours.step
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate: how far out a step goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    taken = interleaved(steps(args.rate), 0, rounds=(args.rounds, args.rounds))
    rows: list[record.Row] = []
    for name, times in taken.items():
        r, ms, fastest = ratio(times, taken[PLAIN]), summary(times).median, min(times) / min(taken[PLAIN])
        print(f"{name:50}{ms:9.2f} ms   R = {r.median:.2f} ± {r.spread:.2f}, of the fastest {fastest:.2f}")
        numbers = {"R": r.median, "R_spread": r.spread, "R_fastest": fastest, "ms": ms}
        rows.append({"threads": args.threads, "contender": name} | {k: round(v, 3) for k, v in numbers.items()})
    here = record.machine(0) | {"threads": "as said"}
    record.merged(record.RESULTS / "adaptive.json", here, rows, ("threads", "contender"))


if __name__ == "__main__":
    main()
