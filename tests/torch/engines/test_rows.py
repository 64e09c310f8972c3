"""Sparse gradients: the rows that a step moved are projected, and no table is written to in a forward pass."""

import copy

import pytest
import torch
from lion_pytorch import Lion
from torch import nn

from projgd import MaxNorm, MinMaxNorm, NonNegative, UnitNorm
from projgd.torch import ProjectedAdagrad, ProjectedSGD, ProjectedSparseAdam, project_after_step, projected
from projgd.torch.engines import rows
from tests.torch.common import longest

C = 1.0
MAKERS = {
    "SGD": (ProjectedSGD, {"lr": 5.0}),
    "SGD with momentum": (ProjectedSGD, {"lr": 5.0, "momentum": 0.9}),
    "Adagrad": (ProjectedAdagrad, {"lr": 0.5}),
    "SparseAdam": (ProjectedSparseAdam, {"lr": 0.5}),
}


def step(table, optimizer, k, size=7):
    tokens = torch.randint(table.num_embeddings, (size,), generator=torch.Generator().manual_seed(k))
    optimizer.zero_grad()
    (table(tokens) * torch.linspace(-1, 1, table.embedding_dim)).sum().backward()
    optimizer.step()
    return tokens


def made(name, constraint, height=50, hook=False):
    torch.manual_seed(0)
    table = nn.Embedding(height, 4, sparse=True)
    cls, options = MAKERS[name]
    if not hook:
        return table, cls(table.parameters(), constraint=constraint, **options)
    optimizer = cls.inner(table.parameters(), **options)
    project_after_step(optimizer, constraint)
    return table, optimizer


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("constraint", [MaxNorm(C), UnitNorm(), NonNegative(), MaxNorm(C, axis=0)], ids=str)
@pytest.mark.parametrize("hook", [False, True], ids=["class", "hook"])
def test_the_whole_table_is_in_the_set_after_every_step(name, constraint, hook):
    """Where it starts outside, where its momentum moves rows that the batch has not, where rows come twice."""
    table, optimizer = made(name, constraint, hook=hook)
    expected = copy.deepcopy(table)
    cls, options = MAKERS[name]
    plain = cls.inner(expected.parameters(), **options)
    for k in range(6):
        step(table, optimizer, k)
        step(expected, plain, k)
        with torch.no_grad():
            expected.weight.copy_(constraint.project(expected.weight))
        torch.testing.assert_close(table.weight, expected.weight, rtol=2e-6, atol=1e-7)
        assert float(constraint.violation(table.weight.detach()).max()) <= 1e-6
        with torch.no_grad():
            expected.weight.copy_(table.weight)


def test_rows_that_no_step_touches_are_not_touched(monkeypatch):
    table, optimizer = made("SparseAdam", MaxNorm(C), height=5000)
    step(table, optimizer, 0)
    before = table.weight.detach().clone()
    sizes = []
    project = rows.project_with

    def counted(engines, job, params):
        sizes.extend(p.shape[0] for p in params)
        project(engines, job, params)

    monkeypatch.setattr(rows, "project_with", counted)
    tokens = step(table, optimizer, 1)
    changed = (table.weight != before).any(1).nonzero().flatten().tolist()
    assert set(changed) <= set(tokens.tolist())
    assert sizes
    assert max(sizes) <= 7  # not the 5000 of the table


@pytest.mark.parametrize("hook", [False, True], ids=["class", "hook"])
def test_what_others_write_and_a_tighter_bound_are_seen(hook):
    table, optimizer = made("SGD", MaxNorm(C), hook=hook)
    step(table, optimizer, 0)
    with torch.no_grad():
        table.weight[13] = 9.0
    step(table, optimizer, 1)
    assert longest(table.weight) <= C
    table.load_state_dict({"weight": torch.full((50, 4), 9.0)})
    step(table, optimizer, 2)
    assert longest(table.weight) <= C
    if not hook:
        optimizer.param_groups[0]["c"] = C / 2
        step(table, optimizer, 3)
        assert longest(table.weight) <= C / 2


