"""Any `torch.optim.Optimizer` with a projection after its step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable

from projgd.torch import metrics, settings
from projgd.torch.project import project_group

# Keys that schedulers, loggers and layer-wise decay keep in a group, beside those of the optimizer itself.
_FOREIGN_KEYS = {"params", "param_names", "name", "initial_lr", "swa_lr", "min_lr", "max_lr", "lr_scale"}
_FOREIGN_KEYS |= {"base_momentum", "max_momentum"}

# The decorator that sets the grad mode around the steps of torch.optim; it breaks a compiled graph on purpose.
_BREAKS_GRAPHS = _use_grad_for_differentiable(lambda self: None).__code__


class Projected(Optimizer):
    """What `projected` puts in front of an optimizer class: settings in its groups, a projection after its step."""

    inner: ClassVar[type[Optimizer]]

    def __init__(
        self,
        params: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        own = {k: kwargs.pop(k) for k in settings.KEYS if k in kwargs}
        self._inherited = settings.settle(own, {})
        super().__init__(params, *args, **kwargs)
        self._made_with = [k for k in vars(self) if not k.endswith("_hooks")]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with `c`, `axis` or `constraint` of its own or the constructor's.

        Raises:
            TypeError, ValueError: what `projgd` or the optimizer cannot honour; nothing is added then.
        """
        group = dict(param_group)
        group["params"] = _as_list(group["params"])
        known = {*settings.KEYS, *self.defaults, *_FOREIGN_KEYS}
        # An optimizer without defaults keeps all that it knows in its groups: what is unknown to it cannot be told.
        if self.defaults and (unknown := sorted(set(group) - known)):
            raise ValueError(f"a param group has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
        group |= settings.settle(group, self._inherited)
        constraint = settings.constraint_of(group)
        settings.check(constraint, settings.named(group, len(self.param_groups)), group["metric"])
        metrics.check(constraint, group["metric"], self.inner)
        super().add_param_group(group)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """The inner optimizer's own step, then the projection.

        The inner `step` is called without torch's wrapper that runs the hooks: this method has that wrapper itself, so
        every hook runs once, and a post-hook sees the projected weights.
        """
        differentiable = bool(self.defaults.get("differentiable"))
        inner: Any = self.inner.step
        if getattr(inner, "hooked", False):
            inner = inner.__wrapped__
        kept = metrics.before_step(self, self.inner)
        if torch.compiler.is_compiling() and getattr(inner, "__code__", None) is _BREAKS_GRAPHS:
            with torch.set_grad_enabled(differentiable):
                loss = _call(inner.__wrapped__, self, closure, kwargs)
        else:
            loss = _call(inner, self, closure, kwargs)
        with torch.set_grad_enabled(differentiable):
            for group in self.param_groups:
                metric = metrics.after_step(self, self.inner, group, kept)
                project_group(group, getattr(self, "found_inf", None), metric)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state in plain types, the constraints as their `config`."""
        state = super().state_dict()
        return {**state, "param_groups": [settings.to_plain(g) for g in state["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from this class or from the stock optimizer; the latter keeps the present constraints."""
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            saved = [settings.from_plain(s, g) for s, g in zip(saved, self.param_groups, strict=True)]
            for group in saved:
                metrics.check(settings.constraint_of(group), group["metric"], self.inner)
                for i in group["params"]:
                    metrics.check_state(state_dict["state"].get(i, {}), group, self.inner)
        super().load_state_dict({**state_dict, "param_groups": saved})

    def __getstate__(self) -> dict[str, Any]:
        """What torch keeps, and what the inner class's constructor set beside it: torch drops that from copies."""
        return {**super().__getstate__(), **{k: vars(self)[k] for k in self._made_with}, "_made_with": self._made_with}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not projected(self.inner):  # a subclass that somebody wrote: found by its own name
            return super().__reduce_ex__(protocol)
        return _blank, (self.inner,), self.__getstate__()


def projected(cls: type[Optimizer]) -> type[Projected]:
    """The optimizer class `cls` with a projection after every step.

    The class returned takes everything that `cls` takes, and for all groups or in each group: `c=` (with `axis=`), the
    max-norm bound; or `constraint=`; `c=None` frees a group. A group's own setting wins over the constructor's.

    `metric="adaptive"` projects in the norm Σ D_i w_i² of the diagonal D that the optimizer divides its step by, which
    it must to end at the constrained optimum; `"euclidean"`, the default, in the plain norm. D is known for Adam,
    AdamW, NAdam, RAdam, Adamax, Adagrad, RMSprop, Adadelta, Adafactor and SparseAdam; `register_metric` adds to them.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = projected(torch.optim.RMSprop)(layer.parameters(), lr=0.1, c=1.0)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 1.0).all())
    True
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"projected() takes a torch.optim.Optimizer class such as torch.optim.SGD, not {cls!r}")
    return cls if issubclass(cls, Projected) else _subclass(cast("Any", cls))


@functools.cache
def _subclass(cls: Any) -> type[Projected]:
    doc = f"`{cls.__module__}.{cls.__qualname__}` with a projection after every step; see `projgd.torch.projected`."
    module = __name__ if cls.__module__.startswith("torch.optim") else cls.__module__
    return type(f"Projected{cls.__name__}", (Projected, cls), {"inner": cls, "__doc__": doc, "__module__": module})


def _blank(cls: type[Optimizer]) -> Projected:
    made = projected(cls)
    return made.__new__(made)


def _call(step: Any, optimizer: Optimizer, closure: Callable[[], Any] | None, kwargs: dict[str, Any]) -> Any:
    return step(optimizer, **kwargs) if closure is None else step(optimizer, closure, **kwargs)


def _as_list(params: Any) -> Any:
    if isinstance(params, torch.Tensor) or not isinstance(params, Iterable) or isinstance(params, set):
        return params  # torch's own errors are clear here
    return list(params)


ProjectedAdadelta = projected(torch.optim.Adadelta)
ProjectedAdafactor = projected(torch.optim.Adafactor)
ProjectedAdagrad = projected(torch.optim.Adagrad)
ProjectedAdam = projected(torch.optim.Adam)
ProjectedAdamW = projected(torch.optim.AdamW)
ProjectedAdamax = projected(torch.optim.Adamax)
ProjectedASGD = projected(torch.optim.ASGD)
ProjectedLBFGS = projected(torch.optim.LBFGS)
ProjectedMuon = projected(torch.optim.Muon)
ProjectedNAdam = projected(torch.optim.NAdam)
ProjectedRAdam = projected(torch.optim.RAdam)
ProjectedRMSprop = projected(torch.optim.RMSprop)
ProjectedRprop = projected(torch.optim.Rprop)
ProjectedSGD = projected(torch.optim.SGD)
ProjectedSparseAdam = projected(torch.optim.SparseAdam)
