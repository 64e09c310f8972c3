"""Every set of `tests.sets` with optax: steps that end in it, loops, populations, state, derivatives, moving bounds.

All sets are leaves of one tree, so that one program tries them all.
"""

import functools
import json
import math
import operator
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax
import pytest
from flax import nnx, serialization

from projgd import (
    AffineSet,
    Around,
    Box,
    BoxSection,
    GroupL1Ball,
    HalfSpace,
    Hyperplane,
    Intersection,
    L1Ball,
    L1Sphere,
    MaxNorm,
    NonNegative,
    Simplex,
    SparseSimplex,
    Sphere,
    TopK,
    WeightClip,
    from_config,
    report,
)
from projgd.axes import resolve
from projgd.entries import EntrySet
from projgd.optax import apply_updates, projection
from projgd.sums import FLOATS
from tests.contract import NUMPY
from tests.sets import SETS, SHAPE, bound, start

pytestmark = pytest.mark.usefixtures("quick_compilation")

EVERY = pytest.mark.parametrize("name", SETS)
MADE = {name: case.make() for name, case in SETS.items()}
AXES = {name: resolve(set_.axis, SHAPE, "out_last").axes for name, set_ in MADE.items()}
SLOW = {"intersection along two axes"}
"""From far away, Dykstra's algorithm takes very many sweeps."""


def slack(name, dtype):
    """How far from the nearest point a result may be, relative to the largest entry."""
    return max(4 * float(FLOATS[dtype].unit), 1e-4 if isinstance(MADE[name], Intersection) else 1e-6)


def wide(x):
    return np.asarray(x).astype(np.float64)


# ---------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Form:
    """How weights are trained: dtype, inner optimizer, learning rates of a population, and what adds the updates.

    Attributes:
        dtype: of the weights.
        inner: makes an optimizer from a learning rate.
        rates: a learning rate for each member of a population; one is not mapped.
        adds: `optax.apply_updates` after a chain, ours, or both.
        is_full: whether XLA optimizes as for users. That takes long, so it tries the sets of entries and what is
            held around the start, whose arithmetic is not in `test_rounding.py`.
    """

    dtype: str
    inner: Callable[..., optax.GradientTransformation]
    rates: tuple[float, ...]
    adds: tuple[str, ...] = ("chain", "ours")
    is_full: bool = False


FORMS = {
    "float32": Form("float32", optax.adam, (0.02,), ("chain",), is_full=True),
    "float32, population": Form("float32", optax.sgd, (0.02, 5.0), ("chain",)),
    "bfloat16": Form("bfloat16", optax.sgd, (0.5,), ("chain",)),
    "float16": Form("float16", optax.sgd, (5.0,)),
}
LARGE = {name for name in SETS if "intersection" in name or "section" in name}
QUICK = {name for name, set_ in MADE.items() if isinstance(set_, (EntrySet, Around))}
CASES = [(form, name) for form in FORMS for name in SETS if name in QUICK or not FORMS[form].is_full]
STEPS, FAR = 6, 4
"""The step number `FAR` begins far away, as where other weights are loaded."""


def train(form, sets, p, grads, shifts, rate):
    """Return the weights before each step, the inner updates, and the weights after it by what adds the updates.

    Args:
        form: the form.
        sets: the sets by name.
        p: the initial weights by name.
        grads: for each step.
        shifts: what is added to the weights before each step.
        rate: the learning rate.
    """
    plain = form.inner(rate)
    tx = optax.chain(plain, projection(sets))

    def step(carry, given):
        (p, state), (g, shift) = carry, given
        grads = {name: g / 16 if name in SLOW else g for name in p}
        p = {name: x if name in SLOW else x + shift for name, x in p.items()}
        direct, _ = plain.update(grads, state[0], p)
        after = {}
        if "ours" in form.adds:
            taken = {name: None if state[1].initial is None else state[1].initial[name] for name in p}
            held = {name: set_ if taken[name] is None else set_.bind(taken[name]) for name, set_ in sets.items()}
            after["ours"] = apply_updates(p, direct, held)
            state = (plain.update(grads, state[0], p)[1], state[1])
        if "chain" in form.adds:
            updates, state = tx.update(grads, state, p)
            after["chain"] = optax.apply_updates(p, updates)
        return (after[form.adds[0]], state), (p, direct, after)

    return jax.lax.scan(step, (p, tx.init(p)), (grads, shifts))[1]


