"""The contract: engine x set x dtype x layout, generated from the table of engines, with one judge in exact arithmetic.

Each tensor holds vectors inside, at, just above and far above the bound, and huge, tiny, zero and broken ones. Vectors
that are spread over ranks go through the same cases in `test_ranks.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import projgd.constraints
from projgd import MaxNorm, MinMaxNorm, Sphere, Split, UnitNorm, sums
from projgd.axes import Vectors
from projgd.constraints import NormSet
from projgd.torch import ProjectedAdam, ProjectedSGD
from projgd.torch.engines import eager
from projgd.torch.engines.base import Job
from projgd.torch.routing import ENGINES, NAMES
from tests.contract import NUMPY, TIGHT, at_the_threshold, bits, exact_norms, judge_at_the_threshold, judge_norms
from tests.torch.common import SHORT, columns, rows_of, tensor_of

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # 0 · inf, which Triton then drops
SETS = {
    "MaxNorm": lambda axis: MaxNorm(1.0, axis),
    "UnitNorm": lambda axis: UnitNorm(axis),
    "Sphere": lambda axis: Sphere(1.25, axis),
    "initial": lambda axis: Sphere("initial", axis),
    "MinMaxNorm": lambda axis: MinMaxNorm(0.5, 1.0, axis=axis),
    "relative": lambda axis: MaxNorm.relative(0.75, axis),
}


def is_fine(set_, dtype):
    """Whether no vector is so short that float16 is rounded entry by entry, as multiples of tiny initial norms are."""
    return (set_, dtype) != ("relative", torch.float16)


FROM_START = ("initial", "relative")
"""Sets that take norms from the initial weights."""

LAYOUTS = {
    "rows of 1": ((20, 1), "fan_in"),
    "rows of 3": ((20, 3), "fan_in"),
    "rows of 147": ((20, 3, 7, 7), "fan_in"),
    "rows of 1031": ((20, 1031), "fan_in"),
    "channels last": ((20, 5, 3, 3), "fan_in"),
    "blocks": ((20, 6), Split(0, 2, (1, 2))),
    "one vector": ((20, 6), None),
    "columns": ((6, 20), 0),
    "transposed": ((20, 9), "fan_in"),
    "sliced": ((20, 9), "fan_in"),
}
ARE_ROWS = tuple(LAYOUTS)[:7]  # of memory, one after the other
SHOWN = {
    "graph": ("rows of 147", "sliced"),  # each parameter takes half a second to compile
    "triton": tuple(at for at in ARE_ROWS if at != "rows of 1031"),  # interpreted; longer rows are in another test
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SUBNORMAL = {torch.float64: 1e-310, torch.float32: 1e-40, torch.bfloat16: 1e-40, torch.float16: 5e-7}
LARGEST = {torch.float64: 1e300, torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 6e4}


@dataclass(frozen=True)
class Way:
    """How a step comes to an engine, and what that engine takes."""

    engine: str
    takes: Callable[[str, str, torch.dtype], bool]
    made: Any = ProjectedSGD
    options: dict[str, Any] = field(default_factory=dict)
    step: Callable[[Any], None] = lambda optimizer: optimizer.step()

    @property
    def device(self):
        """Triton's kernel is interpreted where there is no GPU."""
        return "cuda" if self.engine == "triton" and torch.cuda.is_available() else "cpu"


def compiled(optimizer):
    torch.compiler.reset()
    torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")()


WAYS = {
    way.engine if "metric" not in way.options or way.engine == "diagonal" else f"{way.engine} in a metric": way
    for way in (
        Way("cpu", lambda s, at, d: d is torch.float32 and at in ARE_ROWS, options={"fused": True}),
        Way(
            "cpu",
            lambda s, at, d: s in ("MaxNorm", "relative") and d is torch.float32 and at in ARE_ROWS,
            made=ProjectedAdam,
            options={"fused": True, "metric": "adaptive"},
        ),
        Way(
            "triton",
            lambda s, at, d: d is not torch.float64 and at in ARE_ROWS and is_fine(s, d),
            options={"fused": True},
        ),
        Way("graph", lambda s, at, d: d is not torch.float64, step=compiled),
        Way("rows", lambda s, at, d: s not in FROM_START and at not in ("blocks", "one vector", "columns")),
        Way(
            "diagonal",
            lambda s, at, d: s == "MaxNorm" and d is not torch.float64 and at in ARE_ROWS and at != "channels last",
            made=ProjectedAdam,
            options={"metric": "adaptive"},
        ),
        Way("eager", lambda s, at, d: d is not torch.float64 and is_fine(s, d)),
        Way("reference", lambda s, at, d: True),
    )
}
FORCED = {name: {"engine": way.engine} if way.engine in NAMES else {} for name, way in WAYS.items()}


