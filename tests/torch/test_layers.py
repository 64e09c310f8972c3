"""What one neuron is, layer by layer: measured with autograd, then the projection of exactly those weights."""

import copy
import importlib
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from projgd import Box, MaxNorm, NonNegative, Sphere, Stacked, UnitNorm, report
from projgd.torch import (
    ProjectedAdam,
    ProjectedSGD,
    constrain,
    declared,
    hyperball,
    param_groups,
    project_after_step,
    projected,
    unconstrain,
)


def units_of_last_axis(layer, *inputs):
    return torch.movedim(layer(*inputs), -1, 0)


def channels(layer, *inputs):
    return torch.movedim(layer(*inputs), 1, 0)


def tokens(layer, vocabulary):
    return layer(torch.arange(vocabulary)[:, None]).reshape(vocabulary, -1)


def masks_by_output(units, weight):
    """For every output unit, the entries of `weight` that it depends on at any position."""
    found = []
    for unit in units:
        (g,) = torch.autograd.grad((unit * torch.randn_like(unit)).sum(), weight, retain_graph=True)
        found.append((g != 0).numpy())
    return found


def held(layer, constraint):
    """The layer's parameters before and after one step of SGD with zero gradients."""
    before = {name: p.detach().numpy().copy() for name, p in layer.named_parameters()}
    optimizer = ProjectedSGD(param_groups(layer, constraint), lr=1.0)
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return before, {name: p.detach().numpy() for name, p in layer.named_parameters()}


def check_neurons(layer, **masks):
    """The masks cut each weight into neurons, every one of which is projected by itself; all else is free."""
    params = {name: p.detach().numpy() for name, p in layer.named_parameters()}
    norms = [np.linalg.norm(params[name][mask]) for name, cut in masks.items() for mask in cut]
    c = float(np.median(norms)) * (1 + 1e-9)
    assert min(norms) < c < max(norms)
    before, after = held(layer, MaxNorm(c))
    for name, cut in masks.items():
        np.testing.assert_array_equal(np.sum(cut, axis=0), 1)
        for mask in cut:
            expected = before[name][mask] * min(1, c / np.linalg.norm(before[name][mask]))
            np.testing.assert_allclose(after[name][mask], expected, rtol=1e-12)
            assert np.linalg.norm(after[name][mask]) <= c
    for name in before.keys() - masks.keys():
        np.testing.assert_array_equal(before[name], after[name])


def conv(kind, dim, **options):
    return getattr(nn, f"{kind}{dim}d")(4, 6, 3, dtype=torch.float64, **options)


def image(dim):
    return torch.randn(2, 4, *(5,) * dim, dtype=torch.float64)


