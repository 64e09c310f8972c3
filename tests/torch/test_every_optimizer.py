"""One factory for every optimizer: the step stays the optimizer's own, and what follows it is the projection."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import schedulefree
import torch
from lion_pytorch import Lion
from torch.testing._internal.two_tensor import TwoTensor

import projgd.torch
from projgd import MaxNorm, NonNegative
from projgd.torch import ProjectedAdam, ProjectedSGD, project_after_step, projected

STOCK = sorted(
    (v for v in vars(torch.optim).values() if inspect.isclass(v) and issubclass(v, torch.optim.Optimizer)),
    key=lambda cls: cls.__name__,
)
STOCK.remove(torch.optim.Optimizer)
THIRD = [Lion, schedulefree.SGDScheduleFree, schedulefree.AdamWScheduleFree]
RATES = {"Adafactor": 0.5, "Adadelta": 50.0, "LBFGS": 0.5, "Muon": 0.5, "SGD": 0.5}
OPTIONS = {"LBFGS": {"max_iter": 3}}


class Net(torch.nn.Module):
    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(7, 6, sparse=sparse)
        self.first = torch.nn.Linear(6, 5, bias=False)
        self.last = torch.nn.Linear(5, 3, bias=False)

    def forward(self, tokens):
        return self.last(torch.tanh(self.first(self.table(tokens))))

    def trained(self, cls):
        return [self.table.weight] if cls is torch.optim.SparseAdam else list(self.parameters())


def make(cls, made, **settings):
    net = Net(sparse=cls is torch.optim.SparseAdam)
    lr = RATES.get(cls.__name__, 0.05)
    optimizer = made(net.trained(cls), lr=lr, **OPTIONS.get(cls.__name__, {}), **settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return net, optimizer


def step(net, optimizer, seed):
    tokens = torch.randint(7, (16,), generator=torch.Generator().manual_seed(seed))
    target = torch.randint(3, (16,), generator=torch.Generator().manual_seed(seed + 99))

    def closure():
        net.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(tokens), target)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(closure)
    closure()
    return optimizer.step()


def same(a, b):
    """Equal bit for bit, through any nesting of containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def reference(w, c):
    """The formula in float64: w · min(1, c / ‖w‖), a vector per row."""
    w = w.detach().numpy().astype(np.float64)
    return w * np.minimum(1, c / np.linalg.norm(w, axis=1, keepdims=True))


def longest(w):
    return np.linalg.norm(w.detach().numpy().astype(np.float64), axis=1).max()


def test_all_of_torch_optim_is_there_by_name():
    assert len(STOCK) >= 15
    for cls in STOCK:
        made = getattr(projgd.torch, f"Projected{cls.__name__}")
        assert made is projected(cls)
        assert issubclass(made, cls)
        assert pickle.loads(pickle.dumps(made)) is made


