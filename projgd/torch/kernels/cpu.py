"""The step and the projection on a CPU: update, norm and rescaling of a vector in cache, all tensors in one call.

Memory is seen as (K0, R0, K1, R1): the axes R make a vector, the axes K count vectors. Rows are (1, 1, rows, length),
columns (1, length, columns, 1), a transposed convolution (1, in, out, kernel), grouped (groups, in, out, kernel). The
work is cut into tiles that fit into a core's cache; a tile is a run of contiguous memory for every r0. A vector that is
one such run is rescaled right after its update, others at the end of their tile. Where a vector is longer than a tile,
its tiles leave their sums of squares, and a second pass rescales.

Sums are taken in float64. The squares of float32 and bfloat16 numbers neither over- nor underflow there, and their sum
is as good as exact in any order: `reassoc` in `_plus_square`, which vectorizes it, is harmless. No flag assumes that
NaN or infinity cannot occur. Of float64 numbers at most `BLOCK` are added up in any order, and at most as many blocks:
within the 4096 additions that `projections.guard` allows for. SGD sums as it updates, for it waits for memory anyway.

Everything is in this one file because numba's cache on disk looks at the age of one file only.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from numba import carray, njit, prange, types
from numba.extending import intrinsic, overload, register_jitable

from projgd.torch.kernels.plan import WIDEST
from projgd.torch.kernels.rules import Adam, Sgd

BLOCK = 2048
TINY = 2.0**-100
SHORT = 256  # vectors of fewer entries are not worth a loop each: their squares are taken after the update of a tile
SOME = 256  # entries of a vector that the first guess at its multiplier looks at
STEPS = 30
LIGHTEST, HEAVIEST = 2.0**-50, 2.0**50  # D in which no power that is summed here over- or underflows
INSIDE = 1 - 2.0**-50  # a sum of squares below the square of the threshold, times this, needs no root
UPDATE, MEASURE, PROJECT = range(3)  # how far `_vectors` goes
TENSOR, K0, R0_FROM, R0_TO, K1_FROM, K1_TO, R1_FROM, R1_TO, FIRST, COUNT, PLACE = range(11)  # the columns of `tiles`

_COUNTER = np.empty(0, np.float32)  # the dtype of torch's step counts

_exact = njit(error_model="numpy")
_inlined = njit(error_model="numpy", forceinline=True)  # a call for every vector takes as long as 300 entries
_fast = njit(error_model="numpy", fastmath=True)  # for finite numbers only


@intrinsic
def _pointer(typing: Any, address: Any, like: Any) -> Any:
    """The address as a pointer to the dtype of `like`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), codegen


@intrinsic
def _fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a · b + c, rounded once: where torch's kernels do, so that the bits agree."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return c(a, b, c), codegen


@intrinsic
def _plus_product(typing: Any, total: Any, x: Any, y: Any) -> Any:
    """total + x · y, which a compiler may add up in any order: so it takes several at once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags = ("reassoc", "contract")
        return builder.fadd(args[0], builder.fmul(args[1], args[2], flags=flags), flags=flags)

    return types.float64(types.float64, types.float64, types.float64), codegen


@register_jitable
def _plus_square(total: float, x: float) -> Any:
    return _plus_product(total, x, x)


@intrinsic
def _as_bits(typing: Any, x: Any) -> Any:
    """The bits of a float32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), codegen


