"""Projected optimizers: what they take, how they step, how they are copied and saved, and classes of one's own."""

import inspect
import pickle
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from lion_pytorch import Lion
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal.two_tensor import TwoTensor

import projgd.torch
from projgd import MaxNorm, MinMaxNorm, NonNegative, RelativeUpdate, Sphere, Split, UnitNorm
from projgd.torch import (
    Projected,
    ProjectedAdam,
    ProjectedSGD,
    hyperball,
    param_groups,
    project_after_step,
    projected,
)
from projgd.torch.settings import constraint_of
from tests.torch.common import (
    STOCK,
    THIRD,
    copied,
    longest,
    matrices_and,
    network,
    norms,
    same,
    saved_and_loaded,
    step,
    step_matrices,
    train,
    weight,
)

# ------------------------------------------------------------------------------------------------------ every optimizer


def test_all_of_torch_optim_is_there_by_name():
    assert len(STOCK) >= 15
    for cls in STOCK:
        made = getattr(projgd.torch, f"Projected{cls.__name__}")
        assert made is projected(cls)
        assert issubclass(made, cls)
        assert pickle.loads(pickle.dumps(made)) is made


@pytest.mark.parametrize("cls", STOCK + THIRD, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("way", ["class", "hook"])
def test_a_step_is_the_plain_step_and_then_the_formula(cls, way):
    c = 0.6
    net, plain = matrices_and(cls, cls)
    twin, ours = matrices_and(projected(cls), cls, c=c) if way == "class" else matrices_and(cls, cls)
    if way == "hook":
        project_after_step(ours, MaxNorm(c))
    bound = 0
    for seed in range(4):
        step_matrices(net, plain, seed)
        step_matrices(twin, ours, seed)
        for w, p in zip(net.trained(cls), twin.trained(cls), strict=True):
            touched = p.grad.to_dense().abs().sum(1).numpy() > 0 if p.grad.is_sparse else slice(None)
            moved = w.detach().double().numpy()[touched]
            expected = moved * np.minimum(1, c / np.linalg.norm(moved, axis=1, keepdims=True))
            np.testing.assert_allclose(p.detach().numpy()[touched], expected, rtol=3e-6, atol=1e-7)
            assert (norms(p)[touched] <= c).all()
            bound += int((norms(p)[touched] > c * (1 - 1e-5)).sum())
        with torch.no_grad():  # from the same point into the next step
            for w, p in zip(net.parameters(), twin.parameters(), strict=True):
                w.copy_(p)
    assert bound > 5


class Mine(ProjectedAdam):
    """A subclass that a user writes."""


@pytest.mark.parametrize("made", [*map(projected, STOCK), projected(Lion), Mine], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_keep_the_projection(made, how):
    cls = made.inner
    net, optimizer = matrices_and(made, cls, c=0.3)
    step_matrices(net, optimizer, 0)
    twin, other = copied(how, (net, optimizer))
    assert type(other) is made
    for seed in range(1, 3):
        step_matrices(net, optimizer, seed)
        step_matrices(twin, other, seed)
    assert same(list(net.parameters()), list(twin.parameters()))
    assert max(map(longest, twin.trained(cls))) <= 0.3


@pytest.mark.parametrize("cls", STOCK, ids=lambda cls: cls.__name__)
def test_checkpoints_are_plain_and_go_both_ways(cls):
    net, ours = matrices_and(projected(cls), cls, constraint=MaxNorm(0.3))
    step_matrices(net, ours, 0)
    saved = saved_and_loaded(ours.state_dict())
    _, again = matrices_and(projected(cls), cls, c=7.0)
    again.load_state_dict(saved)
    assert again.param_groups[0]["constraint"] == MaxNorm(0.3)
    assert same(again.state_dict(), ours.state_dict())

    _, plain = matrices_and(cls, cls)
    plain.load_state_dict(saved)
    assert same(plain.state_dict()["state"], saved["state"])

    other, plain = matrices_and(cls, cls)
    step_matrices(other, plain, 0)
    _, ours = matrices_and(projected(cls), cls, constraint=MaxNorm(0.3))
    ours.load_state_dict(plain.state_dict())
    assert same(ours.state_dict()["state"], plain.state_dict()["state"])
    assert ours.param_groups[0]["constraint"] == MaxNorm(0.3)


# ------------------------------------------------------------------------------------------------------- what they take


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW], ids=lambda cls: cls.__name__)
def test_they_are_the_stock_classes_with_some_words_more(cls):
    own = set(inspect.signature(cls).parameters) - {"params"}
    defaults = {k: v.default for k, v in inspect.signature(cls).parameters.items() if k in own}
    optimizer = projected(cls)(network().parameters(), **defaults, c=4.0)  # every option by name
    plain = cls(network().parameters(), **defaults)
    for key, value in plain.param_groups[0].items():
        if key != "params":
            assert optimizer.param_groups[0][key] == value
    assert projected(cls)(network().parameters(), 0.25).param_groups[0]["lr"] == 0.25  # and lr by position


