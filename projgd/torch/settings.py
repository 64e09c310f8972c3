"""Read what a param group says about its projection.

The keys are `c`, `axis`, `constraint`, `update`, `gradient`, `metric`, `without_grad`, whether parameters without a
gradient are projected, too, and `every`, after how many steps the projection follows. `c` (with `axis`) is the short
form of `constraint=MaxNorm(c, axis)`. `c` stays in the group as a number that may change during training, like `lr`. If
`constraint` is given and has a `c`, that one is in the group.

`c=4` is not stored as a constraint: `constraint_of` makes the `MaxNorm`, and a `Snapshot` keeps it.
"""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from projgd import axes, rules
from projgd.axes import Vectors
from projgd.config import from_config
from projgd.constraints import Constraint, MaxNorm, check_every, positive
from projgd.metrics import NAMES
from projgd.sums import float_type
from projgd.torch.engines import ranks
from projgd.updates import Update

LONG_KERNEL = 32
"""A tensor of three axes whose last two are this long is more likely a stack of matrices than a convolution."""

KEYS = ("c", "axis", "constraint", "update", "gradient", "metric", "without_grad", "every")

OPTIONS = ("fused", "differentiable", "capturable")
"""The options of torch.optim that decide, beside the settings, which engine takes a parameter."""


