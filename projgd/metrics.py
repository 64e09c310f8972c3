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
from types import ModuleType

from array_api_compat import array_namespace

from projgd import projections
from projgd.projections import FLOATS, Array, Scalar, float_type

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


def project_ball(
    x: Array,
    metric: Array,
    c: Scalar,
    axes: tuple[int, ...],
    xp: ModuleType | None = None,
    repeat: Repeat | None = None,
) -> Array:
    """Nearest point with ‖·‖₂ ≤ c in the norm of `metric`, per vector: argmin Σ D_i (q_i - x_i)².

    Args:
        x: the array; vectors along `axes`.
        metric: D, the shape of `x`, non-negative. Its scale per vector does not matter. A vector in which D has a NaN
            or a negative entry, or is 0 throughout, is projected in the Euclidean metric.
        c: the bound.
        axes: non-negative axes that make one vector.
        xp: the array namespace, found from `x` if not given.
        repeat: the loop to iterate with; by default `STEPS` steps, which traces and never synchronises.

    >>> import numpy as np
    >>> y, d = np.asarray([[3.0], [4.0]]), np.asarray([[100.0], [1.0]])
    >>> project_ball(y, d, 1.0, (0,)).round(4)  # Euclidean: 0.6, 0.8
    array([[0.9998],
           [0.0199]])
    """
    xp = xp or array_namespace(x)
    if 0 in x.shape:
        return x
    limits = projections.ball_limits(float_type(x), x.shape, axes, c, xp)
    outside, z, r, _ = projections.beyond(x, limits.threshold, axes, xp)
    q = _nearest(z, r, metric, limits.target, outside, outside, axes, xp, repeat or _all_steps)
    if limits.fill:
        stored = projections._fill(q, limits.inner, limits.threshold, axes, xp, x.dtype)
    else:
        stored = xp.astype(q, x.dtype)
    return xp.where(outside, projections.project_ball(stored, c, axes, xp), x)


def project_sphere(
    x: Array,
    metric: Array,
    radius: Scalar,
    axes: tuple[int, ...],
    xp: ModuleType | None = None,
    repeat: Repeat | None = None,
) -> Array:
    """Nearest point of norm `radius` in the norm of `metric`, per vector; arguments as in `project_ball`.

    The nearest point is not unique where all entries with the smallest D are 0 and the rest falls short of the radius;
    then these entries share what is missing, with a positive sign. A zero vector stays zero.

    >>> import numpy as np
    >>> y, d = np.asarray([[0.3], [0.4]]), np.asarray([[100.0], [1.0]])
    >>> project_sphere(y, d, 1.0, (0,)).round(4)  # the light coordinate makes up the length
    array([[0.3018],
           [0.9534]])
    """
    xp = xp or array_namespace(x)
    if 0 in x.shape:
        return x
    off, z, r, z_norm = projections.off_sphere(x, radius, axes, xp)
    longer = z_norm * (r * 2.0**-16) > radius * 2.0**-16
    q = _nearest(z, r, metric, radius, off, longer, axes, xp, repeat or _all_steps)
    return xp.where(off, projections.project_sphere(xp.astype(q, x.dtype), radius, axes, xp), x)


def _nearest(
    z: Array,
    r: Array,
    metric: Array,
    radius: Scalar,
    wanted: Array,
    longer: Array,
    axes: tuple[int, ...],
    xp: ModuleType,
    repeat: Repeat,
) -> Array:
    """The point of norm `radius` that is nearest to y = z·r in the metric, for the vectors that are `wanted`.

    `longer` marks those with ‖y‖ ≥ radius. The sum of squares is scaled throughout so that nothing overflows.
    """
    compute = str(z.dtype).removeprefix("torch.")
    unit, tiny = FLOATS[compute].unit, FLOATS[compute].tiny
    one = xp.ones_like(z)
    z = xp.where(wanted, z, one)
    w = _relative(metric, compute, axes, xp)
    d = xp.where(wanted, w, one)
    u = d * z
    largest = xp.max(xp.abs(u), axis=axes, keepdims=True)
    u = u / largest
    size = xp.abs(u)
    ratio = radius / xp.where(wanted, r, xp.ones_like(r))
    b = d * (xp.where(ratio < FARTHEST[compute], ratio, xp.full_like(ratio, FARTHEST[compute])) / largest)
    lightest = xp.min(b, axis=axes, keepdims=True)
    b = b - lightest
    heaviest = xp.max(b, axis=axes, keepdims=True)
    u_norm = projections._root(projections.tree_sum(u * u, axes, xp), xp)
    low = xp.max(size - b, axis=axes, keepdims=True)
    low = xp.maximum(low, u_norm - heaviest)
    low = xp.maximum(low, xp.where(longer, lightest, xp.zeros_like(lightest)))
    low = xp.maximum(low, xp.full_like(low, tiny))
    high = xp.maximum(u_norm * (1 + 8 * unit), low)
    close = projections.norm_error(FLOATS[compute], z.shape, axes)

    def newton(nu: Array) -> tuple[Array, Array]:
        below = b + nu
        scale = xp.sqrt(nu) * xp.sqrt(heaviest + nu)
        h = u / below
        square = projections.tree_sum(h * h, axes, xp)
        slope = projections.tree_sum(h * h * (scale / below), axes, xp)
        excess = projections._root(square, xp) - 1
        step = excess * (square / xp.where(slope > 0, slope, xp.ones_like(slope))) * scale
        done = xp.all(xp.abs(excess) <= close)
        return xp.minimum(xp.maximum(nu + step, low), high), done

    nu = repeat(newton, low)
    h = u / (b + nu)
    missing = 1 - projections.tree_sum(h * h, axes, xp)
    free = b == 0  # the smallest D: where these are 0 in y, no λ > -min D reaches the radius
    count = xp.sum(xp.astype(free, h.dtype), axis=axes, keepdims=True)
    filled = xp.sqrt(h * h + xp.where(missing > 0, missing, xp.zeros_like(missing)) / count)
    filled = xp.where(h < 0, -filled, filled)
    return radius * xp.where(free & (missing > 8 * close), filled, h)


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
