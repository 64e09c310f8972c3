"""The fused step where there are no kernels: torch's own fused operations, on pieces that are projected in a cache.

torch's step walks through all tensors; when it is done the first is in no cache any more, and its norm reads it again.
So large ones are stepped and projected in pieces of whole rows. Operations and states are those of torch.optim; a group
in which anything is special, or whose states are not there yet, is left to the optimizer's own step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    """What is known of a group while the parameters that have a gradient, their shapes and the axis are the same."""

    key: tuple[Any, ...]
    batches: list[Batch]
    rest: list[int]  # parameters that are stepped in whole
    stacks: list[Stack]  # of these
    left: list[int]  # of these, those projected one by one


@torch.no_grad()
def step(optimizer: Projected) -> list[dict[str, Any]]:
    """Step and project the groups in which nothing is special. Returns the others."""
    plans: dict[int, Plan] = vars(optimizer).setdefault("_piece_plans", {})
    left = []
    for i, (group, seen) in enumerate(zip(optimizer.param_groups, optimizer._seen, strict=True)):
        constraint = seen.constraint
        operands = _operands(optimizer, group) if _is_usual(group, constraint) else None
        if operands is None or not isinstance(constraint, MaxNorm):
            left.append(path.without(optimizer, group, ()))
            continue
        key = constraint.axis, list(map(id, operands[0])), [p.shape for p in operands[0]]
        if i not in plans or plans[i].key != key:
            plans[i] = _plan(key, operands[0], constraint)
        _step(plans[i], optimizer.inner is SGD, group, operands, constraint)
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


def _operands(optimizer: Projected, group: Mapping[str, Any]) -> list[list[Tensor]] | None:
    """Parameters, gradients, states; None where one is not what torch would make, or is not there yet."""
    if optimizer.inner is SGD:
        names = ["momentum_buffer"] if group["momentum"] != 0 else []
    else:
        names = ["exp_avg", "exp_avg_sq", "step"]
    params = [p for p in group["params"] if p.grad is not None]
    grads = [p.grad for p in params]
    states = [optimizer.state.get(p, {}) for p in params] if names else []
    moments = [[state.get(name) for state in states] for name in names]
    plain = all(map(_are_plain, (params, grads, *moments))) and not any(map(Tensor.is_neg, grads))
    if not params or not plain or not all(t.is_cpu for column in (params, *moments) for t in column):
        return None
    sizes = list(map(Tensor.numel, params)) if names else []
    fit = all(list(map(Tensor.numel, column)) == sizes for column in moments[:2])
    return [params, grads, *moments] if fit else None


def _are_plain(tensors: Sequence[Any]) -> bool:
    usual = PLAIN.issuperset(map(type, tensors)) and all(map(Tensor.is_contiguous, tensors))
    return usual and {t.dtype for t in tensors} == {torch.float32}


def _step(plan: Plan, sgd: bool, group: Mapping[str, Any], operands: list[list[Tensor]], constraint: MaxNorm) -> None:
    counters = [] if sgd else operands.pop()
    if counters:
        torch._foreach_add_(counters, 1)
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


def _plan(key: tuple[Any, ...], params: list[Tensor], constraint: MaxNorm) -> Plan:
    stacks, left = stacked.stacks(params, constraint)
    alone = {*left, *(j for stack in stacks if len(stack.places) == 1 for j in stack.places)}
    vectors = [constraint.resolve(tuple(p.shape), "out_first") if j in alone else None for j, p in enumerate(params)]
    shapes = [None if v is None else ball.rows(v) for v in vectors]
    rest = [j for j, shape in enumerate(shapes) if shape is None]
    return Plan(key, _batches(shapes), rest, *stacked.stacks([params[j] for j in rest], constraint))


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
