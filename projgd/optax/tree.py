"""The constraint of each parameter: one for all, rules over names, or a tree of constraints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from projgd import axes, rules
from projgd.axes import Vectors
from projgd.constraints import Constraint
from projgd.optax.layouts import Leaf, absent, leaves
from projgd.sums import float_type
from projgd.updates import Update

Constraints = Constraint | rules.Rules | Any
"""A constraint; rules {pattern: constraint or None}; or a tree of constraints and None (free) with the structure of
the parameters or of their upper part."""


@dataclass(frozen=True)
class LeafConstraint:
    """A constraint, or a shaping of updates, resolved for one parameter.

    Attributes:
        name: of the parameter, keys joined by "/".
        constraint: the set, or the shaping.
        vectors: the vectors that it is about in this parameter.
        over: the mesh axes that the vectors are split over, inside `jax.shard_map`.
    """

    name: str
    constraint: Any
    vectors: Vectors
    over: tuple[str, ...] = ()


SplitOver = Mapping[str, str | tuple[str, ...]]
"""Inside `jax.shard_map`: rules {pattern: mesh axis or axes} for the parameters whose vectors those axes split."""


def check(constraints: Constraints) -> None:
    """Refuse what can be no `Constraints` of any parameters."""
    found = jax.tree_util.tree_flatten_with_path(constraints, is_leaf=_is_none)[0]
    for path, value in found:
        if not isinstance(value, Constraint) and (value is not None or not path):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"{value!r}{where and f' at {where!r}'} is no constraint: pass one such as MaxNorm(4.0), rules such as "
                "{'Dense_*/kernel': MaxNorm(4.0)}, or a tree of constraints and None"
            )


def resolve(constraints: Constraints, params: Any, split_over: SplitOver | None = None) -> list[LeafConstraint | None]:
    """Return the constraint of every leaf of `params`, in JAX's order; None where it is free.

    A mapping from strings to constraints is read as rules, unless its keys are just those at the top of `params`.

    Raises:
        TypeError: a constrained leaf with an integer or complex dtype.
        ValueError: a rule that matches nothing, only what others before it take, or nothing with a fan-in; a tree of
            another structure, an axis that a leaf does not have, a bare 1-D array under a fan-in constraint.

    >>> import jax.numpy as jnp
    >>> from projgd import MaxNorm
    >>> params = {"Dense_0": {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2))}}
    >>> [leaf and leaf.vectors for leaf in resolve({"*": MaxNorm(4.0)}, params)]
    [None, Vectors(shape=(4, 2), axes=(0,))]
    """
    check(constraints)
    found = leaves(params)
    if _is_rules(constraints, params):
        names = [leaf.name for leaf in found if leaf]
        chosen = rules.assign(constraints, names)
        each = [chosen[leaf.name] if leaf else None for leaf in found]
    else:
        each = _spread(constraints, params)
    if isinstance(constraints, Constraint) and found and found[0] and not found[0].name:
        _refuse_flat(constraints, found[0])
    over = rules.first_match(split_over or {}, [leaf.name for leaf in found if leaf])
    resolved = [_resolve(leaf, constraint, over) for leaf, constraint in zip(found, each, strict=True)]
    if _is_rules(constraints, params):
        rules.refuse_idle(constraints, {leaf.name: bool(r) for leaf, r in zip(found, resolved, strict=True) if leaf})
    return resolved


def _resolve(leaf: Leaf | None, constraint: Constraint | None, over: Mapping[str, Any]) -> LeafConstraint | None:
    vectors = vectors_of(leaf, constraint) if leaf and constraint else None
    if leaf is None or constraint is None or vectors is None:
        return None
    mesh_axes = over[leaf.name] or ()
    split = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)
    if not split or not vectors.axes:  # entries on their own need no other device
        return LeafConstraint(leaf.name, constraint, vectors)
    if constraint.takes_initial or vectors.shape != jnp.shape(leaf.array):
        raise ValueError(
            f"{leaf.name}: {constraint} cannot be split over the mesh axes {split} of a shard_map, only a set of norms "
            "that are known at the start, and no Split axis. With jit and NamedSharding any set can, without split_over"
        )
    return LeafConstraint(leaf.name, constraint, vectors, split)


def vectors_of(leaf: Leaf, constraint: Constraint | Update) -> Vectors | None:
    """Return the vectors that a constraint or a shaping is about in a parameter; None where it has none."""
    shape = tuple(jnp.shape(leaf.array))
    if constraint.axis == "fan_in":
        vectors = axes.resolve(leaf.fan_in, shape, "out_last", leaf.name) if leaf.fan_in else None
    else:
        vectors = constraint.resolve(shape, "out_last", leaf.name)
    if vectors:
        float_type(jnp.asarray(leaf.array), leaf.name)
    return vectors


def _spread(constraints: Any, params: Any) -> list[Constraint | None]:
    """The constraint of every leaf, from a tree whose leaves stand for all that is below them in `params`."""
    try:
        tree = jax.tree.broadcast(constraints, params, is_leaf=absent)
    except ValueError as error:
        raise ValueError(f"the tree of constraints does not have the structure of the parameters: {error}") from None
    return jax.tree.leaves(tree, is_leaf=absent)  # None, free, and what holds no parameter


def _is_rules(constraints: Any, params: Any) -> TypeGuard[rules.Rules]:
    if not isinstance(constraints, Mapping) or not constraints:
        return False
    flat = all(isinstance(key, str) for key in constraints) and all(
        value is None or isinstance(value, Constraint) for value in constraints.values()
    )
    return flat and not (hasattr(params, "keys") and set(params.keys()) == set(constraints))


def _is_none(node: Any) -> bool:
    return node is None


def _refuse_flat(constraint: Constraint, leaf: Leaf) -> None:
    if constraint.axis == "fan_in" and len(jnp.shape(leaf.array)) == 1:
        raise ValueError(
            f"the parameters are one bare array of shape {jnp.shape(leaf.array)}, which has no fan-in. Inside "
            "optax.flatten a projection cannot see the neurons: chain(flatten(inner), projection(...)) does; "
            "axis=None makes the whole array one vector"
        )
