"""Use max-norm in the training loops that people write in JAX; print each one's loss and largest neuron norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

from projgd import MaxNorm
from projgd.optax import apply_updates, find_leaves, maxnorm_projection, projection

C = 0.5
STEPS = 60


def data() -> tuple[jax.Array, jax.Array]:
    """Return points on a spiral in two classes; a fit needs large weights."""
    t = np.linspace(0.3, 3, 64)
    arm = np.stack([t * np.cos(3 * t), t * np.sin(3 * t)], axis=1)
    return jnp.asarray(np.concatenate([arm, -arm]), jnp.float32), jnp.repeat(jnp.arange(2), 64)


X, Y = data()


def cross_entropy(logits: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


class Net(nn.Module):
    """Apply three dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(2)(nn.relu(nn.Dense(32)(nn.relu(nn.Dense(32)(x)))))


def linen_loss(params: Any) -> jax.Array:
    return cross_entropy(Net().apply({"params": params}, X))


def optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.adam(0.05), maxnorm_projection(C))


def plain() -> tuple[Any, jax.Array]:
    """Train with `jax.grad` in a Python loop."""
    params, tx = Net().init(jax.random.key(0), X)["params"], optimizer()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(linen_loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for _ in range(STEPS):
        params, state, loss = step(params, state)
    return params, loss


def scanned() -> tuple[Any, jax.Array]:
    """Train in one `lax.scan`, with donated parameters and state and the projection in place."""
    params, tx = Net().init(jax.random.key(0), X)["params"], optax.adam(0.05)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def run(params: Any, state: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(linen_loss)(params)
            updates, state = tx.update(grads, state, params)
            return (apply_updates(params, updates, MaxNorm(C)), state), loss

        (params, state), losses = jax.lax.scan(step, (params, state), length=STEPS)
        return params, state, losses[-1]

    params, _, loss = run(params, tx.init(params))
    return params, loss


def train_state() -> tuple[Any, jax.Array]:
    """Train with flax.training's TrainState, with a rule for each layer."""
    tx = optax.chain(optax.adam(0.05), projection({"Dense_2/kernel": None, "Dense_*/kernel": MaxNorm(C)}))
    state = TrainState.create(apply_fn=Net().apply, params=Net().init(jax.random.key(0), X)["params"], tx=tx)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(linen_loss)(state.params)
        return state.apply_gradients(grads=grads), loss

    for _ in range(STEPS):
        state, loss = step(state)
    return {name: state.params[name] for name in ("Dense_0", "Dense_1")}, loss


def flax_nnx() -> tuple[Any, jax.Array]:
    """Train with `nnx.Optimizer`."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(2, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 2, rngs=rngs))
    holder = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

    @nnx.jit
    def step(model: nnx.Module, holder: nnx.Optimizer) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: cross_entropy(model(X)))(model)
        holder.update(model, grads)
        return loss

    for _ in range(STEPS):
        loss = step(model, holder)
    return nnx.state(model, nnx.Param), loss


def equinox() -> tuple[Any, jax.Array]:
    """Train with `eqx.filter_jit`, with the arrays separate from the rest."""
    params, static = eqx.partition(eqx.nn.MLP(2, 2, 32, 2, key=jax.random.key(0)), eqx.is_inexact_array)
    tx = optimizer()

    @eqx.filter_jit
    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(jax.vmap(eqx.combine(p, static))(X)))(params)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(params, updates), state, loss

    state = tx.init(params)
    for _ in range(STEPS):
        params, state, loss = step(params, state)
    return params, loss


def population() -> tuple[jax.Array, jax.Array]:
    """Train every pair of a bound and a rate by `vmap`; return losses and largest norms, (bounds, rates)."""
    bounds, rates = jnp.asarray([0.25, 0.5, 1.0, 4.0]), jnp.asarray([0.01, 0.1, 1.0])

    def train(c: jax.Array, rate: jax.Array) -> tuple[jax.Array, jax.Array]:
        params, tx = Net().init(jax.random.key(0), X)["params"], optax.chain(optax.adam(rate), maxnorm_projection(c))

        def step(carry: Any, _: None) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(linen_loss)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), length=STEPS)
        return losses[-1], largest_norm(params)

    return jax.jit(jax.vmap(jax.vmap(train, (None, 0)), (0, None)))(bounds, rates)


LOOPS: dict[str, Callable[[], tuple[Any, jax.Array]]] = {
    "jax.grad in a loop": plain,
    "lax.scan, donated": scanned,
    "TrainState": train_state,
    "nnx.Optimizer": flax_nnx,
    "equinox": equinox,
}


def largest_norm(params: Any) -> jax.Array:
    """Return the largest norm of any neuron in any layer."""
    found = [leaf for leaf in find_leaves(params) if leaf is not None and leaf.fan_in]
    return jnp.stack([jnp.linalg.norm(leaf.array, axis=leaf.fan_in).max() for leaf in found]).max()


def main() -> None:
    for name, loop in LOOPS.items():
        params, loss = loop()
        print(f"{name:20} loss {float(loss):.3f}, largest neuron norm {float(largest_norm(params)):.6f}")
    losses, norms = population()
    print("population, bounds 0.25, 0.5, 1, 4 down, rates 0.01, 0.1, 1 across: loss, then largest norm")
    print(np.asarray(losses).round(3), np.asarray(norms).round(3), sep="\n")


if __name__ == "__main__":
    main()
