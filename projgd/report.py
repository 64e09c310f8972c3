"""Show how close weights are to their bound, as a table and as a plot.

Norms are measured on the stored values in NumPy's float64, for every library and dtype. Which vectors a parameter has
is asked of the front that its library belongs to, so that the report reads every layer as the optimizer does. For this
the module stands above the fronts, which it imports when it meets their types.
"""

from __future__ import annotations

import copy
import dataclasses
import html
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from array_api_compat import is_jax_array, is_numpy_array, is_torch_array

from projgd import rules
from projgd.axes import Vectors
from projgd.constraints import Constraint, NormSet
from projgd.sums import Array, float_type, norm

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CLOSE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""The relative distance within which a vector counts as on the bound, by stored dtype: a projection is that tight."""

PIECE = 1 << 17  # this many entries, in float64, stay in a cache


@dataclass(frozen=True)
class Row:
    """Hold the measures of one parameter under one constraint.

    Attributes:
        name: the parameter's name.
        shape: its shape.
        constraint: the constraint.
        norms: the norms of its vectors, in one dimension; the sizes of its entries for a set of entries.
        on_bound: how many vectors are on the bound: one relative `CLOSE` further takes them out of the set.
        violations: how many finite vectors are outside.
        worst: the largest distance of these vectors to the set.
        nonfinite: how many vectors hold NaN or infinity.
        bound: the smallest and the largest norm in the set; None for another kind of set, or one bound per vector.
        initial: the norms at the start, where the optimizer keeps them; otherwise None.

    >>> import numpy as np
    >>> from projgd import MaxNorm
    >>> report({"hidden": np.asarray([[3.0, 0.3], [4.0, 0.4]])}, MaxNorm(5.0)).rows[0].on_bound
    1
    """

    name: str
    shape: tuple[int, ...]
    constraint: Constraint
    norms: NDArray[np.float64]
    on_bound: int
    violations: int
    worst: float
    nonfinite: int
    bound: tuple[float, float] | None = None
    initial: NDArray[np.float64] | None = None

    @property
    def smallest(self) -> float:
        """Return the smallest norm; NaN where a vector holds one, and without vectors."""
        return float(self.norms.min()) if self.norms.size else math.nan

    @property
    def median(self) -> float:
        """Return the median of the norms; NaN where a vector holds one, and without vectors."""
        import numpy as np

        return float(np.median(self.norms)) if self.norms.size else math.nan

    @property
    def largest(self) -> float:
        """Return the largest norm; NaN or infinity where a vector holds one."""
        return float(self.norms.max(initial=0.0))

    @property
    def share(self) -> float:
        """Return the share of the vectors that are on the bound, from 0 to 1."""
        return self.on_bound / max(self.norms.size, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the measures as plain types; the norms as their smallest, median and largest."""
        import numpy as np

        start = None if self.initial is None else float(np.median(self.initial))
        return {
            "parameter": self.name,
            "shape": self.shape,
            "constraint": str(self.constraint),
            "vectors": self.norms.size,
            "min norm": self.smallest,
            "median norm": self.median,
            "max norm": self.largest,
            "median at start": start,
            "on the bound": self.share,
            "outside": self.violations,
            "not finite": self.nonfinite,
        }


