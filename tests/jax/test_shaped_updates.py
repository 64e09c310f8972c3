"""Shaped updates in JAX against float64 transcriptions of the papers' formulas, and against PyTorch."""

import math
import os
import subprocess
import sys
import textwrap
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import projgd.torch
from projgd import RelativeUpdate, Sphere, Split, UnitNorm
from projgd.optax import hyperball, max_update, projection, radial_brake, relative_update, tangent_update

SHAPE = (32, 48)  # (in, out)


def norm(x):
    return math.sqrt(math.fsum(float(v) ** 2 for v in np.ravel(x)))


def gradients(steps, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 0) for _ in range(steps)]).astype(np.float32)


def start(seed=1, shape=SHAPE, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.1, dtype)


def run(tx, params, grads):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda c, g: jax.lax.scan(step, c, g))((params, tx.init(params)), grads)
    return jax.tree.map(lambda p: np.asarray(p, np.float64), params)


def adam(grads, b1=0.9, b2=0.95, eps=1e-8):
    m = v = 0.0
    for t, g in enumerate(np.asarray(grads, np.float64), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def momentum(grads, mu=0.9):
    m = 0.0
    for g in np.asarray(grads, np.float64):
        m = mu * m + g
        yield m


def muon(grads):
    """optax's own directions: its Newton-Schulz iteration in float32 is part of what Muon is."""
    stock = optax.contrib.scale_by_muon()
    state = stock.init(jnp.zeros(SHAPE))
    for g in grads:
        u, state = jax.jit(stock.update)(g, state)
        yield np.asarray(u, np.float64)


INNER = {
    "AdamH": (lambda: optax.adam(1.0, b2=0.95), adam),
    "SGDH": (lambda: optax.sgd(1.0, momentum=0.9), momentum),
    "MuonH": (lambda: optax.contrib.muon(1.0), muon),
}


def hyperball_formula(w, directions, rate, radius):
    for t, u in enumerate(directions):
        w = w - rate(t) * radius * u / norm(u)
        w = w * (radius / norm(w))
    return w


@pytest.mark.parametrize("name", INNER)
def test_hyperball_is_the_papers_formula(name):
    """W ← R·Norm(W - η_t R·Norm(u)) with η_t a schedule that starts at 0, 100 steps under jit and scan."""
    make, direction = INNER[name]
    grads, p = gradients(100), start()
    w = np.asarray(p, np.float64)
    radius = norm(w)
    wanted = hyperball_formula(w, direction(grads), lambda t: 0.02 * min(1.0, t / 20), radius)
    tx = hyperball(make(), optax.schedules.linear_schedule(0.0, 0.02, 20))
    assert norm(run(tx, p, grads) - wanted) <= 1e-6 * radius


def test_the_chain_written_out_is_the_same():
    grads, p = gradients(30), start()
    chain = optax.chain(
        optax.scale_by_adam(b2=0.95), relative_update(0.02, axis=None), projection(Sphere("initial", axis=None))
    )
    wanted = hyperball_formula(np.asarray(p, np.float64), adam(grads), lambda t: 0.02, norm(p))
    assert norm(run(chain, p, grads) - wanted) <= 1e-6 * norm(p)


@pytest.mark.parametrize(
    ("cls", "dtype"),
    [(torch.optim.Adam, "float32"), (torch.optim.SGD, "float32"), (torch.optim.SGD, "bfloat16")],
)
def test_one_answer_in_both_frameworks(cls, dtype):
    inner = {torch.optim.Adam: optax.adam(1.0), torch.optim.SGD: optax.sgd(1.0)}[cls]
    grads, p = gradients(100 if dtype == "float32" else 1), start(dtype=dtype)
    q = torch.nn.Parameter(torch.as_tensor(np.asarray(p, np.float32)).to(getattr(torch, dtype)).T.contiguous())
    opt = projgd.torch.hyperball(cls)([q], lr=0.02)
    for g in grads:
        q.grad = torch.as_tensor(g.T.copy()).to(q.dtype)
        opt.step()
    ours = run(hyperball(inner, 0.02), p, jnp.asarray(grads, dtype))
    theirs = q.detach().double().numpy().T
    if dtype == "float32":
        assert norm(ours - theirs) <= 1e-6 * norm(ours)
    else:
        moved = np.abs(ours - np.asarray(p, np.float64))
        assert (np.abs(ours - theirs) <= 2.0**-7 * (np.abs(ours) + moved)).all()  # a last place of it and of the step


def brake(w, u, outward=0.5, inward=0.8):
    share = outward if norm(w + u) > norm(w) else inward
    return (w + u) * ((norm(w) + share * (norm(w + u) - norm(w))) / norm(w + u))


SHAPINGS = {
    "brake": (lambda: radial_brake(0.5, 0.8, axis=None), brake),
    "tangent": (lambda: tangent_update(axis=None), lambda w, u: w + u - w * ((w * u).sum() / norm(w) ** 2)),
    "max": (
        lambda: max_update(0.03, floor=0.01),
        lambda w, u: w + u * min(0.03 * norm(w), max(0.01 * norm(w), norm(u))) / norm(u),
    ),
}


@pytest.mark.parametrize("name", SHAPINGS)
def test_a_shaping_alone_is_its_formula_over_100_steps(name):
    make, formula = SHAPINGS[name]
    grads, p = gradients(100), start()
    w = np.asarray(p, np.float64)
    for u in adam(grads):
        w = formula(w, -0.02 * u)
    assert norm(run(optax.chain(optax.adam(0.02, b2=0.95), make()), p, grads) - w) <= 1e-6 * norm(w)


def test_relative_update_alone_and_on_leaves_without_vectors():
    grads = {"kernel": gradients(50), "bias": gradients(50, (48,))}
    params = {"kernel": start(), "bias": jnp.zeros(48)}
    got = run(optax.chain(optax.scale_by_adam(b2=0.95), relative_update(0.02)), params, grads)
    w = np.asarray(params["kernel"], np.float64)
    for u in adam(grads["kernel"]):
        w = w - 0.02 * norm(w) * u / norm(u)
    assert norm(got["kernel"] - w) <= 1e-6 * norm(w)
    stock = run(optax.adam(0.02, b2=0.95), params["bias"], grads["bias"])
    assert np.allclose(got["bias"], stock, rtol=0, atol=1e-6 * norm(stock))


def test_tangent_gradients_and_unit_norm_dictionaries():
    grads, p = gradients(50), start()
    got = run(optax.chain(tangent_update(axis=1), optax.sgd(0.02, momentum=0.9), projection(UnitNorm(1))), p, grads)
    w, m = np.asarray(p, np.float64), 0.0
    for g in np.asarray(grads, np.float64):
        m = 0.9 * m + g - w * ((w * g).sum(1, keepdims=True) / (w * w).sum(1, keepdims=True))
        w = w - 0.02 * m
        w /= np.linalg.norm(w, axis=1, keepdims=True)
    assert norm(got - w) <= 1e-6 * norm(w)


@pytest.mark.parametrize(
    ("axis", "parts"),
    [
        ("fan_in", [np.s_[:, j] for j in range(48)]),
        (Split(1, 4, (0, 2)), [np.s_[:, 12 * i : 12 * i + 12] for i in range(4)]),
    ],
)
def test_each_vector_has_its_own_radius(axis, parts):
    params = {"Dense_0": {"kernel": start()}}
    got = run(hyperball(optax.adam(1.0), 0.02, axis), params, {"Dense_0": {"kernel": gradients(20)}})
    got = got["Dense_0"]["kernel"]
    for part in parts:
        assert norm(got[part]) == pytest.approx(norm(params["Dense_0"]["kernel"][part]), rel=1e-6)
        assert norm(got[part] - np.asarray(params["Dense_0"]["kernel"])[part]) > 0


def test_experts_of_a_stacked_tensor():
    grads, p = gradients(10, (4, 8, 6)), start(shape=(4, 8, 6))
    got = run(hyperball(optax.adam(1.0), 0.02, axis=(1, 2)), p, grads)
    for before, after in zip(p, got, strict=True):
        assert norm(after) == pytest.approx(norm(before), rel=1e-6)


def test_zero_updates_leave_every_bit_and_nothing_is_laundered():
    p = start()
    tx = hyperball(optax.sgd(1.0), 0.1)
    assert np.array_equal(run(tx, p, np.zeros((5, *SHAPE), np.float32)), np.asarray(p, np.float64))
    bad = np.ones((1, *SHAPE), np.float32)
    bad[0, 2, 3] = np.nan
    got = run(tx, {"a": p, "b": p}, {"a": bad, "b": gradients(1)})
    assert np.isnan(got["a"][2, 3])
    assert norm(got["b"]) == pytest.approx(norm(p), rel=1e-6)


def test_radii_are_in_the_state_and_survive_jit_vmap_and_masks():
    params = {"w": start(), "head": start(2), "absent": None}
    tx = optax.masked(hyperball(optax.adam(1.0), 0.02), {"w": True, "head": False, "absent": None})
    state = jax.jit(tx.init)(params)
    radii = [x for x in jax.tree.leaves(state) if x.shape == (1, 1)]
    assert [float(r[0, 0]) for r in radii] == [pytest.approx(norm(params["w"]))]
    population = jnp.stack([start(1), start(2) * 3])
    many = hyperball(optax.adam(1.0), 0.02)
    states = jax.vmap(many.init)(population)
    updates, _ = jax.vmap(many.update)(jnp.stack(list(gradients(2))), states, population)
    after = optax.apply_updates(population, updates)
    for a, b in zip(population, after, strict=True):
        assert norm(b) == pytest.approx(norm(a), rel=1e-6)


def test_zero_weights_are_refused():
    params = {"mlp": {"proj": jnp.zeros((3, 2)), "fc": jnp.ones((2, 3))}}
    for make in (lambda: hyperball(optax.adam(1.0), 0.1), lambda: projection(Sphere("initial", None)),
                 lambda: max_update(0.1)):  # fmt: skip
        with pytest.raises(ValueError, match=r"mlp/proj: 1 of its 1 vectors have norm 0.*[Ii]nitialise"):
            make().init(params)
    state = jax.jit(projection(Sphere("initial", None)).init)(params)  # traced, nothing can be refused: it shows
    assert np.isnan(state.initial["mlp"]["proj"]).all()


def test_weight_decay_is_warned_of():
    params = {"w": start(), "b": jnp.zeros(3)}
    for inner in (optax.adamw(1.0), optax.contrib.muon(1.0, weight_decay=0.1)):
        with pytest.warns(UserWarning, match="moves w without a gradient"):
            hyperball(inner, 0.1).init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for inner in (optax.adamw(1.0, weight_decay=0.0), optax.contrib.muon(1.0), optax.lion(1.0, weight_decay=0.0)):
            hyperball(inner, 0.1).init(params)
        mask = {"w": False, "b": True}
        hyperball(optax.adamw(1.0, mask=mask), 0.1).init(params)


def test_parameters_are_asked_for():
    with pytest.raises(ValueError, match="needs the parameters"):
        relative_update(0.1).update(start(), relative_update(0.1).init(start()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_is_held_over_100000_steps(dtype):
    """And drifts where the radius is read from the weights at every step, as most implementations do."""
    p, steps = start(shape=(16, 8), dtype=dtype), 100_000
    grads = jnp.asarray(gradients(64, (16, 8)), dtype)
    tx = hyperball(optax.sgd(1.0), 3e-3 if dtype == "float32" else 3e-2)
    rate, state = (3e-3 if dtype == "float32" else 3e-2), tx.init(p)

    def held(t, carry):
        p, state = carry
        updates, state = tx.update(grads[t % 64], state, p)
        return optax.apply_updates(p, updates), state

    def recomputed(t, w):
        radius, u = jnp.linalg.norm(w), grads[t % 64]
        v = w - rate * radius * (u / jnp.linalg.norm(u))
        return (radius * (v / jnp.linalg.norm(v))).astype(w.dtype)

    ours = jax.jit(lambda: jax.lax.fori_loop(0, steps, held, (p, state))[0])()
    theirs = jax.jit(lambda: jax.lax.fori_loop(0, steps, recomputed, p))()
    off, drift = norm(ours) / norm(p) - 1, norm(theirs) / norm(p) - 1
    print(f"{dtype}: held to {off:.1e}, recomputed at every step {drift:.1e}")
    assert abs(off) <= {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
    assert abs(drift) > {"float32": 2, "bfloat16": 5}[dtype] * abs(off)


def test_sharded_is_the_same():
    """Four devices: the kernel split over both its axes, norms over all of it."""
    script = """
        import jax, jax.numpy as jnp, numpy as np, optax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from projgd.optax import hyperball
        rng = np.random.default_rng(0)
        w, g = rng.normal(size=(64, 32)).astype(np.float32), rng.normal(size=(20, 64, 32)).astype(np.float32)
        tx = hyperball(optax.adam(1.0), 0.02)

        @jax.jit
        def step(p, state, g):
            updates, state = tx.update(g, state, p)
            return optax.apply_updates(p, updates), state

        def run(place):
            p = place(jnp.asarray(w))
            state = tx.init(p)
            for x in g:
                p, state = step(p, state, place(jnp.asarray(x)))
            return p

        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("a", "b"))
        whole = run(lambda x: x)
        for spec in (P("a", "b"), P(("a", "b"), None), P(None, "b")):
            parts = run(lambda x: jax.device_put(x, NamedSharding(mesh, spec)))
            assert parts.sharding.spec == spec, parts.sharding
            off = np.linalg.norm(np.asarray(parts, np.float64) - np.asarray(whole)) / np.linalg.norm(w)
            assert off < 1e-6, off
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]


def test_the_dataclass_and_the_transformation_agree():
    p, g = start(), gradients(1)[0]
    updates, _ = relative_update(0.1, axis=None).update(g, relative_update(0.1, axis=None).init(p), p)
    assert np.array_equal(updates, RelativeUpdate(None)(-jnp.asarray(g), p, lr=0.1))
