"""Run the main job with the lowest and with the newest versions that pyproject.toml admits: `make versions`.

    python tests/versions.py [lowest] [newest]

makes a fresh environment in `.versions/` for each, installs projgd there, runs `check` in it, and prints a table for
CONTRIBUTING.md. It takes minutes and downloads gigabytes, so CI does not run it. `check` needs no test library, because
the lowest versions have no test libraries that fit.
"""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = ("torch", "jax", "optax", "numba", "numpy", "array-api-compat")


def requirements(which: str) -> list[str]:
    """What to install: exactly the lower ends of the ranges, or the newest of each."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["torch"], *extras["jax"], *extras["fast"]]
    if which == "newest":
        return wanted
    jaxlib = [r.replace("jax", "jaxlib") for r in wanted if re.match("jax[^l]", r)]
    return [f"{r.replace('>=', '==')}.*" for r in [*wanted, *jaxlib]]


def check() -> None:
    """Train with every optimizer form of the main job, and measure what the contract promises in float64."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import torch

    from projgd import MaxNorm, NonNegative, UnitNorm
    from projgd.optax import apply_updates, maxnorm_projection, projection
    from projgd.torch import ProjectedAdam, ProjectedSGD, param_groups, project_after_step

    near = {"float64": 1e-12, "float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}

    def judge(norms, c, dtype):
        assert norms.max() <= c, norms.max()
        assert norms.max() >= c * (1 - near[dtype]), norms.max()

    rng = np.random.default_rng(0)
    for dtype in near:
        kind = getattr(torch, dtype)
        for make in (
            lambda net: ProjectedSGD(net.named_parameters(), lr=1.0, momentum=0.9, c=0.5),
            lambda net: ProjectedAdam(param_groups(net, {"0.*": MaxNorm(0.5), "1.*": NonNegative()}), lr=0.1),
            lambda net: torch.optim.SGD(net.parameters(), lr=1.0),
            *([lambda net: ProjectedSGD(net.parameters(), lr=1.0, c=0.5, fused=True)] if dtype == "float32" else []),
        ):
            torch.manual_seed(0)
            net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 2)).to(kind)
            optimizer = make(net)
            if type(optimizer) is torch.optim.SGD:
                project_after_step(optimizer, MaxNorm(0.5))
            for _ in range(3):
                for p in net.parameters():
                    p.grad = torch.randn_like(p)
                optimizer.step()
            judge(net[0].weight.detach().double().norm(dim=1).numpy(), 0.5, dtype)
            optimizer.load_state_dict(optimizer.state_dict())
        if dtype == "float64":
            continue
        params = {"Dense_0": {"kernel": jnp.asarray(rng.normal(size=(8, 16)), dtype), "bias": jnp.zeros(16, dtype)}}
        grads = jax.tree.map(jnp.ones_like, params)
        tx = optax.chain(optax.adam(0.1), maxnorm_projection(c=0.5))

        def chained(params, state, tx=tx, grads=grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        held, state = params, tx.init(params)
        for step in (chained, jax.jit(chained), jax.jit(chained)):
            held, state = step(held, state)
        for found in (held, jax.jit(lambda p, g: apply_updates(p, g, MaxNorm(0.5)))(params, grads)):
            judge(np.linalg.norm(np.asarray(found["Dense_0"]["kernel"], np.float64), axis=0), 0.5, dtype)
    unit = optax.chain(optax.sgd(0.1), projection({"*/kernel": UnitNorm()}))
    params = {"a": {"kernel": jnp.ones((3, 2))}}
    updates, _ = unit.update(params, unit.init(params), params)
    kernel = optax.apply_updates(params, updates)["a"]["kernel"]
    assert np.allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
    print(" ".join(importlib.metadata.version(name) for name in SHOWN))


def main(which: list[str]) -> None:
    print(f"| versions | {' | '.join(SHOWN)} | the main job |\n|---|{'---|' * (len(SHOWN) + 1)}")
    for end in which:
        folder = ROOT / ".versions" / end
        venv.create(folder, clear=True, with_pip=True)
        python = str(folder / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        made = subprocess.run([*install, *requirements(end)], capture_output=True, text=True)
        if made.returncode == 0:
            subprocess.run([*install, "--no-deps", str(ROOT)], check=True)
            made = subprocess.run([python, __file__, "check"], capture_output=True, text=True, cwd=folder)
        ended = made.returncode == 0
        versions = made.stdout.split()[-len(SHOWN) :] if ended else ["?"] * len(SHOWN)
        print(f"| {end} | {' | '.join(versions)} | {'holds' if ended else 'FAILS'} |", flush=True)
        if not ended:
            print((made.stdout + made.stderr)[-3000:], file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:] == ["check"]:
        check()
    else:
        main(sys.argv[1:] or ["lowest", "newest"])
