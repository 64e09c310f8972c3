"""The projection inside of a graph of torch.compile: vectors of several lengths, while c moves, without a new graph."""

import pytest
import torch
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR

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


SCHEDULERS = {
    "LambdaLR": lambda o: schedules.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: schedules.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: schedules.StepLR(o, 2),
    "MultiStepLR": lambda o: schedules.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: schedules.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: schedules.LinearLR(o),
    "ExponentialLR": lambda o: schedules.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: schedules.PolynomialLR(o, 10),
    "ReduceLROnPlateau": lambda o: schedules.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedules.CyclicLR(o, 0.1, 0.5, cycle_momentum=False),
    "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.5, total_steps=20, cycle_momentum=False),
    "SequentialLR": lambda o: schedules.SequentialLR(
        o, [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o), schedules.LinearLR(o)]),
    "SWALR": lambda o: SWALR(o, 0.05),
}


def trained(made, schedule, compiled, when, steps=4):
    """The weights and learning rates of some steps under a scheduler, and how many graphs were compiled."""
    torch.compiler.reset()
    graphs = []
    p = torch.nn.Parameter(torch.linspace(-3, 3, 12).reshape(4, 3))
    p.grad = torch.ones_like(p)
    optimizer = made([p], lr=torch.tensor(0.5), c=1.0)

    def count(graph, _):
        graphs.append(graph)
        return graph

    if when == "after":
        scheduler = schedule(optimizer)
    step = torch.compile(optimizer.step, fullgraph=True, backend=count) if compiled else optimizer.step
    if when == "before":
        scheduler = schedule(optimizer)
    rates = []
    for _ in range(steps):
        step()
        scheduler.step(*[1.0] * isinstance(scheduler, schedules.ReduceLROnPlateau))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert float(p.detach().norm(dim=1).max()) <= 1
    return p.detach(), rates, len(graphs)


@pytest.mark.filterwarnings("ignore:Detected call", "error:Seems like")  # torch does not see a compiled step
@pytest.mark.parametrize(("when", "name"), [("before", "CosineAnnealingLR"), *(("after", name) for name in SCHEDULERS)])
def test_a_compiled_step_follows_every_scheduler(when, name):
    """The first graph is that of the step that makes the state, and the second one stays."""
    made = ProjectedAdam if name == "CosineAnnealingLR" else ProjectedSGD
    expected, rates, _ = trained(made, SCHEDULERS[name], False, when)
    found, same_rates, graphs = trained(made, SCHEDULERS[name], True, when)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert rates == same_rates
    assert graphs <= 2


class Own(ProjectedSGD):
    """A step of one's own."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.sub_(self.param_groups[0]["lr"] * p.grad)


def test_a_compiled_step_of_ones_own_follows_a_scheduler():
    cosine = SCHEDULERS["CosineAnnealingLR"]
    for when in ("after", "before"):
        plain, compiled = (trained(Own, cosine, is_compiled, when)[0] for is_compiled in (False, True))
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_a_scheduler_that_comes_before_the_first_step_still_says_so():
    optimizer = ProjectedSGD([torch.nn.Parameter(torch.ones(4, 3))], lr=0.5, c=1.0)
    scheduler = SCHEDULERS["CosineAnnealingLR"](optimizer)
    with pytest.warns(UserWarning, match="Detected call of `lr_scheduler.step"):
        scheduler.step()
