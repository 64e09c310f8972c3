"""Real processes: killed at a random step and resumed; spawned with an optimizer as an argument."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parent / "processes.py"
STEPS = 300


def start(*words):
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, words)], stdout=subprocess.PIPE, text=True)


def test_killed_at_a_random_step_and_resumed_ends_bit_for_bit_the_same(tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    whole.mkdir()
    pieces.mkdir()
    uninterrupted = start("train", whole, STEPS, 0)
    reached = 0
    for _ in range(2):
        running = start("train", pieces, STEPS, 0.005)
        last = random.randint(reached + 8, reached + 100)
        for line in running.stdout:
            reached = int(line)
            if reached >= last:
                break
        os.kill(running.pid, signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL, f"was to be killed at step {last}"
        assert not (pieces / "end.pt").exists()
    resumed = start("train", pieces, STEPS, 0)
    steps = [int(line) for line in resumed.stdout]
    assert resumed.wait() == 0
    assert steps[0] > 1  # from a checkpoint
    uninterrupted.communicate()
    assert uninterrupted.returncode == 0

    (net, optimizer), (twin, other) = (torch.load(folder / "end.pt") for folder in (whole, pieces))
    assert all(torch.equal(net[name], twin[name]) for name in net)
    assert optimizer["param_groups"] == other["param_groups"]
    for index, state in optimizer["state"].items():
        assert all(torch.equal(value, other["state"][index][key]) for key, value in state.items())


def test_an_optimizer_goes_to_a_spawned_process_with_its_projection():
    assert start("spawn").wait(timeout=120) == 0
