"""Find the axes of a weight array that make one vector.

An *axis* setting says over which axes a norm is taken (the meaning of NumPy and Keras, not that of `torch.renorm`):

* ``"fan_in"``: all the weights that enter one neuron;
* ``"matrix"``: the whole array is one vector if it has two axes or more; a bias or a gain has no vectors;
* an int or a tuple of ints: those axes, negative ones counted from the end;
* ``None``: the whole array is one vector;
* ``"entries"``: every entry is on its own (the sets without vectors, such as `Box`);
* `Split`: one axis is first cut into equal blocks (grouped layers, attention heads);
* `Stacked`: the first axes tell layers or experts apart, and each of these is read on its own.

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


@dataclass(frozen=True)
class Stacked:
    """Read an array as a stack: the first `count` axes tell layers, heads or experts apart; each one is read by `axis`.

    `Stacked("matrix")` makes one vector of each matrix, and `"matrix"` one of all matrices together.

    Attributes:
        axis: how each array of the stack is read: `"fan_in"` (the default), `"matrix"`, an int, a tuple of ints or
            None; ints count the axes after the first `count`.
        count: the number of axes that tell the arrays apart; default 1.

    The weights of 8 experts, (8, out, in) in PyTorch:

    >>> import torch
    >>> from projgd import MaxNorm
    >>> MaxNorm(1.0, axis=Stacked()).violation(torch.ones(8, 6, 4)).shape
    torch.Size([8, 6])
    >>> MaxNorm(1.0, axis=Stacked("matrix")).violation(torch.ones(8, 6, 4)).shape
    torch.Size([8])
    """

    axis: str | int | tuple[int, ...] | None = "fan_in"
    count: int = 1


Axis = int | tuple[int, ...] | Split | Stacked | None | str


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
        The setting, with a list as a tuple and a dict as a `Split` or a `Stacked`.

    Raises:
        TypeError: a value that is no axis of any array.
        ValueError: an unknown word, an empty tuple, or a `Stacked` with a `count` below 1.

    >>> check([0, 1])
    (0, 1)
    """
    if axis is None or isinstance(axis, Split):
        return axis
    if isinstance(axis, str):
        if axis not in ("fan_in", "matrix"):
            raise ValueError(f'axis={axis!r} is not known: pass "fan_in", "matrix", an int, a tuple of ints, or None')
        return axis
    if isinstance(axis, dict):  # one of the two dataclasses, after JSON
        if "count" in axis:
            return check(Stacked(axis["axis"], axis["count"]))
        return Split(int(axis["dim"]), int(axis["parts"]), tuple(int(a) for a in axis["over"]))
    if isinstance(axis, Stacked):
        within = check(axis.axis)
        if isinstance(within, (Split, Stacked)) or not isinstance(axis.count, int) or axis.count < 1:
            raise ValueError(f'{axis} is not known: pass Stacked("fan_in") or Stacked("matrix"), and a count from 1')
        return Stacked(within, axis.count)
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
        The `Vectors`; None if the array, or each one of a stack, has fewer than two axes and the setting is `"fan_in"`,
        `"matrix"`, or ints that it does not have.

    Raises:
        ValueError: an axis that an array of two axes or more does not have.

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
    if isinstance(axis, Stacked):
        if ndim < axis.count:
            return None
        each = resolve(axis.axis, shape[axis.count :], layout, f"each array in {name}")
        if each is None:
            return None
        return Vectors((*shape[: axis.count], *each.shape), tuple(a + axis.count for a in each.axes))
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
    over = (axis,) if isinstance(axis, int) else axis
    if ndim < 2 and not all(-ndim <= a < ndim for a in over):
        return None  # a bias beside the kernels that the axes are for
    return Vectors(shape, _normalise(over, shape, name))


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
