"""Where a neuron's weights are in the parameter trees of flax.linen, flax.nnx, equinox, and plain dicts.

The definition is the layer's arithmetic: the fan-in of an output unit is every weight that the unit, before its
activation, depends on. What the tree tells about that:

* *An equinox module or nnx module* is itself a node of the tree: its type and attributes settle the layout.
* *A dict (linen, nnx's `State`, plain)* has names: `bias` and `scale` are free, `embedding` holds one vector per
  token, the kernels of attention have heads, and `Dense_0` is a dense layer.
* *A bias beside a kernel* has the shape of the outputs: what axes of the kernel are left, enter the neuron. This
  settles DenseGeneral, Einsum, transposed kernels, and layers stacked by `nn.scan`.

Where all of that is silent, every axis but the last enters the neuron.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

FanIn = tuple[int, ...] | None
"""Axes (counted from the end, all negative) over which one neuron's norm is taken; None for a leaf without one."""

_BIASES = ("bias", "b")
_FREE = re.compile(r"bias|b|bias_.*|scale|offset")
_ONE_VECTOR_PER_TOKEN = re.compile(r".*embeddings?")
_ATTENTION = ("query", "key", "value", "out")
_EQUINOX_MATRICES = ("Linear", "Embedding", "LSTMCell", "GRUCell")


@dataclass(frozen=True)
class Leaf:
    """One parameter: its name (keys joined by `/`), the array, and its fan-in."""

    name: str
    array: Any
    fan_in: FanIn


def absent(leaf: Any) -> bool:
    """Whether a place in the tree holds no parameter: None, or optax's MaskedNode."""
    return leaf is None or isinstance(leaf, optax.MaskedNode)


def leaves(params: Any) -> list[Leaf | None]:
    """Every leaf of `params`, in JAX's order; None where there is none.

    >>> import jax.numpy as jnp
    >>> tree = {"embed": {"embedding": jnp.ones((9, 4))}, "head": {"bias": jnp.ones(2), "kernel": jnp.ones((4, 2))}}
    >>> [(leaf.name, leaf.fan_in) for leaf in leaves(tree)]
    [('embed/embedding', (-1,)), ('head/bias', None), ('head/kernel', (-2,))]
    """
    found = jax.tree_util.tree_flatten_with_path(params, is_leaf=absent)[0]
    return [None if absent(array) else _leaf(params, path, array) for path, array in found]


def _leaf(params: Any, path: tuple[Any, ...], array: Any) -> Leaf:
    """`array`, with the nodes from the root to it: every node's key in the next, the array not among them."""
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
    if module is not None and not _has_names(nodes[-1]):
        return _equinox(nodes[module], names[module], ndim)
    if _is_a(nodes[-1], "flax", "Module"):
        known = _nnx(nodes[-1], ndim)
        if known:
            return known
    if _ONE_VECTOR_PER_TOKEN.fullmatch(names[-1]):
        return (-1,)
    layer = names[-2] if len(names) > 1 else ""
    if ndim > 2 and layer in _ATTENTION and all(_child_named(nodes[-2], name) is not None for name in _ATTENTION):
        return (-3, -2) if layer == "out" else (-3,)
    if re.fullmatch(r"(Dense|ConvLocal)_\d+", layer):
        return (-2,)
    return _beside_bias(nodes[-1], shape) or _but_last(ndim)


def _but_last(ndim: int) -> FanIn:
    return tuple(range(-ndim, -1))


def _but_first(ndim: int) -> FanIn:
    return tuple(range(1 - ndim, 0))


def _equinox(module: Any, name: str, ndim: int) -> FanIn:
    """Equinox keeps (out, in, *kernel), transposed convolutions too; `eqx.filter_vmap` puts axes before that."""
    if any(_is_a(module, "equinox.nn", kind) for kind in _EQUINOX_MATRICES):
        return (-1,)
    if _is_a(module, "equinox.nn", "Conv") or _is_a(module, "equinox.nn", "ConvTranspose"):
        return _but_first(module.num_spatial_dims + 2)
    if type(module).__module__.startswith("equinox."):
        return None  # norms, PReLU, states
    return _but_first(ndim) if name.startswith("weight") else _but_last(ndim)


def _nnx(module: Any, ndim: int) -> FanIn:
    """What the attributes of an nnx module say that its kernel alone does not."""
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
    """The axes of the only kernel of a layer that its bias does not have."""
    children = [child for _, child in _children(node)]
    bias = next((child for name, child in _children(node) if name in _BIASES), None)
    if bias is None or sum(len(_shape(child)) > 1 for child in children if child is not bias) != 1:
        return None
    ndim, outputs = len(shape), _shape(bias)
    candidates = [
        axes
        for axes in itertools.combinations(range(ndim), len(outputs))
        if sorted(shape[a] for a in axes) == sorted(outputs) and 0 < len(axes) < ndim
    ]

    def likely(axes: tuple[int, ...]) -> tuple[bool, int, tuple[int, ...]]:
        """In the bias's own order first, then most of them at the end, then at the start."""
        last = next((k for k in range(len(axes)) if axes[-1 - k] != ndim - 1 - k), len(axes))
        return tuple(shape[a] for a in axes) == outputs, last, tuple(-a for a in axes)

    best = max(candidates, key=likely, default=None)
    return None if best is None else tuple(a - ndim for a in range(ndim) if a not in best)


# ------------------------------------------------------------------------------------------------- nodes of a tree


def _is_a(node: Any, package: str, kind: str) -> bool:
    """`isinstance`, without importing the package: which of them is installed is the user's choice."""
    return any(c.__name__ == kind and f"{c.__module__}.".startswith(f"{package}.") for c in type(node).__mro__)


def _is_box(node: Any) -> bool:
    """Whether the node only wraps an array: nnx.Param and its like, nn.Partitioned."""
    return _is_a(node, "flax", "Variable") or _is_a(node, "flax", "AxisMetadata")


def _has_names(node: Any) -> bool:
    return hasattr(node, "keys")


def _child(node: Any, key: Any) -> Any:
    for attribute, get in (("key", lambda n, k: n[k]), ("idx", lambda n, k: n[k]), ("name", getattr)):
        if hasattr(key, attribute):
            try:
                return get(node, getattr(key, attribute))
            except (TypeError, KeyError, IndexError, AttributeError):
                return None  # a node of an unknown kind: nothing is known below it but names
    return None


def _children(node: Any) -> Iterable[tuple[str, Any]]:
    if _has_names(node):
        return [(str(name), node[name]) for name in node.keys()]  # noqa: SIM118  # nnx's State iterates otherwise
    return list(vars(node).items()) if hasattr(node, "__dict__") else []


def _child_named(node: Any, name: str) -> Any:
    return next((child for key, child in _children(node) if key == name), None)


def _shape(leaf: Any) -> tuple[int, ...]:
    while _is_box(leaf):
        leaf = leaf.get_value() if hasattr(leaf, "get_value") else leaf.value
    return tuple(getattr(leaf, "shape", ()))
