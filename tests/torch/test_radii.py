"""The initial norms of `Sphere("initial")`: taken once, kept in the optimizer's state, and no hindrance to others."""

import copy
import math

import numpy as np
import pytest
import torch

from projgd import MaxNorm, RelativeUpdate, Sphere
from projgd.torch import ProjectedAdam, ProjectedSGD, projected
from tests.torch.common import copied, norms, saved_and_loaded, step, weight


@pytest.mark.parametrize("fused", [None, True])
def test_radii_follow_a_set_that_is_changed(fused):
    p = weight()
    optimizer = ProjectedAdam([p], lr=0.1, constraint=Sphere("initial", axis=None), fused=fused)
    step(optimizer)
    with torch.no_grad():
        p[0] *= 2
    optimizer.param_groups[0]["constraint"] = Sphere("initial")
    before = norms(p)
    step(optimizer, 1.0)
    np.testing.assert_allclose(norms(p), before, rtol=1e-6)
    optimizer.param_groups[0]["constraint"] = MaxNorm(1.0)
    step(optimizer, 1.0)
    np.testing.assert_allclose(norms(p), 1, rtol=1e-5)
    assert "initial" not in optimizer.state_dict()["state"][0]


@pytest.mark.parametrize("inner", [torch.optim.Adam, torch.optim.SGD, torch.optim.Muon, torch.optim.LBFGS])
@pytest.mark.parametrize("steps", [0, 1])
def test_with_radii_too_a_state_goes_to_the_stock_optimizer_and_back(inner, steps):
    def train(optimizer, grads):
        for g in grads:
            p = optimizer.param_groups[0]["params"][0]

            def closure(p=p, g=g):
                p.grad = torch.full_like(p, g)
                return torch.zeros(())

            optimizer.step(closure)

    p, q, r = weight(), weight(), weight(value=1.0)
    idle = torch.nn.Parameter(torch.ones(3, 3))
    make = projected(inner)
    ours = make([p, idle], constraint=Sphere("initial"))
    train(ours, [0.5] * steps)
    stock = inner([q, torch.nn.Parameter(torch.ones(3, 3))])
    stock.load_state_dict(ours.state_dict())
    train(stock, [0.25])  # Adam takes a parameter with an odd state for one that it knows
    back = make([r, torch.nn.Parameter(torch.ones(3, 3))], constraint=Sphere("initial"))
    back.load_state_dict(stock.state_dict())
    with torch.no_grad():
        r.copy_(p)
    train(back, [0.5])
    np.testing.assert_allclose(norms(r), norms(weight()), rtol=1e-6)


def test_an_optimizer_without_states_keeps_the_radii_of_what_it_has_stepped_in_copies_too():
    p, idle = weight(), weight(3, 3)
    optimizer = ProjectedSGD([p, idle], lr=0.1, constraint=Sphere("initial"))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    for one in (optimizer, copied("deepcopy", optimizer), copied("pickle", optimizer)):
        for q in one.param_groups[0]["params"]:
            q.grad = None
        state = one.state_dict()["state"]
        np.testing.assert_allclose(state[0]["initial"].flatten(), norms(weight()), rtol=1e-6)
        assert not state.get(1)


def test_a_step_without_gradients_puts_no_radius_where_a_state_would_be():
    optimizer = ProjectedAdam([weight()], lr=0.1, constraint=Sphere("initial"))
    optimizer.step()
    torch.optim.Adam([weight()]).load_state_dict(optimizer.state_dict())
    step(optimizer, 1.0)


def test_loading_another_set_over_one_with_radii_and_the_other_way_round():
    ball, sphere = (
        ProjectedAdam([weight(value=v)], lr=0.1, constraint=set_)
        for v, set_ in ((1.0, MaxNorm(2.0)), (5.0, Sphere("initial")))
    )
    step(ball)
    step(sphere)
    saved = copy.deepcopy(ball.state_dict()), copy.deepcopy(sphere.state_dict())
    sphere.load_state_dict(saved[0])
    ball.load_state_dict(saved[1])
    step(sphere)
    step(ball)
    np.testing.assert_allclose(norms(sphere.param_groups[0]["params"][0]), 2, rtol=1e-5)
    np.testing.assert_allclose(norms(ball.param_groups[0]["params"][0]), norms(weight()), rtol=1e-6)


@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("update", [None, RelativeUpdate()], ids=str)
def test_radii_travel_with_the_optimizer(how, dtype, update):
    def run(optimizer, p, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        return p.detach()

    def made(p):
        return ProjectedAdam([p], lr=0.05, constraint=Sphere("initial"), update=update)

    p = torch.nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(99)).to(dtype))
    optimizer = made(p)
    run(optimizer, p, range(5))
    if how == "state_dict":
        q = torch.nn.Parameter(p.detach() * 3)  # made from other weights: the checkpoint's radii count
        other = made(q)
        saved = saved_and_loaded({"optimizer": optimizer.state_dict(), "p": p.detach()})
        q.data.copy_(saved["p"])
        other.load_state_dict(saved["optimizer"])
    else:
        other = copied(how, optimizer)
        (q,) = other.param_groups[0]["params"]
    assert torch.equal(run(optimizer, p, range(5, 10)), run(other, q, range(5, 10)))


def test_radii_of_parameters_added_later_and_put_in_by_hand():
    first, late, by_hand = weight(), weight(value=2.0), weight(value=3.0)
    optimizer = ProjectedSGD([first], lr=0.1, constraint=Sphere("initial"))
    optimizer.add_param_group({"params": [late]})
    step(optimizer, 1.0)
    optimizer.param_groups[0]["params"].append(by_hand)
    for _ in range(3):
        step(optimizer, 1.0)
    for p, value in ((first, 5.0), (late, 2.0), (by_hand, 3.0)):
        np.testing.assert_allclose(norms(p), value * 3**0.5, rtol=1e-6)


def test_a_vector_without_a_norm_is_refused_by_name():
    for bad in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="proj: 4 of its 4 vectors have norm 0 or are not finite"):
            ProjectedSGD([("proj", weight(value=bad))], constraint=Sphere("initial"))


@pytest.mark.parametrize("broken", [torch.ones(1, 1), torch.ones(7, 1), 0.0, -1.0, math.nan, math.inf], ids=str)
def test_radii_that_cannot_be_those_of_a_parameter_are_refused_before_anything_is_loaded(broken):
    p = weight()
    optimizer = ProjectedAdam([("hidden", p)], lr=0.1, constraint=Sphere("initial"))
    step(optimizer)
    before, state = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    radii = state["state"][0]["initial"]
    state["state"][0]["initial"] = broken if isinstance(broken, torch.Tensor) else radii.clone().fill_(broken)
    state["state"][0]["exp_avg"].fill_(7.0)
    with pytest.raises(ValueError, match=r"hidden: the state has .*radii"):
        optimizer.load_state_dict(state)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    state["state"][0]["initial"] = radii.flatten()
    optimizer.load_state_dict(state)
    step(optimizer)
    np.testing.assert_allclose(norms(p), radii.flatten(), rtol=1e-6)
