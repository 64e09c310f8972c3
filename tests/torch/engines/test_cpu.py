"""The fused engine on a CPU: what it must notice between steps, what it leaves to others, and its threads.

Most tests go through the default step, too: both must be the stock optimizer's step and then the projection.
"""

import copy
import importlib.util
import math
import os
import subprocess
import sys

import array_api_compat.torch as xp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projgd import Box, MaxNorm, MaxUpdate, MinMaxNorm, RadialBrake, RelativeUpdate, Sphere, TangentUpdate, UnitNorm
from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD
from projgd.torch.engines.base import Job
from projgd.torch.engines.cpu import Cpu
from tests.torch.common import give_gradients, longest, random, same, weight

NEEDS_NUMBA = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
FUSED = pytest.mark.parametrize(
    "fused", [pytest.param(True, marks=NEEDS_NUMBA, id="fused"), pytest.param(None, id="default")]
)


def check_beside_stock(fused, cls, c, shapes, prepare, steps=5, **options):
    """Step beside the stock optimizer and the projection; `prepare(i, params, optimizer)` comes before step i."""
    ours, theirs = random(*shapes), random(*shapes)
    optimizer = cls(ours, lr=0.1, c=c, fused=fused, foreach=None if fused else False, **options)
    stock = cls.inner(theirs, lr=0.1, foreach=False, **options)
    for i in range(steps):
        for params, one in ((ours, optimizer), (theirs, stock)):
            prepare(i, params, one)
            one.step()
        with torch.no_grad():
            for q in theirs:
                if c is not None and q.grad is not None:
                    q.copy_(MaxNorm(c).project(q))
        ours, theirs = ([p for g in one.param_groups for p in g["params"]] for one in (optimizer, stock))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    return optimizer


# ------------------------------------------------------------------------------------------ what lies behind its tables


@FUSED
def test_first_gradients_may_come_at_different_steps(fused):
    """Momentum starts undamped for each; torch's own fused SGD takes parameters with a momentum, or without."""

    def prepare(i, params, optimizer):
        give_gradients(params[: 1 + i], i)

    shapes = [(8, 8), (7,), (6, 5)]
    check_beside_stock(fused, ProjectedSGD, 1.0, shapes, prepare, momentum=0.9, dampening=0.3)
    check_beside_stock(fused, ProjectedAdam, 1.0, shapes, prepare)


@FUSED
def test_a_gradient_may_come_and_go(fused):
    def prepare(i, params, optimizer):
        optimizer.zero_grad()
        give_gradients([params[(0, 1, 2, 0, 1)[i]]], i)

    check_beside_stock(fused, ProjectedSGD, 3.0, [(40, 90), (90, 40), (30, 120)], prepare, momentum=0.9)


@FUSED
@pytest.mark.parametrize("c", [None, 1.0])
def test_a_momentum_that_lies_otherwise_in_memory_than_its_weights(fused, c):
    """The optimizer makes it as the first gradient lies; torch's own fused kernel would read it row by row."""

    def prepare(i, params, optimizer):
        give_gradients(params, i)
        if i == 0:
            params[0].grad = params[0].grad.t()

    check_beside_stock(fused, ProjectedSGD, c, [(6, 6)], prepare, momentum=0.9)


def of_state(name, change):
    def put(optimizer, params, j):
        state = optimizer.state[params[j]]
        state[name] = change(state[name].clone())

    return put


def forget(optimizer, params, j):
    del optimizer.state[params[j]]["momentum_buffer"]


def clear(optimizer, params, j):
    optimizer.state.clear()


def load(optimizer, params, j):
    state = copy.deepcopy(optimizer.state_dict())
    for name in state["state"][j]:
        state["state"][j][name] *= 2
    optimizer.load_state_dict(state)


def exchange(optimizer, params, j):
    old = params[j]
    params[j] = optimizer.param_groups[0]["params"][j] = torch.nn.Parameter(old.detach().clone())
    params[j].grad = old.grad


def turn(optimizer, params, j):
    """Same parameter, address, shape and gradient: but its rows lie elsewhere."""
    params[j].data = params[j].data.T


def move(optimizer, params, j):
    """As `module.to()` does, which puts other memory behind the same tensor; what is there now is nobody's."""
    old = params[j].data
    params[j].data = old.clone()
    old.fill_(math.nan)


def move_state(optimizer, params, j):
    moment = optimizer.state[params[j]]["exp_avg"]
    old = moment.data
    moment.data = old.clone()
    old.fill_(math.nan)


