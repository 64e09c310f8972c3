"""Whether an optimizer keeps a projection's promise, found out by trying."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from projgd.optax.layouts import absent
from projgd.optax.projection import ProjectionState, project
from projgd.optax.tree import Constraints, resolve


def check_last(tx: optax.GradientTransformation, params: Any, constraint: Constraints, steps: int = 3) -> None:
    """Raise if `optax.apply_updates` with the updates of `tx` does not land in the set.

    A transformation cannot see what comes after it in a chain. So this takes a few steps that press outwards from the
    boundary, on copies: for a test, or once before a long run.

    Args:
        tx: the whole optimizer, for instance `optax.chain(optax.adam(1e-3), projection(constraint))`.
        params: the parameters, or others of their structure and shapes.
        constraint: what `tx` is expected to keep.
        steps: how many updates to try.

    Raises:
        ValueError: a parameter ended outside; it is named. Or a projection stands inside `schedule_free`, of which the
            first steps do not tell.

    >>> import jax.numpy as jnp, optax
    >>> from projgd import MaxNorm
    >>> from projgd.optax import projection
    >>> params = {"kernel": jnp.ones((4, 2))}
    >>> check_last(optax.chain(optax.adam(0.1), projection(MaxNorm(1.0))), params, MaxNorm(1.0))
    >>> check_last(optax.chain(projection(MaxNorm(1.0)), optax.adam(0.1)), params, MaxNorm(1.0))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: kernel is outside ...
    """
    constraints = resolve(constraint, params)
    outwards = jax.tree.map(
        lambda p: p if absent(p) else jnp.where(p < 0, -1, 1).astype(p.dtype), params, is_leaf=absent
    )
    weights = project(jax.tree.map(lambda p, o: p + o, params, outwards), constraint)
    state = tx.init(weights)
    inner = jax.tree.leaves(state, is_leaf=_is_schedule_free)
    if any(_is_schedule_free(s) and _projects(s.base_optimizer_state) for s in inner):
        raise ValueError(
            "the projection is inside of schedule_free, which adds its update to other points than it was made for: "
            "put it outside, optax.chain(schedule_free(...), projection(...))"
        )
    pressing = jax.tree.map(jnp.negative, outwards)
    for step in range(steps):
        updates, state = tx.update(pressing, state, weights)
        weights = optax.apply_updates(weights, updates)
        for leaf, w in zip(constraints, jax.tree.leaves(weights, is_leaf=absent), strict=True):
            if leaf is None:
                continue
            x = w.reshape(leaf.vectors.shape)
            moved = leaf.constraint.onto(x, leaf.vectors.axes, jnp)
            if not np.array_equal(moved, x, equal_nan=True):
                far = float(jnp.max(leaf.constraint.outside(x, leaf.vectors.axes, jnp)))
                raise ValueError(
                    f"{leaf.name} is outside {leaf.constraint} by {far:.2g} after step {step + 1}: put the "
                    "projection last in the chain, outside of wrappers that change its update"
                )


def _is_schedule_free(state: Any) -> bool:
    return isinstance(state, contrib.ScheduleFreeState)


def _projects(state: Any) -> bool:
    def is_projection(node: Any) -> bool:
        return isinstance(node, ProjectionState)

    return any(map(is_projection, jax.tree.leaves(state, is_leaf=is_projection)))
