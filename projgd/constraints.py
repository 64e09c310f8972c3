"""Define the sets that weights can be held in, as frozen dataclasses.

A new set of norms is a dataclass here that returns its `band`. Any other set is a dataclass in
`projgd.entries`, `projgd.simplices`, `projgd.planes` or `projgd.combined`, and a function in `projgd.projections`.
PyTorch and JAX then have the set, with every engine that suits it.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from types import ModuleType
from typing import Any, ClassVar, Literal

from array_api_compat import array_namespace, is_torch_array

from projgd import axes as _axes
from projgd import bands, metrics, projections
from projgd.axes import Axis, Vectors
from projgd.bands import Band
from projgd.config import Configured, from_config
from projgd.sums import Array, FloatType, Scalar, float_type, norm


@dataclass(frozen=True)
class Constraint(Configured, ABC):
    """Describe a closed set for the weight vectors of a parameter, and project onto it.

    This is the base class of all sets. Make one of its subclasses, such as `MaxNorm`. A constraint is immutable
    and compares by value.

    Attributes:
        axis: the axes that make one vector, see `projgd.axes`.
        moving_c: the bound that may change during training; None for a set without one.
        takes_initial: whether the set takes numbers from the initial weights.
        fixes_norm: whether all vectors in the set have the same norm.
        is_convex: whether the set is convex; the nearest point is then the only one.
        joins_vectors: whether a bound is for all vectors of a parameter together.
        keeps_entries: whether what the set takes from the initial weights has one number per entry.
        arrays: the names of the hyperparameters that may be arrays, which broadcast against a parameter.

    >>> import numpy as np
    >>> w = np.asarray([[3.0, 0.3], [4.0, 0.4]])
    >>> constraint: Constraint = MaxNorm(1.0)
    >>> constraint.violation(w)
    array([4., 0.])
    >>> constraint.violation(constraint.project(w))
    array([0., 0.])
    """

    arrays: ClassVar[tuple[str, ...]] = ()

    @property
    def axis(self) -> Axis:
        """Return the axes that make one vector, see `projgd.axes`; `"entries"` for a set that bounds each entry."""
        return "entries"

    @property
    def moving_c(self) -> Scalar | None:
        """Return the `c` that may move during training, as a param group's own key; None for a set without one."""
        return None

    @property
    def takes_initial(self) -> bool:
        """Return whether the set takes numbers from the initial weights, see `initial`."""
        return False

    @property
    def fixes_norm(self) -> bool:
        """Return whether all vectors in the set have one norm, so that weight decay cannot change it."""
        return False

    @property
    def is_convex(self) -> bool:
        """Return whether the set is convex; the nearest point is then the only one."""
        return True

    @property
    def keeps_entries(self) -> bool:
        """Return whether what `initial` returns has one number per entry, and not one per vector."""
        return False

    @property
    def joins_vectors(self) -> bool:
        """Return whether a bound is for all vectors of a parameter together, so that a sharded one cannot have it."""
        return False

    @abstractmethod
    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        """Project every vector of `x` along given axes; `project` finds the axes itself.

        Args:
            x: an array of any shape and of a floating-point dtype.
            axes: the non-negative axes that make one vector.
            xp: the array namespace of `x`; default None, which looks it up.
            moved: whether a step has just moved the weights; they then need not come back bit for bit. Default False.

        Returns:
            The projected array: same library, dtype, shape and device.

        Raises:
            ValueError: a bound that is too small for the dtype of `x`.

        >>> import numpy as np
        >>> MaxNorm(1.0).onto(np.asarray([[3.0, 4.0]]), axes=(1,)).round(3)
        array([[0.6, 0.8]])
        """

    @abstractmethod
    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        """Return the Euclidean distance of every vector to the set; `violation` finds the axes itself.

        Args:
            x: an array of any shape and of a floating-point dtype.
            axes: the non-negative axes that make one vector.
            xp: the array namespace of `x`; default None, which looks it up.

        Returns:
            One number per vector: `x`'s shape with size 1 along `axes`. NaN or infinity in a vector shows in its
                number.

        Raises:
            ValueError: a set that needs the initial weights, such as `Sphere("initial")` before `bind`.

        >>> import numpy as np
        >>> MaxNorm(1.0).outside(np.asarray([[3.0, 4.0]]), axes=(1,))
        array([[4.]])
        """

    def band(self, kind: FloatType, vectors: Vectors, moved: bool = False) -> Band | None:
        """Return which norms stay and what every other norm becomes; None for a set that is not a set of norms.

        Args:
            kind: the stored dtype.
            vectors: the shape of the array, and the axes that make one vector.
            moved: whether a step has just moved the weights, as in `onto`; default False.

        Returns:
            The band, whose numbers allow for rounding to the dtype.

        Raises:
            ValueError: a bound that is too small for the dtype.

        >>> from projgd.axes import Vectors
        >>> from projgd.sums import FLOATS
        >>> MaxNorm(1.0).band(FLOATS["float64"], Vectors((4, 3), (1,))).high <= 1.0
        True
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
        """Project every vector of `x` to the nearest point in the norm of a diagonal: argmin Σ D_i (q_i - x_i)².

        A set that is a product of intervals inherits this method, because every diagonal has the same nearest point
        there.

        Args:
            metric: D, a non-negative array of the shape of `x`.
            x: an array of any shape and of a floating-point dtype.
            axes: the non-negative axes that make one vector.
            xp: the array namespace of `x`; default None, which looks it up.
            repeat: the loop that iterates, see `projgd.metrics`; default None, which runs a fixed number of steps.

        Returns:
            The projected array: same library, dtype, shape and device.

        Raises:
            ValueError: a bound that is too small for the dtype of `x`.

        >>> import numpy as np
        >>> x, d = np.asarray([[3.0, 4.0]]), np.asarray([[100.0, 1.0]])
        >>> MaxNorm(1.0).onto_in(d, x, axes=(1,)).round(4)
        array([[0.9998, 0.0199]])
        """
        return self.onto(x, axes, xp)

    def check_metric(self, metric: Any) -> None:
        """Raise an error for a metric that this set does not have.

        Args:
            metric: what the user passed as `metric=`.

        Raises:
            ValueError: a metric that is neither `"euclidean"` nor `"adaptive"`.

        >>> MaxNorm(1.0).check_metric("adaptive")
        """
        if metric not in metrics.NAMES:
            raise ValueError(f'metric={metric!r} is not known: pass "euclidean" or "adaptive"')

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        """Return between which two values rounding may move each entry of a projected point.

        `optax.apply_updates` adds a difference d to weights p, and p + d is not every number: it is only as fine as p.
        An optax transformation therefore ends as near to q as an entry of p + d can, between these two values, on one
        side of q at least.

        Args:
            q: the projected point.
            p: the weights that it is reached from, of the shape of `q`.
            axes: the non-negative axes that make one vector.
            norm: returns the norm of every vector of a float32 or float64 array of the shape of `q`, with size 1 along
                the axes of a vector, or broadcast.
            xp: the array namespace of both.

        Returns:
            Two numbers or arrays. Entries of q that are moved between these two values keep the vector in the set,
                whatever the other entries do. An interval has q on its edge or inside.

        Raises:
            NotImplementedError: a set that does not say it. `projgd.optax.projection` then refuses the set, and
                `projgd.optax.apply_updates` takes it.

        >>> import numpy as np
        >>> q = np.asarray([[0.6], [-0.8]])
        >>> [interval.ravel().tolist() for interval in MaxNorm(1.0).rounding_interval(q, q, (0,), np.linalg.norm, np)]
        [[-0.6, -0.8], [0.6, 0.8]]
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say where its points may be rounded to, which a chain of optax has to "
            "know. Give it a method rounding_interval, or use projgd.optax.apply_updates in place of a projection"
        )

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        """Raise an error that names a parameter if the set does not fit it.

        Args:
            kind: the dtype of the parameter.
            vectors: the shape of the parameter, and the axes that make one vector.
            name: its name.

        Raises:
            ValueError: a bound that is too small for the dtype, an array that does not broadcast, too few entries.

        >>> from projgd.sums import FLOATS
        >>> MaxNorm(1.0).fit(FLOATS["float32"], Vectors((4, 3), (1,)), "hidden")
        """
        if not self.takes_initial:
            self.band(kind, vectors)

    def beside(self, fan_in: int) -> Constraint | None:
        """Return the set for the bias of a layer with this fan-in; None, the default, leaves the bias free.

        Args:
            fan_in: the number of weights that enter one neuron of the layer.

        >>> MaxNorm(1.0).beside(fan_in=64)
        """
        return None

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array | None:
        """Return what the set takes from the initial weights; None if it takes nothing.

        The optimizer calls this once, keeps the numbers in its state, and passes them to `bind` at every step.

        Args:
            x: the initial weights.
            axes: the non-negative axes that make one vector.
            name: the parameter's name, for errors.
            xp: the array namespace of `x`; default None, which looks it up.

        Returns:
            An array with one number per vector, of size 1 along `axes`, or with one per entry; or None.

        Raises:
            ValueError: weights that the set can take nothing from, such as a vector whose norm is zero.

        >>> import numpy as np
        >>> Sphere("initial").initial(np.asarray([[3.0, 4.0]]), (1,), "hidden")
        array([[5.]])
        """
        return None

    def bind(self, initial: Array) -> Constraint:
        """Return this set with the numbers that `initial` returned.

        Args:
            initial: what `initial` returned.

        Returns:
            The set, for arrays with these vectors only.

        Raises:
            NotImplementedError: a set that takes nothing from the initial weights.

        >>> import numpy as np
        >>> bound = Sphere("initial").bind(np.asarray([[5.0]]))
        >>> bound.onto(np.asarray([[0.6, 0.8]]), (1,))
        array([[3., 4.]])
        """
        raise NotImplementedError(f"{self} takes nothing from the initial weights")

    def replace(self, **changed: Any) -> Constraint:
        """Return this set with other hyperparameters.

        Args:
            **changed: hyperparameters by name, such as `c=2.0` or `axis=0`.

        Returns:
            A new constraint of the same class.

        Raises:
            TypeError: a value that has no meaning for the hyperparameter.
            ValueError: a name that the set does not have, or a value out of range.

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
        """Return the constraint that `config` describes.

        Args:
            config: what `config()` returned, perhaps after a round trip through JSON.

        Returns:
            A constraint that equals the one whose `config()` was called.

        Raises:
            TypeError: a config of something else, such as an update.
            ValueError: an unknown kind.

        >>> Constraint.from_config(MaxNorm(3.0).config())
        MaxNorm(c=3.0, axis='fan_in')
        """
        made = from_config(config)
        if not isinstance(made, Constraint):
            raise TypeError(f"config describes {made}, which is not a constraint: use projgd.from_config")
        return made

    def project(self, x: Array) -> Array:
        """Return the Euclidean projection of an array: the nearest point in the set, for every vector.

        A bare array is read in its library's own layout: (out, in, *kernel) for PyTorch, (*kernel, in, out) for NumPy
        and JAX. Set `axis` to override that. An array without a fan-in (fewer than two axes) comes back unchanged.

        Args:
            x: an array of NumPy, PyTorch or JAX, of any shape and of a floating-point dtype.

        Returns:
            The projected array: same library, dtype, shape and device. A vector inside comes back bit for bit,
                and so does one that holds NaN or infinity.

        Raises:
            TypeError: an integer, boolean or complex array.
            ValueError: an axis that the array does not have, or arrays of numbers in the set that do not fit it.

        >>> import numpy as np
        >>> MaxNorm(1.0).project(np.asarray([[3.0, 0.3], [4.0, 0.4]])).round(3)
        array([[0.6, 0.3],
               [0.8, 0.4]])
        """
        kind = float_type(x)
        vectors = self.vectors(x)
        if vectors is None:
            return x
        if self.arrays and 0 not in vectors.shape:
            self.fit(kind, vectors, "the array")
        xp = array_namespace(x)
        return xp.reshape(self.onto(xp.reshape(x, vectors.shape), vectors.axes, xp), x.shape)

    def violation(self, x: Array) -> Array:
        """Return the distance of each vector to the set: 0 inside, NaN or infinity where the vector holds one.

        Args:
            x: an array of NumPy, PyTorch or JAX, of any shape and of a floating-point dtype, read as in `project`.

        Returns:
            One number per vector: the shape of `x` without the axes of a vector. 0 for an array without a fan-in.

        Raises:
            TypeError: an integer, boolean or complex array.
            ValueError: an axis that the array does not have.

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
        """Return the vectors of a bare array, which is read in its library's layout.

        Args:
            x: an array of NumPy, PyTorch or JAX.

        Returns:
            The shape to view the array in and the axes of one vector; None if the array has no vectors to constrain.

        Raises:
            ValueError: an axis that the array does not have.

        >>> import numpy as np
        >>> MaxNorm(4.0).vectors(np.ones((3, 2)))
        Vectors(shape=(3, 2), axes=(0,))
        """
        layout: _axes.Layout = "out_first" if is_torch_array(x) else "out_last"
        return self.resolve(x.shape, layout)

    def resolve(self, shape: tuple[int, ...], layout: _axes.Layout, name: str = "the array") -> Vectors | None:
        """Return the vectors of an array of a given shape.

        Args:
            shape: the shape of the array.
            layout: `"out_first"` for (out, in, *kernel), `"out_last"` for (*kernel, in, out).
            name: the array's name, for errors; default `"the array"`.

        Returns:
            The shape to view the array in and the axes of one vector; None if the array has no vectors to constrain.

        Raises:
            ValueError: an axis that the array does not have.

        >>> MaxNorm(4.0).resolve((3, 2), "out_first")
        Vectors(shape=(3, 2), axes=(1,))
        """
        return _axes.resolve(self.axis, shape, layout, name)


