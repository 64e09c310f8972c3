"""Every set: feasible, idempotent, nearest, not expansive; the same in all libraries; exact in all dtypes."""

import warnings

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from projgd import (
    Box,
    BoxSection,
    Hyperplane,
    Intersection,
    KeepSign,
    KeepZeros,
    NonNegative,
    Simplex,
    SparseSimplex,
)
from projgd.axes import resolve
from projgd.entries import EntrySet
from projgd.sums import FLOATS
from tests.contract import NUMPY, bits
from tests.core.arrays import by, to
from tests.sets import SETS, SHAPE, bound, start

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
EVERY = pytest.mark.parametrize("name", SETS)
POINTS = st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.3, 1.0, 3.0, 100.0]))


def weights(seed, size, dtype=np.float64):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(SHAPE) * size
    w[rng.random(SHAPE) < 0.1] = 0.0
    if seed % 3 == 0:
        w = np.round(w * 4) / 4  # equal entries
    return w.astype(dtype)


def near(name, point):
    """Dykstra's algorithm takes the more sweeps the further away it begins."""
    return (point[0], min(point[1], 1.0)) if "two axes" in name else point


def ready(name, dtype=np.float64):
    """The set for arrays of NumPy, and a function that projects onto it."""
    set_ = SETS[name].make()
    set_ = bound(set_, start(dtype))
    axes = resolve(set_.axis, SHAPE, "out_first").axes

    def project(x):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return set_.onto(x, axes)

    return set_, axes, project


@EVERY
@given(point=POINTS)
@settings(max_examples=15, deadline=None)
def test_feasible_and_idempotent(name, point):
    set_, axes, project = ready(name)
    q = project(weights(*near(name, point)))
    limit = 1e-5 if "intersection" in name else 1e-13
    distance = set_.outside(q, axes)
    if not set_.is_convex:  # a zero vector has no direction, and stays
        distance = distance[(q != 0).any(1)]
    assert np.abs(distance).max(initial=0) <= limit * max(1, abs(q).max())
    assert (bits(project(q)) == bits(q)).all()


@EVERY
@given(point=POINTS, other=POINTS)
@settings(max_examples=15, deadline=None)
def test_nearest(name, point, other):
    """⟨x - q, y - q⟩ ≤ 0 for every y in a convex set; no y is nearer in any set."""
    set_, _, project = ready(name)
    x, y = weights(*near(name, point)), project(weights(*near(name, other)))
    q = project(x)
    slack = 1e-4 if "intersection" in name else 1e-10
    if not set_.is_convex and not (np.abs(x).sum(1).all() and np.abs(y).sum(1).all()):
        return  # a zero vector has no direction, and stays
    size = np.linalg.norm(x - q) * max(np.linalg.norm(y - q), 1)
    if set_.is_convex:
        assert np.sum((x - q) * (y - q)) <= slack * size
    assert np.linalg.norm(x - q) <= np.linalg.norm(x - y) + slack * (1 + np.linalg.norm(x))


@EVERY
@given(point=POINTS, other=POINTS)
@settings(max_examples=15, deadline=None)
def test_no_expansion(name, point, other):
    set_, _, project = ready(name)
    if set_.is_convex:
        x, y = weights(*near(name, point)), weights(*near(name, other))
        slack = 1e-4 if "intersection" in name else 1e-10
        assert np.linalg.norm(project(x) - project(y)) <= np.linalg.norm(x - y) * (1 + slack) + slack * abs(x).max()


@EVERY
@pytest.mark.parametrize("library", ["numpy", "torch"])  # the front of JAX has a matrix of its own
@pytest.mark.parametrize("dtype", NUMPY)
def test_all_libraries_and_dtypes(name, library, dtype):
    """The same point in every library; stored values are in the set, exactly where it says so; NaN and inf stay."""
    kind, case = NUMPY[dtype], SETS[name]
    _, axes, project = ready(name, kind)
    x = np.concatenate(
        [weights(s + 1, size, kind)[None] for s, size in enumerate([0.1, 1.0, 1.0 if "two axes" in name else 30.0])]
    )
    set_ = bound(case.make(), to(library, start(kind)))
    run = by(library, lambda w: set_.onto(w, axes))
    for w in x:
        q, wanted = run(w), project(w)
        wide_q, wide = q.astype(np.float64), wanted.astype(np.float64)
        loose = 1e-4 if "intersection" in name or "affine" in name else 1e-6 if dtype != "float64" else 1e-12
        tolerance = max(4 * UNIT[dtype], loose)
        np.testing.assert_allclose(wide_q, wide, rtol=tolerance, atol=tolerance * abs(w.astype(np.float64)).max())
        if "intersection" not in name:
            assert (bits(run(q)) == bits(q)).all(), "idempotent"
        if case.exact:
            exact = bound(case.make(), start(kind).astype(np.float64))
            distance = exact.outside(wide_q, axes)
            limit = 0 if name != "relative max-norm of a tensor" else 1e-6
            assert (distance <= limit).all(), distance.max()


