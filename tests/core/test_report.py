"""The report says what a plain float64 look at the weights says."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from projgd import MaxNorm, NonNegative, UnitNorm, report


def weights() -> np.ndarray:
    """Columns (neurons) of norm 1, 2, 3, exactly 4 and 5."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(6, 5))
    kernel = directions / np.linalg.norm(directions, axis=0) * np.asarray([1.0, 2.0, 3.0, 4.0, 5.0])
    kernel[:, 3] = [4.0, 0, 0, 0, 0, 0]
    return kernel.astype(np.float32)


@pytest.mark.parametrize("library", ["numpy", "jax", "torch"])
def test_counts(library):
    array = {"numpy": weights(), "jax": jnp.asarray(weights()), "torch": torch.from_numpy(weights().T.copy())}[library]
    seen = report({"layer": {"kernel": array, "bias": array[0], "gone": None}}, MaxNorm(4.0))
    (row,) = seen.rows  # the bias has no fan-in
    assert row.name == "layer/kernel"
    np.testing.assert_allclose(row.norms, [1, 2, 3, 4, 5], rtol=1e-6)
    assert (row.on_bound, row.violations, row.nonfinite) == (1, 1, 0)
    assert row.worst == pytest.approx(1.0, rel=1e-6)
    assert (seen.vectors, seen.violations, seen.on_bound) == (5, 1, 0.2)


def test_what_is_not_finite_shows():
    kernel = weights()
    kernel[0, 0], kernel[0, 1] = np.nan, np.inf
    seen = report({"kernel": kernel}, MaxNorm(4.0))
    assert seen.nonfinite == 2
    assert math.isnan(seen.largest)
    assert seen.violations == 1  # a vector that is not finite is counted once
    assert "nan" in str(seen)


def test_one_unit_beyond_the_bound_is_a_violation():
    kernel = np.full((1, 1), np.nextafter(np.float32(4), np.float32(5)))
    assert report([kernel], MaxNorm(4.0)).violations == 1
    assert report([np.full((1, 1), np.float32(4))], MaxNorm(4.0)).violations == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("constraint", [MaxNorm(0.5), UnitNorm(), UnitNorm(axis=None)])
def test_projected_weights_are_on_the_bound_and_inside(dtype, constraint):
    generator = torch.Generator().manual_seed(0)
    stored = constraint.project(torch.randn(20, 300, generator=generator).to(dtype))
    seen = report({"w": stored}, constraint)
    assert seen.on_bound == 1.0
    assert seen.violations == 0


def test_entries_below_zero():
    (row,) = report({"w": np.asarray([[-1.0, 2.0], [-3.0, 0.0]])}, NonNegative()).rows
    assert (row.violations, row.worst) == (2, 3.0)


def test_a_module_and_rules():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    seen = report(model, {"0.weight": MaxNorm(0.1), "2.*": MaxNorm(10.0)})
    assert [(row.name, row.violations) for row in seen.rows] == [("0.weight", 4), ("2.weight", 0)]
    with pytest.raises(ValueError, match=r"0\.weight"):
        report(model, {"0.wieght": MaxNorm(0.1)})
    with pytest.raises(TypeError, match="ids has dtype int64"):
        report({"ids": np.arange(4)}, MaxNorm(1.0))


def test_plot_shows_every_parameter_and_its_bound():
    kernel = weights()
    kernel[0, 0] = np.nan
    ax = report({"a": kernel, "b": weights()}, MaxNorm(4.0)).plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert sum(np.all(line.get_xdata() == 4.0) for line in ax.lines) == 2
    assert [t.get_text() for t in ax.texts] == ["1 not finite"]
