"""Parameter trees: the name of each leaf, which of its axes make one neuron, and the constraint that a rule gives it.

A neuron's fan-in is every weight that an output unit, before its activation, depends on. What a tree tells about it:

* *An equinox module or nnx module* is itself a node of the tree: its type and attributes settle the layout.
* *A dict (linen, nnx's `State`, plain)* has names: `bias` and `scale` are free, `embedding` holds one vector per
  token, the kernels of attention have heads, and `Dense_0` is a dense layer.
* *A bias beside a kernel* has the shape of the outputs: the axes of the kernel that the bias lacks enter the neuron.
  This settles DenseGeneral, Einsum, transposed kernels, and layers stacked by `nn.scan`.
* *Partition names* such as `("layers", "embed", "mlp")`, which `nn.scan` and `nnx.vmap` write, name stacked layers.

Where a tree tells none of that, every axis but the last enters the neuron, with a warning from three axes on.
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
from projgd.axes import Axis, Stacked, Vectors
from projgd.constraints import Constraint
from projgd.sums import float_type
from projgd.updates import Update

Constraints = Constraint | rules.Rules | Any
"""A constraint; rules {pattern: constraint or None}; a tree of constraints and None (free) with the structure of the
parameters or of their upper part; or the function `declared`, for what is declared on the parameters."""

Schedule = Callable[[Any], Constraints]
"""A function from the step (0, 1, …; traced) to constraints."""

Transformation: TypeAlias = optax.GradientTransformationExtraArgs

SplitOver = Mapping[str, str | tuple[str, ...]]
"""Inside `jax.shard_map`: rules {pattern: mesh axis or axes} for the parameters whose vectors those axes split."""

FanIn = tuple[int, ...] | None
"""Axes (counted from the end, all negative) over which one neuron's norm is taken; None for a leaf without one."""

DECLARED = "constraint"
"""The key of a constraint in the metadata of an nnx Variable, and the attribute of a box of linen."""

_BIASES = ("bias", "b")
_STACKS = {"layer", "layers", "block", "blocks", "stack", "repeat", "scan", "vmap", "expert", "experts"}
_FREE = re.compile(r"bias|b|bias_.*|scale|offset")
_ONE_VECTOR_PER_TOKEN = re.compile(r".*embeddings?")
_ATTENTION = {"query", "key", "value", "out"}
_MATRICES = ("Linear", "Embedding", "LSTMCell", "GRUCell")


@dataclass(frozen=True)
class Layout:
    """What the axes of one parameter are to its layer.

    Attributes:
        fan_in: the axes that enter one neuron, counted from the end; None for a parameter without a fan-in.
        ndim: the number of axes of one layer, at the end; the axes before them tell stacked layers apart. None where
            nothing tells it.
        guess: the layout in which the parameter is read if nothing in the tree tells it; otherwise None.
        bias_of: for the bias of a layer with one kernel, the number of weights that enter one of its neurons; else 0.
    """

    fan_in: FanIn
    ndim: int | None = None
    guess: axes.Layout | None = None
    bias_of: int = 0


@dataclass(frozen=True)
class Leaf:
    """One parameter of a tree.

    Attributes:
        name: its keys joined by `/`.
        array: the parameter.
        layout: what its axes are.
        declared: the constraints that are declared on it, none or one; None in it stands for a free parameter.
    """

    name: str
    array: Any
    layout: Layout
    declared: tuple[Constraint | None, ...] = ()

    @property
    def fan_in(self) -> FanIn:
        """The axes that enter one neuron, counted from the end; None for a parameter without a fan-in."""
        return self.layout.fan_in

    def vectors(self, axis: Axis) -> Vectors | None:
        """Return the vectors that an axis means here; None if the parameter has none.

        Raises:
            ValueError: an axis that the parameter does not have.
        """
        shape = _shape(self.array)
        stacked, own = (axis.count, axis.axis) if isinstance(axis, Stacked) else (0, axis)
        if own not in ("fan_in", "matrix"):
            return axes.resolve(axis, shape, "out_last", self.name)
        fan_in, ndim = self.fan_in, len(shape) - stacked
        if self.layout.guess:
            fan_in = _but_first(ndim) if self.layout.guess == "out_first" else _but_last(ndim)
        elif not stacked and self.layout.ndim:
            ndim = min(ndim, self.layout.ndim)
        if ndim < 2 or (fan_in is None and self.layout.ndim == 1):
            return None
        if own == "matrix":
            fan_in = tuple(range(-ndim, 0))
        own_axes = tuple(a for a in fan_in or () if a >= -ndim)  # an axis of the stack enters no neuron
        return axes.resolve(own_axes, shape, "out_last", self.name) if own_axes else None


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
    if constraints is declared:
        return
    found = jax.tree_util.tree_flatten_with_path(constraints, is_leaf=lambda node: node is None)[0]
    for path, value in found:
        if not isinstance(value, Constraint) and (value is not None or not path):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(
                f"{value!r}{where and f' at {where!r}'} is not a constraint: pass one such as MaxNorm(4.0), rules such "
                "as {'Dense_*/kernel': MaxNorm(4.0)}, or a tree of constraints and None"
            )


