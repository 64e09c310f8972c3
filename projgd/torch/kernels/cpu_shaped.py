"""A shaped step on a CPU: the kernel measures, `projgd.updates` says what follows, the kernel moves.

The update is never stored: the second pass reads it off the states again, of the tensors of a round in reverse, so that
it begins with what is still in cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from projgd import projections, updates
from projgd.axes import Vectors
from projgd.torch.kernels import cpu, cpu_batch, plan
from projgd.torch.kernels.batch import NO_COUNTERS
from projgd.torch.kernels.rules import Rule
from projgd.torch.path import Memory
from projgd.updates import Update

ROUND = 1 << 22  # entries: with less to do, starting threads costs more than the cache gives
LARGEST = float(np.finfo(np.float32).max)


class Shaped:
    """Contiguous float32 tensors with the same shaping, known by the shape of their memory alone."""

    lasting = True

    def __init__(
        self, memory: Sequence[Memory], vectors: Sequence[Vectors], radii: Sequence[npt.ArrayLike] | None
    ) -> None:
        """For tensors that `path.of_step` lets through; `radii` of the spheres to land on, None for no sphere."""
        _, _, self.dtype, *_ = memory[0]
        layouts = [plan.layout_of(shape, stride, v) for (*_, shape, stride), v in zip(memory, vectors, strict=True)]
        self._sizes = np.array(layouts, dtype=np.int64).reshape(-1, 4)
        self._tiles, _ = plan.tiles([x for x in layouts if x is not None], [False] * len(layouts))
        tensor, k0, k1, k1_end = (self._tiles[:, i] for i in (cpu.TENSOR, cpu.K0, cpu.K1_FROM, cpu.K1_TO))
        counts = self._sizes[:, 0] * self._sizes[:, 2]
        begins = np.concatenate([[0], np.cumsum(counts)])  # of the vectors of a tensor
        slots = np.concatenate([[0], np.cumsum(k1_end - k1)])  # of the sums of a tile
        first = begins[tensor] + k0 * self._sizes[tensor, 2] + k1
        self._places = np.stack([slots[:-1], first], axis=1)
        self._vector = np.repeat(first - slots[:-1], k1_end - k1) + np.arange(slots[-1])
        self._sums, self._weights = np.empty((slots[-1], 3)), np.empty((begins[-1], 2))
        self._sphere: npt.NDArray[np.float64] | None = None  # radius and band of every vector
        if radii is not None:
            kind = projections.FLOATS["float32"]
            each = [np.full(n, np.ravel(r), dtype=float) for r, n in zip(radii, counts, strict=True)]
            bands = [
                projections.sphere_band(kind, v.shape, v.axes, r, moved=True)
                for v, r in zip(vectors, each, strict=True)
            ]
            self._sphere = np.stack([np.concatenate(each), np.concatenate(bands)])
        entries = np.prod(self._sizes, axis=1)
        self._entries = int(entries.sum())
        self._rounds = [np.searchsorted(tensor, ends).tolist() for ends in _rounds(entries.tolist())]
        self._ranges: dict[int, list[npt.NDArray[np.int64]]] = {}  # by the number of threads

    def run(
        self,
        update: Update,
        table: npt.NDArray[np.int64],
        rule: Rule,
        counters: npt.NDArray[np.int64],
        factors: npt.NDArray[np.float64],
    ) -> None:
        """One step by `rule`, shaped by `update`, landed on the spheres. See `cpu.shape` for the tables."""
        threads = cpu_batch.threads_for(self._entries)
        if threads not in self._ranges:
            self._ranges[threads] = [plan.ranges(self._tiles[a:b], threads) + a for a, b in self._rounds]
        with cpu_batch.launching(threads, cpu.run_shaped, (self.dtype, type(rule))), np.errstate(all="ignore"):
            for (begin, end), ranges in zip(self._rounds, self._ranges[threads], strict=True):
                walk = factors, self._sizes, self._tiles, ranges, self._places, self._sums, self._weights
                like = cpu_batch.LIKE[self.dtype]
                cpu.run_shaped(rule, False, like, table, counters, *walk)
                counters = NO_COUNTERS
                self._decide(update, rule.lr, begin, end)
                cpu.run_shaped(rule, True, like, table, counters, *walk)

    def _decide(self, update: Update, lr: float, begin: int, end: int) -> None:
        """From the sums of these tiles to the weights of their vectors."""
        slots = slice(self._places[begin, 0], self._places[end, 0] if end < len(self._places) else None)
        first = self._places[begin, 1]
        index = self._vector[slots] - first
        ww, uu, wu = (np.bincount(index, sums) for sums in self._sums[slots].T)
        m, mine = projections.measures(ww, uu, wu, np), slice(first, first + len(ww))
        share, push = update.numbers(m, lr, np)
        if self._sphere is not None:
            radius, band = self._sphere[:, mine]
            share, push = updates.landed(share, push, m, radius, band, np)
        self._weights[mine, 0], self._weights[mine, 1] = share, np.minimum(push, LARGEST)


def _rounds(entries: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of tensors, as long as they have at most `ROUND` entries together."""
    cuts, size = [0], 0
    for k, n in enumerate(entries):
        if size and size + n > ROUND:
            cuts.append(k)
            size = 0
        size += n
    cuts.append(len(entries))
    return list(itertools.pairwise(cuts))
