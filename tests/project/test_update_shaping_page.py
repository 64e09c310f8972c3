"""The code on the page about shaped updates runs as it stands; what has a set ends in it."""

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

PAGE = Path(__file__).parents[2] / "docs" / "update-shaping.md"
BLOCKS = [textwrap.dedent(b) for b in re.findall(r"^ *```python\n(.*?)^ *```", PAGE.read_text(), flags=re.M | re.S)]


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


def jax_step(tx):
    start, push = jax.random.normal(jax.random.key(0), (2, 18, 4))
    params, grads = {"dense": {"kernel": start}}, {"dense": {"kernel": push}}
    updates, _ = tx.update(grads, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert bool(jnp.isfinite(moved["dense"]["kernel"]).all())
    assert not bool((moved["dense"]["kernel"] == start).all())


@pytest.mark.filterwarnings("ignore:.*weight_decay")  # Muon's own default, which the page speaks of
def test_the_code_on_the_page_runs():
    in_jax = public(projgd) | public(projgd.optax) | {"optax": optax, "fan_in": 18}
    in_torch = in_jax | public(projgd) | torch_names()
    seen = 0
    for block in BLOCKS:
        for code, value in made_by(block, in_torch if "optax." not in block or "torch.optim" in block else in_jax):
            seen += 1
            try:
                step(value) if isinstance(value, torch.optim.Optimizer) else jax_step(value)
            except Exception as error:
                error.add_note(code)
                raise
    assert seen == 21
