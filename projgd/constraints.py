"""What can be asked of the weights: the sets, as frozen dataclasses.

To add a set of norms: a dataclass here that says its `band`. To add another set: a dataclass here, and one function in
`projgd.projections`. Both fronts then have it, with every engine that suits it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace, is_torch_array

from projgd import axes as _axes
from projgd import bands, metrics, projections
from projgd.axes import Axis, Vectors
from projgd.bands import Band
from projgd.config import Configured, from_config
from projgd.sums import Array, FloatType, Scalar, float_type, norm


@dataclass(frozen=True)
class Constraint(Configured, ABC):
    """A closed set for the weight vectors of a parameter, and the projection onto it."""

    @property
    def axis(self) -> Axis:
        """What makes one vector, see `projgd.axes`; `"entries"` for a set that bounds each entry on its own."""
        return "entries"

    @property
    def moving_c(self) -> Scalar | None:
        """The `c` that may move during training, as a param group's own key; None for a set without one."""
        return None

    @property
    def takes_initial(self) -> bool:
        """Whether the set takes numbers from the initial weights, see `initial`."""
        return False

    @property
    def fixes_norm(self) -> bool:
        """Whether all vectors in the set have one norm, so that weight decay has nothing to do."""
        return False

    @abstractmethod
    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        """Project every vector of `x`, for a caller that has settled the layout.

        Args:
            x: the array.
            axes: the non-negative axes that make one vector.
            xp: its array namespace, found from `x` if not given.
            moved: whether a step has just moved the weights; they need not come back bit for bit then.
        """

    @abstractmethod
    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        """Return the distance of every vector to the set, the reduced axes kept with size 1."""

    def band(self, kind: FloatType, vectors: Vectors, moved: bool = False) -> Band | None:
        """Return which norms stay and what the others become; None for a set that is not a set of norms.

        Args:
            kind: the stored dtype.
            vectors: the shape of the array, and the axes that make one vector.
            moved: as in `onto`.
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
        """Project as `onto`, but nearest in the norm of a diagonal: argmin Σ D_i (q_i - x_i)².

        A set that is a product of intervals inherits this, because there every diagonal has the same nearest point.

        Args:
            metric: D, of the shape of `x`.
            x, axes, xp: as in `onto`.
            repeat: the loop to iterate with, see `projgd.metrics`.
        """
        return self.onto(x, axes, xp)

    def check_metric(self, metric: Any) -> None:
        """Raise ValueError for a metric that is not known."""
        if metric not in metrics.NAMES:
            raise ValueError(f'metric={metric!r} is not known: pass "euclidean" or "adaptive"')

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array | None:
        """Return what the set takes from the initial weights `x`, one number per vector; None if it takes nothing.

        A front asks once, keeps the numbers in the optimizer's state, and hands them to `bind` at every step.
        """
        return None

    def bind(self, initial: Array) -> Constraint:
        """Return this set with the numbers that `initial` took."""
        raise NotImplementedError(f"{self} takes nothing from the initial weights")

    def replace(self, **changed: Any) -> Constraint:
        """Return this set with other hyperparameters.

        Raises:
            ValueError: a name that is none of its hyperparameters.

        >>> MaxNorm(3.0).replace(axis=0)
        MaxNorm(c=3.0, axis=0)
        """
        known = {f.name for f in fields(self)}
        for name, value in changed.items():
            if name not in known:
                raise ValueError(f"{name}={value!r} has no meaning for {self}: leave it out")
        made: Constraint = replace(self, **changed)
        return made

    @staticmethod
    def from_config(config: dict[str, Any]) -> Constraint:
        """Return the constraint that `config` described.

        Raises:
            TypeError: a config of something else, such as a shaping of updates.
            ValueError: an unknown kind.

        >>> Constraint.from_config(MaxNorm(3.0).config())
        MaxNorm(c=3.0, axis='fan_in')
        """
        made = from_config(config)
        if not isinstance(made, Constraint):
            raise TypeError(f"config describes {made}, which is no constraint: use projgd.from_config")
        return made

    def project(self, x: Array) -> Array:
        """Return the Euclidean projection of `x`: same library, dtype, shape and device.

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
        float_type(x)
        vectors = self.vectors(x)
        if vectors is None:
            return x
        xp = array_namespace(x)
        return xp.reshape(self.onto(xp.reshape(x, vectors.shape), vectors.axes, xp), x.shape)

    def violation(self, x: Array) -> Array:
        """Return how far each vector lies outside: 0 inside, NaN or inf where the vector holds one.

        >>> import numpy as np
        >>> MaxNorm(4.0).violation(np.asarray([[3.0, 0.3], [4.0, 0.4]]))
        array([1., 0.])
        """
        float_type(x)
        vectors = self.vectors(x)
        xp = array_namespace(x)
        if vectors is None:
            return xp.zeros((), dtype=x.dtype)
        distance = self.outside(xp.reshape(x, vectors.shape), vectors.axes, xp)
        return xp.squeeze(distance, axis=vectors.axes) if vectors.axes else distance

    def vectors(self, x: Array) -> Vectors | None:
        """Return the vectors of a bare array, in its library's layout."""
        layout: _axes.Layout = "out_first" if is_torch_array(x) else "out_last"
        return self.resolve(x.shape, layout)

    def resolve(self, shape: tuple[int, ...], layout: _axes.Layout, name: str = "the array") -> Vectors | None:
        """Return the vectors of an array of `shape`; None where it has none to constrain."""
        return _axes.resolve(self.axis, shape, layout, name)


