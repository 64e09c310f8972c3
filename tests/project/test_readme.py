"""The README's code runs as printed, and what it shows and links is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_both_frameworks_are_shown():
    assert len(BLOCKS) == 2
    assert "projgd.torch" in BLOCKS[0]
    assert "projgd.optax" in BLOCKS[1]


@pytest.mark.parametrize("block", BLOCKS, ids=["torch", "jax"])
def test_code_runs(block):
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_links_and_commands_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make (\w+)", README)) <= set(targets)
    for path in re.findall(r"`((?:tests|examples|docs)/[\w/.]*)", README):
        assert (ROOT / path).exists(), path
