"""ProjectedSGD, ProjectedAdam and ProjectedAdamW: what they take, which setting wins, and when hooks run."""

import copy
import inspect
import io
import pickle

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from projgd import MaxNorm, NonNegative, UnitNorm
from projgd.axes import Split
from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD, param_groups, project_after_step

CLASSES = {ProjectedSGD: torch.optim.SGD, ProjectedAdam: torch.optim.Adam, ProjectedAdamW: torch.optim.AdamW}


@pytest.fixture(params=CLASSES, ids=lambda cls: cls.__name__)
def cls(request):
    return request.param


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))


def backward(model: torch.nn.Module, step: int = 0) -> torch.Tensor:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    loss = (model(x) - 10).square().mean()
    loss.backward()
    return loss


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[np.ndarray]:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return [p.detach().numpy().copy() for p in model.parameters()]


def norms(weight: torch.Tensor, axis: int = 1) -> np.ndarray:
    return np.linalg.norm(weight.detach().numpy().astype(np.float64), axis=axis)


# ------------------------------------------------------------------------------------------------- what they are, take


def test_they_are_the_stock_classes_with_three_words_more(cls):
    stock = CLASSES[cls]
    assert issubclass(cls, stock)
    own = set(inspect.signature(stock).parameters) - {"params"}
    defaults = {k: v.default for k, v in inspect.signature(stock).parameters.items() if k in own}
    optimizer = cls(network().parameters(), **defaults, c=4.0)  # every option by name
    plain = stock(network().parameters(), **defaults)
    for key, value in plain.param_groups[0].items():
        if key != "params":
            assert optimizer.param_groups[0][key] == value
    assert cls(network().parameters(), 0.25).param_groups[0]["lr"] == 0.25  # and lr by position


@pytest.mark.parametrize(
    "form", ["tensor list", "generator", "groups", "named", "named groups", "generator in a group"]
)
def test_every_form_of_params(cls, form):
    model = network()
    forms = {
        "tensor list": list(model.parameters()),
        "generator": model.parameters(),
        "groups": [{"params": model[0].parameters()}, {"params": model[2].weight, "lr": 0.5}],
        "named": model.named_parameters(),
        "named groups": [{"params": list(model[0].named_parameters())}],
        "generator in a group": [{"params": (p for p in model.parameters())}],
    }
    train(model, cls(forms[form], lr=1e-3, c=0.1), range(1))
    assert norms(model[0].weight).max() <= 0.1
    assert norms(model[0].weight).min() >= 0.1 * (1 - 1e-5)  # all were outside


def test_stock_errors_stay_stock(cls):
    with pytest.raises(ValueError, match="Invalid learning rate"):
        cls(network().parameters(), lr=-1.0, c=4.0)
    with pytest.raises(ValueError, match="empty parameter list"):
        cls([], c=4.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        cls(network().parameters(), momentun=0.9)


def test_a_groups_own_setting_wins(cls):
    weights = [torch.nn.Parameter(torch.full((4, 3), 9.0)) for _ in range(6)]
    keys = [{}, {"c": 2.0}, {"c": None}, {"axis": 0}, {"constraint": UnitNorm()}, {"constraint": NonNegative()}]
    keys[4]["weight_decay"] = 0.0  # what is not zero works against a sphere: there is a warning
    optimizer = cls([{"params": [w], **own} for w, own in zip(weights, keys, strict=True)], lr=1e-9, c=3.0)
    for w in weights:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    inherited, own_c, free, own_axis, unit, positive = weights
    np.testing.assert_allclose(norms(inherited), 3, rtol=1e-5)
    np.testing.assert_allclose(norms(own_c), 2, rtol=1e-5)
    np.testing.assert_array_equal(free.detach(), torch.full((4, 3), 9.0))
    np.testing.assert_allclose(norms(own_axis, axis=0), 3, rtol=1e-5)
    np.testing.assert_allclose(norms(unit), 1, rtol=1e-5)
    np.testing.assert_array_equal(positive.detach(), torch.full((4, 3), 9.0))


def test_a_constraint_for_all_groups_and_a_free_one(cls):
    weights = [torch.nn.Parameter(-torch.ones(4, 3)) for _ in range(3)]
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "c": None}, {"params": [weights[2]], "c": 0.5}]
    optimizer = cls(groups, lr=1e-9, constraint=NonNegative())
    for w in weights:
        w.grad = torch.zeros_like(w)
    optimizer.step()
    np.testing.assert_array_equal(weights[0].detach(), np.zeros((4, 3)))
    np.testing.assert_array_equal(weights[1].detach(), -np.ones((4, 3)))
    np.testing.assert_allclose(norms(weights[2]), 0.5, rtol=1e-5)