@pytest.mark.parametrize(
    "form", ["tensor list", "generator", "groups", "named", "named groups", "generator in a group"]
)
def test_every_form_of_params(form):
    model = network()
    forms = {
        "tensor list": list(model.parameters()),
        "generator": model.parameters(),
        "groups": [{"params": model[0].parameters()}, {"params": model[2].weight, "lr": 0.5}],
        "named": model.named_parameters(),
        "named groups": [{"params": list(model[0].named_parameters())}],
        "generator in a group": [{"params": (p for p in model.parameters())}],
    }
    train(model, ProjectedAdam(forms[form], lr=1e-3, c=0.1), range(1))
    assert (norms(model[0].weight) <= 0.1).all()
    assert (norms(model[0].weight) >= 0.1 * (1 - 1e-5)).all()  # all were outside


def test_stock_errors_stay_stock():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        ProjectedSGD(network().parameters(), lr=-1.0, c=4.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        ProjectedSGD([], c=4.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        ProjectedSGD(network().parameters(), momentun=0.9)


def test_help_shows_what_the_constructor_takes():
    shown = inspect.signature(ProjectedAdam).parameters
    assert [*shown][:3] == ["params", "lr", "betas"]
    assert shown["lr"].default == inspect.signature(torch.optim.Adam).parameters["lr"].default
    settings = {"c", "axis", "constraint", "update", "gradient", "metric", "without_grad", "engine"}
    assert {"foreach", *settings} < shown.keys()
    assert [*inspect.signature(Whole).parameters] == ["params", "lr", "settings"]


def admits(annotation, value):
    """Whether an annotation admits a value."""
    origin, of = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(admits(a, value) for a in of)
    if origin is typing.Literal:
        return any(type(a) is type(value) and a == value for a in of)
    if annotation is typing.Any or isinstance(annotation, typing.TypeVar):
        return True
    return isinstance(value, type(None) if annotation is None else origin or annotation)


def test_every_annotation_admits_its_default():
    """Tools such as jsonargparse and LightningCLI read signatures, and refuse a default that is not of its type."""
    for made in [Projected, *(v for k, v in vars(projgd.torch).items() if k in projgd.torch.__all__ and k[0] > "Z")]:
        of = made.__init__ if made is Projected else made
        for name, parameter in inspect.signature(of).parameters.items():
            if parameter.default is not parameter.empty:
                assert admits(typing.get_type_hints(of)[name], parameter.default), (made, name, parameter)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], None),
        (["--optimizer.c=0.5", "--optimizer.axis=0"], MaxNorm(0.5, 0)),
        (["--optimizer.c=0.5", "--optimizer.axis=matrix"], MaxNorm(0.5, "matrix")),
        (["--optimizer.c=null"], None),
        (["--optimizer.constraint=projgd.UnitNorm", "--optimizer.constraint.axis=[0, 1]"], UnitNorm((0, 1))),
    ],
    ids=str,
)
def test_a_command_line_makes_every_class(words, found):
    """What LightningCLI does with `--optimizer=projgd.torch.ProjectedSGD --optimizer.c=0.5`."""
    jsonargparse = pytest.importorskip("jsonargparse")
    for cls in map(projected, STOCK):
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument("--optimizer", type=Callable[[Iterable], torch.optim.Optimizer])
        config = parser.parse_args([f"--optimizer=projgd.torch.{cls.__name__}", *words, "--optimizer.engine=reference"])
        made = parser.instantiate(config).optimizer([weight()])
        assert type(made) is cls
        assert constraint_of(made.param_groups[0]) == found


