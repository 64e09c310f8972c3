"""Make Hyperball optimizers: the weights of every matrix on a sphere, and updates of a fixed angle."""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch.optim import Optimizer

from projgd.constraints import Sphere
from projgd.torch.inner import as_list
from projgd.torch.optimizers import Projected, projected
from projgd.updates import RelativeUpdate

_made: dict[type[Optimizer], type[Projected]] = {}


def hyperball(cls: type[Optimizer]) -> type[Projected]:
    """Return the optimizer class `cls` as Hyperball: W ← R · Norm(W - η R · Norm(u)), R = ‖W₀‖, for every matrix.

    u is the direction of the inner optimizer, Norm divides by the Frobenius norm, and η is the `lr`, which may follow a
    schedule. The class is `projected(cls)` with `constraint=Sphere("initial", axis="matrix")`,
    `update=RelativeUpdate()` and no weight decay, because the sphere holds the norm already. Biases and gains, and
    groups with `constraint=None`, take the step of `cls` itself.

    Args:
        cls: an optimizer class with an `lr`.

    Returns:
        A class whose constructor takes what that of `cls` takes.

    Raises:
        TypeError: an object that is not an optimizer class.
        ValueError: when the optimizer is made: a `weight_decay` for the matrices; a matrix that starts at zero, as
            residual projections often do, and so has no radius.

    >>> import torch
    >>> layer = torch.nn.Linear(4, 4)
    >>> opt = hyperball(torch.optim.AdamW)(layer.parameters(), lr=0.01)
    >>> before = layer.weight.norm()
    >>> layer(torch.ones(1, 4)).square().sum().backward()
    >>> opt.step()
    >>> bool(torch.isclose(layer.weight.norm(), before, rtol=1e-6))
    True

    References:
        Wen, Dang, Lyu, Ma, Liang, *Hyperball*, 2026, arXiv 2606.16899.
    """
    if cls not in _made:
        _made[cls] = _make(cls)
    return _made[cls]


def _make(cls: type[Optimizer]) -> type[Projected]:
    """Return a new Hyperball class over `cls`."""
    base: Any = projected(cls)
    takes = inspect.signature(cls).parameters

    def init(self: Projected, params: Any, *args: Any, **kwargs: Any) -> None:
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
        base.__init__(self, params, *args, **kwargs, **fixed)

    def reduce_ex(self: Projected, protocol: Any) -> Any:
        if type(self) is not hyperball(cls):  # a subclass that somebody wrote: found by its own name
            return base.__reduce_ex__(self, protocol)
        return _make_blank, (cls,), self.__getstate__()

    body = {"__init__": init, "__reduce_ex__": reduce_ex, "__doc__": f"Run Hyperball over `{cls.__qualname__}`."}
    return cast("type[Projected]", type(f"Hyperball{cls.__name__}", (base,), {**body, "__module__": base.__module__}))


def _make_blank(cls: type[Optimizer]) -> Projected:
    """Return an empty Hyperball optimizer, for unpickling."""
    made = hyperball(cls)
    return made.__new__(made)
