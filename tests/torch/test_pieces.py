"""The fused step without kernels: in pieces, with the optimizer's own numbers, and no vector let out between them."""

import copy
import math

import pytest
import torch

from projgd import MaxNorm, projections
from projgd.axes import Split
from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD, ball, path, pieces, stacked
from tests.torch import test_fused
from tests.torch.option_sets import EVERY, IDS
from tests.torch.test_fused import STOCK, check_contract, check_steps, give_grads, make

SHAPES = [(40, 30), (40, 30), (7, 419), (5, 3, 3, 3), (64,), (1, 1), (300, 1), (2, 701), (30, 64)]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """No kernels; and pieces of a few rows, so that these tensors are cut."""
    monkeypatch.setattr(path, "_machine", lambda kind: path.Path("eager", "numba is not installed"))
    monkeypatch.setattr(ball, "PIECE", 500)
    monkeypatch.setattr(stacked, "SMALL", 100)


def spans(optimizer):
    """The batches of an optimizer's first group."""
    return vars(optimizer)["_piece_plans"][0].batches


@pytest.mark.parametrize(("cls", "options"), EVERY, ids=IDS)
def test_where_nothing_binds_a_step_is_the_stock_one(cls, options):
    check_steps(cls, options, torch.float32, 1e4, SHAPES, 6, "eager")


@pytest.mark.parametrize("axis", ["fan_in", "matrix", 0, -1, Split(0, 1, (1, 2))])
@pytest.mark.parametrize("cls", [ProjectedSGD, ProjectedAdam, ProjectedAdamW])
def test_what_a_step_leaves_is_in_the_ball(cls, axis):
    shapes = SHAPES if axis in ("fan_in", "matrix") else [s for s in SHAPES if len(s) == 2]
    ours, theirs = make(shapes, torch.float32), make(shapes, torch.float32)
    optimizer, stock = cls(ours, lr=0.1, c=3.0, axis=axis, fused=True), STOCK[cls](theirs, lr=0.1, fused=True)
    for i in range(4):
        for a, b in zip(ours, theirs, strict=True):
            b.data.copy_(a.data)
        give_grads(ours, i), give_grads(theirs, i)
        optimizer.step(), stock.step()
        for a, b in zip(ours, theirs, strict=True):
            check_contract(b.detach(), a, 3.0, axis, torch.float32)
            torch.testing.assert_close(a.detach(), MaxNorm(3.0, axis).project(b.detach()), rtol=1e-6, atol=3e-7)
    of_rows = axis in ("fan_in", "matrix") or isinstance(axis, Split) or axis == -1
    assert (len(spans(optimizer)) > 5) == of_rows


