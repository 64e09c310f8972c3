"""Tensors that the Triton kernels take in one call, and their tables on the device."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from projgd.axes import Vectors
from projgd.torch.kernels import batch, gpu, plan
from projgd.torch.kernels.batch import NO_COUNTERS, NO_FACTORS
from projgd.torch.kernels.plan import Layout
from projgd.torch.kernels.rules import Adam, Rule, Sgd
from projgd.torch.path import Memory

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
_launch = threading.Lock()
_captured: list[Any] = []  # what captured graphs read: nobody says when a graph is gone


class Room(NamedTuple):
    """What a step writes to, for one stream."""

    here: npt.NDArray[np.int64]  # what is in `live`
    live: torch.Tensor  # see `gpu.step`
    left: torch.Tensor
    factors: torch.Tensor


class Batch(batch.Batch):
    """Tensors of one dtype on one device, known by the shape of their memory alone, with their tables there."""

    def __init__(self, memory: Sequence[Memory], vectors: Sequence[Vectors | None]) -> None:
        super().__init__(memory, vectors)
        flat = [(1, 1, 1, math.prod(x)) if free else x for x, free in zip(self.layouts, self.free, strict=True)]
        shapes = [[*x[1:], block(x, free)] for x, free in zip(flat, self.free, strict=True)]
        ragged = np.array([(k1 if kind == COLUMNS else r1) % GRAIN != 0 for _, k1, r1, kind in shapes])
        rows, self._sums = plan.tiles(self.layouts, self.free, cut)
        tensor, first, pieces, place = rows[:, 0], rows[:, 8], rows[:, 9], rows[:, 10]
        first[:] = place[first]
        last, shared = ragged[tensor], pieces > 1
        order = np.argsort(3 * last + (shared ^ last), kind="stable")  # ragged ones last, shared ones in the middle
        self._regular = int((~last).sum())
        self._shared = slice(int((~last & ~shared).sum()), len(rows) - int((last & ~shared).sum()))
        self._tiles = self._there(np.pad(rows[order], ((0, 0), (0, 1))))  # rows of whole 16 bytes
        self._sizes = self._there(np.array(shapes, dtype=np.int64))
        self._rooms: dict[int, Room] = {}  # by stream
        self.lasting = not _capturing(self.device)
        if self.device.type == "cuda" and self.lasting:
            torch.cuda.current_stream(self.device).synchronize()  # once: other streams may use the tables

    def run(
        self,
        c: Any,
        table: npt.NDArray[np.int64],
        rule: Rule | None = None,
        counters: npt.NDArray[np.int64] = NO_COUNTERS,
        factors: npt.NDArray[np.float64] = NO_FACTORS,
        eps: float | None = None,
    ) -> list[int]:
        """See `batch.Batch.run` and `gpu.step`. The host waits for nothing; where nothing changed, nothing is sent.

        Left are tensors of float16 that rounding to nearest is too coarse for. The rule's lr may be on the device.
        """
        n = len(self.layouts)
        with _launch, torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            self.limit(c)
            now = np.zeros(9 * n + 8, dtype=np.int64)
            now[: table.size] = table.ravel()
            if counters.size:
                now[5 * n : 6 * n] = counters
            numbers = now.view(np.float64)
            numbers[6 * n : 8 * n] = self.limits[:, :2].T.ravel()
            if factors.size:
                numbers[8 * n : 9 * n] = factors[:, 0]
            lr = rule.lr if rule is not None and isinstance(rule.lr, torch.Tensor) else None
            if rule is not None:
                numbers[9 * n : 9 * n + len(rule)] = rule if lr is None else rule._replace(lr=0.0)
            room = self._room(now)
            if lr is not None:
                room.live[9 * n : 9 * n + 1].view(torch.float64).copy_(lr, non_blocking=True)
            if isinstance(rule, Adam):
                gpu.count[(triton.cdiv(n, 128),)](room.live, room.factors, n, 128)
            aligned = not (table % 16).any()
            self._step(room, rule, self._tiles[: self._regular], aligned)
            self._step(room, rule, self._tiles[self._regular :], False)
            within = self._shared.stop <= self._regular
            self._step(room, None, self._tiles[self._shared], aligned and within, second=True)
            return np.flatnonzero(self.limits[:, 2]).tolist()

    def _step(self, room: Room, rule: Rule | None, tiles: torch.Tensor, aligned: bool, second: bool = False) -> None:
        if len(tiles) == 0:
            return
        gpu.step[(len(tiles),)](
            self._sizes,
            room.live,
            room.factors,
            tiles,
            room.left,
            len(self.layouts),
            DTYPE=DTYPES[self.dtype],
            RULE="project" if rule is None else type(rule).__name__.lower(),
            DECAY=rule is not None and rule.decay != 0,
            EXTRA=rule is not None and (rule.momentum if isinstance(rule, Sgd) else rule.amsgrad) != 0,
            ALIGNED=aligned,
            SECOND=second,
            BLOCKS=BLOCKS,
            num_warps=8 if self.dtype == torch.float64 else 4,
        )

    def _room(self, now: npt.NDArray[np.int64]) -> Room:
        """Where this step works, with `now` there. A graph that is being captured gets a room that stays its own."""
        if _capturing(self.device):
            room = self._new_room(now)
            _captured.append((self, room))
            return room
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        known = self._rooms.get(stream)
        if known is None:
            known = self._new_room(now)
        elif not np.array_equal(now, known.here):
            _send(now, known.live)
            known = known._replace(here=now)
        self._rooms[stream] = known
        return known

    def _new_room(self, now: npt.NDArray[np.int64]) -> Room:
        left = torch.empty(max(1, 2 * self._sums), dtype=torch.float64, device=self.device)
        factors = torch.empty(2 * len(self.layouts), dtype=torch.float64, device=self.device)
        return Room(now, self._there(now), left, factors)

    def _there(self, table: npt.NDArray[np.int64]) -> torch.Tensor:
        return _send(table, torch.empty(table.shape, dtype=torch.int64, device=self.device))


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