def test_defaults_have_the_settings():
    for settings in ({"c": 3.0, "axis": 0}, {"constraint": UnitNorm(), "metric": "euclidean"}):
        again = ProjectedSGD([weight()], **ProjectedSGD([weight()], lr=0.5, **settings).defaults)
        assert {k: again.param_groups[0][k] for k in settings} == settings


@pytest.mark.parametrize("keys", [{"c": 2.0, "axis": 0}, {"constraint": MaxNorm(2.0)}, {"constraint": UnitNorm(0)}])
def test_groups_of_a_projected_optimizer_are_taken_over(keys):
    optimizer = ProjectedSGD(network().parameters(), lr=0.1, **keys)
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.add_param_group({**settings, "params": [network()[0].weight]})
    again = ProjectedSGD(optimizer.param_groups)
    for group in [optimizer.param_groups[1], *again.param_groups]:
        assert {k: v for k, v in group.items() if k != "params"} == settings


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.complex64), "parameter 0 of group 0 has dtype complex64"),
        (torch.zeros(2, 3, dtype=torch.int32), "has dtype int32"),
        (torch.nn.UninitializedParameter(), "not initialised yet"),
        (torch.zeros(3).expand(2, 3), "is an expanded tensor"),
        (torch.eye(3).to_sparse(), "is a sparse_coo tensor"),
        (TwoTensor(torch.eye(3), torch.eye(3)), "is a TwoTensor, a tensor subclass whose norms"),
    ],
)
def test_parameters_that_cannot_be_measured_are_refused(param, message):
    for options in ({"c": 1.0}, {"constraint": MinMaxNorm(0.5, 1.0), "fused": param.is_floating_point()}):
        with pytest.raises((ValueError, TypeError), match=message):
            ProjectedSGD([param], **options, without_grad=True)
    with pytest.raises((ValueError, TypeError), match=message):
        project_after_step(torch.optim.SGD([param]), MaxNorm(1.0), without_grad=True)


def test_an_error_names_the_parameter_even_if_two_have_the_name():
    bad, good = torch.zeros(2, 3, dtype=torch.complex64, requires_grad=True), weight(2, 3)
    for twice in ([("w", bad), ("w", good)], [("w", good), ("w", bad)]):
        with pytest.raises(TypeError, match=r"w.* has dtype complex64"):
            ProjectedSGD(twice, c=1.0)


class Copies(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__([p.detach().double() for p in params], lr=lr)


class InOne(torch.optim.SGD):
    def __init__(self, params, lr=0.1):
        super().__init__([torch.cat([p.detach().flatten() for p in params])], lr=lr)


@pytest.mark.parametrize("cls", [Copies, InOne])
def test_an_optimizer_that_steps_other_tensors_is_refused(cls):
    with pytest.raises(TypeError, match=f"{cls.__name__} steps other tensors than those that it was given"):
        projected(cls)([weight()], c=1.0)


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
    w = weight(2, 3)
    step(projected(WithoutDefaults)([{"params": [w], "rate": 0.5, "c": 1.0}]), 1.0)
    assert 1 - 1e-5 <= longest(w) <= 1
    with pytest.raises(TypeError, match=r"WithC has an option c of its own.*project_after_step"):
        projected(WithC)
    ProjectedSGD([{"params": [w], "name": "backbone", "lr_scale": 0.5}], c=1.0)  # what loggers and schedules read
    for wrong in (torch.optim.SGD([w]), "SGD", torch.nn.Linear):
        with pytest.raises(TypeError, match=r"projected\(\) takes a torch.optim.Optimizer class"):
            projected(wrong)


# ----------------------------------------------------------------------------------------------------- steps and groups


def test_parameters_without_gradient_are_projected_only_when_asked():
    for asked in (False, True):
        used, idle = weight(), weight()
        optimizer = ProjectedSGD([used, idle], c=1.0, without_grad=asked)
        used.grad = torch.zeros_like(used)
        optimizer.step()
        assert longest(used) <= 1
        assert bool(longest(idle) <= 1) is asked


@pytest.mark.parametrize("fused", [None, True])
def test_a_closure_is_called_once_and_its_loss_comes_back(fused):
    model, losses = network(), []
    optimizer = ProjectedAdam(model.parameters(), lr=0.5, c=0.3, fused=fused)

    def closure():
        optimizer.zero_grad()
        losses.append(model(torch.ones(2, 6)).square().mean())
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0]
    assert optimizer.step(closure=closure) is losses[1]
    assert len(losses) == 2
    assert longest(model[0].weight) <= 0.3


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    p = weight()
    optimizer = ProjectedSGD([p], lr=0.1, c=1.0)
    p.grad = torch.ones_like(p)
    optimizer.zero_grad(set_to_none=to_none)
    optimizer.step()  # without gradients torch's own step does nothing either
    assert (longest(p) <= 1) is not to_none


