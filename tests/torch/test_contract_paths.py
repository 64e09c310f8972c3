"""The contract on every way through a Projected optimizer: default, foreach, fused, compiled; and from hard starts."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from projgd import MaxNorm, projections
from projgd.axes import Vectors
from projgd.torch import ProjectedAdam, ProjectedSGD, ball, path, project_after_step
from tests.contract import (
    NUMPY,
    TIGHT,
    at_the_threshold,
    bits,
    check,
    columns,
    exact_norms,
    judge,
    judge_at_the_threshold,
)

WAYS = {"default": {}, "foreach": {"foreach": True}, "fused": {"fused": True}}
SHAPES = [(12, 1), (12, 7), (12, 3, 5, 5), (12, 400)]
C = 3.7


@pytest.fixture(params=["numba", "no-numba"])
def machine(request, monkeypatch):
    """With the kernels and without, as far as numba goes: the operations of PyTorch hold the contract, too."""
    if request.param == "no-numba":
        monkeypatch.setattr(path, "_machine", lambda kind: path.Path("eager", "numba is not installed"))


def make(shape, dtype):
    """Vectors of all lengths about the bound, a huge, a zero and two broken ones; and those that need no reference."""
    x = np.random.default_rng(0).standard_normal(shape).reshape(12, -1)
    t = TIGHT[dtype]
    x *= (
        C
        * np.array([1, 1e-3, 0.5, 1 - 3 * t, 1 - t / 9, 1, 1 + t / 9, 1.5, 5, 0, 1, 1])[:, None]
        / exact_norms(x.T)[:, None]
    )
    x[0] *= {"float16": 1e3, "float64": 1e300}.get(dtype, 1e30)
    x[10, 0], x[11, -1] = np.nan, -np.inf
    whole = torch.from_numpy(x.reshape(shape)).to(getattr(torch, dtype))
    return [torch.nn.Parameter(whole), torch.nn.Parameter(whole[1:10].clone())]


def parameter(w):
    """The columns of `w` as the rows of a parameter with the same bits."""
    ints = torch.from_numpy(np.ascontiguousarray(w.T).view(f"int{8 * w.itemsize}").copy())
    return torch.nn.Parameter(ints.view(getattr(torch, w.dtype.name)))


def stored(p):
    """The vectors of `p` as columns of the NumPy array with the same bits."""
    dtype = str(p.dtype).removeprefix("torch.")
    ints = p.detach().contiguous().view(getattr(torch, f"int{8 * p.element_size()}"))
    return ints.numpy().view(NUMPY[dtype]).reshape(p.shape[0], -1).T.copy()


def give_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (g / g[0].numel() ** 0.5).to(p.dtype)
        p.grad[:2] = 0


def check_steps(made, dtypes, shapes, options, compiled=False):
    """Every step of `made` with a bound, judged against the same step without one."""
    free, held = ([p for s in shapes for dtype in dtypes for p in make(s, dtype)] for _ in range(2))
    plain, ours = made(free, c=None, **options), made(held, c=C, **options)
    steps = [torch.compile(o.step, fullgraph=True) if compiled else o.step for o in (plain, ours)]
    for i in range(3):
        give_grads(free, i)
        give_grads(held, i)
        for step in steps:
            step()
        landed = [stored(p) for p in held]
        with torch.no_grad():
            again = [torch.nn.Parameter(p.clone()) for p in held]
        second = ProjectedSGD(again, lr=0.0, c=C, **{k: v for k, v in options.items() if k in ("foreach", "fused")})
        for p in again:
            p.grad = torch.zeros_like(p)
        second.step()
        for p, q, r in zip(free, landed, again, strict=True):
            judge(stored(p), q, stored(r), C)
        with torch.no_grad():
            for p, q in zip(free, held, strict=True):
                p.copy_(q)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", NUMPY)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("made", "options"), [(ProjectedSGD, {"momentum": 0.9}), (ProjectedAdam, {"eps": 1e-4})])
def test_steps(made, options, way, dtype):
    check_steps(made, [dtype], SHAPES, {"lr": 0.1, **options, **WAYS[way]})


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("made", "options"),
    [*((ProjectedSGD, way) for way in WAYS.values()), (ProjectedAdam, {"metric": "adaptive", "eps": 1e-4})],
    ids=[*WAYS, "adaptive"],
)
@given(at_the_threshold())
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_at_the_threshold(made, options, case):
    w, c = case
    p = parameter(w)
    p.grad = torch.zeros_like(p)
    made([p], lr=0.0, c=c, **options).step()
    judge_at_the_threshold(w, stored(p), c)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("options", [*WAYS.values(), {"metric": "adaptive", "eps": 1e-4}], ids=[*WAYS, "adaptive"])
def test_near_the_threshold_beside_a_huge_vector(options, dtype):
    """Which may take another way through the first step than through the second, with norms that differ by a unit."""
    n, rows = 100, 2000
    limits = projections.ball_limits(projections.FLOATS[dtype], (n, rows), (0,), C, np)
    rng = np.random.default_rng(0)
    w = columns(1, n, rows, limits.threshold, "float64") * (
        1 + rng.uniform(-3, 3, rows) * (1 - limits.threshold / C) / 36
    )
    w[:, 0] *= 1e160 if dtype == "float64" else 1e30
    w = w.astype(NUMPY[dtype])
    p = parameter(w)
    p.grad = torch.zeros_like(p)
    optimizer = (ProjectedAdam if "metric" in options else ProjectedSGD)([p], lr=0.0, c=C, **options)
    optimizer.step()
    q = stored(p)
    optimizer.step()
    judge(w, q, stored(p), C)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("n", [1, 40])
def test_where_the_factor_is_subnormal(n, axis, way, dtype):
    w = columns(0, n, 8, 3e38, dtype)
    p = torch.nn.Parameter(parameter(w).detach().T.contiguous() if axis == 0 else parameter(w).detach())
    p.grad = torch.zeros_like(p)
    ProjectedSGD([p], lr=0.0, c=1e-3, axis=axis, **WAYS[way]).step()
    q = stored(p if axis == 1 else p.detach().T)
    judge(w, q, q, 1e-3)


def as_on_cuda(w, c):
    """What a CUDA tensor would get, which needs no CUDA."""
    p = parameter(w).detach()
    vectors = Vectors(tuple(p.shape), (1,))
    ball._branch_free(p, ball.ball_limits(p.dtype, vectors, c), vectors.axes)
    return stored(p)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_way_of_cuda(dtype):
    t = TIGHT[dtype]
    near = [0.0, 1e-3, 0.5, 1 - 3 * t, 1 - t / 9, 1.0, 1 + t / 9, 1.5, 2e3 if dtype == "float16" else 1e30, 1, 1]
    for n in (1, 333):
        w = columns(n, n, len(near), np.asarray(near) * C, dtype)
        w[0, -2], w[-1, -1] = np.nan, -np.inf
        check(as_on_cuda, w, C)
        if dtype != "float16":
            check(as_on_cuda, columns(0, n, 8, 3e38, dtype), 1e-3)


@given(at_the_threshold(dtypes=["float32", "float16", "bfloat16"]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_at_the_threshold_on_the_way_of_cuda(case):
    w, c = case
    judge_at_the_threshold(w, as_on_cuda(w, c), c)


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 2048, 10**6, 2**21])
def test_blocks_are_no_longer_than_the_guard_allows(n):
    """Squares, sums in any order within a block, roots: no measurement would show that the bound is missed."""
    cpu = pytest.importorskip("projgd.torch.kernels.cpu")
    vectors = Vectors((1, n), (1,))
    for dtype, block, blocks in (("float32", ball.BLOCK, 0), ("float64", cpu.BLOCK, -(-n // cpu.BLOCK))):
        units = (min(n, block) + blocks) / 2 + 1
        assert units * 2.0 ** (-24 if dtype == "float32" else -53) <= projections.guard(
            projections.FLOATS[dtype], vectors.shape, vectors.axes
        )


def test_compiled_steps():
    torch.compiler.reset()  # or the graphs of other tests count against the limit
    check_steps(ProjectedSGD, list(NUMPY), [(12, 7), (12, 3, 5, 5)], {"lr": 0.1}, compiled=True)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"eps": 1e-4}], ids=["momentum", "Adam"])
def test_compiled_steps_of_optimizers_with_states(options):
    torch.compiler.reset()
    made = ProjectedAdam if "eps" in options else ProjectedSGD
    check_steps(made, ["float32"], [(12, 1), (12, 400)], {"lr": 0.1, **options}, compiled=True)


def test_compiled_along_another_axis_while_c_moves():
    """Vectors of several lengths, whose guards differ, and one that has no entry."""
    torch.compiler.reset()
    shapes = [(200, 7), (5, 7), (4, 3, 5), (0, 7)]
    params = [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(0))) for s in shapes]
    optimizer = ProjectedSGD(params, lr=0.1, axis=0, c=1.0)
    step = torch.compile(optimizer.step, fullgraph=True)
    for c in (1.0, 0.9, 0.5, 1e-20):
        optimizer.param_groups[0]["c"] = c
        give_grads(params[:3], 0)
        params[3].grad = torch.zeros(0, 7)
        step()
        for p in params[:3]:
            norms = exact_norms(p.detach().numpy())
            assert (norms <= c).all()
            assert (norms >= c * (1 - TIGHT["float32"])).any()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_long_vectors(way, dtype):
    """Equal entries: what adds them up one after the other is off by thousands of units."""
    w = np.ones((200_003, 2))
    w = (w * (C * np.asarray([1.001, 0.9]) / exact_norms(w))).astype(NUMPY[dtype])
    p = parameter(w)
    p.grad = torch.zeros_like(p)
    ProjectedSGD([p], lr=0.0, c=C, **WAYS[way]).step()
    judge(w, stored(p), stored(p), C)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_far_outside(way, dtype, layout):
    """|p| = 1e6, c = 4: held and tight after the first step already, in the parameter's own memory format."""
    x = torch.randn(9, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x *= 1e6 / torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True)
    p = torch.nn.Parameter(x.to(getattr(torch, dtype)).to(memory_format=layout))
    p.grad = torch.zeros_like(p)
    before, strides = stored(p), p.stride()
    optimizer = ProjectedSGD([p], lr=0.1, c=4.0, **WAYS[way])
    optimizer.step()
    landed = stored(p)
    optimizer.step()
    judge(before, landed, stored(p), 4.0)
    assert p.stride() == strides
    assert p.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3, 3)])
