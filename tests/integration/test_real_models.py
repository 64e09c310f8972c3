"""Models of other libraries, trained with the lines of docs/models.md: every neuron's bound is checked in float64."""

import contextlib
import copy
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import operator
import re
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from projgd import MaxNorm, Stacked, report
from projgd.torch import ProjectedAdam, ProjectedAdamW, ProjectedSGD, constrain, declared, hyperball, lora_pairs

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
BLOCKS = {
    title: re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)
    for title, text in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S)
}
CLOSE = 1e-5


def run_page(title, index=0, **names):
    """Run a block of the page with these names, and return the names that it leaves."""
    exec(BLOCKS[title][index], names)
    return names


def norms_of(weights, axes):
    return np.sqrt(np.sum(np.square(np.asarray(weights, np.float64)), axis=axes))


def stored(p):
    return p.detach().double().numpy()


def assert_held(weights, c, axes, steps=1):
    """Assert that no vector is outside, and that one step leaves vectors that start far outside on the bound."""
    norms = norms_of(weights, axes)
    assert norms.max() <= c
    assert (np.median(norms) if steps == 1 else norms.max()) >= c * (1 - CLOSE)


def push_out(model, by=300.0):
    """Put every weight far outside of the bounds of the page."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(by).add_(torch.randn_like(p))
    return model


def step(model, optimizer, loss):
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def assert_free_as_under(plain, model, optimizer, loss, free):
    """Assert that a step moves the free parameters as the plain optimizer does, and return the stepped model."""
    twin = copy.deepcopy(model)
    groups = [{"params": list(twin.parameters())}]
    options = {k: v for k, v in optimizer.param_groups[0].items() if k in ("lr", "momentum", "weight_decay")}
    torch.manual_seed(1)
    step(twin, plain(groups, **options), loss)
    torch.manual_seed(1)
    step(model, optimizer, loss)
    other = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if name in free:
            torch.testing.assert_close(p, other[name], rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- libraries and tests

SIZES = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
EXPERTS = {
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 16,
}


def tokens(seed=0):
    return torch.randint(SIZES["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(seed))


def language_loss(model):
    return model(tokens(), labels=tokens()).loss


def gpt2(**options):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=12, n_layer=2, n_head=2, **SIZES, **options))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**EXPERTS, **SIZES))


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import a library that is not there as modules in which every name is an empty class."""

    def __init__(self, library):
        self.library = library

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.library:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return EmptyModule(spec.name)

    def exec_module(self, module):
        pass


def _empty(owner, name):
    if name.startswith("__"):
        raise AttributeError(name)
    setattr(owner, name, made := EmptyClass(name, (), {}))
    return made


class EmptyClass(type):
    __getattr__ = _empty


class EmptyModule(types.ModuleType):
    __getattr__ = _empty


@contextlib.contextmanager
def without(library):
    """Let others import `library` where its wheel does not load: torchvision's and torchaudio's need CUDA's torch.

    timm and braindecode import them for transforms that no model here uses.
    """
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        importlib.import_module(library)
        yield
        return
    finder = StandIn(library)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == library]:
            del sys.modules[name]

    forget()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        forget()  # other libraries must not find it


def import_or_skip(name, stand_in=None):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install --no-deps -c constraints.txt -r tests/models.txt")
    with without(stand_in) if stand_in else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


# --------------------------------------------------------------------------------------------------------- Hugging Face


def test_gpt2():
    model = push_out(gpt2())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = run_page("Hugging Face transformers", model=model)["optimizer"]
    free = {name for name, p in model.named_parameters() if p.ndim < 2}
    assert {name for name, own in optimizer.constraints().items() if own is None} == free
    assert_free_as_under(torch.optim.AdamW, model, optimizer, eval_loss, free)
    columns = [m for m in model.modules() if type(m).__name__ == "Conv1D"]
    assert len(columns) == 8
    for layer in columns:
        assert layer.weight.shape[1] == layer.nf  # the outputs
        assert_held(stored(layer.weight), 2.0, 0)
    for layer in (model.transformer.wte, model.transformer.wpe):
        assert_held(stored(layer.weight), 2.0, 1)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert sum(p is model.lm_head.weight for g in optimizer.param_groups for p in g["params"]) == 1


def eval_loss(model):
    return language_loss(model.eval())  # without dropout


def test_the_tied_head_of_gpt2_has_the_embeddings_name():
    with pytest.raises(ValueError, match=r"'lm_head.weight', which is one tensor with 'transformer.wte.weight': use"):
        ProjectedAdamW(gpt2(), lr=0.1, constraint={"lm_head.*": MaxNorm(2.0)})
    untied = gpt2(tie_word_embeddings=False)
    optimizer = ProjectedAdamW(untied, lr=0.1, constraint={"lm_head.*": MaxNorm(2.0)})
    assert [name for name, own in optimizer.constraints().items() if own] == ["lm_head.weight"]


