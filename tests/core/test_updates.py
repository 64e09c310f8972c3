"""Shapings of the update and spheres against float64 transcriptions of their formulas."""

import json
import math
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from projgd import (
    Box,
    MaxNorm,
    MaxUpdate,
    NonNegative,
    RadialBrake,
    RelativeUpdate,
    Sphere,
    Split,
    TangentUpdate,
    UnitNorm,
    from_config,
    projections,
)

TOLERANCE = {"float64": 1e-14, "float32": 5e-7, "bfloat16": 2**-8, "float16": 2**-10}


def norm(x):
    return math.sqrt(math.fsum(float(v) ** 2 for v in np.ravel(x)))


# ---- transcriptions, one vector, float64


def relative(u, w, lr):
    return lr * norm(w) * u / norm(u)


def tangent(u, w, lr):
    return u - w * (math.fsum((w * u).ravel()) / norm(w) ** 2)


def brake(u, w, lr, outward=0.25, inward=0.5):
    v = w + u
    share = outward if norm(v) > norm(w) else inward
    return v * (norm(w) + share * (norm(v) - norm(w))) / norm(v) - w


def limited(u, w, lr, ratio=0.1, floor=0.05):
    r = norm(u) / norm(w)
    return u * min(ratio, max(floor, r)) / r


CASES = [
    (RelativeUpdate(axis=None), relative),
    (TangentUpdate(axis=None), tangent),
    (RadialBrake(0.25, 0.5, axis=None), brake),
    (MaxUpdate(0.1, floor=0.05, axis=None), limited),
]


def library(kind, dtype):
    if kind == "torch":
        return lambda x: torch.as_tensor(x).to(getattr(torch, dtype))
    return (lambda x: jnp.asarray(x, dtype)) if kind == "jax" else (lambda x: np.asarray(x, dtype))


def plain(x):
    return np.asarray(x.double() if isinstance(x, torch.Tensor) else x, np.float64)


@pytest.mark.parametrize(("update", "formula"), CASES, ids=lambda c: type(c).__name__ if hasattr(c, "axis") else "")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("numpy", "float64"), ("numpy", "float32"), ("torch", "float32"), ("torch", "bfloat16"), ("jax", "float32"),
     ("jax", "float16")],
)  # fmt: skip
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (8, 1), (70, 9)]), st.floats(-3, 1))
def test_a_shaping_is_its_formula(update, formula, kind, dtype, seed, shape, log_size):
    rng = np.random.default_rng(seed)
    make = library(kind, dtype)
    w, u = make(rng.normal(size=shape)), make(rng.normal(size=shape) * 10**log_size)
    assume(norm(plain(w) + plain(u)) > 1e-3 * norm(plain(w)))
    got = update(u, w, lr=0.3)
    assert got.dtype == u.dtype
    wanted = formula(plain(u), plain(w), 0.3)
    scale = norm(wanted) if isinstance(update, (RelativeUpdate, MaxUpdate)) else norm(plain(u))
    if isinstance(update, RadialBrake):  # where w + u almost cancels, its direction is ill-conditioned
        scale *= 1 + (norm(plain(w)) + norm(plain(u))) / norm(plain(w) + plain(u))
    assert norm(plain(got) - wanted) <= TOLERANCE[dtype] * scale + 5e-16 * norm(plain(w))  # v - w rounds in float64


@pytest.mark.parametrize("update", [c[0] for c in CASES], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("w_size", "u_size"), [(1e30, 1e30), (1e-30, 1e-30), (1e15, 1e-20), (1e-18, 1e18)])
def test_extremes_neither_over_nor_underflow(update, w_size, u_size):
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(8, 4)) * w_size).astype(np.float32)
    u = (rng.normal(size=(8, 4)) * u_size).astype(np.float32)
    formula = {type(c): f for c, f in CASES}[type(update)]
    wanted = formula(u.astype(np.float64), w.astype(np.float64), 0.3)
    got = plain(update(u, w, lr=0.3))
    assert norm(got - wanted) <= 5e-7 * max(norm(wanted), norm(u)) + 5e-16 * norm(w)


