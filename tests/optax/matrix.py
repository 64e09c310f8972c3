"""Every form of the projection, on every set, dtype and shape: what `test_projection.py` puts to the contract.

One program projects all sets and shapes at once, as the leaves of one tree.
"""

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from projgd import Constraint, MaxNorm, MinMaxNorm, Sphere, UnitNorm
from projgd.optax import apply_updates, project, projection
from projgd.sums import FLOATS
from tests.contract import NUMPY, TIGHT, columns

C = 3.75
"""In every dtype the same, so that a traced one is."""

SETS: dict[str, tuple[Callable[[Any], Constraint], float, float]] = {  # by c; the smallest and the largest norm
    "MaxNorm": (MaxNorm, 0.0, C),
    "MinMaxNorm": (lambda c: MinMaxNorm(1.5, c), 1.5, C),
    "Sphere": (Sphere, C, C),
    "UnitNorm": (lambda c: UnitNorm(), 1.0, 1.0),
}
SHAPES = {"1": (1,), "conv": (3, 3, 37)}
LEAVES = ["MaxNorm/1", "MaxNorm/conv", "MinMaxNorm/conv", "Sphere/conv", "UnitNorm/1"]
HUGE = {"float64": 1e200, "float32": 1e30, "bfloat16": 1e30, "float16": 6e4}
TINY = {"float64": 1e-200, "float32": 1e-30, "bfloat16": 1e-30, "float16": 1e-6}


def projected(p, u, sets):
    return project(optax.apply_updates(p, u), sets)


def applied(p, u, sets):
    return apply_updates(p, u, sets)


def chained(p, u, sets):
    tx = projection(sets)
    return optax.apply_updates(p, tx.update(u, tx.init(p), p)[0])


def scanned(p, u, sets):
    return jax.lax.scan(lambda p, u: (chained(p, u, sets), None), p, jax.tree.map(lambda u: u[None], u))[0]


@dataclass(frozen=True)
class Form:
    """How weights are projected: the function, and whether it is jitted, and c traced."""

    move: Callable[[Any, Any, Any], Any]
    jit: bool = False
    traced: bool = False

    def program(self):
        """Return the function of p and u that projects p + u, each leaf by the set that its name begins with."""

        def move(p, u, c=C):
            return self.move(p, u, {name: SETS[name.partition("/")[0]][0](c) for name in p})

        jitted = jax.jit(move) if self.jit or self.traced else move
        return functools.partial(jitted, c=C) if self.traced else jitted


FORMS = {
    "project": Form(projected),
    "project, jit": Form(projected, jit=True),
    "apply_updates": Form(applied),
    "apply_updates, jit": Form(applied, jit=True),
    "chain": Form(chained),
    "chain, jit": Form(chained, jit=True),
    "chain, jit, traced c": Form(chained, traced=True),
    "chain, scan": Form(scanned, jit=True),
}
SAME = [(dtype, dtype) for dtype in NUMPY]
DTYPES = {  # of the weights and of the update
    "project, jit": SAME,
    "apply_updates, jit": [*SAME, ("bfloat16", "float32")],
    "chain, jit": [*SAME, ("bfloat16", "float32"), ("float16", "float32")],
}


def is_tried(form: str, dtype: str, update: str, leaf: str) -> bool:
    """Programs are dear: all leaves in float32, `conv` in other dtypes, a ball and a sphere in two dtypes at once."""
    kind, shape = leaf.split("/")
    if FORMS[form].traced or update != dtype:
        return kind in ("MaxNorm", "Sphere") and shape == "conv"
    return dtype == "float32" or shape == "conv"


CASES = [
    (form, dtype, update, leaf)
    for form in FORMS
    for dtype, update in DTYPES.get(form, [("float32", "float32")])
    for leaf in LEAVES
    if is_tried(form, dtype, update, leaf)
]


def start(leaf: str, dtype: str) -> np.ndarray:
    """Return columns on, beside and far from the edges of a set; the last ones are 0, tiny, huge, NaN and infinite."""
    kind, shape = leaf.split("/")
    _, low, high = SETS[kind]
    t, unit = TIGHT[dtype], float(FLOATS[dtype].unit)
    around = [1e-3, 0.5, 1 - 3 * t, 1 - t / 9, 1.0, 1 + t / 9, 1.5, 2.0, *(1 + unit * np.linspace(-3, 3, 40))]
    norms = [share * edge for edge in (low or high, high) for share in around]  # as many for all: programs are shared
    n = math.prod(SHAPES[shape])
    w = columns(n, n, len(norms) + 5, np.asarray([*norms, 0, TINY[dtype], HUGE[dtype], 1, 1]), dtype)
    w[0, -2], w[-1, -1] = np.nan, -np.inf
    return w


@functools.cache
def outcome(form: str, dtype: str, update: str) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return by leaf the columns, their projections, and the projections of these.

    Each is reached from its half, so that no rounding disturbs the step; a huge one from 0, because the difference that
    a chain takes is only as fine as the weights.
    """

    program = FORMS[form].program()

    def step(ws):
        ps = {
            name: np.where(abs(w).max(0) > np.sqrt(HUGE[dtype]), np.zeros_like(w), w / w.dtype.type(2))
            for name, w in ws.items()
        }
        us = {name: np.where(np.isfinite(w) & (w != 0), w - ps[name], w) for name, w in ws.items()}
        leaves = {name: w.shape for name, w in ws.items()}
        p = {name: jnp.asarray(ps[name].reshape(*SHAPES[name.partition("/")[2]], -1)) for name in leaves}
        u = {name: jnp.asarray(us[name].reshape(p[name].shape), update) for name in leaves}
        q = program(p, u)
        assert all(q[name].dtype == w.dtype for name, w in ws.items())
        return {name: np.asarray(q[name]).reshape(shape) for name, shape in leaves.items()}

    with jax.enable_x64(dtype == "float64"), np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing overflows on the way either
        ws = {case[3]: start(case[3], dtype) for case in CASES if case[:3] == (form, dtype, update)}
        qs = step(ws)
        return {name: (w, qs[name], again) for (name, w), again in zip(ws.items(), step(qs).values(), strict=True)}
