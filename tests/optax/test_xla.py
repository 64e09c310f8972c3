"""What XLA could do to a projection: sums, extreme numbers, rounding, branches, memory; and its derivative."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from projgd import MaxNorm, MinMaxNorm, Sphere
from projgd.axes import Vectors
from projgd.optax import apply_updates, maxnorm_projection, project, projection
from projgd.sums import FLOATS, guard
from tests.contract import NUMPY, bits, columns, exact_norms, judge_norms
from tests.optax.matrix import applied, chained


def both(p, u, sets):
    """A step in both forms."""
    return {"apply_updates": applied(p, u, sets), "chain": chained(p, u, sets)}


def test_xla_sums_within_the_guard():
    """The proof needs norms that err by at most `guard`; equal entries are what running sums do worst."""
    rng, arrays = np.random.default_rng(0), {}
    for n in (1, 59, 60, 61, 100, 4608, 100_003, 1_000_000):
        arrays[f"{n} equal"] = np.full((n, 3), 0.7310585, np.float32)
        arrays[f"{n} random"] = rng.standard_normal((n, 3)).astype(np.float32)
    found = jax.jit(
        lambda xs: {k: [jnp.sqrt(jnp.sum(x * x, a)) for a, x in enumerate((x, x.T))] for k, x in xs.items()}
    )
    for name, norms in found(arrays).items():
        allowed = guard(FLOATS["float32"], Vectors(arrays[name].shape, (0,)))
        for norm in norms:
            off = np.abs(np.asarray(norm, np.longdouble) / exact_norms(arrays[name]) - 1)
            assert off.max() <= allowed, name


# ----------------------------------------------------------------------------------------------------- extreme numbers


EXTREMES = {  # bounds near the ends of each dtype, and the lengths of vectors without subnormal entries
    "float32": ([2e-28, 1e-20, 1e-3, 1e4, 1e20, 1e37], 1e-33, 3e38),
    "float64": ([1e-290, 1e-200, 1e-3, 1e4, 1e200, 1e307], 1e-300, 1.7e308),
}


@pytest.mark.parametrize("dtype", EXTREMES)
def test_sets_and_norms_of_every_size(dtype):
    """What is computed in float32 or in float64 neither over- nor underflows."""
    bounds, shortest, longest = EXTREMES[dtype]
    w = columns(0, 5, 60, np.geomspace(shortest, longest, 60), dtype)
    sets = {c: (MaxNorm(c), 0.0, c) for c in bounds}
    for c in (bounds[0], bounds[-1]):
        sets |= {c * 1.01: (Sphere(c * 1.01), c * 1.01, c * 1.01), c * 1.02: (MinMaxNorm(c / 2, c), c / 2, c)}
    move = jax.jit(lambda x: project(x, {c: s[0] for c, s in sets.items()}))
    with jax.enable_x64(dtype == "float64"):
        q = move({c: jnp.asarray(w) for c in sets})
        again = move(q)
    for c, (made, low, high) in sets.items():
        try:
            judge_norms(w, np.asarray(q[c]), low, high, np.asarray(again[c]))
        except AssertionError as error:
            raise AssertionError(f"{made}: {error}") from None


def test_large_and_small_entries_of_one_vector_and_signs_of_zero():
    w = np.asarray([[3e38, -3e38, 3e38], [1e25, 1e-25, 1.0], [1.9e19, 0.0, -0.0], [0.0, -0.0, 0.0], [-0.0, 1.0, 0.0]]).T
    w = w.astype(np.float32)
    for q in jax.jit(lambda x, u: (project(x, MaxNorm(4.0)), applied(x, u, MaxNorm(4.0))))(w, np.full_like(w, -0.0)):
        goal = w * np.minimum(4 / exact_norms(w).clip(1e-300), 1)
        np.testing.assert_allclose(q, goal.astype(np.float64), rtol=1e-5, atol=1e-24)
        np.testing.assert_array_equal(np.signbit(q), np.signbit(w))
        judge_norms(w, np.asarray(q), 0, 4)


@pytest.mark.parametrize("dtype", NUMPY)
def test_subnormal_entries_stay(dtype):
    """XLA on a CPU takes subnormal sums for 0 (not in float16, which it adds in float32): the projection takes none."""
    tiny = {"float32": 1e-40, "float64": 1e-310, "bfloat16": 1e-40, "float16": 5e-7}[dtype]
    w = np.asarray([[0.5, tiny, -0.0], [tiny, tiny, 1.0], [-tiny, tiny, tiny]]).astype(NUMPY[dtype])

    def move(p, u):
        return {"plain": optax.apply_updates(p, u), "project": project(p, MaxNorm(4.0)), **both(p, u, MaxNorm(4.0))}

    with jax.enable_x64(dtype == "float64"):
        for step in (move, jax.jit(move)):
            for zero in (0.0, -0.0):
                q = step(jnp.asarray(w), jnp.full(w.shape, zero, dtype))
                for form in ("chain", "apply_updates"):
                    assert (bits(np.asarray(q[form])) == bits(np.asarray(q["plain"]))).all()
                assert (bits(np.asarray(q["project"])) == bits(w)).all()


# ------------------------------------------------------------------------------------------------------------- rounding


MIXED = [(dtype, dtype) for dtype in ("float32", "bfloat16", "float16")] + [
    ("bfloat16", "float32"),
    ("float16", "float32"),
]


def test_halves_are_rounded_at_once():
    """A step to just about the bound, from near and from far: p + u rounds where XLA could skip a rounding or two."""
    rng, p, g = np.random.default_rng(0), {}, {}
    for stored, update in MIXED:
        for far in (1.0, 1000.0):
            goal = rng.standard_normal((64, 512))
            noise = 0 if stored == "float32" else rng.uniform(-0.01, 0.01, goal.shape)
            goal *= (1 + rng.uniform(-1e-5, 1e-6, 512) + noise) / np.linalg.norm(goal, axis=0)
            name = f"{stored}, {update}, {far}"
            p[name] = jnp.asarray(rng.standard_normal(goal.shape) * far, stored)
            g[name] = jnp.asarray((np.asarray(p[name], np.float64) - goal) / 0.1, update)
    tx = optax.chain(optax.sgd(0.1), maxnorm_projection(1.0))

    @jax.jit
    def step(p, g):
        u = jax.tree.map(lambda g: -0.1 * g, g)
        return optax.apply_updates(p, tx.update(g, tx.init(p), p)[0]), apply_updates(p, u, MaxNorm(1.0))

    for form, q in enumerate(step(p, g)):
        again = step(q, jax.tree.map(jnp.zeros_like, g))[form]
        for name in q:
            assert (exact_norms(q[name]) <= 1.0).all(), name
            assert (bits(np.asarray(again[name])) == bits(np.asarray(q[name]))).all(), name


def test_an_update_that_is_a_product():
    """Its rounding is not skipped: the jitted update, added to the weights, gives the bits of the plain step."""
    rng = np.random.default_rng(0)
    p, g = (jnp.asarray(rng.standard_normal((200, 300)), jnp.float32) for _ in range(2))
    plain = p + -np.float32(0.3) * g
    tx = optax.chain(optax.scale(-0.3), maxnorm_projection(1e6))
    updates, _ = jax.jit(tx.update)(g, tx.init(p), p)
    np.testing.assert_array_equal(optax.apply_updates(p, updates), plain)


HARD = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 3e38, -3e38, 1e-37, -1e-37, 65504.0, 2.0**-24]


def test_the_difference_is_added_without_error():
    """Where nothing binds, a chain has the bits of the plain step, for p and u of all relative sizes, and hard cases.

    Though its update is made anew from where p + u is. Only -0 may be 0, for an update that is wider than the weights.
    """
    rng, n, ps, us = np.random.default_rng(0), 100_000, {}, {}
    for stored, update in MIXED:
        reach = 10 if stored == "float16" else 30
        p = rng.standard_normal(n) * 2.0 ** rng.integers(-reach, reach, n)
        u = p * rng.standard_normal(n) * 2.0 ** rng.integers(-30, 30, n)
        u[: n // 4] = -p[: n // 4] * (1 + rng.standard_normal(n // 4) * 2.0 ** rng.integers(-24, 0, n // 4))
        with np.errstate(over="ignore"):
            ps[f"{stored} {update}"] = jnp.asarray(np.concatenate([p, np.repeat(HARD, len(HARD))]), stored)[None]
            us[f"{stored} {update}"] = jnp.asarray(np.concatenate([u, np.tile(HARD, len(HARD))]), update)[None]
    sets = {name: MaxNorm(1e9 if "float16" in name.split() else 1e12) for name in ps}
    with np.errstate(over="ignore", invalid="ignore"):
        plain, found = jax.jit(optax.apply_updates)(ps, us), jax.jit(lambda p, u: chained(p, u, sets))(ps, us)
    for name, q in found.items():
        ours, theirs = np.asarray(q, np.float64)[0], np.asarray(plain[name], np.float64)[0]
        binds = np.isfinite(theirs) & (abs(theirs) > sets[name].c)
        np.testing.assert_array_equal(ours[~binds], theirs[~binds])
        if len(set(name.split())) == 1:
            np.testing.assert_array_equal(np.signbit(ours[~binds]), np.signbit(theirs[~binds]))
        assert (abs(ours[binds]) <= sets[name].c).all()


# ----------------------------------------------------------------------------------------------------- programs, memory


def test_only_a_cpu_branches():
    """A branch saves a CPU a pass over the weights; elsewhere the device would wait for the host."""
    x = jnp.ones((8, 4))
    traced = jax.jit(lambda x: both(x, x, MaxNorm(1.0))).trace(x)
    texts = [traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")]
    branches = [text.count("stablehlo.case") for text in texts]  # two in each form choose the platform
    assert branches == [6, 4, 4]


def test_an_eager_call_compiles_nothing():
    """But the operations themselves, at the first call: a branch would be compiled anew at every call."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    x = jnp.ones((8, 4))
    both(x, x, MaxNorm(1.0))
    assert compiled
    compiled.clear()
    both(x, x, MaxNorm(1.0))
    assert not compiled


