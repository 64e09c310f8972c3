"""The projection onto the ball, in place: what `projections.project_ball` says, at the price of a norm and a multiply.

The reference scales every vector by its largest entry before it squares. Here it is squared as it is, which is right
unless something over- or underflows; a norm beyond `FAR` sends the parameter through the reference, too.

Norms are summed in blocks of `BLOCK` entries in float32, and from there on in float64. Whatever the order within a
block, that errs by at most (BLOCK + 1) / 2 + 1 units (Higham, Accuracy and Stability of Numerical Algorithms, section
4.2): within the 36 that `projections.guard` allows for. CUDA sums all in float64, which costs nothing beside the
reading of the weights, and where no square of a float32 over- or underflows.

A plain norm of n entries, the faster one, may err by n / 2 units, but shows that nothing is near the ball (`_of_rows`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import array_api_compat.torch as xp
import torch

from projgd import projections
from projgd.axes import Vectors
from projgd.projections import BallLimits

BLOCK = 64
PIECE = 2**20  # entries, which with gradient and state stay in a cache of some ten megabytes
FAR = 2.0**64  # squares beyond overflow in float32, and 2^-40 over a norm beyond may be subnormal
_norm = torch.linalg.vector_norm


def takes(p: torch.Tensor) -> bool:
    """Whether `project_ball_` may have this parameter: a plain tensor, not followed by autograd."""
    return type(p) in (torch.Tensor, torch.nn.Parameter) and not torch.is_grad_enabled()


def usual(c: float) -> bool:
    """Whether the squares of norms near c are far from both ends of float32."""
    return 2.0**-40 <= c <= 2.0**60


def project_ball_(p: torch.Tensor, c: float, vectors: Vectors) -> bool:
    """Put every vector of `p` that is longer than `c` on the ball of radius c. No other bit of `p` changes.

    Returns False where it is known that nothing had to be done.
    """
    if torch.compiler.is_compiling():
        # A product of a tensor is all that torch.compile takes a moving float for; others it compiles in.
        _opaque(p, torch.ones((), dtype=torch.float64, device="cpu") * c, list(vectors.shape), list(vectors.axes))
        return True
    x, axes = p.reshape(vectors.shape), vectors.axes
    limits = ball_limits(p.dtype, vectors, c)
    plain = axes and x.numel() and x.dtype != torch.float64 and not limits.fill and usual(c)
    if plain and x.device.type == "cpu":
        if x.numel() > PIECE and x.dtype == torch.float32 and x.is_contiguous() and (shape := rows(vectors)):
            return _in_pieces(x.view(shape), c)
        return not _blocked([x], limits, axes, c) <= limits.threshold
    if plain and x.device.type == "cuda":
        _branch_free(x, limits, axes)
    else:
        x.copy_(projections.project_ball(x, c, axes, xp))
    return True


@torch.library.custom_op("projgd::project_ball_", mutates_args=("p",))
def _opaque(p: torch.Tensor, c: torch.Tensor, shape: list[int], axes: list[int]) -> None:
    """`project_ball_` for torch.compile, which sees no inside, of what `compiled` leaves.

    Fused with the step before it, the norm would be that of weights that are not yet rounded to bfloat16.
    """
    project_ball_(p, c.item(), Vectors(tuple(shape), tuple(axes)))


@functools.lru_cache(maxsize=4096)
def ball_limits(dtype: torch.dtype, vectors: Vectors, c: float) -> BallLimits:
    """`projections.ball_limits`, remembered."""
    kind = projections.FLOATS[str(dtype).removeprefix("torch.")]
    return projections.ball_limits(kind, vectors.shape, vectors.axes, c, xp)


def rows(vectors: Vectors) -> tuple[int, int] | None:
    """How many vectors there are and how long they are, where each is contiguous in a contiguous tensor."""
    ndim, axes = len(vectors.shape), vectors.axes
    whole = axes and axes == tuple(range(axes[0], ndim))
    return (math.prod(vectors.shape[: axes[0]]), vectors.length) if whole else None


def _in_pieces(x: torch.Tensor, c: float) -> bool:
    """Project rows that are scaled while they are still in a cache."""
    near, written = True, False
    for piece in torch.split(x, max(1, PIECE // x.shape[1])):
        near = project_rows_([piece], c, x.shape[1], near)
        written |= near
    return written


def project_rows_(xs: Sequence[torch.Tensor], c: float, longest: int, near: bool) -> bool:
    """Project the rows of float32 matrices on a CPU, all with the limits of the `longest`; returns whether one is near.

    If none was `near` the last time, plain norms are tried first.
    """
    limits, safe = _of_rows(longest, c)
    if not near and all(_norm(x, 2, 1).max().item() <= safe for x in xs):
        return False
    return not _blocked(xs, limits, (1,), c) <= safe


@functools.lru_cache(maxsize=4096)
def _of_rows(length: int, c: float) -> tuple[BallLimits, float]:
    """The limits of rows, and what torch's plain norm in float32 exceeds for each that may have to be moved.

    Squares added in any order err by n / (1 - n) of their sum, n = length units (Higham's gamma), and `norms` may find
    more than the threshold where the norm is 2 * threshold - c.
    """
    limits, n = ball_limits(torch.float32, Vectors((1, length), (1,)), c), min(length * 2.0**-24, 0.5)
    return limits, (2 * limits.threshold - c) * math.sqrt(1 - n / (1 - n)) * (1 - 2.0**-22)


def _blocked(xs: Sequence[torch.Tensor], limits: BallLimits, axes: tuple[int, ...], c: float) -> float:
    """Project what lies on a CPU, several arrays only if they are matrices; returns the largest norm there was, or NaN.

    Nothing is written where that is within the threshold.
    """
    wide = [x.float() for x in xs]  # x itself where it is float32
    each = [norms(x, axes) for x in wide]
    found = each[0] if len(xs) == 1 else torch.cat(each)
    largest = found.max().item()
    if largest <= limits.threshold:
        return largest
    if largest < FAR:
        factor = torch.empty_like(found, dtype=torch.float32)  # target / norm, or 1
        torch.div(_number(limits.target), torch.threshold_(found, limits.threshold, limits.target), out=factor)
        factors = [factor] if len(xs) == 1 else factor.split_with_sizes([x.shape[0] for x in xs])
        for x, w, by in zip(xs, wide, factors, strict=True):
            w.mul_(by)
            if w is not x:
                x.copy_(w)
    else:  # a NaN, too; the others first: the next step may find them alone, and must have nothing to do
        for x, w, n in zip(xs, wide, each, strict=True):
            outside = (n > limits.threshold) & (n < FAR)
            x.copy_(torch.where(outside, w.mul((limits.target / n).float()).to(x.dtype), x))
            x.copy_(projections.project_ball(x, c, axes, xp))
    return largest


@functools.lru_cache(maxsize=64)
def _number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


def _branch_free(x: torch.Tensor, limits: BallLimits, axes: tuple[int, ...]) -> None:
    """Project `x` without reading a number back: the host never waits."""
    factor = factors(_norm(x, dim=axes, keepdim=True, dtype=torch.float64), limits)
    x.copy_(torch.where(factor < 1, torch.mul(x, factor, out=torch.empty_like(x)), x))


def factors(norms: torch.Tensor, limits: BallLimits) -> torch.Tensor:
    """What vectors with these norms are multiplied by, in float64 as they are; 1 for those that are left alone."""
    outside = (norms > limits.threshold) & norms.isfinite()
    return torch.where(outside, limits.target / norms, 1.0)  # in float32, c / 3e38 may be subnormal


@dataclass(frozen=True)
class _Plan:
    """How the norms of an array are summed: axes that are neighbours in memory taken as one, then cut into blocks."""

    order: list[int]  # the axes as they lie in memory
    runs: list[int]  # and those that can be, merged
    within: list[int]  # merged axes that fit into one block together
    beyond: list[int]  # the other merged axes to sum over, of which the last is cut into blocks of
    block: int
    shape: list[int]  # of the norms, in the order of memory
    back: list[int]  # from there to the order of the array
    cut: list[int] | None  # (vectors, blocks, block) where that is what a contiguous array is


@functools.lru_cache(maxsize=4096)
def _plan(shape: tuple[int, ...], stride: tuple[int, ...], axes: tuple[int, ...]) -> _Plan:
    order = sorted(range(len(shape)), key=lambda a: -stride[a])
    runs: list[int] = []
    reduced: list[bool] = []
    for a in order:
        if reduced and reduced[-1] == (a in axes):
            runs[-1] *= shape[a]
        else:
            runs.append(shape[a])
            reduced.append(a in axes)
    block, within, beyond = BLOCK, [], []
    for i in reversed(range(len(runs))):
        if reduced[i] and runs[i] <= block:
            within.append(i)
            block //= runs[i]
        elif reduced[i]:
            beyond.append(i)
    if beyond:  # blocks without a remainder where they are not much shorter
        block = next((b for b in range(block, block // 2, -1) if runs[beyond[0]] % b == 0), block)
    kept = [1 if a in axes else shape[a] for a in order]
    back = [order.index(a) for a in range(len(shape))]
    simple = reduced == [False, True] and beyond and runs[1] % block == 0 and back == order == sorted(order)
    cut = [runs[0], runs[1] // block, block] if simple else None
    return _Plan(order, runs, within, beyond, block, kept, back, cut)


def norms(x: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
    """‖x‖₂ of float32 vectors in float64, reduced axes kept with size 1. Squares may over- or underflow."""
    plan = _plan(x.shape, x.stride(), axes)
    if plan.cut and x.is_contiguous():
        rows: torch.Tensor = _norm(_norm(x.view(plan.cut), 2, 2), 2, 1, dtype=torch.float64)
        return rows.view(plan.shape)
    y = x.permute(plan.order).reshape(plan.runs)
    if not plan.beyond:
        found: torch.Tensor = _norm(y, dim=plan.within, keepdim=True).double()
    else:
        d, n, block = plan.beyond[0], plan.runs[plan.beyond[0]], plan.block
        full = n - n % block
        cut = y.narrow(d, 0, full).reshape([*plan.runs[:d], full // block, block, *plan.runs[d + 1 :]])
        cut = _norm(cut, dim=[d + 1, *(i + (i > d) for i in plan.within)], keepdim=True).squeeze(d + 1)
        found = _norm(cut, dim=plan.beyond, keepdim=True, dtype=torch.float64)
        if full < n:
            rest = _norm(y.narrow(d, full, n - full), dim=[d, *plan.within], keepdim=True)
            found = torch.hypot(found, _norm(rest, dim=plan.beyond, keepdim=True, dtype=torch.float64))
    return found.reshape(plan.shape).permute(plan.back)
