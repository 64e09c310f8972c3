"""One table decides which engine takes a parameter, and what it decided is the report that the user reads."""

import subprocess
import sys

import pytest
import torch

from projgd import Box, MaxNorm, MinMaxNorm, UnitNorm
from projgd.torch import ProjectedAdam, ProjectedRMSprop, ProjectedSGD, ProjectedSparseAdam, project_after_step, routing


@pytest.fixture
def ran(monkeypatch):
    """Which engine has run for which parameter, by its id."""
    found = {}

    def traced(original):
        def run(self, prepared, job, params):
            found.update({id(p): self.name for p in params})
            original(self, prepared, job, params)

        return run

    for cls in map(type, routing.ENGINES):
        monkeypatch.setattr(cls, "run", traced(cls.run))
    return found


def model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(6, 5), torch.nn.ConvTranspose1d(4, 3, 2), torch.nn.Linear(5, 4, dtype=torch.bfloat16)
    )
    return [(name, p) for name, p in net.named_parameters()]


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize(
    "options",
    [
        {"c": 1.0},
        {"constraint": UnitNorm()},
        {"constraint": Box(-1.0, 1.0)},
        {"c": 1.0, "engine": "reference"},
        {"c": 1.0, "metric": "adaptive"},
        {"c": 1.0, "fused": True},
        {"c": 1.0, "fused": True, "metric": "adaptive"},
    ],
    ids=str,
)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_engine_that_runs_is_the_one_that_is_reported(options, scaled, ran):
    named = model()
    if options.get("fused"):
        pytest.importorskip("numba")
    optimizer = ProjectedAdam(named, lr=0.1, **options)
    for _ in range(2):
        if scaled and options.get("fused"):
            optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
        ran.clear()
        routes = optimizer.routes()
        step(optimizer)
        for name, p in named:
            direct = ran.get(id(p), "free")
            assert routes[name].engine == direct, (name, routes[name], direct)
    assert str(routes).count("\n") == len(named) - 1


def test_sparse_gradients_and_compiled_steps_are_reported_too(ran):
    table = torch.nn.Embedding(20, 3, sparse=True)
    optimizer = ProjectedSparseAdam(table.parameters(), lr=0.1, c=1.0)
    table(torch.tensor([1, 2])).sum().backward()
    assert optimizer.routes()["parameter 0 of group 0"].engine == "rows"
    optimizer.step()
    assert ran[id(table.weight)] in ("rows", "eager")
    torch.compiler.reset()
    p = torch.nn.Parameter(torch.ones(4, 3))
    compiled = ProjectedSGD([("w", p)], lr=0.1, c=1.0)
    assert compiled.routes(compiled=True)["w"].engine == "graph"
    assert compiled.routes()["w"].engine == "eager"


def test_a_refusal_is_a_sentence_that_says_why():
    optimizer = ProjectedSGD(model(), lr=0.1, c=1.0)
    choice = optimizer.routes()["0.weight"]
    assert str(choice).startswith("eager (cpu: fused=True was not passed")
    assert optimizer.routes()["0.bias"].engine == "free"
    assert ProjectedSGD(model(), lr=0.1, c=None).routes()["0.weight"].engine == "free"


def test_a_reason_that_the_user_can_do_something_about_comes_last():
    routes = ProjectedRMSprop(model(), lr=0.1, c=1.0).routes()
    assert "not RMSprop" in str(routes["0.weight"])
    assert "float32, not bfloat16" in str(ProjectedSGD(model(), lr=0.1, c=1.0).routes()["2.weight"])
    with pytest.raises(ValueError, match='pass metric="adaptive"'):
        ProjectedAdam(model(), c=1.0, engine="diagonal")


def test_routes_are_made_anew_only_where_something_changed(monkeypatch):
    made = []
    original = routing.make_routes
    monkeypatch.setattr(routing, "make_routes", lambda *args: made.append(1) or original(*args))
    named = model()
    optimizer = ProjectedSGD(named, lr=0.1, momentum=0.9, c=1.0)
    step(optimizer)
    assert len(made) == 1
    for c in (1.1, 1.2):
        optimizer.param_groups[0]["c"], optimizer.param_groups[0]["lr"] = c, 0.2
        step(optimizer)
    assert len(made) == 1
    p = named[0][1]
    p.data = p.data.clone().t().contiguous().t()
    step(optimizer)
    assert len(made) == 2
    optimizer.param_groups[0]["constraint"] = UnitNorm()
    step(optimizer)
    assert len(made) == 3
    for _, q in named:
        q.grad = torch.ones_like(q)
    named[2][1].grad = None
    optimizer.step()
    assert len(made) == 4
    assert float((p.detach().norm(dim=1) - 1).abs().max()) < 1e-6


