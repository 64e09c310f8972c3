"""The fused step: what the kernels need to know of an optimizer, gathered and checked at every step.

A `Plan` holds what stays from step to step. Addresses are read anew every time; a plan is made anew when anything but
the addresses of gradients has changed.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import SGD

from projgd.constraints import Constraint, MaxNorm, Sphere
from projgd.torch import metrics, path
from projgd.torch.kernels import batch
from projgd.torch.kernels.batch import Batch
from projgd.torch.kernels.rules import Adam, Rule, Sgd
from projgd.torch.optimizers import Projected
from projgd.torch.project import project_params
from projgd.torch.settings import vectors_of_update

if TYPE_CHECKING:
    from projgd.torch.kernels.cpu_shaped import Shaped


_address, _stride = Tensor.data_ptr, Tensor.stride  # for `map`: of many small tensors, all that is asked counts


@dataclass
class Part:
    """The parameters of a group that one kernel call takes, of one dtype on one device, and what their update needs."""

    batch: Batch | Shaped
    params: list[Tensor]
    strides: list[tuple[int, ...]]  # of them and of their gradients
    states: list[dict[str, Tensor]]
    read: dict[str, list[Tensor]]  # the states that the kernel reads, one name a row of the table from the third on
    table: npt.NDArray[np.int64]
    addresses: list[list[int]]  # in the table: of parameters and states
    counters: npt.NDArray[np.int64]
    factors: npt.NDArray[np.float64]

    def gradients(self) -> list[Tensor] | None:
        """The gradients; None if all else is not where it was, or the batch was for one graph only."""
        grads: list[Any] = [p.grad for p in self.params]
        try:
            if not self.batch.lasting or any(list(map(_stride, x)) != self.strides for x in (grads, self.params)):
                return None
            for name, tensors in self.read.items():
                if not all(map(operator.is_, map(operator.itemgetter(name), self.states), tensors)):
                    return None
        except (TypeError, RuntimeError, KeyError):  # there is no gradient, it is sparse, or a state has gone
            return None
        found = [list(map(_address, tensors)) for tensors in (self.params, *self.read.values())]
        return grads if found == self.addresses else None


@dataclass
class Plan:
    """What is known of a group: valid while its `_settings` are the same and its tensors have not moved."""

    key: tuple[Any, ...]
    parts: list[Part]
    covered: set[int]  # ids of the parameters in the parts
    others: list[Tensor]  # that might have been in a part
    kinds: list[Any]  # why they are not
    states: list[int]  # ids of all states of the optimizer

    def gradients(self, key: tuple[Any, ...], states: Iterable[Any]) -> list[list[Tensor]] | None:
        """The gradients of every part; None if anything else has changed."""
        if key != self.key or list(map(id, states)) != self.states or list(map(_kind, self.others)) != self.kinds:
            return None
        found: list[Any] = [part.gradients() for part in self.parts]
        return None if None in found else found


def step(optimizer: Projected) -> list[dict[str, Any]]:
    """Step and project all that the kernels cover. Returns what is left for the eager path, as groups."""
    plans: list[Plan | None] = vars(optimizer).setdefault("_plans", [])
    plans += [None] * (len(optimizer.param_groups) - len(plans))
    work: list[tuple[dict[str, Any], Constraint | None, Part, list[Tensor]]] = []
    rest = []
    for i, (group, seen) in enumerate(zip(optimizer.param_groups, optimizer._seen, strict=True)):
        known, constraint = plans[i], seen.constraint
        key = (seen.params, *_settings(optimizer, group, constraint))
        grads = None if known is None else known.gradients(key, optimizer.state.values())
        if known is None or grads is None:
            known = plans[i] = _plan(optimizer, group, constraint, key)
            grads = [_gradients(part.params) for part in known.parts]
        work += [(group, constraint, *each) for each in zip(known.parts, grads, strict=True)]
        if len(known.covered) < len(group["params"]):
            rest.append(path.without(optimizer, group, known.covered))
    for group, constraint, part, theirs in work:
        _run(optimizer, group, constraint, part, theirs)
    return [group for group in rest if group["without_grad"] or any(p.grad is not None for p in group["params"])]


def _settings(optimizer: Projected, group: dict[str, Any], constraint: Constraint | None) -> tuple[Any, ...]:
    """What a plan depends on, but for the tensors."""
    shaped = group["update"] is not None
    return (
        bool(path.of_group(group, constraint)),
        constraint is None,
        getattr(constraint, "axis", None),
        group.get("momentum", 0) != 0,
        group.get("amsgrad"),
        group["metric"],
        *((group["update"], constraint, [id(optimizer._radius_of(p)) for p in group["params"]]) if shaped else ()),
    )


def _kind(p: Tensor) -> Any:
    """What says whether a parameter that is in no part might be in one."""
    if (grad := p.grad) is None:
        return None
    return p.data_ptr(), p.stride(), grad.stride() if grad.layout is torch.strided else None


def _gradients(params: list[Tensor]) -> list[Any]:
    return [p.grad for p in params]


@torch.no_grad()
def _plan(optimizer: Projected, group: dict[str, Any], constraint: Constraint | None, key: tuple[Any, ...]) -> Plan:
    if not path.of_group(group, constraint):
        return Plan(key, [], set(), [], [], list(map(id, optimizer.state.values())))
    sgd = optimizer.inner is SGD
    if sgd:
        names = ["momentum_buffer"] if group["momentum"] != 0 else []
    else:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])
    by_memory: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in group["params"]:
        known = p.grad is not None and path.of_step(optimizer, group, constraint, p, _in_metric(optimizer, group))
        if known and _has_usual_state(optimizer, p, names):
            by_memory.setdefault((p.device, p.dtype), []).append(p)
    parts = []
    for mine in by_memory.values():
        fresh = [p for p in mine if not optimizer.state.get(p)]
        if names and fresh:  # the optimizer's own way to make a state
            inner: Any = optimizer
            inner._init_group({**group, "params": fresh}, *([] for _ in range(3 if sgd else 6)))
        starts = [False] * len(mine)
        if sgd and names:
            for i, p in enumerate(mine):
                starts[i] = optimizer.state[p].get("momentum_buffer") is None
                if starts[i]:
                    optimizer.state[p]["momentum_buffer"] = torch.empty_like(p)
        parts.append(_part(optimizer, _batch(optimizer, group, constraint, mine), mine, names, starts))
    covered = {id(p) for part in parts for p in part.params}
    others = [p for p in group["params"] if id(p) not in covered]
    return Plan(key, parts, covered, others, list(map(_kind, others)), list(map(id, optimizer.state.values())))


def _batch(
    optimizer: Projected, group: dict[str, Any], constraint: Constraint | None, params: list[Tensor]
) -> Batch | Shaped:
    memory = [path.memory(p) for p in params]
    if group["update"] is None:
        return batch.batch(
            memory, [None if constraint is None else constraint.resolve(m[3], "out_first") for m in memory]
        )
    from projgd.torch.kernels.cpu_shaped import Shaped

    vectors = [v for p in params if (v := vectors_of_update(group, p)) is not None]  # all of them: see `path.of_step`
    if not isinstance(constraint, Sphere):
        return Shaped(memory, vectors, None)
    taken = [optimizer._radius_of(p) for p in params]
    return Shaped(memory, vectors, [constraint.radius if r is None else r.numpy() for r in taken])


def _part(
    optimizer: Projected, made: Batch | Shaped, params: list[Tensor], names: list[str], starts: list[bool]
) -> Part:
    states = [optimizer.state[p] for p in params] if names else []
    read = {name: [s[name] for s in states] for name in names}
    weights, *rest = addresses = [list(map(_address, tensors)) for tensors in (params, *read.values())]
    factors = np.zeros((len(params), 2))
    factors[:, 0] = starts
    return Part(
        batch=made,
        params=params,
        strides=list(map(_stride, params)),
        states=states,
        read=read,
        table=np.array([weights, weights, *rest, *[addresses[-1]] * (3 - len(names))], dtype=np.int64),
        addresses=addresses,
        counters=np.array([s["step"].data_ptr() for s in states if "step" in s], dtype=np.int64),
        factors=factors,
    )


def _has_usual_state(optimizer: Projected, p: Tensor, names: list[str]) -> bool:
    """Whether `p` has no state yet, or one that the optimizer would have made for it."""
    state = optimizer.state.get(p)
    if not names or not state:
        return True
    if "momentum_buffer" in names:
        buffer = state.get("momentum_buffer")
        return buffer is None or path.alike(buffer, p)
    counter = state.get("step")
    counted = isinstance(counter, Tensor) and (counter.dtype, counter.device) == (torch.float32, p.device)
    return counted and all(name in state and path.alike(state[name], p) for name in names)


def _run(
    optimizer: Projected, group: dict[str, Any], constraint: Constraint | None, part: Part, grads: list[Tensor]
) -> None:
    part.table[1] = list(map(_address, grads))
    sgd = optimizer.inner is SGD
    rule: Rule = _sgd(group) if sgd else _adam(group)
    if isinstance(part.batch, Batch):
        c = constraint.c if isinstance(constraint, MaxNorm) else None
        eps = group["eps"] if _in_metric(optimizer, group) else None
        left = [part.params[k] for k in part.batch.run(c, part.table, rule, part.counters, part.factors, eps)]
    else:
        part.batch.run(group["update"], part.table, rule, part.counters, part.factors)
        left = [] if isinstance(constraint, Sphere) else part.params
    if sgd:
        part.factors.fill(0)
    if left:
        with torch.no_grad():
            project_params(left, constraint, None, metrics.after_step(optimizer, optimizer.inner, group, {}))
    torch.autograd.graph.increment_version(part.params)


def _in_metric(optimizer: Projected, group: dict[str, Any]) -> bool:
    return group["metric"] == "adaptive" and optimizer.inner is not SGD  # whose metric is the Euclidean one


def _sgd(group: dict[str, Any]) -> Sgd:
    sign, undamped = -1 if group["maximize"] else 1, 1 - group["dampening"]
    numbers = group["momentum"], undamped, group["weight_decay"], sign, group["nesterov"]
    return Sgd(_lr(group), *map(float, numbers))


def _adam(group: dict[str, Any]) -> Adam:
    sign = -1 if group["maximize"] else 1
    ways = group["decoupled_weight_decay"], group["amsgrad"]
    return Adam(_lr(group), *map(float, (*group["betas"], group["eps"], group["weight_decay"], sign, *ways)))


def _lr(group: dict[str, Any]) -> Any:
    """A number; a tensor on a GPU stays there, for reading it would wait."""
    lr = group["lr"]
    return lr if isinstance(lr, Tensor) and lr.device.type != "cpu" else float(lr)
