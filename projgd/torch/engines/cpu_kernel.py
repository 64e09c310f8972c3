"""Define the kernel of the engine `cpu`: it updates, measures and rescales a vector while it is in cache.

A tensor is `count` rows of `length` float32 numbers, one after the other in memory; each row is a vector. The rows are
cut into tiles, and the tiles are divided among threads. Within a tile, a few rows are updated, then their norms are
taken and those outside of their band are scaled, all while they are in the first-level cache. A row that is longer than
a tile is shared: each of its tiles stores its sum of squares, and a second pass rescales the row.

Sums are taken in float64. Squares of float32 numbers neither over- nor underflow there, and their sum is as good as
exact in any order. So `_plus_product` may reorder them, which vectorises the loop. No flag assumes that NaN or infinity
cannot occur, except in `_prepare_metric` and `_sum_block`, which see finite numbers only.

Everything compiled is in this file, because numba's cache on disk checks the age of one file only.
"""

# numba's decorators have no types.
# mypy: allow-untyped-decorators

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import carray, njit, prange, types
from numba.extending import intrinsic

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]

BLOCK = 512
"""Entries of short rows that are updated in one call, and then measured; a longer row is updated on its own."""

TENSOR, START, COUNT, LENGTH, BAND, STEP, FIRST, PARTS = range(8)  # the columns of `tiles`
PARAM, GRAD, M, V, LARGEST, WEIGHTS = range(6)  # the rows of the table of addresses
GUESS = 256  # the first guess at a multiplier reads this many entries of a vector
STEPS = 30  # the iteration for a multiplier usually needs 2 or 3 steps
LIGHTEST, HEAVIEST = (127 - 50) << 23, (127 + 50) << 23  # the bits of 2^-50 and 2^50, see `_prepare_metric`

_exact = njit(error_model="numpy")
_finite = njit(error_model="numpy", fastmath=True)


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """Return the address as a pointer to float32 numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(address), codegen


@intrinsic
def _fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a · b + c, rounded once as in torch's kernels, so that the bits agree."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return c(a, b, c), codegen


@intrinsic
def _plus_product(typing: Any, total: Any, x: Any, y: Any) -> Any:
    """Return total + x · y; the compiler may add in any order, so it adds several products at once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags = ("reassoc", "contract")
        return builder.fadd(args[0], builder.fmul(args[1], args[2], flags=flags), flags=flags)

    return types.float64(types.float64, types.float64, types.float64), codegen


@_exact
def _view(address: int, start: int, size: int) -> Any:
    return carray(_pointer(address + 4 * start), size)


@_exact
def _unscale(g: Any, scale: float) -> None:
    divisor = np.float32(scale)
    for i in range(g.size):
        g[i] /= divisor


@_exact
def _update_sgd(h: Any, table: Any, k: int, start: int, size: int, undamped: float, total: Any) -> Any:
    """Run torch.optim.SGD on a run of memory of tensor k, and return the sum of the squares of what is stored.

    It sums while it updates, because it waits for memory anyway: summing afterwards takes 5 to 15 % longer. With
    `total` None it does not sum. There are two loops, because a single loop with all conditions is not vectorised (40 %
    longer).
    """
    p, g, m = _view(table[PARAM, k], start, size), _view(table[GRAD, k], start, size), _view(table[M, k], start, size)
    lr, momentum, decay, sign = np.float32(h[0]), np.float32(h[1]), np.float32(h[2]), np.float32(h[3])
    nesterov, scale, share = h[4] != 0, h[5], np.float32(undamped)
    if scale != 1:
        _unscale(g, scale)
    if momentum == 0:
        for i in range(p.size):
            d = sign * g[i]
            if decay != 0:
                d = _fma(decay, p[i], d)
            p[i] = _fma(-lr, d, p[i])
            if total is not None:
                total = _plus_product(total, np.float64(p[i]), np.float64(p[i]))
    else:
        for i in range(p.size):
            d = sign * g[i]
            if decay != 0:
                d = _fma(decay, p[i], d)
            m[i] = _fma(share, d, momentum * m[i])
            d = _fma(momentum, m[i], d) if nesterov else m[i]
            p[i] = _fma(-lr, d, p[i])
            if total is not None:
                total = _plus_product(total, np.float64(p[i]), np.float64(p[i]))
    return total


