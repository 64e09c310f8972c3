"""That the benchmarks run, and that a part measured again takes the place of what was there: no figure is judged."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import keras_step, workloads
from benchmarks.__main__ import main
from benchmarks.workloads import BOUNDS

pytest.importorskip("numba")


def ways(record):
    return [(row["front"], row["workload"], row["way"], row["bound"]) for row in record["rows"]]


def test_parts_are_measured_one_by_one_into_one_table(tmp_path, capsys, monkeypatch):
    for name in ("_mlp", "_small"):
        monkeypatch.setattr(workloads, name, lambda: [(16, 12), (16,), (4, 16)])
    out = tmp_path / "results" / "cpu"

    def run(front, workload):
        parts = ["--fronts", front, "--workloads", workload, "--optimizers", "SGD"]
        main([*parts, "--quick", "--seconds", "0.05", "--threads", "1", "--out", str(out)])
        return json.loads(out.with_suffix(".json").read_text())

    first = run("torch", "small")
    for way in ("fused + renorm_ loop", "projgd, default", "projgd, fused"):
        assert {("PyTorch", "small", way, bound) for bound in BOUNDS} <= set(ways(first))
    second = run("jax", "mlp")
    assert second["rows"][: len(first["rows"])] == first["rows"]
    assert ("JAX", "mlp", "projgd, apply_updates", "half binds") in ways(second)
    third = run("torch", "small")
    assert sorted(ways(third), key=str) == sorted(ways(second), key=str)
    assert third["rows"] != second["rows"]
    assert all(0 < row["R"] < float("inf") and row["rounds"] >= 3 for row in third["rows"])
    text = out.with_suffix(".md").read_text()
    assert "### small" in text
    assert "### mlp" in text
    assert third["machine"]["torch"] in text
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_keras_trains_in_a_process_of_its_own_with_the_backend_asked_for(monkeypatch, capsys):
    """The process is this one, where Keras has the backend JAX already."""

    def run(command, env, **_):
        assert (env["KERAS_BACKEND"], command[3:]) == ("jax", ["mlp", "SGD", "0.05"])
        keras_step.main("mlp", "SGD", 0.05)
        return SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(keras_step.subprocess, "run", run)
    times = keras_step.measured("jax", "mlp", "SGD", seconds=0.05, threads=1)
    assert [bound for _, bound in times] == [None, *BOUNDS]
    assert all(min(taken) > 0 for taken in times.values())


def test_libraries_project_the_same_rows():
    from benchmarks import libraries

    rows = libraries.by_rows("L1Ball(8)", seconds=0.0, side=64)
    assert len(rows) == 2 * 5
    assert all(row["error"] < 1e-3 for row in rows)
    assert all(row["over"] <= 0 for row in rows if row["way"].startswith("projgd"))
    steps = libraries.by_steps("small", seconds=0.0)
    assert [row["set"].split("(")[0] for row in steps] == ["Box", "NonNegative", "KeepSign"]
    assert libraries.table(rows + steps).count("\n") == 2 + 10 + 2 + 3
