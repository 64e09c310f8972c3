"""What can be asked of the weights: the sets, as frozen dataclasses.

To add one: a dataclass here, and one function in `projgd.projections`. Both fronts then have it.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

from array_api_compat import array_namespace, is_torch_array

from projgd import axes as _axes
from projgd import projections
from projgd.axes import Axis, Vectors
from projgd.projections import Array, Scalar


@dataclass(frozen=True)
class Constraint(ABC):
    """A closed set for the weight vectors of a parameter, and the projection onto it."""

    kinds: ClassVar[dict[str, type[Constraint]]] = {}

    def __init_subclass__(cls) -> None:
        Constraint.kinds[cls.__name__] = cls

    @abstractmethod
    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        """Project every vector of `x`, made by the non-negative `axes`. The layout is settled: this is for fronts."""

    @abstractmethod
    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        """Distance of every vector to the set, the reduced axes kept with size 1."""

    def project(self, x: Array) -> Array:
        """The Euclidean projection of `x`: same library, dtype, shape and device.

        A bare array is read in its library's own layout: (out, in, *kernel) for PyTorch, (*kernel, in, out) for NumPy
        and JAX; `axis` overrides that. An array without a fan-in (fewer than two axes) comes back as it is.

        Raises:
            TypeError: an integer, boolean or complex array.
            ValueError: an axis that the array does not have.

        >>> import numpy as np
        >>> MaxNorm(1.0).project(np.asarray([[3.0, 0.3], [4.0, 0.4]])).round(3)
        array([[0.6, 0.3],
               [0.8, 0.4]])
        """
        projections.float_type(x)
        vectors = self.vectors(x)
        if vectors is None:
            return x
        xp = array_namespace(x)
        return xp.reshape(self.onto(xp.reshape(x, vectors.shape), vectors.axes, xp), x.shape)

    def violation(self, x: Array) -> Array:
        """How far each vector lies outside (0 inside, NaN or inf where the vector holds one), one number per vector.

        >>> import numpy as np
        >>> MaxNorm(4.0).violation(np.asarray([[3.0, 0.3], [4.0, 0.4]]))
        array([1., 0.])
        """
        projections.float_type(x)
        vectors = self.vectors(x)
        xp = array_namespace(x)
        if vectors is None:
            return xp.zeros((), dtype=x.dtype)
        distance = self.outside(xp.reshape(x, vectors.shape), vectors.axes, xp)
        return xp.squeeze(distance, axis=vectors.axes) if vectors.axes else distance

    def vectors(self, x: Array) -> Vectors | None:
        """The vectors of a bare array, in its library's layout."""
        layout: _axes.Layout = "out_first" if is_torch_array(x) else "out_last"
        return self.resolve(x.shape, layout)

    def resolve(self, shape: tuple[int, ...], layout: _axes.Layout, name: str = "the array") -> Vectors | None:
        """The vectors of an array of `shape`; None where it has none to constrain."""
        return _axes.resolve(getattr(self, "axis", ()), shape, layout, name)

    def config(self) -> dict[str, Any]:
        """The constraint in plain JSON types; `projgd.from_config` gives it back.

        >>> MaxNorm(3.0).config()
        {'kind': 'MaxNorm', 'c': 3.0, 'axis': 'fan_in'}
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": type(self).__name__} | {k: _plain(v) for k, v in fields.items()}


def from_config(config: dict[str, Any]) -> Constraint:
    """The constraint that `Constraint.config` described.

    >>> from_config({"kind": "MaxNorm", "c": 3.0, "axis": [0, 1]})
    MaxNorm(c=3.0, axis=(0, 1))
    """
    fields = dict(config)
    kind = fields.pop("kind", None)
    if kind not in Constraint.kinds:
        raise ValueError(f"config names the constraint {kind!r}; known are {', '.join(sorted(Constraint.kinds))}")
    return Constraint.kinds[kind](**fields)


@dataclass(frozen=True)
class MaxNorm(Constraint):
    """Every vector has a norm of at most `c`: w ← w · min(1, c / ‖w‖₂) (Srivastava et al., JMLR 2014, section 5.1).

    Args:
        c: the bound, a positive number; 3 to 4 is usual. In JAX it may be a traced array: then a value that is not
            positive cannot be refused, and makes the weights NaN.
        axis: what makes one vector, see `projgd.axes`.
    """

    c: Scalar
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", positive("c", self.c))
        object.__setattr__(self, "axis", _axes.check(self.axis))

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        return projections.project_ball(x, self.c, axes, xp)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        excess = projections.norm(x, axes, xp) - self.c
        return xp.where(excess < 0, xp.zeros_like(excess), excess)


@dataclass(frozen=True)
class UnitNorm(Constraint):
    """Every vector has norm 1. A zero vector has no nearest point there and stays zero."""

    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", _axes.check(self.axis))

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        return projections.project_sphere(x, 1.0, axes, xp)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        return xp.abs(projections.norm(x, axes, xp) - 1.0)


@dataclass(frozen=True)
class NonNegative(Constraint):
    """Every entry is at least 0: w ← max(w, 0)."""

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        return projections.project_nonnegative(x, xp)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        return xp.where(x < 0, -x, xp.where(xp.isnan(x), x, xp.zeros_like(x)))


def positive(name: str, value: Scalar) -> Scalar:
    """`value` as a float if it can be read and is positive and finite; a traced array as it is.

    Raises:
        TypeError: not a number.
        ValueError: zero, negative, NaN or infinite.
    """
    if isinstance(value, (str, bytes, bool)) or value is None:
        raise TypeError(f"{name}={value!r} is not a number: pass a positive one, such as {name}=4.0")
    if not isinstance(value, (int, float)) and getattr(value, "shape", None) is None:
        try:
            value = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name}={value!r} is not a number: pass a positive one, such as {name}=4.0") from None
    try:
        number = float(value)
    except TypeError:  # JAX refuses to read a traced array
        return value
    if not (0 < number < math.inf):
        raise ValueError(f"{name}={number} must be positive and finite, such as {name}=4.0; pass None for no bound")
    return number


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value