def settle(own: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """Return all `KEYS` of a group: its own values, and the constructor's for the keys that it does not have.

    Args:
        own: the group.
        inherited: the constructor's settings.

    Returns:
        The settings, checked.

    Raises:
        TypeError: a constraint, an update or a `without_grad` that is not one.
        ValueError: both `c` and `constraint`, an `axis` beside `constraint`, or an unknown gradient or metric.
    """
    given = {k: _read_config(own[k]) for k in KEYS if k in own}
    # A group of a projected optimizer has all keys already.
    settings = given if len(given) == len(KEYS) else _merge(given, inherited)
    settings["axis"] = axes.check(settings["axis"])
    if isinstance(settings["constraint"], Constraint):
        _check_agreement(settings, settings["constraint"])
    constraint_of(settings)  # making the constraint in force checks c, axis and constraint
    if settings["update"] is not None and not isinstance(settings["update"], Update):
        raise TypeError(
            f"update={settings['update']!r} is not a shaping of updates: pass one such as RelativeUpdate(), "
            "or None for the update as it comes"
        )
    if settings["gradient"] not in (None, "tangent"):
        raise ValueError(f'gradient={settings["gradient"]!r} is not known: pass None or "tangent"')
    if settings["metric"] not in NAMES:
        raise ValueError(f'metric={settings["metric"]!r} is not known: pass "euclidean" or "adaptive"')
    if not isinstance(settings["without_grad"], bool):
        raise TypeError(f"without_grad={settings['without_grad']!r} is not known: pass True or False")
    check_every(settings["every"])
    return settings


COUNT = "steps_since_projection"
"""The key of a param group with `every` above 1 for the number of steps since its last projection."""


def count_step(groups: Iterable[dict[str, Any]]) -> None:
    """Count a step of the groups that are not projected after each one."""
    for group in groups:
        if group["every"] > 1:
            _count(group)


def is_due(group: Mapping[str, Any]) -> bool:
    """Return whether a group is projected after the step that was counted last."""
    return group["every"] == 1 or _is_due(group)


@torch._disable_dynamo  # type: ignore[attr-defined]  # a graph would be compiled anew for every count
def _count(group: dict[str, Any]) -> None:
    group[COUNT] = (group.get(COUNT, 0) + 1) % group["every"]


@torch._disable_dynamo  # type: ignore[attr-defined]
def _is_due(group: Mapping[str, Any]) -> bool:
    return bool(group.get(COUNT, 0) == 0)


def _merge(given: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's own settings, with the constructor's for what it does not say."""
    if given.get("c") is not None and given.get("constraint") is not None:
        raise ValueError(f"pass c={given['c']} or constraint={given['constraint']}, not both")
    if given.get("constraint") is not None and "axis" in given:
        raise ValueError(f"axis= goes with c=; here write the axis into the constraint: {given['constraint']}")
    settings: dict[str, Any] = {"update": None, "metric": "euclidean", "c": None, "constraint": None, "axis": "fan_in"}
    settings |= {"gradient": None, "without_grad": False, "every": 1}
    settings |= {k: inherited[k] for k in KEYS if k in inherited}
    if "c" in given or "constraint" in given:
        settings["c"], settings["constraint"] = given.get("c"), given.get("constraint")
        if settings["constraint"] is not None:
            settings["c"], settings["axis"] = _c_and_axis(settings["constraint"])
    if "axis" in given:
        settings["axis"] = given["axis"]
        if settings["constraint"] is not None:  # the group keeps the constructor's set, with its own axis
            settings["constraint"] = settings["constraint"].replace(axis=given["axis"])
    if ("c" in given or "constraint" in given) and settings["c"] is None and settings["constraint"] is None:
        settings |= {"update": None, "gradient": None}  # a freed group takes the inner optimizer's step
    settings |= {k: given[k] for k in ("update", "gradient", "metric", "without_grad", "every") if k in given}
    return settings


@dataclass(frozen=True)
class Snapshot:
    """Describe a param group as it was when it was checked.

    Attributes:
        group: the group itself.
        settings: its settings.
        params: the ids of its parameters, because a wrapper that replaces them wants the old ones freed.
        constraint: the constraint in force.
        options: the values of `OPTIONS`.
    """

    group: dict[str, Any]
    settings: dict[str, Any]
    params: list[int]
    constraint: Constraint | None
    options: list[Any]

    @classmethod
    def of(cls, group: dict[str, Any], own: Mapping[str, Any] | None = None) -> Snapshot:
        """Return a snapshot of the group as it is now, with the settings `own` if they are given."""
        known = {k: (own or group)[k] for k in KEYS}
        return cls(group, known, list(map(id, group["params"])), constraint_of(known), options_of(group))

    def has_params(self, params: list[torch.Tensor]) -> bool:
        """Return whether these are the parameters of the snapshot."""
        return list(map(id, params)) == self.params

    def is_unchanged(self, group: Mapping[str, Any]) -> bool:
        """Return whether `group` is the group of the snapshot, and unchanged."""
        if torch.compiler.is_compiling():  # it watches the parameters itself, and follows c
            now = constraint_of(group)
            same = self.group is group and not changed_keys(group, self.settings, KEYS[1:])
            return same and (moves_freely(now) or now == self.constraint)
        same = self.group is group and not changed_keys(group, self.settings) and self.options == options_of(group)
        return same and self.has_params(group["params"])


def options_of(group: Mapping[str, Any]) -> list[Any]:
    """Return the values of `OPTIONS` in a group; None for an option that it does not have."""
    return list(map(group.get, OPTIONS))


def changed_keys(group: Mapping[str, Any], known: Mapping[str, Any], keys: Sequence[str] = KEYS) -> set[str]:
    """Return the keys whose values in a group differ from `known`.

    Args:
        group: the param group.
        known: its settings when it was last checked.
        keys: the keys to compare; default all `KEYS`.

    Returns:
        The names of the keys. A number in an array always counts as changed, because it may be written in place.
    """
    same = map(operator.is_, map(group.get, keys), map(known.get, keys))
    if type(known["c"]) in (float, int, NoneType) and all(same):
        return set()  # this is quick, because nearly every step comes here
    return {k for k in keys if not _is_same(group.get(k, ...), known[k])}


def adopt(group: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a group in a running optimizer, after some have been changed.

    A new set brings its own c and axis. A c or an axis that was changed goes into the set.

    Args:
        group: the param group.
        known: its settings when it was last checked.

    Returns:
        The settings, checked.

    Raises:
        TypeError, ValueError: as `settle`; and changes that disagree.
    """
    changed = {k: _read_config(group[k]) for k in changed_keys(group, known)}
    settings = {**known, **changed}
    constraint = settings["constraint"]
    if "constraint" in changed:
        settings["c"], settings["axis"] = _c_and_axis(constraint)
        if constraint is None:
            settings |= {"axis": known["axis"]}
            if changed.get("c") is None:
                settings |= {"update": None, "gradient": None}
        settings |= changed
    elif constraint is not None and "axis" in changed:
        settings["constraint"] = constraint.replace(axis=changed["axis"])
    if "constraint" not in changed and "c" in changed and _c_and_axis(constraint)[0] is not None:
        settings["constraint"] = None if changed["c"] is None else settings["constraint"].replace(c=changed["c"])
    return settle(settings, {})


def refuse_lone_axis(own: Mapping[str, Any], groups: Iterable[Mapping[str, Any]]) -> None:
    """Raise an error for an `axis` that somebody has passed, if none of its groups has a constraint.

    Args:
        own: the settings that were passed.
        groups: the param groups that they are for.

    Raises:
        ValueError: such an axis.
    """
    if "axis" in own and not own.keys() & {"c", "constraint"} and all(constraint_of(g) is None for g in groups):
        raise ValueError(f"axis={own['axis']!r} alone holds nothing: pass c= with it, such as c=4.0")


def _check_agreement(settings: dict[str, Any], constraint: Constraint) -> None:
    """Raise an error for a c or an axis that differs from the set's; fill in the set's c if none is given."""
    c, axis = _c_and_axis(constraint)
    if settings["c"] is None:
        settings["c"] = c
    wrong = ["axis"] * (settings["axis"] != axis) + ["c"] * (c is not None and positive("c", settings["c"]) != c)
    if wrong:
        raise ValueError(
            f"{wrong[0]}={settings[wrong[0]]!r} and constraint={constraint} disagree in one group: set only one of them"
        )


def _c_and_axis(constraint: Constraint | None) -> tuple[Any, Any]:
    """Return the c and the axis that a group has beside a set; a set of entries has the default axis."""
    if not isinstance(constraint, Constraint):  # `constraint_of` raises an error for other types
        return None, "fan_in"
    return constraint.moving_c, "fan_in" if constraint.axis == "entries" else constraint.axis


def _read_config(value: Any) -> Any:
    """Return a set or an update that a group holds as its `config`, from a copied checkpoint, as an object."""
    return from_config(dict(value)) if isinstance(value, Mapping) and "kind" in value else value


def _is_same(a: Any, b: Any) -> bool:
    """Return whether two values are equal for certain; an array may be written in place, so it never is."""
    plain = type(a) in (float, int) or not hasattr(a, "__array__")  # an array may be written in place
    return type(a) is type(b) and plain and bool(a == b)


def constraint_of(group: Mapping[str, Any]) -> Constraint | None:
    """Return the constraint in force in a group; its `c` may have changed since the group was made.

    Args:
        group: the param group.

    Returns:
        The constraint; None for a free group.

    Raises:
        TypeError: a constraint that is not one.
        ValueError: a `c` beside a constraint without one, or a `c` that is not positive and finite.
    """
    constraint, c = group["constraint"], group["c"]
    if constraint is None:
        return None if c is None else MaxNorm(c, group["axis"])
    if not isinstance(constraint, Constraint):
        raise TypeError(
            f"constraint={constraint!r} is not a constraint: pass one such as MaxNorm(4.0); rules go to the constructor"
        )
    if c is None:
        return constraint if constraint.moving_c is None else None
    c = positive("c", c)
    if constraint.moving_c is None:
        raise ValueError(f"c={c} goes with MaxNorm, and {constraint} is in its group: set one of them to None")
    return constraint if constraint.moving_c == c else constraint.replace(c=c)


def vectors_of_update(group: Mapping[str, Any], p: torch.Tensor, name: str = "the array") -> Vectors | None:
    """Return the vectors along which a group shapes the update of a parameter.

    Args:
        group: the param group.
        p: the parameter.
        name: its name, for errors; default `"the array"`.

    Returns:
        The vectors; None if the update stays as it is.

    Raises:
        ValueError: an axis that the parameter does not have, or vectors that differ from those of the constraint.
    """
    update: Update | None = group["update"]
    return None if update is None else update.resolve(tuple(p.shape), "out_first", name, constraint_of(group))


def check(constraint: Constraint | None, params: Mapping[str, torch.Tensor], metric: str = "euclidean") -> None:
    """Raise an error that names the parameter if a constraint cannot be applied to it.

    Args:
        constraint: the constraint; None passes.
        params: the parameters by name.
        metric: `"euclidean"`, the default, or `"adaptive"`.

    Raises:
        TypeError: a parameter that is not a dense floating-point tensor of a known dtype.
        ValueError: an uninitialised or expanded parameter, an axis that it does not have, or a bound too small for its
            dtype.
    """
    if constraint is None:
        return
    for name, p in params.items():
        refuse_lazy(p, name)
        _refuse_unmeasurable(p, name)
        kind = float_type(p, name)
        if any(n > 1 and s == 0 for n, s in zip(p.shape, p.stride(), strict=True)):
            raise ValueError(
                f"{name} is an expanded tensor (stride 0): its entries share memory; pass a .contiguous() one"
            )
        vectors = constraint.resolve(tuple(p.shape), "out_first", name)
        if vectors is not None and p.numel():
            constraint.fit(kind, vectors, name)
        if ranks.is_dtensor(p):
            ranks.check_sharding(p, constraint, metric, name)


def warn_if_idle(said: Iterable[str], groups: Sequence[Mapping[str, Any]], layers_known: bool = False) -> None:
    """Warn if nothing will be projected, or if a stack may be read as one layer.

    Args:
        said: the keys that the user has passed, to the constructor or in any group.
        groups: the param groups.
        layers_known: whether a module's layers have told what the axes are, so that no stack is taken for one layer.

    Warns:
        UserWarning: no `c` and no `constraint`; constraints of which no parameter has a vector; a tensor of three axes
            that is more likely a stack of matrices than a convolution.
    """
    if not set(said) & {"c", "constraint", "update", "gradient"}:
        rules.warn("nothing is projected: pass c=, such as c=4.0, or constraint=; c=None says that nothing should be")
    asked = [(constraint_of(g), named_params(g, i)) for i, g in enumerate(groups)]
    found = [(own, name, p) for own, named in asked if own is not None for name, p in named.items()]
    if found and all(own.resolve(tuple(p.shape), "out_first", name) is None for own, name, p in found):
        own, name, p = found[0]
        rules.warn(
            f"{own} holds nothing: no parameter has a vector for it, such as {name} of shape {tuple(p.shape)}. "
            "axis=None makes each whole tensor one vector"
        )
    for own, name, p in [] if layers_known else found:
        if own.axis in ("fan_in", "matrix") and p.ndim == 3 and min(p.shape[1:]) >= LONG_KERNEL:
            read, stacked = ("one matrix", '"matrix"') if own.axis == "matrix" else ("(out, in, kernel)", "")
            rules.warn(
                f"{name} of shape {tuple(p.shape)} is read as {read}. If its first axis counts layers or experts, pass "
                f"axis=Stacked({stacked}); if not, axis={None if own.axis == 'matrix' else (1, 2)} says so"
            )


def is_frozen(group: Mapping[str, Any], p: torch.Tensor) -> bool:
    """Return whether no step projects a parameter, because it has no gradient and cannot get one."""
    return not (p.requires_grad or p.grad is not None or group["without_grad"])


def exempt(
    check: Callable[[Mapping[str, torch.Tensor]], Any], group: Mapping[str, Any], named: Mapping[str, torch.Tensor]
) -> dict[str, Exception]:
    """Return the frozen parameters that `check` refuses, each with its error; raise the error for the others.

    Args:
        check: raises TypeError or ValueError for parameters, which are given by name.
        group: the param group.
        named: its parameters by name.
    """
    try:
        check(named)
    except (TypeError, ValueError):
        refused: dict[str, Exception] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, p in named.items():
                try:
                    check({name: p} if is_frozen(group, p) else {})
                except (TypeError, ValueError) as error:
                    refused[name] = error
        check({name: p for name, p in named.items() if name not in refused})
        return refused
    return {}


def moves_freely(constraint: Constraint | None) -> bool:
    """Return whether a constraint has no c, or one far from the ends of every dtype, which needs no check."""
    c = None if constraint is None else constraint.moving_c
    return c is None or 2.0**-38 < c < 2.0**60


def named_params(group: Mapping[str, Any], index: int) -> dict[str, torch.Tensor]:
    """Return the parameters of a group by name.

    Args:
        group: the param group.
        index: its position in the optimizer, for parameters without a name.

    Returns:
        The tensors by name, or by a description such as "parameter 0 of group 1".
    """
    params = group["params"] if isinstance(group["params"], list) else [group["params"]]
    names = group.get("param_names", [])
    found: dict[str, torch.Tensor] = {}
    for i, p in enumerate(params):
        name, tensor = p if isinstance(p, tuple) else (names[i] if i < len(names) else None, p)
        if isinstance(tensor, torch.Tensor):
            place = f"parameter {i} of group {index}"
            found[place if name is None else f"{name} ({place})" if name in found else name] = tensor
    return found


def refuse_lazy(p: torch.Tensor, name: str) -> None:
    """Raise ValueError if `p` has no shape yet."""
    if torch.nn.parameter.is_lazy(p):
        raise ValueError(f"{name} is not initialised yet: run the lazy module once before making the optimizer")


def refuse_flattened(p: torch.Tensor, name: str) -> None:
    """Raise TypeError if `p` is a part of a flat parameter of the older FSDP."""
    if getattr(p, "_fsdp_flattened", False):
        raise TypeError(
            f"{name} was flattened by FullyShardedDataParallel, and its rows cannot be told apart: "
            "shard the model with torch.distributed.fsdp.fully_shard instead"
        )


def _refuse_unmeasurable(p: torch.Tensor, name: str) -> None:
    """Raise TypeError for a tensor whose norms cannot be measured."""
    refuse_flattened(p, name)
    if p.layout != torch.strided:
        raise TypeError(f"{name} is a {str(p.layout).removeprefix('torch.')} tensor: only dense ones can be projected")
    if is_traceable_wrapper_subclass(p) and not ranks.is_dtensor(p):
        raise TypeError(f"{name} is a {type(p).__name__}, a tensor subclass whose norms projgd cannot measure")


def to_plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group for a checkpoint, with the settings as plain types.

    Args:
        group: the param group.

    Returns:
        A new dict. The constraint and the update are their `config`, an axis that is a dataclass is a dict, a NumPy
        number is a float.
    """
    c, axis = group["c"], group["axis"]
    plain = {k: None if group[k] is None else group[k].config() for k in ("constraint", "update")}
    plain["axis"] = dataclasses.asdict(axis) if isinstance(axis, (axes.Split, axes.Stacked)) else axis
    return {**group, **plain, "c": c if type(c) in (int, float, torch.Tensor, type(None)) else positive("c", c)}


def from_plain(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group from a checkpoint; a group of a stock optimizer takes the `current` settings.

    Args:
        saved: the group in the checkpoint.
        current: the group in the optimizer.

    Returns:
        A new dict, with the settings as objects.

    Raises:
        TypeError, ValueError: as `settle`.
    """
    return {**saved, **settle({**{k: current[k] for k in KEYS}, **saved}, {})}