@pytest.mark.usefixtures("quick_compilation")
def test_jax_gives_the_same_points():
    """One program of all sets, in float32."""
    names = [name for name in SETS if "two axes" not in name]
    w = weights(1, 2.0, np.float32)
    sets = {name: (bound(SETS[name].make(), to("jax", start(np.float32))), ready(name)[1]) for name in names}
    found = jax.jit(lambda x: {name: set_.onto(x, axes) for name, (set_, axes) in sets.items()})(w)
    for name in names:
        wanted = ready(name, np.float32)[2](w)
        np.testing.assert_allclose(found[name], wanted, rtol=1e-6, atol=3e-6, err_msg=name)


@EVERY
def test_broken_vectors_stay(name):
    set_, axes, project = ready(name)
    w = weights(1, 3.0)
    w[2, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_.onto(np.where(np.isnan(w), np.inf, w), axes)
    q = set_.onto(w, axes)
    assert np.isnan(q[2, 1])
    rest = [0, 1, 3, 4]
    if isinstance(set_, EntrySet):
        assert (bits(np.where(np.isnan(w), 0, q)) == bits(np.where(np.isnan(w), 0, project(np.nan_to_num(w))))).all()
    elif axes == (1,) and not set_.joins_vectors:
        assert (bits(q[2]) == bits(w[2])).all()
        np.testing.assert_allclose(q[rest], project(weights(1, 3.0))[rest], rtol=1e-12)
    assert np.isnan(set_.outside(w, axes)).any()


PLANES = ("hyperplane", "centred", "half-space", "affine")
"""From far away the nearest point of these is far away."""


@pytest.mark.parametrize("name", [name for name in SETS if "two axes" not in name])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_huge_entries(name, dtype):
    """No sum and no difference overflows on the way."""
    kind = NUMPY[dtype]
    big = (3e38 if dtype == "float32" else 6e4) / (30 if name in PLANES else 1)
    set_, axes, project = ready(name, kind)
    w = (np.sign(weights(2, 1.0)) * big).astype(kind)
    q = project(w)
    assert np.isfinite(q.astype(np.float64)).all()
    distance = set_.outside(q, axes).astype(np.float64)
    assert (distance <= (4 * UNIT[dtype] * big if name in PLANES else 1e-2)).all()


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_infinity_where_zero_is_kept(library):
    """A product with the sign or the mask would be NaN."""
    w0 = to(library, np.asarray([0.0, 0.0, 0.0, 1.0, -1.0], np.float32))
    x = to(library, np.asarray([np.inf, -np.inf, np.nan, np.inf, np.inf], np.float32))
    for set_, rest in ((KeepSign(), [np.inf, 0.0]), (KeepZeros(), [np.inf, np.inf])):
        q = np.asarray(set_.bind(set_.initial(w0, (), "w")).onto(x, ()))
        np.testing.assert_array_equal(q, [0.0, 0.0, np.nan, *rest])


@pytest.mark.parametrize("side", [-1, 1])
def test_a_section_without_bounds_on_one_side(side):
    """Far outside all entries are at a bound, and one of them has to leave it for the equation to hold."""
    low, high = np.asarray([0.2334329, 1.32510387, -np.inf, -np.inf]), np.asarray([0.33, 2.09450067, 0.9, -0.74039269])
    a, b = np.asarray([0.0, -0.22593505, -0.14291315, 0.44277683]), -1.1437290784934637
    x = np.asarray([-9685.63575432, -4115.61902405, -2518.39519768, 18131.36560552])
    ends = (low, high) if side > 0 else (-high, -low)
    q = BoxSection(*ends, a, side * b, axis=-1).project(side * x[None])[0]
    assert (q >= ends[0]).all()
    assert (q <= ends[1]).all()
    assert abs(a @ q - side * b) < 1e-12


@pytest.mark.parametrize("kind", FLOATS)
def test_bounds_between_numbers_of_a_dtype_are_refused(kind):
    """They may be far apart by their ratio, where the dtype is coarse."""
    spacing = FLOATS[kind].smallest
    for low, high in ((0.2 * spacing, 0.9 * spacing), (-0.9 * spacing, -0.2 * spacing)):
        with pytest.raises(ValueError, match="no number between"):
            Box([low], [high]).fit(FLOATS[kind], resolve("entries", (1,), "out_first"), "w")


def test_an_array_is_refused_as_a_parameter_is():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(ValueError, match="no number between"):
        Box([0.1], [0.1]).project(x)
    with pytest.raises(ValueError, match="does not broadcast"):
        Box([0.0, 0.0]).project(x)


def test_no_more_than_k_entries_of_the_lowest_numbers():
    q = SparseSimplex(2, axis=-1).project(np.full((1, 5), np.finfo(np.float32).min))
    assert q.tolist() == [[0.5, 0.5, 0.0, 0.0, 0.0]]


@given(point=POINTS)
@settings(max_examples=15, deadline=None)
def test_the_nearest_point_of_an_intersection_is_not_any_point(point):
    """A plane and the non-negative vectors have the simplex in common, whose nearest point is known without sweeps."""
    w = weights(point[0], min(point[1], 1.0))
    both = Intersection(Hyperplane(1.0, 1.0, axis=1), NonNegative())
    np.testing.assert_allclose(both.onto(w, (1,)), Simplex(axis=1).onto(w, (1,)), atol=1e-5)