def expand(optimizer, params, j):
    params[j].grad = torch.ones(1, 1).expand(params[j].shape)


@FUSED
@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({}, turn),
        ({}, move),
        ({}, exchange),
        ({}, expand),
        ({"momentum": 0.9}, of_state("momentum_buffer", torch.Tensor.neg_)),
        ({"momentum": 0.9}, of_state("momentum_buffer", lambda m: m.T)),
        ({"momentum": 0.9}, forget),
        ({"momentum": 0.9}, clear),
        ({"momentum": 0.9}, load),
        ({"amsgrad": False}, of_state("step", lambda step: step + 50)),
        ({"amsgrad": True}, of_state("exp_avg", lambda m: m.T)),
        ({"amsgrad": True}, load),
        ({"amsgrad": False}, move_state),
    ],
    ids=lambda x: getattr(x, "__name__", None) or "-".join(x),
)
def test_what_is_changed_between_steps_is_noticed(fused, options, change):
    def prepare(i, params, optimizer):
        give_gradients(params, i)
        if i == 3:
            for j in (2, 0):  # one that is projected in a stack, and one in pieces
                change(optimizer, params, j)

    cls = ProjectedAdam if "amsgrad" in options else ProjectedSGD
    check_beside_stock(fused, cls, 3.0, [(10, 10), (10, 10), (300, 300)], prepare, **options)


@NEEDS_NUMBA
@pytest.mark.parametrize(
    ("cls", "broken"),
    [
        (ProjectedSGD, {"lr": None}),
        (ProjectedSGD, {"momentum": "a"}),
        (ProjectedSGD, {"dampening": "a"}),
        (ProjectedAdam, {"betas": (0.9,)}),
    ],
    ids=str,
)
def test_a_first_step_that_fails_leaves_no_state(cls, broken):
    found = []
    for fails in (False, True):
        (p,) = random((4, 3))
        options = {"momentum": 0.9, "dampening": 0.5} if cls is ProjectedSGD else {}
        optimizer = cls([p], lr=0.1, c=1.0, fused=True, **options)
        group = optimizer.param_groups[0]
        if fails:
            whole = {k: group[k] for k in broken}
            group.update(broken)
            give_gradients([p], 0)
            with pytest.raises((TypeError, ValueError), match="betas=" if "betas" in broken else None):
                optimizer.step()
            group.update(whole, c=2.0)
            assert not optimizer.state[p]
        for i in range(2):
            give_gradients([p], i)
            group["c"] = 1.0 + i
            optimizer.step()
        found.append(p.detach())
    assert torch.equal(*found)


@NEEDS_NUMBA
def test_a_parameter_whose_gradient_comes_later_is_stepped_by_the_engine_from_then_on():
    a, b = random((8, 8), (8, 8))
    optimizer = ProjectedSGD([("a", a), ("b", b)], lr=0.1, c=1.0, fused=True)
    for params in ([a], [a, b]):
        give_gradients(params, 0)
        optimizer.step()
        assert [choice.engine for choice in optimizer.routes().values()] == ["cpu", "cpu"]
        assert max(map(longest, params)) <= 1


@FUSED
def test_autograd_notices_that_the_weights_were_written(fused):
    (p,) = random((40, 90))
    optimizer = ProjectedSGD([p], lr=0.1, c=1e4, fused=fused)
    p.grad, version = torch.ones_like(p), p._version
    loss = p.square().sum()
    optimizer.step()
    assert p._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@FUSED
@pytest.mark.parametrize(
    "options",
    [
        {"c": 3.0},
        {"c": 3.0, "metric": "adaptive"},
        {"c": 3.0, "update": TangentUpdate()},
        {"constraint": UnitNorm()},
        {"constraint": Sphere("initial", None), "update": RelativeUpdate()},
    ],
    ids=str,
)
def test_a_programs_default_device_and_dtype_do_not_matter(options, fused):
    """They are for its own tensors, not for those that a step makes for itself."""
    found = []
    for device, dtype in (("cpu", torch.float32), ("meta", torch.float64)):
        (p,) = random((40, 90))
        p.grad = torch.ones_like(p)
        optimizer = ProjectedAdam([p], lr=0.1, fused=fused, **options)
        optimizer.step()  # torch.optim makes its step count on the default device
        torch.set_default_device(device)
        torch.set_default_dtype(dtype)
        try:
            optimizer.step()
        finally:
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        found.append(p.detach())
    assert torch.equal(*found)


