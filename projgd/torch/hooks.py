"""Project after every step of an optimizer that exists already, through hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from projgd import rules
from projgd.constraints import Constraint, check_every
from projgd.rules import Rules
from projgd.torch import layers, routing, settings
from projgd.torch.engines.base import Job
from projgd.torch.engines.rows import forget_written_tables

Chosen = list[list[Constraint | None]]
"""The constraint of each parameter, by its position in `optimizer.param_groups`."""


def project_after_step(
    optimizer: Optimizer,
    constraint: Constraint | Rules | None,
    model: torch.nn.Module | None = None,
    *,
    without_grad: bool = False,
    every: int = 1,
) -> RemovableHandle:
    """Project after every step of an optimizer that exists already; `handle.remove()` ends that.

    A pickle or a deep copy of an optimizer has no hooks, so neither keeps this one: use `projected` there.

    Args:
        optimizer: any optimizer; its state and its param groups do not change.
        constraint: one constraint for all its parameters, or rules over their names; None, beside `model`, for what is
            declared on the model, see `constrain`.
        model: the module that gives the names and the axes of each layer, see `param_groups`. Parameters of the
            optimizer that are not in it are free. Default None: the names are those that the optimizer was given
            (`model.named_parameters()`), and a weight is read as (out, in, *kernel).
        without_grad: whether parameters without a gradient are projected, too; default False.
        every: project after every so many steps, counted from this call; default 1.

    Returns:
        A handle, whose `remove()` removes the hooks.

    Raises:
        TypeError: an object that is not an optimizer or not a constraint, or a parameter whose dtype has no projection.
        ValueError: a rule that matches or holds nothing, an axis that a parameter does not have, rules without names,
            an `every` below 1, or a set that takes numbers from the initial weights, as `Sphere("initial")` does, which
            only a `Projected` optimizer can keep.

    Warns:
        UserWarning: an optimizer with a `second_step`, as SAM has it, which may never call `step`.

    >>> from projgd import MaxNorm
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = torch.optim.SGD(layer.parameters(), lr=10.0)
    >>> handle = project_after_step(opt, MaxNorm(1.0))
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 1.0).all())
    True
    >>> handle.remove()
    """
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"project_after_step() takes a torch.optim.Optimizer, not {type(optimizer).__name__}; "
            "of a wrapper pass the optimizer inside it, such as wrapper.optimizer"
        )
    if callable(getattr(optimizer, "second_step", None)):
        rules.warn(
            f"only step() of {type(optimizer).__name__} is followed by the projection, not second_step(): for the form "
            "in two steps pass the optimizer inside it, such as optimizer.base_optimizer"
        )
    check_every(every)
    options: dict[str, Any] = {"without_grad": without_grad, "every": every}
    chosen = _choose(optimizer, constraint, model, options)
    exempt: dict[torch.Tensor, Exception] = {}  # frozen parameters that cannot be projected, and why
    seen: list[list[int]] = []  # empty, so that the first step checks again: the model may be wrapped before it
    parts: list[tuple[Constraint, list[torch.Tensor]]] = []
    router = routing.Router()

    def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        nonlocal chosen, seen, parts, exempt
        if (now := _tensors(optimizer)) != seen:
            if list(map(len, now)) != list(map(len, chosen)):
                chosen = _choose(optimizer, constraint, model, options)
            _, exempt = _check(optimizer, chosen, options)  # an error must come before the step writes anything
            seen, parts = now, _by_constraint(optimizer, chosen)
            router.clear()
        for p, why in exempt.items():
            if p.requires_grad or p.grad is not None:
                raise why
        forget_written_tables()

    def project(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        settings.count_step([options])
        if not settings.is_due(options):
            return
        skip = getattr(optimizer, "found_inf", None)
        jobs = [Job(optimizer, type(optimizer), options, own, skip=skip, params=params) for own, params in parts]
        with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
            routing.run(router.routes(jobs, may_step=False))

    pre, post = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    handle = RemovableHandle(post, extra_dict=pre)
    pre[handle.id], post[handle.id] = before, project
    return handle


def _choose(
    optimizer: Optimizer, constraint: Constraint | Rules | None, model: torch.nn.Module | None, options: dict[str, Any]
) -> Chosen:
    """Return the constraint of each parameter, by its position in the param groups.

    Positions outlive tensors: a wrapper such as Accelerate's for FSDP2 later puts other tensors there.
    """
    if not isinstance(constraint, (Constraint, Mapping)) and (model is None or constraint is not None):
        raise TypeError(
            f"{constraint!r} is not a constraint: pass one such as MaxNorm(4.0), or rules: names to constraints"
        )
    named = [settings.named_params(group, i) for i, group in enumerate(optimizer.param_groups)]
    if model is not None:
        wanted = layers.constraints(model, constraint)
        of_tensor = {id(p): wanted[name] for name, p in model.named_parameters()}
        chosen = [[of_tensor.get(id(p)) for p in group.values()] for group in named]
        if not any(own is not None for constraints in chosen for own in constraints):
            of_model = set(map(id, model.parameters()))
            why = "Pass the model that the optimizer was made from"
            if any(id(p) in of_model for group in named for p in group.values()):
                why = "A set of norms needs weights with a fan-in; axis=None makes each whole tensor one vector"
            raise ValueError(
                "nothing would be projected: the optimizer has no parameter of model= that the constraint is for. "
                f"{why}"
            )
    elif isinstance(constraint, Mapping):
        if not all("param_names" in group for group in optimizer.param_groups):
            raise ValueError(
                "rules need names: pass model= here, or make the optimizer from model.named_parameters() "
                "instead of model.parameters()"
            )
        of_name = rules.assign(constraint, [name for group in named for name in group])
        chosen = [[of_name[name] for name in group] for group in named]
    else:
        chosen = [[constraint] * len(group) for group in named]
    held, _ = _check(optimizer, chosen, options)
    if model is None and isinstance(constraint, Mapping):
        rules.refuse_idle(constraint, held)
    if model is None and isinstance(constraint, Constraint):
        own = {"constraint": constraint, "c": constraint.moving_c}
        settings.warn_if_idle(own, [{**group, **own} for group in optimizer.param_groups])
    return chosen


def _by_constraint(optimizer: Optimizer, chosen: Chosen) -> list[tuple[Constraint, list[torch.Tensor]]]:
    """Return every constraint with its parameters."""
    found: dict[Constraint, list[torch.Tensor]] = {}
    for group, constraints in zip(optimizer.param_groups, chosen, strict=True):
        for p, own in zip(group["params"], constraints, strict=True):
            if own is not None:
                found.setdefault(own, []).append(p)
    return list(found.items())


def _tensors(optimizer: Optimizer) -> list[list[int]]:
    """Return the ids of the parameters, group by group."""
    return [list(map(id, group["params"])) for group in optimizer.param_groups]


def _check(
    optimizer: Optimizer, chosen: Chosen, options: dict[str, Any]
) -> tuple[dict[str, bool], dict[torch.Tensor, Exception]]:
    """Raise an error if a constraint cannot be applied.

    Returns:
        By name, whether a parameter has vectors to hold; and the frozen parameters that cannot be projected, with the
        reason.
    """
    held: dict[str, bool] = {}
    exempt: dict[torch.Tensor, Exception] = {}
    for i, (group, constraints) in enumerate(zip(optimizer.param_groups, chosen, strict=True)):
        for (name, p), own in zip(settings.named_params(group, i).items(), constraints, strict=True):
            if own is not None and own.takes_initial:
                raise ValueError(
                    f"{own} keeps numbers in the optimizer's state, where a hook has none: use projected(…)"
                )
            try:
                settings.check(own, {name: p})
                held[name] = own is not None and own.resolve(tuple(p.shape), "out_first", name) is not None
            except (TypeError, ValueError) as error:
                if not settings.is_frozen(options, p):
                    raise
                exempt[p], held[name] = error, True
    return held, exempt
