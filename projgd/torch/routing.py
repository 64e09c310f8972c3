"""Choose the engine of each parameter from one table, and say why.

`choose` decides for both the step and the report that the user reads. The step asks it about parameters with a
gradient. The report asks about all: before the first backward pass it shows the routes for dense gradients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from projgd.torch import metrics
from projgd.torch.engines.base import (
    PLAIN,
    STEPPED,
    Engine,
    Job,
    Reference,
    form_of_gradients,
    has_numbers,
    is_alike,
    reason_of_states,
)
from projgd.torch.engines.cpu import Cpu
from projgd.torch.engines.diagonal import Diagonal
from projgd.torch.engines.eager import Eager
from projgd.torch.engines.graph import Graph
from projgd.torch.engines.ranks import Ranks, is_dtensor
from projgd.torch.engines.rows import Rows
from projgd.torch.engines.triton import Triton
from projgd.torch.settings import constraint_of, named_params
from projgd.torch.shaping import KEY, take_initial

WITHIN: tuple[Engine, ...] = (Diagonal(), Eager(), Reference())
"""The engines that take any tensor: a parameter, some of its rows, or the part that one rank holds."""

ENGINES: tuple[Engine, ...] = (Cpu(), Triton(), Graph(), Rows(WITHIN), Ranks(WITHIN), *WITHIN)
"""All engines, best first. The first that does not refuse a parameter takes it.