@FUSED
def test_empty_and_scalar_and_tied_parameters_step_as_the_stock_optimizer_does(fused):
    """A scalar and a bias have no fan-in: they are free. A tied weight is in the optimizer once."""
    ours, theirs = random((0, 7), (5, 0), (), (3,), (4, 3)), random((0, 7), (5, 0), (), (3,), (4, 3))
    for params, cls, options in ((ours, ProjectedSGD, {"c": 1.0}), (theirs, torch.optim.SGD, {})):
        net = torch.nn.ParameterList([*params, params[-1]])
        optimizer = cls(net.parameters(), lr=0.1, momentum=0.9, fused=fused, **options)
        for i in range(2):
            give_gradients(params, i)
            if cls is torch.optim.SGD and i:
                with torch.no_grad():
                    params[-1].copy_(MaxNorm(1.0).project(params[-1]))
            optimizer.step()
    theirs[-1].data = MaxNorm(1.0).project(theirs[-1].data)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------------------------- GradScaler


@NEEDS_NUMBA
@pytest.mark.parametrize(("cls", "options"), [(ProjectedSGD, {"momentum": 0.9, "dampening": 0.5}), (ProjectedAdam, {})])
def test_a_step_that_gradscaler_skips_changes_nothing_and_momentum_starts_later(cls, options):
    """Whichever engine projects: rows, columns, float64, and a set that is no set of norms."""
    made = [{"c": 1.0, **options}, {"c": 1.0, "axis": 0}, {"c": 1.0}, {"constraint": Box(-0.1, 0.1)}]
    params = random(*[(12, 9)] * len(made))
    params[2] = torch.nn.Parameter(params[2].detach().double())
    groups = [{"params": [p], **own} for p, own in zip(params, made, strict=True)]
    optimizer = cls(groups, lr=0.1, fused=True)
    assert [c.engine for c in optimizer.routes().values()] == ["cpu", "eager", "reference", "clamp"]
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    stock = cls.inner([{"params": [p], **(options if p is plain[0] else {})} for p in plain], lr=0.1)
    before = [p.detach().clone() for p in params]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
    give_gradients(params, 0)
    optimizer.step()
    assert same([p.detach() for p in params], before)
    assert all(not t.any() for state in optimizer.state.values() for t in state.values())
    optimizer.found_inf = torch.tensor(0.0)
    for p, q in zip(params, plain, strict=True):
        q.grad, p.grad = p.grad.clone(), 8 * p.grad
    optimizer.step(), stock.step()
    for p, q, group in zip(params, plain, optimizer.param_groups, strict=True):
        constraint = group["constraint"] or MaxNorm(1.0, group["axis"])
        torch.testing.assert_close(p.detach(), constraint.project(q.detach()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0)  # as torch's own fused step leaves it


# ---------------------------------------------------------------------------------------------------- shaped updates

BRAKE, TANGENT, RELATIVE, BOUND = RadialBrake(0.5, 0.8), TangentUpdate(), RelativeUpdate(), MaxUpdate(0.03, floor=0.01)
SETTINGS = st.one_of(
    st.fixed_dictionaries({"constraint": st.sampled_from([None, UnitNorm(), Sphere("initial", None)])}),
    st.fixed_dictionaries({"c": st.sampled_from([1.0, 1e30]), "axis": st.sampled_from([None, "fan_in", "matrix"])}),
    st.fixed_dictionaries({"c": st.just(1.0), "metric": st.just("adaptive")}),
    st.just({"constraint": MinMaxNorm(0.5, 1.0)}),
)
INNER = [
    (ProjectedAdam, {}),
    (ProjectedAdam, {"weight_decay": 0.01, "maximize": True}),
    (ProjectedAdamW, {"weight_decay": 0.1, "amsgrad": True}),
    (ProjectedSGD, {}),
    (ProjectedSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (ProjectedSGD, {"momentum": 0.9, "dampening": 0.5, "maximize": True}),
]


def step_shaped(shapes, cls, fused, change, steps=3, **options):
    """Return the parameters and the optimizer after some steps; `change(t, params, optimizer)` comes before step t."""
    params = [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(7))) for s in shapes]
    optimizer = cls([(str(i), p) for i, p in enumerate(params)], lr=0.02, fused=fused, **options)
    for t in range(steps):
        give_gradients(params, t)
        change(t, params, optimizer)
        optimizer.step()
    return params, optimizer


