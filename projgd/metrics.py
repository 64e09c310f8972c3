"""Project in a diagonal metric: argmin over the set of Σ D_i (x_i - y_i)², for ball and sphere.

An optimizer that steps by x - α D⁻¹ m (Adam and its relatives: D = √v̂ + ε) solves its constrained problem only if it
projects in the norm of D (Duchi, Hazan & Singer, JMLR 2011, section 1; Reddi, Kale & Kumar, ICLR 2018, algorithm 2).
A set that is a product of intervals needs no code here: its nearest point is the same in every diagonal metric.

On the sphere of radius c, stationarity D(x - y) + λx = 0 gives x_i = D_i y_i / (D_i + λ). The multiplier λ is the root
of the secular equation ‖x(λ)‖ = c on (-min D, ∞), where ‖x(λ)‖ falls. As in trust-region methods (Conn, Gould & Toint
2000, section 7.3), 1/‖x(λ)‖ is concave there: Newton's iteration on it, begun left of the root, climbs to it without
ever stepping over. The code works in units where c = 1 and max D|y| = 1, and subtracts min D from D (b_i and
ν = λ + min D below). There the root lies between max(|u_i| - b_i) and ‖u‖, because each |x_i| ≤ ‖x‖ = 1 and
‖x‖ ≤ ‖u‖ / ν.

The Euclidean projection then rounds and guards the result, so the set's contract is the same in every metric.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from array_api_compat import array_namespace

from projgd import projections
from projgd.axes import Vectors
from projgd.bands import Band
from projgd.projections import fill
from projgd.sums import FLOATS, Array, float_type, norm_error, root, scale, tree_sum

NAMES = ("euclidean", "adaptive")
"""The values of `metric=`: the plain norm, or the inner optimizer's own diagonal."""

STEPS = 30
"""The most Newton steps that are taken; 3 to 5 are usual."""

Repeat = Callable[[Callable[[Array], tuple[Array, Array]], Array], Array]
"""Runs `body(ν) -> (ν, done)` up to `STEPS` times from a given ν; it may stop when `done`."""

WIDEST = {"float32": 2.0**-100, "float64": 2.0**-900}
"""The smallest D in a vector relative to its largest; a smaller D is replaced, because D = 0 is not a metric."""

FARTHEST = {"float32": 2.0**26, "float64": 2.0**54}
"""The largest radius relative to the vector's entries; a larger one moves the result by less than rounding."""


def project_band(
    x: Array,
    metric: Array,
    band: Band,
    axes: tuple[int, ...],
    xp: ModuleType | None = None,
    repeat: Repeat | None = None,
) -> Array:
    """Move every vector outside of the band to the nearest point of its new norm: argmin Σ D_i (q_i - x_i)².

    The nearest point is not unique where all entries with the smallest D are 0 and the rest is too short for the norm.
    These entries then share the missing length equally, with a positive sign. A zero vector stays zero.

    Args:
        x: an array of any shape and of a floating-point dtype.
        metric: D, non-negative, of the shape of `x`. Its scale per vector does not matter. A vector in which D has a
            NaN or a negative entry, or is 0 throughout, is projected in the Euclidean metric.
        band: the band for the dtype and the vectors of `x`.
        axes: the non-negative axes that make one vector.
        xp: the array namespace of `x`; default None, which looks it up.
        repeat: the loop that iterates; default None, which runs `STEPS` steps, can be traced and never synchronises.

    Returns:
        The projected array: same library, dtype, shape and device.

    >>> import numpy as np
    >>> y, d = np.asarray([[3.0], [4.0]]), np.asarray([[100.0], [1.0]])
    >>> project_band(y, d, Band(0.0, 1.0, 0.0, 1.0), (0,)).round(4)  # Euclidean: 0.6, 0.8
    array([[0.9998],
           [0.0199]])

    References:
        A. R. Conn, N. I. M. Gould, P. L. Toint, *Trust-region methods*, SIAM 2000, section 7.3.
    """
    xp = xp or array_namespace(x)
    if 0 in x.shape:
        return x
    z, r = scale(x, axes, xp)
    moves, goal, shorter = band.targets(root(tree_sum(z * z, axes, xp), xp), r, xp)
    points = _Points(z, r, goal, moves, shorter)
    unit = _solve(_equation(points, metric, axes, xp), axes, xp, repeat or _all_steps)
    q = unit * points.goal
    if band.pull != 1:
        q = band.pull * q + (1 - band.pull) * x
        return xp.where(moves, xp.astype(q, x.dtype), x)
    stored = xp.astype(q, x.dtype) if band.filled is None else fill(unit, band, axes, x.dtype)
    return xp.where(moves, projections.project_band(stored, band, axes, xp), x)


