"""Define sets that are made of others: intersections, and sets around the initial weights.

An intersection is projected onto by Dykstra's algorithm, which finds the nearest point. Projecting onto one set after
the other, without its corrections, ends at some point of the intersection only.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace

from projgd import axes as _axes
from projgd import rules
from projgd.axes import Axis, Vectors
from projgd.constraints import Constraint, NormSet, positive
from projgd.entries import Box, EntrySet, NonNegative, NonPositive
from projgd.libraries import call_if, repeat
from projgd.projections import by_pieces
from projgd.sums import Array, FloatType, Scalar, float_type, norm


@dataclass(frozen=True)
class Around(Constraint):
    """Hold the distance of the weights to the initial weights in a set: w ← w₀ + Π(w - w₀).

    `Around(MaxNorm(0.1))` keeps every neuron in a ball around where fine-tuning starts, and `Around(Box(-c, c))` every
    entry. The optimizer copies the initial weights once and keeps them in its state. The set's bound holds exactly for
    the stored values, if the set says so.

    Attributes:
        of: the set that w - w₀ is held in. What it takes from the initial weights, as `MaxNorm.relative(0.1)` takes
            their norms, it takes from w₀.

    Raises:
        TypeError: an object that is not a constraint, or another `Around`.

    >>> import numpy as np
    >>> from projgd.constraints import MaxNorm
    >>> near = Around(MaxNorm(1.0)).bind(np.asarray([[3.0, 4.0]]))
    >>> near.onto(np.asarray([[6.0, 8.0]]), (1,)).round(3)
    array([[3.6, 4.8]])

    References:
        X. Li, Y. Grandvalet, F. Davoine, *Explicit inductive bias for transfer learning with convolutional networks*,
        ICML 2018 (the penalty L2-SP, of which this is the hard bound).
    """

    of: Constraint
    start: Array | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.of, Constraint) or isinstance(self.of, Around):
            raise TypeError(f"Around() takes a set such as MaxNorm(0.1), not {self.of!r}")

    @property
    def axis(self) -> Axis:
        return self.of.axis

    @property
    def moving_c(self) -> Scalar | None:
        return self.of.moving_c

    @property
    def takes_initial(self) -> bool:
        return True

    @property
    def keeps_entries(self) -> bool:
        return True

    @property
    def is_convex(self) -> bool:
        return self.of.is_convex

    @property
    def joins_vectors(self) -> bool:
        return self.of.joins_vectors

    def replace(self, **changed: Any) -> Constraint:
        return Around(changed["of"]) if "of" in changed else Around(self.of.replace(**changed))

    def check_metric(self, metric: Any) -> None:
        super().check_metric(metric)
        if metric != "euclidean":
            raise ValueError(f'{self} is projected in the Euclidean metric only: pass metric="euclidean"')

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        self.of.fit(kind, vectors, name)

    def beside(self, fan_in: int) -> Constraint | None:
        own = self.of.beside(fan_in)
        return None if own is None else Around(own)

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        self.of.initial(x, axes, name, xp)  # raises an error for weights that it can take nothing from
        return xp.asarray(x, copy=True)

    def bind(self, initial: Array) -> Around:
        bound = copy.copy(self)
        object.__setattr__(bound, "start", initial)
        return bound

    def _parts(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Constraint]:
        """Return w₀ in the dtype that is computed in, and the set with what it takes from w₀."""
        if self.start is None:
            raise ValueError(f"{self} has no centre outside an optimizer, which takes the weights at the start")
        start = xp.reshape(xp.astype(self.start, x.dtype), x.shape)
        of = self.of.bind(self.of.initial(start, axes, "the array", xp)) if self.of.takes_initial else self.of
        return xp.astype(start, getattr(xp, float_type(x).compute)), of

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        if self.start is None or self.of.joins_vectors or self.of.arrays or isinstance(self.of, Intersection):
            return self._onto(x, axes, xp, moved)
        start = xp.reshape(xp.astype(self.start, x.dtype), x.shape)
        return by_pieces(lambda x, w: self.bind(w)._onto(x, axes, xp, moved), x, start, axes=axes, xp=xp)

    def _onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType, moved: bool) -> Array:
        """Project some vectors; `start` has theirs."""
        start, of = self._parts(x, axes, xp)
        wide = xp.astype(x, start.dtype, copy=False)
        finite = xp.isfinite(wide)
        y = xp.where(finite, wide, start) / 2 - start / 2  # halves, so that no difference overflows
        far = xp.abs(y) > float_type(start).largest / 2
        y = xp.where(far, xp.copysign(xp.full_like(y, float_type(start).largest / 2), y), y) * 2
        broken = xp.where(finite, y, wide)
        q = of.onto(broken, axes, xp, moved=moved)
        stays = xp.all(q == broken, axis=axes, keepdims=True) if axes else q == broken
        stays = stays | ~(xp.all(finite, axis=axes, keepdims=True) if axes else finite)
        stays = stays & ~far | ~finite
        # Rounded to the dtype, w₀ + q must not leave the set: an entry that would moves towards where it may be.
        least, most = of.rounding_interval(q, y, axes, lambda x: norm(x, axes, xp), xp)
        if isinstance(of, EntrySet):  # what is outside by less than the difference rounds
            stays = stays & ~xp.logical_or(*_outside(wide, start, least, most, xp))
        near = xp.astype(start + q, x.dtype)
        return xp.where(stays, x, _step_inside(near, start, least, most, xp))

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        start, of = self._parts(x, axes, xp)
        return of.outside(xp.astype(x, start.dtype, copy=False) - start, axes, xp)

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        start, of = self._parts(q, axes, xp)
        y = xp.astype(q, start.dtype) - start
        least, most = (e + xp.zeros_like(y) for e in of.rounding_interval(y, y, axes, norm, xp))
        kind = float_type(q)
        ends = [_rounded(start, end, side, q, kind, xp) for end, side in ((least, 1), (most, -1))]
        return xp.where(least < y, ends[0], q), xp.where(most > y, ends[1], q)


def _rounded(start: Array, end: Array, side: int, like: Array, kind: FloatType, xp: Any) -> Array:
    """Return start + end as a dtype has it, moved to one side by as much as rounding may be wrong."""
    total = xp.clip(start, -kind.largest, kind.largest) + xp.clip(end, -kind.largest / 4, kind.largest / 4)
    slack = xp.abs(total) * (2 * kind.unit) + 2 * kind.tiny
    return xp.astype(total + side * slack, like.dtype)


def _step_inside(near: Array, start: Array, least: Array | float, most: Array | float, xp: Any) -> Array:
    """Return the stored numbers near w₀ + q whose distance to w₀ lies between two values; w₀ is inside or a limit.

    Rounding to nearest may leave the interval by half a step of the dtype. Up to two steps towards the inside enter it.
    """
    kind = float_type(near)
    near = xp.where(xp.isfinite(near), near, xp.astype(start, near.dtype))  # what is not finite stays, see `onto`
    for _ in range(2):
        above, below = _outside(xp.astype(near, start.dtype), start, least, most, xp)
        step = xp.abs(xp.astype(near, start.dtype)) * (1.01 * kind.unit) + 0.505 * kind.spacing
        if kind.unit < 2.0**-20:  # the dtype itself: its neighbours
            moved = xp.where(above, _next(near, -1, kind, xp), xp.where(below, _next(near, 1, kind, xp), near))
        else:
            wide = xp.astype(near, start.dtype)
            moved = xp.astype(xp.where(above, wide - step, xp.where(below, wide + step, wide)), near.dtype)
        near = moved
    return near


def _outside(x: Array, start: Array, least: Array | float, most: Array | float, xp: Any) -> tuple[Array, Array]:
    """Return whether x - w₀ is above one value or below another, without rounding; false where x is not finite.

    References:
        O. Møller, *Quasi double-precision in floating point addition*, BIT 5, 1965 (the error of a difference).
    """
    x = xp.where(xp.isfinite(x), x, start)
    distance = x - start
    back = distance - x
    error = (x - (distance - back)) - (start + back)
    above = (distance > most) | ((distance == most) & (error > 0))
    return above, (distance < least) | ((distance == least) & (error < 0))


def _next(x: Array, side: int, kind: FloatType, xp: Any) -> Array:
    """Return the next float32 or float64 to one side, or the one after it."""
    return x + side * (xp.abs(x) * (2 * kind.unit) + kind.spacing)


@dataclass(frozen=True)
class Intersection(Constraint):
    """Hold weights in several sets at once: the nearest point of their intersection, by Dykstra's algorithm.

    `Intersection(NonNegative(), MaxNorm(1.0))` has the non-negative vectors up to norm 1. The last set holds as exactly
    as it does alone; the others hold to `tolerance`, relative to the largest entry of the array. If `steps` sweeps do
    not reach the tolerance, a warning says what is left. For sets that are not convex, such as spheres, the result lies
    in the intersection but need not be its nearest point.

    Attributes:
        sets: the sets. Sets of vectors have one axis setting, or each has ints or None.
        tolerance: how far from a set, relative to the largest entry, a result may be; default 1e-6 (float32 and shorter
            types reach 1e-6, float64 1e-14).
        steps: the most sweeps over all sets; default 1000.

    Raises:
        TypeError: an object that is not a constraint.
        ValueError: fewer than two sets, sets that are known to have no common point, or axes that cannot be combined.

    >>> import numpy as np
    >>> from projgd import MaxNorm, NonNegative
    >>> Intersection(NonNegative(), MaxNorm(1.0, axis=-1)).project(np.asarray([[-3.0, 2.0]])).round(3)
    array([[0., 1.]])

    References:
        J. P. Boyle, R. L. Dykstra, *A method for finding projections onto the intersection of convex sets in Hilbert
            spaces*, Lecture Notes in Statistics 37, 1986.
        E. G. Birgin, M. Raydan, *Robust stopping criteria for Dykstra's algorithm*, SIAM J. Sci. Comput. 26, 2005.
    """

    sets: tuple[Constraint, ...]
    tolerance: float = 1e-6
    steps: int = 1000
    start: Array | None = field(default=None, init=False, repr=False, compare=False)

    def __init__(self, *sets: Any, tolerance: float = 1e-6, steps: int = 1000, **config: Any) -> None:
        sets = tuple(config.pop("sets", sets))
        if config:
            raise TypeError(f"Intersection() has no setting {next(iter(config))!r}")
        for own in sets:
            if not isinstance(own, Constraint):
                raise TypeError(f"Intersection() takes sets such as MaxNorm(1.0), not {own!r}")
        if len(sets) < 2:
            raise ValueError(f"Intersection() of {len(sets)} set: pass two or more, or the set itself")
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps={steps!r} is not a number of sweeps: pass 1 or more")
        object.__setattr__(self, "sets", sets)
        object.__setattr__(self, "tolerance", positive("tolerance", tolerance))
        object.__setattr__(self, "steps", steps)
        object.__setattr__(self, "start", None)
        _common_axis(sets)
        _refuse_disjoint(sets)

    @property
    def axis(self) -> Axis:
        return _common_axis(self.sets)

    @property
    def takes_initial(self) -> bool:
        return any(own.takes_initial for own in self.sets)

    @property
    def keeps_entries(self) -> bool:
        return True

    @property
    def is_convex(self) -> bool:
        return all(own.is_convex for own in self.sets)

    @property
    def joins_vectors(self) -> bool:
        return any(own.joins_vectors for own in self.sets)

    def replace(self, **changed: Any) -> Constraint:
        """Return this set with other settings; `axis=` goes into all members that have one."""
        if "axis" in changed:
            axis = changed.pop("axis")
            changed["sets"] = [own if own.axis == "entries" else own.replace(axis=axis) for own in self.sets]
        unknown = changed.keys() - {"sets", "tolerance", "steps"}
        if unknown:
            raise ValueError(f"{min(unknown)}={changed[min(unknown)]!r} has no meaning for {self}: leave it out")
        return Intersection(**{"sets": self.sets, "tolerance": self.tolerance, "steps": self.steps, **changed})

    def check_metric(self, metric: Any) -> None:
        super().check_metric(metric)
        if metric != "euclidean" and any(own.axis != "entries" for own in self.sets):
            raise ValueError(f'{self} is projected in the Euclidean metric only: pass metric="euclidean"')

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        for own, axes in self._members(vectors.shape, vectors.axes):
            own.fit(kind, Vectors(vectors.shape, axes), name)

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array | None:
        """Return the initial weights, from which every set takes what it needs; None if no set takes anything."""
        if not self.takes_initial:
            return None
        xp = xp or array_namespace(x)
        for own, over in self._members(tuple(x.shape), axes):
            own.initial(x, over, name, xp)  # raises an error for weights that it can take nothing from
        return xp.asarray(x, copy=True)

    def bind(self, initial: Array) -> Intersection:
        bound = copy.copy(self)
        object.__setattr__(bound, "start", initial)
        return bound

    def _members(self, shape: Sequence[int], axes: tuple[int, ...]) -> list[tuple[Constraint, tuple[int, ...]]]:
        """Return every set with the axes that make one vector of it."""
        mixed = len({own.axis for own in self.sets if own.axis != "entries"}) > 1
        members = []
        for own in self.sets:
            over: tuple[int, ...] = () if own.axis == "entries" else axes
            if mixed and own.axis != "entries":
                vectors = _axes.resolve(own.axis, shape, "out_last", f"the array, in {own},")
                assert vectors is not None  # the union of all axes has fitted
                over = vectors.axes
            members.append((own, over))
        return members

    def _bound(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> list[tuple[Constraint, tuple[int, ...]]]:
        """Return every set with its axes, and with what it takes from the initial weights."""
        members = self._members(tuple(x.shape), axes)
        if not self.takes_initial:
            return members
        if self.start is None:
            raise ValueError(f"{self} takes numbers from the initial weights, which only an optimizer has")
        start = xp.reshape(xp.astype(self.start, x.dtype), x.shape)
        return [
            (own.bind(own.initial(start, over, "the array", xp)) if own.takes_initial else own, over)
            for own, over in members
        ]

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        if 0 in x.shape:
            return x
        named = self._bound(x, axes, xp)
        # Entries first: of a cone and a ball, such as `NonNegative` and `MaxNorm`, one sweep then finds the point.
        members = sorted(named, key=lambda member: member[0].axis != "entries")
        wide = xp.astype(x, getattr(xp, float_type(x).compute), copy=False)
        finite = xp.all(xp.isfinite(wide), axis=axes, keepdims=True) if axes else xp.isfinite(wide)
        w = xp.where(finite, wide, xp.zeros_like(wide))
        kind = float_type(w)
        most = kind.largest / (8 * math.prod(x.shape))
        w = xp.clip(w, -most, most)  # no norm and no correction overflows
        close = max(self.tolerance, 8 * kind.unit)

        def sweep(state: tuple[Any, ...]) -> tuple[Any, ...]:
            _, y, *corrections = state
            change, size = xp.zeros_like(finite, dtype=y.dtype), xp.max(xp.abs(y))
            for i, (own, over) in enumerate(members):
                z = y + corrections[i]
                q = own.onto(z, over, xp)
                left = z - q if own.is_convex else xp.zeros_like(z)
                change = xp.maximum(xp.max(xp.abs(left - corrections[i])), change)
                corrections[i], y = left, q
            return xp.all(change <= 0.1 * close * size), y, *corrections

        zeros = [xp.zeros_like(w) for _ in members]
        done, y, *_ = repeat(self.steps, sweep, (xp.asarray(False), w, *zeros), xp)
        self._warn(done, y, members, xp)
        # In the stored dtype: what rounding has moved out of a set goes back in, out of the last one exactly.
        inside = (self._is_inside(xp.astype(w, x.dtype), members, close, axes, xp)) & (w == wide)
        inside = xp.all(inside, axis=axes, keepdims=True) if axes else inside
        q = xp.astype(y, x.dtype)
        for own, over in named:
            q = own.onto(q, over, xp)
        own, over = named[-1]
        return xp.where(finite, xp.where(inside, own.onto(x, over, xp), q), x)

    def _is_inside(self, x: Array, members: list[Any], close: float, axes: tuple[int, ...], xp: Any) -> Array:
        """Return whether each vector is within the tolerance of every set."""
        bound = 4 * max(close, 4 * float_type(x).unit) * xp.max(xp.abs(x))
        inside = xp.ones_like(x, dtype=xp.bool)
        for own, over in members:
            inside = inside & (own.outside(x, over, xp) <= bound)
        return xp.all(inside, axis=axes, keepdims=True) if axes else inside

    def _warn(self, done: Array, y: Array, members: list[Any], xp: Any) -> None:
        """Warn of a result that is not within the tolerance of every set, with the distance that is left."""
        size = xp.max(xp.abs(y))
        left = xp.max(xp.stack([xp.max(own.outside(y, over, xp)) for own, over in members]))
        far = ~done & (left > self.tolerance * size)

        def warn(left: Any, size: Any) -> None:
            rules.warn(
                f"{self} did not reach its tolerance in {self.steps} sweeps: a result is {float(left):.2g} outside of "
                f"a set, with entries up to {float(size):.2g}. Pass more steps=; an empty intersection has no result"
            )

        call_if(far, warn, left, size, xp=xp)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        """Return the largest distance of every vector to one of the sets."""
        xp = xp or array_namespace(x)
        found = None
        for own, over in self._bound(x, axes, xp):
            distance = own.outside(x, over, xp) + xp.zeros_like(x)
            distance = xp.max(distance, axis=axes, keepdims=True) if axes else distance
            found = distance if found is None else xp.maximum(found, distance)
        assert found is not None
        return found

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array, Array]:
        ends = [own.rounding_interval(q, p, over, norm, xp) for own, over in self._bound(q, axes, xp)]
        zero = xp.zeros_like(q)
        least, most = ends[-1][0] + zero, ends[-1][1] + zero  # the last set holds exactly
        for low, high in ends[:-1]:
            least = xp.where((low + zero > least) & (low + zero < most), low + zero, least)
            most = xp.where((high + zero < most) & (high + zero > least), high + zero, most)
        return xp.minimum(least, q), xp.maximum(most, q)

    def __repr__(self) -> str:
        return f"Intersection({', '.join(map(str, self.sets))})"


def _common_axis(sets: Sequence[Constraint]) -> Axis:
    """Return the axis of an intersection: that of its sets of vectors, or all their axes together.

    Raises:
        ValueError: different settings that are not ints.
    """
    found = list(dict.fromkeys(own.axis for own in sets if own.axis != "entries"))
    if len(found) < 2:
        return found[0] if found else "entries"
    if any(isinstance(axis, (str, _axes.Split, _axes.Stacked)) for axis in found):
        raise ValueError(
            f"the sets have the axes {' and '.join(map(repr, found))}: where they differ, pass each as ints or None"
        )
    if None in found:
        return None
    union: list[int] = []
    for axis in found:
        union += [axis] if isinstance(axis, int) else list(axis)  # type: ignore[arg-type]
    if len({a < 0 for a in union}) > 1:
        raise ValueError(f"the axes {found} count from both ends: pass all as positive ints, or all as negative ones")
    return tuple(sorted(set(union)))


def _refuse_disjoint(sets: Sequence[Constraint]) -> None:
    """Raise ValueError for sets of norms, or of entries, that are known to have no common point."""
    for i, one in enumerate(sets):
        for other in sets[i + 1 :]:
            ends = [_span(own) for own in (one, other)]
            if None in ends or (one.axis == "entries") != (other.axis == "entries"):
                continue
            same_axis = one.axis == other.axis
            (low, high), (other_low, other_high) = ends
            if same_axis and (low > other_high or other_low > high):
                raise ValueError(f"the intersection of {one} and {other} is empty: they have no common point")


def _span(own: Constraint) -> Any:
    """Return the smallest and the largest norm, or entry, of a set, as floats; None if they are not known."""
    ends: Any = None
    if isinstance(own, NormSet) and not own.takes_initial:
        ends = own.edges()
    elif isinstance(own, Box):
        ends = (-math.inf if own.low is None else own.low, math.inf if own.high is None else own.high)
    elif isinstance(own, NonNegative):
        ends = (0.0, math.inf)
    elif isinstance(own, NonPositive):
        ends = (-math.inf, 0.0)
    return ends if ends and all(isinstance(e, float) for e in ends) else None
