"""Where `optax.apply_updates` ends after a chain: in the set, for every set and dtype, judged by exact comparison."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from projgd import Box, Constraint, MaxNorm, MinMaxNorm, NonNegative, Sphere, UnitNorm
from projgd.constraints import NormSet
from projgd.optax import apply_updates, check_last, projection
from projgd.sums import FLOATS
from tests.contract import NUMPY, TIGHT, bits, exact_norms

pytestmark = pytest.mark.usefixtures("quick_compilation")

BOXES = [(1e-8, 1), (0.1, 0.7), (1 / 3, 2), (-1, -0.1), (1e-3, 1), (0, 1), (-1, 2), (-7, -1e-6)]
SETS = {str(set_): set_ for set_ in (Box(*box) for box in BOXES)}
SETS |= {"NonNegative": NonNegative(), "ball": MaxNorm(1.3), "shell": MinMaxNorm(0.5, 2.0), "unit": UnitNorm()}
SETS |= {"wide shell": MinMaxNorm(1e-3, 1.0), "sphere": Sphere(1.7)}
SHAPE = (7, 150)


def chained(p, u):
    tx = projection(SETS)
    return optax.apply_updates(p, tx.update(u, tx.init(p), p)[0])


PROGRAMS = {"eager": chained, "jit": jax.jit(chained)}


def starts(dtype, seed, jit, start):
    """Return by set the weights before and after a step, from inside the set, or from `start` times as far as it is."""
    rng = np.random.default_rng(seed)
    p, u = {}, {}
    for name, set_ in SETS.items():
        edges = (set_.low, set_.high) if isinstance(set_, Box) else (-1, 1)
        size = 10.0 ** rng.uniform(-4, 0.3, SHAPE)
        inside = rng.uniform(*edges, SHAPE) if start == 1 else start * rng.standard_normal(SHAPE)
        p[name] = jnp.asarray(inside, dtype)
        u[name] = jnp.asarray(rng.standard_normal(SHAPE) * size * (edges[1] - edges[0]), dtype)
    if start == 1:  # by NumPy, because JAX compiles every operation
        p = {name: jnp.asarray(SETS[name].project(np.asarray(x))) for name, x in p.items()}
    return p, u, PROGRAMS["jit" if jit else "eager"](p, u)


def judge(name, p, q, dtype):
    set_, p, q = SETS[name], np.asarray(p), np.asarray(q)
    assert q.dtype == p.dtype
    wide = q.astype(np.float64)
    assert np.isfinite(wide).all()
    if isinstance(set_, NormSet):
        (low, high), norms = set_.edges(), exact_norms(q)
        slack = TIGHT[dtype] if low == high else 0
        assert (norms <= high * (1 + slack)).all(), f"{name}: {norms.max()!r}"
        assert (norms >= low * (1 - slack)).all(), f"{name}: {norms.min()!r}"
    else:  # a float64 compares exactly with each of the other numbers
        assert (wide >= getattr(set_, "low", 0.0)).all(), f"{name}: {wide.min()!r}"
        assert (wide <= getattr(set_, "high", math.inf)).all(), f"{name}: {wide.max()!r}"


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("dtype", NUMPY)
@settings(max_examples=4)
@given(seed=st.integers(0, 2**31))
def test_a_chain_ends_in_the_set(dtype, seed):
    """From the set, with updates of all sizes that press against both of its sides."""
    with jax.enable_x64(dtype == "float64"):
        for jit in (True, False) if dtype == "bfloat16" and seed % 4 == 0 else (True,):
            p, u, q = starts(dtype, seed, jit, 1)
            for name in SETS:
                judge(name, p[name], q[name], dtype)
                if not isinstance(SETS[name], NormSet):
                    nearest = SETS[name].project(np.asarray(p[name]) + np.asarray(u[name])).astype(np.float64)
                    off = abs(np.asarray(q[name]).astype(np.float64) - nearest)
                    grid = abs(np.asarray(p[name]).astype(np.float64)) + abs(nearest)
                    assert (off <= 2 * FLOATS[dtype].unit * grid).all(), name
            still = PROGRAMS["jit"](q, jax.tree.map(jnp.zeros_like, q))
            for name in SETS:
                if name not in ("sphere", "unit"):
                    assert (bits(np.asarray(still[name])) == bits(np.asarray(q[name]))).all(), name


@pytest.mark.parametrize("dtype", NUMPY)
def test_what_presses_against_a_bound(dtype):
    """Ten thousand entries that press against one bound or the other. Rounded towards 0, more than half end outside."""
    with jax.enable_x64(dtype == "float64"):
        tx = optax.chain(optax.sgd(1.0), projection(Box(1e-8, 1.0)))
        p = jnp.asarray(0.5, dtype)
        updates, _ = tx.update(jnp.asarray(0.6, dtype), tx.init(p), p)
        assert 1e-8 <= float(optax.apply_updates(p, updates)) < 1e-2
        for low, high in BOXES:
            p = Box(low, high).project(jnp.linspace(low, high, 10_000).astype(dtype))
            for u in (-2 * p, high - low + p):
                tx = projection(Box(low, high))
                q = np.asarray(optax.apply_updates(p, tx.update(u, tx.init(p), p)[0])).astype(np.float64)
                assert ((low <= q) & (q <= high)).all()


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_vector_of_a_sphere_ends_at_zero(dtype):
    """From so far away that p + d can be 0 or is beyond the sphere: at 0 a vector would stay for ever."""
    start = 2.0**16 / FLOATS[dtype].unit if dtype == "float32" else 2.0**12
    p, u, q = starts(dtype, 0, True, start)
    for name in ("sphere", "unit", "shell", "wide shell"):
        assert (exact_norms(q[name]) > 0).all(), name
    for _ in range(4):
        q = PROGRAMS["jit"](q, jax.tree.map(lambda u: u * 0, u))
    for name in SETS:
        judge(name, p[name], q[name], dtype)


@pytest.mark.parametrize("dtype", NUMPY)
@given(seed=st.integers(0, 2**31), low=st.floats(-100, 100), width=st.floats(1e-30, 100), shift=st.integers(-30, 2))
@settings(max_examples=30)
def test_a_bound_that_the_dtype_has_is_in_the_box(dtype, seed, low, width, shift):
    """`Box(0, 1)` leaves 1 alone; what has no bound of the dtype is rounded into the set, or refused if nothing is."""
    low, width = math.ldexp(low, shift), math.ldexp(width, shift)
    kind, numbers = FLOATS[dtype], NUMPY[dtype]
    box = Box(low, low + width) if low < low + width else Box(low, math.nextafter(low, math.inf))
    x = np.random.default_rng(seed).standard_normal(50) * 3 * max(abs(box.low), abs(box.high))
    x = np.concatenate([x, [box.low, box.high], np.nextafter([box.low, box.high], math.inf)]).astype(numbers)
    wide = x.astype(np.float64)
    ends = [kind.round_up(box.low), kind.round_down(box.high)]
    if ends[0] > ends[1]:
        with pytest.raises(ValueError, match=f"no {dtype} lies between low="):
            box.project(x)
        return
    assert [float(numbers(end)) for end in ends] == ends
    assert box.low <= ends[0] <= ends[1] <= box.high
    inside = (ends[0] <= wide) & (wide <= ends[1])
    got = box.project(x)
    assert (bits(got)[inside] == bits(x)[inside]).all()
    np.testing.assert_array_equal(got.astype(np.float64), np.clip(wide, *ends))
    assert ((box.violation(x) > 0) == ~inside).all(), "by one last place, too"


def test_a_whole_bound_is_in_the_box():
    for dtype, numbers in NUMPY.items():
        x = np.asarray([-1.0, 0.0, 1.0, 2.0, 0.5], numbers)
        assert (Box(-1, 2).project(x) == x).all(), dtype
        assert Box(0, 1).project(x).tolist() == [0.0, 0.0, 1.0, 1.0, 0.5], dtype
        ends = [numbers(math.nextafter(1, 0) if dtype == "float64" else 1 - FLOATS[dtype].unit), numbers(1)]
        assert (Box(0.25, float(ends[0])).violation(np.asarray(ends)) > 0).tolist() == [False, True], dtype


@pytest.mark.usefixtures("full_compilation")
def test_bounds_below_the_normal_numbers():
    """XLA reads subnormal numbers as 0, so only 0 counts as a number there."""
    x = np.asarray([0.0, 1e-40, -1e-40, 1.0, -1.0], np.float32)
    for f in (Box(1e-40, 1.0).project, jax.jit(Box(1e-40, 1.0).project)):
        assert (np.asarray(f(jnp.asarray(x))) >= 2.0**-126).all()
    assert (Box(-1.0, -1e-40).project(x) <= -(2.0**-126)).all()
    assert (Box(-1e-40, 1e-40).project(x) == 0).all()


class Cube(Constraint):
    """A set of one's own that says nothing of rounding."""

    def onto(self, x, axes, xp=None, *, moved=False):
        return jnp.clip(x, 1, 2)

    def outside(self, x, axes, xp=None):
        return abs(x - jnp.clip(x, 1, 2))