For plain float32 weights on a CPU that is `Cpu` with `fused=True`, and `Eager` without.
"""

NAMES = tuple(e.name for e in ENGINES if not isinstance(e, (Graph, Rows, Ranks)))
"""The values of `engine=`; the step alone decides about the other engines."""

FREE = "free"

OTHERWISE = "it is for another device, metric or kind of step"


@dataclass(frozen=True)
class Choice:
    """Describe how a parameter is projected.

    Attributes:
        engine: the name of the engine that takes it; `"free"` if none does, because nothing of it is projected. An
            engine that steps takes parameters that are not projected, too.
        refusals: why the engines before it in the table do not take it, by name.

    >>> print(Choice("eager", {"cpu": "fused=True was not passed"}))
    eager (cpu: fused=True was not passed)
    """

    engine: str
    refusals: Mapping[str, str]

    def __str__(self) -> str:
        said = "; ".join(f"{name}: {why}" for name, why in self.refusals.items())
        return f"{self.engine} ({said})" if said else self.engine


class Routes(dict[str, Choice]):
    """Hold the `Choice` of every parameter by its name; `print` shows one line for each.

    >>> print(Routes({"0.weight": Choice("eager", {"cpu": "fused=True was not passed"}), "0.bias": Choice("free", {})}))
    0.weight  eager (cpu: fused=True was not passed)
    0.bias    free
    """

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:{width}}  {choice}" for name, choice in self.items())


@dataclass(frozen=True)
class Route:
    """Hold the parameters that one engine takes, and what it has prepared for them.

    Attributes:
        engine: the engine.
        params: the parameters.
        prepared: what `engine.prepare` returned.
        memory: what `engine.memory` returned; None in a compiled step.
    """

    engine: Engine
    params: list[Tensor]
    prepared: Any
    memory: Any

    def run(self, job: Job) -> None:
        """Apply the constraint of the job, and the update if the engine steps."""
        self.engine.run(self.prepared, job, self.params)


def choose(job: Job, p: Tensor, may_step: bool) -> tuple[Engine | None, dict[str, str]]:
    """Return the engine that takes a parameter, and why the engines before it in the table do not.

    Args:
        job: the job of the param group.
        p: one of its parameters.
        may_step: whether an engine may run the optimizer's update for it.

    Returns:
        The engine, or None for a free parameter; and the reasons by the engine's name.

    Raises:
        ValueError: the engine that the user names refuses the parameter.
    """
    refusals: dict[str, str] = {}
    is_free = not has_numbers(p) or job.vectors(p) is None
    for engine in ENGINES:
        if (is_free and not engine.steps) or (job.forced not in (None, engine.name)):
            continue
        reason = engine.refuses(job, p)
        if reason is None and engine.steps and not may_step:
            reason = "the optimizer runs its own step"
        if reason is None:
            return engine, refusals
        if reason:
            refusals[engine.name] = reason
    if job.forced is not None and not is_free:
        raise ValueError(
            f"{_name_of(job, p)}: engine={job.forced!r} cannot take a parameter of shape {tuple(p.shape)}: "
            f"{reason or OTHERWISE}"
        )
    return None, refusals


def _name_of(job: Job, p: Tensor) -> str:
    """Return the name of a parameter of a job, as `settings.named_params` does."""
    groups = [group["params"] for group in job.optimizer.param_groups]
    index = next((i for i, params in enumerate(groups) if params is job.group["params"]), len(groups))
    return next(name for name, q in named_params(job.group, index).items() if q is p)


def make_routes(job: Job, may_step: bool) -> list[Route]:
    """Return the routes of a job: one for each engine that takes some of its parameters.

    The parameters that have a gradient are projected, or all of them if the group says `without_grad`.

    Args:
        job: the job of the param group.
        may_step: whether an engine may run the optimizer's update.

    Returns:
        The routes, each with what its engine has prepared.
    """
    taken: dict[tuple[Engine, int | None], list[Tensor]] = {}
    for p in job.params:
        if p.grad is not None or job.group["without_grad"]:
            engine, _ = choose(job, p, may_step and p.grad is not None)
            if engine is not None:
                alone = id(p) if id(p) in job.shared else None
                taken.setdefault((engine, alone), []).append(p)
    made = []
    for (engine, _), some in taken.items():
        prepared = engine.prepare(job, some)
        made.append(Route(engine, some, prepared, None if job.compiled else engine.memory(job, some)))
    return made


def mark_shared(jobs: Sequence[Job]) -> list[Job]:
    """Return jobs that know which of their parameters share memory, as slices of one tensor do.

    Args:
        jobs: the jobs of all groups of an optimizer.

    Returns:
        The jobs. Parameters count as sharing if the ranges of their addresses overlap.
    """
    spans = sorted((*span, id(p)) for job in jobs for p in job.params if (span := _span(p)))
    shared: set[int] = set()
    furthest, holder = 0, 0
    for start, end, i in spans:
        if start < furthest:
            shared |= {holder, i}
        if end > furthest:
            furthest, holder = end, i
    return [dataclasses.replace(job, shared=frozenset(shared)) for job in jobs] if shared else list(jobs)


def _span(p: Tensor) -> tuple[int, int] | None:
    """Return the first address of a tensor on this rank and the one after its last; None if it has no memory."""
    x = p.to_local() if is_dtensor(p) else p
    if type(x) not in PLAIN or x.layout != torch.strided or not has_numbers(x):
        return None
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + reach * x.element_size()


def may_step(inner: type[Optimizer], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether an engine may run the optimizer's update in some group."""
    return inner in STEPPED and any(group.get("fused") for group in groups)


def run(work: Iterable[tuple[Job, Route]]) -> None:
    """Run the engines of all routes; on a CPU skip those that only project in a step that GradScaler skips."""
    for job, route in work:
        if route.engine.steps or not is_skipped(job.skip):
            route.run(job)


def is_skipped(skip: Tensor | None) -> bool:
    """Return whether GradScaler is known to skip the step; on an accelerator the engines read the flag."""
    return (
        skip is not None and skip.device.type == "cpu" and not torch.compiler.is_compiling() and bool(skip.item() > 0)
    )