def test_an_engine_that_cannot_is_refused_when_the_optimizer_is_made():
    with pytest.raises(ValueError, match="engine='fast' is not known: pass one of cpu"):
        ProjectedSGD(model(), lr=0.1, c=1.0, engine="fast")
    with pytest.raises(ValueError, match=r"0\.weight: engine='cpu' cannot take .*: fused=True was not passed"):
        ProjectedSGD(model(), lr=0.1, c=1.0, engine="cpu")
    with pytest.raises(ValueError, match=r"0\.weight: engine='eager' cannot take .* is not a set of norms"):
        ProjectedSGD(model(), lr=0.1, constraint=Box(-1, 1), engine="eager")
    with pytest.raises(ValueError, match=r"0\.weight: engine='eager' cannot take .* autograd follows"):
        ProjectedSGD(model(), lr=0.1, c=1.0, engine="eager", differentiable=True)


def load_stock_state(optimizer, named):
    optimizer.load_state_dict(torch.optim.SGD([p for _, p in named], lr=0.1).state_dict())


def turn_to_float64(optimizer, named):
    named[0][1].data = named[0][1].data.double()


CHANGES = {
    "a stock state": ("cpu", load_stock_state),
    "fused": ("cpu", lambda optimizer, named: optimizer.param_groups[0].update(fused=False)),
    "a set": ("eager", lambda optimizer, named: optimizer.param_groups[0].update(constraint=Box(-1.0, 1.0))),
    "dtype": ("eager", turn_to_float64),
}


