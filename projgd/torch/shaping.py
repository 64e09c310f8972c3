"""The inner optimizer's update, read off and shaped against the weights before the projection.

An optimizer moves the parameters in place, so its update must be read off them. Where its rule does not look at the
weights (`BLIND`, without weight decay), it is run from zero: what stands in the parameter afterwards is the update
itself, to full precision, in bfloat16 too. Any other optimizer is run from the weights, and the update is the
difference, in which rounding to the parameter's dtype is left. Both need one copy of the parameters that are shaped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch
from torch.optim import Optimizer

from projgd import projections
from projgd.constraints import Constraint, Sphere, norms_of
from projgd.torch import path, settings
from projgd.torch.landing import Plan, land, measurable
from projgd.torch.project import Initial
from projgd.updates import RelativeUpdate, TangentUpdate

BLIND = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.Muon,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
"""Optimizers whose update, without weight decay, is a function of the gradients alone. Subclasses may differ."""


def is_shaped(group: Mapping[str, Any]) -> bool:
    """Whether the steps of a group go through here."""
    return group["update"] is not None or group["gradient"] is not None


def reads_weights(inner: type[Optimizer], group: Mapping[str, Any]) -> bool:
    """Whether the inner optimizer's update may depend on the weights."""
    return inner not in BLIND or bool(group.get("weight_decay"))


def check(inner: type[Optimizer], group: Mapping[str, Any], named: Mapping[str, torch.Tensor]) -> None:
    """Refuse a group whose shaping cannot be honoured, naming the parameter; warn where it works against itself.

    `group` has the optimizer's defaults filled in.

    Raises:
        ValueError: an update that cannot be observed, an axis that is not the set's, a zero weight vector where a norm
            is needed, `gradient="tangent"` without a set of vectors, `RelativeUpdate` without a learning rate.

    Warns:
        UserWarning: weight decay together with a fixed norm; an update that is read off rounded weights.
    """
    constraint, update = settings.constraint_of(group), group["update"]
    if group.get("weight_decay") and isinstance(constraint, Sphere):
        warnings.warn(
            f"weight_decay={group['weight_decay']} works against {constraint}: the projection undoes what it does to "
            "the norm, and what is left changes the length or the direction of the update. Pass weight_decay=0",
            stacklevel=4,
        )
    if group["gradient"] is not None and not hasattr(constraint, "axis"):
        raise ValueError(
            'gradient="tangent" needs a set of vectors: pass constraint=UnitNorm() or another with an axis'
        )
    if update is None:
        return
    if callable(getattr(inner, "eval", None)):
        raise ValueError(
            f"the update of {inner.__name__} cannot be observed: it keeps weights of its own beside the parameters "
            "(it has an eval()). Leave update= out, or shape another optimizer's"
        )
    if isinstance(update, RelativeUpdate) and "lr" not in group:
        raise ValueError(f"{update} makes updates of length lr·‖w‖, and {inner.__name__} has no lr")
    if group.get("differentiable"):
        raise ValueError(f"{update} writes the weights in place, so it cannot be differentiated: differentiable=False")
    for name, p in named.items():
        settings.check(constraint, {name: p})
        projections.float_type(p, name)
        vectors = settings.vectors_of_update(group, p, name)
        if vectors is None:
            continue
        if update.needs_norm and not p.is_meta:
            norms_of(*measurable(p, vectors, _carrier(group)), name, f"{update} needs one", xp)
        if p.dtype in (torch.bfloat16, torch.float16) and reads_weights(inner, group):
            warnings.warn(
                f"{name} is {p.dtype}, and the update of {inner.__name__} is read off it as a difference, after "
                "rounding: small updates lose their direction. Keep the weights in float32 under torch.autocast",
                stacklevel=4,
            )


def initial(constraint: Constraint | None, named: Mapping[str, torch.Tensor]) -> dict[torch.Tensor, torch.Tensor]:
    """What the set takes from the initial weights, by parameter. Raises ValueError for weights that have no norm."""
    found: dict[torch.Tensor, torch.Tensor] = {}
    if constraint is None or type(constraint).initial is Constraint.initial:
        return found
    for name, p in named.items():
        vectors = constraint.resolve(tuple(p.shape), "out_first", name)
        if vectors is not None and not p.is_meta:
            taken = constraint.initial(*measurable(p, vectors, constraint), name, xp)
            if taken is not None:
                found[p] = taken
    return found