def test_groups_added_later_are_held_and_a_refused_one_changes_nothing():
    first, late, free = weight(), weight(), weight()
    optimizer = ProjectedSGD([first], lr=0.1, c=1.0)
    with pytest.raises(ValueError, match="axis 7 is out of range"):
        optimizer.add_param_group({"params": [weight()], "axis": 7})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": iter([late]), "lr": 0.2})
    optimizer.add_param_group({"params": free, "c": None})
    step(optimizer)
    assert longest(first) <= 1
    assert longest(late) <= 1
    assert bool((free == 5).all())


@pytest.mark.parametrize("used_before", ["stock", "projected", "nothing"])
def test_hooks_run_once_and_see_projected_weights(used_before):
    """torch wraps `step` of every class when it is first used; both orders must leave one wrapper in force."""
    inner = type("Fresh", (torch.optim.Adam,), {})
    cls = projected(inner)
    if used_before != "nothing":
        other = network()
        train(other, (inner if used_before == "stock" else cls)(other.parameters(), lr=0.1), range(1))
    p, seen = weight(), {"pre": [], "post": [], "global pre": [], "global post": []}
    optimizer = cls([p], lr=5.0, c=0.25)
    notes = {where: lambda *_, where=where: seen[where].append(longest(p)) for where in seen}
    optimizer.register_step_pre_hook(notes["pre"])
    optimizer.register_step_post_hook(notes["post"])
    handles = [
        register_optimizer_step_pre_hook(notes["global pre"]),
        register_optimizer_step_post_hook(notes["global post"]),
    ]
    try:
        for _ in range(3):
            step(optimizer, 1.0)
    finally:
        for handle in handles:
            handle.remove()
    assert {where: len(found) for where, found in seen.items()} == dict.fromkeys(seen, 3)
    assert max(seen["post"] + seen["global post"]) <= 0.25
    assert seen["pre"][0] > 0.25


def test_differentiable_the_projection_has_its_derivative():
    """d loss(w₁) / d w₀ through the step and the projection, against central differences."""
    torch.manual_seed(0)
    start, gradient, probe = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    start[0] *= 0.01  # one vector stays inside

    def loss(w0):
        w = w0.clone()
        optimizer = ProjectedSGD([w], lr=0.1, differentiable=True, c=1.0)
        w.grad = gradient
        optimizer.step()
        return (w * probe).sum()

    w0 = start.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(w0), w0)
    numeric = torch.zeros_like(start)
    for i in range(3):
        for j in range(4):
            e = torch.zeros_like(start)
            e[i, j] = 1e-6
            numeric[i, j] = (loss(start + e).detach() - loss(start - e).detach()) / 2e-6
    torch.testing.assert_close(slope, numeric, rtol=1e-6, atol=1e-8)
    assert bool((slope[0] == probe[0]).all())


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "keys",
    [
        {"c": np.float64(2.0)},
        {"c": np.float32(2.0), "axis": np.int64(1)},
        {"c": 2.0, "axis": range(1, 2)},
        {"c": 2.0, "axis": Split(0, 1, (1, 2))},
        {"constraint": MaxNorm(np.float32(2.0), Split(0, 1, (1, 2)))},
        {"constraint": MinMaxNorm(1, 2, axis=0)},
    ],
)
def test_a_checkpoint_has_plain_types_whatever_the_settings_came_as(keys):
    def made():
        return ProjectedSGD([network()[0].weight], lr=0.1, **keys)

    loaded, fresh = made(), made()
    loaded.load_state_dict(saved_and_loaded(made().state_dict()))
    for optimizer in (loaded, fresh):
        step(optimizer, 50.0)
    assert torch.equal(loaded.param_groups[0]["params"][0], fresh.param_groups[0]["params"][0])
    assert loaded.param_groups[0]["axis"] == fresh.param_groups[0]["axis"]