def rest_of(work: Iterable[tuple[Job, Route]], optimizer: Optimizer) -> Optimizer | None:
    """Return an optimizer for the parameters that no engine steps.

    torch's fused kernels step them only where this is sound. Only these kernels unscale gradients for GradScaler, so if
    some parameter is not for them, the gradients are unscaled here.

    Args:
        work: jobs and their routes.
        optimizer: the optimizer.

    Returns:
        A view of `optimizer` without the parameters that an engine steps; None if none with a gradient remains, or if
        GradScaler skips the step. The view shares everything with the optimizer but its param groups, so the
        optimizer's own groups do not change.
    """
    stepped = [p for _, route in work if route.engine.steps for p in route.params]
    if len(stepped) == sum(len(group["params"]) for group in optimizer.param_groups):
        return None
    ids = set(map(id, stepped))
    groups = [_drop_params(optimizer, group, ids) for group in optimizer.param_groups]
    groups = [g for g in groups if any(p.grad is not None for p in g["params"])]
    if not groups:
        return None
    view = object.__new__(type(optimizer))
    vars(view).update({**vars(optimizer), "param_groups": groups})
    found_inf, scale = (getattr(optimizer, name, None) for name in ("found_inf", "grad_scale"))
    if found_inf is not None and not all(g["fused"] for g in groups):
        if found_inf.item() > 0:
            return None
        factor = None if scale is None else float(scale.double().reciprocal().float())  # as GradScaler does
        for p in (p for g in groups for p in g["params"]):
            if p.grad is not None and factor is not None:
                p.grad.mul_(factor)
        vars(view).update(found_inf=None, grad_scale=None)
    return view


def _drop_params(optimizer: Optimizer, group: Mapping[str, Any], stepped: set[int]) -> dict[str, Any]:
    """Return a group without some parameters; it is fused only if torch's kernels may step the others."""
    kept = [j for j, p in enumerate(group["params"]) if id(p) not in stepped]
    params = [p for p in (group["params"][j] for j in kept) if p.grad is not None]
    return {
        **group,
        "fused": bool(group.get("fused")) and _may_fuse(optimizer, params),
        **{k: [group[k][j] for j in kept] for k in ("params", "param_names") if k in group},
    }


def _may_fuse(optimizer: Optimizer, params: Sequence[Tensor]) -> bool:
    """Return whether torch's fused kernel may step these parameters, in one call.

    On a CPU (torch 2.13) the fused SGD in bfloat16 is wrong by a tenth of the update, float16 was seen to give NaN, and
    the kernel reads gradients and states as if they had the memory layout of their parameter. A momentum must exist for
    all parameters or for none.
    """
    states = [optimizer.state.get(p, {}) for p in params] if optimizer.state else []
    if len({s.get("momentum_buffer") is None for s in states}) > 1:
        return False
    on_cpu = [p for p in params if p.is_cpu]
    is_usual = {type(p) for p in on_cpu} <= set(PLAIN) and {p.dtype for p in on_cpu} <= {torch.float32, torch.float64}
    return not on_cpu or (is_usual and _lie_alike(optimizer, on_cpu))


def _lie_alike(optimizer: Optimizer, params: Sequence[Tensor]) -> bool:
    """Return whether gradients and states have the shape and the memory layout of their parameter."""
    strides, sizes = list(map(Tensor.stride, params)), list(map(Tensor.numel, params))
    states = [optimizer.state.get(p, {}) for p in params]
    model = next((k for k, p in enumerate(params) if p.ndim), 0)  # a 0-d parameter has the shape of a step count
    names = [k for k, t in states[model].items() if isinstance(t, Tensor) and t.ndim and k != KEY]
    try:  # all at once: one after the other would take longer than the step of many small tensors
        read = [[p.grad for p in params], *([s[k] for s in states] for k in names if params[model].ndim)]
        is_known = all(s.keys() == states[model].keys() for s in states)
        if is_known and all(
            list(map(Tensor.stride, some)) == strides and list(map(Tensor.numel, some)) == sizes for some in read
        ):
            return True
    except (KeyError, TypeError, RuntimeError):  # a state is missing, or a gradient is sparse
        pass
    return all(
        is_alike(t, p)
        for p in params
        for k, t in (("grad", p.grad), *optimizer.state.get(p, {}).items())
        if isinstance(t, Tensor) and (t.ndim or t is p.grad) and k != KEY
    )


