"""The four workloads: the shapes of real models."""

from __future__ import annotations

import itertools
import math

Shape = tuple[int, ...]


def shapes(name: str) -> list[Shape]:
    """The parameter shapes of a workload, PyTorch layout: (out, in, *kernel) and one-axis biases."""
    return {"mlp": _mlp, "small": _small, "resnet": _resnet50, "gpt": _gpt2_small}[name]()


def count(name: str) -> int:
    return sum(math.prod(s) for s in shapes(name))


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
