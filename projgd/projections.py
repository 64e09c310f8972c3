"""Project arrays in the Euclidean metric, with code written once on the Python array API.

Every function takes an array of NumPy, PyTorch or JAX and returns an array of the same library, dtype, shape and
device. These functions are the reference: every engine is tested against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace, is_jax_namespace, is_torch_namespace

from projgd.axes import Vectors
from projgd.bands import Band
from projgd.libraries import repeat, still
from projgd.sums import (
    FLOATS,
    Array,
    FloatType,
    Scalar,
    float_type,
    guard,
    root,
    running_sum,
    scale,
    sum_error,
    tree_sum,
)


def project_band(x: Array, band: Band, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
    """Scale every vector whose norm is outside of the band to the norm that the band gives it.

    For a ball of radius c that is the nearest point: x · min(1, c / ‖x‖).

    Args:
        x: an array of any shape and of a floating-point dtype.
        band: the band for the dtype and the vectors of `x`.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`; default None, which looks it up.

    Returns:
        The projected array. Vectors inside come back bit for bit, and so do zero vectors and vectors with NaN or
        infinity.

    >>> import numpy as np
    >>> from projgd.bands import Band
    >>> project_band(np.asarray([[3.0, 0.3], [4.0, 0.4]]), Band(0.0, 1.0, 0.0, 1.0), (0,)).round(3)
    array([[0.6, 0.3],
           [0.8, 0.4]])

    References:
        N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, *Dropout: a simple way to
            prevent neural networks from overfitting*, JMLR 15, 2014, section 5.1.
    """
    xp = xp or array_namespace(x)
    if 0 in x.shape:
        return x
    z, r = scale(x, axes, xp)  # z = x / r has no entry above 1, so its squares do not overflow
    z_norm = root(tree_sum(z * z, axes, xp), xp)
    moves, goal, shorter = band.targets(z_norm, r, xp)
    length = xp.where(moves, z_norm, xp.ones_like(z_norm))
    y = z * (goal / length)
    if band.pull != 1:
        y = band.pull * y + (1 - band.pull) * x
    stored = xp.astype(y, x.dtype)
    if band.filled is not None:
        stored = xp.where(shorter, fill(z / length, band, axes, x.dtype), stored)
    return xp.where(moves, stored, x)


def project_interval(x: Array, least: Array | float, most: Array | float, xp: Any = None) -> Array:
    """Return the nearest array whose every entry lies between two values: min(max(x, least), most). NaN stays NaN.

    Args:
        x: an array of any shape and of a floating-point dtype.
        least: the smallest value of an entry, as the dtype has it: a float, or an array that broadcasts against `x`;
            minus infinity is no bound.
        most: the largest value of an entry, likewise.
        xp: the array namespace of `x`; default None, which looks it up.

    Returns:
        The projected array. Entries inside come back bit for bit.

    >>> import numpy as np
    >>> project_interval(np.asarray([-3.0, 0.5, 2.0]), -1.0, 1.0)
    array([-1. ,  0.5,  1. ])
    """
    xp = xp or array_namespace(x)
    if not isinstance(least, float) and not isinstance(most, float) and is_torch_namespace(xp):
        y = xp.clamp(x, least, most)  # two comparisons would take longer
        return xp.where(y == x, x, y)  # 0 may have got another sign
    if not (isinstance(least, float) and least == -math.inf):
        least = xp.full_like(x, least) if isinstance(least, float) else least
        x = xp.where(x < least, least, x)
    if not (isinstance(most, float) and most == math.inf):
        most = xp.full_like(x, most) if isinstance(most, float) else most
        x = xp.where(x > most, most, x)
    return x


def box_ends(kind: FloatType, low: float, high: float) -> tuple[float, float]:
    """Return the smallest and the largest number of a dtype between two bounds.

    Args:
        kind: the dtype.
        low: the smallest value of an entry; minus infinity is no bound.
        high: the largest value of an entry; infinity is no bound.

    Returns:
        Two numbers that the dtype has.

    Raises:
        ValueError: bounds between which the dtype has no number.

    >>> from projgd.sums import FLOATS
    >>> box_ends(FLOATS["float16"], 0.1, 1e6)
    (0.10003662109375, 65504.0)
    """
    least = low if math.isinf(low) else kind.round_up(low)
    most = high if math.isinf(high) else kind.round_down(high)
    if least > most or math.inf in (least, -most):
        name = next(name for name, known in FLOATS.items() if known is kind)
        raise ValueError(
            f"no {name} lies between low={low} and high={high} (below {kind.smallest:.0e} only 0 counts): move the "
            "bounds apart, or take a wider dtype"
        )
    return least, most


def project_simplex(x: Array, total: Scalar, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """Return the nearest vectors without negative entries and with the sum `total`: max(x - τ, 0).

    Newton's iteration finds τ from the left: Σ max(x - τ, 0) is convex and falls, so no step goes too far, and the
    entries above τ only become fewer. Each step is one pass; 5 to 10 are usual.

    Args:
        x: an array of float32 or float64, finite.
        total: the sum, a positive number or one per vector.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`.

    Returns:
        The projected array, not yet rounded to a stored dtype.

    >>> import numpy as np
    >>> project_simplex(np.asarray([[0.8, 0.6, -1.0]]), 1.0, (1,), np).round(3)
    array([[0.6, 0.4, 0. ]])

    References:
        C. Michelot, *A finite algorithm for finding the projection of a point onto the canonical simplex of Rⁿ*, JOTA
            50, 1986.
        L. Condat, *Fast projection onto the simplex and the l1 ball*, Mathematical Programming 158, 2016, section 2.
    """
    top = xp.max(x, axis=axes, keepdims=True)
    # Entries more than `total` below the largest become 0. Cut there first, no difference overflows.
    total = xp.zeros_like(top) + total
    z = 2 * xp.maximum(x / 2 - top / 2, -total)
    constant = still(z, xp)

    def newton(state: tuple[Array, Array]) -> tuple[Array, Array]:
        _, tau = state
        over = xp.maximum(constant - tau, xp.zeros_like(tau))
        # Plain sums, because an error of τ is corrected below. PyTorch compares numbers slowly.
        count = xp.sum(xp.sign(over), axis=axes, keepdims=True)
        step = (xp.sum(over, axis=axes, keepdims=True) - total) / xp.maximum(count, xp.ones_like(count))
        return xp.all(step <= tau_unit), xp.where(step > 0, tau + step, tau)

    tau_unit = 4 * FLOATS[str(z.dtype).removeprefix("torch.")].unit * still(total, xp)
    tau = repeat(NEWTON_STEPS, newton, (xp.asarray(False), -still(total, xp)), xp)[1]
    for _ in range(2):
        active = constant > still(tau, xp)
        count = tree_sum(xp.astype(active, z.dtype), axes, xp)
        # A form whose derivative is that of the projection: the entries above τ are constant.
        tau = (tree_sum(xp.where(active, z, xp.zeros_like(z)), axes, xp) - total) / xp.maximum(
            count, xp.ones_like(count)
        )
    return xp.maximum(z - tau, xp.zeros_like(z))


NEWTON_STEPS = 100
"""The most steps; each one but the last takes an entry out."""


def project_plane(x: Array, a: Array, b: Array, axes: tuple[int, ...], xp: ModuleType, is_half: bool = False) -> Array:
    """Return the nearest vectors with ⟨a, w⟩ = b: x - a (⟨a, x⟩ - b) / ‖a‖²; or with ⟨a, w⟩ ≤ b.

    What is within rounding of the plane stays. A half-space is entered by as much as rounding may move ⟨a, w⟩, so that
    the bound holds for the stored values.

    Args:
        x: an array of any shape and of a floating-point dtype.
        a: the normal, in the dtype that `x` is computed in; it broadcasts against `x`.
        b: the right side, likewise, of size 1 along `axes`.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`.
        is_half: whether the set is the half-space below the plane; default False.

    Returns:
        The projected array. Vectors inside come back bit for bit, and so do vectors with NaN or infinity.

    >>> import numpy as np
    >>> project_plane(np.asarray([[1.0, 2.0, 6.0]]), np.ones((1, 1)), np.zeros((1, 1)), (1,), np)
    array([[-2., -1.,  3.]])
    """
    if 0 in x.shape:
        return x
    kind, vectors = float_type(x), Vectors(tuple(x.shape), axes)
    w = xp.astype(x, a.dtype, copy=False)
    size = xp.max(xp.abs(w), axis=axes, keepdims=True)
    finite, unit = xp.isfinite(size), xp.where(size > 2.0**40, xp.full_like(size, 2.0**-72), xp.ones_like(size))
    w = xp.where(finite, w * unit, xp.zeros_like(w))  # no product overflows
    b = b * unit
    error = 2 * sum_error(kind, vectors)
    square = tree_sum(a * a + xp.zeros_like(w), axes, xp)

    def excess(y: Array) -> tuple[Array, Array]:
        products = a * y
        return tree_sum(products, axes, xp) - b, tree_sum(xp.abs(products), axes, xp) + xp.abs(b)

    gap, scale_of_gap = excess(w)
    if not is_half:
        moves = xp.abs(gap) > (2 * kind.unit + error) * scale_of_gap
        y = w - a * (gap / square)
        y = y - a * (excess(y)[0] / square)  # what the first step left by rounding, seen from far away
    else:
        moves = gap > -error * scale_of_gap
        y = w - a * (xp.where(moves, gap, xp.zeros_like(gap)) / square)
        gap, scale_of_gap = excess(y)
        y = y - a * ((gap + (2 * kind.unit + 3 * error) * scale_of_gap) / square)
    return xp.where(moves & finite, _store(y, unit, x, xp), x)


def _store(y: Array, unit: Array, x: Array, xp: ModuleType) -> Array:
    """Return y / unit in the dtype of x, at most the largest number that it has."""
    most = float_type(x).largest * unit
    return xp.astype(xp.minimum(xp.maximum(y, -most), most) / unit, x.dtype)


def project_box_section(
    x: Array,
    ends: tuple[Array | float, Array | float],
    plane: tuple[Array, Array],
    axes: tuple[int, ...],
    xp: ModuleType,
) -> Array:
    """Return the nearest vectors with least ≤ wᵢ ≤ most and ⟨a, w⟩ = b: clip(x - τ a, least, most).

    ⟨a, w⟩ falls as τ grows, and is linear between the τ at which entries reach a bound. Newton's iteration finds τ.
    Where it would leave the interval in which the root is known to lie, the middle of that is taken.

    Args:
        x: an array of any shape and of a floating-point dtype.
        ends: least and most, as `EntrySet.interval` returns them.
        plane: a and b, as in `project_plane`.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`.

    Returns:
        The projected array. Vectors inside come back bit for bit, and so do vectors with NaN or infinity.

    >>> import numpy as np
    >>> plane = np.ones((1, 1)), np.ones((1, 1))
    >>> project_box_section(np.asarray([[0.9, 0.4, 0.0]]), (0.0, 0.5), plane, (1,), np).round(3)
    array([[0.5 , 0.45, 0.05]])
    """
    if 0 in x.shape:
        return x
    kind, vectors, (a, b) = float_type(x), Vectors(tuple(x.shape), axes), plane
    wide = xp.astype(x, a.dtype, copy=False)
    finite = xp.all(xp.isfinite(wide), axis=axes, keepdims=True)
    w = xp.where(finite, wide, xp.zeros_like(wide))
    size = xp.max(xp.abs(w), axis=axes, keepdims=True)
    unit = xp.where(size > 2.0**40, xp.full_like(size, 2.0**-72), xp.ones_like(size))  # no product overflows
    w, b = w * unit, b * unit
    least, most = ((end if isinstance(end, float) else xp.astype(end, a.dtype)) * unit + 0 * w for end in ends)
    error = 2 * kind.unit + 2 * sum_error(kind, vectors)

    section = _Section(a, b, least, most, axes, xp)
    y, gap, reach = section.at(w, xp.zeros_like(size))
    stays = xp.all(y == w, axis=axes, keepdims=True) & (xp.abs(gap) <= error * reach)
    y = section.project(section.project(w))  # the second time for what rounding has left, seen from far away
    return xp.where(stays | ~finite, x, xp.astype(y / unit, x.dtype))


@dataclass(frozen=True)
class _Section:
    """Hold a box that a plane cuts; the names are those of `project_box_section`."""

    a: Array
    b: Array
    least: Array
    most: Array
    axes: tuple[int, ...]
    xp: Any

    def at(self, w: Array, tau: Array) -> tuple[Array, Array, Array]:
        """Return clip(w - τ a), how far its ⟨a, w⟩ is above b, and the sum of the magnitudes of what is added."""
        y = self.xp.minimum(self.xp.maximum(w - tau * self.a, self.least), self.most)
        products = self.a * y
        gap = tree_sum(products, self.axes, self.xp) - self.b
        return y, gap, tree_sum(self.xp.abs(products), self.axes, self.xp) + self.xp.abs(self.b)

    def slope(self, w: Array, tau: Array) -> tuple[Array, Array]:
        """Return which entries are between their bounds, and how fast ⟨a, w⟩ falls."""
        point = w - tau * self.a
        free = (point > self.least) & (point < self.most)
        return free, tree_sum(self.xp.where(free, self.a * self.a, 0 * w), self.axes, self.xp)

    def project(self, w: Array) -> Array:
        """Return the nearest point, before rounding to a stored dtype."""
        xp, constant = self.xp, still(w, self.xp)
        zero = 0 * xp.max(constant, axis=self.axes, keepdims=True)
        start = (xp.asarray(False), zero, zero - math.inf, zero + math.inf)
        # JAX has no backward derivative of a loop, so nothing in it may have one.
        fixed = replace(self, **{key: still(getattr(self, key), xp) for key in ("a", "b", "least", "most")})
        tau = repeat(BOX_STEPS, lambda state: fixed._step(constant, *state[1:]), start, xp)[1]
        # Added as 0, a form whose derivative is that of the projection: entries at a bound move with the bound alone.
        free, slope = self.slope(w, tau)
        known = tree_sum(self.a * xp.where(free, w, self.at(w, tau)[0]), self.axes, xp) - self.b
        known = known / xp.where(slope > 0, slope, zero + 1)
        return self.at(w, tau + (known - still(known, xp)))[0]

    def _step(self, w: Array, tau: Array, low: Array, high: Array) -> tuple[Array, Array, Array, Array]:
        """Return whether all is done, the next τ, and the interval that the root lies in."""
        xp, a = self.xp, self.a
        close = 8 * FLOATS[str(w.dtype).removeprefix("torch.")].unit
        _, gap, size = self.at(w, tau)
        _, slope = self.slope(w, tau)
        low, high = xp.where(gap > 0, tau, low), xp.where(gap < 0, tau, high)
        # Where no entry is free, ⟨a, w⟩ is constant up to the next τ at which one leaves its bound.
        some, infinite = xp.where(a != 0, a, xp.ones_like(a)), xp.full_like(w, math.inf)
        jumps = []
        for end in (self.least, self.most):
            bound = xp.where(xp.isfinite(end), end, w)
            edge = (w - bound) / some
            usable = (a != 0) & xp.isfinite(end)
            # A little further, or rounding keeps the entry at its bound (`test_a_section_without_bounds_on_one_side`).
            over = close * (xp.abs(edge) + xp.abs(bound / some))
            up = xp.min(xp.where(usable & (edge > tau), edge + over, infinite), axis=self.axes, keepdims=True)
            down = xp.max(xp.where(usable & (edge < tau), edge - over, -infinite), axis=self.axes, keepdims=True)
            jumps.append((up, down))
        jump = xp.where(gap > 0, xp.minimum(jumps[0][0], jumps[1][0]), xp.maximum(jumps[0][1], jumps[1][1]))
        step = xp.where(slope > 0, tau + gap / xp.where(slope > 0, slope, xp.ones_like(slope)), jump)
        known = xp.isfinite(low) & xp.isfinite(high)
        middle = (xp.where(known, low, tau) + xp.where(known, high, tau)) / 2
        step = xp.where(((step > low) & (step < high)) | ~known, step, middle)
        done = (xp.abs(gap) <= close * size) | ~xp.isfinite(step) | (step == tau)
        return xp.all(done), xp.where(done, tau, step), low, high


BOX_STEPS = 100
"""The most steps of `project_box_section`; some 10 are usual."""


def project_affine(x: Array, point: Array, basis: Array, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """Return the nearest vectors of an affine set: x - Qᵀ Q (x - p), where the rows of Q span what the equations fix.

    Args:
        x: an array of any shape and of a floating-point dtype.
        point: p, the shortest vector of the set, of shape (entries,).
        basis: Q, orthonormal rows of shape (equations, entries).
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`.

    Returns:
        The projected array. Vectors within rounding of the set come back bit for bit, and so do vectors with NaN or
        infinity.

    >>> import numpy as np
    >>> project_affine(np.asarray([[1.0, 5.0]]), np.zeros(2), np.asarray([[1.0, 0.0]]), (1,), np)
    array([[0., 5.]])
    """
    if 0 in x.shape:
        return x
    kind, vectors = float_type(x), Vectors(tuple(x.shape), axes)
    rows, back = as_rows(xp.astype(x, point.dtype, copy=False), axes, xp)
    size = xp.max(xp.abs(rows), axis=1, keepdims=True)
    finite = xp.isfinite(size)
    unit = xp.where(size > 2.0**40, xp.full_like(size, 2.0**-72), xp.ones_like(size))
    y = xp.where(finite, rows * unit, xp.zeros_like(rows))
    target = point * unit
    residual = (y - target) @ basis.T
    length = xp.sqrt(xp.sum(y * y, axis=1, keepdims=True)) + xp.sqrt(xp.sum(target * target, axis=1, keepdims=True))
    gap = xp.sqrt(xp.sum(residual * residual, axis=1, keepdims=True))
    moves = finite & (gap > (2 * kind.unit + 8 * guard(kind, vectors)) * length)
    for _ in range(2):  # the second time for what the first left by rounding
        y = y - ((y - target) @ basis.T) @ basis
    return xp.where(back(moves & (rows == rows)), back(_store(y, unit, x, xp)), x)


PIECE = 2**17
"""This many entries stay in a cache with the arrays that an iteration makes of them."""


def by_pieces(f: Callable[..., Array], x: Array, *beside: Array, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """Return f(x, *beside), computed for some vectors at a time, so that what f repeats stays in a cache.

    JAX takes everything at once, because XLA fuses the operations. So does an array whose first axis is in a vector.

    Args:
        f: returns an array of the shape of its first argument, each vector from itself alone.
        x: an array.
        beside: arrays that broadcast against it.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`.
    """
    size = math.prod(x.shape)
    if is_jax_namespace(xp) or 0 in axes or size <= 2 * PIECE:
        return f(x, *beside)
    height = max(1, PIECE * x.shape[0] // size)
    tall = [len(t.shape) == len(x.shape) and t.shape[0] > 1 for t in beside]

    def piece(start: int) -> Array:
        rows = slice(start, start + height)
        return f(x[rows], *(t[rows] if cut else t for t, cut in zip(beside, tall, strict=True)))

    return xp.concat([piece(start) for start in range(0, x.shape[0], height)], axis=0)


def largest_entries(size: Array, k: int, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """Return which k entries of every vector are the largest; of equal ones the first.

    Args:
        size: an array.
        k: how many.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `size`.

    Returns:
        An array of booleans, of the shape of `size`, with k true ones in each vector, or all if it has fewer.

    >>> import numpy as np
    >>> largest_entries(np.asarray([[3.0, 1.0, 3.0, 3.0]]), 2, (1,), np)
    array([[ True, False,  True, False]])
    """
    rows, back = as_rows(still(size, xp), axes, xp)
    n = rows.shape[1]
    if k >= n:
        return xp.ones_like(size, dtype=xp.bool)
    least = xp.sort(rows, axis=1)[:, n - k : n - k + 1]
    above, equal = rows > least, rows == least
    missing = k - xp.sum(xp.astype(above, xp.int32), axis=1, keepdims=True)
    chosen = above | (equal & (xp.cumulative_sum(xp.astype(equal, xp.int32), axis=1) <= missing))
    return back(chosen)


def as_rows(x: Array, axes: tuple[int, ...], xp: Any) -> tuple[Array, Callable[[Array], Array]]:
    """Return vectors as the rows of a matrix, and the function that puts such rows back in the place of `x`.

    Args:
        x: an array.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`.
    """
    shape = tuple(x.shape)
    rest = tuple(a for a in range(len(shape)) if a not in axes)
    order = (*rest, *axes)
    moved = tuple(shape[a] for a in order)
    rows = xp.reshape(xp.permute_dims(x, order), (math.prod([shape[a] for a in rest]), -1))
    return rows, lambda y: xp.permute_dims(xp.reshape(y, moved), tuple(order.index(a) for a in range(len(shape))))


def fill(y: Array, band: Band, axes: tuple[int, ...], dtype: Any) -> Array:
    """Round y to float16 towards zero, then give entries one subnormal step more, in order, while the norm allows it.

    Where most entries are subnormal, the spacing of float16 is coarse against the ball: with c = 1e-3 over a million
    entries it is 1/17 of an entry. Rounding all entries to nearest would miss the bound by per cents.

    Args:
        y: vectors in float32, each of norm 1; they are first scaled to `band.filled`.
        band: a band whose `filled` and `inner` are set.
        axes: the non-negative axes that make one vector.
        dtype: float16 of the array's library.

    Returns:
        The rounded vectors, of the given dtype.
    """
    xp: Any = array_namespace(y)
    most, inner = band.filled, band.inner
    assert most is not None
    assert inner is not None
    y = y * most
    step = 2.0**-24
    most, inner = (m if isinstance(m, float) or not m.shape else as_rows(m, axes, xp)[0] for m in (most, inner))
    y, back = as_rows(y, axes, xp)
    size = xp.abs(y)
    coarse = size < 2.0**-14
    normal = xp.astype(xp.astype(size * (1 - 2.0**-11), dtype), y.dtype)
    low = xp.where(coarse, xp.floor(size / step) * step, normal)
    gain = xp.where(coarse, (2 * low + step) * step, xp.zeros_like(low))
    left = inner * inner - tree_sum(low * low, (1,), xp)
    more = low + xp.where(coarse & (running_sum(gain, xp) <= left), step, 0.0)
    # The running sum rounds by up to 2^-12 for a million entries, so the norm is checked once more.
    fits = root(tree_sum(more * more, (1,), xp), xp) <= most
    q = xp.astype(xp.where(y < 0, -1.0, 1.0) * xp.where(fits, more, low), dtype)
    return back(q)
