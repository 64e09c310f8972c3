"""A projection as an optax gradient transformation, the last of a chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from projgd.axes import Axis, Split
from projgd.constraints import MaxNorm, positive
from projgd.optax.layouts import absent
from projgd.optax.tree import Constraints, LeafConstraint, SplitOver, check, resolve
from projgd.optax.xla import Turns, add, as_stored, difference, project_leaf, rounded


class ProjectionState(NamedTuple):
    """State of `projection`: the number of updates so far, for schedules; what sets took from the initial weights."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax's own states
    initial: Any = None  # a tree with the structure of the parameters, None where nothing is taken; None without any


def maxnorm_projection(
    c: Any = 4.0, axis: Axis | Any = "fan_in", split_over: SplitOver | None = None
) -> optax.GradientTransformationExtraArgs:
    """Change an update so that `optax.apply_updates` lands where every neuron has ‖w‖₂ ≤ c. Put it last in the chain.

    Args:
        c: the bound: a positive number, a traced array, or a schedule of the step.
        axis: what makes one vector; `"fan_in"` finds it from the leaf's place in the tree, see
            `projgd.optax.layouts`. Or a tree of axes with the structure of the parameters, or of their upper part:
            `{"conv": (0, 1, 2), "embed": 1}`; or rules, `{"*/embedding": 1}`.
        split_over: as in `projection`.

    Raises:
        TypeError, ValueError: a `c` that is no positive number; at `init`, a leaf that cannot be constrained, or an
            axis tree of another structure than the parameters.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(1.0), maxnorm_projection(c=1.0))
    >>> params = {"kernel": jnp.zeros((2, 1))}
    >>> updates, _ = tx.update({"kernel": jnp.asarray([[-3.0], [-4.0]])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].round(3)
    Array([[0.6],
           [0.8]], dtype=float32)
    """

    def at(c: Any) -> Any:
        return jax.tree.map(lambda a: MaxNorm(c, a), axis, is_leaf=_is_axis)

    if callable(c):
        at(1.0)  # the axes are checked now, c when the schedule is called
        return projection(lambda count: at(c(count)), split_over)
    return projection(at(positive("c", c)), split_over)


def projection(
    constraint: Constraints | Callable[[Any], Constraints], split_over: SplitOver | None = None
) -> optax.GradientTransformationExtraArgs:
    """Change an update so that `optax.apply_updates` lands in the set. Put it last in the chain.

    Args:
        constraint: one for all parameters; rules `{pattern: constraint or None}` over names joined by `/`, where the
            first match wins and what none matches is free; a tree of constraints and None with the structure of the
            parameters or of their upper part; or a function from the step (0, 1, …; traced) to one of those.
        split_over: only inside `jax.shard_map`: `{pattern: mesh axis}` for the parameters whose vectors are split over
            devices. With `jit` and `NamedSharding` there is nothing to say.

    Raises:
        TypeError: no constraint; at `init`, a constrained leaf with an integer or complex dtype.
        ValueError: at `init`, a rule that matches nothing, a tree of another structure, an axis out of range.

    >>> import jax.numpy as jnp, optax
    >>> from projgd import MaxNorm, NonNegative
    >>> tx = optax.chain(optax.adam(1e-3), projection({"Conv_*/kernel": MaxNorm(3.0), "head/*": NonNegative()}))
    >>> state = tx.init({"Conv_0": {"kernel": jnp.ones((3, 3, 1, 8))}, "head": {"kernel": jnp.ones((8, 2))}})

    A bound that grows with the step:

    >>> tx = projection(lambda step: MaxNorm(jnp.minimum(1.0 + 0.01 * step, 4.0)))
    """
    if not callable(constraint):
        check(constraint)
    at = constraint if callable(constraint) else lambda count: constraint

    def init(params: Any) -> ProjectionState:
        count = jnp.zeros((), jnp.int32)
        constraints = resolve(at(count), params, split_over)
        arrays = jax.tree.leaves(params, is_leaf=absent)
        initial = [leaf and _initial(p, leaf) for p, leaf in zip(arrays, constraints, strict=True)]
        taken = any(i is not None for i in initial)
        return ProjectionState(count, _structure(params).unflatten(initial) if taken else None)

    def update(updates: Any, state: ProjectionState, params: Any = None, **extra: Any) -> tuple[Any, ProjectionState]:
        del extra
        if params is None:
            raise ValueError("a projection needs the parameters: call tx.update(grads, state, params)")
        constraints = bind(resolve(at(state.count), params, split_over), params, state)
        projected = map_leaves(partial(_project_update, Turns()), updates, params, constraints)
        return projected, ProjectionState(optax.safe_increment(state.count), state.initial)

    return optax.GradientTransformationExtraArgs(init, update)