@pytest.mark.parametrize("cls", STOCK + THIRD, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("settings", [{}, {"c": None}, {"c": 1e6}], ids=["bare", "free", "slack"])
def test_where_nothing_binds_the_step_is_the_plain_one_bit_for_bit(cls, settings):
    net, plain = make(cls, cls)
    twin, ours = make(cls, projected(cls), **settings)
    for seed in range(5):
        assert same(step(net, plain, seed), step(twin, ours, seed))
        assert same(list(net.parameters()), list(twin.parameters()))
        assert same(plain.state_dict()["state"], ours.state_dict()["state"])


@pytest.mark.parametrize("cls", STOCK + THIRD, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("way", ["class", "hook"])
def test_a_step_is_the_plain_step_and_then_the_formula(cls, way):
    c = 0.6
    net, plain = make(cls, cls)
    if way == "class":
        twin, ours = make(cls, projected(cls), c=c)
    else:
        twin, ours = make(cls, cls)
        project_after_step(ours, MaxNorm(c))
    bound = 0
    for seed in range(5):
        step(net, plain, seed)
        step(twin, ours, seed)
        for w, p in zip(net.trained(cls), twin.trained(cls), strict=True):
            touched = p.grad.to_dense().abs().sum(1).numpy() > 0 if p.grad.is_sparse else slice(None)
            expected, landed = reference(w, c)[touched], p.detach().numpy().astype(np.float64)[touched]
            np.testing.assert_allclose(landed, expected, rtol=3e-6, atol=1e-7)
            assert (np.linalg.norm(landed, axis=1) <= c).all()
            bound += int((np.linalg.norm(landed, axis=1) > c * (1 - 1e-5)).sum())
        with torch.no_grad():  # from the same point into the next step
            for w, p in zip(net.parameters(), twin.parameters(), strict=True):
                w.copy_(p)
    assert bound > 5


def test_the_handle_ends_it_and_later_parameters_are_held():
    w, late = (torch.nn.Parameter(torch.full((2, 3), 5.0)) for _ in range(2))
    optimizer = torch.optim.SGD([w], lr=0.1)
    handle = project_after_step(optimizer, MaxNorm(1.0))
    optimizer.add_param_group({"params": [late]})
    w.grad = late.grad = torch.zeros(2, 3)
    optimizer.step()
    assert longest(w) <= 1
    assert longest(late) <= 1
    handle.remove()
    with torch.no_grad():
        w.fill_(5.0)
    optimizer.step()
    assert bool((w == 5.0).all())


def test_hook_with_rules_by_the_optimizers_own_names_and_by_the_model():
    for by_model in (False, True):
        net = Net()
        rules = {"first.*": MaxNorm(0.2), "last.*": MaxNorm(0.1), "table.weight": None}
        optimizer = torch.optim.Adam(net.parameters() if by_model else net.named_parameters(), lr=0.1)
        project_after_step(optimizer, rules, net if by_model else None)
        before = net.table.weight.detach().norm(dim=1)
        step(net, optimizer, 0)
        assert longest(net.first.weight) <= 0.2
        assert longest(net.last.weight) <= 0.1
        assert bool((net.table.weight.norm(dim=1) > before - 0.5).all())
    for rules, message in (
        ({"first.*": MaxNorm(0.2), "first.weight": None}, "'first.weight' says nothing"),
        ({}, "there are no rules"),
    ):
        with pytest.raises(ValueError, match=message):
            project_after_step(torch.optim.Adam(Net().named_parameters()), rules)
    with pytest.raises(ValueError, match=r"'bias' applies only to parameters without a fan-in, such as 'bias'"):
        project_after_step(torch.optim.Adam(torch.nn.Linear(2, 2).named_parameters()), {"bias": MaxNorm(1.0)})
    with pytest.raises(ValueError, match="pass model= here"):
        project_after_step(torch.optim.Adam(Net().parameters()), {"first.*": MaxNorm(0.2)})


def test_hook_follows_tensors_that_a_wrapper_puts_in_place():
    old, new = (torch.nn.Parameter(torch.full((2, 3), 5.0)) for _ in range(2))
    optimizer = torch.optim.SGD([old], lr=0.1)
    project_after_step(optimizer, MaxNorm(1.0))
    optimizer.param_groups[0]["params"][0] = new
    new.grad = torch.zeros(2, 3)
    optimizer.step()
    assert longest(new) <= 1


class Mine(ProjectedAdam):
    """A subclass that a user writes."""


@pytest.mark.parametrize("made", [*map(projected, STOCK), projected(Lion), Mine], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_keep_the_projection(made, way):
    cls = made.inner
    net, optimizer = make(cls, made, c=0.3)
    step(net, optimizer, 0)
    both = (net, optimizer)
    twin, copied = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert type(copied) is made
    for seed in range(1, 4):
        step(net, optimizer, seed)
        step(twin, copied, seed)
    assert same(list(net.parameters()), list(twin.parameters()))
    assert max(map(longest, twin.trained(cls))) <= 0.3


@pytest.mark.parametrize("cls", STOCK, ids=lambda cls: cls.__name__)
def test_checkpoints_are_plain_and_go_both_ways(cls):
    net, ours = make(cls, projected(cls), constraint=MaxNorm(0.3))
    step(net, ours, 0)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    saved = torch.load(file)  # weights_only=True
    _, again = make(cls, projected(cls), c=7.0)
    again.load_state_dict(saved)
    assert again.param_groups[0]["constraint"] == MaxNorm(0.3)
    assert same(again.state_dict(), ours.state_dict())

    _, plain = make(cls, cls)
    plain.load_state_dict(saved)
    assert same(plain.state_dict()["state"], saved["state"])

    other, plain = make(cls, cls)
    step(other, plain, 0)
    _, ours = make(cls, projected(cls), constraint=MaxNorm(0.3))
    ours.load_state_dict(plain.state_dict())
    assert same(ours.state_dict()["state"], plain.state_dict()["state"])
    assert ours.param_groups[0]["constraint"] == MaxNorm(0.3)


def test_parameters_without_gradient_are_projected_only_when_asked():
    for asked in (False, True):
        used, idle = (torch.nn.Parameter(torch.full((2, 3), 5.0)) for _ in range(2))
        optimizer = ProjectedSGD([used, idle], c=1.0, without_grad=asked)
        used.grad = torch.zeros(2, 3)
        optimizer.step()
        assert longest(used) <= 1
        assert bool(longest(idle) <= 1) is asked


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr_": 1.0}, "unknown key 'lr_'"),
        ({"c": 0.0}, "must be positive"),
        ({"c": float("nan")}, "must be positive"),
        ({"c": 3.0, "constraint": NonNegative()}, "not both"),
        ({"c": 3.0, "axis": 2}, "axis 2 is out of range for weight with shape"),
        ({"constraint": "max"}, "is no constraint"),
        ({"constraint": {"*": MaxNorm(1.0)}}, r"is no constraint: .* param_groups\(model, rules\)"),
    ],
)
def test_bad_groups_are_refused_and_nothing_is_added(group, message):
    optimizer = ProjectedSGD([("first", torch.nn.Parameter(torch.ones(2, 3)))], c=1.0)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.add_param_group({"params": [("weight", torch.nn.Parameter(torch.ones(2, 3)))], **group})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.complex64), "parameter 0 of group 0 has dtype complex64"),
        (torch.zeros(2, 3, dtype=torch.int32), "has dtype int32"),
        (torch.nn.UninitializedParameter(), "not initialised yet"),
        (torch.zeros(3).expand(2, 3), "expanded"),
        (torch.eye(3).to_sparse(), "is a sparse_coo tensor"),
        (TwoTensor(torch.eye(3), torch.eye(3)), "is a TwoTensor, a tensor subclass whose norms"),
    ],
)
def test_parameters_that_cannot_be_measured_are_refused(param, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ProjectedSGD([param], c=1.0)
    with pytest.raises((ValueError, TypeError), match=message):
        project_after_step(torch.optim.SGD([param]), MaxNorm(1.0))


def test_two_parameters_of_one_name_are_both_looked_at():
    bad, good = torch.zeros(2, 3, dtype=torch.complex64), torch.nn.Parameter(torch.full((2, 3), 5.0))
    for twice in ([("w", bad), ("w", good)], [("w", good), ("w", bad)]):
        with pytest.raises(TypeError, match=r"w.* has dtype complex64"):
            ProjectedSGD(twice, c=1.0)
    other = torch.nn.Parameter(torch.full((2, 3), 5.0))
    optimizer = torch.optim.SGD([("w", good), ("w", other)], lr=0.1)
    project_after_step(optimizer, MaxNorm(1.0))
    good.grad = other.grad = torch.zeros(2, 3)
    optimizer.step()
    assert max(longest(good), longest(other)) <= 1


@pytest.mark.parametrize("late", [torch.ones(2, 3, dtype=torch.complex64), torch.ones(3)])
@pytest.mark.parametrize("way", ["added", "in its place"])
def test_a_hook_that_does_not_fit_later_parameters_raises_before_the_step(late, way):
    w = torch.nn.Parameter(torch.full((2, 3), 5.0))
    optimizer = torch.optim.SGD([w], lr=0.1)
    project_after_step(optimizer, MaxNorm(1.0, axis=1))
    if way == "added":
        optimizer.add_param_group({"params": [late]})
    else:
        optimizer.param_groups[0]["params"].insert(0, late)
    w.grad, late.grad = torch.ones_like(w), torch.ones_like(late)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=r"has dtype complex64|axis 1 is out of range"):
            optimizer.step()
    assert bool((w == 5).all())


class WithoutDefaults(torch.optim.Optimizer):
    """Keeps all its options in its groups, as some optimizers do that treat groups differently."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["rate"])


class WithC(torch.optim.SGD):
    """Has an option of the same name as one of ours."""

    def __init__(self, params, c=2.0):
        super().__init__(params, lr=c)


def test_unusual_optimizers():
    w = torch.nn.Parameter(torch.full((2, 3), 5.0))
    optimizer = projected(WithoutDefaults)([{"params": [w], "rate": 0.5, "c": 1.0}])
    w.grad = torch.ones(2, 3)
    optimizer.step()
    assert 1 - 1e-5 <= longest(w) <= 1
    with pytest.raises(TypeError, match=r"WithC has an option c of its own.*project_after_step"):
        projected(WithC)
    ProjectedSGD([{"params": [w], "name": "backbone", "lr_scale": 0.5}], c=1.0)  # what loggers and schedules read
