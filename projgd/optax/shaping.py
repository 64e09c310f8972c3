"""Shapings of the update as optax transformations, to stand between the inner optimizer and the projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from projgd import rules
from projgd.axes import Axis
from projgd.constraints import Sphere, norms_of
from projgd.optax.projection import projection
from projgd.optax.tree import LeafConstraint, Transformation, find_leaves, is_absent, map_leaves, resolve_leaf
from projgd.sums import float_type
from projgd.updates import MaxUpdate, RadialBrake, RelativeUpdate, TangentUpdate, Update


class ShapingState(NamedTuple):
    """State of a shaping.

    Attributes:
        count: the number of updates so far, for schedules.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax's own states


def relative_update(learning_rate: Any, axis: Axis = "matrix", *, flip_sign: bool = True) -> Transformation:
    """Give the update of every vector the length learning_rate · ‖w‖: u ← learning_rate · ‖w‖ · u / ‖u‖.

    It takes the place of `optax.scale_by_learning_rate`: the update of a parameter without such vectors (biases and
    gains, with the default axis) is multiplied by the learning rate.

    Args:
        learning_rate: a number, a traced array, or a schedule of the step.
        axis: what makes one vector, see `projgd.axes`; `"matrix"`, the default, is every array of two axes or more.
        flip_sign: whether the updates that come in point uphill, as those of `optax.scale_by_adam` do.

    Returns:
        An optax transformation. Its `update` needs the parameters.

    Raises:
        TypeError: an `axis` that is none; at `init`, a parameter with an integer or complex dtype.
        ValueError: at `init`, a weight vector that is zero or not finite, or an axis that a parameter does not have.

    AdamH, the Hyperball form of Adam:

    >>> import optax
    >>> from projgd import Sphere
    >>> from projgd.optax import projection
    >>> sphere = Sphere("initial", axis="matrix")
    >>> tx = optax.chain(optax.scale_by_adam(), relative_update(1e-2), projection(sphere))

    References:
        Wen, Dang, Lyu, Ma, Liang, *Hyperball*, 2026, arXiv 2606.16899.
    """
    sign = -1.0 if flip_sign else 1.0

    def rate(count: jax.Array) -> Any:
        return learning_rate(count) if callable(learning_rate) else learning_rate

    return _shaping(RelativeUpdate(axis), rate, lambda u, lr: u * jnp.asarray(sign * lr, jnp.result_type(u)), sign)


def tangent_update(axis: Axis = "matrix") -> Transformation:
    """Remove from every vector of the update what is parallel to the weights: u ← u - w · ⟨w, u⟩ / ‖w‖².

    Args:
        axis: what makes one vector, see `projgd.axes`; `"matrix"`, the default, is every array of two axes or more.

    Returns:
        An optax transformation. Its `update` needs the parameters.

    Raises:
        TypeError: an `axis` that is none; at `init`, a parameter with an integer or complex dtype.
        ValueError: at `init`, an axis that a parameter does not have.

    First in a chain, before the inner optimizer, it makes the gradients tangent, as sparse autoencoders do:

    >>> import optax
    >>> from projgd import UnitNorm
    >>> from projgd.optax import projection
    >>> tx = optax.chain(tangent_update(axis=1), optax.adam(1e-3), projection(UnitNorm(axis=1)))

    References:
        B. Heo et al., *AdamP*, ICLR 2021, arXiv 2006.08217; T. Bricken et al., *Towards Monosemanticity*, 2023.
    """
    return _shaping(TangentUpdate(axis))


def radial_brake(outward: float = 0.5, inward: float = 1.0, axis: Axis = "matrix") -> Transformation:
    """Keep only a share of what the update changes of the norm of every vector.

    w + u is rescaled to the norm ‖w‖ + share · (‖w + u‖ - ‖w‖).

    Args:
        outward: the share of an increase that is kept, from 0 to 1.
        inward: the share of a decrease that is kept, from 0 to 1.
        axis: what makes one vector, see `projgd.axes`; `"matrix"`, the default, is every array of two axes or more.

    Returns:
        An optax transformation. Its `update` needs the parameters.

    Raises:
        TypeError: an `axis` that is none; at `init`, a parameter with an integer or complex dtype.
        ValueError: a share outside of [0, 1]; at `init`, an axis that a parameter does not have.

    >>> import optax
    >>> tx = optax.chain(optax.adam(1e-3), radial_brake(outward=0.5))

    References:
        N. Abrahamsen, *Radial brake*, nilin.github.io/radial-brake, "simplest definition".
    """
    return _shaping(RadialBrake(outward, inward, axis))


def max_update(ratio: float, floor: float | None = None, axis: Axis = "matrix") -> Transformation:
    """Keep the length of the update of every vector between floor · ‖w‖ and ratio · ‖w‖.

    Args:
        ratio: the largest length over ‖w‖, a positive number.
        floor: the smallest length over ‖w‖, from 0 to `ratio`; None for no smallest length.
        axis: what makes one vector, see `projgd.axes`; `"matrix"`, the default, is every array of two axes or more.

    Returns:
        An optax transformation. Its `update` needs the parameters.

    Raises:
        TypeError: an `axis` or a `ratio` that is none; at `init`, a parameter with an integer or complex dtype.
        ValueError: a `ratio` or `floor` out of range; at `init`, a weight vector that is zero or not finite, or an axis
            that a parameter does not have.

    >>> import optax
    >>> tx = optax.chain(optax.adam(1e-3), max_update(0.01, axis="fan_in"))

    References:
        A. Brock, S. De, S. L. Smith, K. Simonyan, *High-performance large-scale image recognition without
        normalization*, ICML 2021, arXiv 2102.06171, section 4.1 (there for gradients).
    """
    return _shaping(MaxUpdate(ratio, floor, axis))


