"""The contract after `optax.apply_updates`, where the step, the projection and the addition are one `jit`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from projgd.optax import maxnorm_projection

TYPES = [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float16", "float32")]


@pytest.mark.parametrize(("stored", "update"), TYPES)
@pytest.mark.parametrize("far", [1.0, 1000.0])
def test_a_jitted_step_lands_inside(stored, update, far):
    """Steps from far away to just about the bound: p + u rounds where XLA could skip or merge the rounding."""
    rng = np.random.default_rng(0)
    goal = rng.standard_normal((64, 512))
    goal *= (
        1 + rng.uniform(-1e-5, 1e-6, 512) + (rng.uniform(-0.01, 0.01, goal.shape) if stored != "float32" else 0)
    ) / (np.linalg.norm(goal, axis=0))
    p = jnp.asarray(rng.standard_normal(goal.shape) * far, stored)
    g = jnp.asarray((np.asarray(p, np.float64) - goal) / 0.1, update)
    tx = optax.chain(optax.sgd(0.1), maxnorm_projection(1.0))
    state = tx.init({"kernel": p})

    @jax.jit
    def step(p, g):
        updates, _ = tx.update({"kernel": g}, state, {"kernel": p})
        return optax.apply_updates({"kernel": p}, updates)["kernel"]

    q = step(p, g)
    assert (np.linalg.norm(np.asarray(q, np.float64), axis=0) <= 1.0).all()
    assert (step(q, jnp.zeros_like(g)) == q).all()


@pytest.mark.parametrize(("stored", "update"), TYPES)
def test_ten_thousand_steps_outwards(stored, update):
    """In one scan: never a bit outside; a neuron that is inside and gets no gradient keeps every bit."""
    tx = optax.chain(optax.sgd(0.37), maxnorm_projection(1.0))
    rng = np.random.default_rng(0)
    p = (
        jnp.asarray(rng.standard_normal((8, 64)) * 0.3, stored)
        .at[:, 0]
        .set(jnp.asarray(rng.uniform(-0.3, 0.3, 8), stored))
    )

    def step(carry, key):
        p, state = carry
        g = (jax.random.normal(key, p.shape) * 0.01).astype(update) - (p * 0.01).astype(update)
        updates, state = tx.update({"kernel": g.at[:, 0].set(0)}, state, {"kernel": p})
        p = optax.apply_updates({"kernel": p}, updates)["kernel"]
        return (p, state), p

    keys = jax.random.split(jax.random.key(0), 10_000)
    _, ps = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init({"kernel": p})), keys))(p)
    norms = np.linalg.norm(np.asarray(ps, np.float64), axis=1)
    assert (norms <= 1.0).all()
    assert (norms[-1, 1:] > 0.9).all()
    assert (ps[:, :, 0] == p[None, :, 0]).all()
