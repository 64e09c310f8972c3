"""Project with plain operations of PyTorch, in place: norms, factors, one product.

On a CPU small parameters are stacked, so that they share calls. Large ones are projected in pieces that stay in a cache
between their norm and their product. If no norm is outside of the band, nothing is written. On a GPU there is no
branch: the host never waits, and a graph can capture a step.

Squares are summed in blocks of float32 in which no square passes through more additions than `FloatType.free`, and the
norms of the blocks are summed in float64. In any order within a block, a norm then errs by less than `sums.guard`
allows (Higham, *Accuracy and Stability of Numerical Algorithms*, section 4.2). CUDA sums in float64 throughout. This
costs nothing beside reading the weights, and no square of a float32 over- or underflows in it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from projgd.bands import Band
from projgd.sums import FLOATS
from projgd.torch.engines.base import PLAIN, Engine, Job, project_by_reference, rows_in_memory, rows_of

BLOCK = 64  # this many squares may be added in any order
PIECE = 2**22  # this many entries stay in a cache between their norm and their product
SMALL = 2**16  # with more entries, copying a parameter onto a stack costs more than the calls that it saves
NEAR, FAR = 2.0**-40, 2.0**64  # squares of norms between these neither under- nor overflow in float32
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
        vectors, band = job.vectors(p), job.band(p)
        if band is None or vectors is None:
            return f"{job.constraint} is not a set of norms"
        if vectors.shape != tuple(p.shape) and not p.is_contiguous():
            return "an axis is cut in memory with gaps"
        if band.filled is not None:
            return "the vectors are so short that float16 must be rounded entry by entry"
        if p.numel() and p.device.type == "cpu" and not _squares_fit(band):
            return f"the squares of norms around {float(torch.as_tensor(band.down).max()):.0e} under- or overflow"
        return None if p.numel() else "the parameter has no entries"

    def prepare(self, job: Job, params: Sequence[Tensor]) -> list[_Batch]:
        return _batches(job, [p for p in params if p.device.type == "cpu"])

    def run(self, prepared: list[_Batch], job: Job, params: Sequence[Tensor]) -> None:
        for batch in prepared:
            batch.project_(job)
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
    factor = band.factors(_norm(x, dim=vectors.axes, keepdim=True, dtype=torch.float64), torch)
    moved = torch.mul(x, factor, out=torch.empty_like(x))  # float64, because c / 3e38 may be subnormal in float32
    p.copy_(torch.where(factor != 1, moved, x).reshape(p.shape))


@dataclass(frozen=True)
class _Array:
    """Describe one array to project: a parameter, some rows of a large one, or a stack of small ones.

    Attributes:
        x: the memory of the weights, or of the stack, in the shape of its vectors.
        axes: the axes that make one vector.
        params: the parameters that it holds.
        sources: the parameters that are copied onto a stack, in the shape of their vectors; empty for no stack.
        parts: the part of the stack that belongs to each of them.
    """

    x: Tensor
    axes: tuple[int, ...]
    params: list[Tensor]
    sources: list[Tensor] = field(default_factory=list)
    parts: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class _Batch:
    """Hold arrays whose norms are compared together.

    Separate calls for the few norms of each array would cost more than the norms.

    Attributes:
        arrays: the arrays; all have one band, or each vector has its own.
        fixed: a band with one number for each vector of the batch, if sets have taken radii; otherwise None.
        found: memory for the norms, float64.
        factors: memory for the factors, float32.
        norms: the part of `found` for each array.
        multipliers: the part of `factors` for each array.
        blocks: the blocks of each array that is rows, and memory for their norms; None for another array.
    """

    arrays: list[_Array]
    fixed: Band | None
    found: Tensor
    factors: Tensor
    norms: list[Tensor]
    multipliers: list[Tensor]
    blocks: list[tuple[Tensor, Tensor] | None]

    def project_(self, job: Job) -> None:
        least, most = self._measure()
        band = self.fixed or job.band(self.arrays[0].params[0])
        assert band is not None
        if self.fixed is None and band.low <= least and most <= band.high:
            return
        is_ball = isinstance(band.low, float) and band.low == 0.0
        if not (most < FAR and (is_ball or least > NEAR)):  # squares may have over- or underflowed
            self._project_by_reference(job)
            return
        if band.pull == 1:  # `Band.factors` in fewer calls: what stays is divided by itself
            found = self.found.clamp_(min=NEAR * NEAR)  # the squares of such a short vector may have become 0
            torch.div(band.goal(found, torch), found, out=self.factors)
        else:
            self.factors.copy_(band.factors(self.found, torch))
        if self.arrays[0].x.dtype == torch.float32:
            torch._foreach_mul_([a.x for a in self.arrays], self.multipliers)
        else:
            for a, by in zip(self.arrays, self.multipliers, strict=True):
                a.x.copy_(torch.where(by != 1, (a.x * by).to(a.x.dtype), a.x))
        for a in self.arrays:
            if a.sources:
                torch._foreach_copy_(a.sources, a.parts)

    def _project_by_reference(self, job: Job) -> None:
        assert job.constraint is not None
        for a in self.arrays:
            if self.fixed is not None:
                for p in a.params:
                    project_by_reference(p, job)
                continue
            a.x.copy_(job.constraint.onto(a.x, a.axes, xp, moved=True))  # some rows of a large parameter, or a stack
            if a.sources:
                torch._foreach_copy_(a.sources, a.parts)

    def _measure(self) -> tuple[float, float]:
        """Fill `found`, and return the smallest and the largest norm; NaN if there is one."""
        for a, norm, blocks in zip(self.arrays, self.norms, self.blocks, strict=True):
            if a.sources:
                torch.cat(a.sources, out=a.x)
            if blocks is None:
                norm.copy_(_quick_norms(a.x.float(), a.axes))
            else:
                _norm(_norm(blocks[0], 2, 2, out=blocks[1]), 2, 1, dtype=torch.float64, out=norm.view(-1))
        least, most = self.found.aminmax()
        return least.item(), most.item()


def _batches(job: Job, params: Sequence[Tensor]) -> list[_Batch]:
    """Cut large parameters into pieces, stack small ones, and collect the arrays with the same band."""
    batches: list[list[_Array]] = []
    sizes: dict[Any, tuple[int, list[_Array]]] = {}
    for array in _arrays(job, params):
        p, size = array.params[0], array.x.numel()
        key = p.dtype, p in job.radii or job.band(p)
        filled, batch = sizes.get(key, (PIECE, []))
        if filled + size > PIECE:
            filled, batch = 0, []
            batches.append(batch)
        batch.append(array)
        sizes[key] = filled + size, batch
    return [_batch(job, arrays) for arrays in batches]


def _arrays(job: Job, params: Sequence[Tensor]) -> list[_Array]:
    small: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    arrays: list[_Array] = []
    for p in params:
        vectors = job.vectors(p)
        assert vectors is not None
        x = p.detach().view(vectors.shape) if vectors.shape != p.shape else p.detach()
        rows = rows_in_memory(p, vectors)
        if p.numel() <= SMALL and 0 not in vectors.axes:
            key = p.dtype, vectors.shape[1:], vectors.axes, p in job.radii
            small.setdefault(key, []).append((p, x))
        elif rows is not None:
            height = max(1, PIECE // rows[1]) if p not in job.radii else rows[0]
            pieces = torch.split(x.as_strided(rows, (rows[1], 1)), height)
            arrays += [_Array(piece, (1,), [p]) for piece in pieces]
        else:
            arrays.append(_Array(x, vectors.axes, [p]))
    for (_, _, axes, _), members in small.items():
        ps, xs = [p for p, _ in members], [x for _, x in members]
        stack = torch.cat(xs) if len(xs) > 1 else xs[0]
        sources, parts = (xs, stack.split_with_sizes([len(x) for x in xs])) if len(xs) > 1 else ([], ())
        arrays.append(_Array(stack, axes, ps, sources, tuple(parts)))
    return arrays


def _batch(job: Job, arrays: list[_Array]) -> _Batch:
    shapes = [[1 if i in a.axes else n for i, n in enumerate(a.x.shape)] for a in arrays]
    counts = [math.prod(shape) for shape in shapes]
    found = torch.empty(sum(counts), dtype=torch.float64, device="cpu")
    factors = torch.empty(sum(counts), dtype=torch.float32, device="cpu")
    parts = [[x.view(s) for x, s in zip(m.split_with_sizes(counts), shapes, strict=True)] for m in (found, factors)]
    blocks = [_blocks(a.x, a.axes) for a in arrays]
    memory = [None if b is None else (b, torch.empty(b.shape[:2], dtype=torch.float32, device="cpu")) for b in blocks]
    return _Batch(arrays, _joined_band(job, arrays), found, factors, parts[0], parts[1], memory)


def _joined_band(job: Job, arrays: list[_Array]) -> Band | None:
    """Return one band with a number for each vector, from the bands of parameters with radii of their own."""
    params = [p for a in arrays for p in a.params]
    if params[0] not in job.radii:
        return None
    bands = [band for p in params if (band := job.band(p)) is not None]

    def join(name: str) -> Tensor:
        numbers = [(torch.as_tensor(getattr(b, name), dtype=torch.float64), torch.as_tensor(b.high)) for b in bands]
        return torch.cat([n.expand(high.shape).reshape(-1) for n, high in numbers])

    is_ball = isinstance(bands[0].low, float)
    joined = dataclasses.replace(bands[0], high=join("high"), down=join("down"))
    return joined if is_ball else dataclasses.replace(joined, low=join("low"), up=join("up"))


def _squares_fit(band: Band) -> bool:
    """Return whether the squares of a band's numbers are far from both ends of float32."""
    used = [band.down] if isinstance(band.low, float) and band.low == 0.0 else [band.up, band.down]
    return all(bool(((n := torch.as_tensor(x)) > 2.0**-38).all() and (n < 2.0**60).all()) for x in used)