@_exact
def _update_adam(h: Any, table: Any, k: int, start: int, size: int, rates: Any) -> None:
    """Run torch.optim.Adam or AdamW on a run of memory of tensor k, without a sum, which would slow it down."""
    p, g, m = _view(table[PARAM, k], start, size), _view(table[GRAD, k], start, size), _view(table[M, k], start, size)
    v, x = _view(table[V, k], start, size), _view(table[LARGEST, k], start, size)
    weight1, weight2, beta2 = np.float32(1 - h[1]), np.float32(1 - h[2]), np.float32(h[2])
    eps, decay, sign, shrink = np.float32(h[3]), np.float32(h[4]), np.float32(h[5]), np.float32(1 - h[0] * h[4])
    decoupled, amsgrad, scale = h[6] != 0, h[7] != 0, h[8]
    rate, root = np.float32(-rates[k, 0]), np.float32(rates[k, 1])
    is_near, beyond = weight1 < np.float32(0.5), weight1 - np.float32(1)  # torch.lerp starts from the nearer end
    if scale != 1:
        _unscale(g, scale)
    for i in range(p.size):
        w = p[i]
        d = sign * g[i]
        if decay != 0:
            if decoupled:
                w = w * shrink
            else:
                d = _fma(decay, w, d)
        a = m[i]
        a = _fma(weight1, d - a, a) if is_near else _fma(beyond, d - a, d)
        b = _fma(weight2 * d, d, beta2 * v[i])
        m[i] = a
        v[i] = b
        if amsgrad:
            most = x[i]
            b = most if most > b else b
            x[i] = b
        p[i] = w + rate * a / (np.sqrt(b) / root + eps)


@_exact
def _start(table: Any, k: int, start: int, size: int, reads_weights: bool) -> None:
    """Let the update of a shaped tensor start from zero or, if it reads the weights, from a copy of them."""
    if table[WEIGHTS, k] != table[PARAM, k]:
        u, w = _view(table[PARAM, k], start, size), _view(table[WEIGHTS, k], start, size)
        for i in range(u.size):
            u[i] = w[i] if reads_weights else np.float32(0)


@_exact
def _observe(table: Any, k: int, start: int, count: int, size: int, observed: Any, place: int) -> None:
    """Leave the updates u alone in the memory of a shaped tensor, and write Σw², Σu² and Σwu of `count` vectors."""
    reads_weights, sums, _ = observed
    for n in range(count if table[WEIGHTS, k] != table[PARAM, k] else 0):
        u, w = _view(table[PARAM, k], start + n * size, size), _view(table[WEIGHTS, k], start + n * size, size)
        ww = uu = wu = 0.0
        for i in range(u.size):
            if reads_weights:
                u[i] -= w[i]
            a, b = np.float64(w[i]), np.float64(u[i])
            ww, uu, wu = _plus_product(ww, a, a), _plus_product(uu, b, b), _plus_product(wu, a, b)
        sums[place + n, 0], sums[place + n, 1], sums[place + n, 2] = ww, uu, wu


@_exact
def _move(table: Any, k: int, start: int, count: int, size: int, moved: Any, at: int) -> None:
    """Add weight · w + factor · u to each of `count` vectors w, in the order of `projgd.torch.shaping`."""
    adds_weights, numbers = moved
    for n in range(count):
        w, u = _view(table[PARAM, k], start + n * size, size), _view(table[GRAD, k], start + n * size, size)
        weight, factor = np.float32(numbers[at + n, 0]), np.float32(numbers[at + n, 1])
        for i in range(w.size):
            share = u[i] * factor
            w[i] += share + w[i] * weight if adds_weights else share


@_exact
def _count(h: Any, counters: Any, rates: Any) -> None:
    """Add 1 to the step counts, and write the step size and the root of the second bias correction to `rates`."""
    count = np.float32(0)
    for k in range(len(counters)):
        counter = carray(_pointer(counters[k]), 1)
        counter[0] += np.float32(1)
        if k == 0 or counter[0] != count:
            count = counter[0]
            size = h[0] / (1 - h[1] ** np.float64(count))
            root = math.sqrt(1 - h[2] ** np.float64(count))
        rates[k, 0], rates[k, 1] = size, root


