"""`python -m benchmarks [--quick]`: what a projected step costs against torch's fused plain one, R = projected / plain.

Writes a table, JSON and a plot to `benchmarks/results/`. Nothing is asserted: the figures are the machine's.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import FREE, OPTIMIZERS, PLAIN, tensors, torch_steps
from benchmarks.timing import interleaved, machine, ratio, summary

WORKLOADS = ("mlp", "small", "resnet", "gpt")
BOUNDS = {"binding": 1.0, "free": FREE}


def measure(workload: str, optimizer: str, bound: str, seconds: float, compiled: bool) -> list[dict[str, Any]]:
    steps = torch_steps(optimizer, tensors(workload), BOUNDS[bound], compiled)
    taken = interleaved(steps, seconds)
    rows = []
    for name, values in taken.items():
        time, r = summary(values), ratio(values, taken[PLAIN])
        where = {"workload": workload, "optimizer": optimizer, "bound": bound, "contender": name}
        numbers = {"ms": time.median, "ms_spread": time.spread, "R": r.median, "R_spread": r.spread}
        rows.append(where | numbers | {"rounds": len(values)})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys((r["workload"], r["bound"]) for r in rows))
    lines = ["| optimizer | contender | " + " | ".join(f"{w}, {b}" for w, b in columns) + " |"]
    lines.append("|" + " --- |" * (len(columns) + 2))
    for optimizer, contender in dict.fromkeys((r["optimizer"], r["contender"]) for r in rows):
        mine = {
            (r["workload"], r["bound"]): r for r in rows if (r["optimizer"], r["contender"]) == (optimizer, contender)
        }
        cells = [f"{mine[c]['R']:.2f} ± {mine[c]['R_spread']:.2f}" if c in mine else "" for c in columns]
        lines.append(f"| {optimizer} | {contender} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["bound"] == "binding" and not r["contender"].startswith("plain")]
    optimizers = list(dict.fromkeys(r["optimizer"] for r in rows))
    figure, axes = plt.subplots(1, len(optimizers), figsize=(4 * len(optimizers), 4), sharey=True, squeeze=False)
    for ax, optimizer in zip(axes[0], optimizers, strict=True):
        mine = [r for r in rows if r["optimizer"] == optimizer]
        for name in dict.fromkeys(r["contender"] for r in mine):
            line = [r for r in mine if r["contender"] == name]
            ax.plot([r["workload"] for r in line], [r["R"] for r in line], "o", label=name)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set(title=optimizer, yscale="log")
    axes[0][0].set_ylabel("R: time of the step / torch's fused plain one")
    axes[0][-1].legend(fontsize="small")
    figure.savefig(path, bbox_inches="tight", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under two minutes: SGD and Adam, fewer rounds")
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile (minutes to warm up)")
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--optimizers", nargs="+", default=None, choices=list(OPTIMIZERS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    optimizers = args.optimizers or (["sgd", "adam"] if args.quick else list(OPTIMIZERS))
    rows: list[dict[str, Any]] = []
    for workload in args.workloads:
        for optimizer in optimizers:
            for bound in BOUNDS:
                rows += measure(workload, optimizer, bound, 1.5 if args.quick else 8.0, args.compiled)
    text = table(rows)
    print(text)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(args.threads), "rows": rows}
    args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(text + "\n")
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
