"""The distributed tests: `python ranks.py FOLDER 4 2` goes through all checks on four ranks, then on two.

The ranks are forks of one process, which has imported everything. A process group is started once for all checks.
`test_ranks.py` reads what failed from the folder.
"""

import copy
import functools
import json
import math
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from projgd import (
    Around,
    Box,
    MaxNorm,
    MinMaxNorm,
    NonNegative,
    ProductMaxNorm,
    RadialBrake,
    RelativeUpdate,
    Sphere,
    Split,
    TreeBall,
    UnitNorm,
)
from projgd.constraints import Constraint
from projgd.torch import (
    ProjectedAdam,
    ProjectedSGD,
    constrain,
    declared,
    hyperball,
    param_groups,
    project_after_step,
    projected,
)
from projgd.torch.engines.base import Job
from projgd.torch.engines.ranks import Ranks
from projgd.torch.routing import WITHIN

C = 0.4
STEPS = 3


class Net(nn.Module):
    """The last layer has rows that four ranks cannot share evenly."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 12)
        self.head = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        return self.head(self.down(torch.tanh(self.up(x))))


def batch(k):
    return torch.randn(16, 8, generator=torch.Generator().manual_seed(k))


def whole(p):
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach()


def train(net, optimizer, steps=range(STEPS), share=slice(None)):
    for k in steps:
        optimizer.zero_grad()
        net(batch(k)[share]).square().mean().backward()
        optimizer.step()


def longest(net):
    return max(float(np.linalg.norm(whole(p).double().numpy(), axis=1).max()) for p in net.parameters() if p.ndim == 2)


def distance(a, b):
    return max(float((whole(p) - whole(q)).abs().max()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def compare(shard, make=ProjectedAdam, share=slice(None), **options):
    """Sharded and in one process: the projection to 1e-6, a training run as closely as the plain optimizer's."""
    apart = {}
    for c in (None, C):
        alone, spread = Net(), shard(Net())
        for net, own in ((alone, slice(None)), (spread, share)):
            train(net, make(net.parameters(), lr=0.05, c=c, **options), share=own)
        apart[c] = distance(alone, spread)
    assert longest(spread) <= C, longest(spread)
    assert longest(spread) >= C * (1 - 1e-5), longest(spread)
    assert apart[C] <= 3 * apart[None] + 1e-6, apart

    alone, spread = Net(), shard(Net())
    for net in (alone, spread):
        optimizer = ProjectedSGD(net.parameters(), lr=0.0, c=C)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        with CommDebugMode() as traffic:
            optimizer.step()
    counts = {str(k): v for k, v in traffic.get_comm_counts().items() if v}
    for p, q in zip(alone.parameters(), spread.parameters(), strict=True):
        np.testing.assert_allclose(whole(q).numpy(), whole(p).numpy(), rtol=1e-6)
    return counts


def check_ddp(ranks, **_):
    each = 16 // ranks
    mine = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    assert compare(nn.parallel.DistributedDataParallel, share=mine) == {}


def check_fully_shard(**_):
    assert compare(by_layer) == {}  # every row is on one rank: nothing to say


def check_fully_shard_across_the_rows(**_):
    def by_columns(net):
        fully_shard(net, shard_placement_fn=lambda p: Shard(p.ndim - 1))
        return net

    counts = compare(by_columns)
    assert list(counts.values()) == [1], counts  # one all-reduce for all parameters
    assert "allreduce" in next(iter(counts)).replace("_", ""), counts


def check_what_is_declared_stays_on_a_sharded_model(**_):
    net = constrain(constrain(Net(), MaxNorm(0.2), "head.weight"), MaxNorm(C), "up.weight")
    known = declared(net)
    by_layer(net)
    assert declared(net) == known == {"up.weight": MaxNorm(C), "head.weight": MaxNorm(0.2)}
    train(net, ProjectedAdam(net, lr=0.5))
    assert 0.2 * (1 - 1e-5) <= longest(net.head) <= 0.2
    assert C * (1 - 1e-5) <= longest(net.up) <= C < longest(net.down)


def check_adaptive_metric(ranks, **_):
    """Where every row and its diagonal are on one rank; across rows it is refused."""
    assert compare(by_layer, metric="adaptive") == {}
    p = nn.Parameter(distribute_tensor(torch.ones(4, 8), init_device_mesh("cpu", (ranks,)), [Shard(1)]))
    with pytest.raises(ValueError, match="metric='adaptive' is not known"):
        ProjectedAdam([p], c=C, metric="adaptive")