def test_an_optimizer_that_is_not_known_has_its_whole_table_projected():
    """What a step of somebody else's moves cannot be told from the gradient."""

    class Decays(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(3.0)

    table = nn.Embedding(50, 4, sparse=True)
    optimizer = projected(Decays)(table.parameters(), c=C)
    for k in range(3):
        step(table, optimizer, k)
        assert longest(table.weight) <= C
    dense = nn.Embedding(50, 4)
    optimizer = projected(Lion)(dense.parameters(), c=C, lr=0.1)
    step(dense, optimizer, 0)
    assert longest(dense.weight) <= C


def test_copies_and_later_steps_agree_bit_for_bit():
    table, optimizer = made("SparseAdam", MaxNorm(C))
    step(table, optimizer, 0)
    twin, copied = copy.deepcopy((table, optimizer))
    for k in range(1, 4):
        step(table, optimizer, k)
        step(twin, copied, k)
    assert torch.equal(table.weight, twin.weight)


# What nn.Embedding(max_norm=...) cannot do, because it renormalises the rows in its forward pass.


def twice(table, other):
    """A second use of the weights, as in a tied output layer; the forward pass of max_norm breaks its backward."""
    scores = other @ table.weight.t()
    return (scores.sum() + table(torch.tensor([1, 2])).sum()) ** 2


def test_a_weight_that_is_used_before_the_lookup():
    broken = nn.Embedding(5, 3, max_norm=0.1)
    other = torch.ones(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        twice(broken, other).backward()

    table = nn.Embedding(5, 3)
    optimizer = ProjectedSGD(table.parameters(), lr=0.1, c=0.1)
    before = table.weight.detach().clone()
    loss = twice(table, other)
    assert torch.equal(table.weight, before)
    loss.backward()
    optimizer.step()
    assert longest(table.weight) <= 0.1


def test_a_lookup_twice_in_one_graph_and_a_backward_through_both():
    broken = nn.Embedding(5, 3, max_norm=0.1)
    first = (broken.weight**2).sum()
    second = broken(torch.tensor([1])).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first + second).backward()

    table = nn.Embedding(5, 3)
    optimizer = ProjectedSGD(table.parameters(), lr=0.1, c=0.1)
    ((table.weight**2).sum() + table(torch.tensor([1])).sum()).backward()
    optimizer.step()
    assert longest(table.weight) <= 0.1


def test_replicas_of_data_parallel_read_and_do_not_write():
    """DataParallel hands out replicas whose weights are views that autograd made: max_norm writes into them."""

    def replica(table):
        copied = table._replicate_for_data_parallel()
        copied._parameters["weight"] = torch.ones(()) * table.weight  # a non-leaf, as broadcast gives
        copied.weight = copied._parameters.pop("weight")
        return copied

    broken = replica(nn.Embedding(5, 3, max_norm=0.1))
    before = broken.weight.detach().clone()
    broken(torch.tensor([0, 4]))
    assert not torch.equal(broken.weight, before)  # written, and lost with the replica

    table = nn.Embedding(5, 3)
    copied = replica(table)
    optimizer = ProjectedSGD(table.parameters(), lr=0.1, c=0.1)
    before = copied.weight.detach().clone()
    copied(torch.tensor([0, 4])).sum().backward()
    assert torch.equal(copied.weight, before)
    optimizer.step()
    assert longest(table.weight) <= 0.1


def test_evaluation_does_not_change_the_weights():
    broken = nn.Embedding(5, 3, max_norm=0.1).eval()
    before = broken.weight.detach().clone()
    with torch.no_grad():
        broken(torch.tensor([0, 4]))
    assert not torch.equal(broken.weight, before)

    table = nn.Embedding(5, 3).eval()
    before = table.weight.detach().clone()
    ProjectedSGD(table.parameters(), c=0.1)
    with torch.no_grad():
        table(torch.tensor([0, 4]))
    assert torch.equal(table.weight, before)


def test_rows_that_a_rate_has_pulled_part_of_the_way_are_pulled_on():
    start = torch.tensor([[6.0, 0.0], [6.0, 0.0], [0.5, 0.0]])
    found = []
    for sparse in (True, False):
        table = torch.nn.Embedding(3, 2, sparse=sparse, _weight=start.clone())
        optimizer = ProjectedSGD(table.parameters(), lr=0.0, constraint=MinMaxNorm(1.0, 2.0, rate=0.5))
        for _ in range(4):
            table(torch.tensor([0])).sum().backward()
            optimizer.step()
        found.append(table.weight.detach())
    torch.testing.assert_close(*found)
