"""The ways to take one projected step that are compared, each a function without arguments.

All contenders of a run share one set of parameters, gradients and optimizer state, so that a large workload fits into
memory once; the gradients point outwards on the half of the neurons that is meant to be on the bound.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.workloads import shapes
from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, ProjectedSGD, {"lr": 1e-3}),
    "momentum": (torch.optim.SGD, ProjectedSGD, {"lr": 1e-3, "momentum": 0.9}),
    "adam": (torch.optim.Adam, ProjectedAdam, {"lr": 1e-5}),
    "adamw": (torch.optim.AdamW, ProjectedAdamW, {"lr": 1e-5, "weight_decay": 0.01}),
}
PLAIN = "plain, fused"
FREE = 1e6


def tensors(workload: str) -> list[Tensor]:
    """Parameters with gradients: of every parameter's vectors, the first half has norm 1, the others 0.5."""
    return [parameter(s) for s in shapes(workload)]


def parameter(shape: tuple[int, ...], share: float = 0.5) -> Tensor:
    """A parameter of which a `share` of the vectors lies on the unit ball, pushed outwards; the others inside."""
    generator = torch.Generator().manual_seed(len(shape))
    p = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        rows = p.view(shape[0], -1)
        rows.div_(rows.norm(dim=1, keepdim=True))
        bound = round(share * shape[0])
        rows[bound:] *= 0.5
        grad = p.clone()
        grad[:bound].neg_()
    else:
        grad = p.clone()
    p.requires_grad_()
    p.grad = grad
    return p


def torch_steps(
    optimizer: str, params: list[Tensor], c: float, compiled: bool = False
) -> dict[str, Callable[[], object]]:
    """All contenders on PyTorch, by name."""
    stock, ours, options = OPTIMIZERS[optimizer]
    fused = stock(params, fused=True, **options)
    fused.step()

    def sharing(cls: type, **extra: object) -> torch.optim.Optimizer:
        made = cls(params, **options, **extra)
        made.state = fused.state
        return made

    matrices = [p for p in params if p.ndim > 1]

    @torch.no_grad()
    def keras_style() -> None:
        fused.step()
        for p in matrices:
            norm = p.square().sum(dim=tuple(range(1, p.ndim)), keepdim=True).sqrt()
            p.mul_(norm.clamp(0, c) / (norm + 1e-7))

    @torch.no_grad()
    def renorm() -> None:
        fused.step()
        for p in matrices:
            p.renorm_(2, 0, c)

    steps: dict[str, Callable[[], object]] = {
        PLAIN: fused.step,
        "plain, default": sharing(stock).step,
        "plain, foreach": sharing(stock, foreach=True).step,
        "fused + Keras-style loop": keras_style,
        "fused + renorm_ loop": renorm,
        "projgd, default": sharing(ours, c=c).step,
        "projgd, foreach": sharing(ours, c=c, foreach=True).step,
    }
    if importlib.util.find_spec("numba"):
        steps["projgd, fused"] = sharing(ours, c=c, fused=True).step
    if compiled:
        steps["plain, compiled"] = torch.compile(sharing(stock).step, fullgraph=False)
        steps["projgd, compiled"] = torch.compile(sharing(ours, c=c).step, fullgraph=False)
    return steps
