"""metric="adaptive" in JAX: the diagonal is found in every optimizer and wrapper, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch

from projgd import MaxNorm, Sphere, UnitNorm
from projgd.constraints import Constraint
from projgd.optax import projected
from projgd.torch import ProjectedAdam
from tests.optimality import LeastSquares, residual

C = 3.0


def moment(state, name):
    """The field of that name, wherever it is in a tree of states."""
    found = []

    def look(node):
        if hasattr(node, "_fields") and name in node._fields:
            found.append(getattr(node, name))
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, tuple) else ():
            look(child)

    look(state)
    return found[0]


def mu(state, grads):
    return moment(state, "mu")["k"]


def gradient(state, grads):
    return grads["k"]


def nesterov(state, grads):
    step = float(moment(state, "count"))
    return 0.9 * moment(state, "mu")["k"] / (1 - 0.9 ** (step + 1)) + 0.1 * grads["k"] / (1 - 0.9**step)


def adan(state, grads):
    m, v, step = (moment(state, name) for name in ("m", "v", "t"))
    return m["k"] / (1 - 0.98 ** float(step)) + (1 - 0.92) * v["k"] / (1 - 0.92 ** float(step))


def ademamix(state, grads):
    m1, m2, step = (moment(state, name) for name in ("m1", "m2", "count"))
    return m1["k"] / (1 - 0.9 ** float(step)) + 5 * m2["k"]


def simplified_ademamix(state, grads):
    return moment(state, "m")["k"] + 0.5 * grads["k"]


def labels(params):
    return {"k": "a", "free": "b"}


# optimizer, what its update is D⁻¹ times of
OPTIMIZERS = {
    "adam": (optax.adam(0.3), mu),
    "adam, eps": (optax.adam(0.3, eps=1e-2, eps_root=1e-3), mu),
    "adam, no memory of gradients": (optax.adam(0.3, b1=0.0), mu),
    "nadam": (optax.nadam(0.3), nesterov),
    "radam, not yet rectified": (optax.radam(0.3), mu),
    "radam": (optax.radam(0.3, b2=0.9), mu),
    "adamax": (optax.adamax(0.3, eps=1e-2), mu),
    "amsgrad": (optax.amsgrad(0.3, b2=0.7), mu),
    "yogi": (optax.yogi(0.3), mu),
    "adabelief": (optax.adabelief(0.3), mu),
    "adabelief, eps_root": (optax.adabelief(0.3, eps_root=1e-2), mu),
    "rmsprop": (optax.rmsprop(0.3), gradient),
    "rmsprop, centered": (optax.rmsprop(0.3, centered=True, initial_scale=1.0, eps=1e-4), gradient),
    "adagrad": (optax.adagrad(1.0), gradient),
    "adadelta": (optax.adadelta(30.0, rho=0.8), gradient),
    "adan": (optax.adan(0.3), adan),
    "ademamix": (optax.contrib.ademamix(0.3, alpha=5.0), ademamix),
    "simplified ademamix": (optax.contrib.simplified_ademamix(0.03, b1=0.9, alpha=0.5), simplified_ademamix),
    "novograd": (optax.novograd(30.0), mu),
    "chain": (optax.chain(optax.clip(5.0), optax.scale_by_adam(), optax.scale(-0.3)), mu),
    "chain, decay first": (optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.3)), mu),
    "masked": (optax.masked(optax.adam(0.3), {"k": True, "free": False}), mu),
    "partition": (optax.partition({"a": optax.adam(0.3), "b": optax.sgd(0.1)}, labels), mu),
    "inject_hyperparams": (
        optax.inject_hyperparams(optax.adam)(learning_rate=lambda i: 0.3 / (i + 1), b2=0.9, eps=1e-3),
        mu,
    ),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(0.3), 3), mu),
}


def gradients(steps, shape=(30, 6)):
    """Of very different sizes, a row so small that only ε counts."""
    rng = np.random.default_rng(0)
    size = 10.0 ** rng.uniform(-3, 1, shape)
    size[3] = 1e-12
    return [
        {"k": jnp.asarray(size * rng.standard_normal(shape), jnp.float32), "free": jnp.ones(3)} for _ in range(steps)
    ]


def start(shape=(30, 6)):
    return {"k": jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32), "free": jnp.ones(3)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_projects_in_the_diagonal_of_the_very_step(name):
    """D is read off the stock optimizer's own update, (what it divides) / (the update), not from any formula."""
    stock, numerator = OPTIMIZERS[name]
    tx = projected(stock, {"k": MaxNorm(C)}, metric="adaptive")
    params = start()
    state, theirs = tx.init(params), stock.init(params)
    step = jax.jit(lambda g, state, theirs, p: (tx.update(g, state, p), stock.update(g, theirs, p)))
    differs = 0
    for grads in gradients(7 if name == "radam" else 4):  # its rectification sets in at the sixth
        (ours, state), (updates, theirs) = step(grads, state, theirs, params)
        y = np.asarray(optax.apply_updates(params, updates)["k"]).T
        d = np.abs(np.asarray(numerator(theirs, grads) / updates["k"])).T
        params = optax.apply_updates(params, ours)
        x = np.asarray(params["k"]).T
        norms = np.linalg.norm(y.astype(np.float64), axis=1)
        outside = norms > C
        assert outside.any()
        assert (np.linalg.norm(x.astype(np.float64), axis=1) <= C).all()
        assert np.array_equal(x[norms < C * (1 - 1e-5)], y[norms < C * (1 - 1e-5)])
        error, multiplier = residual(x[outside], y[outside], d[outside])
        assert (error <= 1e-5).all()
        assert (multiplier >= -1e-5).all()
        differs += int((residual(MaxNorm(C, axis=1).project(y)[outside], y[outside], d[outside])[0] > 1e-3).sum())
    assert bool(differs) is (name not in ("radam, not yet rectified", "novograd"))  # these have one D for all entries
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state.inner, theirs)) or name == "chain, decay first"


