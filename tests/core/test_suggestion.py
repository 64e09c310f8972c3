"""The bounds that `suggest` finds are those that a share of the neurons reach, in the layers' own axes."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from projgd import MaxNorm, NonNegative, UnitNorm, report, suggest
from projgd.torch import ProjectedSGD


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 200), nn.ReLU(), nn.Conv2d(3, 100, 3), nn.ConvTranspose2d(100, 50, 3))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_of_neurons_beyond_the_bound(share):
    net = layers()
    found = suggest(net, share)
    assert list(found.rules) == ["0.weight", "2.weight", "3.weight"]
    for row in report(net, found.rules).rows:
        assert row.on_bound + row.violations == pytest.approx(share * row.norms.size, abs=1.01)
    ProjectedSGD(net, lr=0.1, constraint=found.rules)
    ProjectedSGD(net, lr=0.1, constraint=found.relative)


def test_printed_rules_are_code():
    net = layers()
    found, names = suggest(net), {"MaxNorm": MaxNorm}
    exec(str(found), names)
    for made, own in ((names["rules"], found.rules), (names["relative"], found.relative)):
        assert made.keys() == own.keys()
        for name, set_ in made.items():
            assert set_.axis == own[name].axis
            assert set_.c == pytest.approx(own[name].c, rel=1e-3)


def test_multiples_are_of_the_weights_at_the_start():
    net, start = layers(), layers()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(3.0)
    found = suggest(net, initial=start)
    for name, p in start.named_parameters():
        if name in found.relative:
            rows = p.detach().double() if not name.startswith("3") else p.detach().double().transpose(0, 1)
            usual = rows.reshape(len(rows), -1).norm(dim=1).square().mean().sqrt()
            assert found.relative[name].c == pytest.approx(found.rules[name].c / float(usual), rel=1e-6)
    with pytest.raises(ValueError, match="initial has other parameters than params"):
        suggest(net, initial=layers()[0])


def test_trees_rules_and_axes():
    tree = {"Dense_0": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)}}
    norms = np.linalg.norm(np.arange(12.0).reshape(3, 4), axis=0)
    assert suggest(tree, 0.25).rules == {"Dense_0/kernel": MaxNorm(norms[2])}
    assert suggest(tree, 0.25, constraint={"*/kernel": UnitNorm(axis=1)}).rules["Dense_0/kernel"].axis == 1


def test_zeros_have_no_bound():
    found = suggest({"a": np.zeros((3, 4)), "b": np.ones((3, 4))})
    assert list(found.rules) == list(found.relative) == ["b"]


@pytest.mark.parametrize("share", [0, 1, -0.1, 10, float("nan")])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match="is not between 0 and 1"):
        suggest(layers(), share)


def test_bad_input():
    with pytest.raises(TypeError, match="share='a' is not a number"):
        suggest(layers(), "a")
    with pytest.raises(ValueError, match="w holds NaN or infinity"):
        suggest({"w": np.full((2, 3), np.nan)})
    with pytest.raises(ValueError, match="bounds entries, which have no norm"):
        suggest({"w": np.ones((2, 3))}, constraint=NonNegative())
    with pytest.raises(TypeError, match="no parameters"):
        suggest({})
