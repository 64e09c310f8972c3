"""What makes a projection fast and exact under XLA. Each trick names its reason, and the test that fails without it.

XLA adds in an order of its own, and merges the blocks of `projgd.sums.tree_sum`. Measured on a CPU, a norm errs by less
than 5 units for up to 1,000,000 entries, where `projgd.sums.guard` allows for 36 (`test_xla_sums_within_the_guard`).
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

LARGE = 2**20
"""Bytes of a parameter from which on it is worth waiting for the parameter before it."""

FAR = {"float32": 2.0**76, "float64": 2.0**560}
"""Entries this much smaller or larger have squares that do not over- or underflow."""

SHORT = {"float32": 2.0**-40, "float64": 2.0**-300}
"""Above this norm, all entries whose squares underflow change the norm by less than rounding does."""


def project_leaf(x: jax.Array, leaf: LeafConstraint, *, moved: bool = True) -> tuple[jax.Array, jax.Array | None]:
    """Project an array as `Constraint.onto` does, but subnormal numbers may become 0, as in XLA's sums.

    * One plain sum of squares serves all norms but those whose squares over- or underflow. On a CPU these vectors have
      a branch of their own, which saves a pass over the weights, and nothing else is in it, because XLA runs a branch
      on one core. Elsewhere a branch would make the device wait for the host, and XLA takes all sums in one pass
      (`test_only_a_cpu_branches`).
    * Eager arrays take no branch, because it would be compiled at every call (`test_an_eager_call_compiles_nothing`).
    * The array keeps its shape, because XLA copies what is reshaped before it writes it into the donated weights
      (`test_memory_of_a_step`). So a `Split` axis takes the reference.

    Args:
        x: the array, in the parameter's shape.
        leaf: the parameter's constraint and vectors.
        moved: whether a step has just moved the weights, as in `Constraint.onto`.

    Returns:
        The projected array; and the factors of the vectors, or None if the reference projected them.

    Raises:
        ValueError: inside `jax.shard_map`, a set that has no fast form for vectors that are split over devices.
    """
    band = leaf.constraint.band(float_type(x), _all_devices(leaf), moved)
    if band is None or band.filled is not None or leaf.vectors.shape != x.shape or not x.size:
        if leaf.over:
            raise ValueError(
                f"{leaf.name}: {leaf.constraint} in {x.dtype} cannot be split over devices in a shard_map: it does not "
                "multiply every vector by one factor. With jit and NamedSharding it can, without split_over"
            )
        return leaf.constraint.onto(leaf.view(x), leaf.vectors.axes, jnp, moved=moved).reshape(x.shape), None
    scale = partial(_scale, band=band, total=partial(_total, leaf=leaf))
    everywhere = partial(scale, run_if=lambda flag, f, *arrays: f(*arrays))
    if not isinstance(x, jax.core.Tracer):
        return everywhere(x)
    branching = partial(scale, run_if=lambda flag, f, *arrays: jax.lax.cond(flag, f, lambda *same: same, *arrays))
    scaled: tuple[jax.Array, jax.Array] = jax.lax.platform_dependent(x, cpu=branching, default=everywhere)
    return scaled


def _scale(
    x: jax.Array, band: Band, total: Callable[[jax.Array], jax.Array], run_if: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
    """Project by one sum of squares; run_if(flag, f, *arrays) is f(*arrays), and may be the arrays if flag is false.

    The branch comes before the other vectors are scaled, and what follows uses nothing of before, because XLA makes an
    array that goes through a branch only once (`test_memory_of_a_step`).
    """
    w = x.astype(float_type(x).compute)
    square = total(w * w)
    x, square = run_if(jnp.any(_shift(square, band) != 1), partial(_scale_odd, band=band, total=total), x, square)
    factor = band.factors(root(square, jnp), jnp)
    # Chosen, because XLA takes a subnormal number times 1 for 0 (`test_subnormal_entries_stay`).
    return jnp.where(factor == 1, x, (x.astype(w.dtype) * factor).astype(x.dtype)), factor


def _scale_odd(
    x: jax.Array, square: jax.Array, band: Band, total: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Project the vectors with a shift that is not 1, and set their squares to 0, so that nothing else scales them."""
    w, shift = x.astype(square.dtype), _shift(square, band)
    length = root(total((w * shift) * (w * shift)), jnp)
    norm = length / shift  # infinity, where it is larger than any number: above every band
    goal = band.goal(norm, jnp)
    moves = (shift != 1) & (length > 0) & jnp.isfinite(length) & (goal != norm)
    # Chosen anew, because XLA would hold a product that the sum has, too: a copy of the weights
    # (`test_memory_of_a_step`).
    y = w * jnp.where(moves, shift, 1) * (1 / jnp.where(moves, length, 1)) * goal
    if band.pull != 1:
        y = band.pull * y + (1 - band.pull) * w
    return jnp.where(moves, y.astype(x.dtype), x), jnp.where(shift != 1, 0, square)


