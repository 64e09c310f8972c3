"""The code on the page about PyTorch runs as it stands, and does what the page says."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "pytorch.md"


def test_the_code_on_the_page_runs():
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("features", torch.nn.Sequential(torch.nn.Conv1d(2, 4, 3), torch.nn.Flatten()))
    model.add_module("classifier", torch.nn.Sequential(torch.nn.Linear(24, 3)))
    names = {"model": model, "loss_fn": torch.nn.functional.cross_entropy}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    with torch._dynamo.config.patch(trace_autograd_ops=False):
        for block in blocks:
            exec(block.replace("fullgraph=True", 'fullgraph=True, backend="aot_eager"'), names)
        assert [g["weight_decay"] for g in names["optimizer"].param_groups] == [1e-4] * 3
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(2.0)
        names["step"](torch.randn(5, 2, 8), torch.randint(3, (5,)))
    for layer, c in ((model.features[0], 3), (model.classifier[0], 4)):
        norms = layer.weight.detach().double().flatten(1).norm(dim=1)
        assert bool(((c * (1 - 1e-5) <= norms) & (norms <= c)).all())
