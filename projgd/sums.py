"""Sum squares without over- or underflow, and bound the error.

A vector is divided by its largest entry before it is squared (compare Blue, *A portable Fortran program to find the
Euclidean norm of a vector*, ACM TOMS 4, 1978). Squares are summed in a tree of blocks, so that the error grows with
the depth of the tree and not with the length of the vector (Higham, *Accuracy and Stability of Numerical Algorithms*,
2nd edition, 2002, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_jax_namespace

from projgd.axes import Vectors

Array = Any
Scalar = Any
"""A Python float, or an array: 0-d (traced, in JAX), or one number per vector with the reduced axes kept."""

BLOCK = 8
FIRST = 16  # a larger first block writes fewer sums


@dataclass(frozen=True)
class FloatType:
    """Describe a stored dtype to the arithmetic.

    Attributes:
        unit: the relative error of rounding to nearest, 2^-p.
        tiny: the absolute error of rounding near zero, whether subnormal numbers are flushed or not.
        compute: the name of the dtype that sums and products are taken in.
        free: how many squares an engine may add in any order; it has to add the rest of the sum more exactly.
        spacing: the smallest distance between two numbers.
        smallest: the smallest positive number that no arithmetic reads as 0; XLA reads a subnormal float32 as 0.
        largest: the largest finite number.
    """

    unit: float
    tiny: float
    compute: str
    free: int
    spacing: float
    smallest: float
    largest: float

    def round_up(self, value: float) -> float:
        """Return the smallest number of the dtype that is not below `value`; infinity if there is none.

        A subnormal number that some arithmetic reads as 0 does not count as a number of the dtype.

        Args:
            value: a finite number.

        Returns:
            The number, as a float.

        >>> FLOATS["bfloat16"].round_up(0.1), FLOATS["bfloat16"].round_up(0.5)
        (0.10009765625, 0.5)
        """
        if -self.smallest < value < self.smallest:
            return self.smallest if value > 0 else 0.0
        mantissa, exponent = math.frexp(value)
        step = max(exponent + math.frexp(self.unit)[1] - 1, math.frexp(self.spacing)[1] - 1)  # both are 2^(e - 1)
        rounded = math.ldexp(math.ceil(math.ldexp(mantissa, exponent - step)), step)
        return max(rounded, -self.largest) if rounded <= self.largest else math.inf

    def round_down(self, value: float) -> float:
        """Return the largest number of the dtype that is not above `value`; see `round_up`.

        Args:
            value: a finite number.

        Returns:
            The number, as a float; minus infinity if there is none.

        >>> FLOATS["bfloat16"].round_down(0.1), FLOATS["bfloat16"].round_down(0.5)
        (0.099609375, 0.5)
        """
        return -self.round_up(-value)


FLOATS = {
    "float64": FloatType(2.0**-53, 2.0**-1022, "float64", 4096, 2.0**-1074, 2.0**-1022, math.ldexp(1 - 2.0**-53, 1024)),
    "float32": FloatType(2.0**-24, 2.0**-126, "float32", 60, 2.0**-149, 2.0**-126, math.ldexp(1 - 2.0**-24, 128)),
    "bfloat16": FloatType(2.0**-8, 2.0**-126, "float32", 60, 2.0**-133, 2.0**-126, math.ldexp(1 - 2.0**-8, 128)),
    "float16": FloatType(2.0**-11, 2.0**-25, "float32", 60, 2.0**-24, 2.0**-24, 65504.0),
}


def float_type(x: Array, name: str = "the array") -> FloatType:
    """Return the `FloatType` of an array.

    Args:
        x: an array of NumPy, PyTorch or JAX.
        name: the array's name, for the error; default `"the array"`.

    Returns:
        The entry of `FLOATS` for its dtype.

    Raises:
        TypeError: an integer, boolean, complex or other dtype.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {dtype}; a projection needs one of {', '.join(FLOATS)}")
    return FLOATS[dtype]