def test_decoupled_weight_decay_moves_the_point_and_not_the_metric():
    stock = optax.adamw(0.3, weight_decay=0.5)
    tx = projected(stock, {"k": MaxNorm(C)}, metric="adaptive")
    params = start()
    state, theirs = tx.init(params), stock.init(params)
    for grads in gradients(3):
        updates, theirs = stock.update(grads, theirs, params)
        y = np.asarray(optax.apply_updates(params, updates)["k"]).T
        d = jnp.sqrt(moment(theirs, "nu")["k"] / (1 - 0.999 ** float(moment(theirs, "count")))) + 1e-8
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        outside = np.linalg.norm(y, axis=1) > C
        assert (residual(np.asarray(params["k"]).T[outside], y[outside], np.asarray(d).T[outside])[0] <= 1e-5).all()


def test_multisteps_projects_in_the_metric_of_the_emitted_update():
    grads = gradients(8)
    tx = projected(
        optax.MultiSteps(optax.adam(0.3), 2).gradient_transformation(), {"k": MaxNorm(1.0)}, metric="adaptive"
    )
    every = projected(optax.adam(0.3), {"k": MaxNorm(1.0)}, metric="adaptive")
    params = other = jax.tree.map(lambda a: a / 10, start())
    state, other_state = tx.init(params), every.init(other)
    for first, second in zip(grads[::2], grads[1::2], strict=True):
        for g in (first, second):
            updates, state = jax.jit(tx.update)(g, state, params)
            params = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        updates, other_state = jax.jit(every.update)(mean, other_state, other)
        other = optax.apply_updates(other, updates)
        assert jnp.linalg.norm(params["k"], axis=0).max() > 0.99
        assert jnp.allclose(params["k"], other["k"], rtol=1e-4, atol=1e-6)


def test_equals_pytorch():
    weights = np.random.default_rng(2).standard_normal((10, 30)).astype(np.float32)
    p = torch.nn.Parameter(torch.tensor(weights))
    theirs = ProjectedAdam([p], lr=0.1, c=2.0, metric="adaptive")
    tx = projected(optax.adam(0.1), MaxNorm(2.0), metric="adaptive")
    params = {"kernel": jnp.asarray(weights.T)}
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients(6, (30, 10)):
        p.grad = torch.tensor(np.asarray(grads["k"]).T)
        theirs.step()
        updates, state = update({"kernel": grads["k"]}, state, params)
        params = optax.apply_updates(params, updates)
    assert np.abs(p.detach().numpy().T - np.asarray(params["kernel"])).max() <= 1e-5


@pytest.mark.parametrize(
    ("tx", "rate"),
    [(optax.adagrad, 0.3), (optax.rmsprop, 1e-2), (optax.adam, 1e-2)],
    ids=["adagrad", "rmsprop", "adam"],
)
def test_least_squares_ends_at_the_optimum_and_its_euclidean_twin_does_not(tx, rate):
    problem = LeastSquares()
    with jax.enable_x64(True):
        hessian, linear = jnp.asarray(problem.hessian), jnp.asarray(problem.linear)
        gap = {}
        for metric in ("adaptive", "euclidean"):
            optimizer = projected(tx(rate), MaxNorm(1.0, axis=None), metric=metric)

            def step(carry, _, optimizer=optimizer):
                x, state = carry
                updates, state = optimizer.update(hessian @ x - linear, state, x)
                return (optax.apply_updates(x, updates), state), None

            x = jnp.zeros(20)
            (x, _), _ = jax.jit(lambda c, step=step: jax.lax.scan(step, c, None, 1500))((x, optimizer.init(x)))
            gap[metric] = problem(np.asarray(x)) - problem.optimum
    assert gap["adaptive"] <= 1e-6 * problem.optimum
    assert gap["euclidean"] >= 0.3 * problem.optimum


