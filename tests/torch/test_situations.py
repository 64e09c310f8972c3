"""What a stock optimizer does without trouble, with every set, shaping and kind of step.

Parameters without entries, parameters that are frozen and have another dtype, fake and meta tensors, group keys and
states that are the optimizer's own. Each is beside a usual weight, which has to come out as it does alone.
"""

import copy
import functools
import itertools
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from projgd import (
    Box,
    MaxNorm,
    MaxUpdate,
    MinMaxNorm,
    NonNegative,
    RadialBrake,
    RelativeUpdate,
    Sphere,
    TangentUpdate,
    UnitNorm,
)
from projgd.torch import project_after_step, projected
from projgd.torch.engines import cpu
from tests.torch.common import give_gradients, random, same

SETS = [
    None,
    MaxNorm(0.5),
    MaxNorm(0.5, axis=None),
    MinMaxNorm(0.2, 0.5),
    UnitNorm(),
    Sphere("initial"),
    NonNegative(),
    Box(-0.5, 0.5),
]
SHAPINGS = [
    {},
    {"update": RelativeUpdate()},
    {"update": TangentUpdate()},
    {"update": RadialBrake(0.5)},
    {"update": MaxUpdate(0.1)},
    {"gradient": "tangent"},
]
METRICS = ["euclidean", "adaptive"]
FORMS = ["projected", "fused", "fused, no numba", "hook"]


def cases(form):
    """Every set, shaping and metric that go together, on a usual weight."""
    for constraint, shaping, metric in itertools.product(SETS, SHAPINGS, METRICS):
        if form == "fused, no numba" and (shaping not in SHAPINGS[:2] or metric != "euclidean"):
            continue  # as "projected" from there on
        if form == "hook" and (shaping or metric != "euclidean" or constraint is None or constraint.takes_initial):
            continue
        try:
            make(form, random((4, 3)), constraint, shaping, metric)
        except ValueError:
            continue
        yield constraint, shaping, metric


def make(form, params, constraint, shaping, metric, inner=torch.optim.Adam, **options):
    if form.startswith("fused"):
        options["fused"] = True
    if form == "hook":
        optimizer = inner(params, lr=0.1, **options)
        project_after_step(optimizer, constraint)
        return optimizer
    return projected(inner)(params, lr=0.1, constraint=constraint, metric=metric, **shaping, **options)


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    if request.param == "fused":
        pytest.importorskip("numba")
    if request.param == "fused, no numba":
        monkeypatch.setattr(cpu, "_is_installed", lambda: False)
    return request.param


# ----------------------------------------------------------------------------------- what is the optimizer's own


KEYS = {"fix_lr": True, "lr_multiplier": 2.0, "use_muon": False, "rho": 0.1, "moe": False, "update_proj_gap": 7}


class Own(torch.optim.Adam):
    """Keeps keys of its own in its groups, an entry of its own in its state, and a lambda."""

    def __init__(self, params, **options):
        groups = [{"params": list(params), "use_muon": False, "weight": lambda t: t}]
        super().__init__(groups, **options)
        self.param_groups[0].pop("weight")
        self.of_step = lambda step: step**0.5
        self.state["k"] = torch.tensor([0])
        self.state["sum"] = {"of": "something"}

    def step(self, closure=None):
        self.state["k"] += 1
        return super().step(closure)


def test_groups_and_states_are_the_optimizers_own(form):
    for constraint, shaping, metric in cases(form):
        if metric != "euclidean":
            continue
        plain, params = random((4, 3)), random((4, 3))
        first = make(form, plain, constraint, shaping, metric, Own)
        second = make(form, params, constraint, shaping, metric, Own)
        give_gradients(plain + params, 0)
        first.step()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        assert second.state["k"] == 1
        assert second.state["sum"] == {"of": "something"}
        with torch.no_grad():
            params[0].copy_(plain[0])
        give_gradients(plain, 1)
        give_gradients(params, 1)
        first.step()
        second.step()
        assert torch.equal(plain[0], params[0]), (constraint, shaping)


def test_only_keys_near_a_setting_are_refused():
    for inner in (torch.optim.SGD, torch.optim.Adam):
        optimizer = projected(inner)([{"params": random((4, 3)), **KEYS}], lr=0.1, c=0.5)
        optimizer.add_param_group({"params": random((4, 3)), "gradient_clip": 1.0, "lr_scale": 0.5})
        assert optimizer.param_groups[0].items() >= KEYS.items()
    for key, near in {"axes": "axis", "constraints": "constraint", "C": "c", "withoutgrad": "without_grad"}.items():
        with pytest.raises(ValueError, match=f"unknown key '{key}': did you mean '{near}'"):
            optimizer.add_param_group({"params": random((2, 2)), key: 1})


