"""The contract of every set of norms on arrays of NumPy, PyTorch and JAX, judged in exact arithmetic."""

import functools
import math
import warnings

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from projgd import MaxNorm, MinMaxNorm, Sphere, bands, projections
from projgd.axes import Vectors
from projgd.sums import FLOATS
from tests.contract import (
    NUMPY,
    TIGHT,
    at_the_threshold,
    bits,
    check,
    columns,
    exact_norms,
    judge_at_the_threshold,
    judge_norms,
)
from tests.core.arrays import by, to

LARGEST = {"float64": 1e300, "float32": 3e38, "float16": 6e4, "bfloat16": 3e38}
WAYS = {"numpy": ("numpy", False), "torch": ("torch", False), "jax": ("jax", False), "jitted": ("jax", True)}
FAST = ("numpy", "torch", "jitted")  # without the operations of JAX one by one, each of which is compiled
SETS = {
    "MaxNorm": lambda c: MaxNorm(c, 0),
    "MinMaxNorm": lambda c: MinMaxNorm(c / 4, c, axis=0),
    "narrow": lambda c: MinMaxNorm(c * 0.999, c, axis=0),
    "Sphere": lambda c: Sphere(c, 0),
}


def projected(way, set_):
    library, jitted = WAYS[way]
    return by(library, set_.project, jitted)


@functools.cache
def ball_of(c):
    """The same object for the same c, for which JAX compiles once."""
    return MaxNorm(c, 0)


def ball(way):
    """For `check`: the max-norm projection as a function of the columns and c."""
    return lambda w, c: projected(way, ball_of(c))(w)


def check_set(way, w, set_):
    """The contract for the columns of `w`."""
    project, (low, high) = projected(way, set_), set_.edges()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing overflows on the way either
        q = project(w)
        again = project(q)
    judge_norms(w, q, np.asarray(low), np.asarray(high))
    broken = ~np.isfinite(np.asarray(w, np.float64)).all(0)
    assert (bits(q)[:, broken] == bits(w)[:, broken]).all(), "laundered"
    assert (bits(again) == bits(q)).all(), "idempotent"
    return q


def around(c, dtype):
    """Norms in, at and around every band of `SETS`."""
    eps, t = FLOATS[dtype].unit, TIGHT[dtype]
    near = [0.0, 1e-3, 0.5, 1 - 3 * t, 1 - eps, 1.0, 1 + eps, 1 + 4 * eps, 1.5, 5.0]
    near += [(1 - 3 * t) / 4, (1 - eps) / 4, 0.25, (1 + eps) / 4, (1 + 3 * t) / 4]
    return np.asarray(near) * c


EVERY = [(name, dtype, way) for name in SETS for dtype in NUMPY for way in FAST[:2]]
# JAX compiles each case, and its front has a matrix of its own.
EVERY += [("MaxNorm", dtype, "jitted") for dtype in NUMPY] + [(name, "float32", "jitted") for name in list(SETS)[1:]]


@pytest.mark.parametrize(("name", "dtype", "way"), EVERY)
def test_around_the_edges(name, dtype, way):
    bounds, sizes = ((3.7,), (333,)) if way == "jitted" else ((1e-3, 3.7, 1e4), (1, 2, 7, 64, 333))
    for c in bounds:
        for n in sizes:
            narrow = name == "narrow" and dtype not in ("float32", "float64")
            coarse = dtype == "float16" and c < 1 and name != "MaxNorm"
            if not (narrow or coarse):  # no float16 is as near
                check_set(way, columns(n, n, 15, around(c, dtype), dtype), SETS[name](c))


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("dtype", NUMPY)
def test_long_vectors(way, dtype):
    """300,000 equal entries: what adds them up one after the other is off by thousands of units."""
    w = np.ones((300_000, 3))
    w[:, 1] = np.random.default_rng(0).standard_normal(len(w))
    check(ball(way), np.asarray(w * ([1.001, 1.2, 0.9] / exact_norms(w)), NUMPY[dtype]), 1.0)


@pytest.mark.parametrize("way", FAST)
def test_where_float16_is_coarse(way):
    """Entries of some fifty subnormal steps: rounding them all towards zero would miss the bound by a per cent."""
    w = np.random.default_rng(0).standard_normal((100_000, 3))
    w[:, 2] **= 5
    check(ball(way), np.asarray(w * (1e-3 * np.asarray([1.2, 3.0, 50.0]) / exact_norms(w)), np.float16), 1e-3)


