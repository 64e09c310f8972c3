"""The Triton kernels against exact arithmetic and the stock optimizers: interpreted, or on a GPU where there is one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from projgd import MaxNorm, projections
from projgd.axes import Split
from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedRMSprop, ProjectedSGD, path
from projgd.torch.kernels.rules import Adam, Sgd
from tests.contract import NUMPY, TIGHT, exact_norms, judge
from tests.torch.option_sets import EVERY, IDS

pytest.importorskip("triton")
from projgd.torch.kernels import batch, gpu, gpu_batch

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # of squares of float64, on purpose
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# In last places. The interpreter has no fused multiply-add, and cuts off what it should round to bfloat16.
ROOM = 2 if DEVICE.type == "cuda" else 3
WAYS = [
    ((12, 40), "fan_in"),  # every shape of block, with sizes that are and are not whole vectors of the machine
    ((12, 27), "fan_in"),
    ((130, 8), "fan_in"),
    ((12, 1), "fan_in"),
    ((16, 1), "fan_in"),
    ((12, 3, 5, 5), "fan_in"),
    ((12, 520), "fan_in"),
    ((3, 9001), "fan_in"),  # cut into tiles
    ((2, 16384), "fan_in"),
    ((140, 40), 0),  # columns, cut
    ((70, 13), 0),
    ((20, 12, 3, 3), (0, 2, 3)),  # a transposed convolution
    ((20, 12, 3, 3), Split(0, 2, (1, 3, 4))),  # a grouped one
    ((3, 40, 5), 1),
    ((150, 60), None),  # one vector, cut
    ((40,), "fan_in"),  # free
]


def batch_of(params, vectors):
    return gpu_batch.Batch([path.memory(p) for p in params], vectors)


def addresses(*operands):
    return np.array([[x.data_ptr() for x in xs] for xs in operands])


def columns(p, vectors):
    """The vectors of `p` as columns of a NumPy array with the same bits."""
    keep = [a for a in range(len(vectors.shape)) if a not in vectors.axes]
    rows = p.detach().cpu().reshape(vectors.shape).permute(*keep, *vectors.axes).reshape(-1, vectors.length)
    ints = rows.contiguous().view(getattr(torch, f"int{8 * p.element_size()}"))
    return ints.numpy().view(NUMPY[str(p.dtype).removeprefix("torch.")]).T.copy()


def start(shape, vectors, dtype, c, seed=0):
    """Vectors of all lengths about the bound, huge ones, zeros, and broken ones."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if vectors is None:
        return x.to(DEVICE, dtype)
    x = x.reshape(vectors.shape)
    t = TIGHT[str(dtype).removeprefix("torch.")]
    norms = torch.linalg.vector_norm(x, dim=vectors.axes, keepdim=True)
    wanted = torch.tensor([1.5, 1e-3, 0.5, 1 - 3 * t, 1 - t / 9, 1, 1 + t / 9, 5, 0, 3, 7, 2], dtype=torch.float64)
    wanted[9] = {torch.float16: 1e3, torch.float64: 1e290}.get(dtype, 1e30)
    x *= c * wanted.repeat(norms.numel() // 12 + 1)[: norms.numel()].view_as(norms) / norms
    x = x.reshape(shape).to(dtype)
    broken = x.view(vectors.shape).permute(
        *[a for a in range(len(vectors.shape)) if a not in vectors.axes], *vectors.axes
    )
    if broken.shape[0] > 11:
        broken[10].fill_(torch.nan)
        broken[11].fill_(-torch.inf)
    return x.to(DEVICE)


@pytest.mark.parametrize("dtype", NUMPY)
def test_contract_on_every_way_through_memory(dtype):
    c = 3.7
    vectors = [MaxNorm(c, axis).resolve(shape, "out_first") for shape, axis in WAYS]
    params = [start(s, v, getattr(torch, dtype), c) for (s, _), v in zip(WAYS, vectors, strict=True)]
    before = [p.clone() for p in params]
    made = batch_of(params, vectors)
    made.run(c, addresses(params))
    after = [p.clone() for p in params]
    made.run(c, addresses(params))
    for old, new, again, v, (shape, axis) in zip(before, after, params, vectors, WAYS, strict=True):
        if v is None:
            assert torch.equal(old, again)
            continue
        judge(columns(old, v), columns(new, v), columns(again, v), c)
        expected = MaxNorm(c, axis).project(old)
        kind = projections.FLOATS[dtype]
        room = 2 * projections.guard(kind, v.shape, v.axes) + 2 * kind.unit
        torch.testing.assert_close(new, expected, rtol=room, atol=0, equal_nan=True, msg=f"{shape} {axis}")


@pytest.mark.parametrize("dtype", NUMPY)
def test_a_long_vector_of_equal_entries(dtype):
    """What adds them up one after the other in float32 is off by thousands of units."""
    p = torch.full((1, 100_003), 1.01 / 100_003**0.5, dtype=torch.float64).to(DEVICE, getattr(torch, dtype))
    c, vectors = 1.0, [MaxNorm(1.0).resolve(p.shape, "out_first")]
    before = columns(p, vectors[0])
    made = batch_of([p], vectors)
    made.run(c, addresses([p]))
    after = columns(p, vectors[0])
    made.run(c, addresses([p]))
    judge(before, after, columns(p, vectors[0]), c)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("c", [1e-3, 4.0, 1e6])
def test_the_largest_and_the_smallest_numbers(dtype, c):
    kind = torch.finfo(getattr(torch, dtype))
    x = torch.zeros(8, 16, dtype=getattr(torch, dtype))
    x[0] = kind.max
    x[1, 3] = -kind.max
    x[2] = kind.smallest_normal / 8
    x[3, 0], x[3, 1:] = c * 2, kind.smallest_normal / 8
    x[4, 0] = float(np.nextafter(NUMPY[dtype](c), NUMPY[dtype](np.inf)))
    x[5, 0] = c
    x[6, :2] = kind.max / 2
    x[7] = torch.linspace(-1, 1, 16) * kind.max
    p = x.to(DEVICE)
    vectors = [MaxNorm(c).resolve(p.shape, "out_first")]
    before, made = columns(p, vectors[0]), batch_of([p], vectors)
    made.run(c, addresses([p]))
    after = columns(p, vectors[0])
    made.run(c, addresses([p]))
    judge(before, after, columns(p, vectors[0]), c)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(sorted(NUMPY)),
    st.lists(st.integers(1, 40), min_size=2, max_size=3),
    st.integers(-6, 4),
    st.integers(0, 99),
)
def test_any_shape_and_size(dtype, shape, exponent, seed):
    c = 2.0
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**exponent).to(
        DEVICE, getattr(torch, dtype)
    )
    vectors = [MaxNorm(c, seed % len(shape)).resolve(tuple(shape), "out_first")]
    before = columns(p, vectors[0])
    made = batch_of([p], vectors)
    made.run(c, addresses([p]))
    after = columns(p, vectors[0])
    made.run(c, addresses([p]))
    judge(before, after, columns(p, vectors[0]), c)


