"""Shapings of the update as optax transformations, to stand between the inner optimizer and the projection."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from projgd.axes import Axis, Vectors
from projgd.constraints import Sphere, norms_of
from projgd.optax.layouts import absent, leaves
from projgd.optax.projection import map_leaves, projection
from projgd.optax.tree import LeafConstraint, vectors_of
from projgd.updates import MaxUpdate, RadialBrake, RelativeUpdate, TangentUpdate, Update


class ShapingState(NamedTuple):
    """State of a shaping: the number of updates so far, for schedules."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax's own states


def relative_update(
    learning_rate: Any, axis: Axis = "matrix", *, flip_sign: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Give the update of every vector the length learning_rate · ‖w‖: `RelativeUpdate`.

    It takes the place of `optax.scale_by_learning_rate`: what has no such vector (biases and gains, with the default
    axis) is multiplied by the learning rate.

    Args:
        learning_rate: a number, a traced array, or a schedule of the step.
        axis: what makes one vector; `"matrix"`, every array of two axes or more.
        flip_sign: whether the updates that come in point uphill, as those of `optax.scale_by_adam` do.

    Raises:
        TypeError, ValueError: at `init`, a weight vector without a norm, an axis that a parameter does not have.

    AdamH, the Hyperball form of Adam (Wen et al. 2026, arXiv 2606.16899):

    >>> import optax
    >>> from projgd import Sphere
    >>> from projgd.optax import projection
    >>> ball = Sphere("initial", axis="matrix")
    >>> tx = optax.chain(optax.scale_by_adam(), relative_update(1e-2), projection(ball))
    """
    sign = -1.0 if flip_sign else 1.0

    def rate(count: jax.Array) -> Any:
        return learning_rate(count) if callable(learning_rate) else learning_rate

    return _shaping(RelativeUpdate(axis), rate, lambda u, lr: u * jnp.asarray(sign * lr, u.dtype), sign)


def tangent_update(axis: Axis = "matrix") -> optax.GradientTransformationExtraArgs:
    """Remove from every vector of the update what is parallel to the weights: `TangentUpdate`.

    First in a chain, before the inner optimizer, it makes the gradients tangent, as sparse autoencoders do:

    >>> import optax
    >>> from projgd import UnitNorm
    >>> from projgd.optax import projection
    >>> tx = optax.chain(tangent_update(axis=1), optax.adam(1e-3), projection(UnitNorm(axis=1)))
    """
    return _shaping(TangentUpdate(axis))


def radial_brake(
    outward: float = 0.5, inward: float = 1.0, axis: Axis = "matrix"
) -> optax.GradientTransformationExtraArgs:
    """Keep only a share of what the update changes of the norm of every vector: `RadialBrake`.

    >>> import optax
    >>> tx = optax.chain(optax.adam(1e-3), radial_brake(outward=0.5))
    """
    return _shaping(RadialBrake(outward, inward, axis))


def max_update(
    ratio: float, floor: float | None = None, axis: Axis = "matrix"
) -> optax.GradientTransformationExtraArgs:
    """Keep the update of every vector between floor · ‖w‖ and ratio · ‖w‖: `MaxUpdate`.

    >>> import optax
    >>> tx = optax.chain(optax.adam(1e-3), max_update(0.01, axis="fan_in"))
    """
    return _shaping(MaxUpdate(ratio, floor, axis))


def hyperball(
    inner: optax.GradientTransformation, learning_rate: Any, axis: Axis = "matrix"
) -> optax.GradientTransformationExtraArgs:
    """`inner` as Hyperball: W ← R · Norm(W - η R · Norm(u)), R = ‖W₀‖, for every matrix; `inner` itself for the rest.

    u is the direction of `inner` and η the `learning_rate`, a number or a schedule (Wen, Dang, Lyu, Ma, Liang 2026,
    arXiv 2606.16899). Make `inner` with a learning rate of 1 and without weight decay: the scale of its update does not
    matter for matrices, and biases and gains take its update times `learning_rate`.

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
    """
    sphere = projection(Sphere("initial", axis))
    chained = optax.chain(inner, relative_update(learning_rate, axis, flip_sign=False), sphere)

    def init(params: Any) -> Any:
        if decayed := _decayed(inner, params, axis):
            warnings.warn(
                f"the inner optimizer moves {', '.join(decayed)} without a gradient, as weight decay does. hyperball() "
                "fixes the norm, so decay would only shorten the rest of the update: make it with weight_decay=0",
                stacklevel=2,
            )
        return chained.init(params)

    return optax.GradientTransformationExtraArgs(init, chained.update)


def _shaping(
    shaping: Update,
    rate: Callable[[jax.Array], Any] = lambda count: 1.0,
    elsewhere: Callable[[jax.Array, Any], jax.Array] = lambda u, lr: u,
    sign: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Shape where `shaping` finds vectors, and do `elsewhere(update, lr)` where it finds none."""

    def init(params: Any) -> ShapingState:
        arrays = jax.tree.leaves(params, is_leaf=absent)
        for array, leaf in zip(arrays, _resolve(shaping, params), strict=True):
            if leaf is not None and shaping.needs_norm:
                x = jnp.asarray(array).reshape(leaf.vectors.shape)
                norms_of(x, leaf.vectors.axes, leaf.name, f"{shaping} needs one", jnp)
        return ShapingState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: ShapingState, params: Any = None, **extra: Any) -> tuple[Any, ShapingState]:
        del extra
        if params is None:
            raise ValueError("a shaping needs the parameters: call tx.update(grads, state, params)")
        lr = rate(state.count)

        def shape(u: Any, p: Any, leaf: LeafConstraint) -> Any:
            shape, axes = leaf.vectors.shape, leaf.vectors.axes
            return shaping.shape(sign * u.reshape(shape), p.reshape(shape), lr, axes, jnp).reshape(p.shape)

        found = _resolve(shaping, params)
        free = [None if leaf else LeafConstraint("", shaping, Vectors((), ())) for leaf in found]
        shaped = map_leaves(shape, updates, params, found)
        shaped = map_leaves(lambda u, p, leaf: elsewhere(u, lr), shaped, params, free)
        return shaped, ShapingState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _resolve(shaping: Update, params: Any) -> list[LeafConstraint | None]:
    found = []
    for leaf in leaves(params):
        vectors = None if leaf is None else vectors_of(leaf, shaping)
        found.append(LeafConstraint(leaf.name, shaping, vectors) if leaf is not None and vectors else None)
    return found


def _decayed(inner: optax.GradientTransformation, params: Any, axis: Axis) -> list[str]:
    """Names of the parameters that `inner` moves without a gradient; asked of a small tree of the same structure."""
    with jax.ensure_compile_time_eval():
        small = jax.tree.map(
            lambda p: p if absent(p) else jnp.ones([min(n, 2) for n in jnp.shape(p)]), params, is_leaf=absent
        )
        updates, _ = inner.update(jax.tree.map(jnp.zeros_like, small), inner.init(small), small)
        moved = [not absent(u) and bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates, is_leaf=absent)]
    found = _resolve(RelativeUpdate(axis), params)
    return [leaf.name for leaf, m in zip(found, moved, strict=True) if leaf and m]
