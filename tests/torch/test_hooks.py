"""`project_after_step`: a projection for an optimizer that exists already, and what of it is refused."""

import copy

import pytest
import torch
from lion_pytorch import Lion

from projgd import Box, MaxNorm, MinMaxNorm, NonNegative, Sphere, UnitNorm
from projgd.torch import ProjectedSGD, project_after_step
from tests.torch.common import equal, longest, longest_of, loss_of, network, norms, outside, step, train, weight


@pytest.mark.parametrize(
    "constraint", [MaxNorm(1.0), MinMaxNorm(9.0, 10.0), UnitNorm(), Box(-1.0, 1.0), NonNegative()], ids=str
)
@pytest.mark.parametrize("fused", [None, True])
def test_a_step_is_followed_by_the_projection(constraint, fused):
    p, stock = weight(), weight()
    optimizer = torch.optim.Adam([p], lr=0.1, fused=fused)
    project_after_step(optimizer, constraint)
    step(optimizer, 1.0)
    step(torch.optim.Adam([stock], lr=0.1, fused=fused), 1.0)
    torch.testing.assert_close(p.detach(), constraint.project(stock.detach()), rtol=1e-6, atol=0)
    assert set(optimizer.param_groups[0]) == set(torch.optim.Adam([stock]).param_groups[0])
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}


def test_it_is_the_projected_class():
    one, other = network(), network()
    train(one, ProjectedSGD(one.parameters(), lr=1.0, momentum=0.9, c=0.5), range(5))
    optimizer = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9)
    project_after_step(optimizer, MaxNorm(0.5))
    train(other, optimizer, range(5))
    assert equal(one, other)


def test_the_handle_ends_it_and_later_parameters_are_held():
    w, late = weight(), weight()
    optimizer = torch.optim.SGD([w], lr=0.1)
    handle = project_after_step(optimizer, MaxNorm(1.0))
    optimizer.add_param_group({"params": [late]})
    step(optimizer)
    assert longest(w) <= 1
    assert longest(late) <= 1
    handle.remove()
    assert not optimizer._optimizer_step_pre_hooks
    with torch.no_grad():
        w.fill_(5.0)
    step(optimizer)
    assert bool((w == 5.0).all())


def test_parameters_without_gradient_are_projected_only_when_asked():
    for asked in (False, True):
        used, idle = weight(), weight()
        optimizer = torch.optim.SGD([used, idle])
        project_after_step(optimizer, MaxNorm(1.0), without_grad=asked)
        used.grad = torch.zeros_like(used)
        optimizer.step()
        assert longest(used) <= 1
        assert bool(longest(idle) <= 1) is asked


@pytest.mark.parametrize("by_model", [False, True])
def test_rules_over_names(by_model):
    net = outside(network())
    optimizer = torch.optim.Adam(net.parameters() if by_model else net.named_parameters(), lr=0.01)
    project_after_step(optimizer, {"0.*": MaxNorm(0.2), "2.weight": None}, net if by_model else None)
    before = norms(net[2].weight)
    train(net, optimizer, range(1))
    assert longest(net[0].weight) <= 0.2
    assert (abs(norms(net[2].weight) - before) < 0.1).all()


