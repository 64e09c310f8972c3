"""metric="adaptive" in PyTorch: the diagonal of every optimizer, the fixed point it leads to, and what is refused."""

import copy
import pickle

import pytest
import torch

from projgd import MaxNorm, MinMaxNorm, NonNegative, Sphere, UnitNorm, metrics
from projgd.torch import (
    ProjectedAdagrad,
    ProjectedAdam,
    ProjectedRMSprop,
    ProjectedSGD,
    projected,
    register_metric,
)
from tests.optimality import LeastSquares, residual

# optimizer, its options, and the state entry that is divided by D in a step (None: the gradient itself)
OPTIMIZERS = [
    (torch.optim.Adam, {}, "exp_avg"),
    (torch.optim.Adam, {"amsgrad": True, "foreach": False}, "exp_avg"),
    (torch.optim.Adam, {"foreach": True, "eps": 1e-3}, "exp_avg"),
    (torch.optim.AdamW, {"weight_decay": 0.0}, "exp_avg"),
    (torch.optim.AdamW, {"weight_decay": 0.0, "amsgrad": True, "betas": (0.5, 0.9)}, "exp_avg"),
    (torch.optim.NAdam, {"momentum_decay": 0.0}, "both"),
    (torch.optim.RAdam, {"betas": (0.9, 0.9)}, "exp_avg"),
    (torch.optim.RAdam, {}, "exp_avg"),  # not yet rectified after 5 steps: D = 1
    (torch.optim.Adamax, {"eps": 1e-2}, "exp_avg"),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.1, "lr_decay": 0.1}, None),
    (torch.optim.Adagrad, {"eps": 1e-2}, None),
    (torch.optim.RMSprop, {}, None),
    (torch.optim.RMSprop, {"centered": True, "eps": 1e-3}, None),
    (torch.optim.RMSprop, {"momentum": 0.9}, "momentum"),
    (torch.optim.Adadelta, {"rho": 0.8, "lr": 50.0}, None),
    (torch.optim.Adafactor, {"eps": (1e-3, 1e-3)}, None),
    (torch.optim.SparseAdam, {"eps": 1e-3}, "exp_avg"),
]
IDS = [f"{cls.__name__}-{'-'.join(kwargs) or 'plain'}" for cls, kwargs, _ in OPTIMIZERS]


def gradients(steps, shape=(6, 30)):
    """Gradients of very different sizes, a column so small that only ε counts."""
    torch.manual_seed(0)
    size = 10.0 ** torch.empty(shape, dtype=torch.float64).uniform_(-4, 1)
    size[:, 3] = 1e-12
    return [size * torch.randn(shape, dtype=torch.float64) for _ in range(steps)]


def take(optimizer, p, grad):
    p.grad = grad.to(p.dtype).clone()
    if isinstance(optimizer, torch.optim.SparseAdam):
        p.grad = p.grad.to_sparse(1)
    optimizer.step()


def pulled(name, grad, state, group):
    """What the step divided by D, from the optimizer's state."""
    if name == "both":  # NAdam: without momentum decay μ = β₁ / 2 at every step
        step, mu = float(state["step"]), group["betas"][0] / 2
        return (1 - mu) / (1 - mu**step) * grad + mu / (1 - mu ** (step + 1)) * state["exp_avg"]
    return state["exp_avg"] if name == "exp_avg" else grad


@pytest.mark.parametrize(("cls", "kwargs", "name"), OPTIMIZERS, ids=IDS)
def test_projects_in_the_diagonal_of_the_very_step(cls, kwargs, name):
    """D is read off a stock optimizer's own step, (what it divides) / (how far it goes), not from any formula.

    It is taken from weights of 0, where no rounding hides a small step.
    """
    torch.manual_seed(1)
    start = torch.randn(6, 30, dtype=torch.float64)
    p, stock, bare = (torch.nn.Parameter(start.clone()) for _ in range(3))
    kwargs = {"lr": 0.3} | kwargs
    ours, theirs, probe = (
        projected(cls)([p], metric="adaptive", c=3.0, **kwargs),
        cls([stock], **kwargs),
        cls([bare], **kwargs),
    )
    differs = 0
    for grad in gradients(6):
        stock.data.copy_(p.data)
        bare.data.zero_()
        before = copy.deepcopy(theirs.state.get(stock, {}))
        for optimizer, weights in ((theirs, stock), (probe, bare), (ours, p)):
            take(optimizer, weights, grad)
        moved, state = -bare.detach(), theirs.state[stock]
        if name == "momentum":
            moved = state["momentum_buffer"] - 0.9 * before.get("momentum_buffer", 0 * grad)
        d = pulled(name, grad, state, theirs.param_groups[0]) / moved
        assert (d > 0).all()
        x, y = p.detach(), stock.detach()
        outside = y.norm(dim=1) > 3
        assert (x.norm(dim=1) <= 3).all()
        assert torch.equal(x[~outside], y[~outside])
        error, multiplier = residual(x[outside], y[outside], d[outside])
        assert (error <= 1e-7).all()
        assert (multiplier >= 0).all()
        differs += int((residual(MaxNorm(3.0).project(y)[outside], y[outside], d[outside])[0] > 1e-3).sum())
        assert bool(outside.any())
    identity = cls is torch.optim.RAdam and not kwargs.get("betas")
    assert bool(differs) is not identity  # otherwise the metric made no difference here, and nothing was tested


