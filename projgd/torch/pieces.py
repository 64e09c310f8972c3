"""The fused step where there are no kernels: torch's own fused operations, on pieces that are projected in a cache.

torch's step walks through all tensors; when it is done the first is in no cache any more, and its norm reads it again.
So large ones are stepped and projected in pieces of whole rows. Operations and states are those of torch.optim; a group
in which anything is special, or whose states are not there yet, is left to the optimizer's own step.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD

from projgd import projections
from projgd.constraints import MaxNorm
from projgd.torch import ball, path, stacked
from projgd.torch.project import project_
from projgd.torch.stacked import Stack

if TYPE_CHECKING:
    from projgd.torch.optimizers import Projected

PLAIN = {Tensor, torch.nn.Parameter}
# For `map`: of many small tensors, all that is asked counts.
_shape, _dtype, _is_cpu = map(operator.attrgetter, ("shape", "dtype", "is_cpu"))
Update = Callable[[list[list[Tensor]], list[Tensor]], object]


@dataclass
class Batch:
    """Rows of matrices that are stepped and projected in one go: (which parameter, its shape, first row, rows)."""

    pieces: list[tuple[int, tuple[int, int], int, int]]
    size: int
    longest: int  # row
    near: bool = True  # the ball, the last time


@dataclass
class Plan:
    """What is known of a group while its tensors are the same, and lie in memory as torch makes them."""

    key: tuple[Any, ...]
    params: list[Tensor]  # those that have a gradient
    shapes: list[torch.Size]
    states: list[dict[str, Tensor]]
    read: dict[str, list[Tensor]]  # of the states, by name
    batches: list[Batch]
    rest: list[int]  # parameters that are stepped in whole
    stacks: list[Stack]  # of these
    left: list[int]  # of these, those projected one by one

    def holds(self, key: tuple[Any, ...]) -> bool:
        if key != self.key or list(map(_shape, self.params)) != self.shapes or not _lie_plainly(self.params):
            return False
        try:
            for name, column in self.read.items():
                if not all(map(operator.is_, map(operator.itemgetter(name), self.states), column)):
                    return False
        except KeyError:  # a state has gone
            return False
        return all(map(_lie_plainly, self.read.values()))


@torch.no_grad()
def step(optimizer: Projected) -> list[dict[str, Any]]:
    """Step and project the groups in which nothing is special. Returns the others."""
    plans: dict[int, Plan] = vars(optimizer).setdefault("_piece_plans", {})
    states = list(map(id, optimizer.state.values()))
    left = []
    for i, (group, seen) in enumerate(zip(optimizer.param_groups, optimizer._seen, strict=True)):
        constraint, plan = seen.constraint, plans.pop(i, None)
        grads = [p.grad for p in group["params"]] if _is_usual(group, constraint) else []
        kinds = list(map(type, grads))
        if NoneType in kinds:
            grads = [g for g in grads if g is not None]
        if isinstance(constraint, MaxNorm) and grads and _are_plain(grads) and not any(map(Tensor.is_neg, grads)):
            key = constraint.axis, group.get("momentum", 0) != 0, kinds, seen.params, states
            if plan is None or not plan.holds(key):
                plan = _plan(optimizer, group, constraint, key)
            if plan is not None:
                plans[i] = plan
                _step(plan, optimizer.inner is SGD, group, [plan.params, grads, *plan.read.values()], constraint)
                continue
        left.append(path.without(optimizer, group, ()))
    return left


def _is_usual(group: Mapping[str, Any], constraint: Any) -> bool:
    numbers = [group["lr"], *group.get("betas", ())]
    return (
        bool(path.of_group(group, constraint))
        and type(constraint) is MaxNorm
        and ball.usual(constraint.c)
        and group["update"] is None
        and group["metric"] == "euclidean"
        and not (group["without_grad"] or group.get("amsgrad") or any(isinstance(n, Tensor) for n in numbers))
    )


def _are_plain(tensors: Sequence[Any]) -> bool:
    return PLAIN.issuperset(map(type, tensors)) and _lie_plainly(tensors) and {*map(_dtype, tensors)} == {torch.float32}


def _lie_plainly(tensors: Sequence[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors)) and all(map(_is_cpu, tensors))


def _step(plan: Plan, sgd: bool, group: Mapping[str, Any], operands: list[list[Tensor]], constraint: MaxNorm) -> None:
    counters = [] if sgd else operands.pop()
    if counters:
        torch._foreach_add_(counters, _one(), alpha=1.0)  # of a number it would make a tensor for each
    update = _sgd(group) if sgd else _adam(group)
    for batch in plan.batches:
        pieces = [[o[j].view(shape).narrow(0, k, n) for j, shape, k, n in batch.pieces] for o in operands]
        update(pieces, [counters[j] for j, *_ in batch.pieces] if counters else [])
        batch.near = ball.project_rows_(pieces[0], constraint.c, batch.longest, batch.near)
    if plan.rest:
        rest = [[o[j] for j in plan.rest] for o in operands]
        update(rest, [counters[j] for j in plan.rest] if counters else [])
        for stack in plan.stacks:
            stack.project_(rest[0], constraint.c)
        for j in plan.left:
            project_(rest[0][j], constraint)
    torch.autograd.graph.increment_version(operands[0])  # which torch's fused operations forget


@functools.cache
def _one() -> Tensor:
    return torch.ones((), dtype=torch.float32, device="cpu")


def _sgd(group: Mapping[str, Any]) -> Update:
    """The call that torch.optim.SGD makes."""
    no_buffers: list[list[Tensor]] = [[]] if group["momentum"] == 0 else []
    return lambda operands, counters: torch._fused_sgd_(
        *operands,
        *no_buffers,
        lr=float(group["lr"]),
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
    )


def _adam(group: Mapping[str, Any]) -> Update:
    """The call that torch.optim.Adam and AdamW make."""
    fused: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    beta1, beta2 = group["betas"]
    return lambda operands, counters: fused(
        *operands,
        [],
        counters,
        lr=float(group["lr"]),
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=group["maximize"],
    )


def _plan(optimizer: Projected, group: Mapping[str, Any], constraint: MaxNorm, key: tuple[Any, ...]) -> Plan | None:
    """None where a parameter or a state is not what torch would make, or is not there yet."""
    params = [p for p in group["params"] if p.grad is not None]
    names = ["exp_avg", "exp_avg_sq", "step"]
    if optimizer.inner is SGD:
        names = ["momentum_buffer"] if group["momentum"] != 0 else []
    states = [optimizer.state.get(p, {}) for p in params] if names else []
    read = {name: [state.get(name) for state in states] for name in names}
    if not all(map(_are_plain, (params, *read.values()))):
        return None
    shapes = list(map(_shape, params))
    if any(list(map(_shape, read[name])) != shapes for name in names if name != "step"):
        return None
    stacks, left = stacked.stacks(params, constraint)
    alone = {*left, *(j for stack in stacks if len(stack.places) == 1 for j in stack.places)}
    vectors = [constraint.resolve(tuple(p.shape), "out_first") if j in alone else None for j, p in enumerate(params)]
    rows = [None if v is None else ball.rows(v) for v in vectors]
    rest = [j for j, shape in enumerate(rows) if shape is None]
    whole = [params[j] for j in rest]
    stacks, left = stacked.stacks(whole, constraint)
    stacks = [stack.with_room(whole) for stack in stacks]
    return Plan(key, params, shapes, states, read, _batches(rows), rest, stacks, left)


def _batches(shapes: list[tuple[int, int] | None]) -> list[Batch]:
    """Large matrices in pieces; what is smaller goes together, up to `PIECE`, where rounding errs alike."""
    batches: list[Batch] = []
    for j, shape in enumerate(shapes):
        count, length = shape or (0, 1)
        rows = max(1, ball.PIECE // length)
        for k in range(0, count, rows):
            n = min(rows, count - k)
            last = batches[-1] if batches else None
            if last is None or last.size + n * length > ball.PIECE or _guard(last.longest) != _guard(length):
                batches.append(last := Batch([], 0, 0))
            last.pieces.append((j, (count, length), k, n))
            last.size += n * length
            last.longest = max(last.longest, length)
    return batches


def _guard(length: int) -> float:
    return projections.guard(projections.FLOATS["float32"], (length,), (0,))
