"""A projection as an optax gradient transformation, the last of a chain; and in place of `optax.apply_updates`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from projgd.axes import Axis, Split, Stacked
from projgd.constraints import Constraint, MaxNorm, check_every, positive
from projgd.joint import Joint, JointSet
from projgd.optax import tree
from projgd.optax.joint import project_jointly
from projgd.optax.tree import Constraints, LeafConstraint, Schedule, SplitOver, Transformation, is_absent
from projgd.optax.xla import Turns, add_update, project_leaf, reach, round_to_dtype, run_if, store_update


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class DeclaredRules:
    """Hold what `projection(declared)` found at `init`, because not every training loop passes metadata to `update`.

    Attributes:
        rules: names and constraints; None, for the placeholder of `optax.tree_map_params`, equals all others.
    """

    rules: tuple[tuple[str, Any], ...] | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeclaredRules) and (None in (self.rules, other.rules) or self.rules == other.rules)

    def __hash__(self) -> int:
        return 0


class ProjectionState(NamedTuple):
    """State of `projection`.

    Attributes:
        count: the number of updates so far, for schedules.
        initial: what sets took from the initial weights: a tree with the structure of the parameters, None where
            nothing is taken; None if no set takes anything.
        declared: what was declared on the parameters; None but for `projection(declared)`.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax's own states
    initial: Any = None
    declared: DeclaredRules | None = None


def maxnorm_projection(
    c: Any = 4.0, axis: Axis | Any = "fan_in", split_over: SplitOver | None = None
) -> Transformation:
    """Change an update so that every neuron has ‖w‖₂ <= c after `optax.apply_updates`. Put it last in the chain.

    w ← (w + u) · min(1, c / ‖w + u‖₂)

    Args:
        c: the bound: a positive number, a traced array, or a schedule of the step.
        axis: what makes one vector; `"fan_in"` finds it from the leaf's place in the tree, see `projgd.optax.tree`. Or
            a tree of axes with the structure of the parameters, or of their upper part:
            `{"conv": (0, 1, 2), "embed": 1}`; or rules, `{"*/embedding": 1}`.
        split_over: as in `projection`.

    Returns:
        An optax transformation. Its `update` needs the parameters.

    Raises:
        TypeError: a `c` that is no number; at `init`, a constrained leaf with an integer or complex dtype.
        ValueError: a `c` that is not positive and finite; at `init`, an axis that a leaf does not have, or an axis tree
            of another structure than the parameters.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(1.0), maxnorm_projection(c=1.0))
    >>> params = {"kernel": jnp.zeros((2, 1))}
    >>> updates, _ = tx.update({"kernel": jnp.asarray([[-3.0], [-4.0]])}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].round(3)
    Array([[0.6],
           [0.8]], dtype=float32)

    References:
        N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, *Dropout: a simple way to prevent
        neural networks from overfitting*, JMLR 15, 2014, section 5.1.
    """

    def at(c: Any) -> Any:
        return jax.tree.map(lambda a: MaxNorm(c, a), axis, is_leaf=_is_axis)

    if callable(c):
        at(1.0)  # the axes are checked now, c when the schedule is called
        return projection(lambda count: at(c(count)), split_over)
    return projection(at(positive("c", c)), split_over)


def projection(
    constraint: Constraints | Schedule, split_over: SplitOver | None = None, every: int = 1
) -> Transformation:
    """Change an update so that the weights are in the set after `optax.apply_updates`. Put it last in the chain.

    Args:
        constraint: one for all parameters; rules `{pattern: constraint or None}` over names joined by `/`, where the
            first match wins and what none matches is free; a tree of constraints and None with the structure of the
            parameters or of their upper part; a function from the step (0, 1, …; traced) to one of those; or the
            function `declared`, for what the model declares itself.
        split_over: only inside `jax.shard_map`: `{pattern: mesh axis}` for the parameters whose vectors are split over
            devices. With `jit` and `NamedSharding` there is nothing to say.
        every: project at every so many updates; default 1. Between projections the weights may leave the set.

    Returns:
        An optax transformation with a `ProjectionState`. Its `update` needs the parameters.

    Raises:
        TypeError: no constraint; at `init`, a constrained leaf with an integer or complex dtype.
        ValueError: an `every` below 1; at `init`, a rule that matches nothing, a tree of another structure, an axis out
            of range, a set that does not fit a parameter.

    >>> import jax.numpy as jnp, optax
    >>> from projgd import MaxNorm, NonNegative
    >>> tx = optax.chain(optax.adam(1e-3), projection({"Conv_*/kernel": MaxNorm(3.0), "head/*": NonNegative()}))
    >>> state = tx.init({"Conv_0": {"kernel": jnp.ones((3, 3, 1, 8))}, "head": {"kernel": jnp.ones((8, 2))}})

    A bound that grows with the step:

    >>> tx = projection(lambda step: MaxNorm(jnp.minimum(1.0 + 0.01 * step, 4.0)))
    """

    check_every(every)

    def move(updates: Any, params: Any, leaves: list[LeafConstraint | None], **extra: Any) -> Any:
        turns = Turns()
        return tree.map_leaves(lambda u, p, leaf: project_update(u, p, leaf, turns.project), updates, params, leaves)

    return make_projection(move, constraint, split_over, every)