def test_a_grouped_transposed_convolution_goes_through_a_checkpoint():
    model = torch.nn.ConvTranspose1d(4, 6, 3, groups=2)
    optimizer = ProjectedSGD(param_groups(model, MaxNorm(0.1)), lr=0.1)
    optimizer.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert optimizer.param_groups[0]["axis"] == optimizer.param_groups[0]["constraint"].axis


def test_a_state_that_does_not_fit_is_not_loaded():
    p = weight()
    optimizer = ProjectedAdam([p], lr=0.1, c=1.0)
    step(optimizer)
    before = saved_and_loaded(optimizer.state_dict())
    for change in ({"axis": 2}, {"c": -1.0}, {"metric": "odd"}, {"constraint": MaxNorm(2.0).config()}):
        saved = saved_and_loaded(before)
        saved["param_groups"][0] |= change
        with pytest.raises(ValueError, match=r"out of range|positive|known|disagree"):
            optimizer.load_state_dict(saved)
    for other in ([weight(), weight()], [{"params": [weight()]}, {"params": [weight()]}]):
        with pytest.raises(ValueError, match=r"parameter group"):
            optimizer.load_state_dict(ProjectedAdam(other).state_dict())
    assert same(saved_and_loaded(optimizer.state_dict()), before)
    step(optimizer, 1.0)
    assert longest(p) <= 1


def old_kind(name, params):
    """An optimizer of the kind that wrote `state_dicts_0.1.0.pt`, with settings that the file replaces."""
    if name == "SGD":
        return ProjectedSGD(params, lr=9.0, c=9.0)
    if name == "rules":
        return ProjectedSGD([{"params": [params[0]], "c": 9.0}, {"params": [params[1]]}], lr=9.0)
    if name == "sphere":
        return ProjectedAdam(params, lr=9.0, constraint=Sphere("initial"))
    return hyperball(torch.optim.Adam)(params, lr=9.0)


@pytest.mark.parametrize("name", ["SGD", "rules", "sphere", "hyperball"])
def test_what_version_0_1_0_saved_goes_on_as_it_did_there(name):
    """Momentum and c, a `Split`, initial radii, a shaped update; the file has the result of the next step, too."""
    old = torch.load(Path(__file__).parent / "data" / "state_dicts_0.1.0.pt", weights_only=True)[name]
    params = [torch.nn.Parameter(p * 3) for p in old["before"]]  # radii are those of the file
    optimizer = old_kind(name, params)
    optimizer.load_state_dict(old["state"])
    for p, before, gradient in zip(params, old["before"], old["grads"], strict=True):
        p.data.copy_(before)
        p.grad = gradient
    optimizer.step()
    for p, after in zip(params, old["after"], strict=True):
        torch.testing.assert_close(p.detach(), after, rtol=1e-6, atol=1e-7)
    again = optimizer.state_dict()
    assert [{k: v for k, v in g.items() if k != "every"} for g in again["param_groups"]] == old["state"]["param_groups"]
    assert {i: s.keys() for i, s in again["state"].items()} == {i: s.keys() for i, s in old["state"]["state"].items()}


# ------------------------------------------------------------------------------------------------- classes of one's own


