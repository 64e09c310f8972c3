"""The mathematics: Euclidean projections, written once on the Python array API.

Every function takes an array of NumPy, PyTorch or JAX and the (non-negative) axes that make one vector, and returns an
array of the same library, dtype, shape and device. This is the reference that every faster path is tested against.

How the contract is kept for a ball of radius c:

* *Scale, then square.* A vector is divided by its largest entry r before it is squared, so nothing over- or underflows.
* *Short sums.* Squares are summed in a tree of blocks, so the norm N has a relative error of at most e, in float32 36
  units in the last place even for 1,000,000 entries. (In JAX the tree is XLA's own: measured, not proven.)
  For JAX a plain sum of squares is tried first, which is as good for every norm that does not overflow.
* *A guard for rounding.* A vector with N > T = c(1 - e) may be outside; it is scaled to s = c(1 - 3e)/(1 + u), u the
  rounding of the stored type. So what is stored has a true norm of at most c, and its computed norm is at most T: the
  next projection leaves it alone. Every faster path uses the same T and s, with a norm that errs by at most e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_jax_namespace

Array = Any
Scalar = Any  # a Python float, or a 0-d array (traced, in JAX)
Total = Callable[[Array], Array]
Seldom = Callable[..., Any]
"""seldom(flag, careful, usual, *arrays): careful(*arrays), or where the flag is false usual(*arrays), the same then."""

BLOCK = 8
FIRST = 16  # a larger first block has less to write

# By computing dtype: the squares of numbers 2^-FAR as large never overflow; and for a c within 2^-RANGE and 2^RANGE no
# norm near it over- or underflows when it is squared.
FAR, RANGE = {"float32": 76, "float64": 560}, {"float32": 40, "float64": 300}


@dataclass(frozen=True)
class FloatType:
    """What the arithmetic must know of a stored dtype."""

    unit: float  # relative error of rounding to nearest, 2^-p
    tiny: float  # absolute error of rounding near zero, subnormals flushed or not
    compute: str  # the dtype that sums and products are taken in
    free: int  # how many squares a path may add up in any order that it likes, the rest of the sum being careful


FLOATS = {
    "float64": FloatType(2.0**-53, 2.0**-1022, "float64", 4096),
    "float32": FloatType(2.0**-24, 2.0**-126, "float32", 60),
    "bfloat16": FloatType(2.0**-8, 2.0**-126, "float32", 60),
    "float16": FloatType(2.0**-11, 2.0**-25, "float32", 60),
}


def float_type(x: Array, name: str = "the array") -> FloatType:
    """The `FloatType` of an array. Raises TypeError for integer, boolean, complex and other dtypes."""
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {dtype}; a projection needs one of {', '.join(FLOATS)}")
    return FLOATS[dtype]


# ---------------------------------------------------------------------------------------------------- the three sets


def project_ball(x: Array, c: Scalar, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
    """Nearest point with a norm of at most `c`, per vector: x · min(1, c / ‖x‖).

    >>> import numpy as np
    >>> project_ball(np.asarray([[3.0, 0.3], [4.0, 0.4]]), 1.0, (0,)).round(3)
    array([[0.6, 0.3],
           [0.8, 0.4]])
    """
    xp = xp or array_namespace(x)
    if 0 in x.shape:
        return x
    kind = float_type(x)
    limits = ball_limits(kind, x.shape, axes, c, xp)
    if is_jax_namespace(xp) and squares_fit(kind, c) and not limits.fill:
        return ball_in_jax(x, limits, partial(tree_sum, axes=axes, xp=xp))
    outside, z, _, z_norm = beyond(x, limits.threshold, axes, xp)
    y = z * (limits.target / xp.where(outside, z_norm, xp.ones_like(z_norm)))
    stored = _fill(y, limits.inner, limits.target, axes, xp, x.dtype) if limits.fill else xp.astype(y, x.dtype)
    return xp.where(outside, stored, x)


def project_sphere(
    x: Array, radius: Scalar, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False
) -> Array:
    """Nearest point with a norm of exactly `radius` (to rounding), per vector. A zero vector has none and stays zero.

    A vector whose computed norm is `radius` within a band comes back as it is. The band is one that no rounding can
    leave, so that projecting again changes no bit; for vectors that a step has just moved it is what rounding usually
    does, some ten times less, so that many steps stay where exact arithmetic would take them.

    >>> import numpy as np
    >>> project_sphere(np.asarray([[3.0, 0.0], [4.0, 0.0]]), 1.0, (0,)).round(3)
    array([[0.6, 0. ],
           [0.8, 0. ]])
    """
    xp = xp or array_namespace(x)
    if 0 in x.shape:
        return x
    scaled, z, _, z_norm = off_sphere(x, radius, axes, xp, moved)
    y = z * (radius / xp.where(scaled, z_norm, xp.ones_like(z_norm)))
    return xp.where(scaled, xp.astype(y, x.dtype), x)


def project_nonnegative(x: Array, xp: ModuleType | None = None) -> Array:
    """Nearest point without negative entries: max(x, 0). NaN stays NaN.

    >>> import numpy as np
    >>> project_nonnegative(np.asarray([-1.0, 2.0]))
    array([0., 2.])
    """
    xp = xp or array_namespace(x)
    return xp.where(x < 0, xp.zeros_like(x), x)


def project_box(x: Array, low: float, high: float, xp: ModuleType | None = None) -> Array:
    """Nearest point with every entry from `low` to `high`. NaN stays NaN.

    Each bound is first moved inward by a unit of the dtype, so that rounding to it cannot end outside.

    >>> import numpy as np
    >>> project_box(np.asarray([-3.0, 0.5, 2.0]), -1.0, 1.0)
    array([-1. ,  0.5,  1. ])
    """
    xp = xp or array_namespace(x)
    kind = float_type(x)
    least = xp.full_like(x, low + (abs(low) * kind.unit + 2 * kind.tiny if low else 0.0))
    most = xp.full_like(x, high - (abs(high) * kind.unit + 2 * kind.tiny if high else 0.0))
    return xp.where(x < least, least, xp.where(x > most, most, x))


# ------------------------------------------------------------------------------------------------------ norms, guards


def beyond(x: Array, threshold: Scalar, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Array, Array, Array]:
    """Which finite vectors have a computed norm above `threshold`; and x / r, r, ‖x / r‖ with r the largest entries."""
    z, r = _scaled(x, axes, xp)
    z_norm = _root(tree_sum(z * z, axes, xp), xp)
    return is_beyond(z_norm, r, threshold, xp), z, r, z_norm


def is_beyond(z_norm: Array, r: Array, threshold: Scalar, xp: ModuleType) -> Array:
    """Which finite vectors have a norm r · z_norm above `threshold`."""
    # Compared 2^16 times smaller, where neither side overflows. Written as "not inside", so that a NaN c shows. A NaN
    # entry may show in the sum alone: XLA leaves it out of the largest of 64 numbers or more on a CPU.
    return xp.isfinite(r) & xp.isfinite(z_norm) & ~(z_norm * (r * 2.0**-16) <= threshold * 2.0**-16)


def squares_fit(kind: FloatType, c: Scalar) -> bool:
    """Whether norms around c, a known number, may be squared as they are."""
    reach = RANGE[kind.compute]
    return isinstance(c, (int, float)) and 2.0**-reach <= c <= 2.0**reach


def ball_by_squares(
    x: Array, limits: BallLimits, total: Total, xp: ModuleType, seldom: Seldom, first: bool
) -> tuple[Array, Array]:
    """`project_ball` in the form that XLA makes fast, and what each vector was multiplied by.

    One plain sum of squares serves every norm that does not overflow when it is squared. The vectors whose squares do
    overflow are projected on their own, in a branch: `first`, before the others are scaled, or after.

    `total` sums an array over the axes that make a vector.
    """
    compute = getattr(xp, float_type(x).compute)

    def nearer(x: Array, square: Array) -> tuple[Array, Array]:
        far, w = 2.0 ** -FAR[float_type(x).compute], xp.astype(x, compute)
        smaller = total((w * far) * (w * far))
        huge = xp.isinf(square) & xp.isfinite(smaller)
        factor = limits.target / _root(xp.where(huge, smaller, xp.ones_like(square)), xp)
        # Chosen, for XLA to keep two products: of two known numbers it makes one, which can be subnormal.
        scale = xp.where(huge, xp.full_like(square, far), xp.ones_like(square))
        return xp.where(huge, xp.astype(w * scale * factor, x.dtype), x), xp.where(huge, xp.zeros_like(square), square)

    w = xp.astype(x, compute)
    square = total(w * w)
    flag = xp.any(xp.isinf(square))
    if first:
        x, square = seldom(flag, nearer, lambda *same: same, x, square)
    norm = _root(square, xp)
    outside = xp.isfinite(square) & ~(norm <= limits.threshold)  # "not inside", so that a NaN c shows
    # A division last: what is cheaper XLA moves into the product, where it is computed again for every entry.
    factor = xp.where(outside, limits.target, xp.ones_like(norm)) / xp.where(outside, norm, xp.ones_like(norm))
    y = xp.where(factor == 1, x, xp.astype(xp.astype(x, compute) * factor, x.dtype))
    if not first:
        y, _ = seldom(flag, nearer, lambda *same: same, y, square)
    return y, factor


def always(flag: Array, careful: Callable[..., Any], usual: Callable[..., Any], *arrays: Array) -> Any:
    """A `Seldom` without a branch."""
    return careful(*arrays)


def _ball_in_jax(x: Array, limits: BallLimits, total: Total) -> Array:
    return ball_by_squares(x, limits, total, array_namespace(x), always, first=True)[0]


ball_in_jax: Callable[[Array, BallLimits, Total], Array] = _ball_in_jax
"""The ball for an array of JAX. The core knows no branch of a JAX program: `projgd.optax` puts a ball with one here."""


def off_sphere(
    x: Array, radius: Scalar, axes: tuple[int, ...], xp: ModuleType, moved: bool = False
) -> tuple[Array, Array, Array, Array]:
    """Which finite vectors, but zero ones, have a norm that is not `radius` to rounding; the rest as in `beyond`."""
    z, r = _scaled(x, axes, xp)
    z_norm = _root(tree_sum(z * z, axes, xp), xp)
    return is_off(z_norm, r, radius, float_type(x), x.shape, axes, xp, moved), z, r, z_norm


def is_off(
    z_norm: Array,
    r: Array,
    radius: Scalar,
    kind: FloatType,
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    xp: ModuleType,
    moved: bool = False,
) -> Array:
    """Which finite vectors, but zero ones, have a norm r · z_norm that is not `radius` to rounding."""
    band = sphere_band(kind, shape, axes, radius, moved)
    near = xp.abs(z_norm * (r * 2.0**-16) - radius * 2.0**-16) <= band * 2.0**-16
    return xp.isfinite(r) & (z_norm > 0) & ~near  # "not near", so that a NaN radius shows


def sphere_band(kind: FloatType, shape: tuple[int, ...], axes: tuple[int, ...], radius: Scalar, moved: bool) -> Scalar:
    """How far from `radius` a computed norm may lie for its vector to come back as it is; see `project_sphere`."""
    length = math.sqrt(math.prod([shape[a] for a in axes]))
    compute = FLOATS[kind.compute].unit
    usual = 4 * compute + (kind.unit / length if kind.unit > compute else 0.0)
    return (usual if moved else kind.unit + 3 * norm_error(kind, shape, axes)) * radius + length * kind.tiny


def norm(x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
    """‖x‖₂ of every vector, reduced axes kept with size 1, in the dtype that sums are taken in (float32 for halves).

    Never over- or underflows where the result is representable; inf and NaN show as such.

    >>> import numpy as np
    >>> norm(np.asarray([[3e30], [4e30]], dtype=np.float32), (0,))
    array([[5.e+30]], dtype=float32)
    """
    xp = xp or array_namespace(x)
    kind = float_type(x)
    if 0 in x.shape:
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        return xp.zeros(shape, dtype=getattr(xp, kind.compute))
    z, r = _scaled(x, axes, xp)
    return xp.where(xp.isfinite(r), r * _root(tree_sum(z * z, axes, xp), xp), r)


class Measures(NamedTuple):
    """How an update lies to the weights, one number per vector, the reduced axes kept with size 1."""

    w: Array  # ‖w‖
    u: Array  # ‖u‖
    cosine: Array  # ⟨w, u⟩ / (‖w‖ ‖u‖), 0 where one of them is 0


def measures(ww: Array, uu: Array, wu: Array, xp: ModuleType) -> Measures:
    """The `Measures` of sums over products of entries, none of which over- or underflowed."""
    w, u = xp.sqrt(ww), xp.sqrt(uu)
    both = w * u
    return Measures(w, u, wu / xp.where(both > 0, both, xp.ones_like(both)))


def measure(u: Array, w: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Array, Measures]:
    """u / r, its largest magnitude r, and the `Measures`; neither over- nor underflows."""
    (zu, ru), (zw, rw) = _scaled(u, axes, xp), _scaled(w, axes, xp)
    nu, nw = _root(tree_sum(zu * zu, axes, xp), xp), _root(tree_sum(zw * zw, axes, xp), xp)
    both = nu * nw
    cosine = tree_sum(zu * zw, axes, xp) / xp.where(both > 0, both, xp.ones_like(both))
    return zu, ru, Measures(rw * nw, ru * nu, cosine)


def norm_error(kind: FloatType, shape: tuple[int, ...], axes: tuple[int, ...]) -> float:
    """Relative error of `norm` at most: half the depth of the tree of sums, and 6 for everything else, in units."""
    depth = 0
    for a in axes:
        depth += sum(parts - 1 for parts in _cuts(shape[a]))
    return (depth / 2 + 6) * FLOATS[kind.compute].unit


def guard(kind: FloatType, shape: tuple[int, ...], axes: tuple[int, ...]) -> float:
    """Relative error that a norm may have by whatever path, `norm` or a faster one: what the limits of a ball allow."""
    length = math.prod([shape[a] for a in axes])
    return max(norm_error(kind, shape, axes), (min(length, kind.free) / 2 + 6) * FLOATS[kind.compute].unit)


@dataclass(frozen=True)
class BallLimits:
    """Norms that decide what becomes of a vector; all in the computing dtype."""

    threshold: Scalar  # a computed norm above this one may be outside
    target: Scalar  # what a vector outside is scaled to before it is rounded
    inner: Scalar  # what its stored norm may reach where `fill` is at work
    fill: bool  # rounding to nearest cannot be tight here (subnormal float16)


def least_radius(kind: FloatType) -> float:
    """2^-16 of it, and of any norm above it, is not subnormal."""
    return FLOATS[kind.compute].tiny * 2.0**32


def check_radius(c: float, kind: FloatType) -> None:
    """Raise ValueError for a ball that is too small for the arithmetic."""
    if c < least_radius(kind):
        raise ValueError(f"c={c} is too small for arithmetic in {kind.compute}: pass at least {least_radius(kind):.0e}")


def ball_limits(
    kind: FloatType, shape: tuple[int, ...], axes: tuple[int, ...], c: Scalar, xp: ModuleType, may_fill: bool = True
) -> BallLimits:
    """The guard bands of a ball of radius c for vectors of this dtype and length."""
    error = guard(kind, shape, axes)
    length = math.prod([shape[a] for a in axes])
    coarse = math.sqrt(length) * kind.tiny  # the norm of all roundings near zero
    largest = math.ldexp(1 - 2.0**-24, 128) if kind.compute == "float32" else math.ldexp(1 - 2.0**-53, 1024)
    if isinstance(c, (int, float)):
        check_radius(c, kind)
        c = min(float(c), largest)
        fill = may_fill and coarse > 2.5e-4 * c
        target = max(c * (1 - 3 * error) - coarse, 0.0) / (1 + kind.unit)
    else:
        c = xp.astype(xp.asarray(c), getattr(xp, kind.compute))
        c = xp.where(c >= least_radius(kind), c, xp.full_like(c, math.nan))  # never a silent no-op
        fill = may_fill and kind is FLOATS["float16"] and coarse > 2.5e-4 * 1e-3
        target = (c * (1 - 3 * error) - coarse) / (1 + kind.unit)
        target = xp.where(target < 0, xp.zeros_like(target), target)
    if fill:
        target = c * (1 - 4 * error)
    return BallLimits(c * (1 - error), target, c * (1 - 2.0**-12), fill)


def _scaled(x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Array]:
    """x / r and r, the largest magnitude in each vector; zero vectors stay zero, non-finite ones become NaN."""
    x = xp.astype(x, getattr(xp, float_type(x).compute), copy=False)
    r = xp.max(xp.abs(x), axis=axes, keepdims=True)
    # XLA divides by way of the reciprocal, which is 0 there for the largest numbers, and takes subnormal ones for 0.
    level = xp.where(r > 1, xp.full_like(r, 2.0**-8), xp.where(r < 2.0**-64, xp.full_like(r, 2.0**64), 1.0))
    divisor = xp.where(r * level > 0, r * level, xp.ones_like(r))
    return x * level / xp.where(xp.isfinite(r), divisor, xp.full_like(r, math.nan)), r


def tree_sum(x: Array, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """Sum over `axes`, kept with size 1, in a tree of blocks, of which `norm_error` counts the depth."""
    if is_jax_namespace(xp):  # XLA merges nested sums and takes its own tree; blocks would make it gather sharded axes
        return xp.sum(x, axis=axes, keepdims=True)
    for a in axes:
        all_before = (slice(None),) * a
        for parts in _cuts(x.shape[a]):
            n = x.shape[a]
            each = n // parts
            cut = [x[(*all_before, slice(i * each, (i + 1) * each))] for i in range(parts)]
            total = sum(cut[1:], start=cut[0])
            x = xp.concat([total, x[(*all_before, slice(parts * each, n))]], axis=a) if n % parts else total
    return x


def _cuts(n: int) -> Iterator[int]:
    """Into how many parts n entries are cut, level by level of the tree; what does not fit goes up as it is."""
    block = FIRST if n >= FIRST * BLOCK else BLOCK
    while n > 1:
        parts = min(n, block)
        yield parts
        n = n // parts + n % parts
        block = BLOCK


def _running_sum(x: Array, xp: ModuleType) -> Array:
    """Cumulative sum over the last axis in two levels, for NumPy's own adds one entry after the other."""
    within = xp.cumulative_sum(_blocks(x, x.ndim - 1, 1024, xp), axis=-1)
    total = within[..., -1:]
    running = within + (xp.cumulative_sum(total, axis=-2) - total)
    return xp.reshape(running, (*x.shape[:-1], -1))[..., : x.shape[-1]]