KERNELS = [(3, 3, 64, 500), (3, 3, 64, 500), (1, 1, 300, 1000), (600, 512), (600, 512), (64, 64), (100,)]


def compile_adam(tx, move):
    """Return the temporary bytes of a jitted Adam step in donated memory, the bytes of its weights, and its program."""
    params = {str(i): jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(KERNELS)}
    tx = optax.chain(optax.adam(1e-3), tx)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return move(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params).compile()
    weights = sum(4 * p.size for p in params.values())
    return compiled.memory_analysis().temp_size_in_bytes, weights, compiled.as_text()


def test_memory_of_a_step():
    """In place of `optax.apply_updates`: norms and factors, no copy of a weight. Chained: one large weight or two."""
    copies = r"\[\d\d+\S* copy\(|\[3,\S* copy\("
    plain, weights, _ = compile_adam(optax.identity(), optax.apply_updates)
    ours, _, text = compile_adam(optax.identity(), lambda p, u: apply_updates(p, u, MaxNorm(1.0)))
    assert ours - plain < 0.05 * weights
    assert not re.search(copies, text)
    chain, _, _ = compile_adam(projection(MaxNorm(1.0)), optax.apply_updates)
    assert chain - plain < 0.5 * weights


# ----------------------------------------------------------------------------------------------------------- derivative