def check_forced(optimizer: Optimizer, group: Mapping[str, Any], named: Mapping[str, Tensor], engine: str) -> None:
    """Raise an error if the engine that the user names refuses a parameter.

    Args:
        optimizer: the optimizer.
        group: the param group.
        named: its parameters by name.
        engine: the name of the engine.

    Raises:
        ValueError: the parameter's name and the engine's reason.
    """
    constraint = constraint_of(group)
    inner = getattr(optimizer, "inner", type(optimizer))
    radii = take_initial(constraint, named)
    metric = metrics.after_step(optimizer, inner, group, {})
    job = Job(optimizer, inner, group, constraint, metric, radii, forced=engine)
    with torch.set_grad_enabled(bool(optimizer.defaults.get("differentiable"))):
        for p in named.values():
            choose(job, p, may_step=True)


class Router:
    """Keep the routes of the last step, and make new ones if settings, tensors or memory have changed."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, bool], _KnownRoutes] = {}
        self._shared: frozenset[int] = frozenset()

    def clear(self) -> None:
        """Forget all routes, because settings or parameters have changed."""
        self._known.clear()

    def routes(self, jobs: Sequence[Job], may_step: bool) -> list[tuple[Job, Route]]:
        """Return the routes of jobs.

        Args:
            jobs: the jobs of a step, always in the order of the param groups.
            may_step: whether an engine may run the optimizer's update.

        Returns:
            Pairs of a job and a route.
        """
        keys = [(i, job.constraint is None) for i, job in enumerate(jobs)]  # a group with `every` has routes for both
        stale = [
            i
            for i, job in enumerate(jobs)
            if (k := keys[i]) not in self._known or not self._known[k].is_valid(job, may_step)
        ]
        if stale:
            marked = mark_shared(jobs)
            if marked[0].shared != self._shared:
                self._shared, stale = marked[0].shared, list(range(len(jobs)))
            self._known |= {keys[i]: _KnownRoutes.of(marked[i], may_step) for i in stale}
        return [(job, route) for k, job in zip(keys, jobs, strict=True) for route in self._known[k].routes]


@dataclass(frozen=True)
class _KnownRoutes:
    """Hold the routes of a job, and what they depend on besides settings and memory.

    Attributes:
        routes: the routes.
        situation: whether an engine may step, and whether a GradScaler scales.
        others: the parameters without an engine, which may get one together with a new gradient.
        forms: the forms of their gradients.
        held_up: the parameters whose states keep an engine from stepping them; what only projects does not read states.
    """

    routes: list[Route]
    situation: tuple[bool, bool]
    others: list[Tensor]
    forms: list[Any]
    held_up: list[Tensor]

    @classmethod
    def of(cls, job: Job, may_step: bool) -> _KnownRoutes:
        routes = make_routes(job, may_step)
        taken = {id(p) for route in routes for p in route.params}
        others = [p for p in job.params if id(p) not in taken and (may_step or p.grad is None)]
        held_up = [p for p in job.params if may_step and reason_of_states(job, p)]
        return cls(routes, (may_step, job.skip is None), others, form_of_gradients(job.gradients(others)), held_up)

    def is_valid(self, job: Job, may_step: bool) -> bool:
        return (
            (may_step, job.skip is None) == self.situation
            and form_of_gradients(job.gradients(self.others)) == self.forms
            and all(reason_of_states(job, p) for p in self.held_up)
            and all((now := r.engine.memory(job, r.params)) is not None and now == r.memory for r in self.routes)
        )
