"""Define the projected classes of torch.optim by name, so that a type checker sees them; and Hyperball classes.

Each class is what `projected` returns for the class that follows `Projected` in its bases.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import nn, optim
from torch.optim import Optimizer

from projgd.constraints import Sphere
from projgd.torch.methods import as_list
from projgd.torch.optimizers import Projected, projected
from projgd.updates import RelativeUpdate


class ProjectedAdadelta(Projected, optim.Adadelta):
    """Run `torch.optim.Adadelta`, then project the parameters.

    The constructor takes what `torch.optim.Adadelta` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdadelta(layer.parameters(), lr=1.0, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdafactor(Projected, optim.Adafactor):
    """Run `torch.optim.Adafactor`, then project the parameters.

    The constructor takes what `torch.optim.Adafactor` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdafactor(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdagrad(Projected, optim.Adagrad):
    """Run `torch.optim.Adagrad`, then project the parameters.

    The constructor takes what `torch.optim.Adagrad` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdagrad(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdam(Projected, optim.Adam):
    """Run `torch.optim.Adam`, then project the parameters.

    The constructor takes what `torch.optim.Adam` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdam(layer.parameters(), lr=1e-3, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdamW(Projected, optim.AdamW):
    """Run `torch.optim.AdamW`, then project the parameters.

    The constructor takes what `torch.optim.AdamW` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdamW(layer.parameters(), lr=1e-3, weight_decay=0.1, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedAdamax(Projected, optim.Adamax):
    """Run `torch.optim.Adamax`, then project the parameters.

    The constructor takes what `torch.optim.Adamax` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedAdamax(layer.parameters(), lr=2e-3, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedASGD(Projected, optim.ASGD):
    """Run `torch.optim.ASGD`, then project the parameters.

    The constructor takes what `torch.optim.ASGD` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedASGD(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedLBFGS(Projected, optim.LBFGS):
    """Run `torch.optim.LBFGS`, then project the parameters.

    The line search evaluates points outside of the set; only the end of the step is projected.

    The constructor takes what `torch.optim.LBFGS` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedLBFGS(layer.parameters(), lr=0.5, c=0.1)
    >>> def closure():
    ...     opt.zero_grad()
    ...     loss = layer(torch.ones(1, 3)).square().sum()
    ...     loss.backward()
    ...     return loss
    >>> loss = opt.step(closure)
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedMuon(Projected, optim.Muon):
    """Run `torch.optim.Muon`, then project the parameters.

    Muon takes matrices only.

    The constructor takes what `torch.optim.Muon` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedMuon([layer.weight], lr=0.02, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedNAdam(Projected, optim.NAdam):
    """Run `torch.optim.NAdam`, then project the parameters.

    The constructor takes what `torch.optim.NAdam` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedNAdam(layer.parameters(), lr=2e-3, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedRAdam(Projected, optim.RAdam):
    """Run `torch.optim.RAdam`, then project the parameters.

    The constructor takes what `torch.optim.RAdam` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedRAdam(layer.parameters(), lr=1e-3, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedRMSprop(Projected, optim.RMSprop):
    """Run `torch.optim.RMSprop`, then project the parameters.

    The constructor takes what `torch.optim.RMSprop` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedRMSprop(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedRprop(Projected, optim.Rprop):
    """Run `torch.optim.Rprop`, then project the parameters.

    The constructor takes what `torch.optim.Rprop` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedRprop(layer.parameters(), lr=1e-2, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedSGD(Projected, optim.SGD):
    """Run `torch.optim.SGD`, then project the parameters.

    The constructor takes what `torch.optim.SGD` takes, and `c`, `axis`, `constraint`, `update`, `gradient`, `metric`,
    `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = ProjectedSGD(layer.parameters(), lr=0.1, momentum=0.9, c=0.1)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


class ProjectedSparseAdam(Projected, optim.SparseAdam):
    """Run `torch.optim.SparseAdam`, then project the parameters.

    The first step projects the whole table, later steps only the rows that they move.

    The constructor takes what `torch.optim.SparseAdam` takes, and `c`, `axis`, `constraint`, `update`, `gradient`,
    `metric`, `without_grad`, `engine` and `joint`, see `projgd.torch.Projected`.

    >>> import torch
    >>> layer = torch.nn.Embedding(10, 3, sparse=True)
    >>> opt = ProjectedSparseAdam(layer.parameters(), lr=1e-3, c=0.1)
    >>> layer(torch.tensor([1, 2])).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
    True
    """


_made: dict[type[Optimizer], type[Projected]] = {}


def hyperball(cls: type[Optimizer]) -> type[Projected]:
    """Return the optimizer class `cls` as Hyperball: W ← R · Norm(W - η R · Norm(u)), R = ‖W₀‖, for every matrix.

    u is the direction of the inner optimizer, Norm divides by the Frobenius norm, and η is the `lr`, which may follow a
    schedule. The class is `projected(cls)` with `constraint=Sphere("initial", axis="matrix")`,
    `update=RelativeUpdate()` and no weight decay, because the sphere holds the norm already. Biases and gains, and
    groups with `constraint=None`, take the step of `cls` itself. On a layer with a declared constraint, see
    `constrain`, that constraint wins over the sphere.

    Args:
        cls: an optimizer class with an `lr`.

    Returns:
        A class whose constructor takes what that of `cls` takes, and `axis`: what makes one vector, default `"matrix"`.
        `Stacked("matrix")`, also in a param group, makes one of each matrix in a stack. In the place of `axis` it takes
        `constraint`: rules such as `{"*.experts.*": Sphere("initial", axis=Stacked("matrix")), "embed.*": None}`.

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
        params = as_list(params)
        groups = [] if isinstance(params, nn.Module) else params
        own = [g.get("weight_decay") for g in groups if isinstance(g, dict) and g.get("constraint", cls) is not None]
        if wanted := next((d for d in (decay, *own) if d), None):
            raise ValueError(
                f"weight_decay={wanted} does not go with hyperball(): every norm is fixed, so decay would "
                "only shorten the rest of its update. Leave it out, or give free groups (constraint=None) their own"
            )
        if decay is None and "weight_decay" in takes:
            kwargs["weight_decay"] = 0.0
        if "constraint" not in kwargs:
            kwargs["constraint"] = Sphere("initial", axis=kwargs.pop("axis", "matrix"))
        base.__init__(self, params, *args, **kwargs, update=RelativeUpdate())

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
