"""Parameter trees: the name of each leaf, which of its axes make one neuron, and the constraint that a rule gives it.

A neuron's fan-in is every weight that an output unit, before its activation, depends on. What a tree tells about it:

* *An equinox module or nnx module* is itself a node of the tree: its type and attributes settle the layout.
* *A dict (linen, nnx's `State`, plain)* has names: `bias` and `scale` are free, `embedding` holds one vector per
  token, the kernels of attention have heads, and `Dense_0` is a dense layer.
* *A bias beside a kernel* has the shape of the outputs: the axes of the kernel that the bias lacks enter the neuron.
  This settles DenseGeneral, Einsum, transposed kernels, and layers stacked by `nn.scan`.

Where a tree tells none of that, every axis but the last enters the neuron.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
import optax

from projgd import axes, rules
from projgd.axes import Vectors
from projgd.constraints import Constraint
from projgd.sums import float_type
from projgd.updates import Update

Constraints = Constraint | rules.Rules | Any
"""A constraint; rules {pattern: constraint or None}; or a tree of constraints and None (free) with the structure of
the parameters or of their upper part."""

Schedule = Callable[[Any], Constraints]
"""A function from the step (0, 1, …; traced) to constraints."""

Transformation: TypeAlias = optax.GradientTransformationExtraArgs

SplitOver = Mapping[str, str | tuple[str, ...]]
"""Inside `jax.shard_map`: rules {pattern: mesh axis or axes} for the parameters whose vectors those axes split."""

FanIn = tuple[int, ...] | None
"""Axes (counted from the end, all negative) over which one neuron's norm is taken; None for a leaf without one."""

_BIASES = ("bias", "b")
_FREE = re.compile(r"bias|b|bias_.*|scale|offset")
_ONE_VECTOR_PER_TOKEN = re.compile(r".*embeddings?")
_ATTENTION = {"query", "key", "value", "out"}
_EQUINOX_MATRICES = ("Linear", "Embedding", "LSTMCell", "GRUCell")


@dataclass(frozen=True)
class Leaf:
    """One parameter of a tree.

    Attributes:
        name: its keys joined by `/`.
        array: the parameter.
        fan_in: the axes that enter one neuron, counted from the end; None for a parameter without a fan-in.
    """

    name: str
    array: Any
    fan_in: FanIn


@dataclass(frozen=True)
class LeafConstraint:
    """A constraint, or a shaping of updates, resolved for one parameter.

    Attributes:
        name: the parameter's name.
        constraint: the set, or the shaping.
        vectors: the shape to view the parameter in, and the axes that make one vector there.
        over: the mesh axes that split the vectors, inside `jax.shard_map`.
    """

    name: str
    constraint: Any
    vectors: Vectors
    over: tuple[str, ...] = ()

    def view(self, x: Any) -> jax.Array:
        """Return the parameter, or its update, in the shape of `vectors`."""
        return jnp.reshape(x, self.vectors.shape)


# --------------------------------------------------------------------------------------------------------------- rules


def check_constraints(constraints: Constraints) -> None:
    """Raise TypeError for what can be no `Constraints` of any parameters."""
    found = jax.tree_util.tree_flatten_with_path(constraints, is_leaf=lambda node: node is None)[0]
    for path, value in found:
        if not isinstance(value, Constraint) and (value is not None or not path):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"{value!r}{where and f' at {where!r}'} is no constraint: pass one such as MaxNorm(4.0), rules such as "
                "{'Dense_*/kernel': MaxNorm(4.0)}, or a tree of constraints and None"
            )


def is_schedule(constraints: Constraints | Schedule) -> TypeGuard[Schedule]:
    """Return whether these are a function of the step. A tree of constraints may be callable, too, as modules are."""
    return callable(constraints) and not any(isinstance(leaf, Constraint) for leaf in jax.tree.leaves(constraints))


