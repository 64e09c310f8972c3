"""Any `torch.optim.Optimizer` with a projection after its step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, cast

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable

from projgd.constraints import Sphere
from projgd.torch import metrics, path, settings, shaping
from projgd.torch.project import project_group
from projgd.torch.sparse import MovedRows
from projgd.updates import RelativeUpdate

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
        # Beside `self.state`, for an optimizer takes a parameter with an empty state there for a new one.
        self._initial: dict[torch.Tensor, torch.Tensor] = {}
        super().__init__(params, *args, **kwargs)
        self._made_with = [k for k in vars(self) if not k.endswith("_hooks")]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with `c`, `axis`, `constraint` or `update` of its own or the constructor's.

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
        constraint, named = settings.constraint_of(group), settings.named(group, len(self.param_groups))
        settings.check(constraint, named, group["metric"])
        metrics.check(constraint, group["metric"], self.inner)
        shaping.check(self.inner, {**self.defaults, **group}, named)
        initial = shaping.initial(constraint, named)
        super().add_param_group(group)
        self._initial |= initial

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """The inner optimizer's own step, its update shaped where a group says so, then the projection.

        The inner `step` is called without torch's wrapper that runs the hooks: this method has that wrapper itself, so
        every hook runs once, and a post-hook sees the projected weights.
        """
        fused_step = None if kwargs else path.stepper(self)
        if fused_step is None:
            return self._eager_step(closure, **kwargs)
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with torch.no_grad():
            if left := fused_step(self):
                groups, self.param_groups = self.param_groups, left
                try:
                    self._eager_step(None)
                finally:
                    self.param_groups = groups
        return loss

    def projection_path(self) -> dict[str, path.Path]:
        """The path that each parameter takes, "fused" or "eager", and why, by the parameter's name.

        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = ProjectedSGD(layer.named_parameters(), lr=0.1, c=4.0)
        >>> print(opt.projection_path()["weight"])
        eager: fused=True was not passed
        """
        return path.by_parameter(self)

    def _eager_step(self, closure: Callable[[], Any] | None, **kwargs: Any) -> Any:
        for group in self.param_groups:
            settings.constraint_of(group)  # a bad c raises before the first write
        differentiable = bool(self.defaults.get("differentiable"))
        inner: Any = self.inner.step
        if getattr(inner, "hooked", False):
            inner = inner.__wrapped__
        breaks_graphs = torch.compiler.is_compiling() and getattr(inner, "__code__", None) is _BREAKS_GRAPHS

        def call(closure: Callable[[], Any] | None) -> Any:
            if not breaks_graphs:
                return _call(inner, self, closure, kwargs)
            with torch.set_grad_enabled(differentiable):
                return _call(inner.__wrapped__, self, closure, kwargs)

        rows = None if torch.compiler.is_compiling() else self._rows  # a compiled graph has no sparse gradients
        if rows:
            rows.before_step()
        kept = metrics.before_step(self, self.inner)
        self._take_initial()
        if any(shaping.is_shaped(group) for group in self.param_groups):
            loss = shaping.step(self.inner, self.param_groups, self._initial, call, closure)
        else:
            loss = call(closure)
        with torch.set_grad_enabled(differentiable):
            for group in self.param_groups:
                metric = metrics.after_step(self, self.inner, group, kept)
                left = shaping.not_landed(group)
                project_group(left, getattr(self, "found_inf", None), metric, self._initial, rows)
        return loss

    @functools.cached_property
    def _rows(self) -> MovedRows:
        return MovedRows(self, self.inner)

    def _take_initial(self) -> None:
        """For parameters put into a group behind `add_param_group`, as Accelerate does with those that it shards."""
        for group in self.param_groups:
            if getattr(group["constraint"], "radius", None) == "initial":
                new = {f"parameter {i}": p for i, p in enumerate(group["params"]) if p not in self._initial}
                self._initial |= shaping.initial(group["constraint"], new)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state in plain types: sets and shapings as their `config`, radii under "initial"."""
        state = super().state_dict()
        of_param = dict(state["state"])
        for index, p in zip(_in_order(state["param_groups"]), _in_order(self.param_groups), strict=True):
            if p in self._initial:
                of_param[index] = {**of_param.get(index, {}), "initial": self._initial[p]}
        return {**state, "state": of_param, "param_groups": [settings.to_plain(g) for g in state["param_groups"]]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from this class or from the stock optimizer; the latter keeps the present constraints."""
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):
            saved = [settings.from_plain(s, g) for s, g in zip(saved, self.param_groups, strict=True)]
            for group in saved:
                metrics.check(settings.constraint_of(group), group["metric"], self.inner)
                for i in group["params"]:
                    metrics.check_state(state_dict["state"].get(i, {}), group, self.inner)
        of_param = {i: dict(s) for i, s in state_dict["state"].items()}
        initial = {i: s.pop("initial") for i, s in of_param.items() if "initial" in s}  # torch would round to p.dtype
        of_param = {i: s for i, s in of_param.items() if s}
        super().load_state_dict({**state_dict, "state": of_param, "param_groups": saved})
        for index, p in zip(_in_order(saved), _in_order(self.param_groups), strict=True):
            if index in initial:
                taken = initial[index].to(p.device, copy=True)
                self._initial[p] = taken.reshape(self._initial[p].shape) if p in self._initial else taken

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
    max-norm bound; or `constraint=`; `c=None` frees a group. `update=` first shapes the optimizer's update against the
    weights, and `gradient="tangent"` removes from the gradient what would change the norm (in place, in `p.grad`). A
    group's own setting wins over the constructor's.

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
    if issubclass(cls, Projected):
        return cls
    if taken := [k for k in settings.KEYS if k in inspect.signature(cls).parameters]:
        raise TypeError(f"{cls.__name__} has an option {taken[0]} of its own: make it and use project_after_step()")
    return _subclass(cast("Any", cls))


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
        groups = params = _as_list(params)
        own = [g.get("weight_decay") for g in groups if isinstance(g, dict) and g.get("constraint", cls) is not None]
        if wanted := next((d for d in (decay, *own) if d), None):
            raise ValueError(
                f"weight_decay={wanted} has no place in hyperball(): the norm of every matrix is fixed, so decay would "
                "only shorten the rest of its update. Leave it out, or give free groups (constraint=None) their own"
            )
        if decay is None and "weight_decay" in takes:
            kwargs["weight_decay"] = 0.0
        fixed = {"constraint": Sphere("initial", axis="matrix"), "update": RelativeUpdate()}
        return made(params, *args, **kwargs, **fixed)

    return make


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


def _in_order(groups: Iterable[dict[str, Any]]) -> list[Any]:
    return [p for group in groups for p in group["params"]]


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
