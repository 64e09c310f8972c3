"""Sets over several arrays as the last transformation of a chain, and in `apply_updates`."""

import math
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from projgd import MaxNorm, ProductMaxNorm, QKClip, TreeBall
from projgd.optax import apply_updates, joint_projection, project_jointly, projection
from tests.contract import NUMPY, TIGHT, bits

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("q/lora_a", "q/lora_b")


def pair(dtype="float32", size=1.0, seed=0, shapes=((9, 3), (3, 7))):
    rng = np.random.default_rng(seed)
    a, b = (jnp.asarray((size * rng.standard_normal(s)).astype(NUMPY[dtype])) for s in shapes)
    return {"q": {"lora_a": a, "lora_b": b}}


def wide(tree):
    return [np.asarray(x, np.float64).astype(np.longdouble) for x in jax.tree.leaves(tree)]


def product_norm(params, scale=1.0):
    a, b = wide(params)
    return scale * np.sqrt(((a @ b) ** 2).sum())


def norm_of(params):
    return np.sqrt(sum((x**2).sum() for x in wide(params)))


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all((bits(np.asarray(x)) == bits(np.asarray(y))).all() for x, y in pairs)


def taker(joint, how, jitted):
    """A function that takes a step with an update: through the chain, or by `apply_updates`."""
    tx = joint_projection(joint)

    def take(params, updates):
        if how == "apply_updates":
            return apply_updates(params, updates, joint=joint)
        moved, _ = tx.update(updates, tx.init(params), params)
        return optax.apply_updates(params, moved)

    return jax.jit(take) if jitted else take


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("how", ["chain", "apply_updates"])
@pytest.mark.parametrize("dtype", NUMPY)
def test_a_product_is_held(dtype, how, jitted, request):
    if jitted:
        request.getfixturevalue("full_compilation")
    joint = [ProductMaxNorm(1.5, scale=2.0).over(*NAMES), TreeBall(3.0)]
    with jax.enable_x64(dtype == "float64"):
        take = taker(joint, how, jitted)
        params, updates = pair(dtype, 0.1), pair(dtype, seed=1)
        moved = take(params, updates)
        assert product_norm(moved, 2.0) <= 1.5
        assert norm_of(moved) <= 3.0
        plain = [x + y for x, y in zip(wide(params), wide(updates), strict=True)]
        factor = np.sqrt(1.5 / (2.0 * np.sqrt(((plain[0] @ plain[1]) ** 2).sum())))
        factor = min(factor, 3.0 / np.sqrt(sum((x**2).sum() for x in plain)))
        for x, y in zip(plain, wide(moved), strict=True):
            np.testing.assert_allclose(
                np.float64(y), np.float64(x * factor), rtol=4 * TIGHT[dtype], atol=4 * TIGHT[dtype]
            )
        still = take(moved, jax.tree.map(jnp.zeros_like, moved))
        assert same(still, moved)


@st.composite
def steps(draw):
    """Parameters and an update, of sizes from tiny to huge, eager."""
    dtype = draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    shapes = draw(st.sampled_from([((1, 1), (1, 1)), ((4, 2), (2, 3))]))  # JAX compiles for every shape
    most = 2 if dtype == "float16" else 12
    sizes = [10.0 ** draw(st.floats(-most, most)) for _ in range(2)]
    return [pair(dtype, size, draw(st.integers(0, 99)), shapes) for size in sizes]


@given(steps(), st.floats(-1, 1))
@settings(max_examples=30, deadline=None)
def test_a_product_is_held_through_the_chain_from_anywhere(step, exponent):
    """A first step from far outside, too, where p + u cannot reach every number."""
    made = ProductMaxNorm(10.0**exponent)
    moved = taker([made.over(*NAMES)], "chain", False)(*step)
    assert product_norm(moved) <= made.c


def test_what_an_update_cannot_reach_is_measured_too():
    """From 1e4 an update reaches numbers near 1 to 5e-4 only, and B A is a small difference of large products."""
    for seed in range(8):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((6, 2)), rng.standard_normal((2, 6))
        a[:, 1], b[1] = a[:, 0], -b[0] * 1.01
        params = pair("float32", 1e4, seed, ((6, 2), (2, 6)))
        wanted = {"q": {"lora_a": jnp.asarray(a, jnp.float32), "lora_b": jnp.asarray(b, jnp.float32)}}
        updates = jax.tree.map(lambda q, p: q - p, wanted, params)
        made = ProductMaxNorm(0.9 * float(product_norm(jax.tree.map(lambda p, u: p + u, params, updates))))
        moved = taker([made.over(*NAMES)], "chain", False)(params, updates)
        assert product_norm(moved) <= made.c


