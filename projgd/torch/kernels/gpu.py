"""The step and the projection on a GPU, in Triton: all tensors of a dtype in one launch, long vectors in one more.

Memory is seen as (K0, R0, K1, R1), as in `plan`, and cut into tiles, one for each program. A program walks over its
tile in blocks of 1024 entries (A along R0, V vectors side by side, B along R1), adds up squares as it goes, and walks
once more, while the tile is in cache, if a vector has to be rescaled. `BLOCKS` are the shapes that a block may have:
vectors that are short, middling or long; pieces of one that is cut; columns. Where a vector is cut, its tiles leave
their sums of squares, and the second launch rescales. Nothing is read back by the host.

Sums are taken in float64, whatever is stored. The squares of float32, float16 and bfloat16 numbers are exact there and
neither over- nor underflow, and a sum of them in any order errs by less than n · 2^-53: a unit of float32 for 10^9
entries. Squares of float64 numbers are added up twice, as they are and made 2^600 times smaller before: the former
hold while they are finite, since 2^-400 < c. No entry passes through more than 32 + N / 32 + 16 additions (the blocks
of a tile; the N tiles of a vector; the trees within), nor more than there are entries: 1,072 for vectors of 2^21, the
longest of float64 that `path` lets through, and `projections.guard` allows for 4,096. Threshold and target are those of
`projections.ball_limits`; the product with the factor is taken in float64 and rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

_TILE = tl.constexpr(12)  # columns of `tiles`
_LAYOUT = tl.constexpr(4)  # and of `layouts`
_FAR = tl.constexpr(2.0**-600)


@triton.jit
def _pointer(address, offset, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    start = address.to(tl.pointer_type(DTYPE)) + offset
    return tl.multiple_of(start, 16) if ALIGNED else start


@triton.jit
def _floats(table):
    return table.to(tl.pointer_type(tl.float64))


@triton.jit
def _sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _ratio(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _sgd_numbers(h, starts, COMPUTE: tl.constexpr):
    lr, momentum, undamped = tl.load(h).to(COMPUTE), tl.load(h + 1).to(COMPUTE), tl.load(h + 2).to(COMPUTE)
    decay, sign, nesterov = tl.load(h + 3).to(COMPUTE), tl.load(h + 4).to(COMPUTE), tl.load(h + 5) != 0
    return lr, momentum, undamped, decay, sign, nesterov, tl.load(starts) != 0


@triton.jit
def _sgd(w, d, m, mask, numbers, DECAY: tl.constexpr, MOMENTUM: tl.constexpr):
    """torch.optim.SGD. In `live`: lr, momentum, 1 - dampening, weight decay, sign, nesterov."""
    lr, momentum, undamped, decay, sign, nesterov, starts = numbers
    d = sign * d
    if DECAY:
        d = decay * w + d
    if MOMENTUM:
        old = tl.load(m, mask, other=0).to(w.dtype)
        b = tl.where(starts, d, undamped * d + momentum * old)
        tl.store(m, b, mask)
        d = tl.where(nesterov, momentum * b + d, b)
    return w - lr * d


@triton.jit
def _adam_numbers(h, factors, COMPUTE: tl.constexpr):
    lr, beta1, beta2, decay = tl.load(h), tl.load(h + 1), tl.load(h + 2), tl.load(h + 4)
    eps, sign, decoupled = tl.load(h + 3).to(COMPUTE), tl.load(h + 5).to(COMPUTE), tl.load(h + 6) != 0
    shrink = tl.where(decoupled, 1 - lr * decay, 1.0).to(COMPUTE)
    size, root = tl.load(factors).to(COMPUTE), tl.load(factors + 1).to(COMPUTE)
    weights = (1 - beta1).to(COMPUTE), (1 - beta2).to(COMPUTE), beta2.to(COMPUTE)
    return decoupled, decay.to(COMPUTE), shrink, sign, weights[0], weights[1], weights[2], size, root, eps


@triton.jit
def _adam(w, d, m, v, x, mask, numbers, DECAY: tl.constexpr, AMSGRAD: tl.constexpr):
    """torch.optim.Adam and AdamW. In `live`: lr, beta1, beta2, eps, weight decay, sign, decoupled."""
    decoupled, decay, shrink, sign, weight1, weight2, beta2, size, root, eps = numbers
    d = sign * d
    if DECAY:
        d = tl.where(decoupled, d, decay * w + d)
        w = shrink * w
    a = tl.load(m, mask, other=0).to(w.dtype)
    b = tl.load(v, mask, other=0).to(w.dtype)
    near = weight1 < 0.5  # torch.lerp starts from the nearer end
    a = tl.where(near, a, d) + tl.where(near, weight1, weight1 - 1) * (d - a)
    b = (weight2 * d) * d + beta2 * b
    tl.store(m, a, mask)
    tl.store(v, b, mask)
    if AMSGRAD:
        most = tl.load(x, mask, other=0).to(w.dtype)
        b = tl.where(most > b, most, b)
        tl.store(x, b, mask)
    return w - _ratio(size * a, _ratio(_sqrt(b), root) + eps)


@triton.jit
def _correction(beta, count):
    """1 - betaⁿ, rounded as torch does: betaⁿ first. Of q = 1 - b the square of b is 1 - q(2 - q): nothing cancels."""
    total, power = count * 0.0, 1.0 - beta
    n = count.to(tl.int32)
    for _ in range(24):  # counts in float32 end at 2^24
        total = tl.where(n % 2 == 1, total + (1.0 - total) * power, total)
        power = power * (2.0 - power)
        n = n // 2
    return 1.0 - (1.0 - total)


@triton.jit
def _tile(
    layouts,
    live,
    factors,
    tiles,
    left,
    n,
    DTYPE: tl.constexpr,
    RULE: tl.constexpr,
    DECAY: tl.constexpr,
    EXTRA: tl.constexpr,
    ALIGNED: tl.constexpr,
    SECOND: tl.constexpr,
    A: tl.constexpr,
    V: tl.constexpr,
    B: tl.constexpr,
):
    """One tile, in blocks of shape (A, V, B)."""
    COMPUTE: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    tile = tiles + tl.program_id(0).to(tl.int64) * _TILE
    k, k0, r0_from, r0_to = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    k1_from, r1_from, first, pieces = tl.load(tile + 4), tl.load(tile + 6), tl.load(tile + 8), tl.load(tile + 9)
    width, run = (tl.load(tile + 5) - k1_from).to(tl.int32), (tl.load(tile + 7) - r1_from).to(tl.int32)
    layout, mine = layouts + k * _LAYOUT, live + k
    r0_size, k1_size, r1_size = tl.load(layout), tl.load(layout + 1), tl.load(layout + 2)
    here, gradient, first_state = tl.load(mine), tl.load(mine + n), tl.load(mine + 2 * n)
    second_state, third_state = tl.load(mine + 3 * n), tl.load(mine + 4 * n)
    if RULE == "sgd":
        numbers = _sgd_numbers(_floats(live + 9 * n), _floats(mine + 8 * n), COMPUTE)
    elif RULE == "adam":
        numbers = _adam_numbers(_floats(live + 9 * n), factors + 2 * k, COMPUTE)

    a, v, b = tl.arange(0, A)[:, None, None], tl.arange(0, V)[None, :, None], tl.arange(0, B)[None, None, :]
    if B == 1:  # of columns R1 is 1: what is known here makes loads wide
        r1_size = 1
    if ALIGNED:
        if B > 1:
            r1_size, run = tl.multiple_of(r1_size, 8), tl.multiple_of(run, 8)
        else:
            k1_size, width = tl.multiple_of(k1_size, 8), tl.multiple_of(width, 8)
    if A > 1:
        at = (a.to(tl.int64) * k1_size + v) * r1_size + b
    else:
        at = v * r1_size.to(tl.int32) + b
    start = (k0 * r0_size * k1_size + k1_from) * r1_size + r1_from

    if SECOND:
        near = tl.zeros([V], tl.float64)
        far = tl.zeros([V], tl.float64)
        lanes, other = tl.arange(0, V)[None, :], tl.arange(0, 32)[:, None]
        for i in range(0, pieces, 32):
            place = (first + (i + other) * width + lanes) * 2
            known = (i + other < pieces) & (lanes < width)
            near += tl.sum(tl.load(left + place, known, other=0), 0)
            far += tl.sum(tl.load(left + place + 1, known, other=0), 0)
    else:
        near_squares = tl.zeros([A, V, B], tl.float64)
        far_squares = tl.zeros([A, V, B], tl.float64)
        for r0 in range(r0_from, r0_to, A):
            for r1 in range(0, run, B):
                offset = start + r0 * k1_size * r1_size + r1
                mask = (r0 + a < r0_to) & (v < width) & (r1 + b < run)
                p = _pointer(here, offset, DTYPE, ALIGNED) + at
                w = tl.load(p, mask, other=0).to(COMPUTE)
                if RULE != "project":
                    d = tl.load(_pointer(gradient, offset, DTYPE, ALIGNED) + at, mask, other=0).to(COMPUTE)
                    m = _pointer(first_state, offset, DTYPE, ALIGNED) + at
                    if RULE == "sgd":
                        w = _sgd(w, d, m, mask, numbers, DECAY, EXTRA)
                    else:
                        s = _pointer(second_state, offset, DTYPE, ALIGNED) + at
                        x = _pointer(third_state, offset, DTYPE, ALIGNED) + at
                        w = _adam(w, d, m, s, x, mask, numbers, DECAY, EXTRA)
                    tl.store(p, w, mask)
                stored = tl.where(mask, w.to(DTYPE).to(tl.float64), 0.0)
                near_squares += stored * stored
                if DTYPE == tl.float64:
                    far_squares += (stored * _FAR) * (stored * _FAR)
        near = tl.sum(tl.sum(near_squares, 2), 0)
        far = tl.sum(tl.sum(far_squares, 2), 0)
        if pieces > 1:
            lanes = tl.arange(0, V)
            place = left + (tl.load(tile + 10) + lanes) * 2
            tl.store(place, near, lanes < width)
            tl.store(place + 1, far, lanes < width)

    threshold, target = tl.load(_floats(mine + 6 * n)), tl.load(_floats(mine + 7 * n))
    if not SECOND:  # what is cut waits
        threshold = tl.where(pieces == 1, threshold, float("inf"))
    huge = near == float("inf")
    norm = tl.sqrt(tl.where(huge, far, near))
    outside = ((far if DTYPE == tl.float64 else near) < float("inf")) & (tl.arange(0, V) < width)
    outside &= tl.where(huge, float("inf"), norm) > threshold
    if tl.max(outside.to(tl.int32), 0) > 0:
        tl.debug_barrier()  # other threads may have written what this one reads
        factor = (target / tl.where(outside, norm, 1.0))[None, :, None]
        shift = tl.where(huge, _FAR, 1.0)[None, :, None]
        chosen = outside[None, :, None]
        for r0 in range(r0_from, r0_to, A):
            for r1 in range(0, run, B):
                offset = start + r0 * k1_size * r1_size + r1
                mask = (r0 + a < r0_to) & (r1 + b < run) & chosen
                p = _pointer(here, offset, DTYPE, ALIGNED) + at
                w = tl.load(p, mask, other=0).to(tl.float64) * shift * factor
                tl.store(p, w.to(COMPUTE), mask)


@triton.jit(do_not_specialize=["n"])
def step(
    layouts,
    live,
    factors,
    tiles,
    left,
    n,
    DTYPE: tl.constexpr,
    RULE: tl.constexpr,
    DECAY: tl.constexpr,
    EXTRA: tl.constexpr,
    ALIGNED: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One program a tile: update, norms, rescaling; with SECOND the rescaling of vectors that are cut.

    Args:
        layouts: int64 (tensors, 4): R0, K1, R1, and which of `BLOCKS`.
        live: int64, what may change from step to step, in rows of one number a tensor: addresses of parameter,
            gradient, three states, step count; as float64 the threshold, infinite where a tensor is free, the target,
            and 1 where momentum starts. Then the numbers that the rule names.
        factors: float64 (tensors, 2), written by `count`.
        tiles: int64 (tiles, 12), the columns of `plan.tiles`, FIRST being the place in `left` of the first sum.
        left: float64 (sums, 2), room for the sums of vectors that are cut.
        n: number of tensors.
        RULE: "project" (no update), "sgd" or "adam"; DECAY: with weight decay; EXTRA: with momentum, or amsgrad.
    """
    k = tl.load(tiles + tl.program_id(0).to(tl.int64) * _TILE)
    shape = tl.load(layouts + k * _LAYOUT + 3)
    for i in tl.static_range(len(BLOCKS)):
        if shape == i:
            _tile(
                layouts,
                live,
                factors,
                tiles,
                left,
                n,
                DTYPE,
                RULE,
                DECAY,
                EXTRA,
                ALIGNED,
                SECOND,
                BLOCKS[i][0],
                BLOCKS[i][1],
                BLOCKS[i][2],
            )


@triton.jit(do_not_specialize=["n"])
def count(live, factors, n, BLOCK: tl.constexpr):
    """Adam's step counts, one more each; `factors` become step size and root of the second bias correction."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = k < n
    counter = tl.load(live + 5 * n + k, mask, other=0).to(tl.pointer_type(tl.float32))
    steps = tl.load(counter, mask, other=0) + 1
    tl.store(counter, steps, mask)
    h = _floats(live + 9 * n)
    tl.store(factors + 2 * k, tl.load(h) / _correction(tl.load(h + 1), steps.to(tl.float64)), mask)
    tl.store(factors + 2 * k + 1, tl.sqrt(_correction(tl.load(h + 2), steps.to(tl.float64))), mask)
