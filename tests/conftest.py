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


QUICK = {"xla_cpu_use_fusion_emitters": False}
"""Options of XLA that shorten compilation."""


def _set_quick(is_quick):
    import jax
    from jax._src import compiler

    usual = getattr(compiler.get_compile_options, "usual", compiler.get_compile_options)

    def get_options(*args, env_options_overrides=None, **kwargs):
        return usual(*args, env_options_overrides=QUICK | (env_options_overrides or {}), **kwargs)

    get_options.usual = usual
    compiler.get_compile_options = get_options if is_quick else usual
    jax.config.update("jax_disable_most_optimizations", is_quick)


@pytest.fixture(scope="module")
def quick_compilation():
    """Let JAX compile fast instead of well: for a file that does not test what XLA's optimizations make of our code.

    Compilation takes most of the time of such a file. Without LLVM's optimizations and XLA's fusion emitters, programs
    compile in a third of the time. Tests of exactness, memory and branches need the programs that users run: they are
    in files that do not use this, or use `full_compilation`.
    """
    import jax

    try:
        jax.jit(lambda x: x + 1, compiler_options=QUICK)(0.0)
    except Exception:  # a version of JAX that does not know the options
        QUICK.clear()
    _set_quick(True)
    yield
    _set_quick(False)


@pytest.fixture
def full_compilation(quick_compilation):
    """In a file that uses `quick_compilation`: compile the functions that this test jits as users do."""
    _set_quick(False)
    yield
    _set_quick(True)
