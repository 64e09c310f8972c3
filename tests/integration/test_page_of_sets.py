"""The code on the page about sets runs, and its tables name the sets of other libraries that are the same."""

import ast
import math
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import projgd
import projgd.optax
import projgd.torch
from projgd import Constraint

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:.*square. not a weight of a layer"),
    pytest.mark.filterwarnings("ignore:.*square.* an array of"),
]

PAGE = (Path(__file__).parents[2] / "docs" / "sets.md").read_text()
BLOCKS = [textwrap.dedent(b) for b in re.findall(r"^ *```python\n(.*?)^ *```", PAGE, flags=re.M | re.S)]


def values_of(block, names):
    """The values of a block's expressions and assignments, with their code."""
    for statement in ast.parse(block).body:
        if isinstance(statement, (ast.Expr, ast.Assign)):
            code = ast.unparse(statement)
            value = eval(compile(ast.Expression(statement.value), "page", "eval"), names)
            if isinstance(statement, ast.Assign):
                names[statement.targets[0].id] = value
            yield code, value
        else:
            exec(compile(ast.Module([statement], []), "page", "exec"), names)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.mixture = torch.nn.Linear(6, 8), torch.nn.Linear(8, 8, bias=False)
        self.head, self.square = torch.nn.Linear(8, 3), torch.nn.Parameter(torch.rand(5, 5))


def assert_steps_into(optimizer, code):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    every = max(group["every"] for group in optimizer.param_groups)
    for _ in range(every):
        for p in params:
            p.grad = torch.randn(p.shape)
        optimizer.step()
    assert not all(torch.equal(p, q) for p, q in zip(params, before, strict=True)), code
    named = optimizer.named_params()
    for name, own in optimizer.constraints().items():
        if own is not None and not own.takes_initial and not isinstance(own.axis, projgd.Stacked):
            assert float(own.violation(named[name].detach()).max()) <= 1e-5, (code, name)


def test_the_code_for_pytorch():
    torch.manual_seed(0)
    seen = 0
    for block in BLOCKS:
        if "optax" in block or "axis=-1).project" in block:
            continue
        names = vars(projgd) | vars(projgd.torch) | {"torch": torch, "model": Net(), "other": torch.nn.Linear(3, 2)}
        for code, value in values_of(block, names):
            if isinstance(value, torch.optim.Optimizer):
                seen += 1
                assert_steps_into(value, code)
    assert seen == 26


def test_the_code_for_jax():
    keys = jax.random.split(jax.random.key(0), 8)
    shapes = {"encoder": (6, 8), "mixture": (8, 8), "head": (8, 3)}
    params = {n: {"kernel": jax.random.uniform(k, s)} for k, (n, s) in zip(keys, shapes.items(), strict=False)}
    params["encoder"]["bias"], params["head"]["bias"] = jnp.ones(8), jnp.ones(3)
    params["square"] = jax.random.uniform(keys[7], (5, 5))
    found = {}
    for block in BLOCKS:
        if "optax" in block:
            names = vars(projgd) | vars(projgd.optax) | {"optax": optax}
            made = {code: v for code, v in values_of(block, names) if isinstance(v, optax.GradientTransformation)}
            found |= made
    assert len(found) == 27

    for code, tx in found.items():  # tests/optax runs every set; here the names and the arguments count
        try:
            jax.eval_shape(lambda p, tx=tx: tx.update(p, tx.init(p), p), params)
        except Exception as error:
            error.add_note(code)
            raise


def test_the_code_for_an_array():
    (block,) = (b for b in BLOCKS if "axis=-1).project" in b)
    names = {"w": np.asarray([[0.8, 0.6, -1.0]])}
    exec(block, names)
    np.testing.assert_allclose(names["w"], [[0.6, 0.4, 0.0]])


def test_every_set_is_on_the_page_in_both_frameworks():
    sets = {name for name in projgd.__all__ if _is_set(getattr(projgd, name))}
    sets -= {"Constraint", "RelativeMaxNorm", "RelativeBox"}  # made by MaxNorm.relative and Box.relative
    for name in sets | {"MaxNorm.relative", "Box.relative"}:
        call = re.escape(name) + r"\("
        for marks in (True, False):
            assert any(re.search(call, b) for b in BLOCKS if ("optax" in b) == marks), name
        assert re.search(rf"^\|.*`{call}", PAGE, flags=re.M), name


def _is_set(value):
    return isinstance(value, type) and issubclass(value, Constraint)


# ------------------------------------------------------------------------------------------------------- Coming from …


def rows_of(title):
    section = PAGE.split(f"## Coming from {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]*\([^`]*)` \| (.*) \|$", section, flags=re.M)