@dataclass(frozen=True)
class NormSet(Constraint):
    """Describe a set that depends on the norm of a vector alone.

    A subclass has an `axis`, and returns its `band` and its `edges`.
    """

    @abstractmethod
    def edges(self) -> tuple[Scalar, Scalar]:
        """Return the smallest and the largest norm in the set.

        Returns:
            Two numbers, or two arrays with one number per vector.

        Raises:
            ValueError: a set that needs the initial weights, such as `Sphere("initial")` before `bind`.

        >>> MinMaxNorm(1.0, 2.0).edges()
        (1.0, 2.0)
        """

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

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        """Return the interval: towards 0 in a ball, to both sides on a sphere, inwards in a shell.

        No entry becomes 0 on a sphere, because a vector that ends at 0 has no direction and would stay there.
        """
        low, high = self.edges()
        size, kind = xp.abs(q), float_type(q)
        is_fixed = isinstance(low, float)  # as `MinMaxNorm` has it; arrays are the radii of spheres
        if is_fixed and low == 0:
            return -size, size
        if low is high or (is_fixed and low == high):
            least, most = xp.full_like(size, kind.smallest), xp.full_like(size, kind.largest)
        else:
            compute, unit = getattr(xp, kind.compute), math.ldexp(1.0, -math.frexp(high)[1])  # so no square overflows
            near_low = norm(xp.astype(q, compute) * unit) < (low + high) / 2 * unit
            # From so far away that all entries could become 0, the nearest other vector is one that can be scaled next.
            far = ~(norm(xp.astype(p, compute) * unit) * (4 * kind.unit) <= (high - low) * unit)
            least = xp.where(near_low, size, xp.where(far, kind.smallest, 0.0))
            most = xp.where(near_low | far, kind.largest, size)
        return xp.where(q > 0, least, xp.where(q < 0, -most, q)), xp.where(q < 0, -least, xp.where(q > 0, most, q))

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        norms, (low, high) = norm(x, axes, xp), self.edges()
        zero = xp.zeros_like(norms)
        above = xp.where(norms > high, norms - high, xp.where(xp.isnan(norms), norms, zero))
        return xp.where(norms < low, low - norms, above)


