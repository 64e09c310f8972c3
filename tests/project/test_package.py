"""The package from outside: what importing it loads, how its modules hang together, and that its wheel works alone."""

import graphlib
import os
import runpy
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import projgd.optax
import projgd.torch
from tests.project.house import arguments, modules_of

ROOT = Path(__file__).parents[2]
FRAMEWORKS = ("torch", "jax", "optax", "keras", "tensorflow", "numba", "matplotlib")

BLOCK = """
import importlib.util, sys

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *parent: None if name in {absent!r} else find_spec(name, *parent)

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def python(code: str, absent: tuple[str, ...] = (), executable: str = sys.executable, **options) -> str:
    """What a fresh interpreter prints, where the modules `absent` cannot be imported."""
    code = (BLOCK.format(absent=absent) if absent else "") + code
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_no_framework():
    code = f"import sys, projgd, projgd.rules, projgd.report; print([m for m in {FRAMEWORKS} if m in sys.modules])"
    assert python(code) == "[]\n"


def test_core_works_without_any_framework():
    code = """
import numpy as np, projgd
w = projgd.MaxNorm(1.0).project(np.asarray([[3.0], [4.0]]))
assert abs(np.linalg.norm(w) - 1) < 1e-12
assert projgd.report({"w": w}, projgd.MaxNorm(1.0)).violations == 0
for name in ("ProjectedSGD", "maxnorm_projection"):
    try:
        getattr(projgd, name)
    except ModuleNotFoundError as error:
        print(name, "needs", error.name)
"""
    assert python(code, FRAMEWORKS) == "ProjectedSGD needs torch\nmaxnorm_projection needs jax\n"


def test_torch_front_without_jax():
    code = """
import torch, projgd.torch
layer = torch.nn.Linear(3, 2)
optimizer = projgd.torch.ProjectedSGD(layer.parameters(), lr=10.0, c=0.5)
layer(torch.ones(1, 3)).sum().backward()
optimizer.step()
print(layer.weight.norm(dim=1).max().item() <= 0.5, "jax" in sys.modules)
"""
    assert python(code, ("jax", "jaxlib", "optax", "numba")) == "True False\n"


def test_jax_front_without_torch():
    code = """
import jax.numpy as jnp, optax, projgd.optax
params = {"kernel": jnp.ones((3, 2))}
tx = optax.chain(optax.sgd(0.1), projgd.optax.maxnorm_projection(0.5))
updates, _ = tx.update(params, tx.init(params), params)
norms = jnp.linalg.norm(optax.apply_updates(params, updates)["kernel"], axis=0)
print(float(norms.max()) <= 0.5, "torch" in sys.modules)
"""
    assert python(code, ("torch", "numba")) == "True False\n"


def test_jax_arrays_without_optax():
    """Without a front, whose branch for squares that overflow makes it faster."""
    code = """
import jax, jax.numpy as jnp, numpy as np, projgd
x = jnp.asarray([[3.0, 0.3, 3e38, 1e30], [4.0, 0.4, 3e38, jnp.inf]], jnp.float32)
for project in (projgd.MaxNorm(1.0).project, jax.jit(projgd.MaxNorm(1.0).project)):
    y = np.asarray(project(x), np.float64)
    np.testing.assert_allclose(y[:, (0, 2)], [[0.6, 0.5**0.5], [0.8, 0.5**0.5]], rtol=1e-5)
    np.testing.assert_array_equal(y[:, (1, 3)], np.asarray(x, np.float64)[:, (1, 3)])
