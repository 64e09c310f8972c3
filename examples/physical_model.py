"""Fit a damped oscillator to a short noisy record, with bounds from physics and without.

The model is x(t) = exp(-γ t) (p cos ωt + q sin ωt), in which the damping γ cannot be negative and the frequency ω is
known to lie between 1.5 and 2.5. `Box` holds both, entry by entry; p and q are free. The record is too short to tell a
small damping from none, so without the bound the best fit often has a negative damping, and its prediction grows
without end. Adam finds both fits, in PyTorch and JAX, and scipy's least squares with the same bounds checks them. The
script prints a table and writes out/physical_model.png.
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
from scipy.optimize import least_squares

from projgd import Box
from projgd.optax import projection
from projgd.torch import ProjectedAdam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

NAMES = ("p", "q", "γ", "ω")
TRUE = np.asarray([1.0, 0.3, 0.02, 2.0])
START = np.asarray([0.5, 0.0, 0.2, 1.8])
LOW, HIGH = [-np.inf, -np.inf, 0.0, 1.5], [np.inf, np.inf, np.inf, 2.5]
PHYSICS = Box(LOW, HIGH)  # one bound for each entry, and none where it is infinite
NOISE, END = 0.25, 6.0


def model(theta: Any, t: Any, xp: Any) -> Any:
    p, q, damping, frequency = theta
    return xp.exp(-damping * t) * (p * xp.cos(frequency * t) + q * xp.sin(frequency * t))


def record(seed: int, points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    t = np.linspace(0, END, points)
    return t, model(TRUE, t, np) + NOISE * np.random.default_rng(seed).standard_normal(points)


def in_torch(t: np.ndarray, x: np.ndarray, constraint: Box | None, steps: int) -> np.ndarray:
    times, data = torch.from_numpy(t), torch.from_numpy(x)
    theta = torch.tensor(START, requires_grad=True)
    bounds: dict[str, Any] = {"c": None} if constraint is None else {"constraint": constraint}
    optimizer = ProjectedAdam([theta], lr=0.02, **bounds)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(theta, times, torch) - data).square().mean().backward()
        optimizer.step()
        schedule.step()
    return theta.detach().numpy()


def in_jax(t: np.ndarray, x: np.ndarray, constraint: Box | None, steps: int) -> np.ndarray:
    held = optax.identity() if constraint is None else projection(constraint)
    tx = optax.chain(optax.adam(optax.cosine_decay_schedule(0.02, steps)), held)

    def loss(theta: jax.Array) -> jax.Array:
        return jnp.square(model(theta, t, jnp) - x).mean()

    @jax.jit
    def run(theta: jax.Array) -> jax.Array:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            theta, state = carry
            updates, state = tx.update(jax.grad(loss)(theta), state, theta)
            return (optax.apply_updates(theta, updates), state), None

        return jax.lax.scan(step, (theta, tx.init(theta)), length=steps)[0][0]

    return np.asarray(run(jnp.asarray(START)))


def in_scipy(t: np.ndarray, x: np.ndarray, constraint: Box | None) -> np.ndarray:
    bounds = (-np.inf, np.inf) if constraint is None else (LOW, HIGH)
    return least_squares(lambda theta: model(theta, t, np) - x, START, bounds=bounds, xtol=1e-14, ftol=1e-14).x


def plot(t: np.ndarray, x: np.ndarray, fits: dict[str, np.ndarray], path: Path) -> None:
    figure, panel = plt.subplots(figsize=(9, 3.6), layout="constrained")
    later = np.linspace(0, 5 * END, 1200)
    panel.axvspan(0, END, color="0.93")
    panel.plot(later, model(TRUE, later, np), color="0.6", lw=3, label=f"truth, γ = {TRUE[2]:.3f}")
    for (name, theta), color in zip(fits.items(), ("tab:red", "tab:blue"), strict=True):
        panel.plot(later, model(theta, later, np), color=color, lw=1.2, label=f"{name}, γ = {theta[2]:.3f}")
    panel.plot(t, x, "k.", ms=4, label="record")
    panel.set(xlabel="time", ylabel="x", ylim=(-4, 4), xlim=(0, 5 * END))
    panel.legend(loc="upper left", fontsize=8, ncols=4)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=8, help="of the noise; scipy also fits 100 others")
    parser.add_argument("--quick", action="store_true", help="500 steps, 5 other records")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture (default out)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps, others = (500, 5) if args.quick else (args.steps, 100)
    t, x = record(args.seed)
    later = np.linspace(END, 5 * END, 1000)
    table = Table("bounds", "fit", *NAMES, "rms error on the record", "of the prediction")
    fits = {}
    for bounds, constraint in (("none", None), ("from physics", PHYSICS)):
        found = {
            "projgd, PyTorch": in_torch(t, x, constraint, steps),
            "projgd, JAX": in_jax(t, x, constraint, steps),
            "scipy": in_scipy(t, x, constraint),
        }
        fits[f"bounds: {bounds}"] = found["projgd, PyTorch"]
        for name, theta in found.items():
            errors = [model(theta, t, np) - x, model(theta, later, np) - model(TRUE, later, np)]
            numbers = [f"{number:.4f}" for number in theta]
            table.add_row(bounds, name, *numbers, *(f"{np.sqrt(np.mean(e**2)):.3f}" for e in errors))
    Console().print(table)
    dampings = [in_scipy(*record(1000 + seed), None)[2] for seed in range(others)]
    print(f"without bounds {sum(d < 0 for d in dampings)} of {others} other records have a negative damping")
    plot(t, x, fits, args.out / "physical_model.png")
    print(f"picture: {args.out / 'physical_model.png'}")


if __name__ == "__main__":
    main()