def check_as_unfused(shapes, cls, change=lambda t, params, optimizer: None, **options):
    """The kernel takes all parameters, and weights and states are those of the default step."""
    ours, optimizer = step_shaped(shapes, cls, True, change, **options)
    assert {choice.engine for choice in optimizer.routes().values()} == {"cpu"}
    theirs, other = step_shaped(shapes, cls, None, change, **options)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6, equal_nan=True)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for name, state in optimizer.state[p].items():
            torch.testing.assert_close(state, other.state[q][name], rtol=1e-5, atol=1e-6, equal_nan=True)


@NEEDS_NUMBA
@pytest.mark.filterwarnings("ignore:weight_decay")
@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(1, 40), st.integers(2, 50)),
            st.sampled_from([(9,), (3, 4, 3, 3), (2, 40_000), (300, 700), (9000, 2), (600, 1), (1, 600)]),
        ),
        min_size=1,
        max_size=4,
    ),
    setting=SETTINGS,
    update=st.sampled_from([BRAKE, TANGENT, RELATIVE, BOUND]),
    inner=st.sampled_from(INNER),
    bad=st.sampled_from([None, None, ("weight", math.nan), ("gradient", math.nan), ("gradient", math.inf)]),
    missing=st.sampled_from([None, 0, 1, 2]),
)
def test_a_shaped_step_is_that_of_plain_operations(shapes, setting, update, inner, bad, missing):
    """Biases beside matrices, gradients that miss a step, gradients of zero, vectors with NaN or infinity."""
    cls, options = inner
    if setting.get("metric") and cls is ProjectedSGD:
        setting = {"c": 1.0}

    def change(t, params, optimizer):
        if t == missing and len(params) > 1:
            params[0].grad = None
        if t == 1:
            params[-1].grad[:1] = 0
        if t == 2 and bad:
            where = params[-1].detach() if bad[0] == "weight" else params[-1].grad
            where.view(-1)[-1] = bad[1]

    check_as_unfused(shapes, cls, change, update=update, **setting, **options)


