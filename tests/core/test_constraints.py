"""What can be asked of the weights: each set against its formula, and what is refused when it is made."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projgd import Box, Constraint, MaxNorm, MinMaxNorm, NonNegative, Sphere, UnitNorm
from projgd.axes import Vectors
from projgd.bands import sphere_band
from projgd.sums import FLOATS
from tests.contract import NUMPY, TIGHT
from tests.core.arrays import LIBRARIES, back, to

NORM_SETS = [MaxNorm(2.0), MinMaxNorm(1.0, 2.0), MinMaxNorm(0, 2.0), MinMaxNorm(2.0, 2.0), Sphere(2.0), UnitNorm()]


def exact(x):
    return np.linalg.norm(np.asarray(x, np.float64), axis=0)


# ------------------------------------------------------------------------------------------------------- what all have


@pytest.mark.parametrize("constraint", [*NORM_SETS, NonNegative(), Box(0.5, 1.0)], ids=str)
def test_what_the_projection_gives_is_in_the_set(constraint):
    x = np.random.default_rng(0).standard_normal((6, 9)) * np.linspace(0.01, 4, 9)
    q = constraint.project(x)
    far, near = np.asarray(constraint.violation(x)), np.asarray(constraint.violation(q))
    assert near.max() <= 1e-15  # a sphere has no more than that
    distance = abs(x - q).sum() if constraint.axis == "entries" else abs(exact(x) - exact(q)).sum()
    assert far.sum() == pytest.approx(distance, rel=1e-11)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (), (5,)])
@pytest.mark.parametrize("kind", [MaxNorm(4.0, None), MinMaxNorm(1.0, 4.0, axis=None), Sphere(4.0, None)], ids=str)
def test_empty_and_scalar(library, shape, kind):
    w = np.full(shape, 9.0, np.float32)
    got = back(kind.project(to(library, w)))
    assert got.shape == shape
    assert math.prod(shape) == 0 or np.linalg.norm(np.asarray(got, np.float64)) == pytest.approx(4.0, rel=1e-5)
    assert (back(MaxNorm(4.0).project(to(library, w))) == w).all()  # no fan-in, or nothing in it


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_violation_shows_what_is_not_finite(library):
    w = np.asarray([[3.0, np.nan, 1.0, 6.0], [0.5, 1.0, -np.inf, 8.0]], np.float32)
    for set_, wanted in [
        (MaxNorm(4.0, axis=0), [0.0, np.nan, np.inf, 6.0]),
        (MinMaxNorm(3.5, 4.0, axis=0), [3.5 - math.hypot(3, 0.5), np.nan, np.inf, 6.0]),
        (UnitNorm(axis=0), [math.hypot(3, 0.5) - 1, np.nan, np.inf, 9.0]),
    ]:
        np.testing.assert_allclose(back(set_.violation(to(library, w))), wanted, rtol=1e-6)


def test_a_bias_has_nothing_to_constrain():
    bias = np.ones(3)
    for constraint in (MaxNorm(0.1), MinMaxNorm(0.1, 0.2), Sphere(0.1, "matrix")):
        assert constraint.project(bias) is bias
        assert constraint.violation(bias) == 0


@pytest.mark.parametrize("constraint", [MaxNorm(1.0), NonNegative()], ids=str)
def test_arrays_that_have_no_projection_are_refused(constraint):
    for x in (np.arange(4), torch.ones(2, 2, dtype=torch.complex64)):
        for method in (constraint.project, constraint.violation):
            with pytest.raises(TypeError, match="has dtype"):
                method(x)


def test_the_layouts():
    """Fan-in is every axis but the first in PyTorch, every axis but the last elsewhere."""
    w = np.zeros((2, 3), np.float32)
    w[0] = 3.0
    assert (np.asarray(MaxNorm(4.0).project(torch.as_tensor(w)))[0] < 3).all()
    assert (MaxNorm(4.0).project(w) == w).all()


def test_hyperparameters_can_be_replaced():
    assert MinMaxNorm(1.0, 2.0).replace(low=0.5, axis=0) == MinMaxNorm(0.5, 2.0, axis=0)
    for wrong in ({"low": 3.0}, {"rate": 2.0}, {"c": 1.0}):
        with pytest.raises(ValueError, match=r"is above high|is a share|has no meaning for MinMaxNorm"):
            MinMaxNorm(1.0, 2.0).replace(**wrong)
    with pytest.raises(ValueError, match=r"radius=2.0 has no meaning|radius"):
        UnitNorm().replace(radius=2.0)


def test_a_set_that_takes_nothing_cannot_be_bound():
    assert MaxNorm(1.0).initial(np.ones((2, 2)), (0,), "w") is None
    with pytest.raises(NotImplementedError, match="takes nothing from the initial weights"):
        MaxNorm(1.0).bind(np.ones(2))


def test_only_sets_of_norms_have_a_band():
    vectors = Vectors((4, 3), (0,))
    for name, kind in FLOATS.items():
        assert all(constraint.band(kind, vectors) is not None for constraint in NORM_SETS), name
        assert NonNegative().band(kind, vectors) is Box(0, 1).band(kind, vectors) is None


WRONG_NUMBERS = [
    (0, ValueError, "must be positive"),
    (-1.0, ValueError, "must be positive"),
    (math.nan, ValueError, "must be positive"),
    (math.inf, ValueError, "must be positive and finite"),
    ("4", TypeError, "is not a number"),
    (None, TypeError, "is not a number"),
    (True, TypeError, "is not a number"),
    (np.True_, TypeError, "is not a number"),
    (torch.tensor(True), TypeError, "is not a number"),
    (object(), TypeError, "is not a number"),
    (np.ones(2), TypeError, r"is an array of shape \(2,\)"),
]


@pytest.mark.parametrize(("value", "error", "says"), WRONG_NUMBERS, ids=lambda v: repr(v)[:20])
def test_a_wrong_number_is_refused_by_every_set(value, error, says):
    for name, make in [
        ("c", lambda: MaxNorm(value)),
        ("radius", lambda: Sphere(value)),
        ("high", lambda: MinMaxNorm(0.0, value)),
    ]:
        if name != "radius" or not isinstance(value, str):
            with pytest.raises(error, match=f"{name}.* {says}"):
                make()


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.asarray([2.0]), torch.tensor(2.0), jnp.asarray(2.0)], ids=repr
)
def test_numbers_of_every_kind_are_read(value):
    for number in (MaxNorm(value).c, Sphere(value).radius, MinMaxNorm(value, value).low, MinMaxNorm(0, value).high):
        assert type(number) is float
        assert number == 2.0


# -------------------------------------------------------------------------------------------------------------- MaxNorm


def test_a_traced_c_works_and_one_that_is_not_positive_shows():
    w = np.asarray([[3.0, 0.1], [4.0, 0.1]], np.float32)
    project = jax.jit(lambda c: MaxNorm(c).project(jnp.asarray(w)))
    np.testing.assert_allclose(project(1.0), MaxNorm(1.0).project(w), rtol=1e-6)
    assert bool(jnp.isnan(project(-1.0)).all())


# ----------------------------------------------------------------------------------------------------------- MinMaxNorm


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_vector_of_zeros_stays(library, dtype):
    w = np.asarray([[0.0, 3.0], [-0.0, 4.0]], NUMPY[dtype])
    q = back(MinMaxNorm(1.0, 2.0, axis=0).project(to(library, w)))
    assert (q[:, 0] == 0).all()
    assert np.signbit(q[:, 0]).tolist() == [False, True]
    assert exact(q)[1] == pytest.approx(2.0, rel=TIGHT[dtype])


def test_a_share_of_the_way():
    w = np.asarray([[0.1, 1.5, 3.0], [0.0, 0.0, 4.0]])
    for rate, wanted in [(1.0, [1, 1.5, 2]), (0.3, [0.37, 1.5, 4.1]), (0.0, [0.1, 1.5, 5.0])]:
        np.testing.assert_allclose(exact(MinMaxNorm(1.0, 2.0, rate).project(w)), wanted, rtol=1e-12)
    assert (MinMaxNorm(1.0, 2.0, 0.0).project(w) == w).all()
    assert (MinMaxNorm(1.0, 2.0, 0.3).project(w)[:, 1] == w[:, 1]).all()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((2.0, 1.0), ValueError, r"low=2.0 is above high=1.0: pass the smaller norm first, MinMaxNorm\(1.0, 2.0\)"),
        ((-0.5, 1.0), ValueError, "low=-0.5 is no norm: pass 0 or more"),
        ((math.nan, 1.0), ValueError, "low=nan is no norm"),
        ((math.inf, 1.0), ValueError, "low=inf is no norm"),
        ((0.5, math.nan), ValueError, "high=nan must be positive"),
        ((0.0, 0.0), ValueError, "high=0.0 must be positive"),
        ((0.5, 1.0, -0.1), ValueError, "rate=-0.1 is a share of the way"),
        ((0.5, 1.0, 1.1), ValueError, "rate=1.1 is a share"),
        ((0.5, 1.0, math.nan), ValueError, "rate=nan is a share"),
        (("0", 1.0), TypeError, "low='0' is not a number"),
        ((0.0, "1"), TypeError, "high='1' is not a number"),
        ((True, 1.0), TypeError, "low=True is not a number"),
        ((0.5, 1.0, True), TypeError, "rate=True is not a number"),
        ((0.5, 1.0, "1"), TypeError, "rate='1' is not a number"),
        ((0.5, 1.0, 1.0, "rows"), ValueError, "axis='rows' is not known"),
    ],
)
def test_min_max_norm_refuses_what_cannot_be_honoured(arguments, error, says):
    with pytest.raises(error, match=says):
        MinMaxNorm(*arguments)


# -------------------------------------------------------------------------------------------------------------- spheres


@pytest.mark.parametrize(("library", "dtype"), [("numpy", "float32"), ("torch", "bfloat16"), ("jax", "float16")])
def test_a_sphere_keeps_its_initial_norms(library, dtype):
    w = to(library, np.random.default_rng(3).normal(size=(40, 6)).astype(NUMPY[dtype]))
    sphere = Sphere("initial", axis=0)
    bound = sphere.bind(sphere.initial(w, (0,), "w"))
    assert (sphere.takes_initial, bound.takes_initial) == (True, False)
    np.testing.assert_allclose(back(bound.radius)[0], exact(back(w)), rtol=1e-6)
    away = w * 3
    tight = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for moved in (False, True):
        onto = functools.partial(bound.onto, axes=(0,), moved=moved)
        onto = jax.jit(onto) if library == "jax" else onto
        np.testing.assert_allclose(exact(back(onto(away))), exact(back(w)), rtol=tight)
        assert (back(onto(w)) == back(w)).all()  # a step that moved nothing
        assert moved or (back(onto(onto(away))) == back(onto(away))).all()


def test_after_a_step_a_sphere_is_ten_times_nearer_than_its_band():
    w = np.random.default_rng(4).normal(size=(64, 32)).astype(np.float32)
    w /= np.float32(np.linalg.norm(w.astype(np.float64)))
    found = (UnitNorm(None).onto(w * np.float32(1 + k * 1e-7), (0, 1), moved=True) for k in range(-30, 31))
    assert max(abs(np.linalg.norm(q.astype(np.float64)) - 1) for q in found) < 4e-7


@pytest.mark.parametrize("moved", [False, True])
def test_the_band_of_a_sphere_has_its_edge(moved):
    """The numbers of the band are float64, and every operation on them is exact."""
    least = sphere_band(FLOATS["float64"], Vectors((1, 3), (0,)), 1.0, moved).low
    x = np.asarray([[least, -least, least - 2.0**-53]])
    assert UnitNorm(0).onto(x, (0,), moved=moved).tolist() == [[least, -least, 1.0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_zero_vector_has_no_place_on_a_sphere_and_stays(dtype):
    x = torch.tensor([[0.0, -0.0], [3.0, 4.0]], dtype=getattr(torch, dtype))
    for found in (UnitNorm().project(x), UnitNorm().onto(x, (1,), moved=True)):
        assert torch.equal(found[0], x[0])
        assert torch.signbit(found[0]).tolist() == [False, True]


def test_unit_norm_is_the_sphere_of_radius_one():
    x = np.random.default_rng(5).normal(size=(7, 3))
    assert (UnitNorm().project(x) == Sphere(1.0).project(x)).all()
    assert repr(UnitNorm()) == "UnitNorm(axis='fan_in')"
    assert UnitNorm().fixes_norm
    assert not MaxNorm(1.0).fixes_norm


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Sphere("first"), "radius='first' is not known"),
        (lambda: Sphere("initial").project(np.ones((2, 2))), "no radius outside an optimizer"),
        (lambda: Sphere("initial").violation(np.ones((2, 2))), "no radius outside an optimizer"),
        (lambda: Sphere("initial").initial(np.zeros((4, 2)), (0,), "proj"), "proj: 2 of its 2 vectors have norm 0"),
        (lambda: Sphere("initial").initial(np.full((4, 2), np.inf), (0,), "proj"), "norm 0 or are not finite"),
    ],
)
def test_spheres_refuse_what_cannot_be_honoured(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# ---------------------------------------------------------------------------------------------------- sets of entries


@given(st.floats(-3, 3), st.floats(0.1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=20)
@pytest.mark.parametrize("dtype", NUMPY)
def test_a_box_is_held_exactly_and_tight(dtype, low, width, seed):
    box = Box(low, low + width)
    x = torch.as_tensor(np.random.default_rng(seed).normal(size=50) * 3).to(getattr(torch, dtype))
    got = box.project(x)
    assert ((got.double() >= box.low) & (got.double() <= box.high)).all()
    nearest = x.double().clamp(box.low, box.high)
    assert ((got.double() - nearest).abs() <= TIGHT[dtype] * max(abs(box.low), abs(box.high))).all()
    assert (box.project(got) == got).all()
    assert (box.violation(got) == 0).all()


@pytest.mark.parametrize("set_", [NonNegative(), Box(0.0, 1.0), Box(-1.0, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_zero_on_the_boundary_keeps_its_sign(set_, dtype):
    x = torch.tensor([0.0, -0.0], dtype=getattr(torch, dtype))
    assert torch.signbit(set_.project(x)).tolist() == [False, True]


@pytest.mark.parametrize("library", LIBRARIES)
def test_entries_that_are_nan_stay_and_show(library):
    x = to(library, np.asarray([np.nan, 2.0, -3.0, np.inf], np.float32))
    for set_, wanted, outside in [
        (NonNegative(), [np.nan, 2, 0, np.inf], [np.nan, 0, 3, 0]),
        (Box(0, 1), [np.nan, 1, 0, 1], [np.nan, 1, 3, np.inf]),
    ]:
        np.testing.assert_allclose(back(set_.project(x)), wanted, rtol=1e-6)
        np.testing.assert_allclose(back(set_.violation(x)), outside, rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_a_box_with_infinite_bounds_warns_of_nothing():
    box = Box([-np.inf, -1.0], [np.inf, np.inf])
    np.testing.assert_array_equal(box.project(np.asarray([[-9.0, -9.0]])), [[-9.0, -1.0]])


def test_a_box_refuses_nonsense():
    for low, high in [(1, 0), (math.inf, None), (None, -math.inf), ([0.0, 2.0], 1.0), ([0.0, 2.0], [[3.0, 1.0]])]:
        with pytest.raises(ValueError, match=r"Box\(.*\) is empty: "):
            Box(low, high)
    with pytest.raises(ValueError, match=r"Box\(\) bounds nothing: pass low=, high= or both, such as Box\(-0.5, 0.5\)"):
        Box(-math.inf, None)
    for low, high in [(math.nan, 1), (0.0, [1.0, math.nan])]:
        with pytest.raises(ValueError, match=r"is not a number|holds NaN"):
            Box(low, high)
    for low, high, name in [("a", 1, "low"), (0.0, True, "high"), ([0.0, "a"], 1, "low")]:
        with pytest.raises(TypeError, match=rf"{name}.* is not a number"):
            Box(low, high)
    with pytest.raises(ValueError, match="do not broadcast against each other"):
        Box([0.0, 1.0], [2.0, 3.0, 4.0])


# --------------------------------------------------------------------------------------------------- a set of one's own


class Ball2(Constraint):
    """Every entry has a magnitude of at most 2: the methods that must be written, and no more."""

    def onto(self, x, axes, xp=None, *, moved=False):
        return np.clip(x, -2, 2)

    def outside(self, x, axes, xp=None):
        return abs(x) - abs(np.clip(x, -2, 2))


def test_a_set_of_ones_own_needs_two_methods():
    x = np.asarray([[-3.0, 1.0]])
    assert Ball2().project(x).tolist() == [[-2.0, 1.0]]
    assert Ball2().violation(x).tolist() == [[1.0, 0.0]]
    assert Ball2().onto_in(np.ones((1, 2)), x, ()).tolist() == [[-2.0, 1.0]]
    assert Constraint.from_config(Ball2().config()) == Ball2()
