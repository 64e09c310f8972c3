"""Weights, networks and steps that several test files of the PyTorch front share."""

import copy
import inspect
import io
import pickle

import numpy as np
import schedulefree
import torch
from lion_pytorch import Lion

from tests.contract import NUMPY


def weight(*shape, value=5.0):
    return torch.nn.Parameter(torch.full(shape or (4, 3), value))


def random(*shapes, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(scale * torch.randn(s, generator=generator)) for s in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)


def step(optimizer, gradient=0.0):
    """One step in which every gradient is a number throughout."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.full_like(p, gradient)
    optimizer.step()


def norms(p, axis=1):
    return np.linalg.norm(p.detach().double().numpy(), axis=axis)


def longest(p):
    return norms(p).max()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def batch(seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)


def loss_of(net, seed=0):
    x, y = batch(seed)
    return torch.nn.functional.cross_entropy(net(x), y)


def train(net, optimizer, steps):
    for k in steps:
        optimizer.zero_grad()
        loss_of(net, k).backward()
        optimizer.step()


def longest_of(net):
    return max(longest(p) for p in net.parameters() if p.ndim == 2)


def outside(net):
    """The network with long weights."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.linspace(-2, 2, p.numel()).reshape(p.shape))
    return net


def equal(a, b):
    """Whether two networks have the same weights, bit for bit."""
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def same(a, b):
    """Equal bit for bit, through any nesting of containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def saved_and_loaded(state):
    """What `torch.load(weights_only=True)` gives back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copied(how, thing):
    return copy.deepcopy(thing) if how == "deepcopy" else pickle.loads(pickle.dumps(thing))


# ---------------------------------------------------------------------------------------------- the vectors of a tensor

SHORT = {8: torch.int64, 4: torch.int32, 2: torch.int16}
"""Integers of as many bytes, to compare bits and to hand them to NumPy."""


def rows_of(x, vectors):
    """The vectors of a tensor as rows."""
    kept = [a for a in range(len(vectors.shape)) if a not in vectors.axes]
    return x.reshape(vectors.shape).permute(*kept, *vectors.axes).reshape(-1, vectors.length)


def tensor_of(rows, vectors, shape):
    """The tensor that has these rows as its vectors."""
    order = [*(a for a in range(len(vectors.shape)) if a not in vectors.axes), *vectors.axes]
    x = rows.reshape([vectors.shape[a] for a in order]).permute([order.index(a) for a in range(len(order))])
    return x.reshape(shape)


def columns(x, vectors):
    """The vectors of a tensor as columns of a NumPy array with the same bits."""
    rows = rows_of(x.detach().cpu(), vectors).contiguous()
    return rows.view(SHORT[rows.element_size()]).numpy().view(NUMPY[str(x.dtype).removeprefix("torch.")]).T


# --------------------------------------------------------------------------------------------------- every optimizer

STOCK = sorted(
    (v for v in vars(torch.optim).values() if inspect.isclass(v) and issubclass(v, torch.optim.Optimizer)),
    key=lambda cls: cls.__name__,
)
STOCK.remove(torch.optim.Optimizer)
THIRD = [Lion, schedulefree.SGDScheduleFree, schedulefree.AdamWScheduleFree]
RATES = {"Adafactor": 0.5, "Adadelta": 50.0, "LBFGS": 0.5, "Muon": 0.5, "SGD": 0.5}


class Matrices(torch.nn.Module):
    """Matrices alone, as Muon wants it; the table has sparse gradients for the optimizer that takes only these."""

    def __init__(self, sparse=False):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(7, 6, sparse=sparse)
        self.first = torch.nn.Linear(6, 5, bias=False)
        self.last = torch.nn.Linear(5, 3, bias=False)

    def forward(self, tokens):
        return self.last(torch.tanh(self.first(self.table(tokens))))

    def trained(self, cls):
        return [self.table.weight] if cls is torch.optim.SparseAdam else list(self.parameters())


def matrices_and(made, cls, **settings):
    """A network, and an optimizer `made` from its weights: `cls` itself or its projected class."""
    net = Matrices(sparse=cls is torch.optim.SparseAdam)
    options = {"max_iter": 3} if cls is torch.optim.LBFGS else {}
    optimizer = made(net.trained(cls), lr=RATES.get(cls.__name__, 0.05), **options, **settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    return net, optimizer


def step_matrices(net, optimizer, seed):
    tokens = torch.randint(7, (16,), generator=torch.Generator().manual_seed(seed))
    target = torch.randint(3, (16,), generator=torch.Generator().manual_seed(seed + 99))

    def closure():
        net.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(tokens), target)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        return optimizer.step(closure)
    closure()
    return optimizer.step()
