"""Shaped updates against float64 transcriptions of the papers' formulas, and against PyTorch."""

import functools
import math
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

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPE = (32, 48)  # (in, out)
STEPS = 100
SPLIT = Split(1, 4, (0, 2))


def norm(x):
    return math.sqrt(math.fsum(float(v) ** 2 for v in np.ravel(x)))


def gradients(steps, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 0) for _ in range(steps)]).astype(np.float32)


def start(seed=1, shape=SHAPE, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.1, dtype)


def take_steps(tx, params, grads):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), grads)[0][0]


def run(tx, params, grads):
    found = jax.jit(lambda p, g: take_steps(tx, p, g))(params, grads)
    return jax.tree.map(lambda p: np.asarray(p, np.float64), found)


# ------------------------------------------------------------------------------------------------------------ formulas


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
    _, directions = jax.jit(lambda g: jax.lax.scan(lambda s, g: stock.update(g, s)[::-1], stock.init(g[0]), g))(grads)
    yield from np.asarray(directions, np.float64)


def hyperball_formula(directions, rate):
    def follow(w, grads):
        radius = norm(w)
        for t, u in enumerate(directions(grads)):
            w = w - rate(t) * radius * u / norm(u)
            w = w * (radius / norm(w))
        return w

    return follow


def shaped_adam(formula):
    def follow(w, grads):
        for u in adam(grads):
            w = formula(w, -0.02 * u)
        return w

    return follow


def brake(w, u, outward=0.5, inward=0.8):
    share = outward if norm(w + u) > norm(w) else inward
    return (w + u) * ((norm(w) + share * (norm(w + u) - norm(w))) / norm(w + u))


def unit_dictionary(w, grads):
    m = 0.0
    for g in np.asarray(grads, np.float64):
        m = 0.9 * m + g - w * ((w * g).sum(1, keepdims=True) / (w * w).sum(1, keepdims=True))
        w = w - 0.02 * m
        w /= np.linalg.norm(w, axis=1, keepdims=True)
    return w


def linear(t):
    return 0.02 * min(1.0, t / 20)


RATE = optax.schedules.linear_schedule(0.0, 0.02, 20)  # starts at 0
ADAM = optax.adam(0.02, b2=0.95)
CASES = {  # the transformation, and what follows its formula from the weights
    "AdamH": (hyperball(optax.adam(1.0, b2=0.95), RATE), hyperball_formula(adam, linear)),
    "SGDH": (hyperball(optax.sgd(1.0, momentum=0.9), RATE), hyperball_formula(momentum, linear)),
    "MuonH": (hyperball(optax.contrib.muon(1.0), RATE), hyperball_formula(muon, linear)),
    "AdamH, written out": (
        optax.chain(optax.scale_by_adam(b2=0.95), relative_update(0.02, None), projection(Sphere("initial", None))),
        hyperball_formula(adam, lambda t: 0.02),
    ),
    "radial brake": (optax.chain(ADAM, radial_brake(0.5, 0.8, axis=None)), shaped_adam(brake)),
    "tangent": (
        optax.chain(ADAM, tangent_update(axis=None)),
        shaped_adam(lambda w, u: w + u - w * ((w * u).sum() / norm(w) ** 2)),
    ),
    "tangent gradients, unit norm": (
        optax.chain(tangent_update(axis=1), optax.sgd(0.02, momentum=0.9), projection(UnitNorm(1))),
        unit_dictionary,
    ),
    "max": (
        optax.chain(ADAM, max_update(0.03, floor=0.01)),
        shaped_adam(lambda w, u: w + u * min(0.03 * norm(w), max(0.01 * norm(w), norm(u))) / norm(u)),
    ),
    "relative": (
        optax.chain(optax.scale_by_adam(b2=0.95), relative_update(0.02)),
        shaped_adam(lambda w, u: w + 0.02 * norm(w) * u / norm(u)),
    ),
}


@functools.cache
def weights_after_all_steps():
    """One program takes the steps of all cases."""
    found = jax.jit(lambda p, g: {name: take_steps(tx, p, g) for name, (tx, _) in CASES.items()})
    return found(start(), gradients(STEPS))


@pytest.mark.parametrize("name", CASES)
def test_a_hundred_steps_are_the_formula(name):
    wanted = CASES[name][1](np.asarray(start(), np.float64), gradients(STEPS))
    found = np.asarray(weights_after_all_steps()[name], np.float64)
    assert norm(found - wanted) <= 1e-6 * norm(wanted)
    assert norm(wanted - start()) > 0.1 * norm(wanted)


def test_leaves_without_vectors_take_the_plain_update():
    tx, grads = optax.chain(optax.scale_by_adam(), relative_update(0.02)), gradients(20, (48,))
    shaped, plain = jax.jit(lambda p, g: (take_steps(tx, p, g), take_steps(optax.adam(0.02), p, g)))(
        jnp.zeros(48), grads
    )
    np.testing.assert_allclose(shaped, plain, rtol=0, atol=1e-6 * norm(plain))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_answer_in_both_frameworks(dtype):
    """SGD, without a momentum that could differ; Adam's formula has a test above, and in PyTorch its own."""
    grads, p = gradients(50 if dtype == "float32" else 1), start(dtype=dtype)
    q = torch.nn.Parameter(torch.as_tensor(np.asarray(p, np.float32)).to(getattr(torch, dtype)).T.contiguous())
    opt = projgd.torch.hyperball(torch.optim.SGD)([q], lr=0.02)
    for g in grads:
        q.grad = torch.as_tensor(g.T.copy()).to(q.dtype)
        opt.step()
    ours = run(hyperball(optax.sgd(1.0), 0.02), p, jnp.asarray(grads, dtype))
    theirs = q.detach().double().numpy().T
    if dtype == "float32":
        assert norm(ours - theirs) <= 1e-6 * norm(ours)
    else:
        moved = np.abs(ours - np.asarray(p, np.float64))
        assert (np.abs(ours - theirs) <= 2.0**-7 * (np.abs(ours) + moved)).all()  # a last place of it and of the step


