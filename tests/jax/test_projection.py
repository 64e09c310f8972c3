"""maxnorm_projection under JAX's transformations, on any pytree, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from projgd import MaxNorm, NonNegative, UnitNorm
from projgd.optax import maxnorm_projection, projection

C = 0.5


def some_params() -> dict:
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 2, 4)), "bias": jnp.ones(4)},
        "dense": {"kernel": jax.random.normal(keys[1], (6, 5)), "bias": None},
    }


def some_grads(step: int = 0) -> dict:
    return jax.tree.map(lambda p: jax.random.normal(jax.random.key(step), p.shape), some_params())


def norms(kernel) -> np.ndarray:
    exact = np.asarray(kernel, np.float64)
    return np.linalg.norm(exact.reshape(-1, exact.shape[-1]), axis=0)


def one_step(tx, params, grads):
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state


def the_formula(params, grads, rate=1.0):
    """SGD and Keras's formula without its ε, in float64 NumPy."""

    def one(p, g):
        w = np.asarray(p, np.float64) - rate * np.asarray(g, np.float64)
        if w.ndim < 2:
            return w
        norm = np.sqrt(np.sum(w**2, axis=tuple(range(w.ndim - 1)), keepdims=True))
        return w * np.minimum(1, C / norm)

    return jax.tree.map(one, params, grads)


def assert_close(found, expected, rtol=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6 if rtol else 0), found, expected)


TX = optax.chain(optax.sgd(1.0), maxnorm_projection(C))


@pytest.mark.parametrize("jitted", [False, True])
def test_a_step_is_the_formula_and_lands_inside(jitted):
    step = jax.jit(lambda p, g: one_step(TX, p, g)) if jitted else lambda p, g: one_step(TX, p, g)
    landed, _ = step(some_params(), some_grads())
    assert_close(landed, the_formula(some_params(), some_grads()))
    for layer in landed.values():
        assert norms(layer["kernel"]).max() <= C
        assert norms(layer["kernel"]).min() >= C * (1 - 1e-5)