def test_c_moves_and_what_is_not_aligned_is_projected_too():
    for first in (0, 1):
        p = torch.randn(1 + 12 * 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)[first:][: 12 * 64]
        p = p.view(12, 64)
        vectors = [MaxNorm(1.0).resolve(p.shape, "out_first")]
        made = batch_of([p], vectors)
        for c in (4.0, 1.0, 0.25):
            made.run(c, addresses([p]))
            norms = exact_norms(columns(p, vectors[0]))
            assert (norms <= c).all()
            assert (norms >= c * (1 - 1e-5)).all()


def test_squares_that_overflow_do_not_concern_a_free_tensor():
    p = torch.full((64,), 1e300, dtype=torch.float64, device=DEVICE)
    batch_of([p], [None]).run(1.0, addresses([p]))
    assert (p == 1e300).all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="only the interpreter can be watched")
def test_what_the_compiler_is_told_of_alignment_is_so(monkeypatch):
    from triton.runtime import interpreter

    told = []

    def set_attr(self, name, values):
        assert name == "tt.divisibility"
        assert (self.data.astype(np.int64) % np.asarray(values) == 0).all()
        told.append(values)

    monkeypatch.setattr(interpreter.TensorHandle, "set_attr", set_attr)
    vectors = [MaxNorm(1.0, axis).resolve(shape, "out_first") for shape, axis in WAYS]
    params = [torch.randn(shape) for shape, _ in WAYS]
    shifted = [torch.randn(p.numel() + 1)[1:].view(p.shape) for p in params]
    for tensors in (params, shifted):
        batch_of(tensors, vectors).run(1.0, addresses(tensors))
    assert told


def rule_of(cls, options):
    sign, decay = -1.0 if options.get("maximize") else 1.0, options.get("weight_decay", 0.0)
    if cls is ProjectedSGD:
        momentum, undamped = options.get("momentum", 0.0), 1 - options.get("dampening", 0.0)
        return Sgd(options["lr"], momentum, undamped, decay, sign, float(options.get("nesterov", False)))
    decoupled = float(cls.inner is torch.optim.AdamW)
    betas = options.get("betas", (0.9, 0.999))
    return Adam(options["lr"], *betas, 1e-8, decay, sign, decoupled, float(options.get("amsgrad", False)))


def ulps(a, b, *operands):
    """Distance in last places of the largest number that went into the sum."""
    size = torch.stack([x.detach().abs().double() for x in (a, b, *operands)]).amax(0)
    unit = torch.finfo(a.dtype).eps * torch.exp2(torch.floor(torch.log2(size.clamp_min(1e-30))))
    return ((a.double() - b.double()).abs() / unit).max().item()


