"""Every set of `tests.sets` with optax: steps that end in it, loops, populations, state, derivatives, moving bounds.

All sets are leaves of one tree, so that one program tries them all.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from projgd import Intersection
from projgd.axes import resolve
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
        is_full: whether XLA optimizes as for users; that takes long.
    """

    dtype: str
    inner: Callable[..., optax.GradientTransformation]
    rates: tuple[float, ...]
    adds: tuple[str, ...] = ("chain", "ours")
    is_full: bool = False


FORMS = {
    "float32": Form("float32", optax.adam, (0.02,), ("chain",), is_full=True),
    "float32, population": Form("float32", optax.sgd, (0.02, 5.0), ("ours",)),
    "bfloat16": Form("bfloat16", optax.sgd, (0.5,)),
    "float16": Form("float16", optax.sgd, (5.0,), ("chain",)),
}
STEPS, FAR = 7, 5
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
    given, run = (dict.fromkeys(SETS, first), grads, shifts, rates), functools.partial(train, form, MADE)
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
@EVERY
@pytest.mark.parametrize("form", FORMS)
def test_stored_weights_are_in_the_set(name, form):
    """Exactly, where the set says so. From far away p + d is as fine as p, so a set far from 0 takes one step more."""
    dtype = FORMS[form].dtype
    for p0, p, _, after, k in steps_of(form, name):
        exact = bound(SETS[name].make(), "numpy", wide(p0))
        holds_zero = (exact.outside(np.zeros(SHAPE), AXES[name]) == 0).all()
        for add, q in after.items():
            assert q.dtype == NUMPY[dtype]
            assert np.isfinite(wide(q)).all()
            size = max(abs(wide(q)).max(), 1, abs(wide(p)).max() if add == "chain" else 0)
            is_exact = SETS[name].exact and (k != FAR or add == "ours" or holds_zero)
            distance = exact.outside(wide(q), AXES[name])
            assert (distance <= (0 if is_exact else 8 * slack(name, dtype) * size)).all(), (k, add, distance.max())


@pytest.mark.usefixtures("compiled")
@EVERY
@pytest.mark.parametrize("form", FORMS)
def test_steps_end_at_the_nearest_point(name, form):
    """`apply_updates` is `onto` of what NumPy adds; a chain is as near as a difference can be added."""
    dtype = FORMS[form].dtype
    for p0, p, u, after, k in steps_of(form, name):
        x = p + u
        nearest = wide(bound(SETS[name].make(), "numpy", p0).onto(x, AXES[name]))
        close = 4 * slack(name, dtype) * abs(wide(x)).max()
        grid = 4 * float(FLOATS[dtype].unit) * (abs(wide(p)) + abs(nearest))
        for add, q in after.items():
            off = abs(wide(q) - nearest)
            assert (off <= close + (grid if add == "chain" else 0)).all(), (k, add, off.max())
