"""The projection onto the ball in a diagonal metric, in place on a CPU, by operations of PyTorch: where no kernel can.

The rows outside, a few in cache at a time.

What `projgd.metrics.project_ball` says, with the same target. The secular equation is solved in units where c = 1 and
max D = 1, from λ = max(0, ‖Dy‖ - 1, max(D|y| - D)), which is left of the root; Newton's iteration then only climbs. A
chunk of rows in which that could over- or underflow goes to the reference.
"""

from __future__ import annotations

import array_api_compat.torch as xp
import torch
from torch import Tensor

from projgd import metrics
from projgd.axes import Vectors
from projgd.torch import ball
from projgd.torch.metrics import Metric

CHUNK = 30_000
"""Entries worked on at a time: in a core's second-level cache with the temporaries, and too few for torch to spread."""

_norm = torch.linalg.vector_norm


def project_ball_(p: Tensor, c: float, vectors: Vectors, metric: Metric) -> bool:
    """Project every row of `p` that is longer than `c`; whether that could be done here."""
    first = len(vectors.shape) - len(vectors.axes)
    plain = p.device.type == "cpu" and p.is_contiguous() and p.numel() and p.dtype != torch.float64
    if torch.compiler.is_compiling() or not plain or vectors.axes != tuple(range(first, len(vectors.shape))):
        return False
    limits = ball.ball_limits(p.dtype, vectors, c)
    if limits.fill or not 2.0**-40 <= c <= 2.0**60:
        return False
    rows = p.view(-1, vectors.length)
    norms = ball.norms(rows.float(), (1,)).flatten()
    largest = norms.max().item()
    if largest <= limits.threshold:
        return True
    if not largest < 2.0**10 * c:  # NaN and inf, too
        return False
    outside = (norms > limits.threshold).nonzero().flatten()
    for some in outside.split(max(1, CHUNK // vectors.length)):
        y = rows.index_select(0, some)
        d = metric(p, lambda t, some=some: t.reshape(rows.shape).index_select(0, some))  # type: ignore[misc]
        stored = y
        if d is not None:
            solved = _solve(y.float(), d.float(), limits.target)
            stored = metrics.project_ball(y, d, c, (1,), xp) if solved is None else solved.to(p.dtype)
        ball.project_ball_(stored, c, Vectors(tuple(stored.shape), (1,)))
        rows.index_copy_(0, some, stored)
    return True


def _solve(y: Tensor, d: Tensor, radius: float) -> Tensor | None:
    """The rows of norm `radius` nearest to y in the metric d; None where it needs the reference. Uses `d` up."""
    d = d / d.amax(1, keepdim=True)
    if not d.amin().item() >= 2.0**-80:  # a NaN, too
        return None
    close = 1 - ball.ball_limits(torch.float32, Vectors(tuple(y.shape), (1,)), 1.0).threshold
    u = torch.mul(y, d).div_(radius)
    low = torch.sub(u.abs(), d).amax(1, keepdim=True)
    high = _norm(u, dim=1, keepdim=True)
    nu = torch.maximum(low, high - 1).clamp_(min=0)
    h, inverse = torch.empty_like(u), torch.empty_like(u)
    for _ in range(metrics.STEPS):
        torch.add(d, nu, out=inverse).reciprocal_()
        torch.mul(u, inverse, out=h)
        norm = _norm(h, dim=1, keepdim=True)
        excess = norm - 1
        slope = torch.linalg.vecdot(h, inverse.mul_(h)).unsqueeze(1)
        nu = torch.clamp(nu + excess * norm.square() / slope, min=torch.zeros_like(nu), max=high)
        if float(excess.abs().max()) <= close:
            break
    return torch.div(u, d.add_(nu), out=h).mul_(radius)