def make_projection(
    move: Callable[..., Any], constraint: Constraints | Schedule, split_over: SplitOver | None = None, every: int = 1
) -> Transformation:
    """Return a transformation that changes updates by move(updates, params, leaves, **extra arguments of `update`).

    Args:
        move: what changes a tree of updates; `leaves` are the constraints at this step, see `resolve_at`.
        constraint, split_over, every: as in `projection`.
    """
    if not tree.is_schedule(constraint):
        tree.check_constraints(constraint)

    def init(params: Any) -> ProjectionState:
        state = ProjectionState(jnp.zeros((), jnp.int32))
        arrays = jax.tree.leaves(params, is_leaf=is_absent)
        if constraint is tree.declared:
            state = state._replace(declared=DeclaredRules(tuple(tree.declared(params).items()) if arrays else None))
        if not arrays:  # `optax.tree_map_params` asks with a placeholder which parts of a state are like parameters
            sets = jax.tree.leaves(_constraints_at(state, constraint))
            takes = any(isinstance(set_, Constraint) and set_.takes_initial for set_ in sets)
            return state._replace(initial=jnp.zeros(())) if takes else state
        leaves = resolve_at(constraint, params, state, split_over)
        initial = [_take_initial(leaf, p) for p, leaf in zip(arrays, leaves, strict=True)]
        for p, leaf in zip(arrays, leaves, strict=True):
            if leaf and type(leaf.constraint).rounding_interval is Constraint.rounding_interval:
                leaf.constraint.rounding_interval(
                    p, p, leaf.vectors.axes, jnp.linalg.norm, jnp
                )  # raises the error, before any update
        taken = any(numbers is not None for numbers in initial)
        return state._replace(initial=tree.find_structure(params).unflatten(initial) if taken else None)

    def update(updates: Any, state: ProjectionState, params: Any = None, **extra: Any) -> tuple[Any, ProjectionState]:
        if params is None:
            raise ValueError("a projection needs the parameters: call tx.update(grads, state, params)")
        leaves = resolve_at(constraint, params, state, split_over)
        if every == 1:
            updates = move(updates, params, leaves, **extra)
        else:
            due = (state.count + 1) % every == 0
            updates = run_if(due, lambda u: move(u, params, leaves, **extra), updates)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return Transformation(init, update)


def resolve_at(
    constraint: Constraints | Schedule, params: Any, state: ProjectionState, split_over: SplitOver | None = None
) -> list[LeafConstraint | None]:
    """Return the constraint of every leaf at a step, with what its set took from the initial weights.

    Raises:
        TypeError, ValueError: as `projgd.optax.tree.resolve`.
    """
    leaves = tree.resolve(_constraints_at(state, constraint), params, split_over)
    if state.initial is None:
        return leaves
    initial = tree.find_structure(params).flatten_up_to(state.initial)
    return [
        leaf if leaf is None or numbers is None else dataclasses.replace(leaf, constraint=leaf.constraint.bind(numbers))
        for leaf, numbers in zip(leaves, initial, strict=True)
    ]


def _constraints_at(state: ProjectionState, constraint: Constraints | Schedule) -> Constraints:
    if state.declared is not None and state.declared.rules:
        return dict(state.declared.rules)
    return constraint(state.count) if tree.is_schedule(constraint) else constraint