@dataclass(frozen=True)
class MaxNorm(NormSet):
    """Hold the norm of every vector at most at `c`: w ← w · min(1, c / ‖w‖₂).

    Attributes:
        c: the bound, a positive number; 3 to 4 is usual. In JAX it may be a traced array: a value that is not positive
            then cannot raise an error, and makes the weights NaN.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`, the weights that enter one neuron.

    Raises:
        TypeError: a `c` that is not a number, or an `axis` that is not an axis.
        ValueError: a `c` that is not positive and finite.

    >>> import numpy as np
    >>> MaxNorm(1.0).project(np.asarray([[3.0, 0.3], [4.0, 0.4]])).round(3)
    array([[0.6, 0.3],
           [0.8, 0.4]])

    References:
        N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, *Dropout: a simple way to
            prevent neural networks from overfitting*, JMLR 15, 2014, section 5.1.
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

    @staticmethod
    def relative(c: Scalar, axis: Axis = "fan_in", per: Literal["vector", "tensor"] = "vector") -> RelativeMaxNorm:
        """Return the set in which no vector is longer than a multiple of its initial norm.

        Args:
            c: the multiple, a positive number.
            axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.
            per: whether every vector has its own initial norm (the default), or the whole tensor one.

        Returns:
            The set.

        Raises:
            TypeError, ValueError: as `RelativeMaxNorm`.

        >>> MaxNorm.relative(2.0)
        RelativeMaxNorm(c=2.0, axis='fan_in', per='vector')
        """
        return RelativeMaxNorm(c, axis, per)


@dataclass(frozen=True)
class RelativeMaxNorm(MaxNorm):
    """Hold the norm of every vector at most at a multiple of its initial norm: ‖w‖₂ ≤ c · ‖w₀‖₂.

    Make it with `MaxNorm.relative`. One multiple fits all layers of a network whose initial norms differ. The optimizer
    takes the norms once and keeps them in its state.

    Attributes:
        c: the multiple, a positive number.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`, the weights that enter one neuron.
        per: `"vector"`, the default: every vector has its own initial norm; `"tensor"`: all vectors of a tensor have
            the root of the mean square of their initial norms.

    Raises:
        TypeError: a `c` that is not a number, or an `axis` that is not an axis.
        ValueError: a `c` that is not positive and finite, or another word as `per`.

    >>> import numpy as np
    >>> RelativeMaxNorm(2.0).bind(np.asarray([[0.5]])).onto(np.asarray([[3.0, 4.0]]), (1,)).round(3)
    array([[0.6, 0.8]])
    """

    per: Literal["vector", "tensor"] = "vector"
    norms: Array | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_per(self.per)

    @property
    def takes_initial(self) -> bool:
        return True

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array | None:
        xp = xp or array_namespace(x)
        why = f"{self} takes a multiple of its initial norm"
        if self.per == "vector":
            return norms_of(x, axes, name, why, xp)
        everything = tuple(range(len(x.shape)))
        whole = norms_of(x, everything, name, why, xp)
        count = math.prod(x.shape) // max(1, Vectors(tuple(x.shape), axes).length)
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        return xp.broadcast_to(whole / math.sqrt(max(count, 1)), shape) + xp.zeros(shape, dtype=whole.dtype)

    def bind(self, initial: Array) -> RelativeMaxNorm:
        bound = copy.copy(self)
        object.__setattr__(bound, "norms", initial)
        return bound

    def band(self, kind: FloatType, vectors: Vectors, moved: bool = False) -> Band:
        return bands.ball_band(kind, vectors, self.edges()[1])

    def edges(self) -> tuple[Scalar, Scalar]:
        if self.norms is None:
            raise ValueError(f"{self} has no bound outside an optimizer, which takes it from the weights at the start")
        return 0.0, self.norms * self.c


@dataclass(frozen=True)
class MinMaxNorm(NormSet):
    """Hold the norm of every vector between `low` and `high`: w ← w · clip(‖w‖₂, low, high) / ‖w‖₂.

    A zero vector has no direction and stays zero.

    Attributes:
        low: the smallest norm, 0 or more.
        high: the largest norm, positive, not below `low`.
        rate: the share of the distance that a vector outside is moved, from 0 to 1; default 1. Only 1 holds the bounds.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`, the weights that enter one neuron.

    Raises:
        TypeError: a bound or a rate that is not a number, or an `axis` that is not an axis.
        ValueError: low > high, a negative or NaN bound, or a rate outside of [0, 1].

    >>> import numpy as np
    >>> MinMaxNorm(1.0, 2.0).project(np.asarray([[3.0, 0.3], [4.0, 0.4]])).round(3)
    array([[1.2, 0.6],
           [1.6, 0.8]])

    References:
        F. Chollet and others, *Keras 3*, 2023, `keras.constraints.MinMaxNorm`.
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

    @property
    def is_convex(self) -> bool:
        return self.low == 0


