"""Real processes: killed at a random step and resumed; spawned with optimizers as arguments."""

import subprocess
import sys
from pathlib import Path


def run(*words):
    script = Path(__file__).parent / "processes.py"
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


def test_killed_at_a_random_step_and_resumed_ends_bit_for_bit_the_same(tmp_path):
    run("killed", str(tmp_path))


def test_an_optimizer_goes_to_a_spawned_process_with_its_projection():
    run("spawned")
