"""Run by test_sharding.py in a process with eight devices: steps on sharded parameters, reported as JSON."""

from __future__ import annotations

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from projgd import MaxNorm, UnitNorm
from projgd.optax import apply_updates, maxnorm_projection, projection, xla

xla.LARGE = 0  # these weights too take turns
C = 0.9
SHAPES = {"dense": (128, 64), "conv": (3, 3, 40, 16), "table": (64, 24)}
SPECS = {
    "rows": {"dense": P("a"), "conv": P(None, None, "a"), "table": P("a")},
    "columns": {"dense": P(None, "b"), "conv": P(None, None, None, "b"), "table": P(None, "b")},
    "both": {"dense": P("a", "b"), "conv": P(None, None, "a", "b"), "table": P("a", "b")},
    "one axis twice": {"dense": P(("a", "b")), "conv": P(None, None, ("a", "b")), "table": P(None, ("a", "b"))},
}
AXES = {"dense": 0, "conv": (0, 1, 2), "table": 1}


def tree(seed: int, scale: float) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    fan_in = {"dense": 128, "conv": 360, "table": 24}
    return {
        name: jnp.asarray(rng.standard_normal(shape) * scale / np.sqrt(fan_in[name]), jnp.float32)
        for name, shape in SHAPES.items()
    }


def named(params):
    """As a model has them: a kernel, a kernel, one vector per token."""
    return {
        "dense": {"kernel": params["dense"]},
        "conv": {"kernel": params["conv"]},
        "embed": {"embedding": params["table"]},
    }


def step_with(kind: str, split_over=None):
    inner = optax.adam(0.01)
    chained = {
        "chain": optax.chain(inner, maxnorm_projection(C, split_over=split_over)),
        "sphere": optax.chain(inner, projection(UnitNorm())),
    }.get(kind, inner)

    def step(params, state, grads):
        updates, state = chained.update(grads, state, params)
        if kind == "apply":
            return apply_updates(params, updates, MaxNorm(C), split_over), state
        return optax.apply_updates(params, updates), state

    return chained, step


def compare(found, expected) -> dict[str, float]:
    error, worst, tight = 0.0, 0.0, 9.0
    for q, r, name in zip(jax.tree.leaves(found), jax.tree.leaves(expected), ("conv", "dense", "table"), strict=True):
        q, r = np.asarray(q, np.float64), np.asarray(r, np.float64)
        error = max(error, float(np.abs(q - r).max() / np.abs(r).max()))
        norms = np.sqrt((q**2).sum(axis=AXES[name]))
        worst, tight = max(worst, float(norms.max())), min(tight, float(norms.max()))
    return {"error": error, "largest norm": worst, "least largest norm": tight}


def gathers(text: str) -> list[str]:
    """Collectives but all-reduces, and all-reduces of more than the norms."""
    found = re.findall(
        r"= \(?(f32\[[\d,]*\]).*? (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", text
    )
    return [
        f"{op} {shape}"
        for shape, op in found
        if op != "all-reduce" or np.prod([int(n) for n in re.findall(r"\d+", shape[4:])] or [1]) > 64
    ]


def jitted(mesh, layout, tx, step, params, grads, expected):
    """Three steps on parameters in that layout."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), named(SPECS[layout]))
    p, g = jax.device_put(params, shardings), jax.device_put(grads, shardings)
    s = jax.jit(tx.init)(p)
    compiled = jax.jit(step).lower(p, s, g).compile()
    jitted = jax.jit(step)
    for _ in range(3):
        p, s = jitted(p, s, g)
    kept = jax.tree.map(lambda q, sharding: q.sharding.is_equivalent_to(sharding, q.ndim), p, shardings)
    return compare(p, expected) | {
        "sharding kept": all(jax.tree.leaves(kept)),
        "gathers": gathers(compiled.as_text()),
    }


def main() -> None:
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(auto, auto))
    typed = jax.make_mesh((4, 2), ("a", "b"), axis_types=(explicit, explicit))
    params, grads = named(tree(0, 1.0)), named(tree(1, 1.0))
    report = {}
    for kind in ("chain", "apply", "sphere"):
        tx, step = step_with(kind)
        expected = params
        state = tx.init(params)
        for _ in range(3):
            expected, state = jax.jit(step)(expected, state, grads)
        for layout in SPECS:
            report[f"jit, {kind}, {layout}"] = jitted(mesh, layout, tx, step, params, grads, expected)
        with jax.set_mesh(typed):
            report[f"explicit, {kind}"] = jitted(typed, "both", tx, step, params, grads, expected)
    for kind in ("chain", "apply"):
        for layout, over in {
            "rows": {"dense/*": "a", "conv/*": "a"},
            "columns": {"embed/*": "b"},
            "both": {"dense/*": "a", "conv/*": "a", "embed/*": "b"},
            "one axis twice": {"*/kernel": ("a", "b"), "embed/*": ("a", "b")},
        }.items():
            _, plain = step_with(kind)
            tx, step = step_with(kind, over)
            specs = named(SPECS[layout])
            local = jax.jit(
                jax.shard_map(
                    lambda p, g, tx=tx, step=step: step(p, tx.init(p), g)[0],
                    mesh=mesh,
                    in_specs=(specs, specs),
                    out_specs=specs,
                )
            )
            expected = jax.jit(plain)(params, step_with(kind)[0].init(params), grads)[0]
            report[f"shard_map, {kind}, {layout}"] = compare(local(params, grads), expected) | {
                "sharding kept": True,
                "gathers": gathers(local.lower(params, grads).compile().as_text()),
            }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