def check_steps(cls, options, dtype, shapes, steps):
    """Each step from where the stock optimizer stands, parameters and state within `ROOM` of its own."""
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes]
    theirs = [torch.nn.Parameter(p.to(wide, copy=True)) for p in ours]
    options = {**options, "weight_decay": options.get("weight_decay", 0.0)}
    stock = cls.inner(theirs, fused=True, **options)
    vectors = [MaxNorm(1e4).resolve(p.shape, "out_first") for p in ours]
    made, rule = batch_of(ours, vectors), rule_of(cls, options)
    names = ["momentum_buffer"] if cls is ProjectedSGD else ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    states = [[torch.zeros_like(p) for p in ours] for _ in names]
    counters = [torch.zeros((), device=DEVICE) for _ in ours]
    for i in range(steps):
        grads = [torch.randn(p.shape, generator=generator).to(DEVICE, dtype) for p in ours]
        before = [[x.clone() for x in xs] for xs in (ours, *states)]
        starts = np.full((len(ours), 2), float(i == 0))
        table, counts = addresses(ours, grads, *states), addresses(counters)[0]
        made.run(1e4, table, rule, counts, starts)
        for b, g in zip(theirs, grads, strict=True):
            b.grad = g.to(wide, copy=True)
        stock.step()
        for k, (p, b, g) in enumerate(zip(ours, theirs, grads, strict=True)):
            old = [x[k] for x in before]
            assert ulps(p, b, *old, p - old[0]) <= ROOM
            for name, mine in zip(names, states, strict=True):
                if name in stock.state[b]:
                    assert ulps(mine[k], stock.state[b][name], g, *old) <= ROOM, name
                    stock.state[b][name].copy_(mine[k])  # each step is judged by itself
            if "step" in stock.state[b]:
                assert counters[k] == stock.state[b]["step"]
            b.data.copy_(p)


@pytest.mark.parametrize(("cls", "options"), EVERY, ids=IDS)
def test_where_nothing_binds_a_step_is_the_stock_one(cls, options):
    check_steps(cls, options, torch.float32, [(6, 40), (17,)], 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("cls", "options"),
    [EVERY[7], EVERY[13], next(e for e in EVERY if e[1].get("amsgrad") and e[1]["weight_decay"])],
    ids=str,
)
def test_other_dtypes_and_ways_through_memory(cls, options, dtype):
    check_steps(cls, {**options, "lr": 0.1}, dtype, [(6, 40), (17,), (3, 9001), (4, 3, 3, 3)], 3)


@pytest.fixture
def door(monkeypatch):
    """The optimizers' way to the kernels, on a CPU too."""
    if DEVICE.type == "cpu":
        monkeypatch.setitem(path.MACHINES, "cpu", path.MACHINES["cuda"])
    monkeypatch.setattr(batch, "_known", {})


def tensors(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE, dtype)) for s in shapes]
    for p in made:
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE, dtype)
    return made


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize("dtype", NUMPY)
def test_any_optimizer_projects_by_a_kernel(dtype):
    shapes = [(12, 40), (5, 3, 3, 3), (40,), (3, 70)]
    ours, plain = (tensors(shapes, getattr(torch, dtype)) for _ in range(2))
    optimizer, stock = ProjectedRMSprop(ours, lr=0.01, c=1.0), torch.optim.RMSprop(plain, lr=0.01)
    for c in (1.0, 1.0, 0.5):
        optimizer.param_groups[0]["c"] = c
        for p, q in zip(ours, plain, strict=True):
            q.data.copy_(p)
        optimizer.step(), stock.step()
        for p, q in zip(ours, plain, strict=True):
            v = MaxNorm(c).resolve(p.shape, "out_first")
            if v is None:
                assert torch.equal(p, q)
            else:
                judge(columns(q, v), columns(p, v), columns(MaxNorm(c).project(p.detach()), v), c)
    assert [p.name for p in optimizer.projection_path().values()] == ["kernel", "kernel", "eager", "kernel"]
    assert "triton" in str(optimizer.projection_path()["parameter 0 of group 0"])


@pytest.mark.usefixtures("door")
def test_float16_that_rounding_is_too_coarse_for_is_left_to_the_reference():
    c = 0.002  # nearly all weights are subnormal
    (p,) = tensors([(2, 5000)], torch.float16)
    expected = MaxNorm(c).project(p.detach())
    ProjectedSGD([p], lr=0.0, c=c).step()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=0)
    norms = exact_norms(columns(p, MaxNorm(c).resolve(p.shape, "out_first")))
    assert ((norms <= c) & (norms >= c * (1 - 2e-3))).all()


