"""The mixin in the real Trainer, against hand-written loops with true large batches."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from adaptbatch import Fixed, Limits, RelativeStandardError
from adaptbatch.rules import Replay
from tests.models import LastDigits, equal_state, split
from tests.processes import spawn
from tests.reference import hand_written_loop

transformers = pytest.importorskip("transformers")
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from adaptbatch.integrations.shared import refuse  # noqa: E402
from adaptbatch.integrations.transformers import AdaptiveAccumulationMixin  # noqa: E402
from adaptbatch.integrations.transformers import _refusals as refusals  # noqa: E402

EXAMPLES, SIZE = 42, 4


class AdaptiveTrainer(AdaptiveAccumulationMixin, Trainer):
    pass


class Regression(nn.Module):
    """Keeps the rows that it was trained on."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
        self.rows: list[int] = []

    def forward(self, x: Tensor, row: Tensor) -> dict[str, Tensor]:
        self.rows += row.tolist() if self.training else []
        return {"loss": mean_loss(self.net, x)}


def mean_loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def examples(n: int = EXAMPLES, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))


def rows(x: Tensor) -> list[dict[str, Any]]:
    return [{"x": one, "row": index} for index, one in enumerate(x)]


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {"x": torch.stack([one["x"] for one in batch]), "row": torch.tensor([one["row"] for one in batch])}


def arguments(path: Path, **options: Any) -> Any:
    given = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": SIZE,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.05,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    } | options
    return TrainingArguments(str(path), **given)


def trainer(path: Path, model: nn.Module, x: Tensor, callbacks: Any = None, own: Any = None, **options: Any) -> Any:
    """``options`` are TrainingArguments, ``own`` the mixin's."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return AdaptiveTrainer(
        model,
        arguments(path, **options),
        data_collator=collate,
        train_dataset=rows(x),
        eval_dataset=rows(x[:8]),
        optimizers=(optimizer, None),
        callbacks=callbacks,
        **(own or {"rule": Replay([2, 3, 1, 4])}),
    )


def windows(x: Tensor, steps: list[int], epochs: int = 2) -> list[list[Tensor]]:
    """An epoch's end ends a window; ``steps`` go on, and the last of them holds."""
    made: list[list[Tensor]] = []
    for _ in range(epochs):
        made += split(list(x.split(SIZE)), steps[len(made) :] or steps[-1:])
    return made


