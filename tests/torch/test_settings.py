"""What a param group says: which setting wins, what holds once it is changed, and which settings are errors."""

import warnings

import numpy as np
import pytest
import torch

from projgd import Box, MaxNorm, MinMaxNorm, NonNegative, RelativeUpdate, Sphere, Split, Stacked, UnitNorm
from projgd.torch import ProjectedAdam, ProjectedSGD, hyperball, project_after_step, projected
from tests.torch.common import copied, network, norms, step, weight

# --------------------------------------------------------------------------------------------------- which setting wins


def test_a_groups_own_setting_wins():
    weights = [weight(value=9.0) for _ in range(6)]
    keys = [{}, {"c": 2.0}, {"c": None}, {"axis": 0}, {"constraint": UnitNorm()}, {"constraint": NonNegative()}]
    optimizer = ProjectedSGD([{"params": [w], **own} for w, own in zip(weights, keys, strict=True)], lr=1e-9, c=3.0)
    step(optimizer)
    inherited, own_c, free, own_axis, unit, positive = weights
    np.testing.assert_allclose(norms(inherited), 3, rtol=1e-5)
    np.testing.assert_allclose(norms(own_c), 2, rtol=1e-5)
    assert bool((free == 9).all())
    np.testing.assert_allclose(norms(own_axis, axis=0), 3, rtol=1e-5)
    np.testing.assert_allclose(norms(unit), 1, rtol=1e-5)
    assert bool((positive == 9).all())


def test_a_constraint_for_all_groups_and_a_free_one():
    weights = [weight(value=-1.0) for _ in range(3)]
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "c": None}, {"params": [weights[2]], "c": 0.5}]
    step(ProjectedSGD(groups, lr=1e-9, constraint=NonNegative()))
    assert bool((weights[0] == 0).all())
    assert bool((weights[1] == -1).all())
    np.testing.assert_allclose(norms(weights[2]), 0.5, rtol=1e-5)


def test_a_constructor_axis_is_for_the_groups():
    optimizer = ProjectedSGD([{"params": [weight()], "c": 1.0}, {"params": [weight()], "c": None}], axis=0)
    assert optimizer.param_groups[0]["axis"] == 0


def test_a_freed_group_has_no_shaping_either():
    groups = [{"params": [weight()]}, {"params": [weight()], "c": None}]
    optimizer = ProjectedSGD(groups, c=1.0, update=RelativeUpdate(), gradient="tangent")
    assert [(g["update"], g["gradient"]) for g in optimizer.param_groups] == [
        (RelativeUpdate(), "tangent"),
        (None,) * 2,
    ]


# ------------------------------------------------------------------------------------------------ what is changed holds

CHANGES = [
    ({"constraint": MaxNorm(4.0)}, {"constraint": MaxNorm(1.0)}, MaxNorm(1.0)),
    ({"constraint": MaxNorm(4.0)}, {"constraint": MaxNorm(1.0), "c": 1}, MaxNorm(1.0)),
    ({"constraint": MaxNorm(4.0)}, {"constraint": MaxNorm(1.0, axis=0), "axis": 0}, MaxNorm(1.0, axis=0)),
    ({"constraint": MaxNorm(4.0)}, {"axis": 0}, MaxNorm(4.0, axis=0)),
    ({"constraint": MaxNorm(4.0)}, {"axis": 0, "c": 2}, MaxNorm(2.0, axis=0)),
    ({"constraint": MaxNorm(4.0)}, {"constraint": NonNegative()}, NonNegative()),
    ({"constraint": MaxNorm(4.0)}, {"constraint": MaxNorm(2.0).config()}, MaxNorm(2.0)),
    ({"constraint": MaxNorm(4.0)}, {"constraint": None}, None),
    ({"constraint": MaxNorm(4.0)}, {"constraint": None, "c": 2.0}, MaxNorm(2.0)),
    ({"constraint": MaxNorm(4.0)}, {"c": None}, None),
    ({"constraint": MaxNorm(4.0)}, {"c": np.float32(2.0)}, MaxNorm(2.0)),
    ({"c": 4.0}, {"constraint": UnitNorm()}, UnitNorm()),
    ({"c": 4.0}, {"constraint": MinMaxNorm(6.0, 7.0)}, MinMaxNorm(6.0, 7.0)),
    ({"c": 4.0}, {"constraint": MaxNorm(2.0)}, MaxNorm(2.0)),
    ({"c": 4.0}, {"axis": (0, 1)}, MaxNorm(4.0, axis=None)),
    ({"c": 4.0}, {"axis": Split(0, 2, (1, 2)), "c": 2.0}, MaxNorm(2.0, Split(0, 2, (1, 2)))),
    ({"c": None}, {"c": 2.0}, MaxNorm(2.0)),
    ({}, {"constraint": Box(-1.0, 1.0)}, Box(-1.0, 1.0)),
    ({"constraint": UnitNorm()}, {"axis": 0}, UnitNorm(axis=0)),
    ({"constraint": UnitNorm()}, {"constraint": None}, None),
    ({"constraint": MinMaxNorm(6.0, 7.0)}, {"axis": 0}, MinMaxNorm(6.0, 7.0, axis=0)),
]


