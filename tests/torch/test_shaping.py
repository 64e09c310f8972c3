"""Shaped updates in PyTorch against float64 transcriptions of the papers' formulas."""

import math
import warnings

import array_api_compat.torch as xp
import lion_pytorch
import numpy as np
import pytest
import schedulefree
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from projgd import (
    MaxNorm,
    MaxUpdate,
    MinMaxNorm,
    NonNegative,
    RadialBrake,
    RelativeUpdate,
    Sphere,
    Split,
    TangentUpdate,
    UnitNorm,
)
from projgd.torch import hyperball, projected
from tests.contract import TIGHT

SHAPE = (48, 32)


def norm(x):
    return math.sqrt(math.fsum(float(v) ** 2 for v in np.ravel(x)))


def gradients(steps, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return [
        torch.as_tensor(rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 0), dtype=torch.float32) for _ in range(steps)
    ]


def start(seed=1, shape=SHAPE, dtype=torch.float32):
    return torch.nn.Parameter(torch.as_tensor(np.random.default_rng(seed).normal(size=shape) * 0.1).to(dtype))


def run(opt, p, grads, schedule=None):
    for g in grads:
        p.grad = g.to(p.dtype, copy=True)
        opt.step()
        if schedule is not None:
            schedule.step()
    return p.detach().double().numpy()


# ---- directions u of the inner optimizers, float64; the stock Muon's own is bfloat16 arithmetic, so it is asked


def adam(grads, b1=0.9, b2=0.95, eps=1e-8):
    m = v = 0.0
    for t, g in enumerate((g.double().numpy() for g in grads), 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def momentum(grads, mu=0.9):
    m = 0.0
    for g in (g.double().numpy() for g in grads):
        m = mu * m + g
        yield m


def muon(grads):
    p = torch.nn.Parameter(torch.zeros(SHAPE))
    stock = torch.optim.Muon([p], lr=1.0, weight_decay=0.0)
    for g in grads:
        p.data.zero_()
        p.grad = g.clone()
        stock.step()
        yield -p.detach().double().numpy()


INNER = [
    (torch.optim.Adam, {"betas": (0.9, 0.95)}, adam),
    (torch.optim.AdamW, {"betas": (0.9, 0.95), "foreach": False}, adam),
    (torch.optim.SGD, {"momentum": 0.9}, momentum),
    (torch.optim.Muon, {}, muon),
]
IDS = ["AdamH", "AdamWH", "SGDH", "MuonH"]


@pytest.mark.parametrize(("cls", "settings", "direction"), INNER, ids=IDS)
def test_hyperball_is_the_papers_formula(cls, settings, direction):
    """W ← R·Norm(W - η_t R·Norm(u)) with η_t warmed up from 0 by torch's own scheduler, 60 steps."""
    grads, p = gradients(60), start()
    opt = hyperball(cls)([p], lr=0.02, **settings)
    warmup = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min(1.0, t / 20))
    w = p.detach().double().numpy().copy()
    radius = norm(w)
    for t, u in enumerate(direction(grads)):
        w = w - 0.02 * min(1.0, t / 20) * radius * u / norm(u)
        w *= radius / norm(w)
    assert norm(run(opt, p, grads, warmup) - w) <= 1e-6 * radius


@pytest.mark.parametrize("axis", [None, "fan_in", Split(0, 4, (1, 2))])
def test_each_vector_has_its_own_radius(axis):
    grads, p = gradients(30), start()
    opt = projected(torch.optim.Adam)(
        [p], lr=0.02, betas=(0.9, 0.95), constraint=Sphere("initial", axis), update=RelativeUpdate()
    )
    w = p.detach().double().numpy().copy()
    parts = {None: [np.s_[:]], "fan_in": [np.s_[i] for i in range(48)]}.get(axis if not isinstance(axis, Split) else 0)
    parts = parts or [np.s_[12 * i : 12 * i + 12] for i in range(4)]
    radii = [norm(w[part]) for part in parts]
    for u in adam(grads):
        for part, radius in zip(parts, radii, strict=True):
            v = w[part] - 0.02 * radius * u[part] / norm(u[part])
            w[part] = v * radius / norm(v)
    assert norm(run(opt, p, grads) - w) <= 1e-6 * norm(w)


