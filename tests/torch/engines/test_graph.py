"""The projection inside of a graph of torch.compile: vectors of several lengths, while c moves, without a new graph."""

import pytest
import torch

from projgd import Box, MaxNorm
from projgd.torch import ProjectedAdam, ProjectedSGD
from tests.contract import exact_norms
from tests.torch.common import give_gradients, random


def test_vectors_of_several_lengths_have_their_own_guards_while_c_moves_in_one_graph():
    """Columns, an axis between others, and vectors that have no entry; the second value of c makes it an input."""
    torch.compiler.reset()
    params = random((200, 7), (5, 7), (4, 3, 5), (0, 7))
    optimizer, made = ProjectedSGD(params, lr=0.1, momentum=0.9, axis=0, c=1.0), []

    def counted(graph, inputs):
        made.append(graph)
        return graph

    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # which makes the momentum
    step = torch.compile(optimizer.step, fullgraph=True, backend=counted)
    for i, c in enumerate((1.0, 0.9, 0.5, 0.4, 1e-3)):
        optimizer.param_groups[0]["c"] = c
        give_gradients(params, i)
        step()
        for p in params[:3]:
            norms = exact_norms(p.detach().numpy())
            assert (norms <= c).all()
            assert (norms >= c * (1 - 1e-5)).any()
    assert len(made) == 2


@pytest.mark.parametrize(
    ("make", "engine"),
    [
        (lambda p: ProjectedSGD([p], c=1.0), "graph"),
        (lambda p: ProjectedSGD([p], c=1.0, fused=True), "graph"),
        (lambda p: ProjectedAdam([p], c=1.0, metric="adaptive"), "reference"),
        (lambda p: ProjectedSGD([p], constraint=Box(-1.0, 1.0)), "reference"),
        (lambda p: ProjectedSGD([p.double().detach()], constraint=MaxNorm(1.0)), "reference"),
        (lambda p: ProjectedSGD([p], c=None), "free"),
    ],
)
def test_what_a_graph_does_not_take_the_reference_does(make, engine):
    (p,) = random((4, 3))
    (choice,) = make(p).routes(compiled=True).values()
    assert choice.engine == engine