def apply_updates(params: Any, updates: Any, constraint: Constraints, split_over: SplitOver | None = None) -> Any:
    """`optax.apply_updates`, then the projection, in place where the parameters are donated to a jitted step.

    Use it instead of a projection in the chain where speed or memory matter: there, a difference has to be taken that
    `optax.apply_updates` adds again.

    Args:
        params: a tree of parameters.
        updates: a tree of the same structure, as an optax optimizer returns it.
        constraint: what `projection` takes, but a function of the step: call that yourself.
        split_over: as in `projection`.

    Returns:
        A tree like `params`.

    >>> import jax, jax.numpy as jnp
    >>> from projgd import MaxNorm
    >>> params = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
    >>> updates = {"kernel": jnp.asarray([[3.0], [4.0]]), "bias": jnp.ones(1)}
    >>> jax.tree.map(lambda p: p.round(3), apply_updates(params, updates, MaxNorm(1.0)))
    {'bias': Array([1.], dtype=float32), 'kernel': Array([[0.6],
           [0.8]], dtype=float32)}
    """

    _check_structure(updates, params)
    moved = jax.tree.map(lambda p, u: p if absent(p) or absent(u) else add(p, u), params, updates, is_leaf=absent)
    still = [absent(u) for u in jax.tree.leaves(updates, is_leaf=absent)]
    constraints = resolve(constraint, params, split_over)
    return _project_all(moved, [None if s else leaf for s, leaf in zip(still, constraints, strict=True)], moved=True)


def project(params: Any, constraint: Constraints) -> Any:
    """Every parameter at its nearest point in the set: for initial weights, or averaged ones before an evaluation.

    >>> import jax.numpy as jnp
    >>> from projgd import MaxNorm
    >>> project({"kernel": jnp.asarray([[3.0], [4.0]]), "bias": jnp.ones(1)}, MaxNorm(1.0))["kernel"].round(3)
    Array([[0.6],
           [0.8]], dtype=float32)
    """

    return _project_all(params, resolve(constraint, params), moved=False)


def _project_all(params: Any, constraints: list[LeafConstraint | None], moved: bool) -> Any:
    of_leaf = _structure(params).unflatten(constraints)

    def one(p: Any, leaf: LeafConstraint | None) -> Any:
        return project_leaf(jnp.asarray(p), leaf, moved=moved).x if leaf else p

    return jax.tree.map(one, params, of_leaf, is_leaf=absent)


def _initial(p: Any, leaf: LeafConstraint) -> jax.Array | None:
    x = jnp.asarray(p).reshape(leaf.vectors.shape)
    taken: jax.Array | None = leaf.constraint.initial(x, leaf.vectors.axes, leaf.name, jnp)
    return taken


def bind(constraints: list[LeafConstraint | None], params: Any, state: ProjectionState) -> list[LeafConstraint | None]:
    """Return the constraints with what their sets took from the initial weights."""
    if state.initial is None:
        return constraints
    initial = _structure(params).flatten_up_to(state.initial)
    return [
        leaf if leaf is None or i is None else dataclasses.replace(leaf, constraint=leaf.constraint.bind(i))
        for leaf, i in zip(constraints, initial, strict=True)
    ]


def map_leaves(f: Callable[[Any, Any, Any], Any], updates: Any, params: Any, leaves: Sequence[Any]) -> Any:
    """Return `updates` with f(update, parameter, leaf) for the leaves that are not None.

    Raises:
        ValueError: updates of another structure or shape than the parameters.
    """

    def one(u: Any, p: Any, leaf: Any) -> Any:
        if leaf is None or absent(u) or absent(p):
            return u
        if jnp.shape(u) != jnp.shape(p):
            raise ValueError(f"{leaf.name} has shape {jnp.shape(p)}, but its update has {jnp.shape(u)}")
        return f(u, p, leaf)

    _check_structure(updates, params)
    return jax.tree.map(one, updates, params, _structure(params).unflatten(leaves), is_leaf=absent)


def _check_structure(updates: Any, params: Any) -> None:
    of_updates, of_params = _structure(updates), _structure(params)
    if of_updates != of_params:
        raise ValueError(f"updates and params are different trees: {of_updates} and {of_params}")


def _structure(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=absent)


def _is_axis(axis: Any) -> bool:
    """Whether `axis` is one axis setting, not a tree of them."""
    ints = axis if isinstance(axis, (tuple, list)) else (axis,)
    return axis is None or isinstance(axis, (str, Split)) or all(hasattr(a, "__index__") for a in ints)


def _project_update(turns: Turns, u: jax.Array, p: jax.Array, leaf: LeafConstraint) -> jax.Array:
    """The update that `optax.apply_updates` takes from p to the projection of p + u, rounding included."""
    q = rounded(turns.project(add(p, as_stored(u)), leaf))
    return difference(q, p, jnp.promote_types(u.dtype, p.dtype))
