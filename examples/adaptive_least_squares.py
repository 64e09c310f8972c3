"""Show where projected Adam ends: at the constrained optimum in its own metric, beside it in the Euclidean one.

The problem is min ½‖Ax - b‖²/n over ‖x‖ ≤ 1 with 2,000 rows and 20 features scaled from 0.1 to 10. It is convex, and
the secular equation gives its optimum f*. AdaGrad, RMSprop and Adam take 6,000 steps, with full gradients and with
batches of 32, each with two learning rates, of which the better counts. The script prints a table, and writes the
curves and a picture in two dimensions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from projgd import MaxNorm
from projgd.optax import projected

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

OPTIMIZERS: dict[str, tuple[Callable[..., Any], tuple[float, float]]] = {
    "AdaGrad": (optax.adagrad, (0.1, 0.3)),
    "RMSprop": (optax.rmsprop, (1e-3, 1e-2)),
    "Adam": (optax.adam, (1e-3, 1e-2)),
}
METRICS = {"euclidean": "tab:orange", "adaptive": "tab:blue"}
BALL = MaxNorm(1.0, axis=None)


def problem(rows: int = 2000, columns: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    scales = rng.permutation(np.logspace(-1, 1, columns))
    a = rng.standard_normal((rows, columns)) * scales
    return a, a @ (3 * rng.standard_normal(columns) / np.sqrt(scales)) + rng.standard_normal(rows)


def optimum(hessian: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """Return argmin ½xᵀHx - qᵀx over ‖x‖ = 1: x = (H + λ)⁻¹q with the λ ≥ 0 that gives norm 1, by bisection."""
    values, vectors = np.linalg.eigh(hessian)
    turned = vectors.T @ linear
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.linalg.norm(turned / (values + middle)) > 1 else (low, middle)
    return vectors @ (turned / (values + high))


def path(gradient: Callable[..., Any], optimizer: Any, start: Any, steps: int) -> np.ndarray:
    """Return all iterates of the optimizer; `gradient` takes the point and a random key."""

    def step(carry: Any, key: Any) -> tuple[Any, Any]:
        x, state = carry
        updates, state = optimizer.update(gradient(x, key), state, x)
        x = optax.apply_updates(x, updates)
        return (x, state), x

    keys = jax.random.split(jax.random.key(0), steps)
    run = jax.jit(lambda x: jax.lax.scan(step, (x, optimizer.init(x)), keys)[1])
    return np.concatenate([np.asarray(start)[None], run(start)])


def compare(steps: int, out: Path) -> Table:
    a, b = problem()
    hessian, linear, n = a.T @ a / len(a), a.T @ b / len(a), len(a)

    def value(x: np.ndarray) -> np.ndarray:
        return ((x @ hessian) * x).sum(-1) / 2 - x @ linear + b @ b / n / 2

    best = value(optimum(hessian, linear))
    batches, targets = jnp.asarray(a), jnp.asarray(b)

    def full(x: Any, key: Any) -> Any:
        return hessian @ x - linear

    def mini(x: Any, key: Any) -> Any:
        rows = jax.random.randint(key, (32,), 0, n)
        return batches[rows].T @ (batches[rows] @ x - targets[rows]) / 32

    title = f"f - f* after {steps} steps; f(0) = {value(np.zeros(20)):.1f}, f* = {best:.2f}"
    table = Table("gradients", "projection", *OPTIMIZERS, title=title)
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True, constrained_layout=True)
    with Progress() as progress:
        task = progress.add_task("least squares", total=4 * 2 * len(OPTIMIZERS))
        for kind, gradient in (("full", full), ("batches of 32", mini)):
            for metric, color in METRICS.items():
                row = []
                for panel, (name, (make, rates)) in zip(panels, OPTIMIZERS.items(), strict=True):
                    gaps = []
                    for rate in rates:
                        tx = projected(make(rate), BALL, metric=metric)
                        gaps.append(value(path(gradient, tx, jnp.zeros(20), steps)) - best)
                        progress.advance(task)
                    gap = min(gaps, key=lambda g: g[-100:].mean())
                    row.append(f"{gap[-100:].mean():.2g}")  # of the last 100 iterates: mini-batches are noisy
                    line = "-" if kind == "full" else ":"
                    panel.semilogy(np.maximum(gap, 1e-13), line, color=color, label=f"{metric}, {kind}", lw=1.2)
                    panel.set(title=name, xlabel="step")
                table.add_row(kind, metric, *row)
    panels[0].set_ylabel("f - f*")
    panels[2].legend(fontsize=8)
    figure.savefig(out / "adaptive_least_squares.png", dpi=110)
    return table


def picture(out: Path) -> None:
    """Draw in two dimensions the level sets, the ball, and where AdaGrad ends in either metric."""
    hessian, linear = np.asarray([[8.0, 1.0], [1.0, 0.25]]), np.asarray([12.0, 3.0])
    figure, panel = plt.subplots(figsize=(5.2, 5), constrained_layout=True)
    grid = np.stack(np.meshgrid(np.linspace(-0.25, 1.3, 300), np.linspace(-0.25, 1.3, 300)), -1)
    levels = ((grid @ hessian) * grid).sum(-1) / 2 - grid @ linear
    best = optimum(hessian, linear)
    angle = np.linspace(0, 2 * np.pi, 400)
    panel.contour(*np.moveaxis(grid, -1, 0), levels, levels=25, colors="0.8", linewidths=0.8, linestyles="-")
    panel.fill(np.cos(angle), np.sin(angle), color="tab:green", alpha=0.12)
    panel.plot(np.cos(angle), np.sin(angle), color="tab:green", lw=1)
    for metric, color in METRICS.items():
        tx = projected(optax.adagrad(0.05), BALL, metric=metric)
        points = path(lambda x, key: hessian @ x - linear, tx, jnp.asarray([0.1, 0.0]), 3000)
        panel.plot(*points.T, ".-", color=color, ms=3, lw=1, label=f"AdaGrad, {metric} projection")
        panel.plot(*points[-1], "o", color=color, ms=9)
        away = linear - hessian @ points[-1]
        panel.annotate("", points[-1] + 0.25 * away / np.linalg.norm(away), points[-1], arrowprops={"arrowstyle": "->"})
    panel.plot(*best, "k*", ms=8, label="constrained optimum", zorder=5)
    panel.set(xlim=(-0.25, 1.3), ylim=(-0.25, 1.3), aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    panel.set_title("Arrows: $-\\nabla f$; at the optimum it is normal to the ball", fontsize=10)
    panel.legend(loc="lower left", fontsize=8)
    figure.savefig(out / "adaptive_picture.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plots (default out)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    Console().print(compare(args.steps, args.out))
    picture(args.out)


if __name__ == "__main__":
    main()