@pytest.mark.parametrize(("made", "change", "wanted"), CHANGES)
@pytest.mark.parametrize("way", ["", "deepcopy", "pickle", "state_dict", "fused"])
def test_what_is_changed_holds_from_the_next_step_on(made, change, wanted, way):
    p, start = weight(), weight(value=3.0).detach()
    optimizer = ProjectedSGD([p], lr=0.1, fused=way == "fused", **made)
    step(optimizer)
    optimizer.param_groups[0].update(change)
    if way in ("deepcopy", "pickle"):
        optimizer = copied(way, optimizer)
    elif way == "state_dict":
        fresh = ProjectedSGD([p], lr=0.7, c=77.0)
        fresh.load_state_dict(optimizer.state_dict())
        optimizer = fresh
    (p,) = optimizer.param_groups[0]["params"]
    for _ in range(2):
        with torch.no_grad():
            p.copy_(start)
        step(optimizer)
        expected = start if wanted is None else wanted.project(start)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_c_moves_like_lr(fused):
    p = weight()
    optimizer = ProjectedSGD([p], lr=0.1, c=4.0, fused=fused)
    for c in (0.4, 2, 1e-3, 1e-20):
        optimizer.param_groups[0]["c"] = c
        step(optimizer, -99.0)
        assert (norms(p) <= c).all()
        assert (norms(p) >= c * (1 - 1e-5)).all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_number_in_a_tensor_is_read_at_every_step(fused):
    for made in ({"c": 4.0}, {"constraint": MaxNorm(4.0)}):
        p, c = weight(), torch.tensor(2.0)
        optimizer = ProjectedSGD([p], lr=0.1, fused=fused, **made)
        optimizer.param_groups[0]["c"] = c
        for number in (2.0, 1.0, 0.5):
            c.fill_(number)
            step(optimizer)
            np.testing.assert_allclose(norms(p), number, rtol=1e-5)
        c.fill_(-1.0)
        with pytest.raises(ValueError, match="must be positive"):
            step(optimizer, 1.0)
        np.testing.assert_allclose(norms(p), 0.5, rtol=1e-5)


def test_groups_and_parameters_put_in_by_hand_are_held():
    first, second, third = weight(), weight(), weight()
    optimizer = ProjectedSGD([{"params": [first], "c": 1.0}, {"params": [second], "constraint": MaxNorm(2.0)}], lr=0.1)
    step(optimizer)
    optimizer.param_groups[0]["params"].append(third)
    optimizer.param_groups.reverse()
    late = weight()
    stock = torch.optim.SGD([late], lr=0.1).param_groups[0]
    optimizer.param_groups.append({**stock, "c": 3.0})
    step(optimizer, -9.0)
    for p, c in ((first, 1), (third, 1), (second, 2), (late, 3)):
        np.testing.assert_allclose(norms(p), c, rtol=1e-5)
        assert norms(p).max() <= c