class Rounded(Cube):
    """The same set, which says it."""

    def rounding_interval(self, q, p, axes, norm, xp):
        return 1.0, 2.0


def test_a_set_of_ones_own_is_right_or_refused():
    p = {"w": jnp.full((3, 2), 1.5)}
    with pytest.raises(NotImplementedError, match=r"Cube does not say where .* rounding_interval, or use projgd.optax"):
        projection(Cube()).init(p)
    assert (apply_updates(p, p, Cube())["w"] == 2).all()
    check_last(optax.chain(optax.sgd(0.7), projection(Rounded())), p, Rounded())


# ---------------------------------------------------------------------------------------------------------- check_last


class Loose(Box):
    """A box whose points may be moved beyond its ends by rounding: what a chain did before."""

    def rounding_interval(self, q, p, axes, norm, xp):
        return -abs(q), abs(q)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("low", "high"), [(0.1, 0.7), (-0.7, -0.1), (1e-8, 1.0)])
def test_check_last_sees_a_box_broken_by_a_last_place(low, high, dtype):
    p = {"w": jnp.linspace(low, high, 60).astype(dtype)}
    for lr in (1.0, 0.3):
        with pytest.raises(ValueError, match=r"w is outside Box\("):
            check_last(optax.chain(optax.sgd(lr), projection(Loose(low, high))), p, Box(low, high))
        check_last(optax.chain(optax.sgd(lr), projection(Box(low, high))), p, Box(low, high))


ONE_SIDED = [Box(0.1, 0.7), Box(-0.7, -0.1), NonNegative(), MinMaxNorm(0.5, 2.0), UnitNorm(), Sphere("initial")]


@pytest.mark.parametrize("set_", ONE_SIDED, ids=str)
def test_check_last_presses_against_both_sides(set_):
    """A step inwards after the projection is outside of what is not around 0."""
    p = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)}
    check_last(optax.chain(optax.adam(0.2), projection(set_)), p, set_)
    inwards = optax.chain(optax.sgd(0.2), projection(set_), optax.stateless(lambda u, p: {"w": u["w"] - 0.01 * p["w"]}))
    with pytest.raises(ValueError, match="w is outside"):
        check_last(inwards, p, set_)
    with pytest.raises(ValueError, match="w is outside"):
        check_last(optax.sgd(0.3), p, set_)
