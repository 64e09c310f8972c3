"""Tensors that one kernel call takes: how their memory is walked, which norms are too long, on how many threads."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from projgd import projections
from projgd.axes import Axis, Vectors
from projgd.constraints import MaxNorm
from projgd.torch import path
from projgd.torch.kernels import cpu, plan
from projgd.torch.kernels.rules import Rule
from projgd.torch.metrics import OfStep
from projgd.torch.path import Memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LIKE = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),  # numba has no bfloat16
}
SHARE = 1 << 17  # entries that are worth another thread
MOST_THREADS: int = cast("Any", numba.config).NUMBA_NUM_THREADS
NO_COUNTERS, NO_FACTORS = np.empty(0, np.int64), np.empty((0, 2))
_launch = threading.Lock()  # a batch has one room for sums, and numba's simplest thread pool cannot be entered twice
_ready: set[tuple[torch.dtype, type, bool]] = set()


@dataclass
class Batch:
    """Tensors of one dtype, known by the shape of their memory alone."""

    dtype: torch.dtype
    entries: int
    kinds: list[Vectors | None]  # that occur; None leaves a tensor free
    kind: npt.NDArray[np.intp]  # of each tensor
    layouts: npt.NDArray[np.int64]
    tiles: npt.NDArray[np.int64]
    left: npt.NDArray[np.float64]
    limits: npt.NDArray[np.float64]
    c: float | None = None  # that the limits are for
    ranges: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict)  # by the number of threads

    def run(
        self,
        c: Any,
        table: npt.NDArray[np.int64],
        rule: Rule | None = None,
        eps: float | None = None,
        counters: npt.NDArray[np.int64] = NO_COUNTERS,
        factors: npt.NDArray[np.float64] = NO_FACTORS,
    ) -> list[int]:
        """Update by `rule` and project onto the ball of radius c, in a metric if `eps` is given; see `cpu.step`.

        Returns the tensors that are left to the reference, for something overflowed.
        """
        threads = min(torch.get_num_threads(), MOST_THREADS, 1 + self.entries // SHARE)
        before = numba.get_num_threads()
        with _launch:
            if c is not None and c != self.c:
                self._limit(float(c))
            if threads not in self.ranges:
                self.ranges[threads] = plan.ranges(self.tiles, threads)
            operands = rule, eps, LIKE[self.dtype], table, counters, factors
            variant = self.dtype, type(rule), eps is None
            walk = self.layouts, self.tiles, self.ranges[threads], self.limits, self.left
            if threads != before:
                numba.set_num_threads(threads)
            try:
                if variant in _ready:
                    cpu.run(*operands, *walk)
                else:
                    with _alone():
                        cpu.run(*operands, *walk)
                    _ready.add(variant)
            finally:
                if threads != before:
                    numba.set_num_threads(before)
            if self.dtype != torch.float64 and eps is None:
                return []
            overflowed: list[int] = np.flatnonzero(self.limits[:, 2]).tolist()
            self.limits[:, 2] = 0
            return overflowed

    def _limit(self, c: float) -> None:
        """The guard bands of c."""
        bands = np.full((len(self.kinds), 2), np.inf)
        number = projections.FLOATS[str(self.dtype).removeprefix("torch.")]
        for i, vectors in enumerate(self.kinds):
            if vectors is not None:
                limits = projections.ball_limits(number, vectors.shape, vectors.axes, c, np)
                bands[i] = limits.threshold, limits.target
        self.limits[:, :2] = bands[self.kind]
        self.c = c


def batch(dtype: torch.dtype, memory: Sequence[Memory], vectors: Sequence[Vectors | None]) -> Batch:
    """The batch of tensors with this memory, all of this dtype, that `path.of_memory` lets through."""
    found = [plan.layout_of(shape, stride, v) for (*_, shape, stride), v in zip(memory, vectors, strict=True)]
    layouts = [layout for layout in found if layout is not None]  # all of them: see `path.of_memory`
    tiles, left = plan.tiles(layouts, [v is None for v in vectors])
    kinds = list(dict.fromkeys(vectors))
    limits = np.full((len(vectors), 3), np.inf)
    limits[:, 2] = 0
    return Batch(
        dtype=dtype,
        entries=sum(math.prod(layout) for layout in layouts),
        kinds=kinds,
        kind=np.array([kinds.index(v) for v in vectors]),
        layouts=np.array(layouts, dtype=np.int64).reshape(-1, 4),
        tiles=tiles,
        left=np.empty(left),
        limits=limits,
    )


def project(params: Sequence[Tensor], constraint: MaxNorm, metric: OfStep | None = None) -> list[Tensor]:
    """Project in place what the kernel can take. Returns the parameters that are left."""
    roots = [None if metric is None else metric.root(p) for p in params]
    fits = [metric is None or (r is not None and path.alike(r.v, p)) for r, p in zip(roots, params, strict=True)]
    left = [p for p, fit in zip(params, fits, strict=True) if not fit]
    params, roots = list(itertools.compress(params, fits)), list(itertools.compress(roots, fits))
    batches, rest = _batches(tuple(map(path.memory, params)), constraint.axis, metric is not None)
    left += [params[i] for i in rest]
    for places, known in batches:
        mine, theirs = [params[i] for i in places], [root for i in places if (root := roots[i]) is not None]
        table = np.array(
            [[t.data_ptr() for t in tensors] for tensors in (mine, [root.v for root in theirs]) if tensors]
        )
        factors = np.array([(0.0, float(root.by)) for root in theirs]).reshape(-1, 2)
        eps = float(theirs[0].eps) if theirs else None
        left += [mine[i] for i in known.run(constraint.c, table, None, eps, NO_COUNTERS, factors)]
        torch.autograd.graph.increment_version(mine)
    return left


@functools.lru_cache(maxsize=16)
def _batches(
    memory: tuple[Memory, ...], axis: Axis, in_metric: bool
) -> tuple[list[tuple[list[int], Batch]], list[int]]:
    """What of these parameters goes into which batch, and what into none."""
    constraint = MaxNorm(1.0, axis)
    vectors = [constraint.resolve(shape, "out_first") for *_, shape, _ in memory]
    taken: dict[torch.dtype, list[int]] = {}
    rest = []
    for i, (m, v) in enumerate(zip(memory, vectors, strict=True)):
        if v is None:
            continue
        if path.of_memory(m, v, in_metric):
            taken.setdefault(m[2], []).append(i)
        else:
            rest.append(i)
    return [
        (places, batch(dtype, [memory[i] for i in places], [vectors[i] for i in places]))
        for dtype, places in taken.items()
    ], rest


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process at a time compiles, and the others find the result: numba's index is not made for several writers."""
    directory = cpu.run.stats.cache_path
    if fcntl is None or directory is None:
        yield
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    with (Path(directory) / "projgd.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file releases the lock
