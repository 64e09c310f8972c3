"""Find the weights that enter one neuron in each layer of torch.nn, and make param groups of them.

A constraint can be declared on a layer, too (`constrain`). It is kept in an attribute of the module, so that it travels
with the model and costs nothing until an optimizer is made from the model.

A neuron's fan-in is the set of weights that one pre-activation output unit depends on. A unit of a convolution is one
channel, at all positions. In an embedding, one vector is that of one token.
"""

from __future__ import annotations

import dataclasses
import re
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from projgd import rules
from projgd.axes import Split, Stacked, resolve
from projgd.constraints import Constraint, MaxNorm
from projgd.rules import Rules
from projgd.torch import settings

FREE = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)
OUT_FIRST = (
    nn.Linear,
    nn.Bilinear,
    _ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
FEW = 6
"""A warning lists so many names one by one."""


def param_groups(
    model: nn.Module, constraint: Constraint | Rules | None = None, **group_options: Any
) -> list[dict[str, Any]]:
    """Return the param groups of a projected optimizer, with the axes that each layer's arithmetic needs.

    The groups are for `Projected` optimizers. Any other optimizer takes them and ignores the constraint in them, as
    torch does with all keys that it does not know.

    Args:
        model: any module.
        constraint: one constraint for all weights of the model, or rules: patterns over the names of
            `model.named_parameters()`. The first match wins, and a name that no pattern matches is free. A set of norms
            leaves biases and norm layers free; a set of entries, such as `NonNegative`, holds them, too. An explicit
            axis in a constraint wins over the layer's; `"fan_in"` is the layer's. What is declared on a layer, see
            `constrain`, wins over one constraint for all, and a rule wins over what is declared. Default None: what is
            declared, alone.
        **group_options: other keys for every group, such as `lr` or `weight_decay`. `gradient` is for the groups with
            a constraint only.

    Returns:
        One group for each distinct constraint and one for the free parameters, in the order of the model. A weight that
        several layers share appears once.

    Raises:
        TypeError: an object that is not a module or not a constraint, or a parameter whose dtype has no projection.
        ValueError: a rule that matches no parameter, none with a fan-in, or only those of earlier rules; an axis that a
            parameter does not have; a lazy layer that has not run yet; a weight shared by layers whose axes differ.

    Warns:
        UserWarning: a parametrized weight, where a bound on the tensor that the optimizer owns is not one on the
            effective weight; a parameter of a layer that is not torch.nn's, which is read as (out, in, *kernel); a
            constraint or a rule all of whose parameters are frozen.

    >>> from projgd import MaxNorm
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ConvTranspose1d(4, 6, 3, groups=2))
    >>> for group in param_groups(model, MaxNorm(3.0), lr=0.1):
    ...     print(group["param_names"], group["constraint"])
    ['0.weight'] MaxNorm(c=3.0, axis='fan_in')
    ['0.bias', '1.bias'] None
    ['1.weight'] MaxNorm(c=3.0, axis=Split(dim=0, parts=2, over=(1, 3)))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups() reads the layers of a torch.nn.Module, not a {type(model).__name__}: pass the model, or "
            "give the parameters to the optimizer as they are"
        )
    groups: dict[Constraint | None, dict[str, Any]] = {}
    params = dict(model.named_parameters())
    for name, own in constraints(model, constraint).items():
        settings.check(own, {name: params[name]})
        if own not in groups:
            groups[own] = {"params": [], "param_names": [], "constraint": own, **group_options}
            if own is None:
                groups[own].pop("gradient", None)  # "tangent" needs a set
        groups[own]["params"].append(params[name])
        groups[own]["param_names"].append(name)
    return list(groups.values())


def constraints(model: nn.Module, constraint: Constraint | Rules | None) -> dict[str, Constraint | None]:
    """Return the constraint of every parameter of a model, with the axes of its layer.

    Args:
        model: any module.
        constraint: one constraint for all weights, or rules, as in `param_groups`; None for the declared ones alone.

    Returns:
        The constraint of every parameter by its name; None for a free one.

    Raises:
        TypeError, ValueError: as `param_groups`.

    Warns:
        UserWarning: as `param_groups`.
    """
    uses: dict[str, list[_Use]] = {}
    first = {id(p): name for name, p in model.named_parameters()}
    for use in _find_uses(model):
        uses.setdefault(first[id(use.param)], []).append(use)
    wanted = _assign(constraint, {name: uses[name] for name in first.values()}, declared(model))
    for name, own in wanted.items():
        if own is not None or isinstance(constraint, Constraint):
            settings.refuse_flattened(uses[name][0].param, name)
        if own is not None:
            settings.refuse_lazy(uses[name][0].param, name)
    chosen = {name: _with_axis(own, uses[name]) for name, own in wanted.items()}
    if isinstance(constraint, Mapping):
        rules.refuse_idle(constraint, {name: own is not None for name, own in chosen.items()})
    if isinstance(constraint, Constraint) and not any(chosen.values()):
        rules.warn(f"{constraint} holds nothing: no parameter of the model has a fan-in")
    _warn(uses, wanted, chosen)
    _warn_of_frozen(constraint, {name: uses[name][0].param for name, own in chosen.items() if own is not None})
    return chosen


ATTRIBUTE = "_projgd_constraints"
"""The attribute of a module that holds the constraints that are declared on it."""

_declaring: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The modules with declared constraints, so that an optimizer made from bare tensors can warn."""


class _Declared(dict[str, "Constraint | None"]):
    """Hold the declared constraints of a module by parameter; a copy knows the copied module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = weakref.ref(module)
        _declaring.add(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Declared:
        copied: Any = memo.get(id(self.module()), self.module())
        return _copy_declared(copied, dict(self))

    def __reduce__(self) -> Any:
        return _copy_declared, (self.module(), dict(self))


def _copy_declared(module: nn.Module, found: Mapping[str, Constraint | None]) -> _Declared:
    made = _Declared(module)
    made.update(found)
    return made


T = TypeVar("T", bound=nn.Module)


def constrain(module: T, constraint: Constraint | None, name: str = "weight") -> T:
    """Declare the constraint of a parameter on its module: every projected optimizer made from the model applies it.

    Nothing else changes: no parametrization, no cost in the forward pass, the same state_dict. The declaration is
    copied, pickled and moved with the module.

    Args:
        module: the layer, or a module above it.
        constraint: the set; None declares that the parameter is free, also where the optimizer has a bound for all.
        name: the parameter's name in `module`, such as `"weight"` (the default) or `"0.weight"`.

    Returns:
        The module.

    Raises:
        TypeError: an object that is not a module or not a constraint.
        ValueError: a name that the module does not have, a lazy parameter, an axis that the parameter does not have,
            or another constraint that was declared before.

    >>> from projgd import MaxNorm
    >>> from projgd.torch import ProjectedSGD
    >>> model = nn.Sequential(constrain(nn.Linear(4, 3), MaxNorm(1.0)), nn.ReLU(), nn.Linear(3, 2))
    >>> declared(model)
    {'0.weight': MaxNorm(c=1.0, axis='fan_in')}
    >>> ProjectedSGD(model, lr=0.1).constraints()["0.weight"]
    MaxNorm(c=1.0, axis='fan_in')
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"constrain() takes a torch.nn.Module, not a {type(module).__name__}: pass the layer")
    if constraint is not None and not isinstance(constraint, Constraint):
        raise TypeError(f"{constraint!r} is not a constraint: pass one such as MaxNorm(4.0), or None for a free one")
    owner, own_name, p = _find_param(module, name)
    settings.refuse_lazy(p, f"{name} of {type(module).__name__}")
    settings.check(constraint, {f"{name} of {type(module).__name__}": p})
    known = vars(owner).get(ATTRIBUTE)
    if known is None:
        known = _Declared(owner)
        object.__setattr__(owner, ATTRIBUTE, known)
    if known.get(own_name, constraint) != constraint:
        raise ValueError(
            f"{name} of {type(module).__name__} has {known[own_name]} already, and {constraint} is another set: call "
            f"unconstrain(module, {name!r}) first"
        )
    known[own_name] = constraint
    return module


