"""How close to the bound: a table and a plot of where the weights stand.

Norms are measured on the stored values in float64 (NumPy's), whatever the weights' library and dtype.
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
"""Relative distance at which a vector counts as on the bound: where a projection may land, by stored dtype."""


@dataclass(frozen=True)
class Row:
    """One parameter under one constraint."""

    name: str
    constraint: Constraint
    norms: NDArray[np.float64]  # one number per vector
    on_bound: int  # vectors that a step outwards by a relative `CLOSE` takes out of the set
    violations: int  # finite vectors outside
    worst: float  # the largest distance to the set among them
    nonfinite: int  # vectors that hold NaN or infinity

    @property
    def largest(self) -> float:
        """Largest norm; NaN or infinity where a vector holds one."""
        return float(self.norms.max(initial=0.0))


@dataclass(frozen=True)
class Report:
    """One row per constrained parameter; `str` gives the table.

    >>> import numpy as np
    >>> from projgd import MaxNorm
    >>> print(report({"hidden": np.asarray([[3.0, 0.3], [4.0, 0.4]])}, MaxNorm(5.0)))
    parameter  constraint                     vectors  largest norm  on the bound  outside  not finite
    hidden     MaxNorm(c=5.0, axis='fan_in')        2             5           50%        0           0
    """

    rows: tuple[Row, ...]

    @property
    def vectors(self) -> int:
        return sum(row.norms.size for row in self.rows)

    @property
    def largest(self) -> float:
        """Largest norm of all; NaN or infinity where a vector holds one."""
        import numpy as np

        return float(np.max([row.largest for row in self.rows], initial=0.0))

    @property
    def on_bound(self) -> float:
        """Share of all vectors that are on the bound, 0 to 1."""
        return sum(row.on_bound for row in self.rows) / max(self.vectors, 1)

    @property
    def violations(self) -> int:
        return sum(row.violations for row in self.rows)

    @property
    def nonfinite(self) -> int:
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
        """Draw the spread of norms, one line per parameter, and the bound; returns the matplotlib axes.

        A grey line runs from the smallest to the largest norm, a thick one over the middle 80 %; a parameter with a
        vector outside is red, one with NaN or infinity says so. Needs matplotlib (`projgd[plot]`).
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
        constraint: what the arrays should keep to. Each is read in its library's layout, see `projgd.axes`. Parameters
            without such vectors (a bias under a fan-in constraint) are left out.

    Raises:
        TypeError: an array of integers or of something else that cannot be measured.
        ValueError: an axis that an array does not have, or a rule that matches no name.
    """
    named = dict(params.named_parameters() if hasattr(params, "named_parameters") else _named(params))
    chosen = rules.assign({"*": constraint} if isinstance(constraint, Constraint) else constraint, named)
    found = [(name, x, chosen[name]) for name, x in named.items()]
    return Report(tuple(row for name, x, own in found if own is not None and (row := measure(name, x, own))))


def measure(name: str, x: Array, constraint: Constraint, vectors: Vectors | None = None) -> Row | None:
    """The row of one array; None where it has no vectors. Fronts that know the layer pass its `vectors`."""
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
    # Some sets cannot be met exactly in floating point (a unit norm): outside is what the projection would still move.
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
    import numpy as np

    return np.asarray(x.cpu().double() if is_torch_array(x) else x, dtype=np.float64)


def _named(params: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Array]]:
    """Leaves of nested mappings and sequences with their keys joined by "/"; None leaves are skipped."""
    if isinstance(params, Mapping):
        for key, value in params.items():
            yield from _named(value, (*path, str(key)))
    elif isinstance(params, Sequence):
        for key, value in enumerate(params):
            yield from _named(value, (*path, str(key)))
    elif params is not None:
        yield "/".join(path), params
