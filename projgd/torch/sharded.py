"""Parameters whose weights live on several ranks.

Where every vector lies on one rank as a whole, each rank projects what it has. Otherwise the ranks share one number
per vector, its sum of squares, in one all-reduce for all parameters of a call, and each scales its part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeGuard

import array_api_compat.torch as xp
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from projgd import projections
from projgd.axes import Split, Vectors
from projgd.constraints import Constraint

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(p: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether `p` is a DTensor; the half second that importing its module takes is not spent on others."""
    if not is_traceable_wrapper_subclass(p):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


def check(p: DTensor, constraint: Constraint, metric: str, name: str) -> None:
    """Raise ValueError for a DTensor that this constraint cannot be kept on."""
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"{name} is a DTensor with the placements {p.placements}: a sum that is not taken yet")
    if crossed(p, constraint):
        check_spread(p, constraint, metric, name)


def check_spread(p: DTensor, constraint: Constraint, metric: str, name: str) -> None:
    """Raise ValueError for what is not known where vectors are spread over ranks."""
    if metric != "euclidean":
        raise ValueError(
            f"{name} is sharded with {p.placements} across its vectors, where metric={metric!r} is not known: "
            'pass metric="euclidean", or shard another dimension'
        )
    if type(constraint).rescale is Constraint.rescale:
        raise ValueError(
            f"{name} is sharded with {p.placements} across its vectors, and {constraint} needs each of them whole: "
            "shard another dimension, or leave it free"
        )


def crossed(p: DTensor, constraint: Constraint) -> tuple[int, ...]:
    """The dimensions of the mesh over which the vectors of `p` are spread."""
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    if vectors is None:
        return ()
    views = _views(p, constraint)

    def spread(dim: int) -> bool:  # a shard of an axis that is cut into blocks may hold parts of blocks
        return len(views[dim]) > 1 or views[dim][0] in vectors.axes

    return tuple(
        i
        for i, placement in enumerate(p.placements)
        if hasattr(placement, "dim") and p.device_mesh.size(i) > 1 and spread(placement.dim)
    )


def project(params: list[DTensor], constraint: Constraint, skip: torch.Tensor | None = None) -> None:
    """Project parameters whose vectors are spread, in place; not where `skip` is positive."""
    by_mesh: dict[object, list[Part]] = {}
    for p in params:
        part = part_of(p, constraint)
        by_mesh.setdefault((p.device_mesh, part.over, p.dtype == torch.float64), []).append(part)
    for parts in by_mesh.values():
        _project(parts, constraint, skip)


@dataclass(frozen=True)
class Part:
    """What this rank holds of a parameter."""

    p: DTensor
    local: torch.Tensor
    vectors: Vectors
    over: tuple[int, ...]  # dimensions of the mesh to sum over
    dims: tuple[int, ...]  # dimensions of `local` that lie in one vector as a whole: summed first
    row: torch.Tensor  # which vector each entry belongs to, of a shape that broadcasts against `local`

    @property
    def rows(self) -> int:
        """Vectors of the whole parameter."""
        return math.prod([n for a, n in enumerate(self.vectors.shape) if a not in self.vectors.axes])


