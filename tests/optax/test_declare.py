"""Constraints that are declared on a model: nnx, linen and equinox; who wins, and what cannot be declared."""

import pickle
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from projgd import MaxNorm, NonNegative, UnitNorm
from projgd.optax import apply_updates, constrain, declared, project, projection, with_constraint

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL, LARGE = MaxNorm(0.25), MaxNorm(1.0)


class Net(nnx.Module):
    """A model that declares its own bounds."""

    def __init__(self, rngs):
        large = nnx.with_metadata(nnx.initializers.normal(1.0), constraint=LARGE)
        self.hidden = nnx.Linear(5, 8, kernel_init=large, rngs=rngs)
        self.head = constrain(nnx.Linear(8, 3, rngs=rngs), SMALL)

    def __call__(self, x):
        return self.head(nnx.relu(self.hidden(x)))


class Module(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, kernel_init=with_constraint(nn.initializers.normal(1.0), LARGE), name="hidden")(x)
        return nn.Dense(3, kernel_init=with_constraint(nn.initializers.normal(1.0), SMALL), name="head")(nn.relu(x))


class Equinox(eqx.Module):
    constraints: ClassVar = {"hidden/weight": LARGE, "head/weight": SMALL}
    hidden: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        self.hidden, self.head = eqx.nn.Linear(5, 8, key=key), eqx.nn.Linear(8, 3, key=key)


def linen():
    return Module().init(jax.random.key(0), jnp.ones((1, 5)))["params"]


MODELS = {
    "nnx": lambda: Net(nnx.Rngs(0)),
    "nnx state": lambda: nnx.state(Net(nnx.Rngs(0)), nnx.Param),
    "linen": linen,
    "equinox": lambda: Equinox(jax.random.key(0)),
}


def norms(params):
    """The largest norm of a neuron in each matrix, in the order of the names."""
    matrices = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    axis = 1 if isinstance(params, Equinox) else 0
    found = [np.linalg.norm(np.asarray(m, np.float64), axis=axis).max() for m in matrices]
    return sorted(found)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_declares_its_own_bounds(kind):
    params = jax.tree.map(lambda p: 10 * p, MODELS[kind]())
    assert sorted(declared(params).values(), key=lambda own: own.c) == [SMALL, LARGE]
    tx = optax.chain(optax.sgd(0.1), projection(declared))

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    chained, _ = step(params, tx.init(params))
    assert declared(chained) == declared(params)
    updates = jax.tree.map(jnp.zeros_like, params)
    for held in (chained, apply_updates(params, updates, declared), project(params, declared)):
        small, large = norms(held)
        assert 0.25 * (1 - 1e-5) <= small <= 0.25
        assert 1 - 1e-5 <= large <= 1


def test_the_stock_loop_of_nnx_knows_nothing_of_it():
    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.adam(0.1), projection(declared)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda m: (m(x) ** 2).sum())(model)
        optimizer.update(model, grads)

    for _ in range(3):
        step(model, optimizer, jnp.ones((4, 5)))
    assert norms(nnx.state(model, nnx.Param))[0] <= 0.25
    assert declared(model) == declared(nnx.clone(model)) == {"head/kernel": SMALL, "hidden/kernel": LARGE}
    counted = optax.tree.map_params(optimizer.tx, jnp.ones_like, nnx.as_pure(optimizer.opt_state))
    assert jax.tree.structure(counted) == jax.tree.structure(nnx.as_pure(optimizer.opt_state))
    graph, state = nnx.split(model)
    assert declared(nnx.merge(graph, pickle.loads(pickle.dumps(state)))) == declared(model)


def test_linen_applies_what_is_in_the_boxes():
    params = linen()
    assert Module().apply({"params": params}, jnp.ones((2, 5))).shape == (2, 3)


def test_rules_before_what_is_declared_win():
    params = linen()
    mixed = {"head/*": UnitNorm(), **declared(params)}
    with pytest.raises(ValueError, match="'head/kernel' has no effect"):
        project(params, mixed)
    mixed.pop("head/kernel")
    kernel = project(params, mixed)["head"]["kernel"].unbox()
    np.testing.assert_allclose(jnp.linalg.norm(kernel, axis=0), 1, rtol=1e-5)


def test_what_cannot_be_declared_is_an_error():
    layer = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"Linear has no variable 'weight'; it has .*kernel"):
        constrain(layer, SMALL, "weight")
    with pytest.raises(TypeError, match=r"4\.0 is not a constraint"):
        constrain(layer, 4.0)
    with pytest.raises(TypeError, match=r"4\.0 is not a constraint"):
        with_constraint(nn.initializers.ones, 4.0)
    constrain(constrain(layer, SMALL), SMALL)
    with pytest.raises(ValueError, match=r"kernel of Linear has MaxNorm\(c=0.25.* already"):
        constrain(layer, NonNegative())
    layer.bias.set_metadata(constraint=3.0)
    with pytest.raises(TypeError, match=r"bias declares 3.0, which is not a constraint"):
        projection(declared).init(layer)
    with pytest.raises(ValueError, match=r"no constraint is declared on the parameters: see projgd.optax.constrain"):
        projection(declared).init({"kernel": jnp.ones((2, 2))})


def test_a_parameter_that_is_declared_free():
    net = constrain(Net(nnx.Rngs(0)), None, "head/bias")
    assert declared(net)["head/bias"] is None
    assert norms(project(nnx.state(net, nnx.Param), declared))[0] <= 0.25