def test_a_step_has_the_derivative_of_the_formula():
    """By the weights and by the update, at a zero vector too, forwards and backwards, as in meta-learning."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 6)) * np.asarray([0.05, 1.0, 1e3, 1e-3, 2.0, 0.0])
    v = rng.standard_normal((5, 6))

    def formula(x):
        return x * np.minimum(1, 0.5 / np.linalg.norm(x, axis=0).clip(1e-300))

    h = 1e-6 * np.linalg.norm(x, axis=0).clip(1e-12)
    expected = (formula(x + h * v) - formula(x - h * v)) / (2 * h)
    scale = np.abs(expected).max(axis=0).clip(0.01)  # a chained update's own derivative is near 1: it cancels
    p = np.asarray(x / 2, np.float32)
    u = np.asarray(x - p, np.float32)
    wide, none = np.asarray(v, np.float32), np.zeros_like(p)

    @jax.jit
    def derive(p, u):
        def step(p, u):
            return both(p, u, MaxNorm(0.5, axis=0))

        forwards = [jax.jvp(step, (p, u), tangents)[1] for tangents in ((wide, none), (none, wide))]
        backwards = [jax.vjp(lambda p, u, f=f: step(p, u)[f], p, u)[1](wide) for f in ("chain", "apply_updates")]
        return forwards, backwards

    for found in jax.tree.leaves(derive(p, u)):
        np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)
