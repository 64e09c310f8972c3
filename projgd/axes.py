"""Which axes of a weight array make one neuron.

An *axis* setting says over which axes a norm is taken (the meaning of NumPy and Keras, not `torch.renorm`'s):

* ``"fan_in"``: all the weights that enter one neuron;
* ``"matrix"``: the whole array is one vector if it has two axes or more; a bias or a gain has none;
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
"""Where a bare array has its neurons: PyTorch's (out, in, *kernel); (*kernel, in, out) in NumPy, Keras, Flax."""


@dataclass(frozen=True)
class Split:
    """Cut axis `dim` into `parts` equal blocks, then reduce over `over`.

    One axis becomes two, (parts, size / parts); `over` counts the axes of the array *after* the cut.

    Example: the 4 heads of a (4 * 16, 64) projection, each head one vector.

    >>> Split(dim=0, parts=4, over=(1, 2))
    Split(dim=0, parts=4, over=(1, 2))
    """

    dim: int
    parts: int
    over: tuple[int, ...]


Axis = str | int | tuple[int, ...] | Split | None


@dataclass(frozen=True)
class Vectors:
    """An array of `shape`, of which every slice along `axes` is one vector."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def length(self) -> int:
        """Entries in one vector."""
        return math.prod([self.shape[a] for a in self.axes])


def check(axis: Any) -> Axis:
    """Return `axis` in its canonical form, or raise TypeError / ValueError for what can be no axis of any array."""
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
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def resolve(axis: Axis, shape: Sequence[int], layout: Layout, name: str = "the array") -> Vectors | None:
    """The vectors that `axis` means in an array of `shape`; None if it has no fan-in and is no matrix (0 or 1 axes).

    Raises:
        ValueError: an axis that the array does not have, named by `name`.
    """
    shape = tuple(shape)
    ndim = len(shape)
    if axis == "entries":
        return Vectors(shape, ())
    if axis is None:
        return Vectors(shape, tuple(range(ndim)))
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
    ndim = len(shape)
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(f"axis {a} is out of range for {name} with shape {shape}, which has {ndim} axes")
    normal = tuple(sorted(a % ndim for a in axes))
    if len(set(normal)) < len(normal):
        raise ValueError(f"axis={axes} names an axis of {name} with shape {shape} twice")
    return normal
