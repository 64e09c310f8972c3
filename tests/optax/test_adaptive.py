"""metric="adaptive": the diagonal is found in every optimizer and wrapper, and the step ends nearest in it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import torch

from projgd import MaxNorm, NonNegative, Sphere
from projgd.constraints import Constraint
from projgd.optax import projected
from projgd.torch import ProjectedAdam
from tests.contract import bits, exact_norms
from tests.optimality import LeastSquares, residual

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
    "radam, not yet rectified": (optax.radam(0.3, threshold=100.0), mu),
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
    "adamw": (optax.adamw(0.3, weight_decay=0.5), None),  # its decay moves the point, and is not in the metric
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


class Reveal(Constraint):
    """A set whose projection in a metric is the metric, so that a step to it shows which D was found."""

    def onto(self, x, axes, xp=None, *, moved=False):
        return 0 * x

    def outside(self, x, axes, xp=None):
        return x

    def onto_in(self, metric, x, axes, xp=None, repeat=None):
        return metric

    def rounding_interval(self, q, p, axes, norm, xp):
        return -abs(q), abs(q)


def reveal(tx):
    return projected(tx, {"k": Reveal()}, metric="adaptive")


@functools.cache
def diagonals():
    """By optimizer and step, the D that was found and the one of the stock optimizer's own update.

    The latter is (what it divides) / (the update), not from any formula. One program takes a step with all optimizers.
    """
    stock = {name: tx for name, (tx, _) in OPTIMIZERS.items()}
    ours = {name: reveal(tx) for name, tx in stock.items()}

    @jax.jit
    def step(grads, states, params):
        found, plain = {}, {}
        for name in stock:
            plain[name], _ = stock[name].update(grads, states[name].inner, params[name])
            updates, states[name] = ours[name].update(grads, states[name], params[name])
            found[name] = optax.apply_updates(params[name], updates)["k"]
        return found, plain, states

    params = {name: start() for name in stock}
    states, seen = {name: tx.init(start()) for name, tx in ours.items()}, {name: [] for name in stock}
    for grads in gradients(7):  # the rectification of RAdam sets in at the sixth
        found, plain, states = step(grads, states, params)
        for name, (_, numerator) in OPTIMIZERS.items():
            state = states[name].inner
            if numerator is None:
                correction = 1 - 0.999 ** float(moment(state, "count"))
                d = np.sqrt(np.asarray(moment(state, "nu")["k"]) / correction) + 1e-8
            else:
                d = np.abs(np.asarray(numerator(state, grads)) / np.asarray(plain[name]["k"]))
            seen[name].append((np.asarray(found[name], np.float64), np.asarray(d, np.float64)))
        params = {name: optax.apply_updates(params[name], plain[name]) for name in stock}
    return seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_diagonal_is_that_of_the_very_step(name):
    """Up to one factor for the array."""
    for found, wanted in diagonals()[name]:
        ratio = found / wanted
        np.testing.assert_allclose(ratio, np.median(ratio), rtol=3e-4)  # Adan's numerator cancels in places
    last = diagonals()[name][-1][1]
    assert bool(np.ptp(last) < 1e-3 * last.max()) is (name in ("radam, not yet rectified", "novograd"))


def test_multisteps_projects_in_the_metric_of_the_emitted_update():
    several, every = reveal(optax.MultiSteps(optax.adam(0.3), 2).gradient_transformation()), reveal(optax.adam(0.3))
    params = start()

    @jax.jit
    def step(first, second, states):
        _, after = several.update(first, states[0], params)
        emitted, after = several.update(second, after, params)
        whole, other = every.update(jax.tree.map(lambda a, b: (a + b) / 2, first, second), states[1], params)
        return (params["k"] + emitted["k"], params["k"] + whole["k"]), (after, other)

    states, grads = (several.init(params), every.init(params)), gradients(4)
    for first, second in (grads[:2], grads[2:]):
        (emitted, whole), states = step(first, second, states)
        np.testing.assert_allclose(emitted / whole, np.full((30, 6), np.median(emitted / whole)), rtol=2e-4)


# ------------------------------------------------------------------------------------------------------------ the step


TX = optax.adam(0.3)


@jax.jit
def one_step(c, grads, state, params):
    """A step of Adam with a traced bound: its update, and Adam's own state."""
    tx = projected(TX, {"k": MaxNorm(c)}, metric="adaptive")
    updates, after = tx.update(grads, tx.init(params)._replace(inner=state), params)
    return updates, after.inner


def test_a_step_is_held_and_nearest_in_the_metric():
    params, state, differs = start(), TX.init(start()), 0
    for grads in gradients(4):
        plain, theirs = TX.update(grads, state, params)
        y = np.asarray(optax.apply_updates(params, plain)["k"])
        d = np.asarray(mu(theirs, grads) / plain["k"])
        updates, state = one_step(C, grads, state, params)
        params = optax.apply_updates(params, updates)
        x, norms = np.asarray(params["k"]), exact_norms(y)
        outside = norms > C
        assert outside.any()
        assert (exact_norms(x) <= C).all()
        inside = norms < C * (1 - 1e-5)
        assert (bits(x)[:, inside] == bits(y)[:, inside]).all()
        error, multiplier = residual(*(a.T[outside] for a in (x, y, np.abs(d))))
        assert (error <= 1e-5).all()
        assert (multiplier >= -1e-5).all()
        euclidean = MaxNorm(C, axis=0).project(y)
        differs += int((residual(*(a.T[outside] for a in (euclidean, y, np.abs(d))))[0] > 1e-3).sum())
    assert differs