@pytest.mark.parametrize("way", FAST[:2])
def test_half_precision_where_all_roundings_go_outwards(way):
    """Scaled, one entry lies above the middle of two float16 numbers, and 4,299 so among subnormal ones."""
    w = np.full((4300, 1), 2.0**-7, np.float16)
    w[0] = 2047 / 1024
    check(ball(way), w, 0.00807286)
    below_1000_steps = 20_000 * 2.0**-24 * (1 - 2.0**-26)
    check(ball(way), np.full((400, 1), 2000 * 2.0**-24, np.float16), below_1000_steps)


@pytest.mark.parametrize(
    ("name", "dtype", "way"), [*(case for case in EVERY if case[0] != "narrow"), ("MaxNorm", "float32", "jax")]
)
def test_any_size(name, way, dtype):
    """Huge, subnormal and zero entries, one huge entry among tiny ones, NaN and inf in some columns."""
    w = np.random.default_rng(1).standard_normal((5, 12))
    w[:, 0] *= LARGEST[dtype] / np.abs(w[:, 0]).max()
    w[:, 1] = LARGEST[dtype]
    w[:, 2] = [LARGEST[dtype], 1e-7, -1e-7, 0.0, -0.0]
    w[:, 3], w[:, 4] = 0.0, -0.0
    flushed = way in ("jax", "jitted") and name != "MaxNorm"  # XLA takes subnormal numbers for 0, which stay
    w[:, 5] = 1e-30 if flushed and dtype != "float16" else 6e-8 if dtype == "float16" else 1.4e-45
    w[0, 6], w[1, 7], w[2, 8] = np.nan, np.inf, -np.inf
    w[:, 9] *= 1e20 if dtype in ("float32", "bfloat16") else 1e3
    w = w.astype(NUMPY[dtype])
    q = check_set(way, w, SETS[name](4.0))
    assert abs(float(q[0, 2])) >= 4.0 * (1 - TIGHT[dtype])
    if way in ("numpy", "torch"):
        check_set(way, w[:1], SETS[name](4.0))


@pytest.mark.parametrize("way", FAST[:2])
@pytest.mark.parametrize("dtype", NUMPY)
def test_one_broken_entry_of_many(way, dtype):
    w = columns(0, 200, 6, 8.0, dtype)
    w[0, 0], w[100, 1], w[-1, 2], w[2, 3] = np.nan, np.nan, np.inf, -np.inf
    check(ball(way), w, 4.0)


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_traced_bound(dtype):
    w = columns(0, 200, 10, np.asarray([0.1, 3.9, 4.0, 4.1, 9.0, 1e3, 8, 8, 8, 8]), dtype)
    w[0, 6], w[100, 7], w[-1, 8], w[2, 9] = np.nan, np.nan, np.inf, -np.inf
    with jax.enable_x64(dtype == "float64"):
        project = jax.jit(lambda w, c: MaxNorm(c, 0).project(w))
        for c in (2.0**-10, 4.0):
            check(lambda w, c: np.asarray(project(jnp.asarray(w), c)), w, c)


@pytest.mark.parametrize("way", FAST)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_unit_above_and_below(way, dtype):
    c = 4.0
    kind = NUMPY[dtype]
    above, below = np.nextafter(kind(c), kind(9)), np.nextafter(kind(c), kind(0))
    w = np.zeros((3, 3), kind)
    w[1] = [c, above, below]
    check(ball(way), w, c)
    check(ball(way), w[1:2], c)


@given(
    st.sampled_from(sorted(NUMPY)),
    st.sampled_from(["MaxNorm", "MinMaxNorm", "Sphere"]),
    st.integers(1, 40),
    st.integers(1, 4),
    st.floats(-1, 4).map(lambda e: 10.0**e),
    st.data(),
)
@settings(max_examples=120)
def test_any_weights(dtype, name, n, rows, c, data):
    largest = min(LARGEST[dtype], 1e38)
    entry = (
        st.floats(-largest, largest) | st.floats(-2 * c, 2 * c) | st.sampled_from([0.0, -0.0, np.nan, np.inf, c, -c])
    )
    entries = data.draw(st.lists(entry, min_size=n * rows, max_size=n * rows))
    with np.errstate(over="ignore"):
        w = np.asarray(entries).reshape(n, rows).astype(NUMPY[dtype])
    for way in ("numpy", "torch"):
        check_set(way, w, SETS[name](c))