def norm(x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
    """Return ‖x‖₂ of every vector.

    The result never over- or underflows where it is representable.

    Args:
        x: an array of any shape and of a floating-point dtype.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`; default None, which looks it up.

    Returns:
        One norm per vector, with size 1 along `axes`, in the dtype that sums are taken in. The norm of a
        vector that holds NaN or infinity is NaN or infinity.

    Raises:
        TypeError: an integer, boolean or complex array.

    >>> import numpy as np
    >>> norm(np.asarray([[3e30], [4e30]], dtype=np.float32), (0,))
    array([[5.e+30]], dtype=float32)

    References:
        J. L. Blue, *A portable Fortran program to find the Euclidean norm of a vector*, ACM TOMS 4, 1978.
    """
    xp = xp or array_namespace(x)
    kind = float_type(x)
    if 0 in x.shape:
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        return xp.zeros(shape, dtype=getattr(xp, kind.compute))
    z, r = scale(x, axes, xp)
    return xp.where(xp.isfinite(r), r * root(tree_sum(z * z, axes, xp), xp), r)


def scale(x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Array]:
    """Return x / r and r, the largest magnitude in each vector.

    Zero vectors stay zero. Vectors that hold NaN or infinity become NaN.

    Args:
        x: an array of any shape and of a floating-point dtype.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`.

    Returns:
        x / r in the dtype that sums are taken in, and r with size 1 along `axes`.
    """
    x = xp.astype(x, getattr(xp, float_type(x).compute), copy=False)
    r = xp.max(xp.abs(x), axis=axes, keepdims=True)
    # XLA multiplies by the reciprocal, which is 0 for the largest numbers, and it flushes subnormal numbers to 0.
    level = xp.where(r > 1, xp.full_like(r, 2.0**-8), xp.where(r < 2.0**-64, xp.full_like(r, 2.0**64), 1.0))
    divisor = xp.where(r * level > 0, r * level, xp.ones_like(r))
    # `jax_debug_nans` takes a constant NaN for an error. Divided by r itself, an infinite entry becomes NaN, too.
    broken = r if is_jax_namespace(xp) else xp.full_like(r, math.nan)
    return x * level / xp.where(xp.isfinite(r), divisor, broken), r


def tree_sum(x: Array, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """Return the sum over `axes`, kept with size 1, in a tree of blocks; `norm_error` counts the depth of the tree.

    Args:
        x: an array.
        axes: the non-negative axes to sum over.
        xp: the array namespace of `x`.

    Returns:
        The sums, in the dtype of `x`.
    """
    if is_jax_namespace(xp):  # XLA orders its sums itself, and blocks would make it gather sharded axes
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


def running_sum(x: Array, xp: ModuleType) -> Array:
    """Return the cumulative sum over the last axis, in two levels of 1024 entries.

    NumPy's own cumulative sum adds one entry after the other, and its error grows with the length.

    Args:
        x: an array.
        xp: its array namespace.

    Returns:
        An array of the same shape and dtype.
    """
    n, size = x.shape[-1], 1024
    if n % size:
        x = xp.concat([x, xp.zeros((*x.shape[:-1], -n % size), dtype=x.dtype)], axis=-1)
    within = xp.cumulative_sum(xp.reshape(x, (*x.shape[:-1], -1, size)), axis=-1)
    total = within[..., -1:]
    running = within + (xp.cumulative_sum(total, axis=-2) - total)
    return xp.reshape(running, x.shape)[..., :n]


def root(square: Array, xp: ModuleType) -> Array:
    """Return √square, with a derivative of 0 rather than NaN at 0."""
    positive = square > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, square, xp.ones_like(square))), square)


class Measures(NamedTuple):
    """Hold the lengths of the weights w and of their update u, and the angle between them, for each vector.

    Attributes:
        w: ‖w‖, with the reduced axes kept.
        u: ‖u‖, with the reduced axes kept.
        cosine: ⟨w, u⟩ / (‖w‖ ‖u‖), and 0 where one of them is 0.
    """

    w: Array
    u: Array
    cosine: Array


def measure(u: Array, w: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Array, Measures]:
    """Return u / r, its largest magnitude r, and the `Measures` of u and w, without over- or underflow.

    Args:
        u: the update, of the shape of `w`.
        w: the weights.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of both.

    Returns:
        u / r, r and the `Measures`, in the dtype that sums are taken in.
    """
    (zu, ru), (zw, rw) = scale(u, axes, xp), scale(w, axes, xp)
    nu, nw = root(tree_sum(zu * zu, axes, xp), xp), root(tree_sum(zw * zw, axes, xp), xp)
    both = nu * nw
    cosine = tree_sum(zu * zw, axes, xp) / xp.where(both > 0, both, xp.ones_like(both))
    return zu, ru, Measures(rw * nw, ru * nu, cosine)


def measures_of(ww: Array, uu: Array, wu: Array, xp: ModuleType) -> Measures:
    """Return the `Measures` that belong to Σw², Σu² and Σwu.

    Args:
        ww: Σw² per vector, which must not have over- or underflowed.
        uu: Σu² per vector, likewise.
        wu: Σwu per vector.
        xp: the array namespace of all three.

    Returns:
        The `Measures`.
    """
    w, u = xp.sqrt(ww), xp.sqrt(uu)
    both = w * u
    return Measures(w, u, wu / xp.where(both > 0, both, xp.ones_like(both)))


def norm_error(kind: FloatType, vectors: Vectors) -> float:
    """Return a bound on the relative error of `norm`: in units half the depth of the tree of sums, plus 6.

    Args:
        kind: the stored dtype.
        vectors: the shape of the array, and the axes that make one vector.

    Returns:
        The bound, a share of the norm.
    """
    depth = 0
    for a in vectors.axes:
        depth += sum(parts - 1 for parts in _cuts(vectors.shape[a]))
    return (depth / 2 + 6) * FLOATS[kind.compute].unit


def sum_error(kind: FloatType, vectors: Vectors) -> float:
    """Return a bound on the relative error of a sum of magnitudes by `tree_sum`: the depth of the tree, plus 6.

    Args:
        kind: the stored dtype.
        vectors: the shape of the array, and the axes that make one vector.

    Returns:
        The bound, a share of the sum.
    """
    return 2 * norm_error(kind, vectors) - 6 * FLOATS[kind.compute].unit


def guard(kind: FloatType, vectors: Vectors) -> float:
    """Return the relative error that a norm may have, whether `norm` or an engine computes it.

    Args:
        kind: the stored dtype.
        vectors: the shape of the array, and the axes that make one vector.

    Returns:
        The error that a band allows for, a share of the norm.
    """
    any_order = (min(vectors.length, kind.free) / 2 + 6) * FLOATS[kind.compute].unit
    return max(norm_error(kind, vectors), any_order)


def _cuts(n: int) -> Iterator[int]:
    """Yield into how many parts n entries are cut, level by level of the tree; a remainder goes up a level."""
    block = FIRST if n >= FIRST * BLOCK else BLOCK
    while n > 1:
        parts = min(n, block)
        yield parts
        n = n // parts + n % parts
        block = BLOCK
