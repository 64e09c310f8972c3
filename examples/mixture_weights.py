"""Estimate mixture weights: each row of W is a distribution over known components, held on the simplex.

Each of 200 documents has 400 words from a vocabulary of 100, drawn from a mixture of 3 out of 12 known distributions.
SGD maximises the likelihood of the weights, in PyTorch and JAX: `Simplex()` holds every row at w ≥ 0 and Σ w = 1. The
common alternative trains logits of a softmax with the same optimizer, at the best of six rates. It never reaches 0. The
EM algorithm in float64 finds the same optimum independently, since the problem is convex. The script prints a table and
writes out/mixture_weights.png.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # figures are the same on every machine then

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import torch
from rich.console import Console
from rich.table import Table

from projgd import Simplex
from projgd.optax import projection
from projgd.torch import ProjectedSGD

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COMPONENTS, VOCABULARY, WORDS, PRESENT = 12, 100, 400, 3
MOMENTUM = 0.9


def documents(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the components, the true weights, and the frequencies of words in each document."""
    rng = np.random.default_rng(0)
    components = rng.dirichlet(np.full(VOCABULARY, 0.3), COMPONENTS)
    components = 0.98 * components + 0.02 / VOCABULARY  # no word is impossible
    weights = np.zeros((count, COMPONENTS))
    for row in weights:
        row[rng.permutation(COMPONENTS)[:PRESENT]] = rng.dirichlet(np.full(PRESENT, 2.0))
    counts = np.stack([rng.multinomial(WORDS, row @ components) for row in weights])
    return components, weights, counts / WORDS


def by_em(components: np.ndarray, frequencies: np.ndarray, steps: int) -> np.ndarray:
    """Return the weights of largest likelihood: w ← w · (f / (w P)) Pᵀ, in float64."""
    weights = np.full((len(frequencies), COMPONENTS), 1 / COMPONENTS)
    for _ in range(steps):
        weights = weights * ((frequencies / (weights @ components)) @ components.T)
    return weights


def loss_of(weights: Any, components: Any, frequencies: Any, xp: Any) -> Any:
    """Return -Σ f log(w P), summed over documents."""
    return -(frequencies * xp.log(weights @ components)).sum()


def in_torch(components: np.ndarray, frequencies: np.ndarray, steps: int, rate: float) -> tuple[np.ndarray, list]:
    p, f = (torch.tensor(x, dtype=torch.float32) for x in (components, frequencies))
    weights = torch.full((len(f), COMPONENTS), 1 / COMPONENTS, requires_grad=True)
    optimizer = ProjectedSGD([weights], lr=rate, momentum=MOMENTUM, constraint=Simplex(axis=1))
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(weights, p, f, torch).backward()
        optimizer.step()
        losses.append(loss_of(weights.detach().double().numpy(), components, frequencies, np))
    return weights.detach().numpy(), losses


def in_jax(
    components: np.ndarray, frequencies: np.ndarray, steps: int, rate: float, softmax: bool = False
) -> tuple[np.ndarray, list]:
    """Return the weights and the losses; with `softmax` the parameters are logits, and nothing is projected."""
    p, f = (jnp.asarray(x, jnp.float32) for x in (components, frequencies))
    params = jnp.full((len(f), COMPONENTS), 0.0 if softmax else 1 / COMPONENTS)
    held = optax.identity() if softmax else projection(Simplex(axis=-1))
    tx = optax.chain(optax.sgd(rate, momentum=MOMENTUM), held)

    def weights_of(params: jax.Array) -> jax.Array:
        return jax.nn.softmax(params, axis=-1) if softmax else params

    @jax.jit
    def step(params: jax.Array, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        grads = jax.grad(lambda q: loss_of(weights_of(q), p, f, jnp))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, losses = tx.init(params), []
    for _ in range(steps):
        params, state = step(params, state)
        losses.append(loss_of(np.asarray(weights_of(params), np.float64), components, frequencies, np))
    return np.asarray(weights_of(params)), losses


def plot(true: np.ndarray, best: float, found: dict[str, tuple[np.ndarray, list]], path: Path) -> None:
    figure, panels = plt.subplots(1, 4, figsize=(13, 4), layout="constrained", width_ratios=(1, 1, 1, 1.5))
    shown = {"true weights": true} | {name: weights for name, (weights, _) in found.items() if "JAX" not in name}
    for panel, (name, weights) in zip(panels, shown.items(), strict=False):
        with np.errstate(divide="ignore"):
            image = panel.imshow(np.log10(weights[:25]), vmin=-6, vmax=0, cmap="viridis", aspect="auto")
        panel.set_facecolor("white")  # zeros
        panel.set(title=name, xlabel="component", yticks=[], xticks=range(0, COMPONENTS, 2))
    panels[0].set_ylabel("document")
    figure.colorbar(image, ax=panels[2], label="log₁₀ w (white: exactly 0)")
    for name, (_, losses) in found.items():
        panels[3].loglog(np.arange(1, len(losses) + 1), np.maximum(np.asarray(losses) - best, 1e-5), label=name)
    panels[3].set(title="loss above the optimum (float32 sees 1e-5)", xlabel="step")
    panels[3].legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--quick", action="store_true", help="20 documents, 100 steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    count, steps = (20, 100) if args.quick else (args.documents, args.steps)
    components, true, frequencies = documents(count)
    reference = by_em(components, frequencies, 20 * steps)
    best = loss_of(reference, components, frequencies, np)
    found = {
        "Simplex, PyTorch": in_torch(components, frequencies, steps, args.rate),
        "softmax": in_jax(components, frequencies, steps, 100 * args.rate, softmax=True),
        "Simplex, JAX": in_jax(components, frequencies, steps, args.rate),
    }
    table = Table("weights", "loss - optimum", "largest distance to EM", "zeros", "largest |Σ w - 1|")
    for name, weights in [(name, w) for name, (w, _) in found.items()] + [("EM, float64", reference)]:
        wide = weights.astype(np.float64)
        gap, away = loss_of(wide, components, frequencies, np) - best, np.abs(wide - reference).max()
        sums = np.abs(wide.sum(1) - 1).max()
        table.add_row(name, f"{gap:.1e}", f"{away:.1e}", f"{(weights == 0).mean():.0%}", f"{sums:.0e}")
    Console().print(table)
    print(f"zeros in the true weights: {(true == 0).mean():.0%}")
    plot(true, best, found, args.out / "mixture_weights.png")
    print(f"picture: {args.out / 'mixture_weights.png'}")


if __name__ == "__main__":
    main()
