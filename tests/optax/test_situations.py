"""Every set and every shaping in each situation that an optax utility, a debugging mode or an odd parameter makes.

All sets are leaves of one tree, so that one program tries them all.
"""

import contextlib

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from projgd import Box, MaxNorm, MinMaxNorm, NonNegative, Sphere, UnitNorm
from projgd.optax import (
    apply_updates,
    check_last,
    hyperball,
    max_update,
    maxnorm_projection,
    project,
    projected,
    projection,
    radial_brake,
    relative_update,
    tangent_update,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETS = {
    "ball": MaxNorm(1.0),
    "matrix": MaxNorm(1.0, axis=None),
    "shell": MinMaxNorm(0.5, 2.0),
    "sphere": Sphere(1.5),
    "initial": Sphere("initial"),
    "unit": UnitNorm(),
    "positive": NonNegative(),
    "box": Box(0.1, 0.7),
}
STATIC = {name: set_ for name, set_ in SETS.items() if name != "initial"}  # without numbers from initial weights
SHAPINGS = {
    "none": optax.identity,
    "relative": lambda: relative_update(0.1),
    "tangent": tangent_update,
    "brake": lambda: radial_brake(0.5, 0.9),
    "max": lambda: max_update(0.1, 0.01),
}
FORMS = {name: lambda sets, make=make: optax.chain(make(), projection(sets)) for name, make in SHAPINGS.items()}
FORMS["hyperball"] = lambda sets: hyperball(optax.sgd(1.0), 0.1)
FORMS["adaptive"] = lambda sets: projected(optax.adam(0.1), sets, metric="adaptive")
every_form = pytest.mark.parametrize("form", FORMS)


def weights(dtype="float32", shape=(4, 3)):
    """Healthy weights, one array for every set."""
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.uniform(0.2, 0.6, shape), dtype) for name in SETS}


def step(tx, p, **extra):
    updates, state = tx.update(jax.tree.map(jnp.negative, p), tx.init(p), p, **extra)
    assert jax.tree.map(jnp.result_type, updates) == jax.tree.map(jnp.result_type, p)
    return optax.apply_updates(p, updates), state


def alike(found, wanted):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), found) == jax.tree.map(
        lambda x: (jnp.shape(x), jnp.result_type(x)), wanted
    )


@every_form
def test_parameters_without_entries(form):
    shapes = [(0, 3), (3, 0), (2, 0, 3), (0,)]
    p = {f"{name}, {shape}": jnp.ones(shape) for name in SETS for shape in shapes} | {"ball": jnp.ones((2, 2))}
    sets = {name: SETS[name.partition(",")[0]] for name in p}
    assert alike(jax.eval_shape(lambda p: step(FORMS[form](sets), p)[0], p), p)  # init is traced here
    few = {name: p[name] for name in ("initial, (0, 3)", "ball")}
    q, _ = step(FORMS[form]({name: sets[name] for name in few}), few)
    assert alike(q, few)
    assert jnp.isfinite(q["ball"]).all()


def test_sets_of_parameters_without_entries():
    for set_ in STATIC.values():
        for shape in [(0, 3), (3, 0), (2, 0, 3), (0,)]:
            x = jnp.ones(shape)
            for q in (set_.project(x), *project([x], {"*": set_} if len(shape) > 1 else [set_]), jnp.zeros(shape)):
                assert q.shape == shape
            set_.violation(x)
            assert apply_updates([x], [x], [set_])[0].shape == shape


@every_form
def test_shapes_instead_of_arrays(form):
    """`init` sees only shapes, as where memory is estimated or a checkpoint is read."""
    tx, p = FORMS[form](SETS), weights()
    wanted = jax.tree.map(lambda x: (x.shape, x.dtype), tx.init(p))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), p)
    for found in (tx.init(shapes), jax.eval_shape(tx.init, p), jax.eval_shape(tx.init, shapes)):
        assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == wanted


@every_form
def test_python_numbers(form):
    sets = {name: set_ for name, set_ in SETS.items() if name in ("positive", "box")}
    q, _ = step(FORMS[form](sets), {"positive": 0.5, "box": 0.69} | ({"m": jnp.eye(2)} if form == "hyperball" else {}))
    assert q["positive"] >= 0
    assert form == "hyperball" or 0.1 <= q["box"] <= 0.7
    assert apply_updates({"box": 0.5}, {"box": 9.0}, {"box": Box(0.1, 0.75)})["box"] == 0.75


@pytest.mark.parametrize("kind", ["tree", "rules", "one"])
@every_form
def test_tree_map_params(form, kind):
    """What is like the parameters is mapped, also of an optimizer before; what a set took from them is not."""
    sets = {"tree": SETS, "rules": {f"{name}*": set_ for name, set_ in SETS.items()}, "one": Sphere("initial")}[kind]
    tx = optax.chain(optax.trace(0.9), FORMS[form](sets))
    p = weights()
    state = tx.init(p)
    found = optax.tree_map_params(tx, lambda x, p: x + p, state, p, transform_non_params=lambda x: x)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    np.testing.assert_array_equal(found[0].trace["ball"], p["ball"])
    mapped = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), found, state))
    assert sum(mapped) == (3 if form == "adaptive" else 1) * len(p)


@contextlib.contextmanager
def debugging():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


