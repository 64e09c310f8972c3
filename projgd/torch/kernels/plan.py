"""How memory is cut into tiles, and the tiles dealt out to threads. Knows no kernel and no optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from projgd.axes import Vectors

Layout = tuple[int, int, int, int]  # (K0, R0, K1, R1), outermost first: K count vectors, R run along one
Cut = Callable[[Layout, bool], tuple[int, int, int]]  # how much of R0, K1, R1 makes a tile; whether there is no vector

TILE = 1 << 14  # entries updated before their norms are taken: with gradient and states they fit the second-level cache
LONG = 1 << 15  # a vector longer than this is cut, so that threads can share it
WIDEST = 2048  # vectors side by side in one tile, at most: what a kernel has room for
LINES = 64  # columns side by side in one tile, at least: whole cache lines


def layout_of(shape: Sequence[int], stride: Sequence[int], vectors: Vectors | None) -> Layout | None:
    """A tensor's memory as (K0, R0, K1, R1); None where it has gaps or more changes between the two kinds of axes."""
    if vectors is not None and tuple(shape) != vectors.shape:  # an axis was cut
        steps = _steps(shape)
        if any(n != 1 and step != found for n, step, found in zip(shape, steps, stride, strict=True)):
            return None
        shape, stride = vectors.shape, _steps(vectors.shape)
    sizes, slot, expected = [1, 1, 1, 1], 3, 1
    for a in sorted((a for a in range(len(shape)) if shape[a] != 1), key=lambda a: stride[a]):
        if stride[a] != expected:
            return None
        expected *= shape[a]
        along = vectors is None or a in vectors.axes
        if along != (slot % 2 == 1):
            slot -= 1
        if slot < 0:
            return None
        sizes[slot] *= shape[a]
    return (sizes[0], sizes[1], sizes[2], sizes[3])


def _steps(shape: Sequence[int]) -> list[int]:
    """The strides of a contiguous array."""
    return [math.prod(shape[a + 1 :]) for a in range(len(shape))]


def for_cores(layout: Layout, free: bool) -> tuple[int, int, int]:
    """Tiles about as large as a core's cache."""
    _, r0, k1, r1 = layout
    run = min(r1, TILE if free else LONG)
    # About `TILE` entries, but for a strided axis whole cache lines.
    side = TILE // r1 if r0 == 1 else max(LINES // r1, TILE * 16 // (r0 * r1))
    width = min(k1, max(1, min(side, WIDEST))) if run == r1 else 1
    return max(1, min(r0, LONG // (width * run), 2048)), width, run


def tiles(layouts: Sequence[Layout], free: Sequence[bool], cut: Cut = for_cores) -> tuple[npt.NDArray[np.int64], int]:
    """The tiles that the kernels walk over, and how many sums those leave that share vectors.

    A row: tensor; k0; r0 from, to; k1 from, to; r1 from, to; the first of the tiles that share its vectors, their
    number; the place of its own sums.
    """
    rows: list[tuple[int, ...]] = []
    left = 0
    for k, (k0, r0, k1, r1) in enumerate(layouts):
        if free[k]:  # no vector to keep together
            k0, r0, k1, r1 = 1, 1, 1, k0 * r0 * k1 * r1
        r0_step, width, r1_step = cut((k0, r0, k1, r1), free[k])
        cuts = [
            (a, min(a + r0_step, r0), b, min(b + r1_step, r1))
            for a in range(0, r0, r0_step)
            for b in range(0, r1, r1_step)
        ]
        shared = len(cuts) > 1 and not free[k]
        for i in range(k0):
            for j in range(0, k1, width):
                first, end = len(rows), min(j + width, k1)
                for a, a_end, b, b_end in cuts:
                    count = len(cuts) if shared else 1
                    rows.append((k, i, a, a_end, j, end, b, b_end, first, count, left))
                    left += end - j if shared else 0
    return np.array(rows, dtype=np.int64).reshape(-1, 11), left


def ranges(table: npt.NDArray[np.int64], threads: int) -> npt.NDArray[np.int64]:
    """Which tiles are whose: ranges with about the same number of entries."""
    sizes = (table[:, 3] - table[:, 2]) * (table[:, 5] - table[:, 4]) * (table[:, 7] - table[:, 6])
    total = np.concatenate([[0], np.cumsum(sizes)])
    cuts = np.searchsorted(total, np.linspace(0, total[-1], threads + 1))
    cuts[-1] = len(table)
    return cuts.astype(np.int64)
