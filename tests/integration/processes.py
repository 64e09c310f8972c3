"""What `test_processes.py` runs: `processes.py killed FOLDER` and `processes.py spawned`.

Processes that are killed and resumed are forks of one that has imported everything and has never trained.
"""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import nn

from projgd import MaxNorm
from projgd.torch import ProjectedAdamW, param_groups, projected

C = 0.5
STEPS = 120


def made():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))
    optimizer = ProjectedAdamW(param_groups(net, {"0.*": MaxNorm(C), "3.*": MaxNorm(2 * C)}), lr=0.05)
    return net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)


def backward(net):
    net(torch.randn(8, 6)).square().sum(1).sub(1).square().mean().backward()


def train(folder, pause):
    """From the last checkpoint to the end, one line per step; a checkpoint every seven steps."""
    net, optimizer, schedule = made()
    start = 0
    if (folder / "last.pt").exists():
        saved = torch.load(folder / "last.pt")  # weights_only=True
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["random"])
        start = saved["step"]
    for k in range(start + 1, STEPS + 1):
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
        schedule.step()
        if k % 7 == 0:
            saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save({**saved, "random": torch.get_rng_state(), "step": k}, folder / "next.pt")
            os.replace(folder / "next.pt", folder / "last.pt")
        print(k, flush=True)
        time.sleep(pause)
    torch.save([net.state_dict(), optimizer.state_dict()], folder / "end.pt")


def forked(folder, pause):
    """A process that trains: its id, and what it prints."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(write, 1)
        try:
            train(folder, pause)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write)
    return pid, os.fdopen(read)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(folder):
    """Killed at a random step, twice, and resumed: the end is that of an uninterrupted run, bit for bit."""
    whole, pieces = folder / "whole", folder / "pieces"
    whole.mkdir()
    pieces.mkdir()
    reached = 0
    for _ in range(2):
        pid, lines = forked(pieces, 0.005)
        last = random.randint(reached + 8, reached + 40)
        for line in lines:
            reached = int(line)
            if reached >= last:
                break
        os.kill(pid, signal.SIGKILL)
        assert exit_code(pid) == -signal.SIGKILL, f"was to be killed at step {last}"
        assert not (pieces / "end.pt").exists()
    resumed, lines = forked(pieces, 0)
    steps = [int(line) for line in lines]
    assert exit_code(resumed) == 0
    assert steps[0] > 1  # from a checkpoint
    uninterrupted, lines = forked(whole, 0)
    assert len(list(lines)) == STEPS
    assert exit_code(uninterrupted) == 0

    (net, optimizer), (twin, other) = (torch.load(of / "end.pt") for of in (whole, pieces))
    assert all(torch.equal(net[name], twin[name]) for name in net)
    assert optimizer["param_groups"] == other["param_groups"]
    for index, state in optimizer["state"].items():
        assert all(torch.equal(value, other["state"][index][key]) for key, value in state.items())


def in_child(nets, optimizers, answers):
    for net, optimizer in zip(nets, optimizers, strict=True):
        backward(net)
        optimizer.step()
        answers.put([type(optimizer).__name__, float(net.weight.detach().double().norm(dim=1).max())])


def spawned():
    """Optimizers go to a spawned process with their projection, those of a dynamic class, too."""
    from lion_pytorch import Lion

    context = torch.multiprocessing.get_context("spawn")
    inner = (torch.optim.Adam, Lion)
    nets = [nn.Linear(6, 4, bias=False).share_memory() for _ in inner]
    for net in nets:
        nn.init.constant_(net.weight, 3.0)
    optimizers = [projected(cls)(net.parameters(), lr=0.1, c=C) for cls, net in zip(inner, nets, strict=True)]
    answers = context.SimpleQueue()
    child = context.Process(target=in_child, args=(nets, optimizers, answers))
    child.start()
    child.join(60)
    for cls, net in zip(inner, nets, strict=True):
        name, longest = answers.get()
        assert name == f"Projected{cls.__name__}"
        assert C * (1 - 1e-5) <= longest <= C
        assert bool((net.weight.norm(dim=1) <= C).all())  # the parent's weights are the same memory


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        killed(Path(sys.argv[2]))
    else:
        spawned()
