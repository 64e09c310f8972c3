"""Observe the inner optimizer's update and shape it against the weights before the projection: w ← w + shape(u).

An optimizer moves the parameters in place, so its update must be read off them. Where its rule does not read the
weights (`BLIND`, without weight decay), the optimizer runs from zero: the parameter then holds the update itself, to
full precision, in bfloat16 too. Any other optimizer runs from the weights, and the update is the difference, which
contains the rounding to the parameter's dtype. Both need one copy of the parameters that are shaped.

`Update.coefficients` turns three numbers per vector into two. So one pass measures a parameter and one moves it. Where
vectors are spread over ranks, all parameters share one all-reduce of three numbers per vector.

What a shaping or a set needs of the weights at the start is checked and taken here, too. The initial norms belong into
the optimizer's state, where checkpoints keep them. But an optimizer makes its own state only for a parameter whose
state is empty. So they wait in `Radii` until the optimizer has made it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch.optim import Optimizer

from projgd import axes, rules
from projgd.axes import Axis, Vectors
from projgd.constraints import Constraint, NormSet, norms_of
from projgd.sums import Measures, float_type, measures_of, norm
from projgd.torch import settings
from projgd.torch.engines import eager, ranks
from projgd.torch.engines.base import has_numbers, is_alike
from projgd.updates import TangentUpdate, Update

BLIND = (
    torch.optim.Adadelta,
    torch.optim.Adagrad,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.Muon,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
"""The optimizers whose update, without weight decay, depends on the gradients alone. Their subclasses may differ."""

PIECE = 1 << 18  # this many entries of two arrays and their product take 3 MB


def is_shaped(group: Mapping[str, Any]) -> bool:
    """Return whether a group shapes its update or its gradient."""
    return group["update"] is not None or group["gradient"] is not None


def reads_weights(inner: type[Optimizer], group: Mapping[str, Any]) -> bool:
    """Return whether the inner optimizer's update may depend on the weights."""
    return inner not in BLIND or bool(group.get("weight_decay"))


def check(inner: type[Optimizer], group: Mapping[str, Any], named: Mapping[str, Tensor]) -> None:
    """Raise an error that names the parameter if its group's shaping cannot work; warn if it works against itself.

    Args:
        inner: the class of the optimizer that steps.
        group: the param group, with the optimizer's defaults filled in.
        named: its parameters by name.

    Raises:
        ValueError: an update that cannot be observed, an axis that is not the set's, a zero weight vector where a norm
            is needed, `gradient="tangent"` without a set of vectors, a shaping that needs a missing learning rate.

    Warns:
        UserWarning: weight decay together with a fixed norm; an update that is read off rounded weights.
    """
    constraint, update = settings.constraint_of(group), group["update"]
    if group.get("weight_decay") and constraint is not None and constraint.fixes_norm:
        rules.warn(
            f"weight_decay={group['weight_decay']} works against {constraint}: the projection undoes what it does to "
            "the norm, and what is left changes the length or the direction of the update. Pass weight_decay=0"
        )
    if group["gradient"] is not None and (constraint is None or constraint.axis == "entries"):
        raise ValueError(
            'gradient="tangent" needs a set of vectors: pass constraint=UnitNorm() or another with an axis'
        )
    if update is None:
        return
    if callable(getattr(inner, "eval", None)):
        raise ValueError(
            f"the update of {inner.__name__} cannot be observed: it keeps weights of its own beside the parameters "
            "(it has an eval()). Leave update= out, or shape another optimizer's"
        )
    if update.needs_lr and "lr" not in group:
        raise ValueError(f"{update} makes updates of length lr·‖w‖, and {inner.__name__} has no lr")
    if group.get("differentiable"):
        raise ValueError(f"{update} writes the weights in place, so it cannot be differentiated: differentiable=False")
    for name, p in named.items():
        settings.check(constraint, {name: p})
        float_type(p, name)
        vectors = settings.vectors_of_update(group, p, name)
        if vectors is None:
            continue
        if update.needs_norm and has_numbers(p):
            norms_of(*_measurable(p, vectors, update.axis_beside(constraint)), name, f"{update} needs one", xp)
        if p.dtype in (torch.bfloat16, torch.float16) and reads_weights(inner, group):
            rules.warn(
                f"{name} is {p.dtype}, and the update of {inner.__name__} is read off it as a difference, after "
                "rounding: small updates lose their direction. Keep the weights in float32 under torch.autocast"
            )