def unconstrain(module: T, name: str | None = None) -> T:
    """Remove what `constrain` has declared.

    Args:
        module: the layer, or a module above it.
        name: the parameter's name in `module`; default None, all parameters of the module and of those in it.

    Returns:
        The module.

    Raises:
        ValueError: a name that the module does not have.

    >>> from projgd import MaxNorm
    >>> declared(unconstrain(constrain(nn.Linear(4, 3), MaxNorm(1.0))))
    {}
    """
    if name is None:
        for part in module.modules():
            vars(part).pop(ATTRIBUTE, None)
    else:
        owner, own_name, _ = _find_param(module, name)
        vars(owner).get(ATTRIBUTE, {}).pop(own_name, None)
    return module


def declared(model: nn.Module) -> dict[str, Constraint | None]:
    """Return the constraints that are declared on a model's parameters, by the names of `model.named_parameters()`.

    Args:
        model: any module.

    Returns:
        The constraints as they were declared; None for a parameter that was declared free.

    Raises:
        ValueError: one tensor with two different constraints, in two layers that share it.

    >>> from projgd import MaxNorm, NonNegative
    >>> model = constrain(nn.Sequential(nn.Linear(4, 3)), NonNegative(), "0.bias")
    >>> declared(model)
    {'0.bias': NonNegative()}
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Constraint | None] = {}
    where: dict[str, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own_name, own in vars(module).get(ATTRIBUTE, {}).items():
            here = f"{path}.{own_name}" if path else own_name
            p = getattr(module, own_name, None)
            name = names.get(id(p), here)
            if found.get(name, own) != own:
                raise ValueError(
                    f"{where[name]} and {here} are one tensor, and {found[name]} and {own} are declared on it: keep one"
                )
            found[name], where[name] = own, here
    return {name: found[name] for name in names.values() if name in found}


def _find_param(module: nn.Module, name: str) -> tuple[nn.Module, str, nn.Parameter]:
    """Return the module that has a parameter, its name there, and the parameter."""
    path, _, own_name = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    p = None if owner is None else owner._parameters.get(own_name)
    if owner is not None and is_parametrized(owner, own_name):
        raise ValueError(
            f"{name} of {type(module).__name__} is computed by a parametrization. Remove it with "
            f"torch.nn.utils.parametrize.remove_parametrizations(layer, {own_name!r}), or pass "
            f"name={f'{path}.' if path else ''}parametrizations.{own_name}.original for the tensor that it is made from"
        )
    if owner is None or p is None:
        known = ", ".join(n for n, _ in module.named_parameters()) or "none"
        raise ValueError(f"{type(module).__name__} has no parameter {name!r}; its parameters are {known}")
    return owner, own_name, p


def warn_of_declared(params: Iterable[Any]) -> None:
    """Warn if tensors belong to modules with declared constraints, which an optimizer cannot see."""
    given = set(map(id, params))
    for module in list(_declaring):
        for name in vars(module).get(ATTRIBUTE, {}):
            if id(getattr(module, name, None)) in given:
                rules.warn(
                    f"{name} of a {type(module).__name__} has a declared constraint, which an optimizer cannot see "
                    "on a bare tensor: pass the model in the place of model.parameters()"
                )
                return


def read_params(params: Any, own: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return param groups in the place of a module, or of named tensors beside rules; anything else as it is.

    Args:
        params: what an optimizer was given.
        own: the settings that its constructor was given.

    Returns:
        What to pass on as `params`, and the settings that are not in the groups.

    Raises:
        TypeError, ValueError: as `param_groups`; rules for tensors without names; both `c` and `constraint`.

    Warns:
        UserWarning: as `param_groups`.
    """
    constraint, c = own.get("constraint"), own.get("c")
    has_rules = isinstance(constraint, Mapping) and "kind" not in constraint  # a config has a kind
    if not (has_rules or isinstance(params, nn.Module)):
        return params, own
    if constraint is not None and c is not None:
        raise ValueError(f"pass c={c} or constraint={constraint}, not both")
    if has_rules and "axis" in own:
        raise ValueError(f"axis={own['axis']!r} goes with c=, not with rules: give each constraint its axis")
    rest = {k: v for k, v in own.items() if k not in ("c", "axis", "constraint")} if has_rules else own
    if not isinstance(params, nn.Module):
        return _groups_by_rules(list(params), cast("Rules", constraint)), rest
    if c is None and constraint is None and (own.keys() & {"c", "constraint", "axis"} or not declared(params)):
        return list(params.named_parameters()), own
    groups = param_groups(params, constraint if c is None else MaxNorm(c, own.get("axis", "fan_in")))
    if c is None:
        return groups, rest
    return [_with_c(group, c) for group in groups], rest


