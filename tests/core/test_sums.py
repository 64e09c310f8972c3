"""Sums of squares: as accurate as their bound says, at any size of the numbers."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from array_api_compat import array_namespace

from projgd import sums
from projgd.axes import Vectors
from tests.contract import NUMPY
from tests.core.arrays import LIBRARIES, back, to


@pytest.mark.parametrize("name", NUMPY)
def test_the_table_of_dtypes(name):
    kind, info = sums.FLOATS[name], ml_dtypes.finfo(NUMPY[name])
    assert kind.unit == float(info.eps) / 2
    assert kind.tiny == (2.0**-25 if name == "float16" else float(info.smallest_normal))
    assert sums.float_type(np.zeros(1, NUMPY[name])) is kind
    assert sums.float_type(torch.zeros(1, dtype=getattr(torch, name))) is kind


@pytest.mark.parametrize("x", [np.arange(3), np.ones(2, bool), np.ones(2, complex), torch.arange(3)], ids=str)
def test_other_dtypes_are_refused_by_name(x):
    with pytest.raises(TypeError, match="weights has dtype"):
        sums.float_type(x, "weights")


@pytest.mark.parametrize("n", [1, 2, 8, 9, 63, 128, 1000, 4608, 10**6])
def test_a_norm_is_as_accurate_as_its_bound(n):
    """Equal entries make all roundings of a plain sum go one way."""
    kind, vectors = sums.FLOATS["float32"], Vectors((n, 1), (0,))
    bound = sums.norm_error(kind, vectors)
    assert bound <= sums.guard(kind, vectors) <= 36 * 2.0**-24
    jitted = jax.jit(lambda x: sums.norm(x, (0,), jnp))
    for value in (0.1, 1 / 3, 0.7):
        x = np.full((n, 1), value, np.float32)
        exact = float(np.float32(value)) * math.sqrt(n)
        for found in (sums.norm(x, (0,)), jitted(x)):
            assert abs(float(found[0, 0]) / exact - 1) <= bound


def test_a_guard_allows_for_a_sum_in_any_order():
    """n equal squares, one after the other: each addition errs by a unit at most."""
    for name, kind in sums.FLOATS.items():
        units = sums.guard(kind, Vectors((50,), (0,))) / sums.FLOATS[kind.compute].unit
        assert units == 50 / 2 + 6, name
    assert sums.guard(sums.FLOATS["float64"], Vectors((10**6,), (0,))) == (4096 / 2 + 6) * 2.0**-53


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e30, 3e38])
@pytest.mark.filterwarnings("ignore:overflow")  # of a norm that is above the largest number
def test_a_norm_neither_over_nor_underflows(library, size):
    x = np.asarray([[size, 0.0], [-0.9 * size, 0.0], [0.1 * size, -0.0]], np.float32)
    exact = np.linalg.norm(x.astype(np.float64), axis=0)
    found = back(sums.norm(to(library, x), (0,)))
    if size * 1.35 > 3.4e38:
        assert np.isposinf(found[0, 0])
    elif library != "jax" or size > 1e-38:  # XLA takes subnormal numbers for 0
        np.testing.assert_allclose(found[0], exact, rtol=1e-6, atol=2.0**-149)
    assert found[0, 1] == 0


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_norm_shows_what_is_not_finite(library):
    x = np.asarray([[1.0, np.nan, 1.0, np.inf], [2.0, 1.0, -np.inf, np.nan]], np.float32)
    found = back(sums.norm(to(library, x), (0,)))[0]
    assert found[2] == np.inf
    assert np.isnan(found[[1, 3]]).all()
    assert back(sums.norm(to(library, np.zeros((0, 3), np.float16)), (0,))).tolist() == [[0.0] * 3]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_a_tree_adds_every_entry_once(library, axes):
    """Integers add up without rounding. The sizes are no multiples of a block."""
    x = np.random.default_rng(0).integers(-9, 9, (37, 150, 11)).astype(np.float32)
    xp = array_namespace(to(library, x))
    assert (back(sums.tree_sum(to(library, x), axes, xp)) == x.sum(axes, keepdims=True)).all()
    np.testing.assert_allclose(back(sums.running_sum(to(library, x[0]), xp)), np.cumsum(x[0], -1))
    long = np.ones((2, 3000), np.float32)
    assert (back(sums.running_sum(to(library, long), xp)) == np.arange(1, 3001)).all()


def test_the_root_of_a_sum_of_squares_has_the_derivative_0_at_0():
    assert jax.grad(lambda x: sums.root(x * x, jnp))(0.0) == 0.0
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    sums.root(x * x, torch).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("w_size", "u_size"), [(1.0, 1.0), (1e30, 1e-30), (1e-30, 1e30), (2e38, 2e38)])
def test_how_an_update_lies_to_the_weights(w_size, u_size):
    w, u = np.asarray([[0.6, 0, 0.3]]) * w_size, np.asarray([[0.6, 1, 0]]) * u_size
    z, r, m = sums.measure(u.astype(np.float32), w.astype(np.float32), (1,), np)
    np.testing.assert_allclose(z * r.astype(np.float64), u, rtol=1e-6)
    nw, nu = np.linalg.norm(w), np.linalg.norm(u)
    np.testing.assert_allclose([m.w[0, 0], m.u[0, 0]], [nw, nu], rtol=1e-6)
    np.testing.assert_allclose(m.cosine, (w @ u.T) / nw / nu, rtol=1e-6)
    summed = sums.measures_of(*((a * b).sum(1, keepdims=True) for a, b in ((w, w), (u, u), (w, u))), np)
    np.testing.assert_allclose([part.item() for part in summed], [part.item() for part in m], rtol=1e-6)


def test_a_vector_of_zeros_has_the_cosine_0():
    _, _, m = sums.measure(np.zeros((1, 3)), np.ones((1, 3)), (1,), np)
    assert (m.cosine, m.u) == (0, 0)
    zero = np.zeros((1, 1))
    assert sums.measures_of(zero, zero + 1, zero, np).cosine == 0
