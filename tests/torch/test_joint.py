"""Sets over several tensors in a projected optimizer."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from projgd import MaxNorm, ProductMaxNorm, QKClip, TreeBall
from projgd.torch import ProjectedAdam, ProjectedSGD, hyperball, lora_pairs, projected
from tests.torch.common import copied, give_gradients, longest, random, same, saved_and_loaded, step

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TIGHT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class Layer(nn.Module):
    """A layer as peft makes it: factors by adapter, and a scale."""

    def __init__(self, into=6, out=5, rank=2, scale=2.0, kind=nn.Linear):
        super().__init__()
        self.base_layer = nn.Linear(into, out).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": kind(into, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": kind(rank, out, bias=False)})
        self.scaling = {"default": scale}

    def forward(self, x):
        return self.base_layer(x) + self.scaling["default"] * self.lora_B["default"](self.lora_A["default"](x))


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"q": Layer(), "v": Layer(scale=0.5, rank=3)})


def product_norm(a, b, scale=1.0):
    return float(scale * (b.detach().double() @ a.detach().double()).norm())


def norm_of(*params):
    return math.sqrt(sum(float(p.detach().double().square().sum()) for p in params))


def pair(dtype=torch.float32, size=2.0, seed=0):
    return [nn.Parameter(p.detach().to(dtype)) for p in random((3, 9), (7, 3), seed=seed, scale=size)]


# ------------------------------------------------------------------------------------------------------- ProductMaxNorm


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(-3, 2),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_product_is_held_after_every_step(dtype, rank, into, out, exponent, seed):
    a, b = (
        nn.Parameter(p.detach().to(dtype)) for p in random((rank, into), (out, rank), seed=seed, scale=10**exponent)
    )
    optimizer = ProjectedAdam([a, b], lr=0.01, joint=[ProductMaxNorm(1.5, scale=2.0).over(a, b)])
    for k in range(3):
        give_gradients([a, b], k)
        optimizer.step()
        assert product_norm(a, b, 2.0) <= 1.5
        assert optimizer.joint_norms()[0] == pytest.approx(product_norm(a, b, 2.0), rel=1e-6, abs=1e-300)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_the_plain_step_and_the_formula(dtype):
    (a, b), plain = pair(dtype), pair(dtype)
    optimizer = ProjectedAdam([a, b], lr=0.01, joint=[ProductMaxNorm(1.5, 2.0).over(a, b)])
    give_gradients([a, b], 0)
    give_gradients(plain, 0)
    optimizer.step()
    torch.optim.Adam(plain, lr=0.01).step()
    factor = math.sqrt(1.5 / product_norm(*plain, 2.0))
    for p, q in zip((a, b), plain, strict=True):
        torch.testing.assert_close(p.double(), q.detach().double() * factor, rtol=2 * TIGHT[dtype], atol=1e-7)
    assert 1.5 * (1 - 2 * TIGHT[dtype]) <= product_norm(a, b, 2.0) <= 1.5


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_where_it_holds_the_step_is_the_plain_optimizers(options):
    a, b = pair(size=0.1)
    plain = [nn.Parameter(p.detach().clone()) for p in (a, b)]
    optimizer, stock = (
        ProjectedAdam([a, b], lr=0.01, joint=[ProductMaxNorm(100.0).over(a, b), TreeBall(100.0)], **options),
        torch.optim.Adam(plain, lr=0.01, **options),
    )
    for k in range(3):
        give_gradients([a, b], k)
        give_gradients(plain, k)
        optimizer.step()
        stock.step()
    tolerance = 1e-6 if "fused" in options else 0
    torch.testing.assert_close([a, b], plain, rtol=tolerance, atol=tolerance)


def test_joint_sets_come_after_the_others():
    a, b = pair(size=5.0)
    optimizer = ProjectedSGD([a, b], lr=0.1, c=1.0, joint=[ProductMaxNorm(0.5).over(a, b), TreeBall(0.9)])
    step(optimizer)
    assert longest(a) <= 1.0
    assert product_norm(a, b) <= 0.5
    assert 0.9 * (1 - 1e-5) <= norm_of(a, b) <= 0.9


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_factor_stays(broken):
    a, b = pair()
    with torch.no_grad():
        a[0, 0] = broken
    before = [p.detach().clone() for p in (a, b)]
    step(ProjectedSGD([a, b], lr=0.1, joint=[ProductMaxNorm(0.1).over(a, b), TreeBall(0.1)]))
    torch.testing.assert_close([a, b], before, rtol=0, atol=0, equal_nan=True)


def test_a_zero_factor_stays():
    a, b = pair()
    nn.init.zeros_(b)
    before = a.detach().clone()
    step(ProjectedSGD([a, b], lr=0.1, joint=[ProductMaxNorm(0.1).over(a, b)]))
    assert torch.equal(a, before)
    assert not b.any()


def test_projecting_again_changes_no_bit():
    for dtype in DTYPES:
        a, b = pair(dtype)
        optimizer = ProjectedSGD([a, b], lr=0.1, joint=[ProductMaxNorm(1.0).over(a, b), TreeBall(2.0)])
        step(optimizer)
        before = copy.deepcopy([a, b])
        step(optimizer)
        assert same([a, b], before)


# ----------------------------------------------------------------------------------------------------------- lora_pairs


def test_pairs_of_a_model():
    net = model()
    optimizer = ProjectedAdam(net, lr=0.1, joint=lora_pairs(net, c=0.5))
    assert [made.set.scale for made in optimizer.joint] == [2.0, 0.5]
    assert optimizer.joint[0].members == ("q.lora_A.default.weight", "q.lora_B.default.weight")
    for _ in range(5):
        optimizer.zero_grad()
        (net["q"](torch.ones(4, 6)) + net["v"](torch.ones(4, 6))).square().sum().neg().backward()
        optimizer.step()
    found = [
        product_norm(m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"]) for m in net.values()
    ]
    assert optimizer.joint_norms() == pytest.approx(found)
    assert all(0.5 * (1 - 2e-5) <= n <= 0.5 for n in found)


def test_pairs_in_other_forms():
    net = nn.Module()
    net.lora_A, net.lora_B, net.scaling = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(4, 2)), 4.0
    assert [(p.set.scale, p.members[0] is net.lora_A) for p in lora_pairs(net, 1.0)] == [(4.0, True)]
    net = nn.Module()
    net.lora_embedding_A = nn.ParameterDict({"x": torch.ones(2, 9), "y": torch.ones(2, 9)})
    net.lora_embedding_B = nn.ParameterDict({"x": torch.ones(4, 2), "y": torch.ones(4, 2)})
    net.lora_A, net.lora_B, net.scaling = nn.ModuleDict(), nn.ModuleDict(), {"x": 1.0, "y": 3.0}
    assert [p.set.scale for p in lora_pairs(net, 1.0)] == [1.0, 3.0]
    assert [p.set.scale for p in lora_pairs(net, 1.0, adapter="y")] == [3.0]
    assert [p.set.scale for p in lora_pairs(net, 1.0, scale=2.0)] == [2.0, 2.0]


def test_pairs_that_cannot_be():
    net = model()
    net["v"].lora_B["default"] = nn.Linear(4, 5, bias=False)
    with pytest.raises(ValueError, match=r"v\.lora\.default\.A of shape \(3, 6\).*ranks 3 and 4 differ"):
        lora_pairs(net, 1.0)
    with pytest.raises(ValueError, match="no trainable lora_A and lora_B of the adapter 'other'"):
        lora_pairs(model(), 1.0, adapter="other")
    with pytest.raises(ValueError, match="no trainable lora_A and lora_B: pass what peft"):
        lora_pairs(nn.Linear(3, 2), 1.0)
    with pytest.raises(ValueError, match="must be positive"):
        lora_pairs(model(), 0.0)
    del net["v"].lora_B["default"]
    with pytest.raises(ValueError, match="v has the adapter 'default' in lora_A and not in lora_B"):
        lora_pairs(net, 1.0)


def test_peft_itself():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2)
    torch.manual_seed(0)
    lora = peft.LoraConfig(target_modules=["c_attn", "wte"], r=2, lora_alpha=8, fan_in_fan_out=True)
    net = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    optimizer = ProjectedAdam(net, lr=0.3, joint=lora_pairs(net, c=0.5))
    assert [p.set.scale for p in optimizer.joint] == [4.0] * 3
    frozen = [p.detach().clone() for p in net.parameters() if not p.requires_grad]
    for _ in range(6):
        optimizer.zero_grad()
        tokens = torch.arange(8)[None]
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        named = optimizer.named_params()
        for made in optimizer.joint:
            assert product_norm(*(named[name] for name in made.members), 4.0) <= 0.5
    assert max(optimizer.joint_norms()) >= 0.5 * (1 - 1e-5)
    assert same([p for p in net.parameters() if not p.requires_grad], frozen)


# ------------------------------------------------------------------------------------------------------------- TreeBall


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_ball_around_all(dtype):
    params = [nn.Parameter(p.detach().to(dtype)) for p in random((4, 3), (7,), (), seed=1, scale=3.0)]
    before = [p.detach().double() for p in params]
    step(ProjectedSGD(params, lr=0.1, joint=[TreeBall(2.0)]))
    assert 2.0 * (1 - TIGHT[dtype]) <= norm_of(*params) <= 2.0
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.double(), q * 2.0 / norm_of(*before), rtol=TIGHT[dtype], atol=1e-7)


def test_a_ball_around_what_a_pattern_matches():
    net = model()
    frozen = net["q"].base_layer.weight.detach().clone()
    optimizer = ProjectedSGD(net, lr=0.1, joint=[TreeBall(0.5).over("q.lora_*"), TreeBall(0.9)])
    step(optimizer)
    of_q = [p for name, p in net["q"].named_parameters() if "lora" in name]
    assert norm_of(*of_q) <= 0.5
    assert norm_of(*(p for p in net.parameters() if p.requires_grad)) <= 0.9
    assert torch.equal(net["q"].base_layer.weight, frozen)
    assert optimizer.joint[0].members == ("q.lora_A.default.weight", "q.lora_B.default.weight")


def test_a_ball_takes_parameters_that_come_later():
    first, later = random((3, 2), (4, 2), scale=5.0)
    optimizer = ProjectedSGD([first], lr=0.1, joint=[TreeBall(1.0)])
    optimizer.add_param_group({"params": [later]})
    step(optimizer)
    assert norm_of(first, later) <= 1.0


# --------------------------------------------------------------------------------------------------------------- QKClip


def attention(heads=4, k_heads=2):
    torch.manual_seed(0)
    net = nn.ModuleDict({"q": nn.Linear(6, 3 * heads), "k": nn.Linear(6, 3 * k_heads)})
    clip = QKClip(50.0, 0.25, heads=heads, k_heads=k_heads)
    return net, ProjectedSGD(net, lr=0.1, joint=[clip.over("q.weight", "k.weight", "q.bias", "k.bias")])


def test_heads_above_tau_are_scaled():
    net, optimizer = attention()
    before = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    optimizer.observe({"q.weight": torch.tensor([10.0, 400.0, 50.0, 20.0])})
    optimizer.observe({net["q"].weight: torch.tensor([100.0, 30.0, 50.0, 20.0])})  # the maximum counts
    step(optimizer)
    for kind in ("weight", "bias"):
        for name, share, factors in (("q", 0.25, [0.5, 0.125, 1, 1]), ("k", 0.75, [0.125, 1])):
            wanted = before[f"{name}.{kind}"].unflatten(0, (-1, 3))
            wanted = wanted * (torch.tensor(factors, dtype=torch.float64) ** share).view(-1, *[1] * (wanted.ndim - 1))
            assert torch.equal(net[name].get_parameter(kind), wanted.flatten(0, 1).float())
    after = copy.deepcopy(net)
    with pytest.warns(UserWarning, match="does nothing in a step without logits"):
        step(optimizer)  # the logits are used up
    assert same(dict(net.named_parameters()), dict(after.named_parameters()))


def test_logits_alone_where_there_is_one_set():
    net, optimizer = attention()
    before = net["k"].weight.detach().clone()
    optimizer.observe(torch.full((4,), 100.0))
    step(optimizer)
    torch.testing.assert_close(net["k"].weight.detach(), before * 0.5**0.75)


@pytest.mark.parametrize(
    ("logits", "match"),
    [
        (torch.ones(3), r"logits for q.weight have shape \(3,\): pass .* of shape \(4,\)"),
        ({"q.weight": torch.ones(1, 4)}, r"logits for q.weight have shape \(1, 4\)"),
        ({"k.weight": torch.ones(4)}, "no QKClip is over 'k.weight' as W_q; those that have one are q.weight"),
        ({torch.ones(2): torch.ones(4)}, r"no QKClip is over a tensor of shape \(2,\)"),
    ],
)
def test_logits_that_do_not_fit(logits, match):
    with pytest.raises(ValueError, match=match):
        attention()[1].observe(logits)


def test_logits_without_a_set():
    a, b = pair()
    with pytest.raises(ValueError, match="has 0 QKClip sets"):
        ProjectedSGD([a, b], lr=0.1, joint=[TreeBall(1.0)]).observe(torch.ones(2))


# ---------------------------------------------------------------------------------------- steps, checkpoints and copies


def test_members_without_a_gradient_move_with_the_others():
    a, b = pair()
    optimizer = ProjectedSGD([a, b], lr=0.0, joint=[ProductMaxNorm(1.0).over(a, b)])
    before = [p.detach().clone() for p in (a, b)]
    optimizer.step()
    assert same([a.detach(), b.detach()], before)
    b.grad = torch.zeros_like(b)
    optimizer.step()
    assert product_norm(a, b) <= 1.0
    assert not torch.equal(a, before[0])


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_a_step_that_gradscaler_skips_changes_nothing(options):
    a, b = pair()
    optimizer = ProjectedSGD([a, b], lr=0.1, joint=[ProductMaxNorm(1.0).over(a, b), TreeBall(0.5)], **options)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), [p.detach().clone() for p in (a, b)]
    for broken in (math.inf, 0.0):
        optimizer.zero_grad()
        scaler.scale((a.sum() + b.sum()) * 0.0).backward()
        a.grad[0, 0] = broken
        scaler.step(optimizer)
        scaler.update()
        assert same([a.detach(), b.detach()], before) is (broken != 0)
    assert norm_of(a, b) <= 0.5


def test_a_compiled_step_holds_too():
    torch._dynamo.reset()
    a, b = pair()
    optimizer = ProjectedSGD([a, b], lr=0.1, joint=[ProductMaxNorm(1.0).over(a, b), TreeBall(1.5)])
    give_gradients([a, b], 0)
    torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    assert product_norm(a, b) <= 1.0
    assert norm_of(a, b) <= 1.5


def test_a_subclass_with_a_step_of_its_own():
    class Own(ProjectedSGD):
        def step(self, closure=None):
            with torch.no_grad():
                for p in self.param_groups[0]["params"]:
                    p.add_(1.0)

    a, b = pair()
    step(Own([a, b], lr=0.1, joint=[ProductMaxNorm(1.0).over(a, b)]))
    assert product_norm(a, b) <= 1.0


def test_other_inner_optimizers():
    a, b = pair()
    optimizer = hyperball(torch.optim.Adam)([a, b], lr=0.1, joint=[TreeBall(1.0)])
    step(optimizer)
    assert norm_of(a, b) <= 1.0
    a, b = pair()
    optimizer = projected(torch.optim.LBFGS)([a, b], lr=0.1, joint=[ProductMaxNorm(1.0).over(a, b)])

    def closure():
        optimizer.zero_grad()
        loss = (b @ a).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert product_norm(a, b) <= 1.0


def joint_of(optimizer):
    return [(made.set, made.members) for made in optimizer.joint]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state"])
def test_joint_sets_survive(how):
    net = model()
    joint = [*lora_pairs(net, c=0.5), TreeBall(2.0), TreeBall(1.0).over("v.*")]
    optimizer = ProjectedAdam(net, lr=0.1, joint=joint)
    step(optimizer, 0.1)
    if how == "state":
        state = saved_and_loaded(optimizer.state_dict())
        json.dumps(state["joint"])
        other = ProjectedAdam(model(), lr=0.1, c=None)
        other.load_state_dict(state)
        own = "joint" in state
    else:
        other, own = copied(how, optimizer), True
    assert own
    assert joint_of(other) == joint_of(optimizer)
    params = [p for group in other.param_groups for p in group["params"]]
    with torch.no_grad():
        for p in params:
            p.fill_(1.0)
    step(other)
    assert all(n <= c for n, c in zip(other.joint_norms(), [0.5, 0.5, 2.0, 1.0], strict=True))


def test_states_without_joint_sets_keep_those_that_are_there():
    a, b = pair()
    optimizer = ProjectedSGD([a, b], lr=0.1, joint=[TreeBall(2.0)])
    optimizer.load_state_dict(torch.optim.SGD([a, b], lr=0.5).state_dict())
    assert joint_of(optimizer) == [(TreeBall(2.0), ())]
    assert "joint" not in ProjectedSGD([a, b], lr=0.1, c=1.0).state_dict()
    torch.optim.SGD([a, b], lr=0.5).load_state_dict(optimizer.state_dict())


def test_a_state_that_does_not_fit_loads_nothing():
    a, b = pair()
    state = ProjectedSGD([a, b], lr=0.1, joint=[ProductMaxNorm(2.0).over(a, b)]).state_dict()
    other = ProjectedSGD(random((3, 9), (7, 4)), lr=0.5, c=None)
    with pytest.raises(ValueError, match="ranks 3 and 4 differ"):
        other.load_state_dict(state)
    assert other.param_groups[0]["lr"] == 0.5
    assert other.joint == []


def test_observed_logits_are_in_no_checkpoint():
    _, optimizer = attention()
    plain = optimizer.state_dict()
    optimizer.observe(torch.full((4,), 100.0))
    assert same(optimizer.state_dict(), plain)


def test_the_list_can_be_replaced():
    a, b = pair()
    optimizer = ProjectedSGD([a, b], lr=0.1, joint=[ProductMaxNorm(1.0).over(a, b)])
    optimizer.joint = [ProductMaxNorm(0.5).over(a, b)]
    with pytest.raises(ValueError, match="ranks"):
        optimizer.joint = [ProductMaxNorm(0.1).over(b, a)]
    step(optimizer)
    assert 0.5 * (1 - 1e-4) <= product_norm(a, b) <= 0.5


def test_members_follow_tensors_that_a_wrapper_replaces():
    a, b = pair()
    optimizer = ProjectedSGD([a, b], lr=0.1, joint=[ProductMaxNorm(0.5).over(a, b)])
    new = pair(seed=5)
    optimizer.param_groups[0]["params"][:] = new
    step(optimizer)
    assert product_norm(*new) <= 0.5
    assert product_norm(a, b) > 0.5


def test_a_differentiable_step():
    a, b = pair()
    y, z = a * 1.0, b * 1.0
    optimizer = ProjectedSGD([y, z], lr=0.1, differentiable=True, joint=[ProductMaxNorm(1.0).over(y, z)])
    y.grad, z.grad = torch.ones_like(y), torch.ones_like(z)
    optimizer.step()
    (z @ y).square().sum().backward()
    assert a.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------ bad input


def sgd(joint, params=None):
    a, b = random((2, 6), (5, 2))
    return ProjectedSGD([("up.A", a), ("up.B", b)] if params is None else params, lr=0.1, joint=joint)


@pytest.mark.parametrize(
    ("joint", "error", "match"),
    [
        ([ProductMaxNorm(1.0).over("up.A", "up.C")], ValueError, "'up.C', which no parameter is called: did you mean"),
        (
            [ProductMaxNorm(1.0).over("up.A", torch.ones(5, 2))],
            ValueError,
            r"a Tensor of shape \(5, 2\), which the opt",
        ),
        (
            [ProductMaxNorm(1.0).over("up.B", "up.A")],
            ValueError,
            r"up.B of shape \(5, 2\) and up.A .*ranks 5 and 6 differ",
        ),
        ([TreeBall(1.0).over("down.*")], ValueError, r"'down.\*', which no parameter is called"),
        (
            [QKClip(1.0, heads=4).over("up.A", "up.B")],
            ValueError,
            r"up.A has shape \(2, 6\), which is no weight of 4 heads",
        ),
        ([MaxNorm(1.0)], TypeError, "joint= has MaxNorm"),
        ([ProductMaxNorm(1.0)], TypeError, "joint= has ProductMaxNorm.*over"),
        (TreeBall(1.0), TypeError, "is not a list"),
        (1.0, TypeError, "is not a list"),
    ],
)
def test_bad_input(joint, error, match):
    with pytest.raises(error, match=match):
        sgd(joint)


def test_one_tensor_under_a_name_and_as_itself():
    a, b = random((3, 3), (3, 3))
    with pytest.raises(ValueError, match="one parameter twice"):
        sgd([ProductMaxNorm(1.0).over("a", a)], [("a", a), ("b", b)])


def test_nothing_is_warned_of_with_joint_sets_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd([TreeBall(1.0)])


def test_a_stack_of_integers_is_named():
    table = nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)
    with pytest.raises(TypeError, match=r"table has dtype int32"):
        sgd([TreeBall(1.0).over("table")], [("table", table), ("w", nn.Parameter(torch.ones(2)))])


def test_what_numpy_says_of_the_same_members():
    a, b = pair(torch.float64)
    step(ProjectedSGD([a, b], lr=0.0, joint=[ProductMaxNorm(1.0).over(a, b)]))
    twins = [p.detach().numpy().T for p in pair(torch.float64)]
    for p, q in zip((a, b), ProductMaxNorm(1.0).project(*twins), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), q.T, rtol=1e-12)


def test_a_state_with_joint_sets_over_other_parameters_is_refused_before_it_is_loaded():
    a, b = pair(torch.float32)
    saved = ProjectedSGD([a, b], lr=0.1, joint=[ProductMaxNorm(1.0).over(a, b)]).state_dict()
    other = ProjectedSGD([nn.Parameter(torch.ones(2, 2))], lr=0.5, joint=[TreeBall(3.0)])
    with pytest.raises(ValueError, match="joint sets over other parameters than the 1 of this optimizer"):
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.5
    assert [str(each.set) for each in other.joint] == ["TreeBall(c=3.0)"]