def _blocks(x: Array, axis: int, size: int, xp: ModuleType) -> Array:
    """`axis` of length n as two axes (⌈n / size⌉, size), zeros at the end."""
    n, before, after = x.shape[axis], x.shape[:axis], x.shape[axis + 1 :]
    if n % size:
        zeros = xp.zeros_like(x[(slice(None),) * axis + (slice(1),)])
        x = xp.concat([x, xp.broadcast_to(zeros, (*before, -n % size, *after))], axis=axis)
    return xp.reshape(x, (*before, -(-n // size), size, *after))


def _root(square: Array, xp: ModuleType) -> Array:
    """√square, with a derivative of 0 rather than NaN at 0."""
    positive = square > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, square, xp.ones_like(square))), square)


def _fill(y: Array, inner: Scalar, target: Scalar, axes: tuple[int, ...], xp: ModuleType, dtype: Any) -> Array:
    """Round y to float16 towards zero, then give entries one subnormal step more, in order, while the norm allows it.

    Where most entries are subnormal their spacing is coarse against the ball (c = 1e-3 over a million entries is 17
    steps each): rounding them all alike would miss the bound by per cents.
    """
    step = 2.0**-24
    shape = y.shape
    rest = tuple(a for a in range(len(shape)) if a not in axes)
    rows = math.prod([shape[a] for a in rest])
    y = xp.reshape(xp.permute_dims(y, (*rest, *axes)), (rows, -1))
    size = xp.abs(y)
    coarse = size < 2.0**-14
    normal = xp.astype(xp.astype(size * (1 - 2.0**-11), dtype), y.dtype)
    low = xp.where(coarse, xp.floor(size / step) * step, normal)
    gain = xp.where(coarse, (2 * low + step) * step, xp.zeros_like(low))
    room = inner * inner - tree_sum(low * low, (1,), xp)
    more = low + xp.where(coarse & (_running_sum(gain, xp) <= room), step, 0.0)
    # `inner` leaves room for the rounding of the running sum, 2^-12 for a million entries; keep what is proven.
    fits = _root(tree_sum(more * more, (1,), xp), xp) <= target
    q = xp.astype(xp.where(y < 0, -1.0, 1.0) * xp.where(fits, more, low), dtype)
    q = xp.reshape(q, tuple(shape[a] for a in (*rest, *axes)))
    back = (*rest, *axes)
    return xp.permute_dims(q, tuple(back.index(a) for a in range(len(shape))))
