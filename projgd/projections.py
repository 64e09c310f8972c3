"""The mathematics: Euclidean projections, written once on the Python array API.

Every function takes an array of NumPy, PyTorch or JAX and returns an array of the same library, dtype, shape and
device. These functions are the reference: every engine is tested against them.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace

from projgd.bands import Band
from projgd.sums import Array, float_type, root, running_sum, scale, tree_sum


def project_band(x: Array, band: Band, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
    """Scale every vector whose norm is outside of the band to the norm that the band gives it.

    For a ball of radius c that is the nearest point: x · min(1, c / ‖x‖) (Srivastava et al., JMLR 2014, section 5.1).
    Vectors inside come back bit for bit, zero vectors and vectors with NaN or infinity too.

    Args:
        x: the array.
        band: made for the dtype of `x` and for its vectors.
        axes: non-negative axes that make one vector.
        xp: the array namespace, found from `x` if not given.

    >>> import numpy as np
    >>> from projgd.bands import Band
    >>> project_band(np.asarray([[3.0, 0.3], [4.0, 0.4]]), Band(0.0, 1.0, 0.0, 1.0), (0,)).round(3)
    array([[0.6, 0.3],
           [0.8, 0.4]])
    """
    xp = xp or array_namespace(x)
    if 0 in x.shape:
        return x
    z, r = scale(x, axes, xp)  # z = x / r has no entry above 1, so that nothing over- or underflows
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


def fill(y: Array, band: Band, axes: tuple[int, ...], dtype: Any) -> Array:
    """Round y to float16 towards zero, then give entries one subnormal step more, in order, while the norm allows it.

    Where most entries are subnormal their spacing is coarse against the ball (c = 1e-3 over a million entries is 17
    steps each): rounding them all alike would miss the bound by per cents.

    Args:
        y: vectors in float32, each of norm 1; they are scaled to `band.filled` first.
        band: its `inner` is what the norm after the steps may reach.
        axes: non-negative axes that make one vector.
        dtype: float16 of the array's library.
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
    # `inner` allows for the rounding of the running sum, 2^-12 for a million entries; keep what is proven.
    fits = root(tree_sum(more * more, (1,), xp), xp) <= most
    q = xp.astype(xp.where(y < 0, -1.0, 1.0) * xp.where(fits, more, low), dtype)
    q = xp.reshape(q, tuple(shape[a] for a in (*rest, *axes)))
    back = (*rest, *axes)
    return xp.permute_dims(q, tuple(back.index(a) for a in range(len(shape))))
