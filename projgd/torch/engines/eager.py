"""Plain operations of PyTorch, in place: norms, factors, one product.

On a CPU small parameters are stacked, so that they share calls, and large ones are projected in pieces that stay in a
cache between their norm and their product. Where no norm is outside of the band nothing is written. On a GPU there is
no branch: the host never waits, and a step can be captured in a graph.

Squares are summed in blocks of float32 in which no square passes through more additions than `FloatType.free`, and the
norms of the blocks in float64. Whatever the order within a block, a norm then errs by less than `sums.guard` allows for
(Higham, *Accuracy and Stability of Numerical Algorithms*, section 4.2). CUDA sums in float64 throughout, which costs
nothing beside reading the weights, and in which no square of a float32 over- or underflows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from projgd.axes import Vectors
from projgd.bands import Band
from projgd.sums import FLOATS
from projgd.torch.engines import reference
from projgd.torch.engines.base import PLAIN, Engine, Job, rows_in_memory

BLOCK = 64  # squares that may be added in any order
PIECE = 2**20  # entries projected together: with gradient and state they stay in a cache of some ten megabytes
SMALL = 2**16  # entries; beyond, copying a parameter onto a stack costs more than the calls that it saves
NEAR, FAR = 2.0**-40, 2.0**64  # norms whose squares, in blocks, neither underflow nor overflow in float32
_norm = torch.linalg.vector_norm


class Eager(Engine):
    """Project bands with operations of PyTorch."""

    name = "eager"

    def refuses(self, job: Job, p: Tensor) -> str | None:
        if job.compiled:
            return "torch.compile makes a graph of its own"
        if torch.is_grad_enabled():
            return "autograd follows the projection (differentiable=True)"
        if job.metric is not None:
            return "it projects in the Euclidean metric only"
        if type(p) not in PLAIN:
            return f"the parameter is a {type(p).__name__}"
        if p.device.type not in ("cpu", "cuda") or p.dtype == torch.float64:
            return f"it sums squares of {p.dtype} on {p.device.type} in a form that may overflow"
        band = job.band(p)
        if band is None:
            return f"{job.constraint} is not a set of norms"
        if band.filled is not None:
            return "the vectors are so short that float16 must be rounded entry by entry"
        if p.numel() and p.device.type == "cpu" and not _is_usual(band):
            return f"the squares of norms around {float(torch.as_tensor(band.down).max()):.0e} under- or overflow"
        return None if p.numel() else "the parameter has no entries"

    def prepare(self, job: Job, params: Sequence[Tensor]) -> list[_Batch]:
        on_cpu = [j for j, p in enumerate(params) if p.device.type == "cpu"]
        return _batches(job, params, on_cpu)

    def run(self, prepared: list[_Batch], job: Job, params: Sequence[Tensor]) -> None:
        for batch in prepared:
            batch.project_(job, params)
        for p in params:
            if p.device.type != "cpu":
                project_without_branch_(p, job)


def project_without_branch_(p: Tensor, job: Job) -> None:
    """Project `p` without reading a number back."""
    vectors, band = job.vectors(p), job.band(p)
    assert vectors is not None
    assert band is not None
    if job.skip is not None:
        band = band.unless(job.skip.to(p.device), xp)
    x = p.reshape(vectors.shape)
    factor = band.factors(_norm(x, dim=vectors.axes, keepdim=True, dtype=torch.float64), xp)
    moved = torch.mul(x, factor, out=torch.empty_like(x))  # in float64: c / 3e38 may be subnormal in float32
    p.copy_(torch.where(factor != 1, moved, x).reshape(p.shape))


@dataclass(frozen=True)
class _Array:
    """One array to project: a parameter, some rows of a large one, or small ones in a stack.

    Attributes:
        places: which parameters.
        shapes: the shape of each one's vectors.
        axes: the axes that make one vector.
        rows: the first row and the number of rows of a piece; None for whole parameters.
        stack: memory for several parameters, and the part of it that belongs to each.
    """

    places: list[int]
    shapes: list[tuple[int, ...]]
    axes: tuple[int, ...]
    rows: tuple[int, int] | None = None
    stack: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def views(self, params: Sequence[Tensor]) -> list[Tensor]:
        if self.rows is not None:
            (shape,) = self.shapes
            return [params[self.places[0]].as_strided(shape, (shape[1], 1)).narrow(0, *self.rows)]
        found = [params[j] for j in self.places]
        return [p if p.shape == shape else p.reshape(shape) for p, shape in zip(found, self.shapes, strict=True)]

    def load(self, views: list[Tensor]) -> Tensor:
        return views[0] if self.stack is None else torch.cat(views, out=self.stack[0])

    def store(self, views: list[Tensor], params: Sequence[Tensor]) -> None:
        """Bring what was projected to where it came from, unless it lies there."""
        if self.stack is not None:
            torch._foreach_copy_(views, self.stack[1])
        if self.rows is None:
            for j, view in zip(self.places, views, strict=True):
                if view.data_ptr() != params[j].data_ptr():  # an axis was cut in memory with gaps
                    params[j].copy_(view.reshape(params[j].shape))


@dataclass(frozen=True)
class _Batch:
    """Arrays on a CPU whose norms are judged together: the small operations on norms are what calls cost."""

    arrays: list[_Array]
    vectors: Vectors  # of the first parameter: all in the batch have the same band
    fixed: Band | None  # a band with one number for each vector of the batch, where sets have taken radii

    def project_(self, job: Job, params: Sequence[Tensor]) -> None:
        views = [a.views(params) for a in self.arrays]
        xs = [a.load(v) for a, v in zip(self.arrays, views, strict=True)]
        wide = [x.float() for x in xs]  # x itself where it is float32
        each = [norms(x, a.axes) for x, a in zip(wide, self.arrays, strict=True)]
        found = torch.cat([n.reshape(-1) for n in each]) if len(each) > 1 else each[0].reshape(-1)
        band = self.fixed or job.band(params[self.arrays[0].places[0]], self.vectors)
        assert band is not None
        least, most = (float(n) for n in found.aminmax())
        lower = not (isinstance(band.low, float) and band.low == 0.0)
        if self.fixed is None and band.low <= least and most <= band.high:
            return
        factors = band.factors(found, xp)
        is_usual = most < FAR and (least > NEAR or not lower)
        if not is_usual:
            factors = torch.where((found < FAR) & ((found > NEAR) | (not lower)), factors, 1.0)
        for x, w, by, a, v in zip(xs, wide, _split(factors.float(), each), self.arrays, views, strict=True):
            if is_usual and w is x:
                x.mul_(by)
            else:  # NaN keeps its bits
                x.copy_(torch.where(by != 1, (w * by).to(x.dtype), x))
            a.store(v, params)
        if not is_usual:  # the others first: the next step may find them alone, and must have nothing to do
            for j in {j for a in self.arrays for j in a.places}:
                reference.project_(params[j], job)


def _split(factors: Tensor, norms: list[Tensor]) -> Iterator[Tensor]:
    parts = factors.split_with_sizes([n.numel() for n in norms])
    return (part.view(n.shape) for part, n in zip(parts, norms, strict=True))


def _batches(job: Job, params: Sequence[Tensor], places: Sequence[int]) -> list[_Batch]:
    """Cut large parameters into pieces, stack small ones, and put together what has the same band."""
    stacks: dict[Any, list[tuple[int, Vectors]]] = {}
    arrays: list[tuple[_Array, Vectors, int]] = []
    for j in places:
        p, vectors = params[j], job.vectors(params[j])
        assert vectors is not None
        rows = rows_in_memory(p, vectors) if p.numel() > PIECE and p not in job.radii else None
        if p.numel() <= SMALL and 0 not in vectors.axes:
            key = p.dtype, vectors.shape[1:], vectors.axes, p in job.radii
            stacks.setdefault(key, []).append((j, vectors))
        elif rows is not None:
            height = max(1, PIECE // rows[1])
            for start in range(0, rows[0], height):
                n = min(height, rows[0] - start)
                arrays.append((_Array([j], [rows], (1,), (start, n)), vectors, n * rows[1]))
        else:
            arrays.append((_Array([j], [vectors.shape], vectors.axes), vectors, p.numel()))
    arrays += [_stacked(members, params) for members in stacks.values()]
    return _put_together(job, params, arrays)


def _stacked(members: list[tuple[int, Vectors]], params: Sequence[Tensor]) -> tuple[_Array, Vectors, int]:
    places, shapes = [j for j, _ in members], [v.shape for _, v in members]
    array = _Array(places, shapes, members[0][1].axes)
    if len(places) > 1:
        memory = torch.cat(array.views(params))
        array = dataclasses.replace(array, stack=(memory, memory.split_with_sizes([shape[0] for shape in shapes])))
    return array, members[0][1], sum(map(math.prod, shapes))


def _put_together(job: Job, params: Sequence[Tensor], arrays: list[tuple[_Array, Vectors, int]]) -> list[_Batch]:
    batches: list[_Batch] = []
    sizes: dict[Any, tuple[int, _Batch]] = {}
    for array, vectors, size in arrays:
        p = params[array.places[0]]
        radii = p in job.radii
        key = p.dtype, radii or job.band(p, vectors)
        filled, batch = sizes.get(key, (PIECE, None))
        if batch is None or filled + size > PIECE:
            filled, batch = 0, _Batch([], vectors, None)
            batches.append(batch)
        batch.arrays.append(array)
        sizes[key] = filled + size, batch
    return [dataclasses.replace(b, fixed=_joined_band(b, job, params)) for b in batches]


def _joined_band(batch: _Batch, job: Job, params: Sequence[Tensor]) -> Band | None:
    """Return the bands of parameters with radii of their own as one, with a number for each vector of the batch."""
    places = [j for array in batch.arrays for j in array.places]
    if params[places[0]] not in job.radii:
        return None
    bands = [band for j in places if (band := job.band(params[j])) is not None]
    numbers = {
        name: torch.cat([torch.as_tensor(getattr(band, name), dtype=torch.float64).reshape(-1) for band in bands])
        for name in ("low", "high", "up", "down")
    }
    return dataclasses.replace(bands[0], **numbers)


def _is_usual(band: Band) -> bool:
    """Whether the numbers of a band are far from both ends of float32, squared."""
    used = [band.down] if isinstance(band.low, float) and band.low == 0.0 else [band.up, band.down]
    return all(bool(((n := torch.as_tensor(x)) > 2.0**-38).all() and (n < 2.0**60).all()) for x in used)


@functools.cache
def longest_block() -> int:
    """Return how many squares of contiguous float32 numbers may go into one call of torch's norm.

    torch adds them in as many lanes as a vector register holds numbers, then the lanes, then the rest (2.13,
    aten/src/ATen/native/cpu/ReduceOpsKernel.cpp). This asks it: beside 4096² = 2^24 a square of 1 in the same lane is
    lost. No square may pass through more than `FloatType.free` additions.
    """
    x = torch.ones(1, 256, dtype=torch.float32, device="cpu")
    x[0, 0] = 4096.0
    lost = 256 - round(float(_norm(x, 2, 1).double().square()) - 2.0**24)
    lanes = 256 // max(lost, 1)
    return max(BLOCK, lanes * (FLOATS["float32"].free - 2 * lanes)) if 4 <= lanes <= 16 else BLOCK


@dataclass(frozen=True)
class _Cut:
    """How the norms of an array are summed: axes that are neighbours in memory merged, then cut into blocks."""

    order: list[int]  # the axes as they lie in memory
    runs: list[int]  # and those that can be, merged
    within: list[int]  # merged axes that fit into one block together
    beyond: list[int]  # the other merged axes to sum over, of which the last is cut into blocks of
    block: int
    shape: list[int]  # of the norms, in the order of memory
    back: list[int]  # from there to the order of the array
    blocks: list[int] | None  # (vectors, blocks, block) where that is what a contiguous array is


@functools.lru_cache(maxsize=4096)
def _cut(shape: tuple[int, ...], stride: tuple[int, ...], axes: tuple[int, ...]) -> _Cut:
    order = sorted(range(len(shape)), key=lambda a: -stride[a])
    runs: list[int] = []
    reduced: list[bool] = []
    for a in order:
        if reduced and reduced[-1] == (a in axes):
            runs[-1] *= shape[a]
        else:
            runs.append(shape[a])
            reduced.append(a in axes)
    is_row = sum(reduced) == 1 and reduced[-1] and min(stride, default=1) == 1
    block, within, beyond = longest_block() if is_row else BLOCK, [], []
    for i in reversed(range(len(runs))):
        if reduced[i] and runs[i] <= block:
            within.append(i)
            block //= runs[i]
        elif reduced[i]:
            beyond.append(i)
    if beyond:  # blocks without a remainder where they are not much shorter
        block = next((b for b in range(block, block // 3, -1) if runs[beyond[0]] % b == 0), block)
    kept = [1 if a in axes else shape[a] for a in order]
    back = [order.index(a) for a in range(len(shape))]
    simple = reduced == [False, True] and beyond and runs[1] % block == 0 and back == order == sorted(order)
    return _Cut(order, runs, within, beyond, block, kept, back, [runs[0], runs[1] // block, block] if simple else None)


def norms(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return ‖x‖₂ of float32 vectors in float64, reduced axes kept with size 1. Squares may over- or underflow."""
    cut = _cut(x.shape, x.stride(), axes)
    if cut.blocks and x.is_contiguous():
        rows: Tensor = _norm(_norm(x.view(cut.blocks), 2, 2), 2, 1, dtype=torch.float64)
        return rows.view(cut.shape)
    y = x.permute(cut.order).reshape(cut.runs)
    if not cut.beyond:
        found: Tensor = _norm(y, dim=cut.within, keepdim=True).double()
    else:
        d, n, block = cut.beyond[0], cut.runs[cut.beyond[0]], cut.block
        full = n - n % block
        blocks = y.narrow(d, 0, full).reshape([*cut.runs[:d], full // block, block, *cut.runs[d + 1 :]])
        blocks = _norm(blocks, dim=[d + 1, *(i + (i > d) for i in cut.within)], keepdim=True).squeeze(d + 1)
        found = _norm(blocks, dim=cut.beyond, keepdim=True, dtype=torch.float64)
        if full < n:
            rest = _norm(y.narrow(d, full, n - full), dim=[d, *cut.within], keepdim=True)
            found = torch.hypot(found, _norm(rest, dim=cut.beyond, keepdim=True, dtype=torch.float64))
    return found.reshape(cut.shape).permute(cut.back)
