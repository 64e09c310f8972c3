"""The Triton engine: what it must notice between steps, what it refuses, what it compiles to.

It is interpreted, or runs on a GPU where there is one. The contract and the stock step are tested in `test_matrix.py`
and `test_stock_step.py`.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from projgd import Box, MaxNorm, RelativeUpdate, Sphere
from projgd.torch import ProjectedAdamW, ProjectedSGD
from projgd.torch.engines import triton as engine
from projgd.torch.engines.base import Job
from tests.contract import exact_norms
from tests.torch.common import columns

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # 0 · inf, which `tl.where` then drops
TRITON = engine.Triton()
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def job_for(params, constraint, cls=torch.optim.SGD, **options):
    """A job whose step leaves the weights as they are, unless gradients and options say otherwise."""
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer = cls(params, **{"lr": 0.1, "fused": True, **options})
    return Job(optimizer, cls, optimizer.param_groups[0], constraint, forced="triton")


@torch.no_grad()
def step(job, params):
    assert [TRITON.refuses(job, p) for p in params] == [None] * len(params)
    TRITON.run(TRITON.prepare(job, params), job, params)


@pytest.mark.parametrize("offset", [0, 1])
def test_c_moves_and_what_is_not_aligned_is_projected_too(offset):
    x = torch.randn(1 + 12 * 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    p = torch.nn.Parameter(x[offset : offset + 12 * 64].view(12, 64))
    job = job_for([p], MaxNorm(4.0))
    prepared = TRITON.prepare(job, [p])
    for c in (4.0, 1.0, 0.25):
        TRITON.run(prepared, Job(job.optimizer, job.inner, job.group, MaxNorm(c), forced="triton"), [p])
        norms = exact_norms(columns(p, MaxNorm(1.0).vectors(p)))
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
    shapes = [(13, 40), (12, 27), (130, 8), (12, 1), (12, 3), (3, 300), (1, 2048), (12, 3, 5, 5), (40,)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    shifted = [torch.nn.Parameter(torch.randn(p.numel() + 1)[1:].view(p.shape)) for p in params]
    for tensors in (params, shifted):
        step(job_for(tensors, MaxNorm(1.0)), tensors)
    assert any((np.asarray(values) == 16).any() for values in told)


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
        yield Job(job.optimizer, job.inner, group, MaxNorm(1.0), forced="triton"), p, "as it comes"
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
for cls, dtype, lr, offset in (
    (torch.optim.AdamW, torch.float32, 0.1, 0),
    (torch.optim.SGD, torch.bfloat16, torch.tensor(0.1), 1),
):
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
    assert [count >= 4 for count in wide] == [True, False]
