"""Arrays of NumPy, PyTorch and JAX from those of NumPy and back, bit for bit, in every dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from tests.contract import NUMPY

LIBRARIES = ("numpy", "torch", "jax")


def to(library, w):
    """The array `w` of NumPy in another library; JAX needs `jax.enable_x64` for float64."""
    if library == "torch":
        ints = torch.from_numpy(w.view(f"int{8 * w.itemsize}").copy())
        return ints.view(getattr(torch, w.dtype.name))
    return jnp.asarray(w) if library == "jax" else w


def back(x):
    """An array of any library as one of NumPy."""
    if isinstance(x, torch.Tensor):
        x = x.detach().contiguous()
        ints = x.view(getattr(torch, f"int{8 * x.element_size()}")).numpy()
        return ints.view(NUMPY[str(x.dtype).removeprefix("torch.")])
    return np.asarray(x)


def by(library, function, jitted=False):
    """`function` of an array of NumPy, run in a library; the answer is one of NumPy, of the same dtype and shape."""

    def run(w):
        with jax.enable_x64(w.dtype == np.float64):
            found = back((jax.jit(function) if jitted else function)(to(library, w)))
        assert (found.dtype, found.shape) == (w.dtype, w.shape)
        return found

    return run