def resolve(constraints: Constraints, params: Any, split_over: SplitOver | None = None) -> list[LeafConstraint | None]:
    """Return the constraint of every leaf of `params`, in JAX's order; None where the leaf is free.

    A mapping from strings to constraints is read as rules, unless its keys are just those at the top of `params`.

    Args:
        constraints: what a user passed.
        params: a tree of parameters.
        split_over: which mesh axes of a `jax.shard_map` split which parameters.

    Raises:
        TypeError: no constraint; a constrained leaf with an integer or complex dtype.
        ValueError: a rule that matches nothing, only what others before it take, or nothing with a fan-in; a tree of
            another structure, an axis that a leaf does not have, a bare 1-D array under a fan-in constraint.

    >>> import jax.numpy as jnp
    >>> from projgd import MaxNorm
    >>> params = {"Dense_0": {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2))}}
    >>> [leaf and leaf.vectors for leaf in resolve({"*": MaxNorm(4.0)}, params)]
    [None, Vectors(shape=(4, 2), axes=(0,))]
    """
    check_constraints(constraints)
    leaves = find_leaves(params)
    names = [leaf.name for leaf in leaves if leaf]
    over = rules.first_match(split_over or {}, names)
    if not _is_rules(constraints, params):
        if isinstance(constraints, Constraint) and leaves and leaves[0] and not leaves[0].name:
            _refuse_flat(constraints, leaves[0])
        return [_resolve_split(*pair, over) for pair in zip(leaves, _spread(constraints, params), strict=True)]
    chosen = rules.assign(constraints, names)
    resolved = [_resolve_split(leaf, chosen[leaf.name] if leaf else None, over) for leaf in leaves]
    rules.refuse_idle(constraints, {leaf.name: bool(r) for leaf, r in zip(leaves, resolved, strict=True) if leaf})
    return resolved


def resolve_leaf(leaf: Leaf | None, constraint: Constraint | Update | None) -> LeafConstraint | None:
    """Return a constraint, or a shaping, with its vectors in a parameter; None if one of them is missing.

    Raises:
        TypeError: an integer or complex dtype.
        ValueError: an axis that the parameter does not have.
    """
    if leaf is None or constraint is None:
        return None
    shape = tuple(jnp.shape(leaf.array))
    if constraint.axis == "fan_in":
        vectors = axes.resolve(leaf.fan_in, shape, "out_last", leaf.name) if leaf.fan_in else None
    else:
        vectors = constraint.resolve(shape, "out_last", leaf.name)
    if vectors is None:
        return None
    float_type(
        jax.eval_shape(jnp.asarray, leaf.array), leaf.name
    )  # a ShapeDtypeStruct is no array, a number has no dtype
    return LeafConstraint(leaf.name, constraint, vectors)


def map_leaves(
    f: Callable[[Any, Any, LeafConstraint], Any],
    updates: Any,
    params: Any,
    leaves: Sequence[LeafConstraint | None],
    free: Callable[[Any], Any] = lambda u: u,
) -> Any:
    """Return `updates` with f(update, parameter, leaf), and with free(update) where there is no leaf.

    Raises:
        ValueError: updates of another structure or shape than the parameters.
    """

    def one(u: Any, p: Any, leaf: LeafConstraint | None) -> Any:
        if is_absent(u) or is_absent(p):
            return u
        if leaf is None:
            return free(u)
        if jnp.shape(u) != jnp.shape(p):
            raise ValueError(f"{leaf.name} has shape {jnp.shape(p)}, but its update has {jnp.shape(u)}")
        return f(jnp.asarray(u), jnp.asarray(p), leaf)  # Python numbers have no dtype

    check_structure(updates, params)
    return jax.tree.map(one, updates, params, find_structure(params).unflatten(leaves), is_leaf=is_absent)


def find_structure(tree: Any) -> Any:
    """Return the structure of a tree, in which places without a parameter count as leaves."""
    return jax.tree.structure(tree, is_leaf=is_absent)


def check_structure(updates: Any, params: Any) -> None:
    """Raise ValueError for updates of another structure than the parameters."""
    found, wanted = find_structure(updates), find_structure(params)
    if found != wanted:
        raise ValueError(f"updates and params are different trees: {found} and {wanted}")