def _project(parts: list[Part], constraint: Constraint, skip: torch.Tensor | None) -> None:
    """Sums in float64: the squares of other types neither over- nor underflow there, so that one number per vector is
    enough. Those of float64 itself may, and are divided by the largest entry of their vector first, found likewise.
    """
    divided = parts[0].local.dtype == torch.float64
    if divided:
        largest = shared([collected(q, q.local.abs(), "amax") for q in parts], parts[0], "MAX")
    else:
        largest = [torch.ones(q.rows, dtype=torch.float64, device=q.local.device) for q in parts]
    scales = [torch.where(torch.isfinite(r) & (r > 0), r, 1.0)[q.row] for q, r in zip(parts, largest, strict=True)]

    def scaled(part: Part, scale: torch.Tensor) -> torch.Tensor:  # twice, rather than keep that of all parameters
        return part.local / scale if divided else part.local.double()

    squares = [collected(q, scaled(q, s).square_(), "sum") for q, s in zip(parts, scales, strict=True)]
    sums = shared(squares, parts[0], "SUM")
    ranks = math.prod(parts[0].p.device_mesh.size(i) for i in parts[0].over)
    for part, scale, r, total in zip(parts, scales, largest, sums, strict=True):
        z_norm = total.sqrt() * (1 + ranks * 2.0**-54)  # what adding up over the ranks may have lost
        kind = projections.float_type(part.local)
        # An entry that is not finite shows in the sum where it has not in the largest entry.
        rescaled = constraint.rescale(z_norm, torch.where(torch.isfinite(total), r, total), kind, part.vectors, xp)
        assert rescaled is not None  # `check_spread` has seen to it
        moved, factor = rescaled
        if skip is not None:
            moved = moved & ~(skip.to(moved.device) > 0)
        y = scaled(part, scale).mul_(factor[part.row]).to(part.local.dtype)
        part.local.copy_(torch.where(moved[part.row], y, part.local))


def collected(part: Part, x: torch.Tensor, how: Literal["sum", "amax"]) -> torch.Tensor:
    """`x` summed, or its maximum, over the entries of each vector that this rank holds."""
    found = torch.zeros(part.rows, dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return found
    if part.dims:
        x = projections.tree_sum(x, part.dims, xp) if how == "sum" else x.amax(part.dims, keepdim=True)
    return found.scatter_reduce_(0, part.row.expand(x.shape).reshape(-1), x.reshape(-1).double(), how)


def shared(found: list[torch.Tensor], part: Part, how: str) -> list[torch.Tensor]:
    """The same over all ranks: one all-reduce, of one number per vector."""
    from torch import distributed

    joined = torch.cat(found)
    for i in part.over:
        op = getattr(distributed.ReduceOp, how)
        distributed.all_reduce(joined, op, group=part.p.device_mesh.get_group(i))
    return list(torch.split(joined, [len(f) for f in found]))


def part_of(p: DTensor, constraint: Constraint) -> Part:
    """What this rank holds of `p`, and of which vectors."""
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    assert vectors is not None  # a parameter without vectors is not crossed
    local = p.to_local()
    shape, axes = vectors.shape, vectors.axes
    stride = {a: math.prod([n for b, n in enumerate(shape) if b > a and b not in axes]) for a in range(len(shape))}
    row = torch.zeros((1,) * p.ndim, dtype=torch.int64, device=local.device)
    whole = []
    for dim, views in enumerate(_views(p, constraint)):
        if all(a in axes for a in views):
            whole.append(dim)
            continue
        index = _held(p, dim).to(local.device)
        for a in reversed(views):  # of an axis in blocks, the last one counts fastest
            if a not in axes:
                row = row + index % shape[a] * stride[a]
            index = index // shape[a]
    return Part(p, local, vectors, crossed(p, constraint), tuple(whole), row)


def _views(p: torch.Tensor, constraint: Constraint) -> list[tuple[int, ...]]:
    """For each dimension of `p` its axes in the view that `constraint` takes: two where it is cut into blocks."""
    axis = getattr(constraint, "axis", None)
    if not isinstance(axis, Split):
        return [(d,) for d in range(p.ndim)]
    cut = axis.dim % p.ndim
    return [(d, d + 1) if d == cut else (d + (d > cut),) for d in range(p.ndim)]


def _held(p: DTensor, dim: int) -> torch.Tensor:
    """The places along `dim` of the whole tensor that this rank holds, along `dim` of a tensor of the same rank."""
    shape = [1] * p.ndim
    shape[dim] = p.shape[dim]
    index = torch.arange(p.shape[dim], device="cpu").reshape(shape)
    coordinate = p.device_mesh.get_coordinate()
    assert coordinate is not None  # a rank outside the mesh holds none of its parameters
    for i, placement in enumerate(p.placements):
        if getattr(placement, "dim", None) == dim:
            shards, _ = placement._split_tensor(index, p.device_mesh.size(i), with_padding=False, contiguous=False)  # type: ignore[attr-defined]
            index = shards[coordinate[i]]
    return index
