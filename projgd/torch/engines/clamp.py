"""Clamp entries to intervals, in place.

One number for all entries goes to `torch.clamp_`. Arrays of bounds are compared in pieces that stay in a cache, so that
no second array of the size of a large parameter is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from projgd.entries import EntrySet
from projgd.projections import project_interval
from projgd.torch.engines.base import PLAIN, Engine, Job, project_by_reference

PIECE = 2**17
"""This many entries, with their bounds, stay in a cache."""


class Clamp(Engine):
    """Project onto sets of entries; every diagonal metric has the same nearest point."""

    name = "clamp"

    def refuses(self, job: Job, p: Tensor) -> str | None:
        if not isinstance(job.constraint, EntrySet):
            return f"{job.constraint} is not a set of entries" if job.forced == self.name else ""
        if job.compiled or torch.is_grad_enabled():
            return "a graph follows the projection"
        return None if type(p) in PLAIN else f"the parameter is a {type(p).__name__}"

    def run(self, prepared: None, job: Job, params: Sequence[Tensor]) -> None:
        for p in params:
            vectors, constraint = job.vectors(p), job.bound(p)
            assert vectors is not None
            assert isinstance(constraint, EntrySet)
            if job.skip is not None and p.device.type != "cpu":  # the flag stays on the device
                project_by_reference(p, job)
            elif p in job.radii and vectors.shape == tuple(p.shape) and p.ndim:
                kept = job.radii[p].reshape([1 if a in vectors.axes else n for a, n in enumerate(p.shape)])
                for rows, some in _pieces(p, kept):
                    part = constraint.bind(some)
                    assert isinstance(part, EntrySet)
                    rows.copy_(project_interval(rows, *part.interval(rows, vectors.axes, xp), xp))
            else:
                x = p.reshape(vectors.shape)
                least, most = constraint.interval(x, vectors.axes, xp)
                if isinstance(least, float) and isinstance(most, float):
                    p.clamp_(None if least == -math.inf else least, None if most == math.inf else most)
                elif vectors.shape == tuple(p.shape) and p.ndim:
                    for rows, low, high in _pieces(p, least, most):
                        rows.copy_(project_interval(rows, low, high, xp))
                else:
                    p.copy_(project_interval(x, least, most, xp).reshape(p.shape))


def _pieces(p: Tensor, *others: Tensor | float) -> list[tuple[Any, ...]]:
    """Return rows of a parameter, some at a time, with the rows of what broadcasts against it."""
    height = max(1, PIECE * len(p) // max(1, p.numel()))

    def rows(t: Tensor | float, i: int) -> Any:
        return t[i : i + height] if isinstance(t, Tensor) and t.ndim == p.ndim and len(t) > 1 else t

    return [(p[i : i + height], *(rows(t, i) for t in others)) for i in range(0, len(p), height)]