@dataclass(frozen=True)
class Report:
    """Hold the measures of every constrained parameter; `print` and a notebook show them as a table.

    Attributes:
        rows: one `Row` per constrained parameter.
        vectors: how many vectors there are.
        largest: the largest norm.
        on_bound: the share of vectors on the bound, from 0 to 1.
        violations: how many finite vectors are outside.
        nonfinite: how many vectors hold NaN or infinity.

    >>> import numpy as np
    >>> from projgd import MaxNorm
    >>> print(report({"hidden": np.asarray([[3.0, 0.3], [4.0, 0.4]])}, MaxNorm(5.0)))
    parameter  shape   constraint                     vectors  min  median  max  on bound  outside  not finite
    hidden     (2, 2)  MaxNorm(c=5.0, axis='fan_in')        2  0.5    2.75    5       50%        0           0
    """

    rows: tuple[Row, ...]

    @property
    def vectors(self) -> int:
        """Return how many vectors there are."""
        return sum(row.norms.size for row in self.rows)

    @property
    def largest(self) -> float:
        """Return the largest norm of all; NaN or infinity where a vector holds one."""
        import numpy as np

        return float(np.max([row.largest for row in self.rows], initial=0.0))

    @property
    def on_bound(self) -> float:
        """Return the share of all vectors that are on the bound, from 0 to 1."""
        return sum(row.on_bound for row in self.rows) / max(self.vectors, 1)

    @property
    def violations(self) -> int:
        """Return how many finite vectors are outside."""
        return sum(row.violations for row in self.rows)

    @property
    def nonfinite(self) -> int:
        """Return how many vectors hold NaN or infinity."""
        return sum(row.nonfinite for row in self.rows)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return one dict of plain types for each parameter."""
        return [row.to_dict() for row in self.rows]

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with one row for each parameter.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas as pd  # type: ignore[import-untyped]

        return pd.DataFrame(self.to_dict()).set_index("parameter") if self.rows else pd.DataFrame()

    def _cells(self) -> list[list[str]]:
        """Return the table as text: the head, then one line for each parameter."""
        found = self.to_dict()
        hidden = {"median at start"} if all(line["median at start"] is None for line in found) else set()
        head = [k for k in _HEAD if k not in hidden]

        def text(key: str, value: Any) -> str:
            if value is None:
                return ""
            if key == "on the bound":
                return f"{value:.0%}"
            return f"{value:.6g}" if isinstance(value, float) else str(value)

        return [[_HEAD[k] for k in head], *([text(k, line[k]) for k in head] for line in found)]

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            [c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            for line in cells
        )
        return "\n".join("  ".join(line) for line in lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        head, *lines = self._cells()

        def row(tag: str, cells: list[str]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        return f"<table><thead>{row('th', head)}</thead><tbody>{''.join(row('td', c) for c in lines)}</tbody></table>"

    def plot(self, ax: Any = None) -> Any:
        """Draw the spread of the norms and the bound, one line per parameter, with the share on the bound at the right.

        A thin line runs from the smallest to the largest norm, and a thick one over the middle 80 %. The thick line is
        red if a vector is outside or not finite. This needs matplotlib (`projgd[plot]`).

        Args:
            ax: the matplotlib axes to draw into; default None, which makes a new figure.

        Returns:
            The matplotlib axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        import matplotlib.pyplot as plt
        import numpy as np
        from matplotlib.lines import Line2D

        if ax is None:
            _, ax = plt.subplots(figsize=(8, 1.4 + 0.3 * max(len(self.rows), 1)), layout="constrained")
        for y, row in enumerate(self.rows):
            finite = row.norms[np.isfinite(row.norms)]
            color = "tab:red" if row.violations or row.nonfinite else "tab:blue"
            if finite.size:
                ax.plot([finite.min(), finite.max()], [y, y], color="0.7", lw=2, zorder=1)
                ax.plot(np.quantile(finite, [0.1, 0.9]), [y, y], color=color, lw=7, solid_capstyle="butt", zorder=2)
            for edge in set(row.bound or ()) - {0.0, math.inf}:
                ax.plot([edge] * 2, [y - 0.4, y + 0.4], color="black", lw=2, zorder=3)
            note = f", {row.nonfinite} not finite" if row.nonfinite else ""
            place = ax.get_yaxis_transform()  # the right edge, whatever the norms are
            ax.text(1.01, y, f"{row.share:.0%}{note}", transform=place, va="center", color=color, fontsize=9)
        ax.set_yticks(range(len(self.rows)), [row.name for row in self.rows])
        ax.set_ylim(len(self.rows) - 0.4, -0.6)
        ax.set_xlim(left=0)
        ax.set_xlabel("norm of each vector")
        ax.set_title("on the bound", loc="right", fontsize=9)
        looks = {
            "all": ("0.7", 2),
            "middle 80 %": ("tab:blue", 7),
            "some outside": ("tab:red", 7),
            "bound": ("black", 2),
        }
        handles = [Line2D([], [], color=color, lw=width, label=label) for label, (color, width) in looks.items()]
        ax.figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        return ax


_HEAD = {
    "parameter": "parameter",
    "shape": "shape",
    "constraint": "constraint",
    "vectors": "vectors",
    "min norm": "min",
    "median norm": "median",
    "max norm": "max",
    "median at start": "at start",
    "on the bound": "on bound",
    "outside": "outside",
    "not finite": "not finite",
}
"""The columns of the table by the keys of `Row.to_dict`; min, median and max are those of the norms."""


def report(params: Any, constraint: Constraint | rules.Rules | Any = None) -> Report:
    """Measure weights against the set that they are held in.

    Args:
        params: a `torch.nn.Module`, a flax.nnx or equinox module, or a tree of JAX arrays, which are read as
            `param_groups` and `projgd.optax.projection` read them; a `Projected` optimizer; or a (nested) mapping or
            sequence of NumPy or PyTorch arrays, which are read in their library's layout, see `projgd.axes`.
        constraint: one constraint for all parameters, or rules over their names. An optimizer has its own: leave it
            out.

    Returns:
        A `Report` with one row per parameter that has vectors to hold.

    Raises:
        TypeError: an object without parameters, or an array of integers.
        ValueError: no constraint, an axis that an array does not have, or a rule that matches no name.

    >>> import numpy as np
    >>> from projgd import MaxNorm
    >>> report({"hidden": np.asarray([[3.0, 0.3], [4.0, 0.4]])}, MaxNorm(4.0)).violations
    1
    """
    found = [measure(name, x, own, vectors) for name, x, own, vectors in _read(params, constraint)]
    return Report(tuple(row for row in found if row is not None))


