"""The projection of parameters in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import array_api_compat.torch as xp
import torch

from projgd.constraints import Constraint
from projgd.torch.settings import constraint_of


@torch.no_grad()
def project_group(group: Mapping[str, Any]) -> None:
    """Project every parameter of a param group that has a gradient."""
    constraint = constraint_of(group)
    if constraint is None:
        return
    for p in group["params"]:
        if p.grad is not None:
            project_(p, constraint)


def project_(p: torch.Tensor, constraint: Constraint) -> None:
    """Project one parameter in place."""
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    if vectors is not None:
        p.copy_(constraint.onto(p.reshape(vectors.shape), vectors.axes, xp).reshape(p.shape))
