"""Run SGD, Adam and AdamW with the projection on a GPU, in one Triton kernel for all tensors of a dtype.

The kernel takes tensors whose memory is rows, one vector each. A program takes some rows of one tensor and walks along
them block by block: it updates a block, stores it, and adds the squares of the stored values in float64, where squares
of float32, bfloat16 and float16 are exact and do not overflow. If the norm of a row is outside of its band, the program
walks along its rows once more, while they are in cache, and scales that row.

The host never waits. The numbers that the kernel needs for each tensor are in tables on the device, which are written
again only if an address or the band has changed. The tables get their numbers as arguments of kernels, so that a CUDA
graph that is being captured keeps them.

The engine runs only with `engine="triton"`. It has been tested in Triton's interpreter and compiled for an H100, but it
has never run on a GPU. `python -m benchmarks.gpu` measures whether it is faster.
"""

# Triton's functions at the end have no types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW

from projgd.bands import Band
from projgd.torch.engines.base import (
    Engine,
    Job,
    add_missing_states,
    betas_of,
    reasons_not_to_step,
    rows_in_memory,
    state_names,
)

if TYPE_CHECKING:
    import triton.language as tl  # `_kernel` imports it when it is needed, because that takes 0.3 s

LONGEST = 2**16  # one program walks along a row alone, so longer rows would be slow
PIECE = 2**13  # one program takes this many entries of a tensor without vectors
SHAPES = ((128, 8, 1), (16, 64, 1), (1, 1024, 1), (16, 64, 16), (1, 1024, 16))
"""The rows that a program takes at a time, the entries of each, and a divisor of every row and of the tensor.

If the divisor is 16, and 16 divides the addresses, the program reads and writes 16 bytes at a time.
"""

_STAYS = Band(0.0, math.inf, 0.0, math.inf)
_CAPTURED: list[Any] = []  # captured graphs read these tables, and may live for ever


class Triton(Engine):
    """Update and project on a GPU in one launch."""

    name = "triton"
    steps = True

    def refuses(self, job: Job, p: Tensor) -> str | None:
        return next((reason for is_refused, reason in _reasons(job, p) if is_refused), None)

    def prepare(self, job: Job, params: Sequence[Tensor]) -> list[_Batch]:
        _numbers(job, True)  # an error about them must come before a state is added
        batches: dict[Any, _Batch] = {}
        for j, p in enumerate(params):
            starts = job.inner is SGD and job.optimizer.state[p].get("momentum_buffer") is None
            batches.setdefault((p.device, p.dtype, starts), _Batch(starts)).add(j, p, job)
        return list(batches.values())

    def run(self, prepared: list[_Batch], job: Job, params: Sequence[Tensor]) -> None:
        for batch in prepared:
            batch.step([params[j] for j in batch.places], job)
        torch.autograd.graph.increment_version(params)

    def memory(self, job: Job, params: Sequence[Tensor]) -> Any:
        """Return the addresses of parameters and states, and the strides of parameters and gradients.

        None where a state or a gradient is missing, or a gradient is sparse.
        """
        try:
            states = [job.optimizer.state.get(p, {})[k].data_ptr() for p in params for k in state_names(job)]
            return states, [(p.data_ptr(), p.stride(), p.grad.stride()) for p in params]  # type: ignore[union-attr]
        except (KeyError, AttributeError, RuntimeError):
            return None


def _reasons(job: Job, p: Tensor) -> Iterator[tuple[bool, str]]:
    """Yield pairs: whether the engine refuses a parameter for some reason, and the reason for the user."""
    is_gpu = p.device.type == "cuda" and torch.cuda.get_device_capability(p.device) >= (7, 0)
    is_interpreted = p.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    unmeasured = 'it has not been measured on a GPU yet: engine="triton" asks for it'
    yield job.forced != "triton", unmeasured if p.device.type == "cuda" else ""
    yield from reasons_not_to_step(job, p)
    yield job.group.get("update") is not None, "it takes the update as it comes"
    yield job.metric is not None, "it projects in the Euclidean metric only"
    yield job.skip is not None, "it does not unscale gradients, which GradScaler leaves to fused steps"
    yield not (is_gpu or is_interpreted), f"it is for CUDA of compute capability 7.0 or higher, not for {p.device}"
    yield is_gpu and not _is_installed(), "it needs triton, which comes with PyTorch for CUDA, numpy, and a C compiler"
    yield p.dtype not in (torch.float32, torch.bfloat16, torch.float16), f"squares of {p.dtype} may overflow"
    vectors = job.vectors(p)
    rows = rows_in_memory(p, vectors)
    yield rows is None, "the vectors do not lie in memory one after the other"
    if vectors is not None and rows is not None:
        yield rows[1] > LONGEST, f"the vectors have {rows[1]} entries, and it walks along at most {LONGEST}"
        band = job.band(p, vectors)
        yield band is None, f"{job.constraint} is not a set of norms"
        yield band is not None and band.filled is not None, "float16 must be rounded entry by entry here"


