"""Measure a projected step on a GPU, R = its time / that of torch's fused plain step: `python -m benchmarks.gpu`.

Three engines are compared: plain operations of PyTorch after the fused step ("eager"), torch.compile of the whole step
("graph"), and one Triton kernel ("triton"). At the end the command prints the decision about triton: an engine stays
only if it makes some cell of the table at least 15 % faster than every simpler one.

The table and JSON go to `benchmarks/results/gpu-DEVICE`. Without a GPU the command says so, and measures nothing. Times
are those of captured steps, replayed, so that they are the device's and not Python's. R of ordinary calls is beside
them. The share of the bandwidth is what the plain step must read and write, over what a large copy moves in the same
time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from benchmarks.record import RESULTS, Row, described, machine, merged
from benchmarks.timing import interleaved, ratio, summary
from benchmarks.torch_step import OPTIMIZERS, PLAIN
from benchmarks.workloads import BINDING, BOUNDS, WORKLOADS, shapes, start

Step = Callable[[], object]
PASSES = {"SGD": 3, "momentum": 5, "Adam": 7, "AdamW": 7}  # passes of the plain step over the parameters
KEY = ("workload", "optimizer", "bound", "engine")
ENGINES = ("eager", "graph", "triton")
FASTER = 0.85  # an engine must take at most this share of the time of every simpler one in some cell
ORDER = ("gpt", "mlp", "resnet", "small")  # deciding workloads come first, because the time may run out


@dataclass(frozen=True)
class Contenders:
    """Hold steps over one set of parameters, gradients and states.

    Attributes:
        params: the parameters.
        steps: the steps by engine; `PLAIN` is torch's fused step.
        projected: the projected optimizers by engine.
        errors: the errors of engines that could not take a step.
    """

    params: list[torch.Tensor]
    steps: dict[str, Step]
    projected: list[Optimizer]
    errors: dict[str, str]


def make(workload: str, optimizer: str) -> Contenders:
    params = []
    for shape in shapes(workload):
        p, g = (torch.from_numpy(x).cuda() for x in start(shape))
        params.append(p.requires_grad_())
        p.grad = g
    torch.compiler.reset()  # torch.compile compiles one method for a few objects only
    stock, ours, options = OPTIMIZERS[optimizer]
    options = options | ({"capturable": True} if "Adam" in optimizer else {})
    plain: Optimizer = stock(params, fused=True, **options)
    plain.step()
    found = Contenders(params, {PLAIN: plain.step}, [], {})
    for engine in ENGINES:
        own = {"fused": True, "engine": engine} if engine != "graph" else {}
        try:
            made: Any = ours(params, c=BOUNDS[BINDING], **options, **own)
            made.state = plain.state
            step = torch.compile(made.step) if engine == "graph" else made.step
            step()
            torch.cuda.synchronize()
        except Exception as error:  # the other engines are measured all the same
            found.errors[engine] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            found.steps[engine] = step
            found.projected.append(made)
    return found


def waited_for(step: Step) -> Step:
    def run() -> None:
        step()
        torch.cuda.synchronize()

    return run


def captured(step: Step) -> Step | None:
    """Return the replay of a captured step; None if it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def launches(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    ran = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum("memcpy" not in e.name.lower() and "memset" not in e.name.lower() for e in ran)


def extra_memory(step: Step) -> float:
    """Return the megabytes at the peak of a step beyond those that were allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def copy_bandwidth() -> float:
    """Return the bytes per millisecond, read and written, of a copy of a gigabyte."""
    a = torch.empty(2**28, device="cuda")
    b = torch.empty_like(a)
    taken = interleaved({"copy": waited_for(lambda: b.copy_(a))}, 1.0)
    return 2 * 4 * a.numel() / summary(taken["copy"]).median


@torch.no_grad()
def is_held(step: Step, params: Sequence[torch.Tensor], c: float) -> bool:
    """Return whether no neuron is longer than c after a step."""
    step()
    norms = [torch.linalg.vector_norm(p.flatten(1), dim=1, dtype=torch.float64).amax() for p in params if p.ndim > 1]
    return bool((torch.stack(norms) <= c).all())


def measure(cell: tuple[str, str, str], found: Contenders, seconds: float, bandwidth: float) -> list[Row]:
    """Return a row for each contender that runs in this cell: a workload, an optimizer and a bound."""
    _, optimizer, bound = cell
    for made in found.projected:
        for group in made.param_groups:
            group["c"] = BOUNDS[bound]
    held = {name: name == PLAIN or is_held(step, found.params, BOUNDS[bound]) for name, step in found.steps.items()}
    called = interleaved({name: waited_for(step) for name, step in found.steps.items()}, seconds)
    counts = {name: (launches(step), extra_memory(step)) for name, step in found.steps.items()}
    graphs = {name: replay for name, step in found.steps.items() if (replay := captured(step)) is not None}
    replayed = interleaved({name: waited_for(replay) for name, replay in graphs.items()}, seconds)
    moved = 4 * PASSES[optimizer] * sum(math.prod(p.shape) for p in found.params)
    rows = []
    for name in found.steps:
        own, base = (replayed[name], replayed[PLAIN]) if name in replayed else (called[name], called[PLAIN])
        rows.append(
            {
                **dict(zip(KEY, (*cell, name), strict=True)),
                "ms": summary(own).median,
                "captured": name in replayed,
                "R": ratio(own, base).median,
                "R_spread": ratio(own, base).spread,
                "R_called": ratio(called[name], called[PLAIN]).median,
                "share_of_copy": moved / summary(own).median / bandwidth,
                "launches": counts[name][0],
                "extra_MB": counts[name][1],
                "held": held[name],
                "copy_GB_per_s": round(bandwidth / 1e6),
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    heads = [*KEY, "ms", "R", "R, called", "of copy bandwidth", "launches", "extra MB", "held"]
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        ms = f"{row['ms']:.3f}" if row["captured"] else f"{row['ms']:.3f} (not captured)"
        times = f"{ms} | {row['R']:.2f} ± {row['R_spread']:.2f} | {row['R_called']:.2f}"
        rest = (
            f"{row['share_of_copy']:.0%} | {row['launches']} | {row['extra_MB']:.1f} | {'yes' if row['held'] else 'NO'}"
        )
        lines.append("| " + " | ".join(str(row[k]) for k in KEY) + f" | {times} | {rest} |")
    return "\n".join(lines)


def decide(rows: Sequence[Row]) -> str:
    """Return the decision about triton: in which cells it is at least 15 % faster than both other engines."""
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[k] for k in KEY[:-1]), {})[row["engine"]] = row
    whole = {cell: by for cell, by in cells.items() if all(engine in by for engine in ENGINES)}
    if not whole:
        return "No decision about triton: there is no cell in which all three engines were measured."
    if any(not by["triton"]["held"] for by in whole.values()):
        return "triton goes, or is repaired: after its step some neuron is longer than c."
    shares = {cell: by["triton"]["R"] / min(by[k]["R"] for k in ENGINES if k != "triton") for cell, by in whole.items()}
    best = min(shares, key=lambda cell: shares[cell])
    won = sum(share <= FASTER for share in shares.values())
    verdict = "triton stays, and may become the default" if won else "triton goes"
    return (
        f"{verdict}: it is at least 15 % faster than both other engines in {won} of {len(whole)} cells. "
        f"Its best cell is {', '.join(best)}, with {shares[best]:.2f} of the time of the faster of the others."
    )


def run(args: argparse.Namespace, record: Callable[[list[Row]], list[Row]], bandwidth: float) -> Mapping[str, str]:
    """Measure and record cell by cell, while there is time; return the errors that engines raised."""
    end, longest, errors = time.monotonic() + 60 * args.minutes, 30.0, {}
    for optimizer in args.optimizers:
        for workload in args.workloads:
            begin = time.monotonic()
            if begin + longest > end:
                print(f"Skipped for lack of time: {workload}, {optimizer}.")
                continue
            found = make(workload, optimizer)
            errors |= {f"{workload}, {optimizer}, {engine}": why for engine, why in found.errors.items()}
            for bound in BOUNDS:
                record(measure((workload, optimizer, bound), found, args.seconds, bandwidth))
            longest = max(longest, time.monotonic() - begin)
            print(f"{workload}, {optimizer}: {time.monotonic() - begin:.0f} s", flush=True)
            del found
            torch.cuda.empty_cache()
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--workloads", nargs="+", default=ORDER, choices=WORKLOADS)
    parser.add_argument("--optimizers", nargs="+", default=["AdamW", "momentum"], choices=list(OPTIMIZERS))
    parser.add_argument("--seconds", type=float, default=1.5, help="for each cell, twice")
    parser.add_argument("--minutes", type=float, default=7.0, help="no workload is begun that would end later")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU here: nothing was measured.")
        return
    name = torch.cuda.get_device_name()
    path = args.out / f"gpu-{name.lower().replace(' ', '-')}"
    here = {**machine(torch.get_num_threads()), "gpu": name}
    bandwidth = copy_bandwidth()
    errors = run(args, lambda rows: merged(path.with_suffix(".json"), here, rows, KEY), bandwidth)
    rows = merged(path.with_suffix(".json"), here, [], KEY)
    failed = "".join(f"\n\n{which} failed: {why}" for which, why in errors.items())
    text = f"{table(rows)}{failed}\n\n{decide(rows)}"
    print(text)
    about = described(here, rows) if rows else ""
    path.with_suffix(".md").write_text(f"{name}, a copy moves {bandwidth / 1e6:.0f} GB/s. {about}\n\n{text}\n")


if __name__ == "__main__":
    main()
