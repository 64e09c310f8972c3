"""Projection in a diagonal metric: optimality, agreement with other solvers, and the sets' contract."""

import functools
import math

import array_api_compat.torch as torch_xp
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projgd import MaxNorm, MinMaxNorm, NonNegative, UnitNorm, bands, metrics
from projgd.axes import Vectors
from projgd.sums import float_type
from tests.contract import TIGHT
from tests.optimality import residual


def vectors(y, axes):
    return float_type(y), Vectors(tuple(y.shape), axes)


def project_ball(y, d, c, axes, repeat=None):
    return metrics.project_band(y, d, bands.ball_band(*vectors(y, axes), c), axes, None, repeat)


def project_sphere(y, d, c, axes):
    return metrics.project_band(y, d, bands.sphere_band(*vectors(y, axes), c), axes)


def loop(body, nu):
    """A loop that traces: the one thing that the core leaves to a front."""
    return jax.lax.fori_loop(0, metrics.STEPS, lambda _, nu: body(nu)[0], nu)


@st.composite
def problems(draw, longest=40):
    """Rows (y, D, c): any shape of spectrum, D over up to 12 orders of magnitude, y barely or far outside."""
    rows, n = draw(st.integers(1, 6)), draw(st.integers(1, longest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    span = draw(st.sampled_from([0.0, 1.0, 4.0, 12.0]))
    d = 10.0 ** rng.uniform(-span / 2, span / 2, (rows, n)) * 10.0 ** rng.uniform(-6, 6, (rows, 1))
    y = rng.standard_normal((rows, n)) * 10.0 ** rng.uniform(-draw(st.sampled_from([0.0, 2.0])), 0, (rows, n))
    y *= d ** draw(st.sampled_from([0.0, 0.0, -0.25, 0.25]))
    c = 10.0 ** draw(st.floats(-2, 2))
    y *= c * 10.0 ** rng.uniform(-1, draw(st.sampled_from([0.1, 3.0])), (rows, 1)) / np.linalg.norm(y, axis=1)[:, None]
    return y, d, c


def exact(y, d, c):
    """The nearest point of norm c, by bisection on the secular equation with 60 digits."""
    with mpmath.workdps(60):
        pairs = [(mpmath.mpf(float(a)) * mpmath.mpf(float(b)), mpmath.mpf(float(b))) for a, b in zip(y, d, strict=True)]
        smallest = min(b for _, b in pairs)
        low, high = mpmath.mpf(10) ** -50 * smallest, sum(abs(w) for w, _ in pairs) / c + smallest
        for _ in range(260):
            middle = mpmath.sqrt(low * high)
            norm = mpmath.sqrt(sum((w / (b - smallest + middle)) ** 2 for w, b in pairs))
            low, high = (middle, high) if norm > c else (low, middle)
        return np.asarray([float(w / (b - smallest + high)) for w, b in pairs])


@settings(max_examples=80)
@given(problems())
def test_ball_satisfies_the_optimality_conditions_in_float32(problem):
    y, d, c = problem
    y, d = y.astype(np.float32), d.astype(np.float32)
    x = project_ball(y, d, c, (1,))
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    assert (norms <= c).all()
    outside = np.linalg.norm(y.astype(np.float64), axis=1) > c
    assert (norms[outside] >= c * (1 - TIGHT["float32"])).all()
    error, multiplier = residual(x[outside], y[outside], d[outside])
    assert (error <= 1e-6).all()
    assert (multiplier >= -1e-6).all()
    inside = np.linalg.norm(y.astype(np.float64), axis=1) <= c * (1 - TIGHT["float32"])
    assert np.array_equal(x[inside], y[inside])


@settings(max_examples=50)
@given(problems())
def test_sphere_satisfies_the_optimality_conditions_in_float32(problem):
    """The global minimum on the sphere is the stationary point with λ ≥ -min D (trust-region theory)."""
    y, d, c = problem
    y, d = y.astype(np.float32), d.astype(np.float32)
    x = project_sphere(y, d, c, (1,))
    assert np.allclose(np.linalg.norm(x.astype(np.float64), axis=1), c, rtol=1e-5)
    error, multiplier = residual(x, y, d)
    assert (error <= 1e-5).all()
    assert (multiplier >= -(d.min(1) / d.max(1)) - 1e-5).all()


@settings(max_examples=50)
@given(problems(), st.floats(0.1, 0.9))
def test_an_interval_is_its_nearer_sphere_and_leaves_what_is_inside(problem, share):
    y, d, c = problem
    y, d = y.astype(np.float32), d.astype(np.float32)
    x = MinMaxNorm(share * c, c).onto_in(d, y, (1,))
    before, after = (np.linalg.norm(a.astype(np.float64), axis=1) for a in (y, x))
    assert ((share * c <= after) & (after <= c)).all()
    edge = np.where(before > c, c, share * c)
    outside = (before > c) | (before < share * c)
    assert (abs(after / edge - 1)[outside] <= TIGHT["float32"]).all()
    error, multiplier = residual(x[outside], y[outside], d[outside])
    assert (error <= 1e-5).all()
    assert (multiplier[before[outside] > c] >= -1e-6).all()
    t = TIGHT["float32"]
    inside = (before >= share * c * (1 + t)) & (before <= c * (1 - t))
    assert np.array_equal(x[inside], y[inside])


def test_an_interval_goes_a_share_of_the_way():
    rng = np.random.default_rng(7)
    y, d = rng.standard_normal((20, 5)) * np.linspace(0.05, 3, 20)[:, None], 10 ** rng.uniform(-2, 2, (20, 5))
    whole, part = (MinMaxNorm(0.5, 2.0, rate).onto_in(d, y, (1,)) for rate in (1.0, 0.3))
    np.testing.assert_allclose(part, 0.3 * whole + 0.7 * y, rtol=1e-12)


@settings(max_examples=10)
@given(problems(longest=8))
def test_equals_the_exact_root_in_float64(problem):
    y, d, c = problem
    for function in (project_ball, project_sphere):
        x = function(y, d, c, (1,))
        for row in range(len(y)):
            if function is project_ball and np.linalg.norm(y[row]) <= c:
                assert np.array_equal(x[row], y[row])
            else:
                assert np.abs(x[row] - exact(y[row], d[row], c)).max() <= 1e-11 * c


def test_equals_a_general_constrained_solver():
    rng = np.random.default_rng(0)
    y, d = 3 * rng.standard_normal(4), 10 ** rng.uniform(-1.5, 1.5, 4)
    found = scipy.optimize.minimize(
        lambda x: (d * (x - y) ** 2).sum(),
        y / np.linalg.norm(y),
        jac=lambda x: 2 * d * (x - y),
        constraints={"type": "ineq", "fun": lambda x: 1 - x @ x, "jac": lambda x: -2 * x},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert np.allclose(project_ball(y[:, None], d[:, None], 1.0, (0,))[:, 0], found.x, atol=1e-6)


def test_no_point_of_the_sphere_is_nearer():
    rng = np.random.default_rng(0)
    y, d = 0.4 * rng.standard_normal((1, 3)), 10 ** rng.uniform(-1, 1, (1, 3))
    x = project_sphere(y, d, 1.0, (1,))
    others = rng.standard_normal((50_000, 3))
    others /= np.linalg.norm(others, axis=1)[:, None]
    assert (d * (x - y) ** 2).sum() <= (d * (others - y) ** 2).sum(1).min()


def test_sphere_where_the_lightest_entries_are_zero():
    """No λ > -min D reaches the radius: x_i = D_i y_i / (D_i - min D), and the lightest entries take the rest."""
    y = np.asarray([[0.0, 0.3, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    d = np.asarray([[1.0, 4.0, 1.0], [2.0, 3.0, 2.5], [1.0, 2.0, 3.0]])
    rest = math.sqrt((1 - 0.4**2) / 2)
    wanted = [[rest, 0.4, rest], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]  # zeros have no direction and stay
    assert np.allclose(project_sphere(y, d, 1.0, (1,)), wanted)
    assert np.allclose(MinMaxNorm(1.0, 2.0).onto_in(d, y, (1,)), wanted)


EVERY = [("torch", dtype, c) for dtype in TIGHT for c in (0.003, 4.0)]
EVERY += [("jax", "float16", 0.003)]


@pytest.mark.parametrize(("library", "dtype", "c"), EVERY)
def test_contract_in_every_dtype(library, dtype, c):
    """Held exactly, tight, untouched, idempotent whatever the second metric is; NaN and inf come back as they came."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((60, 33)) * 10.0 ** rng.uniform(-3, 3, (60, 1)) * c / math.sqrt(33)
    diagonal = 10.0 ** rng.uniform(-12, 0, (60, 33))
    set_ = MaxNorm(c)
    with jax.enable_x64(library == "jax"):
        if library == "torch":
            xp, y, d = torch_xp, torch.tensor(values).to(getattr(torch, dtype)), torch.tensor(diagonal)
            project = functools.partial(set_.onto_in, axes=(1,), xp=torch_xp)
        else:
            xp, y, d = jnp, jnp.asarray(values).astype(dtype), jnp.asarray(diagonal)
            project = jax.jit(lambda d, y: set_.onto_in(d, y, (1,), jnp, loop))
        y = xp.concat([y, xp.full_like(y[:1], math.nan), xp.full_like(y[:1], math.inf), y[:1] * 0])
        d = xp.concat([d, d[:3]])
        x = project(d, y)
        again = project(xp.flip(d, axis=0), x)
        before, after, twice = (np.asarray(xp.astype(a, xp.float64)) for a in (y, x, again))
    assert x.dtype == y.dtype
    assert np.array_equal(after, twice, equal_nan=True)
    norms = [math.sqrt(math.fsum(v * v for v in row)) for row in after[:60]]
    true = [math.sqrt(math.fsum(v * v for v in row)) for row in before[:60]]
    for row in range(60):
        assert norms[row] <= c
        if true[row] > c:
            assert norms[row] >= c * (1 - TIGHT[dtype])
        elif true[row] <= c * (1 - TIGHT[dtype]):
            assert np.array_equal(after[row], before[row])
    assert np.array_equal(after[60:], before[60:], equal_nan=True)


def test_all_libraries_give_one_answer_and_jax_traces_and_maps():
    rng = np.random.default_rng(5)
    y = (10 * rng.standard_normal((40, 100))).astype(np.float32)
    d = (10 ** rng.uniform(-8, 1, (40, 100))).astype(np.float32)
    for set_ in (MaxNorm(2.0), UnitNorm()):
        wanted = np.asarray(set_.onto_in(d, y, (1,), np))
        found = set_.onto_in(torch.tensor(d), torch.tensor(y), (1,), torch_xp).numpy()
        assert np.abs(wanted - found).max() <= 2e-6
    by_jax = jax.jit(lambda c: jax.vmap(lambda d, y: MaxNorm(c).onto_in(d, y, (0,), jnp, loop))(d, y))
    for c in (2.0, 5.0):
        wanted = np.asarray(MaxNorm(c).onto_in(d, y, (1,), np))
        assert np.abs(wanted - by_jax(c)).max() <= 1e-6 * c


def test_a_uniform_metric_is_the_euclidean_one():
    y = np.random.default_rng(1).standard_normal((20, 50)).astype(np.float32) * 3
    for scale in (1e-30, 1.0, 1e30, math.inf, 0.0):
        d = np.full_like(y, scale)
        for set_ in (MaxNorm(4.0), UnitNorm(), MinMaxNorm(19.0, 21.0)):
            assert np.allclose(set_.onto_in(d, y, (1,)), set_.onto(y, (1,)), rtol=2e-6)


def test_a_vector_whose_diagonal_is_no_metric_is_projected_in_the_euclidean_one():
    y = np.full((3, 4), 5.0)
    d = np.asarray([[1.0, math.nan, 1, 1], [1, -1, 1, 1], [1, 10, 1, 1]])
    x = MaxNorm(1.0).onto_in(d, y, (1,))
    assert np.allclose(x[:2], 0.5)
    assert np.abs(x[2] - exact(y[2], d[2], 1.0)).max() < 1e-12


@pytest.mark.parametrize("size", [1e-26, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("huge", [1e19, 1e38, math.inf])
def test_one_huge_entry_of_the_metric_and_weights_of_any_size(size, huge):
    """The coordinate that is dear keeps its value; the others, equally cheap, are scaled onto what is left."""
    c = 2 * size if size < 1e38 else 3.3e38
    y = np.asarray([[size, 3 * size, 4 * size]] if size < 1e38 else [[1e38, 2.4e38, 3.2e38]], dtype=np.float32)
    d = np.asarray([[huge, 1.0, 1.0]], dtype=np.float32)
    x = MaxNorm(c).onto_in(d, y, (1,)).astype(np.float64)
    assert x[0, 0] == pytest.approx(float(y[0, 0]), rel=1e-5)
    assert x[0, 2] / x[0, 1] == pytest.approx(4 / 3, rel=1e-5)
    assert c * (1 - 1e-5) <= np.linalg.norm(x[0] / c) * c <= c


def test_zeros_in_the_metric_give_way_first():
    y = np.asarray([[0.5, 7.0, -3.0]])
    x = MaxNorm(1.0).onto_in(np.asarray([[1.0, 0.0, 1e-20]]), y, (1,))
    assert x[0, 0] == pytest.approx(0.5)
    assert np.linalg.norm(x) <= 1


def test_the_bound_is_held_wherever_the_iteration_stops():
    """Left of the root the norm is too large."""
    y, d = np.full((3, 5), 7.0, np.float32), 10.0 ** np.arange(-9, 6, dtype=np.float32).reshape(3, 5)
    x = project_ball(y, d, 1.0, (1,), lambda body, start: start / 2)
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    assert (norms >= 1 - 1e-5).all()
    assert (norms <= 1).all()


def test_newton_needs_far_fewer_than_its_steps():
    """Hard spectra, 500 rows each: D over 20 orders of magnitude, y correlated with it, the bound tight or loose."""
    used = []

    def counted(body, nu):
        done, steps = False, 0
        while not done and steps < metrics.STEPS:
            nu, done = body(nu)
            steps += 1
        used.append((steps, bool(done)))
        return nu

    rng = np.random.default_rng(0)
    for power in (-2, -1, -0.5, 0, 0.5):
        for reach in (1e-3, 1.0, 10.0):
            d = 10 ** -rng.uniform(0, 20, (500, 12))
            y = 10 ** rng.uniform(-3, 3, (500, 12)) * d**power
            y /= np.linalg.norm(y, axis=1)[:, None] * 10 ** -rng.uniform(0, reach, (500, 1))
            project_ball(y, d, 1.0, (1,), counted)
    assert all(done for _, done in used)
    assert max(steps for steps, _ in used) <= 25


def test_boxes_ignore_the_metric_and_unknown_names_are_refused():
    y = np.asarray([[-1.0, 2.0]])
    assert np.array_equal(NonNegative().onto_in(np.asarray([[9.0, 1.0]]), y, (1,)), [[0.0, 2.0]])
    with pytest.raises(ValueError, match="'adaptve' is not known"):
        MaxNorm(1.0).check_metric("adaptve")


@pytest.mark.parametrize("size", [1e-35, 1e-9, 3e-4, 0.2])
def test_sphere_from_far_inside(size):
    rng = np.random.default_rng(4)
    y, d = size * rng.standard_normal(6), 10 ** rng.uniform(-0.3, 0.3, 6)
    y, d = y.astype(np.float32), d.astype(np.float32)
    assert np.abs(project_sphere(y, d, 1.0, (0,)) - exact(y, d, 1.0)).max() <= 1e-6
