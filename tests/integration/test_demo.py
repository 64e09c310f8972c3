"""The demo, for one epoch of a small network: it ends in its table and its picture, the same for the same seed."""

import functools
import importlib.util
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo():
    mpl.use("Agg")
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    module.SIZES = (784, 64, 64, 10)  # as small as still learns
    module.load = functools.cache(module.load)
    return module


@pytest.fixture(scope="module")
def results(demo):
    """Those of the runs below, in their order."""
    return []


def test_ends_in_a_table_and_a_picture(demo, results, tmp_path, monkeypatch, capsys):
    for name in ("run_torch", "run_jax"):
        run = getattr(demo, name)
        monkeypatch.setattr(demo, name, lambda *task, run=run: results.append(run(*task)) or results[-1])
    options = ["--rates", "0.5", "--c", "0.5", "--epochs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo.py", *options])
    demo.main()
    printed = capsys.readouterr().out
    for method in ("nothing", "L2 penalty 0.001", "max-norm, c = 0.5"):
        assert printed.count(method) >= 2, printed  # PyTorch and JAX
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert len(results) == 6


def test_the_same_seed_gives_the_same_results(demo, results):
    task = demo.Task(demo.load(0), seed=0, epochs=1)
    held = [r for r in results if r.method.c]
    assert len(held) == 2
    for before in held:
        run = demo.run_torch if before.framework == "PyTorch" else demo.run_jax
        again = run(task, demo.Method(c=0.5), 0.5, lambda: None)
        assert np.array_equal(again.losses, before.losses)
        assert (again.accuracy, again.on_bound) == (before.accuracy, before.on_bound)
        assert again.accuracy > 0.5
        assert np.max(again.largest) <= 0.5 * (1 + 1e-6)  # measured in float32 along the way
        assert again.losses[-1] < again.losses[0]


def test_digits_are_real_and_split(demo):
    data = demo.load(0)
    assert data.train_x.shape == (4000, 784)
    assert data.test_x.shape == (1000, 784)
    assert np.bincount(np.append(data.train_y, data.test_y)).tolist() == [500] * 10
    assert (data.train_x.min(), data.train_x.max()) == (0, 1)
