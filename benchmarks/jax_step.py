"""What a projected step costs in JAX: Adam on ResNet-50's shapes, one jitted step with donated buffers.

`python benchmarks/jax_step.py [--rounds N]` compares, round by round in one run, the plain step with projgd's forms,
the three-line loop, `optax.projections` and Keras's constraint on its JAX backend. R is the median over the rounds of
a step's time over the plain step's in the same round; "extra" is XLA's own count of temporary bytes.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

from projgd import MaxNorm
from projgd.optax import apply_updates, maxnorm_projection


def resnet_shapes() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            shapes += [(1, 1, inputs, 4 * width)] if block == 0 else []
            inputs = 4 * width
    shapes.append((2048, 1000))
    return [*shapes, *[(shape[-1],) for shape in shapes for _ in range(2)]]


def every_kernel(project):
    """`project(kernel, axes)` on every kernel of a tree."""
    return lambda tree: [project(q, tuple(range(q.ndim - 1))) if q.ndim > 1 else q for q in tree]


def contenders(c: float):
    adam = optax.adam(1e-3)
    keras_norm = {n: keras.constraints.MaxNorm(c, axis=tuple(range(n - 1))) for n in (2, 4)}

    def by_hand(q, axes):
        return q * jnp.minimum(1.0, c / jnp.linalg.norm(q.reshape(-1, q.shape[-1]), axis=0))

    def of_optax(q, axes):
        rows = q.reshape(-1, q.shape[-1]).T
        return jax.vmap(lambda row: optax.projections.projection_l2_ball(row, c))(rows).T.reshape(q.shape)

    def then(project):
        return lambda p, u: every_kernel(project)(optax.apply_updates(p, u))

    return {
        "plain Adam": (adam, optax.apply_updates),
        "projgd, apply_updates": (adam, lambda p, u: apply_updates(p, u, MaxNorm(c))),
        "projgd, chained": (optax.chain(adam, maxnorm_projection(c)), optax.apply_updates),
        "three lines by hand": (adam, then(by_hand)),
        "optax.projections": (adam, then(of_optax)),
        "Keras constraint": (adam, then(lambda q, axes: keras_norm[q.ndim](q))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--c", type=float, default=1.0, help="1 binds on about half of the neurons, 100 on none")
    args = parser.parse_args()
    rng = np.random.default_rng(0)

    def normal(scale):
        return [jnp.asarray(rng.standard_normal(s, np.float32) * scale(s)) for s in resnet_shapes()]

    weights = sum(int(np.prod(s)) for s in resnet_shapes())
    runs = {}
    for name, (tx, move) in contenders(args.c).items():

        def step(p, s, g, tx=tx, move=move):
            u, s = tx.update(g, s, p)
            return move(p, u), s

        p = normal(lambda s: (np.prod(s[:-1]) or 1) ** -0.5)
        s, g = tx.init(p), normal(lambda s: 1.0)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(p, s, g).compile()
        runs[name] = [compiled, p, s, g, []]
        print(f"compiled {name}", flush=True)
    for _ in range(args.rounds + 3):
        for run in runs.values():
            compiled, p, s, g, times = run
            begin = time.perf_counter()
            run[1], run[2] = jax.block_until_ready(compiled(p, s, g))
            times.append(time.perf_counter() - begin)
    base = np.asarray(runs["plain Adam"][4][3:])
    print(f"{weights / 1e6:.1f} M parameters, c = {args.c}, {args.rounds} rounds, {jax.devices()[0].device_kind}")
    print("| | ms | R | extra MB |\n|---|---|---|---|")
    for name, (compiled, *_, times) in runs.items():
        took = np.asarray(times[3:])
        extra = compiled.memory_analysis().temp_size_in_bytes / 1e6
        print(f"| {name} | {1e3 * np.median(took):.0f} | {np.median(took / base):.2f} | {extra:.1f} |")


if __name__ == "__main__":
    main()