def is_schedule(constraints: Constraints | Schedule) -> TypeGuard[Schedule]:
    """Return whether these are a function of the step. A tree of constraints may be callable, too, as modules are."""
    return (
        constraints is not declared
        and callable(constraints)
        and not any(isinstance(leaf, Constraint) for leaf in jax.tree.leaves(constraints))
    )


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

    Warns:
        UserWarning: one constraint for all that no parameter has a vector for; an array of three axes or more that may
            be a stack of layers.

    >>> import jax.numpy as jnp
    >>> from projgd import MaxNorm
    >>> params = {"Dense_0": {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2))}}
    >>> [leaf and leaf.vectors for leaf in resolve({"*": MaxNorm(4.0)}, params)]
    [None, Vectors(shape=(4, 2), axes=(0,))]
    """
    if constraints is declared:
        constraints = declared(params)
        if not constraints:
            raise ValueError("no constraint is declared on the parameters: see projgd.optax.constrain, or pass one")
    check_constraints(constraints)
    leaves = find_leaves(params)
    names = [leaf.name for leaf in leaves if leaf]
    over = rules.first_match(split_over or {}, names)
    if not _is_rules(constraints, params):
        if isinstance(constraints, Constraint) and leaves and leaves[0] and not leaves[0].name:
            _refuse_flat(constraints, leaves[0])
        resolved = [_resolve_split(*pair, over) for pair in zip(leaves, _spread(constraints, params), strict=True)]
        if isinstance(constraints, Constraint) and names and not any(resolved):
            rules.warn(
                f"{constraints} holds nothing: no parameter has a vector for it, such as {names[0]!r}. "
                "axis=None makes each whole array one vector"
            )
        return resolved
    chosen = rules.assign(constraints, names)
    resolved = [_resolve_split(leaf, chosen[leaf.name] if leaf else None, over) for leaf in leaves]
    rules.refuse_idle(constraints, {leaf.name: bool(r) for leaf, r in zip(leaves, resolved, strict=True) if leaf})
    return resolved


def declared(params: Any) -> dict[str, Constraint | None]:
    """Return the constraints that are declared on parameters, by name: rules, as `projection` takes them.

    `projection(declared)` reads them when it is initialised. To change some, put rules before them:
    `projection({"head/*": MaxNorm(2.0), **declared(params)})`.

    Args:
        params: a tree of parameters: an nnx module or its state, the variables of a linen module, an equinox module.

    Returns:
        The constraints; None for a parameter that is declared free.

    Raises:
        TypeError: a declaration that is not a constraint.

    >>> from flax import nnx
    >>> from projgd import MaxNorm
    >>> init = nnx.with_metadata(nnx.initializers.lecun_normal(), constraint=MaxNorm(1.0))
    >>> declared(nnx.Linear(3, 2, kernel_init=init, rngs=nnx.Rngs(0)))
    {'kernel': MaxNorm(c=1.0, axis='fan_in')}
    """
    found = {leaf.name: leaf.declared[0] for leaf in find_leaves(params) if leaf and leaf.declared}
    for name, own in found.items():
        if own is not None and not isinstance(own, Constraint):
            raise TypeError(f"{name} declares {own!r}, which is not a constraint: declare one such as MaxNorm(4.0)")
    return found


def resolve_leaf(leaf: Leaf | None, constraint: Constraint | Update | None) -> LeafConstraint | None:
    """Return a constraint, or a shaping, with its vectors in a parameter; None if one of them is missing.

    Raises:
        TypeError: an integer or complex dtype.
        ValueError: an axis that the parameter does not have.

    Warns:
        UserWarning: an array of three axes or more that may be a stack of layers.
    """
    if leaf is None or constraint is None:
        return None
    axis = constraint.axis_beside(None) if isinstance(constraint, Update) else constraint.axis
    vectors = leaf.vectors(axis)
    if vectors is None and isinstance(constraint, Constraint) and leaf.layout.bias_of:
        constraint = constraint.beside(leaf.layout.bias_of)
        vectors = None if constraint is None else leaf.vectors(constraint.axis)
    if vectors is None:
        return None
    if leaf.layout.guess and axis in ("fan_in", "matrix"):
        _warn_of_guess(leaf, axis)
    kind = float_type(jax.eval_shape(jnp.asarray, leaf.array), leaf.name)  # a number has no dtype, a shape is no array
    if isinstance(constraint, Constraint) and 0 not in vectors.shape:
        constraint.fit(kind, vectors, leaf.name)
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
    boxed = nodes[box] if box is not None else None
    if box is not None and names:
        trained = not _is_a(nodes[box], "flax", "Variable") or _is_a(nodes[box], "flax", "Param")
        nodes, names = nodes[:box], names[:box]
    if not trained:
        return Leaf("/".join(names), array, Layout(None, 1))
    layout = _layout(nodes, names, _shape(array))
    if names and names[-1] in _BIASES:
        layout = replace(layout, bias_of=_fan_in_beside(nodes, names))
    if layout.guess and box is not None:
        layout = _from_partition_names(boxed) or layout
    return Leaf("/".join(names), array, layout, _find_declared(nodes, names, boxed))


def _fan_in_beside(nodes: list[Any], names: list[str]) -> int:
    """Return how many weights enter one neuron of the layer that a bias belongs to; 0 if the tree does not tell it."""
    kernels = {name: child for name, child in _children(nodes[-1]).items() if len(_shape(child)) > 1}
    if len(kernels) != 1:
        return 0
    ((name, kernel),) = kernels.items()
    vectors = Leaf(name, kernel, _layout(nodes, [*names[:-1], name], _shape(kernel))).vectors("fan_in")
    return vectors.length if vectors else 0


def _find_declared(nodes: list[Any], names: list[str], box: Any) -> tuple[Constraint | None, ...]:
    """Return what the box of a parameter declares, or else the innermost equinox module around it."""
    said = box.get_metadata() if hasattr(box, "get_metadata") else vars(box) if hasattr(box, "__dict__") else {}
    if DECLARED in said:
        return (said[DECLARED],)
    for i in reversed(range(len(nodes))):
        own = getattr(nodes[i], "constraints", None) if _is_a(nodes[i], "equinox", "Module") else None
        if isinstance(own, Mapping):
            first = next((pattern for pattern in own if rules.matches(pattern, "/".join(names[i:]))), None)
            if first is not None:
                return (own[first],)
    return ()


def _layout(nodes: list[Any], names: list[str], shape: tuple[int, ...]) -> Layout:
    ndim = len(shape)
    if ndim < 2:
        return Layout(None, 1)
    if not names:
        return Layout(_but_last(ndim))
    if _FREE.fullmatch(names[-1]) or names[0] == "batch_stats":
        return Layout(None, 1)
    module = next((i for i in reversed(range(len(nodes))) if _is_a(nodes[i], "equinox", "Module")), None)
    if module is not None and not hasattr(nodes[-1], "keys"):
        return _equinox(nodes[module], names[module], ndim)
    if _is_a(nodes[-1], "flax", "Module") and (known := _nnx(nodes[-1], names[-1])):
        return known
    if _ONE_VECTOR_PER_TOKEN.fullmatch(names[-1]):
        return Layout((-1,), 2)
    layer = names[-2] if len(names) > 1 else ""
    if ndim > 2 and layer in _ATTENTION and _children(nodes[-2]).keys() >= _ATTENTION:
        return Layout((-3, -2) if layer == "out" else (-3,), 3)
    if re.fullmatch(r"(Dense|ConvLocal)_\d+", layer):
        return Layout((-2,), 2 if layer.startswith("Dense") else None)
    if fan_in := _beside_bias(nodes[-1], shape):
        before = next(a for a in range(ndim) if a - ndim in fan_in)  # axes that the bias has at its start
        return Layout(fan_in, ndim - before if ndim - before > 1 else None)
    return Layout(_but_last(ndim), None, "out_last" if ndim > 2 and "conv" not in "".join(names[-2:]).lower() else None)


def _from_partition_names(box: Any) -> Layout | None:
    """Return the layout of a kernel whose first axes are named after stacked layers, as by `nn.PARTITION_NAME`."""
    said = box.get_metadata() if hasattr(box, "get_metadata") else {}
    names = getattr(box, "names", None) or said.get("out_sharding") or said.get("sharding_names") or ()
    count = next((i for i, name in enumerate(names) if name not in _STACKS), len(names))
    ndim = len(names) - count
    return Layout(_but_last(ndim), ndim) if count and ndim > 1 else None


def _warn_of_guess(leaf: Leaf, axis: Axis) -> None:
    shape = _shape(leaf.array)
    if axis == "matrix":
        read, stacked, whole = "one matrix", 'Stacked("matrix")', None
    else:
        assert leaf.fan_in is not None
        whole = tuple(a + len(shape) for a in leaf.fan_in)
        read, stacked = f"one layer with the axes {whole} entering a neuron", "Stacked()"
    rules.warn(
        f"{leaf.name} has shape {shape}, and no bias or layer type tells what its axes are: it is read as {read}. If "
        f"its first axis counts layers, heads or experts, pass axis={stacked}; if not, axis={whole} says so"
    )


def _but_last(ndim: int) -> FanIn:
    return tuple(range(-ndim, -1))


def _but_first(ndim: int) -> FanIn:
    return tuple(range(1 - ndim, 0))


def _equinox(module: Any, name: str, ndim: int) -> Layout:
    """Return the layout (out, in, *kernel), which transposed convolutions have too; vmapped axes come before."""
    if any(_is_a(module, "equinox.nn", kind) for kind in _MATRICES):
        return Layout((-1,), 2)
    if _is_a(module, "equinox.nn", "Conv") or _is_a(module, "equinox.nn", "ConvTranspose"):
        return Layout(_but_first(module.num_spatial_dims + 2), module.num_spatial_dims + 2)
    if type(module).__module__.startswith("equinox."):
        return Layout(None, 1)  # norms, PReLU, states
    order: axes.Layout = "out_first" if name.startswith("weight") else "out_last"
    return Layout(_but_first(ndim) if order == "out_first" else _but_last(ndim), None, order if ndim > 2 else None)


def _nnx(module: Any, name: str) -> Layout | None:
    """Return the layout where the attributes of an nnx module tell it."""
    if _is_a(module, "flax", "LinearGeneral"):
        into, out = len(module.in_features), len(module.out_features)
        return Layout(tuple(range(-out - into, -out)), into + out)
    if _is_a(module, "flax", "Einsum"):
        kernel, outputs = re.fullmatch(r".*,(\w+)->(.*)", module.einsum_str.replace(" ", "")).groups()  # type: ignore[union-attr]
        fan_in = tuple(i - len(kernel) for i, label in enumerate(kernel) if label not in outputs) or None
        return Layout(fan_in, len(kernel))
    if _is_a(module, "flax", "ConvTranspose") and module.transpose_kernel:
        return Layout((*range(-len(module.kernel_shape), -2), -1), len(module.kernel_shape))
    if (_is_a(module, "flax", "Conv") or _is_a(module, "flax", "ConvTranspose")) and name == "kernel":
        return Layout(_but_last(len(module.kernel_shape)), len(module.kernel_shape))
    if _is_a(module, "flax", "Linear") or _is_a(module, "flax", "LoRA"):
        return Layout((-2,), 2)
    return Layout((-1,), 2) if _is_a(module, "flax", "Embed") else None


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