@_exact
def _sum_squares(address: int, start: int, size: int) -> float:
    x, total = _view(address, start, size), 0.0
    for i in range(x.size):
        total = _plus_product(total, np.float64(x[i]), np.float64(x[i]))
    return total


@_exact
def _is_inside(square: float, low: float, high: float) -> bool:
    """Return whether a vector with this sum of squares surely stays, without a root for every vector."""
    return low * low * (1 + 2.0**-50) <= square <= high * high * (1 - 2.0**-50)


@_exact
def _factor(norm: float, band: Any) -> Any:
    """Return the factor of a vector, as `Band.factors` does."""
    low, high, up, down, pull = band[0], band[1], band[2], band[3], band[4]
    if low <= norm <= high or not 0 < norm < np.inf:
        return 1.0
    factor = (up if norm < low else down) / norm
    return factor if pull == 1 else pull * factor + (1 - pull)


@_exact
def _scale(x: Any, factor: float) -> None:
    """Multiply x, in float64 if the factor is subnormal or infinite in float32, such as 1e-3 / 3e38."""
    if 2.0**-100 < factor < 2.0**100:
        short = np.float32(factor)
        for i in range(x.size):
            x[i] *= short
    else:
        for i in range(x.size):
            x[i] = np.float32(x[i] * factor)


@_exact
def _project(
    metric_eps: Any,
    norm: float,
    band: Any,
    table: Any,
    k: int,
    start: int,
    size: int,
    root: float,
    space: Any,
    unsettled: Any,
) -> None:
    """Project a vector of this norm, or without a metric a part of one; mark a tensor whose metric is out of range."""
    factor = _factor(norm, band)
    if factor == 1:
        return
    x = _view(table[PARAM, k], start, size)
    if metric_eps is None:
        _scale(x, factor)
    else:
        v = _view(table[LARGEST, k], start, size)
        if not _project_in_metric(x, v, root, metric_eps, norm, band[3], space):
            unsettled[k] = 1


@_exact
def _project_in_metric(x: Any, v: Any, root: float, eps: float, norm: float, goal: float, space: Any) -> bool:
    """Move x to the nearest point of norm `goal`, which is less than its `norm`, in D = √v / root + ε.

    Returns:
        False if the metric is out of range; x does not change then.
    """
    y, d = space[0, : x.size], space[1, : x.size]
    if not (2.0**-60 < goal < 2.0**60 and norm < 2.0**20 * goal and _prepare_metric(x, v, root, eps, goal, y, d)):
        return False
    multiplier = _find_multiplier(y, d, norm / goal)
    if multiplier < 0:
        return False
    scale = np.float32(goal / _shrink(y, d, multiplier))
    for i in range(x.size):
        x[i] = y[i] * scale
    return True


@_exact
def _prepare_metric(x: Any, v: Any, root: float, eps: float, goal: float, y: Any, d: Any) -> Any:
    """Write y = x / goal and D = √v / root + ε; return whether no summed power of D over- or underflows."""
    factor, divisor, least = np.float32(1 / goal), np.float32(root), np.float32(eps)
    # The bits of positive floats are ordered like the floats, and those of NaN are the largest.
    low, high, bits = np.uint32(0xFFFFFFFF), np.uint32(0), d.view(np.uint32)
    for i in range(y.size):
        y[i] = x[i] * factor
        d[i] = np.sqrt(v[i]) / divisor + least
        low, high = min(low, bits[i]), max(high, bits[i])
    return low >= LIGHTEST and high <= HEAVIEST