def test_the_layers_of_a_model_say_what_a_neuron_is():
    net = torch.nn.ConvTranspose1d(4, 6, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    project_after_step(optimizer, MaxNorm(0.1), net)
    bias = net.bias.detach().clone()
    step(optimizer)
    assert (norms(net.weight, axis=(0, 2)) <= 0.1).all()
    assert torch.equal(net.bias, bias)


def test_of_a_model_only_a_part_may_be_held():
    net = outside(network())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    project_after_step(optimizer, MaxNorm(0.5), net[0])
    before = net[2].weight.detach().clone()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert longest(net[0].weight) <= 0.5
    assert torch.equal(net[2].weight, before)


def test_tensors_that_a_wrapper_puts_in_place_are_held():
    old, new = weight(), weight()
    optimizer = torch.optim.SGD([old], lr=0.1)
    project_after_step(optimizer, MaxNorm(1.0))
    step(optimizer)
    optimizer.param_groups[0]["params"][0] = new
    step(optimizer)
    assert longest(new) <= 1


def test_two_parameters_of_one_name_are_both_held():
    one, other = weight(), weight()
    optimizer = torch.optim.SGD([("w", one), ("w", other)], lr=0.1)
    project_after_step(optimizer, MaxNorm(1.0))
    step(optimizer)
    assert max(longest(one), longest(other)) <= 1


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, Lion])
def test_with_a_closure(cls):
    net = outside(network())
    optimizer = cls(net.parameters(), lr=0.1)
    project_after_step(optimizer, MaxNorm(0.5))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    assert torch.is_tensor(optimizer.step(closure))
    assert longest_of(net) <= 0.5


def test_a_copy_has_no_hook():
    """As the docstring says; torch drops all hooks of a copied optimizer."""
    p = weight()
    optimizer = torch.optim.SGD([p], lr=0.1)
    project_after_step(optimizer, MaxNorm(1.0))
    twin = copy.deepcopy(optimizer)
    step(twin)
    assert bool((twin.param_groups[0]["params"][0] == 5).all())
    step(optimizer)
    assert longest(p) <= 1


@pytest.mark.parametrize("late", [torch.ones(2, 3, dtype=torch.complex64), torch.ones(3, 2)], ids=["complex", "short"])
@pytest.mark.parametrize("way", ["added", "in its place"])
def test_what_does_not_fit_later_parameters_raises_before_the_step(late, way):
    w = weight(2, 2, 2)
    optimizer = torch.optim.SGD([w], lr=0.1)
    project_after_step(optimizer, MaxNorm(1.0, axis=2))
    if way == "added":
        optimizer.add_param_group({"params": [late]})
    else:
        optimizer.param_groups[0]["params"].insert(0, late)
    w.grad, late.grad = torch.ones_like(w), torch.ones_like(late)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=r"has dtype complex64|axis 2 is out of range"):
            optimizer.step()
    assert bool((w == 5).all())


class Wrapper:
    """Not an optimizer, as that of Accelerate."""

    param_groups = ()


@pytest.mark.parametrize(
    ("make", "constraint", "model", "says"),
    [
        (lambda net: Wrapper(), MaxNorm(4.0), None, "takes a torch.optim.Optimizer, not Wrapper; of a wrapper pass"),
        (
            lambda net: torch.optim.Adam(net.parameters()),
            4.0,
            None,
            "4.0 is not a constraint: pass one such",
        ),
        (lambda net: torch.optim.Adam(net.parameters()), {"0.*": MaxNorm(0.2)}, None, "pass model= here"),
        (lambda net: torch.optim.Adam(net.named_parameters()), {}, None, "there are no rules"),
        (
            lambda net: torch.optim.Adam(net.named_parameters()),
            {"0.*": MaxNorm(0.2), "0.weight": None},
            None,
            "'0.weight' has no effect",
        ),
        (
            lambda net: torch.optim.Adam(net.named_parameters()),
            {"*.bias": MaxNorm(1.0)},
            None,
            r"'\*.bias' applies only to parameters without a fan-in, such as '0.bias'",
        ),
        (lambda net: torch.optim.Adam(net.parameters()), MaxNorm(4.0), network(), "nothing would be projected"),
        (lambda net: torch.optim.Adam(net.parameters()), Sphere("initial"), None, r"a hook has none: use projected\("),
        (lambda net: torch.optim.Adam(net.parameters()), MaxNorm(1.0, axis=2), None, "axis 2 is out of range for"),
        (lambda net: torch.optim.Adam(net.parameters()), MaxNorm(1e-30), None, "c=1e-30 is too small"),
    ],
)
def test_what_cannot_be_honoured_is_refused(make, constraint, model, says):
    with pytest.raises((TypeError, ValueError), match=says):
        project_after_step(make(network()), constraint, model)