@pytest.mark.parametrize("update", [c[0] for c in CASES], ids=lambda c: type(c).__name__)
def test_a_zero_update_stays_zero_and_nothing_is_laundered(update):
    w, zero = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    assert (update(zero, w) == 0).all()
    rows = type(update)(**{**from_config_fields(update), "axis": "fan_in"})
    u = np.ones((2, 3), np.float32)
    u[0, 0], u[1, 1] = np.nan, np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's own, about NaN
        got = rows(torch.as_tensor(u.T.copy()), torch.ones(3, 2)).numpy().T
    assert np.isnan(got[0, 0])
    assert np.isinf(got[1, 1])
    assert np.isfinite(got[:, 2]).all()  # the third neuron is shaped as usual


def from_config_fields(update):
    return {k: v for k, v in update.config().items() if k != "kind"}


def test_within_the_limits_no_bit_changes():
    rng = np.random.default_rng(1)
    w = rng.normal(size=(5, 7)).astype(np.float32)
    u = (0.07 * w / np.linalg.norm(w) * np.linalg.norm(w)).astype(np.float32)
    assert (MaxUpdate(0.1, floor=0.05, axis=None)(u, w) == u).all()
    tangential = np.asarray([[1.0, 0.0]], np.float32)
    assert (TangentUpdate(axis=None)(tangential, np.asarray([[0.0, 3.0]], np.float32)) == tangential).all()
    assert np.allclose(RadialBrake(1.0, 1.0, axis=None)(u, w), u, rtol=0, atol=0)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_tangents_are_tangent_and_the_brake_holds_the_norm(seed):
    rng = np.random.default_rng(seed)
    w, u = rng.normal(size=(2, 6, 50))
    flat = TangentUpdate(axis=0)(u, w)
    assert np.abs((flat * w).sum(0)).max() < 1e-13
    held = w + RadialBrake(0.0, 0.0, axis=0)(u, w)
    assert np.allclose(np.linalg.norm(held, axis=0), np.linalg.norm(w, axis=0), rtol=1e-14)


def test_an_update_that_ends_at_zero_passes_the_brake():
    w = np.ones((2, 2))
    assert (RadialBrake(0.5, 0.5, axis=None)(-w, w) == -w).all()


@pytest.mark.parametrize("axis", ["fan_in", None, 0, (0, 1), Split(dim=0, parts=2, over=(1, 2))])
def test_vectors_are_shaped_each_for_itself(axis):
    rng = np.random.default_rng(2)
    w, u = torch.as_tensor(rng.normal(size=(2, 4, 6)))
    got = RelativeUpdate(axis)(u, w, lr=0.1).numpy()
    blocks = {"fan_in": [np.s_[i] for i in range(4)], 0: [np.s_[:, j] for j in range(6)]}
    blocks |= {None: [np.s_[:]], (0, 1): [np.s_[:]]}
    parts = blocks[axis] if not isinstance(axis, Split) else [np.s_[:2], np.s_[2:]]
    for part in parts:
        assert np.allclose(got[part], relative(u.numpy()[part], w.numpy()[part], 0.1), rtol=1e-13)


def test_biases_are_left_to_the_inner_optimizer():
    bias = np.ones(3)
    assert RelativeUpdate()(bias, bias * 5) is bias
    assert Sphere(2.0, "matrix").project(bias) is bias