@pytest.mark.parametrize("constraint", [MaxNorm(0.5), Sphere("initial"), UnitNorm()], ids=str)
def test_a_hook_adapts_a_state_before_it_is_loaded(constraint):
    """The recipe of torch's documentation: the state of a parameter goes to the one of the same name."""

    def made(order):
        params = dict(zip("abc", random((4, 3), (5, 4), (3, 3), seed=1), strict=True))
        named = [(name, params[name]) for name in order]
        return params, projected(torch.optim.Adam)(named, lr=0.1, constraint=constraint)

    def by_name(optimizer, state_dict):
        group = state_dict["param_groups"][0]
        place = dict(zip(group["param_names"], group["params"], strict=True))
        now = optimizer.param_groups[0]["param_names"]
        state = {i: state_dict["state"][place[name]] for i, name in enumerate(now) if name in place}
        return {"state": state, "param_groups": [{**group, "params": list(range(len(now))), "param_names": now}]}

    first, saving = made("abc")
    give_gradients(first.values(), 0)
    saving.step()
    second, loading = made("ca")
    with torch.no_grad():
        for name in first:
            second[name].copy_(first[name] * 0.5)  # the radii must be those of the file
    loading.register_load_state_dict_pre_hook(by_name)
    seen = []
    loading.register_load_state_dict_post_hook(lambda o: seen.append({n: dict(o.state[second[n]]) for n in "ca"}))
    loading.load_state_dict(copy.deepcopy(saving.state_dict()))
    for name in "ca":
        assert same(loading.state[second[name]], saving.state[first[name]])
        assert same(seen[0][name], loading.state[second[name]])
        second[name].data.copy_(first[name])
    give_gradients([first["a"], second["a"]], 1)
    for name in "bc":
        first[name].grad = None
    second["c"].grad = None
    second["a"].grad = first["a"].grad.clone()
    saving.step()
    loading.step()
    assert torch.equal(first["a"], second["a"])


def test_a_hook_may_drop_a_group():
    first = projected(torch.optim.Adam)([{"params": [p]} for p in random((4, 3), (3, 2))], c=0.5)
    second = projected(torch.optim.Adam)(random((4, 3)), c=0.4)
    second.register_load_state_dict_pre_hook(lambda o, s: {**s, "param_groups": s["param_groups"][:1]})
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["c"] == 0.5
    second._optimizer_load_state_dict_pre_hooks.clear()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        second.load_state_dict(copy.deepcopy(first.state_dict()))


def test_a_class_with_a_lambda_is_pickled_without_it_and_copied_with_it():
    params = random((4, 3))
    optimizer = projected(Own)(params, lr=0.1, c=0.5)
    give_gradients(params, 0)
    optimizer.step()
    again = pickle.loads(pickle.dumps(optimizer))
    (p,) = again.param_groups[0]["params"]
    p.grad = params[0].grad.clone()
    again.step()
    optimizer.step()
    assert torch.equal(p, params[0])
    assert again.of_step is None
    assert copy.deepcopy(optimizer).of_step(4) == 2


# ------------------------------------------------------------------------------------------------- without entries


EMPTY = (0, 3), (3, 0), (2, 0, 3), (0,)


def test_parameters_without_entries(form):
    for constraint, shaping, metric in cases(form):
        plain, params = random((4, 3)), random((4, 3), *EMPTY)
        alone = make(form, plain, constraint, shaping, metric)
        groups = [{"params": [p]} for p in params] if constraint == MaxNorm(0.5) else params
        beside = make(form, groups, constraint, shaping, metric)
        for k in range(2):
            give_gradients(plain, k)
            give_gradients(params, k)
            alone.step()
            beside.step()
            assert torch.equal(plain[0], params[0]), (constraint, shaping, metric)
        if form != "hook":
            beside.routes()
            beside.load_state_dict(copy.deepcopy(beside.state_dict()))


# ------------------------------------------------------------------------------------------------ fake and meta tensors


