"""How people train in PyTorch: the projection is there, and nothing else has changed."""

import copy
import inspect
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler, swa_utils

from projgd import MaxNorm, MinMaxNorm, UnitNorm
from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD, project_after_step
from tests.torch.common import batch, equal, longest_of, loss_of, network, norms, outside

C = 0.5


@pytest.mark.parametrize("made", [ProjectedSGD, ProjectedAdamW], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("way", ["class", "hook"])
def test_amp_a_skipped_step_skips_the_projection(made, fused, way):
    net = outside(network())
    if way == "class":
        optimizer = made(net.parameters(), lr=0.1, fused=fused, c=C)
    else:
        optimizer = made.inner(net.parameters(), lr=0.1, fused=fused)
        project_after_step(optimizer, MaxNorm(C))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(net)
    for overflow in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net)
        scaler.scale(loss * (torch.inf if overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert equal(net, before) is overflow
        assert (longest_of(net) <= C) is not overflow


def test_gradient_accumulation():
    parts, whole = network(), network()
    by_parts, at_once = (ProjectedSGD(net.parameters(), lr=1.0, c=C) for net in (parts, whole))
    for k in range(4):
        loss_of(parts, k).div(4).backward()
    torch.stack([loss_of(whole, k) for k in range(4)]).mean().backward()
    by_parts.step()
    at_once.step()
    for p, q in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert longest_of(parts) <= C


SCHEDULES = {
    "LRScheduler": None,
    "LambdaLR": {"lr_lambda": lambda k: 0.9**k},
    "MultiplicativeLR": {"lr_lambda": lambda k: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 4},
    "PolynomialLR": {},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "ReduceLROnPlateau": {"patience": 0},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 1.0, "step_size_up": 2},
    "OneCycleLR": {"max_lr": 1.0, "total_steps": 10},
    "SequentialLR": "two",
    "ChainedScheduler": "two",
    "SWALR": {"swa_lr": 0.05},
}


def schedule(name, optimizer):
    cls = swa_utils.SWALR if name == "SWALR" else getattr(lr_scheduler, name)
    options = SCHEDULES[name]
    if options != "two":
        return cls(optimizer, **options)
    both = [lr_scheduler.LinearLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return cls(optimizer, both, milestones=[2]) if name == "SequentialLR" else cls(both)


def test_every_scheduler_class_is_in_the_list():
    classes = {
        n for n, v in vars(lr_scheduler).items() if inspect.isclass(v) and issubclass(v, lr_scheduler.LRScheduler)
    }
    assert {n for n in classes if not n.startswith("_")} <= SCHEDULES.keys()


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n != "LRScheduler"])
def test_schedulers_move_lr_as_they_would(name):
    rates = []
    for made in (torch.optim.SGD, ProjectedSGD):
        net = network()
        optimizer = made(net.parameters(), lr=0.8, momentum=0.9, **({} if made is torch.optim.SGD else {"c": C}))
        moving = schedule(name, optimizer)
        rates.append([])
        for k in range(5):
            optimizer.zero_grad()
            loss_of(net, k).backward()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()
                moving.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates[-1].append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
    assert rates[0] == rates[1]
    assert longest_of(net) <= C


def test_averages_of_feasible_weights_are_feasible_in_a_ball_and_short_on_a_sphere():
    for constraint, high in [(MaxNorm(C), C * (1 + 1e-6)), (UnitNorm(), 1 - 1e-4), (MinMaxNorm(0.9, 1.0), 1.0)]:
        for average in (swa_utils.get_ema_avg_fn(0.5), None):
            net = network()
            optimizer = ProjectedSGD(net.parameters(), lr=3.0, constraint=constraint)
            mean = swa_utils.AveragedModel(net, avg_fn=average)
            for k in range(6):
                optimizer.zero_grad()
                loss_of(net, k).backward()
                optimizer.step()
                mean.update_parameters(net)
            assert 0 < norms(mean.module[0].weight).min() <= high
            if isinstance(constraint, MaxNorm):
                assert longest_of(mean.module) <= high


