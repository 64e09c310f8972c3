"""How an update u is shaped against the weights w before the projection: w ← Π(w + shape(u)).

Each shaping adds a share of the weights to the update and sets the length of the rest, shape(u) = α·w + ℓ·u/‖u‖. Both
numbers follow from three others per vector: ‖w‖, ‖u‖ and the cosine between w and u. So one pass over the data
measures and one applies, and where arrays are sharded three numbers per vector are all that is exchanged.

To add one: a dataclass here. Both fronts then have it.
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
from projgd.constraints import Constraint, positive
from projgd.sums import Array, Measures, Scalar, float_type, measure


@dataclass(frozen=True)
class Update(Configured, ABC):
    """A shaping of the inner optimizer's update.

    Every kind has an `axis`, what makes one vector (see `projgd.axes`). `"set"`, the default, is the axis of the
    constraint beside it, or `"matrix"` where there is none: every array of two axes or more is one vector, and biases
    and gains are left to the inner optimizer.
    """

    needs_norm: ClassVar[bool]
    """Whether a zero weight vector would stay zero for ever."""
    needs_lr: ClassVar[bool] = False
    """Whether the learning rate decides about the length of the update."""
    keeps_direction: ClassVar[bool]
    """Whether the update keeps its direction: no share of the weights is added, and the cosine is not needed."""

    @property
    @abstractmethod
    def axis(self) -> Axis:
        """What makes one vector."""

    @abstractmethod
    def coefficients(self, m: Measures, lr: Scalar, xp: ModuleType) -> tuple[Scalar, Array]:
        """The share α of the weights that is added, and the length ℓ of what is kept of the update."""

    def __call__(self, u: Array, w: Array, lr: Scalar = 1.0) -> Array:
        """The update `u` of the weights `w`, shaped: same library, dtype and shape, read in the library's own layout.

        `u` is what an optimizer adds to the weights (so it already points downhill); `lr` its learning rate.

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
        """The share of w and the multiple of u that make the shaped update; 0 and 1 where there is nothing to shape."""
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
        """The vectors of an array of `shape`, `beside` being the constraint whose axis `"set"` means.

        Raises:
            ValueError: an axis that the array does not have, or other vectors than those of the set.
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
        """Return what makes one vector of the update beside a constraint: the set's axis, if it has vectors."""
        if constraint is not None and constraint.axis != "entries":
            return constraint.axis
        return "matrix" if self.axis == "set" else self.axis

    def shape(self, u: Array, w: Array, lr: Scalar, axes: tuple[int, ...], xp: ModuleType) -> Array:
        """`u` shaped, in the dtype that sums are taken in. Vectors of u or w that are not finite come as they are."""
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
    """The update gets the length lr · ‖w‖ and keeps its direction: u ← lr · ‖w‖ · u / ‖u‖.

    So lr is the angle (in radians, while small) that a step turns the weights by, and the scale of the inner
    optimizer's update does not matter: the step of Hyperball (Wen, Dang, Lyu, Ma, Liang 2026, arXiv 2606.16899) where
    the set is `Sphere("initial")`. Nero (Liu et al. 2021, arXiv 2102.07227) divides by a running mean of ‖u‖ instead,
    LARS (You et al. 2017, arXiv 1708.03888) the gradient before the momentum. A zero update stays zero; a zero weight
    vector has no length to offer and is refused.
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
    """The update without its radial part: u ← u - w · ⟨w, u⟩ / ‖w‖², so that the norm changes in second order only.

    AdamP (Heo et al. 2021, arXiv 2006.08217) does this to the update where the weights look scale-invariant; sparse
    autoencoders with a unit-norm dictionary (Bricken et al. 2023, "Towards Monosemanticity") do it to the gradient,
    before Adam.
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
    """Only a share of a change of the norm is kept: w + u is rescaled to the norm ‖w‖ + share · (‖w + u‖ - ‖w‖).

    (N. Abrahamsen, nilin.github.io/radial-brake, the "simplest definition", with its 0.5 and 1.)

    Args:
        outward: the share of an increase that is kept, from 0 to 1.
        inward: the share of a decrease.
        axis: what makes one vector.
    """

    needs_norm = False
    keeps_direction = False
    outward: float = 0.5
    inward: float = 1.0
    axis: Axis = "set"

    def __post_init__(self) -> None:
        for name in ("outward", "inward"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is a share: pass a number from 0 to 1")
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
    """The update is no longer than `ratio` · ‖w‖, and, if `floor` is given, no shorter than `floor` · ‖w‖.

    The rule of unit-wise gradient clipping (Brock et al. 2021, arXiv 2102.06171, section 4.1), applied to the update. A
    zero update stays zero; a zero weight vector is refused.
    """

    needs_norm = True
    keeps_direction = True
    ratio: float
    floor: float | None = None
    axis: Axis = "set"

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", positive("ratio", self.ratio))
        if self.floor is not None and not 0 <= self.floor <= self.ratio:
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
    return axis if isinstance(axis, str) and axis == "set" else _axes.check(axis)
