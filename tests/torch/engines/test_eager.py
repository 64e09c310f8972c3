"""Plain operations, in place: how exact their norms are, and what they must look at in every step."""

import math

import numpy as np
import pytest
import torch

from projgd import MaxNorm, MinMaxNorm, RadialBrake, TangentUpdate, sums
from projgd.torch import ProjectedSGD, project_after_step
from projgd.torch.engines import eager
from tests.torch.common import norms


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 147, 352, 353, 784, 1031, 4608])
def test_norms_are_as_exact_as_the_guard_says(n):
    for value in (0.1, 1 / 3, 0.7):
        x = torch.full((3, n), value)
        x[1, 0] = 1000.0
        x[2] = torch.randn(n, generator=torch.Generator().manual_seed(n))
        exact = np.sqrt((x.numpy().astype(np.longdouble) ** 2).sum(1))
        for axis, y in ((1, x), (0, x.t().contiguous()), (0, x.t())):
            found = eager.norms(y, (axis,)).flatten().numpy()
            vectors = MaxNorm(1.0, axis).vectors(y)
            assert (np.abs(found / exact - 1) <= sums.guard(sums.FLOATS["float32"], vectors)).all()
    assert eager.longest_block() >= eager.BLOCK


@pytest.mark.parametrize("rows", [40, 1000], ids=["in a stack", "in pieces"])
def test_the_first_vector_that_leaves_is_seen_whatever_was_before(rows):
    """NaN in one vector, too, hides nothing of the others."""
    p, other = torch.nn.Parameter(torch.full((rows, 100), 0.1)), torch.nn.Parameter(torch.zeros(3, 100))  # norm 1
    optimizer, row = ProjectedSGD([p, other], lr=1.0, c=2.0), rows // 2
    p.grad, other.grad = torch.zeros_like(p), torch.zeros_like(other)
    for value, norm in ((0.0, 1.0), (0.0, 1.0), (-0.2, 2.0), (0.1, 1.0), (0.0, 1.0)):
        p.grad[row] = value
        optimizer.step()
        np.testing.assert_allclose(norms(p)[row], norm, rtol=2e-5)
        assert bool((p[:row] == 0.1).all())
    p.grad[row], p.grad[row + 1] = math.nan, -0.5
    optimizer.step()
    assert math.isnan(norms(p)[row])
    assert 2 * (1 - 1e-5) <= norms(p)[row + 1] <= 2
    assert bool((p[:row] == 0.1).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [4, 4000], ids=["in a stack", "in pieces"])
def test_a_short_vector_beside_a_long_one_stays(rows, dtype):
    """Its squares become 0 in float32."""
    start = torch.full((rows, 100), 1e-25 if dtype != torch.float16 else 6e-8).to(dtype)
    start[0], start[1] = 300.0, 0.0
    p, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    p.grad, other.grad = torch.zeros_like(p), torch.zeros_like(p)
    optimizer = ProjectedSGD([p, other], lr=1.0, c=2.0)
    optimizer.step()
    assert optimizer.routes()["parameter 0 of group 0"].engine == "eager"
    for x in (p, other):
        assert torch.equal(x[1:], start[1:])
        assert norms(x)[0] <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("other", [0.0, math.nan, 1e20, 1e-20])
@pytest.mark.parametrize("rows", [2, 60_000], ids=["in a stack", "in pieces"])
def test_a_rate_pulls_every_vector_once_whatever_is_beside_it(rows, other, dtype):
    params = [torch.nn.Parameter(torch.zeros(rows, 100, dtype=dtype)) for _ in range(2)]
    for p in params:
        p.grad = torch.zeros_like(p)
        with torch.no_grad():
            p[:, 0], p[-1, 0] = 6.0, other
    ProjectedSGD(params, lr=1.0, constraint=MinMaxNorm(1.0, 2.0, rate=0.5), engine="eager").step()
    for p in params:
        np.testing.assert_allclose(p[:-1, 0].detach().float(), 4.0, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("update", [None, TangentUpdate(axis=None), RadialBrake(0.5, axis=None)], ids=str)
def test_scalars_are_vectors_of_one_entry(update, count):
    params = [torch.nn.Parameter(torch.tensor(3.0)) for _ in range(count)]
    optimizer = ProjectedSGD(params, lr=0.1, constraint=MaxNorm(1.0, axis=None), update=update)
    hooked = [torch.nn.Parameter(torch.tensor(3.0)) for _ in range(count)]
    stock = torch.optim.SGD(hooked, lr=0.1)
    project_after_step(stock, MaxNorm(1.0, axis=None))
    for p in (*params, *hooked):
        p.grad = torch.ones(())
    optimizer.step(), stock.step()
    for p in (*params, *hooked):
        assert p.shape == ()
        assert 1 - 1e-5 <= p.item() <= 1