def take_initial(constraint: Constraint | None, named: Mapping[str, Tensor]) -> dict[Tensor, Tensor]:
    """Return what a set takes from the initial weights.

    Args:
        constraint: the set; None takes nothing.
        named: the parameters by name.

    Returns:
        One tensor for each parameter with vectors.

    Raises:
        ValueError: weights that the set can take nothing from, such as a vector whose norm is zero.
    """
    found: dict[Tensor, Tensor] = {}
    if constraint is None or not constraint.takes_initial:
        return found
    for name, p in named.items():
        vectors = constraint.resolve(tuple(p.shape), "out_first", name)
        if vectors is not None and has_numbers(p):
            if ranks.is_dtensor(p) and not isinstance(constraint, NormSet):
                taken = ranks.take_initial(p, constraint, vectors, name)
            else:
                taken = constraint.initial(*_measurable(p, vectors, constraint.axis), name, xp)
            if taken is not None:
                found[p] = taken
    return found


def step(
    inner: type[Optimizer],
    groups: Sequence[Mapping[str, Any]],
    spare: dict[Tensor, Tensor],
    call: Callable[[Callable[[], Any] | None], Any],
    closure: Callable[[], Any] | None,
) -> Any:
    """Run the inner step, and leave w + shape(u) in the parameters of the groups that shape their update.

    If an error or an interrupt occurs here, those parameters get their old values back.

    Args:
        inner: the class of the optimizer that steps.
        groups: its param groups.
        spare: memory for the copies of the weights, which is kept from step to step on a CPU.
        call: runs the inner step with a closure or None.
        closure: re-evaluates the model and returns the loss; None if the gradients are there already.

    Returns:
        What the inner step returned.
    """
    groups = [g for g in groups if is_shaped(g)]
    if closure is None:
        _make_gradients_tangent(groups)
    else:
        closure = _then_tangent(closure, groups)
    loss = None
    if closure is not None and inner in BLIND:  # it must see the weights, not zeros
        with torch.enable_grad():
            loss, closure = closure(), None
    kept = [(group, p, _copy(p, spare)) for group in groups for p in _to_shape(group, closure is not None)]
    with torch.no_grad():
        try:
            for group, p, _ in kept:
                if not reads_weights(inner, group):
                    p.zero_()
            returned = call(closure)
            _apply([_Shaping.of_step(inner, group, p, w) for group, p, w in kept if p.grad is not None])
        except BaseException:
            for _, p, w in kept:
                p.copy_(w)
            raise
    return returned if loss is None else loss


def _copy(p: Tensor, spare: dict[Tensor, Tensor]) -> Tensor:
    """Return a copy of p; on a CPU reuse its memory, because new memory costs more time than the copy."""
    if p.device.type != "cpu" or torch.compiler.is_compiling():
        return p.detach().clone()
    if p in spare and is_alike(spare[p], p):
        spare[p].copy_(p.detach())
    else:
        spare[p] = p.detach().clone()
    return spare[p]


def _to_shape(group: Mapping[str, Any], all_of_them: bool) -> list[Tensor]:
    """Return the parameters of a group that this step shapes; all of them if a closure makes the gradients."""
    if group["update"] is None:
        return []
    moving = [p for p in group["params"] if all_of_them or p.grad is not None]
    return [p for p in moving if has_numbers(p) and settings.vectors_of_update(group, p) is not None]


def _then_tangent(closure: Callable[[], Any], groups: Sequence[Mapping[str, Any]]) -> Callable[[], Any]:
    """Return a closure that also makes the gradients tangent."""

    def evaluate() -> Any:
        loss = closure()
        _make_gradients_tangent(groups)
        return loss

    return evaluate


def _make_gradients_tangent(groups: Iterable[Mapping[str, Any]]) -> None:
    """Remove from `p.grad` what would change the norm, in the groups with `gradient="tangent"`."""
    shapings = []
    for group in groups:
        constraint = settings.constraint_of(group)
        if group["gradient"] is not None and constraint is not None:
            for p in group["params"]:
                if p.grad is not None and has_numbers(p) and constraint.resolve(tuple(p.shape), "out_first"):
                    shaping = _Shaping(p.grad, p.detach(), TangentUpdate(), constraint.axis, moves=False)
                    shapings.append(shaping)
    _apply(shapings)


