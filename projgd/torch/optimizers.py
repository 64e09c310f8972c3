"""Add a projection to any `torch.optim.Optimizer`.

A step adopts changed settings (only if a group has changed), runs the inner optimizer (`_run_inner`), finds the routes
(anew only if settings, tensors or memory have changed), and projects: it calls `engine.run` for every route. With
`fused=True` the routes come first, engines that step update and project, and the inner optimizer steps what they leave.
"""

from __future__ import annotations

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
from projgd.rules import Rules, suggest
from projgd.torch import layers, metrics, routing, settings, shaping
from projgd.torch.engines.base import Job
from projgd.torch.engines.rows import forget_written_tables
from projgd.torch.joint import JointSets
from projgd.torch.radii import KEY, Radii
from projgd.torch.settings import Snapshot
from projgd.updates import Update

# Schedulers, loggers and layer-wise decay keep these keys in a group, so they are not misspelt options.
_FOREIGN_KEYS = {"params", "param_names", "name", "initial_lr", "swa_lr", "min_lr", "max_lr", "lr_scale"}
_FOREIGN_KEYS |= {"base_momentum", "max_momentum"}

# This decorator sets the grad mode around the steps of torch.optim. It breaks a compiled graph on purpose, so
# `_run_inner` calls the step without it there.
_BREAKS_GRAPHS = _use_grad_for_differentiable(lambda self: None).__code__

_NOT_GIVEN: Any = ...  # None is a value of several settings
_made: dict[type[Optimizer], type[Projected]] = {}


