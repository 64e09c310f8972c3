"""The functions of the core as an engine, for everything that no other engine takes."""

import numpy as np
import pytest
import torch

from projgd import Box, MaxNorm, MinMaxNorm, NonNegative, UnitNorm, projections, sums
from projgd.torch.engines.base import Job, Reference
from tests.torch.common import random

SETS = [MaxNorm(1.0), MaxNorm(1.0, 0), UnitNorm(), MinMaxNorm(3.0, 4.0), NonNegative(), Box(-0.1, 0.1)]


def test_the_reference_is_the_formula():
    x = np.random.default_rng(0).standard_normal((7, 30)) * np.linspace(0.1, 2, 30)
    q = projections.project_band(x, MaxNorm(1.0).band(sums.FLOATS["float64"], MaxNorm(1.0, 0).vectors(x)), (0,))
    np.testing.assert_allclose(q, x * np.minimum(1, 1 / np.linalg.norm(x, axis=0)), rtol=1e-12)


@pytest.mark.parametrize("constraint", SETS, ids=str)
@torch.no_grad()
def test_it_projects_in_place_and_not_in_a_step_that_gradscaler_skips(constraint):
    """On an accelerator the count of infinities is not read: what is written depends on it."""
    for skip in (torch.tensor(1.0), torch.tensor(0.0), None):
        p, bias = random((6, 9), (6,))
        before, job = (
            p.detach().clone(),
            Job(torch.optim.SGD([p, bias], 0.1), torch.optim.SGD, {}, constraint, skip=skip),
        )
        Reference().run(None, job, [p])
        is_skipped = skip is not None and bool(skip)
        torch.testing.assert_close(p.detach(), before if is_skipped else constraint.project(before), rtol=1e-6, atol=0)
        assert torch.equal(p, before) is is_skipped