def _shift(square: jax.Array, band: Band) -> jax.Array:
    """Return a power of two: times it, the squares of the entries do not over- or underflow; 1 where it is not needed.

    A norm near a band of extreme numbers is also taken apart, because its factor could over- or underflow.
    """
    far, short = FAR[str(square.dtype)], SHORT[str(square.dtype)]
    is_extreme = (band.high < short) | (band.low > 1 / short)
    is_short = (square < short**2) & (is_extreme | (band.low > 0))
    shift = jnp.where(is_short, far, jnp.where(is_extreme, 0.5, 1.0))
    return jnp.where(jnp.isinf(square), 1 / far, shift).astype(square.dtype)


def _total(x: jax.Array, leaf: LeafConstraint) -> jax.Array:
    """The sum over each vector, on all devices that it is split over."""
    within = jnp.sum(x, axis=leaf.vectors.axes, keepdims=True)
    return jax.lax.psum(within, leaf.over) if leaf.over else within  # type: ignore[no-untyped-call]


def _all_devices(leaf: LeafConstraint) -> Vectors:
    """Vectors as long as these are over all devices."""
    shape = list(leaf.vectors.shape)
    if leaf.over:
        shape[max(leaf.vectors.axes, key=shape.__getitem__)] *= jax.lax.axis_size(leaf.over)
    return Vectors(tuple(shape), leaf.vectors.axes)


@dataclass
class Turns:
    """Project one parameter after the other, so that XLA need not hold all projected points at once.

    Left alone, its scheduler on a CPU makes all of them before it uses the first: a second copy of the weights, in
    fresh memory (`test_memory_of_a_step`). A point that might depend on the factors of the parameter before cannot be
    made early. It would depend on them if their sum were negative, which does not occur. (A barrier does not help,
    because XLA drops it before it schedules.)
    """

    factor: jax.Array | None = None

    def project(self, x: jax.Array, leaf: LeafConstraint) -> jax.Array:
        """Project the next parameter, as `project_leaf` does."""
        is_large = isinstance(x, jax.core.Tracer) and x.size * x.dtype.itemsize >= LARGE
        if is_large and self.factor is not None:
            waiting = jnp.where(jnp.sum(self.factor) < 0, 0, x)
            if jax.typeof(waiting) == jax.typeof(x):  # else it depends on more mesh axes (`test_sharded_steps`)
                x = jax.lax.platform_dependent(x, waiting, cpu=lambda x, waiting: waiting, default=lambda x, waiting: x)
        y, factor = project_leaf(x, leaf)
        if is_large and factor is not None:
            self.factor = factor
        return y


def run_if(flag: jax.Array, f: Callable[[Any], Any], x: Any) -> Any:
    """Return f(x) if a flag is true, and else x with the types of f(x)."""
    if not isinstance(flag, jax.core.Tracer):  # a branch would be compiled at every call
        return f(x) if flag else x
    kinds = jax.eval_shape(f, x)
    return jax.lax.cond(flag, f, lambda x: jax.tree.map(lambda a, kind: a.astype(kind.dtype), x, kinds), x)