def test_an_expanded_parameter_is_refused(shape):
    p = torch.nn.Parameter(torch.ones(1).expand(shape))
    for use in (
        lambda: ProjectedSGD([("head.weight", p)], lr=0.1, c=1.0),
        lambda: ProjectedSGD([("head.weight", p)], lr=0.1, c=1.0, fused=True),
        lambda: project_after_step(torch.optim.SGD([("head.weight", p)], lr=0.1), MaxNorm(1.0)),
    ):
        with pytest.raises(ValueError, match=r"head\.weight is an expanded tensor \(stride 0\).*contiguous"):
            use()


def test_the_bits_of_subnormal_entries_stay():
    """In vectors that are inside; a step of the stock optimizer keeps them too."""
    for dtype, tiny in (("float32", 1e-40), ("float64", 1e-310), ("bfloat16", 1e-40), ("float16", 5e-7)):
        for options in WAYS.values():
            p = torch.nn.Parameter(torch.tensor([[0.5, tiny, -tiny], [tiny, -0.0, 0.0]], dtype=getattr(torch, dtype)))
            p.grad = torch.zeros_like(p)
            before = stored(p)
            ProjectedSGD([p], lr=0.1, c=4.0, **options).step()
            assert (bits(stored(p)) == bits(before)).all()
