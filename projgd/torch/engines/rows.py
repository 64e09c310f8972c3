"""Project tables with sparse gradients, such as an embedding's: only rows that the step moved can have left the set.

So the cost depends on the rows that a batch touches, not on the height of the table. The other rows are known to be in
the set after a first projection of the whole table, until its constraint changes or other code writes to the table,
which shows in the tensor's version.
"""

from __future__ import annotations

import dataclasses
from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from projgd.constraints import Constraint
from projgd.torch.engines.base import Engine, Job, project_with
from projgd.torch.metrics import Pick

MOVES_ROWS = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam)
"""Optimizers that move only the rows of sparse gradients, and of a sparse momentum buffer."""


class Rows(Engine):
    """Project the rows of a sparse gradient.

    Args:
        within: the engines that may project these rows, best first.
    """

    name = "rows"

    def __init__(self, within: Sequence[Engine]) -> None:
        self._within = within

    def refuses(self, job: Job, p: Tensor) -> str | None:
        if job.compiled or p.grad is None or not p.grad.is_sparse:
            return ""
        stepped = next(base for base in job.inner.__mro__ if "step" in vars(base))
        if stepped not in MOVES_ROWS:
            return f"{job.inner.__name__} may move any row, not only those of a sparse gradient"
        if job.group.get("without_grad") or job.skip is not None or p in job.radii:
            return "the whole table is projected under GradScaler, without_grad=True and for initial norms"
        if id(p) in job.shared:
            return "the parameter shares memory with another one, which may move any row"
        vectors = job.vectors(p)
        if vectors is None or vectors.shape != tuple(p.shape) or 0 in vectors.axes:
            return "a vector does not lie in one row"
        return None

    def run(self, prepared: None, job: Job, params: Sequence[Tensor]) -> None:
        for p in params:
            moved = _moved_rows(p, job) if _inside.get(p, (0, None))[1] == job.constraint else None
            if moved is None:
                project_with(self._within, job, [p])
            else:
                x = p.index_select(0, moved)
                project_with(self._within, _for_rows(job, p, moved), [x])
                p.index_copy_(0, moved, x)  # a row that occurs twice has the same value twice
            band = job.band(p)
            if band is None or band.pull == 1:  # what is pulled is on its way, so the next step pulls it on
                _inside[p] = (p._version, job.constraint)


_inside: MutableMapping[Tensor, tuple[int, Constraint | None]] = WeakIdKeyDictionary()
"""The tables that are in a set, and their versions when they were projected."""


def forget_written_tables() -> None:
    """Forget, before a step, the tables that were written to since they were projected."""
    if not _inside:  # `items` takes 10 µs when it is not in the cache
        return
    for p, (version, _) in list(_inside.items()):
        if p._version != version:
            del _inside[p]


def _moved_rows(p: Tensor, job: Job) -> Tensor | None:
    """Return the rows that the step may have moved, some perhaps twice; None for all rows."""
    assert p.grad is not None
    moved = p.grad._indices()[0]
    momentum = job.optimizer.state.get(p, {}).get("momentum_buffer")
    if momentum is None:
        return moved
    return torch.cat([moved, momentum._indices()[0]]) if momentum.is_sparse else None


def _for_rows(job: Job, p: Tensor, moved: Tensor) -> Job:
    """Return the job for some rows of a table, with the metric of these rows."""
    metric = job.metric
    if metric is None:
        return job

    def of_rows(x: Tensor, pick: Pick | None = None) -> Tensor | None:
        diagonal = metric(p, lambda t: t.index_select(0, moved))
        return diagonal if diagonal is None or pick is None else pick(diagonal)

    return dataclasses.replace(job, metric=of_rows)
