"""`hyperball(cls)` is a class of optimizers like any other: copied, pickled and subclassed; and what it refuses."""

import inspect

import lion_pytorch
import numpy as np
import pytest
import torch

from projgd import RelativeUpdate, Sphere
from projgd.torch import Projected, hyperball, projected
from tests.torch.common import copied, norms, saved_and_loaded, weight

AdamH = hyperball(torch.optim.Adam)


class Mine(hyperball(torch.optim.AdamW)):
    """A class of a user's own, with a constructor of its own."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, lr=lr)


class Momentum(torch.optim.SGD):
    """An optimizer with other defaults."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr, momentum=0.9)


def start(seed=1, shape=(8, 6)):
    return torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))


def run(optimizer, p, seeds):
    for seed in seeds:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 + seed))
        optimizer.step()
    return p.detach()


def test_it_is_a_class():
    assert inspect.isclass(AdamH)
    assert AdamH is hyperball(torch.optim.Adam)
    assert AdamH.__name__ == "HyperballAdam"
    assert issubclass(AdamH, (Projected, torch.optim.Adam))
    assert issubclass(AdamH, projected(torch.optim.Adam))
    optimizer = AdamH([start()], lr=0.01)
    assert isinstance(optimizer, torch.optim.Adam)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert not isinstance(projected(torch.optim.Adam)([start()]), AdamH)
    assert AdamH.inner is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert (group["constraint"], group["update"]) == (Sphere("initial", axis="matrix"), RelativeUpdate())


def test_it_is_the_projected_class_with_the_set_and_the_shaping():
    p, q = start(), start()
    one = AdamH([p], 0.05, betas=(0.5, 0.9))
    other = projected(torch.optim.Adam)(
        [q], lr=0.05, betas=(0.5, 0.9), constraint=Sphere("initial", axis="matrix"), update=RelativeUpdate()
    )
    assert torch.equal(run(one, p, range(4)), run(other, q, range(4)))


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Muon, Momentum, lion_pytorch.Lion])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_as_the_original_would(cls, how):
    p = start()
    optimizer = hyperball(cls)([p], lr=0.05)
    radius = float(p.detach().double().norm())
    run(optimizer, p, range(3))
    twin = copied(how, optimizer)
    assert type(twin) is type(optimizer) is hyperball(cls)
    (q,) = twin.param_groups[0]["params"]
    assert torch.equal(run(optimizer, p, range(3, 6)), run(twin, q, range(3, 6)))
    assert float(q.detach().double().norm()) == pytest.approx(radius, rel=1e-6)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_subclass_is_copied_as_itself(how):
    p = start()
    optimizer = Mine([p])
    run(optimizer, p, range(2))
    twin = copied(how, optimizer)
    assert type(twin) is Mine
    (q,) = twin.param_groups[0]["params"]
    assert torch.equal(run(optimizer, p, range(2, 4)), run(twin, q, range(2, 4)))


def test_a_state_dict_goes_on():
    p, q = start(), start(7)
    optimizer, other = AdamH([p], lr=0.05), AdamH([q], lr=0.3)
    run(optimizer, p, range(3))
    saved = saved_and_loaded({"optimizer": optimizer.state_dict(), "p": p.detach()})
    q.data.copy_(saved["p"])
    other.load_state_dict(saved["optimizer"])
    assert torch.equal(run(optimizer, p, range(3, 6)), run(other, q, range(3, 6)))


def test_a_checkpoint_before_the_first_step_loads():
    p, q = start(), start()
    optimizer, other = AdamH([p], lr=0.05), AdamH([q], lr=0.05)
    other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert torch.equal(run(optimizer, p, range(3)), run(other, q, range(3)))


def test_biases_and_freed_groups_take_the_inner_step():
    bias, twin_bias, head, twin_head = weight(5), weight(5), weight(), weight()
    ours = hyperball(torch.optim.AdamW)(
        [{"params": [start(), bias]}, {"params": [head], "constraint": None, "weight_decay": 0.1}], lr=0.01
    )
    stock = torch.optim.AdamW(
        [{"params": [twin_bias], "weight_decay": 0.0}, {"params": [twin_head], "weight_decay": 0.1}], lr=0.01
    )
    for k in range(3):
        for optimizer in (ours, stock):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.full_like(p, 1.0 + k)
            optimizer.step()
    assert torch.equal(bias, twin_bias)
    assert torch.equal(head, twin_head)


def test_every_form_of_params_and_a_decay_of_zero():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    before = [norms(layer.weight, axis=None) for layer in model]
    for params in (
        model.parameters(),
        model.named_parameters(),
        [{"params": model[0].parameters()}, {"params": (p for p in model[1].parameters()), "weight_decay": 0.0}],
    ):
        optimizer = hyperball(torch.optim.AdamW)(params, lr=0.1, weight_decay=0.0)
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        np.testing.assert_allclose([norms(layer.weight, axis=None) for layer in model], before, rtol=1e-6)


@pytest.mark.parametrize(
    ("params", "options", "says"),
    [
        ([("proj", weight(value=0.0))], {}, "proj: 1 of its 1 vectors have norm 0"),
        ([start()], {"weight_decay": 0.1}, r"weight_decay=0.1 does not go with hyperball\(\)"),
        ([{"params": [start()], "weight_decay": 0.2}], {}, "weight_decay=0.2 does not go"),
    ],
)
def test_what_cannot_be_honoured_is_refused(params, options, says):
    with pytest.raises(ValueError, match=says):
        hyperball(torch.optim.AdamW)(params, lr=0.1, **options)


def test_a_decay_by_position_is_seen():
    with pytest.raises(ValueError, match=r"weight_decay=0\.3 does not go"):
        hyperball(torch.optim.AdamW)([start()], 0.1, (0.9, 0.99), 1e-8, 0.3)


def test_it_compiles_into_one_graph():
    torch.compiler.reset()
    found = []
    for compiled in (False, True):
        p = start()
        optimizer = AdamH([p, weight(4)], lr=torch.tensor(0.05))
        take = torch.compile(optimizer.step, fullgraph=True, backend="eager") if compiled else optimizer.step
        for seed in range(3):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            take()
        found.append(p.detach())
        assert "initial" in optimizer.state_dict()["state"][0]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert abs(float(found[1].double().norm() / start().detach().double().norm()) - 1) <= 1e-6
