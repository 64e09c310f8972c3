"""The fan-in that a tree's leaf is given, against the arithmetic: which output units depend on which weights."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from projgd.optax import find_leaves

KEY = jax.random.key(0)


pytestmark = pytest.mark.usefixtures("quick_compilation")  # which weights an output depends on stays the same


def ones(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).uniform(1, 2, shape), jnp.float32)  # no 0: every weight has an effect


def initial(module: nn.Module, *args: Any) -> Any:
    return jax.tree.map(lambda p: ones(*p.shape), jax.eval_shape(module.init, KEY, *args))


def agrees(params: Any, name: str, forward: Callable[[Any], jax.Array], units: tuple[int, ...]) -> None:
    """Assert that the leaf's vectors are the neurons: `units` are the output's axes that tell neurons apart."""
    flat, treedef = jax.tree.flatten(params, is_leaf=lambda leaf: leaf is None)
    found = find_leaves(params)
    index = next(i for i, leaf in enumerate(found) if leaf is not None and leaf.name == name)

    def output(weight: jax.Array) -> jax.Array:
        return forward(treedef.unflatten([*flat[:index], weight, *flat[index + 1 :]]))

    jacobian = np.asarray(jax.jit(jax.jacobian(output))(flat[index])) != 0
    out_ndim = jacobian.ndim - flat[index].ndim
    positions = tuple(a for a in range(out_ndim) if a not in {u % out_ndim for u in units})
    depends = jacobian.any(axis=positions).reshape(-1, flat[index].size)  # (neuron, weight)
    assert (depends.sum(axis=0) == 1).all()  # every weight enters one neuron
    neuron = depends.argmax(axis=0)
    fan_in = found[index].fan_in
    assert fan_in is not None
    weight_index = np.indices(flat[index].shape)
    kept = [a for a in range(flat[index].ndim) if a - flat[index].ndim not in fan_in]
    vector = np.ravel_multi_index([weight_index[a] for a in kept], [flat[index].shape[a] for a in kept]).ravel()
    pairs = set(zip(neuron.tolist(), vector.tolist(), strict=True))
    assert len(pairs) == len(set(neuron.tolist())) == len(set(vector.tolist()))  # one to one


def free(params: Any, *names: str) -> None:
    found = {leaf.name: leaf for leaf in find_leaves(params) if leaf is not None}
    for name in names:
        assert found[name].fan_in is None, name


LINEN = {
    "Dense": (nn.Dense(5), (2, 4), (-1,)),
    "Dense square": (nn.Dense(4), (2, 4), (-1,)),
    "DenseGeneral": (nn.DenseGeneral((3, 5), axis=(-2, -1)), (2, 4, 6), (-2, -1)),
    "DenseGeneral one in": (nn.DenseGeneral((3, 5)), (2, 4), (-2, -1)),
    "DenseGeneral batch": (nn.DenseGeneral((3,), axis=(-1,), batch_dims=(0,)), (2, 4), (0, 1)),
    "Einsum heads": (nn.Einsum((4, 3, 5), "...d,dhk->...hk"), (2, 4), (-2, -1)),
    "Einsum shared head": (nn.Einsum((3, 4, 5), "nta,hab->nthb"), (2, 7, 4), (-2, -1)),
    "Einsum turned": (nn.Einsum((3, 4, 5), "nd,hdk->nkh"), (2, 4), (-2, -1)),
    "Conv": (nn.Conv(5, (3, 3)), (1, 5, 5, 4), (-1,)),
    "Conv 1d": (nn.Conv(5, (3,)), (1, 5, 4), (-1,)),
    "Conv grouped": (nn.Conv(6, (3, 3), feature_group_count=2), (1, 5, 5, 4), (-1,)),
    "Conv depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), (1, 5, 5, 4), (-1,)),
    "ConvLocal": (nn.ConvLocal(3, (3, 3), padding="VALID"), (1, 4, 4, 2), (-3, -2, -1)),
    "ConvTranspose": (nn.ConvTranspose(5, (3, 3), strides=(2, 2)), (1, 4, 4, 3), (-1,)),
    "ConvTranspose square": (nn.ConvTranspose(3, (3, 3)), (1, 4, 4, 3), (-1,)),
    "ConvTranspose transposed": (nn.ConvTranspose(5, (3, 3), transpose_kernel=True), (1, 4, 4, 3), (-1,)),
}


@pytest.mark.parametrize("case", LINEN)
def test_linen(case):
    layer, shape, units = LINEN[case]
    x = ones(*shape)
    params = initial(layer, x)["params"]
    agrees(params, "kernel", lambda p: layer.apply({"params": p}, x), units)
    free(params, "bias")


class Stack(nn.Module):
    """Three dense layers with one array of weights, as `nn.scan` makes them."""

    @nn.compact
    def __call__(self, x):
        body = lambda layer, x, _: (layer(x), None)  # noqa: E731
        scanned = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(nn.Dense(4, name="layer"), x, None)[0]


def test_linen_layers_stacked_by_scan_are_told_by_their_bias():
    params = initial(Stack(), ones(2, 4))["params"]
    assert params["layer"]["kernel"].shape == (3, 4, 4)
    kernel = next(leaf for leaf in find_leaves(params) if leaf.name == "layer/kernel")
    assert kernel.fan_in == (-2,)  # one layer's kernel is (in, out)
    free(params, "layer/bias")


class Bare(nn.Module):
    """A layer that Flax names after its class, without the bias that would tell its axes."""

    kind: str

    @nn.compact
    def __call__(self, x):
        options = {"Dense": (5,), "ConvLocal": (3, (3, 3), 1, "VALID")}
        return getattr(nn, self.kind)(*options[self.kind], use_bias=False)(x)


def test_linen_layers_told_by_their_automatic_name():
    x = ones(3, 2, 4)
    many = nn.vmap(Bare, variable_axes={"params": 0}, split_rngs={"params": True})("Dense")  # a kernel of (3, 4, 5)
    agrees(initial(many, x)["params"], "Dense_0/kernel", lambda p: many.apply({"params": p}, x), (0, -1))
    x = ones(1, 4, 4, 2)
    local = Bare("ConvLocal")
    agrees(initial(local, x)["params"], "ConvLocal_0/kernel", lambda p: local.apply({"params": p}, x), (-3, -2, -1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
def test_linen_attention(name, bias):
    layer = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=6, use_bias=bias, normalize_qk=True)
    x = ones(2, 4, 6)  # as many inputs as features: shapes alone cannot tell
    params = initial(layer, x)["params"]

    def sublayer(p):
        return layer.apply({"params": p}, x, capture_intermediates=True)[1]["intermediates"][name]["__call__"][0]

    agrees(params, f"{name}/kernel", sublayer, (-1,) if name == "out" else (-2, -1))
    free(params, "query_ln/scale", *([f"{name}/bias"] if bias else []))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.SimpleCell, nn.MGUCell])
def test_linen_cells(cell):
    layer = cell(5)
    carry = jax.tree.map(lambda c: ones(*c.shape), layer.initialize_carry(KEY, (2, 4)))
    params = initial(layer, carry, ones(2, 4))["params"]
    for gate in params:

        def preactivation(p, gate=gate):
            captured = layer.apply({"params": p}, carry, ones(2, 4), capture_intermediates=True)[1]["intermediates"]
            return captured[gate]["__call__"][0]

        agrees(params, f"{gate}/kernel", preactivation, (-1,))


def test_linen_optimized_lstm_has_the_kernels_of_lstm():
    """It computes all gates in one product, from the same parameters."""
    cells = [nn.OptimizedLSTMCell(5), nn.LSTMCell(5)]
    ours, plain = (find_leaves(cell.init(KEY, cell.initialize_carry(KEY, (2, 4)), ones(2, 4))) for cell in cells)
    assert [(leaf.name, leaf.fan_in) for leaf in ours] == [(leaf.name, leaf.fan_in) for leaf in plain]


def test_linen_conv_lstm():
    layer = nn.ConvLSTMCell(2, (3, 3))
    x = ones(1, 4, 4, 3)
    carry = jax.tree.map(lambda c: ones(*c.shape), layer.initialize_carry(KEY, x.shape))
    params = initial(layer, carry, x)["params"]
    for name in ("ih", "hh"):
        agrees(
            params,
            f"{name}/kernel",
            lambda p, name=name: layer.apply({"params": p}, carry, x, capture_intermediates=True)[1]["intermediates"][
                name
            ]["__call__"][0],
            (-1,),
        )


def test_linen_free_leaves():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
            x = nn.PReLU()(nn.LayerNorm(reduction_axes=(-2, -1), feature_axes=(-2, -1))(x))
            return nn.WeightNorm(nn.Dense(3))(nn.InstanceNorm()(x))

    variables = initial(Net(), ones(2, 3, 4))
    found = {leaf.name: leaf for leaf in find_leaves(variables)}
    assert found["params/LayerNorm_0/scale"].array.ndim == 2
    assert {name for name, leaf in found.items() if leaf.fan_in} == {
        "params/Dense_0/kernel",
        "params/Dense_1/kernel",  # under WeightNorm
    }


def test_batch_statistics_of_a_stacked_norm_are_free():
    tree = {"batch_stats": {"BatchNorm_0": {"mean": jnp.ones((3, 4)), "var": jnp.ones((3, 4))}}}
    free(tree, "batch_stats/BatchNorm_0/mean", "batch_stats/BatchNorm_0/var")


@pytest.mark.parametrize(
    ("make", "name", "lookup"),
    [
        (
            lambda: nn.Embed(7, 4).init(KEY, jnp.arange(7))["params"],
            "embedding",
            lambda p: p["embedding"][jnp.arange(7)],
        ),
        (
            lambda: nnx.state(nnx.Embed(7, 4, rngs=nnx.Rngs(0)), nnx.Param),
            "embedding",
            lambda p: jnp.take(jax.tree.leaves(p)[0], jnp.arange(7), axis=0),
        ),
        (lambda: eqx.nn.Embedding(7, 4, key=KEY), "weight", lambda m: jax.vmap(m)(jnp.arange(7))),
    ],
    ids=["linen", "nnx", "equinox"],
)
def test_an_embedding_has_one_vector_per_token(make, name, lookup):
    params = make()
    (leaf,) = (leaf for leaf in find_leaves(params) if leaf is not None)
    assert (leaf.name, leaf.fan_in) == (name, (-1,))
    (table,) = jax.tree.leaves(params)
    jacobian = jax.jacobian(lambda w: lookup(jax.tree.unflatten(jax.tree.structure(params), [w])))(table)
    depends = np.asarray(jacobian != 0).any(axis=(1, 3))  # (token, row)
    np.testing.assert_array_equal(depends, np.eye(7, dtype=bool))


NNX = {  # made in the tests: to make them all takes 20 s, which every worker would spend when it collects tests
    "Linear": (lambda: nnx.Linear(4, 5, rngs=nnx.Rngs(0)), (2, 4), (-1,)),
    "LinearGeneral": (lambda: nnx.LinearGeneral((4, 3), (5, 2), axis=(-2, -1), rngs=nnx.Rngs(0)), (2, 4, 3), (-2, -1)),
    "LinearGeneral batch": (
        lambda: nnx.LinearGeneral((4,), (5,), axis=(-1,), batch_axis={0: 2}, rngs=nnx.Rngs(0)),
        (2, 4),
        (-2, -1),
    ),
    "Einsum": (lambda: nnx.Einsum("...d,dhk->...hk", (4, 3, 5), (3, 5), rngs=nnx.Rngs(0)), (2, 4), (-2, -1)),
    "Conv": (lambda: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0)), (1, 4, 4, 4), (-1,)),
    "Conv depthwise": (lambda: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0)), (1, 4, 4, 4), (-1,)),
    "ConvTranspose": (lambda: nnx.ConvTranspose(3, 5, (3, 3), rngs=nnx.Rngs(0)), (1, 4, 4, 3), (-1,)),
    "ConvTranspose transposed": (
        lambda: nnx.ConvTranspose(3, 5, (3, 3), transpose_kernel=True, rngs=nnx.Rngs(0)),
        (1, 4, 4, 3),
        (-1,),
    ),
}
ONLY_MODULE = {  # what a State's names and shapes do not say, and a module's attributes do
    "LinearGeneral": (
        lambda: nnx.LinearGeneral((4, 3), (5, 2), axis=(-2, -1), use_bias=False, rngs=nnx.Rngs(0)),
        (2, 4, 3),
        (-2, -1),
    ),
    "Einsum": (lambda: nnx.Einsum("nta,hab->nthb", (3, 4, 5), rngs=nnx.Rngs(0)), (2, 7, 4), (-2, -1)),
    "ConvTranspose square": (
        lambda: nnx.ConvTranspose(3, 3, (3, 3), transpose_kernel=True, rngs=nnx.Rngs(0)),
        (1, 4, 4, 3),
        (-1,),
    ),
}


@pytest.mark.parametrize("case", NNX)
def test_nnx(case):
    make, shape, units = NNX[case]
    module = make()
    x = ones(*shape)
    graph, state = nnx.split(module)
    agrees(state, "kernel", lambda p: nnx.merge(graph, p)(x), units)
    free(state, "bias")
    fan_in = {leaf.name: leaf.fan_in for leaf in find_leaves(state)}
    for tree in (nnx.to_pure_dict(state), nnx.as_pure(state), module):  # the same parameters, told otherwise
        assert {leaf.name: leaf.fan_in for leaf in find_leaves(tree)} == fan_in


@pytest.mark.parametrize("case", ONLY_MODULE)
def test_nnx_module_as_the_tree(case):
    make, shape, units = ONLY_MODULE[case]
    agrees(make(), "kernel", lambda m: m(ones(*shape)), units)


@pytest.mark.parametrize("name", ["query", "key", "value", "out"])
def test_nnx_attention(name):
    module = nnx.MultiHeadAttention(num_heads=3, in_features=6, decode=False, use_bias=False, rngs=nnx.Rngs(0))
    graph, params = nnx.split(module)
    x = ones(2, 3, 2) if name == "out" else ones(2, 6)
    units = (-1,) if name == "out" else (-2, -1)
    agrees(params, f"{name}/kernel", lambda p: getattr(nnx.merge(graph, p), name)(x), units)


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_nnx_cells(cell):
    module = cell(4, 5, rngs=nnx.Rngs(0))
    graph, params = nnx.split(module, nnx.Param, ...)[:2]
    rest = nnx.split(module, nnx.Param, ...)[2]
    kernels = [leaf.name for leaf in find_leaves(params) if leaf.name.endswith("kernel")]
    assert len(kernels) >= 2
    for kernel in kernels:
        layer = kernel.split("/")[0]
        x = ones(2, getattr(module, layer).in_features)
        agrees(params, kernel, lambda p, layer=layer, x=x: getattr(nnx.merge(graph, p, rest), layer)(x), (-1,))


def test_nnx_statistics_are_free():
    batch_norm = nnx.vmap(lambda rngs: nnx.BatchNorm(4, rngs=rngs), in_axes=0)(nnx.Rngs(0).split(3))
    assert batch_norm.mean.shape == (3, 4)
    free(nnx.state(batch_norm), "mean", "var", "scale", "bias")


EQUINOX = {
    "Linear": (lambda: eqx.nn.Linear(4, 5, key=KEY), (4,), (0,)),
    "Linear square": (lambda: eqx.nn.Linear(4, 4, key=KEY), (4,), (0,)),
    "Conv": (lambda: eqx.nn.Conv2d(4, 6, 3, key=KEY), (4, 4, 4), (0,)),
    "Conv grouped": (lambda: eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY), (4, 4, 4), (0,)),
    "Conv depthwise": (lambda: eqx.nn.Conv1d(4, 8, 3, groups=4, key=KEY), (4, 6), (0,)),
    "ConvTranspose": (lambda: eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, key=KEY), (4, 4, 4), (0,)),
    "ConvTranspose grouped": (lambda: eqx.nn.ConvTranspose2d(4, 6, 3, groups=2, key=KEY), (4, 4, 4), (0,)),
}


@pytest.mark.parametrize("case", EQUINOX)
def test_equinox(case):
    make, shape, units = EQUINOX[case]
    params, static = eqx.partition(make(), eqx.is_inexact_array)
    agrees(params, "weight", lambda p: eqx.combine(p, static)(ones(*shape)), units)
    free(params, "bias")


@pytest.mark.parametrize("name", ["query_proj", "key_proj", "value_proj", "output_proj"])
def test_equinox_attention(name):
    params, static = eqx.partition(eqx.nn.MultiheadAttention(3, 6, key=KEY), eqx.is_inexact_array)
    agrees(params, f"{name}/weight", lambda p: getattr(eqx.combine(p, static), name)(ones(6)), (0,))


@pytest.mark.parametrize(("cell", "gates"), [(eqx.nn.LSTMCell, 4), (eqx.nn.GRUCell, 3)])
@pytest.mark.parametrize("name", ["weight_ih", "weight_hh"])
def test_equinox_cells(cell, gates, name):
    """The gates are not on view: each row must reach one hidden unit only, and there is a row per gate and unit."""
    module = cell(4, 5, key=KEY)
    index = [leaf.name for leaf in find_leaves(module) if leaf is not None].index(name)
    flat, treedef = jax.tree.flatten(module)
    state = (ones(5), ones(5)) if cell is eqx.nn.LSTMCell else ones(5)

    def hidden(weight):
        out = treedef.unflatten([*flat[:index], weight, *flat[index + 1 :]])(ones(4), state)
        return out[0] if isinstance(out, tuple) else out

    depends = np.asarray(jax.jacobian(hidden)(flat[index])) != 0  # (hidden, row, column)
    assert find_leaves(module)[index].fan_in == (-1,)
    assert flat[index].shape[0] == gates * 5
    assert (depends.all(axis=2) | ~depends.any(axis=2)).all()  # a row reaches a unit with all its weights or none
    assert (depends.any(axis=2).sum(axis=0) == 1).all()


def test_equinox_stacked_shared_and_own_modules():
    class Own(eqx.Module):
        weight: jax.Array
        weights: list[jax.Array]
        bias: jax.Array
        table: jax.Array
        norm: eqx.nn.LayerNorm

    stacked = eqx.filter_vmap(lambda key: eqx.nn.Conv2d(2, 3, 3, key=key))(jax.random.split(KEY, 4))
    (weight, bias) = (leaf for leaf in find_leaves(stacked) if leaf is not None)
    assert weight.array.shape == (4, 3, 2, 3, 3)
    assert (weight.fan_in, bias.fan_in) == ((-3, -2, -1), None)

    own = Own(ones(3, 4), [ones(3, 4, 2)], ones(3, 1), ones(3, 4), eqx.nn.LayerNorm((3, 4)))
    assert {leaf.name: leaf.fan_in for leaf in find_leaves(own) if leaf is not None} == {
        "weight": (-1,),
        "weights/0": (-2, -1),
        "bias": None,
        "table": (-2,),  # the tree does not say: the documented default
        "norm/weight": None,
        "norm/bias": None,
    }


def test_boxes_are_not_part_of_a_name():
    boxed = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, ("in", "out"))).init(KEY, ones(1, 2))
    assert {leaf.name: leaf.fan_in for leaf in find_leaves(boxed["params"])} == {"kernel": (-2,), "bias": None}
