"""Which norms stay and what the others become, and the guards for rounding in the numbers of a band."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projgd import bands
from projgd.axes import Vectors
from projgd.bands import Band
from projgd.sums import FLOATS, guard
from tests.contract import TIGHT
from tests.core.arrays import LIBRARIES, back, to

LENGTHS = (1, 7, 100, 4608, 10**6)
KINDS = [pytest.param(kind, id=name) for name, kind in FLOATS.items()]


def vectors(n):
    return Vectors((3, n), (1,))


def plain_factor(norm, low, high, up, down, pull):
    """What a vector of this norm is multiplied by, in Python's floats."""
    if not 0 < norm < math.inf or low <= norm <= high:
        return 1.0
    return pull * (up if norm < low else down) / norm + (1 - pull)


@settings(max_examples=150)
@given(
    numbers=st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3).map(sorted),
    pull=st.sampled_from([1.0, 0.3, 0.0]),
    norms=st.lists(st.floats(1e-290, 1e6) | st.sampled_from([0.0, math.nan, math.inf]), min_size=1, max_size=6),
)
def test_factors_are_the_formula(numbers, pull, norms):
    low, middle, high = numbers
    band = Band(low, high, middle, (middle + high) / 2, pull)
    norms = np.asarray([*norms, low, high, math.nextafter(low, 0), math.nextafter(high, math.inf)])
    wanted = [plain_factor(n, low, high, band.up, band.down, pull) for n in norms.tolist()]
    found = band.factors(norms, np)
    np.testing.assert_allclose(found, wanted, rtol=1e-15)
    assert (found[(low <= norms) & (norms <= high) | ~(norms > 0) | (norms == math.inf)] == 1).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_factors_of_each_library_with_one_number_per_vector(library):
    low, high, norms = (to(library, np.asarray(x, np.float32)) for x in ([1, 2, 0], [1, 4, 0.5], [3, 1, 2]))
    xp = {"numpy": np, "torch": torch, "jax": jnp}[library]
    assert back(Band(low, high, low, high).factors(norms, xp)).tolist() == pytest.approx([1 / 3, 2, 1 / 4])


def test_a_goal_can_be_asked_for_in_small_units():
    band, unit = Band(1e30, 2e38, 1e30, 1.5e38), 2.0**-16
    norms = np.asarray([1e29, 1e31, 3e38], np.float32) * np.float32(unit)
    np.testing.assert_allclose(band.goal(norms, np, unit) / unit, [1e30, 1e31, 1.5e38], rtol=1e-6)


def test_a_bound_of_nan_shows():
    assert np.isnan(Band(0.0, math.nan, 0.0, math.nan).factors(np.ones(1), np)).all()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_skipped_step_is_the_band_in_which_every_norm_stays(library):
    xp = {"numpy": np, "torch": torch, "jax": jnp}[library]
    norms = to(library, np.asarray([0.1, 1.5, 9.0, math.inf], np.float32))
    band = Band(1.0, 2.0, 1.0, 2.0)
    for found_inf, wanted in ((1.0, [1, 1, 1, 1]), (0.0, [10, 1, 2 / 9, 1])):
        skip = to(library, np.asarray(found_inf, np.float32))
        np.testing.assert_allclose(back(band.unless(skip, xp).factors(norms, xp)), wanted, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------- the guards


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("c", [1e-3, 1.0, 1e4])
def test_the_guards_of_a_ball(kind, c):
    """e is the error of a computed norm, u that of rounding to the dtype."""
    for n in LENGTHS:
        band, e, u = bands.ball_band(kind, vectors(n), c), guard(kind, vectors(n)), kind.unit
        coarse = math.sqrt(n) * kind.tiny
        tight = TIGHT[next(name for name in FLOATS if FLOATS[name] is kind)]
        assert band.low == band.up == 0
        assert band.high * (1 + e) <= c  # what stays is inside
        assert (band.down * (1 + u) + coarse) * (1 + e) <= band.high  # what has moved stays at the next projection
        assert c * (1 - tight) <= band.high
        assert (band.filled is not None) == (coarse > bands.COARSE * c)
        if band.filled is None:
            assert band.down * (1 - e) * (1 - u) - coarse >= c * (1 - tight)
        else:
            assert band.high > band.filled >= c * (1 - tight)
            assert band.inner < c


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("low", "high"), [(0.5, 2.0), (1.0, 1.1), (3.0, 1e3)])
def test_the_guards_of_an_interval(kind, low, high):
    """Those of a ball above, and the same mirrored below."""
    for n in LENGTHS[:-1]:
        band, ball = bands.interval_band(kind, vectors(n), low, high), bands.ball_band(kind, vectors(n), high)
        e, u, coarse = guard(kind, vectors(n)), kind.unit, math.sqrt(n) * kind.tiny
        assert (band.high, band.down) == (ball.high, ball.down)
        assert band.low * (1 - e) >= low * (1 - 2 * e * e - 2.0**-52)  # (1 + e)(1 - e) is 1 but for that
        assert (band.up * (1 - u) - coarse) * (1 - e) >= band.low * (1 - 4 * (e + u) ** 2 - 2.0**-52)
        assert low < band.low < band.up < band.down < band.high < high