class Projected(JointSets, Optimizer):
    """Run an optimizer of torch.optim, then project the parameters: w ← Π(w + shape(inner update)).

    This is the base class of all projected optimizers. `projgd.torch.projected(cls)` puts it in front of an optimizer
    class, and `projgd.torch` has the result for each class of torch.optim by name, such as `ProjectedSGD`. A subclass
    may define `step`. If that does not call `super().step()`, the parameters are projected after it all the same.

    Every setting below may stand in a param group, too, where it wins over the constructor's. Between steps it may be
    changed there, like `lr`.

    Args:
        params: a `torch.nn.Module`, whose every layer is then read by its own fan-in, as by `param_groups`; or tensors,
            `(name, tensor)` pairs or param groups, as torch.optim takes them, each read as (out, in, *kernel).
        *args, **kwargs: the options of the inner optimizer, such as `lr`.
        c: the max-norm bound, short for `constraint=MaxNorm(c, axis)`; default None, no bound.
        axis: the axes that make one vector, beside `c`; default `"fan_in"`.
        constraint: the set that is projected onto, or rules over the parameters' names, such as
            `{"features.*": MaxNorm(3)}`; default None, which leaves the group free.
        update: how the inner optimizer's update is shaped before the projection; default None, no shaping.
        gradient: `"tangent"` removes from `p.grad`, in place, what would change the norm; default None.
        metric: `"euclidean"`, the default, projects in the plain norm; `"adaptive"` in the norm Σ D_i w_i² of the
            diagonal D that the optimizer divides its step by.
        without_grad: whether parameters without a gradient are projected, too; default False.
        engine: the name of the engine to use, see `routes`; default None, the best one. This is not a group's setting.
        joint: sets over several tensors, such as `[ProductMaxNorm(1.5).over(A, B)]`, with names or tensors; they are
            applied after the others. Default none. This is not a group's setting.

    Raises:
        TypeError: a constraint or an update that is not one, or a parameter that cannot be projected.
        ValueError: settings that disagree, an axis that a parameter does not have, a metric that the optimizer does not
            have, or an engine that cannot project a parameter.

    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = projected(torch.optim.SGD)(layer.parameters(), lr=0.1, c=0.1)
    >>> isinstance(opt, Projected) and isinstance(opt, torch.optim.SGD)
    True
    """

    inner: ClassVar[type[Optimizer]]
    __signature__: ClassVar[inspect.Signature]  # help() shows this one
    _seen: tuple[Snapshot, ...] = ()  # a group that still equals its snapshot needs no check

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        behind = cls.__mro__[cls.__mro__.index(Projected) :]
        cls.inner = next(b for b in behind if issubclass(b, Optimizer) and b is not Projected)
        own = f"Projected{cls.inner.__name__}"
        if Projected in cls.__bases__ and cls.__name__ == own:
            name = f"{cls.inner.__module__}.{cls.inner.__qualname__}"
            cls.__doc__ = cls.__doc__ or f"Run `{name}`, then project the parameters; see `projgd.torch.Projected`."
            _made.setdefault(cls.inner, cls)
        cls.__signature__ = _signature(cls)
        step: Any = _unwrap_step(cls.step)
        if step is not Projected.step and not hasattr(step, "projects"):
            cls.step = _project_after(step)  # type: ignore[method-assign]

    def __init__(
        self,
        params: Any,
        *args: Any,
        c: float | Tensor | None = _NOT_GIVEN,
        axis: Axis = _NOT_GIVEN,
        constraint: Constraint | Rules | None = _NOT_GIVEN,
        update: Update | None = _NOT_GIVEN,
        gradient: Literal["tangent"] | None = _NOT_GIVEN,
        metric: Literal["euclidean", "adaptive"] = _NOT_GIVEN,
        without_grad: bool = _NOT_GIVEN,
        engine: str | None = None,
        joint: Iterable[Any] = (),
        **kwargs: Any,
    ) -> None:
        given = (c, axis, constraint, update, gradient, metric, without_grad)
        own = {k: v for k, v in zip(settings.KEYS, given, strict=True) if v is not _NOT_GIVEN}
        is_module = isinstance(params, torch.nn.Module)
        params, own = layers.read_params(as_list(params), own)
        self._inherited = settings.settle(own, {})
        self._radii = Radii(self)
        self._has_projected: bool | None = False  # as before the first step; None while a subclass's step runs
        self._engine = engine
        if engine is not None and engine not in routing.NAMES:
            raise ValueError(f"engine={engine!r} is not known: pass one of {', '.join(routing.NAMES)}, or None")
        self._refuse_misspelt(kwargs)
        super().__init__(params, *args, **kwargs)  # calls `add_param_group`, which checks every group and fills `_seen`
        self.defaults = {**self.defaults, **own}
        settings.refuse_lone_axis(own, self.param_groups)
        self._refuse_other_tensors(params)
        said = [k for group in params if isinstance(group, Mapping) for k in group] if isinstance(params, list) else []
        self.joint = joint
        settings.warn_if_idle([*own, *said, *["c" for _ in self._joint]], self.param_groups)
        if not is_module and "constraint" not in said:
            layers.warn_of_declared(_all_params(self.param_groups))
        self._made_with = [k for k in vars(self) if not k.endswith("_hooks")]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with settings of its own or the constructor's.

        Args:
            param_group: a dict with `params`, and any of the optimizer's options, `c`, `axis`, `constraint`, `update`,
                `gradient`, `metric` and `without_grad`.

        Raises:
            TypeError, ValueError: a setting that `projgd` or the optimizer cannot apply, or an unknown key. The group
                is not added then.

        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = projected(torch.optim.SGD)([layer.weight], lr=0.1, c=4.0)
        >>> opt.add_param_group({"params": [layer.bias], "lr": 0.01, "c": None})
        >>> [group["c"] for group in opt.param_groups]
        [4.0, None]
        """
        group = dict(param_group)
        group["params"] = as_list(group["params"])
        known = {*settings.KEYS, *self.defaults, *_FOREIGN_KEYS}
        # An optimizer without defaults keeps all its options in its groups, so no key can be called unknown.
        if self.defaults.keys() - settings.KEYS and (unknown := sorted(set(group) - known)):
            near = suggest(unknown[0], known)
            raise ValueError(
                f"a param group has the unknown key {unknown[0]!r}{near}; known are {', '.join(sorted(known))}"
            )
        group |= settings.settle(group, self._inherited)
        settings.refuse_lone_axis(param_group, [group])
        named = settings.named_params(group, len(self.param_groups))
        self._check(group, named)
        taken = shaping.take_initial(settings.constraint_of(group), named)
        super().add_param_group(group)
        self._radii.add(taken)
        self._seen = (*self._seen, Snapshot.of(self.param_groups[-1]))

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the inner optimizer's step, then project the parameters.

        This method has torch's wrapper that runs the hooks, and calls the inner `step` without it. So every hook runs
        once, and a post-hook sees the projected weights.

        Args:
            closure: re-evaluates the model and returns the loss; default None.
            *args, **kwargs: passed on to the inner step.

        Returns:
            What the inner step returned: that loss, or None.

        Raises:
            TypeError, ValueError: a setting that was changed in a group and cannot be applied. No parameter is written
                then.

        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = projected(torch.optim.SGD)(layer.parameters(), lr=0.1, c=0.1)
        >>> layer(torch.ones(1, 3)).sum().backward()
        >>> opt.step()
        >>> bool((layer.weight.norm(dim=1) <= 0.1).all())
        True
        """
        self._adopt_changes()
        compiled = torch.compiler.is_compiling()
        may_step = not (args or kwargs or compiled) and routing.may_step(self.inner, self.param_groups)
        if not compiled:  # sparse gradients do not occur in a compiled graph
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
            if rest := routing.run_stepping(work, self):
                self._run_inner(rest, None)
            self._run(work)
        return loss

    def named_params(self) -> dict[str, Tensor]:
        """Return all parameters by name; a parameter without a name has its place, "parameter 0 of group 1".

        >>> layer = torch.nn.Linear(3, 2)
        >>> list(projected(torch.optim.SGD)(layer.named_parameters(), lr=0.1, c=4.0).named_params())
        ['weight', 'bias']
        """
        return {k: p for i, group in enumerate(self.param_groups) for k, p in settings.named_params(group, i).items()}

    def constraints(self) -> dict[str, Constraint | None]:
        """Return the constraint of every parameter by name, with the radii that were taken from it; None if it is free.

        Raises:
            TypeError, ValueError: a setting that was changed in a group and cannot be applied.

        >>> layer = torch.nn.Linear(3, 2)
        >>> projected(torch.optim.SGD)(layer.named_parameters(), lr=0.1, c=4.0).constraints()["weight"]
        MaxNorm(c=4.0, axis='fan_in')
        """
        self._adopt_changes()
        found: dict[str, Constraint | None] = {}
        for i, group in enumerate(self.param_groups):
            own = settings.constraint_of(group)
            for name, p in settings.named_params(group, i).items():
                radius = None if own is None else self._radii.get(p)
                found[name] = own if own is None or radius is None else own.bind(radius)
        return found

    def routes(self, compiled: bool = False) -> routing.Routes:
        """Return the engine that projects each parameter, and why the engines before it in the table do not.

        Args:
            compiled: whether to answer for a step inside of torch.compile; default False.

        Returns:
            A dict from each parameter's name to its `Choice`; `print` shows one line for each.

        Raises:
            TypeError, ValueError: a setting that was changed in a group and cannot be applied.

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
                for name, p in settings.named_params(job.group, i).items():
                    engine, refusals = routing.choose(job, p, may_step)
                    found[name] = routing.Choice(engine.name if engine else routing.FREE, refusals)
        return found

    def _run_inner(self, optimizer: Optimizer, closure: Callable[[], Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Run the inner class's step on `optimizer`: this one, or a view of it with fewer parameters."""
        inner: Any = _unwrap_step(self.inner.step)
        differentiable = bool(self.defaults.get("differentiable"))
        breaks_graphs = torch.compiler.is_compiling() and getattr(inner, "__code__", None) is _BREAKS_GRAPHS

        def call(closure: Callable[[], Any] | None) -> Any:
            given = (optimizer, closure, *args) if args or closure is not None else (optimizer,)
            if not breaks_graphs:
                return inner(*given, **kwargs)
            with torch.set_grad_enabled(differentiable):
                return inner.__wrapped__(*given, **kwargs)

        self._all_radii()  # radii belong to the weights before the step
        if not any(shaping.is_shaped(group) for group in optimizer.param_groups):
            return call(closure)
        spare = {} if torch.compiler.is_compiling() else self._copies
        return shaping.step(self.inner, optimizer.param_groups, spare, call, closure)

    def _project(self, kept: Mapping[Tensor, dict[str, Any]]) -> None:
        """Project the parameters after a step of the inner optimizer."""
        with torch.set_grad_enabled(bool(self.defaults.get("differentiable"))):
            self._run(self._routes(kept, may_step=False))

    def _run(self, work: Iterable[tuple[Job, routing.Route]]) -> None:
        """Run the engines that only project."""
        self._radii.note_step()
        routing.run_projecting(work)
        self._project_jointly()
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
            (seen.constraint, settings.named_params(group, i))
            for i, (group, seen) in enumerate(zip(self.param_groups, self._seen, strict=True))
            if seen.constraint is not None and seen.constraint.takes_initial
        )

    @functools.cached_property
    def _router(self) -> routing.Router:
        return routing.Router()

    @functools.cached_property
    def _copies(self) -> dict[Tensor, Tensor]:
        return {}

    def _adopt_changes(self) -> None:
        """Check the settings that have changed in the groups since the last call, and use them from now on."""
        if len(self._seen) != len(self.param_groups) or not all(
            map(Snapshot.is_unchanged, self._seen, self.param_groups)
        ):
            self._adopt_changed_settings()
        if self._has_projected is False and not torch.compiler.is_compiling():
            self._check_joint(self._joint)
            for i, group in enumerate(self.param_groups):  # a wrapper may have replaced the parameters since
                settings.check(settings.constraint_of(group), settings.named_params(group, i), group["metric"])

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def _adopt_changed_settings(self) -> None:
        seen = {id(s.group): s for s in self._seen}
        self._seen = tuple(
            self._adopt_group(group, i, seen.get(id(group))) for i, group in enumerate(self.param_groups)
        )
        self._radii.keep_only(set(map(id, _all_params(self.param_groups))))
        self._copies.clear()

    def _adopt_group(self, group: dict[str, Any], index: int, seen: Snapshot | None) -> Snapshot:
        """Check a group that has changed, write its settings back, and return its new snapshot."""
        if seen is not None and seen.is_unchanged(group):
            return seen
        named, was, only_c = settings.named_params(group, index), None, False
        if seen is None:
            own = settings.settle(group, self._inherited)
        else:
            own, was = settings.adopt(group, seen.settings), settings.constraint_of(seen.settings)
            only_c = settings.changed_keys(group, seen.settings) == {"c"} and seen.has_params(group["params"])
        now = {**group, **own}
        constraint = settings.constraint_of(now)
        moves = only_c and None not in (was, constraint)
        if not (moves and settings.moves_freely(constraint) and settings.moves_freely(was)):
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
        """Raise TypeError for an option that neither the optimizer nor projgd knows, if a known one is similar."""
        takes = inspect.signature(self.inner).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
            return
        for k in kwargs:
            if k in ("max_norm", "maxnorm", "max_value") and k not in takes:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {k!r}: pass c={kwargs[k]}")
            if k not in takes and (near := suggest(k, {*takes, *settings.KEYS})):
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {k!r}{near}")

    def _refuse_other_tensors(self, params: Any) -> None:
        """Raise TypeError if the optimizer steps tensors other than those that it was given.

        Some optimizers step copies of the weights in another precision, or one tensor that holds all of them. The
        weights of the model would not be projected then.
        """
        given = set(map(id, _tensors(params)))
        if any(id(p) not in given for p in _all_params(self.param_groups)):
            raise TypeError(
                f"{self.inner.__name__} steps other tensors than those that it was given (copies, or all in one), so "
                "the weights of the model would not be held: after its step, w.copy_(constraint.project(w)) yourself"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state in plain types.

        Constraints and updates are stored as their `config`. The radii of `Sphere("initial")` are in the parameters'
        state, under `"initial"`.

        Returns:
            A dict that `torch.save` writes and `torch.load(weights_only=True)` reads.

        Raises:
            TypeError, ValueError: a setting that was changed in a group and cannot be applied.

        >>> from projgd import UnitNorm
        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = projected(torch.optim.SGD)(layer.parameters(), lr=0.1, constraint=UnitNorm())
        >>> opt.state_dict()["param_groups"][0]["constraint"]
        {'kind': 'UnitNorm', 'axis': 'fan_in'}
        """
        self._adopt_changes()
        self._radii.store()
        state = super().state_dict()
        groups, of_param = [settings.to_plain(g) for g in state["param_groups"]], state["state"]
        if any(KEY in s for s in of_param.values() if isinstance(s, dict)):
            # torch.distributed.checkpoint takes a state of all parameters or of none
            of_param = {**{i: {} for i in _all_params(groups)}, **of_param}
        return {**state, "state": of_param, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class or of the stock optimizer.

        A state of the stock optimizer has no settings of projgd, so the groups keep those that they have.

        Args:
            state_dict: what `state_dict()` returned.

        Raises:
            TypeError, ValueError: a setting in it that cannot be applied, or other groups. The state is not loaded
                then.

        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = projected(torch.optim.SGD)(layer.parameters(), lr=0.1, c=4.0)
        >>> opt.load_state_dict(torch.optim.SGD(layer.parameters(), lr=0.5).state_dict())
        >>> opt.param_groups[0]["lr"], opt.param_groups[0]["c"]
        (0.5, 4.0)
        """
        self._adopt_changes()
        waiting = {p: r for p in _all_params(self.param_groups) if (r := self._radii.get(p)) is not None}
        saved = state_dict["param_groups"]
        if len(saved) == len(self.param_groups):  # otherwise torch refuses
            plain, saved = saved, [settings.from_plain(s, g) for s, g in zip(saved, self.param_groups, strict=True)]
            for i, (s, group, present) in enumerate(zip(plain, saved, self.param_groups, strict=True)):
                if settings.changed_keys(group, present):
                    self._check({**group, "params": present["params"]}, settings.named_params(present, i))
                for k in group["params"]:
                    metrics.check_state(state_dict["state"].get(k, {}), group, self.inner)
                if "constraint" in s:  # a projected optimizer's state without a radius: no step has moved the weights
                    for p in present["params"]:
                        waiting.pop(p, None)
        of_param = {i: dict(s) for i, s in state_dict["state"].items()}
        initial = {i: s.pop(KEY) for i, s in of_param.items() if KEY in s}  # torch would round them to p.dtype
        of_param = {i: s for i, s in of_param.items() if s}
        super().load_state_dict({**state_dict, "state": of_param, "param_groups": saved})
        self._radii.replace(waiting)
        self._router.clear()
        for index, p in zip(_all_params(saved), _all_params(self.param_groups), strict=True):
            if index in initial:
                self.state[p][KEY] = initial[index].to(p.device, copy=True)
        self._seen = tuple(Snapshot.of(g, s) for g, s in zip(self.param_groups, saved, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Return what torch keeps, and the attributes that the inner class's constructor set.

        Torch drops these attributes from copies.
        """
        self._adopt_changes()
        self._radii.store()
        made_with = {k: vars(self)[k] for k in self._made_with}
        return {**super().__getstate__(), **made_with, "_made_with": self._made_with}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not projected(self.inner):  # pickle finds a user's subclass by its name
            return super().__reduce_ex__(protocol)
        return _make_blank, (self.inner,), self.__getstate__()


def projected(cls: type[Optimizer]) -> type[Projected]:
    """Return the optimizer class `cls` with a projection after every step.

    The new class takes every option of `cls`, and the settings of `Projected` for all groups or in each: `c=` (with
    `axis=`) or `constraint=`, `update=`, `gradient=`, `metric=`, `without_grad=`. `c=None` frees a group.

    `metric="adaptive"` projects in the norm of the diagonal that the optimizer divides its step by. The optimizer then
    ends at the constrained optimum; with the Euclidean projection an adaptive optimizer does not. The diagonal is known
    for Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, RMSprop, Adadelta, Adafactor and SparseAdam; `register_metric` adds
    others.

    Args:
        cls: a `torch.optim.Optimizer` class, of torch or of another library.

    Returns:
        A subclass of `Projected` and of `cls`; the same one at every call.

    Raises:
        TypeError: an object that is not an optimizer class, or a class with an option of its own named `c`, `axis`,
            `constraint`, `update`, `gradient`, `metric` or `without_grad`.

    >>> import torch
    >>> layer = torch.nn.Linear(3, 2)
    >>> opt = projected(torch.optim.RMSprop)(layer.parameters(), lr=0.1, c=1.0)
    >>> layer(torch.ones(1, 3)).sum().backward()
    >>> opt.step()
    >>> bool((layer.weight.norm(dim=1) <= 1.0).all())
    True

    References:
        J. Duchi, E. Hazan, Y. Singer, *Adaptive subgradient methods for online learning and stochastic optimization*,
        JMLR 12, 2011, section 1 (the projection in the metric).
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


def _make_blank(cls: type[Optimizer]) -> Projected:
    """Return an empty projected optimizer, for unpickling."""
    made = projected(cls)
    return made.__new__(made)


def _all_params(groups: Iterable[dict[str, Any]]) -> list[Any]:
    """Return the parameters of all groups in one list."""
    return [p for group in groups for p in group["params"]]


def as_list(params: Any) -> Any:
    """Return `params` with its iterators as lists, so that it can be read more than once."""
    if isinstance(params, Mapping):
        own = params.get("params")
        return params if own is None or isinstance(own, set) else {**params, "params": as_list(own)}
    if isinstance(params, (Tensor, str, torch.nn.Module)) or not isinstance(params, Iterable):
        return params  # a module is read by its layers; torch raises a clear error for the others
    return [as_list(p) if isinstance(p, Mapping) else p for p in params]


def _tensors(params: Any) -> list[Any]:
    """Return all tensors in `params`, in whatever form an optimizer takes them."""
    if isinstance(params, Mapping):
        return _tensors(params["params"])
    if isinstance(params, tuple):
        return [params[1]]
    return [t for p in params for t in _tensors(p)] if isinstance(params, list) else [params]


def _signature(cls: type[Projected]) -> inspect.Signature:
    """Return the constructor's signature, for `help()`.

    A class without a constructor of its own takes what the inner class takes, and the settings.
    """
    own = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if cls.__init__ is Projected.__init__:
        settings_only = [p for p in own if p.kind is p.KEYWORD_ONLY]
        own = sorted([*inspect.signature(cls.inner).parameters.values(), *settings_only], key=lambda p: p.kind)
    return inspect.Signature(own)


def _unwrap_step(step: Any) -> Any:
    """Return a `step` without the wrapper that torch puts around it."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def _project_after(step: Any) -> Any:
    """Return a subclass's step with a projection after it, unless it calls `Projected.step` itself."""

    @functools.wraps(step)
    def stepped(self: Projected, *args: Any, **kwargs: Any) -> Any:
        self._adopt_changes()
        groups = [g for g in self.param_groups if shaping.is_shaped(g) or g["metric"] != "euclidean"]
        versions = [p._version for p in _all_params(groups)]
        self._has_projected = None
        loss = step(self, *args, **kwargs)
        if not self._has_projected:
            if [p._version for p in _all_params(groups)] != versions:
                raise RuntimeError(
                    f"{type(self).__name__}.step did not call super().step(), so update=, gradient= and metric= had no "
                    "update to work on: call it, or put the step into a plain Optimizer class and use projected(…)"
                )
            self._project({})
        return loss

    stepped.projects = True  # type: ignore[attr-defined]
    return stepped