def cases():
    """Way, set and dtypes: one graph has both, because compiling it takes longer than to run all other cases."""
    for name, way in WAYS.items():
        for dtypes in [[torch.float32, torch.bfloat16]] if name == "graph" else [[d] for d in DTYPES]:
            for set_ in SETS:
                if any(way.takes(set_, at, d) for at in LAYOUTS for d in dtypes):
                    yield pytest.param(name, set_, dtypes, id="-".join([name, set_, *map(short, dtypes)]))


def short(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(autouse=True)
def _has_what_it_needs(request):
    """Skip where numba or Triton is missing."""
    called = getattr(request.node, "callspec", None)
    way = called.params.get("way", "") if called else ""
    if way.startswith("cpu"):
        pytest.importorskip("numba")
    if way == "triton":
        pytest.importorskip("triton")
        request.getfixturevalue("rounds_to_bfloat16")


def laid_out_as(x, values, device=None):
    """A tensor that lies in memory as x does, gaps included."""
    empty = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device or x.device)
    return empty.copy_(torch.as_tensor(values, dtype=x.dtype))


def weights(layout, dtype, has_radii=False, is_usual=False):
    """A tensor whose vectors are all that a projection must tell apart, and the vectors.

    Args:
        has_radii: whether the vectors are those that radii are taken from, so that all must have a norm.
        is_usual: whether these radii have squares in float32, which the engine asks for.
    """
    shape, axis = LAYOUTS[layout]
    generator = torch.Generator().manual_seed(len(shape) * 31 + shape[-1])
    vectors = MaxNorm(1.0, axis).resolve(tuple(shape), "out_first")
    rows = rows_of(torch.randn(shape, generator=generator, dtype=torch.float64), vectors)
    rows /= rows.norm(dim=1, keepdim=True)
    unit, t = sums.FLOATS[short(dtype)].unit, TIGHT[short(dtype)]
    norms = [0.3, 0.75, 1 - 3 * t, 1 - unit, 1.0, 1 + unit, 1 + 4 * unit, 1.01, 1.5, 40.0]
    rows *= torch.tensor([norms[i % len(norms)] for i in range(len(rows))], dtype=torch.float64)[:, None]
    if vectors.length > 1:
        rows[0, -1] = SUBNORMAL[dtype]  # beside others in a vector that stays, where its bits must stay, too
    if len(rows) > 15:
        largest = LARGEST[dtype] / (30 if has_radii else 1)
        rows[10:12] *= (min(largest, 1e12) if has_radii and is_usual else largest) / rows[10:12].abs().max()
        rows[12] *= 1e-4 if dtype == torch.float16 else 1e-8 if has_radii and is_usual else 1e-25
        if not has_radii:
            rows[13], rows[14, 0], rows[15, -1] = 0.0, torch.nan, -torch.inf
    x = tensor_of(rows, vectors, shape).to(dtype)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        x = x.t().contiguous().t()
    elif layout == "sliced":
        x = torch.cat([x, x], dim=-1)[..., : shape[-1]]
    return x, vectors


def move_rows(optimizer, params, targets):
    """A step with sparse gradients that takes rows of zeros, which the engine knows to lie in the set, to `targets`."""
    for sparse in (False, True):
        for p, x in zip(params, targets, strict=True):
            index = torch.arange(len(x) if sparse else 0)[None]
            p.grad = torch.sparse_coo_tensor(index, -x[: index.numel()], x.shape, check_invariants=False)
        assert set(engines(optimizer)) <= {"rows", "free"}
        optimizer.step()
    for p in params:  # once more, without moving
        p.grad = torch.sparse_coo_tensor(torch.arange(len(p))[None], torch.zeros_like(p), p.shape)


def without_a_set(name, params, made):
    """The columns that the same step leaves without a set: it may give NaN other bits."""
    way, plain = WAYS[name], [torch.nn.Parameter(laid_out_as(p, p.detach())) for p in params]
    optimizer = way.made(plain, lr=1.0, **way.options, **FORCED[name])
    if name == "rows":
        move_rows(optimizer, plain, [x for x, _ in made])
    else:
        for p in plain:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return [columns(p, v).copy() for p, (_, v) in zip(plain, made, strict=True)]