@dataclass(frozen=True)
class NormSet(Constraint):
    """A set that only the norm of a vector decides about. A subclass has an `axis`, says its `band` and its `edges`."""

    @abstractmethod
    def edges(self) -> tuple[Scalar, Scalar]:
        """Return the smallest and the largest norm in the set."""

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        band = self.band(float_type(x), Vectors(tuple(x.shape), axes), moved)
        assert band is not None
        return projections.project_band(x, band, axes, xp)

    def onto_in(
        self,
        metric: Array,
        x: Array,
        axes: tuple[int, ...],
        xp: ModuleType | None = None,
        repeat: metrics.Repeat | None = None,
    ) -> Array:
        band = self.band(float_type(x), Vectors(tuple(x.shape), axes))
        assert band is not None
        return metrics.project_band(x, metric, band, axes, xp, repeat)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        norms, (low, high) = norm(x, axes, xp), self.edges()
        zero = xp.zeros_like(norms)
        above = xp.where(norms > high, norms - high, xp.where(xp.isnan(norms), norms, zero))
        return xp.where(norms < low, low - norms, above)


@dataclass(frozen=True)
class MaxNorm(NormSet):
    """Every vector has a norm of at most `c`: w ← w · min(1, c / ‖w‖₂) (Srivastava et al., JMLR 2014, section 5.1).

    Args:
        c: the bound, a positive number; 3 to 4 is usual. In JAX it may be a traced array: then a value that is not
            positive cannot be refused, and makes the weights NaN.
        axis: what makes one vector, see `projgd.axes`.

    Raises:
        TypeError: a `c` that is no number, an `axis` that is none.
        ValueError: a `c` that is not positive and finite.

    >>> import numpy as np
    >>> MaxNorm(1.0).project(np.asarray([[3.0, 0.3], [4.0, 0.4]])).round(3)
    array([[0.6, 0.3],
           [0.8, 0.4]])

    References:
        N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, *Dropout: a simple way to prevent
        neural networks from overfitting*, JMLR 15, 2014, section 5.1.
    """

    c: Scalar
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", positive("c", self.c))
        object.__setattr__(self, "axis", _axes.check(self.axis))

    @property
    def moving_c(self) -> Scalar:
        return self.c

    def band(self, kind: FloatType, vectors: Vectors, moved: bool = False) -> Band:
        return bands.ball_band(kind, vectors, self.c)

    def edges(self) -> tuple[Scalar, Scalar]:
        return 0.0, self.c


@dataclass(frozen=True)
class MinMaxNorm(NormSet):
    """Every vector has a norm from `low` to `high`: w ← w · clip(‖w‖₂, low, high) / ‖w‖₂, as in Keras's `MinMaxNorm`.

    A zero vector has no direction and stays zero.

    Args:
        low: the smallest norm, 0 or more.
        high: the largest norm, positive, not below `low`.
        rate: the share of the way that a vector outside is moved, from 0 to 1. Only 1 holds the bounds.
        axis: what makes one vector, see `projgd.axes`.

    Raises:
        TypeError: a bound or a rate that is no number, an `axis` that is none.
        ValueError: low > high, a negative or NaN bound, a rate outside of [0, 1].

    >>> import numpy as np
    >>> MinMaxNorm(1.0, 2.0).project(np.asarray([[3.0, 0.3], [4.0, 0.4]])).round(3)
    array([[1.2, 0.6],
           [1.6, 0.8]])

    References:
        Keras 3, `keras.constraints.MinMaxNorm`.
    """

    low: float
    high: float
    rate: float = 1.0
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        low, high, rate = number("low", self.low), positive("high", self.high), number("rate", self.rate)
        if not 0 <= low < math.inf:
            raise ValueError(f"low={low} is no norm: pass 0 or more, such as MinMaxNorm(0.0, {high})")
        if low > high:
            raise ValueError(f"low={low} is above high={high}: pass the smaller norm first, MinMaxNorm({high}, {low})")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate={rate} is a share of the way: pass a number from 0 to 1")
        for name, value in (("low", low), ("high", high), ("rate", rate), ("axis", _axes.check(self.axis))):
            object.__setattr__(self, name, value)

    def band(self, kind: FloatType, vectors: Vectors, moved: bool = False) -> Band:
        return bands.interval_band(kind, vectors, self.low, self.high, self.rate)

    def edges(self) -> tuple[Scalar, Scalar]:
        return self.low, self.high