def _with_c(group: dict[str, Any], c: Any) -> dict[str, Any]:
    """Return a group with `c` and `axis` in the place of a constraint that was made from them."""
    own = group["constraint"]
    if own is not None and own != MaxNorm(c, own.axis):
        return group  # a declared one
    del group["constraint"]
    return {**group, "c": None} if own is None else {**group, "c": c, "axis": own.axis}


def _groups_by_rules(params: list[Any], constraint: Rules) -> list[dict[str, Any]]:
    """Return groups of `(name, tensor)` pairs; each tensor is read as (out, in, *kernel)."""
    if not all(isinstance(p, tuple) for p in params):
        raise ValueError(
            "rules need names: pass the model itself, or model.named_parameters() in the place of model.parameters()"
        )
    named = dict(params)
    chosen = rules.assign(constraint, named)
    for name, own in chosen.items():
        settings.check(own, {name: named[name]})
    held = {
        name: own is not None and own.resolve(tuple(named[name].shape), "out_first", name) is not None
        for name, own in chosen.items()
    }
    rules.refuse_idle(constraint, held)
    _warn_of_frozen(constraint, {name: p for name, p in named.items() if held[name]})
    groups: dict[Constraint | None, dict[str, Any]] = {}
    for name, own in chosen.items():
        group = groups.setdefault(own, {"params": [], "constraint": own})
        group["params"].append((name, named[name]))
    return list(groups.values())


