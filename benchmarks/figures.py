"""Make the table and the plot of `python -m benchmarks`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import Row
from benchmarks.torch_step import OPTIMIZERS
from benchmarks.workloads import BINDING, WORKLOADS, shapes

MODELS = {
    "mlp": "784-1024-1024-2048-10",
    "small": "200 layers of 64 × 64",
    "resnet": "ResNet-50's shapes",
    "gpt": "GPT-2 small's shapes",
}
FRONTS = ("PyTorch", "JAX")
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


def distinct(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def ordered(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in one order, whichever part was measured last."""
    optimizers = list(OPTIMIZERS)
    return sorted(rows, key=lambda r: (r["front"] != FRONTS[0], r["front"], optimizers.index(r["optimizer"])))


def table(rows: Sequence[Row]) -> str:
    """Return Markdown: one table per workload, and one for Keras."""
    rows = ordered(rows)
    parts = []
    for workload in WORKLOADS:
        mine = [r for r in rows if r["workload"] == workload and r["front"] in FRONTS]
        if not mine:
            continue
        optimizers = distinct(mine, "optimizer")
        weights = sum(math.prod(s) for s in shapes(workload))
        parts.append(f"### {workload}: {MODELS[workload]}, {weights / 1e6:.1f} M weights\n")
        parts.append("| | " + " | ".join(optimizers) + " |\n" + "|---" * (1 + len(optimizers)) + "|")
        best = {}
        for front in FRONTS:
            for optimizer in optimizers:
                tried = [r for r in mine if (r["front"], r["optimizer"], r["bound"]) == (front, optimizer, BINDING)]
                best[front, optimizer] = min(tried, key=lambda r: r["R"])["way"] if tried else ""
        for front, way in dict.fromkeys((r["front"], r["way"]) for r in mine):
            cells = []
            for optimizer in optimizers:
                where = (front, way, optimizer)
                cell = _cell([r for r in mine if (r["front"], r["way"], r["optimizer"]) == where])
                cells.append(f"**{cell}**" if best[front, optimizer] == way else cell)
            parts.append(f"| {front}: {way} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts + _keras([r for r in rows if r["front"] not in FRONTS]))


def _keras(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    optimizers = distinct(rows, "optimizer")
    lines = ["### Keras 3: a whole training step\n", "| | " + " | ".join(optimizers) + " |"]
    lines.append("|---" * (1 + len(optimizers)) + "|")
    for workload, front in sorted({(r["workload"], r["front"]) for r in rows}):
        mine = [r for r in rows if (r["workload"], r["front"]) == (workload, front)]
        for way in distinct(mine, "way"):
            cells = [_cell([r for r in mine if (r["way"], r["optimizer"]) == (way, o)]) for o in optimizers]
            lines.append(f"| {workload}, {front}: {way} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(rows: Sequence[Row]) -> str:
    """Return the R of both bounds; for a plain step also the time."""
    cell = " / ".join(f"{r['R']:.2f} ± {r['R_spread']:.2f}" for r in rows)
    return f"{cell} ({rows[0]['ms']:.3g} ms)" if rows and rows[0]["bound"] is None else cell


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw one panel per workload: R of every step, a colour per optimizer, hollow where nothing binds."""
    import matplotlib.pyplot as plt

    rows = [r for r in ordered(rows) if r["front"] in FRONTS]
    workloads, optimizers = [w for w in WORKLOADS if w in distinct(rows, "workload")], distinct(rows, "optimizer")
    ways = list(dict.fromkeys((r["front"], r["way"]) for r in rows))
    figure, axes = plt.subplots(
        1,
        len(workloads),
        figsize=(2 + 3 * len(workloads), 1.8 + 0.3 * len(ways)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for ax, workload in zip(axes[0], workloads, strict=True):
        for r in (r for r in rows if r["workload"] == workload):
            i = optimizers.index(r["optimizer"])
            y = ways.index((r["front"], r["way"])) + 0.16 * (i - (len(optimizers) - 1) / 2)
            hollow = r["bound"] not in (None, BINDING)
            ax.plot(r["R"], y, "o", color=COLORS[i], markersize=5, markerfacecolor="white" if hollow else COLORS[i])
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(title=workload, xscale="log")
        ax.xaxis.set_major_locator(plt.LogLocator(base=2))
        ax.xaxis.set_major_formatter(plt.FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_locator(plt.NullLocator())
        ax.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(ways)), [f"{front}: {way}" for front, way in ways])
    axes[0][0].invert_yaxis()
    dots = [plt.Line2D([], [], color=COLORS[i], marker="o", linestyle="", label=o) for i, o in enumerate(optimizers)]
    hollow = {"color": "black", "marker": "o", "linestyle": "", "markerfacecolor": "white"}
    dots.append(plt.Line2D([], [], label="hollow: nothing binds", **hollow))
    figure.legend(handles=dots, loc="outside lower center", ncols=len(dots), frameon=False)
    figure.suptitle(
        "R: time of a step, projection included, over the plain step of torch's fused optimizer / of jitted optax"
    )
    figure.savefig(path, bbox_inches="tight", dpi=110)
    plt.close(figure)
