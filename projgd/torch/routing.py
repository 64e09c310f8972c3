"""The one table of engines: which engine takes which parameter, and why.

The same question to the same engines makes the routes of a step and the report that the user reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from projgd.torch.engines.base import PLAIN, Engine, Job, form_of_gradients, is_alike
from projgd.torch.engines.cpu import Cpu
from projgd.torch.engines.diagonal import Diagonal
from projgd.torch.engines.eager import Eager
from projgd.torch.engines.graph import Graph
from projgd.torch.engines.ranks import Ranks
from projgd.torch.engines.reference import Reference
from projgd.torch.engines.rows import Rows
from projgd.torch.engines.triton import Triton
from projgd.torch.settings import constraint_of
from projgd.torch.shaping import take_initial

WITHIN: tuple[Engine, ...] = (Diagonal(), Eager(), Reference())
"""Engines that take any tensor: parameters, some rows of one, or what one rank holds."""

ENGINES: tuple[Engine, ...] = (Cpu(), Triton(), Graph(), Rows(WITHIN), Ranks(WITHIN), *WITHIN)
"""All engines, best first. The first that does not refuse a parameter takes it."""

NAMES = tuple(e.name for e in (ENGINES[0], ENGINES[1], *WITHIN))
"""What `engine=` may be: the others depend on the step, not on a wish."""

STEPPED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimizers whose update some engine runs."""

FREE = "free"


@dataclass(frozen=True)
class Choice:
    """How a parameter is projected.

    Attributes:
        engine: the engine that takes it; "free" where nothing of it is projected.
        refusals: what the engines that are tried before it say.

    >>> print(Choice("eager", {"cpu": "fused=True was not passed"}))
    eager (cpu: fused=True was not passed)
    """

    engine: str
    refusals: Mapping[str, str]

    def __str__(self) -> str:
        said = "; ".join(f"{name}: {why}" for name, why in self.refusals.items())
        return f"{self.engine} ({said})" if said else self.engine


class Routes(dict[str, Choice]):
    """The `Choice` of every parameter by its name; `print` shows one line for each."""

    def __str__(self) -> str:
        width = max(map(len, self), default=0)
        return "\n".join(f"{name:{width}}  {choice}" for name, choice in self.items())


@dataclass(frozen=True)
class Route:
    """Parameters that one engine takes, and what it has prepared for them."""

    engine: Engine
    params: list[Tensor]
    prepared: Any
    memory: Any

    def run(self, job: Job) -> None:
        """Apply the constraint of the job, and the update if the engine steps."""
        self.engine.run(self.prepared, job, self.params)


def choose(job: Job, p: Tensor, may_step: bool) -> tuple[Engine | None, dict[str, str]]:
    """Return the engine that takes `p`, and what those tried before it say; None where nothing is projected.

    Args:
        job: what the param group asks for.
        p: one of its parameters.
        may_step: whether an engine may run the optimizer's update for it.

    Raises:
        ValueError: the engine that the user asks for refuses the parameter.
    """
    refusals: dict[str, str] = {}
    is_free = job.vectors(p) is None
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
        raise ValueError(f"engine={job.forced!r} cannot take a parameter of shape {tuple(p.shape)}: {reason}")
    return None, refusals


def make_routes(job: Job, may_step: bool) -> list[Route]:
    """Return the routes of a job: one for each engine that takes some of its parameters.

    Projected are the parameters that have a gradient, or all where the group says `without_grad`.
    """
    taken: dict[Engine, list[Tensor]] = {}
    for p in job.params:
        if p.grad is not None or job.group["without_grad"]:
            engine, _ = choose(job, p, may_step and p.grad is not None)
            if engine is not None:
                taken.setdefault(engine, []).append(p)
    made = []
    for engine, some in taken.items():
        prepared = engine.prepare(job, some)
        made.append(Route(engine, some, prepared, None if job.compiled else engine.memory(job, some)))
    return made