@dataclass(frozen=True)
class Sphere(NormSet):
    """Every vector has the norm `radius`: w ← w · radius / ‖w‖₂. A zero vector has no nearest point and stays zero.

    Args:
        radius: a positive number; or `"initial"`, the norm that each vector has when the optimizer is made (in JAX: at
            `init`). That is taken once and kept in the optimizer's state, so that it cannot drift.
        axis: what makes one vector, see `projgd.axes`; None for the Frobenius norm of the whole array.

    Raises:
        TypeError: a `radius` that is no number, an `axis` that is none.
        ValueError: a `radius` that is not positive and finite, or another word than `"initial"`.

    >>> import numpy as np
    >>> Sphere(2.0, axis=None).project(np.asarray([[3.0, 0.0], [4.0, 0.0]])).round(3)
    array([[1.2, 0. ],
           [1.6, 0. ]])
    """

    radius: Scalar
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        if isinstance(self.radius, str):
            if self.radius != "initial":
                raise ValueError(f'radius={self.radius!r} is not known: pass a positive number, or "initial"')
        else:
            object.__setattr__(self, "radius", positive("radius", self.radius))
        object.__setattr__(self, "axis", _axes.check(self.axis))

    def band(self, kind: FloatType, vectors: Vectors, moved: bool = False) -> Band:
        return bands.sphere_band(kind, vectors, self.edges()[0], moved)

    def edges(self) -> tuple[Scalar, Scalar]:
        if isinstance(self.radius, str):
            raise ValueError(f"{self} has no radius outside an optimizer, which takes it from the weights at the start")
        return self.radius, self.radius

    @property
    def takes_initial(self) -> bool:
        return isinstance(self.radius, str)

    @property
    def fixes_norm(self) -> bool:
        return True

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array | None:
        return norms_of(x, axes, name, f"{self} keeps the initial norm", xp) if self.takes_initial else None

    def bind(self, initial: Array) -> Sphere:
        bound = copy.copy(self)
        object.__setattr__(bound, "radius", initial)  # an array: __post_init__ checks a number
        return bound


@dataclass(frozen=True)
class UnitNorm(Sphere):
    """Every vector has norm 1: `Sphere(1.0)`. A zero vector has no nearest point there and stays zero.

    Args:
        axis: what makes one vector, see `projgd.axes`.

    >>> import numpy as np
    >>> UnitNorm(axis=1).project(np.asarray([[3.0, 4.0]]))
    array([[0.6, 0.8]])
    """

    radius: Scalar = field(default=1.0, init=False, repr=False)


@dataclass(frozen=True)
class NonNegative(Constraint):
    """Every entry is at least 0: w ← max(w, 0).

    >>> import numpy as np
    >>> NonNegative().project(np.asarray([[-1.0, 2.0]]))
    array([[0., 2.]])
    """

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
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

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        return projections.project_box(x, self.low, self.high, xp)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        within = xp.where(xp.isnan(x), x, xp.zeros_like(x))
        return xp.where(x < self.low, self.low - x, xp.where(x > self.high, x - self.high, within))


def number(name: str, value: Scalar) -> Scalar:
    """Return `value` as a float if it can be read; a traced array as it is.

    Raises:
        TypeError: not a number, or several.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)  # torch.compile cannot ask a number that moves for a dtype
    shape = getattr(value, "shape", None)
    refusal = TypeError(f"{name}={value!r} is not a number: pass one such as {name}=1.0")
    if value is None or isinstance(value, (bool, str, bytes)) or _is_bool_array(value):
        raise refusal
    if shape is None:
        try:
            return float(value)
        except (TypeError, ValueError):
            raise refusal from None
    if math.prod(shape) != 1:
        raise TypeError(f"{name} is an array of shape {tuple(shape)}: pass one number, such as {name}=1.0")
    try:
        return float(value.reshape(()))
    except TypeError:  # JAX refuses to read a traced array
        return value


def positive(name: str, value: Scalar) -> Scalar:
    """Return `value` as a float if it can be read and is positive and finite; a traced array as it is.

    Raises:
        TypeError: not a number.
        ValueError: zero, negative, NaN or infinite.
    """
    read = number(name, value)
    if isinstance(read, float) and not 0 < read < math.inf:
        raise ValueError(f"{name}={read} must be positive and finite, such as {name}=4.0; pass None for no bound")
    return read


def _is_bool_array(value: Any) -> bool:
    return str(getattr(value, "dtype", "")).endswith("bool")


def norms_of(x: Array, axes: tuple[int, ...], name: str, why: str, xp: ModuleType | None = None) -> Array:
    """The norm of every vector of `x`, all of them positive and finite. Traced in JAX, where none can be refused, such
    a norm becomes NaN.

    Raises:
        ValueError: `name` has a vector that is zero or not finite; `why` says who needs its norm.
    """
    xp = xp or array_namespace(x)
    norms = norm(x, axes, xp)
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
