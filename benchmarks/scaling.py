"""Measure how the cost of a projected step grows: python -m benchmarks.scaling [--studies ...]

The optimizer is SGD, which has the cheapest step and so the largest R, on one tensor or many in PyTorch. The command
measures R and nanoseconds per weight against the number of weights, of tensors, the fan-in, the threads and the share
of neurons on the bound. It writes a table, JSON and a plot to `benchmarks/results/`, and names the sizes that do not
fit into memory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.timing import interleaved, ratio, summary
from benchmarks.torch_step import PLAIN, Contenders, tensors
from benchmarks.workloads import BINDING, BOUNDS, Shape

WAYS = ("fused + renorm_ loop", "projgd, default", "projgd, hook on fused", "projgd, fused, no numba", "projgd, fused")


@dataclass(frozen=True)
class Case:
    """Describe one point of a study; `x` is the number that the study varies."""

    x: float
    shape: Shape
    count: int = 1
    share: float = 0.5
    threads: int = 0  # 0: as many as there are

    @property
    def weights(self) -> int:
        return self.count * math.prod(self.shape)


def cases(study: str) -> Iterator[Case]:
    if study == "weights":
        for exponent in range(8, 19):  # half decades from 10^4 to 10^9
            rows = round(10 ** (exponent / 2 - 3))
            yield Case(1000 * rows, (rows, 1000))
    elif study == "tensors":
        for count in (1, 3, 10, 30, 100, 300, 1000, 3000, 10000):
            yield Case(count, (32768 // count, 32), count)
    elif study == "fan-in":
        for exponent in range(11):
            yield Case(4**exponent, (4 ** (11 - exponent), 4**exponent))
    elif study == "threads":
        for threads in range(1, torch.get_num_threads() + 1):
            yield Case(threads, (10_000, 1000), threads=threads)
    else:
        for percent in (0, 1, 10, 25, 50, 75, 100):
            yield Case(percent, (4096, 1024), share=percent / 100)


STUDIES = {
    "weights": "weights, in one tensor of rows of 1,000",
    "tensors": "tensors, a million weights in rows of 32 in all",
    "fan-in": "fan-in, 4.2 million weights in one tensor",
    "threads": "threads, ten million weights in rows of 1,000",
    "share": "% of the rows on the bound, 4,096 rows of 1,024",
}


def fits(case: Case) -> bool:
    """Return whether parameters, gradients and the needs of a step fit into memory."""
    available = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable"))
    return 1.5 * 8 * case.weights < 1024 * int(available.split()[1])


def measured(study: str, case: Case, seconds: float) -> list[record.Row]:
    contenders = Contenders("SGD", tensors([case.shape] * case.count, case.share))
    steps = contenders.plain() | contenders.projected(BOUNDS[BINDING])
    times = interleaved({way: steps[way] for way in (PLAIN, *WAYS) if way in steps}, seconds, (4, 300))
    rows = []
    for way, taken in times.items():
        ms, r = summary(taken), ratio(taken, times[PLAIN])
        numbers = {"ms": ms.median, "ns": 1e6 * ms.median / case.weights, "R": r.median, "R_spread": r.spread}
        rows.append({"study": study, "x": case.x, "way": way} | {k: float(f"{v:.4g}") for k, v in numbers.items()})
    return rows


def table(rows: list[record.Row]) -> str:
    ways = list(dict.fromkeys(r["way"] for r in rows))
    parts = []
    for study in (s for s in STUDIES if any(r["study"] == s for r in rows)):
        parts.append(f"| {STUDIES[study]} | " + " | ".join(ways) + " |\n" + "|---" * (1 + len(ways)) + "|")
        for x in dict.fromkeys(r["x"] for r in rows if r["study"] == study):
            found = {r["way"]: r for r in rows if (r["study"], r["x"]) == (study, x)}
            cells = [f"{found[w]['R']:.2f} ({found[w]['ns']:.3g} ns)" if w in found else "" for w in ways]
            parts.append(f"| {x:,} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def plot(rows: list[record.Row], path: Path) -> None:
    """Draw R above, and nanoseconds per weight below, in one column per study."""
    import matplotlib.pyplot as plt

    studies = [s for s in STUDIES if any(r["study"] == s for r in rows)]
    figure, axes = plt.subplots(
        2, len(studies), figsize=(4 * len(studies), 7), sharex="col", squeeze=False, layout="constrained"
    )
    for column, study in enumerate(studies):
        for upper, what in ((True, "R"), (False, "ns")):
            ax = axes[0 if upper else 1][column]
            for way in dict.fromkeys(r["way"] for r in rows):
                line = sorted((r["x"], r[what]) for r in rows if (r["study"], r["way"]) == (study, way))
                style = {"color": "black", "linestyle": "--"} if way == PLAIN else {"marker": "o", "markersize": 3}
                ax.plot(*zip(*line, strict=True), label=way, **style)
            ax.set(yscale="log", xscale="linear" if study in ("threads", "share") else "log")
            ax.yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(plt.FuncFormatter(lambda y, _: f"{y:g}"))
            ax.yaxis.set_minor_locator(plt.NullLocator())
            ax.grid(alpha=0.3)
        if study == "threads":
            axes[1][column].set_xticks(sorted({r["x"] for r in rows if r["study"] == study}))
        axes[1][column].set_xlabel(STUDIES[study].replace(", ", ",\n", 1))
    axes[0][0].set_ylabel("R: step / plain step")
    axes[1][0].set_ylabel("ns per weight")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, bbox_inches="tight", dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    parser.add_argument("--seconds", type=float, default=2.0, help="for every point, at least")
    parser.add_argument("--most", type=float, default=1e9, help="weights")
    args = parser.parse_args()
    out, threads = record.RESULTS / "scaling", torch.get_num_threads()
    here = record.machine(threads)
    for study in args.studies:
        found = []
        for case in cases(study):
            if case.weights > args.most or not fits(case):
                print(f"{study}: {case.x:,} does not fit into memory, or was not asked for")
                continue
            torch.set_num_threads(case.threads or threads)
            found += measured(study, case, args.seconds)
        torch.set_num_threads(threads)
        rows = record.merged(out.with_suffix(".json"), here, found, ("study",))
        print(table(found), flush=True)
    out.with_suffix(".md").write_text(f"{table(rows)}\n{record.described(here, rows)}\n")
    plot(rows, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