@functools.cache
def longest_block() -> int:
    """Return how many squares of contiguous float32 numbers may go into one call of torch's norm.

    torch adds them in as many lanes as a vector register holds numbers, then the lanes, then the rest (2.13,
    aten/src/ATen/native/cpu/ReduceOpsKernel.cpp). This function measures the number of lanes: beside 4096² = 2^24 a
    square of 1 in the same lane is lost. No square may pass through more than `FloatType.free` additions.
    """
    x = torch.ones(1, 256, dtype=torch.float32, device="cpu")
    x[0, 0] = 4096.0
    lost = 256 - round(float(_norm(x, 2, 1).double().square()) - 2.0**24)
    lanes = 256 // max(lost, 1)
    return max(BLOCK, lanes * (FLOATS["float32"].free - 2 * lanes)) if 4 <= lanes <= 16 else BLOCK


@functools.lru_cache(maxsize=4096)
def _cut_rows(shape: tuple[int, ...], stride: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, int, int] | None:
    rows = rows_of(shape, stride, axes)
    if rows is None or 0 in shape:
        return None
    length, most = rows[1], longest_block()
    block = next((b for b in range(min(most, length), most // 3, -1) if length % b == 0), min(most, length))
    return (rows[0], length // block, block) if length % block == 0 else None


def _blocks(x: Tensor, axes: tuple[int, ...]) -> Tensor | None:
    """Return float32 memory that is rows as (rows, blocks, block), in the order of x; None for other memory."""
    cut = _cut_rows(tuple(x.shape), x.stride(), axes) if x.dtype == torch.float32 else None
    return None if cut is None else x.as_strided(cut, (cut[1] * cut[2], cut[2], 1))


def norms(x: Tensor, axes: tuple[int, ...], shortest: float = NEAR) -> Tensor:
    """Return ‖x‖₂ of float32 vectors on a CPU in float64, reduced axes kept with size 1.

    Args:
        x: the array.
        axes: the axes that make one vector.
        shortest: norms below this may come out smaller than they are.
    """
    found = _quick_norms(x, axes)
    least, most = (n.item() for n in found.aminmax()) if found.numel() else (1.0, 1.0)
    if min(NEAR, shortest) <= least and most < FAR:
        return found
    return _norm(x, 2, axes, keepdim=True, dtype=torch.float64)  # type: ignore[no-any-return]


def _quick_norms(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return what `norms` does, but that squares may over- or underflow."""
    blocks = _blocks(x, axes)
    if blocks is not None:
        found: Tensor = _norm(_norm(blocks, 2, 2), 2, 1, dtype=torch.float64)
        return found.view([1 if a in axes else n for a, n in enumerate(x.shape)])
    # Merging neighbours in memory saves calls, if both are summed or neither is.
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    y, block = x.permute(order), BLOCK
    merged = [list(run) for _, run in itertools.groupby(order, key=lambda a: a in axes)]
    y = y.reshape([math.prod([x.shape[a] for a in run]) for run in merged])
    summed = [i for i, run in enumerate(merged) if run[0] in axes]
    for i in reversed(summed):  # a block may hold at most `BLOCK` squares before float64
        n = y.shape[i]
        size = min(block, n)
        full = n - n % size
        parts = _norm(y.narrow(i, 0, full).reshape(*y.shape[:i], -1, size, *y.shape[i + 1 :]), dim=i + 1)
        rest = [_norm(y.narrow(i, full, n - full), dim=i, keepdim=True)] if full < n else []
        y, block = torch.cat([parts, *rest], dim=i) if rest else parts, max(1, block // size)
    found = _norm(y, dim=summed, keepdim=True, dtype=torch.float64)
    kept = found.reshape([1 if a in axes else x.shape[a] for a in order])
    return kept.permute([order.index(a) for a in range(x.ndim)])