def test_mixture_of_experts():
    model = push_out(mixtral())
    names = (
        r"model.layers.\*.mlp.gate.weight, model.layers.\*.mlp.experts.gate_up_proj, model.layers.\*.mlp.experts.down_"
    )
    with pytest.warns(UserWarning, match=names + r"proj: not a weight .* axis=Stacked\(\)") as caught:
        ProjectedAdamW(model, lr=1e-3, c=2.0)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = run_page("Mixture of experts", model=model)["optimizer"]
    assert_free_as_under(
        torch.optim.AdamW, model, optimizer, language_loss, {n for n, p in model.named_parameters() if p.ndim < 2}
    )
    for name, p in model.named_parameters():
        if p.ndim > 1:
            assert p.ndim == 3 if ".experts." in name else 2
            assert_held(stored(p), 2.0, -1)  # F.linear(x, weight[expert]): rows
    assert_a_neuron_is(model.model.layers[0].mlp.experts, "down_proj", stored_last=True)


def assert_a_neuron_is(experts, name, stored_last):
    """Assert which axis of the experts' last product holds the weights of one output."""
    p = getattr(experts, name)
    x, each = torch.randn(4, 16), torch.zeros(4, 2, dtype=torch.int64)
    each[:, 1] = 1
    out = experts(x, each, torch.ones(4, 2))
    (grad,) = torch.autograd.grad(out[:, 5].sum(), p)
    one = grad[0, 5] if stored_last else grad[0, :, 5]
    assert bool((one != 0).all())
    assert int((grad != 0).sum()) == 2 * len(one)  # two experts, one neuron of each


