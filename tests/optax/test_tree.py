"""Which constraint each leaf of a tree has, and over which axes: names, plain trees, rules, and what is refused.

The layouts of Flax and Equinox are in `tests/integration/test_jax_layouts.py`.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from projgd import MaxNorm, MinMaxNorm, NonNegative, Sphere, Split, Stacked, UnitNorm
from projgd.optax import find_leaves, hyperball, maxnorm_projection, project, projection
from projgd.optax.tree import resolve

pytestmark = pytest.mark.usefixtures("quick_compilation")


def ones(*shape):
    return jnp.ones(shape)


def fan_ins(tree):
    return {leaf.name: leaf.fan_in for leaf in find_leaves(tree) if leaf}


PARAMS = {
    "conv": {"kernel": ones(3, 3, 2, 4), "bias": ones(4)},
    "dense": {"kernel": ones(6, 5), "bias": None},
}


def test_plain_dicts():
    tree = {
        "w": ones(3, 4),
        "kernel": ones(3, 3, 2, 4),
        "three": ones(2, 3, 4),
        "layer": {"w": ones(4, 3), "b": ones(3)},
        "torch": {"weight": ones(5, 2), "bias": ones(5)},
        "bias": ones(2, 2),
        "none": None,
        "number": 1.0,
    }
    assert fan_ins(tree) == {
        "w": (-2,),
        "kernel": (-4, -3, -2),
        "three": (-3, -2),
        "layer/w": (-2,),
        "layer/b": None,
        "torch/weight": (-1,),
        "torch/bias": None,
        "bias": None,
        "number": None,
    }


def test_names_of_flax_in_plain_dicts():
    """Saved parameters have no modules: embeddings, attention, automatic names and statistics are told by names."""
    heads = {name: {"kernel": ones(6, 3, 2)} for name in ("query", "key", "value")} | {"out": {"kernel": ones(3, 2, 6)}}
    tree = {
        "attention": heads,
        "embed": {"embedding": ones(9, 4)},
        "batch_stats": {"mean": ones(3, 4)},
        "Dense_0": {"kernel": ones(3, 4, 5)},
        "no": {"query": {"kernel": ones(6, 3, 2)}},
        "norm": {"scale": ones(3, 4)},
    }
    found = fan_ins({"params": tree})
    assert {found[f"params/attention/{name}/kernel"] for name in ("query", "key", "value")} == {(-3,)}
    assert found["params/attention/out/kernel"] == (-3, -2)
    assert found["params/embed/embedding"] == (-1,)
    assert found["params/Dense_0/kernel"] == (-2,)
    assert found["params/no/query/kernel"] == (-3, -2)  # a query alone is no attention
    assert found["params/norm/scale"] is None
    assert fan_ins(tree)["batch_stats/mean"] is None


def test_a_node_of_an_unknown_kind():
    @jax.tree_util.register_pytree_node_class
    class Box:
        def __init__(self, inside):
            self.inside = inside

        def tree_flatten(self):
            return (self.inside,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    (leaf,) = find_leaves({"box": Box({"kernel": ones(3, 4)})})
    assert leaf.fan_in == (-2,)


# ------------------------------------------------------------------------------------------------------ stacked layers


@nnx.vmap(in_axes=0, out_axes=0)
def stacked_linear(key):
    return nnx.Linear(5, 3, use_bias=False, rngs=nnx.Rngs(key))


def scanned():
    """Four dense layers in a `nn.scan`, without biases, whose partition names tell of it."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dense(3, use_bias=False, name="proj", kernel_init=kernel)(x), None

    rules = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": 4}
    layers = nn.scan(Block, **rules, metadata_params={nn.PARTITION_NAME: "layers"})
    return layers().init(jax.random.key(0), ones(2, 3), None)["params"]


