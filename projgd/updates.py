"""Shape an update u against the weights w before the projection: w ← Π(w + shape(u)).

Each shaping adds a share of the weights to the update and sets the length of the rest, shape(u) = α·w + ℓ·u/‖u‖. Both
numbers follow from three others per vector: ‖w‖, ‖u‖ and the cosine between w and u. So one pass over the data
measures and one applies. Where arrays are sharded, devices exchange only these three numbers per vector.

A new shaping is a dataclass here. PyTorch and JAX then have it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar

from array_api_compat import array_namespace, is_torch_array

from projgd import axes as _axes
from projgd.axes import Axis, Vectors
from projgd.config import Configured
from projgd.constraints import Constraint, number, positive
from projgd.sums import Array, Measures, Scalar, float_type, measure


@dataclass(frozen=True)
class Update(Configured, ABC):
    """Shape the inner optimizer's update: w ← Π(w + shape(u)).

    This is the base class of all shapings. Make one of its subclasses, such as `RelativeUpdate`.

    Attributes:
        axis: the axes that make one vector, see `projgd.axes`. `"set"`, the default, is the axis of the constraint
            beside the update, or `"matrix"` without a constraint: every array of two axes or more is one vector, and
            biases and gains take the inner optimizer's update.
        needs_norm: whether a zero weight vector would stay zero for ever, so that an optimizer raises an error.
        needs_lr: whether the learning rate decides the length of the update.
        keeps_direction: whether the update keeps its direction, so that nobody has to compute the cosine.

    >>> import numpy as np
    >>> update: Update = TangentUpdate(axis=None)
    >>> update(np.asarray([[1.0], [1.0]]), np.asarray([[0.0], [2.0]]))
    array([[1.],
           [0.]])
    """

    needs_norm: ClassVar[bool]
    """Whether a zero weight vector would stay zero for ever, so that an optimizer raises an error."""
    needs_lr: ClassVar[bool] = False
    """Whether the learning rate decides the length of the update."""
    keeps_direction: ClassVar[bool]
    """Whether the update keeps its direction: the shaping adds no share of the weights and needs no cosine."""

    @property
    @abstractmethod
    def axis(self) -> Axis:
        """Return the axes that make one vector."""

    @abstractmethod
    def coefficients(self, m: Measures, lr: Scalar, xp: ModuleType) -> tuple[Scalar, Array]:
        """Return the share of the weights that is added, and the length that is kept of the update.

        Args:
            m: the norms of the weights and of the update, and the cosine between them, for each vector.
            lr: the learning rate.
            xp: the array namespace of `m`.

        Returns:
            The share α of the weights, and the length ℓ: shape(u) = α·w + ℓ·u/‖u‖.

        >>> import numpy as np
        >>> m = Measures(w=np.asarray(2.0), u=np.asarray(5.0), cosine=np.asarray(0.0))
        >>> [float(x) for x in RelativeUpdate().coefficients(m, 0.5, np)]
        [0.0, 1.0]
        """

    def __call__(self, u: Array, w: Array, lr: Scalar = 1.0) -> Array:
        """Return the shaped update of an array, which is read in its library's own layout.

        Args:
            u: what the optimizer adds to the weights, so that it already points downhill; of the shape of `w`.
            w: the weights, an array of NumPy, PyTorch or JAX.
            lr: the learning rate, which only `RelativeUpdate` uses; default 1.

        Returns:
            The shaped update: same library, dtype and shape as `u`.

        Raises:
            ValueError: an axis that the array does not have.

        >>> import numpy as np
        >>> RelativeUpdate(axis=None)(np.asarray([[3.0], [4.0]]), np.asarray([[0.0], [2.0]]), lr=0.1)
        array([[0.12],
               [0.16]])
        """
        vectors = self.resolve(w.shape, "out_first" if is_torch_array(w) else "out_last")
        if vectors is None:
            return u
        xp = array_namespace(u, w)
        u, w, shape = xp.reshape(u, vectors.shape), xp.reshape(w, vectors.shape), w.shape
        return xp.astype(xp.reshape(self.shape(u, w, lr, vectors.axes, xp), shape), u.dtype)

    def numbers(self, m: Measures, lr: Scalar, xp: ModuleType) -> tuple[Array, Array]:
        """Return the share of w and the multiple of u that make the shaped update.

        Args:
            m: the norms of the weights and of the update, and the cosine between them, for each vector.
            lr: the learning rate.
            xp: the array namespace of `m`.

        Returns:
            Two arrays with one number per vector; 0 and 1 where the update is zero or a norm is not finite.

        >>> import numpy as np
        >>> m = Measures(w=np.asarray(2.0), u=np.asarray(5.0), cosine=np.asarray(0.0))
        >>> [float(x) for x in RelativeUpdate().numbers(m, 0.5, np)]
        [0.0, 0.2]
        """
        alpha, length = self.coefficients(m, lr, xp)
        zero, one = xp.zeros_like(m.u), xp.ones_like(m.u)
        usable = xp.isfinite(m.w) & xp.isfinite(m.u) & (m.u > 0)
        return xp.where(usable, alpha + zero, zero), xp.where(usable, length / xp.where(usable, m.u, one), one)

    def resolve(
        self,
        shape: tuple[int, ...],
        layout: _axes.Layout,
        name: str = "the array",
        beside: Constraint | None = None,
    ) -> Vectors | None:
        """Return the vectors of an array of a given shape.

        Args:
            shape: the shape of the array.
            layout: `"out_first"` for (out, in, *kernel), `"out_last"` for (*kernel, in, out).
            name: the array's name, for errors; default `"the array"`.
            beside: the constraint whose axis `"set"` means; default None.

        Returns:
            The shape to view the array in and the axes of one vector; None if the update stays as it is.

        Raises:
            ValueError: an axis that the array does not have, or vectors that differ from those of the constraint.

        >>> RelativeUpdate().resolve((3, 2), "out_first")
        Vectors(shape=(3, 2), axes=(0, 1))
        """
        if beside is None or beside.axis == "entries":
            return _axes.resolve(self.axis_beside(beside), shape, layout, name)
        vectors = _axes.resolve(beside.axis, shape, layout, name)
        if self.axis != "set" and vectors != _axes.resolve(self.axis, shape, layout, name):
            raise ValueError(
                f"{self} and {beside} have different vectors in {name} with shape {shape}: leave the update's axis "
                "out, and it takes the set's"
            )
        return vectors

    def axis_beside(self, constraint: Constraint | None) -> Axis:
        """Return the axes that make one vector of the update beside a constraint.

        Args:
            constraint: the constraint of the same param group, or None.

        Returns:
            The constraint's axis if it has vectors; otherwise the update's own.

        >>> from projgd.constraints import MaxNorm
        >>> RelativeUpdate().axis_beside(MaxNorm(3.0))
        'fan_in'
        """
        if constraint is not None and constraint.axis != "entries":
            return constraint.axis
        return "matrix" if self.axis == "set" else self.axis

    def shape(self, u: Array, w: Array, lr: Scalar, axes: tuple[int, ...], xp: ModuleType) -> Array:
        """Return the shaped update, in the dtype that sums are taken in.

        Args:
            u: the update, of the shape of `w`.
            w: the weights.
            lr: the learning rate.
            axes: the non-negative axes that make one vector.
            xp: the array namespace of both.

        Returns:
            shape(u). A vector of u stays as it is if u or w is not finite there, or if u is zero.

        >>> import numpy as np
        >>> RelativeUpdate().shape(np.asarray([[3.0], [4.0]]), np.asarray([[0.0], [2.0]]), 0.1, (0, 1), np)
        array([[0.12],
               [0.16]])
        """
        compute = getattr(xp, float_type(w).compute)
        u, w = xp.astype(u, compute, copy=False), xp.astype(w, compute, copy=False)
        if 0 in w.shape:
            return u
        z, r, m = measure(u, w, axes, xp)
        alpha, length = self.coefficients(m, lr, xp)
        usable = xp.isfinite(m.w) & xp.isfinite(m.u) & (m.u > 0)
        same = length == m.u
        scale = length * (r / xp.where(usable, m.u, xp.ones_like(m.u)))  # z = u / r has no entry above 1
        shaped = xp.where(same, u, z * scale)
        if not isinstance(alpha, float):
            shaped = shaped + alpha * w
        return xp.where(usable, shaped, u)


@dataclass(frozen=True)
class RelativeUpdate(Update):
    """Give the update the length lr · ‖w‖ and keep its direction: u ← lr · ‖w‖ · u / ‖u‖.

    So lr is the angle (in radians, while small) by which a step turns the weights, and the scale of the inner
    optimizer's update does not matter. With `Sphere("initial")` this is the step of Hyperball. Nero divides by a
    running mean of ‖u‖ instead. LARS scales the gradient, before the momentum. A zero update stays zero. An
    optimizer raises an error for a zero weight vector, because lr · ‖w‖ would be 0.

    Attributes:
        axis: the axes that make one vector; default `"set"`, see `Update`.

    Raises:
        TypeError, ValueError: an `axis` that is not an axis.

    >>> import numpy as np
    >>> RelativeUpdate()(np.asarray([[3.0], [4.0]]), np.asarray([[0.0], [2.0]]), lr=0.1)
    array([[0.12],
           [0.16]])

    References:
        Wen, Dang, Lyu, Ma, Liang, *Hyperball*, 2026, arXiv 2606.16899.
        Y. Liu, J. Bernstein, M. Meister, Y. Yue, *Learning by turning* (Nero), 2021, arXiv 2102.07227.
        Y. You, I. Gitman, B. Ginsburg, *Large batch training of convolutional networks* (LARS), 2017, arXiv 1708.03888.
    """

    needs_norm = True
    needs_lr = True
    keeps_direction = True
    axis: Axis = "set"

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", _axis(self.axis))

    def coefficients(self, m: Measures, lr: Scalar, xp: ModuleType) -> tuple[Scalar, Array]:
        return 0.0, lr * m.w


@dataclass(frozen=True)
class TangentUpdate(Update):
    """Remove the radial part of the update: u ← u - w · ⟨w, u⟩ / ‖w‖².

    The norm of the weights then changes in second order only. AdamP does this to the update where the weights look
    scale-invariant. Sparse autoencoders with a unit-norm dictionary do it to the gradient, before Adam.

    Attributes:
        axis: the axes that make one vector; default `"set"`, see `Update`.

    Raises:
        TypeError, ValueError: an `axis` that is not an axis.

    >>> import numpy as np
    >>> TangentUpdate()(np.asarray([[1.0], [1.0]]), np.asarray([[0.0], [2.0]]))
    array([[1.],
           [0.]])

    References:
        B. Heo et al., *AdamP*, 2021, arXiv 2006.08217.
        T. Bricken et al., *Towards Monosemanticity*, 2023.
    """

    needs_norm = False
    keeps_direction = False
    axis: Axis = "set"

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", _axis(self.axis))

    def coefficients(self, m: Measures, lr: Scalar, xp: ModuleType) -> tuple[Scalar, Array]:
        return -m.cosine * (m.u / xp.where(m.w > 0, m.w, xp.ones_like(m.w))), m.u


@dataclass(frozen=True)
class RadialBrake(Update):
    """Keep only a share of a change of the norm: rescale w + u to the norm ‖w‖ + share · (‖w + u‖ - ‖w‖).

    Attributes:
        outward: the share of an increase that is kept, from 0 to 1; default 0.5.
        inward: the share of a decrease that is kept, from 0 to 1; default 1.
        axis: the axes that make one vector; default `"set"`, see `Update`.

    Raises:
        TypeError: a share that is not a number, or an `axis` that is not an axis.
        ValueError: a share outside of [0, 1].

    >>> import numpy as np
    >>> RadialBrake(outward=0.5)(np.asarray([[0.0], [1.0]]), np.asarray([[0.0], [2.0]]))
    array([[0. ],
           [0.5]])

    References:
        N. Abrahamsen, *Radial brake*, nilin.github.io/radial-brake, the "simplest definition".
    """

    needs_norm = False
    keeps_direction = False
    outward: float = 0.5
    inward: float = 1.0
    axis: Axis = "set"

    def __post_init__(self) -> None:
        for name in ("outward", "inward"):
            share = number(name, getattr(self, name))
            if isinstance(share, float) and not 0 <= share <= 1:  # JAX may trace it
                raise ValueError(f"{name}={share!r} is a share: pass a number from 0 to 1")
            object.__setattr__(self, name, share)
        object.__setattr__(self, "axis", _axis(self.axis))

    def coefficients(self, m: Measures, lr: Scalar, xp: ModuleType) -> tuple[Scalar, Array]:
        largest = xp.where(m.w > m.u, m.w, m.u)
        largest = xp.where(largest > 0, largest, xp.ones_like(largest))
        w, u = m.w / largest, m.u / largest
        square = w * w + 2 * w * u * m.cosine + u * u
        reached = xp.sqrt(xp.where(square > 0, square, xp.zeros_like(square)))
        change = u * (2 * w * m.cosine + u)  # over the sum of both norms: their difference without cancellation
        lost = 1 - xp.where(change > 0, self.outward, self.inward)
        sums = reached * (reached + w)
        alpha = xp.where(reached > 0, -lost * change / xp.where(reached > 0, sums, xp.ones_like(w)), reached)
        return alpha, m.u + alpha * m.u


@dataclass(frozen=True)
class MaxUpdate(Update):
    """Bound the length of the update by a share of the weights: floor · ‖w‖ ≤ ‖u‖ ≤ ratio · ‖w‖.

    This is the rule of unit-wise gradient clipping, applied to the update. A zero update stays zero. An
    optimizer raises an error for a zero weight vector, because the bound would be 0.

    Attributes:
        ratio: the largest ‖u‖ / ‖w‖, a positive number.
        floor: the smallest ‖u‖ / ‖w‖, from 0 to `ratio`; default None, which sets no lower bound.
        axis: the axes that make one vector; default `"set"`, see `Update`.

    Raises:
        TypeError: a ratio or a floor that is not a number, or an `axis` that is not an axis.
        ValueError: a `ratio` that is not positive and finite, or a `floor` outside of [0, ratio].

    >>> import numpy as np
    >>> MaxUpdate(0.1)(np.asarray([[3.0], [4.0]]), np.asarray([[0.0], [2.0]]))
    array([[0.12],
           [0.16]])

    References:
        A. Brock, S. De, S. Smith, K. Simonyan, *High-performance large-scale image recognition without
        normalization*, 2021, arXiv 2102.06171, section 4.1.
    """

    needs_norm = True
    keeps_direction = True
    ratio: float
    floor: float | None = None
    axis: Axis = "set"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", positive("ratio", self.ratio))
        if self.floor is not None:
            object.__setattr__(self, "floor", number("floor", self.floor))
        if isinstance(self.floor, float) and isinstance(self.ratio, float) and not 0 <= self.floor <= self.ratio:
            raise ValueError(f"floor={self.floor!r} must lie between 0 and ratio={self.ratio}")
        object.__setattr__(self, "axis", _axis(self.axis))

    def coefficients(self, m: Measures, lr: Scalar, xp: ModuleType) -> tuple[Scalar, Array]:
        most = self.ratio * m.w
        length = xp.where(m.u > most, most, m.u)
        if self.floor is None:
            return 0.0, length
        least = self.floor * m.w
        return 0.0, xp.where(length < least, least, length)


def _axis(axis: Axis) -> Axis:
    """Return a checked `axis`; `"set"` is one of an update alone."""
    return axis if isinstance(axis, str) and axis == "set" else _axes.check(axis)
