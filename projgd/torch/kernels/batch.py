"""Tensors that one kernel call takes, those of one dtype on one device: their memory, and which norms are too long."""

from __future__ import annotations

import abc
import importlib
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from projgd import projections
from projgd.axes import Axis, Vectors
from projgd.constraints import MaxNorm
from projgd.torch import path
from projgd.torch.kernels import plan
from projgd.torch.kernels.rules import Rule
from projgd.torch.metrics import OfStep
from projgd.torch.path import Memory

NO_COUNTERS, NO_FACTORS = np.empty(0, np.int64), np.empty((0, 2))


class Batch(abc.ABC):
    """Tensors of one dtype on one device, known by the shape of their memory alone."""

    lasting = True  # False where it may be used only while a graph is being captured

    def __init__(self, memory: Sequence[Memory], vectors: Sequence[Vectors | None]) -> None:
        """For tensors that `path.of_memory` lets through; with `vectors` None a tensor is free."""
        _, self.device, self.dtype, *_ = memory[0]
        found = [plan.layout_of(shape, stride, v) for (*_, shape, stride), v in zip(memory, vectors, strict=True)]
        self.layouts = [layout for layout in found if layout is not None]  # all of them: see `path.of_memory`
        self.free = [v is None for v in vectors]
        self._kinds = list(dict.fromkeys(vectors))
        self._kind = np.array([self._kinds.index(v) for v in vectors])
        # Threshold, infinite where a tensor is free; target; whether the tensor is left to the reference.
        self.limits = np.full((len(vectors), 3), np.inf)
        self.limits[:, 2] = 0
        self._c: float | None = None

    @abc.abstractmethod
    def run(
        self,
        c: Any,
        table: npt.NDArray[np.int64],
        rule: Rule | None = None,
        counters: npt.NDArray[np.int64] = NO_COUNTERS,
        factors: npt.NDArray[np.float64] = NO_FACTORS,
        eps: float | None = None,
    ) -> list[int]:
        """Update by `rule`, and project onto the ball of radius c.

        Args:
            c: None where all tensors are free.
            table: (operands, tensors), addresses of parameter, gradient and three states; without an update of the
                parameter alone; in a metric last of what it is made of.
            rule: None for no update.
            counters: (tensors,), addresses of Adam's step counts.
            factors: (tensors, 2), 1 in the first column where the momentum of SGD starts.
            eps: for the metric √v / root + ε, the root being the second factor; None for the Euclidean one.

        Returns:
            The tensors that are left to the reference.
        """

    def limit(self, c: Any) -> None:
        """Bring `limits` up to date with c."""
        if c is None or c == self._c:
            return
        bands = np.array([[np.inf, np.inf, 0.0]] * len(self._kinds))
        number = projections.FLOATS[str(self.dtype).removeprefix("torch.")]
        for i, vectors in enumerate(self._kinds):
            if vectors is not None:
                limits = projections.ball_limits(number, vectors.shape, vectors.axes, float(c), np)
                bands[i] = (np.inf, np.inf, 1.0) if limits.fill else (limits.threshold, limits.target, 0.0)
        self.limits[:] = bands[self._kind]
        self._c = float(c)


def batch(memory: Sequence[Memory], vectors: Sequence[Vectors | None]) -> Batch:
    """The `Batch` for the device that these tensors are on."""
    made: Batch = importlib.import_module(path.MACHINES[memory[0][1].type].module).Batch(memory, vectors)
    return made


def project(params: Sequence[Tensor], constraint: MaxNorm, metric: OfStep | None = None) -> list[Tensor]:
    """Project in place what the kernels can take. Returns the parameters that are left."""
    roots = [None if metric is None else metric.root(p) for p in params]
    fits = [metric is None or (r is not None and path.alike(r.v, p)) for r, p in zip(roots, params, strict=True)]
    left = [p for p, fit in zip(params, fits, strict=True) if not fit]
    params, roots = list(itertools.compress(params, fits)), list(itertools.compress(roots, fits))
    batches, rest = _batches(tuple(map(path.memory, params)), constraint.axis, metric is not None)
    left += [params[i] for i in rest]
    for places, known in batches:
        mine, theirs = [params[i] for i in places], [root for i in places if (root := roots[i]) is not None]
        table = np.array([[t.data_ptr() for t in tensors] for tensors in (mine, [r.v for r in theirs]) if tensors])
        factors = np.array([(0.0, float(r.by)) for r in theirs]).reshape(-1, 2)
        eps = float(theirs[0].eps) if theirs else None
        left += [mine[i] for i in known.run(constraint.c, table, factors=factors, eps=eps)]
        torch.autograd.graph.increment_version(mine)
    return left


Batches = tuple[list[tuple[list[int], Batch]], list[int]]
_known: dict[tuple[tuple[Memory, ...], Axis, bool], Batches] = {}


def _batches(memory: tuple[Memory, ...], axis: Axis, in_metric: bool) -> Batches:
    """What of these parameters goes into which batch, and what into none. The last 16 answers are remembered."""
    if (memory, axis, in_metric) in _known:
        return _known[memory, axis, in_metric]
    constraint = MaxNorm(1.0, axis)
    vectors = [constraint.resolve(shape, "out_first") for *_, shape, _ in memory]
    taken: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    rest = []
    for i, (m, v) in enumerate(zip(memory, vectors, strict=True)):
        if v is None:
            continue
        if path.of_memory(m, v, in_metric):
            taken.setdefault(m[1:3], []).append(i)
        else:
            rest.append(i)
    made = [(places, batch([memory[i] for i in places], [vectors[i] for i in places])) for places in taken.values()]
    if all(b.lasting for _, b in made):
        if len(_known) >= 16:
            _known.pop(next(iter(_known)), None)
        _known[memory, axis, in_metric] = made, rest
    return made, rest