@pytest.mark.parametrize("make", [lambda: stacked_linear(jax.random.split(jax.random.key(0), 4)), scanned])
def test_layers_that_are_known_to_be_stacked_are_read_one_by_one(make):
    params = jax.tree.map(lambda p: 10 * p, make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (kernel,) = jax.tree.leaves(project(params, MaxNorm(1.0)))
        (matrix,) = jax.tree.leaves(project(params, MaxNorm(1.0, axis="matrix")))
    np.testing.assert_allclose(jnp.linalg.norm(kernel, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(matrix, axis=(1, 2)), 1, rtol=1e-5)


def test_a_stack_that_nothing_tells_of_is_noticed_and_can_be_said():
    params = {"blocks": {"w": 10 * ones(4, 5, 3)}}
    with pytest.warns(
        UserWarning, match=r"blocks/w has shape \(4, 5, 3\), .* axes \(0, 1\) entering .* axis=Stacked\(\)"
    ):
        project(params, MaxNorm(1.0))
    with pytest.warns(UserWarning, match=r'read as one matrix.* axis=Stacked\("matrix"\)'):
        hyperball(optax.sgd(1.0), 0.1).init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        each = project(params, MaxNorm(1.0, axis=Stacked()))["blocks"]["w"]
        matrices = project(params, MaxNorm(1.0, axis=Stacked("matrix")))["blocks"]["w"]
        together = project(params, MaxNorm(1.0, axis=None))["blocks"]["w"]
        convolutions = {"conv": {"kernel": 10 * ones(4, 3, 3, 5, 2)}}  # four of them; the name says no more than that
        held = project(convolutions, MaxNorm(1.0, axis=Stacked()))["conv"]["kernel"]
        np.testing.assert_allclose(jnp.linalg.norm(held.reshape(4, -1, 2), axis=1), 1, rtol=1e-5)
        project({"conv1": {"w": ones(4, 5, 3)}, "Conv_0": {"kernel": ones(3, 3, 5, 3)}}, MaxNorm(1.0))
        radii = hyperball(optax.sgd(1.0), 0.1, axis=Stacked("matrix")).init(params)[-1].initial["blocks"]["w"]
    np.testing.assert_allclose(jnp.linalg.norm(each, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(matrices, axis=(1, 2)), 1, rtol=1e-5)
    assert float(jnp.linalg.norm(together)) == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(radii, np.full((4, 1, 1), 10 * 15**0.5), rtol=1e-5)


def test_a_constraint_that_holds_nothing_is_noticed():
    with pytest.warns(UserWarning, match="holds nothing: no parameter has a vector for it, such as 'a'"):
        maxnorm_projection(1.0).init({"a": ones(3), "b": ones(2)})


def bounds(constraints, params=PARAMS):
    """The bound of every constrained leaf, by name."""
    return {leaf.name: (leaf.constraint.c, leaf.vectors.axes) for leaf in resolve(constraints, params) if leaf}


def test_rules_and_trees():
    conv, dense = "conv/kernel", "dense/kernel"
    assert bounds({"con*/kernel": MaxNorm(3.0)}) == {conv: (3, (0, 1, 2))}
    assert bounds({"dense/*": None, "*": MaxNorm(3.0)}) == {conv: (3, (0, 1, 2))}  # the first match wins
    assert bounds({"conv": None, "dense": MaxNorm(2.0)}) == {dense: (2, (0,))}  # the upper part of the tree
    mixed = {"conv": {"kernel": MaxNorm(1.0), "bias": None}, "dense": MaxNorm(2.0)}
    assert bounds(mixed) == {conv: (1, (0, 1, 2)), dense: (2, (0,))}
    assert bounds({"*/kernel": MaxNorm(2.0, axis=-1)}) == {conv: (2, (3,)), dense: (2, (1,))}
    assert bounds(MaxNorm(2.0)) == {conv: (2, (0, 1, 2)), dense: (2, (0,))}
    assert bounds({"kernel": MaxNorm(2.0)}, {"kernel": ones(2, 2)}) == {"kernel": (2, (0,))}
    whole = jax.jit(lambda p: project(p, MaxNorm(2.0, axis=None)))(PARAMS)
    assert [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(whole)] == pytest.approx([2, 2, 2], rel=1e-5)


@pytest.mark.parametrize(
    "axis", [{"conv": {"kernel": (0, 1, 2), "bias": "fan_in"}, "dense": 0}, {"conv": "fan_in", "dense": 0}]
)
def test_a_tree_of_axes(axis):
    @jax.jit
    def step(p):
        tx = maxnorm_projection(0.5, axis)
        return tx.update(p, tx.init(p), p)[0], project(jax.tree.map(lambda p: 2 * p, p), MaxNorm(0.5))

    updates, wanted = step(PARAMS)
    jax.tree.map(lambda u, q, p: np.testing.assert_allclose(p + u, q, rtol=1e-6), updates, wanted, PARAMS)


@pytest.mark.parametrize(
    ("tx", "error", "message"),
    [
        (maxnorm_projection(1.0, axis=3), ValueError, "axis 3 is out of range for .*(bias|kernel) with shape"),
        (maxnorm_projection(1.0, axis={"conv": 0}), ValueError, "dense"),
        (maxnorm_projection(1.0, axis={"conv": 0, "dense": {"kernel": 0}}), ValueError, "bias"),
        (maxnorm_projection(1.0, axis={"conv": 0, "dense": {"kernel": 5, "bias": 0}}), ValueError, "dense/kernel"),
        (optax.masked(maxnorm_projection(1.0), {"conv": True}), ValueError, "dense"),
        (projection({"conv/kernle": MaxNorm(1.0)}), ValueError, "conv/kernel"),
        (projection({"conv/*": MaxNorm(1.0), "conv/kernel": None}), ValueError, "'conv/kernel' has no effect"),
        (
            projection({"conv/bias": MaxNorm(1.0)}),
            ValueError,
            "'conv/bias' applies only to parameters without a fan-in",
        ),
    ],
)
@pytest.mark.parametrize("traced", [False, True])
def test_what_does_not_fit_the_parameters_is_refused_at_init(tx, error, message, traced):
    init = jax.jit(tx.init) if traced else tx.init
    with pytest.raises(error, match=message):
        init(PARAMS)


def test_leaves_that_cannot_be_constrained_are_named():
    for dtype, name in ((int, "int32"), (complex, "complex64")):
        with pytest.raises(TypeError, match=f"table/ids has dtype {name}"):
            maxnorm_projection(1.0).init({"table": {"ids": jnp.ones((3, 2), dtype)}})
    with pytest.raises(ValueError, match=r"one bare array .*chain\(flatten\(inner\), projection"):
        optax.flatten(optax.chain(optax.adam(0.1), maxnorm_projection(1.0))).init(PARAMS)


def test_split_over_takes_norms_that_are_known_at_the_start():
    params, over = {"a": {"kernel": ones(4, 2)}}, {"a/*": "rows"}
    for constraint in (Sphere("initial"), MaxNorm(1.0, axis=Split(dim=1, parts=2, over=(0, 2)))):
        with pytest.raises(ValueError, match=r"a/kernel: .* With jit and NamedSharding it can, without split_over"):
            projection(constraint, over).init(params)
    for constraint in (MaxNorm(1.0), UnitNorm(), Sphere(2.0), MinMaxNorm(1.0, 2.0)):
        (leaf,) = resolve(constraint, params, over)
        assert leaf.over == ("rows",)
    (leaf,) = resolve(NonNegative(), params, over)
    assert leaf.over == ()  # entries on their own need nothing from other devices
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, half = jax.sharding.PartitionSpec("rows"), {"a": {"kernel": jnp.ones((4, 2), jnp.float16)}}
    tx = projection(MaxNorm(1e-6), over)  # where float16 is coarse, entries are rounded one by one
    step = jax.shard_map(lambda p: tx.update(p, tx.init(p), p)[0], mesh=mesh, in_specs=(spec,), out_specs=spec)
    with pytest.raises(ValueError, match="cannot be split over devices in a shard_map"):
        jax.jit(step)(half)