@pytest.mark.parametrize("kind", KINDS)
def test_intervals_without_room_are_spheres(kind):
    for low, high in [(2.0, 2.0), (2.0, 2.0 * (1 + kind.unit))]:
        band, sphere = bands.interval_band(kind, vectors(100), low, high), (low + high) / 2
        assert band == bands.sphere_band(kind, vectors(100), sphere)
        assert band.low < sphere == band.up == band.down < band.high
    nearly = next(
        k for k in range(60) if bands.interval_band(kind, vectors(100), 1.0, 1 + 2.0**-k) != _wide(kind, 1 + 2.0**-k)
    )
    band = bands.interval_band(kind, vectors(100), 1.0, 1 + 2.0**-nearly)  # the first whose guards cross
    assert band.up == band.down == 1 + 2.0 ** -(nearly + 1)
    assert band.low <= 1.0 + 4 * (guard(kind, vectors(100)) + kind.unit)


def _wide(kind, high):
    """The band of 1 to `high` with both guards, whether they cross or not."""
    e, coarse = guard(kind, vectors(100)), 10 * kind.tiny
    ball = bands.ball_band(kind, vectors(100), high)
    return Band(1 + e, ball.high, (1 + 3 * e + coarse) * (1 + kind.unit), ball.down)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interval_from_0_is_a_ball_and_keeps_its_pull(kind):
    ball = bands.ball_band(kind, vectors(7), 2.0)
    assert bands.interval_band(kind, vectors(7), 0.0, 2.0) == ball
    for low in (0.0, 1.0, 2.0):
        assert bands.interval_band(kind, vectors(7), low, 2.0, 0.3).pull == 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_the_width_of_a_sphere(kind):
    for n in LENGTHS:
        rest, moved = (bands.sphere_band(kind, vectors(n), 2.0, moved) for moved in (False, True))
        assert rest.up == rest.down == moved.up == moved.down == 2.0
        assert 2.0 - rest.low == pytest.approx(rest.high - 2.0, rel=1e-3)
        assert rest.high - 2.0 >= 2 * (kind.unit + guard(kind, vectors(1))) / 2
        if kind.unit == FLOATS[kind.compute].unit:
            assert 0 < moved.high - 2.0 < (rest.high - 2.0) / (1 if n == 1 else 2)
        else:  # a step and a projection agree, so that a projection after a step changes no bit
            assert moved == rest


def test_a_sphere_with_one_radius_per_vector():
    radii = np.asarray([[1.0], [4.0]])
    band = bands.sphere_band(FLOATS["float32"], vectors(9), radii)
    found = band.factors(np.asarray([[2.0], [4.0]]), np)
    assert found.tolist() == [[0.5], [1.0]]


# ---------------------------------------------------------------------------------------------- radii that are refused


@pytest.mark.parametrize(("name", "least"), [("float32", 2.0**-94), ("bfloat16", 2.0**-94), ("float64", 2.0**-990)])
def test_the_smallest_radius(name, least):
    kind = FLOATS[name]
    assert bands.least_radius(kind) == least
    bands.ball_band(kind, vectors(3), least)
    with pytest.raises(ValueError, match=f"is too small for arithmetic in {kind.compute}: pass at least"):
        bands.ball_band(kind, vectors(3), least / 2)
    with pytest.raises(ValueError, match=r"low=.* is too small"):
        bands.interval_band(kind, vectors(3), least / 2, 1.0)


def test_the_largest_radius():
    for name, kind in FLOATS.items():
        band = bands.ball_band(kind, vectors(3), 1.7e308)
        assert band.high <= bands.largest(kind), name
    assert bands.largest(FLOATS["float32"]) == float(np.finfo(np.float32).max)
    assert bands.largest(FLOATS["float64"]) == float(np.finfo(np.float64).max)


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_a_traced_radius_that_is_not_positive_is_nan(name):
    def numbers(c):
        band = bands.ball_band(FLOATS[name], vectors(3), c)
        return band.high, band.down

    for c in (0.0, -1.0, 1e-33, math.nan):
        assert all(map(jnp.isnan, jax.jit(numbers)(c)))
    plain = bands.ball_band(FLOATS[name], vectors(3), 3.7)
    np.testing.assert_allclose(jax.jit(numbers)(3.7), (plain.high, plain.down), rtol=1e-6)
