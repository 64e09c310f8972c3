"""Every set in every front of PyTorch: optimizers, hooks, rules, checkpoints, GradScaler, torch.compile, the report."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from projgd import Box, KeepZeros, MaxNorm, Simplex, WeightClip, from_config, report
from projgd.torch import ProjectedAdam, ProjectedSGD, param_groups, project_after_step
from tests.sets import SETS, bound, start
from tests.torch.common import copied, saved_and_loaded, step

EVERY = pytest.mark.parametrize("name", SETS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)


def parameter(dtype=torch.float32):
    return nn.Parameter(torch.tensor(start()).to(dtype))


def gradients(k, size=1.0):
    return torch.tensor(np.random.default_rng(k).standard_normal((5, 6)) * size)


def run(optimizer, p, steps=(0, 1, 2, 3), size=1.0):
    for k in steps:
        p.grad = gradients(k, size).to(p.dtype)
        optimizer.step()


def judged(name, p, dtype):
    """Whether stored weights are in the set, in float64; to rounding or to a tolerance where it says so."""
    case = SETS[name]
    w0 = torch.tensor(start()).to(dtype).double().numpy()
    set_ = bound(case.make(), w0)
    w = p.detach().double().numpy()
    axes = set_.resolve(w.shape, "out_first").axes
    unit = torch.finfo(dtype).eps
    loose = 40 * unit * max(1.0, abs(w).max()) + (1e-5 if "intersection" in name else 0)
    # The norm of a whole tensor was taken in float32.
    loose = 1e-6 if name == "relative max-norm of a tensor" else loose * (not case.exact)
    distance = set_.outside(w, axes)
    assert (distance <= loose).all(), distance.max()


def moved_by_hand(name, p, steps, size=1.0, lr=0.5):
    """The stock step, then the projection of the core."""
    q = nn.Parameter(p.detach().clone())
    set_ = bound(SETS[name].make(), q.detach().clone())
    axes = set_.resolve(tuple(q.shape), "out_first").axes
    plain = torch.optim.SGD([q], lr=lr)
    for k in steps:
        q.grad = gradients(k, size).to(q.dtype)
        plain.step()
        with torch.no_grad():
            q.copy_(set_.onto(q.detach(), axes, moved=True))
    return q


@EVERY
@DTYPES
@pytest.mark.parametrize("size", [0.1, 30.0])
def test_an_optimizer_holds_the_set(name, dtype, size):
    size = min(size, 1.0) if "two axes" in name else size
    p = parameter(dtype)
    by_hand = moved_by_hand(name, p, (0, 1, 2, 3), size)
    optimizer = ProjectedSGD([p], lr=0.5, constraint=SETS[name].make())
    run(optimizer, p, size=size)
    judged(name, p, dtype)
    torch.testing.assert_close(p.data, by_hand.data, rtol=8 * torch.finfo(dtype).eps, atol=1e-5)


@EVERY
def test_a_fused_step_holds_the_set(name):
    p = parameter()
    optimizer = ProjectedAdam([p], lr=0.5, constraint=SETS[name].make(), fused=True)
    run(optimizer, p, range(6))
    judged(name, p, torch.float32)


@EVERY
def test_a_hook_holds_the_set_or_says_that_it_cannot(name):
    p, set_ = parameter(), SETS[name].make()
    optimizer = torch.optim.SGD([p], lr=0.5)
    if set_.takes_initial:
        with pytest.raises(ValueError, match="where a hook has none"):
            project_after_step(optimizer, set_)
        return
    project_after_step(optimizer, set_)
    run(optimizer, p)
    judged(name, p, torch.float32)


@EVERY
def test_a_checkpoint_continues_bit_for_bit(name):
    p = parameter()
    optimizer = ProjectedSGD([p], lr=0.5, constraint=SETS[name].make())
    run(optimizer, p, (0, 1))
    saved, kept = saved_and_loaded(optimizer.state_dict()), p.detach().clone()
    run(optimizer, p, (2, 3))
    q = nn.Parameter(kept.clone())
    resumed = ProjectedSGD([q], lr=0.1, constraint=SETS[name].make())
    resumed.load_state_dict(saved)
    again = copied("pickle", resumed)
    run(resumed, q, (2, 3))
    assert torch.equal(p.data, q.data)
    (r,) = again.param_groups[0]["params"]
    run(again, r, (2, 3))
    assert torch.equal(p.data, r.data)


@EVERY
def test_the_config_is_plain_and_makes_the_set_again(name):
    set_ = SETS[name].make()
    same = from_config(json.loads(json.dumps(set_.config())))
    assert same == set_
    assert hash(same) == hash(set_)
    assert "\n" not in str(set_)


@EVERY
def test_the_report_of_an_optimizer(name):
    p = parameter()
    optimizer = ProjectedSGD([("weight", p)], lr=0.5, constraint=SETS[name].make())
    run(optimizer, p)
    (row,) = report(optimizer).rows
    assert row.violations == row.nonfinite == 0
    with torch.no_grad():
        p.copy_(torch.where(p == 0, 7.0, -p * 7 + 3))
    assert report(optimizer).rows[0].violations > 0
    assert "weight" in str(report(optimizer))


@EVERY
def test_a_broken_vector_shows(name):
    p = parameter()
    optimizer = ProjectedSGD([p], lr=0.5, constraint=SETS[name].make())
    p.grad = gradients(0).float()
    p.grad[2, 1] = float("nan")
    optimizer.step()
    assert p[2, 1].isnan()


@EVERY
def test_gradscaler_skips(name):
    p = parameter()
    optimizer = ProjectedSGD([p], lr=0.5, constraint=SETS[name].make())
    with torch.no_grad():
        p.mul_(9.0)
    before = p.detach().clone()
    p.grad, optimizer.grad_scale, optimizer.found_inf = gradients(0).float(), None, torch.ones(())
    optimizer.step = optimizer.step
    optimizer._step_supports_amp_scaling = True
    from projgd.torch import routing

    routing.run(optimizer._routes({}, may_step=False))
    assert torch.equal(p.data, before)


COMPILED = ["box", "box of arrays", "signs", "simplex", "L1 ball", "half-space", "top k", "around"]


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_step(name):
    p = parameter()
    by_hand = moved_by_hand(name, p, (0, 1, 2))
    optimizer = ProjectedSGD([p], lr=0.5, constraint=SETS[name].make())
    compiled = torch.compile(optimizer.step, backend="eager")
    for k in (0, 1, 2):
        p.grad = gradients(k).float()
        compiled()
    torch.testing.assert_close(p.data, by_hand.data, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, case in SETS.items() if case.make().is_convex])
def test_a_differentiable_step(name):
    """The derivative of a step is that of the projection, by differences in float64."""
    set_ = bound(SETS[name].make(), torch.tensor(start()))
    axes = set_.resolve((5, 6), "out_first").axes
    x = torch.tensor(np.random.default_rng(5).standard_normal((5, 6)), requires_grad=True)
    v, c = torch.tensor(np.random.default_rng(6).standard_normal((2, 5, 6)))
    (set_.onto(x, axes) * c).sum().backward()
    h = 1e-6
    with torch.no_grad():
        difference = ((set_.onto(x + h * v, axes) - set_.onto(x - h * v, axes)) * c).sum() / (2 * h)
    if "intersection" not in name:
        torch.testing.assert_close((x.grad * v).sum(), difference, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------- single questions


def test_weight_clip_knows_the_fan_in_of_every_layer():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4), nn.LayerNorm(4))
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(9.0)
    optimizer = ProjectedSGD(net, lr=1.0, constraint=WeightClip(2.0))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    found = {name: float(p.max()) for name, p in net.named_parameters()}
    small, large = 2 / 27**0.5, 2 / 32**0.5
    assert found == pytest.approx(
        {"0.weight": small, "0.bias": small, "2.weight": large, "2.bias": large, "3.weight": 9, "3.bias": 9}
    )


def test_weight_clip_of_attention_and_cells():
    for layer, fan_in in ((nn.LSTM(5, 3), None), (nn.MultiheadAttention(8, 2), 8)):
        groups = param_groups(layer, WeightClip(1.0))
        chosen = {name: group["constraint"] for group in groups for name in group["param_names"]}
        assert all(own is not None for own in chosen.values()), chosen
        if fan_in:
            assert chosen["in_proj_bias"].fan_in == chosen["out_proj.bias"].fan_in == fan_in
        else:
            assert (chosen["bias_ih_l0"].fan_in, chosen["bias_hh_l0"].fan_in) == (5, 3)


@pytest.mark.parametrize("way", ["default", "fused", "hook"])
def test_every_third_step(way):
    p, q = parameter(), parameter()
    set_ = MaxNorm(0.5)
    if way == "hook":
        optimizer = torch.optim.SGD([p], lr=0.5)
        project_after_step(optimizer, set_, every=3)
    else:
        optimizer = ProjectedSGD([p], lr=0.5, constraint=set_, every=3, fused=way == "fused")
    plain = torch.optim.SGD([q], lr=0.5)
    for k in range(7):
        run(optimizer, p, [k])
        run(plain, q, [k])
        if k % 3 == 2:
            with torch.no_grad():
                q.copy_(set_.project(q.detach()))
        torch.testing.assert_close(p.data, q.data, rtol=1e-6, atol=1e-6)
    assert float(p.norm(dim=1).max()) > 0.5


def test_every_is_in_the_checkpoint_and_per_group():
    p, q = parameter(), parameter()
    optimizer = ProjectedSGD([{"params": [p], "every": 2}, {"params": [q]}], lr=0.5, c=0.5)
    run(optimizer, p, [0])
    saved = saved_and_loaded(optimizer.state_dict())
    other = ProjectedSGD([{"params": [p]}, {"params": [q]}], lr=0.5, c=0.5)
    other.load_state_dict(saved)
    assert float(p.norm(dim=1).max()) > 0.5
    run(other, p, [1])
    assert float(p.norm(dim=1).max()) <= 0.5


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(ValueError, match="is not a number of steps"):
        ProjectedSGD([parameter()], lr=0.1, c=1.0, every=every)
    with pytest.raises(ValueError, match="is not a number of steps"):
        project_after_step(torch.optim.SGD([parameter()], lr=0.1), MaxNorm(1.0), every=every)


def test_sets_that_do_not_fit_name_the_parameter_before_anything_is_written():
    p = parameter()
    for set_ in (Box([1.0, 2.0]), Simplex(1e-40), Box(1 / 3, 1 / 3)):
        with pytest.raises(ValueError, match=r"weight|too small"):
            ProjectedSGD([("weight", p)], lr=0.1, constraint=set_)
    with pytest.raises(ValueError, match="weight has shape"):
        ProjectedSGD([("weight", p)], lr=0.1, constraint={"weight": Box(np.zeros(4), None)})


def test_a_mask_that_a_checkpoint_does_not_fit():
    p = parameter()
    optimizer = ProjectedSGD([p], lr=0.1, constraint=KeepZeros())
    run(optimizer, p)
    state = optimizer.state_dict()
    state["state"][0]["initial"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="3 initial numbers for its 30 entries"):
        optimizer.load_state_dict(state)


def test_zeros_stay_bit_for_bit_and_others_move_freely():
    p, q = parameter(), parameter()
    optimizer, plain = ProjectedSGD([p], lr=0.5, constraint=KeepZeros()), torch.optim.SGD([q], lr=0.5)
    run(optimizer, p)
    run(plain, q)
    zero = torch.tensor(start()) == 0
    assert torch.equal(p[~zero], q[~zero])
    assert bool((p[zero] == 0).all())


def test_c_moves_in_a_group_with_initial_numbers():
    """`c` of a relative bound is the multiple, and may change during training, in every engine."""
    for fused in (True, False):
        p = parameter()
        norms = p.detach().norm(dim=1)
        optimizer = ProjectedSGD([p], lr=0.5, constraint=MaxNorm.relative(1.0), fused=fused)
        for c in (1.0, 0.5, 0.25):
            optimizer.param_groups[0]["c"] = c
            run(optimizer, p, [0, 1], size=5.0)
            assert bool((p.norm(dim=1) <= c * norms * (1 + 1e-6)).all())
            assert bool((p.norm(dim=1) >= c * norms * (1 - 1e-4)).any())


def test_a_scalar_step_keeps_negative_zero():
    p = nn.Parameter(torch.tensor([[-0.0, 0.5]]))
    step(ProjectedSGD([p], lr=0.0, constraint=Box(0.0, 1.0)))
    assert bool(p.signbit()[0, 0])


@pytest.mark.parametrize("low", [-0.25, 0.0])
def test_arrays_of_bounds_keep_zeros_bit_for_bit(low):
    """So many entries that torch clamps them in registers, where 0 and -0 are the same."""
    p = nn.Parameter(torch.tensor([-0.0, 0.0, -3.0, 2.0, float("nan")]).repeat(2, 16))
    signs = p.signbit()[:, :80]
    step(ProjectedSGD([p], lr=0.0, constraint=Box(np.full((2, 80), low), np.full((2, 80), 1.5))))
    zero = torch.tensor([True, True, False, False, False]).repeat(2, 16)
    assert torch.equal(p.signbit()[zero], signs[zero])
    assert p[0, 2:4].tolist() == [low, 1.5]
    assert bool(p[:, 4::5].isnan().all())
