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
_ready: set[tuple[Any, tuple[Any, ...]]] = set()  # kernels that are compiled, and for what


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
        threads = threads_for(self._entries)
        with launching(threads, cpu.run, (self.dtype, type(rule), eps is None)):
            self.limit(c)
            if threads not in self._ranges:
                self._ranges[threads] = plan.ranges(self._tiles, threads)
            operands = rule, eps, LIKE[self.dtype], table, counters, factors
            cpu.run(*operands, self._sizes, self._tiles, self._ranges[threads], self.limits, self._left)
            if self.dtype != torch.float64 and eps is None:
                return []
            left: list[int] = np.flatnonzero(self.limits[:, 2]).tolist()
            self.limits[:, 2] = 0
            return left


def threads_for(entries: int) -> int:
    """How many threads so many entries are worth, of those that torch may use."""
    return min(torch.get_num_threads(), MOST_THREADS, 1 + entries // SHARE)


def launching(threads: int, kernel: Any, variant: tuple[Any, ...]) -> contextlib.AbstractContextManager[Any]:
    """Alone in this process, on so many threads; alone on this machine where the kernel may have to be compiled."""
    as_it_is = threads == MOST_THREADS and (kernel, variant) in _ready
    return _launch if as_it_is else _prepared(threads, kernel, variant)


@contextlib.contextmanager
def _prepared(threads: int, kernel: Any, variant: tuple[Any, ...]) -> Iterator[None]:
    of_torch = torch.get_num_threads()
    before = numba.get_num_threads()
    if torch.get_num_threads() != of_torch:  # numba started its threads, and told the OpenMP that both use how many
        torch.set_num_threads(of_torch)
    with _launch, contextlib.nullcontext() if (kernel, variant) in _ready else _alone():
        numba.set_num_threads(min(threads, before))
        try:
            yield
            _ready.add((kernel, variant))
        finally:
            numba.set_num_threads(before)


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
