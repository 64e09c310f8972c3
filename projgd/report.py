"""Show how close weights are to their bound, as a table and as a plot.

Norms are measured on the stored values in NumPy's float64, for every library and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from array_api_compat import is_torch_array

from projgd import rules
from projgd.axes import Vectors
from projgd.constraints import Constraint
from projgd.sums import Array, float_type, norm

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CLOSE = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""The relative distance within which a vector counts as on the bound, by stored dtype: a projection is that tight."""


@dataclass(frozen=True)
class Row:
    """Hold the measures of one parameter under one constraint.

    Attributes:
        name: the parameter's name.
        constraint: the constraint.
        norms: the norms of its vectors, in one dimension.
        on_bound: how many vectors are on the bound: one relative `CLOSE` outwards takes them out of the set.
        violations: how many finite vectors are outside.
        worst: the largest distance of these vectors to the set.
        nonfinite: how many vectors hold NaN or infinity.

    >>> import numpy as np
    >>> from projgd import MaxNorm
    >>> report({"hidden": np.asarray([[3.0, 0.3], [4.0, 0.4]])}, MaxNorm(5.0)).rows[0].on_bound
    1
    """

    name: str
    constraint: Constraint
    norms: NDArray[np.float64]
    on_bound: int
    violations: int
    worst: float
    nonfinite: int

    @property
    def largest(self) -> float:
        """Return the largest norm; NaN or infinity where a vector holds one."""
        return float(self.norms.max(initial=0.0))


@dataclass(frozen=True)
class Report:
    """Hold the measures of every constrained parameter; `str` makes the table.

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
    parameter  constraint                     vectors  largest norm  on the bound  outside  not finite
    hidden     MaxNorm(c=5.0, axis='fan_in')        2             5           50%        0           0
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

    def __str__(self) -> str:
        head = ("parameter", "constraint", "vectors", "largest norm", "on the bound", "outside", "not finite")
        lines = [head]
        for row in self.rows:
            share = row.on_bound / max(row.norms.size, 1)
            counts = (
                f"{row.norms.size}",
                f"{row.largest:.6g}",
                f"{share:.0%}",
                f"{row.violations}",
                f"{row.nonfinite}",
            )
            lines.append((row.name, str(row.constraint), *counts))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        cells = (
            [c.rjust(w) if i > 1 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
            for line in lines
        )
        return "\n".join("  ".join(line) for line in cells)

    def plot(self, ax: Any = None) -> Any:
        """Draw the spread of the norms, one line per parameter, and the bound.

        A grey line runs from the smallest to the largest norm, and a thick one over the middle 80 %. The thick line is
        red if a vector is outside or not finite. A note says how many vectors are not finite. This needs matplotlib
        (`projgd[plot]`).

        Args:
            ax: the matplotlib axes to draw into; default None, which makes a new figure.

        Returns:
            The matplotlib axes.

        Raises:
            ImportError: matplotlib is not installed.
        """
        import matplotlib.pyplot as plt
        import numpy as np

        if ax is None:
            _, ax = plt.subplots(figsize=(7, 0.8 + 0.35 * len(self.rows)), layout="constrained")
        for y, row in enumerate(self.rows):
            finite = row.norms[np.isfinite(row.norms)]
            color = "tab:red" if row.violations or row.nonfinite else "tab:blue"
            if finite.size:
                ax.plot([finite.min(), finite.max()], [y, y], color="0.7", lw=2, zorder=1)
                ax.plot(np.quantile(finite, [0.1, 0.9]), [y, y], color=color, lw=7, solid_capstyle="butt", zorder=2)
            if row.nonfinite:
                ax.annotate(f"{row.nonfinite} not finite", (0, y), color=color, va="center")
            if (c := getattr(row.constraint, "c", None)) is not None:
                ax.plot([float(c)] * 2, [y - 0.4, y + 0.4], color="black", lw=2, zorder=3)
        ax.set_yticks(range(len(self.rows)), [row.name for row in self.rows])
        ax.invert_yaxis()
        ax.set_xlim(left=0)
        ax.set_xlabel("norm of each vector; black: the bound")
        ax.spines[["top", "right"]].set_visible(False)
        return ax


def report(params: Any, constraint: Constraint | rules.Rules) -> Report:
    """Measure weights against a constraint, or against rules `{pattern: constraint or None}`.

    Args:
        params: a PyTorch module, or a (nested) mapping or sequence of NumPy, PyTorch or JAX arrays. Names are those of
            `named_parameters()`, or the keys joined by "/".
        constraint: one constraint for all arrays, or rules over their names. Each array is read in its library's
            layout, see `projgd.axes`. The report omits parameters without such vectors (a bias under a fan-in
            constraint).

    Returns:
        A `Report` with one row per constrained parameter.

    Raises:
        TypeError: an array of integers, or an object that is not an array.
        ValueError: an axis that an array does not have, or a rule that matches no name.

    >>> import numpy as np
    >>> from projgd import MaxNorm
    >>> report({"hidden": np.asarray([[3.0, 0.3], [4.0, 0.4]])}, MaxNorm(4.0)).violations
    1
    """
    named = dict(params.named_parameters() if hasattr(params, "named_parameters") else _named(params))
    chosen = rules.assign({"*": constraint} if isinstance(constraint, Constraint) else constraint, named)
    found = [(name, x, chosen[name]) for name, x in named.items()]
    return Report(tuple(row for name, x, own in found if own is not None and (row := measure(name, x, own))))


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
        ValueError: an axis that the array does not have.
    """
    import numpy as np

    float_type(x, name)
    vectors = vectors or constraint.resolve(tuple(x.shape), "out_first" if is_torch_array(x) else "out_last", name)
    if vectors is None:
        return None
    stored = (x.detach() if is_torch_array(x) else x).reshape(vectors.shape)
    exact = _float64(stored)
    near = CLOSE[str(x.dtype).removeprefix("torch.")]
    with np.errstate(invalid="ignore", over="ignore"):
        norms = norm(exact, vectors.axes)
        finite = np.isfinite(norms)
        distance = constraint.outside(exact, vectors.axes)
        edge = finite & (constraint.outside(exact * (1 + near), vectors.axes) > 0)
    # No float has a norm of exactly 1 in general, so a vector counts as outside only if the projection would move it.
    moved = _float64(constraint.onto(stored, vectors.axes)) != exact
    outside = finite & (distance > 0) & np.any(moved, axis=vectors.axes, keepdims=True)
    return Row(
        name=name,
        constraint=constraint,
        norms=norms.reshape(-1),
        on_bound=int(np.sum(edge & ~outside)),
        violations=int(np.sum(outside)),
        worst=float(np.max(distance, where=outside, initial=0.0)),
        nonfinite=int(np.sum(~finite)),
    )


def _float64(x: Array) -> NDArray[np.float64]:
    """Return an array's stored values as NumPy's float64."""
    import numpy as np

    return np.asarray(x.cpu().double() if is_torch_array(x) else x, dtype=np.float64)


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