@dataclass(frozen=True)
class Sphere(NormSet):
    """Hold the norm of every vector at `radius`: w ← w · radius / ‖w‖₂.

    A zero vector has no nearest point on the sphere and stays zero.

    Attributes:
        radius: a positive number; or `"initial"`, the norm that each vector has when the optimizer is made (in JAX: at
            `init`). The optimizer takes it once and keeps it in its state, so that it cannot drift.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`, the weights that enter one neuron.
            `"matrix"` or None takes the Frobenius norm of the whole array.

    Raises:
        TypeError: a `radius` that is not a number, or an `axis` that is not an axis.
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

    @property
    def is_convex(self) -> bool:
        return False

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array | None:
        return norms_of(x, axes, name, f"{self} keeps the initial norm", xp) if self.takes_initial else None

    def __str__(self) -> str:
        return str(replace(self, radius="initial")) if getattr(self.radius, "shape", ()) else repr(self)

    def bind(self, initial: Array) -> Sphere:
        bound = copy.copy(self)
        object.__setattr__(bound, "radius", initial)  # an array: __post_init__ checks a number
        return bound


@dataclass(frozen=True)
class UnitNorm(Sphere):
    """Hold the norm of every vector at 1: w ← w / ‖w‖₂. This is `Sphere(1.0)`.

    A zero vector has no nearest point on the sphere and stays zero.

    Attributes:
        radius: always 1.0; the constructor does not take it.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`, the weights that enter one neuron.

    Raises:
        TypeError: an `axis` that is not an axis.
        ValueError: an unknown word as `axis`.

    >>> import numpy as np
    >>> UnitNorm(axis=1).project(np.asarray([[3.0, 4.0]]))
    array([[0.6, 0.8]])

    References:
        F. Chollet and others, *Keras 3*, 2023, `keras.constraints.UnitNorm`.
    """

    radius: Scalar = field(default=1.0, init=False, repr=False)


@dataclass(frozen=True)
class VectorSet(Constraint):
    """Describe a set of vectors that is no set of norms. A subclass has an `axis`."""

    def check_metric(self, metric: Any) -> None:
        super().check_metric(metric)
        if metric != "euclidean":
            raise ValueError(f'{self} is projected in the Euclidean metric only: pass metric="euclidean"')

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        """Return the distance of every vector to its projection; NaN or infinity where the vector holds one."""
        xp = xp or array_namespace(x)
        wide = getattr(xp, float_type(x).compute)
        half = xp.astype(x, wide) / 2 - xp.astype(self.onto(x, axes, xp), wide) / 2  # so that nothing overflows
        return norm(xp.where(xp.isfinite(x), half, xp.astype(x, wide)), axes, xp) * 2


def number(name: str, value: Scalar) -> Scalar:
    """Return `value` as a float, or unchanged if JAX traces it.

    Args:
        name: the hyperparameter's name, for errors.
        value: a number, an array with one entry, or a traced array.

    Returns:
        A float, or the traced array.

    Raises:
        TypeError: a value that is not a number, or an array of several.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)  # torch.compile cannot read the dtype of a moving number
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
    """Return `value` as a positive, finite float, or unchanged if JAX traces it.

    Args:
        name: the hyperparameter's name, for errors.
        value: a number, an array with one entry, or a traced array.

    Returns:
        A float, or the traced array.

    Raises:
        TypeError: a value that is not a number.
        ValueError: zero, a negative number, NaN or infinity.
    """
    read = number(name, value)
    if isinstance(read, float) and not 0 < read < math.inf:
        or_none = "; pass None for no bound" if name == "c" else ""
        raise ValueError(f"{name}={read} must be positive and finite, such as {name}=4.0{or_none}")
    return read


def check_every(every: Any) -> None:
    """Raise ValueError for what is no number of steps between projections."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r} is not a number of steps: pass 1 to project after each, 10 after each tenth")


def check_per(per: Any) -> None:
    """Raise ValueError for another word than `"vector"` and `"tensor"`."""
    if per not in ("vector", "tensor"):
        raise ValueError(f'per={per!r} is not known: pass "vector" or "tensor"')


def _is_bool_array(value: Any) -> bool:
    """Return whether a value is an array of booleans."""
    return str(getattr(value, "dtype", "")).endswith("bool")


def norms_of(x: Array, axes: tuple[int, ...], name: str, why: str, xp: ModuleType | None = None) -> Array:
    """Return the norm of every vector of `x`, after a check that each one is positive and finite.

    Under JAX's tracing no value can raise an error; a norm that is not positive and finite becomes NaN there.

    Args:
        x: the array.
        axes: the non-negative axes that make one vector.
        name: the parameter's name, for the error.
        why: the part of the error that says who needs the norms.
        xp: the array namespace of `x`; default None, which looks it up.

    Returns:
        One number per vector, with size 1 along `axes`.

    Raises:
        ValueError: a vector of norm zero, or one that is not finite.
    """
    xp = xp or array_namespace(x)
    norms = norm(x, axes, xp)
    if 0 in x.shape:  # no entry that an update could move
        return norms
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
