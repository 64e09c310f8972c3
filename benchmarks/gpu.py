"""`python -m benchmarks.gpu`: what a projected step costs on a GPU, R = its time / that of torch's fused plain one.

Writes a table and JSON to `benchmarks/results/gpu-DEVICE`; without a GPU it says so, and measures nothing. Times are
those of captured steps, replayed, so that they are the device's and not Python's; beside them R of ordinary calls. The
share of the bandwidth: what the plain step must read and write, over what a large copy moves in the same time.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import RESULTS, described, machine, merged
from benchmarks.timing import interleaved, ratio, summary
from benchmarks.torch_step import OPTIMIZERS, PLAIN
from benchmarks.workloads import BOUNDS, WORKLOADS, shapes, start
from projgd import MaxNorm
from projgd.torch import project_after_step

Step = Callable[[], object]
PASSES = {"SGD": 3, "momentum": 5, "Adam": 7, "AdamW": 7}  # over the parameters, in the plain step
KEY = ("workload", "optimizer", "bound", "contender")


def contenders(optimizer: str, params: list[torch.Tensor], c: float) -> dict[str, Step]:
    stock, ours, options = OPTIMIZERS[optimizer]
    options = {**options, "fused": True} | ({"capturable": True} if "Adam" in optimizer else {})
    plain = stock(params, **options)
    plain.step()

    def sharing(cls: Any, **extra: Any) -> Any:
        made = cls(params, **options, **extra)
        made.state = plain.state
        return made

    hooked = sharing(stock)
    project_after_step(hooked, MaxNorm(c))

    @torch.no_grad()
    def keras_style() -> None:
        plain.step()
        for p in params:
            if p.ndim > 1:
                norm = p.square().sum(dim=tuple(range(1, p.ndim)), keepdim=True).sqrt()
                p.mul_(norm.clamp(0, c) / (norm + 1e-7))

    return {
        PLAIN: plain.step,
        "fused + Keras-style loop": keras_style,
        "fused + projgd's projection": hooked.step,
        "projgd, fused": sharing(ours, c=c).step,
    }


def waited_for(step: Step) -> Step:
    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


def captured(step: Step) -> Step:
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def launches(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    ran = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum("memcpy" not in e.name.lower() and "memset" not in e.name.lower() for e in ran)


def extra_memory(step: Step) -> float:
    """Megabytes beyond what was allocated before the step, at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def copy_bandwidth() -> float:
    """Bytes per millisecond, read and written, of a copy of a gigabyte."""
    a = torch.empty(2**28, device="cuda")
    b = torch.empty_like(a)
    taken = interleaved({"copy": waited_for(lambda: b.copy_(a))}, 1.0)
    return 2 * 4 * a.numel() / summary(taken["copy"]).median


def measure(workload: str, optimizer: str, bound: str, seconds: float, bandwidth: float) -> list[dict[str, Any]]:
    params = []
    for shape in shapes(workload):
        p, g = (torch.from_numpy(x).cuda() for x in start(shape))
        params.append(p.requires_grad_())
        p.grad = g
    steps = contenders(optimizer, params, BOUNDS[bound])
    called = interleaved({name: waited_for(step) for name, step in steps.items()}, seconds)
    counts = {name: (launches(step), extra_memory(step)) for name, step in steps.items()}
    replayed = interleaved({name: waited_for(captured(step)) for name, step in steps.items()}, seconds)
    moved = 4 * PASSES[optimizer] * sum(math.prod(p.shape) for p in params)
    rows = []
    for name in steps:
        time, r, call = (
            summary(replayed[name]),
            ratio(replayed[name], replayed[PLAIN]),
            ratio(called[name], called[PLAIN]),
        )
        rows.append(
            {
                **dict(zip(KEY, (workload, optimizer, bound, name), strict=True)),
                "ms": time.median,
                "R": r.median,
                "R_spread": r.spread,
                "R_called": call.median,
                "share_of_copy": moved / time.median / bandwidth,
                "launches": counts[name][0],
                "extra_MB": counts[name][1],
                "copy_GB_per_s": round(bandwidth / 1e6),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    heads = [*KEY, "ms", "R", "R, called", "of copy bandwidth", "launches", "extra MB"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        times = f"{row['ms']:.3f} | {row['R']:.2f} ± {row['R_spread']:.2f} | {row['R_called']:.2f}"
        rest = f"{row['share_of_copy']:.0%} | {row['launches']} | {row['extra_MB']:.1f}"
        lines.append("| " + " | ".join(str(row[k]) for k in KEY) + f" | {times} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, choices=WORKLOADS)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--seconds", type=float, default=2.0, help="for each set of contenders, twice")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.")
        return
    name = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth()
    rows = []
    for workload in args.workloads:
        for optimizer in args.optimizers:
            for bound in BOUNDS:
                rows += measure(workload, optimizer, bound, args.seconds, bandwidth)
    path = args.out / f"gpu-{name.lower().replace(' ', '-')}"
    here = {**machine(torch.get_num_threads()), "gpu": name}
    rows = merged(path.with_suffix(".json"), here, rows, KEY)
    text = table(rows)
    print(text)
    path.with_suffix(".md").write_text(
        f"{name}, a copy moves {bandwidth / 1e6:.0f} GB/s. {described(here, rows)}\n\n{text}\n"
    )


if __name__ == "__main__":
    main()
