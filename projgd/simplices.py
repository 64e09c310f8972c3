"""Define the sets of sums and of numbers of entries: simplices, L1 balls, and sparse vectors.

A simplex bounds Σ wᵢ, an L1 ball Σ |wᵢ|, a group ball Σ ‖w_g‖₂. All of them are projected by one function,
`projections.project_simplex`, because the signs and the directions of the groups stay. Sparse sets first choose the
entries that stay.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace

from projgd import axes as _axes
from projgd import bands
from projgd.axes import Axis, Vectors
from projgd.bands import Band
from projgd.constraints import VectorSet, positive
from projgd.projections import by_pieces, largest_entries, project_simplex
from projgd.sums import Array, FloatType, Scalar, float_type, norm, scale, tree_sum


@dataclass(frozen=True)
class Simplex(VectorSet):
    """Hold every vector at wᵢ ≥ 0 and Σ wᵢ = total: w ← max(w - τ, 0), with the τ that gives the sum.

    The entries are never negative. The sum holds to rounding to the dtype.

    Attributes:
        total: the sum, a positive number; default 1, which makes each vector a probability distribution.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: a `total` that is not a number, or an `axis` that is not an axis.
        ValueError: a `total` that is not positive and finite.

    >>> import numpy as np
    >>> Simplex(axis=-1).project(np.asarray([[0.8, 0.6, -1.0]])).round(3)
    array([[0.6, 0.4, 0. ]])

    References:
        J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, *Efficient projections onto the l1-ball for learning in high
        dimensions*, ICML 2008, section 3.
    """

    total: Scalar = 1.0
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", positive("total", self.total))
        object.__setattr__(self, "axis", _axes.check(self.axis))

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        return by_pieces(lambda x: _onto_simplex(x, self.total, None, axes, xp), x, axes=axes, xp=xp)

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        bands.l1_sphere_band(kind, vectors, self.total)

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        return 0.0, float_type(q).largest


@dataclass(frozen=True)
class SparseSimplex(VectorSet):
    """Hold every vector on the simplex with at most `k` entries that are not 0.

    The set is not convex. The k largest entries stay, of equal ones the first, and are projected onto the simplex: this
    is a nearest point.

    Attributes:
        k: the number of entries that may be positive, 1 or more.
        total: the sum, a positive number; default 1.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: a `k` that is not an integer, or as `Simplex`.
        ValueError: a `k` below 1, or as `Simplex`.

    >>> import numpy as np
    >>> SparseSimplex(1, axis=-1).project(np.asarray([[0.8, 0.6, -1.0]]))
    array([[1., 0., 0.]])

    References:
        A. Kyrillidis, S. Becker, V. Cevher, C. Koch, *Sparse projections onto the simplex*, ICML 2013, algorithm 1.
    """

    k: int
    total: Scalar = 1.0
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _count(self.k))
        object.__setattr__(self, "total", positive("total", self.total))
        object.__setattr__(self, "axis", _axes.check(self.axis))

    @property
    def is_convex(self) -> bool:
        return False

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        return by_pieces(lambda x: _onto_simplex(x, self.total, self.k, axes, xp), x, axes=axes, xp=xp)

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        bands.l1_sphere_band(kind, vectors, self.total)
        _refuse_more(self, self.k, vectors, name)

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        return 0.0, xp.where(q == 0, xp.zeros_like(q), xp.full_like(q, float_type(q).largest))


@dataclass(frozen=True)
class TopK(VectorSet):
    """Hold every vector at no more than `k` entries that are not 0: the k largest in magnitude stay, the others are 0.

    This is the L0 ball, which is not convex. Of entries of equal magnitude the first stay: this is a nearest point.

    Attributes:
        k: the number of entries that may differ from 0, 1 or more.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: a `k` that is not an integer, or an `axis` that is not an axis.
        ValueError: a `k` below 1.

    >>> import numpy as np
    >>> TopK(1, axis=-1).project(np.asarray([[0.8, 0.6, -1.0]]))
    array([[ 0.,  0., -1.]])

    References:
        T. Blumensath, M. Davies, *Iterative hard thresholding for compressed sensing*, ACHA 27, 2009, section 2.
    """

    k: int
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", _count(self.k))
        object.__setattr__(self, "axis", _axes.check(self.axis))

    @property
    def is_convex(self) -> bool:
        return False

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        if 0 in x.shape:
            return x

        def onto(x: Array) -> Array:
            stays = largest_entries(xp.abs(x), self.k, axes, xp) | ~_is_finite(x, axes, xp)
            return xp.where(stays | (x == 0), x, xp.zeros_like(x))

        return by_pieces(onto, x, axes=axes, xp=xp)

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        _refuse_more(self, self.k, vectors, name)

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        most = xp.where(q == 0, xp.zeros_like(q), xp.full_like(q, float_type(q).largest))
        return -most, most


@dataclass(frozen=True)
class SumSet(VectorSet):
    """Describe a set of vectors by a bound on Σ |wᵢ|, or on a sum of norms. A subclass returns its `l1_band`.

    Attributes:
        c: the bound, a positive number.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.
    """

    c: Scalar
    axis: Axis = "fan_in"

    def __post_init__(self) -> None:
        object.__setattr__(self, "c", positive("c", self.c))
        object.__setattr__(self, "axis", _axes.check(self.axis))

    @property
    def moving_c(self) -> Scalar:
        return self.c

    @abstractmethod
    def l1_band(self, kind: FloatType, vectors: Vectors) -> Band:
        """Return which sums stay, and what every other sum becomes.

        Args:
            kind: the stored dtype.
            vectors: the shape of the array, and the axes that make one vector.

        Raises:
            ValueError: a bound that is too small for the dtype.

        >>> from projgd.sums import FLOATS
        >>> L1Ball(1.0).l1_band(FLOATS["float64"], Vectors((4, 3), (1,))).high <= 1.0
        True
        """

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        return x if 0 in x.shape else by_pieces(lambda x: self._onto(x, axes, xp), x, axes=axes, xp=xp)

    def _onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType) -> Array:
        """Project some vectors."""
        band = self.l1_band(float_type(x), Vectors(tuple(x.shape), axes))
        z, r = scale(x, axes, xp)
        moves, goal, _ = band.targets(tree_sum(xp.abs(z), axes, xp), r, xp)
        w = xp.astype(x, z.dtype, copy=False)
        w = xp.where(moves, w, xp.ones_like(w))  # no NaN in what follows
        y = project_simplex(xp.abs(w), xp.where(moves, goal, xp.ones_like(goal)), axes, xp)
        return xp.where(moves, xp.astype(xp.where(w < 0, -y, y), x.dtype), x)

    def fit(self, kind: FloatType, vectors: Vectors, name: str) -> None:
        self.l1_band(kind, vectors)


@dataclass(frozen=True)
class L1Ball(SumSet):
    """Hold Σ |wᵢ| of every vector at most at `c`: w ← sign(w) · max(|w| - τ, 0), with the τ that gives the bound.

    The bound holds exactly for the stored values.

    Attributes:
        c: the bound, a positive number.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: a `c` that is not a number, or an `axis` that is not an axis.
        ValueError: a `c` that is not positive and finite.

    >>> import numpy as np
    >>> L1Ball(1.0, axis=-1).project(np.asarray([[0.8, -0.6, 0.1]])).round(3)
    array([[ 0.6, -0.4,  0. ]])

    References:
        J. Duchi, S. Shalev-Shwartz, Y. Singer, T. Chandra, *Efficient projections onto the l1-ball for learning in high
        dimensions*, ICML 2008, section 4.
    """

    def l1_band(self, kind: FloatType, vectors: Vectors) -> Band:
        return bands.l1_ball_band(kind, vectors, self.c)

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        return -xp.abs(q), xp.abs(q)


@dataclass(frozen=True)
class L1Sphere(SumSet):
    """Hold Σ |wᵢ| of every vector at `c`, to rounding. The signs stay.

    The set is not convex. The nearest point has the signs of w, and positive ones where w is 0; a zero vector has no
    single nearest point and stays zero.

    Attributes:
        c: the sum of the magnitudes, a positive number.
        axis: the axes that make one vector, see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: a `c` that is not a number, or an `axis` that is not an axis.
        ValueError: a `c` that is not positive and finite.

    >>> import numpy as np
    >>> L1Sphere(1.0, axis=-1).project(np.asarray([[0.2, -0.4]])).round(3)
    array([[ 0.4, -0.6]])
    """

    @property
    def is_convex(self) -> bool:
        return False

    def l1_band(self, kind: FloatType, vectors: Vectors) -> Band:
        return bands.l1_sphere_band(kind, vectors, self.c)

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        most = xp.full_like(q, float_type(q).largest)
        return xp.where(q > 0, xp.zeros_like(q), -most), xp.where(q < 0, xp.zeros_like(q), most)


@dataclass(frozen=True)
class GroupL1Ball(SumSet):
    """Hold the sum of the norms of all vectors of a parameter at most at `c`: Σ_g ‖w_g‖₂ ≤ c.

    This is the constraint of the group lasso: it makes whole vectors 0, such as all weights of a neuron. Every norm
    becomes max(‖w_g‖₂ - τ, 0), with the τ that gives the bound. The bound holds exactly for the stored values.

    Attributes:
        c: the bound, a positive number, for the whole parameter.
        axis: the axes that make one vector (one group), see `projgd.axes`; default `"fan_in"`.

    Raises:
        TypeError: a `c` that is not a number, or an `axis` that is not an axis.
        ValueError: a `c` that is not positive and finite.

    >>> import numpy as np
    >>> GroupL1Ball(4.0, axis=-1).project(np.asarray([[3.0, 4.0], [0.6, 0.8]])).round(3)
    array([[2.4, 3.2],
           [0. , 0. ]])

    References:
        E. van den Berg, M. Schmidt, M. Friedlander, K. Murphy, *Group sparsity via linear-time projection*, UBC
        technical report TR-2008-09, 2008.
    """

    @property
    def joins_vectors(self) -> bool:
        return True

    def l1_band(self, kind: FloatType, vectors: Vectors) -> Band:
        return bands.l1_ball_band(kind, Vectors(vectors.shape, tuple(range(len(vectors.shape)))), self.c)

    def onto(self, x: Array, axes: tuple[int, ...], xp: ModuleType | None = None, *, moved: bool = False) -> Array:
        xp = xp or array_namespace(x)
        if 0 in x.shape:
            return x
        everything = tuple(range(len(x.shape)))
        band = self.l1_band(float_type(x), Vectors(tuple(x.shape), axes))
        z, r = scale(x, everything, xp)
        sizes = norm(z, axes, xp)
        moves, goal, _ = band.targets(tree_sum(sizes, everything, xp), r, xp)
        unit = xp.where(r > 1, xp.full_like(r, 2.0**-32), xp.ones_like(r))  # so that no norm overflows
        norms = xp.where(moves, sizes * (r * unit), xp.ones_like(sizes))
        left = project_simplex(norms, xp.where(moves, goal * unit, xp.ones_like(goal)), everything, xp)
        # A group keeps its bits only if none has to move, because τ shortens every group.
        factor = left / xp.where(norms > 0, norms, xp.ones_like(norms))
        y = xp.astype(xp.astype(x, z.dtype, copy=False) * factor, x.dtype)
        return xp.where(moves, y, x)

    def rounding_interval(
        self, q: Array, p: Array, axes: tuple[int, ...], norm: Callable[[Array], Array], xp: ModuleType
    ) -> tuple[Array | float, Array | float]:
        return -xp.abs(q), xp.abs(q)


def _onto_simplex(x: Array, total: Scalar, k: int | None, axes: tuple[int, ...], xp: Any) -> Array:
    """Return the nearest vectors on the simplex, with at most k positive entries."""
    if 0 in x.shape:
        return x
    kind = float_type(x)
    w = xp.astype(x, getattr(xp, kind.compute), copy=False)
    band = bands.l1_sphere_band(kind, Vectors(tuple(x.shape), axes), total)
    least, size = xp.min(w, axis=axes, keepdims=True), xp.max(xp.abs(w), axis=axes, keepdims=True)
    finite = xp.isfinite(size)
    w = xp.where(finite, w, xp.zeros_like(w))
    # No sum of entries from 0 to 2 · total overflows, and with another one the vector is outside.
    sums = tree_sum(xp.minimum(xp.maximum(w, xp.zeros_like(w)), 2 * (xp.zeros_like(size) + total)), axes, xp)
    stays = (least >= 0) & (sums >= band.low) & (sums <= band.high)
    if k is not None:
        chosen = largest_entries(w, k, axes, xp)
        stays = stays & (tree_sum(xp.astype(w != 0, w.dtype), axes, xp) <= k)
        lowest = xp.full_like(w, -float_type(w).largest)
        w = xp.where(chosen, xp.maximum(w, lowest / 2), lowest)
    y = xp.astype(project_simplex(w, total, axes, xp), x.dtype)
    return xp.where(stays | ~finite, x, y)


def _is_finite(x: Array, axes: tuple[int, ...], xp: ModuleType) -> Array:
    """Return whether each vector is finite throughout."""
    return xp.all(xp.isfinite(x), axis=axes, keepdims=True)


def _count(k: Any) -> int:
    """Return a number of entries; raise an error for what is none."""
    if isinstance(k, bool) or not hasattr(k, "__index__"):
        raise TypeError(f"k={k!r} is not a number of entries: pass an integer such as k=8")
    if (number := int(k.__index__())) < 1:
        raise ValueError(f"k={number} leaves no entry: pass 1 or more, such as k=8")
    return number


def _refuse_more(constraint: Any, k: int, vectors: Vectors, name: str) -> None:
    """Raise ValueError if vectors have fewer than k entries."""
    if vectors.length < k and 0 not in vectors.shape:
        raise ValueError(
            f"{name}: its vectors have {vectors.length} entries, fewer than {constraint} lets stay: pass a smaller k"
        )