def test_weight_decay_moves_the_point_and_not_the_metric():
    p, stock = (torch.nn.Parameter(torch.ones(2, 8, dtype=torch.float64)) for _ in range(2))
    ours = projected(torch.optim.AdamW)([p], metric="adaptive", c=1.0, lr=0.1, weight_decay=0.5)
    theirs = torch.optim.AdamW([stock], lr=0.1, weight_decay=0.5)
    for grad in gradients(3, (2, 8)):
        stock.data.copy_(p.data)
        take(theirs, stock, grad)
        take(ours, p, grad)
        state = theirs.state[stock]
        d = (state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))).sqrt() + 1e-8
        assert (residual(p.detach(), stock.detach(), d)[0] <= 1e-9).all()


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.ASGD])
def test_plain_gradient_steps_have_the_euclidean_metric(cls):
    ends = []
    for metric in ("euclidean", "adaptive"):
        p = torch.nn.Parameter(torch.ones(6, 30, dtype=torch.float64))
        optimizer = projected(cls)([p], lr=0.1, c=2.0, metric=metric)
        for grad in gradients(4):
            take(optimizer, p, grad)
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_in_one_compiled_graph(monkeypatch):
    torch.compiler.reset()  # or the graphs of other tests count against the limit
    monkeypatch.setattr(metrics, "STEPS", 4)  # a graph has all of them
    p, other = (torch.nn.Parameter(torch.ones(6, 30)) for _ in range(2))
    eager, compiled = (ProjectedRMSprop([x], lr=0.3, c=3.0, metric="adaptive") for x in (p, other))
    first, *grads = gradients(3)
    for optimizer, x in ((eager, p), (compiled, other)):
        take(optimizer, x, first)  # which makes the states: the graph of that would be another one
    step = torch.compile(compiled.step, fullgraph=True, backend="eager")
    for grad in grads:
        take(eager, p, grad)
        other.grad = grad.float()
        step()
        torch.testing.assert_close(other, p, rtol=1e-5, atol=1e-6)
        assert (other.detach().double().norm(dim=1) <= 3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_held_exactly_in_every_dtype(dtype):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(20, 30).to(dtype))
    optimizer = ProjectedAdam([p], lr=0.1, eps=1e-4, c=1.5, metric="adaptive")
    for _ in range(5):
        take(optimizer, p, torch.randn(20, 30) * 10.0 ** torch.empty(20, 30).uniform_(-2, 1))
        norms = p.detach().double().norm(dim=1)
        assert (norms <= 1.5).all()
        assert norms.max() > 1.5 * (1 - 1e-2)


def test_set_per_group_and_kept_in_checkpoints_and_copies():
    a, b, c = (torch.nn.Parameter(torch.ones(2, 30, dtype=torch.float64)) for _ in range(3))
    groups = [{"params": [a], "metric": "adaptive"}, {"params": [b]}, {"params": [c], "constraint": NonNegative()}]
    optimizer = ProjectedRMSprop(groups, lr=0.1, c=2.0)
    grad = gradients(1, (2, 30))[0]
    for p in (a, b, c):
        p.grad = grad.clone()
    optimizer.step()
    assert not torch.allclose(a, b)
    assert [g["metric"] for g in optimizer.param_groups] == ["adaptive", "euclidean", "euclidean"]
    for other in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert other.param_groups[0]["metric"] == "adaptive"
    fresh = ProjectedRMSprop([{"params": [p.detach().clone().requires_grad_()]} for p in (a, b, c)], lr=0.1, c=2.0)
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.param_groups[0]["metric"] == "adaptive"


