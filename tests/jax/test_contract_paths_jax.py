"""The contract on every way through the optax front, float64 among the dtypes, and from hard starts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from projgd import MaxNorm
from projgd.optax import apply_updates, maxnorm_projection
from tests.contract import (
    NUMPY,
    TIGHT,
    at_the_threshold,
    bits,
    check,
    columns,
    exact_norms,
    judge,
    judge_at_the_threshold,
)


def chained(w, u, c):
    tx = maxnorm_projection(c, axis=0)
    updates, _ = tx.update(u, tx.init(w), w)
    return optax.apply_updates(w, updates)


def at_once(w, u, c):
    return apply_updates(w, u, MaxNorm(c, axis=0))


def scanned(w, u, c):
    return jax.lax.scan(lambda w, u: (chained(w, u, c), None), w, u[None])[0]


WAYS = {
    "chain": chained,
    "chain, jit": jax.jit(chained, static_argnums=2),
    "chain, jit, traced c": jax.jit(chained),
    "chain, scan": jax.jit(scanned, static_argnums=2),
    "apply_updates": at_once,
    "apply_updates, jit": jax.jit(at_once, static_argnums=2),
    "apply_updates, jit, traced c": jax.jit(at_once),
}


def stepped(way, update_dtype=None):
    """A projection of NumPy columns: a step of `way` to them from half of them, which no rounding disturbs."""

    def project(w, c):
        with jax.enable_x64(w.dtype == np.float64), np.errstate(invalid="ignore"):
            p = w / w.dtype.type(2)
            u = np.where(np.isfinite(w) & (w != 0), w - p, w).astype(update_dtype or w.dtype)
            q = WAYS[way](jnp.asarray(p), jnp.asarray(u), c)
            assert q.dtype == w.dtype
            return np.asarray(q)

    return project


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("way", WAYS)
def test_around_the_bound(way, dtype):
    t = TIGHT[dtype]
    near = [0.0, 1e-3, 0.5, 1 - 3 * t, 1 - t / 9, 1.0, 1 + t / 9, 1.5, 2.0]
    c = 3.75  # in every dtype, so that a traced one is the same
    for n in (1, 333):
        w = columns(n, n, len(near) + 2, np.asarray([*near, 1, 1]) * c, dtype)
        w[0, -2], w[-1, -1] = np.nan, -np.inf
        check(stepped(way), w, c)
        if dtype == "bfloat16":
            check(stepped(way, "float32"), w, c)


@pytest.mark.parametrize("way", [way for way in WAYS if "traced" not in way])  # a traced c is rounded
@given(at_the_threshold())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_at_the_threshold(way, case):
    w, c = case
    judge_at_the_threshold(w, stepped(way)(w, c), c)


@pytest.mark.parametrize("c", [1e-3, 1e4])
@pytest.mark.parametrize("way", ["chain, jit", "apply_updates, jit"])
def test_float64_with_small_and_large_bounds(way, c):
    near = np.asarray([0.0, 0.5, 1 - 3e-12, 1.0, 1 + 1e-15, 5.0, 9.0 if "chain" in way else 1e200 / c])
    check(stepped(way), columns(0, 70, len(near), near * c, "float64"), c)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_far_outside(way, dtype):
    """|p| = 1e6, c = 4. `apply_updates` of projgd is tight at once; p + u of optax can only be as fine as p."""
    w = columns(0, 75, 9, 1e6, dtype)
    still = np.full_like(w, -0.0)
    with jax.enable_x64(dtype == "float64"):
        first = np.asarray(WAYS[way](jnp.asarray(w), jnp.asarray(still), 4.0))
        outwards = jnp.asarray(columns(1, 75, 9, 20.0, dtype))
        second = np.asarray(WAYS[way](jnp.asarray(first), outwards, 4.0))
    assert (exact_norms(first) <= 4).all()
    assert (exact_norms(second) <= 4).all()
    assert (exact_norms(second) >= 4 * (1 - TIGHT[dtype])).all()
    if way.startswith("apply_updates"):
        judge(w, first, first, 4.0)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("jitted", [False, True])
def test_subnormal_entries_are_what_the_plain_step_makes_of_them(dtype, jitted):
    """XLA on a CPU takes subnormal sums for 0 (not in float16, which it adds in float32): the projection takes none."""
    tiny = {"float32": 1e-40, "float64": 1e-310, "bfloat16": 1e-40, "float16": 5e-7}[dtype]
    w = np.asarray([[0.5, tiny, -0.0], [tiny, tiny, 1.0], [-tiny, tiny, tiny]]).astype(NUMPY[dtype])
    with jax.enable_x64(dtype == "float64"):
        p = jnp.asarray(w)
        steps = [optax.apply_updates, lambda p, u: chained(p, u, 4.0), lambda p, u: at_once(p, u, 4.0)]
        for zero in (0.0, -0.0):
            u = jnp.full(w.shape, zero, dtype)
            plain, *ours = ((jax.jit(step) if jitted else step)(p, u) for step in steps)
            for q in ours:
                assert (bits(np.asarray(q)) == bits(np.asarray(plain))).all()
        project = MaxNorm(4.0, axis=0).project
        assert (bits(np.asarray((jax.jit(project) if jitted else project)(p))) == bits(w)).all()