@functools.cache
def trained(name):
    """Return by member of a population: the initial weights, and what `train` returned, as arrays of NumPy."""
    form = FORMS[name]
    rng, n = np.random.default_rng(7), len(form.rates)
    p, grads = np.stack([start(seed=seed) for seed in range(n)]), rng.standard_normal((n, STEPS, *SHAPE))
    shifts = np.zeros_like(grads)
    shifts[:, FAR] = rng.standard_normal(SHAPE) * 1e3
    first, grads, shifts, rates = (jnp.asarray(x, form.dtype) for x in (p, grads, shifts, form.rates))
    sets = {key: set_ for key, set_ in MADE.items() if (name, key) in CASES}
    given, run = (dict.fromkeys(sets, first), grads, shifts, rates), functools.partial(train, form, sets)
    if n > 1:
        return np.asarray(first), jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(*given))
    found = jax.jit(run)(*jax.tree.map(lambda x: x[0], given))
    return np.asarray(first), jax.tree.map(lambda x: np.asarray(x)[None], found)


def steps_of(form, name):
    """Yield for each step the initial weights, the weights before it, the inner update, the weights after, its number.

    The weights after it are by what adds the updates.
    """
    first, (before, updates, after) = trained(form)
    for member, p0 in enumerate(first):
        for k in range(STEPS):
            q = {add: tree[name][member, k] for add, tree in after.items()}
            yield p0, before[name][member, k], updates[name][member, k], q, k


@pytest.fixture
def compiled(request):
    """Compile as the form of this test says."""
    if FORMS[request.getfixturevalue("form")].is_full:
        request.getfixturevalue("full_compilation")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("form", "name"), CASES)
def test_stored_weights_are_in_the_set(form, name):
    """Exactly, where the set says so. From far away p + d is as fine as p, so a set far from 0 takes one step more."""
    dtype = FORMS[form].dtype
    for p0, p, _, after, k in steps_of(form, name):
        exact = bound(SETS[name].make(), wide(p0))
        holds_zero = (exact.outside(np.zeros(SHAPE), AXES[name]) == 0).all()
        for add, q in after.items():
            assert q.dtype == NUMPY[dtype]
            assert np.isfinite(wide(q)).all()
            size = max(abs(wide(q)).max(), 1, abs(wide(p)).max() if add == "chain" else 0)
            is_exact = SETS[name].exact and (k != FAR or add == "ours" or holds_zero)
            distance = exact.outside(wide(q), AXES[name])
            assert (distance <= (0 if is_exact else 8 * slack(name, dtype) * size)).all(), (k, add, distance.max())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("form", "name"), CASES)
def test_steps_end_at_the_nearest_point(form, name):
    """`apply_updates` is `onto` of what NumPy adds; a chain is as near as a difference can be added."""
    dtype = FORMS[form].dtype
    for p0, p, u, after, k in steps_of(form, name):
        x = p + u
        nearest = wide(bound(SETS[name].make(), p0).onto(x, AXES[name]))
        close = 4 * slack(name, dtype) * abs(wide(x)).max()
        grid = 4 * float(FLOATS[dtype].unit) * (abs(wide(p)) + abs(nearest))
        for add, q in after.items():
            off = abs(wide(q) - nearest)
            assert (off <= close + (grid if add == "chain" else 0)).all(), (k, add, off.max())


# ------------------------------------------------------------------------------------------- a bias, trees of libraries

KAPPA, FAN_IN = 0.9, 6


