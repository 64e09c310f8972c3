"""Which way a step is taken. The one place that chooses between a fused kernel and the eager path."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Adam, AdamW

from projgd.constraints import Constraint, MaxNorm
from projgd.torch.settings import constraint_of, named

if TYPE_CHECKING:
    from projgd.torch.optimizers import Projected

KERNELS = (SGD, Adam, AdamW)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Path:
    """How a parameter is stepped and projected: `name` is "fused" (one kernel does both) or "eager"; and why.

    >>> print(Path("eager", "fused=True was not passed"))
    eager: fused=True was not passed
    """

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"

    def __bool__(self) -> bool:
        return self.name == "fused"


FUSED = Path("fused", "one numba kernel updates and projects all tensors of the group")


def stepper(optimizer: Projected) -> Callable[[Projected], list[dict[str, Any]]] | None:
    """The function that takes what it can of a step in fused kernels; None where nothing can be fused."""
    if not of_optimizer(optimizer):
        return None
    from projgd.torch import fused

    return fused.step


def by_parameter(optimizer: Projected) -> dict[str, Path]:
    """The path that every parameter takes, by name, with its present gradient if it has one."""
    paths = {}
    for i, group in enumerate(optimizer.param_groups):
        constraint = constraint_of(group)
        chosen = of_optimizer(optimizer) and of_group(group, constraint)
        for name, p in named(group, i).items():
            paths[name] = chosen and of_param(p, p.grad, constraint)
    return paths


def of_optimizer(optimizer: Projected) -> Path:
    """What the optimizer's class, the machine and this moment allow."""
    if torch.compiler.is_compiling():
        return Path("eager", "torch.compile makes its own kernels")
    if not any(group.get("fused") for group in optimizer.param_groups):
        return Path("eager", "fused=True was not passed")
    if optimizer.inner not in KERNELS:
        return Path("eager", f"there is no fused kernel for {optimizer.inner.__name__}, only for SGD, Adam and AdamW")
    if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
        return Path("eager", "GradScaler has a say in this step")
    return _numba()


def of_group(group: Mapping[str, Any], constraint: Constraint | None) -> Path:
    """What the settings of a group allow."""
    if not group.get("fused"):
        return Path("eager", "fused=True was not passed for its group")
    if constraint is not None and type(constraint) is not MaxNorm:
        return Path("eager", f"the kernels know MaxNorm, not {type(constraint).__name__}")
    if isinstance(constraint, MaxNorm) and not 2.0**-400 < constraint.c < 2.0**400:
        return Path("eager", f"the squares of c={constraint.c} are near the ends of float64")
    if group["update"] is not None or group["gradient"] is not None or group["metric"] != "euclidean":
        return Path("eager", "the kernels take gradient and update as they come, and the Euclidean metric")
    if group.get("capturable"):
        return Path("eager", "capturable=True was passed")
    return FUSED


def of_param(p: torch.Tensor, grad: torch.Tensor | None, constraint: Constraint | None) -> Path:
    """What a parameter, its memory and its gradient allow."""
    from projgd.torch.kernels import plan

    if type(p) not in (torch.Tensor, torch.nn.Parameter):
        return Path("eager", f"it is a {type(p).__name__}")
    if p.device.type != "cpu":
        return Path("eager", f"it is on {p.device.type}, and the kernels run on a CPU")
    if p.dtype not in DTYPES:
        return Path(
            "eager", f"the kernels know float32, bfloat16 and float64, not {str(p.dtype).removeprefix('torch.')}"
        )
    vectors = None if constraint is None else constraint.resolve(tuple(p.shape), "out_first")
    if p.numel() == 0 or plan.layout_of(p, vectors) is None:
        return Path("eager", "its memory has gaps, or its vectors lie in it in no regular way")
    if p.dtype == torch.float64 and vectors is not None and vectors.length > 2**21:
        return Path("eager", "its vectors are too long for a sum in float64 that is known to be good enough")
    if grad is not None and not alike(grad, p):
        return Path("eager", "its gradient is sparse, or not laid out in memory as the parameter is")
    return FUSED


def alike(a: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether the memory of a gradient or a state can be walked along with that of `p`."""
    return (
        type(a) in (torch.Tensor, torch.nn.Parameter)
        and a.layout == torch.strided
        and (a.dtype, a.device, a.shape, a.stride()) == (p.dtype, p.device, p.shape, p.stride())
        and not a.is_neg()
    )


@functools.cache
def _numba() -> Path:
    if importlib.util.find_spec("numba") is None or importlib.util.find_spec("numpy") is None:
        return Path("eager", 'numba is not installed: pip install "projgd[fast]"')
    return FUSED
