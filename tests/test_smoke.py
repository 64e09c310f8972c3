"""The founding case, once in each framework."""

import jax.numpy as jnp
import numpy as np
import optax
import torch

from projgd.optax import maxnorm_projection
from projgd.torch import ProjectedSGD


def test_torch_step_lands_in_the_ball():
    layer = torch.nn.Linear(3, 2)
    optimizer = ProjectedSGD(layer.parameters(), lr=10.0, c=0.5)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    norms = np.linalg.norm(layer.weight.detach().numpy().astype(np.float64), axis=1)
    assert (norms <= 0.5).all()
    assert (norms >= 0.5 * (1 - 1e-5)).all()


def test_jax_update_lands_in_the_ball():
    params = {"kernel": jnp.full((3, 2), 0.1), "bias": jnp.zeros(2)}
    tx = optax.chain(optax.sgd(10.0), maxnorm_projection(0.5))
    grads = {"kernel": -jnp.ones((3, 2)), "bias": -jnp.ones(2)}
    updates, _ = tx.update(grads, tx.init(params), params)
    landed = optax.apply_updates(params, updates)
    norms = np.linalg.norm(np.asarray(landed["kernel"], np.float64), axis=0)
    assert (norms <= 0.5).all()
    assert (norms >= 0.5 * (1 - 1e-5)).all()
    np.testing.assert_array_equal(landed["bias"], 10.0 * np.ones(2))