class Dense(equinox.Module):
    """An equinox model with one layer."""

    layer: equinox.nn.Linear


def trees():
    """Models with a kernel whose fan-in is 6 and a bias beside it: linen's dicts, nnx's module and state, equinox."""
    kernel, bias = jnp.asarray(start().T, jnp.float32), jnp.ones(5)
    linear = nnx.Linear(FAN_IN, 5, rngs=nnx.Rngs(0))
    dense = equinox.filter(Dense(equinox.nn.Linear(FAN_IN, 5, key=jax.random.key(0))), equinox.is_array)
    return {
        "linen": {"params": {"Dense_0": {"kernel": kernel, "bias": bias}}},
        "nnx": linear,
        "nnx state": nnx.state(linear, nnx.Param),
        "equinox": dense,
    }


@pytest.mark.parametrize("library", ["linen", "nnx", "nnx state", "equinox"])
def test_a_bias_has_the_bound_of_its_layer(library):
    p = trees()[library]
    pattern = {"linen": "params/Dense_*/*", "equinox": "layer/*"}.get(library, "*")
    tx = optax.chain(optax.sgd(5.0), projection({pattern: WeightClip(KAPPA)}))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)
    held = jax.tree.leaves(optax.apply_updates(p, updates))
    assert sorted(x.ndim for x in held) == [1, 2]
    for x in held:
        assert abs(wide(x)).max() <= KAPPA / math.sqrt(FAN_IN)
        assert abs(wide(x)).max() >= KAPPA / math.sqrt(FAN_IN) * (1 - 1e-6)


def test_rules_leave_the_bias_free_where_the_set_does():
    """Sets of entries reach a bias by its name; sets of vectors have none in it, or say that nothing is held."""
    p = {"Dense_0": {"kernel": jnp.asarray(start(), "float32"), "bias": jnp.full(6, 9.0)}}
    zeros = jax.tree.map(jnp.zeros_like, p)
    for rules, largest in [
        ({"*/kernel": Box(-0.1, 0.1)}, 9.0),
        ({"*": Box(-0.1, 0.1)}, 0.1),
        ({"*": L1Ball(1.0)}, 9.0),
    ]:
        q = apply_updates(p, zeros, rules)["Dense_0"]
        assert abs(q["kernel"]).max() < 1
        assert float(q["bias"].max()) == pytest.approx(largest)
    with pytest.raises(ValueError, match="bias"):
        projection({"*/bias": L1Ball(1.0)}).init(p)
    arrays = Box(-np.ones(6), np.ones(6))  # against the kernel and against the bias
    q = apply_updates(p, zeros, arrays)["Dense_0"]
    assert max(float(abs(x).max()) for x in q.values()) == 1.0


# ---------------------------------------------------------------------------------------------------------------- state


def small(dtype="float32"):
    """The weights of every set, and the sets' optimizer."""
    return {name: jnp.asarray(start(), dtype) for name in SETS}, optax.chain(optax.trace(0.9), projection(MADE))


def test_state_goes_through_files():
    """flax.serialization and pickle bring back what the sets took from the initial weights."""
    p, tx = small()
    state = tx.init(p)
    taken = {name for name, x in state[1].initial.items() if x is not None}
    assert taken == {name for name, set_ in MADE.items() if set_.takes_initial}
    assert len(taken) > 6
    empty = jax.tree.map(jnp.zeros_like, state)
    for found in (serialization.from_bytes(empty, serialization.to_bytes(state)), pickle.loads(pickle.dumps(state))):
        assert jax.tree.structure(found) == jax.tree.structure(state)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_a_checkpoint_of_orbax(tmp_path):
    p, tx = small()
    state = tx.init(p)
    shapes = jax.eval_shape(tx.init, p)
    with orbax.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        found = saver.restore(tmp_path / "state", shapes)
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_shapes_instead_of_arrays():
    p, tx = small("bfloat16")
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(p))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p)
    for found in (tx.init(shapes), jax.eval_shape(tx.init, p), jax.eval_shape(tx.init, shapes)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == wanted


def test_tree_map_params():
    p, tx = small()
    state = tx.init(p)
    found = optax.tree_map_params(tx, lambda x, p: x + p, state, p, transform_non_params=lambda x: x)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, found[0].trace, p)
    jax.tree.map(np.testing.assert_array_equal, found[1], state[1])


