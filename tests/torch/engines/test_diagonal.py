"""Rows in the metric of the optimizer by plain operations, and in the fused kernel, against float64.

With a gradient of zeros D is the same for every entry: so the matrix has this engine, too.
"""

import dataclasses

import array_api_compat.torch as xp
import pytest
import torch

from projgd import MaxNorm, metrics
from projgd.axes import Vectors
from projgd.sums import FLOATS
from projgd.torch import ProjectedAdam, projected
from projgd.torch.engines.base import Job, project_with
from projgd.torch.metrics import DiagonalRule, OfStep
from projgd.torch.routing import WITHIN
from tests.optimality import residual


@pytest.mark.parametrize("shape", [(40, 30), (3, 20_000), (12, 3, 3, 3), (5, 1)], ids=str)
@pytest.mark.parametrize("case", ["near", "far", "wide", "zeros", "first zero", "halves", "not finite", "transposed"])
def test_rows_on_a_cpu_agree_with_the_reference(shape, case):
    """In float32 rows outside are solved apart, in place: same answer, and no other row is touched."""
    torch.manual_seed(0)
    norms = torch.rand(shape[0]) * (2e4 if case == "far" else 3)
    y = torch.nn.functional.normalize(torch.randn(shape).flatten(1), dim=1) * norms[:, None]
    y = y.reshape(shape)
    v = 10.0 ** torch.empty(shape).uniform_(-30 if case == "wide" else -8, 4)
    if case == "zeros":
        v = v * (torch.rand(shape) > 0.5)
    if case == "first zero":
        y.flatten(1)[:, :300] = 0
    if case == "not finite":
        y[0, 0] = torch.inf
        v[1, 0] = torch.inf
        v[2, 0] = torch.nan
    if case == "halves":
        y, v = y.bfloat16(), v.bfloat16()
    p, d = torch.nn.Parameter(y.clone()), v.float().sqrt() + 1e-8
    if case == "transposed":
        p.data = p.data.transpose(0, 1).contiguous().transpose(0, 1)

    def of(state, group):
        return state["v"].float().sqrt() + 1e-8

    with torch.no_grad():
        metric = OfStep(DiagonalRule(of, ("v",)), {p: {"v": v}}, {}, {})
        inner = torch.optim.Adam
        project_with(WITHIN, Job(inner([p]), inner, {}, MaxNorm(1.0), metric), [p])
    expected = MaxNorm(1.0).onto_in(d, y, tuple(range(1, y.ndim)), xp)
    true = p.detach().double().flatten(1).norm(dim=1)
    assert (true[true.isfinite()] <= 1).all()
    before = y.double().flatten(1).norm(dim=1)
    assert torch.equal(p[before < 1 - 1e-2], y[before < 1 - 1e-2])
    # An entry far cheaper than the rest is known less well than the norm: the norm hardly depends on it.
    room = 4e-3 if case == "halves" else 2e-5
    assert torch.allclose(p.detach().float(), expected.float(), rtol=0, atol=room, equal_nan=True)
    outside = (before > 1) & before.isfinite() & d.flatten(1).isfinite().all(1)
    if case != "halves":
        assert (true[outside] >= 1 - 1e-5).all()
        error, _ = residual(p.detach().flatten(1)[outside], y.flatten(1)[outside], d.flatten(1)[outside])
        assert (error <= 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 30])
def test_a_parameter_that_has_not_stepped_yet_is_projected_in_the_euclidean_metric(dtype, length):
    generator = torch.Generator().manual_seed(0)
    used = torch.nn.Parameter(torch.ones(2, 2))
    idle = torch.nn.Parameter((torch.rand(4000, length, generator=generator) + 0.8).to(dtype))
    optimizer = ProjectedAdam([used, idle], c=1.0, metric="adaptive", without_grad=True)
    used.grad = torch.ones(2, 2)
    optimizer.step()
    norms = idle.detach().double().norm(dim=1)
    assert (norms <= 1).all()
    assert (norms >= 0.8).all()


FUSED = [
    (ProjectedAdam, {}),
    (ProjectedAdam, {"amsgrad": True, "betas": (0.5, 0.9), "weight_decay": 1e-3, "maximize": True}),
    (projected(torch.optim.AdamW), {"eps": 1e-3}),
]


def outwards(p, seed):
    """A gradient that sends most rows out of the ball, its entries of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.empty(p.shape).uniform_(-3, 0, generator=generator)
    return (sizes * torch.randn(p.shape, generator=generator) - 0.3 * sizes * p.detach().sign()).to(p.dtype)


@pytest.mark.parametrize(("cls", "kwargs"), FUSED, ids=["Adam", "amsgrad", "AdamW"])
@pytest.mark.parametrize("fused", [True, False], ids=["cpu, then diagonal", "diagonal, then cpu"])
def test_both_engines_project_the_stock_step_to_the_float64_optimum(cls, kwargs, fused):
    pytest.importorskip("numba")
    torch.manual_seed(0)
    shapes = [(40, 30), (3, 20_000), (12, 3, 3, 3), (20, 1), (16,)]  # a row that is several tiles, and a bias
    params = [
        torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(s).flatten(1 - (len(s) == 1)), dim=-1).reshape(s))
        for s in shapes
    ]
    optimizer = cls(params, lr=0.01, c=1.0, metric="adaptive", fused=fused, **kwargs)
    copies = [p.detach().clone().requires_grad_() for p in params]
    stock = cls.inner(copies, lr=0.01, fused=fused, **kwargs)
    found = 0
    for step in range(6):
        for p, q in zip(params, copies, strict=True):
            q.data.copy_(p.data)
            p.grad = q.grad = outwards(p, step) * (-1 if kwargs.get("maximize") else 1)
        if step == 3:  # the engine may change in between
            other = cls(params, lr=0.01, c=1.0, metric="adaptive", fused=not fused, **kwargs)
            other.load_state_dict(optimizer.state_dict())
            other.param_groups[0]["fused"] = not fused
            optimizer = other
        optimizer.step()
        stock.step()
        for p, q in zip(params, copies, strict=True):
            if p.ndim == 1:
                assert torch.allclose(p, q, rtol=1e-6, atol=1e-9)
                continue
            x, y = p.detach().double().flatten(1), q.detach().double().flatten(1)
            name = "max_exp_avg_sq" if kwargs.get("amsgrad") else "exp_avg_sq"
            v, t = stock.state[q][name].double().flatten(1), step + 1
            beta, eps = stock.param_groups[0]["betas"][1], stock.param_groups[0]["eps"]
            d = (v / (1 - beta**t)).sqrt() + eps
            band = MaxNorm(1.0).band(FLOATS["float32"], Vectors(tuple(y.shape), (1,)))
            best = metrics.project_band(y, d, dataclasses.replace(band, high=band.down), (1,), xp)
            outside = y.norm(dim=1) > band.high
            found += int(outside.sum())
            assert (x.norm(dim=1) <= 1).all()
            assert torch.allclose(x[~outside], y[~outside], rtol=1e-6, atol=1e-7)
            assert (x.norm(dim=1)[outside] >= 1 - 1e-5).all()
            assert ((x - best).norm(dim=1)[outside] <= 1e-6).all()
            assert (residual(x[outside], y[outside], d[outside])[0] <= 1e-6).all()
    engines = {choice.engine for name, choice in optimizer.routes().items() if not name.startswith("parameter 4")}
    assert engines == ({"diagonal"} if fused else {"cpu"})
    assert found >= 60