def fan_in(layer: nn.Module, name: str, ndim: int) -> tuple[int, ...] | Split | None:
    """Return the axes of a parameter that hold the weights of one neuron; None for a parameter without a fan-in.

    Args:
        layer: the layer that the parameter belongs to.
        name: the parameter's name in the layer.
        ndim: its number of axes.

    Returns:
        Non-negative axes, a `Split` for grouped transposed convolutions, or None.

    >>> fan_in(nn.ConvTranspose2d(4, 6, 3), "weight", 4)
    (0, 2, 3)
    """
    is_bias = name.startswith("bias") or name.endswith(("_bias", "_biases"))  # of stacked experts: (experts, out)
    if ndim < 2 or is_bias or isinstance(layer, FREE):
        return None
    if isinstance(layer, _ConvTransposeNd):  # the weight is (in, out / groups, *kernel), with the groups along `in`
        if layer.groups == 1:
            return (0, *range(2, ndim))
        return Split(0, layer.groups, (1, *range(3, ndim + 1)))
    if _is_conv1d_of_transformers(layer):  # GPT-2's linear layer stores (in, out)
        return (0,)
    return tuple(range(1, ndim))


@dataclasses.dataclass(frozen=True)
class _Use:
    """Describe a parameter in one layer of the model; a shared parameter has several uses.

    Attributes:
        name: its name in the model.
        param: the parameter.
        layer: the layer.
        own_name: its name in the layer; for a parametrized tensor, the name of that tensor.
        indirect: whether the layer computes its weight from it, so that a bound on it is not one on the weight.
    """

    name: str
    param: nn.Parameter
    layer: nn.Module
    own_name: str
    indirect: bool = False

    @property
    def known(self) -> bool:
        return isinstance(self.layer, (*FREE, *OUT_FIRST)) or _is_conv1d_of_transformers(self.layer)


