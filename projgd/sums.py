"""Sums of squares that neither over- nor underflow, and a bound on their error.

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
FIRST = 16  # a larger first block has less to write


@dataclass(frozen=True)
class FloatType:
    """What the arithmetic must know of a stored dtype.

    Attributes:
        unit: relative error of rounding to nearest, 2^-p.
        tiny: absolute error of rounding near zero, whether subnormal numbers are flushed or not.
        compute: name of the dtype that sums and products are taken in.
        free: how many squares an engine may add in any order; it has to add the rest of the sum more exactly.
    """

    unit: float
    tiny: float
    compute: str
    free: int


FLOATS = {
    "float64": FloatType(2.0**-53, 2.0**-1022, "float64", 4096),
    "float32": FloatType(2.0**-24, 2.0**-126, "float32", 60),
    "bfloat16": FloatType(2.0**-8, 2.0**-126, "float32", 60),
    "float16": FloatType(2.0**-11, 2.0**-25, "float32", 60),
}


def float_type(x: Array, name: str = "the array") -> FloatType:
    """Return the `FloatType` of an array.

    Raises:
        TypeError: an integer, boolean, complex or other dtype; the message names the array by `name`.
    """
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {dtype}; a projection needs one of {', '.join(FLOATS)}")
    return FLOATS[dtype]


def norm(x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
    """Return ‖x‖₂ of every vector, with the reduced axes kept, in the dtype that sums are taken in.

    The result never over- or underflows where it is representable. Infinity and NaN show as such.

    >>> import numpy as np
    >>> norm(np.asarray([[3e30], [4e30]], dtype=np.float32), (0,))
    array([[5.e+30]], dtype=float32)
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
    """
    x = xp.astype(x, getattr(xp, float_type(x).compute), copy=False)
    r = xp.max(xp.abs(x), axis=axes, keepdims=True)
    # XLA divides by way of the reciprocal, which is 0 there for the largest numbers, and takes subnormal ones for 0.
    level = xp.where(r > 1, xp.full_like(r, 2.0**-8), xp.where(r < 2.0**-64, xp.full_like(r, 2.0**64), 1.0))
    divisor = xp.where(r * level > 0, r * level, xp.ones_like(r))
    return x * level / xp.where(xp.isfinite(r), divisor, xp.full_like(r, math.nan)), r


def tree_sum(x: Array, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """Sum over `axes`, kept with size 1, in a tree of blocks; `norm_error` counts its depth."""
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


def running_sum(x: Array, xp: ModuleType) -> Array:
    """Cumulative sum over the last axis in two levels, because NumPy's own adds one entry after the other."""
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
    """How an update u lies to the weights w: one number per vector, with the reduced axes kept.

    Attributes:
        w: ‖w‖.
        u: ‖u‖.
        cosine: ⟨w, u⟩ / (‖w‖ ‖u‖), and 0 where one of them is 0.
    """

    w: Array
    u: Array
    cosine: Array


def measure(u: Array, w: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Array, Measures]:
    """Return u / r, its largest magnitude r, and the `Measures`. Nothing over- or underflows."""
    (zu, ru), (zw, rw) = scale(u, axes, xp), scale(w, axes, xp)
    nu, nw = root(tree_sum(zu * zu, axes, xp), xp), root(tree_sum(zw * zw, axes, xp), xp)
    both = nu * nw
    cosine = tree_sum(zu * zw, axes, xp) / xp.where(both > 0, both, xp.ones_like(both))
    return zu, ru, Measures(rw * nw, ru * nu, cosine)


def measures_of(ww: Array, uu: Array, wu: Array, xp: ModuleType) -> Measures:
    """Return the `Measures` of Σw², Σu² and Σwu, where none of these sums over- or underflowed."""
    w, u = xp.sqrt(ww), xp.sqrt(uu)
    both = w * u
    return Measures(w, u, wu / xp.where(both > 0, both, xp.ones_like(both)))


def norm_error(kind: FloatType, vectors: Vectors) -> float:
    """Return the relative error of `norm` at most: half the depth of the tree of sums, and 6 for the rest, in units."""
    depth = 0
    for a in vectors.axes:
        depth += sum(parts - 1 for parts in _cuts(vectors.shape[a]))
    return (depth / 2 + 6) * FLOATS[kind.compute].unit


def guard(kind: FloatType, vectors: Vectors) -> float:
    """Return the relative error that a norm may have, by `norm` or by any engine: what the guards of a band allow."""
    any_order = (min(vectors.length, kind.free) / 2 + 6) * FLOATS[kind.compute].unit
    return max(norm_error(kind, vectors), any_order)


def _cuts(n: int) -> Iterator[int]:
    """Into how many parts n entries are cut, level by level of the tree; what does not fit goes up as it is."""
    block = FIRST if n >= FIRST * BLOCK else BLOCK
    while n > 1:
        parts = min(n, block)
        yield parts
        n = n // parts + n % parts
        block = BLOCK
