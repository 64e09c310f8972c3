"""The projection last, after every optimizer of optax and inside or outside its wrappers: the real ones."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from projgd import MaxNorm
from projgd.optax import maxnorm_projection, project, projection

pytestmark = pytest.mark.usefixtures("quick_compilation")

C = 0.8
RNG = np.random.default_rng(0)
PARAMS = {  # of few shapes, because JAX compiles every operation for every shape
    name: {"kernel": jnp.asarray(RNG.standard_normal((6, 6)) / 10, jnp.float32), "bias": jnp.zeros(6)}
    for name in ("Dense_0", "Dense_1")
}
INPUTS = jnp.asarray(RNG.standard_normal((32, 6)), jnp.float32)
TARGETS = jnp.asarray(RNG.standard_normal((32, 6)) * 30, jnp.float32)  # far out: a fit needs large weights
ON_THE_BOUND = project(jax.tree.map(lambda p: 100 * p, PARAMS), MaxNorm(C))  # slow starters reach it too


def loss(params, scale=1.0):
    hidden = jax.nn.relu(INPUTS @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
    return scale * jnp.mean((hidden @ params["Dense_1"]["kernel"] + params["Dense_1"]["bias"] - TARGETS) ** 2)


def norms(params) -> np.ndarray:
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 2]
    return np.concatenate([np.sqrt((np.asarray(k, np.float64) ** 2).sum(axis=0)) for k in kernels])


COMPILED = ("apply_if_finite", "conditionally_transform", "dpsgd", "galore", "lbfgs", "MultiSteps", "muon", "sophia")
"""What has control flow of its own, which JAX compiles at every step that is not jitted; the others would be slower."""


def train(tx, steps=4, params=ON_THE_BOUND, scale=lambda step: 1.0, view=lambda params: params, jit=False):
    """The parameters after each step."""

    def step(params, state, scale):
        value, grads = jax.value_and_grad(loss)(view(params), scale)
        updates, state = tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    step = jax.jit(step) if jit else step
    for i in range(steps):
        params, state = step(params, state, scale(i))
        seen.append(params)
    return seen


def spied(tx, seen):
    """`tx`, which appends to `seen` where its updates alone would lead."""

    def update(updates, state, params, **extra):
        updates, state = tx.update(updates, state, params, **extra)
        jax.debug.callback(lambda q: seen.append(norms(q).max()), optax.apply_updates(params, updates))
        return updates, state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def given(tx, **arguments):
    """`tx`, with these extra arguments and no others."""
    return optax.GradientTransformationExtraArgs(tx.init, lambda u, state, p, **_: tx.update(u, state, p, **arguments))


OPTIMIZERS = {
    name: getattr(optax, name)
    for name in " ".join(
        [
            "adabelief adadelta adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars lion nadam",
            "nadamw optimistic_adam_v2 optimistic_gradient_descent radam rmsprop rprop sgd sign_sgd signum sm3",
            "yogi novograd",
        ]
    ).split()
}
OPTIMIZERS |= {
    name: getattr(contrib, name)
    for name in "acprop ademamix adopt dog dowg madgrad muon simplified_ademamix".split()  # noqa: SIM905
}
OPTIMIZERS |= {
    "adafactor": optax.adafactor,
    "noisy_sgd": lambda lr: optax.noisy_sgd(lr, key=jax.random.key(0)),
    "polyak_sgd": lambda lr: optax.polyak_sgd(max_learning_rate=lr),
    "lbfgs": lambda lr: optax.lbfgs(lr, linesearch=None),
    "lbfgs, line search": lambda lr: optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(5)),
    "cocob": lambda lr: contrib.cocob(learning_rate=100 * lr),
    "dadapt_adamw": lambda lr: contrib.dadapt_adamw(10.0, estim_lr0=lr),
    "prodigy": lambda lr: contrib.prodigy(10.0, estim_lr0=lr),
    "momo": lambda lr: contrib.momo(lr),
    "momo_adam": lambda lr: contrib.momo_adam(lr),
    "optimistic_adam": lambda lr: optax.optimistic_adam(lr, optimism=0.1),
    "galore": lambda lr: contrib.galore(lr, rank=2),
    "sophia": lambda lr: given(contrib.sophia(lr), obj_fn=loss),
    "dpsgd": lambda lr: optax.chain(
        optax.stateless(lambda u, p: jax.tree.map(lambda g: g[None], u)),  # a batch of one example
        contrib.dpsgd(lr, l2_norm_clip=1.0, noise_multiplier=0.1, seed=0),
    ),
    "sam, opaque": lambda lr: given(
        contrib.sam(optax.sgd(lr), optax.chain(contrib.normalize(), optax.sgd(0.05)), opaque_mode=True),
        grad_fn=lambda params, _: jax.grad(loss)(params),
    ),
    "schedule_free_adamw": lambda lr: contrib.schedule_free_adamw(lr),
    "mechanize": lambda lr: contrib.mechanize(optax.sgd(10 * lr), s_init=1.0),
    "adam, extra arguments": lambda lr: optax.with_extra_args_support(optax.adam(lr)),
    "apply_every": lambda lr: optax.chain(optax.adam(lr), optax.apply_every(3)),
    "ema": lambda lr: optax.chain(optax.sgd(lr), optax.ema(0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_every_optimizer(name):
    rate, free = 30.0 if name in ("adadelta", "lars", "dog", "dowg") else 0.3, []
    optimizer = spied(optax.with_extra_args_support(OPTIMIZERS[name](rate)), free)
    seen = train(optax.chain(optimizer, maxnorm_projection(C)), jit=name.startswith(COMPILED))
    assert max(norms(params).max() for params in seen) <= C
    assert not max(free) <= C  # NaN counts as free
    assert max(norms(params).max() for params in seen) >= C * (1 - 1e-5)


CHAINED = optax.chain(optax.adam(0.3), maxnorm_projection(C))
KERNELS = {"Dense_0": {"kernel": True, "bias": False}, "Dense_1": {"kernel": True, "bias": False}}
WRAPPED = {
    "named_chain": optax.named_chain(("adam", optax.adam(0.3)), ("projection", maxnorm_projection(C))),
    "masked": optax.chain(optax.adam(0.3), optax.masked(maxnorm_projection(C), KERNELS)),
    "partition": optax.partition(
        {"kernels": CHAINED, "biases": optax.sgd(0.1)},
        jax.tree.map(lambda kernel: "kernels" if kernel else "biases", KERNELS),
    ),
    "multi_transform": optax.multi_transform(
        {"first": CHAINED, "second": optax.chain(optax.sgd(0.1), maxnorm_projection(C))},
        {"Dense_0": "first", "Dense_1": "second"},
    ),
    "MultiSteps": optax.MultiSteps(CHAINED, every_k_schedule=3).gradient_transformation(),
    "MultiSteps skipping": optax.MultiSteps(
        CHAINED, every_k_schedule=2, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(CHAINED, max_consecutive_errors=3),
    "inject_hyperparams": optax.inject_hyperparams(lambda c, lr: optax.chain(optax.adam(lr), maxnorm_projection(c)))(
        c=C, lr=0.3
    ),
    "flatten inside": optax.chain(optax.flatten(optax.adam(0.3)), maxnorm_projection(C)),
    "freeze": optax.chain(optax.adam(0.3), maxnorm_projection(C), optax.freeze({"Dense_0": True, "Dense_1": False})),
    "conditionally_transform": optax.chain(
        optax.conditionally_transform(optax.adam(0.3), lambda step: step < 3), maxnorm_projection(C)
    ),
    "extra arguments": optax.chain(optax.adam(0.3), optax.scale_by_backtracking_linesearch(5), maxnorm_projection(C)),
    "schedule_free": optax.chain(contrib.schedule_free_sgd(0.3), maxnorm_projection(C)),
    "reduce_on_plateau": optax.chain(optax.adam(0.3), contrib.reduce_on_plateau(), maxnorm_projection(C)),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_in_every_wrapper(name):
    finite = name not in ("apply_if_finite", "MultiSteps skipping")
    scales = [1.0, 1.0, 1.0 if finite else np.float32(np.nan), 1.0, 1.0, 1.0]
    seen = train(WRAPPED[name], 6, scale=scales.__getitem__, jit=name.startswith(COMPILED))
    assert max(norms(params).max() for params in seen) <= C
    assert norms(seen[-1]).max() >= C * (1 - 1e-5)
    if name == "freeze":
        np.testing.assert_array_equal(seen[-1]["Dense_0"]["kernel"], ON_THE_BOUND["Dense_0"]["kernel"])


def test_lookahead_is_projected_outside_of_it():
    """Its parameters are a pair, fast and slow; both are constrained."""
    tx = optax.chain(optax.lookahead(optax.sgd(0.3), sync_period=3, slow_step_size=0.5), maxnorm_projection(C))
    seen = train(tx, params=optax.LookaheadParams.init_synced(PARAMS), view=lambda params: params.fast)
    assert max(norms(params).max() for params in seen) <= C
    assert norms(seen[-1]).max() >= C * (1 - 1e-5)


def test_schedule_free_constrains_where_gradients_are_taken():
    """Not the average that is evaluated: that one is projected when it is taken."""
    tx = optax.chain(contrib.schedule_free_sgd(1.0), maxnorm_projection(C))
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(8):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        assert norms(params).max() <= C
    average = contrib.schedule_free_eval_params(state[0], params)
    assert norms(average).max() > C
    assert norms(project(average, MaxNorm(C))).max() <= C


def test_sam_is_projected_outside_of_it():
    """Its adversarial step leaves the set, on purpose, unless the projection stands after it; then both are inside."""
    for sync_period in (2, 3):
        tx = given(contrib.sam(optax.sgd(0.3), optax.chain(contrib.normalize(), optax.sgd(0.5)), sync_period))
        seen = train(optax.chain(tx, maxnorm_projection(C)), steps=12)
        assert max(norms(params).max() for params in seen) <= C
        assert norms(seen[-1]).max() >= C * (1 - 1e-5)


def test_c_as_schedule_and_as_hyperparameter():
    def schedule(step):
        return 0.4 + 0.1 * step

    for tx in (
        optax.chain(optax.adam(0.3), maxnorm_projection(schedule)),
        optax.chain(optax.adam(0.3), optax.inject_hyperparams(maxnorm_projection)(c=schedule)),
        optax.chain(optax.adam(0.3), projection(lambda step: {"*/kernel": MaxNorm(schedule(step))})),
    ):
        largest = [norms(params).max() for params in train(tx, steps=4)]
        bounds = [float(np.float32(0.4 + 0.1 * step)) for step in range(4)]
        assert (np.asarray(largest) <= np.asarray(bounds) * (1 + 1e-7)).all()  # c itself rounds in float32
        np.testing.assert_allclose(largest, bounds, rtol=2e-5)


def test_a_hyperparameter_set_by_hand():
    tx = optax.inject_hyperparams(maxnorm_projection)(c=4.0)
    params = {"kernel": jnp.full((4, 2), 9.0)}
    state = tx.init(params)
    state.hyperparams["c"] = jnp.asarray(0.5)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    assert norms(optax.apply_updates(params, updates)).max() <= 0.5
