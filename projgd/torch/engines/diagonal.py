"""The projection in a diagonal metric on a CPU by plain operations: only rows outside, a few in a cache at a time.

What `projgd.metrics.project_band` says, with the same new norm. The secular equation is solved in units where the new
norm is 1 and max D is 1, from λ = 0, which is left of the root for a row that is too long; Newton's iteration then only
climbs. Rows for which that could over- or underflow go to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat.torch as xp
import torch
from torch import Tensor

from projgd import metrics
from projgd.axes import Vectors
from projgd.bands import Band
from projgd.torch.engines.base import PLAIN, Engine, Job, rows_in_memory
from projgd.torch.engines.eager import norms

CHUNK = 1 << 17
"""Entries worked on at a time: in a cache with the temporaries."""

_norm = torch.linalg.vector_norm


class Diagonal(Engine):
    """Project rows in the metric of the optimizer."""

    name = "diagonal"

    def refuses(self, job: Job, p: Tensor) -> str | None:
        if job.metric is None:
            return ""
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
    found = norms(rows.float(), (1,)).flatten()
    if found.max().item() <= band.high or job.metric is None:
        return
    outside = ((found > band.high) & (found < torch.inf)).nonzero().flatten()
    for some in outside.split(max(1, CHUNK // rows.shape[1])):
        y = rows.index_select(0, some)
        d = job.metric(p, lambda t, some=some: t.reshape(rows.shape).index_select(0, some))  # type: ignore[misc]
        near = found[some]
        if d is None:
            stored = y * (band.down / near).to(y.dtype).unsqueeze(1)
        elif near.max().item() < 2.0**10 * band.down and (solved := _solve(y, d, near, band)) is not None:
            stored = solved
        else:
            stored = metrics.project_band(y, d, band, (1,), xp)
        rows.index_copy_(0, some, stored)


def _solve(y: Tensor, d: Tensor, near: Tensor, band: Band) -> Tensor | None:
    """Return the rows nearest to y in the metric d whose norm is `band.down`; None where it needs the reference.

    Args:
        y: (rows, length), rows whose norms `near` are above the new one.
        d: the diagonal, of the shape of y.
        near: float64 norms of y.
        band: its `down` is the new norm.
    """
    d = d.float() if d.dtype != torch.float32 else d
    most = d.amax(1, keepdim=True)
    if not (d.amin(1, keepdim=True) / most).amin().item() >= 2.0**-80:  # a NaN, too
        return None
    d = d.div_(most)
    x = y.float() / band.down
    u = x * d
    size = (near / band.down).float().unsqueeze(1)
    close = 1 - band.high / band.down if band.high > band.down else 2.0**-20
    nu, inverse, h = torch.zeros_like(size), torch.empty_like(u), x
    torch.reciprocal(d, out=inverse)
    for _ in range(metrics.STEPS):
        slope = torch.linalg.vecdot(h, inverse.mul_(h)).unsqueeze(1)
        step = (size - 1) * size.square() / slope
        nu = nu + step.clamp_(min=0)
        torch.add(d, nu, out=inverse).reciprocal_()
        h = torch.mul(u, inverse, out=h if h is not x else None)
        size = _norm(h, dim=1, keepdim=True)
        if float((size - 1).abs().max()) <= abs(close):
            break
    stored = h.mul_(band.down / norms(h, (1,)).float()).to(y.dtype)
    return stored


def _vectors(rows: Tensor) -> Vectors:
    return Vectors(tuple(rows.shape), (1,))
