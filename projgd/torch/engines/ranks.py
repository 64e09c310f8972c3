"""Project parameters whose weights are on several ranks (DTensor).

If every vector is on one rank as a whole, each rank projects its own. Otherwise the ranks exchange one number per
vector, its sum of squares, in one all-reduce for all parameters of a job, and each scales its part.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeGuard

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from projgd.axes import Axis, Split, Vectors, resolve
from projgd.bands import Band
from projgd.combined import Around, Intersection
from projgd.constraints import Constraint, NormSet
from projgd.sums import tree_sum
from projgd.torch.engines.base import Engine, Job, float_kind, project_with
from projgd.torch.metrics import Pick
from projgd.values import Values

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(p: Tensor) -> TypeGuard[DTensor]:
    """Return whether `p` is a DTensor, without importing its module, which takes half a second."""
    if not is_traceable_wrapper_subclass(p):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(p, DTensor)


class Ranks(Engine):
    """Project sharded parameters.

    Args:
        within: the engines that may project whole vectors on one rank, best first.
    """

    name = "ranks"

    def __init__(self, within: Sequence[Engine]) -> None:
        self._within = within

    def refuses(self, job: Job, p: Tensor) -> str | None:
        return None if is_dtensor(p) else ""

    def run(self, prepared: None, job: Job, params: Sequence[Tensor]) -> None:
        assert job.constraint is not None
        spread: dict[object, list[Part]] = {}
        whole: list[Tensor] = []
        for p in params:
            assert is_dtensor(p)
            if (p in job.radii and isinstance(job.constraint, NormSet)) or spread_over(p, job.constraint.axis):
                # The parameter may have been sharded after the constructor's check.
                refuse_spread(p, job.constraint, job.metric is not None, "a parameter")
                part = part_of(p, job.constraint.axis)
                spread.setdefault((p.device_mesh, part.over, p.dtype == torch.float64), []).append(part)
            elif (local := p.to_local()).numel() == 0:
                continue
            elif (
                job.metric is None and p not in job.radii and _constraint_of_shard(job.constraint, p) is job.constraint
            ):
                whole.append(local)
            else:
                project_with(self._within, _for_shard(job, p, local), [local])
        project_with(self._within, job, whole)
        for parts in spread.values():
            _project(parts, job)


def check_sharding(p: DTensor, constraint: Constraint, metric: str, name: str) -> None:
    """Raise ValueError for a DTensor to which this constraint cannot be applied."""
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"{name} is a DTensor with the placements {p.placements}: a sum that is not taken yet")
    if constraint.joins_vectors and any(hasattr(placement, "dim") for placement in p.placements):
        raise ValueError(f"{name} is sharded, and {constraint} has one bound for all of its vectors: leave it free")
    if spread_over(p, constraint.axis):
        refuse_spread(p, constraint, metric != "euclidean", name)


def refuse_spread(p: DTensor, constraint: Constraint, in_metric: bool, name: str) -> None:
    """Raise ValueError for a constraint or a metric that needs whole vectors, if vectors are spread over ranks."""
    where = f"{name} is sharded with {p.placements} across its vectors"
    if in_metric:
        raise ValueError(
            f"{where}, where metric='adaptive' is not known: pass metric='euclidean', or shard another dimension"
        )
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    if vectors is not None and not isinstance(constraint, NormSet):
        raise ValueError(
            f"{where}, and {constraint} needs each of them whole: shard another dimension, or leave it free"
        )


def spread_over(p: DTensor, axis: Axis) -> tuple[int, ...]:
    """Return the dimensions of the mesh over which the vectors of `p` are spread."""
    vectors = resolve(axis, tuple(p.shape), "out_first")
    if vectors is None:
        return ()
    views = _views(p, axis)

    def is_spread(dim: int) -> bool:  # a shard of an axis that is cut into blocks may hold parts of blocks
        return len(views[dim]) > 1 or views[dim][0] in vectors.axes

    return tuple(
        i
        for i, placement in enumerate(p.placements)
        if hasattr(placement, "dim") and p.device_mesh.size(i) > 1 and is_spread(placement.dim)
    )


@dataclass(frozen=True)
class Part:
    """Describe the part of a parameter that this rank holds.

    Attributes:
        p: the parameter.
        local: this rank's part of it.
        vectors: the vectors of the whole parameter.
        over: the dimensions of the mesh to sum over.
        dims: the dimensions of `local` along which every entry belongs to one vector; they are summed first.
        row: which vector each entry belongs to, of a shape that broadcasts against `local`.
    """

    p: DTensor
    local: Tensor
    vectors: Vectors
    over: tuple[int, ...]
    dims: tuple[int, ...]
    row: Tensor

    @property
    def rows(self) -> int:
        """Return the number of vectors of the whole parameter."""
        return math.prod([n for a, n in enumerate(self.vectors.shape) if a not in self.vectors.axes])

    def collect(self, x: Tensor, how: Literal["sum", "amax"] = "sum") -> Tensor:
        """Return `x` summed, or its maximum, over the entries of each vector that this rank holds, in float64."""
        found = torch.zeros(self.rows, dtype=torch.float64, device=x.device)
        if x.numel() == 0:
            return found
        if self.dims:
            x = tree_sum(x, self.dims, xp) if how == "sum" else x.amax(self.dims, keepdim=True)
        return found.scatter_reduce_(0, self.row.expand(x.shape).reshape(-1), x.reshape(-1).double(), how)


def all_reduce(found: Sequence[Tensor], part: Part, how: Literal["SUM", "MAX"] = "SUM") -> list[Tensor]:
    """Return the sums or maxima of arrays over all ranks, by one all-reduce."""
    from torch import distributed

    joined = torch.cat(list(found))
    for i in part.over:
        op = getattr(distributed.ReduceOp, how)
        distributed.all_reduce(joined, op, group=part.p.device_mesh.get_group(i))
    return list(torch.split(joined, [len(f) for f in found]))


def part_of(p: DTensor, axis: Axis, over_all: bool = False) -> Part:
    """Return the part of `p` that this rank holds.

    Sums are taken over the mesh dimensions that its vectors are spread over. With `over_all` they are taken over every
    dimension of the mesh that `p` is sharded over, so that all parameters of a mesh can share one all-reduce.
    """
    vectors = resolve(axis, tuple(p.shape), "out_first")
    assert vectors is not None  # a parameter without vectors is not spread
    local = p.to_local()
    shape, axes = vectors.shape, vectors.axes
    stride = {a: math.prod([n for b, n in enumerate(shape) if b > a and b not in axes]) for a in range(len(shape))}
    row = torch.zeros((1,) * p.ndim, dtype=torch.int64, device=local.device)
    whole = []
    for dim, views in enumerate(_views(p, axis)):
        if all(a in axes for a in views):
            whole.append(dim)
            continue
        index = _local_indices(p, dim).to(local.device)
        for a in reversed(views):  # the last view of an axis in blocks varies fastest
            if a not in axes:
                row = row + index % shape[a] * stride[a]
            index = index // shape[a]
    sharded = tuple(i for i, placement in enumerate(p.placements) if hasattr(placement, "dim"))
    return Part(p, local, vectors, sharded if over_all else spread_over(p, axis), tuple(whole), row)


def norms_over_ranks(p: DTensor, axis: Axis) -> Tensor:
    """Return the norms of the vectors of a DTensor, in one dimension, by one all-reduce."""
    part = part_of(p, axis, over_all=True)
    local = part.local.double()
    (squares,) = all_reduce([part.collect(local * local)], part)
    return squares.sqrt()


def _project(parts: list[Part], job: Job) -> None:
    """Project parts of parameters, with sums in float64.

    The squares of other types neither over- nor underflow in float64, so that one number per vector is enough. The
    squares of float64 itself may. They are first divided by the largest entry of their vector, which takes a second
    all-reduce.
    """
    divided = parts[0].local.dtype == torch.float64
    if divided:
        largest = all_reduce([q.collect(q.local.abs(), "amax") for q in parts], parts[0], "MAX")
    else:
        largest = [torch.ones(q.rows, dtype=torch.float64, device=q.local.device) for q in parts]
    scales = [torch.where(torch.isfinite(r) & (r > 0), r, 1.0)[q.row] for q, r in zip(parts, largest, strict=True)]

    def scaled(part: Part, scale: Tensor) -> Tensor:  # computed twice, because keeping all of them takes memory
        return part.local / scale if divided else part.local.double()

    sums = all_reduce([q.collect(scaled(q, s).square_()) for q, s in zip(parts, scales, strict=True)], parts[0])
    ranks = math.prod(parts[0].p.device_mesh.size(i) for i in parts[0].over)
    for part, scale, r, total in zip(parts, scales, largest, sums, strict=True):
        z_norm = total.sqrt() * (1 + ranks * 2.0**-54)  # adding over the ranks may have rounded down by this much
        # A NaN may be missing in the largest entry, but it is in the sum.
        r = torch.where(torch.isfinite(total), r, total)
        band = _band(part, job)
        moves, goal, _ = band.targets(z_norm, r, torch)
        if job.skip is not None:
            moves = moves & ~(job.skip.to(moves.device) > 0)
        factor = goal / torch.where(moves, z_norm, 1.0)
        y = scaled(part, scale).mul_(factor[part.row])
        if band.pull != 1:
            y = band.pull * y + (1 - band.pull) * part.local
        part.local.copy_(torch.where(moves[part.row], y.to(part.local.dtype), part.local))


def _band(part: Part, job: Job) -> Band:
    assert job.constraint is not None
    constraint = job.constraint
    if part.p in job.radii:
        constraint = constraint.bind(job.radii[part.p].reshape(-1).double())
    band = constraint.band(float_kind(part.local.dtype), part.vectors, moved=True)
    assert band is not None  # `refuse_spread` has raised an error otherwise
    return band


def take_initial(p: DTensor, constraint: Constraint, vectors: Vectors, name: str) -> Tensor | None:
    """Return what a set that is no set of norms takes from a sharded parameter, sharded likewise.

    Raises:
        ValueError: a set that needs whole vectors, which are spread over ranks.
    """
    from torch.distributed.tensor import DTensor

    if spread_over(p, constraint.axis):
        refuse_spread(p, constraint, False, name)
    taken = constraint.initial(p.to_local().detach(), vectors.axes, name, xp)
    if taken is None:
        return None
    shape = [n if constraint.keeps_entries or a not in vectors.axes else 1 for a, n in enumerate(p.shape)]
    whole = torch.empty(shape, device="meta")
    return DTensor.from_local(taken, p.device_mesh, p.placements, shape=whole.shape, stride=whole.stride())


def _constraint_of_shard(constraint: Constraint, p: DTensor) -> Constraint:
    """Return a set whose arrays of numbers are cut to the part of `p` that this rank holds."""
    if isinstance(constraint, Around):
        of = _constraint_of_shard(constraint.of, p)
        return constraint if of is constraint.of else Around(of)
    if isinstance(constraint, Intersection):
        sets = [_constraint_of_shard(own, p) for own in constraint.sets]
        same = all(new is own for new, own in zip(sets, constraint.sets, strict=True))
        return constraint if same else Intersection(*sets, tolerance=constraint.tolerance, steps=constraint.steps)
    changed = {}
    for key in constraint.arrays:
        if isinstance(values := getattr(constraint, key), Values):
            x = torch.tensor(values.tolist(), dtype=torch.float64).reshape(values.shape)
            for k, n in enumerate(values.shape):
                if n > 1:
                    x = x.index_select(k, _local_indices(p, p.ndim - x.ndim + k).flatten())
            changed[key] = x
    return dataclasses.replace(constraint, **changed) if changed else constraint


def _for_shard(job: Job, p: DTensor, local: Tensor) -> Job:
    """Return the job for the part of `p` that this rank holds, with the set and the metric of this part."""
    assert job.constraint is not None
    radii = {local: r.to_local() if is_dtensor(r) else r} if (r := job.radii.get(p)) is not None else {}
    job = dataclasses.replace(job, constraint=_constraint_of_shard(job.constraint, p), radii=radii)
    metric = job.metric
    if metric is None:
        return job

    def of_shard(local: Tensor, pick: Pick | None = None) -> Tensor | None:
        diagonal = metric(p)
        if diagonal is None:
            return None
        mine = diagonal.to_local() if is_dtensor(diagonal) else diagonal
        return mine if pick is None else pick(mine)

    return dataclasses.replace(job, metric=of_shard)


def _views(p: Tensor, axis: Axis) -> list[tuple[int, ...]]:
    """Return the axes of each dimension of `p` in the view that `axis` needs: two for one that is cut into blocks."""
    if not isinstance(axis, Split):
        return [(d,) for d in range(p.ndim)]
    cut = axis.dim % p.ndim
    return [(d, d + 1) if d == cut else (d + (d > cut),) for d in range(p.ndim)]


def _local_indices(p: DTensor, dim: int) -> Tensor:
    """Return the indices along `dim` of the whole tensor that this rank holds, shaped to broadcast along `dim`."""
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