print("optax" in sys.modules)
"""
    assert python("import sys\n" + code, ("optax", "torch", "numba")) == "False\n"


def test_top_level_names_are_the_fronts_own():
    for name in ("ProjectedSGD", "ProjectedAdam", "ProjectedAdamW"):
        assert getattr(projgd, name) is getattr(projgd.torch, name)
    assert projgd.maxnorm_projection is projgd.optax.maxnorm_projection
    assert set(projgd.__all__) <= set(dir(projgd))
    assert all(hasattr(projgd, name) for name in projgd.__all__)
    with pytest.raises(AttributeError, match="module 'projgd' has no attribute 'ProjectedSDG'"):
        _ = projgd.ProjectedSDG


# ----------------------------------------------------------------------------------------------------------- the house


MODULES = modules_of()
FRONTS = {"torch": {"torch"}, "optax": {"jax", "jaxlib", "optax"}}
ABOVE_THE_FRONTS = ("projgd", "projgd.report")
"""They import a front where a user needs it, see `test_import_loads_no_framework`."""
ENGINES = [name for name in MODULES if name.startswith("projgd.torch.engines")]
MANY_ARGUMENTS = {  # more than six, and why
    "projgd.torch.optimizers:Projected.__init__": "its keyword arguments are the public face",
    "projgd.torch.engines.cpu_kernel:": "numba compiles functions of arrays and numbers, and no dataclasses",
    "projgd.torch.engines.triton:": "Triton compiles functions of pointers and numbers, and no dataclasses",
}


def front_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FRONTS else None


def test_no_circle_of_imports():
    graph = {name: module.needs() for name, module in MODULES.items()}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_arrows_run_one_way(name):
    """Fronts import the core; the core imports no front, and the fronts do not import each other."""
    own, module = front_of(name), MODULES[name]
    assert "projgd.report" not in module.needs() or name in ("projgd", "projgd.suggestion")
    if name not in ABOVE_THE_FRONTS:
        assert {front_of(needed) for needed in module.needs()} <= {None, own}
        frameworks = set().union(*(found for front, found in FRONTS.items() if front != own))
        frameworks = set() if name == "projgd.libraries" else frameworks  # inside of functions, for their own arrays
        assert not module.packages() & frameworks


@pytest.mark.parametrize("name", ENGINES)
def test_engines_know_only_engines_metrics_and_the_core(name):
    beside = {n for n in MODULES[name].needs() if front_of(n) and n not in ENGINES}
    assert beside <= {"projgd.torch.metrics"}


@pytest.mark.parametrize("name", MODULES)
def test_private_names_stay_in_their_module(name):
    assert not list(MODULES[name].private_names())


@pytest.mark.parametrize("name", MODULES)
def test_no_module_writes_into_another_at_import(name):
    assert not list(MODULES[name].written_at_import())


@pytest.mark.parametrize("name", MODULES)
def test_files_functions_and_argument_lists_are_short(name):
    module = MODULES[name]
    assert module.lines_of_code() <= 350
    long = {f: n for f, node in module.functions() if (n := module.lines_of_code(node)) > 50}
    assert not long
    allowed = [of.partition(":")[2] for of in MANY_ARGUMENTS if of.partition(":")[0] == name]
    many = {f: n for f, node in module.functions() if (n := len(arguments(node))) > 6}
    assert not {f for f in many if not any(f.startswith(start) for start in allowed)}


def test_the_front_for_torch_has_few_files():
    assert len([name for name in MODULES if front_of(name) == "torch"]) <= 22


def test_these_rules_see_what_they_are_for(tmp_path):
    files = {
        "__init__": "",
        "core": "TABLE, _hidden = {}, 1\n",
        "reads": "from projgd import core\nfrom projgd.core import TABLE, _hidden\nx = core._hidden\n",
        "writes": (
            "import projgd.core\nfrom projgd import core as c\nfrom projgd.core import TABLE\n"
            "if True:\n    c.flag: int = 1\nc.TABLE['x'], y = 1, 2\nprojgd.core.TABLE.update(x=1)\n"
            "setattr(c, 'z', 1)\nTABLE['q'] = 1\nlocal = {}\nlocal['q'] = 1\n\n\ndef later():\n    c.flag = 2\n"
        ),
        "one": "def f(self, a, *b, c=1, **d):\n    from projgd import other\n    return other\n",
        "other": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from projgd.one import f\n",
        "long": '"""Text\nand text."""\n\nx = [  # a comment\n    1,\n\n    # another\n    2,\n]\n"""About x."""\n',
    }
    (tmp_path / "projgd").mkdir()
    for name, code in files.items():
        (tmp_path / "projgd" / f"{name}.py").write_text(code)
    found = modules_of(tmp_path / "projgd")
    assert list(found["projgd.reads"].private_names()) == ["projgd.core._hidden"] * 2
    written = [name.removeprefix("projgd.core.") for name in found["projgd.writes"].written_at_import()]
    assert written == ["flag", "TABLE", "TABLE.update(…)", "?", "TABLE[…]"]
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter({name: m.needs() for name, m in found.items()}).static_order())
    ((name, f),) = found["projgd.one"].functions()
    assert (name, arguments(f)) == ("f", ["a", "c", "b", "d"])
    assert (found["projgd.one"].lines_of_code(f), found["projgd.long"].lines_of_code()) == (3, 4)


# ----------------------------------------------------------------------------------------------------- the wheel, types


def test_what_type_checkers_are_shown_also_runs():
    runpy.run_path(str(Path(__file__).parent / "typed_user.py"), run_name="__main__")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The project's wheel, built by pip from this checkout with the build tools at hand (no network)."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = ["pyproject.toml", "README.md", "LICENSE"]
    source.mkdir()
    for name in tracked:
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "projgd").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(folder), str(source)], check=True, timeout=300)
    (made,) = folder.glob("projgd-*.whl")
    return made


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
        metadata = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "projgd").rglob("*.py")}
    assert names == modules | {"projgd/py.typed"}
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(required) == 1
    assert "array-api-compat" in required[0]


def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    """Only the wheel is installed; its one dependency and NumPy are lent from here, so that nothing is downloaded."""
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    executable = str(home / "bin" / "python")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}, scheme="venv"))
    pip = [sys.executable, "-m", "pip", "--python", executable, "install", "--quiet", "--no-deps", "--no-index"]
    # Without this checkout on the path: an egg-info there would count as the package installed already.
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True, timeout=300, env=alone, cwd=tmp_path)
    here = Path(sysconfig.get_path("purelib"))
    for lent in ("array_api_compat", "numpy", "numpy.libs"):
        if (here / lent).exists():
            (site / lent).symlink_to(here / lent)
    code = """
import numpy as np, projgd
assert "site-packages" in projgd.__file__, projgd.__file__
w = projgd.MaxNorm(1.0).project(np.full((4, 2), 3.0, np.float32))
print(projgd.__version__, w.dtype, bool((np.linalg.norm(w.astype(float), axis=0) <= 1).all()))
"""
    clean = {"PATH": "/usr/bin:/bin"}
    assert python(code, executable=executable, env=clean, cwd=tmp_path) == "0.1.0 float32 True\n"