def assert_same(net: nn.Module, other: nn.Module, rtol: float = 1e-9) -> None:
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize("steps", [[2, 3, 1, 4], [1], [1, 1, 5, 2, 7, 3], [3], [50]])
def test_parameters_are_those_of_true_large_batches(tmp_path: Path, steps: list[int]) -> None:
    x, model, twin = examples(), Regression(), Regression()
    training = trainer(tmp_path, model, x, own={"rule": Replay(steps)})
    output = training.train()
    expected = windows(x, steps)
    hand_written_loop(twin.net, torch.optim.Adam(twin.net.parameters(), lr=0.05), mean_loss, expected)
    assert_same(model.net, twin.net)
    assert model.rows == 2 * list(range(EXAMPLES))
    table = training.controller.history.to_pandas()
    assert table["accumulation_steps"].tolist() == [len(window) for window in expected]
    assert table["global_batch"].tolist() == [sum(map(len, window)) for window in expected]
    assert output.global_step == training.state.global_step == training.state.max_steps == len(expected)
    logged = [entry for entry in training.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == pytest.approx(table["loss"].tolist(), rel=1e-6)
    assert [entry["grad_norm"] for entry in logged] == pytest.approx(table["batch_grad_norm"].tolist(), rel=1e-5)
    done = table["backward_passes"] / 11
    assert [entry["epoch"] for entry in logged] == pytest.approx(done.tolist(), rel=1e-2)
    assert not any(p._backward_hooks for p in model.parameters())


def test_clipping_sees_the_exact_mean(tmp_path: Path) -> None:
    x, model, twin = examples(), Regression(), Regression()
    trainer(tmp_path, model, x, max_grad_norm=0.5).train()
    optimizer, clipped = torch.optim.Adam(twin.net.parameters(), lr=0.05), 0
    for window in windows(x, [2, 3, 1, 4]):
        optimizer.zero_grad()
        mean_loss(twin.net, torch.cat(window)).backward()
        clipped += float(nn.utils.clip_grad_norm_(twin.net.parameters(), 0.5)) > 0.5
        optimizer.step()
    assert clipped
    # The clipping coefficient has an epsilon, and Adam forgets the length of what it is given only in part.
    assert_same(model.net, twin.net, rtol=1e-7)


@pytest.mark.parametrize(("budget", "micro_batches"), [({"num_train_epochs": 1.5}, 17), ({"max_steps": 14}, 14)])
def test_a_budget_of_micro_batches_is_used_up_and_the_schedule_ends_with_it(
    tmp_path: Path, budget: dict[str, Any], micro_batches: int
) -> None:
    model = Regression()
    training = trainer(tmp_path, model, examples(), lr_scheduler_type="linear", **budget)
    training.train()
    assert training.controller.history.to_pandas()["backward_passes"].iloc[-1] == micro_batches
    assert training.lr_scheduler.last_epoch == micro_batches
    assert training.lr_scheduler.get_last_lr() == [0.0]
    assert training.state.global_step == training.state.max_steps < micro_batches


@pytest.mark.parametrize("ghost", [False, True])
def test_a_closed_loop_moves(tmp_path: Path, ghost: bool) -> None:
    own = {"rule": RelativeStandardError(theta=0.2), "limits": Limits(max_steps=16), "ghost": ghost}
    own |= {"population": 512, "consecutive": True}
    x = examples(512)
    training = trainer(tmp_path, Regression(), x, own=own, num_train_epochs=4, eval_strategy="steps", eval_steps=20)
    training.train()
    table = training.controller.history.to_pandas()
    assert len(set(table["accumulation_steps"])) > 1
    assert table["global_batch"].sum() == 4 * 512
    assert "RelativeStandardError" in training.controller.explain()


class StopAfter(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("restored", [False, True], ids=["", "callbacks restored by the Trainer"])
@pytest.mark.parametrize("stop", [2, 6])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int, shuffled: bool, restored: bool) -> None:
    """Bit for bit: within the first epoch and within a later one, by a rule that one lost bit would lead astray."""
    options = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": stop, "lr_scheduler_type": "linear"}
    options |= {"train_sampling_strategy": "random" if shuffled else "sequential"}
    x, whole, model = examples(dtype=torch.float32), Regression(torch.float32), Regression(torch.float32)
    uninterrupted = trainer(tmp_path / "whole", whole, x, own={"rule": LastDigits()}, **options)
    uninterrupted.train()
    first = trainer(tmp_path / "half", model, x, [StopAfter(stop)], {"rule": LastDigits()}, **options)
    first.train()
    assert first.state.global_step == stop
    other = Regression(torch.float32)
    options["restore_callback_states_from_checkpoint"] = restored
    second = trainer(tmp_path / "half", other, x, own={"rule": LastDigits()}, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "half" / f"checkpoint-{stop}"))
    assert equal_state(whole, other)
    assert model.rows + other.rows == whole.rows
    assert sorted(whole.rows) == sorted(3 * list(range(EXAMPLES)))
    assert second.state.global_step == uninterrupted.state.global_step
    times = [c for c in second.controller.history.to_pandas() if "seconds" in c]
    expected = uninterrupted.controller.history.to_pandas().iloc[stop:].drop(columns=times).reset_index(drop=True)
    found = second.controller.history.to_pandas().drop(columns=times)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)


def test_a_checkpoint_of_the_plain_trainer_can_be_gone_on_with(tmp_path: Path) -> None:
    x, model = examples(), Regression()
    plain = Trainer(
        model,
        arguments(tmp_path, save_strategy="steps", save_steps=3),
        data_collator=collate,
        train_dataset=rows(x),
        optimizers=(torch.optim.Adam(model.parameters(), lr=0.05), None),
        callbacks=[StopAfter(3)],
    )
    plain.train()
    other = Regression()
    training = trainer(tmp_path, other, x, save_strategy="steps", save_steps=3)
    training.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert model.rows + other.rows == 2 * list(range(EXAMPLES))


def test_a_loss_scale_is_heard_away_and_an_overflow_skips_its_window(tmp_path: Path) -> None:
    """The scaler that fp16 would bring on a GPU."""
    x, model, twin = examples(dtype=torch.float32), Regression(torch.float32), Regression(torch.float32)
    x[10] = math.inf
    training = trainer(tmp_path, model, x, own={"rule": Fixed(3)}, logging_nan_inf_filter=False)
    training.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    training.train()
    table = training.controller.history.to_pandas()
    assert table["skipped"].tolist() == 2 * [True, False, False, False]
    good = [window for window in windows(x, [3]) if torch.cat(window).isfinite().all()]
    hand_written_loop(twin.net, torch.optim.Adam(twin.net.parameters(), lr=0.05), mean_loss, good)
    # Float32 sums in another order, through Adam's division by the root of the second moment.
    assert_same(model.net, twin.net, rtol=1e-4)
    norms = [entry["grad_norm"] for entry in training.state.log_history if "grad_norm" in entry]
    assert table["batch_grad_norm"][1] * 2.0**9 == pytest.approx(norms[1], rel=1e-5)