def _take_initial(leaf: LeafConstraint | None, p: Any) -> Any:
    """Return what a set takes from an initial parameter; its shape, if the parameter is a `jax.ShapeDtypeStruct`."""
    if leaf is None:
        return None

    def take(p: Any) -> Any:
        return leaf.constraint.initial(leaf.view(p), leaf.vectors.axes, leaf.name, jnp)

    return jax.eval_shape(take, p) if isinstance(p, jax.ShapeDtypeStruct) else take(jnp.asarray(p))


def project_update(
    u: jax.Array, p: jax.Array, leaf: LeafConstraint, project: Callable[[jax.Array, LeafConstraint], jax.Array]
) -> jax.Array:
    """Return the update that `optax.apply_updates` takes from p to project(p + u, leaf), rounding included."""
    q = round_to_dtype(project(add_update(p, store_update(u)), leaf))
    return reach(q, p, leaf, jnp.promote_types(u.dtype, p.dtype))


def apply_updates(
    params: Any,
    updates: Any,
    constraint: Constraints | None = None,
    split_over: SplitOver | None = None,
    joint: Sequence[Joint | JointSet] = (),
    max_logits: Any = None,
) -> Any:
    """Add the updates as `optax.apply_updates` does, then project; in place if a jitted step donates the parameters.

    Use it instead of a projection in the chain where speed or memory matter: the chain has to take a difference that
    `optax.apply_updates` adds again.

    Args:
        params: a tree of parameters.
        updates: a tree of the same structure, as an optax optimizer returns it.
        constraint: what `projection` takes, but a function of the step: call that yourself. None, beside `joint`,
            leaves the single parameters free.
        split_over: as in `projection`.
        joint: sets over several arrays, applied after the others, as in `joint_projection`.
        max_logits: the largest logits for `QKClip`, as in `joint_projection`.

    Returns:
        A tree like `params`.

    Raises:
        TypeError: no constraint, or a constrained leaf with an integer or complex dtype.
        ValueError: trees of different structures, or constraints that do not fit the parameters.

    >>> import jax, jax.numpy as jnp
    >>> from projgd import MaxNorm
    >>> params = {"kernel": jnp.zeros((2, 1)), "bias": jnp.zeros(1)}
    >>> updates = {"kernel": jnp.asarray([[3.0], [4.0]]), "bias": jnp.ones(1)}
    >>> jax.tree.map(lambda p: p.round(3), apply_updates(params, updates, MaxNorm(1.0)))
    {'bias': Array([1.], dtype=float32), 'kernel': Array([[0.6],
           [0.8]], dtype=float32)}
    """
    tree.check_structure(updates, params)

    def one(p: Any, u: Any, leaf: LeafConstraint | None) -> Any:
        if is_absent(p) or is_absent(u):
            return p
        return project_leaf(add_update(p, u), leaf)[0] if leaf else add_update(p, u)

    rules = {"*": None} if constraint is None and joint else constraint
    leaves = tree.find_structure(params).unflatten(tree.resolve(rules, params, split_over))
    moved = jax.tree.map(one, params, updates, leaves, is_leaf=is_absent)
    return project_jointly(moved, joint, max_logits) if joint else moved


def project(params: Any, constraint: Constraints) -> Any:
    """Move every parameter to its nearest point in the set: initial weights, or averaged ones before an evaluation.

    Args:
        params: a tree of parameters.
        constraint: what `projection` takes, but a function of the step: call that yourself.

    Returns:
        A tree like `params`.

    Raises:
        TypeError: no constraint, or a constrained leaf with an integer or complex dtype.
        ValueError: constraints that do not fit the parameters.

    >>> import jax.numpy as jnp
    >>> from projgd import MaxNorm
    >>> project({"kernel": jnp.asarray([[3.0], [4.0]]), "bias": jnp.ones(1)}, MaxNorm(1.0))["kernel"].round(3)
    Array([[0.6],
           [0.8]], dtype=float32)
    """

    def one(p: Any, leaf: LeafConstraint | None) -> Any:
        return project_leaf(jnp.asarray(p), leaf, moved=False)[0] if leaf else p

    leaves = tree.find_structure(params).unflatten(tree.resolve(constraint, params))
    return jax.tree.map(one, params, leaves, is_leaf=is_absent)


def _is_axis(axis: Any) -> bool:
    """Whether `axis` is one axis setting, not a tree of them."""
    ints = axis if isinstance(axis, (tuple, list)) else (axis,)
    return axis is None or isinstance(axis, (str, Split, Stacked)) or all(hasattr(a, "__index__") for a in ints)
