"""The callback in Lightning's real loop, against hand-written loops with true large batches."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaptbatch import Fixed, Limits, RelativeStandardError
from adaptbatch.rules import Replay
from tests.reference import hand_written_loop

L = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import (  # noqa: E402
    GradientAccumulationScheduler,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from adaptbatch.integrations.lightning import AdaptiveAccumulation  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The 'val_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    # Lightning's own use of torch.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
]


class Net(L.LightningModule):
    def __init__(self, dtype: torch.dtype = torch.float64, scheduled: bool = False, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
        self.scheduled, self.lr = scheduled, lr
        self.rows: list[int] = []
        self.losses: list[float] = []
        self.returned: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        x, rows = batch
        self.rows += rows.tolist()
        loss = mean_loss(self.net, x)
        self.returned.append(float(loss.detach()))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if outputs:
            self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Validated(Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        mean_loss(self.net, batch[0])


def mean_loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def examples(n: int = 43, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))


def loader(x: Tensor, size: int = 4) -> Any:
    return DataLoader(TensorDataset(x, torch.arange(len(x))), batch_size=size)


def trainer(path: Path, *callbacks: Any, **options: Any) -> Any:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    given = {"max_epochs": 2, "enable_checkpointing": checkpoints, "num_sanity_val_steps": 0} | options
    return L.Trainer(default_root_dir=path, callbacks=list(callbacks), **quiet, **given)


def windows(x: Tensor, steps: list[int], epochs: int, size: int = 4) -> list[list[Tensor]]:
    """The micro-batches of each window: ``steps`` of them, the last entry holds, an epoch's end ends a window."""
    made: list[list[Tensor]] = []
    for _ in range(epochs):
        cells = list(x.split(size))
        while cells:
            k = steps[min(len(made), len(steps) - 1)]
            made.append(cells[:k])
            cells = cells[k:]
    return made


def assert_same(net: nn.Module, other: nn.Module, rtol: float = 1e-9) -> None:
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("steps", [[2, 3, 1, 4], [1], [1, 1, 5, 2, 7, 3], [3], [50]])
def test_parameters_are_those_of_true_large_batches(tmp_path: Path, steps: list[int]) -> None:
    x, module, twin = examples(), Net(), Net()
    accumulation = AdaptiveAccumulation(rule=Replay(steps))
    fit = trainer(tmp_path, accumulation)
    fit.fit(module, loader(x))
    expected = windows(x, steps, epochs=2)
    hand_written_loop(twin.net, torch.optim.Adam(twin.net.parameters(), lr=0.05), mean_loss, expected)
    assert_same(module.net, twin.net)
    assert fit.global_step == len(expected)
    assert module.rows == 2 * list(range(len(x)))
    rows = accumulation.controller.history.to_pandas()
    assert rows["accumulation_steps"].tolist() == [len(window) for window in expected]
    assert rows["global_batch"].tolist() == [sum(map(len, window)) for window in expected]
    assert not rows["skipped"].any()
    assert fit.accumulate_grad_batches == 1
    # What other hooks are told is the loss that training_step returned, not divided.
    assert module.losses == pytest.approx(module.returned, rel=1e-12)
    cells = [(len(cell), loss) for cell, loss in zip(itertools.chain(*expected), module.returned, strict=True)]
    for row, window in zip(rows["loss"], expected, strict=True):
        own, cells = cells[: len(window)], cells[len(window) :]
        assert row == pytest.approx(sum(n * loss for n, loss in own) / sum(n for n, _ in own))


def test_clipping_sees_the_exact_mean(tmp_path: Path) -> None:
    x, module, twin = examples(), Net(), Net()
    trainer(tmp_path, AdaptiveAccumulation(rule=Replay([2, 3, 1, 4])), gradient_clip_val=0.5).fit(module, loader(x))
    optimizer, clipped = torch.optim.Adam(twin.net.parameters(), lr=0.05), 0
    for window in windows(x, [2, 3, 1, 4], epochs=2):
        optimizer.zero_grad()
        mean_loss(twin.net, torch.cat(window)).backward()
        clipped += float(nn.utils.clip_grad_norm_(twin.net.parameters(), 0.5)) > 0.5
        optimizer.step()
    assert clipped
    assert_same(module.net, twin.net)


def test_step_schedulers_step_once_a_window(tmp_path: Path) -> None:
    module = Net(scheduled=True)
    fit = trainer(tmp_path, AdaptiveAccumulation(rule=Replay([2, 3, 1, 4])))
    fit.fit(module, loader(examples()))
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.5**fit.global_step)
    assert fit.global_step == len(windows(examples(), [2, 3, 1, 4], epochs=2))


