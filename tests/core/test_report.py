"""The report says what a plain float64 look at the weights says."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from projgd import MaxNorm, MinMaxNorm, NonNegative, Sphere, UnitNorm, report
from projgd.optax import project
from projgd.torch import ProjectedSGD, param_groups


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
    assert [t.get_text() for t in ax.texts] == ["20%, 1 not finite", "20%"]


def test_a_model_is_read_as_its_optimizer_reads_it():
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.ModuleDict(
        {
            "conv1d": Conv1D(6, 5),
            "transposed": torch.nn.ConvTranspose2d(4, 6, 3, groups=2),
            "norm": torch.nn.LayerNorm([4, 5]),
            "attention": torch.nn.MultiheadAttention(4, 2, add_bias_kv=True),
        }
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p.data.mul_(100))
    optimizer = ProjectedSGD(param_groups(model, MaxNorm(0.5)), lr=0.1)
    optimizer.step()
    for seen in (report(model, MaxNorm(0.5)), report(optimizer)):
        assert {row.name for row in seen.rows} == {
            "conv1d.weight",
            "transposed.weight",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
        }
        assert (seen.violations, seen.on_bound) == (0, 1.0)


def test_an_optimizer_shows_its_own_sets_and_what_it_has_taken():
    layer = torch.nn.Linear(4, 3)
    start = layer.weight.detach().norm(dim=1).double()
    groups = [{"params": [("weight", layer.weight)], "constraint": Sphere("initial")}]
    optimizer = ProjectedSGD([*groups, {"params": [("bias", layer.bias)], "c": None}], lr=0.1)
    (row,) = report(optimizer).rows
    np.testing.assert_allclose(row.initial, start, rtol=1e-6)
    assert (row.name, row.shape, row.share) == ("weight", (3, 4), 1.0)
    assert "at start" in str(report(optimizer))
    with pytest.raises(ValueError, match="leave constraint= out"):
        report(optimizer, MaxNorm(1.0))
    with pytest.raises(ValueError, match="pass its model"):
        report(torch.optim.SGD(layer.parameters()))
    with pytest.raises(ValueError, match=r"pass a constraint, such as report\(model, MaxNorm"):
        report(layer)


def test_trees_and_modules_of_jax_are_read_as_the_transformation_reads_them():
    tree = {"query": {"kernel": 10 * jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))}}
    linear = nnx.vmap(lambda key: nnx.Linear(5, 3, use_bias=False, rngs=nnx.Rngs(key)), in_axes=0, out_axes=0)
    stacked = nnx.split(linear(jax.random.split(jax.random.key(0), 4)), nnx.Param)
    for params in (tree, nnx.merge(stacked[0], jax.tree.map(lambda p: 10 * p, stacked[1]))):
        held = project(params, MaxNorm(1.0))
        seen = report(held, MaxNorm(1.0))
        assert (len(seen.rows), seen.violations, seen.on_bound) == (1, 0, 1.0)
        assert report(params, MaxNorm(1.0)).violations == seen.vectors
    module = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    assert [row.shape for row in report(module, MaxNorm(1.0)).rows] == [(4, 3), (2, 4)]


@pytest.mark.parametrize("nothing", [3, "weights", torch.nn.functional, {}, []])
def test_what_has_no_parameters_is_refused(nothing):
    with pytest.raises(TypeError, match=r"no parameters.*pass a model, an optimizer or a tree of arrays"):
        report(nothing, MaxNorm(1.0))


@pytest.mark.parametrize("shape", [(7, 5), (5, 1), (3, 4, 2, 2), (0, 3), (500, 600), (2, 200, 3, 400)])  # pieces, too
@pytest.mark.parametrize("axis", ["fan_in", 0, (0, 1), None, -1])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_norms_are_those_of_float64(shape, axis, dtype):
    x = np.random.default_rng(0).normal(size=shape).astype(dtype)
    (row,) = report({"w": x}, MaxNorm(1.0, axis=axis)).rows
    vectors = MaxNorm(1.0, axis=axis).vectors(x)
    wanted = np.sqrt(np.sum(x.astype(np.float64) ** 2, axis=vectors.axes))
    np.testing.assert_allclose(row.norms, wanted.reshape(-1), rtol=1e-13)
    assert row.violations == np.sum(wanted > 1)


def test_the_lower_edge_of_an_interval():
    x = np.asarray([[0.5, 1.0, 1.5, 2.0, 3.0, 0.0]])
    (row,) = report({"w": x}, MinMaxNorm(1.0, 2.0, axis=0)).rows
    assert (row.violations, row.on_bound, row.worst, row.bound) == (2, 2, 1.0, (1.0, 2.0))


def test_tables():
    seen = report({"a<b": weights()}, MaxNorm(4.0))
    assert "a&lt;b" in seen._repr_html_()
    assert repr(seen) == str(seen)
    (line,) = seen.to_dict()
    assert (line["parameter"], line["shape"], line["on the bound"], line["outside"]) == ("a<b", (6, 5), 0.2, 1)
    assert line["median norm"] == pytest.approx(3.0)
    assert list(seen.to_pandas()["outside"]) == [1]
