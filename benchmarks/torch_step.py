"""Define projected steps in PyTorch, each as a function without arguments.

All steps of a run share one set of parameters, gradients and optimizer state, so that a large workload fits into memory
once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.workloads import Shape, start
from projgd import MaxNorm
from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD, project_after_step

OPTIMIZERS = {
    "SGD": (torch.optim.SGD, ProjectedSGD, {"lr": 1e-3}),
    "momentum": (torch.optim.SGD, ProjectedSGD, {"lr": 1e-3, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, ProjectedAdam, {"lr": 1e-5}),
    "AdamW": (torch.optim.AdamW, ProjectedAdamW, {"lr": 1e-5, "weight_decay": 0.01}),
}
PLAIN = "plain, fused"
Step = Callable[[], object]


def tensors(shapes: Iterable[Shape], share: float = 0.5) -> list[Tensor]:
    """Return parameters with gradients, in which a `share` of the neurons is on the unit ball."""
    params = []
    for shape in shapes:
        p, g = (torch.from_numpy(x) for x in start(shape, share))
        params.append(p.requires_grad_())
        p.grad = g
    return params


class Contenders:
    """Hold the steps of `params`, plain or with a bound c."""

    def __init__(self, optimizer: str, params: list[Tensor]) -> None:
        torch.compiler.reset()  # torch.compile compiles one method for a few objects only
        self.params, self.matrices = params, [p for p in params if p.ndim > 1]
        self.stock, self.ours, self.options = OPTIMIZERS[optimizer]
        self.fused = self.stock(params, fused=True, **self.options)
        self.fused.step()

    def plain(self, compiled: bool = False) -> dict[str, Step]:
        steps: dict[str, Step] = {
            PLAIN: self.fused.step,
            "plain, default": self._sharing(self.stock).step,
            "plain, foreach": self._sharing(self.stock, foreach=True).step,
        }
        if compiled:
            steps["plain, compiled"] = torch.compile(self._sharing(self.stock).step)
        return steps

    def projected(self, c: float, compiled: bool = False) -> dict[str, Step]:
        def keras_style(p: Tensor) -> None:
            norm = p.square().sum(dim=tuple(range(1, p.ndim)), keepdim=True).sqrt()
            p.mul_(norm.clamp(0, c) / (norm + 1e-7))

        steps: dict[str, Step] = {
            "fused + Keras-style loop": self._then(keras_style),
            "fused + renorm_ loop": self._then(lambda p: p.renorm_(2, 0, c)),
            "projgd, default": self._sharing(self.ours, c=c).step,
            "projgd, hook on fused": self._hooked(c).step,
            "projgd, fused, no numba": self._sharing(self.ours, c=c, fused=True, engine="eager").step,
        }
        if importlib.util.find_spec("numba"):
            steps["projgd, fused"] = self._sharing(self.ours, c=c, fused=True).step
        return steps | (
            {"projgd, compiled": torch.compile(self._sharing(self.ours, c=c).step, fullgraph=True)} if compiled else {}
        )

    def _sharing(self, cls: type, **extra: object) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = cls(self.params, **self.options, **extra)
        made.state = self.fused.state
        return made

    def _hooked(self, c: float) -> torch.optim.Optimizer:
        optimizer = self._sharing(self.stock, fused=True)
        project_after_step(optimizer, MaxNorm(c))
        return optimizer

    def _then(self, project: Callable[[Tensor], object]) -> Step:
        @torch.no_grad()
        def step() -> None:
            self.fused.step()
            for p in self.matrices:
                project(p)

        return step