@pytest.mark.parametrize("made", [ProjectedSGD, ProjectedAdam], ids=lambda cls: cls.__name__)
def test_compiled_step_is_one_graph_while_c_and_lr_move(made):
    """The first move of c makes it an input of the graph: that is the second compilation, and there is no third."""
    torch.compiler.reset()
    eager, compiled = network(), network()
    options = {"lr": torch.tensor(0.1)} | ({} if made is ProjectedAdam else {"momentum": 0.9})
    plain, traced = (made(net.parameters(), c=C, **options) for net in (eager, compiled))
    graphs = CompileCounterWithBackend("eager")
    step = torch.compile(traced.step, fullgraph=True, backend=graphs)
    loss = torch.compile(torch.nn.functional.cross_entropy, fullgraph=True, backend="eager")
    for k in range(6):
        loss_of(eager, k).backward()
        x, y = batch(k)
        loss(compiled(x), y).backward()
        plain.step()
        step()
        c = plain.param_groups[0]["c"]
        assert longest_of(compiled) <= c
        for optimizer in (plain, traced):
            optimizer.zero_grad()
            optimizer.param_groups[0]["c"] = c * 0.95
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.9
    assert graphs.frame_count <= 3  # also that without momentum buffers yet
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)  # compiled, Adam takes its capturable form


@pytest.mark.parametrize("made", [ProjectedSGD, ProjectedAdam], ids=lambda cls: cls.__name__)
def test_a_whole_training_step_is_one_graph(made):
    """Forward, backward, optimizer and projection; the gradients go into tensors that stay, as torch wants it."""
    options = {"lr": torch.tensor(0.1)} if made is ProjectedAdam else {"lr": 0.1, "momentum": 0.9}

    def trained(compiled):
        net = network()
        params = list(net.parameters())
        optimizer = made(params, c=C, **options)
        for p in params:
            p.grad = torch.zeros_like(p)

        def step(x, y):
            loss = torch.nn.functional.cross_entropy(net(x), y)
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad.copy_(g)
            optimizer.step()
            return loss.detach()

        if compiled:
            step = torch.compile(step, fullgraph=True, backend="eager")
        for k in range(4):
            step(*batch(k))
            assert longest_of(net) <= C
        return net

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for p, q in zip(trained(False).parameters(), trained(True).parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("made", "options"),
    [
        (ProjectedSGD, {"lr": 0.1}),
        (ProjectedSGD, {"constraint": UnitNorm()}),
        (ProjectedAdam, {"foreach": False}),
        (ProjectedAdam, {"foreach": False, "metric": "adaptive"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("skip", [False, True], ids=["", "GradScaler"])
def test_off_the_cpu_no_number_is_read_back(made, options, skip):
    """Tensors on the meta device have no numbers: an `.item()` or a branch on a value raises."""
    params = [torch.nn.Parameter(torch.empty(s, device="meta")) for s in ((8, 64), (8,), (5, 3, 3, 3))]
    with pytest.raises(RuntimeError, match="meta"):
        bool((params[0] > 0).any())
    optimizer = made(params, **({"c": C} if "constraint" not in options else {}), **options)
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    if skip:
        optimizer.found_inf = torch.zeros((), device="meta")
        optimizer._project({})


def test_frozen_parameters_stay_and_thawed_ones_are_held():
    net = outside(network())
    net[0].weight.requires_grad_(False)
    optimizer = ProjectedSGD(net.parameters(), lr=0.1, c=C)
    before = net[0].weight.clone()
    loss_of(net).backward()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert longest_of(net[2]) <= C
    net[0].weight.requires_grad_(True)
    loss_of(net).backward()
    optimizer.step()
    assert longest_of(net) <= C


def test_optimizer_in_backward():
    net, twin = network(), network()
    ours = ProjectedSGD(twin.parameters(), lr=0.5, momentum=0.9, c=C)
    each = {p: ProjectedSGD([p], lr=0.5, momentum=0.9, c=C) for p in net.parameters()}

    def step(p):
        each[p].step()
        each[p].zero_grad()

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    for k in range(3):
        loss_of(net, k).backward()
        loss_of(twin, k).backward()
        ours.step()
        ours.zero_grad()
    assert equal(net, twin)
    assert longest_of(net) <= C