def numbers():
    """Vectors, square matrices and numbers, under the names that the tables have."""
    rng = np.random.default_rng(0)
    names = {"w": rng.standard_normal(6) * 2, "a": rng.standard_normal(6), "W": rng.random((4, 4))}
    names |= {"low": -0.4, "high": 0.9, "b": 0.3, "c": 0.7, "r": 1.3, "total": 1.5, "scale": 0.8, "unit": 0.8, "k": 2}
    names |= {"rows": np.asarray([0.1, 0.2, 0.3, 0.4]), "columns": np.full(4, 0.25)}
    return names | {"A": rng.standard_normal((2, 6)), "G": rng.standard_normal((2, 6)), "h": np.asarray([0.1, 0.2])}


def nearest(x, equations, bounds):
    """The nearest point by SLSQP: equations A w = b, and inequalities G w <= h."""
    (matrix, right), (rows, most) = equations, bounds
    limits = [
        {"type": "eq", "fun": lambda w: matrix @ w - right, "jac": lambda w: matrix},
        {"type": "ineq", "fun": lambda w: most - rows @ w, "jac": lambda w: -rows},
    ]
    point = x.ravel()
    options = {"maxiter": 500, "ftol": 1e-14}
    minimize = pytest.importorskip("scipy.optimize").minimize
    done = minimize(
        lambda w: np.sum((w - point) ** 2) / 2,
        np.zeros_like(point),
        jac=lambda w: w - point,
        constraints=limits,
        options=options,
    )
    assert done.success
    return done.x.reshape(x.shape)


def of_matrices(right, columns):
    """The equations and inequalities of non-negative 4 × 4 matrices with given sums of rows and of columns."""
    sums = [np.kron(np.eye(4), np.ones(4)), np.kron(np.ones(4), np.eye(4))]
    return (np.vstack(sums)[:-1], np.concatenate([right, columns])[:-1]), (-np.eye(16), np.zeros(16))


def answer(module, theirs, names):
    """What the other library gives; by SLSQP, where theirs is a solver that stops at 1e-3 and compiles for long."""
    name = theirs.split("(")[0]
    if name == "projection_polyhedron":
        return nearest(names["w"], (names["A"], names["b"]), (names["G"], names["h"]))
    if name in ("projection_birkhoff", "projection_transport"):
        sums = (np.ones(4),) * 2 if name == "projection_birkhoff" else (names["rows"], names["columns"])
        return nearest(names["W"], *of_matrices(*sums))
    in_jax = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in names.items()}
    return np.asarray(eval(f"module.{theirs}", {"module": module} | in_jax))


@pytest.mark.parametrize(("library", "count"), [("optax", 12), ("JAXopt", 17)])
def test_coming_from_jax(library, count):
    module = optax.projections if library == "optax" else pytest.importorskip("jaxopt").projection
    found = rows_of(library)
    assert len(found) == count
    assert {theirs.split("(")[0] for theirs, _ in found} == {
        name for name in dir(module) if name.startswith("projection_")
    }
    with jax.enable_x64(True):
        for theirs, ours in found:
            names = numbers()
            if "box_section" in theirs:
                names["a"] = np.abs(names["a"])  # theirs takes positive normals only
            if "(A, b" in theirs:
                names["b"] = np.asarray([0.3, -0.2])
            if ours == "none":
                continue
            code = ours.split("`")[1].replace("…", "HalfSpace(G[1], h[1], axis=-1)")
            own = eval(code, vars(projgd) | names).project(names["W" if "(W" in theirs else "w"])
            np.testing.assert_allclose(own, answer(module, theirs, names), atol=1e-5, err_msg=theirs)


def test_coming_from_keras(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    constraints = pytest.importorskip("keras").constraints
    rng, kernel = np.random.default_rng(0), None
    kernel = 3 * rng.standard_normal((5, 4)).astype(np.float32)
    pairs = rows_of("Keras")[:4]
    for theirs, ours in pairs:
        found = np.asarray(eval(theirs, vars(constraints))(kernel))
        own = eval(ours.split("`")[1], vars(projgd)).project(kernel)
        np.testing.assert_allclose(own, found, rtol=1e-5, atol=1e-6, err_msg=theirs)
    assert [theirs.split("(")[0] for theirs, _ in pairs] == ["NonNeg", "MaxNorm", "MinMaxNorm", "UnitNorm"]


def test_the_norm_of_a_depthwise_filter_of_eegnet_in_keras_is_that_of_projgd(monkeypatch):
    """Keras's kernel is (channels, 1, filters, multiplier), PyTorch's (filters · multiplier, 1, channels, 1)."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    constraints = pytest.importorskip("keras").constraints
    kernel = np.random.default_rng(0).standard_normal((22, 1, 8, 2)).astype(np.float32)
    found = np.asarray(constraints.MaxNorm(1.0)(kernel))
    in_torch = torch.from_numpy(np.moveaxis(kernel.reshape(22, 1, 16), 2, 0)[:, None].copy())
    assert in_torch.shape == (16, 1, 22, 1)
    own = projgd.MaxNorm(1.0).project(in_torch).numpy()
    np.testing.assert_allclose(own, np.moveaxis(found.reshape(22, 1, 16), 2, 0)[:, None], rtol=1e-5, atol=1e-6)
    assert math.isclose(np.linalg.norm(own[0]), 1.0, rel_tol=1e-5)
