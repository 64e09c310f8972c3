"""How people train: the projection is there, and nothing else has changed."""

import copy
import inspect
import warnings

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import lr_scheduler, swa_utils

from projgd import MaxNorm, UnitNorm
from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD, project_after_step

C = 0.5


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)


def loss_of(net, seed=0):
    x, y = batch(seed)
    return torch.nn.functional.cross_entropy(net(x), y)


def longest(net):
    weights = [p.detach().double().numpy() for p in net.parameters() if p.ndim == 2]
    return max(float(np.linalg.norm(w, axis=1).max()) for w in weights)


def outside(net):
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.linspace(-2, 2, p.numel()).reshape(p.shape))
    return net


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


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
        assert (longest(net) <= C) is not overflow


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
    assert longest(parts) <= C


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
    assert longest(net) <= C


def test_averages_of_feasible_weights_are_feasible_in_a_ball_and_short_on_a_sphere():
    for constraint, low, high in [(MaxNorm(C), 0.0, C * (1 + 1e-6)), (UnitNorm(), 0.0, 1 - 1e-4)]:
        for average in (swa_utils.get_ema_avg_fn(0.5), None):
            net = network()
            optimizer = ProjectedSGD(net.parameters(), lr=3.0, constraint=constraint)
            mean = swa_utils.AveragedModel(net, avg_fn=average)
            for k in range(6):
                optimizer.zero_grad()
                loss_of(net, k).backward()
                optimizer.step()
                mean.update_parameters(net)
            shortest = float(mean.module[0].weight.detach().double().norm(dim=1).min())
            assert low < shortest <= high
            if isinstance(constraint, MaxNorm):
                assert longest(mean.module) <= high


@pytest.mark.parametrize("made", [ProjectedSGD, ProjectedAdam], ids=lambda cls: cls.__name__)
def test_compiled_step_is_one_graph_while_c_and_lr_move(made):
    """The first move of c makes it an input of the graph: that is the second compilation, and there is no third."""
    torch.compiler.reset()
    eager, compiled = network(), network()
    options = {"lr": torch.tensor(0.1)} | ({} if made is ProjectedAdam else {"momentum": 0.9})
    plain, traced = (made(net.parameters(), c=C, **options) for net in (eager, compiled))
    graphs = CompileCounterWithBackend("aot_eager")
    step = torch.compile(traced.step, fullgraph=True, backend=graphs)
    loss = torch.compile(torch.nn.functional.cross_entropy, fullgraph=True, backend="aot_eager")
    for k in range(6):
        loss_of(eager, k).backward()
        x, y = batch(k)
        loss(compiled(x), y).backward()
        plain.step()
        step()
        c = plain.param_groups[0]["c"]
        assert longest(compiled) <= c
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
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        for k in range(4):
            step(*batch(k))
            assert longest(net) <= C
        return net

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for p, q in zip(trained(False).parameters(), trained(True).parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"maximize": True}], ids=str
)
def test_implementations_of_the_same_step(options):
    net, twin = network(), network()
    ours = ProjectedAdam(net.parameters(), lr=0.1, c=C, **options)
    plain = torch.optim.Adam(twin.parameters(), lr=0.1, **options)
    for k in range(3):
        for model, optimizer in ((net, ours), (twin, plain)):
            optimizer.zero_grad()
            loss_of(model, k).backward()
            optimizer.step()
        with torch.no_grad():
            for p in twin.parameters():
                if p.ndim == 2:
                    p.mul_((C / p.double().norm(dim=1, keepdim=True)).clamp(max=1))
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=3e-6, atol=1e-7)
            q.data.copy_(p)


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


def test_differentiable_the_projection_has_its_derivative():
    """d loss(w₁) / d w₀ through the step and the projection, against central differences."""
    torch.manual_seed(0)
    start, gradient, probe = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    start[0] *= 0.01  # one vector stays inside

    def landed(w0):
        w = w0.clone()
        optimizer = ProjectedSGD([w], lr=0.1, differentiable=True, c=1.0)
        w.grad = gradient
        optimizer.step()
        return (w * probe).sum()

    w0 = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(landed(w0), w0)
    numeric = torch.zeros_like(start)
    for i in range(3):
        for j in range(4):
            e = torch.zeros_like(start)
            e[i, j] = 1e-6
            numeric[i, j] = (landed(start + e).detach() - landed(start - e).detach()) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-8)
    assert bool((slope[0] == probe[0]).all())