def reach(q: jax.Array, p: jax.Array, leaf: LeafConstraint, dtype: Any) -> jax.Array:
    """Return the update from p to q in a dtype, or to a point of the set near q where p + d cannot be q.

    Args:
        q: the projected point.
        p: the weights.
        leaf: the parameter's constraint and vectors.
        dtype: of the update.
    """

    def norm(x: jax.Array) -> jax.Array:
        norms: jax.Array = root(_total(x * x, leaf), jnp)
        return norms

    views = leaf.view(q), leaf.view(p)
    ends = leaf.constraint.rounding_interval(*views, leaf.vectors.axes, norm, jnp)
    least, most = (jnp.broadcast_to(jnp.asarray(x, q.dtype), views[0].shape).reshape(q.shape) for x in ends)
    return take_difference(q, p, least, most, dtype)


def add_update(p: Any, u: Any) -> jax.Array:
    """Return p + u as `optax.apply_updates` computes and rounds it."""
    return round_to_dtype(jnp.asarray(p + u).astype(jnp.asarray(p).dtype))


def round_to_dtype(x: jax.Array) -> jax.Array:
    """Return `x`, rounded to its dtype now.

    Inside `jit`, XLA may carry a bfloat16 or float16 on as a float32 (`test_halves_are_rounded_at_once`).
    """
    if x.dtype.itemsize > 2:
        return x
    kind = finfo(x.dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def store_update(u: jax.Array) -> jax.Array:
    """Return an update as it is when it is stored, even if it is a product.

    Inside `jit`, XLA may round -lr * g and p + (-lr * g) at once (a fused multiply-add): then p + u here and p + u in
    `optax.apply_updates` differ (`test_an_update_that_is_a_product`). A choice between two numbers, of which the
    compiler cannot know that they are equal, stands between; barriers and precision hints are dropped too early.
    """
    if not jnp.issubdtype(u.dtype, jnp.floating):
        return u
    u = round_to_dtype(u)
    largest = finfo(u.dtype).max
    return jnp.where(jnp.isinf(u), u, jnp.clip(u, -largest, largest))


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def take_difference(q: jax.Array, p: jax.Array, least: jax.Array, most: jax.Array, dtype: Any) -> jax.Array:
    """Return d with p + d = q wherever some d of `dtype` gives that, and else with p + d beside q, in the interval.

    Args:
        q: the point to reach, from `least` to `most`.
        p: the weights.
        least: the smallest value that each entry of p + d may have.
        most: the largest.
        dtype: of the difference.

    q - p rounds, and p + (q - p) rounds again. Where that is not q, it lies on one side of q, and with one step of d it
    reaches q or lies on the other side, because rounding keeps the order: d and the next d have q - p between them. So
    one of both is inside of every interval that ends at q, as a ball's does
    (`test_the_difference_is_added_without_error`, `test_a_chain_ends_in_the_set`). It is made of q and p alone, so that
    XLA holds no other copy.
    """
    wide = q.astype(dtype)
    zero = jnp.copysign(jnp.zeros_like(wide), wide)  # p = q may be infinite, and -0 + 0 is 0
    d = round_to_dtype(jnp.where(q == p, zero, wide - p.astype(dtype)))
    reached = add_update(p, d)
    towards_q = jnp.where((reached < q) == (d > 0), 1, -1)
    bits = jax.lax.bitcast_convert_type(d, f"int{8 * d.dtype.itemsize}")
    step = jnp.where((d == 0) | (reached == q), 0, towards_q).astype(bits.dtype)  # the bits before those of 0 are NaN
    next_d = jax.lax.bitcast_convert_type(bits + step, d.dtype)
    is_outside = (reached < least) | (reached > most)  # not so, if the point is NaN
    return jnp.where(is_outside | (add_update(p, next_d) == q), next_d, d)


@take_difference.defjvp
def _derivative(dtype: Any, at: tuple[Any, ...], along: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    """The derivative of q - p, which that of the bits is not (`test_a_step_has_the_derivative_of_the_formula`)."""
    return take_difference(*at, dtype), along[0].astype(dtype) - along[1].astype(dtype)
