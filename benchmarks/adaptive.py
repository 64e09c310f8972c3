"""The cost of projecting in the adaptive metric, as a ratio to the plain fused step: python -m benchmarks.adaptive

The weights of a 784-1024-1024-2048-10 network under Adam, with c that binds on half of the neurons and with c that
never binds; the Euclidean projection beside it. All optimizers share parameters and state, and take turns.
"""

import argparse
import itertools
import statistics
import time

import torch

from projgd.torch import ProjectedAdam

SIZES = [784, 1024, 1024, 2048, 10]


def parameter(shape):
    """Half of the rows on the unit ball and pushed outwards by gradients of all sizes; the others inside."""
    generator = torch.Generator().manual_seed(len(shape))
    p = torch.randn(shape, generator=generator)
    gradient = torch.rand(shape, generator=generator) * 10 ** (-3 * torch.rand(shape, generator=generator))
    if len(shape) > 1:
        p.div_(p.norm(dim=1, keepdim=True))
        p[shape[0] // 2 :] *= 0.5
        gradient.mul_(-p.sign())
        gradient[shape[0] // 2 :].neg_()
    p.requires_grad_()
    p.grad = gradient
    return p


def steps(rate):
    """A function that takes one step, by name; the plain one first."""
    params = [parameter(s) for i, o in itertools.pairwise(SIZES) for s in ((o, i), (o,))]
    plain = torch.optim.Adam(params, lr=rate, fused=True)
    plain.step()
    found = {"plain, fused": plain.step}
    for bound, c in (("half binds", 1.0), ("nothing binds", 1e6)):
        for metric in ("euclidean", "adaptive"):
            ours = ProjectedAdam(params, lr=rate, fused=True, c=c, metric=metric)
            ours.state = plain.state
            found[f"{metric}, {bound}"] = ours.step
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate: how far out a step goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    contenders = steps(args.rate)
    taken = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, step in contenders.items():
            start = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - start)
    base = statistics.median(taken["plain, fused"])
    for name, times in taken.items():
        median = statistics.median(times)
        print(f"{name:26}{1e3 * median:9.2f} ms   R = {median / base:.2f}")


if __name__ == "__main__":
    main()
