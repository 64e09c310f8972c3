"""The examples of sets end in their tables and pictures, and their two frameworks agree."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(request, monkeypatch):
    import jax

    monkeypatch.syspath_prepend(EXAMPLES)
    x64 = jax.config.jax_enable_x64
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, request.param, module)
    spec.loader.exec_module(module)
    yield module
    jax.config.update("jax_enable_x64", x64)


@pytest.mark.parametrize("example", ["sets", "nmf", "physical_model", "mixture_weights"], indirect=True)
def test_ends_in_a_table_and_a_picture(example, tmp_path, monkeypatch, capsys):
    options = [] if example.__name__ == "sets" else ["--quick"]
    monkeypatch.setattr(sys, "argv", [example.__name__, *options, "--out", str(tmp_path)])
    example.main()
    printed = capsys.readouterr().out
    assert "PyTorch" in printed or example.__name__ == "sets"
    (picture,) = tmp_path.iterdir()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in printed


@pytest.mark.parametrize("example", ["physical_model"], indirect=True)
def test_the_bounded_fit_is_that_of_scipy(example):
    t, x = example.record(8)
    found = example.in_torch(t, x, example.PHYSICS, 1500)
    assert found[2] == 0
    np.testing.assert_allclose(found, example.in_scipy(t, x, example.PHYSICS), atol=2e-3)


@pytest.mark.parametrize("example", ["mixture_weights"], indirect=True)
def test_the_weights_are_those_of_em(example):
    components, _, frequencies = example.documents(20)
    found, _ = example.in_torch(components, frequencies, 400, 0.01)
    np.testing.assert_allclose(found, example.by_em(components, frequencies, 5000), atol=1e-3)
    assert (found == 0).mean() > 0.3
