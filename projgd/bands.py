"""A norm set is a band: which norms stay, and what the norm of every other vector becomes.

The guards for rounding are in the numbers of the band. Let e be the relative error of a computed norm (`sums.guard`)
and u the rounding of the stored dtype. For a ball of radius c a computed norm above T = c(1 - e) may be that of a
vector outside, and such a vector is scaled to s = c(1 - 3e)/(1 + u):

* what stays has a true norm of at most T(1 + e) <= c;
* what is scaled has a true norm of at most s(1 + e)(1 + u) <= c(1 - 2e), and a computed norm of at most T, so that the
  next projection leaves it alone;
* its true norm is at least s(1 - e)(1 - u) >= c(1 - 4e - 2u).

A lower bound mirrors this. Every engine takes T and s from here, and computes norms with an error of at most e.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace

from projgd.axes import Vectors
from projgd.sums import FLOATS, Array, FloatType, Scalar, guard, norm_error

COARSE = 2.5e-4
"""Where rounding to float16 near zero moves a norm by more than this share of c, rounding to nearest is not tight."""


@dataclass(frozen=True)
class Band:
    """Which norms stay, and what the other norms become.

    A finite norm n > 0 becomes n where low <= n <= high, `up` where n < low, and `down` where n > high. With pull < 1
    it goes only that share of the way. A zero vector has no direction and stays; NaN and infinity stay and show.

    Attributes:
        low: the smallest computed norm that stays.
        high: the largest computed norm that stays.
        up: the norm that a shorter vector is scaled to, before it is rounded to its dtype.
        down: the norm that a longer vector is scaled to, before it is rounded.
        pull: the share of the way that a vector outside is moved; 1 for a projection.
        filled, inner: None, but where entries are so coarse (subnormal float16) that `down` and rounding to nearest
            hold the bound and miss it by per cents: the norm to scale to instead for `projections.fill`, and the norm
            that this may reach.

    Each number is a float, a 0-d array, or an array with one number per vector that broadcasts against the norms.
    """

    low: Scalar
    high: Scalar
    up: Scalar
    down: Scalar
    pull: float = 1.0
    filled: Scalar | None = None
    inner: Scalar | None = None

    def goal(self, norms: Array, xp: ModuleType, unit: Scalar = 1.0) -> Array:
        """Return what norms become: a norm in the band itself, another one `up` or `down`.

        Args:
            norms: computed norms times `unit`; with a small unit nothing overflows.
            xp: their array namespace.
            unit: a power of two, or one for each norm.
        """
        goal = xp.where(norms <= self.high * unit, norms, self.down * unit)  # "not inside": a bound of NaN shows
        if isinstance(self.low, float) and self.low == 0:
            return goal
        return xp.where(norms >= self.low * unit, goal, self.up * unit)

    def targets(self, size: Array, r: Array, xp: ModuleType) -> tuple[Array, Array, Array]:
        """Return which vectors of norm size · r move, the norm that each gets, and which of them get shorter.

        Args:
            size: norms of vectors that were divided by r.
            r: the largest magnitude in each vector.
            xp: their array namespace.
        """
        unit = xp.where(r > 1, xp.full_like(r, 2.0**-16), xp.ones_like(r))  # so that no norm over- or underflows
        norms = size * (r * unit)
        goal = self.goal(norms, xp, unit)
        return xp.isfinite(norms) & (norms > 0) & (goal != norms), goal / unit, norms > goal

    def factors(self, norms: Array, xp: ModuleType) -> Array:
        """Return what each vector is multiplied by, in the dtype of `norms`: exactly 1 where it stays.

        >>> import numpy as np
        >>> Band(low=1.0, high=2.0, up=1.0, down=2.0).factors(np.asarray([0.5, 1.5, 8.0, 0.0]), np)
        array([2.  , 1.  , 0.25, 1.  ])
        """
        usable = (norms > 0) & (norms < math.inf)
        # A division last: XLA moves what is cheaper into the product, where it is computed again for every entry.
        factor = xp.where(usable, self.goal(norms, xp), 1.0) / xp.where(usable, norms, 1.0)
        return factor if self.pull == 1 else self.pull * factor + (1 - self.pull)

    def unless(self, skip: Array, xp: ModuleType) -> Band:
        """Return this band, or where the 0-d array `skip` is positive the band in which every norm stays."""
        low = xp.where(skip > 0, xp.zeros_like(skip), self.low)
        high = xp.where(skip > 0, xp.full_like(skip, math.inf), self.high)
        return dataclasses.replace(self, low=low, high=high)


def ball_band(kind: FloatType, vectors: Vectors, c: Scalar) -> Band:
    """Return the band of ‖w‖ <= c for stored vectors of dtype `kind`.

    Args:
        kind: the stored dtype.
        vectors: for their length and the shape that sums are taken over.
        c: a number; or a 0-d array (traced, in JAX), where a value that is not positive makes the weights NaN.

    Raises:
        ValueError: a number that is too small for the arithmetic.
    """
    error, coarse = guard(kind, vectors), math.sqrt(vectors.length) * kind.tiny
    if isinstance(c, (int, float)):
        check_radius(c, kind)
        c = min(float(c), largest(kind))
        down = max(c * (1 - 3 * error) - coarse, 0.0) / (1 + kind.unit)
        is_coarse = coarse > COARSE * c
    else:
        xp: Any = array_namespace(c)
        c = xp.astype(c, getattr(xp, kind.compute))
        c = xp.where(c >= least_radius(kind), c, xp.full_like(c, math.nan))  # never a silent no-op
        down = (c * (1 - 3 * error) - coarse) / (1 + kind.unit)
        down = xp.where(down < 0, xp.zeros_like(down), down)
        is_coarse = kind is FLOATS["float16"] and coarse > COARSE * 1e-3
    band = Band(0.0, c * (1 - error), 0.0, down)
    return dataclasses.replace(band, filled=c * (1 - 4 * error), inner=c * (1 - 2.0**-12)) if is_coarse else band


def sphere_band(kind: FloatType, vectors: Vectors, radius: Scalar, moved: bool = False) -> Band:
    """Return the band of ‖w‖ = radius, to rounding.

    The band is one that no rounding can leave, so that projecting again changes no bit. For vectors that a step has
    just `moved` it is what rounding usually does, some ten times less, so that many steps stay where exact arithmetic
    would take them.
    """
    length, compute = math.sqrt(vectors.length), FLOATS[kind.compute].unit
    usual = 4 * compute + (kind.unit / length if kind.unit > compute else 0.0)
    share = usual if moved else kind.unit + 3 * norm_error(kind, vectors)
    width = share * radius + length * kind.tiny
    return Band(radius - width, radius + width, radius, radius)


def interval_band(kind: FloatType, vectors: Vectors, low: float, high: float, pull: float = 1.0) -> Band:
    """Return the band of low <= ‖w‖ <= high, with guards on both sides; where they would cross, that of a sphere."""
    error, coarse = guard(kind, vectors), math.sqrt(vectors.length) * kind.tiny
    ball = ball_band(kind, vectors, high)
    if low == 0:
        return dataclasses.replace(ball, pull=pull)
    check_radius(low, kind, "low")
    up = (low * (1 + 3 * error) + coarse) * (1 + kind.unit)
    if low * (1 + error) < up < ball.down:
        return dataclasses.replace(ball, low=low * (1 + error), up=up, pull=pull)
    return dataclasses.replace(sphere_band(kind, vectors, (low + high) / 2), pull=pull)


def least_radius(kind: FloatType) -> float:
    """Return the smallest radius for which the arithmetic stays clear of subnormal numbers."""
    return FLOATS[kind.compute].tiny * 2.0**32


def largest(kind: FloatType) -> float:
    """Return the largest finite number of the dtype that `kind` is computed in."""
    return math.ldexp(1 - 2.0**-24, 128) if kind.compute == "float32" else math.ldexp(1 - 2.0**-53, 1024)


def check_radius(c: float, kind: FloatType, name: str = "c") -> None:
    """Raise ValueError for a radius that is too small for the arithmetic."""
    if c < least_radius(kind):
        raise ValueError(
            f"{name}={c} is too small for arithmetic in {kind.compute}: pass at least {least_radius(kind):.0e}"
        )