def test_without_a_bound_it_is_the_stock_optimizer_bit_for_bit(cls):
    ours, plain = network(), network()
    found = train(ours, cls(ours.parameters(), lr=0.1, c=None), range(10))
    expected = train(plain, CLASSES[cls](plain.parameters(), lr=0.1), range(10))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------------------------------------- ways to take a step


def test_closure(cls):
    model = network()
    optimizer = cls(model.parameters(), lr=0.5, c=0.3)
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses.append(backward(model))
        return losses[-1]

    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1
    assert norms(model[0].weight).max() <= 0.3


def test_a_step_that_grad_scaler_skips_is_not_projected(cls):
    model = network()
    optimizer = cls(model.parameters(), lr=0.5, c=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(torch.tensor(float("inf")) * model(torch.ones(1, 6)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    optimizer.zero_grad()
    scaler.scale(model(torch.ones(1, 6)).sum()).backward()
    scaler.step(optimizer)
    assert norms(model[0].weight).max() <= 0.01


def test_scheduler_moves_lr_and_the_bound_stays(cls):
    model = network()
    optimizer = cls(model.parameters(), lr=0.5, c=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step in range(3):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
        assert norms(model[0].weight).max() <= 0.3
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0625)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_as_the_original_would(cls, way):
    model = network()
    optimizer = cls(model.parameters(), lr=0.05, c=0.5)
    train(model, optimizer, range(5))
    if way == "deepcopy":
        twin, copied = copy.deepcopy((model, optimizer))
    elif way == "pickle":
        twin, copied = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        twin = copy.deepcopy(model)
        copied = cls(twin.parameters(), lr=0.7, c=77.0)
        copied.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert copied.param_groups[0]["c"] == 0.5
    assert type(copied) is cls
    expected, found = train(model, optimizer, range(5, 10)), train(twin, copied, range(5, 10))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert norms(twin[0].weight).max() <= 0.5


# --------------------------------------------------------------------------------------------------------------- hooks


@pytest.mark.parametrize("used_before", ["stock", "projected", "nothing"])
def test_hooks_run_once_and_see_projected_weights(cls, used_before):
    """torch wraps `step` of every class when it is first used; both orders must leave one wrapper in force."""
    if used_before != "nothing":
        other = network()
        train(other, (CLASSES[cls] if used_before == "stock" else cls)(other.parameters(), lr=0.1), range(1))
    model = network()
    optimizer = cls(model.parameters(), lr=5.0, c=0.25)
    seen: dict[str, list[float]] = {"pre": [], "post": [], "global pre": [], "global post": []}

    def note(where):
        return lambda *_: seen[where].append(norms(model[0].weight).max())

    optimizer.register_step_pre_hook(note("pre"))
    optimizer.register_step_post_hook(note("post"))
    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    try:
        train(model, optimizer, range(3))
    finally:
        for handle in handles:
            handle.remove()
    assert {where: len(found) for where, found in seen.items()} == dict.fromkeys(seen, 3)
    assert max(seen["post"] + seen["global post"]) <= 0.25
    assert seen["pre"][0] > 0.25


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"c": 0}, ValueError, r"c=0\.0 must be positive"),
        ({"c": -1.0}, ValueError, "c=-1.0 must be positive"),
        ({"c": float("nan")}, ValueError, "c=nan must be positive"),
        ({"c": float("inf")}, ValueError, "c=inf must be positive and finite"),
        ({"c": "4"}, TypeError, "c='4' is not a number"),
        ({"c": True}, TypeError, "c=True is not a number"),
        ({"c": 4.0, "axis": 2}, ValueError, r"axis 2 is out of range for 0\.weight with shape \(5, 6\)"),
        ({"c": 4.0, "axis": (0, 0)}, ValueError, r"names an axis of 0\.weight with shape \(5, 6\) twice"),
        ({"c": 4.0, "axis": "fan_out"}, ValueError, "axis='fan_out' is not known"),
        ({"c": 4.0, "axis": 1.5}, TypeError, "axis=1.5 is not an axis"),
        ({"c": 4.0, "constraint": MaxNorm(3.0)}, ValueError, "c=4.0 or constraint=.*, not both"),
        ({"constraint": MaxNorm}, TypeError, "is no constraint: pass one such as"),
    ],
)
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_bad_settings_are_refused_when_they_are_made(cls, settings, error, message, where):
    named = network().named_parameters()
    params, own = ([{"params": named, **settings}], {}) if where == "group" else (named, settings)
    with pytest.raises(error, match=message):
        cls(params, lr=0.1, **own)


