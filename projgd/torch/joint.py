"""Apply sets over several tensors after the step of a projected optimizer; find the LoRA pairs of a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import array_api_compat.torch as xp
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from projgd import rules
from projgd.config import from_config
from projgd.entries import NonNegative
from projgd.joint import (
    Arithmetic,
    Joint,
    JointSet,
    ProductMaxNorm,
    TreeBall,
    measure_all,
    repeat_always,
    repeat_until_true,
    run_always,
    run_if_true,
)
from projgd.sums import Scalar
from projgd.torch import routing, settings
from projgd.torch.engines.ranks import all_reduce, is_dtensor, part_of

if TYPE_CHECKING:
    _Base = Optimizer
else:
    _Base = object  # `Projected` takes the optimizer class from those behind it


class JointSets(_Base):
    """Keep the sets over several tensors of a projected optimizer: the part of `Projected` for `joint=`."""

    _joint: tuple[tuple[JointSet, tuple[int, ...]], ...] = ()  # positions outlive tensors that a wrapper replaces
    _observed: dict[int, Tensor] | None = None  # the largest logits since the last step, by position in `_joint`

    @property
    def joint(self) -> list[Joint]:
        """Return the sets over several tensors with the names of their members. Assign a list to replace them.

        Raises:
            TypeError, ValueError: on assignment, sets that cannot be applied; the old ones stay then.

        >>> from projgd import TreeBall
        >>> from projgd.torch import ProjectedSGD
        >>> opt = ProjectedSGD(nn.Linear(3, 2), lr=0.1, joint=[TreeBall(4.0)])
        >>> opt.joint = [TreeBall(3.0).over("weight")]
        >>> opt.joint
        [Joint(set=TreeBall(c=3.0), members=('weight',))]
        """
        names = [name for name, _ in self._named()]
        return [made.over(*(names[i] for i in places)) for made, places in self._joint]

    @joint.setter
    def joint(self, joint: Iterable[Joint | JointSet]) -> None:
        named = self._named()  # empty where ZeroRedundancyOptimizer gives a rank no parameter
        names, params = [name for name, _ in named], [p for _, p in named]
        read: list[tuple[JointSet, tuple[int, ...]]] = []
        if isinstance(joint, (str, Joint, JointSet)) or not isinstance(joint, Iterable):
            raise TypeError(f"joint={joint!r} is not a list: pass one such as [TreeBall(4.0)]")
        for each in joint:
            if not isinstance(each, (Joint, TreeBall)):
                raise TypeError(f"joint= has {each!r}: pass sets with members, such as ProductMaxNorm(1.5).over(A, B)")
            each = each if isinstance(each, Joint) else each.over()
            read.append((each.set, each.find(names, params)))
        self._check_joint(read)
        self._joint, self._observed = tuple(read), None

    def observe(self, logits: Tensor | Mapping[Any, Tensor]) -> None:
        """Hand in the largest attention logits of a forward pass, for `QKClip` at the next step.

        Several calls before one step count as their maximum. The step uses them up; they are in no checkpoint.

        Args:
            logits: `{W_q: largest logit of every head}`, where W_q is a name or a tensor, and the values have the shape
                (heads,); or such a tensor alone if there is one `QKClip`.

        Raises:
            ValueError: another shape, or no `QKClip` over that W_q; the error names it.

        >>> from projgd import QKClip
        >>> from projgd.torch import ProjectedSGD
        >>> net = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
        >>> clip = QKClip(100.0, heads=2).over("q.weight", "k.weight")
        >>> opt = ProjectedSGD(net, lr=0.1, joint=[clip])
        >>> opt.observe({"q.weight": torch.tensor([20.0, 400.0])})
        """
        named = self._named()
        own = {i: places[0] for i, (made, places) in enumerate(self._joint) if made.takes_logits}
        if not isinstance(logits, Mapping):
            if len(own) != 1:
                raise ValueError(f"the optimizer has {len(own)} QKClip sets: pass {{name of W_q: its logits}}")
            logits = {named[next(iter(own.values()))][1]: logits}
        observed = dict(self._observed or {})
        for key, value in logits.items():
            found = [i for i, place in own.items() if key is named[place][1] or key == named[place][0]]
            if not found:
                known = ", ".join(named[place][0] for place in own.values()) or "none"
                what = repr(key) if isinstance(key, str) else f"a tensor of shape {tuple(key.shape)}"
                raise ValueError(f"no QKClip is over {what} as W_q; those that have one are {known}")
            for i in found:
                self._joint[i][0].check_logits(value, named[own[i]][0])
                now = value.detach().to(named[own[i]][1].device, torch.float64, copy=True)
                observed[i] = torch.maximum(observed[i], now) if i in observed else now
        self._observed = observed

    def joint_norms(self) -> list[float]:
        """Return for every set of `joint` the norm that it bounds, such as ‖scale · B A‖; NaN for `QKClip`.

        >>> from projgd import TreeBall
        >>> from projgd.torch import ProjectedSGD
        >>> opt = ProjectedSGD([nn.Parameter(torch.tensor([3.0, 4.0]))], lr=0.1, joint=[TreeBall(4.0)])
        >>> opt.joint_norms()
        [5.0]
        """
        with torch.no_grad():
            return [float(made.norm_by(*_locals(self._members(places)))) for made, places in self._joint]

    def _named(self) -> list[tuple[str, Tensor]]:
        """Return all parameters with their names, in the order of the param groups."""
        return [pair for i, group in enumerate(self.param_groups) for pair in settings.named_params(group, i).items()]

    def _members(self, places: Sequence[int]) -> list[Tensor]:
        """Return the parameters at some positions; for none, all that require a gradient."""
        params = [p for group in self.param_groups for p in group["params"]]
        return [params[i] for i in places] if places else [p for p in params if p.requires_grad]

    def _check_joint(self, joint: Iterable[tuple[JointSet, tuple[int, ...]]]) -> None:
        """Raise an error that names the parameter if a set cannot be applied to its members."""
        for made, places in joint:
            named = self._named()
            members = dict([named[i] for i in places] if places else [(k, p) for k, p in named if p.requires_grad])
            settings.check(NonNegative(), members)
            made.check(members, "out_first")
            sharded = [name for name, p in members.items() if _is_sharded(p)]
            if sharded and not isinstance(made, TreeBall):
                raise ValueError(f"{sharded[0]} is sharded, and {made} needs it whole: replicate it, or leave it out")

    def _project_jointly(self) -> None:
        """Apply the sets over several tensors, in their order; none where no member has a gradient."""
        observed, self._observed, skip = self._observed or {}, None, getattr(self, "found_inf", None)
        if routing.is_skipped(skip):
            return
        for i, (made, places) in enumerate(self._joint):
            params = self._members(places)
            if all(p.grad is None for p in params):
                continue
            if made.takes_logits and i not in observed and not torch.compiler.is_compiling():
                rules.warn(f"{made} does nothing in a step without logits: call optimizer.observe(…)")
            arrays, by = _locals(params)
            if torch.is_grad_enabled():  # autograd needs the values before the projection
                arrays = [x.clone() for x in arrays]
            for p, x, y in zip(params, arrays, made.onto(arrays, by, observed.get(i)), strict=True):
                if y is not x:
                    (p.to_local() if is_dtensor(p) else p).copy_(y if skip is None else torch.where(skip > 0, x, y))

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        joint = [{"set": made.config(), "over": list(places)} for made, places in self._joint]
        return {**state, "joint": joint} if joint else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        joint = [(from_config(j["set"]), tuple(j["over"])) for j in state_dict.get("joint", ())]
        count = len(self._named())
        if any(place >= count for _, places in joint for place in places):
            raise ValueError(f"the state has joint sets over other parameters than the {count} of this optimizer")
        self._check_joint(joint)
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "joint"})
        self._joint = tuple(joint) or self._joint


def lora_pairs(model: nn.Module, c: Scalar, scale: float | None = None, adapter: str | None = None) -> list[Joint]:
    """Return a `ProductMaxNorm` over every trainable LoRA pair of a model: ‖scale · B A‖ ≤ c.

    A pair is `lora_A` and `lora_B`, or `lora_embedding_A` and `lora_embedding_B`, of one module: as peft names them, by
    adapter, or as single layers or parameters.

    Args:
        model: the model, after peft has wrapped it.
        c: the bound of every pair.
        scale: what the layers multiply the product by; default None, each layer's own `scaling`, or 1 without one.
        adapter: the name of the adapter; default None, all of them.

    Returns:
        What goes into `joint=`.

    Raises:
        ValueError: no trainable pair, or a pair whose ranks differ; the error names the module.

    >>> model = nn.Linear(8, 8)
    >>> model.lora_A, model.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
    >>> [pair.set for pair in lora_pairs(model, c=1.5, scale=2.0)]
    [ProductMaxNorm(c=1.5, scale=2.0)]
    """
    found = []
    for name, key, a, b, own in _find_pairs(model):
        if adapter not in (None, key) or not (a.requires_grad or b.requires_grad):
            continue
        made = ProductMaxNorm(c, own if scale is None else scale)
        made.check({f"{name}.A": a, f"{name}.B": b}, "out_first")
        found.append(made.over(a, b))
    if not found:
        of = "" if adapter is None else f" of the adapter {adapter!r}"
        raise ValueError(f"the model has no trainable lora_A and lora_B{of}: pass what peft.get_peft_model returned")
    return found


def _find_pairs(model: nn.Module) -> Iterator[tuple[str, str | None, Tensor, Tensor, float]]:
    """Yield the name, the adapter, A, B and the scale of every LoRA pair."""
    for path, module in model.named_modules():
        for kind in ("lora_", "lora_embedding_"):
            a, b = getattr(module, f"{kind}A", None), getattr(module, f"{kind}B", None)
            if a is None or b is None:
                continue
            by_key = isinstance(a, (nn.ModuleDict, nn.ParameterDict))
            scales = getattr(module, "scaling", 1.0)
            for key in a.keys() if by_key else (None,):
                if by_key and key not in b:
                    raise ValueError(f"{path} has the adapter {key!r} in {kind}A and not in {kind}B")
                first, last = (_weight(x[key] if by_key else x) for x in (a, b))
                scale = scales[key] if isinstance(scales, Mapping) else scales
                name = ".".join(filter(None, (path, kind.rstrip("_"), key)))
                yield name, key, first, last, float(scale)


def _weight(factor: Any) -> Tensor:
    """Return a factor, which may be a layer."""
    return factor if isinstance(factor, Tensor) else factor.weight


def _is_sharded(p: Tensor) -> bool:
    """Return whether a rank holds a part of a tensor only."""
    return is_dtensor(p) and any(
        not placement.is_replicate() and p.device_mesh.size(i) > 1 for i, placement in enumerate(p.placements)
    )


def _locals(params: Sequence[Tensor]) -> tuple[list[Tensor], Arithmetic]:
    """Return what this rank holds of parameters, and how torch computes with it."""
    arrays = [p.to_local() if is_dtensor(p) else p for p in params]
    shapes = [tuple(p.shape) for p in params]
    wide = "float32" if params[0].device.type == "mps" else "float64"
    can_look = params[0].device.type == "cpu" and not (torch.compiler.is_compiling() or torch.is_grad_enabled())

    def measure(members: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = measure_all(members, wide, xp)
        return _over_ranks(params, *found) if any(map(_is_sharded, params)) else found

    # An accelerator would wait for the host, which reads a flag.
    control = (run_if_true, repeat_until_true) if can_look else (run_always, repeat_always)
    return arrays, Arithmetic(xp, wide, "out_first", shapes, lambda i, y: y.to(params[i].dtype), *control, measure)


def _over_ranks(params: Sequence[Tensor], r: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Return the measures of whole tensors from those of their parts, in one all-reduce for the tensors of a mesh."""
    meshes: dict[Any, list[int]] = {}
    parts = {i: part_of(p, None, over_all=True) for i, p in enumerate(params) if is_dtensor(p) and _is_sharded(p)}
    r, squares = r.clone(), squares.clone()
    for i, part in parts.items():
        meshes.setdefault((part.p.device_mesh, part.over), []).append(i)
    for at in meshes.values():
        part = parts[at[0]]
        if any(params[i].dtype == torch.float64 for i in at):  # their squares may not fit
            (largest,) = all_reduce([r[at]], part, "MAX")
        else:
            largest = torch.ones_like(r[at])
        share = r[at] / torch.where(largest > 0, largest, 1.0)
        (total,) = all_reduce([share * share * squares[at]], part)
        ranks = math.prod(part.p.device_mesh.size(i) for i in part.over)
        r[at], squares[at] = largest, total * (1 + 2 * ranks * 2.0**-53)
    return r, squares
