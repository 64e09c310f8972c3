"""What the numba kernels take in one call, and on how many threads."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np
import numpy.typing as npt
import torch

from projgd.axes import Vectors
from projgd.torch.kernels import batch, cpu, plan
from projgd.torch.kernels.batch import NO_COUNTERS, NO_FACTORS
from projgd.torch.kernels.rules import Rule
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
_launch = threading.Lock()  # a batch has one room for sums, and numba's simplest thread pool cannot be entered twice
_ready: set[tuple[torch.dtype, type, bool]] = set()


class Batch(batch.Batch):
    """Tensors of one dtype, known by the shape of their memory alone."""

    def __init__(self, memory: Sequence[Memory], vectors: Sequence[Vectors | None]) -> None:
        super().__init__(memory, vectors)
        self._tiles, left = plan.tiles(self.layouts, self.free)
        self._left = np.empty(left)
        self._sizes = np.array(self.layouts, dtype=np.int64).reshape(-1, 4)
        self._entries = sum(math.prod(layout) for layout in self.layouts)
        self._ranges: dict[int, npt.NDArray[np.int64]] = {}  # by the number of threads

    def run(
        self,
        c: Any,
        table: npt.NDArray[np.int64],
        rule: Rule | None = None,
        counters: npt.NDArray[np.int64] = NO_COUNTERS,
        factors: npt.NDArray[np.float64] = NO_FACTORS,
        eps: float | None = None,
    ) -> list[int]:
        """See `batch.Batch.run` and `cpu.step`. Left are tensors in which something over- or underflowed."""
        threads = min(torch.get_num_threads(), MOST_THREADS, 1 + self._entries // SHARE)
        before = numba.get_num_threads()
        with _launch:
            self.limit(c)
            if threads not in self._ranges:
                self._ranges[threads] = plan.ranges(self._tiles, threads)
            operands = rule, eps, LIKE[self.dtype], table, counters, factors
            variant = self.dtype, type(rule), eps is None
            walk = self._sizes, self._tiles, self._ranges[threads], self.limits, self._left
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
            left: list[int] = np.flatnonzero(self.limits[:, 2]).tolist()
            self.limits[:, 2] = 0
            return left


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
