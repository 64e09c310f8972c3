"""Test whether the best learning rate transfers across width, for AdamW, Muon, AdamH and MuonH.

A byte-level transformer learns the sources of Python's own standard library. The optimizer under test trains its
matrices, over a sweep of learning rates, at two widths. The same AdamW always trains embedding, head and gains. AdamW
and Muon use weight decay. The script prints a table and writes a plot of the final validation loss against the learning
rate.

    python examples/hyperball_lm.py            # takes minutes on a CPU; if interrupted, it continues
    python examples/hyperball_lm.py --steps 1000 --widths 32 128 512
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional as F

from projgd.torch import hyperball

DECAY = 0.1
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.95), weight_decay=DECAY),
    "AdamH": lambda p, lr: hyperball(torch.optim.Adam)(p, lr=lr, betas=(0.9, 0.95)),
    "Muon": lambda p, lr: torch.optim.Muon(p, lr=lr, weight_decay=DECAY),
    "MuonH": lambda p, lr: hyperball(torch.optim.Muon)(p, lr=lr),
}
RATES = {
    "AdamW": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
    "AdamH": [5e-3, 1.5e-2, 5e-2, 1.5e-1, 5e-1],
    "Muon": [3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
    "MuonH": [5e-3, 1.5e-2, 5e-2, 1.5e-1, 5e-1],
}
LENGTH, BATCH, LAYERS, HEAD = 64, 16, 2, 16


class Block(nn.Module):
    """Apply attention with normalised queries and keys, then a feed-forward layer; both read a normalised stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, HEAD)).permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, (HEAD,)), F.rms_norm(k, (HEAD,))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Predict the next byte with a decoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(LAYERS))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def hidden(self, bytes_: torch.Tensor) -> torch.Tensor:
        """The residual stream after the last block."""
        x = self.embed(bytes_) + self.place.weight[: bytes_.shape[1]]
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, bytes_: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(bytes_)))


def standard_library(size: int = 4_000_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bytes to learn from and bytes to validate on, from different files."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    parts = [b"".join(f.read_bytes() for f in files if (hash_of(f.name) % 10 == 0) == held) for held in (False, True)]
    train, valid = (torch.frombuffer(bytearray(p[:size]), dtype=torch.uint8).long() for p in parts)
    return train, valid


def hash_of(name: str) -> int:
    """Return a hash that is the same on every machine, unlike hash()."""
    return sum(name.encode())


def batch(data: torch.Tensor, size: int, seed: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random windows, and the bytes that follow each of their bytes."""
    starts = torch.randint(len(data) - LENGTH - 1, (size, 1), generator=seed)
    windows = data[starts + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


def train(name: str, rate: float, width: int, steps: int, tick: Callable[[], Any]) -> tuple[float, Transformer]:
    """Train one model; return its validation loss in nats per byte (inf if it diverged), and the model."""
    torch.manual_seed(0)
    seed = torch.Generator().manual_seed(1)
    learn, valid = standard_library()
    model = Transformer(width)
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers = [
        OPTIMIZERS[name](matrices, rate),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warmup = max(1, steps // 10)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: min((t + 1) / warmup, (steps - t) / (steps - warmup)))
        for o in optimizers
    ]
    for _ in range(steps):
        loss = loss_of(model, *batch(learn, BATCH, seed))
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o, schedule in zip(optimizers, schedules, strict=True):
            o.step()
            schedule.step()
        tick()
    with torch.no_grad():
        seed = torch.Generator().manual_seed(2)
        final = sum(float(loss_of(model, *batch(valid, 64, seed))) for _ in range(8)) / 8
    return (final if math.isfinite(final) else math.inf), model


def sweep(out: Path, widths: list[int], steps: int) -> list[dict[str, Any]]:
    """Run all settings, except those whose result is in `out` already."""
    log = out / f"runs-{steps}.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    todo = [(w, n, r) for w in widths for n in OPTIMIZERS for r in RATES[n]]
    todo = [run for run in todo if run not in [(d["width"], d["optimizer"], d["lr"]) for d in done]]
    with Progress() as bar:
        task = bar.add_task("", total=len(todo) * steps)
        for width, name, rate in todo:
            bar.update(task, description=f"{name} width {width} lr {rate:g}")
            loss, model = train(name, rate, width, steps, lambda: bar.advance(task))
            if loss <= min([d["loss"] for d in done if d["width"] == width], default=math.inf):
                torch.save(model.state_dict(), out / f"best-{width}.pt")
            done.append({"width": width, "optimizer": name, "lr": rate, "loss": loss})
            with log.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    return done


def table(runs: list[dict[str, Any]], widths: list[int]) -> str:
    """Return the best learning rate and loss per width, and the cost of the first width's best rate at the last."""
    lines = ["| optimizer | " + " | ".join(f"width {w}: best lr, loss" for w in widths) + " | cost of the transfer |"]
    lines += ["|" + " --- |" * (len(widths) + 2)]
    for name in OPTIMIZERS:
        loss = {(r["width"], r["lr"]): r["loss"] for r in runs if r["optimizer"] == name}
        best = {w: min((loss[w, lr], lr) for lr in RATES[name]) for w in widths}
        cost = loss[widths[-1], best[widths[0]][1]] - best[widths[-1]][0]
        cells = [f"{best[w][1]:g}, {best[w][0]:.3f}" for w in widths]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {cost:+.3f} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], widths: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panes = plt.subplots(1, len(OPTIMIZERS), figsize=(12, 3.2), sharey=True, layout="constrained")
    for pane, name in zip(panes, OPTIMIZERS, strict=True):
        for width, style in zip(widths, ("o-", "s--", "^:"), strict=False):
            points = sorted((r["lr"], r["loss"]) for r in runs if r["optimizer"] == name and r["width"] == width)
            pane.plot(*zip(*points, strict=True), style, label=f"width {width}")
        pane.set(title=name, xscale="log", xlabel="learning rate")
    panes[0].set_ylabel("validation loss, nats per byte")
    panes[0].legend()
    losses = [r["loss"] for r in runs if math.isfinite(r["loss"])]
    panes[0].set_ylim(min(losses) - 0.05, min(max(losses), min(losses) + 1.2) + 0.05)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--widths", type=int, nargs="+", default=[32, 128])
    options.add_argument("--out", type=Path, default=Path("out/hyperball_lm"))
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    runs = [r for r in sweep(given.out, given.widths, given.steps) if r["width"] in given.widths]
    print(table(runs, given.widths))
    plot(runs, given.widths, given.out / "losses.png")
    print(f"plot: {given.out / 'losses.png'}")


if __name__ == "__main__":
    main()
