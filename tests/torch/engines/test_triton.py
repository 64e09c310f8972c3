"""The Triton engine against exact arithmetic and the stock optimizers: interpreted, or on a GPU where there is one."""

import os
import subprocess
import sys

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.torch.option_sets import EVERY, IDS

from projgd import Box, MaxNorm, MinMaxNorm, RelativeUpdate, Sphere, UnitNorm, projections
from projgd.axes import Split
from projgd.bands import Band
from projgd.sums import FLOATS, guard
from projgd.torch import ProjectedAdamW, ProjectedSGD
from projgd.torch.engines import triton as engine
from projgd.torch.engines.base import Job
from tests.contract import NUMPY, TIGHT, bits, exact_norms, judge

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # 0 · inf, which `tl.where` then drops
TRITON = engine.Triton()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = ("float32", "bfloat16", "float16")

SETS = {
    "max-norm": lambda axis: MaxNorm(3.7, axis),
    "both sides": lambda axis: MinMaxNorm(1.5, 3.7, axis=axis),
    "half of the way": lambda axis: MinMaxNorm(1.5, 3.7, rate=0.5, axis=axis),
    "sphere": lambda axis: Sphere(2.5, axis),
    "unit": lambda axis: UnitNorm(axis),
    "initial": lambda axis: Sphere("initial", axis),
}
SHAPES = {
    "fan_in": [
        *[(13, 40), (12, 27), (130, 8), (12, 1), (12, 3), (13, 64), (3, 300), (2, 1000), (1, 5000), (1, 2048)],
        *[(12, 3, 5, 5), (40,), (9000,)],
    ],
    None: [(30, 40), (7,), ()],
    (1, 2): [(3, 8, 5)],
    Split(0, 2, (2, 3, 4)): [(12, 4, 3, 3)],
}
"""By axis: rows of one block and of several, with lengths that 16 divides and others; tensors without vectors."""


@pytest.fixture(autouse=True)
def _rounds_to_bfloat16(monkeypatch):
    """Triton's interpreter cuts off what a GPU rounds to nearest."""
    from triton.runtime import interpreter

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounded(self, source, to):
        if (source.dtype.scalar.name, to.scalar.name) != ("fp32", "bf16"):
            return cast(self, source, to)
        with np.errstate(invalid="ignore"):
            return interpreter.TensorHandle(source.data.astype(NUMPY["bfloat16"]).view(np.uint16), to.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded)


def vectors_of(axis, shape):
    return MaxNorm(1.0, axis).resolve(shape, "out_first")


def columns(p, vectors):
    """The vectors of `p` as columns of a NumPy array with the same bits."""
    kept = [a for a in range(len(vectors.shape)) if a not in vectors.axes]
    rows = p.detach().cpu().reshape(vectors.shape).permute((*kept, *vectors.axes)).reshape(-1, vectors.length)
    ints = rows.contiguous().view(getattr(torch, f"int{8 * p.element_size()}"))
    return ints.numpy().view(NUMPY[str(p.dtype).removeprefix("torch.")]).T.copy()


