"""What AdamH costs over Adam: R = time of a step / time of the plain step (`fused=True`), on GPT-2 small's shapes.

python -m benchmarks.shaping
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from projgd import RadialBrake, TangentUpdate
from projgd.torch import hyperball, projected

BLOCK = [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), *[(768,)] * 5]
GPT = [(50257, 768), (1024, 768), *BLOCK * 12, (768,), (768,)]


def fastest(step: Callable[[], object], times: int = 5) -> float:
    step()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return min(found)


def main() -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in GPT]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    plain = torch.optim.Adam(params, lr=1e-4, fused=True)
    fastest(plain.step)
    ways = {
        "AdamH": hyperball(torch.optim.Adam)(params, lr=1e-4, fused=True),
        "radial brake": projected(torch.optim.Adam)(params, lr=1e-4, fused=True, update=RadialBrake()),
        "tangent update": projected(torch.optim.Adam)(params, lr=1e-4, fused=True, update=TangentUpdate()),
    }
    size = sum(p.numel() for p in params) * 4 / 2**20
    print(f"{torch.get_num_threads()} threads, parameters {size:.0f} MiB")
    for name, optimizer in ways.items():
        optimizer.state = plain.state  # the same moments
        base, own = fastest(plain.step), fastest(optimizer.step)
        print(f"{name:>15}: R {own / base:.2f} ({1e3 * own:.0f} ms against {1e3 * base:.0f})")


if __name__ == "__main__":
    main()