def test_an_integer_parameter_is_named(cls):
    counts = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="counts has dtype int64"):
        cls([("counts", counts)], c=4.0)
    with pytest.raises(TypeError, match="parameter 1 of group 0 has dtype int64"):
        cls([torch.zeros(3, 2), counts], c=4.0)


def test_a_refused_group_leaves_the_optimizer_as_it_was(cls):
    model = network()
    optimizer = cls(model[0].parameters(), lr=0.5, c=0.5)
    with pytest.raises(ValueError, match="axis 7 is out of range"):
        optimizer.add_param_group({"params": model[2].parameters(), "axis": 7})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, range(3))
    assert norms(model[0].weight).max() <= 0.5


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("bad", [0, float("nan"), "4", torch.tensor(-1.0), np.array([1.0, 2.0]), object()])
def test_a_bad_c_in_a_running_optimizer_raises_before_anything_moves(cls, bad, fused):
    model = network()
    optimizer = cls([{"params": [p]} for p in model.parameters()], lr=0.1, c=4.0, fused=fused)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model)
    optimizer.param_groups[-1]["c"] = bad
    with pytest.raises((TypeError, ValueError), match="c"):
        optimizer.step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_what_is_no_constraint_in_a_running_optimizer_raises_before_anything_moves(cls):
    model = network()
    before = model[0].weight.detach().clone()
    backward(model)
    for keys in ({"constraint": "max"}, {"constraint": UnitNorm(), "c": 0.5}):
        optimizer = cls(model.parameters(), lr=0.1, c=4.0)
        optimizer.param_groups[0].update(keys)
        with pytest.raises((TypeError, ValueError), match=r"is no constraint|goes with MaxNorm"):
            optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    "keys",
    [
        {"c": np.float64(2.0)},
        {"c": np.float32(2.0), "axis": np.int64(1)},
        {"c": 2.0, "axis": range(1, 2)},
        {"c": 2.0, "axis": Split(0, 1, (1, 2))},
        {"constraint": MaxNorm(np.float32(2.0), Split(0, 1, (1, 2)))},
    ],
)
def test_a_checkpoint_has_plain_types_whatever_c_and_axis_came_as(keys):
    def made() -> ProjectedSGD:
        return ProjectedSGD([network()[0].weight], lr=0.1, **keys)

    file = io.BytesIO()
    torch.save(made().state_dict(), file)
    file.seek(0)
    loaded, fresh = made(), made()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for optimizer in (loaded, fresh):
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = torch.full_like(p, 50.0)
        optimizer.step()
    assert torch.equal(loaded.param_groups[0]["params"][0], fresh.param_groups[0]["params"][0])
    assert loaded.param_groups[0]["axis"] == fresh.param_groups[0]["axis"]


def test_a_grouped_transposed_convolution_goes_through_a_checkpoint():
    model = torch.nn.ConvTranspose1d(4, 6, 3, groups=2)
    optimizer = ProjectedSGD(param_groups(model, MaxNorm(0.1)), lr=0.1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.param_groups[0]["axis"] == optimizer.param_groups[0]["constraint"].axis


@pytest.mark.parametrize("keys", [{"c": 2.0, "axis": 0}, {"constraint": MaxNorm(2.0)}, {"constraint": UnitNorm(0)}])
def test_groups_of_a_projected_optimizer_are_taken_over(cls, keys):
    optimizer = cls(network().parameters(), lr=0.1, **keys)
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    optimizer.add_param_group({**settings, "params": [network()[0].weight]})
    again = cls(optimizer.param_groups)
    for group in [optimizer.param_groups[1], *again.param_groups]:
        assert {k: v for k, v in group.items() if k != "params"} == settings


@pytest.mark.parametrize(
    ("keys", "group", "error", "message"),
    [
        ({"c": np.array([1.0, 2.0])}, {}, TypeError, r"c is an array of shape \(2,\)"),
        ({"c": torch.ones(2)}, {}, TypeError, r"c is an array of shape \(2,\)"),
        ({"c": 4.0, "without_grad": "no"}, {}, TypeError, "without_grad='no' is not known"),
        ({"constraint": NonNegative()}, {"axis": 0}, ValueError, r"axis=0 has no meaning for NonNegative\(\)"),
    ],
)
def test_more_settings_that_cannot_be_honoured_are_errors(keys, group, error, message):
    with pytest.raises(error, match=message):
        ProjectedSGD([{"params": network().parameters(), **group}], lr=0.1, **keys)


def test_a_hook_with_the_names_of_another_model_is_an_error():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="nothing would be projected"):
        project_after_step(optimizer, MaxNorm(4.0), copy.deepcopy(model))
    project_after_step(optimizer, MaxNorm(4.0), model[0])  # a part of the model is enough
