"""The projection of weights that a step has just moved, in the forms that XLA does with little memory.

XLA writes a ball's projection into the donated weights if the array keeps its shape (a reshape in the last product
makes XLA copy). The vectors whose squares overflow have a branch of their own on a CPU, where a pass over the weights
that is left out is time won; elsewhere it would make the device wait for the host, and XLA takes both sums in one pass.
Nothing else is in the branch, for XLA runs what is there on one core. It comes last, so that weights that are not
donated need no copy to go through it; in a chain first, for what goes through it XLA holds once and makes only once.

The guard is `projgd.projections.ball_limits`: the same threshold and target as the reference. Its proof needs a norm
that errs by at most `projections.guard`. XLA adds in an order of its own (it merges the reference's blocks too);
measured on a CPU a norm errs by less than 5 units for up to 1,000,000 entries, where 36 are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from projgd import projections
from projgd.constraints import MaxNorm
from projgd.optax.placement import Placed

finfo: Any = jnp.finfo  # has no types
LARGE = 2**20  # bytes of weights that are worth waiting for


def land(x: jax.Array, asked: Placed, first: bool = False) -> tuple[jax.Array, jax.Array | None]:
    """`x` in its set, as `Constraint.project`, but that subnormal numbers may become 0, as in XLA's sums.

    And what the vectors were multiplied by, where this is a ball's fast form; its branch is `first` or last.
    """
    vectors = asked.vectors
    if type(asked.constraint) is MaxNorm and vectors.shape == x.shape and x.size:
        kind = projections.float_type(x)
        c, reach = asked.constraint.c, projections.RANGE[kind.compute]
        traced = not isinstance(c, (int, float))
        if traced:
            c = jnp.asarray(c).astype(kind.compute)
            c = jnp.where((c >= 2.0**-reach) & (c <= 2.0**reach), c, jnp.nan)
        if traced or projections.squares_fit(kind, c):
            limits = projections.ball_limits(kind, _whole(asked), vectors.axes, c, jnp)
            if not limits.fill:
                return _into_ball(x, limits, partial(_total, asked), first)
    if asked.over:
        raise ValueError(
            f"{asked.name}: {asked.constraint} in {x.dtype} cannot be split over devices in a shard_map: its squares "
            "over- or underflow. With jit and NamedSharding it can, without split_over"
        )
    landed: jax.Array = asked.constraint.land(x.reshape(vectors.shape), vectors.axes, jnp)
    return landed.reshape(x.shape), None


@dataclass
class Turns:
    """`land` for one leaf of a tree after the other: so XLA need not hold all their landing points at once.

    Left alone, its scheduler on a CPU makes all of them before it uses the first: a second copy of the weights, in
    fresh memory. A landing point that might depend on the factors of the leaf before cannot be made early. (What it
    would depend on, a negative sum of factors, does not occur; a barrier is dropped before XLA schedules.)
    """

    factor: jax.Array | None = None

    def land(self, x: jax.Array, asked: Placed) -> jax.Array:
        large = isinstance(x, jax.core.Tracer) and x.size * x.dtype.itemsize >= LARGE
        if large and self.factor is not None and _varies(self.factor) <= _varies(x):
            wait = lambda x, factor: jnp.where(jnp.sum(factor) < 0, 0, x)  # noqa: E731
            x = jax.lax.platform_dependent(x, self.factor, cpu=wait, default=lambda x, factor: x)
        landed, factor = land(x, asked, first=True)
        if large and factor is not None:
            self.factor = factor
        return landed


def _varies(x: jax.Array) -> frozenset[str]:
    """The mesh axes of a shard_map that `x` depends on."""
    return getattr(jax.typeof(x), "vma", frozenset())


def _into_ball(
    x: jax.Array, limits: projections.BallLimits, total: projections.Total, first: bool = False
) -> tuple[jax.Array, jax.Array]:
    ball = partial(projections.ball_by_squares, limits=limits, total=total, xp=jnp)
    careful = partial(ball, seldom=projections.always, first=True)
    if not isinstance(x, jax.core.Tracer):  # compiling a branch for every call would take longer
        return careful(x)
    branching = partial(ball, seldom=jax.lax.cond, first=first)
    projected: tuple[jax.Array, jax.Array] = jax.lax.platform_dependent(x, cpu=branching, default=careful)
    return projected


projections.ball_in_jax = lambda *args: _into_ball(*args)[0]


def _total(asked: Placed, x: jax.Array) -> jax.Array:
    within = jnp.sum(x, axis=asked.vectors.axes, keepdims=True)
    return jax.lax.psum(within, asked.over) if asked.over else within  # type: ignore[no-untyped-call]


def _whole(asked: Placed) -> tuple[int, ...]:
    """The shape of an array whose vectors are as long as these over all devices."""
    shape = list(asked.vectors.shape)
    if asked.over:
        shape[max(asked.vectors.axes, key=shape.__getitem__)] *= jax.lax.axis_size(asked.over)
    return tuple(shape)


def add(p: Any, u: Any) -> jax.Array:
    """p + u as `optax.apply_updates` computes and rounds it."""
    return rounded(jnp.asarray(p + u).astype(jnp.asarray(p).dtype))


def rounded(x: jax.Array) -> jax.Array:
    """`x` rounded to its dtype now: inside `jit`, XLA may carry a bfloat16 or float16 on as a float32."""
    if x.dtype.itemsize > 2:
        return x
    kind = finfo(x.dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def as_stored(u: jax.Array) -> jax.Array:
    """An update as it is when it is stored, even if it is a product.

    Inside `jit`, XLA may round -lr * g and p + (-lr * g) at once (a fused multiply-add): then p + u here and p + u in
    `optax.apply_updates` differ. A choice between two numbers, of which the compiler cannot know that they are equal,
    stands between; barriers and precision hints are dropped too early.
    """
    if not jnp.issubdtype(u.dtype, jnp.floating):
        return u
    u = rounded(u)
    largest = finfo(u.dtype).max
    return jnp.where(jnp.isinf(u), u, jnp.clip(u, -largest, largest))