def test_parameters_and_state_are_donated():
    """The state holds copies: no buffer is in both trees, which XLA would refuse."""
    p, tx = small()
    state = tx.init(p)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((p, state))]
    assert len(set(pointers)) == len(pointers)
    some = {name: MADE[name] for name in ("around", "signs", "zeros", "relative box", "initial sphere", "intersection")}
    some["relative intersection"] = Intersection(MaxNorm.relative(0.5, axis=1), NonNegative())
    p, tx = {name: jnp.asarray(start(), "float32") for name in some}, projection(some)
    state = tx.init(p)

    def step(p, state):
        updates, state = tx.update(p, state, p)
        return optax.apply_updates(p, updates), state

    before = jax.tree.map(np.asarray, state.initial)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    q, state = jitted(p, state)
    assert all(x.is_deleted() for x in jax.tree.leaves(p))
    q, state = jitted(q, state)
    jax.tree.map(np.testing.assert_array_equal, state.initial, before)


# -------------------------------------------------------------------------------------------------------- moving bounds

TRACED = {  # by a bound that is traced
    "box": lambda c: Box(-c, 0.5 * c),
    "box of arrays": lambda c: Box(-c * jnp.arange(1.0, 7.0), c * jnp.ones((5, 1))),
    "simplex": lambda c: Simplex(c, axis=1),
    "sparse simplex": lambda c: SparseSimplex(2, c, axis=1),
    "L1 ball": lambda c: L1Ball(c, axis=1),
    "groups": lambda c: GroupL1Ball(c, axis=1),
    "weight clip": lambda c: WeightClip(c, axis=1),
    "half-space": lambda c: HalfSpace(1.0, c, axis=1),
    "hyperplane": lambda c: Hyperplane(c * jnp.ones(6), c, axis=1),
    "box section": lambda c: BoxSection(-c, c, 1.0, 0.1 * c, axis=1),
    "intersection": lambda c: Intersection(MaxNorm(c, axis=1), Box(-0.5 * c, c)),
    "box around": lambda c: Around(Box(-c, c)),
    "around": lambda c: Around(MaxNorm(c, axis=1)),
    "relative box": lambda c: Box.relative(c, axis=1),
}
LOOSE = {"simplex", "sparse simplex", "hyperplane", "box section", "intersection"}


@functools.cache
def swept(dtype):
    """Return by name the weights of a population whose members have other bounds: floats, and ints for the first."""
    p = {name: jnp.asarray(start(), dtype) for name in TRACED}
    shift = jnp.asarray(np.random.default_rng(3).standard_normal(SHAPE) * 3, dtype)

    def run(c):
        tx = projection(lambda step: {name: make(c) for name, make in TRACED.items()})
        updates, _ = tx.update(dict.fromkeys(p, shift), tx.init(p), p)
        return optax.apply_updates(p, updates)

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(jnp.asarray(BOUNDS, "float32")))


BOUNDS = np.asarray([0.3, 1.1, 2.0], np.float32)