@pytest.mark.parametrize(
    "thing",
    [RelativeUpdate(), TangentUpdate("fan_in"), RadialBrake(0.1, 0.2, (0, 1)), MaxUpdate(0.1, 0.01, Split(0, 2, (1,))),
     Sphere("initial", None), Sphere(2.0, "matrix"), UnitNorm(0), Box(-1, 2)],
)  # fmt: skip
def test_configurations_survive_json(thing):
    assert from_config(json.loads(json.dumps(thing.config()))) == thing


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RadialBrake(outward=1.5), "outward=1.5 is a share"),
        (lambda: RadialBrake(inward=math.nan), "inward=nan is a share"),
        (lambda: MaxUpdate(0.0), "ratio=0.0 must be positive"),
        (lambda: MaxUpdate(0.1, floor=0.2), "floor=0.2 must lie between 0 and ratio=0.1"),
        (lambda: RelativeUpdate(axis="rows"), "axis='rows' is not known"),
        (lambda: Sphere("first"), "radius='first' is not known"),
        (lambda: Sphere(-1.0), "radius=-1.0 must be positive"),
        (lambda: Sphere("initial").project(np.ones((2, 2))), "no radius outside an optimizer"),
        (lambda: RelativeUpdate(0).resolve((2, 3), "out_first", "head", UnitNorm()), "different vectors in head"),
        (lambda: Sphere("initial").initial(np.zeros((4, 2)), (0,), "proj"), "proj: 2 of its 2 vectors have norm 0"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(("kind", "dtype"), [("numpy", "float32"), ("torch", "bfloat16"), ("jax", "float16")])
def test_a_sphere_keeps_its_initial_norms(kind, dtype):
    rng = np.random.default_rng(3)
    w = library(kind, dtype)(rng.normal(size=(6, 40)))
    sphere = Sphere("initial", axis=1)
    bound = sphere.bind(sphere.initial(w, (1,), "w"))
    assert np.allclose(plain(bound.radius)[:, 0], [norm(row) for row in plain(w)], rtol=1e-6)
    moved = w * 3
    tight = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
    for back in (bound.onto(moved, (1,)), bound.land(moved, (1,))):
        norms = [norm(row) for row in plain(back)]
        assert np.allclose(norms, plain(bound.radius)[:, 0], rtol=tight)
    assert (plain(bound.onto(bound.onto(moved, (1,)), (1,))) == plain(bound.onto(moved, (1,)))).all()
    assert (plain(bound.land(w, (1,))) == plain(w)).all()  # a step that moved nothing


def test_a_landing_is_ten_times_nearer_than_the_band():
    rng = np.random.default_rng(4)
    w = rng.normal(size=(64, 32)).astype(np.float32)
    w /= np.float32(norm(w))
    off = [norm(UnitNorm(None).land((w * np.float32(1 + k * 1e-7)), (0, 1))) - 1 for k in range(-30, 31)]
    assert max(map(abs, off)) < 4e-7


@pytest.mark.parametrize("moved", [False, True])
def test_the_band_of_a_sphere_has_its_edge(moved):
    """1 - band is a float64, and every operation on it exact."""
    band = projections.sphere_band(projections.FLOATS["float64"], (1, 3), (0,), 1.0, moved)
    x = np.asarray([[1 - band, -(1 - band), 1 - band - 2.0**-53]])
    found = UnitNorm(0).land(x, (0,)) if moved else UnitNorm(0).project(x)
    assert found.tolist() == [[1 - band, -(1 - band), 1.0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_zero_vector_has_no_place_on_a_sphere_and_stays(dtype):
    x = torch.tensor([[0.0, -0.0], [3.0, 4.0]], dtype=getattr(torch, dtype))
    for found in (UnitNorm().project(x), UnitNorm().land(x, (1,))):
        assert torch.equal(found[0], x[0])
        assert torch.signbit(found[0]).tolist() == [False, True]


def test_unit_norm_is_the_sphere_of_radius_one():
    x = np.random.default_rng(5).normal(size=(7, 3))
    assert (UnitNorm().project(x) == Sphere(1.0).project(x)).all()
    assert repr(UnitNorm()) == "UnitNorm(axis='fan_in')"
    assert not isinstance(MaxNorm(1.0), Sphere)


@given(st.floats(-3, 3), st.floats(0.1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_box_is_held_exactly_and_tight(dtype, low, width, seed):
    box = Box(low, low + width)
    x = torch.as_tensor(np.random.default_rng(seed).normal(size=50) * 3).to(getattr(torch, dtype))
    got, t = box.project(x), {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}[dtype]
    assert ((got.double() >= box.low) & (got.double() <= box.high)).all()
    nearest = x.double().clamp(box.low, box.high)
    assert ((got.double() - nearest).abs() <= t * max(abs(box.low), abs(box.high))).all()
    assert (box.project(got) == got).all()
    assert (box.violation(got) == 0).all()


@pytest.mark.parametrize("set_", [NonNegative(), Box(0.0, 1.0), Box(-1.0, 0.0)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_zero_on_the_boundary_keeps_its_sign(set_, dtype):
    x = torch.tensor([0.0, -0.0], dtype=getattr(torch, dtype))
    assert torch.signbit(set_.project(x)).tolist() == [False, True]


def test_a_box_keeps_nan_and_refuses_nonsense():
    assert np.isnan(Box(0, 1).project(np.asarray([np.nan, 2.0]))[0])
    for low, high in [(1, 0), (1, 1), (0, math.inf), (math.nan, 1)]:
        with pytest.raises(ValueError, match="must be finite, and low the smaller"):
            Box(low, high)
