"""Sets over several arrays, against transcriptions in extended precision, on NumPy, PyTorch and JAX."""

import functools
import json
import math
import warnings

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from projgd import ProductMaxNorm, QKClip, TreeBall, from_config
from projgd.sums import FLOATS
from tests.contract import NUMPY, TIGHT, bits
from tests.core.arrays import back, to

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZES = {"float64": 150, "float32": 18, "float16": 2, "bfloat16": 17}
"""The largest power of ten of an entry: the norm of a product of two such factors is in the range of the test's own."""


@functools.cache
def jitted_projection(made):
    """One program for all arrays of the same shapes."""
    return jax.jit(lambda arrays: made.project(*arrays))


def project(made, library, members, logits=None, jitted=False):
    """The members of `made.project`, run in a library, as arrays of NumPy."""
    kept = {} if logits is None else {"logits": to(library, logits)}

    with jax.enable_x64(library == "jax"):
        arrays = [to(library, x) for x in members]
        if jitted:
            return [back(x) for x in jitted_projection(made)(arrays)]
        return [back(x) for x in made.project(*arrays, **kept)]


def wide(x):
    return np.asarray(x, np.float64).astype(np.longdouble)


def product(members, library):
    """B A in extended precision."""
    a, b = map(wide, members)
    return b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1) if library == "torch" else a @ b


def length(*arrays):
    return np.sqrt(sum((wide(x) ** 2).sum() for x in arrays))


def reach(members, library):
    """The sum of the norms of the rank-one products."""
    a, b = map(wide, members)
    rows, columns = (a, b.T) if library == "torch" else (a.T, b)
    return (np.sqrt((rows**2).sum(1)) * np.sqrt((columns**2).sum(1))).sum()


def judge_product(members, moved, again, made, library):
    """Held, tight, untouched, idempotent, nothing laundered, one factor for both."""
    dtype = members[0].dtype.name
    same = all((bits(x) == bits(y)).all() for x, y in zip(members, moved, strict=True))
    if not all(np.isfinite(wide(x)).all() for x in members):
        assert same, "laundered"
        return
    before, after = (made.scale * length(product(x, library)) for x in (members, moved))
    assert after <= made.c, f"held: {float(after / made.c)!r}"
    assert all((bits(x) == bits(y)).all() for x, y in zip(moved, again, strict=True)), "idempotent"
    across = made.scale * reach(members, library)
    spread = float(across / before) if before else math.inf
    unit = (sum(x.size for x in members) + 64) * 2.0**-53
    error = unit * spread**2
    if before**2 + unit * (across**2 + made.c**2) <= made.c**2:  # what float64 can tell from the bound
        assert same, "untouched"
    coarse = any(math.sqrt(x.size) * FLOATS[dtype].tiny > 1e-4 * length(y) for x, y in zip(members, moved, strict=True))
    if before > made.c and not coarse and spread < 8:
        assert after >= made.c * (1 - 2 * TIGHT[dtype] - 8 * error), f"tight: {float(after / made.c)!r}"
        f = np.sqrt(made.c / before)
        for x, y in zip(members, moved, strict=True):
            near = np.abs(wide(y) - f * wide(x)) <= 2 * TIGHT[dtype] * np.abs(f * wide(x)) + FLOATS[dtype].tiny
            assert near.all() or error > TIGHT[dtype], "the formula"


