"""Tables with sparse gradients, such as an embedding's: only rows that the step moved can have left the set.

So the cost follows the rows that a batch touches, not the height of the table. That holds while the other rows are
known to lie in the set: after a first projection of the whole table, and until its constraint changes or somebody else
writes to it, which shows in the tensor's version.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from projgd.axes import Vectors
from projgd.constraints import Constraint

MOVES_ROWS = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam)
"""Optimizers that move only the rows of sparse gradients, and of a sparse momentum buffer."""


class MovedRows:
    """Which rows of its tables an optimizer has moved in its last step.

    Args:
        optimizer: whose state is read.
        cls: its class, without the projection.
    """

    def __init__(self, optimizer: Optimizer, cls: type[Optimizer]) -> None:
        self._optimizer = optimizer
        self._known = next(base for base in cls.__mro__ if "step" in vars(base)) in MOVES_ROWS
        # from a table to its version and constraint when it was projected
        self._inside: MutableMapping[torch.Tensor, tuple[int, Constraint | None]] = WeakIdKeyDictionary()

    def before_step(self) -> None:
        """Forget the tables that have been written to since they were projected."""
        for p, (version, _) in list(self._inside.items()):
            if p._version != version:
                del self._inside[p]

    def of(self, p: torch.Tensor, constraint: Constraint) -> torch.Tensor | None:
        """The rows of `p` that may lie outside, some perhaps twice; None for all."""
        if not self._known or p.grad is None or not p.grad.is_sparse:
            return None
        vectors = constraint.resolve(tuple(p.shape), "out_first")
        if vectors is None or not _by_rows(p, vectors) or self._inside.get(p, (0, None))[1] != constraint:
            return None
        moved = p.grad._indices()[0]
        momentum = self._optimizer.state.get(p, {}).get("momentum_buffer")
        if momentum is None:
            return moved
        return torch.cat([moved, momentum._indices()[0]]) if momentum.is_sparse else None

    def projected(self, p: torch.Tensor, constraint: Constraint) -> None:
        """Note that all of `p` lies in the set now."""
        if self._known and p.grad is not None and p.grad.is_sparse:
            self._inside[p] = (p._version, constraint)


def _by_rows(p: torch.Tensor, vectors: Vectors) -> bool:
    return vectors.shape == tuple(p.shape) and 0 not in vectors.axes
