"""Any `torch.optim.Optimizer` with a projection after its step.

A step goes straight down: settings (only if a group has changed), routes (only if settings, tensors or memory have
changed), `engine.run`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _use_grad_for_differentiable

from projgd.axes import Axis
from projgd.constraints import Constraint
from projgd.torch import metrics, routing, settings, shaping
from projgd.torch.engines.base import Job
from projgd.torch.engines.rows import forget_written_tables
from projgd.torch.radii import KEY, Radii
from projgd.torch.settings import Snapshot
from projgd.updates import Update

# Keys that schedulers, loggers and layer-wise decay keep in a group, beside those of the optimizer itself.
_FOREIGN_KEYS = {"params", "param_names", "name", "initial_lr", "swa_lr", "min_lr", "max_lr", "lr_scale"}
_FOREIGN_KEYS |= {"base_momentum", "max_momentum"}

# The decorator that sets the grad mode around the steps of torch.optim; it breaks a compiled graph on purpose.
_BREAKS_GRAPHS = _use_grad_for_differentiable(lambda self: None).__code__

_NOT_GIVEN: Any = ...  # for a setting, None says something
_made: dict[type[Optimizer], type[Projected]] = {}


class Projected(Optimizer):
    """What `projected` puts in front of an optimizer class: settings in its groups, a projection after its step.

    A subclass may have a `step` of its own. If that does not call `super().step()`, what it did is projected all the
    same.
    """

    inner: ClassVar[type[Optimizer]]
    __signature__: ClassVar[inspect.Signature]  # what help() shows
    _seen: tuple[Snapshot, ...] = ()  # the groups as they were when they were last checked

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
        c: float | Tensor | None = _NOT_GIVEN,
        axis: Axis = _NOT_GIVEN,
        constraint: Constraint | None = _NOT_GIVEN,
        update: Update | None = _NOT_GIVEN,
        gradient: Literal["tangent"] | None = _NOT_GIVEN,
        metric: Literal["euclidean", "adaptive"] = _NOT_GIVEN,
        without_grad: bool = _NOT_GIVEN,
        engine: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = (c, axis, constraint, update, gradient, metric, without_grad)
        own = {k: v for k, v in zip(settings.KEYS, given, strict=True) if v is not _NOT_GIVEN}
        self._inherited = settings.settle(own, {})
        self._radii = Radii(self)
        self._has_projected: bool | None = False  # None while a step runs that may not come to it
        self._engine = engine
        if engine is not None and engine not in routing.NAMES:
            raise ValueError(f"engine={engine!r} is not known: pass one of {', '.join(routing.NAMES)}, or None")
        self._refuse_misspelt(kwargs)
        params = as_list(params)
        super().__init__(params, *args, **kwargs)
        self.defaults = {**self.defaults, **own}
        settings.refuse_lone_axis(own, self.param_groups)
        self._refuse_other_tensors(params)
        self._made_with = [k for k in vars(self) if not k.endswith("_hooks")]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with settings of its own or the constructor's.

        Args:
            param_group: `params`, and any of the optimizer's options, `c`, `axis`, `constraint`, `update`, `gradient`,
                `metric` and `without_grad`.

        Raises:
            TypeError, ValueError: what `projgd` or the optimizer cannot do; nothing is added then.
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
        taken = shaping.take_initial(settings.constraint_of(group), named)
        super().add_param_group(group)
        self._radii.add(taken)
        self._seen = (*self._seen, Snapshot.of(self.param_groups[-1]))

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the inner optimizer's step, then project the parameters.

        The inner `step` is called without torch's wrapper that runs the hooks: this method has that wrapper itself, so
        every hook runs once, and a post-hook sees the projected weights.

        Args:
            closure: re-evaluates the model and returns the loss.
            *args, **kwargs: passed on to the inner step.

        Returns:
            What the inner step returned: that loss, or None.

        Raises:
            TypeError, ValueError: a setting was changed in a group to what cannot be done; nothing is written then.
        """
        self._adopt_changes()
        compiled = torch.compiler.is_compiling()
        may_step = not (args or kwargs or compiled) and routing.may_step(self.inner, self.param_groups)
        if not compiled:  # a compiled graph has no sparse gradients
            forget_written_tables()
        if not may_step:
            kept = metrics.before_step(self, self.inner)
            loss = self._run_inner(self, closure, *args, **kwargs)
            self._project(kept)
            return loss
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            work = self._routes({}, may_step=True)
            if rest := routing.step(work, self):
                self._run_inner(rest, None)
            self._run(work)
        return loss

    def routes(self, compiled: bool = False) -> routing.Routes:
        """Return the engine that projects each parameter, and what the engines that are tried before it say.

        Args:
            compiled: whether to answer for a step inside of torch.compile.

        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = projected(torch.optim.SGD)(layer.named_parameters(), lr=0.1, c=4.0)
        >>> print(opt.routes()["bias"].engine)
        free
        """
        self._adopt_changes()
        may_step = not compiled and routing.may_step(self.inner, self.param_groups)
        found = routing.Routes()
        grad_enabled = bool(self.defaults.get("differentiable"))
        with torch.set_grad_enabled(grad_enabled):
            for i, job in enumerate(self._jobs({}, compiled)):
                for name, p in settings.named(job.group, i).items():
                    engine, refusals = routing.choose(job, p, may_step)
                    found[name] = routing.Choice(engine.name if engine else routing.FREE, refusals)
        return found

    def _run_inner(self, optimizer: Optimizer, closure: Callable[[], Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Run the inner class's step on `optimizer`: this one, or a view of it with fewer parameters."""
        inner: Any = _unhooked(self.inner.step)
        differentiable = bool(self.defaults.get("differentiable"))
        breaks_graphs = torch.compiler.is_compiling() and getattr(inner, "__code__", None) is _BREAKS_GRAPHS

        def call(closure: Callable[[], Any] | None) -> Any:
            given = (optimizer, closure, *args) if args or closure is not None else (optimizer,)
            if not breaks_graphs:
                return inner(*given, **kwargs)
            with torch.set_grad_enabled(differentiable):
                return inner.__wrapped__(*given, **kwargs)

        self._all_radii()  # of the weights as they are before the step
        if not any(shaping.is_shaped(group) for group in optimizer.param_groups):
            return call(closure)
        spare = {} if torch.compiler.is_compiling() else self._spare
        return shaping.step(self.inner, optimizer.param_groups, spare, call, closure)

    def _project(self, kept: Mapping[Tensor, dict[str, Any]]) -> None:
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            self._run(self._routes(kept, may_step=False))

    def _run(self, work: Iterable[tuple[Job, routing.Route]]) -> None:
        """Run the engines that only project."""
        self._radii.note_step()
        routing.project(work)
        self._has_projected = True

    def _routes(self, kept: Mapping[Tensor, dict[str, Any]], may_step: bool) -> list[tuple[Job, routing.Route]]:
        jobs = self._jobs(kept, compiled := torch.compiler.is_compiling())
        if compiled:
            return [(job, route) for job in jobs for route in routing.make_routes(job, may_step)]
        return self._router.routes(jobs, may_step)

    def _jobs(self, kept: Mapping[Tensor, dict[str, Any]], compiled: bool) -> list[Job]:
        radii, skip = self._all_radii(), getattr(self, "found_inf", None)
        return [
            Job(
                self,
                self.inner,
                group,
                seen.constraint if not compiled else settings.constraint_of(group),
                metrics.after_step(self, self.inner, group, kept),
                radii,
                skip,
                self._engine,
                compiled,
                group["params"],
            )
            for group, seen in zip(self.param_groups, self._seen, strict=True)
        ]

    def _all_radii(self) -> dict[Tensor, Tensor]:
        return self._radii.all_of(
            (seen.constraint, settings.named(group, i))
            for i, (group, seen) in enumerate(zip(self.param_groups, self._seen, strict=True))
            if seen.constraint is not None and seen.constraint.takes_initial
        )

    @functools.cached_property
    def _router(self) -> routing.Router:
        return routing.Router()

    @functools.cached_property
    def _spare(self) -> dict[Tensor, Tensor]:
        return {}

    def _adopt_changes(self) -> None:
        """Check what has been changed in the groups since they were last seen, and let it hold from now on."""
        if len(self._seen) != len(self.param_groups) or not all(map(Snapshot.still, self._seen, self.param_groups)):
            self._adopt_changed_settings()
        if self._has_projected is False and not torch.compiler.is_compiling():
            for i, group in enumerate(self.param_groups):  # once more: the model may have been wrapped since
                settings.check(settings.constraint_of(group), settings.named(group, i), group["metric"])

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _adopt_changed_settings(self) -> None:
        seen = {id(s.group): s for s in self._seen}
        self._seen = tuple(self._look(group, i, seen.get(id(group))) for i, group in enumerate(self.param_groups))
        self._radii.keep_only(set(map(id, _in_order(self.param_groups))))
        self._spare.clear()

    def _look(self, group: dict[str, Any], index: int, seen: Snapshot | None) -> Snapshot:
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
        moves = only_c and None not in (was, constraint)
        if not (moves and settings.is_usual(constraint) and settings.is_usual(was)):
            self._router.clear()
            self._check(now, named)
            if seen is not None and was != constraint:
                self._radii.drop(group["params"])
                self._radii.take(constraint, named)
        group.update(own)
        return Snapshot.of(group)

    def _check(self, group: Mapping[str, Any], named: Mapping[str, Tensor]) -> None:
        """Raise an error that names the parameter if its group's settings cannot be applied to it."""
        constraint = settings.constraint_of(group)
        settings.check(constraint, named, group["metric"])
        metrics.check(constraint, group["metric"], self.inner)
        shaping.check(self.inner, {**self.defaults, **group}, named)
        if self._engine is not None:
            routing.check_forced(self, {**self.defaults, **group}, named, self._engine)

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
        """The optimizer's state in plain types: sets and shapings as their `config`, radii under "initial".

        Returns:
            A dict that `torch.save` writes and `torch.load(weights_only=True)` reads.
        """
        self._adopt_changes()
        self._radii.store()
        state = super().state_dict()
        groups, of_param = [settings.to_plain(g) for g in state["param_groups"]], state["state"]
        if any(KEY in s for s in of_param.values() if isinstance(s, dict)):
            # torch.distributed.checkpoint wants a state of all parameters or of none
            of_param = {**{i: {} for i in _in_order(groups)}, **of_param}
        return {**state, "state": of_param, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state from this class or from the stock optimizer; the latter keeps the present constraints.

        Raises:
            TypeError, ValueError: a setting in it that cannot be honoured; nothing is loaded then.
        """
        self._adopt_changes()
        waiting = {p: r for p in _in_order(self.param_groups) if (r := self._radii.get(p)) is not None}
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
        initial = {i: s.pop(KEY) for i, s in of_param.items() if KEY in s}  # torch would round to p.dtype
        of_param = {i: s for i, s in of_param.items() if s}
        super().load_state_dict({**state_dict, "state": of_param, "param_groups": saved})
        self._radii.replace(waiting)
        self._router.clear()
        for index, p in zip(_in_order(saved), _in_order(self.param_groups), strict=True):
            if index in initial:
                self.state[p][KEY] = initial[index].to(p.device, copy=True)
        self._seen = tuple(Snapshot.of(g, s) for g, s in zip(self.param_groups, saved, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """What torch keeps, and what the inner class's constructor set beside it: torch drops that from copies."""
        self._adopt_changes()
        self._radii.store()
        made_with = {k: vars(self)[k] for k in self._made_with}
        return {**super().__getstate__(), **made_with, "_made_with": self._made_with}

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
    if isinstance(params, (Tensor, str)) or not isinstance(params, Iterable):
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
        self._adopt_changes()
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
            self._project({})
        return loss

    stepped.projects = True  # type: ignore[attr-defined]
    return stepped
