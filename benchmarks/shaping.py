"""Measure what shaping the update costs over plain fused Adam: python -m benchmarks.shaping [--workload gpt]"""

from __future__ import annotations

import argparse

import torch

from benchmarks.timing import interleaved, ratio, summary
from benchmarks.torch_step import PLAIN
from benchmarks.workloads import WORKLOADS, shapes
from projgd import RadialBrake, RelativeUpdate, Sphere, TangentUpdate
from projgd.torch import hyperball, projected


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--workload", choices=WORKLOADS, default="gpt")
    workload = options.parse_args().workload
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes(workload)]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    adam = torch.optim.Adam
    plain = adam(params, lr=1e-4, fused=True)
    plain.step()
    by_neuron = {"constraint": Sphere("initial", axis="fan_in"), "update": RelativeUpdate()}
    ways = {
        "AdamH": hyperball(adam)(params, lr=1e-4, fused=True),
        "by neuron": projected(adam)(params, lr=1e-4, fused=True, **by_neuron),
        "radial brake": projected(adam)(params, lr=1e-4, fused=True, update=RadialBrake()),
        "tangent update": projected(adam)(params, lr=1e-4, fused=True, update=TangentUpdate()),
    }
    for optimizer in ways.values():
        optimizer.state = plain.state  # the same moments
    steps = {PLAIN: plain.step} | {name: optimizer.step for name, optimizer in ways.items()}
    taken = interleaved(steps, 30)
    print(f"{workload}, {torch.get_num_threads()} threads")
    for name, times in taken.items():
        r = ratio(times, taken[PLAIN])
        print(f"{name:>24}: R {r.median:.2f} ± {r.spread:.2f} ({summary(times).median:.1f} ms)")


if __name__ == "__main__":
    main()
