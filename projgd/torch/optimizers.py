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
from projgd.rules import Rules, nearest_name
from projgd.torch import layers, methods, metrics, routing, settings, shaping
from projgd.torch.engines.base import Job
from projgd.torch.engines.rows import forget_written_tables
from projgd.torch.joint import JointSets
from projgd.torch.settings import Snapshot
from projgd.torch.shaping import KEY, Radii, check_saved
from projgd.updates import Update

# This decorator sets the grad mode around the steps of torch.optim. It breaks a compiled graph on purpose, so
# `_run_inner` calls the step without it there.
_BREAKS_GRAPHS = _use_grad_for_differentiable(lambda self: None).__code__

UNSET: Literal["unset"] = "unset"
"""The default of `c=`, for which None says that there is no bound. Tools that read signatures pass it as it stands."""

_DEFAULTS: dict[str, Any] = dict.fromkeys(settings.KEYS[1:])
_DEFAULTS |= {"axis": "fan_in", "metric": "euclidean", "without_grad": False, "every": 1}

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
        c: the max-norm bound, short for `constraint=MaxNorm(c, axis)`; None, as the default `"unset"`, is no bound.
        axis: the axes that make one vector, beside `c`; default `"fan_in"`.
        constraint: the set that is projected onto, or rules over the parameters' names, such as
            `{"features.*": MaxNorm(3)}`; default None, which leaves the group free.
        update: how the inner optimizer's update is shaped before the projection; default None, no shaping.
        gradient: `"tangent"` removes from `p.grad`, in place, what would change the norm; default None.
        metric: `"euclidean"`, the default, projects in the plain norm; `"adaptive"` in the norm Σ D_i w_i² of the
            diagonal D that the optimizer divides its step by.
        without_grad: whether parameters without a gradient are projected, too; default False.
        every: project after every so many steps; default 1. Between projections the weights may leave the set.
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
    _is_stepping = True  # as while the constructor runs; `methods.watch` then watches nothing
    _moved_by: str | None = None  # the method that has moved the weights since the last projection, see `methods.watch`
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
        cls.__signature__ = methods.signature_of(cls, Projected.__init__)
        step: Any = methods.unwrap_step(cls.step)
        if step is not Projected.step and not hasattr(step, "projects"):
            cls.step = methods.project_after(step)  # type: ignore[method-assign]
        for name in dir(cls.inner):
            method = inspect.getattr_static(cls, name)
            is_inner = inspect.isfunction(method) and method is inspect.getattr_static(cls.inner, name)
            if is_inner and not (name.startswith("_") or hasattr(Optimizer, name) or name in ("train", "eval")):
                setattr(cls, name, methods.watch(method))

    def __init__(
        self,
        params: Any,
        *args: Any,
        c: float | Tensor | Literal["unset"] | None = UNSET,
        axis: Axis = "fan_in",
        constraint: Constraint | Rules | None = None,
        update: Update | None = None,
        gradient: Literal["tangent"] | None = None,
        metric: Literal["euclidean", "adaptive"] = "euclidean",
        without_grad: bool = False,
        every: int = 1,
        engine: str | None = None,
        joint: Iterable[Any] = (),
        **kwargs: Any,
    ) -> None:
        given = zip(_DEFAULTS, (axis, constraint, update, gradient, metric, without_grad, every), strict=True)
        own: dict[str, Any] = {k: v for k, v in given if type(v) is not type(_DEFAULTS[k]) or v != _DEFAULTS[k]}
        if not (isinstance(c, str) and c == UNSET):
            own["c"] = c
        is_module = isinstance(params, torch.nn.Module)
        params, own = layers.read_params(methods.as_list(params), own)
        self._inherited = settings.settle(own, {})
        self._radii = Radii(self)
        self._exempt: dict[Tensor, Exception] = {}  # frozen parameters that cannot be projected, and why
        self._has_projected: bool | None = False  # as before the first step; None while a subclass's step runs
        self._engine = engine
        if engine is not None and engine not in routing.NAMES:
            raise ValueError(f"engine={engine!r} is not known: pass one of {', '.join(routing.NAMES)}, or None")
        methods.refuse_misspelt(self, kwargs)
        super().__init__(params, *args, **kwargs)  # calls `add_param_group`, which checks every group and fills `_seen`
        self.defaults = {**self.defaults, **own}
        settings.refuse_lone_axis(own, self.param_groups)
        methods.refuse_other_tensors(self, params)
        said = [k for group in params if isinstance(group, Mapping) for k in group] if isinstance(params, list) else []
        self.joint = joint
        settings.warn_if_idle([*own, *said, *["c" for _ in self._joint]], self.param_groups, is_module)
        if not is_module and "constraint" not in said:
            layers.warn_of_declared(_all_params(self.param_groups))
        self._is_stepping = False
        self._made_with = [k for k in vars(self) if not k.endswith("_hooks")]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with settings of its own or the constructor's.

        Args:
            param_group: a dict with `params`, and any of the optimizer's options, `c`, `axis`, `constraint`, `update`,
                `gradient`, `metric`, `without_grad` and `every`.

        Raises:
            TypeError, ValueError: a setting that `projgd` or the optimizer cannot apply, or an unknown key with nearly
                the name of a setting. The group is not added then.

        >>> layer = torch.nn.Linear(3, 2)
        >>> opt = projected(torch.optim.SGD)([layer.weight], lr=0.1, c=4.0)
        >>> opt.add_param_group({"params": [layer.bias], "lr": 0.01, "c": None})
        >>> [group["c"] for group in opt.param_groups]
        [4.0, None]
        """
        group = dict(param_group)
        group["params"] = methods.as_list(group["params"])
        for key in group.keys() - {*settings.KEYS, *self.defaults}:  # loggers and optimizers keep others there
            if near := nearest_name(key, settings.KEYS, cutoff=0.75):
                raise ValueError(f"a param group has the unknown key {key!r}{near}")
        group |= settings.settle(group, self._inherited)
        settings.refuse_lone_axis(param_group, [group])
        named = self._check(group, settings.named_params(group, len(self.param_groups)))
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
        self._opt_called = True  # see `methods.MARK`
        settings.count_step(self.param_groups)
        compiled = torch.compiler.is_compiling()
        may_step = not (args or kwargs or compiled) and routing.may_step(self.inner, self.param_groups)
        if not compiled:  # sparse gradients do not occur in a compiled graph
            forget_written_tables()
        if not may_step:
            kept = metrics.before_step(self, self.inner)
            if self._engine is not None and not compiled:  # its refusal must come before the step moves anything
                with self._grad_mode():
                    self._routes({}, may_step=False)
            loss = self._run_inner(self, closure, *args, **kwargs)
            self._project(kept)
            return loss
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            work = self._routes({}, may_step=True)
            if rest := routing.rest_of(work, self):
                self._run_inner(rest, None)  # first, because torch may refuse a parameter
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
        with self._grad_mode():
            for i, job in enumerate(routing.mark_shared(self._jobs({}, compiled))):
                for name, p in settings.named_params(job.group, i).items():
                    if p in self._exempt:
                        found[name] = routing.Choice(routing.FREE, {"frozen": str(self._exempt[p])})
                        continue
                    engine, refusals = routing.choose(job, p, may_step)
                    found[name] = routing.Choice(engine.name if engine else routing.FREE, refusals)
        return found

    def _run_inner(self, optimizer: Optimizer, closure: Callable[[], Any] | None, *args: Any, **kwargs: Any) -> Any:
        """Run the inner class's step on `optimizer`: this one, or a view of it with fewer parameters."""
        inner: Any = methods.unwrap_step(self.inner.step)
        differentiable = bool(self.defaults.get("differentiable"))
        breaks_graphs = torch.compiler.is_compiling() and getattr(inner, "__code__", None) is _BREAKS_GRAPHS

        def call(closure: Callable[[], Any] | None) -> Any:
            given = (optimizer, closure, *args) if args or closure is not None else (optimizer,)
            if not breaks_graphs:
                with methods.stepping(optimizer):
                    return inner(*given, **kwargs)
            with torch.set_grad_enabled(differentiable):
                return inner.__wrapped__(*given, **kwargs)

        self._all_radii()  # radii belong to the weights before the step
        if not any(shaping.is_shaped(group) for group in optimizer.param_groups):
            return call(closure)
        spare = {} if torch.compiler.is_compiling() else self._copies
        return shaping.step(self.inner, optimizer.param_groups, spare, call, closure)

    def _grad_mode(self) -> torch.set_grad_enabled:
        """Return a context in which autograd follows the projection if it follows the step."""
        return torch.set_grad_enabled(bool(self.defaults.get("differentiable")))

    def _project(self, kept: Mapping[Tensor, dict[str, Any]]) -> None:
        """Project the parameters after a step of the inner optimizer."""
        with self._grad_mode():
            self._run(self._routes(kept, may_step=False))

    def _run(self, work: Iterable[tuple[Job, routing.Route]]) -> None:
        """Run the engines."""
        self._radii.note_step()
        routing.run(work)
        self._project_jointly()
        self._has_projected, self._moved_by = True, None

    def _routes(self, kept: Mapping[Tensor, dict[str, Any]], may_step: bool) -> list[tuple[Job, routing.Route]]:
        jobs = self._jobs(kept, compiled := torch.compiler.is_compiling(), is_step=True)
        if compiled:
            return [(job, route) for job in jobs for route in routing.make_routes(job, may_step)]
        return self._router.routes(jobs, may_step)

    def _jobs(self, kept: Mapping[Tensor, dict[str, Any]], compiled: bool, is_step: bool = False) -> list[Job]:
        radii, skip, jobs = self._all_radii(), getattr(self, "found_inf", None), []
        for group, seen in zip(self.param_groups, self._seen, strict=True):
            own = settings.constraint_of(group) if compiled else seen.constraint
            own = own if not is_step or settings.is_due(group) else None
            metric, params = metrics.after_step(self, self.inner, group, kept), group["params"]
            jobs.append(Job(self, self.inner, group, own, metric, radii, skip, self._engine, compiled, params))
        return jobs

    def _all_radii(self) -> dict[Tensor, Tensor]:
        return self._radii.all_of(
            (seen.constraint, self._without_exempt(group, i))
            for i, (group, seen) in enumerate(zip(self.param_groups, self._seen, strict=True))
            if seen.constraint is not None and seen.constraint.takes_initial
        )

    def _without_exempt(self, group: Mapping[str, Any], index: int) -> dict[str, Tensor]:
        """Return the parameters of a group by name, without the frozen ones that cannot be projected."""
        named = settings.named_params(group, index)
        return {name: p for name, p in named.items() if p not in self._exempt} if self._exempt else named

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
                settings.check(settings.constraint_of(group), self._without_exempt(group, i), group["metric"])
        if self._exempt and not torch.compiler.is_compiling():
            for p, why in self._exempt.items():
                if p.requires_grad or p.grad is not None:
                    raise why

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
            only_c = only_c and seen.options == settings.options_of(group)
        now = {**group, **own}
        constraint = settings.constraint_of(now)
        moves = only_c and constraint is not None and was is not None and not constraint.takes_initial
        if not (moves and settings.moves_freely(constraint) and settings.moves_freely(was)):
            self._router.clear()
            named = self._check(now, named)
            if seen is not None and was != constraint and not only_c:  # numbers of the start outlive a new c
                self._radii.drop(group["params"])
                self._radii.take(constraint, named)
        group.update(own)
        return Snapshot.of(group)

    def _check(self, group: Mapping[str, Any], named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raise an error that names the parameter if its group's settings cannot be applied to it.

        A frozen parameter may be one that no set can be applied to, because no step projects it. The result is the
        other parameters.
        """

        def check(some: Mapping[str, Tensor]) -> None:
            constraint = settings.constraint_of(group)
            settings.check(constraint, some, group["metric"])
            metrics.check(constraint, group["metric"], self.inner)
            shaping.check(self.inner, {**self.defaults, **group}, some)
            shaping.take_initial(constraint, {name: p for name, p in some.items() if settings.is_frozen(group, p)})
            if self._engine is not None:
                routing.check_forced(self, {**self.defaults, **group}, some, self._engine)

        exempt = settings.exempt(check, group, named)
        self._exempt = {p: exempt[name] for name, p in named.items() if name in exempt} | {
            p: why for p, why in self._exempt.items() if not any(p is q for q in named.values())
        }
        return {name: p for name, p in named.items() if name not in exempt}

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
        if "param_groups" not in state:  # some optimizers around another one save in a form of their own
            return state
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
        if "param_groups" not in state_dict:
            super().load_state_dict(state_dict)
            return
        self._adopt_changes()
        waiting = {p: r for p in _all_params(self.param_groups) if (r := self._radii.get(p)) is not None}
        saved: list[dict[str, Any]] = []
        initial: dict[int, Tensor] = {}

        def read(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            saved.extend(self._read_groups(state_dict, initial))
            for s, present in zip(state_dict["param_groups"], self.param_groups, strict=False):
                if "constraint" in s:  # a projected optimizer's state without a radius: no step has moved the weights
                    for p in present["params"]:
                        waiting.pop(p, None)
            # torch would round the radii to p.dtype
            own = {i: {k: v for k, v in state_dict["state"][i].items() if k != KEY} for i in initial}
            of_param = {i: s for i, s in {**state_dict["state"], **own}.items() if i not in own or s}
            return {**state_dict, "state": of_param, "param_groups": saved}

        def finish(_: Optimizer) -> None:
            self._radii.replace(waiting)
            self._router.clear()
            for index, p in zip(_all_params(saved), _all_params(self.param_groups), strict=True):
                if index in initial:
                    self.state[p][KEY] = initial[index].to(p.device, copy=True)
            self._seen = tuple(Snapshot.of(g, s) for g, s in zip(self.param_groups, saved, strict=True))

        # The user's hooks adapt a state before `read`, and see the loaded one after `finish`.
        handles = [
            self.register_load_state_dict_pre_hook(read),
            self.register_load_state_dict_post_hook(finish, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _read_groups(self, state_dict: dict[str, Any], initial: dict[int, Tensor]) -> list[dict[str, Any]]:
        """Return the groups of a checkpoint with the settings as objects, checked; put its radii into `initial`."""
        saved = state_dict["param_groups"]
        if len(saved) != len(self.param_groups):
            return list(saved)  # torch refuses them
        groups = [settings.from_plain(s, g) for s, g in zip(saved, self.param_groups, strict=True)]
        for i, (group, present) in enumerate(zip(groups, self.param_groups, strict=True)):
            named = settings.named_params(present, i)
            if settings.changed_keys(group, present) or settings.options_of(group) != settings.options_of(present):
                self._check({**present, **group, "params": present["params"]}, named)
            constraint = settings.constraint_of(group)
            for k, (name, p) in zip(group["params"], named.items(), strict=False):
                of_param = state_dict["state"].get(k, {})
                metrics.check_state(of_param, group, self.inner)
                if KEY in of_param:
                    initial[k] = check_saved(constraint, p, of_param[KEY], name)
        return groups

    def __getstate__(self) -> dict[str, Any]:
        """Return what torch keeps, and the attributes that the inner class's constructor set.

        Torch drops these attributes from copies.
        """
        self._adopt_changes()
        self._radii.store()
        made_with = {k: methods.for_pickling(vars(self)[k]) for k in self._made_with}
        return {**super().__getstate__(), **made_with, "_made_with": self._made_with}

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) is not projected(self.inner):  # pickle finds a user's subclass by its name
            return super().__reduce_ex__(protocol)
        return _make_blank, (self.inner,), self.__getstate__()


setattr(Projected.step, methods.MARK, True)


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
            `constraint`, `update`, `gradient`, `metric`, `without_grad`, `every`, `engine` or `joint`.

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
    if taken := [k for k in (*settings.KEYS, "engine", "joint") if k in inspect.signature(cls).parameters]:
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