@intrinsic
def _from_bits(typing: Any, x: Any) -> Any:
    """The float32 with these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), codegen


@register_jitable
def _view(address: int, start: int, size: int, like: Any) -> Any:
    return carray(_pointer(address + start * like.itemsize, like), size)


def _load(x: Any, i: int) -> Any:
    """x[i] as a number; 16-bit integers are the bits of bfloat16."""


def _store(x: Any, i: int, value: Any) -> Any:
    """x[i] = value, rounded to nearest even."""


@overload(_load, strict=False)
def _load_of(x: Any, i: Any) -> Any:
    if x.dtype == types.uint16:
        return lambda x, i: _from_bits(np.uint32(np.uint32(x[i]) << np.uint32(16)))
    return lambda x, i: x[i]


@overload(_store, strict=False)
def _store_of(x: Any, i: Any, value: Any) -> Any:
    if x.dtype == types.uint16:

        def store(x: Any, i: Any, value: Any) -> None:
            bits = _as_bits(value)
            rounded = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            x[i] = np.uint16(rounded if value == value else np.uint32(0x7FC0))

        return store

    def store_as_is(x: Any, i: Any, value: Any) -> None:
        x[i] = value

    return store_as_is


def _as(x: Any, value: float) -> Any:
    """`value` in the type that x is computed in."""


@overload(_as, strict=False)
def _as_of(x: Any, value: Any) -> Any:
    if x.dtype == types.float64:
        return lambda x, value: np.float64(value)
    return lambda x, value: np.float32(value)


@register_jitable
def _add(sums: Any, ww: float, uu: float, wu: float) -> None:
    sums[0] += ww
    sums[1] += uu
    sums[2] += wu


@_inlined
def _sgd(h: Any, table: Any, k: int, start: int, size: int, factors: Any, like: Any, sums: Any) -> float:
    """torch.optim.SGD on a run of memory; returns the sum of the squares of what is stored."""
    p, g = _view(table[0, k], start, size, like), _view(table[1, k], start, size, like)
    m, first = _view(table[2, k], start, size, like), factors[k, 0] != 0
    lr, momentum, undamped = _as(p, h.lr), _as(p, h.momentum), _as(p, h.undamped)
    decay, sign, nesterov = _as(p, h.decay), _as(p, h.sign), h.nesterov != 0
    total = uu = wu = 0.0
    for i in range(p.size):
        w = _load(p, i)
        d = sign * _load(g, i)
        if decay != 0:
            d = _fma(decay, w, d)
        if momentum != 0:
            b = d if first else _fma(undamped, d, momentum * _load(m, i))
            _store(m, i, b)
            d = _fma(momentum, b, d) if nesterov else b
        if sums is None:
            _store(p, i, _fma(-lr, d, w))
            total = _plus_square(total, np.float64(_load(p, i)))
        else:
            x, y = np.float64(w), np.float64(-lr * d)
            total, uu, wu = _plus_square(total, x), _plus_square(uu, y), _plus_product(wu, x, y)
    if sums is not None:
        _add(sums, total, uu, wu)
    return total


@_inlined
def _adam(h: Any, table: Any, k: int, start: int, size: int, factors: Any, like: Any, sums: Any) -> float:
    """torch.optim.Adam and AdamW on a run of memory. Its squares are left for later: with them, the loop is slower."""
    p, g = _view(table[0, k], start, size, like), _view(table[1, k], start, size, like)
    m, v = _view(table[2, k], start, size, like), _view(table[3, k], start, size, like)
    x = _view(table[4, k], start, size, like)
    beta2, eps, decay, sign = _as(p, h.beta2), _as(p, h.eps), _as(p, h.decay), _as(p, h.sign)
    weight1, weight2, shrink = _as(p, 1 - h.beta1), _as(p, 1 - h.beta2), _as(p, 1 - h.lr * h.decay)
    decoupled, amsgrad = h.decoupled != 0, h.amsgrad != 0
    rate, root = _as(p, -factors[k, 0]), _as(p, factors[k, 1])
    near, beyond = weight1 < 0.5, weight1 - _as(p, 1.0)  # torch.lerp starts from the nearer end
    ww = uu = wu = 0.0
    for i in range(p.size):
        w = _load(p, i)
        d = sign * _load(g, i)
        if decay != 0:
            if decoupled:
                w = w * shrink
            else:
                d = _fma(decay, w, d)
        a = _load(m, i)
        a = _fma(weight1, d - a, a) if near else _fma(beyond, d - a, d)
        b = _fma(weight2 * d, d, beta2 * _load(v, i))
        _store(m, i, a)
        _store(v, i, b)
        if amsgrad:
            most = _load(x, i)
            b = most if most > b else b
            _store(x, i, b)
        u = rate * a / (np.sqrt(b) / root + eps)
        if sums is None:
            _store(p, i, w + u)
        else:
            y, z = np.float64(w), np.float64(u)
            ww, uu, wu = _plus_square(ww, y), _plus_square(uu, z), _plus_product(wu, y, z)
    if sums is not None:
        _add(sums, ww, uu, wu)
    return np.nan


@_inlined
def _squares(h: None, table: Any, k: int, start: int, size: int, factors: Any, like: Any, sums: None) -> float:
    """The sum of the squares on a run of memory."""
    p = _view(table[0, k], start, size, like)
    total = 0.0
    for i in range(p.size):
        total = _plus_square(total, np.float64(_load(p, i)))
    return total


@_exact
def _add_squares(x: Any, sums: Any) -> None:
    """One square to each sum: the vectors lie side by side."""
    for i in range(x.size):
        y = np.float64(_load(x, i))
        sums[i] += y * y


@_exact
def _scale(x: Any, factor: Any) -> None:
    """In float32, a factor such as 1e-3 / 3e38 would be subnormal, and some per cent off."""
    f, tiny = _as(x, factor), factor < TINY
    for i in range(x.size):
        _store(x, i, _as(x, _load(x, i) * factor) if tiny else _load(x, i) * f)


@_exact
def _scale_each(x: Any, factors: Any) -> None:
    for i in range(x.size):
        _store(x, i, _as(x, _load(x, i) * factors[i]))


@_exact
def _count(counters: Any, h: Any, factors: Any) -> None:
    """Adam's step counts, one more each; `factors` become the step size and the root of the second bias correction."""
    step = np.float32(0)
    for k in range(len(counters)):
        counter = carray(_pointer(counters[k], _COUNTER), 1)
        counter[0] += np.float32(1)
        if k == 0 or counter[0] != step:
            step = counter[0]
            size = h.lr / (1 - h.beta1 ** np.float64(step))
            root = math.sqrt(1 - h.beta2 ** np.float64(step))
        factors[k, 0], factors[k, 1] = size, root