@pytest.mark.parametrize("mode", [FakeTensorMode, functools.partial(torch.device, "meta")], ids=["fake", "meta"])
def test_a_step_of_tensors_without_memory(form, mode):
    """How people estimate memory. Nothing is projected or shaped, because there are no numbers."""
    for constraint, shaping, metric in cases(form):
        with mode() as made:
            if form.startswith("fused") and isinstance(made, torch.device):
                return  # torch refuses it
            params = [torch.nn.Parameter(torch.ones(s)) for s in [(4, 3), (2, 3, 2), (3,)]]
            optimizer = make(form, params, constraint, shaping, metric)
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            if form != "hook":
                assert {choice.engine for choice in optimizer.routes().values()} == {"free"}
                optimizer.state_dict()


# ------------------------------------------------------------------------------ frozen parameters of other kinds


FROZEN = {
    "uint8": lambda: torch.ones(4, 3, dtype=torch.uint8),
    "int8": lambda: torch.ones(4, 3, dtype=torch.int8),
    "complex": lambda: torch.ones(4, 3, dtype=torch.complex64),
    "expanded": lambda: torch.ones(1, 3).expand(4, 3),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "uninitialised": lambda: torch.nn.UninitializedParameter(requires_grad=False),
}


def frozen_of(kind):
    made = FROZEN[kind]()
    return made if kind == "uninitialised" else torch.nn.Parameter(made, requires_grad=False)


def test_frozen_parameters_that_cannot_be_projected(form):
    for constraint, shaping, metric in cases(form):
        plain, params = random((4, 3)), random((4, 3))
        alone = make(form, plain, constraint, shaping, metric)
        beside = make(form, [frozen_of("uint8"), *params, frozen_of("complex")], constraint, shaping, metric)
        for k in range(2):
            give_gradients(plain, k)
            give_gradients(params, k)
            alone.step()
            beside.step()
            assert torch.equal(plain[0], params[0]), (constraint, shaping, metric)
        if form != "hook":
            assert beside.routes()["parameter 0 of group 0"].engine == "free"
            beside.load_state_dict(copy.deepcopy(beside.state_dict()))
            beside.param_groups[0]["axis"] = beside.param_groups[0]["axis"]
            pickle.dumps(beside)


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parametrize("form", ["projected", "hook"])
def test_a_frozen_parameter_that_is_thawed_is_an_error_before_anything_is_written(kind, form):
    params = random((4, 3))
    p, w = frozen_of(kind), params[0]
    optimizer = make(form, [*params, p], MaxNorm(0.5), {}, "euclidean", torch.optim.SGD)
    give_gradients(params, 0)
    optimizer.step()
    before = w.detach().clone()
    if kind in ("uint8", "int8"):
        p.grad = torch.ones_like(p)
    elif kind == "uninitialised":
        return  # torch refuses to thaw it
    else:
        p.requires_grad_()
    with pytest.raises((TypeError, ValueError), match=r"parameter 1 of group 0 (has dtype|is)"):
        optimizer.step()
    assert torch.equal(w, before)


@pytest.mark.parametrize("kind", FROZEN)
def test_a_frozen_parameter_that_would_be_projected_is_refused(kind):
    with pytest.raises((TypeError, ValueError), match="parameter 0 of group 0"):
        projected(torch.optim.SGD)([frozen_of(kind)], lr=0.1, c=0.5, without_grad=True)
    with pytest.raises((TypeError, ValueError), match="parameter 0 of group 0"):
        project_after_step(torch.optim.SGD([frozen_of(kind)], lr=0.1), MaxNorm(0.5), without_grad=True)
    if kind in ("complex", "expanded"):
        with pytest.raises((TypeError, ValueError), match="parameter 0 of group 0"):
            projected(torch.optim.SGD)([FROZEN[kind]().requires_grad_()], lr=0.1, c=0.5)


def test_a_frozen_weight_of_zero_has_no_radius_and_needs_none(form):
    for settings in ({"constraint": Sphere("initial")}, {"constraint": MaxNorm(0.5), "update": RelativeUpdate()}):
        if form == "hook":
            return
        zero, params = torch.nn.Parameter(torch.zeros(4, 3), requires_grad=False), random((4, 3))
        optimizer = projected(torch.optim.SGD)([zero, *params], lr=0.1, fused="fused" in form, **settings)
        give_gradients(params, 0)
        optimizer.step()
        assert not zero.any()
        zero.requires_grad_()
        with pytest.raises(ValueError, match="norm 0"):
            optimizer.step()
