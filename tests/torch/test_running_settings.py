"""Settings changed in a running optimizer, and classes of one's own: what was asked for holds, or it is an error."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch

from projgd import Box, MaxNorm, NonNegative, RelativeUpdate, Sphere, Split, UnitNorm
from projgd.torch import Projected, ProjectedAdam, ProjectedSGD, hyperball, projected


def weight(*shape, value=5.0):
    return torch.nn.Parameter(torch.full(shape or (4, 3), value))


def step(optimizer, gradient=0.0):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, gradient)
    optimizer.step()


def norms(p, axis=1):
    return np.linalg.norm(p.detach().numpy().astype(np.float64), axis=axis)


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
    ({"c": 4.0}, {"constraint": MaxNorm(2.0)}, MaxNorm(2.0)),
    ({"c": 4.0}, {"axis": (0, 1)}, MaxNorm(4.0, axis=None)),
    ({"c": 4.0}, {"axis": Split(0, 2, (1, 2)), "c": 2.0}, MaxNorm(2.0, Split(0, 2, (1, 2)))),
    ({"c": None}, {"c": 2.0}, MaxNorm(2.0)),
    ({}, {"constraint": Box(-1.0, 1.0)}, Box(-1.0, 1.0)),
    ({"constraint": UnitNorm()}, {"axis": 0}, UnitNorm(axis=0)),
    ({"constraint": UnitNorm()}, {"constraint": None}, None),
]


@pytest.mark.parametrize(("made", "change", "wanted"), CHANGES)
@pytest.mark.parametrize("way", ["", "deepcopy", "pickle", "state_dict", "fused"])
def test_what_is_changed_holds_from_the_next_step_on(made, change, wanted, way):
    p, start = weight(), weight(value=3.0).detach()
    optimizer = ProjectedSGD([p], lr=0.1, fused=way == "fused", **made)
    step(optimizer)
    optimizer.param_groups[0].update(change)
    if way == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
    elif way == "pickle":
        optimizer = pickle.loads(pickle.dumps(optimizer))
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


@pytest.mark.parametrize(
    ("made", "change", "message"),
    [
        ({"c": 1.0}, {"axis": 2}, r"axis 2 is out of range for parameter 0 of group 0"),
        ({"constraint": MaxNorm(1.0)}, {"axis": 2}, r"axis 2 is out of range for parameter 0 of group 0"),
        ({"constraint": NonNegative()}, {"axis": 0}, r"axis=0 has no meaning for NonNegative\(\)"),
        ({"constraint": MaxNorm(1.0)}, {"constraint": MaxNorm(2.0, axis=7)}, "axis 7 is out of range"),
        ({"constraint": MaxNorm(1.0)}, {"constraint": MaxNorm(2.0), "c": 3.0}, r"c=3.0 and constraint=.* disagree"),
        ({"constraint": MaxNorm(1.0)}, {"constraint": MaxNorm(2.0), "axis": 0}, r"axis=0 and constraint=.* disagree"),
        ({"constraint": MaxNorm(1.0)}, {"constraint": 2.0}, "constraint=2.0 is no constraint"),
        ({"constraint": UnitNorm()}, {"c": 0.5}, "c=0.5 goes with MaxNorm"),
        ({"constraint": UnitNorm()}, {"c": np.ones(2)}, r"c is an array of shape \(2,\)"),
        ({"c": 1.0}, {"c": np.True_}, "is not a number"),
        ({"c": 1.0}, {"update": "relative"}, "is no shaping"),
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


def test_a_number_in_a_tensor_is_read_at_every_step():
    for made in ({"c": 4.0}, {"constraint": MaxNorm(4.0)}):
        p, c = weight(), torch.tensor(2.0)
        optimizer = ProjectedSGD([p], lr=0.1, **made)
        optimizer.param_groups[0]["c"] = c
        for number in (2.0, 1.0, 0.5):
            c.fill_(number)
            step(optimizer)
            np.testing.assert_allclose(norms(p), number, rtol=1e-5)
        c.fill_(-1.0)
        with pytest.raises(ValueError, match="must be positive"):
            step(optimizer, 1.0)
        np.testing.assert_allclose(norms(p), 0.5, rtol=1e-5)


def test_compiled_a_change_other_than_of_c_is_an_error_or_holds():
    for change in ({"constraint": MaxNorm(1.0)}, {"axis": 0}):
        for fullgraph in (True, False):
            torch.compiler.reset()
            p = weight()
            optimizer = ProjectedSGD([p], lr=0.1, constraint=MaxNorm(4.0))
            compiled = torch.compile(optimizer.step, fullgraph=fullgraph, backend="aot_eager")
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
                    expected = (
                        (MaxNorm(1.0) if "constraint" in change else MaxNorm(4.0, axis=0)) if turn else MaxNorm(4.0)
                    )
                    torch.testing.assert_close(p.detach(), expected.project(torch.full((4, 3), 5.0)), rtol=1e-6, atol=0)
                optimizer.param_groups[0].update(change)


# ------------------------------------------------------------------------------------------- radii of the first weights


def test_radii_follow_a_set_that_is_changed():
    p = weight()
    optimizer = ProjectedAdam([p], lr=0.1, constraint=Sphere("initial", axis=None))
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
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
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


def test_a_state_that_does_not_fit_is_not_loaded():
    p = weight()
    optimizer = ProjectedAdam([p], lr=0.1, c=1.0)
    step(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    for change in ({"axis": 2}, {"c": -1.0}, {"metric": "odd"}, {"constraint": MaxNorm(2.0).config()}):
        saved = copy.deepcopy(before)
        saved["param_groups"][0] |= change
        with pytest.raises(ValueError, match=r"out of range|positive|known|disagree"):
            optimizer.load_state_dict(saved)
    for other in ([weight(), weight()], [{"params": [weight()]}, {"params": [weight()]}]):
        with pytest.raises(ValueError, match=r"parameter group"):
            optimizer.load_state_dict(ProjectedAdam(other).state_dict())
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], before["state"][0]["exp_avg"])
    step(optimizer, 1.0)
    assert norms(p).max() <= 1


@pytest.mark.parametrize("way", ["default", "fused", "compiled"])
def test_a_ball_too_small_for_the_dtype_raises_before_anything_moves(way):
    torch.compiler.reset()
    p = torch.nn.Parameter(torch.randn(6, 4))
    with pytest.raises(ValueError, match="too small for arithmetic in float32: pass at least 5e-29"):
        ProjectedAdam([p], c=1e-30)
    lr = torch.tensor(0.1) if way == "compiled" else 0.1
    optimizer = ProjectedAdam([p], lr=lr, c=1.0, fused=way == "fused")
    # Inductor, which writes states as soon as it has them; other backends put that off to the end.
    take = torch.compile(optimizer.step) if way == "compiled" else optimizer.step
    for c in (1.0, 0.9, 0.8):
        optimizer.param_groups[0]["c"], p.grad = c, torch.randn(6, 4)
        take()
    before, moment = p.detach().clone(), optimizer.state[p]["exp_avg"].clone()
    optimizer.param_groups[0]["c"] = 1e-30
    with pytest.raises(ValueError, match="too small"):
        take()
    assert torch.equal(p.detach(), before)
    assert torch.equal(optimizer.state[p]["exp_avg"], moment)
    double = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    double.grad = torch.randn_like(double)
    ProjectedAdam([double], c=1e-30).step()
    assert double.detach().norm(dim=1).max() <= 1e-30


def test_hyperball_compiles_into_one_graph():
    torch.compiler.reset()
    torch.manual_seed(0)
    start = torch.randn(6, 4)
    grads = [torch.randn(6, 4) for _ in range(3)]
    found = []
    for compiled in (False, True):
        p = torch.nn.Parameter(start.clone())
        optimizer = hyperball(torch.optim.Adam)([p, torch.nn.Parameter(torch.zeros(4))], lr=torch.tensor(0.05))
        take = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
        for g in grads:
            p.grad = g.clone()
            take()
        found.append(p.detach())
        assert "initial" in optimizer.state_dict()["state"][0]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert abs(float(found[1].double().norm() / start.double().norm()) - 1) <= 1e-6


# ------------------------------------------------------------------------------------------------ classes of your own


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
def test_a_class_with_a_step_of_its_own_is_projected(cls):
    p, seen = weight(), []
    optimizer = cls([p], lr=0.1, c=1.0)
    optimizer.register_step_post_hook(lambda *_: seen.append(norms(p).max()))
    for _ in range(2):
        step(optimizer, -1.0)
    np.testing.assert_allclose(norms(p), 1, rtol=1e-5)
    assert norms(p).max() <= 1
    assert seen[-1] <= 1
    if issubclass(cls, OwnStep):
        assert optimizer.step() == "done"
    twin = copy.deepcopy(optimizer)
    (q,) = twin.param_groups[0]["params"]
    step(twin, -1.0)
    assert norms(q).max() <= 1


def test_an_update_that_a_step_of_ones_own_does_not_shape_is_an_error():
    p = weight()
    optimizer = OwnStep([p], lr=0.1, c=1.0, update=RelativeUpdate())
    with pytest.raises(RuntimeError, match=r"OwnStep.step did not call super\(\).step\(\)"):
        step(optimizer, 1.0)
    optimizer = SometimesSuper([p], lr=0.1, c=1.0, update=RelativeUpdate())
    for _ in range(2):
        step(optimizer, 1.0)  # the turn without a step has not written anything
    assert norms(p).max() <= 1


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


# --------------------------------------------------------------------------------------------------------- constructors


@pytest.mark.parametrize(
    ("params", "settings", "message"),
    [
        ([weight()], {"axis": 0}, "axis=0 alone holds nothing: pass c= with it"),
        ([{"params": [weight()], "axis": 0}], {}, "axis=0 alone holds nothing: pass c= with it"),
        ([weight()], {"C": 3}, r"unexpected keyword argument 'C': did you mean 'c'\?"),
        ([weight()], {"constrain": MaxNorm(3.0)}, r"argument 'constrain': did you mean 'constraint'\?"),
        ([{"params": [weight()], "C": 3}], {}, r"unknown key 'C': did you mean 'c'\?"),
        ([weight()], {"c": np.True_}, "is not a number"),
        ([weight()], {"c": torch.tensor(True)}, "is not a number"),
        ([{"params": [weight()], "c": np.ones(2)}], {"constraint": UnitNorm()}, r"c is an array of shape \(2,\)"),
    ],
)
def test_slips_are_errors_that_say_what_to_type(params, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ProjectedSGD(params, **settings)


def test_a_constructor_axis_is_for_the_groups():
    optimizer = ProjectedSGD([{"params": [weight()], "c": 1.0}, {"params": [weight()], "c": None}], axis=0)
    assert optimizer.param_groups[0]["axis"] == 0


def test_help_shows_what_the_constructor_takes():
    shown = inspect.signature(ProjectedAdam).parameters
    assert [*shown][:3] == ["params", "lr", "betas"]
    assert shown["lr"].default == inspect.signature(torch.optim.Adam).parameters["lr"].default
    assert {"foreach", "c", "axis", "constraint", "update", "gradient", "metric", "without_grad"} < shown.keys()
    assert [*inspect.signature(Whole).parameters] == ["params", "lr", "settings"]


def test_defaults_have_the_settings():
    for settings in ({"c": 3.0, "axis": 0}, {"constraint": UnitNorm(), "metric": "euclidean"}):
        again = ProjectedSGD([weight()], **ProjectedSGD([weight()], lr=0.5, **settings).defaults)
        assert {k: again.param_groups[0][k] for k in settings} == settings


def test_a_group_passed_on_with_another_set_is_an_error():
    optimizer = ProjectedSGD([weight()], constraint=MaxNorm(4.0))
    with pytest.raises(ValueError, match="disagree"):
        optimizer.add_param_group({**optimizer.param_groups[0], "params": [weight()], "constraint": MaxNorm(1.0)})
    assert len(optimizer.param_groups) == 1
