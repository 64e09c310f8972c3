"""A projection as an optax gradient transformation, the last of a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from projgd import projections
from projgd.axes import Axis, Split
from projgd.constraints import Constraint, MaxNorm, positive

Schedule = Callable[[jax.Array], Any]


class ProjectionState(NamedTuple):
    """State of `projection`: the number of updates so far, for schedules."""

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count, as in optax's own states


def maxnorm_projection(c: Any = 4.0, axis: Axis | Any = "fan_in") -> optax.GradientTransformationExtraArgs:
    """Change an update so that `optax.apply_updates` lands where every neuron has ‖w‖₂ ≤ c. Put it last in the chain.

    Args:
        c: the bound: a positive number, a traced array, or a schedule of the step.
        axis: what makes one vector; `"fan_in"` reads (*kernel, in, out), all axes but the last. Or a tree of those with
            the structure of the parameters, or of their upper part: `{"conv": (0, 1, 2), "embed": 1}`.

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
        return _transformation(lambda count: at(c(count)))
    constraints = at(positive("c", c))
    return _transformation(lambda count: constraints)


def projection(constraint: Constraint) -> optax.GradientTransformationExtraArgs:
    """Change an update so that `optax.apply_updates` lands in the set. Put it last in the chain.

    >>> import optax
    >>> from projgd import NonNegative
    >>> tx = optax.chain(optax.adam(1e-3), projection(NonNegative()))
    """
    if not isinstance(constraint, Constraint):
        raise TypeError(f"{constraint!r} is no constraint: pass one such as MaxNorm(4.0)")
    return _transformation(lambda count: constraint)


def _transformation(constraints_at: Callable[[jax.Array], Any]) -> optax.GradientTransformationExtraArgs:
    """The transformation for one constraint, or a tree of them (None: free) with the upper structure of the params."""

    def init(params: Any) -> ProjectionState:
        count = jnp.zeros((), jnp.int32)
        jax.tree_util.tree_map_with_path(_check, params, _spread(constraints_at(count), params))
        return ProjectionState(count)

    def update(updates: Any, state: ProjectionState, params: Any = None, **extra: Any) -> tuple[Any, ProjectionState]:
        del extra
        if params is None:
            raise ValueError("a projection needs the parameters: call tx.update(grads, state, params)")
        projected = jax.tree.map(
            lambda u, p, constraint: u if any(map(_absent, (u, p, constraint))) else _project_update(u, p, constraint),
            updates,
            params,
            _spread(constraints_at(state.count), params),
            is_leaf=_absent,
        )
        return projected, ProjectionState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _spread(constraints: Any, params: Any) -> Any:
    """A constraint for every leaf of `params`."""
    return jax.tree.broadcast(constraints, params, is_leaf=lambda x: x is None)


def _check(path: Any, p: Any, constraint: Constraint | None) -> None:
    if constraint is not None:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        projections.float_type(jnp.asarray(p), name)
        constraint.resolve(p.shape, "out_last", name)


def _is_axis(axis: Any) -> bool:
    """Whether `axis` is one axis setting, not a tree of them."""
    ints = axis if isinstance(axis, (tuple, list)) else (axis,)
    return axis is None or isinstance(axis, (str, Split)) or all(hasattr(a, "__index__") for a in ints)


def _absent(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _project_update(u: jax.Array, p: jax.Array, constraint: Constraint) -> jax.Array:
    """The update that `optax.apply_updates` takes from p to the projection of p + u, rounding included."""
    vectors = constraint.resolve(p.shape, "out_last")
    if vectors is None:
        return u
    landing = _apply(p, u)
    q = constraint.onto(landing.reshape(vectors.shape), vectors.axes, jnp).reshape(p.shape)
    u = u.astype(jnp.promote_types(u.dtype, p.dtype))
    return jnp.where((q == landing) | jnp.isnan(q), u, _difference(q, p, u.dtype))


def _apply(p: jax.Array, u: jax.Array) -> jax.Array:
    """p + u as `optax.apply_updates` computes and rounds it."""
    return jnp.asarray(p + u).astype(p.dtype)


def _difference(q: jax.Array, p: jax.Array, dtype: Any) -> jax.Array:
    """u with |p + u| ≤ |q| entry by entry, as near to q as dtype allows: q itself whenever p is not far larger.

    q - p rounds, and p + (q - p) rounds again; where that ends beyond q, one step back is enough, or -p, which ends
    at 0.
    """
    u = q.astype(dtype) - p.astype(dtype)
    inward = jnp.where(q > 0, -jnp.inf, jnp.inf).astype(dtype)
    for nearer in (jnp.nextafter(u, inward), -p.astype(dtype)):
        u = jnp.where(jnp.abs(_apply(p, u)) > jnp.abs(q), nearer, u)
    return u
