"""The contract of MaxNorm as one check, in exact arithmetic, for tests to put to every way that weights take."""

import math
import warnings

import hypothesis.strategies as st
import ml_dtypes
import numpy as np

from projgd import projections

TIGHT = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
NUMPY = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
BITS = {8: np.uint64, 4: np.uint32, 2: np.uint16}


def exact_norms(w):
    """‖w‖₂ of the columns: squares and sums in extended precision, with a range where nothing overflows."""
    w = np.asarray(w, np.float64).astype(np.longdouble)
    return np.sqrt((w * w).sum(0))


def bits(w):
    w = np.ascontiguousarray(w)
    return w.view(BITS[w.dtype.itemsize])


def check(project, w, c):
    """Properties 1 to 6 for the columns of `w`, which `project(w, c)` projects."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing overflows on the way either
        q = project(w, c)
        again = project(q, c)
    judge(w, q, again, c)


def judge(w, q, again, c):
    """Properties 1 to 6 of the columns of `q`, projected from `w`, and of `again`, projected from `q`."""
    name = w.dtype.name
    finite = np.isfinite(np.asarray(w, np.float64)).all(0)
    assert (bits(q)[:, ~finite] == bits(w)[:, ~finite]).all(), "laundered"
    w, q, again = w[:, finite], q[:, finite], again[:, finite]
    before, after = exact_norms(w), exact_norms(q)
    assert (after <= c).all(), f"held: {after.max()!r} > {c!r}"
    inside = before <= c * (1 - TIGHT[name])
    assert (bits(q)[:, inside] == bits(w)[:, inside]).all(), "untouched"
    assert (bits(again) == bits(q)).all(), "idempotent"
    outside = before > c
    coarse = np.sqrt(len(w)) * 2.0**-25 if name == "float16" else 0.0
    if coarse < 0.02 * c:  # else no float16 is near
        assert (after[outside] >= c * (1 - TIGHT[name])).all(), f"tight: {(after[outside] / c).min()}"
        unit_w = np.asarray(w, np.float64)[:, outside] / before[outside]
        cosine = (unit_w * (np.asarray(q, np.float64)[:, outside] / after[outside])).sum(0)
        assert (cosine >= 1 - 1e-2).all(), "direction"


def columns(seed, n, rows, norms, dtype):
    w = np.random.default_rng(seed).standard_normal((n, rows))
    return np.asarray(w / exact_norms(w) * norms, NUMPY[dtype])


@st.composite
def at_the_threshold(draw, dtypes=tuple(NUMPY)):
    """Columns whose norms every way computes without rounding, and c such that the first is T, the last that is inside.

    The second is longer (no way may leave early), the third shorter.
    """
    entries = draw(st.sampled_from([(1,), (3, 4), (2, 2, 1), (8, 4, 1), (12, 16, 15)]))
    dtype, zeros = draw(st.sampled_from(dtypes)), draw(st.sampled_from([0, 1, 80]))
    w = np.zeros((len(entries) + zeros, 3))
    w[: len(entries)] = np.ldexp(entries, draw(st.integers(-9, 9)))[:, None] * np.asarray([1, 2, 0.5])
    w = np.roll(w, draw(st.integers(0, len(w) - 1)), axis=0)
    threshold, kind = float(exact_norms(w)[0]), projections.FLOATS[dtype]
    share = projections.ball_limits(kind, w.shape, (0,), 1.0, np).threshold
    near = threshold / share
    c = next(c for c in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)) if c * share == threshold)
    return w.astype(NUMPY[dtype]), c


def judge_at_the_threshold(w, q, c):
    """T belongs to what is untouched, on every way the same."""
    assert (bits(q)[:, [0, 2]] == bits(w)[:, [0, 2]]).all(), "a vector at the threshold moved"
    judge(w, q, q, c)


def judge_norms(w, q, low, high):
    """The contract of a set of norms from `low` to `high` (arrays, one number per column), for columns `q` from `w`.

    Held, tight, untouched, nothing laundered, zero vectors stay, direction kept. A sphere, low == high, is met to the
    tightness of the dtype.
    """
    t = TIGHT[w.dtype.name]
    wide_w, wide_q = np.asarray(w, np.float64), np.asarray(q, np.float64)
    stays = ~np.isfinite(wide_w).all(0) | (wide_w == 0).all(0)
    assert np.array_equal(wide_q[:, stays], wide_w[:, stays], equal_nan=True), "laundered, or a zero vector moved"
    low, high = (np.broadcast_to(x, stays.shape)[~stays] for x in (low, high))
    before, after = exact_norms(wide_w[:, ~stays]), exact_norms(wide_q[:, ~stays])
    solid = low < high
    assert (after[solid] <= high[solid]).all(), f"held: {(after / high).max()!r}"
    assert (after[solid] >= low[solid]).all(), f"held from below: {(after[solid] - low[solid]).min()!r}"
    inside = solid & (before <= high * (1 - t)) & (before >= low * (1 + t))
    kept = bits(q)[:, ~stays] == bits(w)[:, ~stays]
    assert kept[:, inside].all(), "untouched"
    assert (after >= np.minimum(before, high) * (1 - t)).all(), f"tight: {(after / np.minimum(before, high)).min()!r}"
    assert (after <= np.maximum(before, low) * (1 + t)).all(), f"tight: {(after / np.maximum(before, low)).max()!r}"
    assert (after[~solid] >= low[~solid] * (1 - t)).all(), "the sphere"
    assert (after[~solid] <= high[~solid] * (1 + t)).all(), "the sphere"
    cosine = ((wide_w[:, ~stays] / before) * (wide_q[:, ~stays] / after)).sum(0)
    assert (cosine >= 1 - 1e-2).all(), "direction"
