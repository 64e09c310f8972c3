"""The forms of a projection: the contract, the step that is the optimizer's own, state, trees, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from projgd import MaxNorm, MinMaxNorm, NonNegative, Sphere, Split, UnitNorm
from projgd.axes import Vectors
from projgd.bands import ball_band, interval_band
from projgd.optax import apply_updates, maxnorm_projection, project, projection
from projgd.sums import FLOATS
from tests.contract import TIGHT, bits, columns, exact_norms, judge_norms
from tests.optax.matrix import CASES, FORMS, SETS, C, applied, chained, outcome

pytestmark = pytest.mark.usefixtures("quick_compilation")


def compile_as_users_do(form, request):
    """Operations one by one leave XLA nothing to optimize; what is jitted does."""
    if FORMS[form].jit or FORMS[form].traced:
        request.getfixturevalue("full_compilation")


@pytest.mark.parametrize(("form", "dtype", "update", "leaf"), CASES)
def test_the_contract(form, dtype, update, leaf, request):
    compile_as_users_do(form, request)
    w, q, again = outcome(form, dtype, update)[leaf]
    _, low, high = SETS[leaf.partition("/")[0]]
    judge_norms(w, q, low, high, again)
    if form.startswith("project"):  # a step may move a weight on a sphere by a last place
        assert (bits(again) == bits(q)).all(), "idempotent"


@pytest.mark.parametrize(("form", "dtype", "update", "leaf"), CASES)
def test_one_answer(form, dtype, update, leaf, request):
    """The reference in NumPy gives the same: to the guard in float32 and float64, and a last place in halves."""
    compile_as_users_do(form, request)
    w, q, _ = outcome(form, dtype, update)[leaf]
    made = SETS[leaf.partition("/")[0]][0](C).replace(axis=0)
    w, q = w[:, np.isfinite(w.astype(np.float64)).all(0)], q[:, np.isfinite(w.astype(np.float64)).all(0)]
    reference = np.asarray(made.project(w), np.float64)
    unit = FLOATS[dtype].unit
    off = exact_norms(np.asarray(q, np.float64) - reference) / exact_norms(reference).clip(1e-300)
    assert off.max() <= (72 * unit if dtype in ("float32", "float64") else 2 * unit)


@pytest.mark.usefixtures("full_compilation")
def test_at_the_edges():
    """The edge belongs to the band: a vector whose computed norm is T, without rounding, comes back bit for bit."""
    w = np.asarray([[3.0, 6.0, 1.5], [4.0, 8.0, 2.0]], np.float32)  # norms 5, 10, 2.5
    kind, vectors = FLOATS["float32"], Vectors((2, 3), (0,))
    c, low = 5.0 / ball_band(kind, vectors, 1.0).high, 5.0 / interval_band(kind, vectors, 1.0, 9.0).low
    assert ball_band(kind, vectors, c).high == interval_band(kind, vectors, low, 99.0).low == 5.0

    def move(p, u):
        sets = MaxNorm(c), MinMaxNorm(low, 99.0)
        return [[applied(p, u, made), chained(p, u, made), project(p, made)] for made in sets]

    for step in (move, jax.jit(move)):
        balls, intervals = step(jnp.asarray(w), jnp.zeros((2, 3)))
        for q in map(np.asarray, balls):
            assert (bits(q)[:, [0, 2]] == bits(w)[:, [0, 2]]).all()
            judge_norms(w, q, 0, c)
        for q in map(np.asarray, intervals):
            assert (bits(q)[:, :2] == bits(w)[:, :2]).all()
            judge_norms(w, q, low, 99.0)


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_far_outside(dtype):
    """|p| = 1e6, c = 4. `apply_updates` of projgd is tight at once; p + u of optax can only be as fine as p."""
    w = columns(0, 75, 9, 1e6, dtype)
    outwards = jnp.asarray(columns(1, 75, 9, 20.0, dtype))

    @jax.jit
    def step(p, q, u):
        return chained(p, u, MaxNorm(4.0)), applied(q, u, MaxNorm(4.0))

    first = step(jnp.asarray(w), jnp.asarray(w), jnp.full(w.shape, -0.0, dtype))
    second = step(*first, outwards)
    judge_norms(w, np.asarray(first[1]), 0, 4.0)
    for q in (*first, *second):
        assert (exact_norms(q) <= 4).all()
    for q in second:
        assert (exact_norms(q) >= 4 * (1 - TIGHT[dtype])).all()


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize(("stored", "update"), [("float32", "float32"), ("bfloat16", "float32")])
def test_a_thousand_steps_outwards(stored, update):
    """In one scan: never a bit outside; a neuron that is inside and gets no gradient keeps every bit."""
    tx = optax.chain(optax.sgd(0.37), maxnorm_projection(1.0))
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.standard_normal((8, 64)) * np.where(np.arange(64), 0.3, 0.1), stored)

    def step(carry, key):
        p, state = carry
        g = (jax.random.normal(key, p.shape) * 0.01).astype(update) - (p * 0.01).astype(update)
        updates, state = tx.update({"kernel": g.at[:, 0].set(0)}, state, {"kernel": p})
        p = optax.apply_updates({"kernel": p}, updates)["kernel"]
        return (p, state), p

    keys = jax.random.split(jax.random.key(0), 1000)
    (_, state), ps = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init({"kernel": p})), keys))(p)
    norms = np.linalg.norm(np.asarray(ps, np.float64), axis=1)
    assert (norms <= 1.0).all()
    assert (norms[-1, 1:] > 0.9).all()
    assert (ps[:, :, 0] == p[None, :, 0]).all()
    assert int(state[-1].count) == 1000


@pytest.mark.usefixtures("full_compilation")
def test_a_step_where_nothing_binds_is_the_optimizers_own():
    """To 2 ulp a step: XLA may fuse lr · direction into the addition in one program and not in the other."""
    p = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((30, 20)), jnp.float32)}
    g = {"kernel": jax.random.normal(jax.random.key(0), (3, 30, 20))}

    def run(tx, apply):
        def step(carry, g):
            updates, state = tx.update(g, carry[1], carry[0])
            return (apply(carry[0], updates), state), None

        return jax.lax.scan(step, (p, tx.init(p)), g)[0]

    adam = optax.adam(1e-2)
    (plain, state), (chain, (own, _)), (moved, other) = jax.jit(
        lambda: (
            run(adam, optax.apply_updates),
            run(optax.chain(adam, maxnorm_projection(1e6)), optax.apply_updates),
            run(adam, lambda p, u: apply_updates(p, u, MaxNorm(1e6))),
        )
    )()
    for found in (chain, moved):
        np.testing.assert_array_max_ulp(np.asarray(found["kernel"]), np.asarray(plain["kernel"]), maxulp=6)
    jax.tree.map(np.testing.assert_array_equal, (own, other), (state, state))


@pytest.mark.usefixtures("full_compilation")
def test_a_batch_is_its_parts():
    """Under vmap every branch is taken; vectors that overflow when squared are in one part and not in the other."""
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.standard_normal((2, 40, 6)), jnp.float32).at[1, 3, :3].set(1e30)
    u = jnp.asarray(rng.standard_normal(p.shape), jnp.float32)

    def step(p, u, c):
        return applied(p, u, MaxNorm(c)), chained(p, u, MaxNorm(c))

    both, one = jax.jit(jax.vmap(step, (0, 0, None)))(p, u, 4.0), jax.jit(step)
    for i in (0, 1):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), both, one(p[i], u[i], 4.0))
    swept = jax.jit(jax.vmap(step, (None, None, 0)))(p[0], u[0], jnp.asarray([0.5, 2.0, 100.0]))
    for q in swept:
        for kernel, c in zip(q, (0.5, 2.0), strict=False):
            np.testing.assert_allclose(exact_norms(kernel), c, rtol=1e-5)
            assert exact_norms(kernel).max() <= c
        np.testing.assert_array_equal(q[2], p[0] + u[0])


# ---------------------------------------------------------------------------------------------------------- sets, state


def test_initial_norms_are_taken_once_and_kept():
    """Not read from the weights at each step: scaled from outside, they come back to the norms that they had."""
    p = jnp.asarray([[3.0, 0.6, 1.0], [4.0, 0.8, 0.0]])
    tx = projection(Sphere("initial"))
    state = tx.init(p)
    np.testing.assert_allclose(state.initial, [[5.0, 1.0, 1.0]], rtol=1e-6)
    for scale in (2.0, 1e-6, 1e-25):
        updates, state = tx.update(jnp.zeros((2, 3)), state, p * scale)
        np.testing.assert_allclose(optax.apply_updates(p * scale, updates), p, rtol=1e-6)
    np.testing.assert_allclose(state.initial, [[5.0, 1.0, 1.0]], rtol=1e-6)
    assert int(state.count) == 3


@pytest.mark.usefixtures("full_compilation")
def test_other_sets_and_splits():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)
    sets = [NonNegative(), MaxNorm(0.5, axis=Split(dim=1, parts=2, over=(0, 2))), UnitNorm(None)]
    for move in (applied, chained):
        found = jax.jit(lambda x, move=move: [move(x, jnp.zeros((4, 6)), made) for made in sets])(x)
        assert (found[0] == np.maximum(x, 0)).all()
        halves = exact_norms(np.moveaxis(np.asarray(found[1]).reshape(4, 2, 3), 1, 2).reshape(12, 2))
        assert (halves <= 0.5).all()
        assert (halves >= 0.5 * (1 - 1e-5)).all()
        assert exact_norms(np.ravel(found[2])) == pytest.approx(1.0, rel=1e-6)


def test_a_function_of_the_step():
    tx = projection(lambda step: {"a": MaxNorm(1.0 + step), "b": None})
    params = {"a": jnp.full((4, 6), 9.0), "b": jnp.full((4, 6), 9.0)}
    state = tx.init(params)
    for step in range(3):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        q = optax.apply_updates(params, updates)
        np.testing.assert_allclose(exact_norms(q["a"]), 1.0 + step, rtol=1e-5)
        np.testing.assert_array_equal(q["b"], params["b"])


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("c", [np.nan, -1.0, 0.0])
def test_a_traced_c_that_is_no_bound_shows(c):
    """It cannot be refused in a compiled program, so the weights become NaN: never a bound that is not there."""
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for q in BROKEN(params, zeros, c):
        assert np.isnan(q["kernel"]).all()
        assert not np.isnan(q["bias"]).any()


BROKEN = jax.jit(lambda p, u, c: (applied(p, u, MaxNorm(c)), chained(p, u, MaxNorm(c))))


# ------------------------------------------------------------------------------------------ trees, what is refused


def test_none_and_masked_leaves_stay():
    params = {"a": jnp.full((4, 6), 9.0), "b": None, "c": jnp.ones((4, 6)), "d": ([None, {}], ())}
    updates = {"a": jnp.zeros((4, 6)), "b": None, "c": optax.MaskedNode(), "d": ([None, {}], ())}
    moved = apply_updates(params, updates, MaxNorm(1.0))
    tx = projection(MaxNorm(1.0))
    changed, state = tx.update(updates, tx.init(params), params)
    for q in (moved["a"], params["a"] + changed["a"]):
        assert exact_norms(q) == pytest.approx(1.0, rel=1e-5)
    assert moved["b"] is changed["b"] is None
    assert isinstance(changed["c"], optax.MaskedNode)
    np.testing.assert_array_equal(moved["c"], params["c"])
    assert state.initial is None


@pytest.mark.usefixtures("full_compilation")
def test_donated_buffers_are_used():
    params = {"kernel": jnp.ones((64, 32))}
    step = jax.jit(lambda p, u: apply_updates(p, u, MaxNorm(1.0)), donate_argnums=0)
    assert exact_norms(step(params, jax.tree.map(jnp.copy, params))["kernel"]).max() <= 1
    assert params["kernel"].is_deleted()


def test_refused_when_made_or_used():
    with pytest.raises(TypeError, match=r"3\.0 is not a constraint"):
        projection(3.0)
    with pytest.raises(TypeError, match="at 'a/b'"):
        projection({"a": {"b": 3.0}})
    params = {"kernel": jnp.ones((2, 2))}
    tx = projection(MaxNorm(1.0))
    with pytest.raises(ValueError, match=r"needs the parameters: call tx\.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="different trees"):
        tx.update({"other": params["kernel"]}, tx.init(params), params)
    with pytest.raises(ValueError, match="kernel has shape"):
        tx.update({"kernel": jnp.ones((2, 1))}, tx.init(params), params)
    with pytest.raises(ValueError, match="different trees"):
        apply_updates({**params, "d": jnp.ones(1)}, params, MaxNorm(1.0))
    with pytest.raises(TypeError, match="is not a constraint"):
        apply_updates(params, params, lambda step: MaxNorm(1.0))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"c": 0}, ValueError, "c=0.0 must be positive"),
        ({"c": -2}, ValueError, "c=-2.0 must be positive"),
        ({"c": float("nan")}, ValueError, "c=nan must be positive"),
        ({"c": "4"}, TypeError, "c='4' is not a number"),
        ({"c": None}, TypeError, "c=None is not a number"),
        ({"axis": "fan_out"}, ValueError, "axis='fan_out' is not known"),
        ({"axis": 0.5}, TypeError, "axis=0.5 is not an axis"),
    ],
)
def test_bad_settings_are_refused_when_they_are_made(settings, error, message):
    with pytest.raises(error, match=message):
        maxnorm_projection(**settings)