def test_the_dataclass_and_the_transformation_agree():
    p, g = start(), gradients(1)[0]
    updates, _ = relative_update(0.1, axis=None).update(g, relative_update(0.1, axis=None).init(p), p)
    assert np.array_equal(updates, RelativeUpdate(None)(-jnp.asarray(g), p, lr=0.1))


# ------------------------------------------------------------------------------------------------------ radii and state


def test_each_vector_has_its_own_radius():
    """Columns; heads of a Split; the experts of a stacked tensor."""
    inner, before = optax.adam(1.0), {"Dense_0": {"kernel": start()}, "experts": start(shape=(4, 8, 6))}
    grads = {"Dense_0": {"kernel": gradients(20)}, "experts": gradients(20, (4, 8, 6))}

    def each(p, g):
        dense = [take_steps(hyperball(inner, 0.02, axis), p["Dense_0"], g["Dense_0"]) for axis in ("fan_in", SPLIT)]
        return *(d["kernel"] for d in dense), take_steps(hyperball(inner, 0.02, (1, 2)), p["experts"], g["experts"])

    columns, heads, experts = jax.jit(each)(before, grads)
    kernel = np.asarray(before["Dense_0"]["kernel"])
    parts = [(kernel[:, j], columns[:, j]) for j in range(48)]
    parts += [(kernel[:, i : i + 12], heads[:, i : i + 12]) for i in range(0, 48, 12)]
    parts += list(zip(before["experts"], experts, strict=True))
    for old, new in parts:
        assert norm(new) == pytest.approx(norm(old), rel=1e-6)
        assert norm(np.asarray(new) - np.asarray(old)) > 0


def test_zero_updates_leave_every_bit_and_nothing_is_laundered():
    p, bad = start(), gradients(1)
    bad[0, 2, 3] = np.nan
    grads = {"still": np.zeros((1, *SHAPE), np.float32), "bad": bad, "good": gradients(1)}
    found = run(hyperball(optax.sgd(1.0), 0.1), {"still": p, "bad": p, "good": p}, grads)
    assert np.array_equal(found["still"], np.asarray(p, np.float64))
    assert np.isnan(found["bad"][2, 3])
    assert norm(found["good"]) == pytest.approx(norm(p), rel=1e-6)


def test_radii_are_in_the_state_and_survive_jit_vmap_and_masks():
    params = {"w": start(), "head": start(2), "absent": None}
    tx = optax.masked(hyperball(optax.sgd(1.0), 0.02), {"w": True, "head": False, "absent": None})
    state = jax.jit(tx.init)(params)
    assert [float(x[0, 0]) for x in jax.tree.leaves(state) if x.shape == (1, 1)] == [pytest.approx(norm(params["w"]))]
    population = jnp.stack([start(1), start(2) * 3])
    many = hyperball(optax.sgd(1.0), 0.02)

    @jax.jit
    @jax.vmap
    def step(p, g):
        return optax.apply_updates(p, many.update(g, many.init(p), p)[0])

    for old, new in zip(population, step(population, gradients(2)), strict=True):
        assert norm(new) == pytest.approx(norm(old), rel=1e-6)


@pytest.mark.parametrize(("dtype", "rate", "held", "drifts"), [("float32", 3e-3, 1e-6, 2), ("bfloat16", 3e-2, 1e-2, 5)])
def test_the_norm_is_held_over_100000_steps(dtype, rate, held, drifts):
    """And drifts where the radius is read from the weights at every step, as most implementations do."""
    p, steps = start(shape=(16, 8), dtype=dtype), 100_000
    grads, tx = jnp.asarray(gradients(64, (16, 8)), dtype), hyperball(optax.sgd(1.0), rate)

    def keep(t, carry):
        p, state = carry
        updates, state = tx.update(grads[t % 64], state, p)
        return optax.apply_updates(p, updates), state

    def recompute(t, w):
        radius, u = jnp.linalg.norm(w), grads[t % 64]
        v = w - rate * radius * (u / jnp.linalg.norm(u))
        return (radius * (v / jnp.linalg.norm(v))).astype(w.dtype)

    ours = jax.jit(lambda: jax.lax.fori_loop(0, steps, keep, (p, tx.init(p)))[0])()
    theirs = jax.jit(lambda: jax.lax.fori_loop(0, steps, recompute, p))()
    off, drift = norm(ours) / norm(p) - 1, norm(theirs) / norm(p) - 1
    print(f"{dtype}: held to {off:.1e}, recomputed at every step {drift:.1e}")
    assert abs(off) <= held
    assert abs(drift) > drifts * abs(off)


# ----------------------------------------------------------------------------------------------------- what is refused


def test_zero_weights_are_refused():
    params = {"mlp": {"proj": jnp.zeros((3, 2)), "fc": jnp.ones((2, 3))}}
    for tx in (hyperball(optax.adam(1.0), 0.1), projection(Sphere("initial", None)), max_update(0.1)):
        with pytest.raises(ValueError, match=r"mlp/proj: 1 of its 1 vectors have norm 0.*[Ii]nitialise"):
            tx.init(params)
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
        hyperball(optax.adamw(1.0, mask={"w": False, "b": True}), 0.1).init(params)


def test_the_parameters_are_needed():
    with pytest.raises(ValueError, match="needs the parameters"):
        relative_update(0.1).update(start(), relative_update(0.1).init(start()))
