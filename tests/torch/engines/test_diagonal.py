"""Rows in the metric of the optimizer, by plain operations. With a gradient of zeros D is the same for every entry."""

import numpy as np
import pytest
import torch

from projgd import MaxNorm
from projgd.torch import ProjectedAdam
from tests.contract import columns, judge_norms

HUGE = {"float32": [1e19, 1e25, 1e38], "bfloat16": [1e19, 1e25, 1e38], "float16": [6e4, 5e4, 1e4]}


@pytest.mark.parametrize("dtype", HUGE)
@pytest.mark.parametrize("length", [1, 7, 147, 1031])
def test_the_contract_holds_for_vectors_of_every_size(length, dtype):
    sizes = np.asarray([0.3, 0.75, 0.98, 1.0, 1.01, 1.5, 40.0, *HUGE[dtype], 1e-6, 1.0, 1.0])
    w = columns(length, length, len(sizes), sizes, dtype)
    w[:, 3], w[0, -2], w[-1, -1] = 0, np.nan, -np.inf
    p = torch.nn.Parameter(torch.tensor(w.T.astype(np.float64)).to(getattr(torch, dtype)).contiguous())
    p.grad = torch.zeros_like(p)
    optimizer = ProjectedAdam([p], lr=0.1, constraint=MaxNorm(1.0), metric="adaptive", eps=1e-3)
    assert optimizer.routes()["parameter 0 of group 0"].engine == "diagonal"
    found = []
    for _ in range(2):
        optimizer.step()
        found.append(p.detach().double().numpy().T.astype(w.dtype))
    judge_norms(w, found[0], 0.0, 1.0, again=found[1])
