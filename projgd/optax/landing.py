"""The projection of weights that a step has just moved, in the form that XLA does in place.

XLA writes a ball's projection into the donated weights if the array keeps its shape (a reshape in the last product
makes XLA copy) and is multiplied by 1 rather than selected where it stays. One sum of squares serves every norm below
2^64. A vector whose squares overflow is first made 2^76 times smaller: on a CPU behind a branch that is hardly ever
taken, for another pass over the weights costs as much as the first; elsewhere always, for a branch makes a GPU wait
for the host, and both sums are one pass there.

The guard is `projgd.projections.ball_limits`: the same threshold and target as the reference. Its proof needs a norm
that errs by at most `projections.guard`. XLA adds in an order of its own (it merges the reference's blocks too);
measured on a CPU a norm errs by less than 5 units for up to 1,000,000 entries, where 36 are allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from projgd import projections
from projgd.constraints import MaxNorm
from projgd.optax.placement import Placed

finfo: Any = jnp.finfo  # has no types

# By dtype: the squares of numbers 2^-FAR as large never overflow, and for a c within 2^-RANGE and 2^RANGE no norm near
# it over- or underflows when it is squared.
FAR, RANGE = {"float32": 76, "float64": 560}, {"float32": 40, "float64": 300}


def land(x: jax.Array, asked: Placed) -> jax.Array:
    """`x` in its set, as `Constraint.project`, but that subnormal numbers may become 0, as in XLA's sums."""
    vectors = asked.vectors
    if type(asked.constraint) is MaxNorm and vectors.shape == x.shape and x.size:
        kind = projections.float_type(x)
        c, reach = asked.constraint.c, RANGE[kind.compute]
        traced = not isinstance(c, (int, float))
        if traced:
            c = jnp.asarray(c).astype(kind.compute)
            c = jnp.where((c >= 2.0**-reach) & (c <= 2.0**reach), c, jnp.nan)
        if traced or 2.0**-reach <= c <= 2.0**reach:
            limits = projections.ball_limits(kind, _whole(asked), vectors.axes, c, jnp)
            if not limits.fill:
                return _into_ball(x, limits, asked)
    if asked.over:
        raise ValueError(f"{asked.name}: over devices of a shard_map only a MaxNorm without Split is implemented")
    landed: jax.Array = asked.constraint.land(x.reshape(vectors.shape), vectors.axes, jnp)
    return landed.reshape(x.shape)


def _into_ball(x: jax.Array, limits: projections.BallLimits, asked: Placed) -> jax.Array:
    square = _squares(x, 1.0, asked)
    nearer = partial(_nearer, asked=asked)
    x, fine = jax.lax.platform_dependent(x, square, cpu=partial(_if_huge, nearer), default=nearer)
    norm = jnp.sqrt(jnp.maximum(fine, finfo(fine.dtype).tiny))  # at 0 the root has no derivative
    was_huge = jnp.isinf(square)
    outside = jnp.isfinite(fine) & (was_huge | ~(norm <= limits.threshold))  # "not inside": a NaN c shows
    factor = jnp.where(outside, limits.target / jnp.where(outside, norm, 1.0), 1.0).astype(square.dtype)
    return jnp.asarray(x.astype(square.dtype) * factor, x.dtype)


def _nearer(x: jax.Array, square: jax.Array, asked: Placed) -> tuple[jax.Array, jax.Array]:
    """x and its sums of squares, finite vectors whose `square` overflows made 2^FAR times smaller."""
    far = 2.0 ** -FAR[str(square.dtype)]
    smaller = _squares(x, far, asked)
    huge = jnp.isinf(square) & jnp.isfinite(smaller)
    return x * jnp.where(huge, far, 1.0).astype(x.dtype), jnp.where(huge, smaller, square)


def _if_huge(nearer: Callable[..., Any], x: jax.Array, square: jax.Array) -> Any:
    return jax.lax.cond(jnp.any(jnp.isinf(square)), nearer, lambda *same: same, x, square)


def _squares(x: jax.Array, scale: float, asked: Placed) -> jax.Array:
    """The sum of the squares of every vector, `scale` times as large, over all devices that share it."""
    compute = projections.float_type(x).compute
    total = jnp.sum(jnp.square(x.astype(compute) * scale), axis=asked.vectors.axes, keepdims=True)
    return jax.lax.psum(total, asked.over) if asked.over else total  # type: ignore[no-untyped-call]


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
