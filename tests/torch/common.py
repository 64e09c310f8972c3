"""Weights, networks and steps that several test files of the PyTorch front share."""

import copy
import io
import pickle

import numpy as np
import torch


def weight(*shape, value=5.0):
    return torch.nn.Parameter(torch.full(shape or (4, 3), value))


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
