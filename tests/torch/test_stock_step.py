"""Where nothing binds, the step is the plain optimizer's own: parameters and state, for every engine and option."""

from itertools import product
from typing import Any

import pytest
import torch

from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD, projected
from tests.torch.common import STOCK, THIRD, give_gradients, matrices_and, random, same, step_matrices

FLAGS = (False, True)
MOMENTUM: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
)
EVERY: list[tuple[Any, dict[str, Any]]] = [
    *(
        (ProjectedSGD, {"lr": 0.01, **momentum, "weight_decay": 0.1 * decay, "maximize": maximize})
        for momentum, decay, maximize in product(MOMENTUM, FLAGS, FLAGS)
    ),
    *(
        (cls, {"lr": 0.01, "amsgrad": amsgrad, "weight_decay": 0.1 * decay, "maximize": maximize})
        for cls, amsgrad, decay, maximize in product((ProjectedAdam, ProjectedAdamW), FLAGS, FLAGS, FLAGS)
    ),
    (ProjectedAdam, {"lr": 0.1, "betas": (0.0, 0.3), "eps": 1e-3, "decoupled_weight_decay": True, "weight_decay": 0.1}),
    (ProjectedAdamW, {"lr": torch.tensor(0.1)}),
]
"""Every set of options of SGD, Adam and AdamW that changes what a step computes."""

IDS = ["-".join([cls.__name__, *(f"{k}={v}" for k, v in options.items() if v and k != "lr")]) for cls, options in EVERY]


