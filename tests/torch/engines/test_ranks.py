"""PyTorch's own engines on several processes, see `ranks.py`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

SIZES = (4, 2)


def test_four_ranks_then_two(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "ranks.py"), str(tmp_path), *map(str, SIZES)]
    started = subprocess.Popen(command, start_new_session=True)
    try:
        code = started.wait(timeout=300)
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)  # its forks, too
    failed = {}
    for ranks in SIZES:
        for rank in range(ranks):
            answer = tmp_path / f"{ranks}-{rank}.json"
            found = json.loads(answer.read_text()) if answer.exists() else {"": "no answer"}
            failed |= {f"{name} on rank {rank} of {ranks}": error for name, error in found.items()}
    assert not failed, "\n".join(f"{name}:\n{error}" for name, error in failed.items())
    assert code == 0
