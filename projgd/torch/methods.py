"""Wrap the methods and read the options of the optimizer classes that get a projection.

An inner class may be of any library. Its `step` is run without torch's wrapper; a `step` of a subclass gets a
projection after it; other methods that move the weights are watched; what its constructor has set goes along with
copies.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from projgd.rules import nearest_name
from projgd.torch import settings, shaping
from projgd.torch.engines.base import PLAIN

MARK = "_wrapped_by_lr_sched"
"""Schedulers (torch 2.13) replace the `step` of an optimizer by a function that torch.compile cannot trace, but for a
`step` with this mark. It has to set `_opt_called`, as that function does."""


def refuse_misspelt(optimizer: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that neither the optimizer nor projgd knows, if a known one is similar."""
    takes = inspect.signature(optimizer.inner).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values()):
        return
    for k in kwargs:
        if k in ("max_norm", "maxnorm", "max_value") and k not in takes:
            raise TypeError(
                f"{type(optimizer).__name__}() got an unexpected keyword argument {k!r}: pass c={kwargs[k]}"
            )
        if k not in takes and (near := nearest_name(k, {*takes, *settings.KEYS})):
            raise TypeError(f"{type(optimizer).__name__}() got an unexpected keyword argument {k!r}{near}")


def refuse_other_tensors(optimizer: Any, params: Any) -> None:
    """Raise TypeError if the optimizer steps tensors other than those that it was given.

    Some optimizers step copies of the weights in another precision, or one tensor that holds all of them. The
    weights of the model would not be projected then.
    """
    given = set(map(id, tensors_of(params)))
    if any(id(p) not in given for group in optimizer.param_groups for p in group["params"]):
        raise TypeError(
            f"{optimizer.inner.__name__} steps other tensors than those that it was given (copies, or all in one), so "
            "the weights of the model would not be held: after its step, w.copy_(constraint.project(w)) yourself"
        )


class _Local:
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


def for_pickling(value: Any) -> Any:
    """Return a value, or a `_Local` with it if it cannot be pickled."""
    try:
        _Probe(io.BytesIO()).dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return _Local(value)
    return value


def as_list(params: Any) -> Any:
    """Return `params` with its iterators as lists, so that it can be read more than once."""
    if isinstance(params, Mapping):
        own = params.get("params")
        return params if own is None or isinstance(own, set) else {**params, "params": as_list(own)}
    if isinstance(params, (Tensor, str, torch.nn.Module)) or not isinstance(params, Iterable):
        return params  # a module is read by its layers; torch raises a clear error for the others
    return [as_list(p) if isinstance(p, Mapping) else p for p in params]


def tensors_of(params: Any) -> list[Any]:
    """Return all tensors in `params`, in whatever form an optimizer takes them."""
    if isinstance(params, Mapping):
        return tensors_of(params["params"])
    if isinstance(params, tuple):
        return [params[1]]
    return [t for p in params for t in tensors_of(p)] if isinstance(params, list) else [params]


def signature_of(cls: Any, init: Any) -> inspect.Signature:
    """Return the constructor's signature, for `help()`.

    A class without a constructor of its own, whose constructor is `init`, takes what the inner class takes, and the
    settings.
    """
    own = list(inspect.signature(cls.__init__).parameters.values())[1:]
    if cls.__init__ is init:
        settings_only = [p for p in own if p.kind is p.KEYWORD_ONLY]
        own = sorted([*inspect.signature(cls.inner).parameters.values(), *settings_only], key=lambda p: p.kind)
    return inspect.Signature(own)


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
        versions = [p._version for g in groups for p in g["params"]]
        self._has_projected = None
        with stepping(self):
            loss = step(self, *args, **kwargs)
        if not self._has_projected:
            if [p._version for g in groups for p in g["params"]] != versions:
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
        was, before = (self._has_projected, self._moved_by), [_place(p) for g in held for p in g["params"]]
        self._has_projected = None
        try:
            result = method(self, *args, **kwargs)
        finally:
            has_projected = self._has_projected
            self._has_projected = has_projected or was[0]
        if has_projected or [_place(p) for g in held for p in g["params"]] == before:
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