def brake(w, u, outward=0.5, inward=0.8):
    share = outward if norm(w + u) > norm(w) else inward
    return (w + u) * ((norm(w) + share * (norm(w + u) - norm(w))) / norm(w + u))


SHAPINGS = [
    (RadialBrake(0.5, 0.8, axis=None), brake),
    (TangentUpdate(axis=None), lambda w, u: w + u - w * ((w * u).sum() / norm(w) ** 2)),
    (RelativeUpdate(axis=None), lambda w, u: w + 0.02 * norm(w) * u / norm(u)),
    (MaxUpdate(0.03, floor=0.01), lambda w, u: w + u * min(0.03 * norm(w), max(0.01 * norm(w), norm(u))) / norm(u)),
]


@pytest.mark.parametrize(("update", "formula"), SHAPINGS, ids=lambda c: type(c).__name__ if hasattr(c, "axis") else "")
@pytest.mark.parametrize(("cls", "settings", "direction"), INNER[1:3], ids=IDS[1:3])
def test_a_shaping_alone_is_its_formula_over_many_steps(update, formula, cls, settings, direction):
    grads, p = gradients(60), start()
    opt = projected(cls)([p], lr=0.02, weight_decay=0.0, update=update, **settings)
    w = p.detach().double().numpy().copy()
    for u in direction(grads):
        w = formula(w, -0.02 * u)
    assert norm(run(opt, p, grads) - w) <= 1e-6 * norm(w)


@pytest.mark.parametrize("update", [update for update, _ in SHAPINGS], ids=lambda u: type(u).__name__)
@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "maximize": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_a_fused_step_is_shaped_as_any_other(cls, settings, update):
    grads, ends = gradients(10), []
    for fused in (None, True):
        for constraint in (None, Sphere("initial", None), MinMaxNorm(1.0, 2.0, axis=None)):
            p = start()
            options = {"fused": fused, "constraint": constraint, **settings}
            ends.append(run(projected(cls)([p], lr=0.02, update=update, **options), p, grads))
    for plain, fused in zip(ends[:3], ends[3:], strict=True):
        assert norm(fused - plain) <= 1e-6 * norm(plain)


def test_tangent_gradients_reach_the_inner_optimizer():
    grads, p = gradients(50), start()
    opt = projected(torch.optim.SGD)([p], lr=0.02, momentum=0.9, constraint=UnitNorm(axis=0), gradient="tangent")
    w = p.detach().double().numpy().copy()
    m = 0.0
    for g in (g.double().numpy() for g in grads):
        m = 0.9 * m + g - w * ((w * g).sum(0) / (w * w).sum(0))
        w = w - 0.02 * m
        w /= np.linalg.norm(w, axis=0)
    assert norm(run(opt, p, grads) - w) <= 5e-6 * norm(w)  # the set's own band, without a shaping of the update


def test_in_bfloat16_the_update_is_not_read_off_rounded_weights():
    """A gradient so small that w - lr·g is w: as a difference it would be lost."""
    p = start(dtype=torch.bfloat16)
    opt = hyperball(torch.optim.SGD)([p], lr=0.1)
    w, g = p.detach().double(), torch.ones(SHAPE) * 1e-12
    got = torch.as_tensor(run(opt, p, [g])) - w
    wanted = -0.1 * norm(w) / SHAPE[0] ** 0.5 / SHAPE[1] ** 0.5
    tangential = got - w * (got * w).sum() / (w * w).sum()
    assert abs(float(tangential.mean()) - wanted) < 0.02 * abs(wanted)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(torch.optim.Adafactor, {}), (torch.optim.ASGD, {}), (lion_pytorch.Lion, {}), (torch.optim.Rprop, {}),
     (torch.optim.LBFGS, {})],
)  # fmt: skip
def test_any_inner_optimizer(cls, settings):
    torch.manual_seed(0)
    layer = torch.nn.Linear(32, 16)
    radius = norm(layer.weight.detach().double())
    opt = projected(cls)(
        [layer.weight], lr=0.01, constraint=Sphere("initial", None), update=RelativeUpdate(), **settings
    )
    x = torch.randn(64, 32)

    def closure():
        opt.zero_grad()
        loss = (layer(x) - x[:, :16].sin()).square().mean()
        loss.backward()
        return loss

    losses = []
    for _ in range(30):
        w = layer.weight.detach().double()
        losses.append(float(opt.step(closure)))
        length = norm(layer.weight.detach().double() - w)
        assert norm(layer.weight.detach().double()) == pytest.approx(radius, rel=1e-6)
        assert length <= 0.01001 * radius
    assert losses[-1] < losses[0]