Reading = tuple[str, Array, Constraint, Vectors | None]
"""A parameter: its name, the array, its constraint, and its vectors; None reads the array in its library's layout."""


def _read(params: Any, constraint: Any) -> Iterator[Reading]:
    """Yield the parameters that have a constraint, as the front of their library reads them."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(params, torch.optim.Optimizer):
        yield from _read_optimizer(params, constraint)
        return
    if constraint is None:
        raise ValueError("pass a constraint, such as report(model, MaxNorm(4.0)); only an optimizer has its own")
    if torch is not None and isinstance(params, torch.nn.Module):
        from projgd.torch.layers import constraints

        tensors = dict(params.named_parameters())
        yield from ((name, tensors[name], own, None) for name, own in constraints(params, constraint).items() if own)
        return
    if _is_bare(params):
        named = dict(_named(params))
        if not named:
            raise TypeError(f"there are no parameters in {params!r}: pass a model, an optimizer or a tree of arrays")
        chosen = rules.assign({"*": constraint} if isinstance(constraint, Constraint) else constraint, named)
        yield from ((name, x, own, None) for name, x in named.items() if (own := chosen[name]) is not None)
        return
    if "jax" not in sys.modules:
        raise TypeError(f"a {type(params).__name__} has no parameters: pass a model, an optimizer or a tree of arrays")
    yield from _read_tree(params, constraint)


def _read_optimizer(optimizer: Any, constraint: Any) -> Iterator[Reading]:
    from projgd.torch import Projected

    if constraint is not None or not isinstance(optimizer, Projected):
        raise ValueError(
            "a report of an optimizer shows the constraints of a Projected one, so leave constraint= out; for another "
            "optimizer pass its model, such as report(model, MaxNorm(4.0))"
        )
    tensors = optimizer.named_params()
    yield from ((name, tensors[name], own, None) for name, own in optimizer.constraints().items() if own)


def _read_tree(params: Any, constraint: Any) -> Iterator[Reading]:
    from projgd.optax import tree

    arrays = [leaf.array if leaf else None for leaf in tree.find_leaves(params)]
    if not any(is_jax_array(x) or is_numpy_array(x) for x in arrays):
        raise TypeError(f"a {type(params).__name__} has no parameters: pass a model, an optimizer or a tree of arrays")
    resolved = tree.resolve(constraint, params)
    for x, leaf in zip(arrays, resolved, strict=True):
        if leaf is not None:
            yield leaf.name, x, leaf.constraint, leaf.vectors


def _is_bare(params: Any) -> bool:
    """Return whether there are only mappings and sequences of NumPy and PyTorch arrays."""
    if isinstance(params, Mapping):
        return all(map(_is_bare, params.values()))
    if isinstance(params, Sequence) and not isinstance(params, str):
        return all(map(_is_bare, params))
    return params is None or is_numpy_array(params) or is_torch_array(params)


def measure(name: str, x: Array, constraint: Constraint, vectors: Vectors | None = None) -> Row | None:
    """Return the row of one array; None if the array has no vectors.

    Args:
        name: the parameter's name.
        x: an array of NumPy, PyTorch or JAX.
        constraint: the constraint of the array.
        vectors: the vectors of the array, from a caller that knows the layer; default None, which reads the array in
            its library's layout.

    Returns:
        The `Row`, or None.

    Raises:
        TypeError: an array of integers, or an object that is not an array.
        ValueError: an axis that the array does not have, or a set that takes its numbers from the initial weights.
    """
    import numpy as np

    kind = float_type(x, name)
    layout: Any = "out_first" if is_torch_array(x) else "out_last"
    vectors = vectors or constraint.resolve(tuple(x.shape), layout, name)
    if vectors is None:
        return None
    near = CLOSE[str(x.dtype).removeprefix("torch.")]
    if isinstance(constraint, NormSet):
        stored = _as_numpy(x).reshape(vectors.shape)
        norms = _norms(stored, vectors.axes)
        low, high = (np.asarray(_as_numpy(e), np.float64) for e in constraint.edges())
        band = constraint.band(kind, vectors)
        assert band is not None
        finite = np.isfinite(norms)
        distance = np.maximum(np.maximum(low - norms, norms - high), 0)
        # No float has a norm of exactly 1 in general, so a sphere is as wide as its band.
        stays = (norms >= np.minimum(low, _as_numpy(band.low))) & (norms <= np.maximum(high, _as_numpy(band.high)))
        outside = finite & ~stays & (norms > 0)
        edge = finite & ((norms * (1 + near) > high) | ((norms > 0) & (norms * (1 - near) < low)))
        bound = (low.item(), high.item()) if low.size == high.size == 1 else None
        initial = low.reshape(-1) if low.ndim else None  # a bound set has one number per vector
    else:
        norms, outside, edge, distance, finite = _compare(x, constraint, vectors, near)
        bound = initial = None
    return Row(
        name=name,
        shape=tuple(x.shape),
        constraint=constraint,
        norms=norms.reshape(-1),
        on_bound=int(np.sum(edge & ~outside)),
        violations=int(np.sum(outside)),
        worst=float(np.max(distance, where=outside, initial=0.0)),
        nonfinite=int(np.sum(~finite)),
        bound=bound,
        initial=initial,
    )


def _with_numpy(constraint: Constraint) -> Constraint:
    """Return a set whose numbers from the initial weights are arrays of NumPy."""
    kept = {f.name: getattr(constraint, f.name) for f in dataclasses.fields(constraint) if not f.init}
    if not any(hasattr(value, "shape") for value in kept.values()):
        return constraint
    bound = copy.copy(constraint)
    for name, value in kept.items():
        object.__setattr__(bound, name, _as_numpy(value) if hasattr(value, "shape") else value)
    return bound


def _compare(x: Array, constraint: Constraint, vectors: Vectors, near: float) -> tuple[Any, ...]:
    """Return norms, which vectors are outside, which are on the bound, distances, and which vectors are finite."""
    import numpy as np

    stored = (x.detach() if is_torch_array(x) else x).reshape(vectors.shape)
    exact = np.asarray(_as_numpy(stored), np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        norms = norm(exact, vectors.axes)
        finite = np.isfinite(norms)
        wide = _with_numpy(constraint)
        distance = wide.outside(exact, vectors.axes)
        edge = finite & (wide.outside(exact * (1 + near), vectors.axes) > 0)
    # What an iteration leaves is no violation, so a vector counts as outside only if the projection would move it.
    moved = np.asarray(_as_numpy(constraint.onto(stored, vectors.axes)), np.float64) != exact
    outside = finite & (distance > 0) & np.any(moved, axis=vectors.axes, keepdims=True)
    return norms, outside, edge, distance, finite


def _norms(x: NDArray[Any], axes: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the norms of stored values, in float64, with the reduced axes kept."""
    import numpy as np

    if x.dtype == np.float64 or not x.size:
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(norm(x.astype(np.float64), axes))
    kept = tuple(a for a in range(x.ndim) if a not in axes)
    result: tuple[int, ...] = kept
    y = x
    if axes == tuple(range(len(kept), x.ndim)):  # rows in memory
        y, result = x.reshape(math.prod([x.shape[a] for a in kept]), -1), (0,)
    elif axes == tuple(range(len(axes))):
        y, result = x.reshape(math.prod([x.shape[a] for a in axes]), -1), (1,)
    einsum: Any = np.einsum  # its types know no lists of indices
    indices, rows = tuple(range(y.ndim)), max(1, PIECE * len(y) // y.size)
    pieces = (y[i : i + rows].astype(np.float64) for i in range(0, len(y), rows))
    squares = [einsum(piece, indices, piece, indices, result) for piece in pieces]  # none of these dtypes overflows
    total: NDArray[np.float64] = np.concatenate(squares) if 0 in result else np.sum(squares, axis=0)
    return np.sqrt(total).reshape([1 if a in axes else n for a, n in enumerate(x.shape)])


def _as_numpy(x: Any) -> Any:
    """Return stored values as a NumPy array, without a copy where that can be; a sharded tensor as a whole."""
    import numpy as np

    if not is_torch_array(x):
        return np.asarray(x)
    x = x.detach()
    x = (x.full_tensor() if hasattr(x, "full_tensor") else x).cpu()
    return (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()


def _named(params: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Array]]:
    """Yield the leaves of nested mappings and sequences with their keys joined by "/"; skip None."""
    if isinstance(params, Mapping):
        for key, value in params.items():
            yield from _named(value, (*path, str(key)))
    elif isinstance(params, Sequence):
        for key, value in enumerate(params):
            yield from _named(value, (*path, str(key)))
    elif params is not None:
        yield "/".join(path), params