@pytest.mark.parametrize("name", TRACED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_population_of_bounds(name, dtype):
    """`vmap` over a bound that is traced. It is rounded into the set, as a number is."""
    for c, q in zip(BOUNDS.tolist(), swept(dtype)[name], strict=True):
        exact = bound(TRACED[name](c), wide(start().astype(NUMPY[dtype])))
        axes = resolve(exact.axis, SHAPE, "out_last").axes
        distance = exact.outside(wide(q), axes)
        # The products of a traced bound, such as c / √6, are rounded to float32.
        close = 2e-7 if dtype == "float32" and name in ("weight clip", "relative box", "box of arrays") else 0
        limit = 8 * max(float(FLOATS[dtype].unit), 1e-6) * 3 if name in LOOSE else close
        assert (distance <= limit).all(), distance.max()
        fixed = wide(bound(TRACED[name](c), start().astype(NUMPY[dtype])).onto(q, axes))
        np.testing.assert_allclose(wide(q), fixed, atol=limit or 3e-7, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_scheduled_box(dtype):
    p = {"w": jnp.asarray(start(), dtype)}
    tx = optax.chain(optax.sgd(1.0), projection(lambda step: Box(-0.1 * step, 0.7 * jnp.ones(6))))

    @jax.jit
    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), state

    carry = p, tx.init(p)
    for k in range(3):
        carry = step(carry, {"w": (-1.0) ** k * p["w"]})
        q = wide(carry[0]["w"])
        assert q.max() <= np.float32(0.7)
        assert q.min() >= np.float32(-0.1) * np.float32(k)
    assert q.min() < -0.19


def test_bounds_that_are_traced_integers():
    """A count of steps is an int32: as a bound, it is a number as others."""
    x = jnp.asarray([-3.5, -1.0, 0.25, 3.5])
    for dtype in ("float32", "bfloat16", "float16"):
        found = jax.jit(lambda x, k: Box(-k, k).onto(x, (), jnp))(x.astype(dtype), 2)
        assert wide(found).tolist() == [-2.0, -1.0, 0.25, 2.0]
        for kind in ("float16", "bfloat16", "float32"):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = jax.jit(lambda x, k: Box(high=k).onto(x, (), jnp))(x.astype(dtype), jnp.asarray(0.3, kind))
            assert wide(found).max() <= float(jnp.asarray(0.3, kind))
            assert wide(found).max() >= 0.3 * (1 - 2.0**-7)


# --------------------------------------------------------------------------------------------------- every third update


@pytest.mark.parametrize("loop", ["eager", "jit", "scan"])
def test_every_third_update(loop):
    sets = {name: MADE[name] for name in ("box", "signs", "simplex", "initial sphere", "L1 ball")}
    p = {name: jnp.asarray(start(), "float32") for name in sets}
    free, often = optax.sgd(1.0), optax.chain(optax.sgd(1.0), projection(sets, every=3))
    always = projection(sets)

    def step(carry, g):
        updates, state = often.update(g, carry[1], carry[0])
        q = optax.apply_updates(carry[0], updates)
        return (q, state), (carry[0], q)

    carry = p, often.init(p)
    grads = [dict.fromkeys(sets, g) for g in np.random.default_rng(5).standard_normal((7, *SHAPE)).astype("float32")]
    if loop == "scan":
        _, (before, after) = jax.lax.scan(step, carry, jax.tree.map(lambda *g: jnp.stack(g), *grads))
        pairs = [jax.tree.map(operator.itemgetter(k), (before, after)) for k in range(len(grads))]
    else:
        pairs, one = [], jax.jit(step) if loop == "jit" else step
        for g in grads:
            carry, pair = one(carry, g)
            pairs.append(pair)
    initial = always.init(p)
    for k, (p, q) in enumerate(pairs):
        updates, _ = free.update(grads[k], free.init(p), p)
        if k % 3 == 2:
            updates, _ = always.update(updates, initial, p)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), q, optax.apply_updates(p, updates)
        )
        outside = {
            name: float(abs(bound(MADE[name], start("float32")).outside(np.asarray(x), AXES[name])).max())
            for name, x in q.items()
        }
        assert (max(outside.values()) < 1e-6) == (k % 3 == 2), outside


# ---------------------------------------------------------------------------------------------------------- derivatives


