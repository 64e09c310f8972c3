"""Engine x set x dtype x shape, generated from the table of engines, with one judge in exact arithmetic.

Each tensor holds vectors inside, at, just above and far above the bound, and huge, tiny, zero and broken ones.
"""

import importlib.util

import numpy as np
import pytest
import torch

from projgd import MaxNorm, MinMaxNorm, Sphere, Split, UnitNorm, projections, sums
from projgd.torch import ProjectedSGD
from projgd.torch.engines import eager
from projgd.torch.engines.base import Job
from projgd.torch.routing import ENGINES, NAMES
from tests.contract import NUMPY, TIGHT, judge_norms

SETS = {
    "MaxNorm": lambda axis: MaxNorm(1.0, axis),
    "UnitNorm": lambda axis: UnitNorm(axis),
    "Sphere": lambda axis: Sphere(1.25, axis),
    "initial": lambda axis: Sphere("initial", axis),
    "MinMaxNorm": lambda axis: MinMaxNorm(0.5, 1.0, axis=axis),
}
SHAPES = {
    "rows of 1": ((20, 1), "fan_in"),
    "rows of 3": ((20, 3), "fan_in"),
    "rows of 147": ((20, 3, 7, 7), "fan_in"),
    "rows of 1031": ((20, 1031), "fan_in"),
    "channels last": ((20, 5, 3, 3), "fan_in"),
    "columns": ((6, 20), 0),
    "one vector": ((20, 6), None),
    "blocks": ((20, 6), Split(0, 2, (1, 2))),
    "transposed": ((20, 9), "fan_in"),
    "sliced": ((20, 9), "fan_in"),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LARGEST = {torch.float64: 1e300, torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 6e4}


def options(engine):
    """What makes an optimizer use this engine, as far as it can be asked for."""
    steps = {"fused": True} if engine in ("cpu", "triton") else {}
    return {**steps, **({"engine": engine} if engine in NAMES else {})}


def tensor(shape, layout, dtype, axis, finite):
    """A parameter whose vectors are all that a projection must tell apart."""
    generator = torch.Generator().manual_seed(len(shape) * 31 + shape[-1])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    vectors = MaxNorm(1.0, axis).resolve(tuple(shape), "out_first")
    rows = as_rows(x, vectors)
    rows /= rows.norm(dim=1, keepdim=True)
    unit = sums.FLOATS[str(dtype).removeprefix("torch.")].unit
    norms = [0.3, 0.75, 1 - 3 * TIGHT[str(dtype).removeprefix("torch.")], 1 - unit, 1.0, 1 + unit, 1 + 4 * unit]
    norms += [1.01, 1.5, 40.0]
    rows *= torch.tensor([norms[i % len(norms)] for i in range(len(rows))], dtype=torch.float64)[:, None]
    if len(rows) > 15:
        rows[10:12] *= LARGEST[dtype] / (30 if finite else 1) / rows[10:12].abs().max()
        rows[12] *= 1e-4 if dtype == torch.float16 else 1e-25
        if not finite:
            rows[13], rows[14, 0], rows[15, -1] = 0.0, torch.nan, -torch.inf
    x = from_rows(rows, vectors, shape).to(dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "sliced":
        x = torch.cat([x, x], dim=-1)[..., : shape[-1]]
    return x, vectors


def as_rows(x, vectors):
    kept = [a for a in range(len(vectors.shape)) if a not in vectors.axes]
    return x.reshape(vectors.shape).permute(*kept, *vectors.axes).reshape(-1, vectors.length)


def from_rows(rows, vectors, shape):
    kept = [a for a in range(len(vectors.shape)) if a not in vectors.axes]
    order = [*kept, *vectors.axes]
    x = rows.reshape([vectors.shape[a] for a in order]).permute([order.index(a) for a in range(len(order))])
    return x.reshape(shape)


def columns(x, vectors):
    rows = as_rows(x.detach(), vectors).contiguous()
    numpy = rows.view({8: torch.int64, 4: torch.int32, 2: torch.int16}[rows.element_size()]).numpy()
    return numpy.view(NUMPY[str(x.dtype).removeprefix("torch.")]).T


def step(optimizer, p):
    p.grad = torch.zeros_like(p)
    optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("engine", [e.name for e in ENGINES if e.name in ("cpu", "eager", "reference")])
def test_every_engine_keeps_the_contract(engine, name, layout, dtype):
    if engine == "cpu" and importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    shape, axis = SHAPES[layout]
    made = SETS[name](axis)
    x, vectors = tensor(shape, layout, dtype, axis, finite=name == "initial")
    p = torch.nn.Parameter(x)
    try:
        optimizer = ProjectedSGD([p], lr=0.1, constraint=made, **options(engine))
    except ValueError as error:
        if f"engine={engine!r} cannot take" not in str(error):
            raise
        optimizer = ProjectedSGD([p], lr=0.1, constraint=made)
        assert optimizer.routes()["parameter 0 of group 0"].engine in NAMES
    start = columns(p, vectors).copy()
    if name == "initial":
        with torch.no_grad():
            p.mul_(0.5)
        start = columns(p, vectors).copy()
    step(optimizer, p)
    moved = columns(p, vectors).copy()
    low, high = made.edges() if name != "initial" else (sums.norm(start.astype(float), (0,))[0] * 2,) * 2
    judge_norms(start, moved, np.asarray(low), np.asarray(high))
    step(optimizer, p)
    if low is not high and name in ("MaxNorm", "MinMaxNorm"):
        again = np.asarray(columns(p, vectors), np.float64)
        assert np.array_equal(again, np.asarray(moved, np.float64), equal_nan=True), "idempotent"


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_step_keeps_the_contract(name, dtype):
    torch.compiler.reset()
    x, vectors = tensor((20, 147), "rows", dtype, "fan_in", finite=True)
    p = torch.nn.Parameter(x)
    optimizer = ProjectedSGD([p], lr=0.1, constraint=SETS[name]("fan_in"))
    start = columns(p, vectors).copy()
    p.grad = torch.zeros_like(p)
    torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()
    low, high = SETS[name]("fan_in").edges() if name != "initial" else (sums.norm(start.astype(float), (0,))[0],) * 2
    judge_norms(start, columns(p, vectors), np.asarray(low), np.asarray(high))
    assert optimizer.routes(compiled=True)["parameter 0 of group 0"].engine == "graph"


@pytest.mark.parametrize("name", [n for n in SETS if n != "initial"])
def test_the_form_without_branches_keeps_the_contract(name):
    """What runs on a GPU, on a CPU."""
    made = SETS[name]("fan_in")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, vectors = tensor((20, 147), "rows", dtype, "fan_in", finite=False)
        p = x.clone()
        skip = torch.zeros(())
        for skipped in (True, False):
            skip.fill_(skipped)
            eager.project_without_branch_(p, Job(torch.optim.SGD([p], 0.1), torch.optim.SGD, {}, made, skip=skip))
            if skipped:
                assert torch.equal(p.nan_to_num(7.0), x.nan_to_num(7.0)), "skip ignored"
        judge_norms(columns(x, vectors), columns(p, vectors), *map(np.asarray, made.edges()))


@pytest.mark.parametrize("name", ["MaxNorm", "MinMaxNorm", "UnitNorm"])
@pytest.mark.parametrize("engine", ["cpu", "eager"])
def test_large_and_many_small_parameters(engine, name):
    """Pieces, vectors that threads share, and stacks: the right factor for every row."""
    if engine == "cpu":
        pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 70_000), (2 * eager.PIECE // 1000 + 7, 1000), *[(5 + i % 3, 12) for i in range(40)], (64, 64), (9,)]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    for p in params:
        if p.ndim > 1:
            p *= torch.linspace(0.2, 2.5, len(p))[:, None] / p.norm(dim=1, keepdim=True)
    params = [torch.nn.Parameter(p) for p in params]
    starts = [p.detach().clone() for p in params]
    made = SETS[name]("fan_in")
    optimizer = ProjectedSGD(params, lr=0.0, constraint=made, fused=engine == "cpu")
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, start in zip(params, starts, strict=True):
        vectors = made.resolve(tuple(p.shape), "out_first")
        if vectors is None:
            assert torch.equal(p, start)
            continue
        judge_norms(columns(start, vectors), columns(p, vectors), *map(np.asarray, made.edges()))
    assert {c.engine for name, c in optimizer.routes().items()} <= {engine, "free", "cpu"}


@pytest.mark.parametrize("engine", ["cpu", "eager", "reference"])
def test_c_moves_and_a_rate_below_one_goes_part_of_the_way(engine):
    if engine == "cpu":
        pytest.importorskip("numba")
    p = torch.nn.Parameter(torch.full((4, 9), 2.0))
    optimizer = ProjectedSGD([p], lr=0.1, c=4.0, **options(engine))
    for c in (4.0, 2.0, 3.0, 1e-3):
        optimizer.param_groups[0]["c"] = c
        step(optimizer, p)
        assert float(p.detach().double().norm(dim=1).max()) <= c
    p = torch.nn.Parameter(torch.full((4, 9), 2.0))
    part = ProjectedSGD([p], lr=0.1, constraint=MinMaxNorm(1.0, 2.0, rate=0.25), **options(engine))
    step(part, p)
    np.testing.assert_allclose(p.detach().norm(dim=1).numpy(), 0.75 * 6 + 0.25 * 2, rtol=1e-5)


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


def test_the_reference_is_the_formula():
    x = np.random.default_rng(0).standard_normal((7, 30)) * np.linspace(0.1, 2, 30)
    q = projections.project_band(x, MaxNorm(1.0).band(sums.FLOATS["float64"], MaxNorm(1.0, 0).vectors(x)), (0,))
    np.testing.assert_allclose(q, x * np.minimum(1, 1 / np.linalg.norm(x, axis=0)), rtol=1e-12)