# -------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize(
    ("change", "fullgraph"), [({"constraint": MaxNorm(1.0)}, True), ({"axis": 0}, False)], ids=["error", "holds"]
)
def test_compiled_a_change_other_than_of_c_is_an_error_or_holds(change, fullgraph):
    torch.compiler.reset()
    p, changed = weight(), MaxNorm(1.0) if "constraint" in change else MaxNorm(4.0, axis=0)
    optimizer = ProjectedSGD([p], lr=0.1, constraint=MaxNorm(4.0))
    compiled = torch.compile(optimizer.step, fullgraph=fullgraph, backend="eager")
    for turn in range(3):
        p.grad = torch.zeros_like(p)
        with torch.no_grad():
            p.fill_(5.0)
        if turn and fullgraph:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="_adopt"):
                compiled()
            assert bool((p == 5).all())
        else:
            compiled()
            expected = (changed if turn else MaxNorm(4.0)).project(torch.full((4, 3), 5.0))
            torch.testing.assert_close(p.detach(), expected, rtol=1e-6, atol=0)
        optimizer.param_groups[0].update(change)


@pytest.mark.parametrize("way", ["default", "fused", "compiled"])
def test_a_ball_too_small_for_the_dtype_raises_before_anything_moves(way):
    torch.compiler.reset()
    p = torch.nn.Parameter(torch.randn(6, 4))
    with pytest.raises(ValueError, match="too small for arithmetic in float32: pass at least 5e-29"):
        ProjectedAdam([p], c=1e-30)
    lr = torch.tensor(0.1) if way == "compiled" else 0.1
    optimizer = ProjectedAdam([p], lr=lr, c=1.0, fused=way == "fused")
    # This backend and Inductor write states as soon as they have them; "aot_eager" puts that off to the end.
    take = torch.compile(optimizer.step, backend="eager") if way == "compiled" else optimizer.step
    for c in (1.0, 0.9):
        optimizer.param_groups[0]["c"], p.grad = c, torch.randn(6, 4)
        take()
    before, moment = p.detach().clone(), optimizer.state[p]["exp_avg"].clone()
    optimizer.param_groups[0]["c"] = 1e-30
    with pytest.raises(ValueError, match="too small"):
        take()
    assert torch.equal(p.detach(), before)
    assert torch.equal(optimizer.state[p]["exp_avg"], moment)


def test_float64_has_smaller_balls():
    double = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    double.grad = torch.randn_like(double)
    ProjectedAdam([double], c=1e-30).step()
    assert double.detach().norm(dim=1).max() <= 1e-30


# -------------------------------------------------------------------------------------------- errors while it is made


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"c": 0}, ValueError, r"c=0\.0 must be positive"),
        ({"c": float("nan")}, ValueError, "c=nan must be positive"),
        ({"c": "4"}, TypeError, "c='4' is not a number"),
        ({"c": np.True_}, TypeError, "is not a number"),
        ({"c": np.ones(2)}, TypeError, r"c is an array of shape \(2,\)"),
        ({"c": torch.ones(2)}, TypeError, r"c is an array of shape \(2,\)"),
        ({"c": 4.0, "axis": 2}, ValueError, r"axis 2 is out of range for 0\.weight with shape \(8, 6\)"),
        ({"c": 4.0, "axis": (0, 0)}, ValueError, r"names an axis of 0\.weight with shape \(8, 6\) twice"),
        ({"c": 4.0, "axis": "fan_out"}, ValueError, "axis='fan_out' is not known"),
        ({"c": 4.0, "axis": 1.5}, TypeError, "axis=1.5 is not an axis"),
        ({"c": 4.0, "constraint": MaxNorm(3.0)}, ValueError, "c=4.0 or constraint=.*, not both"),
        ({"constraint": MaxNorm}, TypeError, "is not a constraint: pass one such as"),
        ({"constraint": MinMaxNorm(1e-30, 1.0)}, ValueError, "low=1e-30 is too small for arithmetic in float32"),
        ({"c": 4.0, "without_grad": "no"}, TypeError, "without_grad='no' is not known"),
        ({"c": 4.0, "metric": "odd"}, ValueError, "metric='odd' is not known"),
        ({"axis": 0}, ValueError, "axis=0 alone holds nothing: pass c= with it"),
        ({"C": 3}, (TypeError, ValueError), r"'C': did you mean 'c'\?"),
        ({"constrain": MaxNorm(3.0)}, (TypeError, ValueError), r"'constrain': did you mean 'constraint'\?"),
    ],
)
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_bad_settings_are_refused_when_they_are_made(settings, error, message, where):
    named = network().named_parameters()
    params, own = ([{"params": named, **settings}], {}) if where == "group" else (named, settings)
    with pytest.raises(error, match=message):
        ProjectedAdam(params, lr=0.1, **own)