class Endless(torch.utils.data.IterableDataset):
    """No length, and one pass has six micro-batches."""

    def __iter__(self) -> Any:
        return iter(rows(examples(6 * SIZE)))


def test_data_without_a_length_end_with_the_budget(tmp_path: Path) -> None:
    model = Regression()
    training = trainer(tmp_path, model, examples(), own={"rule": Fixed(4)}, max_steps=15)
    training.train_dataset = Endless()
    training.train()
    assert training.controller.history.to_pandas()["accumulation_steps"].tolist() == [4, 2, 4, 2, 3]
    assert model.rows == (3 * list(range(6 * SIZE)))[: 15 * SIZE]


def test_bfloat16_autocast_is_measured(tmp_path: Path) -> None:
    training = trainer(tmp_path, Regression(torch.float32), examples(dtype=torch.float32), bf16=True)
    training.train()
    assert training.accelerator.mixed_precision == "bf16"
    assert (training.controller.history.to_pandas()["batch_grad_norm"] > 0.0).all()


# --- tokens -----------------------------------------------------------------------------------------------------


def gpt2() -> Any:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=17, n_positions=16, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config).double()


def sentences(count: int = 22) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    return [torch.randint(1, 17, (length,), generator=generator) for length in lengths]


def padded(batch: list[Tensor]) -> dict[str, Tensor]:
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(batch, batch_first=True),
        "attention_mask": pad([torch.ones_like(one) for one in batch], batch_first=True),
        "labels": pad(batch, batch_first=True, padding_value=-100),
    }


def token_trainer(path: Path, model: Any, data: list[Tensor], steps: list[int], **options: Any) -> Any:
    return AdaptiveTrainer(
        model,
        arguments(path, per_device_train_batch_size=2, **options),
        data_collator=padded,
        train_dataset=data,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.5), None),
        rule=Replay(steps),
    )


