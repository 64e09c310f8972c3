"""What a param group says about its projection: `c`, `axis`, `constraint`, `update`, `gradient`, `metric`, and
`without_grad`, whether parameters without a gradient are projected too.

`c` (with `axis`) is the short form of `constraint=MaxNorm(c, axis)`. `c` stays in the group as a number that may be
moved during training, like `lr`; where `constraint` is given, its own `c`, if it has one, stands there.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from projgd import axes
from projgd.axes import Vectors
from projgd.config import from_config
from projgd.constraints import Constraint, MaxNorm, positive
from projgd.metrics import NAMES
from projgd.sums import float_type
from projgd.torch.engines import ranks
from projgd.updates import Update

KEYS = ("c", "axis", "constraint", "update", "gradient", "metric", "without_grad")


def settle(own: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """All `KEYS` of a group, from what it says itself and, where it is silent, from the constructor's settings.

    Raises:
        TypeError: a constraint that is none.
        ValueError: `c` and `constraint` both, `axis` beside `constraint` or beside nothing, or an unknown update or
            metric.
    """
    given = {k: _made(own[k]) for k in KEYS if k in own}
    # A group of a projected optimizer has all keys, and is taken over as it stands.
    settings = given if len(given) == len(KEYS) else _merged(given, inherited)
    settings["axis"] = axes.check(settings["axis"])
    if isinstance(settings["constraint"], Constraint):
        _agree(settings, settings["constraint"])
    constraint_of(settings)  # c, axis and constraint are checked by making the constraint in force
    if settings["update"] is not None and not isinstance(settings["update"], Update):
        raise TypeError(
            f"update={settings['update']!r} is no shaping: pass one such as RelativeUpdate(), or None, the update as "
            "it comes"
        )
    if settings["gradient"] not in (None, "tangent"):
        raise ValueError(f'gradient={settings["gradient"]!r} is not known: pass None or "tangent"')
    if settings["metric"] not in NAMES:
        raise ValueError(f'metric={settings["metric"]!r} is not known: pass "euclidean" or "adaptive"')
    if not isinstance(settings["without_grad"], bool):
        raise TypeError(f"without_grad={settings['without_grad']!r} is not known: pass True or False")
    return settings


def _merged(given: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("c") is not None and given.get("constraint") is not None:
        raise ValueError(f"pass c={given['c']} or constraint={given['constraint']}, not both")
    if given.get("constraint") is not None and "axis" in given:
        raise ValueError(f"axis= goes with c=; here write the axis into the constraint: {given['constraint']}")
    settings: dict[str, Any] = {"update": None, "metric": "euclidean", "c": None, "constraint": None, "axis": "fan_in"}
    settings |= {"gradient": None, "without_grad": False}
    settings |= {k: inherited[k] for k in KEYS if k in inherited}
    if "c" in given or "constraint" in given:
        settings["c"], settings["constraint"] = given.get("c"), given.get("constraint")
        if settings["constraint"] is not None:
            settings["c"], settings["axis"] = _c_and_axis(settings["constraint"])
    if "axis" in given:
        settings["axis"] = given["axis"]
        if settings["constraint"] is not None:  # the constructor's set, with this group's axis
            settings["constraint"] = settings["constraint"].replace(axis=given["axis"])
    if ("c" in given or "constraint" in given) and settings["c"] is None and settings["constraint"] is None:
        settings |= {"update": None, "gradient": None}  # a freed group is the inner optimizer's own
    settings |= {k: given[k] for k in ("update", "gradient", "metric", "without_grad") if k in given}
    return settings


@dataclass(frozen=True)
class Snapshot:
    """A param group as it was when it was checked.

    Attributes:
        group: the group itself.
        settings: its settings.
        params: ids of its parameters; a wrapper that puts others in their place wants the old ones gone.
        constraint: the constraint in force.
    """

    group: dict[str, Any]
    settings: dict[str, Any]
    params: list[int]
    constraint: Constraint | None

    @classmethod
    def of(cls, group: dict[str, Any], own: Mapping[str, Any] | None = None) -> Snapshot:
        """Return the group as it is now, with the settings `own` if they are not in it as they are."""
        known = {k: (own or group)[k] for k in KEYS}
        return cls(group, known, list(map(id, group["params"])), constraint_of(known))

    def has(self, params: list[torch.Tensor]) -> bool:
        """Whether these are the parameters."""
        return list(map(id, params)) == self.params

    def still(self, group: Mapping[str, Any]) -> bool:
        """Whether `group` is this one, unchanged."""
        if torch.compiler.is_compiling():  # which watches the parameters itself, and follows c
            now = constraint_of(group)
            same = self.group is group and not moved(group, self.settings, KEYS[1:])
            return same and (is_usual(now) or now == self.constraint)
        return self.group is group and not moved(group, self.settings) and self.has(group["params"])


def moved(group: Mapping[str, Any], known: Mapping[str, Any], keys: Sequence[str] = KEYS) -> set[str]:
    """The keys under which a group has something else than `known`; a number in an array may always have moved."""
    same = map(operator.is_, map(group.get, keys), map(known.get, keys))
    if type(known["c"]) in (float, int, NoneType) and all(same):
        return set()  # at nearly every step
    return {k for k in keys if not _same(group.get(k, ...), known[k])}


def adopt(group: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a group in a running optimizer, in which some have been changed since they were `known`.

    A set that has been replaced brings its own c and axis; a c or an axis that has been moved goes into the set.

    Raises:
        TypeError, ValueError: as `settle`; and where several changes disagree.
    """
    changed = {k: _made(group[k]) for k in moved(group, known)}
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
    """Raise ValueError for an `axis` that somebody has passed, where none of the groups that it is for has a set."""
    if "axis" in own and not own.keys() & {"c", "constraint"} and all(constraint_of(g) is None for g in groups):
        raise ValueError(f"axis={own['axis']!r} alone holds nothing: pass c= with it, such as c=4.0")


