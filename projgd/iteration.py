"""Repeat a step until it is done, in NumPy, PyTorch and JAX."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from array_api_compat import is_jax_namespace


def repeat(times: int, f: Callable[[Any], Any], state: Any, xp: ModuleType) -> Any:
    """Return f(… f(f(state))): `times` times, or until the first of the state, a 0-d array of booleans, is true.

    What JAX traces becomes a `jax.lax.while_loop`. On an accelerator PyTorch waits for the flag after every step.

    Args:
        times: the most steps.
        f: returns the next state, a tuple of arrays of the same shapes and dtypes.
        state: the first state.
        xp: the array namespace of the state.

    Returns:
        The last state.

    >>> import numpy as np
    >>> repeat(9, lambda s: (s[1] >= 3, s[1] + 1), (np.asarray(False), np.asarray(0)), np)[1]
    np.int64(4)
    """
    if is_jax_namespace(xp):
        import jax

        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)):
            start = (jax.numpy.asarray(0), state)
            return jax.lax.while_loop(lambda s: ~s[1][0] & (s[0] < times), lambda s: (s[0] + 1, f(s[1])), start)[1]
    for _ in range(times):
        state = f(state)
        if bool(state[0]):
            break
    return state
