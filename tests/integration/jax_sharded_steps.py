"""Run by `test_jax_sharded.py` in a process with eight devices: steps on sharded parameters, reported as JSON."""

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
from projgd.optax import apply_updates, hyperball, maxnorm_projection, projected, projection, xla

xla.LARGE = 0  # these weights too take turns
C = 0.9
SHAPES = {"dense": (128, 64), "conv": (3, 3, 40, 16), "table": (64, 24)}
AXES = {"dense": 0, "conv": (0, 1, 2), "table": 1}
SPECS = {
    "rows": {"dense": P("a"), "conv": P(None, None, "a"), "table": P("a")},
    "columns": {"dense": P(None, "b"), "conv": P(None, None, None, "b"), "table": P(None, "b")},
    "both": {"dense": P("a", "b"), "conv": P(None, None, "a", "b"), "table": P("a", "b")},
    "one axis twice": {"dense": P(("a", "b")), "conv": P(None, None, ("a", "b")), "table": P(None, ("a", "b"))},
}
SPLIT_OVER = {
    "rows": {"dense/*": "a", "conv/*": "a"},
    "columns": {"embed/*": "b"},
    "both": {"dense/*": "a", "conv/*": "a", "embed/*": "b"},
    "one axis twice": {"*/kernel": ("a", "b"), "embed/*": ("a", "b")},
}


def named(params):
    """As a model has them: a kernel, a kernel, one vector per token."""
    names = {"dense": "kernel", "conv": "kernel", "table": "embedding"}
    return {"embed" if key == "table" else key: {names[key]: value} for key, value in params.items()}


def tree(seed):
    rng, arrays = np.random.default_rng(seed), {}
    for name, shape in SHAPES.items():
        w = rng.standard_normal(shape)
        arrays[name] = jnp.asarray(w / np.sqrt(np.sum(w * w, AXES[name]).mean()), jnp.float32)
    return named(arrays)


def optimizers(split_over=None):
    """Every way to step; those of the second line take numbers from the initial weights, or measure a diagonal."""
    adam = optax.adam(0.01)
    found = {"chain": optax.chain(adam, maxnorm_projection(C, split_over=split_over)), "apply_updates": adam}
    found["sphere"] = optax.chain(adam, projection(UnitNorm(), split_over))
    return found | ({} if split_over else {"hyperball": hyperball(optax.sgd(1.0), 0.02)})


def all_steps(split_over=None):
    """Return the function that takes a step with every optimizer, and the one that makes their states."""
    made = optimizers(split_over)

    def step(params, states, grads):
        for name, tx in made.items():
            updates, state = tx.update(grads, states[name], params[name])
            if name == "apply_updates":
                moved = apply_updates(params[name], updates, MaxNorm(C), split_over)
            else:
                moved = optax.apply_updates(params[name], updates)
            params, states = params | {name: moved}, states | {name: state}
        return params, states

    return step, lambda params: {name: made[name].init(params[name]) for name in made}


def compare(found, expected):
    """The largest relative error of a parameter; the largest norm of any, and the least of their largest norms."""
    found, expected = ([np.asarray(x, np.float64) for x in jax.tree.leaves(tree)] for tree in (found, expected))
    largest = [
        np.sqrt((q**2).sum(axis=AXES[name])).max() for name, q in zip(("conv", "dense", "table"), found, strict=True)
    ]
    error = max(np.abs(q - r).max() / np.abs(r).max() for q, r in zip(found, expected, strict=True))
    return {"error": float(error), "largest norm": max(largest), "least largest norm": min(largest)}


def find_gathers(text):
    """Collectives but all-reduces, and all-reduces of more than the norms."""
    found = re.findall(
        r"= \(?(f32\[[\d,]*\]).*? (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", text
    )
    return [
        f"{op} {shape}"
        for shape, op in found
        if op != "all-reduce" or np.prod([int(n) for n in re.findall(r"\d+", shape[4:])] or [1]) > 64
    ]


def judge(found, expected, gathers, shardings=None):
    """One entry of the report per optimizer."""

    def is_kept(params):
        return all(
            q.sharding.is_equivalent_to(s, q.ndim)
            for q, s in zip(*map(jax.tree.leaves, (params, shardings)), strict=True)
        )

    return {
        name: compare(params, expected[name])
        | {"sharding kept": shardings is None or is_kept(params), "gathers": gathers}
        for name, params in found.items()
    }


def jitted(mesh, layout, expected, steps):
    """As many steps as were taken to `expected`, on parameters in that layout."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), named(SPECS[layout]))
    step, init = all_steps()
    p, g = ({name: jax.device_put(tree(0), shardings) for name in expected}, jax.device_put(tree(1), shardings))
    s = jax.jit(init)(p)
    step = jax.jit(step)
    text = step.lower(p, s, g).compile().as_text()
    for _ in range(steps):
        p, s = step(p, s, g)
    return judge(p, expected, find_gathers(text), shardings)


def mapped(mesh, layout):
    """One step inside of a shard_map."""
    step, init = all_steps(SPLIT_OVER[layout])
    plain, plain_init = all_steps()
    params = {name: tree(0) for name in optimizers(SPLIT_OVER[layout])}
    specs = {name: named(SPECS[layout]) for name in params}
    local = jax.jit(
        jax.shard_map(
            lambda p, g: step(p, init(p), g)[0], mesh=mesh, in_specs=(specs, named(SPECS[layout])), out_specs=specs
        )
    )
    every = {name: tree(0) for name in optimizers()}
    expected = jax.jit(lambda p, g: plain(p, plain_init(p), g)[0])(every, tree(1))
    text = local.lower(params, tree(1)).compile().as_text()
    return judge(local(params, tree(1)), expected, find_gathers(text))


def adaptive(mesh):
    """One step in the optimizer's own metric, which may gather."""
    tx, params, grads = projected(optax.adam(0.3), MaxNorm(C), metric="adaptive"), tree(0), tree(1)
    step = jax.jit(lambda p, g: optax.apply_updates(p, tx.update(g, tx.init(p), p)[0]))
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), named(SPECS["both"]))
    found = step(jax.device_put(params, shardings), jax.device_put(grads, shardings))
    return compare(found, step(params, grads)) | {"sharding kept": True, "gathers": []}


def main() -> None:
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(auto, auto))
    typed = jax.make_mesh((4, 2), ("a", "b"), axis_types=(explicit, explicit))
    step, init = all_steps()
    expected, steps = {name: tree(0) for name in optimizers()}, 3
    states, step = init(expected), jax.jit(step)
    for _ in range(steps):
        expected, states = step(expected, states, tree(1))
    report = {}
    for layout in SPECS:
        report |= {f"jit, {layout}, {name}": r for name, r in jitted(mesh, layout, expected, steps).items()}
        report |= {f"shard_map, {layout}, {name}": r for name, r in mapped(mesh, layout).items()}
    with jax.set_mesh(typed):
        report |= {f"explicit, {name}": r for name, r in jitted(typed, "both", expected, steps).items()}
    report["jit, adaptive"] = adaptive(mesh)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
