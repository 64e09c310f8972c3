"""A check that an optimizer keeps the promise of its projection, by trying it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from projgd.optax.projection import ProjectionState, projection, resolve_at
from projgd.optax.tree import Constraints, LeafConstraint, is_absent, map_leaves
from projgd.optax.xla import project_leaf


def check_last(
    tx: optax.GradientTransformation, params: Any, constraint: Constraints, steps: int = 3, **extra: Any
) -> None:
    """Raise an error if the parameters are not in the set after `optax.apply_updates` with the updates of `tx`.

    A transformation cannot see what comes after it in a chain. So this takes a few steps that press against the
    boundary, on copies: outwards, and inwards for a set with a smallest norm or value. Call it in a test, or once
    before a long run.

    Args:
        tx: the whole optimizer, for instance `optax.chain(optax.adam(1e-3), projection(constraint))`.
        params: the parameters, or others of their structure and shapes.
        constraint: the set that the parameters are to stay in.
        steps: how many updates to try in each direction.
        **extra: what the optimizer's `update` needs besides, such as the `value` of `optax.polyak_sgd`.

    Raises:
        ValueError: a parameter ended outside; the message names it. Or a projection stands inside `schedule_free`,
            which shows only after more steps.

    >>> import jax.numpy as jnp, optax
    >>> from projgd import MaxNorm
    >>> from projgd.optax import projection
    >>> params = {"kernel": jnp.ones((4, 2))}
    >>> check_last(optax.chain(optax.adam(0.1), projection(MaxNorm(1.0))), params, MaxNorm(1.0))
    >>> check_last(optax.chain(projection(MaxNorm(1.0)), optax.adam(0.1)), params, MaxNorm(1.0))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: kernel is outside ...
    """
    outwards = jax.tree.map(lambda p: jnp.where(p < 0, -1, 1).astype(p.dtype), params)
    backwards = jax.tree.map(jnp.negative, outwards)
    far = jax.tree.map(lambda p, o: p + o * _vary(p), params, outwards)
    opposite = jax.tree.map(jnp.negative, far)  # beyond the other end of a set that is not around 0
    near = jax.tree.map(lambda x: x * 2.0**-10 / max(x.size, 1) ** 0.5, far)  # below a smallest norm
    # Steps to the boundary from anywhere in the set are rounded in many ways.
    trials = ((far, outwards), (opposite, backwards), (near, backwards), (params, outwards), (params, backwards))
    for start, towards in trials:
        _press(tx, start, towards, resolve_at(constraint, start, projection(constraint).init(start)), steps, extra)


def _press(tx: Any, start: Any, towards: Any, leaves: list[LeafConstraint | None], steps: int, extra: Any) -> None:
    """Take steps in a direction from the projection of `start`, and raise an error if one ends outside."""
    update = optax.with_extra_args_support(tx).update
    weights = _project(start, leaves)
    state = tx.init(weights)
    if any(_find(s.base_optimizer_state, ProjectionState) for s in _find(state, contrib.ScheduleFreeState)):
        raise ValueError(
            "the projection is inside of schedule_free, which adds its update to other points than it was made for: "
            "put it outside, optax.chain(schedule_free(...), projection(...))"
        )
    for step in range(steps):
        updates, state = update(jax.tree.map(jnp.negative, towards), state, weights, **extra)
        weights = optax.apply_updates(weights, updates)
        inside = jax.tree.leaves(_project(weights, leaves), is_leaf=is_absent)
        for leaf, w, q in zip(leaves, jax.tree.leaves(weights, is_leaf=is_absent), inside, strict=True):
            if leaf and not np.array_equal(w, q, equal_nan=True):
                distance = float(jnp.max(leaf.constraint.outside(leaf.view(w), leaf.vectors.axes, jnp)))
                raise ValueError(
                    f"{leaf.name} is outside {leaf.constraint} by {distance:.2g} after step {step + 1}: put the "
                    "projection last in the chain, outside of wrappers that change its update"
                )


def _project(params: Any, leaves: list[LeafConstraint | None]) -> Any:
    """Return the parameters projected by constraints that may have taken numbers from the initial weights."""
    return map_leaves(lambda w, p, leaf: project_leaf(w, leaf, moved=False)[0], params, params, leaves)


def _vary(p: Any) -> Any:
    """Return numbers from 1 to 2, so that weights that are all alike do not point where the steps press."""
    return jnp.linspace(1, 2, p.size, dtype=jnp.float32).reshape(p.shape).astype(p.dtype)


def _find(state: Any, kind: type) -> list[Any]:
    """Return the states of a kind in a tree of states."""

    def is_kind(node: Any) -> bool:
        return isinstance(node, kind)

    return list(filter(is_kind, jax.tree.leaves(state, is_leaf=is_kind)))