def test_where_nothing_binds_it_is_the_optimizers_own():
    params, grads = start(), gradients(1)[0]
    ours, state = one_step(1e6, grads, TX.init(params), params)
    theirs, own = jax.jit(TX.update)(grads, TX.init(params), params)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, (ours, state), (theirs, own)))


def test_vmap_sweeps_a_population_over_the_bound():
    params, grads, bounds = start(), gradients(1)[0], jnp.asarray([1.0, 2.0, 4.0])
    together, _ = jax.jit(jax.vmap(one_step, (0, None, None, None)))(bounds, grads, TX.init(params), params)
    for row, c in zip(together["k"], bounds, strict=True):
        alone, _ = one_step(c, grads, TX.init(params), params)
        assert jnp.allclose(row, alone["k"], rtol=1e-4, atol=1e-6)


def test_other_sets_and_dtypes():
    """A sphere; a set that is the same in every diagonal; 16-bit weights, which are held exactly."""
    sets = {"initial": Sphere("initial"), "positive": NonNegative()}
    sets |= {"float16": MaxNorm(C), "bfloat16": MaxNorm(C)}
    params = {name: start()["k"].astype(name if "16" in name else "float32") for name in sets}
    tx = projected(optax.adam(0.3, eps=1e-4), sets, metric="adaptive")
    update, state, before = jax.jit(tx.update), tx.init(params), params
    for grads in gradients(2):
        updates, state = update({name: grads["k"].astype(p.dtype) for name, p in params.items()}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(exact_norms(params["initial"]), exact_norms(before["initial"]), rtol=1e-5)
        assert (params["positive"] >= 0).all()
        for name in ("float16", "bfloat16"):
            assert params[name].dtype == name
            assert (exact_norms(params[name]) <= C).all()


def test_equals_pytorch():
    weights = np.random.default_rng(2).standard_normal((6, 30)).astype(np.float32)
    p, params = torch.nn.Parameter(torch.tensor(weights)), {"k": jnp.asarray(weights.T), "free": jnp.ones(3)}
    theirs, state = ProjectedAdam([p], lr=0.3, c=2.0, metric="adaptive"), TX.init(params)
    for grads in gradients(6):
        p.grad = torch.tensor(np.asarray(grads["k"]).T)
        theirs.step()
        updates, state = one_step(2.0, grads, state, params)
        params = optax.apply_updates(params, updates)
    assert np.abs(p.detach().numpy().T - np.asarray(params["k"])).max() <= 1e-5


def test_least_squares_ends_at_the_optimum_and_its_euclidean_twin_does_not():
    problem = LeastSquares()

    def minimize(optimizer):
        def step(carry, _):
            x, state = carry
            updates, state = optimizer.update(hessian @ x - linear, state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (jnp.zeros(20), optimizer.init(jnp.zeros(20))), None, 1500)[0][0]

    optimizers = [(tx, metric) for tx in (optax.adagrad(0.3), optax.adam(1e-2)) for metric in ("adaptive", "euclidean")]
    with jax.enable_x64(True):
        hessian, linear = jnp.asarray(problem.hessian), jnp.asarray(problem.linear)
        found = jax.jit(
            lambda: [minimize(projected(tx, MaxNorm(1.0, axis=None), metric)) for tx, metric in optimizers]
        )()
    for (_, metric), x in zip(optimizers, found, strict=True):
        gap = (problem(np.asarray(x)) - problem.optimum) / problem.optimum
        assert gap <= 1e-6 if metric == "adaptive" else gap >= 0.3


def test_a_function_may_give_the_diagonal():
    params, grads = start(), gradients(1)[0]
    tx = projected(optax.sgd(1.0), {"k": MaxNorm(C)}, metric=lambda state, params: {"k": params["k"] ** 2, "free": 1.0})
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    y = np.asarray(params["k"] - grads["k"]).T
    outside = np.linalg.norm(y, axis=1) > C
    x = np.asarray(optax.apply_updates(params, updates)["k"]).T
    assert outside.any()
    assert (residual(x[outside], y[outside], np.asarray(params["k"] ** 2).T[outside])[0] <= 1e-5).all()


# ----------------------------------------------------------------------------------------------------- what is refused


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
    half = optax.partition({"a": optax.sgd(0.1), "b": optax.adam(0.1)}, labels)
    with pytest.raises(ValueError, match="no second moment for k"):
        projected(half, {"k": MaxNorm(C)}, metric="adaptive").init(start())
    tx = projected(optax.adam(0.1), {"k": MaxNorm(C)}, metric="adaptive")
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(start(), tx.init(start()))