def test_where_it_holds_the_chain_is_the_plain_optimizers():
    params, joint = pair(), [ProductMaxNorm(1e3).over(*NAMES), TreeBall(1e3)]
    plain, tx = optax.adam(0.1), optax.chain(optax.adam(0.1), joint_projection(joint))
    wanted, _ = plain.update(params, plain.init(params), params)
    updates, _ = tx.update(params, tx.init(params), params)
    assert same(updates, wanted)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_and_zero_factors_stay(broken):
    params = pair()
    params["q"]["lora_a"] = params["q"]["lora_a"].at[0, 0].set(broken)
    joint = [ProductMaxNorm(0.1).over(*NAMES), TreeBall(0.1)]
    assert same(apply_updates(params, jax.tree.map(jnp.zeros_like, params), joint=joint), params)
    params = pair()
    params["q"]["lora_b"] = jnp.zeros_like(params["q"]["lora_b"])
    assert same(project_jointly(params, joint[:1]), params)


def test_joint_sets_come_after_the_others():
    params = pair(size=5.0)
    tx = optax.chain(optax.sgd(0.1), projection(MaxNorm(1.0)), joint_projection([ProductMaxNorm(0.5).over(*NAMES)]))
    updates, _ = tx.update(params, tx.init(params), params)
    one = optax.apply_updates(params, updates)
    two = apply_updates(params, jax.tree.map(lambda p: -0.1 * p, params), MaxNorm(1.0), joint=[TreeBall(0.5)])
    assert product_norm(one) <= 0.5
    assert all(np.linalg.norm(np.float64(x), axis=0).max() <= 1.0 for x in jax.tree.leaves(one))
    assert 0.5 * (1 - 1e-5) <= norm_of(two) <= 0.5


# ------------------------------------------------------------------------------------------------ schedules, vmap, scan


def test_c_may_be_a_schedule():
    params = pair()
    tx = joint_projection(lambda step: [ProductMaxNorm(1.0 + step).over(*NAMES)])
    state, norms = tx.init(params), []
    for _ in range(2):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        norms.append(float(product_norm(optax.apply_updates(params, updates))))
    assert norms == pytest.approx([1.0, 2.0], rel=1e-5)
    assert int(state.count) == 2
    assert joint_projection([TreeBall(1.0)]).init(params) == optax.EmptyState()


def test_c_may_be_traced():
    params = pair(size=3.0)

    def norms(c):
        moved = project_jointly(params, [ProductMaxNorm(c).over(*NAMES), TreeBall(c)])
        return jnp.stack([jnp.linalg.norm(moved["q"]["lora_a"] @ moved["q"]["lora_b"]), optax.tree.norm(moved)])

    found = jax.jit(jax.vmap(norms))(jnp.asarray([1.0, 2.0, -1.0]))
    np.testing.assert_allclose(found[:2, 1], [1.0, 2.0], rtol=1e-5)
    assert (found[:2, 0] <= jnp.asarray([1.0, 2.0]) * (1 + 1e-6)).all()
    assert jnp.isnan(found[2]).all()  # a bound that cannot be held must show


