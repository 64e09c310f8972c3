"""Hold arrays of numbers inside of frozen dataclasses, and round bounds into a set.

A constraint is compared, hashed, pickled and written as JSON. An array of bounds is none of that, so a constraint keeps
its numbers as `Values`. An array that JAX traces stays as it is.
"""

from __future__ import annotations

import functools
import math
from array import array as array_of
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace, is_jax_namespace, is_torch_array, is_torch_namespace

from projgd.libraries import tensor_of
from projgd.sums import Array, FloatType, Scalar


@dataclass(frozen=True)
class Values:
    """Hold an array of float64 numbers.

    Attributes:
        shape: the shape of the array.
        data: its bytes, row by row.

    >>> Values.of("low", [[1.0, 2.0]])
    array of shape (1, 2)
    """

    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, name: str, value: Any) -> Values:
        """Return the numbers of an array of NumPy, PyTorch or JAX, or of nested lists.

        Args:
            name: the hyperparameter's name, for errors.
            value: the array.

        Returns:
            The numbers.

        Raises:
            TypeError: a value that holds no numbers, or whose numbers JAX traces.
            ValueError: lists of different lengths, or NaN.
        """
        if isinstance(value, Values):
            return value
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return cls._of_array(name, value)
        shape, flat = _flatten(name, value)
        if any(math.isnan(number) for number in flat):
            raise ValueError(f"{name} holds NaN: pass numbers, and infinity where there is no bound")
        return cls(shape, array_of("d", flat).tobytes())

    @classmethod
    def _of_array(cls, name: str, value: Any) -> Values:
        """Return the numbers of an array; JAX raises a TypeError for a traced one."""
        import numpy as np

        wide = np.asarray(value.detach().cpu().double() if is_torch_array(value) else value)
        if wide.dtype.kind in "cOSUb":
            raise TypeError(f"{name} has dtype {wide.dtype}: pass an array of real numbers")
        wide = np.ascontiguousarray(wide.astype(np.float64)).reshape(wide.shape)
        if np.isnan(wide).any():
            raise ValueError(f"{name} holds NaN: pass numbers, and infinity where there is no bound")
        return cls(wide.shape, wide.tobytes())

    def numbers(self) -> list[float]:
        """Return the numbers one after the other."""
        return array_of("d", self.data).tolist()

    def tolist(self) -> Any:
        """Return the numbers as nested lists."""
        flat: Any = self.numbers()
        for n in reversed(self.shape[1:]):
            flat = [flat[i : i + n] for i in range(0, len(flat), n)] if n else []
        return flat if self.shape else flat[0]

    def array(self, xp: ModuleType, like: Array) -> Array:
        """Return the numbers in float64, in the library of `like` and on its device; in NumPy for JAX.

        Args:
            xp: the array namespace of `like`.
            like: an array.
        """
        if is_torch_namespace(xp):
            return _to_torch(self.data, self.shape, str(like.device))
        import numpy as np

        return np.frombuffer(self.data, np.float64).reshape(self.shape)

    def __repr__(self) -> str:
        return f"array of shape {self.shape}"


_to_torch = functools.lru_cache(maxsize=64)(tensor_of)


def _flatten(name: str, nested: Any) -> tuple[tuple[int, ...], list[float]]:
    """Return the shape of nested lists, and their numbers one after the other."""
    if not isinstance(nested, Sequence) or isinstance(nested, (str, bytes)):
        if isinstance(nested, bool) or not isinstance(nested, (int, float)):
            raise TypeError(f"{name} holds {nested!r}, which is not a number")
        return (), [float(nested)]
    parts = [_flatten(name, part) for part in nested]
    shapes = {shape for shape, _ in parts}
    if len(shapes) > 1:
        raise ValueError(f"{name} holds lists of different lengths: pass an array")
    return (len(parts), *(shapes.pop() if shapes else ())), [number for _, flat in parts for number in flat]


