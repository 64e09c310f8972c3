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
from tests.sets import SETS, SHAPE

xla.LARGE = 0  # these weights too take turns
C = 0.9
STEPS = 3
SHAPES = {"dense": (128, 64), "conv": (3, 3, 40, 16), "table": (64, 24)}
AXES = {"dense": 0, "conv": (0, 1, 2), "table": 1}
SPECS = {  # split by inputs, by outputs, by both; one axis by two
    "first": {"dense": P("a"), "conv": P(None, None, None, "b"), "table": P("a", "b")},
    "second": {"dense": P("a", "b"), "conv": P(None, None, ("a", "b")), "table": P(None, ("a", "b"))},
}
SPLIT_OVER = {
    "first": {"dense/*": "a", "embed/*": "b"},
    "second": {"dense/*": "a", "*/kernel": ("a", "b"), "embed/*": ("a", "b")},
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


def train(params, grads, split_over=None, steps=1):
    """Take steps with every optimizer, from its own copy of the parameters."""
    made = optimizers(split_over)

    def step(carry, _):
        params, states = {}, {}
        for name, tx in made.items():
            p, state = carry[0][name], carry[1][name]
            updates, states[name] = tx.update(grads, state, p)
            ours = name == "apply_updates"
            params[name] = (
                apply_updates(p, updates, MaxNorm(C), split_over) if ours else optax.apply_updates(p, updates)
            )
        return (params, states), None

    carry = params, {name: tx.init(params[name]) for name, tx in made.items()}
    return (step(carry, None) if steps == 1 else jax.lax.scan(step, carry, length=steps))[0][0]


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


def jitted(mesh, layout, expected):
    """Steps on parameters in that layout."""
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), named(SPECS[layout]))
    p, g = ({name: jax.device_put(tree(0), shardings) for name in expected}, jax.device_put(tree(1), shardings))
    compiled = jax.jit(lambda p, g: train(p, g, steps=STEPS)).lower(p, g).compile()
    return judge(compiled(p, g), expected, find_gathers(compiled.as_text()), shardings)


def mapped(mesh, layout, expected):
    """One step inside of a shard_map."""
    over = SPLIT_OVER[layout]
    params = {name: tree(0) for name in optimizers(over)}
    specs = {name: named(SPECS[layout]) for name in params}
    local = jax.shard_map(
        lambda p, g: train(p, g, over), mesh=mesh, in_specs=(specs, named(SPECS[layout])), out_specs=specs
    )
    compiled = jax.jit(local).lower(params, tree(1)).compile()
    return judge(compiled(params, tree(1)), expected, find_gathers(compiled.as_text()))


def adaptive(mesh):
    """One step in the optimizer's own metric, which may gather."""
    tx, w, g = projected(optax.adam(0.3), MaxNorm(C), metric="adaptive"), tree(0)["dense"], tree(1)["dense"]
    step = jax.jit(lambda p, g: optax.apply_updates(p, tx.update(g, tx.init(p), p)[0]))
    found = step(*jax.device_put((w, g), NamedSharding(mesh, P("a", "b"))))["kernel"]
    expected = step(w, g)["kernel"]
    return {"error": float(abs(found - expected).max() / abs(expected).max()), "sharding kept": True, "gathers": []}


def every_set(mesh):
    """One step with every set of the table, whose vectors are whole: the rows are split over all devices.

    Returns:
        By name of the set, how far the result is from that of unsharded weights, whether its sharding is kept, and what
        all sets together gather.
    """
    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.standard_normal((8 * SHAPE[0], *SHAPE[1:])), jnp.float32) for _ in range(2))
    sets = {name: case.make() for name, case in SETS.items() if name not in OTHER_ROWS}
    tx = optax.chain(optax.sgd(0.5), projection(sets))

    @jax.jit
    def train(p, g):
        updates, state = tx.update(dict.fromkeys(p, g), tx.init(p), p)
        return optax.apply_updates(p, updates), state

    rows = NamedSharding(mesh, P(("a", "b")))
    wanted, _ = train(dict.fromkeys(sets, w), g)
    split = dict.fromkeys(sets, jax.device_put(w, rows)), jax.device_put(g, rows)
    compiled = train.lower(*split).compile()
    found, state = compiled(*split)
    taken, gathers = state[1].initial, find_gathers(compiled.as_text())
    return {
        f"sets, {name}": {
            "error": float(abs(q - wanted[name]).max()),
            "sharding kept": q.sharding.is_equivalent_to(rows, q.ndim)
            and (taken[name] is None or taken[name].sharding.is_equivalent_to(rows, taken[name].ndim)),
            "gathers": gathers,
        }
        for name, q in found.items()
    }


OTHER_ROWS = {"box of arrays", "intersection along two axes"}
"""These have numbers for each of the rows of the table."""


def main() -> None:
    auto, explicit = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(auto, auto))
    typed = jax.make_mesh((4, 2), ("a", "b"), axis_types=(explicit, explicit))
    params = {name: tree(0) for name in optimizers()}
    one, several = jax.jit(lambda p, g: (train(p, g), train(p, g, steps=STEPS)))(params, tree(1))
    report = {}
    for layout in SPECS:
        report |= {f"jit, {layout}, {name}": found for name, found in jitted(mesh, layout, several).items()}
        report |= {f"shard_map, {layout}, {name}": found for name, found in mapped(mesh, layout, one).items()}
    with jax.set_mesh(typed):
        report |= {f"explicit, {name}": found for name, found in jitted(typed, "first", several).items()}
    report["jit, adaptive"] = adaptive(mesh)
    report |= every_set(mesh)
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
