"""The projection of weights that a step has just moved, in the form that XLA does in place.

XLA writes a ball's projection into the donated weights if the array keeps its shape (a reshape in the last product
makes XLA copy) and is multiplied by 1 rather than selected where it stays. One sum of squares serves every norm below
2^64; a vector whose squares overflow is first made 2^76 times smaller, on a CPU behind a branch that is hardly ever
taken. The branch stands before the product, for XLA runs what is in a branch on one core.

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


def land(x: jax.Array, asked: Placed) -> jax.Array:
    """`x` in its set, as `Constraint.project`, but that subnormal numbers may become 0, as in XLA's sums."""
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
                return _into_ball(x, limits, asked)
    if asked.over:
        raise ValueError(
            f"{asked.name}: {asked.constraint} in {x.dtype} cannot be split over devices in a shard_map: its squares "
            "over- or underflow. With jit and NamedSharding it can, without split_over"
        )
    landed: jax.Array = asked.constraint.land(x.reshape(vectors.shape), vectors.axes, jnp)
    return landed.reshape(x.shape)


def _seldom(flag: jax.Array, careful: Callable[..., Any], usual: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`projections.seldom`, as a branch where that pays.

    Only where it is compiled for a CPU, where a pass over the weights that is left out is time won: it would make a GPU
    wait for the host, and there XLA takes both sums in one pass.
    """
    if not isinstance(flag, jax.core.Tracer):  # compiling a branch for every call would take longer
        return careful(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=partial(jax.lax.cond, flag, careful, usual), default=careful)


projections.seldom = _seldom


def _into_ball(x: jax.Array, limits: projections.BallLimits, asked: Placed) -> jax.Array:
    def total(squares: jax.Array) -> jax.Array:
        within = jnp.sum(squares, axis=asked.vectors.axes, keepdims=True)
        return jax.lax.psum(within, asked.over) if asked.over else within  # type: ignore[no-untyped-call]

    def nearer(x: jax.Array, square: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale, fine = projections.shrunk(total, x, square, jnp)
        return x * scale.astype(x.dtype), fine

    compute = projections.float_type(x).compute
    square = total(x.astype(compute) * x.astype(compute))
    x, fine = _seldom(jnp.any(jnp.isinf(square)), nearer, lambda *same: same, x, square)
    norm = jnp.sqrt(jnp.maximum(fine, finfo(compute).tiny))  # at 0 the root has no derivative
    outside = jnp.isfinite(fine) & (jnp.isinf(square) | ~(norm <= limits.threshold))  # "not inside": a NaN c shows
    factor = jnp.where(outside, limits.target / jnp.where(outside, norm, 1.0), 1.0).astype(compute)
    return jnp.asarray(x.astype(compute) * factor, x.dtype)


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
