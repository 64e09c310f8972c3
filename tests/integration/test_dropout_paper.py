"""The example of the dropout paper: its readers, its table and plot in both frameworks, and a run that is resumed."""

import functools
import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "dropout_paper.py"
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
NPZ = ("x_train", "y_train", "x_test", "y_test")


@pytest.fixture(scope="module")
def paper():
    spec = importlib.util.spec_from_file_location("dropout_paper", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["dropout_paper"] = module
    spec.loader.exec_module(module)
    module.QUICK_SIZES = (784, 32, 32, 10)
    module.load = functools.cache(module.load)
    yield module
    del sys.modules["dropout_paper"]


@pytest.fixture
def run(paper, monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["dropout_paper.py", *map(str, options)])
        paper.main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (n, 28, 28), np.uint8) for n in (60, 20)]
    digits = [rng.integers(0, 10, n).astype(np.uint8) for n in (60, 20)]
    return images[0], digits[0], images[1], digits[1]


def write_idx(folder, arrays, compress):
    folder.mkdir()
    for name, array in zip(IDX, arrays, strict=True):
        content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
        path = folder / (name + ".gz" * compress)
        path.write_bytes(gzip.compress(content) if compress else content)
    return folder


def table(printed):
    return printed[printed.index("Error in %") : printed.index("picture:")]


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_ends_in_a_table_and_a_plot(run, paper, framework, tmp_path):
    printed = run("--quick", "--framework", framework, "--out", tmp_path)
    for method, error in paper.PAPER.items():
        assert method in table(printed)
        assert f"{error:.2f}" in table(printed)
    (picture,) = tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(results) == 12  # four methods, two rates each, one test run each
    assert not list(tmp_path.glob("*.checkpoint"))
    assert min(r["error"][-1] for r in results if r["method"] == "max-norm") < 40


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_an_interrupted_run_ends_in_the_same_table(run, paper, framework, tmp_path, monkeypatch):
    trainer = paper.FRAMEWORKS[framework]
    train, trained = trainer.epoch, []
    stop_at = 7

    def epoch(self, number):
        if len(trained) == stop_at:
            raise KeyboardInterrupt
        trained.append((self.run.name, number))
        return train(self, number)

    options = ("--grid", "one", "--epochs", 2, "--seeds", 2, "--framework", framework, "--out")
    monkeypatch.setattr(paper, "SIZES", (784, 32, 32, 10))
    whole = run(*options, tmp_path / "whole")
    monkeypatch.setattr(trainer, "epoch", epoch)
    with pytest.raises(SystemExit, match="resumes"):
        run(*options, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.checkpoint"))) == 1  # one of the two epochs of a run
    stop_at = None
    assert table(run(*options, tmp_path / "parts")) == table(whole)
    assert len(trained) == len(set(trained)) == 4 * 3 * 2  # no epoch twice
    assert table(run(*options, tmp_path / "parts")) == table(whole)
    assert len(trained) == 24
    for path in (tmp_path / "whole").glob("*.json"):
        assert path.read_text() == (tmp_path / "parts" / path.name).read_text()


def test_the_test_images_are_not_used_to_choose(paper):
    data = paper.load(None)
    held = paper.hold_out(data)
    assert (len(held.x), len(held.test_x)) == (3334, 666)
    rows = {row.tobytes() for row in data.x}
    assert all(row.tobytes() in rows for row in held.test_x)
    assert not {row.tobytes() for row in held.x} & {row.tobytes() for row in held.test_x}


def test_both_frameworks_start_alike_and_test_with_the_paper_s_dropout(paper):
    data = paper.load(None)
    run = paper.Run("", "dropout + max-norm", 2.0, 1.0, "test", 0, 1, 0.95, (784, 32, 10), 0)
    digits = [trainer(run, data.x, data.y).predict(data.test_x) for trainer in paper.FRAMEWORKS.values()]
    first, second = run.initial_kernels()
    by_hand = (0.5 * np.maximum(0.8 * data.test_x @ first, 0) @ second).argmax(1)
    assert np.mean(digits[0] == by_hand) > 0.99
    assert np.mean(digits[1] == by_hand) > 0.99


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_the_bound_holds(paper, framework):
    data = paper.load(None)
    run = paper.Run(framework, "max-norm", 0.5, 1.0, "test", 0, 1, 0.95, (784, 32, 10), 0)
    trainer = paper.FRAMEWORKS[framework](run, data.x[:500], data.y[:500])
    trainer.epoch(0)
    axis = 1 if framework == "torch" else 0
    norms = [np.linalg.norm(np.asarray(kernel), axis=axis) for kernel in trainer.kernels()]
    assert max(n.max() for n in norms) <= 0.5 * (1 + 1e-6)


@pytest.mark.parametrize("kind", ["idx", "idx.gz", "npz", "flat npz"])
def test_readers(paper, arrays, kind, tmp_path):
    path = tmp_path / "mnist"
    if "npz" in kind:
        path = tmp_path / "mnist.npz"
        flat = [a.reshape(len(a), -1) if a.ndim == 3 and kind == "flat npz" else a for a in arrays]
        np.savez(path, **dict(zip(NPZ, flat, strict=True)))
    else:
        write_idx(path, arrays, compress=kind == "idx.gz")
    data = paper.load(path)
    assert (data.x.shape, data.test_x.shape, data.x.dtype) == ((60, 784), (20, 784), np.float32)
    np.testing.assert_array_equal(np.rint(data.x * 255), arrays[0].reshape(60, 784))
    np.testing.assert_array_equal(np.rint(data.test_x * 255), arrays[2].reshape(20, 784))
    assert (data.y.tolist(), data.test_y.tolist()) == (arrays[1].tolist(), arrays[3].tolist())


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("length", [0, 2, 6, 10, 500])
def test_a_truncated_idx_file_is_an_error(paper, arrays, compress, length, tmp_path):
    folder = write_idx(tmp_path / "mnist", arrays, compress)
    path = folder / (IDX[0] + ".gz" * compress)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{IDX[0]}.* (is truncated|is no MNIST file)"):
        paper.load(folder)


def test_a_truncated_npz_file_is_an_error(paper, arrays, tmp_path):
    path = tmp_path / "mnist.npz"
    np.savez_compressed(path, **dict(zip(NPZ, arrays, strict=True)))
    whole = path.read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"mnist.npz is no npz file, or truncated"):
            paper.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": np.zeros((60, 32, 32, 3), np.uint8)}, "images"),
        ({"y_test": np.zeros(19, np.uint8)}, "labels"),
        ({"y_train": np.full(60, 10)}, "labels 0 to 9"),
        ({"x_train": np.zeros((60, 784))}, "pixels must be 0 to 255"),
        ({"x_train": None}, "x_train"),
    ],
)
def test_other_arrays_are_an_error(paper, arrays, change, message, tmp_path):
    changed = dict(zip(NPZ, arrays, strict=True)) | change
    np.savez(tmp_path / "other.npz", **{name: a for name, a in changed.items() if a is not None})
    with pytest.raises(ValueError, match=f"other.npz is no MNIST file.*{message}"):
        paper.load(tmp_path / "other.npz")


def test_other_files_are_an_error(run, paper, arrays, tmp_path, capsys):
    folder = write_idx(tmp_path / "mnist", arrays, compress=False)
    (folder / IDX[1]).rename(folder / "labels")
    with pytest.raises(ValueError, match=r"has no file train-labels\*"):
        paper.load(folder)
    (folder / IDX[1]).write_bytes((folder / IDX[0]).read_bytes())
    with pytest.raises(ValueError, match="is no MNIST file: it begins with 00000803, not with 00000801"):
        paper.load(folder)
    np.save(tmp_path / "one.npy", arrays[0])
    with pytest.raises(ValueError, match=r"one.npy is no npz file"):
        paper.load(tmp_path / "one.npy")
    with pytest.raises(SystemExit):
        run("--data", tmp_path / "nowhere")
    assert "nowhere does not exist; --data takes a folder" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--seeds", 0), ("--epochs", 0), ("--momentum", 1.0)])
def test_settings_out_of_range_are_an_error(run, options):
    with pytest.raises(SystemExit):
        run(*options)