def hyperball(inner: optax.GradientTransformation, learning_rate: Any, axis: Axis = "matrix") -> Transformation:
    """Return `inner` as Hyperball: W ← R · Norm(W - η R · Norm(u)), R = ‖W₀‖, for every matrix.

    u is the direction of `inner`, and η the `learning_rate`. Make `inner` with a learning rate of 1 and without weight
    decay: the scale of its update does not matter for matrices, and biases and gains take its update times η.

    Args:
        inner: a whole optimizer with a learning rate of 1.
        learning_rate: a number, a traced array, or a schedule of the step.
        axis: what makes one vector, see `projgd.axes`; `"matrix"`, the default, is every array of two axes or more.

    Returns:
        An optax transformation. Its `update` needs the parameters.

    Raises:
        ValueError: at `init`, a matrix that starts at zero, as residual projections often do.

    Warns:
        UserWarning: at `init`, if `inner` moves matrices whose gradients are zero, as weight decay does.

    >>> import jax.numpy as jnp, optax
    >>> tx = hyperball(optax.contrib.muon(1.0), learning_rate=0.01)
    >>> params = {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}
    >>> updates, state = tx.update({"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, tx.init(params), params)
    >>> float(jnp.linalg.norm(optax.apply_updates(params, updates)["kernel"]).round(5))
    2.0

    References:
        Wen, Dang, Lyu, Ma, Liang, *Hyperball*, 2026, arXiv 2606.16899.
    """
    sphere = projection(Sphere("initial", axis))
    chained = optax.chain(inner, relative_update(learning_rate, axis, flip_sign=False), sphere)

    def init(params: Any) -> Any:
        if names := _find_decayed(inner, params, axis):
            rules.warn(
                f"the inner optimizer moves {', '.join(names)} without a gradient, as weight decay does. hyperball() "
                "fixes the norm, so decay would only shorten the rest of the update: make it with weight_decay=0"
            )
        return chained.init(params)

    return Transformation(init, chained.update)


def _shaping(
    shaping: Update,
    rate: Callable[[jax.Array], Any] = lambda count: 1.0,
    free: Callable[[jax.Array, Any], jax.Array] = lambda u, lr: u,
    sign: float = 1.0,
) -> Transformation:
    """Shape the updates of parameters in which `shaping` finds vectors, and return free(update, lr) for the others."""

    def init(params: Any) -> ShapingState:
        for p, leaf in zip(jax.tree.leaves(params, is_leaf=is_absent), _resolve(shaping, params), strict=True):
            if leaf is not None and shaping.needs_norm and not isinstance(p, jax.ShapeDtypeStruct):
                norms_of(leaf.view(p), leaf.vectors.axes, leaf.name, f"{shaping} needs one", jnp)
        return ShapingState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: ShapingState, params: Any = None, **extra: Any) -> tuple[Any, ShapingState]:
        del extra
        if params is None:
            raise ValueError("a shaping needs the parameters: call tx.update(grads, state, params)")
        lr = rate(state.count)

        def shape(u: jax.Array, p: jax.Array, leaf: LeafConstraint) -> jax.Array:
            rate = jnp.asarray(lr, float_type(p).compute) if hasattr(lr, "dtype") else lr
            shaped: jax.Array = shaping.shape(sign * leaf.view(u), leaf.view(p), rate, leaf.vectors.axes, jnp)
            return shaped.reshape(p.shape).astype(u.dtype)  # wrappers such as `optax.apply_if_finite` need the same

        shaped = map_leaves(shape, updates, params, _resolve(shaping, params), lambda u: free(u, lr))
        return shaped, ShapingState(optax.safe_increment(state.count))

    return Transformation(init, update)


def _resolve(shaping: Update, params: Any) -> list[LeafConstraint | None]:
    return [resolve_leaf(leaf, shaping) for leaf in find_leaves(params)]


def _find_decayed(inner: optax.GradientTransformation, params: Any, axis: Axis) -> list[str]:
    """Names of the matrices that `inner` moves without a gradient, found with a small tree of the same structure."""
    with jax.ensure_compile_time_eval():
        small = jax.tree.map(lambda p: jnp.ones([min(n, 2) for n in jnp.shape(p)]), params)
        try:
            updates, _ = inner.update(jax.tree.map(jnp.zeros_like, small), inner.init(small), small)
        except TypeError:  # it needs more than gradients, as `optax.polyak_sgd` does
            return []
        moves = [not is_absent(u) and bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates, is_leaf=is_absent)]
    leaves = _resolve(RelativeUpdate(axis), params)
    return [leaf.name for leaf, m in zip(leaves, moves, strict=True) if leaf and m]
