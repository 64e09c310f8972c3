"""Which way a step and its projection are taken. The one place that chooses between the kernels and the eager path."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import SGD, Adam, AdamW

from projgd.axes import Vectors
from projgd.constraints import Constraint, MaxNorm
from projgd.torch import metrics
from projgd.torch.settings import constraint_of, named, vectors_of_update

if TYPE_CHECKING:
    from projgd.torch.optimizers import Projected

KERNELS = (SGD, Adam, AdamW)


@dataclass(frozen=True, eq=False)
class Machine:
    """Where the kernels for a device are, and what they need."""

    module: str
    package: str  # that compiles them
    get_it: str
    dtypes: tuple[torch.dtype, ...]


MACHINES = {
    "cpu": Machine(
        "projgd.torch.kernels.cpu_batch",
        "numba",
        'pip install "projgd[fast]"',
        (torch.float32, torch.bfloat16, torch.float64),
    ),
    "cuda": Machine(
        "projgd.torch.kernels.gpu_batch",
        "triton",
        "it comes with PyTorch for CUDA; numpy is needed too",
        (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    ),
}
"""By type of device."""

Memory = tuple[type, torch.device, torch.dtype, torch.Size, tuple[int, ...]]
"""What a kernel must know of a tensor but its address: class, device, dtype, shape and strides."""

Projector = Callable[[Sequence[torch.Tensor], Any, Any], list[torch.Tensor]]


@dataclass(frozen=True)
class Path:
    """How a parameter is stepped and projected, and why.

    `name` is "fused" (one kernel updates and projects), "kernel" (one projects, after the optimizer's own step) or
    "eager" (operations of PyTorch).

    >>> print(Path("eager", "there are no kernels for mps"))
    eager: there are no kernels for mps
    """

    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}: {self.why}"

    def __bool__(self) -> bool:
        return self.name != "eager"


FUSED = Path("fused", "one kernel updates and projects all tensors of the group")
ODD_GRADIENT = Path("eager", "its gradient is sparse, or not laid out in memory as the parameter is")
SHAPED = Path("fused", "one numba kernel measures the update and then moves the weights, several tensors at a time")


def stepper(optimizer: Projected) -> Callable[[Projected], list[dict[str, Any]]] | None:
    """The function that takes what it can of a step asked for with fused=True; None where that is nothing."""
    return _stepper(bool(_of_machine(optimizer))) if _of_moment(optimizer) else None


@functools.cache
def _stepper(kernels: bool) -> Callable[[Projected], list[dict[str, Any]]]:
    if kernels:
        from projgd.torch import fused

        return fused.step
    from projgd.torch import pieces

    return pieces.step


def projector(
    params: Sequence[torch.Tensor], constraint: Constraint, metric: metrics.Metric | None
) -> Projector | None:
    """The function that takes what it can of a projection in a kernel; None where nothing can be."""
    can = isinstance(metric, metrics.OfStep | None) and of_projection(constraint) and _any_machine(params[:1])
    return _projector() if can else None


@functools.cache
def _projector() -> Projector:
    from projgd.torch.kernels import batch

    return batch.project


def by_parameter(optimizer: Projected) -> dict[str, Path]:
    """The path that every parameter takes, by name, with its present gradient if it has one."""
    paths = {}
    for i, group in enumerate(optimizer.param_groups):
        constraint = constraint_of(group)
        fused = of_optimizer(optimizer) and of_group(group, constraint)
        metric = metrics.after_step(optimizer, optimizer.inner, group, {})
        after = _after_step(optimizer, constraint)
        for name, p in named(group, i).items():
            whole = fused and of_step(optimizer, group, constraint, p, metric is not None)
            paths[name] = whole if whole else _alone(after, whole, p, constraint, metric)
    return paths


def _after_step(optimizer: Projected, constraint: Constraint | None) -> Path:
    """Whether the projection after the optimizer's own step may be a kernel's."""
    if constraint is None:
        return Path("eager", "there is no constraint")
    if getattr(optimizer, "found_inf", None) is not None:
        return Path("eager", "GradScaler has a say in this step")
    if optimizer.defaults.get("differentiable"):
        return Path("eager", "differentiable=True was passed")
    with torch.no_grad():
        return of_projection(constraint)


def _alone(
    after: Path, whole: Path, p: torch.Tensor, constraint: Constraint | None, metric: metrics.OfStep | None
) -> Path:
    if not after or constraint is None:
        return after
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    if vectors is None:
        return Path("eager", "it has no fan-in: nothing of it is projected")
    if metric is not None and ((root := metric.root(p)) is None or not alike(root.v, p)):
        return Path("eager", "the kernels know metrics √v + ε, with v from a step that has been taken")
    found = of_memory(memory(p), vectors, metric is not None)
    if not found:
        return found
    package = MACHINES[p.device.type].package
    return Path("kernel", f"one {package} kernel projects, after the optimizer's own step: {whole.why}")


def of_optimizer(optimizer: Projected) -> Path:
    """What the optimizer's class, the machine and this moment allow."""
    return _of_moment(optimizer) and _of_machine(optimizer)


def _of_machine(optimizer: Projected) -> Path:
    return _any_machine([group["params"][0] for group in optimizer.param_groups if group["params"]])


def _of_moment(optimizer: Projected) -> Path:
    if torch.compiler.is_compiling():
        return Path("eager", "torch.compile makes its own kernels")
    if not any(group.get("fused") for group in optimizer.param_groups):
        return Path("eager", "fused=True was not passed")
    if optimizer.inner not in KERNELS:
        return Path("eager", f"there is no fused kernel for {optimizer.inner.__name__}, only for SGD, Adam and AdamW")
    if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
        return Path("eager", "GradScaler has a say in this step")
    return FUSED


def of_group(group: Mapping[str, Any], constraint: Constraint | None) -> Path:
    """What the settings of a group allow."""
    if not group.get("fused"):
        return Path("eager", "fused=True was not passed for its group")
    if group["gradient"] is not None:
        return Path("eager", "the kernels take the gradient as it comes")
    if group["update"] is not None:
        if group.get("weight_decay"):
            return Path("eager", "with weight decay, an update that is shaped depends on the weights")
        if group["metric"] != "euclidean":
            return Path("eager", "the kernels shape no update that is projected in a metric of its own")
    elif constraint is not None and not (known := _of_set(constraint)):
        return known
    if group.get("capturable") and all(p.device.type == "cpu" for p in group["params"][:1]):
        return Path("eager", "capturable=True was passed")
    return FUSED


def of_projection(constraint: Constraint) -> Path:
    """What the set, the machine and this moment allow."""
    if torch.compiler.is_compiling():
        return Path("eager", "torch.compile makes its own kernels")
    if torch.is_grad_enabled():
        return Path("eager", "autograd follows the projection")
    return _of_set(constraint)


def _of_set(constraint: Constraint) -> Path:
    if type(constraint) is not MaxNorm:
        return Path("eager", f"the kernels know MaxNorm, not {type(constraint).__name__}")
    if not 2.0**-400 < constraint.c < 2.0**400:
        return Path("eager", f"the squares of c={constraint.c} are near the ends of float64")
    return FUSED


def of_param(
    p: torch.Tensor, grad: torch.Tensor | None, constraint: Constraint | None, in_metric: bool = False
) -> Path:
    """What a parameter, its memory and its gradient allow."""
    vectors = None if constraint is None else constraint.resolve(tuple(p.shape), "out_first")
    found = of_memory(memory(p), vectors, in_metric)
    if found and grad is not None and not alike(grad, p):
        return ODD_GRADIENT
    return found


def of_step(
    optimizer: Projected, group: Mapping[str, Any], constraint: Constraint | None, p: torch.Tensor, in_metric: bool
) -> Path:
    """What a parameter allows in a group that allows a fused step."""
    if group["update"] is None:
        return of_param(p, p.grad, constraint, in_metric)
    if (vectors := vectors_of_update(group, p)) is None:
        return Path("eager", "its update is taken as it comes, in a group where others are shaped")
    if getattr(constraint, "radius", None) == "initial" and optimizer._radius_of(p) is None:
        return Path("eager", "its radius is taken at the next step")
    found = of_memory(memory(p), vectors)
    if found and (p.device.type != "cpu" or p.dtype != torch.float32 or not p.is_contiguous()):
        return Path("eager", "the kernels shape updates on a CPU, of contiguous float32 tensors")
    if found and p.grad is not None and not alike(p.grad, p):
        return ODD_GRADIENT
    return SHAPED if found else found


def memory(p: torch.Tensor) -> Memory:
    """The `Memory` of a dense tensor."""
    return type(p), p.device, p.dtype, p.shape, p.stride()


def of_memory(memory: Memory, vectors: Vectors | None, in_metric: bool = False) -> Path:
    """What the memory of a tensor allows; with `vectors` None it is not projected."""
    from projgd.torch.kernels import plan

    cls, device, dtype, shape, stride = memory
    if cls not in (torch.Tensor, torch.nn.Parameter):
        return Path("eager", f"it is a {cls.__name__}")
    if not (found := _machine(device.type)):
        return found
    machine = MACHINES[device.type]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        return Path("eager", "Triton is for newer GPUs")
    if dtype not in machine.dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in machine.dtypes)
        return Path("eager", f"the kernels know {known}, not {str(dtype).removeprefix('torch.')}")
    layout = plan.layout_of(shape, stride, vectors)
    if 0 in shape or layout is None:
        return Path("eager", "its memory has gaps, or its vectors lie in it in no regular way")
    if dtype == torch.float64 and vectors is not None and vectors.length > 2**21:
        return Path("eager", "its vectors are too long for a sum in float64 that is known to be good enough")
    if in_metric and vectors is not None and (device.type != "cpu" or dtype == torch.float64 or layout[1] != 1):
        return Path(
            "eager", "the kernels know a metric on a CPU, float32 or bfloat16, for vectors of contiguous memory"
        )
    return found


