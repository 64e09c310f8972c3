"""Shapings of the update against float64 transcriptions of their formulas."""

import math
import warnings

import jax
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from projgd import MaxUpdate, RadialBrake, RelativeUpdate, Split, TangentUpdate, UnitNorm
from tests.contract import NUMPY
from tests.core.arrays import back, to

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


by_jax = {type(update): jax.jit(update) for update, _ in CASES}


def plain(x):
    return back(x).astype(np.float64)


@pytest.mark.parametrize(("update", "formula"), CASES, ids=lambda c: type(c).__name__ if hasattr(c, "axis") else "")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("numpy", "float64"), ("numpy", "float32"), ("torch", "float32"), ("torch", "bfloat16"), ("jax", "float32")],
)  # fmt: skip
@settings(max_examples=15)
@given(st.integers(0, 2**32 - 1), st.sampled_from([(1, 1), (8, 1), (70, 9)]), st.floats(-3, 1))
def test_a_shaping_is_its_formula(update, formula, kind, dtype, seed, shape, log_size):
    rng, shape = np.random.default_rng(seed), (70, 9) if kind == "jax" else shape
    sizes = (1.0, 10**log_size)
    w, u = (to(kind, (rng.normal(size=shape) * size).astype(NUMPY[dtype])) for size in sizes)
    assume(norm(plain(w) + plain(u)) > 1e-2 * norm(plain(w)))
    got = (by_jax[type(update)] if kind == "jax" else update)(u, w, 0.3)
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
@settings(max_examples=20)
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


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RadialBrake(outward=1.5), "outward=1.5 is a share"),
        (lambda: RadialBrake(inward=math.nan), "inward=nan is a share"),
        (lambda: MaxUpdate(0.0), "ratio=0.0 must be positive"),
        (lambda: MaxUpdate(0.1, floor=0.2), "floor=0.2 must lie between 0 and ratio=0.1"),
        (lambda: RelativeUpdate(axis="rows"), "axis='rows' is not known"),
        (lambda: RelativeUpdate(0).resolve((2, 3), "out_first", "head", UnitNorm()), "different vectors in head"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