def _find_uses(model: nn.Module) -> Iterator[_Use]:
    """Yield every parameter in every layer that has it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        for own_name, p in module._parameters.items():
            if p is None:
                continue
            name = f"{path}.{own_name}" if path else own_name
            if isinstance(module, ParametrizationList):
                *above, _, tensor = path.split(".")
                layer = modules[".".join(above)]
                by_rows = fan_in(layer, tensor, p.ndim) == tuple(range(1, p.ndim))
                yield _Use(name, p, layer, tensor, indirect=not (by_rows and _is_gain(module, own_name)))
            else:
                made = (
                    own_name.removesuffix("_orig").removesuffix("_g").removesuffix("_v")
                )  # the suffixes of torch.nn.utils' older functions
                old_way = made != own_name and hasattr(module, made) and not hasattr(module, f"{made}_mask")
                yield _Use(name, p, module, own_name, old_way)


def _fan_in(use: _Use) -> tuple[int, ...] | Split | None:
    """Return the fan-in of a use; a lazy weight counts as a matrix."""
    ndim = 2 if is_lazy(use.param) and "bias" not in use.own_name else use.param.ndim
    return fan_in(use.layer, use.own_name, ndim)


def _fan_in_beside(use: _Use) -> int:
    """Return how many weights enter one neuron of the layer that a bias belongs to; 0 for another parameter."""
    name = use.own_name.replace("bias", "weight")
    weight = getattr(use.layer, name, None)
    if name == use.own_name or not isinstance(weight, Tensor):
        return 0
    axis = fan_in(use.layer, name, weight.ndim)
    vectors = None if axis is None else resolve(axis, tuple(weight.shape), "out_first", use.name)
    return vectors.length if vectors else 0


def _is_gain(module: ParametrizationList, own_name: str) -> bool:
    """Return whether a parametrized tensor is weight_norm's g, which holds the norms of the weight's rows."""
    made_by = module[0]
    return own_name == "original0" and type(made_by).__name__ == "_WeightNorm" and bool(made_by.dim == 0)


def _assign(
    constraint: Constraint | Rules | None, uses: Mapping[str, list[_Use]], declared: Mapping[str, Constraint | None]
) -> dict[str, Constraint | None]:
    """Return the constraint that the user wants for every parameter, before its layer decides the axes.

    A rule that matches a parameter wins over what is declared on it; what is declared wins over a constraint for all.
    """
    if constraint is None or isinstance(constraint, Constraint):
        holds_all = constraint is not None and (constraint.axis == "entries" or constraint.beside(1) is not None)
        return {
            name: constraint if holds_all or any(_fan_in(p) is not None for p in here) else None
            for name, here in uses.items()
        } | dict(declared)
    if not isinstance(constraint, Mapping):
        raise TypeError(
            f"{constraint!r} is not a constraint: pass one such as MaxNorm(4.0), or rules: names to constraints"
        )
    shared = {p.name: name for name, here in uses.items() for p in here if p.name != name}
    for pattern in constraint:
        other = next((name for name in shared if rules.matches(pattern, name)), None)
        if other is not None and not any(rules.matches(pattern, name) for name in uses):
            raise ValueError(
                f"the rule {pattern!r} names {other!r}, which is one tensor with {shared[other]!r}: use that name"
            )
    chosen = rules.assign(constraint, uses)
    return chosen | {k: own for k, own in declared.items() if not any(rules.matches(r, k) for r in constraint)}


def _with_axis(own: Constraint | None, uses: list[_Use]) -> Constraint | None:
    """Return a constraint with the axes of the layers in which its parameter is."""
    if own is None or own.axis not in ("fan_in", "matrix"):
        return own
    found = {_fan_in(p) for p in uses}
    if own.axis == "matrix":
        return None if found == {None} else own
    if len(found) > 1:
        raise ValueError(
            f"{' and '.join(p.name for p in uses)} are one tensor whose neurons lie along different axes in the "
            "layers that share it: give the constraint of its rule an explicit axis"
        )
    (axis,) = found
    if axis is None:
        fan_ins = {_fan_in_beside(p) for p in uses}
        return own.beside(fan_ins.pop()) if len(fan_ins) == 1 and 0 not in fan_ins else None
    if axis == tuple(range(1, uses[0].param.ndim)):
        return own  # layers of all ranks then share one group
    return own.replace(axis=axis)


def _warn(
    uses: Mapping[str, list[_Use]], wanted: Mapping[str, Constraint | None], chosen: Mapping[str, Constraint | None]
) -> None:
    """Warn of constraints on tensors that are not effective weights, and of unknown layers."""
    held = [(name, p) for name, here in uses.items() for p in here if chosen[name] is not None]
    if indirect := [name for name, p in held if p.indirect]:
        rules.warn(
            f"{_list(indirect)}: the constraint holds for this tensor, which the optimizer owns, not for the "
            "effective weight that the parametrization makes from it"
        )
    if unknown := [name for name, p in held if not p.known and _is_guessed(wanted[name], p.param)]:
        rules.warn(
            f"{_list(unknown)}: not a weight of a layer that projgd knows, read as (out, in, *kernel); a rule settles "
            "it: an explicit axis, such as axis=1, or axis=Stacked() for a stack of experts; None frees it"
        )
    if idle := [name for name, p in held if _is_no_stack(chosen[name], p)]:
        rules.warn(
            f"{_list(idle)}: {chosen[idle[0]]} leaves them free, because it takes the first axis for a stack; "
            "give the stacks a rule of their own"
        )


def _is_no_stack(constraint: Constraint | None, use: _Use) -> bool:
    """Return whether `Stacked` finds no vectors in a weight, because it is not a stack."""
    if constraint is None or not isinstance(constraint.axis, Stacked) or _fan_in(use) is None:
        return False
    return constraint.resolve(tuple(use.param.shape), "out_first", use.name) is None


def _list(names: Iterable[str]) -> str:
    """Return names as text; names that differ in numbers alone, as those of many layers do, become one pattern."""
    names = list(dict.fromkeys(names))
    if len(names) <= FEW:
        return ", ".join(names)
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append(name)
    return ", ".join(pattern if len(here) > 1 else here[0] for pattern, here in alike.items())


def _warn_of_frozen(constraint: Constraint | Rules | None, held: Mapping[str, nn.Parameter]) -> None:
    """Warn of a constraint, or a rule, that is only for parameters that do not train."""
    own: dict[Any, list[str]] = {None: list(held)}
    if isinstance(constraint, Mapping):
        own = dict(rules.own_names(constraint, held))
    for pattern, names in own.items():
        if names and not any(held[name].requires_grad for name in names):
            who = constraint or "what is declared" if pattern is None else f"the rule {pattern!r}"
            rules.warn(
                f"{who} is for frozen parameters only, such as {names[0]!r}: nothing is projected unless they get a "
                "gradient, or without_grad=True is passed"
            )


def _is_guessed(constraint: Constraint | None, p: nn.Parameter) -> bool:
    """Return whether the vectors of a parameter depend on its layer; a matrix has no layout to know."""
    return constraint is not None and (constraint.axis == "fan_in" or (constraint.axis == "matrix" and p.ndim > 2))


def _is_conv1d_of_transformers(layer: nn.Module) -> bool:
    """Return whether a layer is the `Conv1D` of the transformers library."""
    return any((c.__module__, c.__qualname__) == ("transformers.pytorch_utils", "Conv1D") for c in type(layer).__mro__)