def test_spheres_and_boxes():
    """On a sphere the metric's nearest point is a stationary one; for a box the metric changes nothing."""
    for constraint in (UnitNorm(), Sphere(2.0, axis=None), MinMaxNorm(0.5, 1.0)):
        p, stock = (torch.nn.Parameter(torch.ones(3, 8, dtype=torch.float64)) for _ in range(2))
        constraint_axis = (0, 1) if constraint.axis is None else (1,)
        edge = constraint.edges()[1]  # where all rows end that start from ones
        ours = ProjectedAdagrad([p], lr=0.1, constraint=constraint, metric="adaptive")
        theirs = torch.optim.Adagrad([stock], lr=0.1)
        for grad in gradients(3, (3, 8)):
            stock.data.copy_(p.data)
            take(theirs, stock, grad)
            take(ours, p, grad)
            d = theirs.state[stock]["sum"].sqrt() + 1e-10
            rows = (3, 8) if constraint_axis == (1,) else (1, 24)
            assert (residual(p.detach().reshape(rows), stock.detach().reshape(rows), d.reshape(rows))[0] <= 1e-8).all()
            assert torch.allclose(p.norm(dim=constraint_axis), torch.tensor(edge, dtype=torch.float64))
    ends = []
    for metric in ("euclidean", "adaptive"):
        p = torch.nn.Parameter(torch.ones(3, 8, dtype=torch.float64))
        optimizer = ProjectedAdam([p], lr=0.5, constraint=NonNegative(), metric=metric)
        for grad in gradients(4, (3, 8)):
            take(optimizer, p, grad)
        ends.append(p.detach())
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    ("cls", "rate"),
    [(ProjectedAdagrad, 0.3), (ProjectedRMSprop, 1e-2), (ProjectedAdam, 0.03)],
    ids=["Adagrad", "RMSprop", "Adam"],
)
def test_least_squares_ends_at_the_optimum_and_its_euclidean_twin_does_not(cls, rate):
    problem = LeastSquares()
    hessian, linear = torch.tensor(problem.hessian), torch.tensor(problem.linear)
    gap = {}
    for metric in ("adaptive", "euclidean"):
        p = torch.nn.Parameter(torch.zeros(1, 20, dtype=torch.float64))
        optimizer = cls([p], lr=rate, c=1.0, metric=metric)
        for _ in range(200):
            take(optimizer, p, p.detach() @ hessian - linear)
        gap[metric] = problem(p.detach().numpy()[0]) - problem.optimum
    assert gap["adaptive"] <= 1e-6 * problem.optimum
    assert gap["euclidean"] >= 0.3 * problem.optimum


class Halved(torch.optim.Optimizer):
    """A third-party optimizer: x ← x - lr · g / (state "scale"), with a scale of its own."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                scale = self.state[p].setdefault("scale", torch.zeros_like(p))
                p -= group["lr"] * p.grad / (scale + 1)  # the scale as it was before the step
                scale += p.grad.abs()


def test_a_third_party_optimizer_tells_its_diagonal():
    with pytest.raises(ValueError, match=r"Halved divides its step by, and none is known.*register_metric"):
        projected(Halved)([torch.nn.Parameter(torch.ones(2, 4))], c=1.0, metric="adaptive")
    register_metric(Halved, lambda state, group: state["scale"] + 1, before=["scale"])
    p, stock = (torch.nn.Parameter(torch.ones(2, 8, dtype=torch.float64)) for _ in range(2))
    ours, theirs = projected(Halved)([p], c=1.0, metric="adaptive"), Halved([stock])
    for grad in gradients(3, (2, 8)):
        stock.data.copy_(p.data)
        d = theirs.state[stock].get("scale", torch.zeros_like(p)).clone() + 1
        take(theirs, stock, grad)
        take(ours, p, grad)
        assert (residual(p.detach(), stock.detach(), d)[0] <= 1e-9).all()


class OwnStep(torch.optim.Adam):
    def step(self, closure=None):
        return super().step(closure)


class SameStep(torch.optim.Adam):
    pass


@pytest.mark.parametrize("cls", [torch.optim.LBFGS, torch.optim.Rprop, torch.optim.Muon, OwnStep])
def test_optimizers_without_a_known_diagonal_are_refused_at_construction(cls):
    with pytest.raises(ValueError, match=f'metric="adaptive" needs the diagonal that {cls.__name__}'):
        projected(cls)([torch.nn.Parameter(torch.ones(2, 4))], c=1.0, metric="adaptive")
    projected(SameStep)([torch.nn.Parameter(torch.ones(2, 4))], c=1.0, metric="adaptive")


def test_bad_input_is_refused():
    p = torch.nn.Parameter(torch.ones(2, 4))
    with pytest.raises(ValueError, match='metric=\'adaptve\' is not known: pass "euclidean" or "adaptive"'):
        ProjectedAdam([p], c=1.0, metric="adaptve")
    with pytest.raises(TypeError, match="register_metric"):
        register_metric("Adam", lambda state, group: state)
    other, mine = ProjectedSGD([p], lr=0.1, momentum=0.9), ProjectedAdam([p], c=1.0, metric="adaptive")
    take(other, p, torch.ones(2, 4))
    with pytest.raises(
        ValueError, match="with Adam reads 'exp_avg_sq' from the state, which has only 'momentum_buffer'"
    ):
        mine.load_state_dict(other.state_dict() | {"param_groups": mine.state_dict()["param_groups"]})
    assert not mine.state
