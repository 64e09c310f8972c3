"""Optimizers that live through a random order of what people do to them; after every step each weight is in its set.

What is in force is kept here beside the optimizer, with radii of `Sphere("initial")` measured in float64 by this file.
"""

import copy
import random
import warnings

import pytest
import torch

from projgd import Box, MaxNorm, MinMaxNorm, NonNegative, RelativeUpdate, Sphere, Split, TangentUpdate, UnitNorm
from projgd.torch import projected
from tests.torch.common import copied, saved_and_loaded

INNER = ["Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop"]
INNER += ["Rprop", "SGD"]
SETS = [None, MaxNorm(2.0), MaxNorm(0.5, 0), MaxNorm(1.0, None), MaxNorm(1.0, Split(0, 2, (1, 2))), UnitNorm()]
SETS += [Sphere("initial"), Sphere("initial", None), Sphere(2.0, 0), NonNegative(), Box(-0.1, 0.1)]
SETS += [MinMaxNorm(0.5, 2.0), MinMaxNorm(1.0, 1.5, axis=None)]


def norms(p, constraint):
    vectors = constraint.resolve(tuple(p.shape), "out_first")
    x = p.detach().double().reshape(vectors.shape)
    return torch.linalg.vector_norm(x, dim=vectors.axes).reshape(-1)


def holds(p, constraint, radius):
    if isinstance(constraint, NonNegative):
        return bool((p >= 0).all())
    if isinstance(constraint, Box):
        return bool(((p >= constraint.low) & (p <= constraint.high)).all())
    if isinstance(constraint, (MaxNorm, MinMaxNorm)):
        low, high = constraint.edges()
        return bool(((low <= norms(p, constraint)) & (norms(p, constraint) <= high)).all())
    return constraint is None or bool(((norms(p, constraint) / radius - 1).abs() <= 1e-6).all())


class Life:
    def __init__(self, seed):
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.inner = getattr(torch.optim, self.random.choice(INNER))
        self.sets = [self.random.choice(SETS)]
        fused = self.inner in (torch.optim.SGD, torch.optim.Adam) and self.random.random() < 0.5
        params = [self.weight(), self.weight()]
        self.optimizer = projected(self.inner)(
            params, lr=0.05, constraint=self.sets[0], **({"fused": True} if fused else {})
        )
        self.radii = {}

    def weight(self):
        return torch.nn.Parameter(torch.randn(4, 6))

    def params(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def became(self, optimizer):
        """Another optimizer goes on with what this one had."""
        old, self.optimizer = self.params(), optimizer
        self.radii = {q: self.radii[p] for p, q in zip(old, self.params(), strict=True) if p in self.radii}

    def wants(self, i, constraint):
        if constraint != self.sets[i]:
            for p in self.optimizer.param_groups[i]["params"]:
                self.radii.pop(p, None)
        self.sets[i] = constraint

    def replace_the_set(self, i, group):
        group["constraint"] = self.random.choice(SETS)
        if group["constraint"] is None:
            group["c"] = None
        self.wants(i, group["constraint"])

    def move_c(self, i, group):
        if isinstance(self.sets[i], MaxNorm):
            group["c"] = self.random.choice([0.3, 1.5, 3.0])
            self.wants(i, self.sets[i].replace(c=group["c"]))

    def move_the_axis(self, i, group):
        if self.sets[i] is not None and self.sets[i].axis != "entries":
            group["axis"] = self.random.choice([0, 1, None, "fan_in"])
            self.wants(i, self.sets[i].replace(axis=group["axis"]))

    def shape_the_update(self, i, group):
        if self.sets[i] is not None and self.sets[i].axis != "entries":
            group["update"] = self.random.choice([None, RelativeUpdate(), TangentUpdate()])

    def add_a_group(self, i, group):
        self.sets.append(self.random.choice(SETS))
        self.optimizer.add_param_group({"params": [self.weight()], "constraint": self.sets[-1]})

    def append_a_parameter(self, i, group):
        if self.inner is not torch.optim.Adagrad:  # which makes the state of all parameters at the start
            group["params"].append(self.weight())

    def deepcopy(self, i, group):
        self.became(copied("deepcopy", self.optimizer))

    def pickle(self, i, group):
        self.became(copied("pickle", self.optimizer))

    def save_and_load(self, i, group, by_way_of_the_stock_optimizer=False):
        state = saved_and_loaded(self.optimizer.state_dict())
        groups = [
            {"params": [torch.nn.Parameter(p.detach().clone()) for p in g["params"]]}
            for g in self.optimizer.param_groups
        ]
        if by_way_of_the_stock_optimizer:
            stock = self.inner(copy.deepcopy(groups), lr=0.5)
            stock.load_state_dict(state)
            state = stock.state_dict()
        fresh = projected(self.inner)(groups, lr=0.7, c=55.0)
        fresh.load_state_dict(state)
        self.became(fresh)

    def go_by_way_of_the_stock_optimizer(self, i, group):
        self.save_and_load(i, group, by_way_of_the_stock_optimizer=True)

    def step(self):
        for group, constraint in zip(self.optimizer.param_groups, self.sets, strict=True):
            for p in group["params"]:
                p.grad = torch.randn_like(p) if self.random.random() < 0.8 else None
                if isinstance(constraint, Sphere) and p not in self.radii:
                    initial = constraint.radius == "initial"
                    self.radii[p] = norms(p, constraint) if initial else constraint.radius
        self.optimizer.step()
        for group, constraint in zip(self.optimizer.param_groups, self.sets, strict=True):
            for p in group["params"]:
                assert p.grad is None or holds(p, constraint, self.radii.get(p)), constraint


EVENTS = [Life.replace_the_set, Life.move_c, Life.move_the_axis, Life.shape_the_update, Life.add_a_group]
EVENTS += [Life.append_a_parameter, Life.deepcopy, Life.pickle, Life.save_and_load]
EVENTS += [Life.go_by_way_of_the_stock_optimizer]


@pytest.mark.parametrize("seed", range(60))
def test_through_all_of_it_every_weight_is_in_its_set(seed):
    life, lived = Life(seed), []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # weight decay against spheres
            for _ in range(10):
                event = life.random.choice(EVENTS)
                i = life.random.randrange(len(life.sets))
                lived.append(f"{event.__name__} {i}")
                event(life, i, life.optimizer.param_groups[i])
                life.step()
    except ValueError as error:  # a set may have left a vector of zeros, which has no radius
        if "have norm 0" not in str(error):
            raise
    except AssertionError as error:
        raise AssertionError(f"{life.inner.__name__}: {', '.join(lived)}") from error
