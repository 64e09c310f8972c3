"""Hyperball: any optimizer with the weights of every matrix on a sphere, and updates of a fixed angle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from projgd.constraints import Sphere
from projgd.torch.optimizers import Projected, as_list, projected
from projgd.updates import RelativeUpdate


def hyperball(cls: type[Optimizer]) -> Callable[..., Projected]:
    """`projected(cls)` with the settings of Hyperball: W ← R · Norm(W - η R · Norm(u)), R = ‖W₀‖ for every matrix.

    u is the direction of the inner optimizer, Norm divides by the Frobenius norm, and η is the `lr`, scheduled as ever
    (Wen, Dang, Lyu, Ma, Liang 2026, arXiv 2606.16899). In other words: `constraint=Sphere("initial", axis="matrix")`,
    `update=RelativeUpdate()` and no weight decay, whose work of holding the norm the sphere does. Biases and gains, and
    groups with `constraint=None`, take the step of `cls` itself.

    Raises:
        ValueError: a `weight_decay` for the matrices; a matrix that starts at zero, as residual projections often do,
            and so has no radius.

    >>> import torch
    >>> layer = torch.nn.Linear(4, 4)
    >>> opt = hyperball(torch.optim.AdamW)(layer.parameters(), lr=0.01)
    >>> before = layer.weight.norm()
    >>> layer(torch.ones(1, 4)).square().sum().backward()
    >>> opt.step()
    >>> bool(torch.isclose(layer.weight.norm(), before, rtol=1e-6))
    True
    """
    made = projected(cls)
    takes = inspect.signature(cls).parameters

    def make(params: Any, *args: Any, **kwargs: Any) -> Projected:
        decay = dict(zip(takes, (params, *args), strict=False)).get("weight_decay", kwargs.get("weight_decay"))
        groups = params = as_list(params)
        own = [g.get("weight_decay") for g in groups if isinstance(g, dict) and g.get("constraint", cls) is not None]
        if wanted := next((d for d in (decay, *own) if d), None):
            raise ValueError(
                f"weight_decay={wanted} has no place in hyperball(): the norm of every matrix is fixed, so decay would "
                "only shorten the rest of its update. Leave it out, or give free groups (constraint=None) their own"
            )
        if decay is None and "weight_decay" in takes:
            kwargs["weight_decay"] = 0.0
        fixed: dict[str, Any] = {"constraint": Sphere("initial", axis="matrix"), "update": RelativeUpdate()}
        return made(params, *args, **kwargs, **fixed)

    return make
