"""Any `torch.optim.Optimizer` with a projection after its step."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable

from projgd.axes import Axis
from projgd.constraints import Constraint
from projgd.torch import metrics, path, settings, shaping
from projgd.torch.project import project_group
from projgd.torch.sparse import MovedRows
from projgd.updates import Update

# Keys that schedulers, loggers and layer-wise decay keep in a group, beside those of the optimizer itself.
_FOREIGN_KEYS = {"params", "param_names", "name", "initial_lr", "swa_lr", "min_lr", "max_lr", "lr_scale"}
_FOREIGN_KEYS |= {"base_momentum", "max_momentum"}

# The decorator that sets the grad mode around the steps of torch.optim; it breaks a compiled graph on purpose.
_BREAKS_GRAPHS = _use_grad_for_differentiable(lambda self: None).__code__

_UNSAID: Any = ...  # for a setting, None says something
_made: dict[type[Optimizer], type[Projected]] = {}


class Projected(Optimizer):
    """What `projected` puts in front of an optimizer class: settings in its groups, a projection after its step.

    A subclass may have a `step` of its own. If that does not call `super().step()`, what it did is projected all the
    same.
    """

    inner: ClassVar[type[Optimizer]]
    __signature__: ClassVar[inspect.Signature]  # what help() shows
    _seen: tuple[_Seen, ...] = ()  # the groups as they were when they were last checked

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        behind = cls.__mro__[cls.__mro__.index(Projected) :]
        cls.inner = next(b for b in behind if issubclass(b, Optimizer) and b is not Projected)
        own = f"Projected{cls.inner.__name__}"
        if Projected in cls.__bases__ and cls.__name__ == own:
            name = f"{cls.inner.__module__}.{cls.inner.__qualname__}"
            cls.__doc__ = cls.__doc__ or f"`{name}` with a projection after every step; see `projgd.torch.projected`."
            _made.setdefault(cls.inner, cls)
        cls.__signature__ = _signature(cls)
        step: Any = _unhooked(cls.step)
        if step is not Projected.step and not hasattr(step, "projects"):
            cls.step = _then_projected(step)  # type: ignore[method-assign]

    def __init__(
        self,
        params: Any,
        *args: Any,
        c: float | torch.Tensor | None = _UNSAID,
        axis: Axis = _UNSAID,
        constraint: Constraint | None = _UNSAID,
        update: Update | None = _UNSAID,
        gradient: Literal["tangent"] | None = _UNSAID,
        metric: Literal["euclidean", "adaptive"] = _UNSAID,
        without_grad: bool = _UNSAID,
        **kwargs: Any,
    ) -> None:
        said = (c, axis, constraint, update, gradient, metric, without_grad)
        own = {k: v for k, v in zip(settings.KEYS, said, strict=True) if v is not _UNSAID}
        self._inherited = settings.settle(own, {})
        # Radii of the initial weights that are not in the state, where they belong: a parameter with a radius there and
        # nothing else would not look new to the optimizer. `state_dict` puts them there once they cannot harm.
        self._waiting: dict[torch.Tensor, torch.Tensor] = {}
        self._moved: set[int] = set()  # ids of those of them that the optimizer has stepped, perhaps without a state
        self._has_projected: bool | None = False  # None while a step runs that may not come to it
        self._refuse_misspelt(kwargs)
        params = as_list(params)
        super().__init__(params, *args, **kwargs)
        self.defaults = {**self.defaults, **own}
        settings.refuse_lone_axis(own, self.param_groups)
        self._refuse_other_tensors(params)
        self._made_with = [k for k in vars(self) if not k.endswith("_hooks")]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with `c`, `axis`, `constraint` or `update` of its own or the constructor's.

        Raises:
            TypeError, ValueError: what `projgd` or the optimizer cannot honour; nothing is added then.
        """
        group = dict(param_group)
        group["params"] = as_list(group["params"])
        known = {*settings.KEYS, *self.defaults, *_FOREIGN_KEYS}
        # An optimizer without defaults keeps all that it knows in its groups: what is unknown to it cannot be told.
        if self.defaults.keys() - settings.KEYS and (unknown := sorted(set(group) - known)):
            near = _nearest(unknown[0], known)
            raise ValueError(
                f"a param group has the unknown key {unknown[0]!r}{near}; known are {', '.join(sorted(known))}"
            )
        group |= settings.settle(group, self._inherited)
        settings.refuse_lone_axis(param_group, [group])
        named = settings.named(group, len(self.param_groups))
        self._check(group, named)
        initial = shaping.initial(settings.constraint_of(group), named)
        super().add_param_group(group)
        self._waiting |= initial
        self._seen = (*self._seen, _Seen.of(self.param_groups[-1]))

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """The inner optimizer's own step, its update shaped where a group says so, then the projection.

        The inner `step` is called without torch's wrapper that runs the hooks: this method has that wrapper itself, so
        every hook runs once, and a post-hook sees the projected weights.

        Raises:
            TypeError, ValueError: a setting changed in a group that cannot be honoured; nothing is written then.
        """
        self._settle()
        fused_step = None if args or kwargs else path.stepper(self)
        if fused_step is None:
            return self._eager_step(closure, *args, **kwargs)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if left := fused_step(self):
            groups, self.param_groups = self.param_groups, left
            try:
                with torch.no_grad():
                    self._eager_step(None)
            finally:
                self.param_groups = groups
        self._note_moved()
        self._has_projected = True
        return loss

    def projection_path(self) -> dict[str, path.Path]:
        """The path that each parameter takes, "fused", "kernel" or "eager", and why, by the parameter's name.

        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = projected(torch.optim.SGD)(layer.named_parameters(), lr=0.1, c=4.0)
        >>> print(opt.projection_path()["bias"])
        eager: it has no fan-in: nothing of it is projected
        """
        self._settle()
        return path.by_parameter(self)

    def _eager_step(self, closure: Callable[[], Any] | None, *args: Any, **kwargs: Any) -> Any:
        inner: Any = _unhooked(self.inner.step)
        differentiable = bool(self.defaults.get("differentiable"))
        breaks_graphs = torch.compiler.is_compiling() and getattr(inner, "__code__", None) is _BREAKS_GRAPHS

        def call(closure: Callable[[], Any] | None) -> Any:
            given = (self, closure, *args) if args or closure is not None else (self,)
            if not breaks_graphs:
                return inner(*given, **kwargs)
            with torch.set_grad_enabled(differentiable):
                return inner.__wrapped__(*given, **kwargs)

        rows = None if torch.compiler.is_compiling() else self._rows  # a compiled graph has no sparse gradients
        if rows:
            rows.before_step()
        kept = metrics.before_step(self, self.inner)
        radii = self._radii()
        if any(shaping.is_shaped(group) for group in self.param_groups):
            room = {} if torch.compiler.is_compiling() else self._room
            loss = shaping.step(self.inner, self.param_groups, radii, room, call, closure)
        else:
            loss = call(closure)
        self._note_moved()
        self._project(radii, kept, rows)
        return loss

    def _project(
        self,
        radii: Mapping[torch.Tensor, torch.Tensor],
        kept: Mapping[torch.Tensor, dict[str, Any]],
        rows: MovedRows | None,
    ) -> None:
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            for group in self.param_groups:
                metric = metrics.after_step(self, self.inner, group, kept)
                left = shaping.not_landed(group)
                project_group(left, getattr(self, "found_inf", None), metric, radii, rows)
        self._has_projected = True

    @functools.cached_property
    def _rows(self) -> MovedRows:
        return MovedRows(self, self.inner)

    @functools.cached_property
    def _room(self) -> dict[torch.Tensor, torch.Tensor]:
        return {}

    def _radius_of(self, p: torch.Tensor) -> torch.Tensor | None:
        if p in self._waiting and torch.compiler.is_compiling():  # which must not see a state before the optimizer does
            return self._waiting[p]
        state = self.state.get(p, {})
        return state["initial"] if "initial" in state else self._waiting.get(p)

    def _radii(self) -> dict[torch.Tensor, torch.Tensor]:
        """The radii of `Sphere("initial")`, by parameter. They are taken now for parameters put into a group behind
        `add_param_group`, as Accelerate does with those that it shards."""
        radii: dict[torch.Tensor, torch.Tensor] = {}
        for i, group in enumerate(self.param_groups):
            constraint = settings.constraint_of(group)
            if constraint is not None and getattr(constraint, "radius", None) == "initial":
                for name, p in settings.named(group, i).items():
                    if constraint.resolve(tuple(p.shape), "out_first", name) is not None:
                        radius = self._radius_of(p)
                        if radius is None:
                            self._waiting |= (taken := shaping.initial(constraint, {name: p}))
                            radii |= taken
                        else:
                            radii[p] = radius
        return radii

    def _note_moved(self) -> None:
        if len(self._moved) < len(self._waiting):
            self._moved |= {id(p) for p in self._waiting if p.grad is not None}

    def _store_radii(self) -> None:
        """Put them into the state of every parameter that has one, or that was stepped without getting one."""
        for p in list(self._waiting):
            if self.state.get(p) or id(p) in self._moved:
                self.state[p]["initial"] = self._waiting.pop(p)

    def _settle(self) -> None:
        """Check what has been changed in the groups since they were last seen, and let it hold from now on."""
        if len(self._seen) != len(self.param_groups) or not all(map(_Seen.still, self._seen, self.param_groups)):
            self._adopt_changed_settings()
        if self._has_projected is False and not torch.compiler.is_compiling():
            for i, group in enumerate(self.param_groups):  # once more: the model may have been wrapped since
                settings.check(settings.constraint_of(group), settings.named(group, i), group["metric"])

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _adopt_changed_settings(self) -> None:
        seen = {id(s.group): s for s in self._seen}
        self._seen = tuple(self._look(group, i, seen.get(id(group))) for i, group in enumerate(self.param_groups))
        held = set(map(id, _in_order(self.param_groups)))  # no others are kept alive for their radii
        self._waiting = {p: radius for p, radius in self._waiting.items() if id(p) in held}
        self._moved &= held
        self._room.clear()

    def _look(self, group: dict[str, Any], index: int, seen: _Seen | None) -> _Seen:
        if seen is not None and seen.still(group):
            return seen
        named, was, only_c = settings.named(group, index), None, False
        if seen is None:
            own = settings.settle(group, self._inherited)
        else:
            own, was = settings.adopt(group, seen.settings), settings.constraint_of(seen.settings)
            only_c = settings.moved(group, seen.settings) == {"c"} and seen.has(group["params"])
        now = {**group, **own}
        constraint = settings.constraint_of(now)
        if not only_c or was is None or settings.is_tiny(constraint):
            self._check(now, named)
            if seen is not None and was != constraint:
                for p in group["params"]:
                    self._waiting.pop(p, None)
                    self.state.get(p, {}).pop("initial", None)
                self._waiting |= shaping.initial(constraint, named)
        group.update(own)
        return _Seen.of(group)

    def _check(self, group: Mapping[str, Any], named: Mapping[str, torch.Tensor]) -> None:
        """Refuse what cannot be honoured of a group, all of whose settings are there."""
        constraint = settings.constraint_of(group)
        settings.check(constraint, named, group["metric"])
        metrics.check(constraint, group["metric"], self.inner)
        shaping.check(self.inner, {**self.defaults, **group}, named)

    def _refuse_misspelt(self, kwargs: Mapping[str, Any]) -> None:
        takes = inspect.signature(self.inner).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
            return
        for k in kwargs:
            if k not in takes and (near := _nearest(k, {*takes, *settings.KEYS})):
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {k!r}{near}")

    def _refuse_other_tensors(self, params: Any) -> None:
        """An optimizer that steps copies of the weights in another precision, or all of them in one, hides them."""
        given = set(map(id, _tensors(params)))
        if any(id(p) not in given for p in _in_order(self.param_groups)):
            raise TypeError(
                f"{self.inner.__name__} steps other tensors than those that it was given (copies, or all in one), so "
                "the weights of the model would not be held: after its step, w.copy_(constraint.project(w)) yourself"
            )

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state in plain types: sets and shapings as their `config`, radii under "initial"."""
        self._settle()
        self._store_radii()
        state = super().state_dict()
        groups, of_param = [settings.to_plain(g) for g in state["param_groups"]], state["state"]
        if any("initial" in s for s in of_param.values() if isinstance(s, dict)):
            # torch.distributed.checkpoint wants a state of all parameters or of none
            of_param = {**{i: {} for i in _in_order(groups)}, **of_param}
        return {**state, "state": of_param, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from this class or from the stock optimizer; the latter keeps the present constraints.

        Raises:
            TypeError, ValueError: a setting in it that cannot be honoured; nothing is loaded then.
        """
        self._settle()
        waiting = {p: r for p in _in_order(self.param_groups) if (r := self._radius_of(p)) is not None}
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):  # otherwise torch refuses
            plain, saved = saved, [settings.from_plain(s, g) for s, g in zip(saved, self.param_groups, strict=True)]
            for i, (s, group, present) in enumerate(zip(plain, saved, self.param_groups, strict=True)):
                if settings.moved(group, present):
                    self._check({**group, "params": present["params"]}, settings.named(present, i))
                for k in group["params"]:
                    metrics.check_state(state_dict["state"].get(k, {}), group, self.inner)
                if "constraint" in s:  # not of a stock optimizer: where it has no radius, no step has moved the weights
                    for p in present["params"]:
                        waiting.pop(p, None)
        of_param = {i: dict(s) for i, s in state_dict["state"].items()}
        initial = {i: s.pop("initial") for i, s in of_param.items() if "initial" in s}  # torch would round to p.dtype
        of_param = {i: s for i, s in of_param.items() if s}
        super().load_state_dict({**state_dict, "state": of_param, "param_groups": saved})
        self._waiting, self._moved = waiting, set()
        for index, p in zip(_in_order(saved), _in_order(self.param_groups), strict=True):
            if index in initial:
                self.state[p]["initial"] = initial[index].to(p.device, copy=True)
        self._seen = tuple(_Seen.of(g, s) for g, s in zip(self.param_groups, saved, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """What torch keeps, and what the inner class's constructor set beside it: torch drops that from copies."""
        self._settle()
        self._store_radii()
        made_with = {k: vars(self)[k] for k in self._made_with}
        return {**super().__getstate__(), **made_with, "_made_with": self._made_with, "_moved": set()}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not projected(self.inner):  # a subclass that somebody wrote: found by its own name
            return super().__reduce_ex__(protocol)
        return _blank, (self.inner,), self.__getstate__()


@dataclass(frozen=True)
class _Seen:
    """A param group as it was when it was checked."""

    group: dict[str, Any]
    settings: dict[str, Any]
    params: list[int]  # ids: a wrapper that puts others in their place wants them gone
    constraint: Constraint | None  # in force

    @classmethod
    def of(cls, group: dict[str, Any], own: Mapping[str, Any] | None = None) -> _Seen:
        known = {k: (own or group)[k] for k in settings.KEYS}
        return cls(group, known, list(map(id, group["params"])), settings.constraint_of(known))

    def has(self, params: list[torch.Tensor]) -> bool:
        return list(map(id, params)) == self.params

    def still(self, group: Mapping[str, Any]) -> bool:
        if torch.compiler.is_compiling():  # which watches the parameters itself, and follows c
            now = settings.constraint_of(group)
            same = self.group is group and not settings.moved(group, self.settings, settings.KEYS[1:])
            return same and (not settings.is_tiny(now) or now == self.constraint)
        return self.group is group and not settings.moved(group, self.settings) and self.has(group["params"])


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
    if cls not in _made:
        module = __name__ if cls.__module__.startswith("torch.optim") else cls.__module__
        type(f"Projected{cls.__name__}", (Projected, cast("Any", cls)), {"__module__": module})
    return _made[cls]


def _blank(cls: type[Optimizer]) -> Projected:
    made = projected(cls)
    return made.__new__(made)


def _in_order(groups: Iterable[dict[str, Any]]) -> list[Any]:
    return [p for group in groups for p in group["params"]]


def as_list(params: Any) -> Any:
    """`params` with its iterators read, so that it can be read again."""
    if isinstance(params, Mapping):
        own = params.get("params")
        return params if own is None or isinstance(own, set) else {**params, "params": as_list(own)}
    if isinstance(params, (torch.Tensor, str)) or not isinstance(params, Iterable):
        return params  # torch's own errors are clear here
    return [as_list(p) if isinstance(p, Mapping) else p for p in params]


def _tensors(params: Any) -> list[Any]:
    """All that is in `params`, in whatever form an optimizer takes it."""
    if isinstance(params, Mapping):
        return _tensors(params["params"])
    if isinstance(params, tuple):
        return [params[1]]
    return [t for p in params for t in _tensors(p)] if isinstance(params, list) else [params]


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), sorted(known), n=1)
    return f": did you mean {near[0]!r}?" if near else ""


