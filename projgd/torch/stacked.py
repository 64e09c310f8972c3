"""The projection onto the ball of many small parameters at once, where calls are what a projection costs."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from projgd.axes import Vectors
from projgd.constraints import MaxNorm
from projgd.torch import ball

SMALL = 2**16  # entries; beyond, copying costs more than it saves
STACK = 2**22  # entries: what is copied stays in a cache


@dataclass(frozen=True)
class Stack:
    """Which of some parameters may be stacked along the first axis, in which shapes, and the axes of their vectors."""

    places: list[int]
    shapes: list[tuple[int, ...]] | None  # None where that is what they have
    heights: list[int]
    axes: tuple[int, ...]
    room: torch.Tensor | None = None  # to stack them in, and what belongs to each
    parts: tuple[torch.Tensor, ...] = ()

    def with_room(self, params: Sequence[torch.Tensor]) -> Stack:
        """The same with memory that is kept: to get it anew at every step can cost more than the rest."""
        if len(self.places) == 1:
            return self
        room = torch.cat(self._views(params))
        return dataclasses.replace(self, room=room, parts=tuple(room.split_with_sizes(self.heights)))

    def _views(self, params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        views = [params[j] for j in self.places]
        return views if self.shapes is None else [p.reshape(s) for p, s in zip(views, self.shapes, strict=True)]

    def project_(self, params: Sequence[torch.Tensor], c: float) -> None:
        """Project those of `params` that are in the stack."""
        views = self._views(params)
        whole = torch.cat(views, out=self.room) if len(views) > 1 else views[0]
        written = ball.project_ball_(whole, c, Vectors(tuple(whole.shape), self.axes))
        if written and len(views) > 1:
            torch._foreach_copy_(views, self.parts or torch.split_with_sizes(whole, self.heights))


def stacks(params: Sequence[torch.Tensor], constraint: MaxNorm) -> tuple[list[Stack], list[int]]:
    """The stacks of small ones on a CPU, and the places of those others that have something to be projected."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for j, p in enumerate(params):
        alike[type(p), p.device, p.dtype, p.shape].append(j)
    found: dict[Any, list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    left = []
    for (_, device, dtype, shape), places in alike.items():
        vectors = constraint.resolve(tuple(shape), "out_first")
        if vectors is None:  # nothing of them is projected
            continue
        small = device.type == "cpu" and 0 < math.prod(shape) <= SMALL and 0 not in vectors.axes
        if small and vectors.axes and ball.takes(params[places[0]]):
            same = vectors.shape == shape
            found[dtype, vectors.shape[1:], vectors.axes, same] += [(j, vectors.shape) for j in places]
        else:
            left += places
    made = []
    for (_, _, axes, same), members in found.items():
        each = STACK // max(math.prod(shape) for _, shape in members)
        for i in range(0, len(members), each):
            places, shapes = map(list, zip(*members[i : i + each], strict=True))
            made.append(Stack(places, None if same else shapes, [shape[0] for shape in shapes], axes))
    return made, left


def project_(params: Sequence[torch.Tensor], constraint: MaxNorm) -> list[torch.Tensor]:
    """Project the small ones of `params` on a CPU. Returns those that are left."""
    made, left = stacks(params, constraint)
    for stack in made:
        stack.project_(params, constraint.c)
    return [params[j] for j in left]
