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
from projgd.torch import ProjectedSGD
from projgd.torch.kernels import plan
from projgd.torch.kernels.rules import Adam, Sgd
from tests.contract import NUMPY, TIGHT, exact_norms, judge
from tests.torch.option_sets import EVERY, IDS

pytest.importorskip("triton")
from projgd.torch.kernels import gpu_batch

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
    layouts = [plan.layout_of(p.shape, p.stride(), v) for p, v in zip(params, vectors, strict=True)]
    return gpu_batch.Batch(params[0].dtype, DEVICE, layouts, [v is None for v in vectors])


def limits_of(params, vectors, c):
    limits = np.full((len(params), 2), np.inf)
    for i, (p, v) in enumerate(zip(params, vectors, strict=True)):
        if v is not None:
            bands = projections.ball_limits(projections.float_type(p), v.shape, v.axes, c, np)
            limits[i] = bands.threshold, bands.target
    return limits


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
    batch, limits = batch_of(params, vectors), limits_of(params, vectors, c)
    batch.run(limits, addresses(params))
    after = [p.clone() for p in params]
    batch.run(limits, addresses(params))
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
    vectors = [MaxNorm(1.0).resolve(p.shape, "out_first")]
    before = columns(p, vectors[0])
    batch, limits = batch_of([p], vectors), limits_of([p], vectors, 1.0)
    batch.run(limits, addresses([p]))
    after = columns(p, vectors[0])
    batch.run(limits, addresses([p]))
    judge(before, after, columns(p, vectors[0]), 1.0)


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
    batch, limits = batch_of([p], vectors), limits_of([p], vectors, c)
    batch.run(limits, addresses([p]))
    after = columns(p, vectors[0])
    batch.run(limits, addresses([p]))
    judge(columns(x, vectors[0]), after, columns(p, vectors[0]), c)


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
    batch, limits = batch_of([p], vectors), limits_of([p], vectors, c)
    batch.run(limits, addresses([p]))
    after = columns(p, vectors[0])
    batch.run(limits, addresses([p]))
    judge(before, after, columns(p, vectors[0]), c)


def test_c_moves_and_what_is_not_aligned_is_projected_too():
    for first in (0, 1):
        p = torch.randn(1 + 12 * 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)[first:][: 12 * 64]
        p = p.view(12, 64)
        vectors = [MaxNorm(1.0).resolve(p.shape, "out_first")]
        batch = batch_of([p], vectors)
        for c in (4.0, 1.0, 0.25):
            batch.run(limits_of([p], vectors, c), addresses([p]))
            norms = exact_norms(columns(p, vectors[0]))
            assert (norms <= c).all()
            assert (norms >= c * (1 - 1e-5)).all()


def test_squares_that_overflow_do_not_concern_a_free_tensor():
    p = torch.full((64,), 1e300, dtype=torch.float64, device=DEVICE)
    batch_of([p], [None]).run(limits_of([p], [None], 1.0), addresses([p]))
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
    batch_of(params, vectors).run(limits_of(params, vectors, 1.0), addresses(params))
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
    batch, rule = batch_of(ours, vectors), rule_of(cls, options)
    names = ["momentum_buffer"] if cls is ProjectedSGD else ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]
    states = [[torch.zeros_like(p) for p in ours] for _ in names]
    counters = [torch.zeros((), device=DEVICE) for _ in ours]
    for i in range(steps):
        grads = [torch.randn(p.shape, generator=generator).to(DEVICE, dtype) for p in ours]
        before = [[x.clone() for x in xs] for xs in (ours, *states)]
        starts = np.full(len(ours), i == 0)
        table, counts = addresses(ours, grads, *states), addresses(counters)[0]
        batch.run(limits_of(ours, vectors, 1e4), table, rule, counts, starts)
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


COMPILE = """
import sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from projgd.torch.kernels import gpu, gpu_batch

tables = {"layouts": "*i64", "live": "*i64", "factors": "*fp64", "tiles": "*i64", "left": "*fp64", "n": "i32"}
for dtype, rule, second in (
    (tl.float32, "adam", False), (tl.bfloat16, "sgd", False), (tl.float16, "project", False),
    (tl.float32, "project", True)
):
    flags = {"DTYPE": dtype, "RULE": rule, "DECAY": True, "EXTRA": True, "ALIGNED": True, "SECOND": second}
    flags["BLOCKS"] = gpu_batch.BLOCKS
    wide = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    source = ASTSource(gpu.step, {**tables, **dict.fromkeys(flags, "constexpr")}, flags, wide)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(made.asm["cubin"]) > 1000
    print(rule, made.asm["ptx"].count("ld.global.v4"), made.asm["ptx"].count("st.global.v4"))
source = ASTSource(gpu.count, {"live": "*i64", "factors": "*fp64", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 128})
assert len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 1000
"""


def test_the_kernels_compile_for_an_h100_and_read_sixteen_bytes_at_a_time(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        _, loads, stores = line.split()
        assert int(loads) >= 4
        assert int(stores) >= 4