@functools.cache
def _is_installed() -> bool:
    has_compiler = bool(os.environ.get("CC")) or any(map(shutil.which, ("cc", "gcc", "clang")))
    return has_compiler and all(importlib.util.find_spec(package) is not None for package in ("triton", "numpy"))


@dataclass
class _Batch:
    """Hold parameters of one dtype on one device that one launch takes.

    Attributes:
        starts: whether SGD's momentum starts with this step.
        places: the positions of the parameters in the engine's list.
        tensors: ten numbers of each parameter: its address; those of up to four states; its number of entries, and that
            of each row; the index of its `SHAPES`; the first program that takes it; the number of these programs.
        tables: the tables on the device by name, each with what it was made from.
    """

    starts: bool
    places: list[int] = field(default_factory=list)
    tensors: list[tuple[int, ...]] = field(default_factory=list)
    tables: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def add(self, place: int, p: Tensor, job: Job) -> None:
        """Add a parameter, and make its missing states."""
        names, vectors = state_names(job), job.vectors(p)
        if names:
            add_missing_states(job, p)
        length = PIECE if vectors is None else rows_in_memory(p, vectors)[1]  # type: ignore[index]
        shape = 0 if length <= 16 else (1 if length <= 256 else 2) + 2 * (length % 16 == p.numel() % 16 == 0)
        addresses = [p.data_ptr(), *(job.optimizer.state[p][k].data_ptr() for k in names), 0, 0, 0, 0][:5]
        sizes = p.numel(), length, shape, sum(numbers[9] for numbers in self.tensors)
        self.tensors.append((*addresses, *sizes, -(-p.numel() // (length * SHAPES[shape][0]))))
        self.places.append(place)

    def step(self, params: Sequence[Tensor], job: Job) -> None:
        """Update and project in one launch, after another one that raises Adam's step counts."""
        device, lr = params[0].device, job.group["lr"]
        moving_lr = lr if isinstance(lr, Tensor) and lr.device == device else None  # reading it would wait
        grads = [p.grad.data_ptr() for p in params if p.grad is not None]
        radii = [(job.radii[p].data_ptr(), job.radii[p]._version) for p in params if p in job.radii]
        places, bands = self._table("bands", (job.constraint, radii), lambda: _bands(job, params))
        numbers = (n for parts in zip(self.tensors, places, strict=True) for part in parts for n in part)
        tensors = self._table("tensors", places, lambda: _write([*numbers], device))
        gradients = self._table("gradients", grads, lambda: _write(grads, device))
        programs = self._table("programs", None, lambda: _program_tensors([t[9] for t in self.tensors], device))
        is_aligned = not any(a % 16 for numbers in (grads, *(t[:5] for t in self.tensors)) for a in numbers)
        if job.inner is not SGD:
            torch._foreach_add_([job.optimizer.state[p]["step"] for p in params], 1)
        with torch.cuda.device(device if device.type == "cuda" else -1):
            _kernel()[(len(programs),)](
                *(programs, tensors, gradients, bands, moving_lr),
                (0.0 if moving_lr is not None else float(lr), *_numbers(job, self.starts)),
                dtype=getattr(tl, str(params[0].dtype).removeprefix("torch.")),
                is_sgd=job.inner is SGD,
                shapes=SHAPES if is_aligned else tuple((rows, width, 1) for rows, width, _ in SHAPES),
            )
        self.starts = False

    def _table(self, name: str, source: Any, make: Callable[[], Any]) -> Any:
        """Return a table, and make it again if its source has changed.

        A table that a graph makes while it is captured exists only when the graph runs, so other steps do not use it.
        """
        known = self.tables.get(name)
        if known is None or known[0] != source:
            known = (source, make())
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            _CAPTURED.append(known)
        else:
            self.tables[name] = known
        return known[1]


def _write(numbers: list[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return numbers on a device; they go there as arguments of kernels, without a copy from the host."""
    table = torch.zeros(len(numbers), dtype=dtype, device=device)
    torch._foreach_add_(table.unbind(), numbers)
    return table


def _program_tensors(counts: list[int], device: torch.device) -> Tensor:
    """Return 0, 1, 2, … on a device, each as often as `counts` says: the tensor of each program."""
    return torch.repeat_interleave(_write(counts, device), output_size=sum(counts))


def _bands(job: Job, params: Sequence[Tensor]) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the position of the bands of each parameter, and all bands.

    A position is the first band and the step from row to row. A band is five numbers. All rows share one band, with a
    step of 0, unless a set has taken a radius from each row.
    """
    bands = [job.band(p) or _STAYS for p in params]
    shared = list(dict.fromkeys([_STAYS, *(b for b in bands if not isinstance(b.high, Tensor))]))
    flat = [float(x) for b in shared for x in (b.low, b.high, b.up, b.down, b.pull)]
    places, tables, count = [], [_write(flat, params[0].device, torch.float64)], len(shared)
    for b in bands:
        places.append((count, 1) if isinstance(b.high, Tensor) else (shared.index(b), 0))
        if isinstance(b.high, Tensor):
            numbers = [x + torch.zeros_like(b.high).double() for x in (b.low, b.high, b.up, b.down, b.pull)]
            tables.append(torch.stack(numbers, -1).reshape(-1))
            count += b.high.numel()
    return places, torch.cat(tables)


def _numbers(job: Job, starts: bool) -> tuple[float, ...]:
    """Return the hyperparameters as `_sgd` and `_adam` read them, after lr."""
    group, decay, sign = job.group, float(job.group["weight_decay"]), -1.0 if job.group["maximize"] else 1.0
    if job.inner is SGD:
        kept, share = (0.0, 1.0) if starts else (float(group["momentum"]), 1.0 - group["dampening"])
        return sign, decay, float(group["momentum"]), kept, share, float(group["nesterov"])
    is_decoupled, betas = group.get("decoupled_weight_decay", job.inner is AdamW), betas_of(group)
    common = sign, decay, float(is_decoupled), float(group["amsgrad"]), float(group["eps"])
    return (*common, *(n for b in betas for n in (b, 1 - b, math.log2(b) if b else -math.inf)))


@functools.cache
def _kernel() -> Any:
    """Import Triton, and return the kernel.

    The functions below have no decorator of Triton's, so that this module can be imported without it. Triton looks up
    the names in them among the globals of the module.
    """
    import triton.language

    globals()["tl"] = triton.language
    for function in (_pointer, _sgd, _adam, _factors, _walk, _step):
        globals()[function.__name__] = triton.jit(getattr(function, "fn", function))
    return _step


def _step(
    programs, tensors, grads, bands, lr, numbers, dtype: tl.constexpr, is_sgd: tl.constexpr, shapes: tl.constexpr
):
    """Update and project all tensors of a dtype in one kernel; each program takes some rows of one of them.

    Args:
        programs: int64, the tensor that each program takes.
        tensors: int64, twelve numbers of each tensor: those of `_Batch.tensors` and of `_bands`.
        grads: int64, the address of each gradient.
        bands: float64, five numbers of each band: low, high, up, down, pull.
        lr: a tensor with the learning rate; None where it is the first of `numbers`.
        numbers: the learning rate, and what `_numbers` returns.
        dtype: that of the tensors.
        is_sgd: whether this is SGD; else it is Adam.
        shapes: `SHAPES`, with 1 as the divisor where 16 does not divide all addresses.
    """
    k = tl.load(programs + tl.program_id(0))
    tensor = tensors + 12 * k
    shape, program = tl.load(tensor + 7), tl.program_id(0) - tl.load(tensor + 8)
    rate = tl.load(lr).to(tl.float32) if lr is not None else numbers[0]
    for i in tl.static_range(len(shapes)):
        if shape == i:
            _walk(tensor, grads + k, bands, program, rate, numbers, dtype, is_sgd, *shapes[i])


def _walk(tensor, gradient, bands, program, lr, numbers, dtype, is_sgd, rows, width, unit):
    """Update the rows of a program, block by block, and walk along them once more if one has to be scaled."""
    length = tl.multiple_of(tl.load(tensor + 6).to(tl.int32), unit)
    start = program * rows * length
    rest = tl.multiple_of(tl.minimum(tl.load(tensor + 5) - start, rows * length).to(tl.int32), unit)
    row, column = tl.arange(0, rows), tl.arange(0, width)[None, :]
    weights, grads = _pointer(tensor, start, dtype, unit), _pointer(gradient, start, dtype, unit)
    squares = tl.zeros([rows, width], tl.float64)
    for j in range(0, length, width):
        at = row[:, None] * length + (column + j)
        mask = (column + j < length) & (at < rest)
        w = tl.load(weights + at, mask, other=0).to(tl.float32)
        d = numbers[1] * tl.load(grads + at, mask, other=0).to(tl.float32)
        if is_sgd:
            w = _sgd(w, d, _pointer(tensor + 1, start, dtype, unit) + at, mask, lr, numbers)
        else:
            n = tl.load(tl.load(tensor + 1).to(tl.pointer_type(tl.float32))).to(tl.float64)
            m, v = _pointer(tensor + 2, start, dtype, unit) + at, _pointer(tensor + 3, start, dtype, unit) + at
            w = _adam(w, d, m, v, _pointer(tensor + 4, start, dtype, unit) + at, n, mask, lr, numbers)
        tl.store(weights + at, w, mask)
        stored = tl.where(mask, w.to(dtype).to(tl.float64), 0.0)
        squares += stored * stored
    band = bands + 5 * (tl.load(tensor + 10) + (program * rows + row) * tl.load(tensor + 11))
    moves, factors = _factors(tl.sqrt(tl.sum(squares, 1)), band, row * length < rest)
    if tl.max(moves.to(tl.int32), 0) > 0:
        tl.debug_barrier()  # other threads of the program may have written what this one reads
        for j in range(0, length, width):
            at = row[:, None] * length + (column + j)
            mask = (column + j < length) & moves[:, None]
            w = tl.load(weights + at, mask, other=0).to(tl.float64) * factors[:, None]
            tl.store(weights + at, w.to(tl.float32), mask)


def _pointer(address, start, dtype, unit):
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(dtype)) + start, unit)


def _factors(norms, band, is_row):
    """Return which rows move, and their factors as in `Band.factors`."""
    low, high = tl.load(band, is_row, other=0), tl.load(band + 1, is_row, other=0)
    up, down = tl.load(band + 2, is_row, other=0), tl.load(band + 3, is_row, other=0)
    pull, stays = tl.load(band + 4, is_row, other=1), (norms >= low) & (norms <= high)
    moves = (norms > 0) & (norms < float("inf")) & (stays == 0)
    factors = tl.where(norms < low, up, down) / tl.where(moves, norms, 1.0)
    return moves, tl.where(pull == 1, factors, pull * factors + (1 - pull))


def _sgd(w, d, m, mask, lr, numbers):
    """Return weights w with gradient d after `torch.optim.SGD`; m is its momentum."""
    decay, momentum, kept, share, nesterov = numbers[2], numbers[3], numbers[4], numbers[5], numbers[6]
    d = tl.where(decay != 0, d + decay * w, d)
    b = kept * tl.load(m, mask & (momentum != 0), other=0).to(tl.float32) + share * d
    tl.store(m, b, mask & (momentum != 0))
    return w - lr * tl.where(momentum == 0, d, tl.where(nesterov != 0, d + momentum * b, b))


def _adam(w, d, m, v, x, n, mask, lr, numbers):
    """Return weights w with gradient d after step n of `torch.optim.Adam`; m, v and x are its moments."""
    decay, is_decoupled, amsgrad, eps = numbers[2], numbers[3], numbers[4], numbers[5]
    d = tl.where((decay != 0) & (is_decoupled == 0), d + decay * w, d)
    w = tl.where((decay != 0) & (is_decoupled != 0), w - lr * decay * w, w)
    a = numbers[6] * tl.load(m, mask, other=0).to(tl.float32) + numbers[7] * d
    b = numbers[9] * tl.load(v, mask, other=0).to(tl.float32) + (numbers[10] * d) * d
    tl.store(m, a, mask)
    tl.store(v, b, mask)
    most = tl.load(x, mask & (amsgrad != 0), other=0).to(tl.float32)
    b = tl.where((amsgrad != 0) & (most > b), most, b)
    tl.store(x, b, mask & (amsgrad != 0))
    size = (lr / (1 - tl.exp2(n * numbers[8]))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp2(n * numbers[11])).to(tl.float32)
    return w - tl.div_rn(size * a, tl.div_rn(tl.sqrt_rn(b), root) + eps)
