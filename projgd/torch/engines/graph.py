"""Project under torch.compile.

Norms and products belong to the graph: Inductor puts the norm into the loop of the update, and computes the update once
more for the product, so that no weights are written twice. An operator between them computes the factors. The compiler
does not look into it, so c can move in it, and Inductor does not merge both loops into one (on a CPU, in torch 2.13,
merging fails where the optimizer has momentum: KeyError in codegen_outer_loop_node).

The norm is that of the stored weights, because the same arithmetic is done twice. If a device contracts a product and a
sum in one of the two, a norm differs by a unit of ‖update‖, which is far less than the guard allows. Weights in 16-bit
types would be rounded in one and not in the other, so an operator projects them as a whole.

A set that is no set of norms is projected by an operator, too, because it may iterate. Only intervals of numbers are
left to the graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import array_api_compat.torch as xp
import torch
from torch import Tensor

from projgd.axes import Vectors
from projgd.config import from_config
from projgd.constraints import Constraint, NormSet
from projgd.entries import EntrySet
from projgd.sums import FLOATS
from projgd.torch.engines.base import PLAIN, Engine, Job
from projgd.values import Values


class Graph(Engine):
    """Project inside of a graph that torch.compile makes."""

    name = "graph"

    def refuses(self, job: Job, p: Tensor) -> str | None:
        if not job.compiled:
            return ""
        if job.metric is not None:
            return "it projects in the Euclidean metric only"
        if type(p) not in PLAIN or p.device.type not in ("cpu", "cuda") or not p.numel():
            return "it takes tensors with entries on cpu and cuda that are no subclasses"
        if job.skip is not None or (p.dtype == torch.float64 and isinstance(job.constraint, NormSet)):
            return "it takes no GradScaler, and norms of float32 and shorter types"
        if isinstance(job.constraint, EntrySet) and not _has_arrays(job.constraint):
            return "the compiler makes a clamp of it"
        return None

    def run(self, prepared: None, job: Job, params: Sequence[Tensor]) -> None:
        assert job.constraint is not None
        if not isinstance(job.constraint, NormSet):
            c = torch.full((1,), 1.0, dtype=torch.float64, device="cpu")
            number = c if job.constraint.moving_c is None else c * job.constraint.moving_c
            for p in params:
                vectors = job.vectors(p)
                assert vectors is not None
                initial = job.radii[p] if p in job.radii else torch.empty(0, device=p.device)
                _onto_opaque(
                    p, _remember(job.group["constraint"]), number, initial, list(vectors.shape), list(vectors.axes)
                )
            return
        by_device = itertools.groupby(sorted(params, key=lambda p: str(p.device)), key=lambda p: p.device)
        for _, some in by_device:
            group = list(some)
            whole = [p for p in group if p.dtype == torch.float32]
            if whole:
                _project(whole, job)
            for p in group:
                vectors = job.vectors(p)
                if p.dtype != torch.float32 and vectors is not None:
                    radii = job.radii[p] if p in job.radii else torch.empty(0, device=p.device)
                    _project_opaque(p, *_describe(job.constraint), radii, list(vectors.shape), list(vectors.axes))


def _has_arrays(constraint: Constraint) -> bool:
    """Return whether a set has arrays of bounds, its own or from the initial weights."""
    return constraint.takes_initial or any(isinstance(getattr(constraint, k), Values) for k in constraint.arrays)


_remembered: list[Constraint] = []
"""The sets that compiled graphs name by their place here."""


def _remember(constraint: Constraint) -> int:
    """Return the place of a set in `_remembered`."""
    if constraint not in _remembered:
        _remembered.append(constraint)
    return _remembered.index(constraint)


# A group with another set gets another graph. `torch.compiler.assume_constant_result` sets this, and imports Triton.
setattr(_remember, "_dynamo_marked_constant", True)  # noqa: B010


@torch.library.custom_op("projgd::onto_", mutates_args=("p",))
def _onto_opaque(p: Tensor, place: int, c: Tensor, initial: Tensor, shape: list[int], axes: list[int]) -> None:
    constraint = _remembered[place]
    if constraint.moving_c is not None:
        constraint = constraint.replace(c=c.item())
    if constraint.takes_initial:
        constraint = constraint.bind(initial)
    p.copy_(constraint.onto(p.reshape(shape), tuple(axes), xp, moved=True).reshape(p.shape))


def _project(params: Sequence[Tensor], job: Job) -> None:
    assert job.constraint is not None
    views = [(p.reshape(v.shape), v) for p in params if (v := job.vectors(p)) is not None]
    norms = [torch.linalg.vector_norm(x, dim=v.axes, keepdim=True, dtype=torch.float64) for x, v in views]
    counts = [n.numel() for n in norms]
    radii = [job.radii[p].reshape(-1).double() for p in params if p in job.radii]
    factors = _factors(
        torch.cat([n.reshape(-1) for n in norms]),
        counts,
        [v.length for _, v in views],
        *_describe(job.constraint),
        torch.cat(radii) if radii else torch.empty(0, device=params[0].device),
    )
    for (x, _), n, factor in zip(views, norms, factors.split_with_sizes(counts), strict=True):
        x.mul_(factor.reshape(n.shape))


def _describe(constraint: Constraint) -> tuple[str, Tensor]:
    """Return the words of a constraint's config, and its numbers as a tensor.

    torch.compile keeps a moving float only as the product of a tensor; it compiles other floats in.
    """
    config = {k: v for k, v in constraint.config().items() if k != "axis"}
    words = ";".join(f"{k}={v}" if isinstance(v, str) else k for k, v in config.items())
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    numbers = [one * v for v in config.values() if not isinstance(v, str)]
    return words, torch.cat(numbers) if numbers else one


def _constraint(words: str, numbers: Tensor, radii: Tensor) -> Constraint:
    """Return the constraint that `_describe` described, with the radii that were taken for it."""
    values = iter(numbers.tolist())
    pairs = [word.partition("=") for word in words.split(";")]
    constraint: Constraint = from_config({k: v if is_word else next(values) for k, is_word, v in pairs})
    return constraint.bind(radii) if radii.numel() else constraint


@torch.library.custom_op("projgd::factors", mutates_args=())
def _factors(
    norms: Tensor, counts: list[int], lengths: list[int], words: str, numbers: Tensor, radii: Tensor
) -> Tensor:
    """Return the factors of vectors with these norms, `counts` of them of each length; 1 where they stay."""
    factors, start = torch.empty_like(norms), 0
    for count, n in zip(counts, lengths, strict=True):
        part = slice(start, start := start + count)
        band = _constraint(words, numbers, radii[part]).band(FLOATS["float32"], Vectors((1, n), (1,)), moved=True)
        assert band is not None
        factors[part] = band.factors(norms[part], xp)
    return factors


@_factors.register_fake
def _(norms: Tensor, counts: list[int], lengths: list[int], words: str, numbers: Tensor, radii: Tensor) -> Tensor:
    return torch.empty_like(norms)


@torch.library.custom_op("projgd::project_", mutates_args=("p",))
def _project_opaque(p: Tensor, words: str, numbers: Tensor, radii: Tensor, shape: list[int], axes: list[int]) -> None:
    x = p.reshape(shape)
    p.copy_(_constraint(words, numbers, radii).onto(x, tuple(axes), xp, moved=True).reshape(p.shape))