def test_validation_within_windows_and_limited_epochs_change_nothing(tmp_path: Path) -> None:
    x, module, twin = examples(), Validated(), Net()
    fit = trainer(
        tmp_path, AdaptiveAccumulation(rule=Fixed(3)), limit_train_batches=7, val_check_interval=2, max_epochs=2
    )
    fit.fit(module, loader(x), loader(x))
    expected = windows(x[:28], [3], epochs=2)
    hand_written_loop(twin.net, torch.optim.Adam(twin.net.parameters(), lr=0.05), mean_loss, expected)
    assert_same(module.net, twin.net)
    assert fit.global_step == len(expected)


@pytest.mark.parametrize("ghost", [False, True])
def test_a_closed_loop_moves(tmp_path: Path, ghost: bool) -> None:
    x = examples(512)
    accumulation = AdaptiveAccumulation(
        rule=RelativeStandardError(theta=0.2),
        limits=Limits(max_steps=16),
        ghost=ghost,
        population=512,
        consecutive=True,
    )
    module = Validated()
    fit = trainer(tmp_path, accumulation, max_epochs=4, val_check_interval=50)
    fit.fit(module, loader(x), loader(x[:8]))
    rows = accumulation.controller.history.to_pandas()
    assert rows["accumulation_steps"].nunique() > 1
    assert fit.global_step == len(rows)
    assert rows["global_batch"].sum() == 4 * 512
    assert "RelativeStandardError" in accumulation.controller.explain()


def test_a_weight_function_and_nested_batches(tmp_path: Path) -> None:
    x = examples(12)
    accumulation = AdaptiveAccumulation(rule=Fixed(2), weight=lambda batch: 10.0 * len(batch[0]))
    trainer(tmp_path, accumulation, max_epochs=1).fit(Net(), loader(x))
    assert accumulation.controller.history.to_pandas()["global_batch"].tolist() == [80, 40]

    class Nested(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch["deep"][1], batch_idx)  # type: ignore[return-value]

    cells = [{"name": "a", "deep": (torch.tensor(1.0), (part, torch.arange(len(part))))} for part in x.split(5)]
    accumulation = AdaptiveAccumulation(rule=Fixed(2))
    trainer(tmp_path, accumulation, max_epochs=1).fit(Nested(), DataLoader(cells, batch_size=None))
    assert accumulation.controller.history.to_pandas()["global_batch"].tolist() == [10, 2]

    with pytest.raises(ValueError, match="weight must be given"):
        trainer(tmp_path, AdaptiveAccumulation()).fit(Net(), DataLoader([["a"], ["b"]], batch_size=None))


