"""What the array API lacks, for NumPy, PyTorch and JAX: loops, constants of derivatives, and calls at run time.

This is the only module of the core that imports a framework, and only for an array of that framework.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from array_api_compat import is_jax_namespace, is_torch_namespace


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


def still(x: Any, xp: ModuleType) -> Any:
    """Return an array as a constant of derivatives."""
    if is_jax_namespace(xp):
        import jax

        return jax.lax.stop_gradient(x)
    return x.detach() if is_torch_namespace(xp) else x


def call_if(flag: Any, f: Callable[..., None], *numbers: Any, xp: ModuleType) -> None:
    """Call f(*numbers) if a 0-d array of booleans is true; what JAX traces is called when the program runs.

    Args:
        flag: the array.
        f: the function.
        numbers: 0-d arrays.
        xp: the array namespace of both.
    """
    if is_jax_namespace(xp):
        import jax

        if isinstance(flag, jax.core.Tracer):
            # Under vmap both branches run, so the flag is read once more (`test_the_warning_of_an_intersection`).
            jax.lax.cond(
                flag, lambda: jax.debug.callback(functools.partial(_call_once_more, f), flag, *numbers), lambda: None
            )
            return
    if bool(flag):
        f(*numbers)


def _call_once_more(f: Callable[..., None], flag: Any, *numbers: Any) -> None:
    if bool(flag):
        f(*numbers)


def tensor_of(data: bytes, shape: tuple[int, ...], device: str) -> Any:
    """Return a float64 tensor of PyTorch from its bytes."""
    import torch

    flat = torch.frombuffer(bytearray(data), dtype=torch.float64) if data else torch.empty(0, dtype=torch.float64)
    return flat.reshape(shape).to(device)
