"""The projection of parameters in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import array_api_compat.torch as xp
import torch

from projgd.constraints import Constraint, MaxNorm
from projgd.torch import ball
from projgd.torch.settings import constraint_of


def project_group(group: Mapping[str, Any], skip: torch.Tensor | None = None) -> None:
    """Project the parameters of a param group that have a gradient, and with `without_grad` all of them."""
    params = group["params"] if group["without_grad"] else [p for p in group["params"] if p.grad is not None]
    project_params(params, constraint_of(group), skip)


def project_params(
    params: Iterable[torch.Tensor], constraint: Constraint | None, skip: torch.Tensor | None = None
) -> None:
    """Project parameters in place; not where `skip`, GradScaler's count of gradients with inf or NaN, is positive."""
    if constraint is not None:
        for p in params:
            project_(p, constraint, skip)


def project_(p: torch.Tensor, constraint: Constraint, skip: torch.Tensor | None = None) -> None:
    """Project one parameter in place."""
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    if vectors is None:
        return
    if isinstance(constraint, MaxNorm) and skip is None and ball.takes(p):
        ball.project_ball_(p, constraint.c, vectors)
        return
    w = p.clone() if torch.is_grad_enabled() else p  # differentiable: autograd keeps what the projection started from
    projection = constraint.onto(w.reshape(vectors.shape), vectors.axes, xp).reshape(p.shape)
    if skip is not None:  # chosen on the device: reading `skip` here would wait for it
        projection = torch.where(skip.to(p.device) > 0, p, projection)
    p.copy_(projection)