def engines(optimizer, **options):
    return [choice.engine for choice in optimizer.routes(**options).values()]


@pytest.mark.parametrize(("way", "set_", "dtypes"), list(cases()))
def test_every_engine_keeps_the_contract(way, set_, dtypes):
    """Held, tight, untouched, idempotent; nothing laundered; no over- or underflow; memory laid out as before."""
    name, way = way, WAYS[way]
    taken = [(layout, d) for d in dtypes for layout in SHOWN.get(name, LAYOUTS) if way.takes(set_, layout, d)]
    made = [weights(layout, d, set_ in FROM_START, name == "eager") for layout, d in taken]
    params = [torch.nn.Parameter(laid_out_as(x, 0 if name == "rows" else x, way.device)) for x, _ in made]
    groups = [
        {"params": [p], "constraint": SETS[set_](LAYOUTS[layout][1])}
        for (layout, _), p in zip(taken, params, strict=True)
    ]
    optimizer = way.made(groups, lr=1.0, **way.options, **FORCED[name])
    edges = [group["constraint"].edges() for group in groups] if set_ not in FROM_START else []
    with torch.no_grad():
        for p, (x, vectors) in zip(params, made, strict=True) if set_ in FROM_START else []:
            norms = exact_norms(columns(x, vectors))
            edges.append((norms, norms) if set_ == "initial" else (0 * norms, 0.75 * norms))
            rows = rows_of(p.detach().clone(), vectors)
            rows *= torch.tensor([0.5, 4.0], dtype=p.dtype, device=p.device).repeat(len(rows))[: len(rows), None]
            p.copy_(tensor_of(rows, vectors, p.shape))
    before = without_a_set(name, params, made)
    if name == "rows":
        move_rows(optimizer, params, [x for x, _ in made])
    else:
        for p in params:
            p.grad = torch.zeros_like(p)
        assert set(engines(optimizer, compiled=name == "graph")) == {way.engine}
        way.step(optimizer)
    after = [columns(p, v).copy() for p, (_, v) in zip(params, made, strict=True)]
    way.step(optimizer)
    for where, p, (x, v), w, q, (low, high) in zip(taken, params, made, before, after, edges, strict=True):
        assert p.stride() == x.stride(), where
        try:
            judge_norms(w, q, np.asarray(low), np.asarray(high), columns(p, v))
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error


@pytest.mark.parametrize("way", WAYS)
def test_what_an_engine_does_not_take_goes_to_another(way):
    name, way = way, WAYS[way]
    for set_ in SETS:
        for layout, dtype in [
            (a, d) for a in LAYOUTS for d in DTYPES if is_fine(set_, d) and not way.takes(set_, a, d)
        ]:
            p = torch.nn.Parameter(weights(layout, dtype, has_radii=True)[0])
            constraint = SETS[set_](LAYOUTS[layout][1])
            if FORCED[name]:
                with pytest.raises(ValueError, match=f"engine='{way.engine}' cannot take"):
                    way.made([p], constraint=constraint, **way.options, **FORCED[name])
            optimizer = way.made([p], constraint=constraint, **way.options)
            if name == "rows":
                p.grad = torch.zeros_like(p).to_sparse(1)
            assert engines(optimizer, compiled=name == "graph")[0] not in (way.engine, "free"), (set_, layout, dtype)


def test_every_engine_and_every_set_of_norms_is_in_the_matrix():
    assert {way.engine for way in WAYS.values()} | {"ranks"} == {e.name for e in ENGINES}
    known = {v for v in vars(projgd.constraints).values() if isinstance(v, type) and issubclass(v, NormSet)}
    assert {type(made("fan_in")) for made in SETS.values()} == known - {NormSet}


AT_THE_THRESHOLD = {
    "cpu": ["float32"],
    "cpu in a metric": ["float32"],
    "triton": ["float32"],
    "diagonal": ["float32"],
    "eager": ["float32", "bfloat16"],
    "reference": list(NUMPY),
}


@pytest.mark.parametrize("way", AT_THE_THRESHOLD)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_threshold_belongs_to_what_stays(way, data):
    w, c = data.draw(at_the_threshold(AT_THE_THRESHOLD[way]))
    name, way = way, WAYS[way]
    p = torch.tensor(w.astype(np.float64).T).to(way.device, getattr(torch, w.dtype.name)).contiguous()
    p = torch.nn.Parameter(p)
    p.grad = torch.zeros_like(p)
    optimizer = way.made([p], lr=0.1, c=c, **way.options, **FORCED[name])
    assert engines(optimizer) == [way.engine]
    optimizer.step()
    judge_at_the_threshold(w, columns(p, MaxNorm(1.0).vectors(p)), c)