def test_a_closure_sees_the_weights():
    p, q = start(), start()
    hyper, stepwise = hyperball(torch.optim.Adam)([p], lr=0.05), hyperball(torch.optim.Adam)([q], lr=0.05)
    for _ in range(5):

        def closure():
            hyper.zero_grad()
            loss = (p**4).sum()
            loss.backward()
            return loss

        expected = float((q.detach() ** 4).sum())
        assert float(hyper.step(closure)) == expected
        q.grad = 4 * q.detach() ** 3
        stepwise.step()
        assert (p == q).all()


def test_an_error_inside_leaves_the_weights():
    p = start()
    opt = hyperball(torch.optim.Adam)([p], lr=0.05)
    before = p.detach().clone()

    def broken():
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        opt.step(broken)
    assert (p == before).all()
    opt.param_groups[0]["betas"] = None
    p.grad = torch.ones(SHAPE)
    with pytest.raises(TypeError):
        opt.step()
    assert (p == before).all()


@pytest.mark.parametrize("fused", [None, True])
def test_zero_updates_leave_every_bit_and_nothing_is_laundered(fused):
    p, q = start(1), start(2)
    opt = hyperball(torch.optim.SGD)([p, q], lr=0.1, fused=fused)
    p.grad, q.grad = torch.zeros(SHAPE), torch.ones(SHAPE)
    before, other = p.detach().clone(), q.detach().clone()
    opt.step()
    assert (p == before).all()
    assert not (q == other).any()
    p.grad[3, 5] = math.nan
    q.grad[0, 0] = math.inf
    opt.step()
    assert torch.isnan(p[3, 5])
    assert not torch.isfinite(q[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", ["fan_in", (1, 2), None])
def test_the_order_in_memory_makes_no_difference(axis, dtype):
    """Strides of axes of length one are anything, as a permuted or sliced parameter has them."""
    stepped = []
    for stride in [(1920, 64, 64, 1), (64, 1600, 1, 1), (1, 25, 1, 750)]:
        p = torch.nn.Parameter(torch.zeros(48_000, dtype=dtype).as_strided((25, 30, 1, 64), stride))
        p.data = p.data.copy_(start(0, (25, 30, 1, 64)))
        p.grad = torch.empty_like(p).copy_(start(1, (25, 30, 1, 64)))
        constraint = Sphere("initial", axis=axis)
        projected(torch.optim.Adam)([p], lr=0.01, constraint=constraint, update=RelativeUpdate()).step()
        stepped.append(p.detach().clone(memory_format=torch.contiguous_format))
    for other in stepped[1:]:
        torch.testing.assert_close(other, stepped[0], rtol=1e-6 if dtype == torch.float32 else 2**-7, atol=1e-8)


def test_a_parameter_without_gradient_stays():
    p, q = start(1), start(2)
    opt = hyperball(torch.optim.Adam)([p, q], lr=0.1)
    before = q.detach().clone()
    run(opt, p, gradients(3))
    assert (q == before).all()


@pytest.mark.parametrize("fused", [None, True])
def test_a_stock_checkpoint_keeps_the_radii(fused):
    """The state goes on in the stock optimizer too, bit for bit: shaping changes the weights alone."""
    grads, p, q = gradients(9), start(), start()
    stock = torch.optim.Adam([q], lr=0.05, fused=fused)
    run(stock, q, grads[:3])
    opt = hyperball(torch.optim.Adam)([p], lr=0.05, fused=fused)
    radius = norm(p.detach().double())
    opt.load_state_dict(stock.state_dict())
    assert norm(run(opt, p, grads[3:6])) == pytest.approx(radius, rel=1e-6)
    run(stock, q, grads[3:6])
    for k, kept in stock.state[q].items():
        assert torch.equal(opt.state[p][k], kept)
    stock.load_state_dict(opt.state_dict())
    run(stock, q, grads[6:])
    run(opt, p, grads[6:])
    assert torch.equal(stock.state[q]["exp_avg_sq"], opt.state[p]["exp_avg_sq"])


def test_tensor_learning_rates_and_compiled_layouts():
    p = torch.nn.Parameter(start().detach().T)  # not contiguous
    q = start()
    one = hyperball(torch.optim.Adam)([p], lr=torch.tensor(0.05))
    two = hyperball(torch.optim.Adam)([q], lr=0.05)
    run(one, p, [g.T for g in gradients(5)])
    run(two, q, gradients(5))
    assert torch.allclose(p.T, q, rtol=0, atol=1e-7)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_extremes(size, fused):
    p = torch.nn.Parameter(start().detach() * size)
    w, g = p.detach().double().numpy(), gradients(1)[0]
    opt = hyperball(torch.optim.SGD)([p], lr=0.1, fused=fused)
    wanted = w - 0.1 * norm(w) * g.double().numpy() / norm(g.double())
    wanted *= norm(w) / norm(wanted)
    assert norm(run(opt, p, [g]) - wanted) <= 1e-6 * norm(w)


def refuse(cls=torch.optim.SGD, params=None, **kwargs):
    return lambda: projected(cls)(params or [start()], lr=0.1, **kwargs)


class NoLearningRate(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {})


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (refuse(update="relative"), TypeError, "is not a shaping of updates: pass one such as RelativeUpdate"),
        (refuse(gradient="normal"), ValueError, "gradient='normal' is not known"),
        (refuse(gradient="tangent"), ValueError, "needs a set of vectors"),
        (refuse(constraint=NonNegative(), gradient="tangent"), ValueError, "needs a set of vectors"),
        (refuse(constraint=UnitNorm(0), update=RelativeUpdate(1)), ValueError, "parameter 0 of group 0 with shape"),
        (refuse(params=[torch.nn.Parameter(torch.zeros(3, 2))], update=RelativeUpdate()), ValueError, "norm 0"),
        (refuse(schedulefree.AdamWScheduleFree, update=RelativeUpdate()), ValueError, "cannot be observed"),
        (lambda: projected(NoLearningRate)([start()], update=RelativeUpdate()), ValueError, "has no lr"),
        (refuse(torch.optim.SGD, differentiable=True, update=RelativeUpdate()), ValueError, "differentiable=False"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_at_construction(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_warnings_where_settings_work_against_each_other():
    with pytest.warns(UserWarning, match=r"weight_decay=0.01 works against Sphere"):
        projected(torch.optim.AdamW)([start()], constraint=Sphere("initial"))
    with pytest.warns(UserWarning, match=r"read off it as a difference"):
        projected(torch.optim.Adafactor)([start(dtype=torch.bfloat16)], update=RelativeUpdate())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyperball(torch.optim.AdamW)([start()])
        hyperball(torch.optim.Muon)([start()])
        projected(torch.optim.AdamW)([start()], c=1.0, update=MaxUpdate(0.1))


def test_a_shaping_goes_with_any_set():
    p = start()
    opt = projected(torch.optim.Adam)([p], lr=0.1, constraint=MaxNorm(0.5), update=RelativeUpdate())
    run(opt, p, gradients(20))
    assert all(norm(row) <= 0.5 for row in p.detach().double())
    q = start()
    opt = projected(torch.optim.Adam)([q], lr=0.1, constraint=NonNegative(), update=RelativeUpdate())
    run(opt, q, gradients(20))
    assert (q >= 0).all()


def test_the_norm_is_held_over_many_steps():
    """In the shorter types the moved weights are rounded, and their projection once more: no error adds up."""
    grads, shape = gradients(50, (16, 8)), (16, 8)
    params = [start(shape=shape, dtype=d) for d in (torch.float32, torch.bfloat16, torch.float16, torch.float32)]
    opt = hyperball(torch.optim.SGD)([{"params": params[:3]}, {"params": params[3:], "fused": True}], lr=0.03)
    radii = [norm(p.detach().double()) for p in params]
    for t in range(1000):
        for p in params:
            p.grad = grads[t % 50].to(p.dtype)
        opt.step()
        if t % 100 == 99:
            off = [abs(norm(p.detach().double()) / radius - 1) for p, radius in zip(params, radii, strict=True)]
            assert max(off[0], off[3]) <= 1e-6
            assert off[1] <= TIGHT["bfloat16"]
            assert off[2] <= TIGHT["float16"]


def reference(p, u, update, constraint, lr):
    """w + shape(u) on the sphere, all in float64 by the core, which knows no kernel."""
    w = p.detach().double()
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    w, u = w.reshape(vectors.shape), u.double().reshape(vectors.shape)
    moved = w + update.shape(u, w, lr, vectors.axes, xp)
    return (moved if isinstance(constraint, MaxNorm) else constraint.onto(moved, vectors.axes)).reshape(p.shape)


@settings(max_examples=30)
@given(
    shapes=st.lists(
        st.one_of(
            st.tuples(st.integers(9, 40), st.integers(9, 50)),
            st.tuples(st.integers(9, 12), st.integers(9, 12), st.integers(1, 4), st.integers(1, 4)),
            st.sampled_from([(2, 4099), (700, 300), (40000, 3), (600, 500)]),
        ),
        min_size=1,
        max_size=3,
    ),
    axis=st.sampled_from([None, "fan_in", 0, 1]),
    update=st.sampled_from([RelativeUpdate(), RadialBrake(0.5, 0.8), TangentUpdate(), MaxUpdate(0.03, floor=0.01)]),
    cls=st.sampled_from(
        [
            (torch.optim.Adam, {}),
            (torch.optim.AdamW, {"amsgrad": True, "weight_decay": 0.0}),
            (torch.optim.SGD, {}),
            (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
        ]
    ),
    radius=st.sampled_from(["initial", 3.0, None]),
    size=st.sampled_from([1.0, 1e-12, 1e12]),
    fused=st.sampled_from([None, True]),
)
def test_any_step_is_the_reference(shapes, axis, update, cls, radius, size, fused):
    constraint = (
        MaxNorm(1e30, axis) if radius is None else Sphere(radius if radius == "initial" else radius * size, axis)
    )
    params = [torch.nn.Parameter(start(i, shape).detach() * size) for i, shape in enumerate(shapes)]
    zeros = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    lr = 0.02 if isinstance(update, RelativeUpdate) or cls[0] is torch.optim.SGD else 0.02 * size
    opt = projected(cls[0])(params, lr=lr, fused=fused, constraint=constraint, update=update, **cls[1])
    stock = cls[0](zeros, lr=lr, **cls[1])
    goals = [constraint.bind(norms(p, constraint)) if radius == "initial" else constraint for p in params]
    for t in range(2):
        for i, (p, zero) in enumerate(zip(params, zeros, strict=True)):
            p.grad = zero.grad = gradients(1, p.shape, 100 + 10 * t + i)[0] * size
            zero.data.zero_()
        stock.step()
        wanted = [reference(p, z.detach(), update, goal, lr) for p, z, goal in zip(params, zeros, goals, strict=True)]
        opt.step()
        for p, w in zip(params, wanted, strict=True):
            assert (p.detach().double() - w).norm() <= 1e-6 * w.norm()


def norms(p, constraint):
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    return p.detach().double().reshape(vectors.shape).square().sum(vectors.axes, keepdim=True).sqrt()


class Interrupted(TangentUpdate):
    def coefficients(self, m, lr, xp):
        raise KeyboardInterrupt


@pytest.mark.parametrize("fused", [None, True])
def test_an_interrupt_while_the_update_is_shaped_gives_the_weights_back(fused):
    p = torch.nn.Parameter(torch.randn(3, 4))
    w = p.detach().clone()
    optimizer = projected(torch.optim.SGD)([p], lr=0.1, constraint=UnitNorm(), update=Interrupted(), fused=fused)
    p.grad = torch.ones_like(p)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert torch.equal(p, w)