class OwnStep(ProjectedSGD):
    """Does not call super().step()."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"])
        return "done"


class Whole(Projected):
    """An optimizer that is nothing but a subclass of `Projected`."""

    def __init__(self, params, lr=0.1, **settings):
        super().__init__(params, {"lr": lr}, **settings)

    step = OwnStep.step.__wrapped__


class SometimesSuper(ProjectedSGD):
    turns = 0

    def step(self, closure=None):
        self.turns += 1
        return None if self.turns % 2 else super().step(closure)


class Logging(torch.optim.SGD):
    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(closure)


class Mixed(Logging, ProjectedSGD):
    """`step` is found in a class before `Projected`."""


class Below(OwnStep):
    """Inherits it."""


@pytest.mark.parametrize("cls", [OwnStep, Whole, SometimesSuper, Mixed, Below, projected(OwnStep), projected(Logging)])
@pytest.mark.parametrize("constraint", [MaxNorm(1.0), MinMaxNorm(0.5, 1.0)], ids=str)
def test_a_class_with_a_step_of_its_own_is_projected(cls, constraint):
    p, seen = weight(), []
    optimizer = cls([p], lr=0.1, constraint=constraint)
    optimizer.register_step_post_hook(lambda *_: seen.append(longest(p)))
    for _ in range(2):
        step(optimizer, -1.0)
    np.testing.assert_allclose(norms(p), 1, rtol=1e-5)
    assert longest(p) <= 1
    assert seen[-1] <= 1
    if issubclass(cls, OwnStep):
        assert optimizer.step() == "done"
    twin = copied("deepcopy", optimizer)
    (q,) = twin.param_groups[0]["params"]
    step(twin, -1.0)
    assert longest(q) <= 1


def test_an_update_that_a_step_of_ones_own_does_not_shape_is_an_error():
    p = weight()
    optimizer = OwnStep([p], lr=0.1, c=1.0, update=RelativeUpdate())
    with pytest.raises(RuntimeError, match=r"OwnStep.step did not call super\(\).step\(\)"):
        step(optimizer, 1.0)
    optimizer = SometimesSuper([p], lr=0.1, c=1.0, update=RelativeUpdate())
    for _ in range(2):
        step(optimizer, 1.0)  # the turn without a step has not written anything
    assert longest(p) <= 1


class TwoSteps(torch.optim.Optimizer):
    """Sharpness-aware minimization, in one step with a closure, or in two."""

    def __init__(self, params, base_optimizer=torch.optim.SGD, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.count()

    def count(self):
        return len(self.param_groups)

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["e_w"] = p.grad * (group["rho"] / p.grad.norm())
                p.add_(self.state[p]["e_w"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["e_w"])
        self.base_optimizer.step()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()

    def swap(self):
        """Weights for evaluation, and those of the training back."""
        for p in self.param_groups[0]["params"]:
            p.data = -p.data


class InItsStep(torch.optim.SGD):
    """Its second step is a step, so it needs nothing."""

    first_step = TwoSteps.first_step

    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.data = p.data - self.state[p].pop("e_w")
        self.step()


def two_steps(optimizer, p):
    def closure():
        p.grad = torch.full_like(p, -5.0)

    closure()
    optimizer.first_step()
    closure()
    optimizer.second_step()


def test_methods_that_move_the_weights_without_a_step_are_an_error_that_says_what_works():
    p, q = weight(), weight()
    optimizer = projected(TwoSteps)([p], lr=0.1, c=1.0)
    p.grad = torch.ones_like(p)
    optimizer.step(lambda: None)
    assert longest(p) <= 1
    assert optimizer.count() == 1
    with pytest.raises(RuntimeError, match=r"first_step\(\) and second_step\(\) of TwoSteps .*base_optimizer"):
        two_steps(optimizer, p)
    optimizer.step(lambda: None)
    assert longest(p) <= 1
    sam = TwoSteps([q], lr=0.1)
    with pytest.warns(UserWarning, match="only step.. of TwoSteps is followed by the projection"):
        project_after_step(sam, MaxNorm(1.0)).remove()
    project_after_step(sam.base_optimizer, MaxNorm(1.0))
    for _ in range(3):
        two_steps(sam, q)
        assert longest(q) <= 1
    assert longest(q) > 1 - 1e-5


def test_methods_that_move_the_weights_are_no_error_where_a_step_follows_or_nothing_is_held():
    p = weight()
    optimizer = projected(InItsStep)([p], lr=0.1, c=1.0)
    optimizer.param_groups[0]["rho"] = 0.05
    for _ in range(3):
        two_steps(optimizer, p)
        assert longest(p) <= 1
    free = projected(TwoSteps)([p], lr=0.1, c=None)
    for _ in range(3):
        two_steps(free, p)
    assert longest(p) > 1
    optimizer = projected(TwoSteps)([p], lr=0.1, c=1.0)
    optimizer.swap()
    p.grad = torch.ones_like(p)
    optimizer.step(lambda: None)
    optimizer.swap()


def test_a_set_of_entries_in_a_step_of_ones_own():
    p = weight(value=-5.0)
    step(OwnStep([p], lr=0.1, constraint=NonNegative()), 1.0)
    assert bool((p == 0).all())
