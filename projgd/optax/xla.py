"""What is done so that XLA is fast and exact. Each trick names what makes it needed.

XLA adds in an order of its own (it merges the reference's blocks). Measured on a CPU a norm errs by less than 5 units
for up to 1,000,000 entries, where `projgd.sums.guard` allows for 36.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from projgd.axes import Vectors
from projgd.bands import Band
from projgd.optax.tree import LeafConstraint
from projgd.sums import float_type, root

finfo: Any = jnp.finfo  # has no types

LARGE = 2**20  # bytes of weights that are worth waiting for
FAR = {"float32": 76, "float64": 560}  # the squares of numbers 2^-FAR as large never overflow
USUAL = {"float32": 40, "float64": 300}  # no square that counts of a norm above 2^-USUAL underflows


def project_leaf(x: jax.Array, leaf: LeafConstraint, *, first: bool = False, moved: bool = True) -> Projected:
    """Project `x`, as `Constraint.onto` does, but that subnormal numbers may become 0, as in XLA's sums.

    Args:
        x: the array, of the parameter's shape.
        leaf: its constraint and vectors.
        first: whether the branch for vectors whose squares overflow comes before the others are scaled, or after.
        moved: as in `Constraint.onto`.
    """
    vectors = leaf.vectors
    band = leaf.constraint.band(float_type(x), _whole(leaf), moved)
    if band is not None and band.filled is None and vectors.shape == x.shape and x.size:
        return _project_by_squares(x, band, partial(_total, leaf), first)
    if leaf.over:
        raise ValueError(
            f"{leaf.name}: {leaf.constraint} in {x.dtype} cannot be split over devices in a shard_map: its entries are "
            "rounded one by one. With jit and NamedSharding it can, without split_over"
        )
    return Projected(leaf.constraint.onto(x.reshape(vectors.shape), vectors.axes, jnp, moved=moved).reshape(x.shape))


@dataclass(frozen=True)
class Projected:
    """A projected array, and what its vectors were multiplied by where that is known."""

    x: jax.Array
    factor: jax.Array | None = None


def _project_by_squares(x: jax.Array, band: Band, total: Callable[[jax.Array], jax.Array], first: bool) -> Projected:
    """Project by one plain sum of squares; vectors whose squares over- or underflow have a branch of their own.

    On a CPU that saves a pass over the weights. Elsewhere a branch would make the device wait for the host, and XLA
    takes all sums in one pass. Nothing else is in the branch, because XLA runs what is there on one core. It comes
    last, so that weights that are not donated need no copy to go through it; in a chain first, because XLA holds once
    what goes through it. Eager arrays take no branch, because compiling it at every call would take longer.
    """
    usual = partial(_scale_vectors, band=band, total=total, first=first)
    everywhere = partial(usual, seldom=lambda flag, rare, *arrays: rare(*arrays))
    if not isinstance(x, jax.core.Tracer):
        return Projected(*everywhere(x))
    branching = partial(usual, seldom=lambda flag, rare, *arrays: jax.lax.cond(flag, rare, lambda *a: a, *arrays))
    return Projected(*jax.lax.platform_dependent(x, cpu=branching, default=everywhere))


def _scale_vectors(
    x: jax.Array, band: Band, total: Callable[[jax.Array], jax.Array], first: bool, seldom: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
    name = float_type(x).compute
    shifts = [2.0 ** -FAR[name]] + ([2.0 ** FAR[name]] if _sees_short(band, name) else [])
    square = total(jnp.square(x.astype(name)))
    odd = jnp.isinf(square) if len(shifts) == 1 else jnp.isinf(square) | (square < 4.0 ** -USUAL[name])
    flag, rare = jnp.any(odd), partial(_project_odd, band=band, total=total, shifts=shifts)
    if first:
        x, square = seldom(flag, rare, x, square)
    factor = band.factors(root(jnp.where(odd, 0, square) if not first else square, jnp), jnp)
    y = jnp.where(factor == 1, x, (x.astype(name) * factor).astype(x.dtype))
    if not first:
        y, _ = seldom(flag, rare, y, square)
    return y, factor


def _project_odd(
    x: jax.Array, square: jax.Array, band: Band, total: Callable[[jax.Array], jax.Array], shifts: list[float]
) -> tuple[jax.Array, jax.Array]:
    """Project the vectors whose squares overflow, or underflow where the band sees it, and make the squares 0."""
    name = float_type(x).compute
    w = x.astype(name)
    for shift in shifts:
        shifted = total(jnp.square(w * shift))
        odd = (square < 4.0 ** -USUAL[name]) & (shifted > 0) if shift > 1 else jnp.isinf(square) & jnp.isfinite(shifted)
        norm = root(jnp.where(odd, shifted, 1), jnp)
        goal = band.goal(norm, jnp, shift)
        # Chosen, for XLA to keep two products: of two known numbers it makes one, which can be subnormal.
        y = w * jnp.where(odd, shift, 1) * (goal / shift / norm)
        x = jnp.where(odd & (goal != norm), (band.pull * y + (1 - band.pull) * w).astype(x.dtype), x)
    return x, jnp.where(jnp.isinf(square) | (square < 4.0 ** -USUAL[name]), 0, square)


def _sees_short(band: Band, name: str) -> bool:
    """Whether short vectors must be told apart: the band has a lower bound, or may be as short as they are."""
    is_ball = isinstance(band.low, float) and band.low == 0
    return not (is_ball and isinstance(band.high, float) and band.high >= 2.0 ** -USUAL[name])


def _total(leaf: LeafConstraint, x: jax.Array) -> jax.Array:
    within = jnp.sum(x, axis=leaf.vectors.axes, keepdims=True)
    return jax.lax.psum(within, leaf.over) if leaf.over else within  # type: ignore[no-untyped-call]


def _whole(leaf: LeafConstraint) -> Vectors:
    """The vectors of an array that are as long as these over all devices."""
    shape = list(leaf.vectors.shape)
    if leaf.over:
        shape[max(leaf.vectors.axes, key=shape.__getitem__)] *= jax.lax.axis_size(leaf.over)
    return Vectors(tuple(shape), leaf.vectors.axes)


@dataclass
class Turns:
    """`project_leaf` for one leaf after the other, so that XLA need not hold all projected points at once.

    Left alone, its scheduler on a CPU makes all of them before it uses the first: a second copy of the weights, in
    fresh memory. A point that might depend on the factors of the leaf before cannot be made early. What it would depend
    on, a negative sum of factors, does not occur; a barrier is dropped before XLA schedules.
    """

    factor: jax.Array | None = None

    def project(self, x: jax.Array, leaf: LeafConstraint) -> jax.Array:
        """Project one leaf, after the leaf before."""
        large = isinstance(x, jax.core.Tracer) and x.size * x.dtype.itemsize >= LARGE
        if large and self.factor is not None and _varies(self.factor) <= _varies(x):
            wait = lambda x, factor: jnp.where(jnp.sum(factor) < 0, 0, x)  # noqa: E731
            x = jax.lax.platform_dependent(x, self.factor, cpu=wait, default=lambda x, factor: x)
        projected = project_leaf(x, leaf, first=True)
        if large and projected.factor is not None:
            self.factor = projected.factor
        return projected.x


def _varies(x: jax.Array) -> frozenset[str]:
    """The mesh axes of a shard_map that `x` depends on."""
    return getattr(jax.typeof(x), "vma", frozenset())


def add(p: Any, u: Any) -> jax.Array:
    """Return p + u as `optax.apply_updates` computes and rounds it."""
    return rounded(jnp.asarray(p + u).astype(jnp.asarray(p).dtype))


def rounded(x: jax.Array) -> jax.Array:
    """Return `x` rounded to its dtype now: inside `jit`, XLA may carry a bfloat16 or float16 on as a float32."""
    if x.dtype.itemsize > 2:
        return x
    kind = finfo(x.dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def as_stored(u: jax.Array) -> jax.Array:
    """Return an update as it is when it is stored, even if it is a product.

    Inside `jit`, XLA may round -lr * g and p + (-lr * g) at once (a fused multiply-add): then p + u here and p + u in
    `optax.apply_updates` differ. A choice between two numbers, of which the compiler cannot know that they are equal,
    stands between; barriers and precision hints are dropped too early.
    """
    if not jnp.issubdtype(u.dtype, jnp.floating):
        return u
    u = rounded(u)
    largest = finfo(u.dtype).max
    return jnp.where(jnp.isinf(u), u, jnp.clip(u, -largest, largest))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def difference(q: jax.Array, p: jax.Array, dtype: Any) -> jax.Array:
    """Return d with |p + d| ≤ |q| entry by entry, and p + d = q wherever some d of `dtype` gives that.

    q - p rounds, and p + (q - p) rounds again. Where that is not q, one step of d is enough. Made of q and p alone, for
    XLA to hold no other copy.
    """
    wide = q.astype(dtype)
    d = rounded(jnp.where(q == p, jnp.copysign(jnp.zeros_like(wide), wide), wide - p.astype(dtype)))  # inf and -0 stay
    reached = add(p, d)
    size = 8 * d.dtype.itemsize
    bits, reached_bits = (jax.lax.bitcast_convert_type(x.astype(dtype), f"int{size}") for x in (d, reached))
    away = ((bits ^ reached_bits) >> (size - 1)) | 1  # the step of d that makes |reached| larger: -1 if signs differ
    step = jnp.where(jnp.abs(reached) > jnp.abs(q), -away, away)
    next_d = jax.lax.bitcast_convert_type(bits + step, d.dtype)
    return jnp.where((reached != q) & (jnp.abs(add(p, next_d)) <= jnp.abs(q)), next_d, d)


@difference.defjvp
def _derivative(dtype: Any, at: tuple[Any, Any], along: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    return difference(*at, dtype), along[0].astype(dtype) - along[1].astype(dtype)