def test_closures_give_their_loss_back():
    net = network()
    optimizer = ProjectedSGD(net.parameters(), lr=0.1, c=C)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(net)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(loss_of(network()).item())
    assert optimizer.step(closure=closure) is not None
    assert longest(net) <= C


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    net = outside(network())
    optimizer = ProjectedSGD(net.parameters(), lr=0.1, c=C)
    loss_of(net).backward()
    optimizer.zero_grad(set_to_none=to_none)
    optimizer.step()  # without gradients torch's own step does nothing either
    assert (longest(net) <= C) is not to_none


def test_frozen_parameters_stay_and_thawed_ones_are_held():
    net = outside(network())
    net[0].weight.requires_grad_(False)
    optimizer = ProjectedSGD(net.parameters(), lr=0.1, c=C)
    before = net[0].weight.clone()
    loss_of(net).backward()
    optimizer.step()
    assert torch.equal(net[0].weight, before)
    assert longest(net[2]) <= C
    net[0].weight.requires_grad_(True)
    loss_of(net).backward()
    optimizer.step()
    assert longest(net) <= C


def test_parameters_added_later_are_held():
    net, late = network(), outside(network())
    optimizer = ProjectedSGD(net.parameters(), lr=0.1, c=C)
    optimizer.add_param_group({"params": late.parameters(), "lr": 0.2})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.full((2, 2), 9.0))], "c": None})
    free = optimizer.param_groups[2]["params"][0]
    (loss_of(net) + loss_of(late) + 0 * free.sum()).backward()
    optimizer.step()
    assert longest(late) <= C
    assert bool((free == 9).all())


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
    assert longest(net) <= C


def test_c_moves_like_lr():
    net = network()
    optimizer = ProjectedSGD(net.parameters(), lr=0.1, c=C)
    for c in (0.4, 0.2, 0.1):
        optimizer.param_groups[0]["c"] = c
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
        assert c * (1 - 1e-5) <= longest(net) <= c


@pytest.mark.parametrize("way", ["class", "hook"])
def test_lightning(way, tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, data, _):
            return torch.nn.functional.cross_entropy(self.net(data[0]), data[1])

        def configure_optimizers(self):
            if way == "class":
                return ProjectedAdam(self.net.parameters(), lr=0.1, c=C)
            optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
            project_after_step(optimizer, MaxNorm(C))
            return optimizer

    def trained(steps, **options):
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            barebones=False,
        )
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), batch_size=16)
        trainer.fit(module, data, **options)
        return module, trainer

    whole, _ = trained(6)
    assert longest(whole.net) <= C
    assert longest(whole.net) >= C * (1 - 1e-5)
    trained(4)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = trained(6, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(resumed.net, whole.net)


def test_accelerate(tmp_path):
    from accelerate import Accelerator

    net = outside(network())
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(net, ProjectedAdam(net.parameters(), lr=0.1, c=C))
    for k in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, k))
            optimizer.step()
            optimizer.zero_grad()
    assert longest(net) <= C
    assert longest(net) >= C * (1 - 1e-5)
    accelerator.save_state(tmp_path)
    after = copy.deepcopy(net)
    optimizer.param_groups[0]["c"] = 2 * C
    outside(net)
    accelerator.load_state(tmp_path)
    assert equal(net, after)
    assert optimizer.param_groups[0]["c"] == C
    with pytest.raises(TypeError, match=r"pass the optimizer inside it, such as wrapper.optimizer"):
        project_after_step(optimizer, MaxNorm(C))


@pytest.mark.parametrize("way", ["instance", "class"])
def test_trainer_of_transformers(way, tmp_path):
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    x, y = batch()
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def trained(resume=None):
        model = Model()
        if way == "instance":
            options = {"optimizers": (ProjectedAdamW(model.parameters(), lr=0.1, c=C), None)}
        else:
            options = {"optimizer_cls_and_kwargs": (ProjectedAdamW, {"lr": 0.1, "c": C})}
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_steps=2,
            max_grad_norm=1.0,
            per_device_train_batch_size=4,
        )
        Trainer(model, arguments, train_dataset=data, **options).train(resume_from_checkpoint=resume)
        return model.net

    whole = trained()
    assert C * (1 - 1e-5) <= longest(whole) <= C
    assert equal(trained(resume=str(tmp_path / "checkpoint-2")), whole)
