"""The examples' training loops, run; and a run that is killed and resumed."""

import importlib.util
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def loops():
    spec = importlib.util.spec_from_file_location("jax_loops", EXAMPLES / "jax_loops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["jax.grad in a loop", "lax.scan, donated", "TrainState", "nnx.Optimizer", "equinox"])
def test_loop(loops, name):
    params, loss = loops.LOOPS[name]()
    assert 0 < float(loss) < 0.65  # it learns: chance is 0.693
    found = [leaf for leaf in loops.find_leaves(params) if leaf is not None and leaf.fan_in]
    norms = [np.sqrt((np.asarray(leaf.array, np.float64) ** 2).sum(axis=leaf.fan_in)).max() for leaf in found]
    assert max(norms) <= loops.C
    assert max(norms) >= loops.C * (1 - 1e-5)


def test_population(loops):
    losses, norms = loops.population()
    assert losses.shape == norms.shape == (4, 3)
    assert np.isfinite(losses).all()
    bounds = np.asarray([0.25, 0.5, 1.0, 4.0])[:, None]
    assert (np.asarray(norms) <= bounds * (1 + 1e-6)).all()  # the example's own norms are float32
    assert (np.asarray(norms)[:2] >= bounds[:2] * (1 - 1e-5)).all()


def test_killed_and_resumed(tmp_path):
    def run(folder: str, *options: str) -> int:
        (tmp_path / folder).mkdir(exist_ok=True)
        command = [sys.executable, str(EXAMPLES / "jax_resume.py"), str(tmp_path / folder), *options]
        return subprocess.run(command, capture_output=True, timeout=300).returncode

    assert run("whole") == 0
    assert run("killed", "--die-at", "7") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "kernel.npy").exists()
    assert run("killed") == 0
    whole, killed = (np.load(tmp_path / folder / "kernel.npy") for folder in ("whole", "killed"))
    np.testing.assert_array_equal(killed, whole)
    assert np.sqrt((whole.astype(np.float64) ** 2).sum(axis=0)).max() <= np.float32(0.5 + 0.05 * 19) * (1 + 1e-7)
