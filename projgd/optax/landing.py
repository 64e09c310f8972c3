"""The projection of weights that a step has just moved, in the form that XLA does in place.

XLA writes a ball's projection into the donated weights if three things hold: the array keeps its shape (a reshape in
the last product makes XLA copy), it is multiplied by 1 rather than selected where it stays, and there is no branch. So
one sum of squares serves every norm below 2^64, a second one of squares made 2^152 times smaller the norms above, and
the product with their factors is all that touches the weights.

The guard is `projgd.projections.ball_limits`: the same threshold and target as the reference. Its proof needs a norm
that errs by at most `projections.guard`. XLA adds in an order of its own (it merges the reference's blocks too);
measured on a CPU a norm errs by less than 5 units for up to 1,000,000 entries, where 36 are allowed.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from projgd import projections
from projgd.constraints import MaxNorm
from projgd.optax.placement import Placed

finfo: Any = jnp.finfo  # has no types

# By dtype: the squares of numbers 2^-FAR as large never overflow; a norm that overflows when squared is divided by
# 2^NEAR first; and the two sums leave no gap between them for a c within 2^-RANGE and 2^RANGE.
FAR, NEAR, RANGE = {"float32": 76, "float64": 560}, {"float32": 64, "float64": 512}, {"float32": 40, "float64": 300}


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
    compute = projections.float_type(x).compute
    near = NEAR[compute]
    far = FAR[compute] + asked.index % 32  # if parameters of one shape share a number, XLA makes an array of it
    w = x.astype(compute)
    square = _total(jnp.square(w), asked)
    square_far = _total(jnp.square(w * 2.0**-far), asked)
    huge = jnp.isinf(square)  # or a vector with NaN or inf, which also has no finite `square_far`
    norm = jnp.where(huge, jnp.sqrt(square_far) * math.ldexp(1.0, far - near), jnp.sqrt(square))
    outside = jnp.isfinite(square_far) & (huge | ~(norm <= limits.threshold))  # "not inside": a NaN c shows
    first = jnp.where(outside & huge, 2.0**-near, 1.0).astype(compute)
    then = jnp.where(outside, limits.target / jnp.where(outside, norm, 1.0), 1.0).astype(compute)
    return (w * first * then).astype(x.dtype)


def _whole(asked: Placed) -> tuple[int, ...]:
    """The shape of an array whose vectors are as long as these over all devices."""
    shape = list(asked.vectors.shape)
    if asked.over:
        shape[max(asked.vectors.axes, key=shape.__getitem__)] *= jax.lax.axis_size(asked.over)
    return tuple(shape)


def _total(squares: jax.Array, asked: Placed) -> jax.Array:
    total = jnp.sum(squares, axis=asked.vectors.axes, keepdims=True)
    return jax.lax.psum(total, asked.over) if asked.over else total  # type: ignore[no-untyped-call]


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
