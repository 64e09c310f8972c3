"""The derivative of `.project`, in JAX and in PyTorch, against float64 finite differences of the formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from projgd import MaxNorm, NonNegative, UnitNorm
from projgd.optax import apply_updates, maxnorm_projection

RNG = np.random.default_rng(0)
# Columns inside, outside, far outside, far inside, and zero.
X = RNG.standard_normal((5, 6)) * np.asarray([0.05, 1.0, 1e3, 1e-3, 2.0, 0.0])
V = RNG.standard_normal((5, 6))

FORMULAS = {
    "MaxNorm": (MaxNorm(0.5, axis=0), lambda x: x * np.minimum(1, 0.5 / np.linalg.norm(x, axis=0).clip(1e-300))),
    "UnitNorm": (UnitNorm(axis=0), lambda x: x / np.linalg.norm(x, axis=0)),
    "NonNegative": (NonNegative(), lambda x: np.maximum(x, 0)),
}


def slope(f, x, v):
    """df(x)[v] by central differences, each column with a step of its own size."""
    h = 1e-6 * np.linalg.norm(x, axis=0).clip(1e-12)
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


@pytest.mark.parametrize("name", FORMULAS)
def test_jax(name):
    constraint, formula = FORMULAS[name]
    x, v = (X[:, :5], V[:, :5])  # the zero vector has a test of its own
    expected = slope(formula, x, v)
    primal, tangent = jax.jit(lambda x, v: jax.jvp(constraint.project, (x,), (v,)))(jnp.asarray(x), jnp.asarray(v))
    scale = np.abs(expected).max(axis=0)
    np.testing.assert_allclose(np.asarray(tangent) / scale, expected / scale, atol=2e-5)
    # The derivative is symmetric, so that vjp and jvp are the same map.
    pulled = jax.jit(lambda x, v: jax.vjp(constraint.project, x)[1](v)[0])(jnp.asarray(x), jnp.asarray(v))
    np.testing.assert_allclose(np.asarray(pulled) / scale, expected / scale, atol=2e-5)
    np.testing.assert_allclose(primal, formula(x), rtol=2e-5)


@pytest.mark.parametrize("name", FORMULAS)
def test_torch(name):
    constraint, formula = FORMULAS[name]
    if hasattr(constraint, "axis"):
        constraint = type(constraint)(**({"c": constraint.c} if name == "MaxNorm" else {}), axis=0)
    x = torch.tensor(X[:, :5], requires_grad=True)
    (pulled,) = torch.autograd.grad(constraint.project(x), x, torch.tensor(V[:, :5]))
    expected = slope(formula, X[:, :5], V[:, :5])
    scale = np.abs(expected).max(axis=0)
    np.testing.assert_allclose(pulled.numpy() / scale, expected / scale, atol=1e-6)


def on_the_boundary() -> np.ndarray:
    return np.asarray([[3.0], [4.0]], np.float32)  # its norm is 5 exactly


def test_on_the_boundary_and_at_zero_it_is_the_identity():
    """Two one-sided derivatives meet at the boundary; ours is the inner one. MaxNorm(5.001) has it inside, for sure."""
    v = np.asarray([[1.0], [1.0]], np.float32)
    for x, c in ((on_the_boundary(), 5.001), (np.zeros((2, 1), np.float32), 5.0)):
        constraint = MaxNorm(c, axis=0)
        np.testing.assert_array_equal(jax.jvp(constraint.project, (x,), (v,))[1], v)
        t = torch.tensor(x, requires_grad=True)
        (pulled,) = torch.autograd.grad(constraint.project(t), t, torch.tensor(v))
        np.testing.assert_array_equal(pulled.numpy(), v)


def test_just_beyond_the_guard_it_is_the_outer_one():
    """A norm of exactly c is within rounding of the boundary: it is scaled by about 1 - 1e-6, its radial part goes."""
    v = on_the_boundary()  # radial
    tangent = jax.jvp(MaxNorm(5.0, axis=0).project, (on_the_boundary(),), (v,))[1]
    assert np.abs(tangent).max() < 1e-5


def test_inside_a_loss():
    x, target = jnp.asarray(X, jnp.float32), jnp.ones((5, 6))
    grads = jax.grad(lambda x: jnp.sum((MaxNorm(0.5).project(x) - target) ** 2))(x)
    assert np.isfinite(grads).all()
    huge = jnp.full((3, 1), 1e30, jnp.float32)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(MaxNorm(4.0).project(x)))(huge)).all()


def chained(p, u, c):
    tx = maxnorm_projection(c, axis=0)
    return optax.apply_updates(p, tx.update(u, tx.init(p), p)[0])


@pytest.mark.parametrize("way", [chained, lambda p, u, c: apply_updates(p, u, MaxNorm(c, axis=0))])
def test_of_a_step_as_in_meta_learning(way):
    """By the weights and by the update it is the derivative of the projection of their sum, at a zero vector too."""
    p, u = np.asarray(X / 2, np.float32), np.asarray(X - np.asarray(X / 2, np.float32), np.float32)
    expected = slope(FORMULAS["MaxNorm"][1], X, V)
    scale = np.abs(expected).max(axis=0).clip(0.01)  # a chained update's own derivative is near 1: it cancels
    for a, b in ((V, 0 * V), (0 * V, V)):
        tangents = np.asarray(a, np.float32), np.asarray(b, np.float32)
        found = jax.jvp(lambda p, u: way(p, u, 0.5), (p, u), tangents)[1]
        np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)
    pulled = jax.jit(lambda p, u: jax.vjp(lambda p, u: way(p, u, 0.5), p, u)[1](np.asarray(V, np.float32)))(p, u)
    for found in pulled:
        np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, atol=2e-5)
