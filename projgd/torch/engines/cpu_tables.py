"""Lay out the tables that the kernel of the engine `cpu` reads and writes, and run it.

Nothing is compiled here, so that the kernel need not be compiled anew if this file changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from projgd.sums import measures_of
from projgd.torch.engines.cpu_kernel import (
    COUNT,
    GRAD,
    LENGTH,
    PARAM,
    START,
    TENSOR,
    WEIGHTS,
    launch,
)
from projgd.updates import Update

Rows = Sequence[tuple[int, int, int, int]]
"""Where the vectors of each tensor lie, see `cut_tiles`."""

Table = Sequence[Sequence[float]]
Addresses = Sequence[Sequence[int]]

TILE = 1 << 14
"""Entries of a tile: with gradient and states they fit into the second-level cache."""

LONG = 1 << 15
"""Entries from which on a row is shared by several tiles."""

SHARE = 1 << 17
"""Entries that are worth another thread."""


class Tables:
    """Hold what the kernel reads and writes, for tensors that do not move in memory.

    Attributes:
        rates: see `step`.
        bands: see `step`.
        tiles: see `step`.
    """

    def __init__(self, addresses: Addresses, counters: Sequence[int], tensors: Rows, bands: Table) -> None:
        """Lay out the tables; `tensors` as in `cut_tiles`."""
        self._addresses, self._counters = np.array(addresses, dtype=np.int64), np.array(counters, dtype=np.int64)
        self.rates, self.bands = np.zeros((len(tensors), 2)), np.array(bands, dtype=np.float64).reshape(-1, 5)
        self.tiles = cut_tiles(tensors)
        self._sums, self._unsettled = np.zeros(len(self.tiles)), np.zeros(len(tensors), dtype=np.int64)
        self._most = 1 + sum(count * length for count, length, *_ in tensors) // SHARE  # more threads would slow it
        self._ranges: dict[int, Any] = {}  # the user may change the number of threads

    def run(
        self, grads: Sequence[int], sgd: Any, adam: Any, eps: float | None, observed: Any = None, moved: Any = None
    ) -> list[int]:
        """Run `step` with gradients at these addresses; return the tensors whose metric is out of range."""
        self._addresses[GRAD] = grads
        threads = min(torch.get_num_threads(), self._most)
        if threads not in self._ranges:
            self._ranges[threads] = deal_out(self.tiles, threads)
        arrays = self._addresses, self._counters, self.rates, self.bands, self._sums, self._unsettled
        launch(threads, (sgd, adam, observed, moved, eps, arrays, self.tiles, self._ranges[threads]))
        unsettled: list[int] = [] if eps is None else np.flatnonzero(self._unsettled).tolist()
        if unsettled:
            self._unsettled[:] = 0
        return unsettled


class ShapedTables:
    """Hold what the kernel reads and writes where it shapes the updates of some tensors, in two runs.

    Attributes:
        rates: see `step`.
        bands: see `step`; each vector has a row of its own.
    """

    def __init__(
        self, addresses: Addresses, counters: Sequence[int], tensors: Rows, bands: Table, update: Update
    ) -> None:
        """Lay out the tables.

        Args:
            addresses: those of the first run, see `step`.
            counters: see `step`.
            tensors: as in `cut_tiles`; a tensor whose update is not shaped has no bands.
            bands: see `step`, one for each vector.
            update: how updates are shaped.
        """
        self._update, self._spare = update, addresses[PARAM]
        self._first = Tables(addresses, counters, [(count, length, -1, 0) for count, length, *_ in tensors], [])
        shaped = [(count if band >= 0 else 0, length, band, step) for count, length, band, step in tensors]
        self._second = Tables([addresses[WEIGHTS], self._spare, *addresses[2:]], [], shaped, bands)
        self._second.rates, self.rates, self.bands = self._first.rates, self._first.rates, self._second.bands
        which, starts, counts = self._first.tiles[:, [TENSOR, START, COUNT]].T
        begins = np.repeat(starts % np.array([length for _, length, *_ in tensors])[which] == 0, counts)
        is_shaped = np.repeat(np.array([count > 0 for count, *_ in shaped])[which], counts)
        self._places, self._sums = np.cumsum(counts) - counts, np.zeros((len(begins), 3))
        self._begins = np.flatnonzero(begins)
        self._is_shaped, self._numbers = is_shaped[self._begins], np.empty((len(bands), 2))

    def run(self, grads: Sequence[int], sgd: Any, adam: Any, eps: float | None) -> list[int]:
        """Run `step` twice with gradients at these addresses; return the tensors whose metric is out of range."""
        lr, decay = (adam[0], adam[4]) if sgd is None else (sgd[0], sgd[2])
        self._first.run(grads, sgd, adam, None, observed=(decay != 0, self._sums, self._places))
        ww, uu, wu = np.add.reduceat(self._sums, self._begins)[self._is_shaped].T
        with np.errstate(all="ignore"):
            weight, factor = self._update.numbers(measures_of(ww, uu, wu, np), lr, np)
        self._numbers[:, 0], self._numbers[:, 1] = weight, np.minimum(factor, np.finfo(np.float32).max)
        return self._second.run(self._spare, None, None, eps, moved=(not self._update.keeps_direction, self._numbers))


def cut_tiles(tensors: Rows) -> Any:
    """Return the tiles that the kernel walks over, one in each row.

    The columns are: the tensor; the start of its first vector; the number of vectors, and of entries in each; the row
    in `bands` of the first vector, or -1 for a free tensor, and the distance to that of the next vector; the first of
    the tiles that share its vector, and their number.

    Args:
        tensors: (count, length, band, step) of each: `count` vectors of `length` entries in memory.
    """
    rows: list[tuple[int, ...]] = []
    for k, (count, length, band, step) in enumerate(tensors):
        size = min(length, TILE if band < 0 else LONG)
        parts = 1 if band < 0 else -(-length // size)
        side = max(1, TILE // length)
        for j in range(0, count, side):
            first = len(rows)
            for begin in range(0, length, size):
                each = min(side, count - j), min(size, length - begin)
                rows.append((k, j * length + begin, *each, band + j * step, step, first, parts))
    return np.array(rows, dtype=np.int64).reshape(-1, 8)


def deal_out(tiles: Any, threads: int) -> Any:
    """Return the range of tiles of each thread, with about the same number of entries in each."""
    ends = np.concatenate([[0], np.cumsum(tiles[:, COUNT] * tiles[:, LENGTH])])
    cuts = np.searchsorted(ends, np.linspace(0, ends[-1], threads + 1))
    cuts[-1] = len(tiles)
    return cuts.astype(np.int64)
