"""Without kernels: vectors of all kinds in one parameter, and many small parameters at a time."""

from unittest.mock import patch

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from projgd import MaxNorm
from projgd.axes import Split, Vectors
from projgd.torch import ball, stacked
from projgd.torch.project import project_
from tests.contract import TIGHT, columns, judge

C = 3.7
HUGE = {"float32": 1e30, "bfloat16": 1e30, "float16": 1e4}


def project_rows(w, axis=1):
    """The columns of `w` as rows, or columns, of a parameter."""
    given = torch.from_numpy(np.ascontiguousarray(w.T).view(f"int{8 * w.itemsize}").copy())
    p = given.view(getattr(torch, w.dtype.name))
    p = p if axis == 1 else p.T.contiguous()
    with torch.no_grad():
        ball.project_ball_(p, C, Vectors(tuple(p.shape), (axis,)))
    p = p if axis == 1 else p.T.contiguous()
    return p.view(given.dtype).numpy().view(w.dtype).T.copy()


@given(
    st.sampled_from(list(TIGHT)[1:]),
    st.sampled_from([1, 7, 64, 65, 147, 600]),
    st.lists(st.sampled_from(["zero", "small", "inside", "on", "outside", "far", "huge", "nan", "inf"]), max_size=40),
    st.sampled_from([0, 1]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_vectors_of_all_kinds(dtype, n, kinds, axis):
    t = TIGHT[dtype]
    size = {"zero": 0.0, "small": 1e-3, "inside": 1 - 3 * t, "on": 1.0, "outside": 1 + t / 9, "far": 5.0}
    size |= {"huge": HUGE[dtype] / C, "nan": 0.5, "inf": 0.5}
    kinds = ["small", *kinds]
    w = columns(0, n, len(kinds), np.asarray([size[kind] for kind in kinds]) * C, dtype)
    for i, kind in enumerate(kinds):
        if kind in ("nan", "inf"):
            w[-1, i] = float(kind)
    q = project_rows(w, axis)
    judge(w, q, project_rows(q, axis), C)


def parameters():
    """Small ones of many shapes, lengths and layouts; some with a vector for the reference; and a large one."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 6), (8, 6), (3, 6), (1, 6), (4, 2, 3), (4, 2, 3), (6,), (6,), (5, 200), (8, 6), (400, 200), (0, 6)]
    found = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    found[1][0], found[4][1, 1] = 1e30, torch.nan
    found += [found[0].T.contiguous().T, found[0].T.contiguous()]
    return [torch.nn.Parameter(x.to(dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64) for x in found]


@pytest.mark.parametrize("axis", ["fan_in", "matrix", 0, -1, (), Split(0, 1, (1, 2))])
@pytest.mark.parametrize("most", [2**16, 2**20])
@torch.no_grad()
def test_many_at_a_time_are_as_one_by_one(axis, most):
    constraint = MaxNorm(2.0, axis) if axis != () else MaxNorm(1e6)
    kept = [p for p in parameters() if axis in ("fan_in", "matrix", ()) or p.ndim > 1]
    many, single = ([torch.nn.Parameter(p.clone(memory_format=torch.preserve_format)) for p in kept] for _ in range(2))
    versions = [p._version for p in many]
    with patch.object(stacked, "STACK", most):
        for p in stacked.project_(many, constraint):
            project_(p, constraint)
    for p in single:
        project_(p, constraint)
    for p, q, before, version in zip(many, single, kept, versions, strict=True):
        assert p.stride() == before.stride()
        assert torch.equal(p.contiguous().view(torch.uint8), q.contiguous().view(torch.uint8))
        if not torch.equal(p.nan_to_num(7), before.nan_to_num(7)):
            assert p._version > version