def weights(shape, vectors, dtype, c=3.7, seed=0):
    """Vectors of all lengths about the bound c, huge ones, tiny ones, zeros, and broken ones."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if vectors is not None:
        x = x.reshape(vectors.shape)
        norms = torch.linalg.vector_norm(x, dim=vectors.axes, keepdim=True)
        t, huge = TIGHT[dtype], 1e3 if dtype == "float16" else 1e30
        wanted = [1.5, 1e-2, 0.5, 1 - 3 * t, 1 - t / 9, 1, 1 + t / 9, 5, 0, huge, 7, 2, 0.3]
        x *= c * torch.tensor(wanted, dtype=torch.float64).repeat(norms.numel())[: norms.numel()].view_as(norms) / norms
        place = torch.arange(norms.numel()).view_as(norms)
        x = torch.where(place == 10, torch.nan, x)
        x = torch.where((place == 11) & (x == x.amax(vectors.axes, keepdim=True)), -torch.inf, x)
    return torch.nn.Parameter(x.reshape(shape).to(DEVICE, getattr(torch, dtype)))


def job_for(params, constraint, cls=torch.optim.SGD, radii=None, **options):
    """A job whose step leaves the weights as they are, unless gradients and options say otherwise."""
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer = cls(params, **{"lr": 0.1, "fused": True, **options})
    return Job(optimizer, cls, optimizer.param_groups[0], constraint, radii=radii or {}, forced="triton")


@torch.no_grad()
def step(job, params):
    assert [TRITON.refuses(job, p) for p in params] == [None] * len(params)
    TRITON.run(TRITON.prepare(job, params), job, params)


def project(params, constraint, radii=None):
    """Project by a step that moves nothing; return what it would have been without a constraint."""
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    step(job_for(plain, None), plain)  # NaN may get other bits
    step(job_for(params, constraint, radii=radii), params)
    return plain


def judge_band(before, after, again, expected, band, kind, error):
    """Judge columns that were projected onto a band, and once more, against an `expected` projection in float64.

    Args:
        band: its numbers, one for each column.
        kind: the dtype.
        error: the guard for norms.
    """
    norms = exact_norms(before)
    is_broken = ~np.isfinite(np.asarray(before, np.float64)).all(0) | (norms == 0)
    assert (bits(after)[:, is_broken] == bits(before)[:, is_broken]).all(), "zero or broken vectors moved"
    with np.errstate(invalid="ignore"):
        stays = (norms >= band.low * (1 + error)) & (norms <= band.high * (1 - error)) & ~is_broken
        moves = ((norms < band.low * (1 - error)) | (norms > band.high * (1 + error))) & ~is_broken
    assert (bits(after)[:, stays] == bits(before)[:, stays]).all(), "untouched"
    wide, now = expected[:, moves], np.asarray(after, np.float64)[:, moves]
    np.testing.assert_allclose(now, wide, rtol=2 * error + 2 * kind.unit, atol=2 * kind.tiny)
    if band.pull == 1:
        sure = stays | moves
        moved_again = bits(again)[:, sure] != bits(after)[:, sure]
        is_narrow = (band.high - band.low) < 1e-2 * band.high  # a sphere: its band for moved weights is not idempotent
        assert not moved_again[:, ~np.broadcast_to(is_narrow, norms.shape)[sure]].any(), "idempotent"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETS)
@torch.no_grad()
def test_every_set_in_every_dtype_and_shape(name, dtype):
    for axis, shapes in SHAPES.items():
        constraint, vectors = SETS[name](axis), [vectors_of(axis, shape) for shape in shapes]
        params = [weights(shape, v, dtype) for shape, v in zip(shapes, vectors, strict=True)]
        radii = {}
        if constraint.takes_initial:
            for i, (p, v) in enumerate(zip(params, vectors, strict=True)):
                if v is not None:
                    like = torch.zeros([1 if a in v.axes else n for a, n in enumerate(v.shape)], device=DEVICE)
                    radii[p] = torch.rand(like.shape, generator=torch.Generator().manual_seed(i)).to(like) + 0.5
        before = project(params, constraint, radii)
        after = [p.clone() for p in params]
        project(params, constraint, radii)
        job = job_for(params, constraint, radii=radii)
        for p, v, old, new in zip(params, vectors, before, after, strict=True):
            if v is None:
                assert torch.equal(old, p)
                continue
            kind, band = FLOATS[dtype], job.band(p)
            expected = projections.project_band(old.double().reshape(v.shape), band, v.axes, xp).reshape(p.shape)
            flat = [np.asarray(torch.as_tensor(x).cpu().double().reshape(-1)) for x in (band.low, band.high)]
            one = Band(flat[0], flat[1], 0.0, 0.0, band.pull)
            error = guard(kind, v)
            judge_band(columns(old, v), columns(new, v), columns(p, v), columns(expected, v), one, kind, error)
            if name == "max-norm":
                judge(columns(old, v), columns(new, v), columns(p, v), 3.7)


def judge_max_norm(p, c, axis="fan_in"):
    """Project `p` twice, and judge it in exact arithmetic."""
    v = vectors_of(axis, tuple(p.shape))
    (before,) = project([p], MaxNorm(c, axis))
    after = columns(p, v)
    project([p], MaxNorm(c, axis))
    judge(columns(before, v), after, columns(p, v), c)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_vector_of_equal_entries(dtype):
    """A sum in float32, one entry after the other, is off by thousands of units."""
    p = torch.full((1, 60_003), 1.01 / 60_003**0.5, dtype=torch.float64)
    judge_max_norm(torch.nn.Parameter(p.to(DEVICE, getattr(torch, dtype))), 1.0)


@pytest.mark.parametrize("c", [1e-3, 4.0, 1e6])
def test_the_largest_and_the_smallest_numbers(c):
    kind = torch.finfo(torch.float32)
    x = torch.zeros(8, 16)
    x[0] = kind.max
    x[1, 3] = -kind.max
    x[2] = kind.smallest_normal / 8
    x[3, 0], x[3, 1:] = c * 2, kind.smallest_normal / 8
    x[4, 0] = float(np.nextafter(np.float32(c), np.float32(np.inf)))
    x[5, 0] = c
    x[6, :2] = kind.max / 2
    x[7] = torch.linspace(-1, 1, 16) * kind.max
    judge_max_norm(torch.nn.Parameter(x.to(DEVICE)), c)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(DTYPES),
    st.lists(st.integers(1, 40), min_size=2, max_size=3),
    st.integers(-6, 4),
    st.integers(0, 99),
)
def test_any_shape_and_size(dtype, shape, exponent, seed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10.0**exponent
    judge_max_norm(torch.nn.Parameter(x.to(DEVICE, getattr(torch, dtype))), 2.0)


def test_convolutions_in_channels_last_memory_are_rows_too():
    p = weights((12, 8, 3, 3), vectors_of("fan_in", (12, 8, 3, 3)), "float32")
    p = torch.nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    judge_max_norm(p, 3.7)


@pytest.mark.parametrize("offset", [0, 1])
def test_c_moves_and_what_is_not_aligned_is_projected_too(offset):
    x = torch.randn(1 + 12 * 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    p = torch.nn.Parameter(x[offset : offset + 12 * 64].view(12, 64))
    v, job = vectors_of("fan_in", (12, 64)), job_for([p], MaxNorm(4.0))
    prepared = TRITON.prepare(job, [p])
    for c in (4.0, 1.0, 0.25):
        TRITON.run(prepared, Job(job.optimizer, job.inner, job.group, MaxNorm(c), forced="triton"), [p])
        norms = exact_norms(columns(p, v))
        assert ((norms <= c) & (norms >= c * (1 - 1e-5))).all()


def test_gradients_may_move_between_steps():
    p = torch.nn.Parameter(torch.ones(3, 5, device=DEVICE))
    job = job_for([p], None, lr=1.0)
    prepared = TRITON.prepare(job, [p])
    for i in range(3):
        p.grad = torch.full_like(p, float(i))
        TRITON.run(prepared, job, [p])
    assert (p == 1 - 3).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter can be watched")
def test_what_the_compiler_is_told_of_divisibility_is_so(monkeypatch):
    from triton.runtime import interpreter

    told = []

    def set_attr(self, name, values):
        assert name == "tt.divisibility"
        assert (self.data.astype(np.int64) % np.asarray(values) == 0).all()
        told.append(values)

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", set_attr)
    shapes = SHAPES["fan_in"]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    shifted = [torch.nn.Parameter(torch.randn(p.numel() + 1)[1:].view(p.shape)) for p in params]
    for tensors in (params, shifted):
        project(tensors, MaxNorm(1.0))
    assert any((np.asarray(values) == 16).any() for values in told)


def ulps(a, b, *operands):
    """Distance in last places of the largest number that went into the sum."""
    size = torch.stack([x.detach().abs().double() for x in (a, b, *operands)]).amax(0)
    unit = torch.finfo(a.dtype).eps * torch.exp2(torch.floor(torch.log2(size.clamp_min(1e-30))))
    return ((a.double() - b.double()).abs() / unit).max().item()


@torch.no_grad()
def check_steps(cls, options, dtype, shapes, allowed):
    """Step each time from where the stock optimizer stands: parameters and states are within `allowed` ulps."""
    generator = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in shapes]
    theirs = [torch.nn.Parameter(p.to(torch.float32, copy=True)) for p in ours]
    job, stock = job_for(ours, MaxNorm(1e4), cls, **options), cls(theirs, fused=True, **options)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE, dtype)
            q.grad = p.grad.to(torch.float32, copy=True)
        states = [[x.clone() for x in job.optimizer.state[p].values() if x.ndim] for p in ours]
        before = [[p.clone(), *s] for p, s in zip(ours, states, strict=True)]
        step(job, ours)
        stock.step()
        for p, q, old in zip(ours, theirs, before, strict=True):
            assert ulps(p, q, *old, p - old[0]) <= allowed
            mine, other = job.optimizer.state[p], stock.state[q]
            assert mine.keys() == {k for k, s in other.items() if s is not None}
            for name in mine:
                if name == "step":
                    assert mine[name] == other[name]
                else:
                    assert ulps(mine[name], other[name], p.grad, *old) <= allowed, name
                    other[name].copy_(mine[name])  # each step is judged by itself
            q.copy_(p)


@pytest.mark.parametrize(("cls", "options"), EVERY, ids=IDS)
def test_where_nothing_binds_a_step_is_the_stock_one(cls, options):
    check_steps(cls.inner, options, torch.float32, [(6, 40), (17,)], 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (torch.optim.AdamW, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}),
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.0, 0.9), "decoupled_weight_decay": True, "weight_decay": 0.1}),
    ],
    ids=["SGD", "AdamW", "Adam"],
)
def test_a_stock_step_in_other_dtypes_and_shapes(cls, options, dtype):
    # Among so many entries torch's own steps differ from exact arithmetic by up to 3.7 ulps, and from each other by 4.
    check_steps(cls, options, dtype, [(6, 40), (16, 64), (17,), (1, 2100), (4, 3, 3, 3), (8200,)], 4)


def test_the_learning_rate_may_be_a_tensor():
    p, q = (torch.nn.Parameter(torch.ones(3, 4, device=DEVICE)) for _ in range(2))
    job, same = job_for([p], None, lr=torch.tensor(0.5, device=DEVICE)), job_for([q], None, lr=0.5)
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    step(job, [p]), step(same, [q])
    assert torch.equal(p, q)
    job.group["lr"].fill_(0.25)
    step(job, [p])
    assert (p == 0.25).all()


def test_momentum_starts_for_each_parameter_when_it_gets_a_gradient():
    params, twins = ([torch.nn.Parameter(torch.ones(3, 4, device=DEVICE)) for _ in range(2)] for _ in range(2))
    options = {"lr": 0.5, "momentum": 0.9, "dampening": 0.3}
    job, stock = job_for(params, None, **options), torch.optim.SGD(twins, **options)
    for some in (1, 2, 2):
        for p, q in zip(params[:some], twins[:some], strict=True):
            p.grad, q.grad = torch.full_like(p, 0.7), torch.full_like(q, 0.7)
        step(job, params[:some]), stock.step()
    torch.testing.assert_close(params, twins, rtol=1e-6, atol=0)


def test_a_prepared_step_can_be_run_again():
    """Momentum starts once, though nothing is prepared anew."""
    p, q = (torch.nn.Parameter(torch.ones(3, 4, device=DEVICE)) for _ in range(2))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    options = {"lr": 0.5, "momentum": 0.9, "dampening": 0.3}
    job, stock = job_for([p], None, **options), torch.optim.SGD([q], **options)
    prepared = TRITON.prepare(job, [p])
    for _ in range(3):
        TRITON.run(prepared, job, [p]), stock.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0)


def test_memory_says_when_something_has_moved():
    p = torch.nn.Parameter(torch.ones(3, 4, device=DEVICE))
    job = job_for([p], MaxNorm(1.0), torch.optim.Adam)
    assert TRITON.memory(job, [p]) is None  # there is no state yet
    step(job, [p])
    known = TRITON.memory(job, [p])
    step(job, [p])
    p.grad = torch.zeros_like(p)
    assert TRITON.memory(job, [p]) == known
    job.optimizer.state[p]["exp_avg"] = torch.zeros_like(p)
    assert TRITON.memory(job, [p]) != known
    p.grad = torch.zeros(4, 3, device=DEVICE).t()
    assert TRITON.memory(job, [p])[1] != known[1]
    p.grad = None
    assert TRITON.memory(job, [p]) is None


def with_state(p, **state):
    job = job_for([p], MaxNorm(1.0), torch.optim.Adam)
    job.optimizer.state[p] |= state
    return job


def refusals():
    """Jobs with a parameter that the engine cannot take, and words of the sentence that it gives."""
    p = torch.nn.Parameter(torch.ones(3, 4, device=DEVICE))
    job, group = job_for([p], MaxNorm(1.0)), {}
    yield Job(job.optimizer, job.inner, {**job.group, "fused": False}, MaxNorm(1.0), forced="triton"), p, "fused=True"
    yield Job(job.optimizer, torch.optim.RMSprop, job.group, MaxNorm(1.0), forced="triton"), p, "RMSprop"
    for key, value in (("gradient", "tangent"), ("update", RelativeUpdate())):
        group = {**job.group, key: value}
        yield Job(job.optimizer, job.inner, group, MaxNorm(1.0), forced="triton"), p, "as they come"
    arguments = (job.optimizer, job.inner, job.group, MaxNorm(1.0))
    yield Job(*arguments, metric=object(), forced="triton"), p, "Euclidean"
    yield Job(*arguments, skip=torch.zeros(()), forced="triton"), p, "GradScaler"
    yield Job(*arguments, forced="triton", compiled=True), p, "torch.compile"
    yield Job(*arguments[:3], Box(-1.0, 1.0), forced="triton"), p, "not a set of norms"
    yield Job(*arguments[:3], MaxNorm(1.0, 0), forced="triton"), p, "one after the other"
    yield job, p.detach().to("meta"), "CUDA"
    yield job, p.detach().double(), "float64"
    yield job, p.detach().new_zeros(0, 4), "0 entries"
    yield job, p.detach().new_zeros(2, 70_000), "70000 entries"
    yield job, torch.ones(3, 8, device=DEVICE)[:, ::2], "one after the other"
    yield Job(*arguments[:3], MaxNorm(1e-3), forced="triton"), p.detach().new_zeros(2, 9000).half(), "entry by entry"
    odd = torch.nn.Parameter(torch.ones(3, 4, device=DEVICE))
    odd.grad = torch.ones(4, 3, device=DEVICE).t()
    yield job, odd, "gradient"
    sparse = torch.nn.Parameter(torch.ones(3, 4, device=DEVICE))
    sparse.grad = torch.ones(3, 4, device=DEVICE).to_sparse()
    yield job, sparse, "gradient"
    moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    yield with_state(p, **moments), p, "only exp_avg, exp_avg_sq"
    yield with_state(p, **moments, step=torch.tensor(1.0, dtype=torch.float64, device=DEVICE)), p, "step count"
    moments["exp_avg"] = torch.zeros(4, 3, device=DEVICE).t()
    yield with_state(p, **moments, step=torch.tensor(1.0, device=DEVICE)), p, "a state"


def test_refusals_say_why():
    for job, p, words in refusals():
        assert words in str(TRITON.refuses(job, p)), words
    p = torch.nn.Parameter(torch.ones(3, 4, device=DEVICE))
    job = job_for([p], MaxNorm(1.0))
    unnamed = Job(job.optimizer, job.inner, job.group, MaxNorm(1.0))
    assert ("measured" in str(TRITON.refuses(unnamed, p))) == (DEVICE.type == "cuda")
    assert TRITON.refuses(unnamed, p) is not None


def test_what_triton_needs_is_looked_for(monkeypatch):
    for patch in (("find_spec", engine.importlib.util), ("which", engine.shutil)):
        engine._is_installed.cache_clear()
        monkeypatch.delenv("CC", raising=False)
        with monkeypatch.context() as patched:
            patched.setattr(patch[1], patch[0], lambda name: None)
            assert not engine._is_installed()
    engine._is_installed.cache_clear()


@pytest.mark.parametrize(
    ("cls", "options"), [(ProjectedSGD, {"momentum": 0.9, "nesterov": True}), (ProjectedAdamW, {"amsgrad": True})]
)
def test_the_state_goes_to_the_stock_optimizer_and_back(cls, options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE)) for s in [(12, 40), (40,), (3, 70)]]
    straight = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, straight, strict=True):
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
        q.grad = p.grad
    current = cls(params, lr=0.01, c=1e4, fused=True, engine="triton", **options)
    reference = cls.inner(straight, lr=0.01, fused=True, **options)
    assert all(choice.engine == "triton" for choice in current.routes().values())
    for i in range(5):
        if i in (2, 3):
            ours = {"c": 1e4, "engine": "triton"} if i == 3 else {}
            other = (cls if i == 3 else cls.inner)(params, lr=0.01, fused=True, **options, **ours)
            state = current.state_dict()
            groups = [{k: g[k] for k in g if k in other.param_groups[0]} for g in state["param_groups"]]
            other.load_state_dict({**state, "param_groups": groups})
            current = other
        current.step(), reference.step()
        for p, q in zip(params, straight, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert current.state[p].keys() == reference.state[q].keys()
            q.data.copy_(p)


def test_engine_by_name_holds_and_an_engine_that_cannot_is_an_error():
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in [(12, 40), (40,)]]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = ProjectedSGD(params, lr=1.0, momentum=0.9, constraint=Sphere("initial"), fused=True, engine="triton")
    norms = params[0].detach().norm(dim=1)
    for _ in range(3):
        optimizer.step()
        torch.testing.assert_close(params[0].detach().norm(dim=1), norms)
    with pytest.raises(ValueError, match="fused=True was not passed"):
        ProjectedSGD(params, lr=1.0, c=1.0, engine="triton")


def test_many_tensors_are_one_launch(monkeypatch):
    launched = []

    class Counting:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    kernel = engine._kernel()
    monkeypatch.setattr(engine, "_kernel", Counting)
    shapes = [(2, 16), (2, 64), (16,), (16, 3, 3, 3), (1, 3000)]
    params = [torch.nn.Parameter(torch.ones(s, device=DEVICE)) for s in shapes]
    step(job_for(params, MaxNorm(1.0), momentum=0.9), params)
    assert len(launched) == 1


def test_the_module_is_imported_without_triton():
    script = "import sys, projgd.torch.engines.triton; print([m for m in sys.modules if m.startswith('triton')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
@pytest.mark.parametrize("moves_gradients", [False, True])
@pytest.mark.parametrize(
    ("cls", "options"), [(ProjectedSGD, {"momentum": 0.9}), (ProjectedAdamW, {"capturable": True})]
)
def test_no_step_waits_and_a_captured_step_is_the_same(cls, options, moves_gradients):
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 40), (40,), (3, 9001), (20, 3, 3, 3)]
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE)) for s in shapes]
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, twins, strict=True):
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
        q.grad = p.grad.clone()
    ours, twin = (cls(x, lr=0.01, c=1.0, fused=True, engine="triton", **options) for x in (params, twins))
    ours.step(), twin.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step(), twin.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if moves_gradients:
            for p in params:
                p.grad = p.grad.clone()
        ours.step()
    for _ in range(3):
        graph.replay()
        twin.step()
    for p in params:  # an ordinary step with other gradients leaves the graph alone
        p.grad = p.grad.clone()
    for i in range(4):
        graph.replay() if i % 2 else ours.step()
        twin.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from projgd import MaxNorm
from projgd.torch.engines import triton as engine
from projgd.torch.engines.base import Job

class H100:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

class Compiled:  # launches nothing
    def __getitem__(self, grid):
        def run(*args, **options):
            made = kernel.warmup(*args, grid=grid, **options)
            assert len(made.asm["cubin"]) > 1000
            print(*(made.asm["ptx"].count(f"{x}.global.v4") for x in ("ld", "st")))
        return run

driver.set_active(H100())
kernel = engine._kernel()
engine._kernel = Compiled
for cls, dtype, lr in (
    (torch.optim.AdamW, torch.float32, 0.1),
    (torch.optim.SGD, torch.bfloat16, torch.tensor(0.1)),
    (torch.optim.SGD, torch.float16, 0.1),
):
    for offset in (0, 1):
        p = torch.nn.Parameter(torch.zeros(16 * 64 + 1, dtype=dtype)[offset:][: 16 * 64].view(16, 64))
        p.grad = torch.zeros_like(p)
        optimizer = cls([p], lr=lr)
        job = Job(optimizer, cls, optimizer.param_groups[0], MaxNorm(1.0))
        engine.Triton().run(engine.Triton().prepare(job, [p]), job, [p])
"""


def test_the_kernel_compiles_for_an_h100_and_reads_sixteen_bytes_at_a_time(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_kernel.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wide = [min(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [count >= 4 for count in wide] == [True, False] * 3