@st.composite
def factors(draw, dtypes=tuple(NUMPY), shapes=None):
    """Two factors in PyTorch's layout, (r, in) and (out, r), of sizes from tiny to huge, some with cancellation.

    `shapes` are (r, in, out); any up to (5, 9, 9) if there are none.
    """
    dtype = draw(st.sampled_from(dtypes))
    rank, inputs, outputs = draw(
        st.sampled_from(shapes) if shapes else st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    a, b = rng.standard_normal((rank, inputs)), rng.standard_normal((outputs, rank))
    how = draw(st.sampled_from(["random", "random", "cancel", "zero", "rows", "broken"]))
    if how == "cancel" and rank > 1:
        a[1], b[:, 1] = a[0], -b[:, 0] * draw(st.sampled_from([1, 1 + 1e-3, 1 + 1e-7]))
    if how == "rows":
        ratio = 10.0 ** (np.arange(rank) * SIZES[dtype] / 6)[:, None]
        a, b = a * ratio, b / ratio.T
    if how == "zero":
        (a, b)[draw(st.integers(0, 1))][...] = draw(st.sampled_from([0.0, -0.0]))
    most = SIZES[dtype] / 2
    a, b = a * 10.0 ** draw(st.floats(-most, most)), b * 10.0 ** draw(st.floats(-most, most))
    if how == "broken":
        x = (a, b)[draw(st.integers(0, 1))]
        x[draw(st.integers(0, x.shape[0] - 1)), 0] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    with np.errstate(over="ignore"):
        return [x.astype(NUMPY[dtype]) for x in (a, b)]


def product_case(pair, made, library, jitted=False):
    pair = pair if library == "torch" else [np.ascontiguousarray(x.T) for x in pair]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = project(made, library, pair, jitted=jitted)
        again = project(made, library, moved, jitted=jitted)
    judge_product(pair, moved, again, made, library)


@given(factors(), st.floats(-0.5, 0.5), st.sampled_from([0.125, 1.0, 2.0]), st.sampled_from(["numpy", "torch"]))
@settings(max_examples=400, deadline=None)
def test_a_product_is_held(pair, exponent, scale, library):
    made = ProductMaxNorm(10.0**exponent, scale)
    product_case(pair, made, library)


@given(factors(shapes=[(1, 1, 1), (3, 9, 4)]), st.floats(-0.5, 0.5))  # JAX compiles for every shape
@settings(max_examples=25, deadline=None)
def test_a_product_is_held_in_jax(pair, exponent):
    product_case(pair, ProductMaxNorm(10.0**exponent, 2.0), "jax")


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_product_is_held_under_jit(dtype):
    rng = np.random.default_rng(0)
    pair = [rng.standard_normal(s).astype(NUMPY[dtype]) for s in ((4, 40), (30, 4))]
    product_case(pair, ProductMaxNorm(1.5, 2.0), "jax", jitted=True)


@given(factors(), st.floats(0.9, 1.1))
@settings(max_examples=200, deadline=None)
def test_a_product_near_the_bound(pair, share):
    norm = float(length(product(pair, "torch")))
    if 1e-3 < norm < 1e3:
        product_case(pair, ProductMaxNorm(norm * share), "torch")


def test_a_product_that_float64_cannot_tell_from_the_bound_is_held():
    """The rank-one products are 1e9 times their sum, so that the computed sum may be far too small."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        v, w, change = 1e5 * rng.standard_normal((1, 9)), 1e5 * rng.standard_normal((9, 1)), rng.standard_normal((1, 9))
        a, b = np.concatenate([v, v + 1e-5 * change]), np.concatenate([w, -w], axis=1)
        for made in (ProductMaxNorm(0.5), ProductMaxNorm(float(length(product((a, b), "torch"))) * 0.9)):
            moved = project(made, "torch", (a, b))
            assert length(product(moved, "torch")) <= made.c


def test_jax_without_float64_is_held_with_a_wider_guard():
    rng = np.random.default_rng(1)
    pair = [rng.standard_normal(s).astype(np.float32) for s in ((40, 4), (4, 30))]
    moved = [back(x) for x in ProductMaxNorm(1.0).project(*(to("jax", x) for x in pair))]
    assert 1 - 1e-4 < length(product(moved, "jax")) <= 1.0


def test_the_product_is_never_formed():
    made, (a, b) = ProductMaxNorm(1.0), (np.ones((300_000, 1)), np.ones((1, 300_000)))  # 0.7 TB together
    a, b = made.project(a, b)
    assert 1 - 1e-9 < float(made.norm(a, b)) <= 1.0


def test_a_convolution_pair_is_read_as_matrices():
    torch = pytest.importorskip("torch")
    a, b = torch.randn(2, 3, 3, 3, dtype=torch.float64), torch.randn(5, 2, 1, 1, dtype=torch.float64)
    y, z = ProductMaxNorm(0.5).project(a, b)
    assert y.shape == a.shape
    assert z.shape == b.shape
    assert float((z.flatten(1) @ y.flatten(1)).norm()) == pytest.approx(0.5, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------- TreeBall


@given(
    st.sampled_from(["numpy", "torch"]),
    st.sampled_from(list(NUMPY)),
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    st.integers(0, 999),
    st.sampled_from([-1.0, 0.0, 0.3, 1.0]),
    st.sampled_from([None, None, math.nan, math.inf]),
)
@settings(max_examples=300, deadline=None)
def test_a_ball_around_all(library, dtype, shapes, seed, size, broken):
    rng = np.random.default_rng(seed)
    scale = 10.0 ** (size * SIZES[dtype])
    members = [np.asarray(scale * rng.standard_normal(s), NUMPY[dtype]) for s in shapes]
    if broken is not None and members[0].size:
        members[0][(0,) * members[0].ndim] = broken
    c = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved = project(TreeBall(c), library, members)
        again = project(TreeBall(c), library, moved)
    same = all((bits(x) == bits(y)).all() for x, y in zip(members, moved, strict=True))
    before, after = length(*members), length(*moved)
    if not np.isfinite(before):
        assert same, "laundered"
        return
    assert after <= c, "held"
    assert all((bits(x) == bits(y)).all() for x, y in zip(moved, again, strict=True)), "idempotent"
    if before <= c * (1 - TIGHT[dtype]):
        assert same, "untouched"
    elif before > c:
        assert after >= c * (1 - TIGHT[dtype]), f"tight: {float(after / c)!r}"
        for x, y in zip(members, moved, strict=True):
            near = np.abs(wide(y) - wide(x) * (c / before)) <= TIGHT[dtype] * np.abs(wide(x) * (c / before))
            assert (near | (np.abs(wide(y)) < 100 * FLOATS[dtype].tiny)).all(), "the formula"


def test_a_ball_of_huge_float64():
    (y,) = TreeBall(1e-5).project(np.full(7, 1e308))
    assert 1e-5 * (1 - 1e-12) < length(y) <= 1e-5


def test_a_ball_of_mixed_dtypes():
    members = [np.full(50, 3.0, NUMPY[dtype]) for dtype in NUMPY]
    moved = TreeBall(2.0).project(*members)
    assert [x.dtype for x in moved] == [x.dtype for x in members]
    assert 2.0 * (1 - 1e-2) <= length(*moved) <= 2.0


# --------------------------------------------------------------------------------------------------------------- QKClip


def clip(w, logits, tau, power, layout):
    """A transcription: W of the heads, scaled in float64."""
    factor = np.asarray([(tau / float(s)) ** power if s > tau and np.isfinite(s) else 1.0 for s in logits])
    heads = len(factor)
    x = np.asarray(w, np.float64)
    if layout == "torch":
        y = (x.reshape(heads, -1, *x.shape[1:]) * factor.reshape(-1, *[1] * x.ndim)).reshape(x.shape)
    elif x.ndim == 3:
        y = x * factor[:, None]
    else:
        y = (x.reshape(*x.shape[:-1], heads, -1) * factor[:, None]).reshape(x.shape)
    return y.astype(w.dtype)


@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(("heads", "k_heads"), [(4, 4), (4, 2), (6, 1)])
def test_heads_are_clipped(library, dtype, heads, k_heads):
    rng, made = np.random.default_rng(heads), QKClip(50.0, 0.3, heads=heads, k_heads=k_heads)
    logits = np.resize(np.asarray([20.0, 400.0, 50.0, 75.0, math.nan, math.inf], np.float32), heads)
    shared = [max(group) for group in logits.reshape(k_heads, -1)] if heads == 4 else [math.nan]
    for shape in [(3, 5)] if library == "torch" else [(5, 3), "own"]:
        d = 3
        w = [rng.standard_normal((n * d, 5) if library == "torch" else (5, n * d)) for n in (heads, k_heads)]
        if shape == "own":
            w = [x.reshape(5, n, d) for x, n in zip(w, (heads, k_heads), strict=True)]
        bias = [rng.standard_normal((n, d) if shape == "own" else n * d) for n in (heads, k_heads)]
        members = [x.astype(NUMPY[dtype]) for x in (*w, *bias)]
        members[0].reshape(-1)[0] = math.nan
        moved = project(made, library, members, logits)
        for i, (x, y) in enumerate(zip(members, moved, strict=True)):
            own, power = (logits, shared)[i % 2], (0.3, 0.7)[i % 2]
            flat_bias = i > 1 and shape != "own"
            x = x[None] if i > 1 and shape == "own" else x
            wanted = clip(x, own, 50.0, power, "torch" if library == "torch" or flat_bias else "").reshape(y.shape)
            rtol = 0 if dtype.endswith("16") else 4 * FLOATS[dtype].unit  # a power may differ in its last place
            np.testing.assert_allclose(np.asarray(y, np.float64), np.asarray(wanted, np.float64), rtol=rtol, atol=0)


def test_clipped_logits_reach_tau():
    """The logits of a batch after the clip are at most tau, for heads that share a key head, too."""
    rng = np.random.default_rng(0)
    q, k, x = 3 * rng.standard_normal((8, 8)), 3 * rng.standard_normal((8, 4)), rng.standard_normal((16, 8))

    def largest(q, k):
        per_q, per_k = (x @ q).reshape(16, 4, 2), (x @ k).reshape(16, 2, 2)
        return np.einsum("ihd,jhd->hij", per_q, per_k.repeat(2, 1)).max((1, 2))

    before = largest(q, k)
    after = largest(*QKClip(40.0, heads=4, k_heads=2).project(q, k, logits=before))
    assert (before > 40).any()
    assert (after <= 40 * (1 + 1e-12)).all()


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ProductMaxNorm(0.0), ValueError, "c=0.0 must be positive"),
        (lambda: ProductMaxNorm(1.0, -2.0), ValueError, "scale=-2.0 must be positive"),
        (lambda: ProductMaxNorm("wide"), TypeError, "is not a number"),
        (lambda: TreeBall(math.nan), ValueError, "must be positive"),
        (lambda: QKClip(-1.0, heads=2), ValueError, "tau=-1.0 must be positive"),
        (lambda: QKClip(1.0, 1.5, heads=2), ValueError, "from 0 to 1"),
        (lambda: QKClip(1.0, heads=2.5), TypeError, "heads=2.5 is not a number of heads"),
        (lambda: QKClip(1.0, heads=0), ValueError, "heads=0"),
        (lambda: QKClip(1.0, heads=6, k_heads=4), ValueError, "evenly"),
        (lambda: ProductMaxNorm(1.0).over("a", "a"), ValueError, "twice"),
        (lambda: ProductMaxNorm(1.0).project(np.ones((2, 3))), ValueError, "over 1 tensors: pass two"),
        (lambda: ProductMaxNorm(1.0).project(np.ones((2, 3)), np.ones((4, 2))), ValueError, "ranks 3 and 4 differ"),
        (lambda: ProductMaxNorm(1.0).project(np.ones(2), np.ones((4, 2))), ValueError, "two matrices"),
        (
            lambda: ProductMaxNorm(1.0).project(np.ones((2, 3), int), np.ones((3, 2))),
            TypeError,
            "member 0 has dtype int",
        ),
        (
            lambda: ProductMaxNorm(1e-20).project(np.ones((2, 3), np.float16), np.ones((3, 2), np.float16)),
            ValueError,
            "c=1e-20 is too small for member 0",
        ),
        (lambda: TreeBall(1e-9).project(np.ones(9, np.float16)), ValueError, "too small"),
        (lambda: QKClip(1.0, heads=2).project(np.ones((3, 5)), np.ones((3, 4))), ValueError, "member 0 has shape"),
        (lambda: QKClip(1.0, heads=2).project(np.ones((3, 4)), np.ones((3, 8))), ValueError, "check k_heads"),
        (lambda: QKClip(1.0, heads=2).project(np.ones((3, 4))), ValueError, "over 1 tensors"),
        (
            lambda: QKClip(1.0, heads=2).project(np.ones((3, 4)), np.ones((3, 4)), logits=np.ones(3)),
            ValueError,
            r"logits for W_q have shape \(3,\)",
        ),
    ],
)
def test_bad_input(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize("made", [ProductMaxNorm(1.5, 2.0), QKClip(100.0, 0.4, heads=8, k_heads=2), TreeBall(3.0)])
def test_config(made):
    assert from_config(json.loads(json.dumps(made.config()))) == made
    assert made.over("a", "b").members == ("a", "b")
