"""Measure Keras 3's own training step, forward and backward pass included, with and without `MaxNorm`.

The backend is chosen once per process, so this is a program of its own:

KERAS_BACKEND=torch python -m benchmarks.keras_step mlp Adam

It prints the milliseconds of every step in JSON: of the plain one, and with each bound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.workloads import BOUNDS

BACKENDS = ("torch", "jax")
WORKLOADS = ("mlp", "small")  # only these are stacks of dense layers
PLAIN = "plain"
BATCH = 32


Times = dict[tuple[str, str | None], list[float]]


def measured(backend: str, workload: str, optimizer: str, seconds: float, threads: int) -> Times:
    """Return the milliseconds of the steps of Keras with this backend, by step and bound."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.keras_step", workload, optimizer, str(seconds)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    plain, *bound = json.loads(done.stdout.splitlines()[-1])
    return {(PLAIN, None): plain} | {
        ("kernel_constraint=MaxNorm", b): taken for b, taken in zip(BOUNDS, bound, strict=True)
    }


def main(workload: str, optimizer: str, seconds: float) -> None:
    import keras
    import numpy as np

    from benchmarks.timing import interleaved

    made = {
        "SGD": lambda: keras.optimizers.SGD(1e-3),
        "momentum": lambda: keras.optimizers.SGD(1e-3, momentum=0.9),
        "Adam": lambda: keras.optimizers.Adam(1e-5),
        "AdamW": lambda: keras.optimizers.AdamW(1e-5, weight_decay=0.01),
    }
    sizes, activation = {"mlp": ([784, 1024, 1024, 2048, 10], "relu"), "small": ([64] * 201, None)}[workload]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH, sizes[0]), np.float32)
    y = rng.standard_normal((BATCH, sizes[-1]), np.float32)

    def model(c: float | None) -> keras.Model:
        keras.utils.set_random_seed(0)  # Glorot's initial weights have norms of about 1
        bound = None if c is None else keras.constraints.MaxNorm(c)
        layers = [keras.layers.Dense(n, activation, kernel_constraint=bound) for n in sizes[1:-1]]
        layers.append(keras.layers.Dense(sizes[-1], kernel_constraint=bound))
        built = keras.Sequential([keras.Input((sizes[0],)), *layers])
        built.compile(made[optimizer](), loss="mse")
        return built

    models = {PLAIN: model(None)} | {name: model(c) for name, c in BOUNDS.items()}
    steps = {name: lambda each=each: each.train_on_batch(x, y) for name, each in models.items()}
    print(json.dumps(list(interleaved(steps, seconds).values())))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 4.0)
