"""The contract of MaxNorm on the reference path, for NumPy, PyTorch and JAX arrays, judged in exact arithmetic."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from projgd import MaxNorm, projections
from tests.contract import (
    NUMPY,
    TIGHT,
    at_the_threshold,
    bits,
    check,
    columns,
    exact_norms,
    judge_at_the_threshold,
)

LARGEST = {"float64": 1e300, "float32": 3e38, "float16": 6e4, "bfloat16": 3e38}


def on_numpy(w, c):
    return MaxNorm(c, axis=0).project(w)


def on_torch(w, c):
    dtype = getattr(torch, w.dtype.name)
    x = torch.from_numpy(bits(w).view(f"int{8 * w.itemsize}").copy()).view(dtype)
    q = MaxNorm(c, axis=0).project(x)
    assert q.dtype == dtype
    assert q.shape == x.shape
    return q.contiguous().view(getattr(torch, f"int{8 * w.itemsize}")).numpy().view(w.dtype)


def on_jax(w, c):
    with jax.enable_x64(w.dtype == np.float64):
        q = MaxNorm(c, axis=0).project(jnp.asarray(w))
        assert q.dtype == w.dtype
        return np.asarray(q)


def on_jax_jitted(w, c):
    with jax.enable_x64(w.dtype == np.float64):
        return np.asarray(jax.jit(MaxNorm(c, axis=0).project)(jnp.asarray(w)))


def on_jax_with_c_traced(w, c):
    with jax.enable_x64(w.dtype == np.float64):
        return np.asarray(jax.jit(lambda w, c: MaxNorm(c, axis=0).project(w))(jnp.asarray(w), c))


PATHS = [on_numpy, on_torch, on_jax, on_jax_jitted]


@pytest.mark.parametrize("project", [on_numpy, on_torch, on_jax_jitted])
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("c", [1e-3, 3.7, 1e4])
def test_around_the_bound(project, dtype, c):
    eps = float(projections.FLOATS[dtype].unit)
    near = [0.0, 1e-3, 0.5, 1 - 3 * TIGHT[dtype], 1 - eps, 1.0, 1 + eps, 1 + 4 * eps, 1.5, 5.0]
    for n in (1, 333) if project is on_jax_jitted else (1, 2, 7, 64, 333):
        check(project, columns(n, n, len(near), np.asarray(near) * c, dtype), c)


@pytest.mark.parametrize("project", [on_numpy, on_torch, on_jax_jitted])
@pytest.mark.parametrize("dtype", NUMPY)
def test_long_vectors(project, dtype):
    """A million equal entries: what adds them up one after the other is off by thousands of units."""
    w = np.ones((1_000_000, 3))
    w[:, 1] = np.random.default_rng(0).standard_normal(len(w))
    check(project, np.asarray(w * ([1.001, 1.2, 0.9] / exact_norms(w)), NUMPY[dtype]), 1.0)


@pytest.mark.parametrize("project", [on_numpy, on_torch, on_jax_jitted])
def test_where_float16_is_coarse(project):
    """Entries of some fifty subnormal steps: rounding them all towards zero would miss the bound by a per cent."""
    w = np.random.default_rng(0).standard_normal((100_000, 3))
    w[:, 2] **= 5
    check(project, np.asarray(w * (1e-3 * np.asarray([1.2, 3.0, 50.0]) / exact_norms(w)), np.float16), 1e-3)


@pytest.mark.parametrize("project", PATHS)
@pytest.mark.parametrize("dtype", NUMPY)
def test_any_size(project, dtype):
    """Huge, subnormal and zero entries, one huge entry among tiny ones, NaN and inf in some columns."""
    w = np.random.default_rng(1).standard_normal((5, 12))
    w[:, 0] *= LARGEST[dtype] / np.abs(w[:, 0]).max()
    w[:, 1] = LARGEST[dtype]
    w[:, 2] = [LARGEST[dtype], 1e-7, -1e-7, 0.0, -0.0]
    w[:, 3] = 0.0
    w[:, 4] = -0.0
    w[:, 5] = float(np.finfo(np.float32).smallest_subnormal if dtype != "float16" else 6e-8)
    w[0, 6], w[1, 7], w[2, 8] = np.nan, np.inf, -np.inf
    w[:, 9] *= 1e20 if dtype in ("float32", "bfloat16") else 1e3
    w = w.astype(NUMPY[dtype])
    check(project, w, 4.0)
    check(project, w[:1], 4.0)
    q = np.asarray(project(w, 4.0), np.float64)
    assert abs(q[0, 2]) >= 4.0 * (1 - TIGHT[dtype])


@pytest.mark.parametrize("project", [*PATHS, on_jax_with_c_traced])
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("c", [2.0**-10, 4.0])
def test_one_broken_entry_of_many(project, dtype, c):
    w = columns(0, 200, 6, 2 * c, dtype)
    w[0, 0], w[100, 1], w[-1, 2], w[2, 3] = np.nan, np.nan, np.inf, -np.inf
    check(project, w, c)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_unit_above_and_below(dtype):
    c = 4.0
    kind = NUMPY[dtype]
    above, below = np.nextafter(kind(c), kind(9)), np.nextafter(kind(c), kind(0))
    w = np.zeros((3, 3), kind)
    w[1] = [c, above, below]
    for project in PATHS:
        check(project, w, c)
        check(project, w[1:2], c)


@given(
    st.sampled_from(sorted(NUMPY)),
    st.integers(1, 40),
    st.integers(1, 4),
    st.floats(-3, 4).map(lambda e: 10.0**e),
    st.data(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_weights(dtype, n, rows, c, data):
    largest = min(LARGEST[dtype], 1e38)
    entry = (
        st.floats(-largest, largest) | st.floats(-2 * c, 2 * c) | st.sampled_from([0.0, -0.0, np.nan, np.inf, c, -c])
    )
    entries = data.draw(st.lists(entry, min_size=n * rows, max_size=n * rows))
    with np.errstate(over="ignore"):
        w = np.asarray(entries).reshape(n, rows).astype(NUMPY[dtype])
    if dtype == "float16" and c < 0.1:
        c = 0.1
    for project in (on_numpy, on_torch):
        check(project, w, c)


@pytest.mark.parametrize("project", PATHS)
def test_half_precision_where_all_roundings_go_outwards(project):
    """Scaled, one entry lies above the middle of two float16 numbers, and 4,299 so among subnormal ones."""
    w = np.full((4300, 1), 2.0**-7, np.float16)
    w[0] = 2047 / 1024
    check(project, w, 0.00807286)
    below_1000_steps = 20_000 * 2.0**-24 * (1 - 2.0**-26)
    check(project, np.full((400, 1), 2000 * 2.0**-24, np.float16), below_1000_steps)


@given(at_the_threshold())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_at_the_threshold(case):
    w, c = case
    for project in PATHS:
        judge_at_the_threshold(w, project(w, c), c)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_one_answer(dtype):
    """NumPy, PyTorch and JAX: to 1e-6 in float32, one last place in the short types."""
    for n in (3, 100, 4608):
        w = columns(n, n, 40, np.linspace(0.1, 3, 40), dtype)
        answers = [np.asarray(project(w, 1.0), np.float64) for project in PATHS]
        room = 1e-6 if dtype == "float32" else 2 * float(projections.FLOATS[dtype].unit)
        for other in answers[1:]:
            np.testing.assert_allclose(other, answers[0], rtol=room, atol=1e-12 if dtype != "float16" else 2.0**-24)


@pytest.mark.parametrize("like", [np.asarray, torch.as_tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (), (5,)])
def test_empty_and_scalar(like, shape):
    w = np.full(shape, 9.0, np.float32)
    got = MaxNorm(4.0, axis=None).project(like(w))
    assert tuple(got.shape) == shape
    assert math.prod(shape) == 0 or 4.0 * (1 - 1e-5) <= np.linalg.norm(np.asarray(got, np.float64)) <= 4.0
    assert (np.asarray(MaxNorm(4.0).project(like(w))) == w).all()  # no fan-in, or nothing in it


@pytest.mark.parametrize("like", [np.asarray, torch.as_tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_violation_shows_what_is_not_finite(like):
    w = np.asarray([[3.0, np.nan, 1.0, 6.0], [0.5, 1.0, -np.inf, 8.0]], np.float32)
    shown = np.asarray(MaxNorm(4.0, axis=0).violation(like(w)))
    np.testing.assert_array_equal(shown, [0.0, np.nan, np.inf, 6.0])


def test_the_layouts():
    """Fan-in is every axis but the first in PyTorch, every axis but the last elsewhere."""
    w = np.zeros((2, 3), np.float32)
    w[0] = 3.0
    assert (np.asarray(MaxNorm(4.0).project(torch.as_tensor(w)))[0] < 3).all()
    assert (MaxNorm(4.0).project(w) == w).all()


@pytest.mark.parametrize("n", [1, 2, 8, 9, 63, 128, 1000, 4608, 10**6])
def test_the_sum_is_as_accurate_as_its_bound(n):
    """Equal entries make all roundings of a plain sum go one way."""
    kind = projections.FLOATS["float32"]
    for value in (0.1, 1 / 3, 0.7):
        x = np.full((n, 1), value, np.float32)
        exact = float(np.float32(value)) * math.sqrt(n)
        bound = projections.norm_error(kind, x.shape, (0,))
        assert bound <= projections.guard(kind, x.shape, (0,)) <= 36 * 2.0**-24
        for got in (projections.norm(x, (0,)), jax.jit(lambda x: projections.norm(x, (0,), jnp))(x)):
            assert abs(float(got[0, 0]) / exact - 1) <= bound
