"""Projections in a diagonal metric: argmin over the set of Σ D_i (x_i - y_i)², for ball and sphere.

An optimizer that steps by x - α D⁻¹ m (Adam and its relatives: D = √v̂ + ε) solves its constrained problem only if it
projects in the norm of D (Duchi, Hazan & Singer, JMLR 2011, section 1; Reddi, Kale & Kumar, ICLR 2018, algorithm 2).
A set that is a product of intervals needs nothing new: the metric changes nothing in a problem that separates.

On the sphere of radius c, stationarity D(x - y) + λx = 0 gives x_i = D_i y_i / (D_i + λ), and λ is the root of the
secular equation ‖x(λ)‖ = c on (-min D, ∞), where ‖x(λ)‖ falls. As in trust-region methods (Conn, Gould & Toint 2000,
section 7.3), 1/‖x(λ)‖ is concave there: Newton's iteration on it, begun left of the root, climbs to it without ever
stepping over. In units where c = 1, max D|y| = 1 and min D is subtracted (b_i and ν below), ν = λ + min D, the root
lies between max(|u_i| - b_i) and ‖u‖: each |x_i| ≤ ‖x‖ = 1, and ‖x‖ ≤ ‖u‖ / ν.

The result is rounded and guarded by the Euclidean projection, so the set's contract is the same in every metric.
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
"""What `metric=` may be in both fronts: the plain norm, or the inner optimizer's own diagonal."""

STEPS = 30
"""Newton steps at most; 3 to 5 are usual."""

Repeat = Callable[[Callable[[Array], tuple[Array, Array]], Array], Array]
"""Runs `body(ν) -> (ν, done)` up to `STEPS` times from a given ν; it may stop when `done`."""

WIDEST = {"float32": 2.0**-100, "float64": 2.0**-900}
"""Smallest D in a vector, relative to its largest; less is taken as this (a D of 0 has no metric of its own)."""

FARTHEST = {"float32": 2.0**26, "float64": 2.0**54}
"""Largest radius relative to the vector's entries: beyond, the result moves by less than rounding."""


def project_band(
    x: Array,
    metric: Array,
    band: Band,
    axes: tuple[int, ...],
    xp: ModuleType | None = None,
    repeat: Repeat | None = None,
) -> Array:
    """Move every vector outside of the band to the nearest point of its new norm: argmin Σ D_i (q_i - x_i)².

    The nearest point is not unique where all entries with the smallest D are 0 and the rest falls short of the norm;
    then these entries share what is missing, with a positive sign. A zero vector stays zero.

    Args:
        x: the array; vectors along `axes`.
        metric: D, the shape of `x`, non-negative. Its scale per vector does not matter. A vector in which D has a NaN
            or a negative entry, or is 0 throughout, is projected in the Euclidean metric.
        band: which norms stay, and what the others become.
        axes: non-negative axes that make one vector.
        xp: the array namespace, found from `x` if not given.
        repeat: the loop to iterate with; by default `STEPS` steps, which traces and never synchronises.

    >>> import numpy as np
    >>> y, d = np.asarray([[3.0], [4.0]]), np.asarray([[100.0], [1.0]])
    >>> project_band(y, d, Band(0.0, 1.0, 0.0, 1.0), (0,)).round(4)  # Euclidean: 0.6, 0.8
    array([[0.9998],
           [0.0199]])
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
    """The points y = z · r, their new norms, which of them move, and which of these are longer than their new norm."""

    z: Array
    r: Array
    goal: Array
    moves: Array
    longer: Array


@dataclass(frozen=True)
class _Equation:
    """The secular equation ‖u / (b + ν)‖ = 1 of every vector, and the interval that its root lies in."""

    u: Array
    b: Array
    low: Array
    high: Array
    heaviest: Array  # the largest b


def _equation(points: _Points, metric: Array, axes: tuple[int, ...], xp: ModuleType) -> _Equation:
    """Scale throughout so that nothing overflows: the new norm, max D|y| and max D become 1."""
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
    free = b == 0  # the smallest D: where these are 0 in y, no λ > -min D reaches the norm
    count = xp.sum(xp.astype(free, h.dtype), axis=axes, keepdims=True)
    shared = xp.sqrt(h * h + xp.where(missing > 0, missing, xp.zeros_like(missing)) / count)
    shared = xp.where(h < 0, -shared, shared)
    return xp.where(free & (missing > 8 * close), shared, h)


def _relative(metric: Array, compute: str, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """D over its largest entry in each vector, at least `WIDEST`; 1 where the vector's D is not a metric."""
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
    nu = start
    for _ in range(STEPS):
        nu, _ = body(nu)
    return nu