def may_step(inner: type[Optimizer], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an engine may run the optimizer's update in some group."""
    return inner in STEPPED and any(group.get("fused") for group in groups)


def project(work: Iterable[tuple[Job, Route]]) -> None:
    """Run the engines that only project; on a CPU nothing is projected in a step that GradScaler skips."""
    for job, route in work:
        if not (route.engine.steps or is_skipped(job.skip)):
            route.run(job)


def is_skipped(skip: Tensor | None) -> bool:
    """Whether GradScaler is known to skip the step. On an accelerator the engines decide: asking would wait."""
    return (
        skip is not None and skip.device.type == "cpu" and not torch.compiler.is_compiling() and bool(skip.item() > 0)
    )


def step(work: Iterable[tuple[Job, Route]], optimizer: Optimizer) -> Optimizer | None:
    """Run the engines that step, and return the optimizer for the parameters that they leave.

    Returns:
        A view of `optimizer` without the parameters that were stepped; None if none with a gradient remains. The view
        shares everything but its param groups with the optimizer, whose own groups nobody sees changed.
    """
    stepped: list[Tensor] = []
    for job, route in work:
        if route.engine.steps:
            route.run(job)
            stepped += route.params
    if len(stepped) == sum(len(group["params"]) for group in optimizer.param_groups):
        return None
    ids = set(map(id, stepped))
    groups = [_without(optimizer, group, ids) for group in optimizer.param_groups]
    groups = [g for g in groups if any(p.grad is not None for p in g["params"])]
    if not groups:
        return None
    view = object.__new__(type(optimizer))
    vars(view).update({**vars(optimizer), "param_groups": groups})
    return view


def _without(optimizer: Optimizer, group: Mapping[str, Any], stepped: set[int]) -> dict[str, Any]:
    """A group without some parameters, stepped by torch's own fused kernels only where they are sound."""
    kept = [j for j, p in enumerate(group["params"]) if id(p) not in stepped]
    params = [p for p in (group["params"][j] for j in kept) if p.grad is not None]
    is_scaled = getattr(optimizer, "found_inf", None) is not None  # only fused kernels know what GradScaler asks for
    is_sound = all(_is_sound(optimizer, p) for p in params)
    starts = {optimizer.state.get(p, {}).get("momentum_buffer") is None for p in params}  # that of SGD takes one kind
    return {
        **group,
        "fused": bool(group.get("fused")) and (is_scaled or (len(starts) < 2 and is_sound)),
        **{k: [group[k][j] for j in kept] for k in ("params", "param_names") if k in group},
    }


def _is_sound(optimizer: Optimizer, p: Tensor) -> bool:
    """Whether torch's fused kernel may step p.

    On a CPU (torch 2.13) that for SGD in bfloat16 is wrong by a tenth of the update, float16 was seen to give NaN, and
    gradients and states are read as if they lay in memory as p does.
    """
    if p.device.type != "cpu":
        return True
    read = [p.grad, *optimizer.state.get(p, {}).values()]
    as_p = all(is_alike(t, p) for t in read if isinstance(t, Tensor) and t.shape == p.shape)
    return as_p and type(p) in PLAIN and p.dtype in (torch.float32, torch.float64)


def check_forced(optimizer: Optimizer, group: Mapping[str, Any], named: Mapping[str, Tensor], engine: str) -> None:
    """Raise ValueError for the engine that the user asks for if it refuses a parameter, naming it and the reason."""
    constraint = constraint_of(group)
    inner = getattr(optimizer, "inner", type(optimizer))
    radii = take_initial(constraint, named)
    job = Job(optimizer, inner, group, constraint, radii=radii, forced=engine)
    with torch.no_grad():
        for name, p in named.items():
            try:
                choose(job, p, may_step=True)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


class Router:
    """The routes of the last step, made anew only where settings, tensors or memory have changed."""

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def clear(self) -> None:
        """Forget all routes: settings or parameters have changed."""
        self._known.clear()

    def routes(self, jobs: Sequence[Job], may_step: bool) -> list[tuple[Job, Route]]:
        """Return the routes of jobs, each with its job."""
        found = []
        for i, job in enumerate(jobs):
            known = self._known.get(i)
            if known is None or not known.holds(job, may_step):
                known = self._known[i] = _Known.of(job, may_step)
            found += [(job, route) for route in known.routes]
        return found


@dataclass(frozen=True)
class _Known:
    """The routes of a job, and what they depend on beside settings and memory.

    Attributes:
        routes: the routes.
        situation: whether an engine may step, and whether a GradScaler scales.
        others: the parameters that no engine takes now, but may take when they get a gradient, or another.
        forms: what their gradients are.
    """

    routes: list[Route]
    situation: tuple[bool, bool]
    others: list[Tensor]
    forms: list[Any]

    @classmethod
    def of(cls, job: Job, may_step: bool) -> _Known:
        routes = make_routes(job, may_step)
        taken = {id(p) for route in routes for p in route.params}
        others = [p for p in job.params if id(p) not in taken and (may_step or p.grad is None)]
        return cls(routes, (may_step, job.skip is None), others, form_of_gradients(job.gradients(others)))

    def holds(self, job: Job, may_step: bool) -> bool:
        return (
            (may_step, job.skip is None) == self.situation
            and form_of_gradients(job.gradients(self.others)) == self.forms
            and all((now := r.engine.memory(job, r.params)) is not None and now == r.memory for r in self.routes)
        )
