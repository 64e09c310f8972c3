"""Compare the projections onto a ball of several libraries: python -m benchmarks.probes [--markdown PATH]

Each library projects the same rows with the same c, one vector in each row. The results are compared in exact
arithmetic.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jaxopt.projection
import keras
import numpy as np
import optax
import torch

from projgd import MaxNorm

C = 4.0
Rows = np.ndarray
Project = Callable[[Rows], Rows]  # a round trip through the library's own arrays, bit for bit


def in_torch(function: Callable[[torch.Tensor], object]) -> Project:
    def project(x: Rows) -> Rows:
        w = torch.from_numpy(x.copy())
        found = function(w)
        return (w if found is None else found).numpy()

    return project


def in_jax(function: Callable[[jax.Array], jax.Array]) -> Project:
    jitted = jax.jit(function)
    return lambda x: np.asarray(jitted(x))


def three_lines(w: torch.Tensor) -> None:
    norm = w.norm(dim=1, keepdim=True)
    factor = (C / norm).clamp(max=1)
    w.mul_(factor)


def libraries() -> Mapping[str, Project]:
    by_row = functools.partial(jax.vmap, in_axes=0)
    return {
        "projgd, PyTorch": in_torch(MaxNorm(C, axis=1).project),
        "projgd, JAX": in_jax(MaxNorm(C, axis=1).project),
        "Keras 3": in_jax(keras.constraints.MaxNorm(C, axis=1)),
        "torch.renorm": in_torch(lambda w: torch.renorm(w, 2, 0, C)),
        "optax": in_jax(by_row(lambda row: optax.projections.projection_l2_ball(row, C))),
        "jaxopt": in_jax(by_row(lambda row: jaxopt.projection.projection_l2_ball(row, C))),
        "three lines": in_torch(three_lines),
    }


def rows(norms: Rows, length: int = 64, dtype: str = "float32") -> Rows:
    """Return vectors of random directions with these norms."""
    x = np.random.default_rng(0).standard_normal((len(norms), length))
    return (x * (norms / np.linalg.norm(x, axis=1))[:, None]).astype(dtype)


def norms(x: Rows) -> Rows:
    """Return the norms of the stored values, rounded once."""
    return np.asarray([math.sqrt(math.fsum(float(v) ** 2 for v in row)) for row in x])


def changed(x: Rows, y: Rows) -> Rows:
    """Return which rows lost a bit."""
    return (x.view(f"u{x.itemsize}") != y.view(f"u{y.itemsize}")).any(axis=1)


def kept(x: Rows, y: Rows) -> str:
    """Return whether every row kept its bits, and otherwise how many did not and how far their norms moved."""
    lost = changed(x, y)
    far = abs(norms(y[lost]) / norms(x[lost]) - 1).max(initial=0)
    return f"{lost.sum()} of {len(x)} change; norm by {far:.0e}" if lost.any() else "yes"


INSIDE = np.geomspace(1e-3, 0.98 * C, 1000)
OUTSIDE = np.geomspace(1.001 * C, 1e3 * C, 1000)


def inside_is_kept(project: Project) -> str:
    x = rows(INSIDE)
    return kept(x, project(x))


def held(project: Project) -> str:
    found = norms(project(rows(OUTSIDE)))
    above = found > C
    return f"{above.sum()} of {len(found)} above, by {found.max() / C - 1:.0e}" if above.any() else "yes"


def huge(project: Project, value: float, dtype: str) -> str:
    """Check that (value, value) is projected to c / √2 each."""
    y = project(np.full((1, 2), value, dtype)).astype(float)[0]
    near = np.allclose(y, C / math.sqrt(2), rtol=2e-3)
    return "yes" if near else f"gives ({y[0]:g}, {y[1]:g})"


def laundered(project: Project, value: float) -> str:
    """Check that the row with `value` comes back unchanged, and that the row beside it is projected as usual."""
    x = rows(np.asarray([8.0, 8.0]))
    alone = project(x)[1]
    x[0, 3] = value
    y = project(x)
    if not np.array_equal(y[1], alone):
        return "its neighbour changes"
    if np.array_equal(y[0], x[0], equal_nan=True):
        return "yes"
    return f"becomes {np.isnan(y[0]).sum()} NaN, {(y[0] == 0).sum()} zeros of 64"


def idempotent(project: Project) -> str:
    y = project(rows(OUTSIDE))
    return kept(y, project(y))


def zero(project: Project) -> str:
    y = project(np.zeros((1, 64), np.float32))
    return "yes" if not y.any() else f"becomes {y.ravel()[0]}"


def steps(project: Project, times: int = 10_000) -> str:
    x = y = rows(INSIDE[::20])
    for _ in range(times):
        y = project(y)
    return kept(x, y)


PROBES: Mapping[str, Callable[[Project], str]] = {
    "rows inside keep every bit": inside_is_kept,
    "norm ≤ c exactly, float32": held,
    "1e30 in float32": lambda project: huge(project, 1e30, "float32"),
    "6e4 in float16": lambda project: huge(project, 6e4, "float16"),
    "a row with NaN stays as it is": lambda project: laundered(project, math.nan),
    "a row with inf stays as it is": lambda project: laundered(project, math.inf),
    "again changes no bit": idempotent,
    "a row of zeros stays": zero,
    "rows inside keep every bit, 10,000 steps with zero gradient": steps,
}


def table() -> str:
    tried = libraries()
    lines = ["| | " + " | ".join(tried) + " |", "|---" * (len(tried) + 1) + "|"]
    for question, probe in PROBES.items():
        lines.append(f"| {question} | " + " | ".join(probe(project) for project in tried.values()) + " |")
    used = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "jax", "keras", "optax", "jaxopt"))
    return (
        "\n".join([*lines, "", f"c = {C:g}; rows inside have norms from 0.001 to {INSIDE[-1]:g}. {used}, on a CPU."])
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", type=Path, help="a file to write the table to")
    args = parser.parse_args()
    found = table()
    print(found)
    if args.markdown:
        args.markdown.write_text(found)


if __name__ == "__main__":
    main()