@functools.cache
def derivatives():
    """Return, in float64, a point and a direction; by set the derivative along it, and backwards from it."""
    x, v = (np.random.default_rng(seed).standard_normal(SHAPE) for seed in (11, 12))
    x = x * np.asarray([0.1, 1, 1, 1, 3])[:, None]
    with jax.enable_x64(True):
        held = {name: bound(case.make(), jnp.asarray(start())) for name, case in SETS.items()}

        def run(x, v):
            along, back = {}, {}
            for name, set_ in held.items():
                onto = functools.partial(set_.onto, axes=AXES[name], xp=jnp)
                if isinstance(set_, Intersection):  # JAX has no backward derivative of its loop
                    along[name] = jax.jvp(onto, (x,), (v,))[1]
                else:
                    _, line = jax.linearize(onto, x)
                    along[name], (back[name],) = line(v), jax.linear_transpose(line, x)(v)
            return along, back

        along, back = jax.jit(run)(x, v)
    return x, v, jax.tree.map(np.asarray, along), jax.tree.map(np.asarray, back)


@EVERY
def test_derivatives(name):
    """Forwards as finite differences, at a generic point. The derivative of a nearest point is symmetric."""
    x, v, along, back = derivatives()
    assert set(back) >= {name for name in SETS if "intersection" not in name}
    set_ = bound(SETS[name].make(), start())
    assert np.isfinite(along[name]).all()
    h = 1e-4 if isinstance(set_, Intersection) else 1e-6
    ends = [set_.onto(x + side * h * v, AXES[name]) for side in (1, -1)]
    tolerance = 2e-3 if isinstance(set_, Intersection) else 1e-7
    np.testing.assert_allclose(along[name], (ends[0] - ends[1]) / (2 * h), atol=tolerance, rtol=tolerance)
    if name in back:
        np.testing.assert_allclose(back[name], along[name], atol=1e-9)


# ------------------------------------------------------------------------------------------------ settings, the report


@EVERY
def test_settings_go_through_json(name):
    """An equal set comes back; `Box` with arrays compares and hashes by its numbers."""
    set_ = MADE[name]
    found = from_config(json.loads(json.dumps(set_.config())))
    assert type(found) is type(set_)
    assert found == set_ == SETS[name].make()
    assert hash(found) == hash(set_)
    assert pickle.loads(pickle.dumps(set_)) == set_
    assert sum(set_ == other for other in MADE.values()) == 1


def test_boxes_compare_by_their_numbers():
    numbers = [0.0, 0.5]
    same = [Box(low=kind(numbers)) for kind in (list, np.asarray, jnp.asarray, lambda x: np.asarray(x, np.float16))]
    assert len(set(same)) == 1
    for other in (Box(high=numbers), Box(low=[0.0, 0.25]), Box(low=[numbers]), Box(low=0.0)):
        assert other != same[0]
    tx = jax.jit(lambda x, set_: set_.project(x), static_argnums=1)
    assert tx(jnp.full(2, -1.0), same[0]).tolist() == numbers


@EVERY
def test_the_report(name):
    """Of trees of JAX and of NumPy: what is projected is in the set, and what is far away is outside of it."""
    set_ = bound(MADE[name], start("float32"))
    x = np.random.default_rng(1).standard_normal(SHAPE).astype("float32") * (1 if name in LARGE else 20)
    q = set_.onto(x, AXES[name])
    for library in (np.asarray, jnp.asarray):
        found = report({"layer": {"w": library(x)}, "held": {"w": library(q)}}, set_)
        rows = {row.name: row for row in found.rows}
        assert len(rows) == 2
        far, held = (rows[next(key for key in rows if part in key)] for part in ("layer", "held"))
        assert far.violations > 0
        assert far.worst > 1e-3
        assert held.violations == 0 or not SETS[name].exact
        assert held.worst <= 4 * slack(name, "float32") * abs(q).max()
        assert far.nonfinite == held.nonfinite == 0
        assert str(found)


# ------------------------------------------------------------------------------------------------------ what is refused

