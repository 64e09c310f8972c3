"""What shaping the update costs over plain fused Adam, on GPT-2 small's shapes: python -m benchmarks.shaping"""

from __future__ import annotations

import torch

from benchmarks.timing import interleaved, ratio, summary
from benchmarks.torch_step import PLAIN
from benchmarks.workloads import shapes
from projgd import RadialBrake, TangentUpdate
from projgd.torch import hyperball, projected


def main() -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes("gpt")]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    adam = torch.optim.Adam
    plain = adam(params, lr=1e-4, fused=True)
    plain.step()
    ways = {
        PLAIN: plain,
        "AdamH": hyperball(adam)(params, lr=1e-4, fused=True),
        "radial brake": projected(adam)(params, lr=1e-4, fused=True, update=RadialBrake()),
        "tangent update": projected(adam)(params, lr=1e-4, fused=True, update=TangentUpdate()),
    }
    for optimizer in ways.values():
        optimizer.state = plain.state  # the same moments
    taken = interleaved({name: optimizer.step for name, optimizer in ways.items()}, 20)
    print(f"{torch.get_num_threads()} threads")
    for name, times in taken.items():
        r = ratio(times, taken[PLAIN])
        print(f"{name:>15}: R {r.median:.2f} ± {r.spread:.2f} ({summary(times).median:.0f} ms)")


if __name__ == "__main__":
    main()
