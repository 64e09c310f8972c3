"""Keras 3 and projgd: the network that asked the question, trained in Keras, PyTorch and JAX; and its MinMaxNorm.

    Convolution2D(32, 3, 3, border_mode='same', activation='relu', kernel_constraint=max_norm(3))

on 3x32x32 inputs (https://stats.stackexchange.com/questions/257996), with a small head.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from projgd import MaxNorm, MinMaxNorm, report
from projgd.optax import projection
from projgd.torch import ProjectedSGD

C, STEPS = 3.0, 25

KERAS = """
import sys, numpy as np, keras
from keras import layers
keras.backend.set_image_data_format("channels_last")

def train(data, axis, rate):
    constraint = keras.constraints.MaxNorm({c}, axis=axis)
    model = keras.Sequential([
        layers.Input((32, 32, 3)),
        layers.Conv2D(32, 3, padding="same", activation="relu", kernel_constraint=constraint),
        layers.AveragePooling2D(8),
        layers.Flatten(),
        layers.Dense(10),
    ])
    model.set_weights([data["kernel"], np.zeros(32), data["head"], np.zeros(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate), loss=loss)
    for x, y in zip(data["x"], data["y"]):
        model.train_on_batch(x, y)
    return model.get_weights()

for i, (axis, rate) in enumerate({settings}):
    np.savez(sys.argv[1] + f"/trained{{i}}.npz", *train(np.load(sys.argv[1] + f"/data{{i}}.npz"), axis, rate))

w = np.load(sys.argv[1] + "/w.npy")
for i, (low, high, rate, axis) in enumerate({intervals}):
    found = keras.constraints.MinMaxNorm(low, high, rate=rate, axis=axis)(keras.ops.convert_to_tensor(w))
    np.save(sys.argv[1] + f"/w{{i}}.npy", keras.ops.convert_to_numpy(found))
"""
INTERVALS = [(0.5, 2.0, 1.0, 0), (0.5, 2.0, 0.3, 0), (0.0, 1.0, 1.0, 0), (1.0, 1.0, 1.0, 1), (0.7, 0.9, 0.3, (0, 1))]


@dataclass(frozen=True)
class Axis:
    """One setting of Keras's `axis`, in projgd's words for both layouts."""

    keras: list[int] | int
    jax: tuple[int, ...] | int | None
    torch: tuple[int, ...] | int | None
    rate: float
    spread: float  # of the initial weights: vectors start near the bound, most of them outside
    binding: int  # vectors that end on the bound, at the least


AXES = {
    "each filter": Axis([0, 1, 2], (0, 1, 2), (1, 2, 3), 0.1, 1.15 * C / 27**0.5, binding=16),
    "Keras's default": Axis(0, 0, 2, 0.03, 1.15 * C / 3**0.5, binding=24),
    "whole tensor": Axis([0, 1, 2, 3], None, None, 0.1, 1.15 * C / 864**0.5, binding=1),
}


def problem(axis: Axis) -> dict[str, np.ndarray]:
    """Batches of images (NHWC), each class with its own mean colours, and initial kernels (HWIO, and in-out)."""
    rng = np.random.default_rng(0)
    means, y = 0.3 * rng.normal(size=(10, 1, 1, 3)), rng.integers(10, size=(STEPS, 16))
    data = {
        "x": means[y] + 0.1 * rng.normal(size=(STEPS, 16, 32, 32, 3)),
        "kernel": axis.spread * rng.normal(size=(3, 3, 3, 32)),
        "head": 0.02 * rng.normal(size=(512, 10)),
    }
    return {k: v.astype(np.float32) for k, v in data.items()} | {"y": y}


def with_torch(data, axis) -> list[np.ndarray]:
    conv, dense = torch.nn.Conv2d(3, 32, 3, padding="same"), torch.nn.Linear(512, 10)
    with torch.no_grad():
        conv.weight.copy_(torch.from_numpy(data["kernel"].transpose(3, 2, 0, 1)))
        dense.weight.copy_(torch.from_numpy(data["head"].T))
        conv.bias.zero_()
        dense.bias.zero_()
    groups = [{"params": conv.weight, "c": C, "axis": axis.torch}, {"params": [conv.bias, *dense.parameters()]}]
    optimizer = ProjectedSGD(groups, lr=axis.rate)
    for x, y in zip(torch.from_numpy(data["x"].transpose(0, 1, 4, 2, 3)), torch.from_numpy(data["y"]), strict=True):
        pooled = torch.nn.functional.avg_pool2d(conv(x).relu(), 8)
        logits = dense(pooled.permute(0, 2, 3, 1).flatten(1))  # flattened in the order of Keras
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, y).backward()
        optimizer.step()
    kernel = conv.weight.detach().numpy().transpose(2, 3, 1, 0)
    return [kernel, conv.bias.detach().numpy(), dense.weight.detach().numpy().T, dense.bias.detach().numpy()]


def with_jax(data, axis) -> list[np.ndarray]:
    params = {"conv": {"kernel": data["kernel"], "bias": np.zeros(32, np.float32)}}
    params |= {"dense": {"kernel": data["head"], "bias": np.zeros(10, np.float32)}}
    tx = optax.chain(optax.sgd(axis.rate), projection({"conv/kernel": MaxNorm(C, axis.jax)}))

    def loss(params, x, y):
        conv, dense = params["conv"], params["dense"]
        h = jax.lax.conv_general_dilated(x, conv["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = jax.nn.relu(h + conv["bias"]).reshape(-1, 4, 8, 4, 8, 32).mean((2, 4)).reshape(len(x), -1)
        logits = h @ dense["kernel"] + dense["bias"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, batch):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(jnp.asarray, params)
    (params, _), _ = jax.jit(lambda *carry: jax.lax.scan(step, carry, (data["x"], data["y"])))(params, tx.init(params))
    return [np.asarray(params[layer][name]) for layer in ("conv", "dense") for name in ("kernel", "bias")]


def weights_of_all_norms() -> np.ndarray:
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((6, 40)) * np.geomspace(1e-2, 30, 40)).astype(np.float32)
    w[:, 7] = 0.0
    return w


@pytest.fixture(scope="module")
def by_keras(tmp_path_factory) -> Path:
    """The folder with what Keras 3 makes of our data, in a process of its own: there is one backend in a process."""
    folder = tmp_path_factory.mktemp("keras")
    np.save(folder / "w.npy", weights_of_all_norms())
    for i, axis in enumerate(AXES.values()):
        np.savez(folder / f"data{i}.npz", **problem(axis))
    code = KERAS.format(c=C, settings=[(axis.keras, axis.rate) for axis in AXES.values()], intervals=INTERVALS)
    environment = {**os.environ, "KERAS_BACKEND": "jax", "KERAS_HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("ours", [with_torch, with_jax])
@pytest.mark.parametrize("name", AXES)
def test_weights_agree_with_keras(ours, name, by_keras):
    axis = AXES[name]
    found = ours(problem(axis), axis)
    (row,) = report({"kernel": found[0]}, MaxNorm(C, axis.jax)).rows
    assert row.violations == 0
    assert row.on_bound >= axis.binding
    trained = np.load(by_keras / f"trained{list(AXES).index(name)}.npz").values()
    for weights, keras in zip(found, trained, strict=True):
        np.testing.assert_allclose(weights, keras, rtol=0, atol=1e-3)


@pytest.mark.parametrize("i", range(len(INTERVALS)))
def test_min_max_norm_is_that_of_keras(i, by_keras):
    low, high, rate, axis = INTERVALS[i]
    w = weights_of_all_norms()
    ours = MinMaxNorm(low, high, rate, axis).project(w)
    np.testing.assert_allclose(ours, np.load(by_keras / f"w{i}.npy"), rtol=1e-5, atol=1e-5)
    assert (ours[:, 7] == 0).all()