def _agree(settings: dict[str, Any], constraint: Constraint) -> None:
    """Refuse a c or an axis beside a set that has another; fill in its c where none is given."""
    c, axis = _c_and_axis(constraint)
    if settings["c"] is None:
        settings["c"] = c
    wrong = ["axis"] * (settings["axis"] != axis) + ["c"] * (c is not None and positive("c", settings["c"]) != c)
    if wrong:
        raise ValueError(
            f"{wrong[0]}={settings[wrong[0]]!r} and constraint={constraint} disagree in one group: set only one of them"
        )


def _c_and_axis(constraint: Constraint | None) -> tuple[Any, Any]:
    """The c and the axis that stand in a group beside a set; a set of entries has none, and leaves the default."""
    if not isinstance(constraint, Constraint):  # `constraint_of` refuses what is neither
        return None, "fan_in"
    return constraint.moving_c, "fan_in" if constraint.axis == "entries" else constraint.axis


def _made(value: Any) -> Any:
    """A set or a shaping that lies in a group as its `config`, where a checkpoint was copied into it."""
    return from_config(dict(value)) if isinstance(value, Mapping) and "kind" in value else value


def _same(a: Any, b: Any) -> bool:
    plain = type(a) in (float, int) or not hasattr(a, "__array__")  # what has one may be written to
    return type(a) is type(b) and plain and bool(a == b)


def constraint_of(group: Mapping[str, Any]) -> Constraint | None:
    """The constraint in force in a group now: its `c` may have moved since the group was made."""
    constraint, c = group["constraint"], group["c"]
    if constraint is None:
        return None if c is None else MaxNorm(c, group["axis"])
    if not isinstance(constraint, Constraint):
        raise TypeError(
            f"constraint={constraint!r} is no constraint: pass one such as MaxNorm(4.0); rules go through "
            "param_groups(model, rules)"
        )
    if c is None:
        return constraint if constraint.moving_c is None else None
    c = positive("c", c)
    if constraint.moving_c is None:
        raise ValueError(f"c={c} goes with MaxNorm, and {constraint} is in its group: set one of them to None")
    return constraint if constraint.moving_c == c else constraint.replace(c=c)


def vectors_of_update(group: Mapping[str, Any], p: torch.Tensor, name: str = "the array") -> Vectors | None:
    """The vectors of a parameter that the group's update is shaped along; None where it comes as it is."""
    update: Update | None = group["update"]
    return None if update is None else update.resolve(tuple(p.shape), "out_first", name, constraint_of(group))


def check(constraint: Constraint | None, params: Mapping[str, torch.Tensor], metric: str = "euclidean") -> None:
    """Raise an error that names the parameter if a constraint cannot be applied to it.

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
        if vectors is not None and not constraint.takes_initial:
            constraint.band(kind, vectors)  # refuses a bound that is too small for the dtype
        if ranks.is_dtensor(p):
            ranks.check_sharding(p, constraint, metric, name)


def is_usual(constraint: Constraint | None) -> bool:
    """Whether the c of a constraint, if it has one, is far from the ends of every dtype: it then moves freely."""
    c = None if constraint is None else constraint.moving_c
    return c is None or 2.0**-38 < c < 2.0**60


def named(group: Mapping[str, Any], index: int) -> dict[str, torch.Tensor]:
    """The parameters of a group by name; those without one by their place."""
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
    """Raise TypeError for a part of what the older FSDP has made of parameters."""
    if getattr(p, "_fsdp_flattened", False):
        raise TypeError(
            f"{name} was flattened by FullyShardedDataParallel, and its rows cannot be told apart: "
            "shard the model with torch.distributed.fsdp.fully_shard instead"
        )


def _refuse_unmeasurable(p: torch.Tensor, name: str) -> None:
    refuse_flattened(p, name)
    if p.layout != torch.strided:
        raise TypeError(f"{name} is a {str(p.layout).removeprefix('torch.')} tensor: only dense ones can be projected")
    if is_traceable_wrapper_subclass(p) and not ranks.is_dtensor(p):
        raise TypeError(f"{name} is a {type(p).__name__}, a tensor subclass whose norms projgd cannot measure")


def to_plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group for a checkpoint: the constraint, the shaping, a `Split` and the numbers of NumPy as plain types."""
    c, axis = group["c"], group["axis"]
    plain = {k: None if group[k] is None else group[k].config() for k in ("constraint", "update")}
    plain["axis"] = dataclasses.asdict(axis) if isinstance(axis, axes.Split) else axis
    return {**group, **plain, "c": c if type(c) in (int, float, torch.Tensor, type(None)) else positive("c", c)}


def from_plain(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, Any]:
    """A group from a checkpoint; one that a stock optimizer wrote keeps the `current` settings."""
    return {**saved, **settle({**{k: current[k] for k in KEYS}, **saved}, {})}
