"""The diagonal D that each optimizer divides its step by, read from its state: the metric of `metric="adaptive"`.

An entry of `DIAGONALS` says what D was in the step that has just been taken, up to one positive factor for a whole
tensor. Momentum and decoupled weight decay move the point that is projected, not D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from projgd.constraints import Constraint

State = Mapping[str, Any]
Group = Mapping[str, Any]
Pick = Callable[[Tensor], Tensor]
"""Some of the rows of a tensor that has the parameter's shape."""


class Metric(Protocol):
    """From a parameter to the diagonal D that its step was divided by, or some rows of it; None for the identity."""

    def __call__(self, p: Tensor, /, pick: Pick | None = None) -> Tensor | None: ...


@dataclass(frozen=True)
class Diagonal:
    """D of one parameter, from its state after the step and its param group.

    Args:
        of: `(state, group) -> D`, a non-negative tensor of the parameter's shape.
        needs: the entries of the state that `of` reads.
        before: those of them that are handed over as they were before the step, because the step overwrites them.
        entrywise: whether an entry of D depends only on the same entry of the state's tensors.
    """

    of: Callable[[State, Group], Tensor]
    needs: tuple[str, ...]
    before: tuple[str, ...] = ()
    entrywise: bool = True


@dataclass(frozen=True)
class OfStep:
    """The `Metric` of the step that a group has just taken."""

    diagonal: Diagonal
    state: Mapping[Tensor, State]
    group: Group
    kept: Mapping[Tensor, State]

    def __call__(self, p: Tensor, /, pick: Pick | None = None) -> Tensor | None:
        if not self.state.get(p):  # never stepped: no metric yet
            return None
        state = {**self.state[p], **self.kept.get(p, {})}
        if pick is not None and self.diagonal.entrywise:
            state = {k: pick(v) if isinstance(v, Tensor) and v.shape == p.shape else v for k, v in state.items()}
        d = self.diagonal.of(state, self.group)
        return d if pick is None or self.diagonal.entrywise else pick(d)


def register_metric(
    cls: type[Optimizer], of: Callable[[State, Group], Tensor], needs: Iterable[str] = (), before: Iterable[str] = ()
) -> None:
    """Tell what diagonal D an optimizer class steps by, so that it can have `metric="adaptive"`.

    Args:
        cls: the class; its subclasses that do not define `step` themselves have the same diagonal.
        of: `(state, group) -> D`, for a step x - α D⁻¹ m: `state` is `optimizer.state[p]` after the step, D a
            non-negative tensor of the shape of `p`. One positive factor for the whole of it does not matter; where an
            epsilon is added does.
        needs: names of the entries that `of` reads, for a clear error where a checkpoint lacks them.
        before: those that `of` wants as they were before the step (copied; zeros in the first one).

    >>> class Scaled(torch.optim.Adam):
    ...     def step(self, closure=None):
    ...         return super().step(closure)
    >>> register_metric(Scaled, lambda state, group: state["exp_avg_sq"].sqrt() + group["eps"], ["exp_avg_sq"])
    """
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise TypeError(f"register_metric() takes a torch.optim.Optimizer class, not {cls!r}")
    before = tuple(before)
    DIAGONALS[cls] = Diagonal(of, tuple(dict.fromkeys((*needs, *before))), before, entrywise=False)


def diagonal_of(cls: type[Optimizer]) -> Diagonal | None:
    """The `Diagonal` of an optimizer class; None where D is the identity.

    Raises:
        ValueError: an optimizer whose step is no diagonal times a momentum, or is not known.
    """
    for base in cls.__mro__:
        if base in DIAGONALS:
            return DIAGONALS[base]
        if "step" in vars(base):
            break
    known = ", ".join(sorted(c.__name__ for c in DIAGONALS))
    raise ValueError(
        f'metric="adaptive" needs the diagonal that {cls.__name__} divides its step by, and none is known: pass '
        f'metric="euclidean", one of {known}, or say what D is with projgd.torch.register_metric'
    )


def check(constraint: Constraint | None, metric: Any, cls: type[Optimizer]) -> None:
    """Raise ValueError for a metric that is not known, or that the set or the optimizer does not have."""
    if constraint is not None:
        constraint.check_metric(metric)
    if metric == "adaptive":
        diagonal_of(cls)


def check_state(state: State, group: Group, cls: type[Optimizer]) -> None:
    """Raise ValueError for the state of another optimizer, from which D cannot be read."""
    diagonal = diagonal_of(cls) if group.get("metric") == "adaptive" else None
    if diagonal and state and (missing := [k for k in diagonal.needs if k not in state]):
        raise ValueError(
            f'metric="adaptive" with {cls.__name__} reads {", ".join(map(repr, missing))} from the state, which '
            f"has only {', '.join(map(repr, state))}: load a checkpoint of {cls.__name__}"
        )


