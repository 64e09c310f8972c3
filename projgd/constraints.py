"""What can be asked of the weights: the sets, as frozen dataclasses.

To add one: a dataclass here, and one function in `projgd.projections`. Both fronts then have it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

from array_api_compat import array_namespace, is_torch_array

from projgd import axes as _axes
from projgd import metrics, projections
from projgd.axes import Axis, Vectors
from projgd.config import Configured
from projgd.projections import Array, FloatType, Scalar


@dataclass(frozen=True)
class Constraint(Configured, ABC):
    """A closed set for the weight vectors of a parameter, and the projection onto it."""

    in_metrics: ClassVar[tuple[str, ...]] = ("euclidean",)  # those that the projection is known in

    @abstractmethod
    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        """Project every vector of `x`, made by the non-negative `axes`. The layout is settled: this is for fronts."""

    @abstractmethod
    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        """Distance of every vector to the set, the reduced axes kept with size 1."""

    def land(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        """`onto` for weights that a step has just moved, when they need not come back bit for bit."""
        return self.onto(x, axes, xp)

    def rescale(
        self, z_norm: Array, r: Array, kind: FloatType, vectors: Vectors, xp: ModuleType
    ) -> tuple[Array, Array] | None:
        """For a set that only scales vectors: which of them, and by what; None for another set.

        The norms are given as r · z_norm, a vector x as x / r · the factor: where a vector is spread over several
        machines its norm is all that they share.
        """
        return None

    def onto_in(
        self,
        metric: Array,
        x: Array,
        axes: tuple[int, ...],
        xp: ModuleType | None = None,
        repeat: metrics.Repeat | None = None,
    ) -> Array:
        """As `onto`, nearest in the norm of a diagonal: argmin Σ D_i (q_i - x_i)², D = `metric` of the shape of `x`.

        `repeat` is the loop to iterate with, see `projgd.metrics`. A set that is a product of intervals inherits this,
        because there every diagonal has the same nearest point.
        """
        self.check_metric("adaptive")
        return self.onto(x, axes, xp)

    def check_metric(self, metric: Any) -> None:
        """Raise ValueError for a metric that is not known, or in which this set has no projection."""
        if metric not in metrics.NAMES:
            raise ValueError(f'metric={metric!r} is not known: pass "euclidean" or "adaptive"')
        if metric not in self.in_metrics:
            raise ValueError(f"{self} has no projection for metric={metric!r}: pass metric={self.in_metrics[0]!r}")

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array | None:
        """What the set takes from the initial weights `x`, one number per vector; None for a set that takes nothing.

        A front asks once, keeps the numbers in the optimizer's state, and hands them to `bind` at every step.
        """
        return None

    def bind(self, initial: Array) -> Constraint:
        """This set, with the numbers that `initial` took."""
        raise NotImplementedError(f"{self} takes nothing from the initial weights")

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


@dataclass(frozen=True)
class MaxNorm(Constraint):
    """Every vector has a norm of at most `c`: w ← w · min(1, c / ‖w‖₂) (Srivastava et al., JMLR 2014, section 5.1).

    Args:
        c: the bound, a positive number; 3 to 4 is usual. In JAX it may be a traced array: then a value that is not
            positive cannot be refused, and makes the weights NaN.
        axis: what makes one vector, see `projgd.axes`.
    """

    in_metrics: ClassVar[tuple[str, ...]] = metrics.NAMES
    c: Scalar
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", positive("c", self.c))
        object.__setattr__(self, "axis", _axes.check(self.axis))

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        return projections.project_ball(x, self.c, axes, xp)

    def rescale(
        self, z_norm: Array, r: Array, kind: FloatType, vectors: Vectors, xp: ModuleType
    ) -> tuple[Array, Array] | None:
        limits = projections.ball_limits(kind, vectors.shape, vectors.axes, self.c, xp, may_fill=False)
        outside = projections.is_beyond(z_norm, r, limits.threshold, xp)
        return outside, limits.target / xp.where(outside, z_norm, xp.ones_like(z_norm))

    def onto_in(
        self,
        metric: Array,
        x: Array,
        axes: tuple[int, ...],
        xp: ModuleType | None = None,
        repeat: metrics.Repeat | None = None,
    ) -> Array:
        return metrics.project_ball(x, metric, self.c, axes, xp, repeat)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        excess = projections.norm(x, axes, xp) - self.c
        return xp.where(excess < 0, xp.zeros_like(excess), excess)


@dataclass(frozen=True)
class Sphere(Constraint):
    """Every vector has the norm `radius`: w ← w · radius / ‖w‖₂. A zero vector has no nearest point and stays zero.

    Args:
        radius: a positive number; or `"initial"`, the norm that each vector has when the optimizer is made (in JAX: at
            `init`). That is taken once and kept in the optimizer's state, so that it cannot drift.
        axis: what makes one vector, see `projgd.axes`; None for the Frobenius norm of the whole array.

    >>> import numpy as np
    >>> Sphere(2.0, axis=None).project(np.asarray([[3.0, 0.0], [4.0, 0.0]])).round(3)
    array([[1.2, 0. ],
           [1.6, 0. ]])
    """

    in_metrics: ClassVar[tuple[str, ...]] = metrics.NAMES
    radius: Scalar
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        if isinstance(self.radius, str):
            if self.radius != "initial":
                raise ValueError(f'radius={self.radius!r} is not known: pass a positive number, or "initial"')
        else:
            object.__setattr__(self, "radius", positive("radius", self.radius))
        object.__setattr__(self, "axis", _axes.check(self.axis))

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        return projections.project_sphere(x, self._number(), axes, xp)

    def land(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        return projections.project_sphere(x, self._number(), axes, xp, moved=True)

    def rescale(
        self, z_norm: Array, r: Array, kind: FloatType, vectors: Vectors, xp: ModuleType
    ) -> tuple[Array, Array] | None:
        radius = self._number()
        off = projections.is_off(z_norm, r, radius, kind, vectors.shape, vectors.axes, xp, moved=True)
        return off, radius / xp.where(off, z_norm, xp.ones_like(z_norm))

    def onto_in(
        self,
        metric: Array,
        x: Array,
        axes: tuple[int, ...],
        xp: ModuleType | None = None,
        repeat: metrics.Repeat | None = None,
    ) -> Array:
        return metrics.project_sphere(x, metric, self._number(), axes, xp, repeat)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        return xp.abs(projections.norm(x, axes, xp) - self._number())

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array | None:
        return norms_of(x, axes, name, f"{self} keeps the initial norm", xp) if isinstance(self.radius, str) else None

    def bind(self, initial: Array) -> Sphere:
        bound = copy.copy(self)
        object.__setattr__(bound, "radius", initial)  # an array: __post_init__ checks a number
        return bound

    def _number(self) -> Scalar:
        if isinstance(self.radius, str):
            raise ValueError(f"{self} has no radius outside an optimizer, which takes it from the weights at the start")
        return self.radius


@dataclass(frozen=True)
class UnitNorm(Sphere):
    """Every vector has norm 1: `Sphere(1.0)`. A zero vector has no nearest point there and stays zero."""

    radius: Scalar = field(default=1.0, init=False, repr=False)


@dataclass(frozen=True)
class NonNegative(Constraint):
    """Every entry is at least 0: w ← max(w, 0)."""

    in_metrics: ClassVar[tuple[str, ...]] = metrics.NAMES

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        return projections.project_nonnegative(x, xp)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        return xp.where(x < 0, -x, xp.where(xp.isnan(x), x, xp.zeros_like(x)))


@dataclass(frozen=True)
class Box(Constraint):
    """Every entry lies from `low` to `high`: w ← min(max(w, low), high), the weight clipping of Wasserstein GANs.

    (Arjovsky, Chintala, Bottou 2017, arXiv 1701.07875, algorithm 1.)

    >>> import numpy as np
    >>> Box(-0.5, 0.5).project(np.asarray([[1.0, 0.25]]))
    array([[0.5 , 0.25]])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"low={self.low} and high={self.high} must be finite, and low the smaller")

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        return projections.project_box(x, self.low, self.high, xp)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        within = xp.where(xp.isnan(x), x, xp.zeros_like(x))
        return xp.where(x < self.low, self.low - x, xp.where(x > self.high, x - self.high, within))