@pytest.mark.parametrize(("engine", "change"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("steps", [0, 1])
def test_an_engine_that_can_no_longer_is_refused_before_the_step_writes_anything(engine, change, steps):
    named = model()[:2]
    if engine == "cpu":
        pytest.importorskip("numba")
    optimizer = ProjectedSGD(named, lr=0.1, c=1.0, engine=engine, fused=engine == "cpu")
    for _ in range(steps):
        step(optimizer)
    start = [p.detach().clone() for _, p in named]

    def change_and_step():
        change(optimizer, named)
        step(optimizer)

    with pytest.raises(ValueError, match=rf"0\.weight: engine='{engine}' cannot take"):
        change_and_step()
    assert all(torch.equal(p.detach().to(q.dtype), q) for (_, p), q in zip(named, start, strict=True))


@pytest.mark.parametrize(
    ("settings", "is_taken"),
    [
        ({"c": 1.0, "engine": "diagonal"}, True),
        ({"constraint": MinMaxNorm(0.5, 1.0), "engine": "cpu", "fused": True}, False),
        ({"c": 1.0, "engine": "eager"}, False),
    ],
    ids=["diagonal", "cpu", "eager"],
)
def test_an_engine_by_name_is_asked_about_the_metric_when_the_optimizer_is_made(settings, is_taken):
    if settings["engine"] == "cpu":
        pytest.importorskip("numba")
    if is_taken:
        optimizer = ProjectedAdam(model()[:1], metric="adaptive", **settings)
        assert optimizer.routes()["0.weight"].engine == settings["engine"]
    else:
        with pytest.raises(ValueError, match="metric"):
            ProjectedAdam(model()[:1], metric="adaptive", **settings)


def test_nothing_imports_numba_or_triton_unless_it_is_asked_for():
    code = """
import sys, torch
from projgd import MaxNorm
from projgd.torch import ProjectedAdam, project_after_step
print("triton" in sys.modules)  # torch imports it for its first optimizer
layer = torch.nn.Linear(8, 4)
hooked = torch.optim.SGD(layer.parameters(), 0.1)
project_after_step(hooked, MaxNorm(1.0))
for optimizer in (ProjectedAdam(layer.parameters(), c=1.0), hooked):
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
print("numba" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_hook_uses_the_same_table(ran):
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    project_after_step(optimizer, MaxNorm(0.5))
    step(optimizer)
    assert ran == {id(layer.weight): "eager"}


OVERLAPS = {
    "one storage": lambda w: (w, w),
    "some rows": lambda w: (w, w[: len(w) // 2]),
    "some columns": lambda w: (w, w[:, : w.shape[1] // 2]),
    "a part first": lambda w: (w[:, : w.shape[1] // 2], w),
}


@pytest.mark.parametrize("late", [False, True], ids=["from the start", "later"])
@pytest.mark.parametrize("shape", [(4, 3), (400, 300)], ids=str)
@pytest.mark.parametrize("overlap", OVERLAPS)
@pytest.mark.parametrize("form", ["projected", "fused", "fused, two groups", "hook"])
def test_parameters_that_share_memory_are_all_updated_and_then_projected_in_turn(form, overlap, shape, late):
    if form.startswith("fused"):
        pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    parts = OVERLAPS[overlap](memory := torch.randn(shape, generator=generator))
    expected = memory.clone()
    views = [expected.as_strided(x.shape, x.stride()) for x in parts]
    params = [torch.nn.Parameter(x.clone()) for x in parts]
    groups = [{"params": [p]} for p in params] if "two" in form else params
    if form == "hook":
        optimizer = torch.optim.SGD(params, lr=0.1)
        project_after_step(optimizer, MaxNorm(1.0))
    else:
        optimizer = ProjectedSGD(groups, lr=0.1, c=1.0, fused="fused" in form)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    if late:
        optimizer.step()
    for p, x in zip(params, parts, strict=True):
        p.data = x
    for v, p in zip(views, params, strict=True):
        v.sub_(p.grad, alpha=0.1)
    for v in views:
        v.copy_(MaxNorm(1.0).project(v.clone()))
    if "fused" in form:
        route = optimizer.routes()["parameter 0 of group 0"]
        assert route.engine == "eager"
        assert route.refusals["cpu"] == "the parameter shares memory with another one"
    optimizer.step()
    torch.testing.assert_close(memory, expected, rtol=3e-6, atol=1e-6)
    assert all(float(p.detach().norm(dim=1).max()) <= 1 for p in params)
    for p in params:  # alone again
        p.data = p.data.clone()
    if "fused" in form:
        assert optimizer.routes()["parameter 0 of group 0"].engine == "cpu"


def test_a_table_that_shares_memory_is_projected_as_a_whole(ran):
    table, head = torch.nn.Embedding(20, 3, sparse=True), torch.nn.Linear(3, 20, bias=False)
    head.weight.data = table.weight.data
    optimizer = ProjectedSGD([{"params": table.parameters(), "c": 1.0}, {"params": head.parameters()}], lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (table(torch.tensor([1, 2])).sum() + head(torch.ones(1, 3)).sum()).backward()
        head.weight.grad *= 5
        optimizer.step()
        assert float(table.weight.detach().norm(dim=1).max()) <= 1
    assert ran[id(table.weight)] == "eager"


def strided_momentum(optimizer, p):
    state = optimizer.state[p]
    state["momentum_buffer"] = state["momentum_buffer"].t().contiguous().t()


def contiguous_momentum(optimizer, p):
    state = optimizer.state[p]
    state["momentum_buffer"] = state["momentum_buffer"].contiguous()


@pytest.mark.parametrize(
    "change",
    [
        lambda optimizer, p: optimizer.param_groups[0].update(fused=False),
        lambda optimizer, p: optimizer.param_groups[0].update(fused=True),
        lambda optimizer, p: optimizer.param_groups[1].update(fused=False),
        lambda optimizer, p: optimizer.param_groups[0].update(differentiable=True),
        strided_momentum,
    ],
    ids=["unfused", "fused", "another group", "differentiable", "momentum"],
)
def test_what_has_changed_between_steps_is_in_the_report_and_in_the_step(change, ran):
    pytest.importorskip("numba")
    p, q = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    optimizer = ProjectedSGD([{"params": [p]}, {"params": [q]}], lr=0.1, momentum=0.9, c=1.0, fused=True)
    undo = (
        contiguous_momentum
        if change is strided_momentum
        else lambda optimizer, p: [group.update(fused=True, differentiable=False) for group in optimizer.param_groups]
    )
    for act in (lambda optimizer, p: None, change, undo):
        step(optimizer)
        act(optimizer, p)
        ran.clear()
        routes = optimizer.routes()
        step(optimizer)
        assert [routes[f"parameter 0 of group {i}"].engine for i in range(2)] == [ran[id(p)], ran[id(q)]]
    assert ran[id(p)] == "cpu"
