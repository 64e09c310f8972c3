"""Project in a diagonal metric on a CPU with plain operations: only the rows outside, a few in a cache at a time.

The result is that of `projgd.metrics.project_band`. The secular equation is solved in units where the new norm is 1 and
max D is 1. Newton's iteration starts from λ = 0, which is left of the root for a row that is too long, so it only
climbs. The reference projects rows for which that could over- or underflow.
"""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat.torch as xp
import torch
from torch import Tensor

from projgd import metrics
from projgd.bands import Band
from projgd.torch.engines.base import PLAIN, Engine, Job, rows_in_memory
from projgd.torch.engines.eager import norms

CHUNK = 1 << 18
"""Entries worked on at a time: in a cache with the temporaries."""

SMALLEST = 2.0**-50
"""D from this to its inverse: no power that is summed here over- or underflows."""

CLOSE = 2.0**-19
"""Norms this near to 1 are scaled to it; what is left of the optimality condition is as small."""

_norm = torch.linalg.vector_norm


class Diagonal(Engine):
    """Project rows in the metric of the optimizer."""

    name = "diagonal"

    def refuses(self, job: Job, p: Tensor) -> str | None:
        if job.metric is None:
            return 'it projects in a metric: pass metric="adaptive"' if job.forced == self.name else ""
        if job.compiled or torch.is_grad_enabled():
            return "a graph follows the projection"
        if type(p) not in PLAIN or p.device.type != "cpu" or p.dtype == torch.float64:
            return "it takes tensors on a CPU in float32 and shorter types"
        vectors, band = job.vectors(p), job.band(p)
        if band is None or vectors is None:
            return f"{job.constraint} is not a set of norms"
        if not vectors.axes or not p.is_contiguous() or rows_in_memory(p, vectors) is None:
            return "its vectors are not rows of contiguous memory"
        known = band.filled is None and band.pull == 1 and isinstance(band.down, float)
        if not known or not (isinstance(band.low, float) and band.low == 0) or not 2.0**-40 <= band.down <= 2.0**60:
            return "it takes sets of norms up to a bound of usual size"
        return None

    def run(self, prepared: None, job: Job, params: Sequence[Tensor]) -> None:
        for p in params:
            vectors, band = job.vectors(p), job.band(p)
            assert vectors is not None
            assert band is not None
            _project_rows(p, p.view(-1, vectors.length), band, job)


def _project_rows(p: Tensor, rows: Tensor, band: Band, job: Job) -> None:
    found = norms(rows.float(), (1,), shortest=0.0).flatten()
    outside = ((found > band.high) & (found < torch.inf)).nonzero().flatten()
    if not outside.numel() or job.metric is None:
        return
    for some in outside.split(max(1, CHUNK // rows.shape[1])):
        y = rows.index_select(0, some)
        d = job.metric(p, lambda t, some=some: t.reshape(rows.shape).index_select(0, some))  # type: ignore[misc]
        near = found[some]
        if d is None:
            stored = (y.float() * (band.down / near).float().unsqueeze(1)).to(y.dtype)
        elif near.max().item() < 2.0**10 * band.down and (solved := _solve(y, d, near, band)) is not None:
            stored = solved
        else:
            stored = metrics.project_band(y, d, band, (1,), xp)
        rows.index_copy_(0, some, stored)


def _solve(y: Tensor, d: Tensor, near: Tensor, band: Band) -> Tensor | None:
    """Return the rows nearest to y in the metric d whose norm is `band.down`; None if only the reference can find them.

    x(λ) = y D / (D + λ) has the moments m_k = Σ x² / (D + λ)^k. Newton's step on 1/‖x(λ)‖ = 1 is (‖x‖ - 1) m_0 / m_1.
    One more term of the series makes a second step rare.

    Args:
        y: (rows, length), rows whose norms `near` are above the new one.
        d: the diagonal, of the shape of y.
        near: float64 norms of y.
        band: the band; its `down` is the new norm.
    """
    least, most = d.aminmax()
    if not (least.item() >= SMALLEST and most.item() <= 1 / SMALLEST):  # `not` makes a NaN return, too
        return None
    d = d.float()
    x: Tensor = y.float() / band.down
    u, below = x * d, d
    size = (near / band.down).float().unsqueeze(1)
    nu = torch.zeros_like(size)
    memory = torch.empty_like(x)
    for _ in range(metrics.STEPS):
        t = torch.div(x, below, out=memory)
        first = torch.linalg.vecdot(t, x).unsqueeze(1)
        second = _norm(t, dim=1, keepdim=True).square_()
        square, excess = size.square(), size - 1
        bend = 1.5 * excess * (square * second / first.square() - 1)
        nu = nu + excess * square / first * (1 + torch.where(bend.abs() < 0.3, bend, 0.0))
        below = torch.add(d, nu.clamp_(min=0), out=memory)
        torch.div(u, below, out=x)
        size = _norm(x, dim=1, keepdim=True)
        if float((size - 1).abs().max()) <= CLOSE:
            return x.mul_(band.down / norms(x, (1,)).float()).to(y.dtype)
        below = memory.clone()
    return None