def test_vmap_sweeps_a_population_over_the_bound():
    params, grads = start(), gradients(1)[0]

    def one(c):
        tx = projected(optax.adam(0.3), {"k": MaxNorm(c)}, metric="adaptive")
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)["k"]

    bounds = jnp.asarray([1.0, 2.0, 4.0])
    together = jax.jit(jax.vmap(one))(bounds)
    for row, c in zip(together, bounds, strict=True):
        assert jnp.allclose(row, one(float(c)), rtol=1e-4, atol=1e-6)


def test_spheres_and_nothing_binding():
    params, grads = start(), gradients(1)[0]
    tx = projected(optax.adam(0.3), {"k": UnitNorm()}, metric="adaptive")
    updates, _ = tx.update(grads, tx.init(params), params)
    assert jnp.allclose(jnp.linalg.norm(optax.apply_updates(params, updates)["k"], axis=0), 1, rtol=1e-5)
    tx = projected(optax.adam(0.3), {"k": Sphere("initial")}, metric="adaptive")
    updates, _ = tx.update(grads, tx.init(params), params)
    norms = [jnp.linalg.norm(p["k"], axis=0) for p in (params, optax.apply_updates(params, updates))]
    assert jnp.allclose(*norms, rtol=1e-5)
    tx, stock = projected(optax.adam(0.3), {"k": MaxNorm(1e6)}, metric="adaptive"), optax.adam(0.3)
    ours, _ = tx.update(grads, tx.init(params), params)
    theirs, _ = stock.update(grads, stock.init(params), params)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, ours, theirs))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_are_held_exactly(dtype):
    params = {"k": start()["k"].astype(dtype)}
    tx = projected(optax.adam(0.3, eps=1e-4), MaxNorm(C), metric="adaptive")
    state = tx.init(params)
    for grads in gradients(3):
        updates, state = jax.jit(tx.update)({"k": grads["k"].astype(dtype)}, state, params)
        params = optax.apply_updates(params, updates)
        assert params["k"].dtype == dtype
        assert (np.linalg.norm(np.asarray(params["k"]).astype(np.float64), axis=0) <= C).all()


def test_a_function_may_give_the_diagonal():
    params, grads = start(), gradients(1)[0]
    tx = projected(optax.sgd(1.0), {"k": MaxNorm(C)}, metric=lambda state, params: {"k": params["k"] ** 2, "free": 1.0})
    updates, _ = tx.update(grads, tx.init(params), params)
    y = np.asarray(params["k"] - grads["k"]).T
    outside = np.linalg.norm(y, axis=1) > C
    x = np.asarray(optax.apply_updates(params, updates)["k"]).T
    assert outside.any()
    assert (residual(x[outside], y[outside], np.asarray(params["k"] ** 2).T[outside])[0] <= 1e-5).all()


class Simplex(Constraint):
    def onto(self, x, axes, xp=None):
        return x

    def outside(self, x, axes, xp=None):
        return x


@pytest.mark.parametrize(
    "tx", [optax.sgd(0.1, momentum=0.9), optax.lion(0.1), optax.contrib.muon(0.1), optax.adafactor(0.1)]
)
def test_an_optimizer_without_second_moment_is_refused(tx):
    with pytest.raises(ValueError, match=r'the optimizer has no second moment for k .*pass metric="euclidean"'):
        projected(tx, {"k": MaxNorm(C)}, metric="adaptive").init(start())


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"metric='adaptve' is not known"):
        projected(optax.adam(0.1), MaxNorm(C), metric="adaptve")
    with pytest.raises(TypeError, match="takes an optax optimizer"):
        projected(0.1, MaxNorm(C))
    with pytest.raises(ValueError, match="no projection for metric='adaptive'"):
        projected(optax.adam(0.1), {"k": Simplex()}, metric="adaptive").init(start())
    half = optax.partition({"a": optax.sgd(0.1), "b": optax.adam(0.1)}, labels)
    with pytest.raises(ValueError, match="no second moment for k"):
        projected(half, {"k": MaxNorm(C)}, metric="adaptive").init(start())