def tensor_parallel(net, mesh):
    return parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def check_tensor_parallel(ranks, **_):
    mesh = init_device_mesh("cpu", (ranks,))
    counts = compare(lambda net: tensor_parallel(net, mesh))
    assert list(counts.values()) == [1], counts


def check_mesh_of_two_dimensions(ranks, **_):
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))

    def both(net):
        tensor_parallel(net, mesh["tensor"])
        return fully_shard(net, mesh=mesh["data"])

    counts = compare(both, foreach=False)
    assert sum(counts.values()) == (1 if ranks > 2 else 0), counts


def check_replicated_shards(ranks, **_):
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    compare(lambda net: fully_shard(net, mesh=mesh))


def cases():
    """dtype, tightness and set: float32 along every axis, the other sets and dtypes along some."""
    all_axes = ["fan_in", None, 0, (0, 2), Split(0, 2, (0, 2)), Split(2, 3, (1, 2))]
    yield from ((torch.float32, 1e-6, MaxNorm(2.0, axis)) for axis in all_axes)
    for axis in ("fan_in", None, Split(2, 3, (1, 2))):
        yield from ((torch.float32, 1e-6, made) for made in (UnitNorm(axis), MinMaxNorm(1.0, 2.0, axis=axis)))
    for dtype, close in ((torch.float64, 1e-12), (torch.bfloat16, 1.1 * 2**-7), (torch.float16, 2**-10)):
        yield from ((dtype, close, made) for made in (MaxNorm(2.0), MinMaxNorm(1.0, 2.0, axis=(0, 2))))


def weights_of_all_sizes(dtype):
    torch.manual_seed(1)
    x = torch.randn(12, 5, 6, dtype=torch.float64) * torch.logspace(-2, 1, 12, dtype=torch.float64)[:, None, None]
    x[3, 2] *= 1e30 if dtype in (torch.float32, torch.bfloat16) else 1e200 if dtype == torch.float64 else 1e2
    x[4, 1, 1], x[5, 0, 0] = torch.nan, torch.inf
    return x.to(dtype)