def read_numbers(name: str, value: Any) -> Scalar:
    """Return a number as a float and an array as `Values`; what JAX traces comes back unchanged.

    Args:
        name: the hyperparameter's name, for errors.
        value: a number, an array with one entry or more, or a traced array.

    Returns:
        A float, `Values`, or the traced array.

    Raises:
        TypeError: a value that holds no numbers.
        ValueError: NaN.

    >>> read_numbers("low", 3), read_numbers("low", [0.0, 1.0])
    (3.0, array of shape (2,))
    """
    if value is None or isinstance(value, (bool, str, bytes)) or str(getattr(value, "dtype", "")).endswith("bool"):
        raise TypeError(f"{name}={value!r} is not a number: pass one such as {name}=1.0, or an array of them")
    if isinstance(value, (int, float)):
        if math.isnan(value):
            raise ValueError(f"{name}={value} is not a number")
        return float(value)
    try:
        values = Values.of(name, value)
    except TypeError:
        if hasattr(value, "aval"):  # JAX refuses to read a traced array
            return value
        raise
    return values.tolist() if values.shape == () else values


def stored(value: Scalar, x: Array, kind: FloatType, xp: ModuleType, side: int) -> Array:
    """Return numbers in the dtype of an array, rounded to one side where the dtype does not have them.

    Args:
        value: a float, `Values`, or an array; see `read_numbers`.
        x: the array that the numbers are for.
        kind: its dtype.
        xp: its array namespace.
        side: 1 rounds up, -1 rounds down. A subnormal number that XLA reads as 0 counts as none.

    Returns:
        An array of the dtype of `x` with the shape of the numbers; 0-d for a float.
    """
    if isinstance(value, float):
        if math.isfinite(value):
            value = kind.round_up(value) if side > 0 else kind.round_down(value)
        return xp.full((), value, dtype=x.dtype, **({} if is_jax_namespace(xp) else {"device": x.device}))
    if isinstance(value, Values):
        if is_torch_namespace(xp):
            return _stored_tensor(value, x.dtype, str(x.device), kind, side)
        value = value.array(xp, x)
        if is_jax_namespace(xp):  # JAX would round float64 to nearest
            return xp.asarray(_round(value, x.dtype, kind, array_namespace(value), side))
    elif not str(value.dtype).endswith("float64"):  # integers, and shorter types than the largest number needs
        value = xp.astype(value, getattr(xp, kind.compute), copy=False)
    return _round(value, x.dtype, kind, xp, side)


@functools.lru_cache(maxsize=64)
def _stored_tensor(values: Values, dtype: Any, device: str, kind: FloatType, side: int) -> Any:
    """Return the numbers as a tensor of a dtype, from a cache: rounding large arrays takes longer than a step."""
    wide = tensor_of(values.data, values.shape, device)
    return _round(wide, dtype, kind, array_namespace(wide), side)


def _round(wide: Array, dtype: Any, kind: FloatType, xp: Any, side: int) -> Array:
    """Return numbers in another dtype, rounded to one side; see `stored`."""
    most = xp.full_like(wide, kind.largest)
    within = xp.minimum(xp.maximum(wide, -most), most)
    near = xp.astype(xp.astype(within, dtype), wide.dtype)
    # Half of the distance to the next number, and a little more: rounded again, it is that number.
    zero = xp.zeros_like(wide)
    step = xp.abs(near) * (1.01 * kind.unit) + 0.505 * kind.spacing
    near = near + side * xp.where(side * near < side * within, step, zero)
    small = xp.where(side * wide > 0, zero + side * kind.smallest, zero)
    near = xp.where((xp.abs(wide) < kind.smallest) & (wide != 0), small, near)
    beyond = (side * wide > kind.largest) | xp.isinf(wide)
    return xp.astype(xp.where(beyond, xp.copysign(xp.full_like(wide, math.inf), wide), near), dtype)