CONVOLUTIONS = {
    f"{kind}{dim}d {options}": (kind, dim, options)
    for kind in ("Conv", "ConvTranspose", "LazyConv", "LazyConvTranspose")
    for dim in (1, 2, 3)
    for options in ({}, {"groups": 2}, {"stride": 2, "padding": 1})
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    torch.manual_seed(0)
    kind, dim, options = CONVOLUTIONS[case]
    if kind.startswith("Lazy"):
        layer = getattr(nn, f"{kind}{dim}d")(6, 3, dtype=torch.float64, **options)
        with pytest.raises(ValueError, match="weight is not initialised yet"):
            param_groups(layer, MaxNorm(0.5))
        layer(image(dim))
    else:
        layer = conv(kind, dim, **options)
    masks = masks_by_output(channels(layer, image(dim)), layer.weight)
    check_neurons(layer, weight=masks)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_depthwise(kind):
    torch.manual_seed(0)
    layer = getattr(nn, f"{kind}2d")(4, 8, 3, groups=4, dtype=torch.float64)
    masks = masks_by_output(channels(layer, image(2)), layer.weight)
    check_neurons(layer, weight=masks)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(5, 7), [(3, 5)]),
        (nn.LazyLinear(7), [(3, 5)]),
        (nn.Bilinear(3, 4, 7), [(2, 3), (2, 4)]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_dense(layer, inputs):
    torch.manual_seed(0)
    layer = layer.double()
    inputs = [torch.randn(s, dtype=torch.float64) for s in inputs]
    layer(*inputs)
    masks = masks_by_output(units_of_last_axis(layer, *inputs), layer.weight)
    check_neurons(layer, weight=masks)


def test_linear_of_transformers_is_in_first():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layer = conv1d(7, 5).double()
    masks = masks_by_output(units_of_last_axis(layer, torch.randn(3, 5, dtype=torch.float64)), layer.weight)
    check_neurons(layer, weight=masks)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_have_one_vector_per_token(kind):
    torch.manual_seed(0)
    layer = kind(9, 4, dtype=torch.float64)
    masks = masks_by_output(tokens(layer, 9), layer.weight)
    check_neurons(layer, weight=masks)


RECURRENT = {
    "RNN": (nn.RNN, {}),
    "LSTM": (nn.LSTM, {}),
    "LSTM both ways": (nn.LSTM, {"bidirectional": True}),
    "GRU": (nn.GRU, {}),
    "RNNCell": (nn.RNNCell, {}),
    "LSTMCell": (nn.LSTMCell, {}),
    "GRUCell": (nn.GRUCell, {}),
}


@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_layers(case):
    """A gate's neuron is found by its bias: W[r, k] belongs to neuron r where ∂y/∂W[r, k] = x_k ∂y/∂b_r for all y."""
    torch.manual_seed(0)
    kind, options = RECURRENT[case]
    layer = kind(3, 4, dtype=torch.float64, **options)
    cell, ways = isinstance(layer, nn.RNNCellBase), 2 if options else 1
    x = torch.randn((1, 3) if cell else (1, 1, 3), dtype=torch.float64)
    h = torch.randn((1, 4) if cell else (ways, 1, 4), dtype=torch.float64)
    out = layer(x, (h, torch.randn_like(h)) if "LSTM" in case else h)
    if cell:
        out = torch.cat(out) if isinstance(out, tuple) else out
    else:
        out = torch.cat([out[0].flatten(), *(t.flatten() for t in (out[1] if "LSTM" in case else (out[1],)))])
    params = dict(layer.named_parameters())
    grads = {
        n: torch.stack([torch.autograd.grad(o, p, retain_graph=True)[0] for o in out.flatten()])
        for n, p in params.items()
    }
    masks = {}
    for name in [n for n in params if n.startswith("weight")]:
        g_bias = grads[name.replace("weight", "bias")]
        entering = x.flatten() if "_ih" in name else h.reshape(ways, 4)[int(name.endswith("reverse"))]
        by_bias = g_bias[:, :, None, None] * entering  # (outputs, neurons, 1, inputs), against the weight's own
        match = ((grads[name][:, None] - by_bias).abs() <= 1e-12).all(0) & (grads[name] != 0).any(0)
        masks[name] = list(match.numpy())
    check_neurons(layer, **masks)


def test_deeper_recurrent_layers_are_alike():
    shapes = {n: p.shape for n, p in nn.LSTM(3, 4, num_layers=2).named_parameters()}
    layer = nn.LSTM(3, 4, num_layers=2)
    before, after = held(layer, MaxNorm(0.3))
    for name in (n for n in shapes if n.startswith("weight")):
        norms = np.linalg.norm(before[name].astype(np.float64), axis=1, keepdims=True)
        np.testing.assert_allclose(after[name], before[name] * np.minimum(1, 0.3 / norms), rtol=1e-5)


def test_projections_of_an_lstm_are_neurons_too():
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4, proj_size=2, dtype=torch.float64)
    h, c = torch.randn(1, 1, 2, dtype=torch.float64), torch.randn(1, 1, 4, dtype=torch.float64)
    out, _ = layer(torch.randn(1, 1, 3, dtype=torch.float64), (h, c))
    masks = masks_by_output(out.flatten(), layer.weight_hr_l0)
    gates = {n: [np.arange(16)[:, None] == r for r in range(16)] for n in ("weight_ih_l0", "weight_hh_l0")}
    gates = {n: [np.broadcast_to(m, layer.get_parameter(n).shape) for m in cut] for n, cut in gates.items()}
    check_neurons(layer, weight_hr_l0=masks, **gates)