def test_the_first_vector_that_leaves_is_seen_whatever_was_before():
    w = torch.nn.Parameter(torch.full((40, 100), 0.1))  # norm 1
    optimizer = ProjectedSGD([w], lr=1.0, c=2.0, fused=True)
    for value, norm in ((0.0, 1.0), (0.0, 1.0), (-0.2, 2.0), (0.1, 1.0), (0.0, 1.0), (math.nan, math.nan)):
        w.grad = torch.zeros_like(w)
        w.grad[33] = value
        optimizer.step()
        norms = w.detach().double().norm(dim=1)
        assert norms.tolist()[:33] == pytest.approx([1.0] * 33, rel=1e-6)
        assert norms[33].item() == pytest.approx(norm, rel=3e-5, nan_ok=True)
        assert not norms[33] > 2
        near = [batch.near for batch in spans(optimizer)]
        assert near == [norm != 1 and k == 33 // 5 for k in range(8)]


@pytest.mark.parametrize("lengths", [[0.5] * 40, [0.5] * 20 + [5.0] + [0.5] * 19, [5.0, math.nan, 0.5, 1e30] * 10])
@torch.no_grad()
def test_projected_alone_a_large_parameter_goes_in_pieces_too(lengths, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(40, 9, 11, generator=generator), dim=(1, 2))
    x *= torch.tensor(lengths)[:, None, None]
    y = x.clone()
    written = ball.project_ball_(x, 2.0, MaxNorm(2.0).resolve(x.shape, "out_first"))
    monkeypatch.setattr(ball, "PIECE", 10**6)
    assert ball.project_ball_(y, 2.0, MaxNorm(2.0).resolve(x.shape, "out_first")) == written == (max(lengths) > 2)
    torch.testing.assert_close(x, y, rtol=3e-7, atol=0, equal_nan=True)  # huge ones are summed in another order


def test_rows_that_share_a_batch_share_their_limits():
    long_and_short, shorter, last = pieces._batches([(1, 400), None, (1, 70), (9, 30), (12, 80)])[:3]
    assert (long_and_short.longest, [j for j, *_ in long_and_short.pieces]) == (400, [0, 2])
    assert (shorter.longest, shorter.size, shorter.pieces) == (30, 270, [(3, (9, 30), 0, 9)])
    assert last.pieces == [(4, (12, 80), 0, 6)]


@pytest.mark.parametrize("length", [70, 4099, 2**20])
@pytest.mark.parametrize("above", [-1e-4, -5e-6, -1e-6, 1e-7, 2e-6, 1e-4])
def test_the_plain_norm_decides_nothing_near_the_ball(length, above):
    """torch's own norm of a million equal entries is off by 4e-4."""
    x = torch.full((2, length), 3.0 * (1 + above) / math.sqrt(length))
    y = x.clone()
    with torch.no_grad():
        ball.project_rows_([x], 3.0, length, near=True)
        assert ball.project_rows_([y], 3.0, length, near=False) == (length > 1000 or above > -2e-5)
    assert torch.equal(x, y)
    assert (x.double().norm(dim=1) <= 3.0).all()
    assert torch.equal(x, projections.project_ball(x, 3.0, (1,)))


@pytest.mark.parametrize(
    "special",
    ["amsgrad", "tensor lr", "scaled", "transposed gradient", "bfloat16", "without_grad", "no bound", "first step"],
)
def test_what_is_special_is_left_to_torch(special):
    options = {"amsgrad": True} if special == "amsgrad" else {}
    options["lr"] = torch.tensor(0.1) if special == "tensor lr" else 0.1
    params = make(SHAPES[:2], torch.bfloat16 if special == "bfloat16" else torch.float32)
    c = None if special == "no bound" else 2.0
    optimizer = ProjectedAdam(params, c=c, fused=True, without_grad=special == "without_grad", **options)
    for i in range(1 if special == "first step" else 2):
        give_grads(params, i)
        if special == "transposed gradient":
            params[0].grad = params[0].grad.T.contiguous().T
        if special == "scaled":
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(1.0)
        optimizer.step()
    assert not vars(optimizer).get("_piece_plans")


def test_a_run_goes_on_with_the_stock_optimizer_and_back():
    ours = make(SHAPES, torch.float32)
    optimizer = ProjectedSGD(ours, lr=0.1, momentum=0.9, c=3.0, fused=True)
    theirs = copy.deepcopy(ours)
    stock = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, fused=True)
    for i in range(6):
        give_grads(ours, i), give_grads(theirs, i)
        if i % 2:
            optimizer.step()
            for a, b in zip(ours, theirs, strict=True):
                b.data.copy_(a.data)
            stock.load_state_dict(without_projection(optimizer.state_dict()))
        else:
            stock.step()
            for a, b in zip(ours, theirs, strict=True):
                a.data.copy_(MaxNorm(3.0).project(b.data))
            optimizer.load_state_dict(stock.state_dict())
    reference = make(SHAPES, torch.float32)
    whole = ProjectedSGD(reference, lr=0.1, momentum=0.9, c=3.0)
    for i in range(6):
        give_grads(reference, i)
        whole.step()
    assert len(spans(optimizer)) > 5
    for a, b in zip(ours, reference, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def without_projection(state):
    keys = torch.optim.SGD([torch.zeros(1)], lr=0.1).state_dict()["param_groups"][0]
    return {**state, "param_groups": [{k: g[k] for k in keys} for g in state["param_groups"]]}


# The fused step's tests of what torch's own fused operations must not get, here without kernels.
test_momentum = test_fused.test_a_momentum_that_lies_otherwise_in_memory_than_its_weights
test_first_gradients = test_fused.test_first_gradients_may_come_at_different_steps
test_defaults = test_fused.test_defaults_of_torch_do_not_matter
test_a_bound_in_an_array = test_fused.test_a_bound_in_an_array_is_followed_where_it_is_written


def test_autograd_learns_of_a_step():
    w = torch.nn.Parameter(torch.randn(40, 90))
    optimizer = ProjectedSGD([w], lr=0.1, c=1e4, fused=True)
    w.grad = torch.ones_like(w)
    loss = w.square().sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_which_parameters_have_gradients_may_change():
    torch.manual_seed(0)
    shapes = [(40, 90), (90, 40), (30, 120)]
    starts, grads = [torch.randn(s) for s in shapes], [torch.randn(s) for s in shapes]
    found = []
    for fused in (True, False):
        params = [torch.nn.Parameter(x.clone()) for x in starts]
        optimizer = ProjectedSGD(params, lr=0.1, c=3.0, fused=fused)
        for j in (0, 1, 2, 0):
            optimizer.zero_grad()
            params[j].grad = grads[j]
            optimizer.step()
        found.append([p.detach() for p in params])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def of_state(name, change):
    """What puts `change` of a state in its place."""
    return lambda optimizer, params: optimizer.state[params[0]].update(
        {name: change(optimizer.state[params[0]][name].clone())}
    )


def forget(optimizer, params):
    del optimizer.state[params[0]]["momentum_buffer"]


def load(optimizer, params):
    state = copy.deepcopy(optimizer.state_dict())
    for name in state["state"][0]:
        state["state"][0][name] *= 2
    optimizer.load_state_dict(state)


def exchange(optimizer, params):
    old = params[0]
    params[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(old.detach().clone())
    params[0].grad = old.grad


def turn(optimizer, params):
    params[0].data = params[0].data.T


def grow(optimizer, params):
    params[0].grad, params[0].data = None, torch.ones(70, 60)
    params[0].grad = torch.randn(70, 60)


def turn_state(optimizer, params):
    moment = optimizer.state[params[0]]["exp_avg_sq"]
    moment.data = moment.data.T


def negate(optimizer, params):
    params[0].grad = torch._neg_view(params[0].grad)


@pytest.mark.parametrize("size", [10, 60], ids=["stacked", "in pieces"])
@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (ProjectedSGD, turn),
        (ProjectedSGD, grow),
        (ProjectedSGD, exchange),
        (ProjectedSGD, negate),
        ("momentum", of_state("momentum_buffer", torch.Tensor.neg_)),
        ("momentum", of_state("momentum_buffer", lambda m: m.T)),
        ("momentum", forget),
        ("momentum", load),
        (ProjectedAdam, of_state("step", lambda step: step + 50)),
        (ProjectedAdam, of_state("exp_avg", lambda m: m.T)),
        (ProjectedAdam, load),
        (ProjectedAdam, turn_state),
    ],
)
def test_what_is_changed_behind_a_plan_is_seen(cls, change, size):
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(size, size)) for _ in range(3)]
        options = {"momentum": 0.9} if cls == "momentum" else {}
        made = ProjectedSGD if cls == "momentum" else cls
        optimizer = made(params, lr=0.1, c=3.0, fused=fused, foreach=False, **options)
        for i in range(5):
            give_grads(params, i)
            if i == 3:
                change(optimizer, params)
            optimizer.step()
        found.append([p.detach() for p in params])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