def positive(name: str, value: Scalar) -> Scalar:
    """`value` as a float if it can be read and is positive and finite; a traced array as it is.

    Raises:
        TypeError: not a number.
        ValueError: zero, negative, NaN or infinite.
    """
    is_bool = isinstance(value, bool)
    plain = isinstance(value, (int, float)) and not is_bool  # torch.compile cannot ask a number that moves for a dtype
    if not plain and (is_bool or isinstance(value, (str, bytes)) or value is None or _is_bool_array(value)):
        raise TypeError(f"{name}={value!r} is not a number: pass a positive one, such as {name}=4.0")
    if not plain and math.prod(getattr(value, "shape", ())) != 1:
        raise TypeError(
            f"{name} is an array of shape {tuple(value.shape)}: pass one positive number, such as {name}=4.0"
        )
    if not plain and getattr(value, "shape", None) is None:
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


def _is_bool_array(value: Any) -> bool:
    return str(getattr(value, "dtype", "")).endswith("bool")


def norms_of(x: Array, axes: tuple[int, ...], name: str, why: str, xp: ModuleType | None = None) -> Array:
    """The norm of every vector of `x`, all of them positive and finite. Traced in JAX, where none can be refused, such
    a norm becomes NaN.

    Raises:
        ValueError: `name` has a vector that is zero or not finite; `why` says who needs its norm.
    """
    xp = xp or array_namespace(x)
    norms = projections.norm(x, axes, xp)
    fine = xp.isfinite(norms) & (norms > 0)
    try:
        bad = int(xp.sum(xp.astype(~fine, xp.int32)))
    except TypeError:  # JAX refuses to read a traced array
        return xp.where(fine, norms, xp.full_like(norms, math.nan))
    if bad:
        raise ValueError(
            f"{name}: {bad} of its {math.prod(norms.shape)} vectors have norm 0 or are not finite, and {why}. "
            "Initialise it differently (a residual projection that starts at zero can start small), or leave it free"
        )
    return norms