@NEEDS_NUMBA
@pytest.mark.parametrize("size", [1e-27, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("update", [BRAKE, TANGENT, RELATIVE, BOUND], ids=lambda u: type(u).__name__)
@pytest.mark.parametrize("length", [40, 70_000])
def test_a_shaped_step_of_any_size_is_the_formula(length, update, size):
    """In float64, where no square over- or underflows; SGD, so that the update has the size of the weights."""
    (p,), (g,) = random((3, length), scale=size), random((3, length), seed=1, scale=size)
    optimizer = ProjectedSGD([p], lr=0.02, c=1e6 * size, update=update, fused=True)
    w, u = p.detach().double(), -0.02 * g.detach().double()
    wanted = w + update.shape(u, w, 0.02, (1,), xp)
    p.grad = g.detach()
    optimizer.step()
    assert (p.detach().double() - wanted).norm() <= 1e-7 * w.norm()
    assert [choice.engine for choice in optimizer.routes().values()] == ["cpu"]


@NEEDS_NUMBA
def test_the_kernel_knows_the_metric_of_a_shaped_step(monkeypatch):
    monkeypatch.setattr("projgd.torch.engines.cpu._project_unsettled", None)  # for a metric that is out of range
    check_as_unfused([(30, 40), (5,)], ProjectedAdam, update=BRAKE, c=1.0, metric="adaptive")


@NEEDS_NUMBA
def test_settings_of_a_shaped_group_may_change_between_steps():
    def change(t, params, optimizer):
        group = optimizer.param_groups[0]
        group["c"], group["lr"] = (3.0, 1.0, 2.0, 0.5)[t], 0.01 * (1 + t)
        group["update"] = (BRAKE, BRAKE, TANGENT, None)[t]
        group["weight_decay"] = (0.0, 0.1, 0.0, 0.0)[t]

    check_as_unfused([(30, 40), (5,), (600, 300)], ProjectedAdam, change, steps=4, c=1.0, update=BRAKE)


@NEEDS_NUMBA
@pytest.mark.parametrize(("cls", "options"), INNER[::3])
def test_gradscaler_scales_and_skips_a_shaped_step(cls, options):
    def scale(t, params, optimizer):
        if optimizer.param_groups[0]["fused"]:  # GradScaler unscales the gradients of any other step itself
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(float(t == 0))
            for p in params:
                p.grad *= 8
        elif t == 0:
            for p in params:
                p.grad = None

    check_as_unfused([(30, 40), (5,)], cls, scale, c=1.0, update=RELATIVE, **options)


@NEEDS_NUMBA
def test_what_the_kernel_does_not_take_of_a_shaped_group_is_shaped_by_plain_operations():
    ends = []
    for fused in (True, None):
        params = random((8, 9), (8, 9), (7,))
        params[1] = torch.nn.Parameter(params[1].detach().double())
        optimizer = ProjectedAdam(params, lr=0.1, c=1.0, update=BRAKE, fused=fused)
        for t in range(2):
            give_gradients(params, t)
            optimizer.step()
        ends.append([p.detach() for p in params])
        engines = [choice.engine for choice in optimizer.routes().values()]
        assert engines == (["cpu", "reference", "cpu"] if fused else ["eager", "reference", "free"])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


@NEEDS_NUMBA
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("is_unscaled", [False, True])
def test_what_the_engine_does_not_take_steps_under_gradscaler_as_without(is_unscaled, skips):
    """torch's fused kernel is wrong in bfloat16, and reads a transposed gradient row by row."""
    start = [torch.randn(6, 6, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    ours, plain = ([torch.nn.Parameter(x.clone()) for x in (*start, start[0].bfloat16())] for _ in range(2))
    optimizer = ProjectedSGD(ours, lr=0.1, momentum=0.9, c=1e6, fused=True)
    stock = torch.optim.SGD(plain, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    for i in range(3):
        for k, (p, q) in enumerate(zip(ours, plain, strict=True)):
            q.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(9 * i + k)).to(p.dtype)
            p.grad = 8 * q.grad
        ours[1].grad = ours[1].grad.t().contiguous().t()
        if skips and i == 1:
            ours[0].grad[0, 0] = math.inf
        else:
            stock.step()
        if is_unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(8.0)
        assert ours[1].grad.equal(plain[1].grad) or (skips and i == 1)
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0 if p.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@FUSED
def test_a_parameter_that_grew_is_an_error_and_not_a_read_beyond_its_state(fused):
    for cls in (ProjectedSGD, ProjectedAdam):
        p, q = random((64, 8), (4, 3))
        optimizer = cls([p, q], lr=0.1, c=1.0, fused=fused, **({"momentum": 0.9} if cls is ProjectedSGD else {}))
        give_gradients([p, q], 0)
        optimizer.step()
        p.data = torch.ones(4000, 8)
        p.grad = None
        give_gradients([p, q], 0)
        start = q.detach().clone()
        with pytest.raises(RuntimeError, match="size"):
            optimizer.step()
        assert torch.equal(q, start) or not fused


@NEEDS_NUMBA
def test_a_weight_that_torch_refuses_is_refused_before_the_others_move():
    p, q = random((4, 3), (4, 3))
    optimizer = ProjectedAdam([p, q], lr=0.1, c=1.0, fused=True)
    give_gradients([p, q], 0)
    optimizer.step()
    q.data, q.grad = q.data.double(), None
    give_gradients([p, q], 0)
    start = [p.detach().clone(), q.detach().clone()]
    with pytest.raises(RuntimeError, match="scalar type"):
        optimizer.step()
    assert torch.equal(p, start[0])
    assert torch.equal(q, start[1])


# ---------------------------------------------------------------------------------------------------------- refusals


def job_for(p, constraint=None, change=None, **fields):
    optimizer = torch.optim.Adam([p], lr=0.1, fused=True)
    group = {**optimizer.param_groups[0], "update": None, "gradient": None, **(change or {})}
    return Job(optimizer, torch.optim.Adam, group, constraint or MaxNorm(1.0), **fields), p


def with_gradient(grad, p=None):
    p = weight() if p is None else p
    p.grad = grad
    return p


def with_state(**state):
    job, p = job_for(weight())
    job.optimizer.state[p].update(state)
    return job, p


def refusals():
    """Jobs with a parameter that the engine cannot take, and words of the sentence that it gives."""
    p = weight()
    yield job_for(p, change={"fused": False}), "fused=True"
    yield job_for(p, compiled=True), "torch.compile"
    yield (Job(torch.optim.RMSprop([p]), torch.optim.RMSprop, {"fused": True}, None), p), "RMSprop"
    yield job_for(p, change={"gradient": "tangent"}), "as it comes"
    yield job_for(p, constraint=MaxNorm(1.0, 0), change={"update": RelativeUpdate()}), "one after the other"
    yield job_for(p, constraint=Box(-1.0, 1.0), change={"update": TangentUpdate()}), "not a set of norms"
    for change in ({"capturable": True}, {"differentiable": True}):
        yield job_for(p, change=change), "no graph can record"
    yield job_for(p, metric=lambda p: None), "no other metric"
    yield job_for(torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64))), "float64"
    yield job_for(torch.nn.Parameter(torch._neg_view(torch.ones(3, 4)))), "dense tensor"
    yield job_for(torch.nn.Parameter(torch.ones(3, 8)[:, ::2])), "one after the other"
    yield job_for(p, constraint=MaxNorm(1.0, 0)), "one after the other"
    yield job_for(p, constraint=Box(-1.0, 1.0)), "not a set of norms"
    yield job_for(with_gradient(torch.ones(3, 4).t())), "gradient"
    yield job_for(with_gradient(torch.ones(4, 3).to_sparse())), "gradient is sparse"
    moments = {"exp_avg": torch.zeros(4, 3), "exp_avg_sq": torch.zeros(4, 3)}
    yield with_state(**moments), "only exp_avg, exp_avg_sq"
    yield with_state(**moments, step=torch.tensor(1.0, dtype=torch.float64)), "step count"
    yield with_state(**moments | {"exp_avg": torch.zeros(3, 4).t()}, step=torch.tensor(1.0)), "a state"


@NEEDS_NUMBA
def test_refusals_say_why():
    job, p = job_for(weight())
    assert Cpu().refuses(job, p) is None
    for (job, p), words in refusals():
        assert words in str(Cpu().refuses(job, p)), words
    optimizer = ProjectedAdam([weight()], constraint=MinMaxNorm(0.5, 1.0), metric="adaptive", fused=True)
    assert "projects onto a ball, not onto" in str(optimizer.routes())


# ------------------------------------------------------------------------------------------------ threads and processes


@NEEDS_NUMBA
def test_one_and_two_threads_make_the_same_bits():
    shapes, found = [(2, 300_000), (999, 64), (16, 8, 3, 3), (128,)], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            params = random(*shapes, scale=2.0)
            for cls, update in ((ProjectedSGD, None), (ProjectedAdamW, None), (ProjectedAdamW, RadialBrake())):
                optimizer = cls(params, lr=0.1, c=3.0, fused=True, update=update)
                for i in range(2):
                    give_gradients(params, i)
                    optimizer.step()
            found.append([p.detach() for p in params])
    finally:
        torch.set_num_threads(before)
    assert same(*found)


SCRIPT = """
import os, sys, torch
if "{hide}": sys.modules["{hide}"] = None
from projgd.torch import ProjectedSGD
torch.set_num_threads(1)
p = torch.nn.Parameter(torch.linspace(-1, 1, 256).reshape(8, 32))
optimizer = ProjectedSGD([("p", p)], lr=0.1, c=1.0, fused=True)
def step():
    p.grad = torch.full_like(p, -3.0)
    optimizer.step()
    held = p.detach().double().norm(dim=1).max().item() <= 1
    return optimizer.routes()["p"].engine, held, torch.get_num_threads(), round(p.detach().double().sum().item(), 4)
print(*step(), flush=True)
if "{fork}":
    child = os.fork()
    print(*step(), os.waitpid(child, 0)[1] if child else "", flush=True)
    os._exit(0)
"""


def run(**options):
    script = SCRIPT.format(**{"hide": "", "fork": "", **options})
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


@NEEDS_NUMBA
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_goes_on_with_another_engine():
    """The kernel's threads are not there after a fork: a step that used them would hang or be killed."""
    first, *both = run(fork="yes")
    assert first[:3] == ["cpu", "True", "1"]  # numba's threads leave torch's number of threads as it is
    assert sorted(line[0] for line in both) == ["cpu", "eager"]
    assert {(*line[1:3], line[3]) for line in both} == {("True", "1", both[0][3])}
    assert [line[4:] for line in both if line[0] == "cpu"] == [["0"]]


@NEEDS_NUMBA
def test_without_numba_another_engine_gives_the_same():
    p = torch.nn.Parameter(torch.linspace(-1, 1, 256).reshape(8, 32))
    p.grad = torch.full_like(p, -3.0)
    ProjectedSGD([p], lr=0.1, c=1.0, fused=True).step()
    assert run(hide="numba") == [["eager", "True", "1", str(round(p.detach().double().sum().item(), 4))]]
