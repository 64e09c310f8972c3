"""The cost of projecting a table with sparse gradients: with the rows that a batch touches, not with its height.

python -m benchmarks.sparse
"""

import statistics
import time

import torch

from projgd.torch import projected

WIDTH, TOUCHED, STEPS = 64, 512, 200
HEIGHTS = (10_000, 100_000, 1_000_000)
OPTIMIZERS = {"SGD": torch.optim.SGD, "SparseAdam": torch.optim.SparseAdam, "Adagrad": torch.optim.Adagrad}


def optimizer_with_gradient(cls, height, **settings):
    """An optimizer of one table, whose gradient has `TOUCHED` rows that leave the ball at every step."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(height, WIDTH, sparse=True)
    optimizer = cls(table.parameters(), lr=1.0, **settings)
    table(torch.randint(height, (TOUCHED,))).square().sum().neg().backward()
    table.weight.grad = table.weight.grad.coalesce()
    for _ in range(3):
        optimizer.step()
    return optimizer


def microseconds(optimizers):
    """Median time of a step of each; they take turns, so that all see the same machine."""
    times = [[] for _ in optimizers]
    for _ in range(STEPS):
        for optimizer, taken in zip(optimizers, times, strict=True):
            start = time.perf_counter()
            optimizer.step()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) * 1e6 for taken in times]


def main():
    torch.set_num_threads(1)
    print(f"{'':12}{'height':>10}{'plain, µs':>12}{'projected, µs':>15}{'projection / step':>19}")
    for name, cls in OPTIMIZERS.items():
        for height in HEIGHTS:
            plain = optimizer_with_gradient(cls, height)
            ours = optimizer_with_gradient(projected(cls), height, c=4.0)
            a, b = microseconds([plain, ours])
            print(f"{name:12}{height:>10,}{a:>12.0f}{b:>15.0f}{(b - a) / a:>19.2f}")


if __name__ == "__main__":
    main()
