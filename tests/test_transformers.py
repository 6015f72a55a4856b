"""Hugging Face's Trainer: windows of any size equal true large batches; checkpoints carry the controller."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import adaptbatch as ab
from adaptbatch.integrations.transformers import AdaptiveAccumulationMixin
from tests.test_controller import batches, split

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true"),
]
INPUTS = torch.cat(batches([42]))


class AdaptiveTrainer(AdaptiveAccumulationMixin, Trainer):
    """In the order of the data, so that a twin can follow."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Regression(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(x) - 0.5).square().sum(-1).mean()}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    options = {"output_dir": str(folder), "per_device_train_batch_size": 4, "learning_rate": 0.05, "use_cpu": True}
    options |= {"lr_scheduler_type": "constant", "optim": "sgd", "report_to": "none", "save_strategy": "no"}
    options |= {"disable_tqdm": True, "logging_strategy": "no", "max_grad_norm": 0.0, "seed": 0}
    return TrainingArguments(**(options | {"num_train_epochs": 2} | more))


def trained(folder: Path, adaptive: dict[str, Any], resume: str | None = None, **more: Any) -> AdaptiveTrainer:
    data = [{"x": x} for x in INPUTS]
    trainer = AdaptiveTrainer(Regression(), arguments(folder, **more), train_dataset=data, adaptive=adaptive)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_unequal_and_partial_windows_equal_true_large_batches(tmp_path, clip):
    """Eleven micro-batches an epoch, the last one of two examples: windows of 2, 3, 1, 4 and 1, then 4, 4 and 3."""
    trainer = trained(tmp_path, {"rule": ab.Replay([2, 3, 1, 4])}, max_grad_norm=clip)
    micro = list(INPUTS.split(4))
    twin = Regression()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    for window in split(micro, [2, 3, 1, 4]) + split(micro, [4]):
        twin(torch.cat(window))["loss"].backward()
        if clip:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    for p, q in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    rows = trainer.controller.history.to_pandas()
    assert rows["accumulation_steps"].tolist() == [2, 3, 1, 4, 1, 4, 4, 3]
    assert trainer.controller.examples_seen == 84
    assert trainer.state.global_step == 8
    assert not any(p._backward_hooks for p in trainer.model.parameters())


def test_a_language_model_is_averaged_over_tokens(tmp_path):
    """Padded sequences of several lengths: one window of five equals one batch of all."""
    config = GPT2Config(vocab_size=11, n_positions=16, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0)
    config.attn_pdrop = 0.0
    torch.manual_seed(0)
    ours = GPT2LMHeadModel(config).double()
    twin = GPT2LMHeadModel(config).double()
    twin.load_state_dict(ours.state_dict())
    data = []
    for length in (3, 7, 16, 4, 9, 2, 12, 5, 6, 10):
        ids = torch.randint(11, (16,))
        mask = (torch.arange(16) < length).long()
        data.append({"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)})
    options = {"per_device_train_batch_size": 2, "num_train_epochs": 1}
    trainer = AdaptiveTrainer(ours, arguments(tmp_path, **options), train_dataset=data, adaptive={"rule": ab.Fixed(5)})
    trainer.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    twin(**{name: torch.stack([item[name] for item in data]) for name in data[0]}).loss.backward()
    optimizer.step()
    for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
        # Transformers takes the loss in float32.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)
    assert trainer.controller.history.to_pandas()["global_batch"].tolist() == [64.0]


def test_a_closed_loop_rule_changes_the_window(tmp_path):
    rule = ab.RelativeStandardError(theta=0.3, memory=100.0, dead_time=20.0)
    trainer = trained(tmp_path, {"rule": rule}, num_train_epochs=30, learning_rate=1e-3)
    assert trainer.controller.history.to_pandas()["accumulation_steps"].nunique() > 2


def test_a_checkpoint_carries_the_controller(tmp_path):
    adaptive = {"rule": ab.Replay([2, 3, 1, 4, 1, 5])}
    first = trained(tmp_path, adaptive, num_train_epochs=1, save_strategy="steps", save_steps=5)
    checkpoint = str(tmp_path / "checkpoint-5")
    second = trained(tmp_path, adaptive, checkpoint, num_train_epochs=2, ignore_data_skip=True)
    assert first.controller.examples_seen == 42
    rows = second.controller.history.to_pandas()
    assert rows["accumulation_steps"].iloc[0] == 5
    assert rows["optimizer_step"].iloc[0] == 6
    assert rows["examples_seen"].iloc[0] == 42 + rows["global_batch"].iloc[0]


@pytest.mark.parametrize(
    ("adaptive", "more", "message"),
    [
        ({}, {"gradient_accumulation_steps": 2}, r"args must leave accumulation .* gradient_accumulation_steps = 2"),
        ({"guard": ab.Guard()}, {}, r"adaptive must leave \['guard'\] out"),
    ],
    ids=["accumulation", "guard"],
)
def test_what_cannot_work_is_refused(tmp_path, adaptive, more, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveTrainer(Regression(), arguments(tmp_path, **more), adaptive=adaptive)