def alike(a: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether the memory of a gradient or a state can be walked along with that of `p`."""
    return (
        type(a) in (torch.Tensor, torch.nn.Parameter)
        and a.layout == torch.strided
        and (a.dtype, a.device, a.shape, a.stride()) == (p.dtype, p.device, p.shape, p.stride())
        and not a.is_neg()
    )


def without(optimizer: Projected, group: Mapping[str, Any], covered: Collection[int]) -> dict[str, Any]:
    """A group without the parameters with these ids; stepped by torch's own fused kernels only where they are sound."""
    left = [j for j, p in enumerate(group["params"]) if id(p) not in covered]
    stepped = [p for p in (group["params"][j] for j in left) if p.grad is not None]
    starts = {optimizer.state.get(p, {}).get("momentum_buffer") is None for p in stepped}  # that of SGD takes one kind
    return {
        **group,
        "fused": bool(group.get("fused")) and len(starts) < 2 and all(_is_sound(optimizer, p) for p in stepped),
        **{k: [group[k][j] for j in left] for k in ("params", "param_names") if k in group},
    }


def _is_sound(optimizer: Projected, p: torch.Tensor) -> bool:
    """Whether torch's fused kernel may step p.

    On a CPU (torch 2.13) that for SGD in bfloat16 is wrong by a tenth of the update, float16 was seen to give NaN, and
    gradients and states are read as if they lay in memory as p does.
    """
    if p.device.type != "cpu":
        return True
    read = [p.grad, *optimizer.state.get(p, {}).values()]
    as_p = all(alike(t, p) for t in read if isinstance(t, torch.Tensor) and t.shape == p.shape)
    return as_p and type(p) in (torch.Tensor, torch.nn.Parameter) and p.dtype in (torch.float32, torch.float64)


def _any_machine(tensors: Sequence[torch.Tensor]) -> Path:
    """Whether there are kernels for the device of one of these tensors."""
    found = FUSED
    for p in tensors:
        found = _machine(p.device.type)
        if found:
            break
    return found


def _machine(kind: str) -> Path:
    """Whether there are kernels for a type of device, here and now."""
    if kind == "cpu" and _forked:
        return Path("eager", "this process was forked from one in which numba's threads had been at work")
    return _found(MACHINES[kind]) if kind in MACHINES else Path("eager", f"there are no kernels for {kind}")


@functools.cache
def _found(machine: Machine) -> Path:
    if any(importlib.util.find_spec(package) is None for package in (machine.package, "numpy")):
        return Path("eager", f"{machine.package} is not installed: {machine.get_it}")
    if machine.package == "triton" and not (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang")))):
        return Path("eager", "Triton needs a C compiler, and there is none")
    return Path("fused", f"one {machine.package} kernel updates and projects all tensors of the group")


_forked = False


def _note_fork() -> None:
    """In the child of a fork: threads that numba started are not there, and waiting for them would never end."""
    global _forked
    numba: Any = sys.modules.get("numba")
    with contextlib.suppress(ValueError):  # raised where no threads were started
        _forked = _forked or (numba is not None and bool(numba.threading_layer()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
