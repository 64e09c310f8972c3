"""Train a sparse autoencoder whose dictionary has unit norm, with and without tangent gradients.

The activations are those of the transformer that `hyperball_lm.py` trained (run that first). An autoencoder writes each
activation as a sparse sum of dictionary vectors, the columns of its decoder. Without a bound on their norm it could
lower the sparsity penalty by large dictionary vectors and small codes, so every step projects them to norm 1. This
undoes the radial part of the gradient, but Adam's moments keep it: `gradient="tangent"` removes it first (Bricken et
al. 2023, "Towards Monosemanticity"). The script compares three dictionaries: free, unit norm, and unit norm with
tangent gradients.

    python examples/sae.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import hyperball_lm as lm
import torch
from rich.progress import Progress
from torch import nn

from projgd import UnitNorm
from projgd.torch import ProjectedAdam

COLUMNS = UnitNorm(axis=0)  # a Linear's weight is (out, in): a dictionary vector runs along the outputs
WAYS: dict[str, dict[str, Any]] = {
    "free": {},
    "unit norm": {"constraint": COLUMNS},
    "unit norm, tangent gradients": {"constraint": COLUMNS, "gradient": "tangent"},
}


class Autoencoder(nn.Module):
    """Compute x ≈ decoder(relu(encoder(x))), with sparse codes."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(width, features)
        self.decoder = nn.Linear(features, width)
        with torch.no_grad():
            self.decoder.weight.copy_(COLUMNS.project(self.decoder.weight))
            self.encoder.weight.copy_(self.decoder.weight.T)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes = torch.relu(self.encoder(x))
        return self.decoder(codes), codes


def activations(weights: Path, width: int, count: int) -> torch.Tensor:
    """Return the residual stream of the trained transformer on text, scaled to an average norm of √width."""
    model = lm.Transformer(width)
    model.load_state_dict(torch.load(weights))
    data, seed = lm.standard_library()[0], torch.Generator().manual_seed(3)
    with torch.no_grad():
        x = torch.cat([model.hidden(lm.batch(data, 64, seed)[0]).flatten(0, 1) for _ in range(-(-count // 4096))])
    x = x - x.mean(0)
    return x * (width**0.5 / x.norm(dim=1).mean())


def train(way: str, x: torch.Tensor, steps: int, sparsity: float, tick: Any) -> list[dict[str, float]]:
    """Return the losses, and the norms of the dictionary, at a hundred steps."""
    torch.manual_seed(0)
    model = Autoencoder(x.shape[1], 4 * x.shape[1])
    rest = [model.encoder.weight, model.encoder.bias, model.decoder.bias]
    opt = ProjectedAdam([{"params": rest}, {"params": [model.decoder.weight], **WAYS[way]}], lr=1e-3)
    history = []
    for step in range(steps):
        batch = x[torch.randint(len(x), (512,))]
        rebuilt, codes = model(batch)
        error = (rebuilt - batch).square().sum(1).mean() / batch.square().sum(1).mean()
        penalty = codes.sum(1).mean() / x.shape[1] ** 0.5
        opt.zero_grad()
        (error + sparsity * penalty).backward()
        weight, grad = model.decoder.weight.detach(), model.decoder.weight.grad
        radial = float(((weight * grad).sum(0) / weight.norm(dim=0)).norm() / grad.norm())
        opt.step()
        if step % max(1, steps // 100) == 0 or step == steps - 1:
            norms, active = model.decoder.weight.detach().norm(dim=0), float((codes > 0).sum(1).float().mean())
            history.append(
                {"step": step, "error": float(error), "penalty": float(penalty), "active": active, "radial": radial,
                 "norm_min": float(norms.min()), "norm_mean": float(norms.mean()), "norm_max": float(norms.max())}
            )  # fmt: skip
        tick()
    return history


def plot(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for (way, history), style in zip(runs.items(), ("-", "--", ":"), strict=True):
        steps = [h["step"] for h in history]
        panes[0].plot(steps, [h["error"] for h in history], style, label=way)
        panes[1].plot(steps, [h["active"] for h in history], style, label=way)
        (line,) = panes[2].plot(steps, [h["norm_mean"] for h in history], style, label=way)
        low, high = [h["norm_min"] for h in history], [h["norm_max"] for h in history]
        panes[2].fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    panes[0].set(title="reconstruction error (share of variance)", xlabel="step", yscale="log")
    panes[1].set(title="active features per activation", xlabel="step", yscale="log")
    panes[2].set(title="norms of the dictionary: mean, range", xlabel="step")
    panes[2].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--sparsity", type=float, default=0.3)
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--out", type=Path, default=Path("out/sae"))
    options.add_argument("--weights", type=Path, help="default: the best of out/hyperball_lm")
    given = options.parse_args()
    weights = given.weights or Path(f"out/hyperball_lm/best-{given.width}.pt")
    if not weights.exists():
        options.error(f"{weights} does not exist: run examples/hyperball_lm.py first")
    given.out.mkdir(parents=True, exist_ok=True)
    x, runs = activations(weights, given.width, 100_000), {}
    with Progress() as bar:
        for way in WAYS:
            log = given.out / f"{way.replace(' ', '-').replace(',', '')}-{given.steps}-{given.sparsity}.json"
            task = bar.add_task(way, total=given.steps)
            if log.exists():  # interrupted: what is finished stays
                bar.update(task, completed=given.steps)
            else:
                log.write_text(json.dumps(train(way, x, given.steps, given.sparsity, lambda t=task: bar.advance(t))))
            runs[way] = json.loads(log.read_text())
    print("| dictionary | error | active | penalty | norms | radial share of the gradient |")
    print("|" + " --- |" * 6)
    for way, history in runs.items():
        last = [sum(h[k] for h in history[-10:]) / 10 for k in ("error", "active", "penalty", "radial")]
        spread = f"{history[-1]['norm_min']:.6f} to {history[-1]['norm_max']:.6f}"
        print(f"| {way} | {last[0]:.4f} | {last[1]:.1f} | {last[2]:.3f} | {spread} | {last[3]:.2f} |")
    plot(runs, given.out / "sae.png")
    print(f"plot: {given.out / 'sae.png'}")


if __name__ == "__main__":
    main()