@pytest.mark.usefixtures("door")
@pytest.mark.parametrize(
    ("cls", "options"), [(ProjectedSGD, {"momentum": 0.9, "nesterov": True}), (ProjectedAdamW, {"amsgrad": True})]
)
def test_fused_steps_are_held_and_the_state_goes_to_the_stock_optimizer_and_back(cls, options):
    shapes = [(12, 40), (40,), (3, 70)]
    params, straight = tensors(shapes), tensors(shapes)
    current = cls(params, lr=0.01, c=None, fused=True, **options)
    reference = cls.inner(straight, lr=0.01, fused=True, **options)
    for i in range(5):
        if i in (2, 3):
            other = (cls.inner if i == 2 else cls)(params, lr=0.01, fused=True, **options)
            state = current.state_dict()
            groups = [{k: g[k] for k in g if k in other.param_groups[0]} for g in state["param_groups"]]
            other.load_state_dict({**state, "param_groups": groups})
            current = other
        current.step(), reference.step()
        for p, q in zip(params, straight, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
            assert current.state[p].keys() == reference.state[q].keys()
            q.data.copy_(p)
    assert "fused: one triton kernel" in str(current.projection_path()["parameter 0 of group 0"])
    current.param_groups[0].update(c=1.0, lr=torch.tensor(0.02))
    current.step()
    for p in (params[0], params[2]):
        norms = exact_norms(columns(p, MaxNorm(1.0).resolve(p.shape, "out_first")))
        assert ((norms <= 1) & (norms >= 1 - 1e-5)).all()


@pytest.mark.usefixtures("door")
def test_many_tensors_are_one_launch_and_cut_vectors_one_more(monkeypatch):
    launched = []

    class Counting:
        def __getitem__(self, grid):
            launched.append(grid)
            return step[grid]

    step = gpu.step
    monkeypatch.setattr(gpu, "step", Counting())
    params = tensors([(2, 16), (2, 64), (16,)] * 10 + [(16, 4, 3, 8)])
    ProjectedSGD(params, lr=0.1, momentum=0.9, c=1.0, fused=True).step()
    assert len(launched) == 1
    ProjectedSGD([*params, *tensors([(1, 16000)])], lr=0.1, c=1.0).step()
    assert len(launched) == 3


@pytest.mark.skipif(DEVICE.type != "cuda", reason="there is no GPU")
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize(("cls", "options"), [(ProjectedSGD, {"momentum": 0.9}), (ProjectedAdam, {"capturable": True})])
def test_no_step_waits_and_a_captured_step_is_the_same(cls, options, fused):
    shapes = [(12, 40), (40,), (3, 9001), (20, 3, 3, 3)]
    params, twins = tensors(shapes), tensors(shapes)
    ours, twin = (cls(x, lr=0.01, c=1.0, fused=fused, **options) for x in (params, twins))
    for _ in range(2):
        ours.step(), twin.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step(), twin.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for _ in range(3):
        graph.replay()
        twin.step()
    for p in twins:  # an ordinary step elsewhere leaves the graph alone
        p.grad = p.grad.clone()
    twin.step()
    graph.replay()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


COMPILE = """
import numpy as np, torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from projgd import MaxNorm
from projgd.torch import path
from projgd.torch.kernels import gpu, gpu_batch
from projgd.torch.kernels.rules import Adam, Sgd

class H100:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

class Compiled:  # launches nothing
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(*args, **options):
            made = self.kernel.warmup(*args, grid=grid, **options)
            assert len(made.asm["cubin"]) > 1000
            wide = [made.asm["ptx"].count(f"{x}.global.v4") for x in ("ld", "st")]
            print(options.get("RULE"), options.get("ALIGNED"), *wide)
        return run

driver.set_active(H100())
gpu.step, gpu.count = Compiled(gpu.step), Compiled(gpu.count)
for dtype, rule, shape in (
    (torch.float32, Adam(1e-3, 0.9, 0.999, 1e-8, 0.1, 1.0, 1.0, 1.0), (2, 16384)),
    (torch.bfloat16, Sgd(0.1, 0.9, 1.0, 0.1, 1.0, 0.0), (16, 64)),
    (torch.float16, None, (7, 5)),
):
    p = torch.zeros(shape, dtype=dtype)
    table = np.array([[p.data_ptr()]] * 5)
    batch = gpu_batch.Batch([path.memory(p)], [MaxNorm(1.0).resolve(p.shape, "out_first")])
    batch.run(1.0, table, rule, table[0], np.zeros((1, 2)))
"""


def test_the_kernels_compile_for_an_h100_and_read_sixteen_bytes_at_a_time(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["None", "adam", "project", "sgd", "project"]  # the first counts steps
    for rule, aligned, loads, stores in lines[1:]:
        assert (int(loads) >= 4 and int(stores) >= 4) == (aligned == "True"), rule
