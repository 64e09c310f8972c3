"""The derivative of `.project`, in JAX and in PyTorch, against float64 finite differences of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from projgd import MaxNorm, NonNegative, UnitNorm

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 5)) * np.asarray([0.05, 1.0, 1e3, 1e-3, 2.0])  # inside, outside, far outside, far inside
V = RNG.standard_normal((5, 5))

FORMULAS = {
    "MaxNorm": (MaxNorm(0.5, axis=0), lambda x: x * np.minimum(1, 0.5 / np.linalg.norm(x, axis=0).clip(1e-300))),
    "UnitNorm": (UnitNorm(axis=0), lambda x: x / np.linalg.norm(x, axis=0)),
    "NonNegative": (NonNegative(), lambda x: np.maximum(x, 0)),
}


def slope(f, x, v):
    """df(x)[v] by central differences, each column with a step of its own size."""
    h = 1e-6 * np.linalg.norm(x, axis=0).clip(1e-12)
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


def by_torch(constraint, x, v):
    x = torch.tensor(x, requires_grad=True)
    return torch.autograd.grad(constraint.project(x), x, torch.tensor(v))[0].numpy()


def test_forwards_and_backwards():
    """The derivative is symmetric, so that both are the same map."""

    @jax.jit
    def derive(x, v):
        sets = [constraint for constraint, _ in FORMULAS.values()]
        return [(jax.jvp(s.project, (x,), (v,))[1], jax.vjp(s.project, x)[1](v)[0]) for s in sets]

    for (constraint, formula), by_jax in zip(FORMULAS.values(), derive(*map(jnp.asarray, (X, V))), strict=True):
        expected = slope(formula, X, V)
        scale = np.abs(expected).max(axis=0)
        np.testing.assert_allclose(by_torch(constraint, X, V) / scale, expected / scale, atol=1e-6)
        for found in by_jax:
            np.testing.assert_allclose(np.asarray(found) / scale, expected / scale, atol=2e-5)


@pytest.mark.parametrize(("x", "c"), [([[3.0], [4.0]], 5.001), ([[0.0], [0.0]], 5.0)])
def test_on_the_boundary_and_at_zero_it_is_the_identity(x, c):
    """Two one-sided derivatives meet at the boundary; ours is the inner one. MaxNorm(5.001) has it inside, for sure."""
    x, v = np.asarray(x, np.float32), np.ones((2, 1), np.float32)
    np.testing.assert_array_equal(jax.jvp(MaxNorm(c, axis=0).project, (x,), (v,))[1], v)
    np.testing.assert_array_equal(by_torch(MaxNorm(c, axis=0), x, v), v)


def test_just_beyond_the_guard_it_is_the_outer_one():
    """A norm of exactly c is within rounding of the boundary: it is scaled by about 1 - 1e-6, its radial part goes."""
    x = np.asarray([[3.0], [4.0]], np.float32)
    assert np.abs(jax.jvp(MaxNorm(5.0, axis=0).project, (x,), (x,))[1]).max() < 1e-5


def test_of_huge_weights_it_is_finite():
    huge = np.full((3, 1), 1e30, np.float32)
    assert np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(MaxNorm(4.0).project(x))))(huge)).all()
