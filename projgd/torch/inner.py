"""Deal with an inner optimizer that knows nothing of projgd: wrap its methods, read what it is passed, keep radii.

What sets have taken from the initial weights, such as the radii of `Sphere("initial")`, belongs into the optimizer's
state, where checkpoints keep it. But an optimizer makes its own state only for a parameter whose state is empty. So the
radii wait here until the optimizer has made it.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import inspect
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from projgd.constraints import Constraint
from projgd.torch import shaping
from projgd.torch.engines.base import PLAIN
from projgd.torch.shaping import take_initial

# Schedulers (torch 2.13) replace the `step` of an optimizer by a function that torch.compile cannot trace, but for a
# `step` with this mark. It has to set `_opt_called`, as that function does.
MARK = "_wrapped_by_lr_sched"


class Local:
    """Hold a value that cannot be pickled, such as a lambda: a deep copy has the value, and a pickle has None."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.value, memo)

    def __reduce__(self) -> Any:
        return type(None), ()


class _Probe(pickle.Pickler):
    """Pickle without the tensors and the optimizer that a value holds."""

    def persistent_id(self, x: Any) -> Any:
        return "" if isinstance(x, (Tensor, Optimizer)) else None


def can_be_pickled(value: Any) -> bool:
    """Return whether a value can be pickled, apart from the tensors and the optimizer that it holds."""
    try:
        _Probe(io.BytesIO()).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def all_params(groups: Iterable[dict[str, Any]]) -> list[Any]:
    """Return the parameters of all groups in one list."""
    return [p for group in groups for p in group["params"]]


def as_list(params: Any) -> Any:
    """Return `params` with its iterators as lists, so that it can be read more than once."""
    if isinstance(params, Mapping):
        own = params.get("params")
        return params if own is None or isinstance(own, set) else {**params, "params": as_list(own)}
    if isinstance(params, (Tensor, str)) or not isinstance(params, Iterable):
        return params  # torch raises a clear error for these
    return [as_list(p) if isinstance(p, Mapping) else p for p in params]


def tensors_of(params: Any) -> list[Any]:
    """Return all tensors in `params`, in whatever form an optimizer takes them."""
    if isinstance(params, Mapping):
        return tensors_of(params["params"])
    if isinstance(params, tuple):
        return [params[1]]
    return [t for p in params for t in tensors_of(p)] if isinstance(params, list) else [params]


def suggest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return a question that names the known word nearest to `word`; an empty string if none is near."""
    near = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=cutoff)
    return f": did you mean {near[0]!r}?" if near and abs(len(word) - len(near[0])) < 5 else ""


def unwrap_step(step: Any) -> Any:
    """Return a `step` without the wrapper that torch puts around it."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


def project_after(step: Any) -> Any:
    """Return a subclass's step with a projection after it, unless it calls `Projected.step` itself."""

    @functools.wraps(step)
    def stepped(self: Any, *args: Any, **kwargs: Any) -> Any:
        self._adopt_changes()
        self._opt_called = True
        groups = [g for g in self.param_groups if shaping.is_shaped(g) or g["metric"] != "euclidean"]
        versions = [p._version for p in all_params(groups)]
        self._has_projected = None
        with stepping(self):
            loss = step(self, *args, **kwargs)
        if not self._has_projected:
            if [p._version for p in all_params(groups)] != versions:
                raise RuntimeError(
                    f"{type(self).__name__}.step did not call super().step(), so update=, gradient= and metric= had no "
                    "update to work on: call it, or put the step into a plain Optimizer class and use projected(…)"
                )
            self._project({})
        return loss

    stepped.projects = True  # type: ignore[attr-defined]
    setattr(stepped, MARK, True)
    return stepped


@contextlib.contextmanager
def stepping(optimizer: Any) -> Iterator[None]:
    """Let the methods that a step calls move the weights."""
    was, optimizer._is_stepping = optimizer._is_stepping, True
    try:
        yield
    finally:
        optimizer._is_stepping = was


def watch(method: Any) -> Any:
    """Return a method of the inner class that raises an error if the weights are moved by methods instead of steps.

    One move without a projection may be a perturbation, or an average for evaluation. The second, such as that of
    `second_step` of SAM, shows that no step follows.
    """

    @functools.wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._is_stepping:
            return method(self, *args, **kwargs)
        held = [g for g in self.param_groups if g.get("c") is not None or g.get("constraint") is not None]
        was, before = (self._has_projected, self._moved_by), [_place(p) for p in all_params(held)]
        self._has_projected = None
        try:
            result = method(self, *args, **kwargs)
        finally:
            has_projected = self._has_projected
            self._has_projected = has_projected or was[0]
        if has_projected or [_place(p) for p in all_params(held)] == before:
            return result
        if was[1] is not None:
            inner, call = self.inner.__name__, f"{was[1]}() and {method.__name__}()"
            raise RuntimeError(
                f"{call} of {inner} have moved the weights, and no step() has projected them: call step(closure) "
                f"instead, or make {inner} itself and project after the optimizer inside it, as in "
                "project_after_step(optimizer.base_optimizer, MaxNorm(4.0))"
            )
        self._moved_by = method.__name__
        return result

    return watched


