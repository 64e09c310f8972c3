"""Every set of entries and of vectors, in one table. A new set is covered by its line here.

The sets are for a parameter of `SHAPE` whose vectors lie along axis 1, in both frameworks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from projgd import (
    AffineSet,
    Around,
    Box,
    BoxSection,
    Constraint,
    GroupL1Ball,
    HalfSpace,
    Hyperplane,
    Intersection,
    KeepSign,
    KeepZeros,
    L1Ball,
    L1Sphere,
    MaxNorm,
    MinMaxNorm,
    NonNegative,
    NonPositive,
    Simplex,
    SparseSimplex,
    Sphere,
    TopK,
    UnitNorm,
    WeightClip,
)
from projgd.axes import resolve

SHAPE = (5, 6)
ROWS, COLUMNS = np.linspace(-0.5, 0.5, 5)[:, None], np.linspace(0.1, 0.6, 6)
NORMAL = np.asarray([1.0, -2.0, 0.5, 1.0, 0.0, 3.0])
PLANES = np.asarray([[1.0, 0.0, 0.0, -1.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])


@dataclass(frozen=True)
class Case:
    """A set, and what holds for it.

    Attributes:
        make: makes it.
        exact: whether stored values are in it without any tolerance; a sphere or a plane is met to rounding.
    """

    make: Callable[[], Constraint]
    exact: bool = True


SETS: dict[str, Case] = {
    "max-norm": Case(lambda: MaxNorm(1.0, axis=1)),
    "shell": Case(lambda: MinMaxNorm(0.5, 1.0, axis=1)),
    "sphere": Case(lambda: Sphere(1.5, axis=1), exact=False),
    "unit norm": Case(lambda: UnitNorm(axis=1), exact=False),
    "initial sphere": Case(lambda: Sphere("initial", axis=1), exact=False),
    "relative max-norm": Case(lambda: MaxNorm.relative(0.5, axis=1)),
    "relative max-norm of a tensor": Case(lambda: MaxNorm.relative(0.5, axis=1, per="tensor")),
    "box": Case(lambda: Box(-0.1, 0.7)),
    "box from below": Case(lambda: Box(low=0.3)),
    "box from above": Case(lambda: Box(high=-0.3)),
    "box of arrays": Case(lambda: Box(ROWS - COLUMNS, ROWS + COLUMNS)),
    "box with fixed and free entries": Case(
        lambda: Box([-np.inf, 0.25, 0.5, -1.0, -np.inf, 0.0], [0.1, 0.25, np.inf, 1.0, np.inf, 2.0])
    ),
    "relative box": Case(lambda: Box.relative(0.5, axis=1)),
    "relative box of a tensor": Case(lambda: Box.relative(0.5, axis=1, per="tensor")),
    "non-negative": Case(NonNegative),
    "non-positive": Case(NonPositive),
    "signs": Case(KeepSign),
    "zeros": Case(KeepZeros),
    "weight clip": Case(lambda: WeightClip(0.9, axis=1)),
    "simplex": Case(lambda: Simplex(axis=1), exact=False),
    "simplex of 3": Case(lambda: Simplex(3.0, axis=1), exact=False),
    "sparse simplex": Case(lambda: SparseSimplex(2, axis=1), exact=False),
    "L1 ball": Case(lambda: L1Ball(1.3, axis=1)),
    "L1 sphere": Case(lambda: L1Sphere(1.3, axis=1), exact=False),
    "top k": Case(lambda: TopK(2, axis=1)),
    "groups": Case(lambda: GroupL1Ball(1.7, axis=1)),
    "hyperplane": Case(lambda: Hyperplane(NORMAL, 0.5, axis=1), exact=False),
    "centred": Case(lambda: Hyperplane(axis=1), exact=False),
    "half-space": Case(lambda: HalfSpace(NORMAL, -0.5, axis=1)),
    "box section": Case(lambda: BoxSection(-0.5, 0.9, NORMAL, 0.7, axis=1), exact=False),
    "affine": Case(lambda: AffineSet(PLANES, [0.5, 1.0], axis=1), exact=False),
    "intersection": Case(lambda: Intersection(MaxNorm(1.0, axis=1), NonNegative()), exact=False),
    "intersection along two axes": Case(lambda: Intersection(Simplex(5 / 6, axis=0), Simplex(axis=1)), exact=False),
    "around": Case(lambda: Around(MaxNorm(0.3, axis=1))),
    "box around": Case(lambda: Around(Box(-0.05, 0.1))),
    "relative around": Case(lambda: Around(MaxNorm.relative(0.2, axis=1))),
}
"""The cases by name. Sets that take numbers from the initial weights take those of `start`."""


def start(dtype=np.float64, seed=0):
    """Initial weights, with some zeros in them."""
    w = np.random.default_rng(seed).standard_normal(SHAPE)
    w[1, 2] = w[4, 0] = 0.0
    return w.astype(dtype)


def bound(set_, x0):
    """Return the set with what it takes from the initial weights x0, an array of any library."""
    initial = set_.initial(x0, resolve(set_.axis, x0.shape, "out_first").axes, "w")
    return set_ if initial is None else set_.bind(initial)
