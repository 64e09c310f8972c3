"""The code on the README and on the pages about PyTorch and update shaping runs as it stands."""

import ast
import math
import re
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
import torch

import projgd
import projgd.optax
import projgd.torch
from projgd.torch.settings import constraint_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]


def blocks_of(page):
    text = (ROOT / page).read_text()
    return [textwrap.dedent(b) for b in re.findall(r"^ *```python\n(.*?)^ *```", text, flags=re.M | re.S)]


@pytest.mark.parametrize("front", ["torch", "optax"])
def test_the_code_of_the_readme_runs(front):
    found = blocks_of("README.md")
    assert len(found) == 2
    (block,) = (b for b in found if f"projgd.{front}" in b)
    exec(block, {})


# -------------------------------------------------------------------------------------------------------------- PyTorch


def test_the_code_of_the_page_about_pytorch_runs():
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("features", torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.Flatten()))
    model.add_module("classifier", torch.nn.Sequential(torch.nn.Linear(24, 3)))
    names = {"model": model, "loss_fn": torch.nn.functional.cross_entropy}
    found = blocks_of("docs/pytorch.md")
    assert len(found) == 6
    with torch._dynamo.config.patch(trace_autograd_ops=False):
        for block in found:
            exec(block.replace("fullgraph=True", 'fullgraph=True, backend="eager"'), names)
        assert [str(g["constraint"]) for g in names["optimizer"].param_groups] == [
            "MaxNorm(c=3.0, axis='fan_in')",
            "None",
            "MaxNorm(c=4.0, axis='fan_in')",
        ]
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(2.0)
        names["step"](torch.randn(5, 2, 8), torch.randint(3, (5,)))
    for layer, c in ((model.features[0], 3), (model.classifier[0], 4)):
        norms = layer.weight.detach().double().flatten(1).norm(dim=1)
        assert bool(((c * (1 - 1e-5) <= norms) & (norms <= c)).all())


# ------------------------------------------------------------------------------------------------------------------ JAX


def test_the_code_of_the_page_about_jax_runs():
    found = blocks_of("docs/jax.md")
    assert len(found) == 3
    names = {}
    for block in found:
        exec(block, names)
    assert names["declared"](names["model"]).keys() == {"hidden/kernel", "head/kernel"}


# ------------------------------------------------------------------------------------------------------- update shaping


def made_by(block, names):
    """The values of a block's expressions and assignments, one after the other."""
    for statement in ast.parse(block).body:
        if isinstance(statement, (ast.Expr, ast.Assign)):
            yield ast.unparse(statement), eval(compile(ast.Expression(statement.value), "page", "eval"), names)
        else:
            exec(compile(ast.Module([statement], []), "page", "exec"), names)


def torch_names():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6))
    conv, critic, decoder = torch.nn.Conv2d(2, 4, 3), torch.nn.Linear(3, 1), torch.nn.Linear(9, 5)
    names = {"model": model, "critic": critic, "decoder": decoder, "convs": [conv.weight], "fan_in": 18}
    names |= {"matrices": [p for p in model.parameters() if p.ndim == 2], "rest": list(conv.parameters())}
    return names | public(projgd.torch) | {"torch": torch}


def public(module):
    return {name: getattr(module, name) for name in [*projgd.__all__, *module.__all__] if hasattr(module, name)} | {
        "math": math
    }


def step(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape)
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    optimizer.step()
    after = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    assert all(bool(q.isfinite().all()) for q in after)
    assert not all(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    for group in optimizer.param_groups:
        constraint = constraint_of(group)
        if constraint is not None and getattr(constraint, "radius", None) != "initial":
            for p in group["params"]:
                assert float(constraint.violation(p.detach()).max()) <= 1e-6 * math.sqrt(18)
        elif constraint is not None:
            pairs = zip(before, after, strict=True)
            assert all(bool((p.norm() - q.norm()).abs() <= 1e-5 * p.norm()) for p, q in pairs if p.ndim > 1)


def jax_steps(transformations):
    """One step of each, all of them in one compiled function."""
    start, push = jax.random.normal(jax.random.key(0), (2, 18, 4))

    @jax.jit
    def moved(params, grads):
        found = {}
        for code, tx in transformations.items():
            try:
                updates, _ = tx.update(grads, tx.init(params), params)
            except Exception as error:
                error.add_note(code)
                raise
            found[code] = optax.apply_updates(params, updates)["dense"]["kernel"]
        return found

    for code, kernel in moved({"dense": {"kernel": start}}, {"dense": {"kernel": push}}).items():
        assert bool(jnp.isfinite(kernel).all()), code
        assert not bool((kernel == start).all()), code


@pytest.mark.filterwarnings("ignore:.*weight_decay")  # Muon's own default, which the page speaks of
def test_the_code_of_the_page_about_update_shaping_runs():
    in_jax = public(projgd) | public(projgd.optax) | {"optax": optax, "fan_in": 18}
    in_torch = in_jax | public(projgd) | torch_names()
    seen, in_graph = 0, {}
    for block in blocks_of("docs/update-shaping.md"):
        for code, value in made_by(block, in_torch if "optax." not in block or "torch.optim" in block else in_jax):
            seen += 1
            if not isinstance(value, torch.optim.Optimizer):
                in_graph[f"{seen}: {code}"] = value
                continue
            try:
                step(value)
            except Exception as error:
                error.add_note(code)
                raise
    jax_steps(in_graph)
    assert seen == 21
    assert len(in_graph) > 5


# ------------------------------------------------------------------------------------------- sets over several tensors


def test_the_code_of_the_page_about_joint_sets_runs():
    peft = pytest.importorskip("peft")
    torch_lora, jax_lora, torch_clip, jax_clip, torch_ball, jax_ball = blocks_of("docs/joint.md")
    attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(32, 32), "k_proj": torch.nn.Linear(32, 8)})
    model = torch.nn.ModuleDict({"attn": attn})
    names = {"torch": torch, "peft": peft, "model": torch.nn.Sequential(torch.nn.Linear(6, 5)), **vars(projgd.torch)}
    with pytest.MonkeyPatch.context() as patch:
        config = peft.LoraConfig
        patch.setattr(peft, "LoraConfig", lambda **options: config(target_modules=["0"], **options))
        exec(torch_lora, names)
    assert names["opt"].joint[0].set == projgd.ProductMaxNorm(1.5, 2.0)
    names |= {"model": model, "logits": 300 * torch.rand(2, 16, 4, 4)}
    for block in (torch_clip, torch_ball):
        exec(block, names)

    key = jax.random.key(0)
    params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 5))}}
    names = {**vars(projgd), "optax": optax, "joint_projection": projgd.optax.joint_projection}
    exec(jax_lora, names)
    names["tx"].init(params)
    kernels = {"query": {"kernel": jnp.ones((32, 16, 2))}, "key": {"kernel": jnp.ones((32, 4, 2))}}
    params = {"attn": kernels}
    names |= {"params": params, "grads": params, "logits": 300 * jax.random.uniform(key, (2, 16, 4, 4))}
    state = optax.chain(optax.adam(1e-3), optax.identity()).init(params)
    exec(jax_clip, names | {"state": state})
    exec(jax_ball, names)