@_exact
def _find_multiplier(y: Any, d: Any, norm: float) -> Any:
    """Return λ > 0 with ‖x(λ)‖ = 1, x as in `_sum_moments`, for y with a norm above 1; -1 if none was found.

    This is Newton's iteration on 1/‖x(λ)‖ = 1 with one more term of the series. Left of the root it never steps over.
    The guess from the first entries may be right of the root; Newton's own step leads back to the left from there.
    """
    size = min(y.size, GUESS)
    _, first, second = _sum_moments(y[:size], d[:size], 0.0)
    zeroth, first, second = norm * norm, first * y.size / size, second * y.size / size
    if first == 0:
        _, first, second = _sum_moments(y, d, 0.0)
    multiplier = lower = 0.0
    for step in range(STEPS):
        excess = math.sqrt(zeroth) - 1
        newton, bend = excess * zeroth / first, 1.5 * excess * (zeroth * second / (first * first) - 1)
        multiplier = max(multiplier + (newton * (1 + bend) if abs(bend) < 0.3 else newton), lower)
        if not multiplier < np.inf:
            return -1.0
        if step > 0 and abs(bend) < 0.1 and abs(excess) * bend * bend < 2e-9:  # an estimate of the next excess
            return multiplier
        zeroth, first, second = _sum_moments(y, d, multiplier)
        if zeroth > 1:
            lower = multiplier
    return -1.0


@_exact
def _sum_moments(y: Any, d: Any, multiplier: float) -> Any:
    """Return Σ x², Σ x² / (D + λ) and Σ x² / (D + λ)² of x = y · D / (D + λ)."""
    zeroth, first, second = 0.0, 0.0, 0.0
    for start in range(0, y.size, BLOCK):
        block = _sum_block(y[start : start + BLOCK], d[start : start + BLOCK], np.float32(multiplier))
        zeroth, first, second = zeroth + block[0], first + block[1], second + block[2]
    return zeroth, first, second


@_finite
def _sum_block(y: Any, d: Any, multiplier: Any) -> Any:
    zeroth = first = second = np.float32(0)
    for i in range(y.size):
        inverse = np.float32(1) / (d[i] + multiplier)
        x = y[i] * (d[i] * inverse)
        h = x * inverse
        zeroth, first, second = zeroth + x * x, first + x * h, second + h * h
    return zeroth, first, second


@_finite
def _shrink(y: Any, d: Any, multiplier: float) -> float:
    """Write x(λ) of `_sum_moments` into y, and return its norm."""
    short, total = np.float32(multiplier), 0.0
    for i in range(y.size):
        y[i] *= d[i] / (d[i] + short)
        wide = np.float64(y[i])
        total += wide * wide
    return math.sqrt(total)


