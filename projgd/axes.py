"""Find the axes of a weight array that make one vector.

An *axis* setting says over which axes a norm is taken (the meaning of NumPy and Keras, not that of `torch.renorm`):

* ``"fan_in"``: all the weights that enter one neuron;
* ``"matrix"``: the whole array is one vector if it has two axes or more; a bias or a gain has no vectors;
* an int or a tuple of ints: those axes, negative ones counted from the end;
* ``None``: the whole array is one vector;
* ``"entries"``: every entry is on its own (the sets without vectors, such as `Box`);
* `Split`: one axis is first cut into equal blocks (grouped layers, attention heads).

`resolve` turns a setting into a `Vectors`: the shape to view the array in, and the axes to reduce there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Layout = Literal["out_first", "out_last"]
"""The layout of a bare array: (out, in, *kernel) in PyTorch; (*kernel, in, out) in NumPy, Keras and Flax."""


@dataclass(frozen=True)
class Split:
    """Cut axis `dim` into `parts` equal blocks, then take norms over the axes `over`.

    One axis becomes two, (parts, size / parts). `over` counts the axes of the array *after* the cut.

    Attributes:
        dim: the axis to cut; a negative one counts from the end.
        parts: the number of blocks; it has to divide the size of the axis.
        over: the axes that make one vector, counted after the cut.

    The 4 heads of a (4 * 16, 64) projection, with each head as one vector:

    >>> import numpy as np
    >>> from projgd import MaxNorm
    >>> heads = MaxNorm(1.0, axis=Split(dim=0, parts=4, over=(1, 2)))
    >>> heads.violation(np.ones((4 * 16, 64))).shape
    (4,)
    """

    dim: int
    parts: int
    over: tuple[int, ...]


Axis = str | int | tuple[int, ...] | Split | None


@dataclass(frozen=True)
class Vectors:
    """Describe an array of `shape`, in which every slice along `axes` is one vector.

    Attributes:
        shape: the shape to view the array in.
        axes: the non-negative axes of that shape that make one vector, in ascending order.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def length(self) -> int:
        """Return the number of entries in one vector."""
        return math.prod([self.shape[a] for a in self.axes])


def check(axis: Any) -> Axis:
    """Return an `axis` setting in its canonical form.

    Args:
        axis: what the user passed, or what a checkpoint holds.

    Returns:
        The setting, with a list as a tuple and a dict as a `Split`.

    Raises:
        TypeError: a value that is no axis of any array.
        ValueError: an unknown word, or an empty tuple.

    >>> check([0, 1])
    (0, 1)
    """
    if axis is None or isinstance(axis, Split):
        return axis
    if isinstance(axis, str):
        if axis not in ("fan_in", "matrix"):
            raise ValueError(f'axis={axis!r} is not known: pass "fan_in", "matrix", an int, a tuple of ints, or None')
        return axis
    if isinstance(axis, dict):  # a Split that went through JSON
        return Split(int(axis["dim"]), int(axis["parts"]), tuple(int(a) for a in axis["over"]))
    try:
        if isinstance(axis, Sequence):
            axes = tuple(_as_int(a) for a in axis)
        else:
            return _as_int(axis)
    except TypeError:
        raise TypeError(f'axis={axis!r} is not an axis: pass "fan_in", an int, a tuple of ints, or None') from None
    if not axes:
        raise ValueError("axis=() names no axis: pass None for the whole array, or leave the parameter free")
    return axes


def _as_int(value: Any) -> int:
    """Return a value as an int; raise TypeError for booleans and for what is not an integer."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def resolve(axis: Axis, shape: Sequence[int], layout: Layout, name: str = "the array") -> Vectors | None:
    """Return the vectors that `axis` means in an array of `shape`.

    Args:
        axis: a checked setting.
        shape: the shape of the array.
        layout: `"out_first"` for (out, in, *kernel), `"out_last"` for (*kernel, in, out).
        name: the array's name, for errors; default `"the array"`.

    Returns:
        The `Vectors`; None for `"fan_in"` and `"matrix"` if the array has fewer than two axes.

    Raises:
        ValueError: an axis that the array does not have.

    >>> resolve("fan_in", (8, 3, 5, 5), "out_first")
    Vectors(shape=(8, 3, 5, 5), axes=(1, 2, 3))
    """
    shape = tuple(shape)
    ndim = len(shape)
    if axis == "entries":
        return Vectors(shape, ())
    if axis is None:
        return Vectors(shape or (1,), tuple(range(ndim)) or (0,))  # a scalar is a vector of one entry
    if axis in ("fan_in", "matrix") and ndim < 2:
        return None
    if axis == "matrix":
        return Vectors(shape, tuple(range(ndim)))
    if axis == "fan_in":
        return Vectors(shape, tuple(range(1, ndim)) if layout == "out_first" else tuple(range(ndim - 1)))
    if isinstance(axis, Split):
        (dim,) = _normalise((axis.dim,), shape, name)
        if axis.parts < 1 or shape[dim] % axis.parts:
            raise ValueError(
                f"{axis} cannot cut axis {dim} of {name} with shape {shape} into {axis.parts} equal blocks"
            )
        shape = (*shape[:dim], axis.parts, shape[dim] // axis.parts, *shape[dim + 1 :])
        return Vectors(shape, _normalise(axis.over, shape, name))
    if isinstance(axis, str):
        raise ValueError(f'axis={axis!r} is not known: pass "fan_in", "matrix", an int, a tuple of ints, or None')
    return Vectors(shape, _normalise((axis,) if isinstance(axis, int) else axis, shape, name))


def _normalise(axes: tuple[int, ...], shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Return axes as sorted non-negative ones; raise ValueError if one is out of range or appears twice."""
    ndim = len(shape)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for {name} with shape {shape}, which has {ndim} axes")
    normal = tuple(sorted(a % ndim for a in axes))
    if len(set(normal)) < len(normal):
        raise ValueError(f"axis={axes} names an axis of {name} with shape {shape} twice")
    return normal