def check_placements(ranks, **_):
    """Any placement, axis, set and dtype, with huge and broken vectors, against the whole tensor in one process."""
    line = init_device_mesh("cpu", (ranks,))
    square = init_device_mesh("cpu", (2, ranks // 2))
    meshes = [(line, [p]) for p in (Shard(0), Shard(1), Shard(2), Replicate())]
    meshes += [(square, list(p)) for p in [(Shard(0), Shard(0)), (Shard(2), Shard(0)), (Replicate(), Shard(1))]]
    meshes += [(square, [_StridedShard(0, split_factor=ranks // 2), Shard(0)]), (square, [Shard(1), Shard(2)])]
    for dtype, close, made in cases():
        x = weights_of_all_sizes(dtype)
        expected = made.project(x)
        for mesh, placements in meshes:
            p = nn.Parameter(distribute_tensor(x.clone(), mesh, placements, src_data_rank=None))
            optimizer = ProjectedSGD([p], lr=0.0, constraint=made)
            p.grad = torch.zeros_like(p)
            optimizer.step()
            found = whole(p)
            where = f"{dtype} {made} {placements}"
            fine = torch.isfinite(expected)
            assert torch.equal(fine, torch.isfinite(found)), where
            a, b = found[fine].double(), expected[fine].double()
            assert torch.allclose(a, b, rtol=close, atol=1e-7 if dtype == torch.float16 else 0), where
            if made.fixes_norm:
                continue  # on a sphere every step lands as near as its rounding allows, and may move a bit
            v, (low, high) = made.vectors(x), made.edges()
            norms = torch.linalg.vector_norm(found.double().reshape(v.shape), dim=v.axes)
            norms = norms[torch.isfinite(norms)]
            assert bool(((low <= norms) & (norms <= high)).all()), where
            before = p.to_local().detach().clone()
            optimizer.step()
            assert torch.equal(before.nan_to_num(7), p.to_local().nan_to_num(7)), f"again: {where}"


@torch.no_grad()
def check_a_step_that_gradscaler_skips(ranks, **_):
    """On accelerators the engine sees to that itself, for vectors that are spread over ranks."""
    mesh, engine = init_device_mesh("cpu", (ranks,)), Ranks(WITHIN)
    for skip in (1.0, 0.0):
        p = nn.Parameter(distribute_tensor(torch.ones(4, 8), mesh, [Shard(1)]))
        optimizer = torch.optim.SGD([p], lr=0.1)
        engine.run(None, Job(optimizer, torch.optim.SGD, {}, MaxNorm(C), skip=torch.tensor(skip)), [p])
        assert bool((whole(p) == 1).all()) is bool(skip), skip


def check_sets_over_several_tensors(ranks, **_):
    """A ball around all tensors takes one all-reduce (float64 two); a product needs whole factors."""
    mesh = init_device_mesh("cpu", (ranks,))
    for dtype, size in ((torch.float32, 3.0), (torch.bfloat16, 3.0), (torch.float64, 1e200)):
        torch.manual_seed(0)
        alone = [nn.Parameter((size * torch.randn(s, dtype=torch.float64)).to(dtype)) for s in ((4, 6), (7,), (3, 5))]
        where = [[Shard(1)], [Shard(0)], [Replicate()]]
        spread = [
            nn.Parameter(distribute_tensor(p.detach().clone(), mesh, w)) for p, w in zip(alone, where, strict=True)
        ]
        for params in (alone, spread):
            optimizer = ProjectedSGD(params, lr=0.0, joint=[TreeBall(2.0)])
            for p in params:
                p.grad = torch.zeros_like(p)
            with CommDebugMode() as traffic:
                optimizer.step()
        counts = list(traffic.get_comm_counts().values())
        assert sum(counts) == (2 if dtype == torch.float64 else 1), counts
        for p, q in zip(alone, spread, strict=True):
            torch.testing.assert_close(whole(q), p.detach(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
        norm = math.sqrt(sum(float(whole(p).double().square().sum()) for p in spread))
        assert 2.0 * (1 - 1e-2) <= norm <= 2.0, norm
        assert abs(optimizer.joint_norms()[0] - norm) <= 1e-9
    a, b = torch.ones(2, 8), torch.ones(4, 2)
    sharded = nn.Parameter(distribute_tensor(a, mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"up is sharded, and ProductMaxNorm.* needs it whole"):
        ProjectedSGD([("up", sharded), ("down", b)], lr=0.1, joint=[ProductMaxNorm(1.0).over("up", "down")])
    copies = [nn.Parameter(distribute_tensor(x, mesh, [Replicate()])) for x in (a, b)]
    optimizer = ProjectedSGD(copies, lr=0.0, joint=[ProductMaxNorm(1.0).over(*copies)])
    for p in copies:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert 1 - 1e-5 <= float((whole(copies[1]).double() @ whole(copies[0]).double()).norm()) <= 1.0


@dataclass(frozen=True)
class Odd(Constraint):
    """A set of vectors that is no set of norms."""

    axis: str = "fan_in"

    def onto(self, x, axes, xp=None, *, moved=False):
        return x

    def outside(self, x, axes, xp=None):
        return x


def check_every_set_with_whole_vectors(ranks, **_):
    """Rows that four ranks cannot share evenly: the weights of one process, also from a state that was loaded."""
    from tests.sets import ROWS, SETS, Case, start

    mesh = init_device_mesh("cpu", (ranks,))
    # Arrays of bounds are cut to the rows of a rank, inside of other sets, too.
    for name, case in {**SETS, "arrays around": Case(lambda: Around(Box(ROWS - 0.6, ROWS + 0.6)))}.items():
        set_, w0 = case.make(), torch.tensor(start(), dtype=torch.float32)
        spread = nn.Parameter(distribute_tensor(w0.clone(), mesh, [Shard(0)]))
        if set_.joins_vectors or 0 in (set_.axis if isinstance(set_.axis, tuple) else ()):
            with pytest.raises(ValueError, match="is sharded"):
                ProjectedSGD([spread], lr=0.5, constraint=set_)
            continue
        params = [nn.Parameter(w0.clone()), spread]
        optimizers = [ProjectedSGD([p], lr=0.5, constraint=case.make()) for p in params]
        for k in range(3):
            g = torch.randn(w0.shape, generator=torch.Generator().manual_seed(k))
            for p, optimizer in zip(params, optimizers, strict=True):
                p.grad = distribute_tensor(g.clone(), mesh, [Shard(0)]) if p is spread else g.clone()
                optimizer.step()
            state = optimizers[1].state_dict()
            optimizers[1] = ProjectedSGD([spread], lr=0.5, constraint=case.make())
            optimizers[1].load_state_dict(state)
        torch.testing.assert_close(
            whole(spread), params[0].data, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_refusals(ranks, **_):
    mesh = init_device_mesh("cpu", (ranks,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 8), mesh, [Shard(1)]))
    ProjectedSGD([p], constraint=NonNegative())
    with pytest.raises(ValueError, match="needs each of them whole"):
        ProjectedSGD([p], constraint=Odd())


def check_the_older_fsdp(**_):
    """It flattens parameters, before the optimizer is made or after; a bound is an error there, and not just gone."""
    says = pytest.raises(TypeError, match="flattened by FullyShardedDataParallel")
    for kept in (False, True):

        def wrapped(net, kept=kept):
            return FullyShardedDataParallel(net, use_orig_params=kept, device_id=torch.device("cpu"))

        net = wrapped(Net())
        stock = torch.optim.SGD(net.parameters(), lr=0.1)
        for refused in (
            lambda net=net: ProjectedSGD(net.parameters(), c=C),
            lambda net=net: param_groups(net, MaxNorm(C)),
            lambda stock=stock: project_after_step(stock, MaxNorm(C)),
            lambda net=net, stock=stock: project_after_step(stock, MaxNorm(C), net),
        ):
            with says:
                refused()
    for hooked in (False, True):  # an optimizer of the parameters as they were can be used where they are kept
        net = Net()
        optimizer = (torch.optim.SGD if hooked else ProjectedSGD)(
            net.parameters(), lr=0.1, **({} if hooked else {"c": C})
        )
        if hooked:
            project_after_step(optimizer, MaxNorm(C))
        net = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
        net(batch(0)).square().mean().backward()
        with says:
            optimizer.step()


def check_shaped_updates(ranks, folder):
    """Hyperball and other shapings on shards of every kind: the weights of a single process, few all-reduces."""
    flat, square = init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", (2, ranks // 2))
    layouts = [(flat, [Shard(1)]), (square, [Shard(0), Shard(1)])]
    kinds = [
        {"constraint": Sphere("initial", axis=None), "update": RelativeUpdate()},
        {"constraint": Sphere("initial"), "update": RelativeUpdate()},
        {"constraint": Sphere("initial", Split(0, 2, (1, 2)))},
        {"update": RadialBrake(0.3, 0.7)},
        {"constraint": UnitNorm(0), "gradient": "tangent"},
    ]
    rng = np.random.default_rng(0)
    shapes = [(6, 8), (10, 7)]  # 7 columns are not shared evenly
    weights = [torch.as_tensor(rng.normal(size=s), dtype=torch.float32) for s in shapes]
    grads = [[torch.as_tensor(rng.normal(size=s), dtype=torch.float32) for s in shapes] for _ in range(4)]

    def run(options, place, steps, saved=None, over=None):
        params = [nn.Parameter(place(w.clone() * (1 if saved is None else 2))) for w in weights]
        optimizer = ProjectedSGD(params, lr=0.05, momentum=0.9, foreach=False, **options)
        if saved is not None:  # made from other weights: the radii of the checkpoint count
            optimizer.load_state_dict(saved[1])
            for p, w in zip(params, saved[0], strict=True):
                p.data.copy_(place(w))
        for k in steps:
            for p, g in zip(params, grads[k], strict=True):
                p.grad = place(g.clone())
            with CommDebugMode() as traffic:
                optimizer.step()
        if over is not None and "gradient" not in options and "update" in options:
            calls = sum(traffic.get_comm_counts().values())  # one of the update, and one of the set where it needs it
            assert over <= calls <= (2 if "constraint" in options else 1) * over, traffic.get_comm_counts()
        return [whole(p) for p in params], optimizer.state_dict()

    for options in kinds:
        alone, _ = run(options, lambda x: x, range(4))
        others = [(flat, [Shard(0)]), (square, [Replicate(), Shard(1)])] if options is kinds[0] else []
        for mesh, placements in layouts + others:
            over = sum(isinstance(x, Shard) for x in placements)
            place = functools.partial(distribute_tensor, device_mesh=mesh, placements=placements)
            spread, _ = run(options, place, range(4), over=over)
            for p, q in zip(alone, spread, strict=True):
                assert (p - q).norm() <= 1e-6 * p.norm(), (options, placements, (p - q).norm() / p.norm())
            if "gradient" in options or placements != [Shard(1)]:
                continue
            half = run(options, place, range(2))
            again, _ = run(options, place, range(2, 4), saved=half)
            assert all((p == q).all() for p, q in zip(spread, again, strict=True)), (options, placements)
    p = nn.Parameter(distribute_tensor(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), flat, [Shard(0)]))
    with pytest.raises(ValueError, match="1 of its 2 vectors have norm 0"):
        ProjectedAdam([p], constraint=Sphere("initial"))


def check_mixed_precision(**_):
    """A step that GradScaler skips leaves weights outside where they are."""
    for fused in (False, True):
        for options in ({}, {"shard_placement_fn": lambda p: Shard(p.ndim - 1)}):
            net = fully_shard(Net(), **options)
            optimizer = ProjectedAdam(net.parameters(), lr=0.05, c=0.1, fused=fused)
            scaler = torch.amp.GradScaler("cpu")
            for overflow in (True, False):
                before = [whole(p).clone() for p in net.parameters()]
                optimizer.zero_grad()
                scaler.scale(net(batch(0)).square().mean() * (torch.inf if overflow else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
                unmoved = all(torch.equal(a, whole(p)) for a, p in zip(before, net.parameters(), strict=True))
                assert unmoved is overflow
                assert (longest(net) <= 0.1) is not overflow


def check_zero_redundancy(ranks, **_):
    each = 16 // ranks
    mine = slice(dist.get_rank() * each, (dist.get_rank() + 1) * each)
    alone, net = Net(), nn.parallel.DistributedDataParallel(Net())
    train(alone, ProjectedAdam(alone.parameters(), lr=0.05, c=C))
    train(net, ZeroRedundancyOptimizer(net.parameters(), optimizer_class=ProjectedAdam, lr=0.05, c=C), share=mine)
    assert distance(alone, net) <= 1e-5
    assert longest(net) <= C


def check_zero_redundancy_resumed(ranks, **_):
    """Sets, shapings and radii go through the state that ZeRO collects from all ranks."""
    for options in ({"constraint": MaxNorm(C)}, {"constraint": Sphere("initial"), "update": RelativeUpdate()}):

        def made(seed, options=options):
            net = nn.parallel.DistributedDataParallel(Net(seed))
            params = [p for p in net.parameters() if p.ndim == 2]
            return net, ZeroRedundancyOptimizer(params, optimizer_class=ProjectedAdam, lr=0.05, **options)

        net, optimizer = made(0)
        train(net, optimizer, range(3))
        saved = [None]
        optimizer.consolidate_state_dict(to=0)
        if dist.get_rank() == 0:
            saved = [(net.state_dict(), optimizer.state_dict())]
        dist.broadcast_object_list(saved)
        again, other = made(1)
        again.load_state_dict(saved[0][0])
        other.load_state_dict(copy.deepcopy(saved[0][1]))
        train(net, optimizer, range(3, 6))
        train(again, other, range(3, 6))
        assert distance(net, again) == 0, options


def by_layer(net):
    for layer in (net.up, net.down, net):
        fully_shard(layer)
    return net


def sharded_with_rules():
    net = by_layer(Net())
    return net, ProjectedAdam(param_groups(net, {"head.*": MaxNorm(0.2), "*": MaxNorm(C)}), lr=0.05)


def check_checkpoint(ranks, folder):
    """Four ranks train, save and go on; two ranks load and go on to the same weights."""

    def made(seed):
        return sharded_with_rules()

    optimizer = through_a_checkpoint(ranks, folder / "rules", made)[1]
    assert sorted(g["constraint"].c for g in optimizer.param_groups if g["constraint"]) == [0.2, C]
    assert sorted(g["c"] for g in optimizer.param_groups if g["constraint"]) == [0.2, C]


def through_a_checkpoint(ranks, folder, made, **options):
    """`made(seed)` makes a network and its optimizer; those of two ranks with another seed, and another c at first."""
    options = StateDictOptions(**options)
    net, optimizer = made(seed=ranks)
    if ranks == 4:
        train(net, optimizer, range(3))
    elif optimizer.param_groups[0]["c"] is not None:
        optimizer.param_groups[0]["c"] = 9.0  # the checkpoint knows better
    model_state, optimizer_state = get_state_dict(net, optimizer, options=options)
    state = {"model": model_state, "optimizer": optimizer_state}
    if ranks == 4:
        dcp.save(state, checkpoint_id=folder / "checkpoint")
    else:
        dcp.load(state, checkpoint_id=folder / "checkpoint")
        set_state_dict(
            net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options
        )
    train(net, optimizer, range(3, 6))
    full = [whole(p) for p in net.parameters()]
    if ranks == 4 and dist.get_rank() == 0:
        torch.save(full, folder / "end.pt")
    if ranks == 2:
        for p, q in zip(full, torch.load(folder / "end.pt"), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    return net, optimizer


def check_radii_in_a_checkpoint(ranks, folder):
    """Those of the four ranks' first weights hold on the two ranks that load, though these were made from others."""
    for inner, flat in ((torch.optim.Adam, True), (torch.optim.SGD, False)):

        def made(seed, inner=inner):
            net = by_layer(Net(seed))
            return net, projected(inner)(net.parameters(), lr=0.05, constraint=Sphere("initial"))

        net, _ = through_a_checkpoint(ranks, folder / inner.__name__, made, flatten_optimizer_state_dict=flat)
        for p, first in zip(net.parameters(), Net(4).parameters(), strict=True):
            if p.ndim == 2:
                assert (whole(p).norm(dim=1) / first.norm(dim=1) - 1).abs().max() <= 1e-6, (inner, flat)


def check_hyperball_of_a_whole_engine(ranks, **_):
    """AdamH under `fully_shard` ends where one process ends; MuonH as near as the plain Muon, whose matrix products in
    bfloat16 round otherwise on shards."""

    def apart(make):
        alone, spread = Net(), by_layer(Net())
        for net in (alone, spread):
            train(net, make([p for p in net.parameters() if p.ndim == 2], lr=0.05), range(2))
        pairs = list(zip(alone.parameters(), spread.parameters(), Net().parameters(), strict=True))
        if make is not torch.optim.Muon:
            assert all(abs(whole(q).norm() / w.norm() - 1) <= 1e-6 for _, q, w in pairs)
        return max(float((whole(p) - whole(q)).norm() / whole(p).norm()) for p, q, _ in pairs)

    assert apart(hyperball(torch.optim.Adam)) <= 1e-6
    assert apart(hyperball(torch.optim.Muon)) <= 2 * apart(torch.optim.Muon)


def check_accelerate(**_):
    """Its FSDP2 preparation puts other tensors into the optimizer's groups; it has none for CPUs, so here by hand."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    for hooked in (False, True):
        net = Net()
        if hooked:
            optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
            project_after_step(optimizer, {"head.*": MaxNorm(0.2), "*": MaxNorm(C)}, net)
        else:
            optimizer = ProjectedAdam(param_groups(net, {"head.*": MaxNorm(0.2), "*": MaxNorm(C)}), lr=0.05)
        names = {p.data_ptr(): n for n, p in net.named_parameters()}
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                group["params"][i] = torch.empty(1)
                group["params"][i].data_ptr = p.data_ptr()
        fully_shard(net)
        new = dict(net.named_parameters())
        fsdp2_switch_optimizer_parameters(optimizer, {address: new[name] for address, name in names.items()})
        train(net, optimizer)
        assert C * (1 - 1e-5) <= longest(net) <= C
        assert 0.2 * (1 - 1e-5) <= longest(net.head) <= 0.2


ON_TWO_RANKS = [check_mesh_of_two_dimensions, check_replicated_shards, check_checkpoint, check_radii_in_a_checkpoint]
"""Those that load what four ranks have saved, and meshes with a dimension of one rank."""


def go_through(rank, ranks, folder, names):
    """All checks on one rank; what failed is written to the folder."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    checks, failed = {n: f for n, f in globals().items() if n.startswith("check_")}, {}
    for name in names or (checks if ranks > 2 else [f.__name__ for f in ON_TWO_RANKS]):
        started = time.monotonic()
        try:
            checks[name](ranks=ranks, folder=folder)
        except Exception:
            failed[name] = traceback.format_exc()
            break  # the other ranks may wait for this one
        if rank == 0:
            print(f"{time.monotonic() - started:6.2f} s on {ranks} ranks: {name}", flush=True)
    (folder / f"{ranks}-{rank}.json").write_text(json.dumps(failed))
    dist.destroy_process_group()


def main():
    folder, sizes, names = Path(sys.argv[1]), map(int, sys.argv[2:4]), sys.argv[4:]
    torch.set_num_threads(1)
    for ranks in sizes:
        forks = []
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                try:
                    go_through(rank, ranks, folder, names)
                finally:
                    os._exit(0)  # a thread of gloo that is still running would abort a normal exit, once in a while
            forks.append(pid)
        for pid in forks:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
