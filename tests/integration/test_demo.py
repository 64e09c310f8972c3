"""The demo, for one epoch: it ends in its table and its picture, and the same seed gives the same table."""

import importlib.util
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from rich.console import Console

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def demo():
    mpl.use("Agg")
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module
    spec.loader.exec_module(module)
    module.SIZES = (784, 64, 64, 10)  # as small as still learns
    return module


def test_ends_in_a_table_and_a_picture(demo, tmp_path, monkeypatch, capsys):
    options = ["--rates", "1", "--c", "0.5", "--epochs", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo.py", *options])
    demo.main()
    printed = capsys.readouterr().out
    for method in ("nothing", "L2 penalty 0.001", "max-norm, c = 0.5"):
        assert printed.count(method) >= 2, printed  # PyTorch and JAX
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_table(demo):
    task = demo.Task(demo.load(0), seed=0, epochs=1)
    tables = []
    for _ in range(2):
        results = [run(task, demo.Method(c=0.5), 0.5, lambda: None) for run in (demo.run_torch, demo.run_jax)]
        console = Console(width=100, record=True, quiet=True)
        console.print(demo.table_of(results))
        tables.append(console.export_text())
    assert tables[0] == tables[1]
    for r in results:
        assert r.accuracy > 0.5
        assert np.max(r.largest) <= 0.5 * (1 + 1e-6)  # measured in float32 along the way
        assert r.losses[-1] < r.losses[0]


def test_digits_are_real_and_split(demo):
    data = demo.load(0)
    assert data.train_x.shape == (4000, 784)
    assert data.test_x.shape == (1000, 784)
    assert np.bincount(np.append(data.train_y, data.test_y)).tolist() == [500] * 10
    assert (data.train_x.min(), data.train_x.max()) == (0, 1)