def is_absent(leaf: Any) -> bool:
    """Return whether a place in the tree holds no parameter: None, or optax's MaskedNode."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def _resolve_split(leaf: Leaf | None, constraint: Constraint | None, over: Mapping[str, Any]) -> LeafConstraint | None:
    resolved = resolve_leaf(leaf, constraint)
    if leaf is None or constraint is None or resolved is None:
        return None
    mesh_axes = over[leaf.name] or ()
    split = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)
    if not split or not resolved.vectors.axes:  # entries on their own need no other device
        return resolved
    if constraint.takes_initial or resolved.vectors.shape != jnp.shape(leaf.array):
        raise ValueError(
            f"{leaf.name}: {constraint} cannot be split over the mesh axes {split} of a shard_map, because its axis is "
            "a Split or it takes norms from the initial weights. With jit and NamedSharding it can, without split_over"
        )
    return replace(resolved, over=split)


def _spread(constraints: Any, params: Any) -> list[Constraint | None]:
    """Return the constraint of every leaf, from a tree whose leaves stand for all that is below them in `params`."""
    try:
        tree = jax.tree.broadcast(constraints, params, is_leaf=is_absent)
    except ValueError as error:
        raise ValueError(f"the tree of constraints does not have the structure of the parameters: {error}") from None
    return jax.tree.leaves(tree, is_leaf=is_absent)  # None, free, and what holds no parameter


def _is_rules(constraints: Any, params: Any) -> TypeGuard[rules.Rules]:
    if not isinstance(constraints, Mapping) or not constraints:
        return False
    is_flat = all(isinstance(key, str) and isinstance(value, Constraint | None) for key, value in constraints.items())
    return is_flat and not (hasattr(params, "keys") and set(params.keys()) == set(constraints))


def _refuse_flat(constraint: Constraint, leaf: Leaf) -> None:
    if constraint.axis == "fan_in" and len(jnp.shape(leaf.array)) == 1:
        raise ValueError(
            f"the parameters are one bare array of shape {jnp.shape(leaf.array)}, which has no fan-in. Inside "
            "optax.flatten a projection cannot see the neurons: chain(flatten(inner), projection(...)) does; "
            "axis=None makes the whole array one vector"
        )


# ------------------------------------------------------------------------------------------------------ names, layouts


def find_leaves(params: Any) -> list[Leaf | None]:
    """Return every leaf of `params`, in JAX's order; None where a place holds no parameter.

    Args:
        params: a tree of parameters: dicts, modules of flax.nnx or equinox, or any other tree.

    >>> import jax.numpy as jnp
    >>> tree = {"embed": {"embedding": jnp.ones((9, 4))}, "head": {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2))}}
    >>> [(leaf.name, leaf.fan_in) for leaf in find_leaves(tree)]
    [('embed/embedding', (-1,)), ('head/bias', None), ('head/kernel', (-2,))]
    """
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_absent)[0]
    return [None if is_absent(array) else _leaf(params, path, array) for path, array in found]


def _leaf(params: Any, path: tuple[Any, ...], array: Any) -> Leaf:
    """Return the leaf at a path, found by walking the nodes from the root to it."""
    nodes = [params]
    for key in path[:-1]:
        nodes.append(_child(nodes[-1], key))
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    box = next((i for i, node in enumerate(nodes) if _is_box(node)), None)  # no place of its own, as in kernel/value
    trained = True
    if box is not None and names:
        trained = not _is_a(nodes[box], "flax", "Variable") or _is_a(nodes[box], "flax", "Param")
        nodes, names = nodes[:box], names[:box]
    return Leaf("/".join(names), array, _fan_in(nodes, names, tuple(jnp.shape(array))) if trained else None)


def _fan_in(nodes: list[Any], names: list[str], shape: tuple[int, ...]) -> FanIn:
    ndim = len(shape)
    if ndim < 2 or not names:
        return _but_last(ndim) if ndim > 1 else None
    if _FREE.fullmatch(names[-1]) or names[0] == "batch_stats":
        return None
    module = next((i for i in reversed(range(len(nodes))) if _is_a(nodes[i], "equinox", "Module")), None)
    if module is not None and not hasattr(nodes[-1], "keys"):
        return _equinox(nodes[module], names[module], ndim)
    if _is_a(nodes[-1], "flax", "Module") and (known := _nnx(nodes[-1], ndim)):
        return known
    if _ONE_VECTOR_PER_TOKEN.fullmatch(names[-1]):
        return (-1,)
    layer = names[-2] if len(names) > 1 else ""
    if ndim > 2 and layer in _ATTENTION and _children(nodes[-2]).keys() >= _ATTENTION:
        return (-3, -2) if layer == "out" else (-3,)
    if re.fullmatch(r"(Dense|ConvLocal)_\d+", layer):
        return (-2,)
    return _beside_bias(nodes[-1], shape) or _but_last(ndim)


def _but_last(ndim: int) -> FanIn:
    return tuple(range(-ndim, -1))


def _but_first(ndim: int) -> FanIn:
    return tuple(range(1 - ndim, 0))


def _equinox(module: Any, name: str, ndim: int) -> FanIn:
    """Return the fan-in in (out, in, *kernel), which transposed convolutions have too; vmapped axes come before."""
    if any(_is_a(module, "equinox.nn", kind) for kind in _EQUINOX_MATRICES):
        return (-1,)
    if _is_a(module, "equinox.nn", "Conv") or _is_a(module, "equinox.nn", "ConvTranspose"):
        return _but_first(module.num_spatial_dims + 2)
    if type(module).__module__.startswith("equinox."):
        return None  # norms, PReLU, states
    return _but_first(ndim) if name.startswith("weight") else _but_last(ndim)


def _nnx(module: Any, ndim: int) -> FanIn:
    """Return the fan-in where only the attributes of an nnx module tell it."""
    if _is_a(module, "flax", "LinearGeneral"):
        out = len(module.out_features)
        return tuple(range(-out - len(module.in_features), -out))
    if _is_a(module, "flax", "Einsum"):
        kernel, outputs = re.fullmatch(r".*,(\w+)->(.*)", module.einsum_str.replace(" ", "")).groups()  # type: ignore[union-attr]
        return tuple(i - len(kernel) for i, label in enumerate(kernel) if label not in outputs) or None
    if _is_a(module, "flax", "ConvTranspose") and module.transpose_kernel:
        return (*range(-len(module.kernel_shape), -2), -1)
    return None


def _beside_bias(node: Any, shape: tuple[int, ...]) -> FanIn:
    """Return the axes of a layer's only kernel that its bias does not have."""
    children = _children(node)
    bias = next((child for name, child in children.items() if name in _BIASES), None)
    if bias is None or sum(len(_shape(child)) > 1 for child in children.values() if child is not bias) != 1:
        return None
    ndim, outputs = len(shape), _shape(bias)
    candidates = [
        axes
        for axes in itertools.combinations(range(ndim), len(outputs))
        if sorted(shape[a] for a in axes) == sorted(outputs) and 0 < len(axes) < ndim
    ]

    def likely(axes: tuple[int, ...]) -> tuple[bool, int, tuple[int, ...]]:
        """Rank axes in the bias's own order first, then those with most of them at the end, then at the start."""
        last = next((k for k in range(len(axes)) if axes[-1 - k] != ndim - 1 - k), len(axes))
        return tuple(shape[a] for a in axes) == outputs, last, tuple(-a for a in axes)

    best = max(candidates, key=likely, default=None)
    return None if best is None else tuple(a - ndim for a in range(ndim) if a not in best)