def test_experts_that_are_stored_the_other_way_round():
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = GptOssForCausalLM(GptOssConfig(**EXPERTS, **SIZES, head_dim=4, rope_parameters=rope))
    push_out(model, by=1000.0)
    with pytest.warns(UserWarning, match="experts.gate_up_proj, .*: not a weight") as caught:
        plain = ProjectedAdamW(model, lr=1e-3, c=2.0)
    biases = {name for name in plain.constraints() if name.endswith("bias")}
    assert any(dict(model.named_parameters())[name].ndim == 2 for name in biases)  # (experts, out)
    assert "_bias" not in str(caught[0].message)
    assert all(plain.constraints()[name] is None for name in biases)
    rules = {"*.experts.*_proj": MaxNorm(2.0, axis=1), "*.router.weight": MaxNorm(2.0, axis=1), "*": MaxNorm(2.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = ProjectedAdamW(model, lr=1e-3, constraint=rules)
    step(model, optimizer, language_loss)
    for name, p in model.named_parameters():
        if p.ndim > 1 and name not in biases:
            assert_held(stored(p), 2.0, 1)  # x @ weight[expert]: columns
    assert_a_neuron_is(model.model.layers[0].mlp.experts, "down_proj", stored_last=False)


def test_hyperball_of_experts():
    model = mixtral()
    before = {name: stored(p).copy() for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = run_page("Mixture of experts", 1, model=model)["optimizer"]
    for _ in range(3):
        step(model, optimizer, language_loss)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            axes = (-2, -1)  # for experts: one norm for each
            np.testing.assert_allclose(norms_of(stored(p), axes), norms_of(before[name], axes), rtol=1e-6)
            assert not np.array_equal(stored(p), before[name])
    with pytest.warns(UserWarning, match=r"embed_tokens.weight, .*Stacked.* leaves them free, .* a rule of their own"):
        hyperball(torch.optim.AdamW)(model, lr=0.01, axis=Stacked("matrix"))


# ----------------------------------------------------------------------------------------------------------------- peft


def lora():
    peft = import_or_skip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(gpt2(), config)


def test_lora_in_the_trainer(tmp_path):
    model = lora()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
    )
    data = [{"input_ids": tokens(i)[0], "labels": tokens(i)[0]} for i in range(12)]
    push_out_lora(model)
    title = "LoRA with peft, in the Trainer"
    optimizer = run_page(title, model=model, arguments=arguments, data=data)["optimizer"]
    factors = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(factors) == 12
    assert factors == [name for name in before if ".lora_A." in name or ".lora_B." in name]
    assert {name for name, own in optimizer.constraints().items() if own} == set(factors)
    for name, p in model.named_parameters():
        if name in factors:
            assert_held(stored(p), 0.1, 1, arguments.max_steps)
        else:
            assert torch.equal(p, before[name])
    with pytest.warns(
        UserWarning, match=r"'\*base_layer\*' is for frozen parameters only, such as .*base_layer.weight"
    ):
        ProjectedAdamW(model, lr=1e-3, constraint={"*base_layer*": MaxNorm(0.1)})


def push_out_lora(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.copy_(torch.randn_like(p))


def test_products_of_lora_factors():
    model = lora()
    push_out_lora(model)
    pairs = lora_pairs(model, c=0.5)
    assert len(pairs) == 6
    optimizer = ProjectedAdamW(model, lr=1e-3, joint=pairs, c=None)
    step(model, optimizer, language_loss)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            a, b = (stored(factor["default"].weight) for factor in (module.lora_A, module.lora_B))
            assert module.scaling["default"] == 2.0
            norm = np.linalg.norm(2.0 * b @ a)
            assert 0.5 * (1 - CLOSE) <= norm <= 0.5, name


# ----------------------------------------------------------------------------------------------------------------- timm


def image_loss(model):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return nn.functional.cross_entropy(model(x), torch.arange(4) % 3)


def test_resnet_of_timm():
    timm = import_or_skip("timm", stand_in="torchvision")
    torch.manual_seed(0)
    model = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=3, channels=(8, 8, 16, 16)
    )
    push_out(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = run_page("timm", model=model)["optimizer"]
    free = {name for name, p in model.named_parameters() if p.ndim < 2}
    assert any("bn" in name for name in free)
    assert_free_as_under(torch.optim.SGD, model, optimizer, image_loss, free)
    filters = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(filters) == 13
    for layer in filters:
        assert_held(stored(layer.weight), 2.0, (1, 2, 3))
    assert_held(stored(model.fc.weight), 2.0, 1)


def test_vision_transformer_of_timm():
    timm = import_or_skip("timm", stand_in="torchvision")
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(32, 8, num_classes=3, embed_dim=24, depth=2, num_heads=2)
    push_out(model, by=1000.0)
    with pytest.warns(UserWarning, match="cls_token, pos_embed: not a weight of a layer .* None frees it"):
        ProjectedSGD(model, lr=0.1, c=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = run_page("timm", 1, model=model)["optimizer"]
    free = {name for name, p in model.named_parameters() if p.ndim < 2} | {"cls_token"}
    assert_free_as_under(torch.optim.SGD, model, optimizer, image_loss, free)
    for name, p in model.named_parameters():
        if name == "pos_embed":
            assert_held(stored(p), 1.0, 2)
        elif name not in free:
            assert_held(stored(p), 2.0, tuple(range(1, p.ndim)))


# ---------------------------------------------------------------------------------------------------------- braindecode


def eegnet():
    models = import_or_skip("braindecode", stand_in="torchaudio").models
    torch.manual_seed(0)
    return models.EEGNet(n_chans=8, n_outputs=3, n_times=64, kernel_length=16, final_layer_with_constraint=True)


def eeg_loss(model):
    x = torch.randn(6, 8, 64, generator=torch.Generator().manual_seed(0))
    return nn.functional.cross_entropy(model(x), torch.arange(6) % 3)


def test_eegnet_of_braindecode():
    model = eegnet()
    with pytest.raises(ValueError, match=r"weight of .* computed by a parametrization.*remove_parametrizations\("):
        constrain(model.conv_spatial, MaxNorm(1.0))
    run_page("EEGNet with braindecode", model=model)
    bounds = {"conv_spatial.weight": 1.0, "final_layer.linearconstraint.weight": 0.25}
    assert declared(model) == {name: MaxNorm(c) for name, c in bounds.items()}
    model = push_out(copy.deepcopy(model))  # a copy declares the same
    optimizer = ProjectedAdamW(model, lr=1e-3)  # knows nothing of bounds
    free = {name for name, _ in model.named_parameters()} - set(bounds)
    assert_free_as_under(torch.optim.AdamW, model, optimizer, eeg_loss, free)
    for name, c in bounds.items():
        p = model.get_parameter(name)
        assert_held(stored(p), c, tuple(range(1, p.ndim)))


def test_eegnet_trains_as_with_the_constraints_of_keras():
    """The published model has max_norm(1.) on the spatial filters and max_norm(0.25) on the classifier."""
    from torch.nn.utils.parametrize import remove_parametrizations

    bounds = {"conv_spatial.weight": 1.0, "final_layer.linearconstraint.weight": 0.25}
    model = eegnet()
    for name in bounds:
        remove_parametrizations(model.get_submodule(name.rsplit(".", 1)[0]), "weight")
    model.eval()  # no dropout, and fixed statistics
    theirs = copy.deepcopy(model)
    rules = {"conv_spatial.weight": MaxNorm(1.0), "final_layer.*.weight": MaxNorm(0.25)}
    optimizer, plain = ProjectedAdam(model, lr=0.1, constraint=rules), torch.optim.Adam(theirs.parameters(), lr=0.1)
    for _ in range(10):
        step(model, optimizer, eeg_loss)
        step(theirs, plain, eeg_loss)
        for name, c in bounds.items():
            w = theirs.get_parameter(name).data
            norms = w.square().sum(tuple(range(1, w.ndim)), keepdim=True).sqrt()
            w.mul_(norms.clamp(0, c) / (1e-7 + norms))  # Keras's formula; a filter of PyTorch is its axis 0
            p = stored(model.get_parameter(name))
            assert norms_of(p, tuple(range(1, p.ndim))).max() <= c
    assert optimizer.constraints()["conv_temporal.weight"] is None
    for name, c in bounds.items():
        p = model.get_parameter(name)
        assert norms_of(stored(p), tuple(range(1, p.ndim))).max() >= c * (1 - 1e-5)  # it binds
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-3, atol=1e-4)


def test_eegnet_keeps_its_own_parametrization():
    model = push_out(eegnet())
    names = (
        "conv_spatial.parametrizations.weight.original, final_layer.linearconstraint.parametrizations.weight.original"
    )
    with pytest.warns(UserWarning, match=f"^{names}: the constraint holds for this tensor"):
        optimizer = ProjectedAdamW(model, lr=1e-3, c=4.0)
    step(model, optimizer, eeg_loss)
    for layer, c in ((model.conv_spatial, 1.0), (model.final_layer.linearconstraint, 0.25)):
        axes = tuple(range(1, layer.weight.ndim))
        assert_held(stored(layer.parametrizations.weight.original), 4.0, axes)
        np.testing.assert_allclose(norms_of(stored(layer.weight), axes), c, rtol=1e-5)  # its own bound, in the forward


# ------------------------------------------------------------------------------------------------------------------ JAX


@pytest.fixture
def compile_quickly():
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.usefixtures("compile_quickly")
def test_transformer_block_of_flax_nnx():
    import jax
    import optax
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(20, 12, rngs=rngs)
            self.norm1, self.norm2 = nnx.LayerNorm(12, rngs=rngs), nnx.LayerNorm(12, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
            self.up, self.down = nnx.Linear(12, 24, rngs=rngs), nnx.Linear(24, 12, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attn(self.norm1(x))
            return self.embed.attend(x + self.down(nnx.gelu(self.up(self.norm2(x)))))

    @nnx.jit
    def trained(model, optimizer, tokens):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(model(tokens), tokens).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    model = Block(nnx.Rngs(0))
    rng = np.random.default_rng(0)
    nnx.update(model, jax.tree.map(lambda p: rng.normal(0, 9, p.shape).astype(p.dtype), nnx.state(model, nnx.Param)))
    free = ("norm1.scale", "norm1.bias", "norm2.scale", "up.bias", "attn.query.bias", "attn.out.bias")
    before = {name: np.asarray(operator.attrgetter(name)(model)[...]) for name in free}
    optimizer = run_page("flax.nnx", model=model)["optimizer"]
    trained(model, optimizer, rng.integers(0, 20, (2, 6)))
    for layer in (model.attn.query, model.attn.key, model.attn.value):
        assert layer.kernel.shape == (12, 3, 4)  # in, heads, features
        assert_held(layer.kernel[...], 2.0, 0)
    assert_held(model.attn.out.kernel[...], 2.0, (0, 1))
    assert_held(model.up.kernel[...], 1.0, 0)
    assert_held(model.down.kernel[...], 1.0, 0)
    assert_held(model.embed.embedding[...], 4.0, 1)
    for name in free:
        np.testing.assert_allclose(operator.attrgetter(name)(model)[...], before[name], rtol=1e-3, atol=2e-3)


@pytest.mark.usefixtures("compile_quickly")
def test_mlp_of_equinox():
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    def loss(model, x, y):
        return jnp.square(jax.vmap(model)(x) - y).mean()

    model = eqx.nn.MLP(8, 3, 16, 2, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    model = eqx.combine(jax.tree.map(lambda p: 30 * p, arrays), rest)
    x, y = jnp.ones((4, 8)), jnp.zeros((4, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = run_page("equinox", model=model, loss=loss)
        model, _ = names["step"](model, names["state"], x, y)
        assert report(model, MaxNorm(1.0)).violations == 0  # reads the whole module, with its activations
    for layer, c in zip(model.layers, (1.0, 1.0, 0.25), strict=True):
        assert_held(layer.weight, c, 1)
    assert float(jnp.abs(model.layers[0].bias).max()) > 1.0  # free


def test_every_block_of_the_page_is_run():
    text = Path(__file__).read_text()
    assert sum(map(len, BLOCKS.values())) == PAGE.count("```python") == 9
    for title, blocks in BLOCKS.items():
        assert not blocks or f'"{title}"' in text, title
