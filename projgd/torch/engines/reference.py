"""Project with the reference, `projgd.projections`, for every set, dtype, device and memory layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import array_api_compat.torch as xp
import torch
from torch import Tensor

from projgd import metrics
from projgd.torch.engines.base import Engine, Job


class Reference(Engine):
    """Project with the functions of the core, one parameter after the other."""

    name = "reference"

    def refuses(self, job: Job, p: Tensor) -> str | None:
        return None

    def run(self, prepared: None, job: Job, params: Sequence[Tensor]) -> None:
        for p in params:
            project_(p, job)


def project_(p: Tensor, job: Job) -> None:
    """Project `p` in place, unless GradScaler skips the step."""
    vectors = job.vectors(p)
    if vectors is None:
        return
    constraint = job.bound(p)
    w = p.clone() if torch.is_grad_enabled() else p  # autograd needs the value before the projection
    x = w.reshape(vectors.shape)
    projection = constraint.onto(x, vectors.axes, xp, moved=True)
    if job.metric is not None and not (_can_look(x) and bool((projection == x).logical_or_(x != x).all())):
        # Vectors that the Euclidean projection does not move are in the set, in every metric.
        diagonal = job.metric(p)
        if diagonal is not None:
            repeat = _until_done if _can_look(x) else None
            projection = constraint.onto_in(diagonal.reshape(vectors.shape), x, vectors.axes, xp, repeat)
    projection = projection.reshape(p.shape)
    if job.skip is not None:  # `where` runs on the device; reading `skip` would wait for it
        projection = torch.where(job.skip.to(p.device) > 0, p, projection)
    p.copy_(projection)


def _can_look(x: Tensor) -> bool:
    """Return whether reading a number back is free: an accelerator would wait, and a graph cannot read it."""
    return type(x.data) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _until_done(body: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor) -> Tensor:
    """Run steps until one is done, or `STEPS` of them."""
    nu = start
    for _ in range(metrics.STEPS):
        nu, done = body(nu)
        if bool(done):
            break
    return nu
