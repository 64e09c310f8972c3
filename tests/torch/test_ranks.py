"""PyTorch's own engines on several processes, see `ranks.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("sizes", [(4, 2)], ids=["four ranks, then two"])
def test_engines(sizes, tmp_path):
    for ranks in sizes:
        commands = [
            [sys.executable, Path(__file__).parent / "ranks.py", str(r), str(ranks), tmp_path] for r in range(ranks)
        ]
        started = [
            subprocess.Popen(c, env={**os.environ, "RANK": str(r), "WORLD_SIZE": str(ranks)})
            for r, c in enumerate(commands)
        ]
        try:
            codes = [p.wait(timeout=200) for p in started]
        finally:
            for p in started:
                p.kill()
        failed = {}
        for r in range(ranks):
            answer = tmp_path / f"{ranks}-{r}.json"
            failed |= json.loads(answer.read_text()) if answer.exists() else {f"rank {r}": "no answer"}
        assert not failed, "\n".join(f"{name}:\n{error}" for name, error in failed.items())
        assert codes == [0] * ranks
