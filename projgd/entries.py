"""Define the sets that bound each entry on its own: intervals, signs, zeros, and clipping to the fan-in.

Such a set says between which two values each entry may lie (`EntrySet.interval`). The nearest point clips every entry
there, in any diagonal metric, and entries inside stay bit for bit.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Literal

from array_api_compat import array_namespace, is_torch_namespace

from projgd import axes as _axes
from projgd import projections
from projgd.axes import Axis, Vectors
from projgd.constraints import Constraint, check_per, norms_of, positive
from projgd.sums import Array, FloatType, Scalar, float_type, norm
from projgd.values import Values, read_numbers, stored


@dataclass(frozen=True)
class EntrySet(Constraint):
    """Describe a set that is an interval for every entry. A subclass returns its `interval`."""

    @abstractmethod
    def interval(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array | float, Array | float]:
        """Return the smallest and the largest value that each entry may have, as the dtype of an array has them.

        Args:
            x: an array.
            axes: the non-negative axes that make one vector; none, for a set without vectors.
            xp: the array namespace of `x`.

        Returns:
            Two floats, or arrays of the dtype of `x` that broadcast against it; infinity where there is no bound.

        Raises:
            ValueError: a set that takes its bounds from the initial weights, before `bind`.

        >>> import numpy as np
        >>> NonNegative().interval(np.ones(3), (), np)
        (0.0, inf)
        """

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        return projections.project_interval(x, *self.interval(x, axes, xp), xp)

    def outside(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        q = projections.project_interval(x, *self.interval(x, axes, xp), xp)
        distance = xp.where(x == q, xp.zeros_like(x), xp.abs(x - q))
        return norm(distance, axes, xp) if axes else distance

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        least, most = self.interval(q, axes, xp)
        ends = float_type(q).largest
        return (
            max(least, -ends) if isinstance(least, float) else xp.where(xp.isinf(least), -ends, least),
            min(most, ends) if isinstance(most, float) else xp.where(xp.isinf(most), ends, most),
        )


@dataclass(frozen=True)
class NonNegative(EntrySet):
    """Hold every entry at 0 or above: w ← max(w, 0).

    Attributes:
        axis: always `"entries"`: each entry is bounded on its own.

    >>> import numpy as np
    >>> NonNegative().project(np.asarray([[-1.0, 2.0]]))
    array([[0., 2.]])

    References:
        F. Chollet and others, *Keras 3*, `keras.constraints.NonNeg`.
    """

    def interval(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[float, float]:
        return 0.0, math.inf


@dataclass(frozen=True)
class NonPositive(EntrySet):
    """Hold every entry at 0 or below: w ← min(w, 0).

    Attributes:
        axis: always `"entries"`: each entry is bounded on its own.

    >>> import numpy as np
    >>> NonPositive().project(np.asarray([[-1.0, 2.0]]))
    array([[-1.,  0.]])
    """

    def interval(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[float, float]:
        return -math.inf, 0.0


@dataclass(frozen=True)
class Box(EntrySet):
    """Hold every entry between `low` and `high`: w ← min(max(w, low), high).

    A bound that the dtype of the weights has is in the set. Another bound is rounded into the set, so in bfloat16 the
    entries of `Box(0.1, 1.0)` end between 0.10009765625 and 1. Below the smallest normal number only 0 counts as a
    number of float32, bfloat16 and float64, because XLA reads the subnormal ones as 0. The L∞ ball of radius c is
    `Box(-c, c)`.

    Attributes:
        low: the smallest value of an entry: a number; an array that broadcasts against the parameter as it is stored,
            such as (out, 1) for one bound per row; or None for no bound. An entry of minus infinity is no bound. In JAX
            it may be a traced array. Default None.
        high: the largest value of an entry, likewise. Where both are equal, the entry is fixed.
        axis: always `"entries"`: each entry is bounded on its own.

    Raises:
        TypeError: a bound that is not a number, an array or None.
        ValueError: a bound that is NaN, a `low` above its `high`, or no bound at all.

    >>> import numpy as np
    >>> Box(-0.5, 0.5).project(np.asarray([[1.0, 0.25]]))
    array([[0.5 , 0.25]])
    >>> Box(low=[0.0, -1.0]).project(np.asarray([[-3.0, -3.0]]))
    array([[ 0., -1.]])

    References:
        M. Arjovsky, S. Chintala, L. Bottou, *Wasserstein GAN*, 2017, arXiv 1701.07875, algorithm 1 (weight clipping).
    """

    arrays: ClassVar[tuple[str, ...]] = ("low", "high")
    low: Scalar | None = None
    high: Scalar | None = None

    def __post_init__(self) -> None:
        for name, none in (("low", -math.inf), ("high", math.inf)):
            value = getattr(self, name)
            read = None if value is None else read_numbers(name, value)
            object.__setattr__(self, name, None if isinstance(read, float) and read == none else read)
        if self.low is None and self.high is None:
            raise ValueError("Box() bounds nothing: pass low=, high= or both, such as Box(-0.5, 0.5)")
        low, high = (_wide(end) for end in (self.low, self.high))
        if math.inf in (low if isinstance(low, float) else 0.0, -high if isinstance(high, float) else 0.0):
            raise ValueError(f"{self} is empty: no number lies above infinity or below minus infinity")
        if low is None or high is None:
            return
        try:
            crossed = _broadcast_any(low, high, lambda a, b: a > b)
        except ValueError as error:
            raise ValueError(f"low and high of {self} do not broadcast against each other: {error}") from None
        if crossed:
            raise ValueError(
                f"{self} is empty: low is above high{crossed}; pass the smaller first, as in Box(-0.5, 0.5)"
            )

    @staticmethod
    def relative(factor: Scalar, axis: Axis = "fan_in", per: Literal["vector", "tensor"] = "vector") -> RelativeBox:
        """Return the set in which no entry is larger than a multiple of the largest initial one.

        Args:
            factor: the multiple, a positive number.
            axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.
            per: whether every vector has its own largest entry (the default), or the whole tensor one.

        Returns:
            The set.

        Raises:
            TypeError, ValueError: as `RelativeBox`.

        >>> Box.relative(2.0)
        RelativeBox(factor=2.0, axis='fan_in', per='vector')
        """
        return RelativeBox(factor, axis, per)

    def interval(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array | float, Array | float]:
        kind = float_type(x)
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        if isinstance(low, float) and isinstance(high, float):
            return projections.box_ends(kind, low, high)
        ends = (stored(low, x, kind, xp, 1), stored(high, x, kind, xp, -1))
        return ends[0], ends[1]

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        """Raise an error if bounds do not broadcast against a parameter, or if its dtype has no number between them."""
        fit_shape(self, vectors, name)
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        if isinstance(low, float) and isinstance(high, float):
            try:
                projections.box_ends(kind, low, high)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        elif None not in (_wide(low), _wide(high)) and _broadcast_any(
            low, high, lambda a, b: _is_between(a, b, kind), kind.smallest + kind.spacing
        ):
            raise ValueError(f"{name}: its dtype has no number between some low and high of {self}")


def _is_between(low: float, high: float, kind: FloatType) -> bool:
    """Return whether two bounds lie between the same two numbers of a dtype."""
    return math.isfinite(low) and math.isfinite(high) and kind.round_up(low) > kind.round_down(high)


def fit_shape(constraint: Constraint, vectors: Vectors, name: str) -> None:
    """Raise ValueError for an array of numbers that does not broadcast against a parameter.

    Args:
        constraint: the set.
        vectors: the shape of the parameter.
        name: its name, for the error.
    """
    for key in constraint.arrays:
        value = getattr(constraint, key)
        shape = tuple(getattr(value, "shape", ()))
        ends = vectors.shape[len(vectors.shape) - len(shape) :]
        if len(shape) > len(vectors.shape) or any(n not in (1, m) for n, m in zip(shape, ends, strict=True)):
            raise ValueError(
                f"{name} has shape {vectors.shape}, against which {key} of shape {shape} in {constraint} does not "
                "broadcast: give this parameter a rule of its own, with an array of its shape or with axes of size 1"
            )


def _wide(end: Any) -> Any:
    """Return a bound that can be looked at; None for one that is missing or traced."""
    return end if isinstance(end, (float, Values)) else None


def _broadcast_any(
    low: float | Values, high: float | Values, test: Callable[[float, float], bool], near: float = 0.0
) -> str:
    """Return where a test holds for two bounds, as text for an error; an empty string if nowhere.

    The test is made where low is above high, or is nearer to it than a hundredth or than `near`.
    """
    if isinstance(low, float) and isinstance(high, float):
        return f" ({low} > {high})" if test(low, high) else ""
    import numpy as np

    wide = [np.frombuffer(e.data).reshape(e.shape) if isinstance(e, Values) else np.asarray(e) for e in (low, high)]
    pairs = np.broadcast_arrays(*wide)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: a candidate
        candidates = np.argwhere(~(pairs[0] < pairs[1] - 1e-2 * (np.abs(pairs[0]) + np.abs(pairs[1])) - near))
    for at in map(tuple, candidates):
        a, b = float(pairs[0][at]), float(pairs[1][at])
        if test(a, b):
            return f" at {tuple(int(i) for i in at)} ({a} > {b})"
    return ""


@dataclass(frozen=True)
class RelativeBox(EntrySet):
    """Hold every entry at most at a multiple of the largest initial one: |w| ≤ factor · max |w₀|.

    Make it with `Box.relative`. The optimizer takes the largest entry once and keeps it in its state.

    Attributes:
        factor: the multiple, a positive number.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.
        per: whether every vector has its own largest entry, `"vector"` (the default), or the whole tensor one,
            `"tensor"`.

    Raises:
        TypeError: a factor that is not a number, or an `axis` that is not an axis.
        ValueError: a factor that is not positive and finite, or another word as `per`.

    >>> import numpy as np
    >>> bound = RelativeBox(2.0).bind(np.asarray([[0.5]]))
    >>> bound.onto(np.asarray([[3.0, -0.2]]), (1,))
    array([[ 1. , -0.2]])
    """

    factor: Scalar
    axis: Axis = "fan_in"
    per: Literal["vector", "tensor"] = "vector"
    largest: Array | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", positive("factor", self.factor))
        object.__setattr__(self, "axis", _axes.check(self.axis))
        check_per(self.per)

    @property
    def takes_initial(self) -> bool:
        return True

    @property
    def joins_vectors(self) -> bool:
        return self.per == "tensor"

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        over = axes if self.per == "vector" else tuple(range(len(x.shape)))
        norms_of(x, over, name, f"{self} takes a multiple of the largest entry", xp)  # raises the error
        shape = tuple(1 if a in axes else n for a, n in enumerate(x.shape))
        if 0 in x.shape:  # as on a rank without rows
            return xp.zeros(shape, dtype=x.dtype)
        largest = xp.max(xp.abs(x), axis=over, keepdims=True) if over else xp.abs(x)
        return xp.broadcast_to(largest, shape) + xp.zeros(shape, dtype=x.dtype)

    def bind(self, initial: Array) -> RelativeBox:
        bound = copy.copy(self)
        object.__setattr__(bound, "largest", initial)
        return bound

    def interval(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Array]:
        if self.largest is None:
            raise ValueError(f"{self} has no bound outside an optimizer, which takes it from the weights at the start")
        kind = float_type(x)
        largest = xp.astype(self.largest, getattr(xp, kind.compute), copy=False)  # a short type would round upwards
        high = stored(largest * self.factor, x, kind, xp, -1)
        return -high, high


@dataclass(frozen=True)
class StartSet(EntrySet):
    """Describe a set of entries that keeps one number of each initial entry. A subclass returns its `initial`.

    Attributes:
        kept: what `initial` returned, in a set that is bound; otherwise None.
    """

    kept: Array | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def keeps_entries(self) -> bool:
        return True

    @property
    def takes_initial(self) -> bool:
        return True

    @abstractmethod
    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array: ...

    def bind(self, initial: Array) -> StartSet:
        bound = copy.copy(self)
        object.__setattr__(bound, "kept", initial)
        return bound

    def known(self) -> Array:
        """Return what the set keeps of the initial weights.

        Raises:
            ValueError: a set that is not bound.

        >>> import numpy as np
        >>> KeepZeros().bind(np.asarray([True])).known()
        array([ True])
        """
        if self.kept is None:
            raise ValueError(
                f"{self} needs the initial weights: use it in a Projected optimizer or in projgd.optax.projection"
            )
        return self.kept


@dataclass(frozen=True)
class KeepSign(StartSet):
    """Hold every entry on the side of 0 where it starts: w ← max(w · sign w₀, 0) · sign w₀.

    An entry that starts at 0 stays 0. The optimizer takes the signs once and keeps them in its state (one byte per
    entry), so an entry that has reached 0 may leave it again, to its own side.

    Attributes:
        axis: always `"entries"`: each entry is bounded on its own.

    >>> import numpy as np
    >>> signs = KeepSign().initial(np.asarray([0.5, -0.5, 0.0]), (), "w")
    >>> KeepSign().bind(signs).onto(np.asarray([-1.0, -1.0, 2.0]), ())
    array([ 0., -1.,  0.])
    """

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array:
        xp = xp or array_namespace(x)
        above, below = xp.astype(x > 0, xp.int8), xp.astype(x < 0, xp.int8)
        return above - below

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp, signs = xp or array_namespace(x), self.known()
        if is_torch_namespace(xp):  # comparisons take five times as long
            sign = xp.astype(signs, x.dtype)
            y = xp.maximum(x * sign, xp.zeros((), dtype=x.dtype, device=x.device)) * sign
            return _zeros_kept(signs, y, x, xp)
        wrong = ((x < 0) & (signs >= 0)) | ((x > 0) & (signs <= 0))
        return xp.where(wrong, xp.zeros_like(x), x)

    def interval(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Array]:
        signs = self.known()
        free, zero = xp.full_like(x, float_type(x).largest), xp.zeros_like(x)
        return xp.where(signs < 0, -free, zero), xp.where(signs > 0, free, zero)


@dataclass(frozen=True)
class KeepZeros(StartSet):
    """Hold the entries that start at 0 at 0: w ← w · (w₀ ≠ 0).

    A pruned network stays pruned. The optimizer takes the mask once and keeps it in its state, one byte per entry.

    Attributes:
        axis: always `"entries"`: each entry is bounded on its own.

    >>> import numpy as np
    >>> mask = KeepZeros().initial(np.asarray([0.5, 0.0]), (), "w")
    >>> KeepZeros().bind(mask).onto(np.asarray([-1.0, 2.0]), ())
    array([-1.,  0.])
    """

    def initial(self, x: Array, axes: tuple[int, ...], name: str, xp: ModuleType | None = None) -> Array:
        return x != 0

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp, mask = xp or array_namespace(x), self.known()
        if is_torch_namespace(xp):  # comparisons take five times as long
            return _zeros_kept(mask, x, x, xp)
        return xp.where((mask != 0) | xp.isnan(x), x, xp.zeros_like(x))

    def interval(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array, Array]:
        mask = self.known()
        most = xp.where(mask != 0, xp.full_like(x, float_type(x).largest), xp.zeros_like(x))
        return -most, most


def _zeros_kept(stays: Array, y: Array, x: Array, xp: Any) -> Array:
    """Return y where `stays` is not 0, elsewhere 0 or the NaN of x. A product would make NaN of infinity."""
    return xp.where(xp.astype(stays, xp.bool, copy=False), y, xp.clip(x, 0.0, 0.0))


@dataclass(frozen=True)
class WeightClip(EntrySet):
    """Hold every entry at most at κ over the root of the fan-in: |w| ≤ κ / √(fan-in).

    With κ = 1 this is the range of PyTorch's default initialisation. A module, or a tree of JAX, tells the fan-in of
    every layer, and the bias of a layer has the bound of its weights. A bare bias is free.

    Attributes:
        kappa: κ, a positive number; 1 to 5 are usual.
        axis: the axes that enter one neuron; default `"fan_in"`.
        fan_in: the fan-in, for a parameter whose shape does not tell it, such as a bias; default None.

    Raises:
        TypeError: a κ that is not a number, or an `axis` that is not an axis.
        ValueError: a κ that is not positive and finite, or a `fan_in` below 1.

    >>> import numpy as np
    >>> WeightClip(1.0).project(np.asarray([[3.0, 0.1]] * 4))
    array([[0.5, 0.1],
           [0.5, 0.1],
           [0.5, 0.1],
           [0.5, 0.1]])

    References:
        M. Elsayed, Q. Lan, C. Lyle, A. R. Mahmood, *Weight clipping for deep continual and reinforcement learning*,
        RLC 2024, arXiv 2407.01704, algorithm 1.
    """

    kappa: Scalar
    axis: Axis = "fan_in"
    fan_in: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kappa", positive("kappa", self.kappa))
        object.__setattr__(self, "axis", "entries" if self.fan_in is not None else _axes.check(self.axis))
        if self.fan_in is not None and not (isinstance(self.fan_in, int) and self.fan_in >= 1):
            raise ValueError(f"fan_in={self.fan_in!r} is not a number of weights: pass 1 or more, such as fan_in=64")

    def beside(self, fan_in: int) -> WeightClip:
        return WeightClip(self.kappa, fan_in=fan_in)

    def interval(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> tuple[Array | float, Array | float]:
        fan_in = Vectors(tuple(x.shape), axes).length if self.fan_in is None else self.fan_in
        bound = self.kappa / math.sqrt(max(fan_in, 1))
        if isinstance(bound, float):
            return projections.box_ends(float_type(x), -bound, bound)
        high = stored(bound, x, float_type(x), xp, -1)
        return -high, high
