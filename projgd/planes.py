"""Define the sets of linear equations: hyperplanes, half-spaces, affine sets, and boxes that a hyperplane cuts.

The equations hold to rounding to the dtype, because no dtype has all points of a plane. An inequality holds exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from array_api_compat import array_namespace

from projgd import axes as _axes
from projgd import projections
from projgd.axes import Axis, Vectors
from projgd.constraints import VectorSet
from projgd.entries import Box, fit_shape
from projgd.sums import Array, FloatType, Scalar, float_type
from projgd.values import Values, read_numbers


@dataclass(frozen=True)
class Hyperplane(VectorSet):
    """Hold every vector at ⟨a, w⟩ = b: w ← w - a (⟨a, w⟩ - b) / ‖a‖².

    The equation holds to rounding to the dtype. `Hyperplane()` makes the sum of every vector 0.

    Attributes:
        a: the normal: a number, for a vector of equal entries, or an array that broadcasts against the parameter as it
            is stored. Default 1.
        b: the right side: a number, or an array with one number per vector, of size 1 along its axes. Default 0.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: an `a` or a `b` that is no number and no array, or an `axis` that is not an axis.
        ValueError: an `a` that is 0 throughout, or numbers that are not finite.

    >>> import numpy as np
    >>> Hyperplane(axis=-1).project(np.asarray([[1.0, 2.0, 6.0]]))
    array([[-2., -1.,  3.]])
    """

    arrays: ClassVar[tuple[str, ...]] = ("a", "b")
    a: Scalar = 1.0
    b: Scalar = 0.0
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        _check_plane(self)

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        return projections.project_plane(x, *_numbers(self, x, xp), axes, xp)

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        _fit_plane(self, vectors, name)

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[float, float]:
        return -float_type(q).largest, float_type(q).largest


@dataclass(frozen=True)
class HalfSpace(VectorSet):
    """Hold every vector at ⟨a, w⟩ ≤ b: w ← w - a max(⟨a, w⟩ - b, 0) / ‖a‖².

    The bound holds exactly for the stored values. For ⟨a, w⟩ ≥ b pass -a and -b.

    Attributes:
        a: the normal: a number, for a vector of equal entries, or an array that broadcasts against the parameter as it
            is stored.
        b: the bound: a number, or an array with one number per vector, of size 1 along its axes. Default 0.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: an `a` or a `b` that is no number and no array, or an `axis` that is not an axis.
        ValueError: an `a` that is 0 throughout, or numbers that are not finite.

    >>> import numpy as np
    >>> HalfSpace(1.0, 9.0, axis=-1).project(np.asarray([[2.0, 3.0, 7.0], [0.0, 1.0, 2.0]])).round(3)
    array([[1., 2., 6.],
           [0., 1., 2.]])
    """

    arrays: ClassVar[tuple[str, ...]] = ("a", "b")
    a: Scalar
    b: Scalar = 0.0
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        _check_plane(self)

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        return projections.project_plane(x, *_numbers(self, x, xp), axes, xp, is_half=True)

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        _fit_plane(self, vectors, name)

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array, Array]:
        a, _ = _numbers(self, q, xp)
        most = xp.full_like(q, float_type(q).largest)
        return xp.where(a < 0, q, -most), xp.where(a > 0, q, most)


@dataclass(frozen=True)
class BoxSection(VectorSet):
    """Hold every vector at low ≤ wᵢ ≤ high and ⟨a, w⟩ = b: w ← clip(w - τ a, low, high), with the τ that gives b.

    The bounds of the entries hold exactly, the equation to rounding to the dtype.

    Attributes:
        low: the smallest value of an entry: a number, an array that broadcasts against the parameter, or None.
        high: the largest value of an entry, likewise.
        a: the normal: a number, for a vector of equal entries, or an array that broadcasts against the parameter.
            Default 1.
        b: the right side: a number, or an array with one number per vector, of size 1 along its axes. Default 0.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: a number that is none, or an `axis` that is not an axis.
        ValueError: an empty box, an `a` that is 0 throughout, or a `b` that no vector of the box reaches.

    >>> import numpy as np
    >>> BoxSection(0.0, 0.5, 1.0, 1.0, axis=-1).project(np.asarray([[0.9, 0.4, 0.0]])).round(3)
    array([[0.5 , 0.45, 0.05]])

    References:
        N. Maculan, C. P. Santiago, E. M. Macambira, M. H. C. Jardim, *An O(n) algorithm for projecting a vector on the
        intersection of a hyperplane and a box in Rⁿ*, JOTA 117, 2003.
    """

    arrays: ClassVar[tuple[str, ...]] = ("low", "high", "a", "b")
    low: Scalar | None = None
    high: Scalar | None = None
    a: Scalar = 1.0
    b: Scalar = 0.0
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        box = Box(self.low, self.high)
        object.__setattr__(self, "low", box.low)
        object.__setattr__(self, "high", box.high)
        _check_plane(self)

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        ends = [xp.full((), e, dtype=x.dtype) if isinstance(e, float) else e for e in self._box.interval(x, axes, xp)]
        a, b = _numbers(self, x, xp)

        def onto(x: Array, least: Array, most: Array, a: Array, b: Array) -> Array:
            return projections.project_box_section(x, (least, most), (a, b), axes, xp)

        return projections.by_pieces(onto, x, *ends, a, b, axes=axes, xp=xp)

    @property
    def _box(self) -> Box:
        return Box(self.low, self.high)

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        _fit_plane(self, vectors, name)
        self._box.fit(kind, vectors, name)
        numbers = self.low, self.high, self.a, self.b
        if not all(isinstance(n, (float, Values, type(None))) for n in numbers):
            return
        import numpy as np

        low, high, a, b = (_as_numpy(n, none) for n, none in zip(numbers, (-math.inf, math.inf, 0, 0), strict=True))
        with np.errstate(invalid="ignore"):
            ends = [np.where(a == 0, 0, np.where((a > 0) == is_low, a * low, a * high)) for is_low in (True, False)]
        least, most = (np.broadcast_to(e, vectors.shape).sum(axis=vectors.axes, keepdims=True) for e in ends)
        slack = 1e-9 * (np.abs(b) + np.abs(np.where(np.isfinite(least), least, 0)))
        if np.any((b < least - slack) | (b > most + slack)):
            raise ValueError(
                f"{name}: {self} is empty, because ⟨a, w⟩ is between {least.min()} and {most.max()} in the box"
            )

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        return self._box.rounding_interval(q, p, (), norm, xp)


@dataclass(frozen=True)
class AffineSet(VectorSet):
    """Hold every vector at A w = b: w ← w - A⁺ (A w - b), with the pseudo-inverse A⁺.

    The equations hold to rounding to the dtype. A vector's entries are in the order of the array, row by row.

    Attributes:
        A: an array of shape (equations, entries of one vector).
        b: the right sides: a number for all, or an array of shape (equations,). Default 0.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: an `A` that is no array of numbers (or one that JAX traces), or an `axis` that is not an axis.
        ValueError: shapes that do not fit, numbers that are not finite, or equations that no vector solves.

    >>> import numpy as np
    >>> AffineSet([[1.0, 0.0, -1.0]], axis=-1).project(np.asarray([[1.0, 5.0, 3.0]])).round(3)
    array([[2., 5., 2.]])
    """

    A: Any
    b: Any = 0.0
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        for key in ("A", "b"):
            object.__setattr__(self, key, Values.of(key, getattr(self, key)))
        object.__setattr__(self, "axis", _axes.check(self.axis))
        if len(self.A.shape) != 2 or self.b.shape not in ((), (1,), self.A.shape[:1]):
            raise ValueError(
                f"A has shape {self.A.shape} and b {self.b.shape}: pass (equations, entries) and (equations,)"
            )
        _solve(self.A, self.b)  # raises an error for equations without a solution

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        point, basis = (_like(values, x, xp) for values in _solve(self.A, self.b))
        return projections.project_affine(x, point, basis, axes, xp)

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        if vectors.length != self.A.shape[1]:
            raise ValueError(f"{name}: its vectors have {vectors.length} entries, and A has {self.A.shape[1]} columns")

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[float, float]:
        return -float_type(q).largest, float_type(q).largest


@functools.lru_cache(maxsize=64)
def _solve(matrix: Values, b: Values) -> tuple[Values, Values]:
    """Return the shortest solution of A w = b, and an orthonormal basis of the rows of A.

    Raises:
        ValueError: numbers that are not finite, or equations without a solution.
    """
    import numpy as np

    rows, right = np.frombuffer(matrix.data).reshape(matrix.shape), np.frombuffer(b.data).reshape(b.shape)
    right = np.broadcast_to(right, matrix.shape[:1])
    if not (np.isfinite(rows).all() and np.isfinite(right).all()):
        raise ValueError("A and b hold infinity: pass finite numbers")
    left, sizes, basis = np.linalg.svd(rows, full_matrices=False)
    rank = int((sizes > 1e-12 * max(sizes, default=0.0)).sum())
    if not rank:
        raise ValueError("A is 0 throughout, so its equations bound nothing: pass a row that is not 0")
    point = basis[:rank].T @ (left[:, :rank].T @ right / sizes[:rank])
    gap = float(np.abs(rows @ point - right).max())
    if gap > 1e-9 * max(1.0, float(np.abs(right).max())):
        raise ValueError(f"no vector solves A w = b: the best one is {gap:.2g} away, so the set is empty")
    return Values.of("point", point), Values.of("basis", basis[:rank])


def _like(values: Values, x: Array, xp: ModuleType) -> Array:
    """Return numbers in the dtype that an array is computed in."""
    return xp.astype(xp.asarray(values.array(xp, x)), getattr(xp, float_type(x).compute))


def _numbers(constraint: Any, x: Array, xp: ModuleType) -> tuple[Array, Array]:
    """Return a and b in the dtype that an array is computed in."""
    wide = getattr(xp, float_type(x).compute)

    def read(value: Any) -> Array:
        if isinstance(value, float):
            return xp.zeros_like(x[(slice(0, 1),) * len(x.shape)], dtype=wide) + value
        return _like(value, x, xp) if isinstance(value, Values) else xp.astype(value, wide)

    return read(constraint.a), read(constraint.b)


def _as_numpy(value: float | Values | None, none: float) -> Any:
    import numpy as np

    return (
        np.frombuffer(value.data).reshape(value.shape)
        if isinstance(value, Values)
        else np.asarray(none if value is None else value)
    )


def _check_plane(constraint: Any) -> None:
    """Read a, b and the axis of a set; raise an error for what is no plane."""
    for key in ("a", "b"):
        value = read_numbers(key, getattr(constraint, key))
        object.__setattr__(constraint, key, value)
        flat = [value] if isinstance(value, float) else value.numbers() if isinstance(value, Values) else []
        if not all(map(math.isfinite, flat)):
            raise ValueError(f"{key} is not finite: pass finite numbers")
        if key == "a" and flat and not any(flat):
            raise ValueError("a is 0 throughout, so ⟨a, w⟩ is 0 for every w: pass a normal that is not 0")
    object.__setattr__(constraint, "axis", _axes.check(constraint.axis))


def _fit_plane(constraint: Any, vectors: Vectors, name: str) -> None:
    """Raise ValueError for a normal or a right side that does not fit a parameter."""
    fit_shape(constraint, vectors, name)
    shape = tuple(getattr(constraint.b, "shape", ()))
    full = (1,) * (len(vectors.shape) - len(shape)) + shape
    if any(full[a] != 1 for a in vectors.axes):
        raise ValueError(
            f"{name}: b of shape {shape} has more than one number per vector, which lies along {vectors.axes}"
        )
    if isinstance(constraint.a, Values):
        import numpy as np

        a = np.broadcast_to(np.frombuffer(constraint.a.data).reshape(constraint.a.shape), vectors.shape)
        if not np.any(a != 0, axis=vectors.axes).all():
            raise ValueError(f"{name}: a is 0 along some vector, so ⟨a, w⟩ is 0 there: pass a normal that is not 0")