@dataclass(frozen=True)
class _Shaping:
    """Describe how to shape what `p` holds: an update u of the weights `w` or, if `is_sum`, w + u.

    Attributes:
        p: the tensor that is written.
        w: the weights.
        update: how u is shaped.
        axis: the axes that make one vector.
        lr: the learning rate.
        is_sum: whether p holds w + u.
        moves: whether p shall hold w + shape(u), or shape(u) alone.
    """

    p: Tensor
    w: Tensor
    update: Update
    axis: Axis
    lr: Any = 1.0
    is_sum: bool = False
    moves: bool = True

    @classmethod
    def of_step(cls, inner: type[Optimizer], group: Mapping[str, Any], p: Tensor, w: Tensor) -> _Shaping:
        update: Update = group["update"]
        axis = update.axis_beside(settings.constraint_of(group))
        return cls(p, w, update, axis, group.get("lr", 1.0), reads_weights(inner, group))


@torch.no_grad()
def _apply(shapings: Sequence[_Shaping]) -> None:
    """Write the result of every shaping into its p; sums of 16-bit types are taken in float32 or more."""
    by_mesh: dict[object, list[tuple[_Shaping, ranks.Part]]] = {}
    alike: dict[object, list[_Shaping]] = {}
    for shaping in shapings:
        p = shaping.p
        if ranks.is_dtensor(p):
            part = ranks.part_of(p, shaping.axis, over_all=True)
            by_mesh.setdefault((p.device_mesh, part.over), []).append((shaping, part))
        elif _can_look(p) and p.numel() <= eager.SMALL:
            how = shaping.update, shaping.axis, id(shaping.lr), shaping.is_sum, shaping.moves
            alike.setdefault((p.shape, p.dtype, *how), []).append(shaping)
        else:
            _apply_here([shaping])
    for some in alike.values():
        _apply_here(some)
    for spread in by_mesh.values():
        _apply_over_ranks(spread)


def _apply_here(shapings: list[_Shaping]) -> None:
    """Apply shapings of one kind to parameters of one shape, several in a stack, so that they share calls."""
    shaping, p = shapings[0], shapings[0].p
    vectors = axes.resolve(shaping.axis, tuple(p.shape), "out_first")
    assert vectors is not None
    compute, over = getattr(torch, float_type(p).compute), vectors.axes
    if len(shapings) == 1:  # u is a view of p if p has this dtype
        u, w = (x.to(compute).view(vectors.shape) for x in (p, shaping.w))
    else:
        stacks = torch.stack([s.p for s in shapings]), torch.stack([s.w for s in shapings])
        u, w = (x.to(compute).view(-1, *vectors.shape) for x in stacks)
        over = tuple(a + 1 for a in over)
    if shaping.is_sum:
        u.sub_(w)
    size = Measures(_norms(w, over), _norms(u, over), torch.zeros((), device=u.device))
    if not shaping.update.keeps_direction:
        size = size._replace(cosine=_cosine(u, w, size, over))
    weight, factor = shaping.update.numbers(size, shaping.lr, xp)
    factor = factor.clamp(max=torch.finfo(u.dtype).max).to(u.dtype)
    if shaping.update.keeps_direction and shaping.moves:
        torch.addcmul(w, u, factor, out=u)  # this is one pass over memory
    else:
        for u_, w_, weight_, factor_ in _in_cache(u, w, weight.to(u.dtype), factor):
            u_.mul_(factor_).addcmul_(w_, weight_)
            if shaping.moves:
                u_.add_(w_)
    if len(shapings) > 1:
        torch._foreach_copy_([s.p for s in shapings], u.view(-1, *p.shape).unbind())
    elif p.dtype != compute:
        p.copy_(u.view(p.shape))


def _apply_over_ranks(spread: list[tuple[_Shaping, ranks.Part]]) -> None:
    found = []
    for shaping, part in spread:
        u, w = _parts(shaping)
        found += [part.collect(x) for x in (w * w, u * u, u * w)]
    sums = iter(ranks.all_reduce(found, spread[0][1]))
    for shaping, part in spread:
        ww, uu, uw = next(sums), next(sums), next(sums)
        weight, factor = shaping.update.numbers(measures_of(ww, uu, uw, xp), shaping.lr, xp)
        u, w = _parts(shaping)
        shaped = u * factor[part.row] + w * weight[part.row]
        part.local.copy_(w + shaped if shaping.moves else shaped)


