"""Set-up shared by all tests: one thread per worker, the same random cases in every run, this checkout on the path."""

import gc
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


def pytest_collection_finish(session):
    """Collect garbage less often, without the objects that imports made: this saves 7 % of the time of JAX tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def _drop_compiled_programs():
    """Drop what JAX compiled after every file: together it takes gigabytes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="module")
def quick_compilation():
    """Let JAX compile fast instead of well: for a file that does not test what XLA's optimizations make of our code.

    Compilation takes most of the time of such a file. Tests of exactness, memory and branches need the programs that
    users run: they are in files that do not use this, or use `full_compilation`.
    """
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def full_compilation(quick_compilation):
    """In a file that uses `quick_compilation`: compile the functions that this test jits as users do."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
