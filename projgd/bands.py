"""Describe a set of norms as a band: which norms stay, and what the norm of every other vector becomes.

The numbers of the band allow for rounding. Let e be the relative error of a computed norm (`sums.guard`) and u the
rounding of the stored dtype. For a ball of radius c, a vector whose computed norm is above T = c(1 - e) may be outside,
so it is scaled to s = c(1 - 3e)/(1 + u):

* what stays has a true norm of at most T(1 + e) <= c;
* what is scaled has a true norm of at most s(1 + e)(1 + u) <= c(1 - 2e), and a computed norm of at most T, so that the
  next projection does not move it;
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
from projgd.sums import FLOATS, Array, FloatType, Scalar, guard, norm_error, sum_error

COARSE = 2.5e-4
"""The share of c above which an error of rounding to float16 near zero makes rounding to nearest too loose."""


@dataclass(frozen=True)
class Band:
    """Describe which norms stay, and what the other norms become.

    A finite norm n > 0 becomes n where low <= n <= high, `up` where n < low, and `down` where n > high. With pull < 1
    it moves only that share of the distance. A zero vector has no direction and stays. NaN and infinity stay.

    Each number is a float, a 0-d array, or an array with one number per vector that broadcasts against the norms.

    Attributes:
        low: the smallest computed norm that stays.
        high: the largest computed norm that stays.
        up: the norm that a shorter vector is scaled to, before rounding to its dtype.
        down: the norm that a longer vector is scaled to, before rounding to its dtype.
        pull: the share of the distance that a vector outside is moved; default 1, a projection.
        filled: the norm that `projections.fill` scales to instead of `down`; default None. It is set where entries are
            so coarse (subnormal float16) that scaling to `down` and rounding to nearest would miss the bound by per
            cents.
        inner: the norm that `projections.fill` may reach; default None.
    """

    low: Scalar
    high: Scalar
    up: Scalar
    down: Scalar
    pull: float = 1.0
    filled: Scalar | None = None
    inner: Scalar | None = None

    def goal(self, norms: Array, xp: ModuleType, unit: Scalar = 1.0) -> Array:
        """Return what norms become: a norm in the band stays, another one becomes `up` or `down`.

        Args:
            norms: computed norms times `unit`; a small unit keeps them from overflowing.
            xp: the array namespace of `norms`.
            unit: a power of two, or one for each norm; default 1.

        Returns:
            The new norms, also times `unit`.
        """
        goal = xp.where(norms <= self.high * unit, norms, self.down * unit)  # not `norms > high`: NaN bounds show
        if isinstance(self.low, float) and self.low == 0:
            return goal
        return xp.where(norms >= self.low * unit, goal, self.up * unit)

    def targets(self, size: Array, r: Array, xp: ModuleType) -> tuple[Array, Array, Array]:
        """Return which vectors of norm size · r move, the norm that each one gets, and which of them get shorter.

        Args:
            size: the norms of the vectors after division by r.
            r: the largest magnitude in each vector.
            xp: the array namespace of both.

        Returns:
            Three arrays with one entry per vector: booleans, norms, booleans.
        """
        unit = xp.where(r > 1, xp.full_like(r, 2.0**-16), xp.ones_like(r))  # no norm over- or underflows then
        norms = size * (r * unit)
        goal = self.goal(norms, xp, unit)
        return xp.isfinite(norms) & (norms > 0) & (goal != norms), goal / unit, norms > goal

    def factors(self, norms: Array, xp: ModuleType) -> Array:
        """Return the factor of each vector, in the dtype of `norms`: exactly 1 where it stays.

        Args:
            norms: computed norms, one per vector.
            xp: the array namespace of `norms`.

        Returns:
            The factors, an array of the shape of `norms`.

        >>> import numpy as np
        >>> Band(low=1.0, high=2.0, up=1.0, down=2.0).factors(np.asarray([0.5, 1.5, 8.0, 0.0]), np)
        array([2.  , 1.  , 0.25, 1.  ])
        """
        usable = (norms > 0) & (norms < math.inf)
        # The division comes last, because XLA repeats cheaper operations for every entry of the product.
        factor = xp.where(usable, self.goal(norms, xp), 1.0) / xp.where(usable, norms, 1.0)
        return factor if self.pull == 1 else self.pull * factor + (1 - self.pull)

    def unless(self, skip: Array, xp: ModuleType) -> Band:
        """Return this band, or a band in which every norm stays where `skip` is positive.

        Args:
            skip: a 0-d array, such as GradScaler's count of gradients that are not finite.
            xp: the array namespace of `skip`.

        Returns:
            A band whose `low` and `high` are arrays.
        """
        low = xp.where(skip > 0, xp.zeros_like(skip), self.low)
        high = xp.where(skip > 0, xp.full_like(skip, math.inf), self.high)
        return dataclasses.replace(self, low=low, high=high)


def ball_band(kind: FloatType, vectors: Vectors, c: Scalar) -> Band:
    """Return the band of ‖w‖ <= c for stored vectors of dtype `kind`.

    Args:
        kind: the stored dtype.
        vectors: the shape of the array, and the axes that make one vector.
        c: a number; or a 0-d array (traced, in JAX), where a value that is not positive makes the weights NaN.

    Returns:
        The band.

    Raises:
        ValueError: a number that is too small for the arithmetic.
    """
    error, coarse = guard(kind, vectors), math.sqrt(vectors.length) * kind.tiny
    c, down = _within(kind, c, error, coarse)
    share = coarse / _smallest(c) if kind is FLOATS["float16"] else 0.0
    band = Band(0.0, c * (1 - error), 0.0, down)
    return dataclasses.replace(band, filled=c * (1 - 4 * error), inner=c * (1 - 2.0**-12)) if share > COARSE else band


def _smallest(c: Scalar) -> float:
    """Return the smallest of some bounds; 1e-3, as small as bounds of networks are, if JAX traces them."""
    if isinstance(c, float):
        return c
    try:
        return max(float(array_namespace(c).min(c)), 1e-30)
    except TypeError:
        return 1e-3


def _within(kind: FloatType, c: Scalar, error: float, coarse: float) -> tuple[Scalar, Scalar]:
    """Return a bound that can be held, and the norm to scale to, so that rounding does not exceed the bound.

    Args:
        kind: the stored dtype.
        c: the bound.
        error: the relative error of a computed norm.
        coarse: the error of a norm by rounding entries near zero.

    Raises:
        ValueError: a number that is too small for the arithmetic.
    """
    if isinstance(c, (int, float)):
        check_radius(c, kind)
        c = min(float(c), largest(kind))
        return c, max(c * (1 - 3 * error) - coarse, 0.0) / (1 + kind.unit)
    xp: Any = array_namespace(c)
    c = xp.astype(c, getattr(xp, kind.compute))
    c = xp.where(c >= least_radius(kind), c, xp.full_like(c, math.nan))  # a bound that cannot be held must show
    down = (c * (1 - 3 * error) - coarse) / (1 + kind.unit)
    return c, xp.where(down < 0, xp.zeros_like(down), down)


def l1_ball_band(kind: FloatType, vectors: Vectors, c: Scalar) -> Band:
    """Return the band of Σ|w| <= c for stored vectors of dtype `kind`, as `ball_band` does for ‖w‖₂.

    Args:
        kind: the stored dtype.
        vectors: the shape of the array, and the axes that make one vector.
        c: a number, or an array.

    Returns:
        The band.

    Raises:
        ValueError: a number that is too small for the arithmetic.
    """
    error = sum_error(kind, vectors)
    c, down = _within(kind, c, error, vectors.length * kind.tiny)
    return Band(0.0, c * (1 - error), 0.0, down)


def l1_sphere_band(kind: FloatType, vectors: Vectors, total: Scalar) -> Band:
    """Return the band of Σ|w| = total, to rounding, so wide that no rounding leaves it.

    Args:
        kind: the stored dtype.
        vectors: the shape of the array, and the axes that make one vector.
        total: a number, or an array.

    Returns:
        The band.
    """
    if isinstance(total, (int, float)):
        check_radius(total, kind, "total")
    width = (kind.unit + 3 * sum_error(kind, vectors)) * total + vectors.length * kind.tiny
    return Band(total - width, total + width, total, total)


def sphere_band(kind: FloatType, vectors: Vectors, radius: Scalar, moved: bool = False) -> Band:
    """Return the band of ‖w‖ = radius, to rounding.

    The band is wide enough that no rounding leaves it, so that projecting again changes no bit. With `moved` it is some
    ten times less wide in float32 and float64, as wide as rounding usually is, so that many steps stay where exact
    arithmetic would take them. In 16-bit types rounding to the dtype decides about the width.

    Args:
        kind: the stored dtype.
        vectors: the shape of the array, and the axes that make one vector.
        radius: a number, or an array with one number per vector.
        moved: whether a step has just moved the vectors; default False.

    Returns:
        The band.
    """
    is_usual = moved and kind is FLOATS[kind.compute]
    share = 4 * kind.unit if is_usual else kind.unit + 3 * norm_error(kind, vectors)
    width = share * radius + math.sqrt(vectors.length) * kind.tiny
    return Band(radius - width, radius + width, radius, radius)


def interval_band(kind: FloatType, vectors: Vectors, low: float, high: float, pull: float = 1.0) -> Band:
    """Return the band of low <= ‖w‖ <= high.

    Where the guards of both sides would cross, this is the band of the sphere between them.

    Args:
        kind: the stored dtype.
        vectors: the shape of the array, and the axes that make one vector.
        low: the smallest norm, 0 or more.
        high: the largest norm.
        pull: the share of the distance that a vector outside is moved; default 1.

    Returns:
        The band.

    Raises:
        ValueError: a bound that is too small for the arithmetic.
    """
    error, coarse = guard(kind, vectors), math.sqrt(vectors.length) * kind.tiny
    ball = dataclasses.replace(ball_band(kind, vectors, high), pull=pull)
    if pull != 1 and ball.filled is not None:  # what is pulled need not end inside, so entries are rounded to nearest
        ball = dataclasses.replace(ball, down=ball.filled, filled=None, inner=None)
    if low == 0:
        return ball
    check_radius(low, kind, "low")
    up = (low * (1 + 3 * error) + coarse) * (1 + kind.unit)
    if low * (1 + error) < up < ball.down:
        return dataclasses.replace(ball, low=low * (1 + error), up=up)
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
