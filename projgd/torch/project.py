"""The projection of parameters in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import array_api_compat.torch as xp
import torch

from projgd import metrics
from projgd.axes import Vectors
from projgd.constraints import Constraint, MaxNorm
from projgd.torch import ball, compiled, metric_ball, path, sharded, stacked
from projgd.torch.metrics import Metric, Pick
from projgd.torch.settings import constraint_of
from projgd.torch.sparse import MovedRows

Initial = Mapping[torch.Tensor, torch.Tensor]
"""What the sets of an optimizer took from the initial weights, by parameter."""


def project_group(
    group: Mapping[str, Any],
    skip: torch.Tensor | None = None,
    metric: Metric | None = None,
    initial: Initial | None = None,
    rows: MovedRows | None = None,
) -> None:
    """Project the parameters of a param group that have a gradient, and with `without_grad` all of them."""
    params = group["params"] if group["without_grad"] else [p for p in group["params"] if p.grad is not None]
    project_params(params, constraint_of(group), skip, metric, initial, None if group["without_grad"] else rows)


def project_params(
    params: Iterable[torch.Tensor],
    constraint: Constraint | None,
    skip: torch.Tensor | None = None,
    metric: Metric | None = None,
    initial: Initial | None = None,
    rows: MovedRows | None = None,
) -> None:
    """Project parameters in place; not where `skip`, GradScaler's count of gradients with inf or NaN, is positive.

    `rows` knows which rows are enough where a gradient is sparse.
    """
    if constraint is None:
        return
    params = list(params)
    if rows and not any(p.grad is not None and p.grad.is_sparse for p in params):
        rows = None
    whole, spread = [], []
    for p in params:
        if not sharded.is_dtensor(p):
            own = constraint.bind(initial[p]) if initial and p in initial else constraint
            moved = rows.of(p, constraint) if rows and own is constraint else None
            if moved is not None:
                _project_rows(p, moved, constraint, skip, metric)
            elif own is constraint:
                whole.append(p)
            else:
                project_(p, own, skip, metric)
        elif initial and p in initial:
            sharded.project([p], constraint.bind(initial[p].reshape(-1)), skip)
        elif sharded.crossed(p, constraint):
            # Once more: it may have been sharded after the optimizer was made.
            sharded.check_spread(p, constraint, "euclidean" if metric is None else "adaptive", "a parameter")
            spread.append(p)
        elif p.to_local().numel():
            project_whole([p.to_local()], constraint, skip, metric and _of_shard(p, metric))
    project_whole(whole, constraint, skip, metric)
    if spread:
        sharded.project(spread, constraint, skip)
    if rows and skip is None:
        for p in params:
            rows.projected(p, constraint)


def project_whole(
    params: Sequence[torch.Tensor], constraint: Constraint, skip: torch.Tensor | None, metric: Metric | None
) -> None:
    """What a kernel can take in one call, what a graph can, small ones in stacks, the others one by one."""
    if skip is None and (kernel := path.projector(params, constraint, metric)):
        params = kernel(params, constraint, metric)
    if params and skip is None and metric is None and isinstance(constraint, MaxNorm):
        many = compiled if torch.compiler.is_compiling() else stacked
        params = many.project_(params, constraint)
    for p in params:
        project_(p, constraint, skip, metric)


def _project_rows(
    p: torch.Tensor, moved: torch.Tensor, constraint: Constraint, skip: torch.Tensor | None, metric: Metric | None
) -> None:
    def of(x: torch.Tensor, pick: Pick | None = None) -> torch.Tensor | None:
        diagonal = None if metric is None else metric(p, lambda t: t.index_select(0, moved))
        return diagonal if diagonal is None or pick is None else pick(diagonal)

    x = p.index_select(0, moved)
    if x.device.type == "cpu":
        project_whole([x], constraint, skip, metric and of)
    else:  # kernels need tables on the device, which are not worth making for a tensor of this step
        project_(x, constraint, skip, metric and of)
    p.index_copy_(0, moved, x)  # a row that is there twice is the same twice


def _of_shard(p: torch.Tensor, metric: Metric) -> Metric:
    """The metric of what this rank holds of `p`."""

    def of(local: torch.Tensor, pick: Pick | None = None) -> torch.Tensor | None:
        diagonal = metric(p)
        if diagonal is not None and sharded.is_dtensor(diagonal):
            diagonal = diagonal.to_local()
        return diagonal if diagonal is None or pick is None else pick(diagonal)

    return of


def project_(
    p: torch.Tensor, constraint: Constraint, skip: torch.Tensor | None = None, metric: Metric | None = None
) -> None:
    """Project one parameter in place."""
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    if vectors is None:
        return
    fast = constraint if isinstance(constraint, MaxNorm) and skip is None and ball.takes(p) else None
    if fast and metric is None:
        ball.project_ball_(p, fast.c, vectors)
        return
    if fast and metric and metric_ball.project_ball_(p, fast.c, vectors, metric):
        return
    w = p.clone() if torch.is_grad_enabled() else p  # differentiable: autograd keeps what the projection started from
    x = w.reshape(vectors.shape)
    projection = constraint.land(x, vectors.axes, xp)
    if metric is not None:
        projection = _in_metric(p, x, projection, vectors, constraint, metric)
    projection = projection.reshape(p.shape)
    if skip is not None:  # chosen on the device: reading `skip` here would wait for it
        projection = torch.where(skip.to(p.device) > 0, p, projection)
    p.copy_(projection)
    if fast:  # whose norms may differ in the last place, and may be those of the next step
        ball.project_ball_(p, fast.c, vectors)


def _in_metric(
    p: torch.Tensor, x: torch.Tensor, euclidean: torch.Tensor, vectors: Vectors, constraint: Constraint, metric: Metric
) -> torch.Tensor:
    """The projection of x in the metric of its step.

    Vectors that the Euclidean projection leaves alone are in the set, whatever the metric. On a CPU that can be looked
    at: nothing more is done where there are no others. Elsewhere looking would wait for the device.
    """
    look = type(x.data) is torch.Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if look and not bool((euclidean != x).any()):
        return euclidean
    diagonal = metric(p)
    if diagonal is None:
        return euclidean
    repeat = _until_done if look else None
    projection: torch.Tensor = constraint.onto_in(diagonal.reshape(vectors.shape), x, vectors.axes, xp, repeat)
    return projection


def _until_done(body: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], start: torch.Tensor) -> torch.Tensor:
    nu = start
    for _ in range(metrics.STEPS):
        nu, done = body(nu)
        if bool(done):
            break
    return nu
