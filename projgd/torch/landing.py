"""The arithmetic of a shaped step, in place: w ← Π(w + shape(u)).

`Update.coefficients` asks for three numbers per vector and gives two. So a parameter is measured in one pass and moved
in another; and where vectors are spread over ranks, one all-reduce of three numbers per vector is shared by all
parameters. A sphere is landed on before rounding to the parameter's dtype: the norm of the sum follows from the same
numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import array_api_compat.torch as xp
import torch

from projgd import projections, updates
from projgd.axes import Vectors
from projgd.constraints import Constraint
from projgd.projections import FloatType, Measures
from projgd.torch import ball, sharded
from projgd.updates import MaxUpdate, RelativeUpdate, Update

PIECE = 1 << 18  # entries of two arrays and their product: 3 MB


@dataclass(frozen=True)
class Plan:
    """What is to become of `p`, which holds an update u of the weights `w` or, if `on_top`, w + u."""

    p: torch.Tensor
    w: torch.Tensor
    on_top: bool
    update: Update
    lr: Any
    of: Constraint  # a set with the vectors that are meant
    radius: Any = None  # of the sphere that is landed on; None for no sphere
    moves: bool = True  # whether w + shape(u) is wanted, or shape(u) alone


@torch.no_grad()
def land(plans: Sequence[Plan]) -> None:
    """Put what is wanted in every p. Sums are taken in float32 for halves, or more."""
    by_mesh: dict[object, list[tuple[Plan, sharded.Part]]] = {}
    for plan in plans:
        if sharded.is_dtensor(plan.p):
            part = _part(plan.p, plan.of)
            by_mesh.setdefault((plan.p.device_mesh, part.over), []).append((plan, part))
        else:
            _land_plain(plan)
    for spread in by_mesh.values():
        _land_sharded(spread)


def _land_plain(plan: Plan) -> None:
    p, vectors = plan.p, plan.of.resolve(tuple(plan.p.shape), "out_first")
    assert vectors is not None
    kind = projections.float_type(p)
    compute = getattr(torch, kind.compute)
    u, w = (x.to(compute).view(vectors.shape) for x in (p, plan.w))  # of p itself, where it has this dtype
    if plan.on_top:
        u.sub_(w)
    _shape(u, w, plan, vectors.axes)
    if plan.radius is not None:
        u.mul_(_to_sphere(_norms(u, vectors.axes), plan.radius, kind, vectors).to(compute))
    if p.dtype != compute:
        p.copy_(u.view(p.shape))


def _land_sharded(spread: list[tuple[Plan, sharded.Part]]) -> None:
    found = []
    for plan, part in spread:
        u, w = _pair(plan)
        found += [sharded.collected(part, x, "sum") for x in (w * w, u * u, u * w)]
    sums = iter(sharded.shared(found, spread[0][1], "SUM"))
    for plan, part in spread:
        ww, uu, uw = next(sums), next(sums), next(sums)
        size = projections.measures(ww, uu, uw, xp)
        share, push = plan.update.numbers(size, plan.lr, xp)
        if plan.radius is not None:
            radius = plan.radius.reshape(-1) if isinstance(plan.radius, torch.Tensor) else plan.radius
            kind, vectors = projections.float_type(part.local), part.vectors
            band = projections.sphere_band(kind, vectors.shape, vectors.axes, radius, moved=True)
            share, push = updates.landed(share, push, size, radius, band, xp)
        u, w = _pair(plan)
        shaped = u * push[part.row] + w * share[part.row]
        part.local.copy_(w + shaped if plan.moves else shaped)


def _pair(plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of u and w in float64, whose squares neither over- nor underflow."""
    u, w = (cast("Any", x).to_local().double() for x in (plan.p, plan.w))
    return (u - w if plan.on_top else u), w