def _parts(shaping: _Shaping) -> tuple[Tensor, Tensor]:
    """Return this rank's part of u and w in float64, whose squares neither over- nor underflow."""
    u, w = (cast("Any", x).to_local().double() for x in (shaping.p, shaping.w))
    return (u - w if shaping.is_sum else u), w


def _norms(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return norms with the reduced axes kept, in float64 if the device has it."""
    if x.dtype == torch.float64 or x.device.type not in ("cpu", "cuda"):
        return cast("Tensor", norm(x, axes, xp))
    if _can_look(x):
        return eager.norms(x, axes)
    return cast("Tensor", torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=torch.float64))


def _cosine(u: Tensor, w: Tensor, size: Measures, axes: tuple[int, ...]) -> Tensor:
    """Return the cosine between u and w for every vector."""
    if _can_look(u) and bool(((_squares_fit(size.u) | (size.u == 0)) & (_squares_fit(size.w) | (size.w == 0))).all()):
        parts = [torch.sum(u_ * w_, dim=axes, keepdim=True) for u_, w_ in _in_cache(u, w)]
        both = size.u * size.w
        dot = torch.stack(parts).double().sum(0) if 0 in axes else torch.cat(parts)
        return dot.to(both.dtype) / torch.where(both > 0, both, 1.0)
    u, w = (x / torch.where(n > 0, n, 1.0).to(x.dtype) for x, n in ((u, size.u), (w, size.w)))
    return torch.sum(u * w, dim=axes, keepdim=True).to(size.u.dtype)


def _squares_fit(norms: Tensor) -> Tensor:
    """Return whether no relevant square over- or underflows in float32."""
    return (norms > 1e-12) & (norms < 1e18)


def _can_look(x: Tensor) -> bool:
    """Return whether reading a number back is free: a graph cannot read it, and an accelerator would wait."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _in_cache(x: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Yield pieces along the first axis; on a CPU they are so small that they stay in the cache."""
    if not (_can_look(x) and x.numel() > PIECE):
        return [(x, *others)]
    rows = max(1, PIECE * len(x) // x.numel())
    pieces = (torch.split(t, rows) if len(t) == len(x) else itertools.repeat(t) for t in (x, *others))
    return zip(*pieces, strict=False)


def _measurable(p: Tensor, vectors: Vectors, axis: Axis) -> tuple[Tensor, tuple[int, ...]]:
    """Return a tensor with the norms of the vectors of `p`, and the axes to take them over.

    For a sharded parameter this tensor has the norms themselves as its entries.
    """
    if ranks.is_dtensor(p):
        return ranks.norms_over_ranks(p.detach(), axis).unsqueeze(1), (1,)  # type: ignore[arg-type]
    return p.detach().reshape(vectors.shape), vectors.axes


# -------------------------------------------------------------------------------------------------- the initial norms


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


def check_saved(constraint: Constraint | None, p: Tensor, saved: Tensor, name: str) -> Tensor:
    """Return the radii that a checkpoint has for a parameter, in the shape that its set takes.

    Args:
        constraint: the set of the parameter.
        p: the parameter.
        saved: its radii in the checkpoint; those of a sharded parameter are in another shape.
        name: its name, for errors.

    Returns:
        The radii, unchanged if the set takes none.

    Raises:
        ValueError: radii of another number than the parameter's vectors, or not all positive and finite.
    """
    vectors = None if constraint is None else constraint.resolve(tuple(p.shape), "out_first", name)
    if constraint is None or vectors is None or not constraint.takes_initial:
        return saved
    per_entry = constraint.keeps_entries
    kept = [1 if a in vectors.axes and not per_entry else n for a, n in enumerate(vectors.shape)]
    if saved.numel() != math.prod(kept):
        what, counted = ("initial numbers", "entries") if per_entry else ("radii", "vectors")
        raise ValueError(f"{name}: the state has {saved.numel()} {what} for its {math.prod(kept)} {counted}")
    if not (per_entry or saved.is_meta or bool((saved.isfinite() & (saved > 0)).all())):
        raise ValueError(f"{name}: the state has radii that are not positive and finite")
    return saved if ranks.is_dtensor(p) or ranks.is_dtensor(saved) else saved.reshape(kept)