# ------------------------------------------------------------------------------------------------- nodes of a tree


def _is_a(node: Any, package: str, kind: str) -> bool:
    """Return what isinstance does, without importing the package: the user chooses which of them is installed."""
    return any(c.__name__ == kind and f"{c.__module__}.".startswith(f"{package}.") for c in type(node).__mro__)


def _is_box(node: Any) -> bool:
    """Return whether the node only wraps an array, as nnx.Param and nn.Partitioned do."""
    return _is_a(node, "flax", "Variable") or _is_a(node, "flax", "AxisMetadata")


def _child(node: Any, key: Any) -> Any:
    try:
        return getattr(node, key.name) if hasattr(key, "name") else node[key.key if hasattr(key, "key") else key.idx]
    except (TypeError, KeyError, IndexError, AttributeError):
        return None  # a node of an unknown kind: below it only names tell something


def _children(node: Any) -> dict[str, Any]:
    if hasattr(node, "keys"):
        return {str(name): node[name] for name in node.keys()}  # noqa: SIM118  # nnx's State iterates otherwise
    return dict(vars(node)) if hasattr(node, "__dict__") else {}


def _shape(leaf: Any) -> tuple[int, ...]:
    while _is_box(leaf):
        leaf = leaf.get_value() if hasattr(leaf, "get_value") else leaf.value
    return tuple(getattr(leaf, "shape", ()))