def _shape(u: torch.Tensor, w: torch.Tensor, plan: Plan, axes: tuple[int, ...]) -> None:
    """u becomes what `Update.shape` makes of it, with w added if the plan moves the weights."""
    keeps_direction = isinstance(plan.update, (RelativeUpdate, MaxUpdate))
    size = Measures(_norms(w, axes), _norms(u, axes), torch.zeros((), device=u.device))
    if not keeps_direction:
        size = size._replace(cosine=_cosine(u, w, size, axes))
    share, factor = plan.update.numbers(size, plan.lr, xp)
    factor = factor.clamp(max=torch.finfo(u.dtype).max).to(u.dtype)
    if keeps_direction and plan.moves:
        torch.addcmul(w, u, factor, out=u)  # one pass over memory
        return
    for u_, w_, share_, factor_ in _in_cache(u, w, share.to(u.dtype), factor):
        u_.mul_(factor_).addcmul_(w_, share_)
        if plan.moves:
            u_.add_(w_)


def _to_sphere(norm: torch.Tensor, radius: Any, kind: FloatType, vectors: Vectors) -> torch.Tensor:
    """What vectors with these norms are multiplied by, as in `Sphere.land`."""
    near = (norm - radius).abs() <= projections.sphere_band(kind, vectors.shape, vectors.axes, radius, moved=True)
    return torch.where(torch.isfinite(norm) & (norm > 0) & ~near, radius / norm, 1.0)


def _norms(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """Norms with the reduced axes kept, in float64 where the device has it."""
    if x.dtype == torch.float64 or x.device.type not in ("cpu", "cuda"):
        return projections.norm(x, axes, xp)  # type: ignore[no-any-return]
    if _can_look(x):
        norm = ball.norms(x, axes)
        if bool(_usual(norm).all()):
            return norm
        if bool((_usual(norm) | (torch.linalg.vector_norm(x, torch.inf, axes, keepdim=True) == 0)).all()):
            return norm
    return cast("torch.Tensor", torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=torch.float64))


def _cosine(u: torch.Tensor, w: torch.Tensor, size: Measures, axes: tuple[int, ...]) -> torch.Tensor:
    if _can_look(u) and bool(((_usual(size.u) | (size.u == 0)) & (_usual(size.w) | (size.w == 0))).all()):
        parts = [torch.sum(u_ * w_, dim=axes, keepdim=True) for u_, w_ in _in_cache(u, w)]
        both = size.u * size.w
        dot = torch.stack(parts).double().sum(0) if 0 in axes else torch.cat(parts)
        return dot.to(both.dtype) / torch.where(both > 0, both, 1.0)
    u, w = (x / torch.where(n > 0, n, 1.0).to(x.dtype) for x, n in ((u, size.u), (w, size.w)))
    return torch.sum(u * w, dim=axes, keepdim=True).to(size.u.dtype)


def _usual(norm: torch.Tensor) -> torch.Tensor:
    """Whether no square that counts over- or underflows in float32."""
    return (norm > 1e-12) & (norm < 1e18)


def _can_look(x: torch.Tensor) -> bool:
    """Whether reading a number back costs nothing: a graph cannot, and an accelerator would be waited for."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _in_cache(x: torch.Tensor, *others: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Pieces along the first axis, on a CPU so small that a second operation finds them in the cache."""
    if not (_can_look(x) and x.numel() > PIECE):
        return [(x, *others)]
    step = max(1, PIECE * len(x) // x.numel())
    cut = (torch.split(t, step) if len(t) == len(x) else itertools.repeat(t) for t in (x, *others))
    return zip(*cut, strict=False)


def _norms_over_ranks(p: torch.Tensor, of: Constraint) -> torch.Tensor:
    """The norms of the vectors of a DTensor, in a row: one all-reduce."""
    part = _part(cast("Any", p), of)
    local = part.local.double()
    (squares,) = sharded.shared([sharded.collected(part, local * local, "sum")], part, "SUM")
    return squares.sqrt()


def _part(p: Any, of: Constraint) -> sharded.Part:
    """What this rank holds, its sums taken over every dimension of the mesh that `p` is sharded over."""
    over = tuple(i for i, placement in enumerate(p.placements) if hasattr(placement, "dim"))
    return dataclasses.replace(sharded.part_of(p, of), over=over)


def measurable(p: torch.Tensor, vectors: Vectors, of: Constraint) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What has the norms of the vectors of `p`, and over which axes: of a sharded one, the norms themselves."""
    if sharded.is_dtensor(p):
        return _norms_over_ranks(p.detach(), of).unsqueeze(1), (1,)
    return p.detach().reshape(vectors.shape), vectors.axes
