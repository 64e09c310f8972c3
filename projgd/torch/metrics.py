"""Read from an optimizer's state the diagonal D that it divides its step by: the metric of `metric="adaptive"`.

An entry of `DIAGONALS` returns the D of the step that the optimizer has just taken, up to one positive factor for a
whole tensor. Momentum and decoupled weight decay move the point that is projected, not D.
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
"""A function that returns some of the rows of a tensor of the parameter's shape."""


class Metric(Protocol):
    """Return the diagonal D that a parameter's step was divided by, or some of its rows; None for the identity."""

    def __call__(self, p: Tensor, /, pick: Pick | None = None) -> Tensor | None: ...


@dataclass(frozen=True)
class Diagonal:
    """Describe how to compute D of one parameter from its state after the step and its param group.

    Attributes:
        of: `(state, group) -> D`, a non-negative tensor of the parameter's shape.
        needs: the entries of the state that `of` reads.
        before: the entries that `of` needs as they were before the step, because the step overwrites them.
        entrywise: whether an entry of D depends only on the same entry of the state's tensors.
    """

    of: Callable[[State, Group], Tensor]
    needs: tuple[str, ...]
    before: tuple[str, ...] = ()
    entrywise: bool = True


@dataclass(frozen=True)
class OfStep:
    """Compute the `Metric` of the step that a group has just taken.

    Attributes:
        diagonal: how to compute D.
        state: the optimizer's state.
        group: the param group.
        kept: copies of entries of the state from before the step.
    """

    diagonal: Diagonal
    state: Mapping[Tensor, State]
    group: Group
    kept: Mapping[Tensor, State]

    def __call__(self, p: Tensor, /, pick: Pick | None = None) -> Tensor | None:
        """Return D of a parameter, or some of its rows; None for a parameter that was never stepped."""
        if not self.state.get(p):  # a parameter that was never stepped has no metric
            return None
        state = {**self.state[p], **self.kept.get(p, {})}
        if pick is not None and self.diagonal.entrywise:
            state = {k: pick(v) if isinstance(v, Tensor) and v.shape == p.shape else v for k, v in state.items()}
        d = self.diagonal.of(state, self.group)
        return d if pick is None or self.diagonal.entrywise else pick(d)


def register_metric(
    cls: type[Optimizer], of: Callable[[State, Group], Tensor], needs: Iterable[str] = (), before: Iterable[str] = ()
) -> None:
    """Register the diagonal D that an optimizer class divides its step by, so that it can have `metric="adaptive"`.

    Args:
        cls: the class. Its subclasses that do not define `step` themselves have the same diagonal.
        of: `(state, group) -> D`, for a step x - α D⁻¹ m: `state` is `optimizer.state[p]` after the step, D a
            non-negative tensor of the shape of `p`. One positive factor for the whole of D does not matter; the
            position of an epsilon in it does.
        needs: the names of the entries that `of` reads, for a clear error if a checkpoint lacks them; default none.
        before: the entries that `of` needs as they were before the step (copied; zeros in the first one); default none.

    Raises:
        TypeError: an object that is not an optimizer class.

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
    """Return the `Diagonal` of an optimizer class; None where D is the identity.

    Args:
        cls: an optimizer class, without the projection.

    Returns:
        The entry of `DIAGONALS` for the class that defines its `step`.

    Raises:
        ValueError: an optimizer whose step is not a diagonal times a momentum, or is not known.
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
    """Raise an error for a metric that is not known, or that the constraint or the optimizer does not have.

    Args:
        constraint: the constraint of the group; None for a free group.
        metric: what the user passed as `metric=`.
        cls: the optimizer class, without the projection.

    Raises:
        ValueError: such a metric.
    """
    if constraint is not None:
        constraint.check_metric(metric)
    if metric == "adaptive":
        diagonal_of(cls)


def check_state(state: State, group: Group, cls: type[Optimizer]) -> None:
    """Raise an error for the state of another optimizer, from which D cannot be read.

    Args:
        state: the state of one parameter; an empty one passes.
        group: its param group.
        cls: the optimizer class, without the projection.

    Raises:
        ValueError: an entry that D needs is missing.
    """
    diagonal = diagonal_of(cls) if group.get("metric") == "adaptive" else None
    if diagonal and state and (missing := [k for k in diagonal.needs if k not in state]):
        raise ValueError(
            f'metric="adaptive" with {cls.__name__} reads {", ".join(map(repr, missing))} from the state, which '
            f"has only {', '.join(map(repr, state))}: load a checkpoint of {cls.__name__}"
        )


def before_step(optimizer: Optimizer, cls: type[Optimizer]) -> dict[Tensor, dict[str, Any]]:
    """Return copies of the state that the next step will overwrite although D needs it.

    Args:
        optimizer: the optimizer.
        cls: its class, without the projection.

    Returns:
        Entries of the state by name, for each parameter; zeros for a parameter without a state.
    """
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
    """Return the metric of the step that a group has just taken; None where it is the identity.

    Args:
        optimizer: the optimizer.
        cls: its class, without the projection.
        group: the param group.
        kept: what `before_step` returned.

    Returns:
        The metric, or None.
    """
    diagonal = diagonal_of(cls) if group["metric"] == "adaptive" else None
    if diagonal is None:
        return None
    return OfStep(diagonal, optimizer.state, group, kept)


def _wide(t: Any) -> Tensor:
    """Return a tensor in float32 if it is of a 16-bit type."""
    wide: Tensor = t.float() if t.dtype in (torch.float16, torch.bfloat16) else t
    return wide


def _correction(state: State, beta: Any) -> Any:
    """Return 1 - βᵗ, without waiting for a step count that is on an accelerator."""
    step = state["step"]
    if isinstance(step, Tensor) and step.device.type == "cpu" and not torch.compiler.is_compiling():
        step = step.item()
    return 1 - beta**step


def _root(name: str) -> Callable[[State, Group], Tensor]:
    """Return the diagonal √v + ε of optimizers that keep v under this name."""
    return lambda state, group: _wide(state[name]).sqrt() + group["eps"]


def _adam(state: State, group: Group) -> Tensor:
    """Return √(v̂) + ε, with the largest v so far under `amsgrad`."""
    v = state["max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"]
    return _wide(v).sqrt() / _correction(state, group["betas"][1]) ** 0.5 + group["eps"]  # type: ignore[no-any-return]


def _radam(state: State, group: Group) -> Tensor:
    """Return D of RAdam: √v + ε once ρ_t > 5, and 1 before.

    The variance rectification (Liu et al. 2020) divides by the root only then.
    """
    beta = group["betas"][1]
    correction = _correction(state, beta)
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * (1 - correction) / correction * state["step"]
    adaptive: Tensor = _wide(state["exp_avg_sq"]).sqrt() + group["eps"]
    return torch.where(torch.as_tensor(length, device=adaptive.device) > 5, adaptive, 1.0)


def _rmsprop(state: State, group: Group) -> Tensor:
    """Return √v + ε, where a centered v is the variance."""
    v = _wide(state["square_avg"]) - (_wide(state["grad_avg"]) ** 2 if group["centered"] else 0)
    return v.sqrt() + group["eps"]  # type: ignore[no-any-return]


def _adadelta(state: State, group: Group) -> Tensor:
    """Return √(v + ε) / √(Δ + ε), with Δ from before the step."""
    ratio: Tensor = (_wide(state["square_avg"]) + group["eps"]) / (_wide(state["acc_delta"]) + group["eps"])
    return ratio.sqrt()


def _adafactor(state: State, group: Group) -> Tensor:
    """Return the root of Adafactor's rank-one estimate, which the step divides by."""
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
