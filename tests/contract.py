"""The contract of sets of norms as one check in exact arithmetic, for tests to put to everything that projects."""

import math
import warnings

import hypothesis.strategies as st
import ml_dtypes
import numpy as np

from projgd.axes import Vectors
from projgd.bands import ball_band
from projgd.sums import FLOATS

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
    """Properties 1 to 6 of the columns of `q`, projected from `w`, and of `again`, projected from `q`, for a ball."""
    finite = np.isfinite(np.asarray(w, np.float64)).all(0)
    assert (bits(q)[:, ~finite] == bits(w)[:, ~finite]).all(), "laundered"
    judge_norms(w, q, 0.0, c, again)


def judge_norms(w, q, low, high, again=None):
    """The contract of the set of norms from `low` to `high`, for columns `q` that were projected from `w`.

    Held from both sides on the stored values; tight; untouched inside, bit for bit; nothing laundered; zero vectors
    stay; direction kept. A sphere (low == high) is met to the tightness of the dtype.

    Args:
        w, q: a vector per column, of one dtype.
        low, high: numbers, or arrays with one number per column.
        again: `q` projected again, which changes no bit of a set with an interior; None to leave that out.
    """
    name, wide_w, wide_q = w.dtype.name, np.asarray(w, np.float64), np.asarray(q, np.float64)
    t, same = TIGHT[name], (bits(q) == bits(w)).all(0)
    broken, zero = ~np.isfinite(wide_w).all(0), (wide_w == 0).all(0)
    assert np.array_equal(wide_q[:, broken], wide_w[:, broken], equal_nan=True), "laundered"
    assert same[zero].all(), "a vector of zeros moved"
    usual = ~(broken | zero)
    low, high = (np.broadcast_to(x, usual.shape)[usual] for x in (low, high))
    before, after, same = exact_norms(wide_w[:, usual]), exact_norms(wide_q[:, usual]), same[usual]
    solid = low < high
    assert (after <= high)[solid].all(), f"held: {(after / high)[solid].max()!r}"
    assert (after >= low)[solid].all(), f"held from below: {(after / low)[solid].min()!r}"
    inside = solid & (before <= high * (1 - t)) & (before >= low * (1 + t))
    assert same[inside].all(), "untouched"
    if again is not None:
        assert (bits(again) == bits(q))[:, usual][:, solid].all(), "idempotent"
        assert (bits(again) == bits(q))[:, zero].all(), "idempotent"
    coarse = math.sqrt(len(w)) * 2.0**-25 if name == "float16" else 0.0
    near = coarse < 0.02 * np.where(before < low, low, high)  # else no float16 is near
    shorter, longer = near & (before < low), near & (before > high)
    assert (after <= low * (1 + t))[shorter].all(), f"tight: {(after / low)[shorter].max()!r}"
    assert (after >= high * (1 - t))[longer].all(), f"tight: {(after / high)[longer].min()!r}"
    sphere = near & ~solid
    assert (np.abs(after / high - 1) <= t)[sphere].all(), f"on the sphere: {(after / high)[sphere]!r}"
    between = near & ~(shorter | longer)
    assert (np.abs(after / before - 1) <= 2 * t)[between].all(), "moved too far"
    with np.errstate(over="ignore"):
        cosine = ((wide_w[:, usual] / before) * (wide_q[:, usual] / after)).sum(0)
    assert (cosine >= 1 - 1e-2)[near].all(), "direction"


def columns(seed, n, rows, norms, dtype):
    w = np.random.default_rng(seed).standard_normal((n, rows))
    return np.asarray(w / exact_norms(w) * norms, NUMPY[dtype])


@st.composite
def at_the_threshold(draw, dtypes=tuple(NUMPY)):
    """Columns whose norms every engine computes without rounding, and c such that the first is the largest that stays.

    The second is longer (no engine may stop early), the third shorter.
    """
    entries = draw(st.sampled_from([(1,), (3, 4), (2, 2, 1), (8, 4, 1), (12, 16, 15)]))
    dtype, zeros = draw(st.sampled_from(dtypes)), draw(st.sampled_from([0, 1, 80]))
    w = np.zeros((len(entries) + zeros, 3))
    w[: len(entries)] = np.ldexp(entries, draw(st.integers(-9, 9)))[:, None] * np.asarray([1, 2, 0.5])
    w = np.roll(w, draw(st.integers(0, len(w) - 1)), axis=0)
    threshold, vectors = float(exact_norms(w)[0]), Vectors(w.shape, (0,))
    share = ball_band(FLOATS[dtype], vectors, 1.0).high
    near = threshold / share
    c = next(c for c in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)) if c * share == threshold)
    return w.astype(NUMPY[dtype]), c


def judge_at_the_threshold(w, q, c):
    """The threshold belongs to what is untouched, for every engine the same."""
    assert (bits(q)[:, [0, 2]] == bits(w)[:, [0, 2]]).all(), "a vector at the threshold moved"
    judge(w, q, q, c)
