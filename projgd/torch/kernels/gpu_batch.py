"""Tensors that the Triton kernels take in one call, and their tables on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from projgd.torch.kernels import gpu, plan
from projgd.torch.kernels.plan import Layout
from projgd.torch.kernels.rules import Adam, Rule, Sgd

BLOCKS = ((1, 128, 8), (1, 16, 64), (1, 2, 512), (1, 1, 1024), (16, 64, 1))  # along R0, vectors, along R1
SHORT, MIDDLING, WIDE, PIECE, COLUMNS = range(5)
LONG = 8192  # entries in a tile, about; a longer vector is cut
GRAIN = 8  # entries: runs of so many are read 16 bytes at a time

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_captured: list[Any] = []  # what captured graphs read: nobody says when a graph is gone


class Batch:
    """Tensors of one dtype on one device, known by the shape of their memory alone."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, layouts: Sequence[Layout], free: Sequence[bool]
    ) -> None:
        flat = [(1, 1, 1, math.prod(sizes)) if alone else sizes for sizes, alone in zip(layouts, free, strict=True)]
        shapes = [[*sizes[1:], block(sizes, alone)] for sizes, alone in zip(flat, free, strict=True)]
        ragged = np.array([(k1 if kind == COLUMNS else r1) % GRAIN != 0 for _, k1, r1, kind in shapes])
        rows, sums = plan.tiles(layouts, free, cut)
        tensor, first, pieces, place = rows[:, 0], rows[:, 8], rows[:, 9], rows[:, 10]
        first[:] = place[first]
        last, shared = ragged[tensor], pieces > 1
        order = np.argsort(3 * last + (shared ^ last), kind="stable")  # ragged ones last, shared ones in the middle
        self._regular = int((~last).sum())
        self._shared = slice(int((~last & ~shared).sum()), len(rows) - int((last & ~shared).sum()))
        self._dtype, self._device, self._tensors = dtype, device, len(layouts)
        self._tiles = self._there(np.pad(rows[order], ((0, 0), (0, 1))))  # rows of whole 16 bytes
        self._layouts = self._there(np.array(shapes, dtype=np.int64))
        self._left = torch.empty(max(1, 2 * sums), dtype=torch.float64, device=device)
        self._factors = torch.empty(2 * self._tensors, dtype=torch.float64, device=device)
        self._here = np.full(9 * self._tensors + 8, -1, dtype=np.int64)
        self._live = self._there(self._here)

    def run(
        self,
        limits: npt.NDArray[np.float64],
        table: npt.NDArray[np.int64],
        rule: Rule | None = None,
        counters: npt.NDArray[np.int64] | None = None,
        starts: npt.NDArray[np.float64] | None = None,
    ) -> None:
        """Update by `rule` and project. The host waits for nothing; where nothing has changed, nothing is allocated.

        Args:
            limits: (tensors, 2), thresholds and targets; an infinite threshold leaves a tensor free.
            table: (operands, tensors), addresses of parameter, gradient and states.
            rule: None for no update. Its lr may be a tensor on the device.
            counters: (tensors,), addresses of Adam's step counts.
            starts: (tensors,), 1 where the momentum of SGD starts.
        """
        n = self._tensors
        now = np.zeros_like(self._here)
        numbers = now.view(np.float64)
        now[: table.size] = table.ravel()
        numbers[6 * n : 8 * n] = limits.T.ravel()
        if counters is not None:
            now[5 * n : 6 * n] = counters
        if starts is not None:
            numbers[8 * n : 9 * n] = starts
        lr = rule.lr if rule is not None and isinstance(rule.lr, torch.Tensor) else None
        if rule is not None:
            numbers[9 * n : 9 * n + len(rule)] = rule if lr is None else rule._replace(lr=0.0)
        live = self._brought(now)
        if lr is not None:
            live[9 * n : 9 * n + 1].view(torch.float64).copy_(lr, non_blocking=True)
        if isinstance(rule, Adam):
            gpu.count[(triton.cdiv(n, 128),)](live, self._factors, n, 128)
        aligned = not (table % 16).any()
        self._step(live, rule, self._tiles[: self._regular], aligned)
        self._step(live, rule, self._tiles[self._regular :], False)
        self._step(live, None, self._tiles[self._shared], aligned and self._shared.stop <= self._regular, second=True)

    def _step(
        self, live: torch.Tensor, rule: Rule | None, tiles: torch.Tensor, aligned: bool, second: bool = False
    ) -> None:
        if len(tiles) == 0:
            return
        name = "project" if rule is None else type(rule).__name__.lower()
        gpu.step[(len(tiles),)](
            self._layouts,
            live,
            self._factors,
            tiles,
            self._left,
            self._tensors,
            DTYPE=DTYPES[self._dtype],
            RULE=name,
            DECAY=rule is not None and rule.decay != 0,
            EXTRA=rule is not None and (rule.momentum if isinstance(rule, Sgd) else rule.amsgrad) != 0,
            ALIGNED=aligned,
            SECOND=second,
            BLOCKS=BLOCKS,
            num_warps=8 if self._dtype == torch.float64 else 4,
        )

    def _brought(self, now: npt.NDArray[np.int64]) -> torch.Tensor:
        """`now` on the device. A graph that is being captured gets a table of its own, which no later step changes."""
        if _capturing(self._device):
            live = self._there(now)
            _captured.append((self, live))
            return live
        if not np.array_equal(now, self._here):
            self._here = now
            _send(now, self._live)
        return self._live

    def _there(self, table: npt.NDArray[np.int64]) -> torch.Tensor:
        return _send(table, torch.empty(table.shape, dtype=torch.int64, device=self._device))


def block(layout: Layout, free: bool) -> int:
    """Which of `BLOCKS` suits a layout."""
    _, r0, _, r1 = layout
    if free or r1 > LONG:
        return PIECE
    if r1 == 1 and r0 > 1:
        return COLUMNS
    return SHORT if r1 <= 16 else MIDDLING if r1 <= 256 else WIDE


def cut(layout: Layout, free: bool) -> tuple[int, int, int]:
    """How much of R0, K1 and R1 makes a tile."""
    _, width, _ = BLOCKS[block(layout, free)]
    run = min(layout[3], LONG)
    return max(1, LONG // (width * run)), width, run


def _send(table: npt.NDArray[np.int64], to: torch.Tensor) -> torch.Tensor:
    """Copy without waiting."""
    staged = torch.from_numpy(table)
    if to.device.type == "cuda":
        staged = staged.pin_memory()
        if _capturing(to.device):
            _captured.append(staged)
    return to.copy_(staged, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