def _begin(h: Any, counters: Any, factors: Any) -> None:
    """What a step does once."""


def _measures(h: Any) -> Any:
    """Whether `_update` returns the sum of the squares."""


def _update(h: Any, table: Any, k: int, start: int, size: int, factors: Any, like: Any, sums: Any) -> Any:
    """The update of a run of memory of tensor k, none where `h` is None, and the sum of the squares then.

    With `sums` the states are updated, but the weights w are left; Σw², Σu² and Σwu are added, u being their update.
    """


@overload(_begin, strict=False)
def _begin_of(h: Any, counters: Any, factors: Any) -> Any:
    if getattr(h, "instance_class", None) is Adam:
        return lambda h, counters, factors: _count(counters, h, factors)
    return lambda h, counters, factors: None


@overload(_measures, strict=False)
def _measures_of(h: Any) -> Any:
    measures = getattr(h, "instance_class", None) is not Adam
    return lambda h: measures


@overload(_update, strict=False, jit_options={"error_model": "numpy", "forceinline": True})
def _update_of(h: Any, table: Any, k: Any, start: Any, size: Any, factors: Any, like: Any, sums: Any) -> Any:
    rule: Any = {Sgd: _sgd, Adam: _adam}.get(getattr(h, "instance_class", type(None)), _squares)
    return lambda h, table, k, start, size, factors, like, sums: rule(h, table, k, start, size, factors, like, sums)


@_exact
def _sgd_again(
    h: Any, table: Any, k: int, start: int, size: int, factors: Any, like: Any, keep: Any, share: Any, push: Any
) -> None:
    p, g, m = (
        _view(table[0, k], start, size, like),
        _view(table[1, k], start, size, like),
        _view(table[2, k], start, size, like),
    )
    lr, momentum, sign = _as(p, h.lr), _as(p, h.momentum), _as(p, h.sign)
    nesterov = h.nesterov != 0
    for i in range(p.size):
        d = sign * _load(g, i)
        if momentum != 0:
            d = _fma(momentum, _load(m, i), d) if nesterov else _load(m, i)
        w = _load(p, i)
        _store(p, i, _fma(keep, w, _fma(share, w, push * (-lr * d))))


@_exact
def _adam_again(
    h: Any, table: Any, k: int, start: int, size: int, factors: Any, like: Any, keep: Any, share: Any, push: Any
) -> None:
    p, m, v = (
        _view(table[0, k], start, size, like),
        _view(table[2, k], start, size, like),
        _view(table[4, k], start, size, like),
    )
    rate, root, eps = _as(p, -factors[k, 0]), _as(p, 1 / factors[k, 1]), _as(p, h.eps)
    for i in range(p.size):
        u, w = rate * _load(m, i) / (np.sqrt(_load(v, i)) * root + eps), _load(p, i)
        _store(p, i, _fma(keep, w, _fma(share, w, push * u)))


