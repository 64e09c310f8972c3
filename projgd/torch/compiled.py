"""The projection onto balls under torch.compile.

Norms and products belong to the graph: Inductor puts the norm into the loop of the update, and computes the update once
more for the product, so that no weights are written twice. What happens in between is an operator, which the compiler
does not look into: c can move in it, and Inductor does not merge both loops into one (on a CPU, in torch 2.13, it fails
to where the optimizer has momentum).

What is measured is what is stored, for the same arithmetic is done twice. Should a device contract a product and a sum
in one of the two, an entry differs by a unit of its update, and a norm by a unit of ‖update‖ ≤ c + ‖w‖: far less than
the guard allows for. Weights in halves would be rounded in one and not in the other; they are left.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from projgd.axes import Vectors
from projgd.constraints import MaxNorm
from projgd.torch import ball


def project_(params: Sequence[Tensor], constraint: MaxNorm) -> list[Tensor]:
    """Project the float32 ones of `params`. Returns those that are left."""
    taken, left = [], []
    for p in params:
        vectors = constraint.resolve(tuple(p.shape), "out_first")
        if vectors is None:  # nothing of it is projected
            continue
        fit = ball.takes(p) and p.dtype == torch.float32 and p.device.type in ("cpu", "cuda")
        if fit and vectors.axes and p.numel():
            taken.append((p.reshape(vectors.shape), vectors))
        else:
            left.append(p)
    for _, group in itertools.groupby(sorted(taken, key=lambda t: str(t[0].device)), key=lambda t: t[0].device):
        _project(list(group), constraint.c)
    return left


def _project(balls: list[tuple[Tensor, Vectors]], c: float) -> None:
    norms = [torch.linalg.vector_norm(x, dim=v.axes, keepdim=True, dtype=torch.float64) for x, v in balls]
    counts = [n.numel() for n in norms]
    # A product of a tensor is all that torch.compile takes a moving float for; others it compiles in.
    moving = torch.ones((), dtype=torch.float64, device="cpu") * c
    factors = _factors(torch.cat([n.reshape(-1) for n in norms]), counts, [v.length for _, v in balls], moving)
    for (x, _), n, factor in zip(balls, norms, factors.split_with_sizes(counts), strict=True):
        x.mul_(factor.reshape(n.shape))


@torch.library.custom_op("projgd::ball_factors", mutates_args=())
def _factors(norms: Tensor, counts: list[int], lengths: list[int], c: Tensor) -> Tensor:
    """What vectors with these norms are multiplied by, `counts` of them of each length; 1 for those left alone."""
    factors, start = torch.empty_like(norms), 0
    limits = [ball.ball_limits(torch.float32, Vectors((1, n), (1,)), c.item()) for n in lengths]
    for one, run in itertools.groupby(zip(limits, counts, strict=True), key=lambda pair: pair[0]):
        part = slice(start, start := start + sum(count for _, count in run))
        factors[part] = ball.factors(norms[part], one)
    return factors


@_factors.register_fake
def _(norms: Tensor, counts: list[int], lengths: list[int], c: Tensor) -> Tensor:
    return torch.empty_like(norms)
