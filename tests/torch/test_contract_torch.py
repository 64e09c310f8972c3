"""The contract in place: the fast path against the reference, and over many steps."""

import array_api_compat.torch as xp
import pytest
import torch

from projgd import projections
from projgd.torch import ProjectedAdam, ProjectedSGD

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 1), (9, 147), (9, 784), (4, 3, 5, 5), (3, 20_000)])
@pytest.mark.parametrize("layout", ["plain", "transposed", "sliced"])
def test_in_place_is_the_reference(dtype, shape, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= torch.linspace(0.2, 3, shape[0]).reshape(-1, *[1] * (x.ndim - 1)) / torch.linalg.vector_norm(
        x, dim=tuple(range(1, x.ndim)), keepdim=True
    )
    x[0] *= 1e4 if dtype == torch.float16 else 1e30
    x[1].view(-1)[0] = torch.nan
    x = x.to(dtype)
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "sliced":
        x = torch.cat([x, x], dim=-1)[..., : shape[-1]]
    p = torch.nn.Parameter(x)
    p.grad = torch.zeros_like(p)
    axes = tuple(range(1, p.ndim))
    expected = projections.project_ball(p.detach().clone(), 1.0, axes, xp)
    opt = ProjectedSGD([p], lr=0.1, c=1.0)
    opt.step()
    room = 2 * projections.guard(projections.float_type(p), tuple(p.shape), axes) + 2 * projections.float_type(p).unit
    torch.testing.assert_close(p.detach(), expected, rtol=room, atol=0, equal_nan=True)
    kept = p.detach().clone()
    opt.step()
    assert torch.equal(p.detach().nan_to_num(7), kept.nan_to_num(7))
    norms = torch.linalg.vector_norm(p.detach().double(), dim=axes)
    assert (norms[~norms.isnan()] <= 1.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [ProjectedSGD, ProjectedAdam])
def test_many_steps_outwards(dtype, make):
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter((torch.randn(6, 8, generator=generator) * 0.2).to(dtype))
    start = p[0].detach().clone()
    small = {"eps": 1e-4} if make is ProjectedAdam else {}  # Adam's own 1e-8 is 0 in float16
    opt = make([p], lr=0.05, c=1.0, **small)
    noise = torch.randn(10_000, 6, 8, generator=generator).to(dtype)
    worst = torch.zeros((), dtype=torch.float64)
    for step in range(10_000):
        p.grad = noise[step] - p.detach()
        p.grad[0] = 0
        opt.step()
        worst = torch.maximum(worst, torch.linalg.vector_norm(p.detach().double(), dim=1).max())
    assert 0.99 < worst <= 1.0
    assert torch.equal(p[0].detach(), start)