def _carrier(group: Mapping[str, Any]) -> Constraint:
    """A set with the vectors that the group's update is shaped along."""
    constraint, axis = settings.constraint_of(group), group["update"].axis
    if constraint is not None and hasattr(constraint, "axis"):
        return constraint
    return Sphere(1.0, "matrix" if axis == "set" else axis)


def step(
    inner: type[Optimizer],
    groups: Iterable[Mapping[str, Any]],
    initial: Initial,
    room: dict[torch.Tensor, torch.Tensor],
    call: Callable[[Callable[[], Any] | None], Any],
    closure: Callable[[], Any] | None,
) -> Any:
    """Run the inner step, `call(closure)`, and leave w + shape(update) in the parameters that have a shaping.

    Spheres are landed on here, and `not_landed` says what is left to project. `room` is where the copies of the weights
    lie from step to step on a CPU.

    An error or an interrupt anywhere in here leaves those parameters as they were.
    """
    groups = [g for g in groups if is_shaped(g)]
    if closure is None:
        _make_gradients_tangent(groups)
    else:
        closure = _then_tangent(closure, groups)
    loss = None
    if closure is not None and inner in BLIND:  # evaluated now, at the weights, and not at zero
        with torch.enable_grad():
            loss, closure = closure(), None
    plans = [(group, p, _copy(p, room)) for group in groups for p in _to_shape(group, closure is not None)]
    with torch.no_grad():
        try:
            for group, p, _ in plans:
                if not reads_weights(inner, group):
                    p.zero_()
            returned = call(closure)
            land(
                [
                    Plan(
                        p,
                        w,
                        reads_weights(inner, g),
                        g["update"],
                        g.get("lr", 1.0),
                        _carrier(g),
                        _radius(g, initial.get(p)),
                    )
                    for g, p, w in plans
                    if p.grad is not None
                ]
            )
        except BaseException:
            for _, p, w in plans:
                p.copy_(w)
            raise
    return returned if loss is None else loss


def _copy(p: torch.Tensor, room: dict[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A copy of p. On a CPU the system takes longer to find the memory for it than the copy takes: it is kept."""
    if p.device.type != "cpu" or torch.compiler.is_compiling():
        return p.detach().clone()
    if p in room and path.alike(room[p], p):
        room[p].copy_(p.detach())
    else:
        room[p] = p.detach().clone()
    return room[p]


def not_landed(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group with the parameters that are still to be projected after `step`."""
    if not _lands(group):
        return group
    left = [p for p in group["params"] if p.grad is None or settings.vectors_of_update(group, p) is None]
    return {**group, "params": left}


def _lands(group: Mapping[str, Any]) -> bool:
    """Whether shaped parameters are also projected here, before they are rounded to their dtype."""
    on_sphere = isinstance(settings.constraint_of(group), Sphere) and group["metric"] == "euclidean"
    return group["update"] is not None and on_sphere


def _to_shape(group: Mapping[str, Any], all_of_them: bool) -> list[torch.Tensor]:
    """The parameters of a group that this step moves; all of them where only its closure will tell."""
    if group["update"] is None:
        return []
    moved = [p for p in group["params"] if all_of_them or p.grad is not None]
    return [p for p in moved if settings.vectors_of_update(group, p) is not None]


def _radius(group: Mapping[str, Any], initial: torch.Tensor | None) -> Any:
    if not _lands(group):
        return None
    return settings.constraint_of(group).radius if initial is None else initial  # type: ignore[union-attr]


def _then_tangent(closure: Callable[[], Any], groups: Sequence[Mapping[str, Any]]) -> Callable[[], Any]:
    def tangent() -> Any:
        loss = closure()
        _make_gradients_tangent(groups)
        return loss

    return tangent


def _make_gradients_tangent(groups: Iterable[Mapping[str, Any]]) -> None:
    """Remove from `p.grad` what would change the norm, in the groups with `gradient="tangent"`."""
    plans = []
    for group in groups:
        constraint = settings.constraint_of(group)
        if group["gradient"] is not None and constraint is not None:
            with_vectors = [p for p in group["params"] if constraint.resolve(tuple(p.shape), "out_first") is not None]
            plans += [
                Plan(p.grad, p.detach(), False, TangentUpdate(), 1.0, constraint, moves=False)
                for p in with_vectors
                if p.grad is not None
            ]
    land(plans)