@pytest.mark.usefixtures("full_compilation")
def test_inside_a_scan():
    params, joint = pair(size=0.1), [ProductMaxNorm(0.7).over(*NAMES)]
    tx = optax.chain(optax.adam(0.3), joint_projection(joint))

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(lambda p: -p, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (moved, _), _ = jax.jit(lambda c: jax.lax.scan(body, c, None, length=5))((params, tx.init(params)))
    assert 0.7 * (1 - 1e-5) <= product_norm(moved) <= 0.7


def test_a_derivative_passes():
    params = pair()

    def loss(params):
        moved = project_jointly(params, [ProductMaxNorm(0.5).over(*NAMES)])
        return sum(x.sum() for x in jax.tree.leaves(moved))

    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


# --------------------------------------------------------------------------------------------------------------- QKClip


def attention(heads=4, k_heads=2, own_axis=False):
    rng = np.random.default_rng(0)
    shapes = [(6, n, 3) if own_axis else (6, 3 * n) for n in (heads, k_heads)]
    return {
        name: {"kernel": jnp.asarray(rng.standard_normal(s), jnp.float32)} for name, s in zip("qk", shapes, strict=True)
    }


@pytest.mark.parametrize("own_axis", [False, True])
@pytest.mark.parametrize("jitted", [False, True])
def test_heads_above_tau_are_scaled(jitted, own_axis):
    params, logits = attention(own_axis=own_axis), jnp.asarray([100.0, 400.0, 50.0, 20.0])
    tx = optax.chain(
        optax.sgd(0.0), joint_projection([QKClip(50.0, 0.25, heads=4, k_heads=2).over("q/kernel", "k/kernel")])
    )
    update = jax.jit(tx.update) if jitted else tx.update
    updates, _ = update(params, tx.init(params), params, max_logits={"q/kernel": logits})
    moved = optax.apply_updates(params, updates)
    for name, share, factors in (("q", 0.25, [0.5, 0.125, 1, 1]), ("k", 0.75, [0.125, 1])):
        factor = np.repeat(np.asarray(factors) ** share, 3)
        x = np.asarray(params[name]["kernel"], np.float64)
        wanted = (x.reshape(6, -1) * factor).reshape(x.shape)
        np.testing.assert_allclose(moved[name]["kernel"], wanted, rtol=1e-6)  # p + u is rounded as p is
    still = apply_updates(
        moved,
        jax.tree.map(jnp.zeros_like, moved),
        joint=[QKClip(500.0, heads=4, k_heads=2).over("q/kernel", "k/kernel")],
        max_logits=logits,
    )
    assert same(still, moved)


@pytest.mark.parametrize(
    ("logits", "match"),
    [
        (None, "max_logits has logits for nothing: pass {W_q: largest logit of every head} for q/kernel"),
        ({"k/kernel": jnp.ones(4)}, "max_logits has logits for k/kernel: pass"),
        (jnp.ones((1, 4)), r"logits for q/kernel have shape \(1, 4\): pass .* of shape \(4,\)"),
    ],
)
def test_logits_that_do_not_fit(logits, match):
    params = attention()
    tx = joint_projection([QKClip(50.0, heads=4, k_heads=2).over("q/kernel", "k/kernel")])
    with pytest.raises(ValueError, match=match):
        tx.update(params, tx.init(params), params, max_logits=logits)


# ----------------------------------------------------------------------------------------------------- trees, shardings


def test_a_lora_layer_of_nnx():
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    lora = nnx.LoRA(6, 2, 5, base_module=model, rngs=nnx.Rngs(1))
    lora.lora_b.set_value(jnp.full((2, 5), 3.0))
    params = nnx.state(lora, nnx.LoRAParam)
    moved = project_jointly(params, [ProductMaxNorm(0.5).over("lora_a", "lora_b")])
    assert 0.5 * (1 - 1e-5) <= product_norm(moved) <= 0.5


def test_an_equinox_module_is_read_as_out_in():
    class Pair(eqx.Module):
        a: eqx.nn.Linear
        b: eqx.nn.Linear

        def __init__(self):
            self.a = eqx.nn.Linear(6, 2, use_bias=False, key=jax.random.key(0))
            self.b = eqx.nn.Linear(2, 5, use_bias=False, key=jax.random.key(1))

    moved = project_jointly(Pair(), [ProductMaxNorm(0.1).over("a/weight", "b/weight")])
    norm = np.linalg.norm(np.float64(moved.b.weight) @ np.float64(moved.a.weight))
    assert 0.1 * (1 - 1e-5) <= norm <= 0.1


def test_a_ball_leaves_integers_and_masked_leaves_alone():
    params = {"step": jnp.asarray(7), "w": jnp.full(3, 5.0), "frozen": jnp.full(2, 9.0)}
    updates = {"step": jnp.asarray(0), "w": jnp.zeros(3), "frozen": optax.MaskedNode()}
    tx = joint_projection([TreeBall(1.0).over("w")])
    moved, _ = tx.update(updates, tx.init(params), params)
    assert isinstance(moved["frozen"], optax.MaskedNode)
    assert int(moved["step"]) == 0
    assert 1 - 1e-5 <= np.linalg.norm(np.float64(params["w"] + moved["w"])) <= 1.0
    both = project_jointly({k: params[k] for k in ("step", "w")}, [TreeBall(1.0)])
    assert int(both["step"]) == 7


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from projgd import ProductMaxNorm, TreeBall
from projgd.optax import apply_updates
mesh = Mesh(np.asarray(jax.devices()).reshape(4), ("x",))
rng = np.random.default_rng(0)
host = {"a": rng.standard_normal((8, 4)).astype(np.float32), "b": rng.standard_normal((4, 8)).astype(np.float32)}
spread = {k: jax.device_put(v, NamedSharding(mesh, P("x", None))) for k, v in host.items()}
joint = [ProductMaxNorm(1.0).over("a", "b"), TreeBall(1.2)]
step = jax.jit(lambda p: apply_updates(p, jax.tree.map(jnp.zeros_like, p), joint=joint))
q = step(spread)
print({k: str(v.sharding.spec) for k, v in q.items()})
alone = step(host)
for k in q:
    np.testing.assert_allclose(np.asarray(q[k]), np.asarray(alone[k]), rtol=1e-6)
assert np.linalg.norm(np.float64(q["a"]) @ np.float64(q["b"])) <= 1.0
assert np.sqrt(sum((np.float64(v) ** 2).sum() for v in q.values())) <= 1.2
"""


def test_sharded_arrays_under_jit():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("joint", "error", "match"),
    [
        (
            [ProductMaxNorm(1.0).over("q/lora_a", "q/lora_c")],
            ValueError,
            "'q/lora_c', which no parameter is called: did you",
        ),
        ([ProductMaxNorm(1.0).over("q/lora_b", "q/lora_a")], ValueError, "q/lora_b of shape .*ranks 7 and 9 differ"),
        ([ProductMaxNorm(1.0).over("q/lora_a")], ValueError, "over 1 tensors: pass two"),
        ([MaxNorm(1.0)], TypeError, "joint= has MaxNorm"),
        (TreeBall(1.0), TypeError, "is not a list"),
        ([TreeBall(1.0).over("v/*")], ValueError, "no parameter is called"),
    ],
)
def test_bad_input(joint, error, match):
    with pytest.raises(error, match=match):
        joint_projection(joint).init(pair())
    with pytest.raises(error, match=match):
        apply_updates(pair(), pair(), joint=joint)


def test_missing_parameters():
    tx = joint_projection([TreeBall(1.0)])
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(pair(), tx.init(pair()))