def test_scan_is_the_loop():
    grads = jax.tree.map(lambda *g: jnp.stack(g), *[some_grads(step) for step in range(20)])

    def step(carry, grad):
        params, state = carry
        updates, state = TX.update(grad, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.linalg.norm(params["dense"]["kernel"], axis=0)

    carry = some_params(), TX.init(some_params())
    (scanned, state), seen = jax.lax.scan(step, carry, grads)
    for i in range(20):
        carry, _ = step(carry, jax.tree.map(lambda g, i=i: g[i], grads))
    assert_close(scanned, carry[0], rtol=1e-5)
    assert norms(scanned["dense"]["kernel"]).max() <= C
    assert seen.shape == (20, 5)
    assert int(state[-1].count) == 20


def test_vmap_over_parameters_and_over_c():
    params, grads = {"kernel": jnp.ones((6, 5))}, {"kernel": jnp.full((6, 5), -1.0)}

    def landing(params, c):
        return one_step(optax.chain(optax.sgd(1.0), maxnorm_projection(c)), params, grads)[0]["kernel"]

    bounds = jnp.asarray([0.5, 1.0, 2.0, 100.0])
    swept = jax.vmap(landing, in_axes=(None, 0))(params, bounds)
    for kernel, c in zip(swept, (0.5, 1.0, 2.0), strict=False):
        np.testing.assert_allclose(norms(kernel), c, rtol=1e-5)
        assert norms(kernel).max() <= c
    np.testing.assert_array_equal(swept[3], np.full((6, 5), 2.0))
    population = {"kernel": jnp.stack([params["kernel"], 0 * params["kernel"]])}
    both = jax.vmap(landing, in_axes=(0, None))(population, 0.5)
    np.testing.assert_allclose(np.stack([norms(k) for k in both]), 0.5, rtol=1e-5)


def test_donated_buffers():
    @jax.jit
    def expected(params, state, grads):
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donating = jax.jit(expected.__wrapped__, donate_argnums=(0, 1))
    params, grads = some_params(), some_grads()
    want, _ = expected(params, TX.init(params), grads)
    found, _ = donating(params, TX.init(params), grads)
    assert_close(found, want, rtol=0)
    assert params["dense"]["kernel"].is_deleted()


def test_none_leaves_and_other_trees():
    landed, _ = one_step(TX, some_params(), some_grads())
    assert landed["dense"]["bias"] is None
    tree = (jnp.ones((4, 2)), [None, {"a": jnp.ones((3, 2))}], ())
    landed, _ = one_step(TX, tree, jax.tree.map(jnp.zeros_like, tree))
    assert landed[1][0] is None
    np.testing.assert_allclose(norms(landed[0]), C, rtol=1e-5)


def test_masked_parameters_are_left_alone():
    params, grads = some_params(), some_grads()
    mask = {"conv": True, "dense": False}
    tx = optax.chain(optax.sgd(1.0), optax.masked(maxnorm_projection(C), mask))
    landed, _ = one_step(tx, params, grads)
    plain, _ = one_step(optax.sgd(1.0), params, grads)
    assert norms(landed["conv"]["kernel"]).max() <= C
    np.testing.assert_array_equal(landed["dense"]["kernel"], plain["dense"]["kernel"])


@pytest.mark.parametrize("constraint", [MaxNorm(1e6), MaxNorm(C), UnitNorm(), NonNegative()])
def test_all_three_sets_and_plain_steps_where_nothing_binds(constraint):
    params, grads = some_params(), some_grads()
    landed, _ = one_step(optax.chain(optax.sgd(1.0), projection(constraint)), params, grads)
    plain, _ = one_step(optax.sgd(1.0), params, grads)
    for name in ("conv", "dense"):
        again = constraint.project(landed[name]["kernel"])
        np.testing.assert_allclose(
            landed[name]["kernel"], constraint.project(plain[name]["kernel"]), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(again, landed[name]["kernel"], rtol=1e-5, atol=1e-6)
    if constraint == MaxNorm(1e6):
        jax.tree.map(np.testing.assert_array_equal, landed, plain)


@pytest.mark.parametrize(
    "axis", [{"conv": (0, 1, 2), "dense": 0}, {"conv": "fan_in", "dense": {"kernel": 0, "bias": 0}}]
)
def test_a_tree_of_axes(axis):
    tx = optax.chain(optax.sgd(1.0), maxnorm_projection(C, axis))
    params, grads = some_params(), some_grads()
    del params["conv"]["bias"], grads["conv"]["bias"]
    landed, _ = one_step(tx, params, grads)
    assert_close(landed, the_formula(params, grads))


# ----------------------------------------------------------------------------------------------------------- bad input


def test_missing_params_are_asked_for():
    with pytest.raises(ValueError, match=r"needs the parameters: call tx\.update\(grads, state, params\)"):
        maxnorm_projection(C).update(some_grads(), maxnorm_projection(C).init(some_params()))


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


@pytest.mark.parametrize(
    ("tx", "error", "message"),
    [
        (maxnorm_projection(C, axis=3), ValueError, "axis 3 is out of range for .*(bias|kernel) with shape"),
        (maxnorm_projection(C, axis={"conv": 0}), ValueError, "dense"),
        (maxnorm_projection(C, axis={"conv": 0, "dense": {"kernel": 0}}), ValueError, "bias"),
        (maxnorm_projection(C, axis={"conv": 0, "dense": {"kernel": 5, "bias": 0}}), ValueError, "dense/kernel"),
        (optax.masked(maxnorm_projection(C), {"conv": True}), ValueError, "dense"),
        (optax.masked(maxnorm_projection(C), {"conv": {"kernel": True}, "dense": True}), ValueError, "bias"),
        (projection({"conv/kernle": MaxNorm(C)}), ValueError, "conv/kernel"),
        (projection({"conv/*": MaxNorm(C), "conv/kernel": None}), ValueError, "'conv/kernel' says nothing"),
        (projection({"conv/bias": MaxNorm(C)}), ValueError, "'conv/bias' applies only to parameters without a fan-in"),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_what_does_not_fit_the_parameters_is_refused_at_init(tx, error, message, traced):
    init = jax.jit(tx.init) if traced else tx.init
    with pytest.raises(error, match=message):
        init(some_params())


def test_an_integer_leaf_is_named():
    with pytest.raises(TypeError, match="table/ids has dtype int32"):
        maxnorm_projection(C).init({"table": {"ids": jnp.zeros((3, 2), jnp.int32)}})


def test_a_traced_bound_that_is_not_positive_shows():
    """It cannot be refused in a compiled program, so the weights become NaN: never a bound that is not there."""
    landing = jax.jit(lambda c: one_step(maxnorm_projection(c), {"w": jnp.ones((2, 2))}, {"w": jnp.ones((2, 2))})[0])
    assert np.isnan(landing(-1.0)["w"]).all()
    assert np.isnan(landing(jnp.nan)["w"]).all()
