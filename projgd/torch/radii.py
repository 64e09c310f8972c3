"""Keep what sets have taken from the initial weights, such as the radii of `Sphere("initial")`.

The radii belong into the optimizer's state, where checkpoints keep them. But an optimizer makes its own state only for
a parameter whose state is empty. So the radii wait here until the optimizer has made it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from projgd.constraints import Constraint
from projgd.torch.engines.ranks import is_dtensor
from projgd.torch.shaping import take_initial

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
    kept = [1 if a in vectors.axes else n for a, n in enumerate(vectors.shape)]
    if saved.numel() != math.prod(kept):
        raise ValueError(f"{name}: the state has {saved.numel()} radii for its {math.prod(kept)} vectors")
    if not (saved.is_meta or bool((saved.isfinite() & (saved > 0)).all())):
        raise ValueError(f"{name}: the state has radii that are not positive and finite")
    return saved if is_dtensor(p) or is_dtensor(saved) else saved.reshape(kept)