@dataclass(frozen=True)
class _Points:
    """Hold the points y = z · r, and what they become.

    Attributes:
        z: the points divided by r.
        r: the largest magnitude in each.
        goal: their new norms.
        moves: which of them move.
        longer: which of them are longer than their new norm.
    """

    z: Array
    r: Array
    goal: Array
    moves: Array
    longer: Array


@dataclass(frozen=True)
class _Equation:
    """Hold the secular equation ‖u / (b + ν)‖ = 1 of every vector.

    Attributes:
        u: D y in units where its largest entry is 1.
        b: D - min D in these units.
        low: the lower end of the interval that the root lies in.
        high: the upper end.
        heaviest: the largest b.
    """

    u: Array
    b: Array
    low: Array
    high: Array
    heaviest: Array


def _equation(points: _Points, metric: Array, axes: tuple[int, ...], xp: ModuleType) -> _Equation:
    """Return the equations, scaled so that nothing overflows: the new norm and max D|y| become 1."""
    compute = str(points.z.dtype).removeprefix("torch.")
    unit, tiny, moves = FLOATS[compute].unit, FLOATS[compute].tiny, points.moves
    one = xp.ones_like(points.z)
    z = xp.where(moves, points.z, one)
    d = xp.where(moves, _relative(metric, compute, axes, xp), one)
    u = d * z
    largest = xp.max(xp.abs(u), axis=axes, keepdims=True)
    u = u / largest
    ratio = points.goal / xp.where(moves, points.r, xp.ones_like(points.r))
    b = d * (xp.where(ratio < FARTHEST[compute], ratio, xp.full_like(ratio, FARTHEST[compute])) / largest)
    lightest = xp.min(b, axis=axes, keepdims=True)
    b = b - lightest
    heaviest = xp.max(b, axis=axes, keepdims=True)
    u_norm = root(tree_sum(u * u, axes, xp), xp)
    low = xp.maximum(xp.max(xp.abs(u) - b, axis=axes, keepdims=True), u_norm - heaviest)
    low = xp.maximum(low, xp.where(points.longer, lightest, xp.zeros_like(lightest)))
    low = xp.maximum(low, xp.full_like(low, tiny))
    return _Equation(u, b, low, xp.maximum(u_norm * (1 + 8 * unit), low), heaviest)


def _solve(equation: _Equation, axes: tuple[int, ...], xp: ModuleType, repeat: Repeat) -> Array:
    """Return the points of norm 1 that solve the equations."""
    u, b, heaviest = equation.u, equation.b, equation.heaviest
    close = norm_error(FLOATS[str(u.dtype).removeprefix("torch.")], Vectors(tuple(u.shape), axes))

    def newton(nu: Array) -> tuple[Array, Array]:
        below = b + nu
        slanted = xp.sqrt(nu) * xp.sqrt(heaviest + nu)
        h = u / below
        square = tree_sum(h * h, axes, xp)
        slope = tree_sum(h * h * (slanted / below), axes, xp)
        excess = root(square, xp) - 1
        step = excess * (square / xp.where(slope > 0, slope, xp.ones_like(slope))) * slanted
        done = xp.all(xp.abs(excess) <= close)
        return xp.minimum(xp.maximum(nu + step, equation.low), equation.high), done

    h = u / (b + repeat(newton, equation.low))
    missing = 1 - tree_sum(h * h, axes, xp)
    free = b == 0  # entries of the smallest D; where they are 0 in y, no λ > -min D reaches the norm
    count = xp.sum(xp.astype(free, h.dtype), axis=axes, keepdims=True)
    shared = xp.sqrt(h * h + xp.where(missing > 0, missing, xp.zeros_like(missing)) / count)
    shared = xp.where(h < 0, -shared, shared)
    return xp.where(free & (missing > 8 * close), shared, h)


def _relative(metric: Array, compute: str, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """Return D over its largest entry in each vector, at least `WIDEST`; 1 where the vector's D is not a metric."""
    kind = FLOATS[float_type(metric, "the metric").compute]
    d = xp.astype(metric, getattr(xp, kind.compute), copy=False)
    valid = xp.all(d >= 0, axis=axes, keepdims=True)
    finite_max = xp.full_like(d, float(xp.finfo(d.dtype).max))
    d = xp.where(valid, xp.where(d < finite_max, d, finite_max), xp.ones_like(d))
    largest = xp.max(d, axis=axes, keepdims=True)
    d = xp.where(largest > 0, d / xp.where(largest > 0, largest, xp.ones_like(largest)), xp.ones_like(d))
    d = xp.astype(d, getattr(xp, compute), copy=False)
    return xp.maximum(d, xp.full_like(d, WIDEST[compute]))


def _all_steps(body: Callable[[Array], tuple[Array, Array]], start: Array) -> Array:
    """Run all `STEPS` steps."""
    nu = start
    for _ in range(STEPS):
        nu, _ = body(nu)
    return nu
