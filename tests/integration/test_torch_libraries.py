"""Lightning, Accelerate and the Trainer of transformers: they train, save and resume with the projection."""

import copy

import pytest
import torch

from projgd import MaxNorm
from projgd.torch import ProjectedAdam, ProjectedAdamW, constrain, project_after_step
from tests.torch.common import batch, equal, longest_of, loss_of, network, outside

C = 0.5


@pytest.mark.parametrize("way", ["class", "hook", "declared"])
def test_lightning(way, tmp_path):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            if way == "declared":
                for layer in (part for part in self.net if isinstance(part, torch.nn.Linear)):
                    constrain(layer, MaxNorm(C))

        def training_step(self, data, _):
            return torch.nn.functional.cross_entropy(self.net(data[0]), data[1])

        def configure_optimizers(self):
            if way == "declared":
                return ProjectedAdam(self, lr=0.1)
            if way == "class":
                return ProjectedAdam(self.net.parameters(), lr=0.1, c=C)
            optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)
            project_after_step(optimizer, MaxNorm(C))
            return optimizer

    def trained(steps, **options):
        module = Module()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            barebones=False,
        )
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch()), batch_size=16)
        trainer.fit(module, data, **options)
        return module, trainer

    whole, _ = trained(6)
    assert longest_of(whole.net) <= C
    assert longest_of(whole.net) >= C * (1 - 1e-5)
    trained(4)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = trained(6, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(resumed.net, whole.net)


def test_accelerate(tmp_path):
    from accelerate import Accelerator

    net = outside(network())
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(net, ProjectedAdam(net.parameters(), lr=0.1, c=C))
    for k in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, k))
            optimizer.step()
            optimizer.zero_grad()
    assert longest_of(net) <= C
    assert longest_of(net) >= C * (1 - 1e-5)
    accelerator.save_state(tmp_path)
    after = copy.deepcopy(net)
    optimizer.param_groups[0]["c"] = 2 * C
    outside(net)
    accelerator.load_state(tmp_path)
    assert equal(net, after)
    assert optimizer.param_groups[0]["c"] == C
    with pytest.raises(TypeError, match=r"pass the optimizer inside it, such as wrapper.optimizer"):
        project_after_step(optimizer, MaxNorm(C))


@pytest.mark.parametrize("way", ["instance", "class"])
def test_trainer_of_transformers(way, tmp_path):
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels):
            logits = self.net(x)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    x, y = batch()
    data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def trained(resume=None):
        model = Model()
        if way == "instance":
            options = {"optimizers": (ProjectedAdamW(model.parameters(), lr=0.1, c=C), None)}
        else:
            options = {"optimizer_cls_and_kwargs": (ProjectedAdamW, {"lr": 0.1, "c": C})}
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_steps=2,
            max_grad_norm=1.0,
            per_device_train_batch_size=4,
        )
        Trainer(model, arguments, train_dataset=data, **options).train(resume_from_checkpoint=resume)
        return model.net

    whole = trained()
    assert C * (1 - 1e-5) <= longest_of(whole) <= C
    assert equal(trained(resume=str(tmp_path / "checkpoint-2")), whole)