def step(sgd: Any, adam: Any, observed: Any, moved: Any, metric_eps: Any, arrays: Any, tiles: Any, ranges: Any) -> None:
    """Run one optimizer step and its projection for all tensors.

    A shaped update takes two runs. The first (`observed`) projects nothing: it writes the updates into spare memory,
    and the sums that `projgd.updates` needs. The second (`moved`, no optimizer) adds them to the weights and projects.

    Args:
        sgd: lr, momentum, weight decay, sign of the gradient, whether nesterov, and what gradients are divided by
            first: GradScaler's scale, or 1. None for Adam: the kernel is compiled for each.
        adam: lr, beta1, beta2, ε, weight decay, sign, whether the decay is decoupled, whether amsgrad, scale. None for
            SGD, and both are None in the second run.
        observed: None; or whether the update reads the weights, sums: float64 (places, 3), written here for each vector
            or part of one, and for each tile the place of its first.
        moved: None; or whether a share of the weights is added, and numbers: float64 (vectors, 2), that share and the
            multiple of the update for each vector, which has its row of `bands` in the same place.
        metric_eps: None for the Euclidean projection; or ε of the metric D = √v / root + ε, with v the last address.
        arrays: addresses: int64 (6, tensors), of parameter, gradient, three states, and the parameter again. In
            the first run for shaped updates, spare memory comes first; in the second, updates replace gradients;
            counters: int64 (tensors,), addresses of Adam's step counts, otherwise empty;
            rates: float64 (tensors, 2), for SGD the first column is what the gradient is multiplied by before it is
            added to the momentum, for Adam it is written here;
            bands: float64 (bands, 5), low, high, up, down, pull;
            sums: float64 (tiles,), written here by tiles that share a vector;
            unsettled: int64 (tensors,), becomes 1 where the metric is out of range, and the tensor needs
            `projgd.metrics.project_band`.
        tiles: int64 (tiles, 8), see `cpu_tables.cut_tiles`.
        ranges: int64 (threads + 1,): which tiles are whose.
    """
    table, counters, rates, bands, sums, unsettled = arrays
    if adam is not None:
        _count(adam, counters, rates)
    longest, is_shared = 1, False
    for i in range(len(tiles)):
        longest, is_shared = max(longest, tiles[i, LENGTH] * tiles[i, PARTS]), is_shared or tiles[i, PARTS] > 1
    for t in prange(len(ranges) - 1):
        space = np.empty((2, longest if metric_eps is not None else 1), np.float32)
        for i in range(ranges[t], ranges[t + 1]):
            tile = tiles[i]
            k, length, is_free = tile[TENSOR], tile[LENGTH], tile[BAND] < 0
            side = max(1, BLOCK // length)
            for j in range(0, tile[COUNT], side):
                count, start = min(side, tile[COUNT] - j), tile[START] + j * length
                at, square = tile[BAND] + j * tile[STEP], 0.0
                is_summed = count == 1 and not is_free and sgd is not None
                # numba removes a branch that cannot run because a value is None, but only a simple `if`.
                if observed is not None:
                    _start(table, k, start, count * length, observed[0])
                if sgd is not None:
                    if is_summed:
                        square = _update_sgd(sgd, table, k, start, length, rates[k, 0], 0.0)
                    else:
                        _update_sgd(sgd, table, k, start, count * length, rates[k, 0], None)
                if adam is not None:
                    _update_adam(adam, table, k, start, count * length, rates)
                if observed is not None:
                    _observe(table, k, start, count, length, observed, observed[2][i] + j)
                if moved is not None:
                    _move(table, k, start, count, length, moved, at)
                for n in range(0 if is_free else count):
                    row, first = at + n * tile[STEP], start + n * length
                    if not is_summed:
                        square = _sum_squares(table[PARAM, k], first, length)
                    if tile[PARTS] > 1:
                        sums[i] = square
                    elif not _is_inside(square, bands[row, 0], bands[row, 1]):
                        norm, root = math.sqrt(square), rates[k, 1]
                        _project(metric_eps, norm, bands[row], table, k, first, length, root, space, unsettled)
    if is_shared:
        for t in prange(len(ranges) - 1):
            space = np.empty((2, longest if metric_eps is not None else 1), np.float32)
            for i in range(ranges[t], ranges[t + 1]):
                tile = tiles[i]
                first, end, length = tile[FIRST], tile[FIRST] + tile[PARTS], tile[LENGTH]
                if metric_eps is not None:  # a metric needs whole vectors
                    length = tiles[first:end, LENGTH].sum() if first == i else 0
                if tile[PARTS] > 1 and length > 0:
                    k, norm, band = tile[TENSOR], math.sqrt(sums[first:end].sum()), bands[tile[BAND]]
                    _project(metric_eps, norm, band, table, k, tile[START], length, rates[k, 1], space, unsettled)


def _compile() -> Any:
    """Return `step`, which numba compiles on its first call and keeps on disk if it can write a directory."""
    try:
        return njit(parallel=True, nogil=True, error_model="numpy", cache=True)(step)
    except RuntimeError:  # numba raises this if it can write no directory
        return njit(parallel=True, nogil=True, error_model="numpy")(step)


_run = _compile()
_lock = threading.Lock()  # numba's simplest thread pool cannot be entered twice
_ready: set[tuple[type, ...]] = set()  # the types that the kernel is compiled for


def launch(threads: int, operands: tuple[Any, ...]) -> None:
    """Run the kernel, alone in this process, and alone on this machine if it may have to be compiled."""
    variant = tuple(map(type, operands))
    with _lock, contextlib.nullcontext() if variant in _ready else _compiling():
        of_torch = torch.get_num_threads()
        before = numba.get_num_threads()
        if torch.get_num_threads() != of_torch:  # numba has set the number of the OpenMP that both use
            torch.set_num_threads(of_torch)
        fewer = threads < before
        if fewer:  # numba takes three locks to set a number
            numba.set_num_threads(threads)
        try:
            _run(*operands)
        finally:
            if fewer:
                numba.set_num_threads(before)
        _ready.add(variant)


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Let one process at a time compile, because numba's index has one writer; the others find the result."""
    directory = _run.stats.cache_path
    if fcntl is None or directory is None:
        yield
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    with (Path(directory) / "projgd.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield  # closing the file releases the lock