# --- checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_goes_on_as_the_whole_one(tmp_path: Path) -> None:
    x, rule, limits = examples(256), RelativeStandardError(theta=0.3), Limits(max_steps=16)
    whole, module = AdaptiveAccumulation(rule=rule, limits=limits), Net()
    trainer(tmp_path / "whole", whole, max_epochs=4).fit(module, loader(x))
    first = AdaptiveAccumulation(rule=rule, limits=limits)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="half")
    trainer(tmp_path, saver, first, max_epochs=2).fit(Net(), loader(x))
    second, resumed = AdaptiveAccumulation(rule=rule, limits=limits), Net()
    fit = trainer(tmp_path, second, max_epochs=4)
    fit.fit(resumed, loader(x), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    steps = [a.controller.history.to_pandas()["accumulation_steps"].tolist() for a in (whole, first, second)]
    assert steps[1] + steps[2] == steps[0]
    assert len(set(steps[2])) > 1 or steps[2][0] != steps[1][0]
    assert fit.global_step == len(steps[0])
    assert_same(resumed.net, module.net)


class Resumable(DataLoader):  # type: ignore[type-arg]
    """As torchdata's StatefulDataLoader: goes on behind the batch it stood at."""

    at = 0

    def __iter__(self) -> Any:
        start, self.at = self.at % len(self), 0
        for index, batch in enumerate(super().__iter__()):
            if index >= start:
                self.at = index + 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class SaveAt(L.Callback):
    def __init__(self, batch_idx: int, path: Path) -> None:
        self.batch_idx, self.path = batch_idx, path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("first", [True, False], ids=["saver first", "saver last"])
@pytest.mark.parametrize("batch_idx", [1, 2, 3, 5, 10])
def test_a_checkpoint_within_an_epoch_keeps_an_open_windows_gradients(
    tmp_path: Path, batch_idx: int, first: bool
) -> None:
    x, rule = examples(), Replay([2, 3, 1, 4])
    stateful = Resumable(TensorDataset(x, torch.arange(len(x))), batch_size=4)
    whole, module = AdaptiveAccumulation(rule=rule), Net()
    pair = whole, SaveAt(batch_idx, tmp_path / "mid.ckpt")
    fit = trainer(tmp_path, *(reversed(pair) if first else pair))
    fit.fit(module, stateful)
    stateful = Resumable(TensorDataset(x, torch.arange(len(x))), batch_size=4)
    second, resumed = AdaptiveAccumulation(rule=rule), Net()
    again = trainer(tmp_path, second)
    again.fit(resumed, stateful, ckpt_path=tmp_path / "mid.ckpt")
    assert resumed.rows == module.rows[min(4 * (batch_idx + 1), len(x)) :]
    assert again.global_step == fit.global_step
    assert_same(resumed.net, module.net)


def test_a_checkpoint_before_the_record_is_refused(tmp_path: Path) -> None:
    class SaveEarly(L.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            trainer.save_checkpoint(tmp_path / "early.ckpt")

    saver = SaveEarly()
    with pytest.raises(RuntimeError, match="too late in a due window"):
        trainer(tmp_path, saver, AdaptiveAccumulation(rule=Fixed(2))).fit(Net(), loader(examples()))


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    accumulation, module = AdaptiveAccumulation(rule=Replay([2, 3, 1, 4])), Net()
    fit = trainer(tmp_path, accumulation, max_epochs=1)
    fit.fit(module, loader(examples()))
    first = accumulation.controller
    fit.fit_loop.max_epochs = 2
    fit.fit(module, loader(examples()))
    assert accumulation.controller is not first
    rows = [c.history.to_pandas()["accumulation_steps"].tolist() for c in (first, accumulation.controller)]
    assert rows == [[2, 3, 1, 4, 1], [4, 4, 3]]


def test_state_before_a_fit() -> None:
    accumulation = AdaptiveAccumulation()
    assert accumulation.state_dict() == {}
    accumulation.load_state_dict({})
    with pytest.raises(RuntimeError, match="no fit has started"):
        accumulation.on_after_backward(None, None)


# --- precision --------------------------------------------------------------------------------------------------


def test_bfloat16_runs(tmp_path: Path) -> None:
    accumulation = AdaptiveAccumulation(rule=Replay([2, 3, 1, 4]))
    fit = trainer(tmp_path, accumulation, precision="bf16-mixed")
    fit.fit(Net(torch.float32), loader(examples(dtype=torch.float32)))
    assert accumulation.controller.history.to_pandas()["accumulation_steps"].tolist() == [2, 3, 1, 4, 1, 4, 4, 3]


def test_loss_scaling_changes_neither_parameters_nor_numbers(tmp_path: Path) -> None:
    # float16 parameters are of no use here: the scaler alone, on float32 and without autocast.
    x, rows, nets = examples(dtype=torch.float32), [], []
    for scaled in (False, True):
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
        plugin.autocast_context_manager = lambda: torch.autocast("cpu", enabled=False)  # type: ignore[method-assign]
        accumulation, module = AdaptiveAccumulation(rule=Replay([2, 3, 1, 4]), consecutive=True), Net(torch.float32)
        options = {"plugins": [plugin]} if scaled else {}
        trainer(tmp_path, accumulation, gradient_clip_val=0.5, **options).fit(module, loader(x))
        rows.append(accumulation.controller.history.to_pandas().drop(columns="wall_seconds"))
        nets.append(module.net)
    assert_same(*nets, rtol=1e-4)
    for name in ("loss", "grad_sq_norm", "noise_trace", "consecutive_product"):
        torch.testing.assert_close(
            torch.tensor(rows[1][name]), torch.tensor(rows[0][name]), rtol=1e-3, atol=1e-4, equal_nan=True
        )


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_leaves_out_is_recorded_as_skipped(tmp_path: Path, fused: bool) -> None:
    class Once(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 3 else loss  # type: ignore[operator,return-value]

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=self.lr, fused=fused)

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
    accumulation, module = AdaptiveAccumulation(rule=Fixed(2)), Once(torch.float32)
    trainer(tmp_path, accumulation, max_epochs=1, plugins=[plugin]).fit(
        module, loader(examples(32, dtype=torch.float32))
    )
    assert accumulation.controller.history.to_pandas()["skipped"].tolist() == [False, True, False, False]
    assert all(p.isfinite().all() for p in module.parameters())


def test_a_step_that_the_module_leaves_out_is_recorded_as_skipped(tmp_path: Path) -> None:
    class Cautious(Net):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
            closure() if batch_idx == 3 else optimizer.step(closure=closure)

    accumulation, module = AdaptiveAccumulation(rule=Fixed(2)), Cautious()
    trainer(tmp_path, accumulation, max_epochs=1).fit(module, loader(examples(32)))
    assert accumulation.controller.history.to_pandas()["skipped"].tolist() == [False, True, False, False]


# --- what training steps and stops may do ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("dropped", [[0], [1], [0, 1], [10], [2, 3, 4]])
def test_a_training_step_that_returns_none_is_left_out_of_its_window(tmp_path: Path, dropped: list[int]) -> None:
    class Dropping(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx in dropped else loss

    x, module = examples(), Dropping()
    accumulation = AdaptiveAccumulation(rule=Fixed(2))
    trainer(tmp_path, accumulation, max_epochs=1).fit(module, loader(x))
    rows = accumulation.controller.history.to_pandas()
    assert rows["global_batch"].sum() == sum(len(c) for i, c in enumerate(x.split(4)) if i not in dropped)
    assert rows["accumulation_steps"].max() == 2
    cells, expected = [c for i, c in enumerate(x.split(4)) if i not in dropped], []
    for k in rows["accumulation_steps"]:
        expected.append(cells[:k])
        cells = cells[k:]
    twin = Net()
    hand_written_loop(twin.net, torch.optim.Adam(twin.net.parameters(), lr=0.05), mean_loss, expected)
    assert_same(module.net, twin.net)


def test_an_epoch_stopped_within_a_window_drops_it_and_says_so(tmp_path: Path) -> None:
    class Stopping(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    module, twin = Stopping(), Net()
    with pytest.warns(UserWarning, match="1 of 2 micro-batches are dropped"):
        trainer(tmp_path, AdaptiveAccumulation(rule=Fixed(2))).fit(module, loader(examples()))
    expected = 2 * [list(examples().split(4))[:2]]
    hand_written_loop(twin.net, torch.optim.Adam(twin.net.parameters(), lr=0.05), mean_loss, expected)
    assert_same(module.net, twin.net)


@pytest.mark.filterwarnings("ignore:`.fit\\(ckpt_path=None\\)` was called without a model")
@pytest.mark.filterwarnings('ignore:.fit\\(ckpt_path="last"\\) is set, but there is no last checkpoint')
@pytest.mark.parametrize("where", ["training_step", "backward"])
def test_an_error_leaves_no_hooks_and_a_state_of_the_last_step(tmp_path: Path, where: str) -> None:
    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 3 and where == "training_step":
                raise ArithmeticError("a bug")
            return loss  # type: ignore[return-value]

        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx == 3 and where == "backward":
                raise ArithmeticError("a bug")
            super().backward(loss, *args, **kwargs)

    accumulation = AdaptiveAccumulation(rule=Fixed(3))
    saver = OnExceptionCheckpoint(tmp_path, "failed")
    fit = trainer(tmp_path, accumulation, saver, enable_checkpointing=True)
    with pytest.raises(ArithmeticError, match="a bug"):
        fit.fit(Failing(), loader(examples()))
    assert fit.accumulate_grad_batches == 1
    assert not fit.optimizers[0]._optimizer_step_post_hooks
    kept = torch.load(tmp_path / "failed.ckpt", weights_only=True)["callbacks"]["AdaptiveAccumulation"]
    assert kept["controller"]["optimizer_step"] == 1
    assert kept["controller"]["window"] is None


# --- refusals ---------------------------------------------------------------------------------------------------


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Two(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]


class Quasi(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


class Drawing(Net):
    def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(next(dataloader_iter)[0], 0)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
@pytest.mark.parametrize(
    ("module", "beside", "options", "message"),
    [
        (Manual, [], {}, "automatic optimization"),
        (Two, [], {}, "automatic optimization"),
        (Quasi, [], {}, "LBFGS"),
        (Drawing, [], {}, "dataloader_iter"),
        (Net, [], {"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        (Net, [GradientAccumulationScheduler({0: 1})], {}, "GradientAccumulationScheduler"),
        (Net, [StochasticWeightAveraging(0.1)], {}, "StochasticWeightAveraging"),
    ],
)
def test_what_else_decides_when_to_step_is_refused_by_name(
    tmp_path: Path, module: Any, beside: list[Any], options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, AdaptiveAccumulation(), *beside, **options).fit(module(), loader(examples()))


def test_several_optimizers_and_deepspeed_are_refused_by_name(tmp_path: Path) -> None:
    accumulation, module = AdaptiveAccumulation(), Net()
    fit = trainer(tmp_path, accumulation)
    fit.strategy._optimizers = 2 * [torch.optim.SGD(module.parameters(), lr=0.1)]
    with pytest.raises(ValueError, match="one optimizer, got 2"):
        accumulation.on_fit_start(fit, module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(fit.strategy), "handles_gradient_accumulation", property(lambda _: True))
        with pytest.raises(ValueError, match="DeepSpeed"):
            accumulation.on_fit_start(fit, module)


def test_a_second_callback_of_its_kind_is_refused_by_name(tmp_path: Path) -> None:
    accumulation = AdaptiveAccumulation()
    fit = trainer(tmp_path, accumulation)
    fit.callbacks.append(AdaptiveAccumulation())
    with pytest.raises(ValueError, match="must be there once, got 2 of them"):
        accumulation.on_fit_start(fit, Net())


# --- several ranks ----------------------------------------------------------------------------------------------


class Sharded(Net):
    """Rank ``r`` of two takes every second example; rows of the history come back in a buffer."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.register_buffer("sizes", torch.zeros(6))

    def train_dataloader(self) -> Any:
        return loader(self.x[self.trainer.global_rank :: 2], 3)

    def on_train_end(self) -> None:
        (accumulation,) = (c for c in self.trainer.callbacks if isinstance(c, AdaptiveAccumulation))
        self.sizes += torch.tensor(accumulation.controller.history.to_pandas()["global_batch"].to_numpy())


def test_two_ranks_step_on_the_mean_over_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    x, steps = examples(48), [2, 3, 1, 4]
    module, twin = Sharded(x), Net()
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False}
    trainer(tmp_path, AdaptiveAccumulation(rule=Replay(steps)), **options).fit(module)
    ranks = [windows(x[rank::2], steps, epochs=2, size=3) for rank in (0, 1)]
    expected = [own + other for own, other in zip(*ranks, strict=True)]
    hand_written_loop(twin.net, torch.optim.Adam(twin.net.parameters(), lr=0.05), mean_loss, expected)
    assert_same(module.net, twin.net)
    assert module.sizes.tolist() == [sum(map(len, window)) for window in expected]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("skips", [True, False])
def test_a_window_that_is_not_finite_moves_nothing(tmp_path: Path, skips: bool, clip: float | None) -> None:
    """Two of ten micro-batches are poisoned: the twin is trained on the windows without them."""
    x = examples(40)
    x[9] = float("nan")
    module, twin = Net(), Net()
    accumulation = AdaptiveAccumulation(rule=Fixed(2), skip_nonfinite=skips)
    trainer(tmp_path, accumulation, max_epochs=1, gradient_clip_val=clip).fit(module, loader(x))
    table = accumulation.controller.history.to_pandas()  # type: ignore[union-attr]
    assert table["reason"].eq("nonfinite").tolist() == [False, True] + [not skips] * 3
    assert table["skipped"].tolist() == [False, skips, False, False, False]
    if not skips:
        assert not any(p.isfinite().all() for p in module.parameters())
        return
    good = [cells for index, cells in enumerate(windows(x, [2], epochs=1)) if index != 1]
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.05)
    for cells in good:
        optimizer.zero_grad()
        mean_loss(twin.net, torch.cat(cells)).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), clip)
        optimizer.step()
    assert_same(module.net, twin.net)


@pytest.mark.parametrize("first", [True, False])
def test_other_callbacks_see_the_loss_as_it_was_returned(tmp_path: Path, first: bool) -> None:
    class Reader(L.Callback):
        losses: list[float] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.losses.append(float(outputs["loss"]))

    reader, module = Reader(), Net()
    reader.losses = []
    accumulation = AdaptiveAccumulation(rule=Replay([2, 3, 1, 4]))
    pair = (reader, accumulation) if first else (accumulation, reader)
    trainer(tmp_path, *pair, max_epochs=1).fit(module, loader(examples()))
    assert reader.losses == pytest.approx(module.returned, rel=1e-12)


@pytest.mark.parametrize("told", [True, False])
def test_a_schedule_that_was_planned_in_batches_is_told(tmp_path: Path, told: bool) -> None:
    class Planned(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            steps = int(self.trainer.estimated_stepping_batches) if told else 5
            scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    fit = trainer(tmp_path, AdaptiveAccumulation(rule=Fixed(4)), max_epochs=1)
    if told:
        with pytest.warns(UserWarning, match=r"OneCycleLR was planned for 11 steps, one a batch"):
            fit.fit(Planned(), loader(examples()))
    else:
        fit.fit(Planned(), loader(examples()))