def token_loop(model: Any, windows: list[list[list[Tensor]]], smoothing: float = 0.0) -> None:
    """One step a window, on the mean over the target tokens of all its sentences in a single batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for window in windows:
        optimizer.zero_grad()
        batch = padded([one for cell in window for one in cell])
        logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing).backward()
        optimizer.step()


def assert_same_tokens(parameters: Iterable[Tensor], twin: Any) -> None:
    for p, q in zip(parameters, twin.parameters(), strict=True):
        # The model's loss is computed in float32.
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_target_token_of_a_language_model_counts_the_same(tmp_path: Path, smoothing: float) -> None:
    data, model, twin = sentences(), gpt2(), gpt2()
    steps = [2, 3, 1, 4]
    options = {"label_smoothing_factor": smoothing, "include_num_input_tokens_seen": "non_padding"}
    training = token_trainer(tmp_path, model, data, steps, **options)
    training.train()
    cells = [data[i : i + 2] for i in range(0, len(data), 2)]
    expected = split(cells, steps) + split(cells, steps[-1:])
    token_loop(twin, expected, smoothing)
    assert_same_tokens(model.parameters(), twin)
    table = training.controller.history.to_pandas()
    targets = [sum(len(one) - 1 for cell in window for one in cell) for window in expected]
    assert table["global_batch"].tolist() == targets
    assert training.state.num_input_tokens_seen == 2 * sum(map(len, data))
    plain = [training.floating_point_ops(padded(cell)) for cell in cells]
    assert training.state.total_flos == 2 * sum(plain)


def test_a_micro_batch_without_targets_is_left_out(tmp_path: Path) -> None:
    data = sentences(8)
    data[2] = data[3] = torch.tensor([1])
    training = token_trainer(tmp_path, gpt2(), data, [2])
    training.train()
    table = training.controller.history.to_pandas()
    assert table["accumulation_steps"].tolist() == [1, 2, 1, 2]
    assert table["loss"].notna().all()


def ranked(rank: int, folder: str) -> dict[str, Any]:
    # What torchrun sets, and Accelerate asks for though the group exists.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # never bound
    data, model = sentences(), gpt2()
    training = token_trainer(Path(folder), model, data, [2, 3, 1, 4], ddp_find_unused_parameters=False)
    training.train()
    batch = training.controller.history.to_pandas()["global_batch"].tolist()
    return {"parameters": [p.detach() for p in model.parameters()], "batch": batch}


def test_two_ranks_step_on_the_mean_over_the_tokens_of_both(tmp_path: Path) -> None:
    """Eleven micro-batches an epoch, given to the ranks in turn, and to the second rank the first one again."""
    found, data, twin = spawn(ranked, tmp_path, str(tmp_path)), sentences(), gpt2()
    cells = [data[i : i + 2] for i in range(0, len(data), 2)]
    pairs = [cells[i] + (cells[i + 1 :] or cells)[0] for i in range(0, len(cells), 2)]
    expected = split(pairs, [2, 3, 1, 4]) + split(pairs, [4])
    token_loop(twin, expected)
    for result in found:
        assert result["batch"] == [sum(len(one) - 1 for pair in window for one in pair) for window in expected]
        assert_same_tokens(result["parameters"], twin)


def test_a_weight_of_ones_own(tmp_path: Path) -> None:
    x = examples()
    own = {"rule": Fixed(2), "weight": lambda inputs: 3.0 * len(inputs["row"])}
    training = trainer(tmp_path, Regression(), x, own=own)
    training.train()
    assert training.controller.examples_seen == 6 * EXAMPLES


# --- refusals and errors ----------------------------------------------------------------------------------------


def test_accumulation_by_the_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got gradient_accumulation_steps = 2; leave it at 1"):
        trainer(tmp_path, Regression(), examples(), gradient_accumulation_steps=2)


@pytest.mark.parametrize(
    ("whose", "name", "value", "message"),
    [
        (AdaptiveTrainer, "is_deepspeed_enabled", True, "steps the optimizer itself, got DeepSpeed"),
        (TrainingArguments, "n_gpu", 2, r"needs one process a GPU, got DataParallel on 2; launch it with torchrun"),
        (TrainingArguments, "optim", "lomo", "needs an optimizer that steps after the backward pass, got optim = lomo"),
    ],
)
def test_what_else_steps_or_splits_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whose: type, name: str, value: Any, message: str
) -> None:
    training = trainer(tmp_path, Regression(), examples())
    ours = training if whose is AdaptiveTrainer else training.args
    monkeypatch.setattr(type(ours), name, property(lambda self: value), raising=False)
    with pytest.raises(ValueError, match=message):
        refuse("AdaptiveAccumulationMixin", refusals(training))


def test_a_state_within_a_window_is_refused(tmp_path: Path) -> None:
    class Asking(Regression):
        asked = 0

        def forward(self, x: Tensor, row: Tensor) -> dict[str, Tensor]:
            if training.controller._window.micro_batches == 2:
                Asking.asked += 1
                with pytest.raises(RuntimeError, match=r"state\(\) is for between windows, got one with 2 of 3"):
                    training._windows.state()
            return super().forward(x, row)

    training = trainer(tmp_path, Asking(), examples(), own={"rule": Replay([2, 3])}, num_train_epochs=1)
    training.train()
    assert Asking.asked


def test_inputs_without_a_tensor_need_a_weight(tmp_path: Path) -> None:
    training = trainer(tmp_path, Regression(), examples())
    with pytest.raises(ValueError, match=r"weight must be given for a batch without a tensor"):
        training._weigh({"x": 3.0})


def test_an_error_within_a_window_leaves_no_hooks_and_can_be_gone_on_from(tmp_path: Path) -> None:
    class Failing(Regression):
        fails = True

        def forward(self, x: Tensor, row: Tensor) -> dict[str, Tensor]:
            if self.fails and 5 in row:
                raise FloatingPointError("row 5")
            return super().forward(x, row)

    model = Failing()
    training = trainer(tmp_path, model, examples())
    with pytest.raises(FloatingPointError, match="row 5"):
        training.train()
    assert not any(p._backward_hooks for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())
    model.fails = False
    training.train()
    assert training.controller.examples_seen == 2 * EXAMPLES


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("skips", [True, False])
def test_a_window_that_is_not_finite_moves_nothing(tmp_path: Path, skips: bool, clip: float) -> None:
    """One of ten micro-batches is poisoned: the twin is trained on the windows without it."""
    x = examples(40)
    x[9] = math.nan
    model, twin = Regression(), Regression()
    own = {"rule": Fixed(2), "skip_nonfinite": skips}
    tried = trainer(tmp_path, model, x, own=own, num_train_epochs=1, max_grad_norm=clip)
    tried.train()
    table = tried.controller.history.to_pandas()
    assert table["reason"].eq("nonfinite").tolist() == [False, True] + [not skips] * 3
    assert table["skipped"].tolist() == [False, skips, False, False, False]
    if not skips:
        assert not any(p.isfinite().all() for p in model.parameters())
        return
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.05)
    for index, cells in enumerate(windows(x, [2], epochs=1)):
        if index != 1:
            optimizer.zero_grad()
            mean_loss(twin.net, torch.cat(cells)).backward()
            if clip:
                nn.utils.clip_grad_norm_(twin.parameters(), clip)
            optimizer.step()
    assert_same(model.net, twin.net)
