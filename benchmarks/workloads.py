"""Define the four workloads: the shapes of real models, and weights of which half are on the bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt

Shape = tuple[int, ...]
Weights = npt.NDArray[np.float32]

WORKLOADS = ("mlp", "small", "resnet", "gpt")
BINDING = "half binds"
BOUNDS = {BINDING: 1.0, "nothing binds": 1e6}  # c, for parameters as `start` makes them


def shapes(name: str) -> list[Shape]:
    """Return the parameter shapes of a workload in PyTorch layout: (out, in, *kernel) and one-axis biases."""
    return {"mlp": _mlp, "small": _small, "resnet": _resnet50, "gpt": _gpt2_small}[name]()


def start(shape: Shape, share: float = 0.5) -> tuple[Weights, Weights]:
    """Return a parameter and its gradient in float32, with a `share` of neurons of norm 1 that steps push outwards.

    The others have norm 0.5 and gradient zero, so that they stay inside for any number of steps.
    """
    rng = np.random.default_rng(math.prod(shape))
    p = rng.standard_normal(shape, np.float32)
    if len(shape) == 1:
        return p, p.copy()
    rows = p.reshape(shape[0], -1)
    bound = round(share * shape[0])
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    norms[bound:] *= 2
    rows /= np.maximum(norms, 1e-30)[:, None]  # a single entry may be 0
    g = np.zeros_like(p)
    np.negative(p[:bound], out=g[:bound])
    return p, g


def outputs_last(x: Weights) -> Weights:
    """Return an array of PyTorch's layout in that of JAX and Keras: (*kernel, in, out)."""
    return np.ascontiguousarray(np.moveaxis(x, (0, 1), (-1, -2))) if x.ndim > 1 else x


def _mlp() -> list[Shape]:
    sizes = [784, 1024, 1024, 2048, 10]
    return [s for i, o in itertools.pairwise(sizes) for s in ((o, i), (o,))]


def _small() -> list[Shape]:
    return [(64, 64), (64,)] * 200


def _resnet50() -> list[Shape]:
    def conv(o: int, i: int, k: int) -> list[Shape]:
        return [(o, i, k, k), (o,), (o,)]  # the kernel, then scale and shift of its norm

    out = conv(64, 3, 7)
    width = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        mid = 64 << stage
        for block in range(blocks):
            out += conv(mid, width, 1) + conv(mid, mid, 3) + conv(4 * mid, mid, 1)
            if block == 0:
                out += conv(4 * mid, width, 1)
            width = 4 * mid
    return [*out, (1000, 2048), (1000,)]


def _gpt2_small() -> list[Shape]:
    d = 768
    norm: list[Shape] = [(d,), (d,)]
    layer = [*norm, (3 * d, d), (3 * d,), (d, d), (d,), *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(50257, d), (1024, d), *(layer * 12), *norm]