@pytest.mark.parametrize("form", [*FORMS, "jitted"])
def test_debugging_modes(form):
    """Healthy weights raise no error. Of what is jitted only the results are looked at, so one form is enough."""
    some = {name: SETS[name] for name in ("ball", "initial", "box")} if form in SHAPINGS or form == "adaptive" else SETS
    with debugging():
        tx, p = FORMS["none" if form == "jitted" else form](some), {name: weights()[name] for name in some}
        state = tx.init(p)
        update = jax.jit(tx.update) if form == "jitted" else tx.update
        updates, state = update(jax.tree.map(jnp.negative, p), state, p)
        updates, _ = update(updates, state, optax.apply_updates(p, updates))
    assert all(bool(jnp.isfinite(u).all()) for u in jax.tree.leaves(updates))


def test_sets_in_debugging_modes():
    p = {name: x for name, x in weights().items() if name in STATIC}
    with debugging():
        for set_ in STATIC.values():
            x = jnp.ones((4, 3))
            set_.violation(jax.jit(set_.project)(x))
            set_.violation(set_.project(0 * x))
            set_.onto_in(x, x, (0,), jnp)
        jitted = jax.jit(lambda p: apply_updates(p, p, STATIC))(p)
        held = project(apply_updates(p, p, STATIC), STATIC)
    for name in p:
        np.testing.assert_allclose(held[name], jitted[name], rtol=1e-5)


def test_what_is_not_finite_still_shows_in_its_own_vector():
    x = jnp.asarray([[np.inf, np.nan, -np.inf, 3.0], [1.0, 2.0, np.inf, 4.0]])
    for f in (MaxNorm(1.0).project, jax.jit(MaxNorm(1.0).project)):
        np.testing.assert_array_equal(f(x)[:, :3], x[:, :3])
        assert jnp.linalg.norm(f(x)[:, 3]) <= 1
    assert np.isfinite(MaxNorm(1.0).violation(x)).tolist() == [False, False, False, True]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@every_form
def test_strict_promotion_and_apply_if_finite(form, dtype):
    """The update keeps the dtype that came in, which wrappers need. Tracing shows it: nothing is compiled."""
    p = weights(dtype)
    strict = "standard" if form == "adaptive" else "strict"  # optax.adam itself is not strict
    with jax.numpy_dtype_promotion(strict):
        assert alike(jax.eval_shape(lambda p: step(FORMS[form](SETS), p)[0], p), p)
    for tx in (FORMS[form](SETS), SHAPINGS.get(form, optax.identity)()):
        assert alike(jax.eval_shape(lambda p, tx=tx: step(optax.apply_if_finite(tx, 1), p)[0], p), p)


def test_inner_optimizers_that_need_extra_arguments():
    inner, p = optax.polyak_sgd(1.0), {"ball": jnp.eye(3) + 1}
    made = {name: optax.chain(inner, make(), projection(MaxNorm(1.0))) for name, make in SHAPINGS.items()}
    made |= {"hyperball": hyperball(inner, 0.1), "projected": projected(inner, MaxNorm(1.0))}
    made["adaptive"] = projected(optax.chain(optax.scale_by_adam(), inner), MaxNorm(1.0), metric="adaptive")
    for tx in made.values():
        step(tx, p, value=1.0)
    check_last(made["projected"], p, MaxNorm(1.0), value=1.0)


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (radial_brake, {"outward": 0.5}),
        (radial_brake, {"outward": 0.5, "inward": 0.2}),
        (max_update, {"ratio": 0.5, "floor": 0.1}),
        (relative_update, {"learning_rate": 0.1}),
        (maxnorm_projection, {"c": 0.5}),
    ],
)
def test_injected_hyperparameters(make, numbers):
    p = {"w": jnp.eye(3) + 1}
    plain, _ = step(make(**numbers), p)
    found, _ = jax.jit(lambda p: step(optax.inject_hyperparams(make)(**numbers), p))(p)
    np.testing.assert_allclose(found["w"], plain["w"], rtol=1e-6)


class Layer(equinox.Module):
    """A module that is called: as parameters, and as a tree of constraints."""

    weight: object
    bias: object

    def __call__(self, x):
        raise AssertionError("called")


def test_a_tree_of_constraints_that_is_callable():
    p, sets = Layer(jnp.ones((4, 3)), jnp.ones(4)), Layer(MaxNorm(1.0), None)
    for tx in (projection(sets), projected(optax.adam(0.1), sets, metric="adaptive")):
        q, _ = step(tx, p)
        assert (jnp.linalg.norm(q.weight, axis=1) <= 1).all()
    check_last(projection(sets), p, sets)
    with pytest.raises(TypeError, match="is not a constraint"):
        projection(Layer("MaxNorm", MaxNorm(1.0)))


def test_a_schedule_that_is_an_object():
    class Grow:
        def __call__(self, count):
            return MaxNorm(1.0 + count)

    q, _ = step(projection(Grow()), {"w": 5 * jnp.ones((4, 3))})
    assert (jnp.linalg.norm(q["w"], axis=0) <= 1).all()


def test_frozen_parameters():
    """A zero update moves a parameter outside of the set; a rule with None or a mask around the chain does not."""
    p = {"a": {"kernel": 3 * jnp.ones((4, 2))}, "b": {"kernel": 3 * jnp.ones((4, 2))}}
    labels, ball = {"a": "frozen", "b": "trained"}, MaxNorm(1.0)

    def split(tx):
        return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, labels)

    free = projection({"a/*": None, "*": ball})
    for tx, stays in [
        (optax.chain(split(optax.sgd(0.1)), projection(ball)), False),
        (optax.chain(split(optax.sgd(0.1)), free), True),
        (split(optax.chain(optax.sgd(0.1), projection(ball))), True),
    ]:
        q, _ = step(tx, p)
        assert (q["a"]["kernel"] == 3).all() == stays
        assert (jnp.linalg.norm(q["b"]["kernel"], axis=0) <= 1).all()