def _place(p: Tensor) -> tuple[int, int]:
    """Return what changes if a parameter is written or gets other memory."""
    return p._version, p.data_ptr() if type(p) in PLAIN else 0


def refuse_misspelt(name: str, inner: type[Optimizer], kwargs: Iterable[str], keys: Iterable[str]) -> None:
    """Raise TypeError for an option that neither the optimizer nor projgd knows, if a known one is similar."""
    takes = inspect.signature(inner).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    for k in kwargs:
        if k not in takes and (near := suggest(k, {*takes, *keys})):
            raise TypeError(f"{name}() got an unexpected keyword argument {k!r}{near}")


def refuse_other_tensors(inner: type[Optimizer], params: Any, groups: Iterable[dict[str, Any]]) -> None:
    """Raise TypeError if the optimizer steps tensors other than those that it was given.

    Some optimizers step copies of the weights in another precision, or one tensor that holds all of them. The weights
    of the model would not be projected then.
    """
    given = set(map(id, tensors_of(params)))
    if any(id(p) not in given for p in all_params(groups)):
        raise TypeError(
            f"{inner.__name__} steps other tensors than those that it was given (copies, or all in one), so the "
            "weights of the model would not be held: after its step, w.copy_(constraint.project(w)) yourself"
        )


def signature_of(cls: Any, base: Any) -> inspect.Signature:
    """Return the constructor's signature, for `help()`.

    A class without a constructor of its own takes what the inner class takes, and the settings.
    """
    own = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if cls.__init__ is base.__init__:
        settings_only = [p for p in own if p.kind is p.KEYWORD_ONLY]
        own = sorted([*inspect.signature(cls.inner).parameters.values(), *settings_only], key=lambda p: p.kind)
    return inspect.Signature(own)


KEY = "initial"
"""The key of the radii in the state of a parameter."""


class Radii:
    """Keep the initial norms of one optimizer's parameters.

    Attributes:
        waiting: the radii that are not in the optimizer's state yet, by parameter.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.waiting: dict[Tensor, Tensor] = {}
        self._stepped: set[int] = set()  # ids of stepped parameters; some optimizers make no state
        self._known: dict[Tensor, Tensor] | None = None

    def get(self, p: Tensor) -> Tensor | None:
        """Return the radii of a parameter; None if none were taken."""
        if p in self.waiting and torch.compiler.is_compiling():  # the tracer must not see a new state
            return self.waiting[p]
        state = self._optimizer.state.get(p, {})
        return state[KEY] if KEY in state else self.waiting.get(p)

    def take(self, constraint: Constraint | None, named: Mapping[str, Tensor]) -> None:
        """Take what a set needs from the current weights."""
        self.add(take_initial(constraint, named))

    def add(self, taken: Mapping[Tensor, Tensor]) -> None:
        """Let radii wait for the state of their parameters."""
        self.waiting |= taken
        self._known = None

    def drop(self, params: Iterable[Tensor]) -> None:
        """Forget the radii of parameters whose set was replaced."""
        for p in params:
            self.waiting.pop(p, None)
            self._optimizer.state.get(p, {}).pop(KEY, None)
        self._known = None

    def keep_only(self, held: set[int]) -> None:
        """Forget parameters that the optimizer no longer has; `held` are the ids of the others."""
        self.waiting = {p: radius for p, radius in self.waiting.items() if id(p) in held}
        self._stepped &= held
        self._known = None

    def all_of(self, groups: Iterable[tuple[Constraint | None, Mapping[str, Tensor]]]) -> dict[Tensor, Tensor]:
        """Return the radii of all groups.

        A parameter that was put into a group without `add_param_group`, as Accelerate does with parameters that it
        shards, has its radii taken now.

        Args:
            groups: the constraint and the parameters by name, for each group.

        Returns:
            The radii by parameter.
        """
        if self._known is None or torch.compiler.is_compiling():
            found: dict[Tensor, Tensor] = {}
            for constraint, named in groups:
                if constraint is not None and constraint.takes_initial:
                    for name, p in named.items():
                        if self.get(p) is None:
                            self.waiting |= take_initial(constraint, {name: p})
                        radius = self.get(p)
                        if radius is not None:
                            found[p] = radius
            self._known = found
        return self._known

    def note_step(self) -> None:
        """Note which parameters with waiting radii have been stepped."""
        if len(self._stepped) < len(self.waiting):
            self._stepped |= {id(p) for p in self.waiting if p.grad is not None}

    def store(self) -> None:
        """Put the radii into the state of every parameter that has one, or was stepped without getting one."""
        for p in list(self.waiting):
            if self._optimizer.state.get(p) or id(p) in self._stepped:
                self._optimizer.state[p][KEY] = self.waiting.pop(p)

    def replace(self, waiting: dict[Tensor, Tensor]) -> None:
        """Start again after a checkpoint was loaded, with the radii that it does not have."""
        self.waiting, self._stepped, self._known = waiting, set(), None
