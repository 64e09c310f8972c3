"""The projection onto the ball of many small parameters at once, where calls are what a projection costs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from projgd.axes import Vectors
from projgd.constraints import MaxNorm
from projgd.torch import ball

SMALL = 2**16  # entries; beyond, copying costs more than it saves
STACK = 2**22  # entries: what is copied stays in a cache


def project_(params: Sequence[torch.Tensor], constraint: MaxNorm) -> list[torch.Tensor]:
    """Project the small ones of `params` on a CPU, stacked along the first axis. Returns those that are left."""
    alike: dict[Any, list[torch.Tensor]] = defaultdict(list)
    for p in params:
        alike[type(p), p.device, p.dtype, p.shape].append(p)
    stacks: dict[Any, list[torch.Tensor]] = defaultdict(list)
    left = []
    for (_, device, dtype, shape), some in alike.items():
        vectors = constraint.resolve(tuple(shape), "out_first")
        if vectors is None:  # nothing of them is projected
            continue
        small = device.type == "cpu" and 0 < math.prod(shape) <= SMALL and 0 not in vectors.axes
        if small and vectors.axes and ball.takes(some[0]):
            views = some if vectors.shape == shape else [p.reshape(vectors.shape) for p in some]
            stacks[dtype, vectors.shape[1:], vectors.axes] += views
        else:
            left += some
    for (_, _, axes), stack in stacks.items():
        each = STACK // max(map(torch.numel, stack))
        for i in range(0, len(stack), each):
            _project_stack(stack[i : i + each], constraint.c, axes)
    return left


def _project_stack(stack: list[torch.Tensor], c: float, axes: tuple[int, ...]) -> None:
    whole = torch.cat(stack) if len(stack) > 1 else stack[0]
    written = ball.project_ball_(whole, c, Vectors(tuple(whole.shape), axes))
    if written and len(stack) > 1:
        torch._foreach_copy_(stack, torch.split_with_sizes(whole, [x.shape[0] for x in stack]))