@given(at_the_threshold())
@settings(max_examples=25)
def test_at_the_threshold(case):
    w, c = case
    for way in ("numpy", "torch"):
        judge_at_the_threshold(w, projected(way, MaxNorm(c, 0))(w), c)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["MaxNorm", "MinMaxNorm", "Sphere"])
def test_one_answer(name, dtype):
    """NumPy, PyTorch and JAX: to 1e-6 in float32, one last place in the short types."""
    w = columns(0, 4608, 40, np.linspace(0.1, 3, 40), dtype)
    ways = FAST if dtype == "float32" or name == "MaxNorm" else FAST[:2]
    answers = [np.asarray(projected(way, SETS[name](1.0))(w), np.float64) for way in ways]
    room = 1e-6 if dtype == "float32" else 2 * FLOATS[dtype].unit
    for other in answers[1:]:
        np.testing.assert_allclose(other, answers[0], rtol=room, atol=1e-12 if dtype != "float16" else 2.0**-24)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_vectors_along_any_axes(axes):
    x = np.random.default_rng(0).standard_normal((4, 3, 5))
    norms = np.linalg.norm(x, axis=axes, keepdims=True) if len(axes) < 3 else np.linalg.norm(x).reshape(1, 1, 1)
    c = float(np.median(norms)) * 0.9
    band = bands.ball_band(FLOATS["float64"], Vectors(x.shape, axes), c)
    np.testing.assert_allclose(projections.project_band(x, band, axes), x * np.minimum(1, c / norms), rtol=1e-12)


def test_one_bound_for_each_vector():
    x = np.full((2, 3), 3.0)
    bounds = np.asarray([[1.0], [9.0]])
    band = bands.Band(0.0, bounds, 0.0, bounds)
    assert np.linalg.norm(projections.project_band(x, band, (1,)), axis=1) == pytest.approx([1, 27**0.5])


def test_a_share_of_the_way_does_not_overflow():
    w = np.full((2, 1), 2e38, np.float32)
    project = functools.partial(MinMaxNorm(0.0, 1.0, 0.5, axis=0).project)
    np.testing.assert_allclose(project(w), w / 2, rtol=1e-6)
    assert torch.equal(project(torch.tensor([[2e38, 2e38]]).T), torch.tensor([[1e38, 1e38]]).T)


@pytest.mark.parametrize("way", FAST)
def test_a_share_of_the_way_in_coarse_float16(way):
    w = np.full((1000, 1), 0.01, np.float16)
    for rate, norm in ((0.0, 0.01), (0.5, 0.01 / 2 + 1e-3 / 1000**0.5 / 2)):
        q = projected(way, MinMaxNorm(0.0, 1e-3, rate, axis=0))(w)
        np.testing.assert_allclose(np.asarray(q, np.float64), float(w[0, 0]) / 0.01 * norm, rtol=1e-3)


def test_the_derivative_of_a_projection_is_that_of_its_formula():
    """Outside d/dx x·c/‖x‖ = c/‖x‖ (I - x xᵀ/‖x‖²), inside the identity, and finite at 0."""
    x = np.asarray([3.0, 4.0])
    outside = (np.eye(2) - np.outer(x, x) / 25) / 5
    set_ = MaxNorm(1.0, None)
    by_jax = jax.jit(jax.jacobian(set_.project))
    for point, wanted in ((x, outside), (x / 10, np.eye(2)), (0 * x, np.eye(2))):
        np.testing.assert_allclose(by_jax(jnp.asarray(point, jnp.float32)), wanted, rtol=1e-5, atol=1e-6)
        found = torch.autograd.functional.jacobian(set_.project, to("torch", point))
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("most", [1.0, math.inf])
def test_entries_are_projected_one_by_one(most):
    x = np.asarray([[-2.0, 0.5, 7.0, np.nan]])
    wanted = [[0.0, 0.5, min(7.0, most), np.nan]]
    found = projections.project_interval(x, 0.0, most)
    np.testing.assert_allclose(found, wanted, rtol=1e-15)