def before_step(optimizer: Optimizer, cls: type[Optimizer]) -> dict[Tensor, dict[str, Any]]:
    """Copies of the state that the coming step will overwrite though D needs it."""
    kept: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        diagonal = diagonal_of(cls) if group["metric"] == "adaptive" else None
        if diagonal and diagonal.before:
            for p in group["params"]:
                state = optimizer.state.get(p, {})
                kept[p] = {k: state[k].clone() if k in state else torch.zeros_like(p) for k in diagonal.before}
    return kept


def after_step(
    optimizer: Optimizer, cls: type[Optimizer], group: Group, kept: Mapping[Tensor, dict[str, Any]]
) -> OfStep | None:
    """The metric of the step that the group has just taken; None where that is the identity."""
    diagonal = diagonal_of(cls) if group["metric"] == "adaptive" else None
    if diagonal is None:
        return None
    return OfStep(diagonal, optimizer.state, group, kept)


def _wide(t: Any) -> Tensor:
    wide: Tensor = t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
    return wide


def _correction(state: State, beta: Any) -> Any:
    """1 - βᵗ, without waiting for a step count that lives on an accelerator."""
    step = state["step"]
    if isinstance(step, Tensor) and step.device.type == "cpu" and not torch.compiler.is_compiling():
        step = step.item()
    return 1 - beta**step


def _root(name: str) -> Callable[[State, Group], Tensor]:
    """Return the diagonal √v + ε of optimizers that keep v under this name."""
    return lambda state, group: _wide(state[name]).sqrt() + group["eps"]


def _adam(state: State, group: Group) -> Tensor:
    v = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    return _wide(v).sqrt() / _correction(state, group["betas"][1]) ** 0.5 + group["eps"]  # type: ignore[no-any-return]


def _radam(state: State, group: Group) -> Tensor:
    """The variance rectification (Liu et al. 2020) switches the denominator on once ρ_t > 5; before, D is 1."""
    beta = group["betas"][1]
    correction = _correction(state, beta)
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * (1 - correction) / correction * state["step"]
    adaptive: Tensor = _wide(state["exp_avg_sq"]).sqrt() + group["eps"]
    return torch.where(torch.as_tensor(length, device=adaptive.device) > 5, adaptive, 1.0)


def _rmsprop(state: State, group: Group) -> Tensor:
    v = _wide(state["square_avg"]) - (_wide(state["grad_avg"]) ** 2 if group["centered"] else 0)
    return v.sqrt() + group["eps"]  # type: ignore[no-any-return]


def _adadelta(state: State, group: Group) -> Tensor:
    """The step is √(Δ + ε) / √(v + ε) times the gradient, with Δ from before the step."""
    ratio: Tensor = (_wide(state["square_avg"]) + group["eps"]) / (_wide(state["acc_delta"]) + group["eps"])
    return ratio.sqrt()


def _adafactor(state: State, group: Group) -> Tensor:
    """The rank-one estimate that the step divides by is a diagonal like any other."""
    small = group["eps"][0]
    row, col = state.get("row_var"), state.get("col_var")
    if small is None:
        small = torch.finfo((state["variance"] if row is None else row).dtype).eps
    if row is None:
        estimate = _wide(state["variance"])
    else:
        estimate = _wide(row) @ _wide(col) / _wide(row).mean(dim=-2, keepdim=True).clamp(min=small)
    return estimate.clamp(min=small**2).sqrt()


DIAGONALS: dict[type[Optimizer], Diagonal | None] = {
    torch.optim.SGD: None,
    torch.optim.ASGD: None,
    torch.optim.Adam: Diagonal(_adam, ("exp_avg_sq",)),
    torch.optim.AdamW: Diagonal(_adam, ("exp_avg_sq",)),
    torch.optim.NAdam: Diagonal(_adam, ("exp_avg_sq",)),
    torch.optim.RAdam: Diagonal(_radam, ("exp_avg_sq",)),
    torch.optim.SparseAdam: Diagonal(_root("exp_avg_sq"), ("exp_avg_sq",)),
    torch.optim.Adamax: Diagonal(lambda state, group: state["exp_inf"], ("exp_inf",)),
    torch.optim.Adagrad: Diagonal(_root("sum"), ("sum",)),
    torch.optim.RMSprop: Diagonal(_rmsprop, ("square_avg",)),
    torch.optim.Adadelta: Diagonal(_adadelta, ("square_avg", "acc_delta"), ("acc_delta",)),
    torch.optim.Adafactor: Diagonal(_adafactor, (), entrywise=False),
}
