"""Where nothing binds, the step is the plain optimizer's own: parameters and state, over 100 steps."""

import pytest
import torch

from tests.torch.option_sets import EVERY, IDS


def make():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in [(4, 3), (4,), (3, 2, 3, 3)]]


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize(("cls", "options"), EVERY, ids=IDS)
def test_a_hundred_steps_are_the_plain_ones_bit_for_bit(cls, options, foreach):
    plain, free, slack = make(), make(), make()
    stock = cls.inner(plain, foreach=foreach, **options)
    ours = [cls(params, c=c, foreach=foreach, **options) for params, c in ((free, None), (slack, 1e4))]
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        for same in zip(plain, free, slack, strict=True):
            grad = torch.randn(same[0].shape, generator=generator)
            for p in same:
                p.grad = grad.clone()  # foreach=True with Nesterov adds to it in place
        for optimizer in (stock, *ours):
            optimizer.step()
    for params, optimizer in zip((free, slack), ours, strict=True):
        for p, q in zip(plain, params, strict=True):
            assert torch.equal(p, q)
            assert list(stock.state[p]) == list(optimizer.state[q])
            for key, expected in stock.state[p].items():
                found = optimizer.state[q][key]
                assert (found is None and expected is None) or torch.equal(found, expected), key
