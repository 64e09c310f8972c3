"""Project arrays in the Euclidean metric, with code written once on the Python array API.

Every function takes an array of NumPy, PyTorch or JAX and returns an array of the same library, dtype, shape and
device. These functions are the reference: every engine is tested against them.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace

from projgd.bands import Band
from projgd.sums import FLOATS, Array, FloatType, float_type, root, running_sum, scale, tree_sum


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


def project_nonnegative(x: Array, xp: ModuleType | None = None) -> Array:
    """Return the nearest array without negative entries: max(x, 0). NaN stays NaN.

    Args:
        x: an array of any shape and of a floating-point dtype.
        xp: the array namespace of `x`; default None, which looks it up.

    Returns:
        The projected array.

    >>> import numpy as np
    >>> project_nonnegative(np.asarray([-1.0, 2.0]))
    array([0., 2.])
    """
    xp = xp or array_namespace(x)
    return xp.where(x < 0, xp.zeros_like(x), x)


def project_box(x: Array, low: float, high: float, xp: ModuleType | None = None) -> Array:
    """Return the nearest array with every entry from `low` to `high`. NaN stays NaN.

    A bound that the dtype has is in the set. Another one is rounded into the set, see `box_ends`.

    Args:
        x: an array of any shape and of a floating-point dtype.
        low: the smallest value of an entry.
        high: the largest value of an entry.
        xp: the array namespace of `x`; default None, which looks it up.

    Returns:
        The projected array.

    Raises:
        ValueError: bounds between which the dtype of `x` has no number.

    >>> import numpy as np
    >>> project_box(np.asarray([-3.0, 0.5, 2.0]), -1.0, 1.0)
    array([-1. ,  0.5,  1. ])
    """
    xp = xp or array_namespace(x)
    least, most = (xp.full_like(x, end) for end in box_ends(float_type(x), low, high))
    return xp.where(x < least, least, xp.where(x > most, most, x))


def box_ends(kind: FloatType, low: float, high: float) -> tuple[float, float]:
    """Return the smallest and the largest number of a dtype between two bounds.

    Args:
        kind: the dtype.
        low: the smallest value of an entry.
        high: the largest value of an entry.

    Returns:
        Two numbers that the dtype has.

    Raises:
        ValueError: bounds between which the dtype has no number.

    >>> from projgd.sums import FLOATS
    >>> box_ends(FLOATS["float16"], 0.1, 1e6)
    (0.10003662109375, 65504.0)
    """
    least, most = kind.round_up(low), kind.round_down(high)
    if least > most:
        name = next(name for name, known in FLOATS.items() if known is kind)
        raise ValueError(
            f"no {name} lies between low={low} and high={high} (below {kind.smallest:.0e} only 0 counts): move the "
            "bounds apart, or take a wider dtype"
        )
    return least, most


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
    step, shape = 2.0**-24, y.shape
    rest = tuple(a for a in range(len(shape)) if a not in axes)
    y = xp.reshape(xp.permute_dims(y, (*rest, *axes)), (math.prod([shape[a] for a in rest]), -1))
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
    q = xp.reshape(q, tuple(shape[a] for a in (*rest, *axes)))
    back = (*rest, *axes)
    return xp.permute_dims(q, tuple(back.index(a) for a in range(len(shape))))
