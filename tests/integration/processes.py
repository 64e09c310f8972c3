"""What the processes of `test_processes.py` run: `processes.py train FOLDER STEPS PAUSE` and `processes.py spawn`."""

import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

from projgd import MaxNorm
from projgd.torch import ProjectedAdamW, param_groups, projected

C = 0.5


def made():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))
    optimizer = ProjectedAdamW(param_groups(net, {"0.*": MaxNorm(C), "3.*": MaxNorm(2 * C)}), lr=0.05)
    return net, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)


def backward(net):
    net(torch.randn(8, 6)).square().sum(1).sub(1).square().mean().backward()


def train(folder, steps, pause):
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
    for k in range(start + 1, steps + 1):
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


def in_child(net, optimizer, answers):
    backward(net)
    optimizer.step()
    answers.put([type(optimizer).__name__, max(float(p.detach().double().norm(dim=1).max()) for p in net.parameters())])


def spawn():
    from lion_pytorch import Lion

    context = torch.multiprocessing.get_context("spawn")
    for cls in (torch.optim.Adam, Lion):
        net = nn.Linear(6, 4, bias=False)
        nn.init.constant_(net.weight, 3.0)
        net.share_memory()
        answers = context.SimpleQueue()
        child = context.Process(target=in_child, args=(net, projected(cls)(net.parameters(), lr=0.1, c=C), answers))
        child.start()
        child.join(60)
        name, longest = answers.get()
        assert name == f"Projected{cls.__name__}"
        assert C * (1 - 1e-5) <= longest <= C
        assert bool((net.weight.norm(dim=1) <= C).all())  # the parent's weights are the same memory


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    else:
        spawn()