def _signature(cls: type[Projected]) -> inspect.Signature:
    """What the constructor takes: of a class that has none of its own, what the inner one takes, and the settings."""
    own = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if cls.__init__ is Projected.__init__:
        settings_only = [p for p in own if p.kind is p.KEYWORD_ONLY]
        own = sorted([*inspect.signature(cls.inner).parameters.values(), *settings_only], key=lambda p: p.kind)
    return inspect.Signature(own)


def _unhooked(step: Any) -> Any:
    """A `step` without the wrapper that torch puts around it."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _then_projected(step: Any) -> Any:
    """The step of a subclass, with the projection after it where it has not called `Projected.step`."""

    @functools.wraps(step)
    def stepped(self: Projected, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        groups = [g for g in self.param_groups if shaping.is_shaped(g) or g["metric"] != "euclidean"]
        versions = [p._version for p in _in_order(groups)]
        self._has_projected = None
        loss = step(self, *args, **kwargs)
        if not self._has_projected:
            if [p._version for p in _in_order(groups)] != versions:
                raise RuntimeError(
                    f"{type(self).__name__}.step did not call super().step(), so update=, gradient= and metric= had no "
                    "update to work on: call it, or put the step into a plain Optimizer class and use projected(…)"
                )
            self._project(self._radii(), {}, None)
        return loss

    stepped.projects = True  # type: ignore[attr-defined]
    return stepped