NAN = float("nan")
REFUSED = {
    "low above high": (lambda: Box(1.0, 0.5), "low is above high"),
    "low above high somewhere": (lambda: Box([0.0, 2.0], [1.0, 1.0]), r"low is above high at \(1,\)"),
    "NaN": (lambda: Box(low=NAN), "low=nan is not a number"),
    "NaN somewhere": (lambda: Box(high=[0.0, NAN]), "high holds NaN"),
    "no bound": (lambda: Box(), "bounds nothing"),
    "bounds that do not broadcast": (lambda: Box(np.zeros(3), np.ones(4)), "do not broadcast"),
    "words": (lambda: Box("a"), "low='a' is not a number"),
    "no entry": (lambda: TopK(0), "k=0 leaves no entry"),
    "half an entry": (lambda: TopK(1.5), "k=1.5 is not a number of entries"),
    "no normal": (lambda: HalfSpace(0.0), "a is 0 throughout"),
    "an infinite side": (lambda: Hyperplane(1.0, math.inf), "b is not finite"),
    "no solution": (lambda: AffineSet([[1.0, 1.0], [2.0, 2.0]], [1.0, 3.0]), "no vector solves"),
    "no matrix": (lambda: AffineSet([1.0, 1.0]), "pass \\(equations, entries\\)"),
    "disjoint boxes": (lambda: Intersection(Box(high=0.0), Box(low=1.0)), "no common point"),
    "a ball in a sphere": (lambda: Intersection(MaxNorm(1.0), Sphere(2.0)), "no common point"),
    "one set": (lambda: Intersection(MaxNorm(1.0)), "pass two or more"),
    "no set": (lambda: Intersection(MaxNorm(1.0), 3.0), "not 3.0"),
    "no total": (lambda: Simplex(0.0), "total=0.0 must be positive"),
    "no centre": (lambda: Around(Around(NonNegative())), "Around\\(\\) takes a set"),
    "other sides": (lambda: WeightClip(1.0, fan_in=0), "fan_in=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_when_made(case):
    make, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        make()


UNFIT = {
    "more entries than there are": (lambda: TopK(7, axis=1), "6 entries, fewer than"),
    "more positive ones than there are": (lambda: SparseSimplex(7, axis=1), "6 entries, fewer than"),
    "an array of another shape": (lambda: Box(low=np.zeros(5)), "low of shape \\(5,\\)"),
    "too many axes": (lambda: Box(high=np.ones((1, 5, 6))), "high of shape"),
    "a normal of another shape": (lambda: HalfSpace(np.ones(5), axis=1), "a of shape"),
    "a side per entry": (lambda: HalfSpace(1.0, np.ones(6), axis=1), "b of shape \\(6,\\) has more than one"),
    "a normal that is 0 along a row": (lambda: Hyperplane(np.eye(5, 6) * [1, 1, 1, 0, 1, 1], axis=1), "a is 0 along"),
    "a matrix of another width": (lambda: AffineSet(np.ones((1, 5)), axis=1), "5 columns"),
    "an empty section": (lambda: BoxSection(0.0, 0.1, 1.0, 1.0, axis=1), "is empty"),
    "an interval without numbers": (lambda: Box(1 + 2.0**-30, 1 + 2.0**-29), "no float32 lies between"),
    "such an interval somewhere": (lambda: Box([1 + 2.0**-30] * 6, 1 + 2.0**-29), "no number between"),
    "a member that does not fit": (lambda: Intersection(NonNegative(), TopK(7, axis=1)), "6 entries, fewer than"),
    "what is held around the start": (lambda: Around(Box(low=-np.ones(5))), "low of shape"),
    "a norm of zero": (lambda: MaxNorm.relative(1.0, axis=1), "norm 0"),
    "a largest entry of zero": (lambda: Box.relative(1.0, axis=1), "norm 0"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_refused_at_init_by_name(case):
    make, message = UNFIT[case]
    set_, p = make(), {"layer": {"w": jnp.zeros(SHAPE), "v": jnp.ones(SHAPE)}}
    for constraint in (set_, {"*/w": set_}, {"layer": {"w": set_, "v": None}}):
        with pytest.raises(ValueError, match=rf"layer/[vw].*{message}"):
            projection(constraint).init(p)
    if not set_.takes_initial:
        with pytest.raises(ValueError, match=rf"layer/[vw].*{message}"):
            apply_updates(p, p, set_)


def test_the_warning_of_an_intersection():
    """Where the sweeps do not suffice, with what is left; eager, jitted, and for that member of a population alone."""
    hard, easy = jnp.asarray(start() * 30, "float32"), jnp.full(SHAPE, 0.0)
    few = Intersection(Hyperplane(axis=1), Box(-0.1, 0.7), steps=2)
    message = r"in 2 sweeps: a result is [\d.e-]+ outside of a set, with entries up to"
    one = jax.jit(lambda x: apply_updates({"w": x}, {"w": 0 * x}, few))
    population = jax.jit(jax.vmap(lambda x: apply_updates({"w": x}, {"w": 0 * x}, few)))

    def run(f, x):
        jax.block_until_ready(f(x))
        jax.effects_barrier()

    for f in (lambda x: few.onto(x, (1,), jnp), one):
        with pytest.warns(UserWarning, match=message):
            run(f, hard)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(one, easy)
        run(population, jnp.stack([easy, easy]))
    with pytest.warns(UserWarning, match=message) as found:
        run(population, jnp.stack([easy, hard]))
    assert len([w for w in found if "sweeps" in str(w.message)]) == 1


# ----------------------------------------------------------------------------------------------- the functions of optax


def test_the_projections_of_optax():
    """They are for whole arrays or trees: our axis=None, or a set of entries."""
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 6)) * 2, "float32")
    of_optax = optax.projections
    pairs = [
        (of_optax.projection_simplex(x.ravel()), Simplex(axis=None)),
        (of_optax.projection_simplex(x.ravel(), 2.5), Simplex(2.5, axis=None)),
        (of_optax.projection_l1_ball(x, 2.5), L1Ball(2.5, axis=None)),
        (of_optax.projection_l1_sphere(x, 2.5), L1Sphere(2.5, axis=None)),
        (of_optax.projection_l2_ball(x, 2.5), MaxNorm(2.5, axis=None)),
        (of_optax.projection_l2_sphere(x, 2.5), Sphere(2.5, axis=None)),
        (of_optax.projection_linf_ball(x, 0.5), Box(-0.5, 0.5)),
        (of_optax.projection_box(x, -0.25, 0.75), Box(-0.25, 0.75)),
        (of_optax.projection_box(x, -jnp.ones((4, 6)) / 4, jnp.ones((4, 6)) / 2), Box(-np.ones((4, 6)) / 4, [0.5] * 6)),
        (of_optax.projection_hypercube(x), Box(0.0, 1.0)),
        (of_optax.projection_hypercube(x, 3.0), Box(0.0, 3.0)),
        (of_optax.projection_non_negative(x), NonNegative()),
    ]
    a = jnp.asarray(np.random.default_rng(3).standard_normal(24), "float32")
    normal, across = np.asarray(a).reshape(4, 6), np.linalg.svd(np.asarray(a)[None])[2][1:]
    pairs += [
        (of_optax.projection_hyperplane(x.ravel(), a, 0.5), Hyperplane(normal, 0.5, axis=None)),
        (of_optax.projection_halfspace(x.ravel(), a, 0.5), HalfSpace(normal, 0.5, axis=None)),
        (of_optax.projection_vector(x.ravel(), a), AffineSet(across, axis=None)),
    ]
    projected = jax.jit(lambda x: [set_.project(x) for _, set_ in pairs])(x)
    for (theirs, set_), q in zip(pairs, projected, strict=True):
        np.testing.assert_allclose(np.ravel(q), np.ravel(theirs), rtol=1e-5, atol=2e-5, err_msg=str(set_))