@pytest.mark.parametrize("way", [name for name in AT_THE_THRESHOLD if "metric" not in WAYS[name].options])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_lower_threshold_belongs_to_what_stays_too(way, data):
    w, _ = data.draw(at_the_threshold(AT_THE_THRESHOLD[way]))
    threshold, kind = float(exact_norms(w)[0]), sums.FLOATS[w.dtype.name]
    share = 1 + sums.guard(kind, Vectors(w.shape, (0,)))
    near = threshold / share
    low = next(x for x in (near, math.nextafter(near, 0), math.nextafter(near, math.inf)) if x * share == threshold)
    name, way = way, WAYS[way]
    p = torch.tensor(w.astype(np.float64).T).to(way.device, getattr(torch, w.dtype.name)).contiguous()
    p = torch.nn.Parameter(p)
    p.grad = torch.zeros_like(p)
    constraint = MinMaxNorm(low, 1e3 * low)
    way.made([p], lr=0.1, constraint=constraint, **way.options, **FORCED[name]).step()
    q = columns(p, constraint.vectors(p))
    assert (bits(q)[:, :2] == bits(w)[:, :2]).all(), "a vector at the threshold moved"
    judge_norms(w, q, low, 1e3 * low, q)


@pytest.mark.parametrize("set_", ["MaxNorm", "MinMaxNorm", "UnitNorm"])
@pytest.mark.parametrize("way", ["cpu", "triton", "eager"])
def test_large_and_many_small_parameters(way, set_):
    """Long vectors of equal entries, pieces, vectors that several threads share, stacks: every row has its factor."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 20_003), *[(5 + i % 3, 12) for i in range(10)], (64, 64), (9,)]
    if way != "triton":
        shapes += [(eager.PIECE // 1000 + 7 if way == "eager" else 200, 1000), (3, 140_000)]
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    params[0].fill_(0.1)  # added one after the other, their squares are off by thousands of units
    for p in params:
        if p.ndim > 1:
            p *= torch.linspace(0.2, 2.5, len(p))[:, None] / p.double().norm(dim=1, keepdim=True)
    params = [torch.nn.Parameter(p.to(WAYS[way].device)) for p in params]
    starts, made = [p.detach().clone() for p in params], SETS[set_]("fan_in")
    optimizer = ProjectedSGD(params, lr=0.0, constraint=made, **WAYS[way].options, **FORCED[way])
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, start in zip(params, starts, strict=True):
        vectors = made.resolve(tuple(p.shape), "out_first")
        if vectors is None:
            assert torch.equal(p, start)
        else:
            judge_norms(columns(start, vectors), columns(p, vectors), *map(np.asarray, made.edges()))
    assert set(engines(optimizer)) <= {way, "free"}


@pytest.mark.parametrize("way", ["cpu", "triton", "graph", "eager", "reference"])
def test_a_rate_below_one_goes_part_of_the_way(way):
    """In every engine but those that refuse such a set, and those that hand it on to another one."""
    name, way = way, WAYS[way]
    p = torch.nn.Parameter(torch.full((4, 9), 2.0, device=way.device))
    p.grad = torch.zeros_like(p)
    optimizer = ProjectedSGD([p], constraint=MinMaxNorm(1.0, 2.0, rate=0.25), **way.options, **FORCED[name])
    way.step(optimizer)
    np.testing.assert_allclose(exact_norms(p.detach().cpu().numpy().T), 0.75 * 6 + 0.25 * 2, rtol=1e-5)


@pytest.mark.parametrize("set_", [n for n in SETS if n not in FROM_START])
def test_the_form_without_branches_keeps_the_contract(set_):
    """What runs on a GPU, on a CPU; where GradScaler skips the step it changes nothing."""
    made = SETS[set_]("fan_in")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, vectors = weights("rows of 147", dtype)
        p, skip = x.clone(), torch.ones(())
        job = Job(torch.optim.SGD([p], 0.1), torch.optim.SGD, {}, made, skip=skip)
        eager.project_without_branch_(p, job)
        assert torch.equal(p.view(SHORT[p.element_size()]), x.view(SHORT[p.element_size()])), "skip ignored"
        skip.fill_(0)
        eager.project_without_branch_(p, job)
        judge_norms(columns(x, vectors), columns(p, vectors), *map(np.asarray, made.edges()))
