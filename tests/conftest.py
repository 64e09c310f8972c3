"""Set-up shared by all tests: one thread per worker, the same random cases in every run, this checkout on the path."""

import os
import sys
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]).rstrip(
    os.pathsep
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not Path("/dev/nvidiactl").exists():  # no GPU: Triton's kernels are interpreted, if triton is imported after this
    os.environ.setdefault("TRITON_INTERPRET", "1")
hypothesis.settings.register_profile("same cases", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same cases")


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs():
    """Drop what JAX compiled after every file: together it takes gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