@pytest.mark.parametrize("cls", STOCK + THIRD, ids=lambda cls: cls.__name__)
def test_the_step_of_any_optimizer_is_the_plain_one_bit_for_bit(cls):
    net, plain = matrices_and(cls, cls)
    others = [matrices_and(projected(cls), cls, **settings) for settings in ({}, {"c": None}, {"c": 1e6})]
    for seed in range(3):
        found = step_matrices(net, plain, seed)
        for twin, ours in others:
            assert same(found, step_matrices(twin, ours, seed))
            assert same(list(net.parameters()), list(twin.parameters()))
            assert same(plain.state_dict()["state"], ours.state_dict()["state"])


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize(("cls", "options"), EVERY[:-1], ids=IDS[:-1])  # foreach=True takes no tensor as its rate
def test_with_any_options_the_default_step_is_the_plain_one_bit_for_bit(cls, options, foreach):
    ways = [{"c": None}, {"c": 1e4}] + [{"c": 1e4, "metric": "adaptive"}] * (cls is not ProjectedSGD)
    plain, *ours = (random((4, 3), (4,), (3, 2, 3, 3)) for _ in range(1 + len(ways)))
    stock = cls.inner(plain, foreach=foreach, **options)
    optimizers = [cls(params, foreach=foreach, **options, **way) for params, way in zip(ours, ways, strict=True)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        for twins in zip(plain, *ours, strict=True):
            grad = torch.randn(twins[0].shape, generator=generator)
            for p in twins:
                p.grad = grad.clone()  # foreach=True with Nesterov adds to it in place
        for optimizer in (stock, *optimizers):
            optimizer.step()
    for params, optimizer in zip(ours, optimizers, strict=True):
        assert same(plain, params)
        for p, q in zip(plain, params, strict=True):
            assert list(stock.state[p]) == list(optimizer.state[q])
            assert same(dict(stock.state[p]), dict(optimizer.state[q]))


def device_of(engine):
    """Triton's kernel is interpreted where there is no GPU."""
    return "cuda" if engine == "triton" and torch.cuda.is_available() else "cpu"


def ulps(a, b, *operands):
    """Distance in last places of the largest number that went into the sum."""
    size = torch.stack([x.detach().abs().double() for x in (a, b, *operands)]).amax(0)
    unit = torch.finfo(a.dtype).eps * torch.exp2(torch.floor(torch.log2(size.clamp_min(1e-30))))
    return ((a.double() - b.double()).abs() / unit).max().item()


@torch.no_grad()
def check_fused_steps(engine, cls, options, dtype, shapes, allowed, c):
    """Step each time from where the stock optimizer stands: parameters and states are within `allowed` ulps.

    The stock optimizer steps in float32: torch's own fused SGD in bfloat16 is wrong by a tenth of the update.
    """
    ours = [torch.nn.Parameter(p.to(device_of(engine), dtype)) for p in random(*shapes)]
    theirs = [torch.nn.Parameter(p.to(torch.float32, copy=True)) for p in ours]
    optimizer = cls(ours, fused=True, engine=engine, c=c, **options)
    stock = cls.inner(theirs, fused=True, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, dtype)
            q.grad = p.grad.to(torch.float32, copy=True)
        states = [[x.clone() for x in optimizer.state[p].values() if x.ndim] for p in ours]
        before = [[p.clone(), *s] for p, s in zip(ours, states, strict=True)]
        optimizer.step(), stock.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            assert ulps(p, q, *old, p - old[0]) <= allowed
            mine, other = optimizer.state[p], stock.state[q]
            assert mine.keys() == {k for k, s in other.items() if s is not None}
            for name in mine:
                if name == "step":
                    assert mine[name] == other[name]
                else:
                    assert ulps(mine[name], other[name], p.grad, *old) <= allowed, name
                    other[name].copy_(mine[name])  # each step is judged by itself
            q.copy_(p)
    assert {choice.engine for choice in optimizer.routes().values()} == {engine}


FUSED = {"cpu": [(3, 2, 3, 3), (17,), (700, 64), (2, 40_000)], "triton": [(6, 40), (17,)]}
"""For the kernel on a CPU also tensors of several tiles, and vectors that several tiles share."""


@pytest.mark.parametrize("c", [None, 1e4])
@pytest.mark.parametrize(("cls", "options"), EVERY, ids=IDS)
def test_with_any_options_a_fused_step_on_a_cpu_is_the_plain_one_to_two_ulps(cls, options, c):
    pytest.importorskip("numba")
    check_fused_steps("cpu", cls, options, torch.float32, FUSED["cpu"], 2, c)


@pytest.mark.parametrize(("cls", "options"), EVERY, ids=IDS)
def test_with_any_options_a_step_in_triton_is_the_plain_one_to_two_ulps(cls, options):
    pytest.importorskip("triton")
    check_fused_steps("triton", cls, options, torch.float32, FUSED["triton"], 2, 1e4)


@pytest.mark.usefixtures("rounds_to_bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("cls", "options"), [EVERY[i] for i in (14, 30, -2)], ids=[IDS[i] for i in (14, 30, -2)])
def test_in_triton_so_are_steps_in_other_dtypes_and_shapes(cls, options, dtype):
    # Among so many entries torch's own steps differ from exact arithmetic by up to 3.7 ulps, and from each other by 4.
    check_fused_steps("triton", cls, options, dtype, [(6, 40), (16, 64), (17,), (1, 2100), (4, 3, 3, 3)], 4, 1e4)


@pytest.mark.parametrize("engine", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("cls", "options"),
    [(ProjectedSGD, {"momentum": 0.9, "nesterov": True}), (ProjectedAdamW, {"amsgrad": True})],
    ids=["SGD", "AdamW"],
)
def test_the_state_of_a_fused_step_goes_to_the_stock_optimizer_and_back(engine, cls, options):
    pytest.importorskip("numba" if engine == "cpu" else "triton")
    params, straight = (
        [torch.nn.Parameter(p.to(device_of(engine))) for p in random((12, 40), (40,), (3, 70))] for _ in range(2)
    )
    current = cls(params, lr=0.01, c=1e4, fused=True, engine=engine, **options)
    reference = cls.inner(straight, lr=0.01, fused=True, **options)
    for i in range(5):
        if i in (2, 3):
            ours = {"c": 1e4, "engine": engine} if i == 3 else {}
            other = (cls if i == 3 else cls.inner)(params, lr=0.01, fused=True, **options, **ours)
            state = current.state_dict()
            groups = [{k: g[k] for k in g if k in other.param_groups[0]} for g in state["param_groups"]]
            other.load_state_dict({**state, "param_groups": groups})
            current = other
        give_gradients(params, i), give_gradients(straight, i)
        current.step(), reference.step()
        for p, q in zip(params, straight, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert current.state[p].keys() == reference.state[q].keys()
            q.data.copy_(p)


@pytest.mark.parametrize(
    ("ours", "name", "options", "first"),
    [(ProjectedSGD, "momentum_buffer", {"momentum": 0.9}, ()), (ProjectedAdam, "exp_avg_sq", {}, (3,))],
    ids=["a scalar stands first", "a parameter without a state stands first"],
)
def test_a_state_in_another_layout_is_read_right(ours, name, options, first):
    """torch's fused kernels on a CPU read a state in the layout of its weights, so they must not get this one."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(first)), torch.nn.Parameter(torch.randn(6, 6))]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    mine = ours(params, lr=0.1, c=1e4, fused=True, engine="eager", **options)
    stock = ours.inner(twins, lr=0.1, **options)
    for step in range(4):
        for p, twin in zip(params, twins, strict=True):
            twin.grad = None if p.shape == (3,) and step < 2 else torch.randn(p.shape)
            p.grad = None if twin.grad is None else twin.grad.clone()
        if step == 2:
            state = mine.state[params[1]]
            state[name] = state[name].t().contiguous().t()
        mine.step()
        stock.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)
