"""Draw every set in two dimensions, with points outside and arrows to their projections.

python examples/sets.py    # writes out/sets.png, which docs/sets.md shows
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np

from projgd import (
    AffineSet,
    Around,
    Box,
    BoxSection,
    Constraint,
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
    TopK,
    UnitNorm,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

START = (-0.7, 0.5)  # w₀, where a set needs one
SETS: dict[str, tuple[Constraint, tuple[float, float] | None]] = {
    "MaxNorm(1)": (MaxNorm(1.0, axis=1), None),
    "MinMaxNorm(0.5, 1)": (MinMaxNorm(0.5, 1.0, axis=1), None),
    "UnitNorm()": (UnitNorm(axis=1), None),
    "MaxNorm.relative(1.2)": (MaxNorm.relative(1.2, axis=1), START),
    "Box(-0.8, 0.5)": (Box(-0.8, 0.5), None),
    "Box(low=[-0.2, -1], high=[1, inf])": (Box([-0.2, -1.0], [1.0, np.inf]), None),
    "NonNegative()": (NonNegative(), None),
    "NonPositive()": (NonPositive(), None),
    "KeepSign()": (KeepSign(), START),
    "KeepZeros()": (KeepZeros(), (0.8, 0.0)),
    "Simplex()": (Simplex(axis=1), None),
    "SparseSimplex(1)": (SparseSimplex(1, axis=1), None),
    "L1Ball(1)": (L1Ball(1.0, axis=1), None),
    "L1Sphere(1)": (L1Sphere(1.0, axis=1), None),
    "TopK(1)": (TopK(1, axis=1), None),
    "Hyperplane()": (Hyperplane(axis=1), None),
    "HalfSpace([1, 2], 0.5)": (HalfSpace([1.0, 2.0], 0.5, axis=1), None),
    "BoxSection(0, 0.8, b=1)": (BoxSection(0.0, 0.8, 1.0, 1.0, axis=1), None),
    "AffineSet([[1, -2]], 0.4)": (AffineSet([[1.0, -2.0]], 0.4, axis=1), None),
    "Around(MaxNorm(0.6))": (Around(MaxNorm(0.6, axis=1)), START),
    "Intersection(NonNegative(), MaxNorm(1))": (Intersection(NonNegative(), MaxNorm(1.0, axis=1)), None),
}
POINTS = np.asarray(
    [(1.4, 1.1), (1.5, 0.2), (0.5, 1.5), (-0.4, 1.4), (-1.4, 0.9), (-1.5, -0.3), (-1.0, -1.3), (0.2, -1.4), (1.2, -1.0),
     (0.3, 0.2)]
)  # fmt: skip


def projected(constraint: Constraint, start: tuple[float, float] | None, x: np.ndarray) -> np.ndarray:
    """Return the projections of the rows of x, for a set that may take numbers from the initial weights."""
    axes = () if constraint.axis == "entries" else (1,)
    if start is not None:
        initial = constraint.initial(np.tile(np.asarray(start), (len(x), 1)), axes, "w")
        constraint = constraint.bind(initial)
    return constraint.onto(x, axes)


def draw(panel: plt.Axes, constraint: Constraint, start: tuple[float, float] | None) -> None:
    ticks = np.linspace(-3, 3, 301)
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    held = projected(constraint, start, grid)  # of so many points the projections are the set
    panel.plot(*held.T, ".", color="tab:green", ms=1.4, mew=0, rasterized=True)
    for point, nearest in zip(POINTS, projected(constraint, start, POINTS), strict=True):
        if np.abs(point - nearest).max() > 1e-6:
            panel.annotate("", nearest, point, arrowprops={"arrowstyle": "->", "color": "0.25", "lw": 0.9})
        panel.plot(*point, "o", color="0.25", ms=2.5)
        panel.plot(*nearest, "o", color="tab:orange", ms=3.5)
    if start is not None:
        panel.plot(*start, "k*", ms=7)
        panel.annotate("w₀", start, (3, 3), textcoords="offset points", fontsize=8)
    panel.axhline(0, color="0.8", lw=0.6, zorder=0)
    panel.axvline(0, color="0.8", lw=0.6, zorder=0)
    panel.set(xlim=(-1.7, 1.7), ylim=(-1.7, 1.7), aspect="equal", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
    panel.tick_params(labelsize=6, length=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(3, 7, figsize=(15, 7), layout="constrained")
    for panel, (name, (constraint, start)) in zip(panels.flat, SETS.items(), strict=True):
        draw(panel, constraint, start)
        panel.set_title(name.replace("], ", "],\n").replace("), ", "),\n") if len(name) > 22 else name, fontsize=8)
    figure.savefig(args.out / "sets.png", dpi=90)
    print(f"picture: {args.out / 'sets.png'}")


if __name__ == "__main__":
    main()
