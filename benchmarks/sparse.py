"""Measure the cost of projecting a table with sparse gradients: it depends on the rows of a batch, not on the table.

python -m benchmarks.sparse
"""

from __future__ import annotations

import torch

from benchmarks.timing import interleaved, summary
from projgd.torch import projected

WIDTH, TOUCHED, STEPS = 64, 512, 200
HEIGHTS = (10_000, 100_000, 1_000_000)
OPTIMIZERS = {"SGD": torch.optim.SGD, "SparseAdam": torch.optim.SparseAdam, "Adagrad": torch.optim.Adagrad}


def optimizer_with_gradient(cls: type, height: int, **settings: float) -> torch.optim.Optimizer:
    """Return an optimizer of one table, whose gradient has `TOUCHED` rows that leave the ball at every step."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(height, WIDTH, sparse=True)
    optimizer = cls(table.parameters(), lr=1.0, **settings)
    table(torch.randint(height, (TOUCHED,))).square().sum().neg().backward()
    table.weight.grad = table.weight.grad.coalesce()
    return optimizer


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':12}{'height':>10}{'plain, µs':>12}{'projected, µs':>15}{'projection / step':>19}")
    for name, cls in OPTIMIZERS.items():
        for height in HEIGHTS:
            plain = optimizer_with_gradient(cls, height)
            ours = optimizer_with_gradient(projected(cls), height, c=4.0)
            taken = interleaved({"plain": plain.step, "ours": ours.step}, 0, rounds=(STEPS, STEPS))
            a, b = (1e3 * summary(times).median for times in taken.values())
            print(f"{name:12}{height:>10,}{a:>12.0f}{b:>15.0f}{(b - a) / a:>19.2f}")


if __name__ == "__main__":
    main()