def _again(
    h: Any, table: Any, k: int, start: int, size: int, factors: Any, like: Any, keep: Any, share: Any, push: Any
) -> None:
    """A run of memory becomes keep · w + share · w + push · u, u the update read off the states; no weight decay."""


@overload(_again, strict=False)
def _again_of(
    h: Any, table: Any, k: Any, start: Any, size: Any, factors: Any, like: Any, keep: Any, share: Any, push: Any
) -> Any:
    rule: Any = {Sgd: _sgd_again, Adam: _adam_again}[h.instance_class]
    return lambda h, table, k, start, size, factors, like, keep, share, push: rule(
        h, table, k, start, size, factors, like, keep, share, push
    )


@_exact
def _shares(w: Any, weights: Any) -> Any:
    """How w + share · w + push · u is computed: not as w + share · w where that cancels."""
    near = abs(weights[0]) < 0.5
    return _as(w, 1.0 if near else 0.0), _as(w, weights[0] if near else weights[0] + 1), _as(w, weights[1])


@_exact
def _measure_short(w: Any, u: Any, run: int, sums: Any) -> None:
    """Add Σw², Σu² and Σwu of every `run` entries to a row of `sums`."""
    for j in range(w.size // run):
        ww = uu = wu = 0.0
        for i in range(run):
            x, y = np.float64(w[j * run + i]), np.float64(u[j * run + i])
            ww, uu, wu = ww + x * x, uu + y * y, wu + x * y
        _add(sums[j], ww, uu, wu)


@_exact
def _move_short(w: Any, u: Any, run: int, weights: Any) -> None:
    for j in range(w.size // run):
        keep, share, push = _shares(w, weights[j])
        for i in range(run):
            x = w[j * run + i]
            w[j * run + i] = _fma(keep, x, _fma(share, x, push * u[j * run + i]))


@_exact
def _pull_back(x: Any, squares: float, threshold: float, target: float) -> bool:
    """A vector to the nearest point, if it is outside; whether its sum of squares is a number."""
    norm = math.sqrt(squares)
    if norm > threshold and norm < np.inf:
        _scale(x, target / norm)
    return norm < np.inf


@_exact
def _vectors(
    h: Any,
    table: Any,
    k: int,
    start: int,
    count: int,
    run: int,
    factors: Any,
    like: Any,
    sums: Any,
    limits: Any,
    then: int,
) -> None:
    """Update `count` vectors, or parts of vectors, of `run` entries each that lie side by side in tensor k.

    Then, by `then`: nothing; or their squares are added to `sums`; or they are projected, each while it is in the
    first-level cache. A sum is taken in blocks, each in any order: it errs as `BLOCK` additions and one for each block.
    """
    inside = limits[k, 0] * limits[k, 0] * INSIDE
    for j in range(count):
        total, at = 0.0, start + j * run
        for done in range(0, run, BLOCK):
            size = min(BLOCK, run - done)
            squares = _update(h, table, k, at + done, size, factors, like, None)
            if then != UPDATE and not _measures(h):
                squares = _update(None, table, k, at + done, size, factors, like, None)
            total += squares
        if then == MEASURE:
            sums[j] += total
        elif then == PROJECT and not total < inside:
            known = _pull_back(_view(table[0, k], at, run, like), total, limits[k, 0], limits[k, 1])
            if like.itemsize == 8 and not known:
                limits[k, 2] = 1


@_exact
def _rescale(
    eps: Any, i: int, tiles: Any, sums: Any, table: Any, layouts: Any, limits: Any, factors: Any, rooms: Any, like: Any
) -> None:
    """To the nearest points: the part of every vector that lies in this tile."""
    tile, scales = tiles[i], rooms[0]
    k = tile[TENSOR]
    address, layout, limit = table[0, k], layouts[k], limits[k]
    width, run = tile[K1_TO] - tile[K1_FROM], tile[R1_TO] - tile[R1_FROM]
    outside = False
    for j in range(width):
        norm = math.sqrt(sums[j])
        scales[j] = 1.0
        if norm > limit[0] and norm < np.inf:
            scales[j] = limit[1] / norm
            outside = True
        elif like.itemsize == 8 and not norm < np.inf:
            limit[2] = 1
    if not outside:
        return
    for r in range(tile[R0_FROM], tile[R0_TO]):
        start = ((tile[K0] * layout[1] + r) * layout[2] + tile[K1_FROM]) * layout[3] + tile[R1_FROM]
        if run == 1:
            _scale_each(_view(address, start, width, like), scales)
            continue
        for j in range(width):
            if scales[j] != 1:
                _scale(_view(address, start + j * run, run, like), scales[j])


@_exact
def _widen(x: Any, v: Any, root: float, eps: float, scale: float, y: Any, d: Any) -> bool:
    """y = x · scale and D = √v / root + ε; whether D is such that `_multiplier` can work with it."""
    factor, by, least = np.float32(scale), np.float32(root), np.float32(eps)
    low, high = np.uint32(0xFFFFFFFF), np.uint32(0)
    for i in range(y.size):
        y[i] = _load(x, i) * factor
        d[i] = np.sqrt(_load(v, i)) / by + least
        bits = _as_bits(d[i])  # in the order of the numbers, then NaN and negative ones
        low, high = bits if bits < low else low, bits if bits > high else high
    return bool(_from_bits(low) >= LIGHTEST and _from_bits(high) <= HEAVIEST)


@_fast
def _block_moments(y: Any, d: Any, multiplier: Any) -> Any:
    one, zero, first, second = np.float32(1), np.float32(0), np.float32(0), np.float32(0)
    for i in range(y.size):
        inverse = one / (d[i] + multiplier)
        x = y[i] * (d[i] * inverse)
        h = x * inverse
        zero += x * x
        first += x * h
        second += h * h
    return zero, first, second


@_exact
def _moments(y: Any, d: Any, multiplier: float) -> Any:
    """Σ x², Σ x² / (D + λ) and Σ x² / (D + λ)² of x = y · D / (D + λ)."""
    zero, first, second = 0.0, 0.0, 0.0
    for start in range(0, y.size, BLOCK):
        part = _block_moments(y[start : start + BLOCK], d[start : start + BLOCK], np.float32(multiplier))
        zero += part[0]
        first += part[1]
        second += part[2]
    return zero, first, second


@_exact
def _multiplier(y: Any, d: Any, norm: float) -> Any:
    """λ > 0 with ‖x(λ)‖ = 1, x as in `_moments`; y has a norm above 1. -1 where it was not found.

    Newton's iteration on 1/‖x(λ)‖ = 1 with one more term of the series. Left of the root it never steps over; from the
    right, where the guess from the first entries may lie, Newton's own step leads back to the left.
    """
    some = min(y.size, SOME)
    _, first, second = _moments(y[:some], d[:some], 0.0)
    zero, first, second = norm * norm, first * y.size / some, second * y.size / some
    if first == 0:
        _, first, second = _moments(y, d, 0.0)
    found = least = 0.0
    for step in range(STEPS):
        excess = math.sqrt(zero) - 1
        newton, bend = excess * zero / first, 1.5 * excess * (zero * second / (first * first) - 1)
        found = max(found + (newton * (1 + bend) if abs(bend) < 0.3 else newton), least)
        if not found < np.inf:
            return -1.0
        if step > 0 and abs(bend) < 0.1 and abs(excess) * bend * bend < 2e-9:  # the next excess, but for rounding
            return found
        zero, first, second = _moments(y, d, found)
        if zero > 1:
            least = found
    return -1.0


@_fast
def _weigh(y: Any, d: Any, multiplier: float) -> float:
    """y becomes x(λ); its norm."""
    by, total = np.float32(multiplier), 0.0
    for i in range(y.size):
        y[i] *= d[i] / (d[i] + by)
        wide = np.float64(y[i])
        total += wide * wide
    return math.sqrt(total)


@_exact
def _store_scaled(x: Any, y: Any, scale: float) -> None:
    factor = np.float32(scale)
    for i in range(x.size):
        _store(x, i, y[i] * factor)


@_exact
def _in_metric(
    eps: Any, i: int, tiles: Any, sums: Any, table: Any, layouts: Any, limits: Any, factors: Any, rooms: Any, like: Any
) -> None:
    """To the nearest points in the metric D, whole vectors at a time: those that begin in this tile."""
    tile = tiles[i]
    k = tile[TENSOR]
    size, limit = layouts[k, 3], limits[k]
    if tile[FIRST] != i:
        return
    for j in range(tile[K1_TO] - tile[K1_FROM]):
        norm, target = math.sqrt(sums[j]), limit[1]
        if not (norm > limit[0] and norm < np.inf):
            continue
        start = (tile[K0] * layouts[k, 2] + tile[K1_FROM] + j) * size
        x, v = _view(table[0, k], start, size, like), _view(table[len(table) - 1, k], start, size, like)
        y, d = rooms[1][:size], rooms[2][:size]
        multiplier = -1.0
        usable = 2.0**-60 < target < 2.0**60 and norm < 2.0**20 * target
        if usable and _widen(x, v, factors[k, 1], eps, 1 / target, y, d):
            multiplier = _multiplier(y, d, norm / target)
        if multiplier < 0:
            limit[2] = 1
        else:
            _store_scaled(x, y, target / _weigh(y, d, multiplier))


def _bring_back(
    eps: Any, i: int, tiles: Any, sums: Any, table: Any, layouts: Any, limits: Any, factors: Any, rooms: Any, like: Any
) -> None:
    """Bring what is outside, of the vectors of tile i with these `sums` of squares, back into the ball."""


@overload(_bring_back, strict=False)
def _bring_back_of(
    eps: Any, i: Any, tiles: Any, sums: Any, table: Any, layouts: Any, limits: Any, factors: Any, rooms: Any, like: Any
) -> Any:
    project = _rescale if isinstance(eps, types.NoneType) else _in_metric
    return lambda eps, i, tiles, sums, table, layouts, limits, factors, rooms, like: project(
        eps, i, tiles, sums, table, layouts, limits, factors, rooms, like
    )


def step(
    h: Any,
    eps: Any,
    like: Any,
    table: Any,
    counters: Any,
    factors: Any,
    layouts: Any,
    tiles: Any,
    ranges: Any,
    limits: Any,
    left: Any,
) -> None:
    """One optimizer step and its projection, for all tensors; or the projection alone.

    Args:
        h: the rule of the update with its hyperparameters, `Sgd` or `Adam`; None for no update. Compiled for each.
        eps: None for the Euclidean projection; or ε of the metric D = √v / root + ε, where the last row of `table`
            has the addresses of v, and the second column of `factors` the roots. For vectors of contiguous memory.
        like: an empty array of the stored dtype.
        table: int64 (operands, tensors): addresses of parameter, gradient and three states; without an update of
            the parameter alone.
        counters: int64 (tensors,): addresses of Adam's step counts; otherwise empty.
        factors: float64 (tensors, 2): Sgd: 1 in the first column where the momentum starts; Adam: written here.
        layouts: int64 (tensors, 4): (K0, R0, K1, R1).
        tiles: int64 (tiles, 11), the columns as named above; FIRST and COUNT are the tiles that share its vectors,
            PLACE is where its sums lie in `left`.
        ranges: int64 (threads + 1,): which tiles are whose.
        limits: float64 (tensors, 3): threshold and target; an infinite threshold leaves a tensor free. The third
            becomes 1 where the squares of float64 numbers overflowed, or a metric is out of range: that tensor is left
            to `projections` and `metrics`.
        left: float64, room for the sums of the tiles that share vectors; empty if none do.
    """
    _begin(h, counters, factors)
    longest = 0
    if eps is not None:
        for k in range(len(layouts)):
            longest = max(longest, layouts[k, 3])
    for t in prange(len(ranges) - 1):
        sums = np.zeros(WIDEST)
        rooms = np.ones(WIDEST), np.empty(longest, np.float32), np.empty(longest, np.float32)
        for i in range(ranges[t], ranges[t + 1]):
            tile = tiles[i]
            k = tile[TENSOR]
            layout = layouts[k]
            width, run = tile[K1_TO] - tile[K1_FROM], tile[R1_TO] - tile[R1_FROM]
            free = limits[k, 0] == np.inf
            whole = eps is None and tile[COUNT] == 1 and tile[R0_TO] - tile[R0_FROM] == 1 and run > 1
            then = UPDATE if free else PROJECT if whole else MEASURE
            for j in range(width):
                sums[j] = 0.0
            for r in range(tile[R0_FROM], tile[R0_TO]):
                start = ((tile[K0] * layout[1] + r) * layout[2] + tile[K1_FROM]) * layout[3] + tile[R1_FROM]
                if run >= SHORT:
                    _vectors(h, table, k, start, width, run, factors, like, sums, limits, then)
                    continue
                if h is not None:
                    _update(h, table, k, start, width * run, factors, like, None)
                if free:
                    continue
                if run > 1:
                    _vectors(None, table, k, start, width, run, factors, like, sums, limits, then)
                else:
                    _add_squares(_view(table[0, k], start, width, like), sums)
            if then != MEASURE:
                continue
            if tile[COUNT] == 1:
                _bring_back(eps, i, tiles, sums, table, layouts, limits, factors, rooms, like)
            else:
                left[tile[PLACE] : tile[PLACE] + width] = sums[:width]
    if left.size:
        for t in prange(len(ranges) - 1):
            sums = np.zeros(WIDEST)
            rooms = np.ones(WIDEST), np.empty(longest, np.float32), np.empty(longest, np.float32)
            for i in range(ranges[t], ranges[t + 1]):
                tile = tiles[i]
                k = tile[TENSOR]
                if tile[COUNT] == 1 or limits[k, 0] == np.inf:
                    continue
                width = tile[K1_TO] - tile[K1_FROM]
                for j in range(width):
                    sums[j] = 0.0
                    for other in range(tile[FIRST], tile[FIRST] + tile[COUNT]):
                        sums[j] += left[tiles[other, PLACE] + j]
                _bring_back(eps, i, tiles, sums, table, layouts, limits, factors, rooms, like)


def _compiled(function: Any) -> Any:
    """`function` compiled on its first call and kept on disk, where there is a directory to keep it in."""
    jit: Any = functools.partial(njit, parallel=True, nogil=True, error_model="numpy")
    try:
        return jit(cache=True)(function)
    except RuntimeError:  # no directory can be written
        return jit()(function)


def shape(
    h: Any,
    move: bool,
    like: Any,
    table: Any,
    counters: Any,
    factors: Any,
    layouts: Any,
    tiles: Any,
    ranges: Any,
    places: Any,
    sums: Any,
    weights: Any,
) -> None:
    """One half of an optimizer step whose update is shaped: measure, then move.

    Args:
        h, like, table, counters, factors, layouts, tiles, ranges: as in `step`. No weight decay.
        move: False measures the update u, leaving the states as after the step and the parameters as they are; True
            takes u from these states.
        places: int64 (tiles, 2): where the sums of a tile begin, and the first of its vectors.
        sums: float64 (places, 3): written are Σw², Σu² and Σwu of the part of every vector that lies in a tile.
        weights: float64 (vectors, 2): added to w is the first times w and the second times u.
    """
    _begin(h, counters, factors)
    for t in prange(len(ranges) - 1):
        own, room = table.copy(), np.empty(BLOCK, like.dtype)
        for step in range(ranges[t + 1] - ranges[t]):
            i = ranges[t + 1] - 1 - step if move else ranges[t] + step  # what was read last is in cache
            tile = tiles[i]
            k, place, vector = tile[TENSOR], places[i, 0], places[i, 1]
            layout = layouts[k]
            width, run = tile[K1_TO] - tile[K1_FROM], tile[R1_TO] - tile[R1_FROM]
            short = max(1, BLOCK // run) * run if run < SHORT else 0
            if not move:
                sums[place : place + width] = 0.0
            for r in range(tile[R0_FROM], tile[R0_TO]):
                start = ((tile[K0] * layout[1] + r) * layout[2] + tile[K1_FROM]) * layout[3] + tile[R1_FROM]
                if not short:
                    for j in range(width):
                        if move:
                            keep, plus, push = _shares(like, weights[vector + j])
                            _again(h, table, k, start + j * run, run, factors, like, keep, plus, push)
                        else:
                            _update(h, table, k, start + j * run, run, factors, like, sums[place + j])
                    continue
                for a in range(0, width * run, short):  # several vectors at a time, their update taken on its own
                    u = room[: min(short, width * run - a)]
                    w = _view(table[0, k], start + a, u.size, like)
                    own[0, k] = np.int64(room.ctypes.data) - (start + a) * like.itemsize
                    u[:] = 0
                    if move:
                        keep, plus, push = _as(u, 0.0), _as(u, 0.0), _as(u, 1.0)
                        _again(h, own, k, start + a, u.size, factors, like, keep, plus, push)
                        _move_short(w, u, run, weights[vector + a // run :])
                    else:
                        _update(h, own, k, start + a, u.size, factors, like, None)
                        _measure_short(w, u, run, sums[place + a // run :])


run = _compiled(step)
run_shaped = _compiled(shape)