@pytest.mark.parametrize(
    "case", ["packed", "separate", "encoder", "decoder", "transformer", "packed with bias_kv"], ids=str
)
def test_attention(case, monkeypatch):
    """Every output of every linear map inside, for inputs of its own."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    if case == "packed":
        layer, inputs = nn.MultiheadAttention(8, 2), (x, x, x)
    elif case == "packed with bias_kv":
        layer, inputs = nn.MultiheadAttention(8, 2, add_bias_kv=True), (x, x, x)
    elif case == "separate":
        layer = nn.MultiheadAttention(8, 2, kdim=5, vdim=6)
        inputs = (x, torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64))
    elif case == "encoder":
        layer, inputs = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, 0.0), 2, None, False), (x,)
    elif case == "decoder":
        layer, inputs = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12, 0.0), 1), (x, x)
    else:
        layer, inputs = nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True), (x, x)
    layer = layer.double().train()
    seen = []
    linear = nn.functional.linear

    def recording(entering, weight, bias=None):
        seen.append(linear(torch.randn_like(entering), weight, bias))
        return linear(entering.detach(), weight, bias)

    monkeypatch.setattr(nn.functional, "linear", recording)
    layer(*inputs)
    masks = {}
    for name, p in layer.named_parameters():
        if name.endswith("weight") and p.ndim == 2:
            masks[name] = []
            for out in seen:
                for unit in torch.movedim(out, -1, 0):
                    cotangent = torch.randn_like(unit)
                    (g,) = torch.autograd.grad(unit, p, cotangent, retain_graph=True, allow_unused=True)
                    if g is not None and bool((g != 0).any()):
                        masks[name].append((g != 0).numpy())
    assert len(masks) == {"separate": 4, "encoder": 8, "decoder": 6, "transformer": 10}.get(case, 2)
    check_neurons(layer, **masks)


NORMS = [
    nn.BatchNorm1d(4),
    nn.BatchNorm2d(4),
    nn.BatchNorm3d(4),
    nn.SyncBatchNorm(4),
    nn.InstanceNorm2d(4, affine=True),
    nn.GroupNorm(2, 4),
    nn.LayerNorm((4, 3, 3)),
    nn.RMSNorm((4, 3)),
    nn.PReLU(4),
]


@pytest.mark.parametrize("layer", NORMS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("constraint", [MaxNorm(0.01), MaxNorm(0.01, axis="matrix"), NonNegative()], ids=str)
def test_norm_layers_and_biases_are_free_of_norms_but_not_of_sets_of_entries(layer, constraint):
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(-5.0)
    before, after = held(layer, constraint)
    for name, was in before.items():
        np.testing.assert_array_equal(0 if constraint == NonNegative() else was, after[name])


class Scaled(nn.Linear):
    """A layer with a 0-d, a 1-d and a 2-d parameter."""

    def __init__(self):
        super().__init__(3, 2)
        self.scale = nn.Parameter(torch.tensor(1.0))


def through_groups(net, own):
    return ProjectedSGD(param_groups(net, own), lr=1.0)


def through_rules(net, own):
    return ProjectedSGD(param_groups(net, {"*": own}), lr=1.0)


def through_tensors(net, own):
    return ProjectedSGD(net.parameters(), lr=1.0, constraint=own)


def through_hook(net, own):
    project_after_step(optimizer := torch.optim.SGD(net.parameters(), lr=1.0), own, net)
    return optimizer


def through_hook_of_tensors(net, own):
    project_after_step(optimizer := torch.optim.SGD(net.parameters(), lr=1.0), own)
    return optimizer


DOORS = [through_groups, through_rules, through_tensors, through_hook, through_hook_of_tensors]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("own", "held"), [(NonNegative(), 3), (Box(-0.1, 0.1), 3), (MaxNorm(0.1), 1)], ids=str)
def test_a_set_means_the_same_through_all_doors(door, own, held):
    net = Scaled()
    for p in net.parameters():
        p.grad = torch.full_like(p, 5.0)
    before = {name: p.detach().clone() - 5 for name, p in net.named_parameters()}
    door(net, own).step()
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert len(moved) == held
    for name in moved:
        own_axis = own if name == "weight" or own.axis == "entries" else own.replace(axis=None)
        assert float(own_axis.violation(net.get_parameter(name).detach()).max()) == 0


def test_every_layer_of_torch_nn_with_weights_is_known():
    """No layer that torch may add later is read by convention without a warning of ours that says so."""
    known = {
        "Linear",
        "Bilinear",
        "Embedding",
        "EmbeddingBag",
        "RNNBase",
        "RNN",
        "LSTM",
        "GRU",
        "RNNCellBase",
        "RNNCell",
    }
    known |= {"LSTMCell", "GRUCell", "MultiheadAttention", "PReLU"}
    composed = {"Transformer", "TransformerEncoder", "TransformerDecoder", "TransformerEncoderLayer"}
    composed |= {"TransformerDecoderLayer", "AdaptiveLogSoftmaxWithLoss"}
    own = set()
    for name, kind in vars(nn).items():
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            notes = {k for c in kind.__mro__ for k in getattr(c, "__annotations__", {})}
            if "weight" in notes or name in known:
                own.add(name)
    families = ("Conv", "Lazy", "BatchNorm", "InstanceNorm", "LayerNorm", "GroupNorm", "RMSNorm", "SyncBatchNorm")
    losses = {n for n in own if n.endswith("Loss")}
    assert {n for n in own if not n.startswith(families)} - known - composed - losses == set()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))


def constraints_of(groups):
    return {n: g["constraint"] for g in groups for n in g["param_names"]}


def test_rules_options_and_order():
    groups = param_groups(model(), {"0.*": MaxNorm(3.0), "*.weight": MaxNorm(2.0, axis=None)}, lr=0.5, weight_decay=0.1)
    assert constraints_of(groups) == {
        "0.weight": MaxNorm(3.0),
        "0.bias": None,
        "1.weight": MaxNorm(2.0, axis=None),  # a norm layer, named by a rule with an axis
        "1.bias": None,
        "2.weight": MaxNorm(2.0, axis=None),
        "2.bias": None,
    }
    assert all(g["lr"] == 0.5 and g["weight_decay"] == 0.1 for g in groups)
    optimizer = ProjectedSGD(groups, c=9.0)  # the groups know better
    assert [g["c"] for g in optimizer.param_groups] == [3.0, None, 2.0]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"0.wieght": MaxNorm(3.0)}, r"'0.wieght' matches no parameter; the nearest names are 0.weight"),
        ({"*.bias": MaxNorm(3.0)}, "applies only to parameters without a fan-in, such as '0.bias'"),
        ({"0.weight": MaxNorm(3.0, axis=2)}, "axis 2 is out of range for 0.weight"),
        ({"0.weight": 3.0}, "holds 3.0: pass a constraint"),
        ({"*.weight": MaxNorm(3.0), "0.*": MaxNorm(4.0)}, "'0.\\*' applies only to parameters without a fan-in"),
        ({"*": MaxNorm(3.0), "0.*": None}, "'0.\\*' has no effect"),
        ({}, "there are no rules"),
        (3.0, "3.0 is not a constraint"),
    ],
)
def test_what_cannot_be_honoured_is_an_error(rules, message):
    with pytest.raises((ValueError, TypeError), match=message):
        param_groups(model(), rules)


def test_tensors_are_no_model():
    with pytest.raises(TypeError, match=r"reads the layers of a torch.nn.Module, not a list: pass the model"):
        param_groups(list(model().parameters()), MaxNorm(3.0))


def test_shared_weights_appear_once():
    net = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    (group,) = param_groups(net, MaxNorm(3.0))
    assert group["param_names"] == ["0.weight"]
    for pattern in ("1.weight", "1.*"):
        with pytest.raises(ValueError, match=r"'1.weight', which is one tensor with '0.weight': use that name"):
            param_groups(net, {pattern: MaxNorm(3.0)})


def test_a_tangent_gradient_is_for_the_groups_with_a_set():
    held, free = param_groups(nn.Linear(3, 2), MaxNorm(3.0), gradient="tangent", lr=0.1)
    assert held["gradient"] == "tangent"
    assert "gradient" not in free
    ProjectedSGD([held, free])


def test_rules_for_frozen_weights_alone_are_noticed():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"the rule '0.\*' is for frozen parameters only, such as '0.weight'"):
        param_groups(net, {"0.*": MaxNorm(3.0), "1.*": MaxNorm(3.0)})
    with pytest.warns(UserWarning, match="is for frozen parameters only"):
        param_groups(net.requires_grad_(False), MaxNorm(3.0))


def test_a_stack_of_experts_is_noticed_and_can_be_said():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 6, 5))

    net = Experts()
    with pytest.warns(UserWarning, match=r"up: not a weight .* read as \(out, in, \*kernel\).* axis=Stacked\(\)"):
        param_groups(net, MaxNorm(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = ProjectedSGD(param_groups(net, MaxNorm(0.1, axis=Stacked())), lr=0.1)
        net.up.grad = torch.zeros_like(net.up)
        optimizer.step()
    np.testing.assert_allclose(net.up.detach().norm(dim=2), 0.1, rtol=1e-5)


def test_a_stack_beside_single_layers_needs_a_rule_of_its_own():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 6, 5))
            self.up_bias = nn.Parameter(torch.randn(4, 6))
            self.head = nn.Linear(6, 3)

    net = Net()
    with pytest.warns(UserWarning, match=r"^head.weight: MaxNorm.*Stacked.* leaves them free, .* a rule of their own$"):
        ProjectedSGD(net, lr=0.1, constraint=MaxNorm(1.0, axis=Stacked()))
    with pytest.warns(UserWarning, match="^up: not a weight"):  # the bias of the stack, (experts, out), is free
        assert ProjectedSGD(net, lr=0.1, c=1.0).constraints()["up_bias"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProjectedSGD(net, lr=0.1, constraint={"up": MaxNorm(1.0, axis=Stacked()), "*": MaxNorm(1.0)})


def test_a_warning_points_at_the_users_line_and_folds_the_names_of_many_layers():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix2 = nn.Parameter(torch.ones(3, 4))

    few, many = (nn.Sequential(*[Layer() for _ in range(n)]) for n in (2, 7))
    for make in (param_groups, lambda net, own: ProjectedSGD(net, lr=0.1, constraint=own)):
        for net, names in ((few, "0.mix2, 1.mix2"), (many, "*.mix2")):
            with pytest.warns(UserWarning, match="not a weight of a layer") as caught:
                make(net, MaxNorm(1.0))
            assert [(w.filename, str(w.message).partition(":")[0]) for w in caught] == [(__file__, names)]


def test_a_convolution_with_a_long_kernel_is_no_stack():
    net = nn.Sequential(nn.Conv1d(32, 32, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ProjectedSGD(net, lr=0.1, c=1.0)
        hyperball(torch.optim.Adam)(net, lr=0.1)
    with pytest.warns(UserWarning, match=r"axis=Stacked\(\)"):
        ProjectedSGD(net.parameters(), lr=0.1, c=1.0)


def test_a_declared_bound_on_a_parametrized_weight_says_what_to_do():
    net = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"computed by a parametrization.*remove_parametrizations\(layer, 'weight'\)"):
        constrain(net, MaxNorm(1.0), "0.weight")
    own = "0.parametrizations.weight.original"
    assert declared(constrain(net, MaxNorm(1.0), own)) == {own: MaxNorm(1.0)}


def test_hyperball_takes_rules():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net.register_parameter("stack", nn.Parameter(torch.randn(3, 4, 4)))
    rules = {"stack": Sphere("initial", axis=Stacked("matrix")), "0.*": None, "*": Sphere("initial", axis="matrix")}
    optimizer = hyperball(torch.optim.Adam)(net, lr=0.1, constraint=rules)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(net.stack.norm(dim=(1, 2)), before["stack"].norm(dim=(1, 2)))
    torch.testing.assert_close(net[1].weight.norm(), before["1.weight"].norm())
    torch.testing.assert_close(net[0].weight, before["0.weight"] - 0.1)  # Adam's own step
    with pytest.raises(ValueError, match="axis='matrix' goes with c=, not with rules"):
        hyperball(torch.optim.Adam)(net, lr=0.1, constraint=rules, axis="matrix")


def test_a_weight_shared_by_layers_that_disagree_is_an_error():
    net = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"0.weight and 1.weight are one tensor"):
        param_groups(net, MaxNorm(3.0))
    groups = param_groups(net, {"0.weight": MaxNorm(3.0, axis=(1, 2))})
    assert constraints_of(groups)["0.weight"] == MaxNorm(3.0, axis=(1, 2))


def test_parametrized_weights_are_held_where_the_optimizer_owns_them():
    layer = nn.utils.parametrizations.spectral_norm(nn.ConvTranspose1d(3, 4, 3, dtype=torch.float64))
    with pytest.warns(UserWarning, match=r"parametrizations.weight.original: the constraint holds for this tensor"):
        before, after = held(layer, MaxNorm(0.5))
    name = "parametrizations.weight.original"
    norms = np.linalg.norm(before[name], axis=(0, 2), keepdims=True)
    np.testing.assert_allclose(after[name], before[name] * np.minimum(1, 0.5 / norms), rtol=1e-12)


def test_a_bound_on_the_gain_of_weight_norm_is_one_on_the_weight():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 5, dtype=torch.float64))
    with torch.no_grad():
        layer.parametrizations.weight.original0.copy_(torch.linspace(-1, 1, 5)[:, None])
    rules = {"parametrizations.weight.original0": MaxNorm(0.5)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held(layer, rules)
    norms = layer.weight.detach().norm(dim=1)
    assert float(norms.max()) <= 0.5 * (1 + 1e-15)
    assert float(norms.min()) < 0.5
    with pytest.warns(UserWarning, match=r"original1: the constraint holds"):
        param_groups(layer, MaxNorm(0.5))


def test_a_pruned_weight_is_quiet_and_an_old_spectral_norm_is_not():
    pruned = prune.l1_unstructured(nn.Linear(4, 3), "weight", amount=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert constraints_of(param_groups(pruned, MaxNorm(0.5)))["weight_orig"] == MaxNorm(0.5)
    with pytest.warns(UserWarning, match="weight_orig: the constraint holds for this tensor"):
        param_groups(nn.utils.spectral_norm(nn.Linear(4, 3)), MaxNorm(0.5))


def test_a_layer_of_somebody_elses_is_read_by_convention_with_a_warning():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.ones(3, 4))

    with pytest.warns(UserWarning, match="mix: not a weight of a layer that projgd knows"):
        assert constraints_of(param_groups(Mixer(), MaxNorm(1.0))) == {"mix": MaxNorm(1.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(Mixer(), {"mix": MaxNorm(1.0, axis=1)})


def test_named_parameters_give_names_to_errors():
    net = model()
    ProjectedSGD([{"params": net.named_parameters(), "c": 3.0}])
    with pytest.raises(ValueError, match=r"axis 2 is out of range for 0.weight"):
        ProjectedSGD([{"params": net.named_parameters(), "c": 3.0, "axis": 2}])


# --------------------------------------------------------------------------------------------------- a module is enough


def mixed():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 2), nn.Linear(4, 4), nn.Linear(4, 4)
    )


def steps(net, optimizer):
    for seed in range(3):
        torch.manual_seed(seed)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach() for p in net.parameters()]


RULES = {"0.*": MaxNorm(0.3), "3.weight": UnitNorm(), "4.bias": NonNegative()}


@pytest.mark.parametrize("cls", [ProjectedSGD, ProjectedAdam, projected(torch.optim.RMSprop)])
@pytest.mark.parametrize("own", [MaxNorm(0.3), MaxNorm(0.3, axis=0), UnitNorm(), NonNegative(), RULES], ids=str)
def test_a_module_is_read_by_its_layers(cls, own):
    net, other = mixed(), mixed()
    net[4].weight, other[4].weight = net[3].weight, other[3].weight  # tied
    one, two = cls(net, lr=0.1, constraint=own), cls(param_groups(other, own), lr=0.1)
    assert one.constraints() == two.constraints()
    assert all(torch.equal(a, b) for a, b in zip(steps(net, one), steps(other, two), strict=True))


def test_c_for_a_module_is_a_number_that_moves():
    net = mixed()
    optimizer = ProjectedSGD(net, lr=0.1, c=0.3, momentum=0.9)
    assert {(g["c"], g["constraint"]) for g in optimizer.param_groups} == {(0.3, None), (None, None)}
    assert optimizer.constraints()["2.weight"] == MaxNorm(0.3, axis=(0, 2, 3))
    for group in optimizer.param_groups:
        if group["c"] is not None:
            group["c"] = 0.2
    steps(net, optimizer)
    assert report(optimizer).violations == 0
    assert report(optimizer).largest == pytest.approx(0.2, rel=1e-5)
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(2, 2)))]})
    assert optimizer.param_groups[-1]["c"] == 0.3


def test_rules_for_named_tensors():
    net = mixed()
    optimizer = ProjectedSGD(net.named_parameters(), lr=0.1, constraint={"0.*": MaxNorm(0.3), "3.weight": UnitNorm()})
    assert {k: v for k, v in optimizer.constraints().items() if v} == {
        "0.weight": MaxNorm(0.3),
        "0.bias": MaxNorm(0.3),
        "3.weight": UnitNorm(),
    }
    with pytest.raises(ValueError, match=r"rules need names: pass the model itself, or model.named_parameters\(\)"):
        ProjectedSGD(net.parameters(), lr=0.1, constraint={"0.*": MaxNorm(0.3)})
    with pytest.raises(ValueError, match=r"'9\.\*' matches no parameter"):
        ProjectedSGD(net, lr=0.1, constraint={"9.*": MaxNorm(0.3)})
    with pytest.raises(ValueError, match="not both"):
        ProjectedSGD(net, lr=0.1, c=3.0, constraint={"0.*": MaxNorm(0.3)})


def test_hyperball_of_a_module_leaves_gains_and_biases_to_the_inner_optimizer():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([3, 4]))
    optimizer = hyperball(torch.optim.Adam)(net, lr=0.1)
    assert [name for name, own in optimizer.constraints().items() if own is not None] == ["0.weight"]
    by_rule = hyperball(torch.optim.Adam)(net, lr=0.1, constraint={"*": Sphere("initial", axis="matrix")})
    assert by_rule.constraints().keys() == optimizer.constraints().keys()
    assert [name for name, own in by_rule.constraints().items() if own is not None] == ["0.weight"]
    before = net[0].weight.detach().norm()
    steps(net, optimizer)
    assert float(net[0].weight.detach().norm()) == pytest.approx(float(before), rel=1e-6)


def test_a_module_without_weights_of_a_fan_in_is_noticed():
    with pytest.warns(UserWarning, match="holds nothing: no parameter of the model has a fan-in"):
        ProjectedSGD(nn.LayerNorm(3), lr=0.1, c=3.0)


# ------------------------------------------------------------------------------------------------ declared on a layer


class EEGNet(nn.Module):
    """A model that declares its own bounds: 1 on the depthwise spatial filters, 0.25 on the classifier.

    V. Lawhern et al., *EEGNet*, J. Neural Eng. 15, 2018, table 2.
    """

    def __init__(self, channels=5, classes=3):
        super().__init__()
        self.temporal = nn.Conv2d(1, 4, (1, 7), padding="same", bias=False)
        self.spatial = constrain(nn.Conv2d(4, 8, (channels, 1), groups=4, bias=False), MaxNorm(1.0))
        self.norm = nn.BatchNorm2d(8)
        self.classifier = constrain(nn.Linear(8, classes), MaxNorm(0.25))

    def forward(self, x):
        x = nn.functional.elu(self.norm(self.spatial(self.temporal(x))))
        return self.classifier(x.mean(dim=(2, 3)))


DECLARED = {"spatial.weight": MaxNorm(1.0), "classifier.weight": MaxNorm(0.25)}


def trained_by_a_loop_that_knows_nothing(model, name="ProjectedAdamW", **options):
    optimizer = getattr(importlib.import_module("projgd.torch"), name)(model, lr=0.05, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x, y = torch.randn(8, 1, 5, 20, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def largest_norms(model):
    weights = {n: p.detach().double() for n, p in model.named_parameters() if p.ndim > 1}
    return {n: float(w.flatten(1).norm(dim=1).max()) for n, w in weights.items()}


def test_a_model_declares_its_own_bounds():
    torch.manual_seed(0)
    model = EEGNet()
    assert declared(model) == DECLARED
    assert set(model.state_dict()) == {
        *(f"{k}.weight" for k in ("temporal", "spatial", "norm", "classifier")),
        *(f"norm.{k}" for k in ("bias", "running_mean", "running_var", "num_batches_tracked")),
        "classifier.bias",
    }
    trained_by_a_loop_that_knows_nothing(model)
    found = largest_norms(model)
    assert 0.25 * (1 - 1e-5) <= found["classifier.weight"] <= 0.25
    assert found["spatial.weight"] <= 1
    assert found["temporal.weight"] > 0.25


@pytest.mark.parametrize(
    "how", ["deepcopy", "pickle", "torch.save", "half", "meta and back", "compiled", "parametrized"]
)
def test_a_declaration_travels_with_the_model(how, tmp_path):
    model = EEGNet()
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        torch.save(model, tmp_path / "model.pt")
        model = torch.load(tmp_path / "model.pt", weights_only=False)
    elif how == "half":
        model = model.to(torch.bfloat16)
    elif how == "meta":
        model = model.to("meta").to_empty(device="cpu")
    elif how == "parametrized":
        nn.utils.parametrizations.weight_norm(model.temporal)
    prefix = ""
    if how == "compiled":
        model, prefix = torch.compile(model, backend="eager"), "_orig_mod."
    assert declared(model) == {prefix + name: own for name, own in DECLARED.items()}
    with pytest.warns(UserWarning, match=r"weight of a (Conv2d|Linear) has a declared constraint.* pass the model"):
        ProjectedSGD(model.parameters(), lr=0.1, c=3.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = ProjectedSGD(model, lr=0.1)
    held = {name.removeprefix(prefix): own for name, own in optimizer.constraints().items() if own is not None}
    assert held == DECLARED


def test_rules_win_over_what_is_declared_which_wins_over_a_bound_for_all():
    model = constrain(EEGNet(), None, "temporal.weight")

    def held(**options):
        found = ProjectedSGD(model, lr=0.1, **options).constraints()
        return {name: own for name, own in found.items() if own is not None}

    assert held() == held(c=3.0) == DECLARED
    assert held(constraint={"spatial.*": MaxNorm(2.0)}) == {**DECLARED, "spatial.weight": MaxNorm(2.0)}
    assert held(constraint={"temporal.*": MaxNorm(2.0), "*": None}) == {"temporal.weight": MaxNorm(2.0)}
    assert held(constraint={"*.bias": NonNegative()}).keys() == {*DECLARED, "norm.bias", "classifier.bias"}
    assert held(c=None) == {}
    with pytest.raises(ValueError, match="axis=1 alone holds nothing: pass c= with it"):
        held(axis=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    project_after_step(optimizer, None, model)
    steps(model, optimizer)
    assert largest_norms(model)["classifier.weight"] <= 0.25
    unconstrain(model, "spatial.weight")
    assert declared(model) == {"temporal.weight": None, "classifier.weight": MaxNorm(0.25)}
    assert declared(unconstrain(model)) == {}
    with pytest.warns(UserWarning, match="nothing is projected"):
        ProjectedSGD(model, lr=0.1)


def test_what_cannot_be_declared_is_an_error():
    layer = nn.Linear(3, 2)
    for name in ("wieght", "0.weight", "weight.data"):
        with pytest.raises(ValueError, match=rf"Linear has no parameter '{name}'; its parameters are weight, bias"):
            constrain(layer, MaxNorm(1.0), name)
    with pytest.raises(ValueError, match="weight of LazyLinear is not initialised yet"):
        constrain(nn.LazyLinear(3), MaxNorm(1.0))
    with pytest.raises(ValueError, match=r"axis 2 is out of range for weight of Linear"):
        constrain(layer, MaxNorm(1.0, axis=2))
    with pytest.raises(TypeError, match=r"4.0 is not a constraint: pass one such as MaxNorm\(4.0\)"):
        constrain(layer, 4.0)
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not a Parameter"):
        constrain(layer.weight, MaxNorm(4.0))
    assert declared(layer) == {}
    constrain(constrain(layer, MaxNorm(1.0)), MaxNorm(1.0))
    with pytest.raises(ValueError, match=r"has MaxNorm\(c=1.0.* already, and .* unconstrain\(module, 'weight'\)"):
        constrain(layer, UnitNorm())
    tied = nn.Sequential(layer, constrain(nn.Linear(3, 2), UnitNorm()))
    tied[1].weight = layer.weight
    with pytest.raises(ValueError, match=r"0.weight and 1.weight are one tensor, and .* are declared on it: keep one"):
        ProjectedSGD(tied, lr=0.1)
    frozen = constrain(nn.Linear(3, 2), MaxNorm(1.0)).requires_grad_(False)
    with pytest.warns(UserWarning, match="what is declared is for frozen parameters only"):
        ProjectedSGD(frozen, lr=0.1)