def test_settings_that_disagree_with_the_constructors_are_errors():
    with pytest.raises(ValueError, match=r"axis=0 has no meaning for NonNegative\(\)"):
        ProjectedSGD([{"params": [weight()], "axis": 0}], constraint=NonNegative())
    optimizer = ProjectedSGD([weight()], constraint=MaxNorm(4.0))
    for group in (
        {**optimizer.param_groups[0], "params": [weight()], "constraint": MaxNorm(1.0)},
        {"params": [("weight", weight())], "c": 3.0, "axis": 2},
        {"params": [weight()], "metrics": 1.0},
    ):
        with pytest.raises(
            ValueError,
            match=r"disagree|axis 2 is out of range for weight with|key 'metrics': did you mean",
        ):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1


# --------------------------------------------------------------------------------------- errors in a running optimizer


@pytest.mark.parametrize(
    ("made", "change", "message"),
    [
        ({"c": 1.0}, {"c": 0}, "must be positive"),
        ({"c": 1.0}, {"c": float("nan")}, "must be positive"),
        ({"c": 1.0}, {"c": "4"}, "is not a number"),
        ({"c": 1.0}, {"c": torch.tensor(-1.0)}, "must be positive"),
        ({"c": 1.0}, {"c": np.ones(2)}, r"c is an array of shape \(2,\)"),
        ({"c": 1.0}, {"c": np.True_}, "is not a number"),
        ({"c": 1.0}, {"axis": 2}, r"axis 2 is out of range for parameter 0 of group 0"),
        ({"constraint": MaxNorm(1.0)}, {"axis": 2}, r"axis 2 is out of range for parameter 0 of group 0"),
        ({"constraint": NonNegative()}, {"axis": 0}, r"axis=0 has no meaning for NonNegative\(\)"),
        ({"constraint": MaxNorm(1.0)}, {"constraint": MaxNorm(2.0, axis=7)}, "axis 7 is out of range"),
        ({"constraint": MaxNorm(1.0)}, {"constraint": MaxNorm(2.0), "c": 3.0}, r"c=3.0 and constraint=.* disagree"),
        ({"constraint": MaxNorm(1.0)}, {"constraint": MaxNorm(2.0), "axis": 0}, r"axis=0 and constraint=.* disagree"),
        ({"constraint": MaxNorm(1.0)}, {"constraint": 2.0}, "constraint=2.0 is not a constraint"),
        ({"constraint": UnitNorm()}, {"c": 0.5}, "c=0.5 goes with MaxNorm"),
        ({"constraint": MinMaxNorm(0.5, 1.0)}, {"c": 0.5}, "c=0.5 goes with MaxNorm"),
        ({"c": 1.0}, {"update": "relative"}, "is not a shaping of updates"),
        ({"c": 1.0}, {"update": RelativeUpdate(axis=0)}, "different vectors"),
        ({"c": 1.0}, {"gradient": "normal"}, "is not known"),
        ({"c": 1.0, "gradient": "tangent"}, {"constraint": NonNegative(), "gradient": "tangent"}, "a set of vectors"),
        ({"c": 1.0}, {"metric": "hyperbolic"}, "is not known"),
        ({"c": 1.0}, {"without_grad": 1}, "pass True or False"),
        ({}, {"constraint": Sphere("initial"), "params": [torch.zeros(4, 3)]}, "have norm 0"),
        ({"c": 1.0}, {"params": [torch.ones(3, 2, dtype=torch.complex64)]}, "has dtype complex64"),
        ({"c": 1.0}, {"params": [torch.ones(3, 1).expand(3, 4)]}, "expanded tensor"),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_what_cannot_be_honoured_raises_before_anything_moves(made, change, message, fused):
    p, other = weight(), weight()
    optimizer = ProjectedAdam([{"params": [other]}, {"params": [p]}], lr=0.1, fused=fused, **made)
    optimizer.param_groups.reverse()
    optimizer.param_groups[0].update(change)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=message):
            step(optimizer, 1.0)
    assert bool((p == 5).all())
    assert bool((other == 5).all())
    assert not optimizer.state


def test_a_metric_that_the_optimizer_does_not_have_raises_before_anything_moves():
    p = weight(8, 8)
    optimizer = projected(torch.optim.Muon)([p], lr=0.1, c=1.0)
    optimizer.param_groups[0]["metric"] = "adaptive"
    with pytest.raises(ValueError, match='metric="adaptive" needs the diagonal'):
        step(optimizer, 1.0)
    assert bool((p == 5).all())


def test_what_holds_nothing_is_noticed():
    layer = torch.nn.Linear(3, 2)
    with pytest.warns(UserWarning, match=r"nothing is projected: pass c=, such as c=4.0"):
        ProjectedSGD(layer.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProjectedSGD(layer.parameters(), lr=0.1, c=None)
        ProjectedSGD([{"params": layer.parameters(), "c": None}], lr=0.1)
        ProjectedSGD(layer.parameters(), lr=0.1, update=RelativeUpdate())
        ProjectedSGD([layer.bias], lr=0.1, constraint=NonNegative())
    for wanted in ({"c": 3.0}, {"constraint": UnitNorm()}):
        with pytest.warns(UserWarning, match=r"holds nothing: .* such as bias of shape \(2,\)\. axis=None"):
            ProjectedSGD([("bias", layer.bias)], lr=0.1, **wanted)
        with pytest.warns(UserWarning, match=r"holds nothing: .* of shape \(\)"):
            ProjectedSGD([torch.nn.Parameter(torch.tensor(1.0))], lr=0.1, **wanted)
    with pytest.warns(UserWarning, match="holds nothing"):
        project_after_step(torch.optim.SGD([layer.bias], lr=0.1), MaxNorm(3.0))
    norm = torch.nn.LayerNorm(3)
    with pytest.raises(ValueError, match="A set of norms needs weights with a fan-in; axis=None makes"):
        project_after_step(torch.optim.SGD(norm.parameters()), MaxNorm(3.0), norm)


def test_experts_among_bare_tensors_are_noticed():
    experts, convolution = torch.nn.Parameter(torch.ones(4, 64, 32)), torch.nn.Parameter(torch.ones(64, 32, 7))
    with pytest.warns(UserWarning, match=r"shape \(4, 64, 32\) is read as \(out, in, kernel\)\. .* axis=Stacked\(\)"):
        ProjectedSGD([convolution, experts], lr=0.1, c=1.0)
    with pytest.warns(UserWarning, match=r'is read as one matrix\. .* axis=Stacked\("matrix"\)'):
        hyperball(torch.optim.Adam)([convolution, experts])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProjectedSGD([convolution], lr=0.1, c=1.0)
        each = hyperball(torch.optim.Adam)([experts], axis=Stacked("matrix"))
        assert each.param_groups[0]["constraint"].axis == Stacked("matrix")
        restored = hyperball(torch.optim.Adam)([experts], axis=None)
        restored.load_state_dict(each.state_dict())
        assert restored.param_groups[0]["constraint"].axis == Stacked("matrix")


def test_the_name_that_other_libraries_have_for_the_bound_is_answered():
    with pytest.raises(TypeError, match=r"'max_norm': pass c=3"):
        ProjectedSGD([torch.nn.Parameter(torch.ones(2, 2))], lr=0.1, max_norm=3)


def test_an_axis_of_kernels_leaves_biases_alone():
    layer = torch.nn.Conv2d(3, 4, 2)
    optimizer = ProjectedSGD(layer.parameters(), lr=0.1, c=0.1, axis=(1, 2, 3))
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    bias = layer.bias.detach().clone()
    optimizer.step()
    assert torch.equal(layer.bias, bias)
    assert float(MaxNorm(0.1).violation(layer.weight.detach()).max()) == 0


def test_rules_in_a_group_are_refused():
    with pytest.raises(TypeError, match="rules go to the constructor"):
        ProjectedSGD([{"params": [weight()], "constraint": {"*": MaxNorm(1.0)}}], lr=0.1)
