"""controller.py: exact for every window, silent, resumable; every refusal by name."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptbatch as ab
from adaptbatch.records import Progress
from adaptbatch.reporting.history import COLUMNS
from adaptbatch.schema import saved
from adaptbatch.state import State
from tests import reference
from tests.test_probe import Checkpointed, TiedLanguageModel


def small_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 0.5).square().sum(dim=-1).mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def batches(sizes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, generator=generator, dtype=dtype) for size in sizes]


def run(
    controller: ab.BatchController, data: Sequence[Tensor], loss: Callable[[nn.Module, Tensor], Tensor] = squared
) -> list[ab.records.Decision]:
    decisions = []
    for x in controller.micro_batches(data):
        controller.backward(loss(controller.model, x), weight=len(x))
        if controller.step_due:
            decisions.append(controller.step())
    return decisions


def equal_state(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def split(data: Sequence[Tensor], steps: Sequence[int]) -> list[list[Tensor]]:
    """The windows that ``steps`` cut ``data`` into; the last entry holds, the last window may be partial."""
    windows, left = [], list(data)
    while left:
        k = steps[min(len(windows), len(steps) - 1)]
        windows.append(left[:k])
        left = left[k:]
    return windows


class TestExactness:
    @settings(max_examples=40)
    @given(
        sizes=st.lists(st.integers(1, 9), min_size=1, max_size=14),
        steps=st.lists(st.integers(1, 5), min_size=1, max_size=6),
        optimizer=st.sampled_from([sgd, adamw]),
    )
    def test_any_windows_equal_single_large_batches(self, sizes, steps, optimizer):
        """Grown, shrunk, partial last windows and unequal micro-batches: each step is the mean over its examples."""
        data, ours, twin = batches(sizes), small_model(), small_model()
        with ab.BatchController(ours, optimizer(ours), rule=ab.rules.Replay(steps)) as controller:
            run(controller, data)
        windows = split(data, steps)
        reference.hand_written_loop(twin, optimizer(twin), squared, windows)
        for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [len(w) for w in windows]
        assert controller.history.to_pandas()["global_batch"].tolist() == [sum(map(len, w)) for w in windows]

    def test_a_loss_of_one_element_with_a_dimension(self):
        ours, twin, data = small_model(), small_model(), batches([4, 3])
        run(ab.BatchController(ours, sgd(ours), rule=ab.Fixed(2)), data, lambda m, x: squared(m, x).reshape(1))
        run(ab.BatchController(twin, sgd(twin), rule=ab.Fixed(2)), data)
        assert equal_state(ours, twin)

    def test_token_weights_equal_one_mean_over_all_tokens(self):
        """Micro-batches whose losses are means over different numbers of tokens."""
        torch.manual_seed(0)
        ours = TiedLanguageModel().double()
        twin = copy.deepcopy(ours)
        sequences = [torch.randint(7, (length,)) for length in (3, 11, 1, 6)]

        def loss(model: nn.Module, tokens: Tensor) -> Tensor:
            return (
                nn.functional.cross_entropy(model(tokens[:-1]), tokens[1:])
                if len(tokens) > 1
                else 0 * model(tokens).sum()
            )

        sequences = [tokens for tokens in sequences if len(tokens) > 1]
        with ab.BatchController(ours, sgd(ours), rule=ab.Fixed(len(sequences))) as controller:
            for tokens in controller.micro_batches(sequences):
                controller.backward(loss(ours, tokens), weight=len(tokens) - 1)
                if controller.step_due:
                    controller.step()
        optimizer = sgd(twin)
        logits = torch.cat([twin(tokens[:-1]) for tokens in sequences])
        nn.functional.cross_entropy(logits, torch.cat([tokens[1:] for tokens in sequences])).backward()
        optimizer.step()
        torch.testing.assert_close(ours.embedding.weight, twin.embedding.weight, rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("optimizer", [sgd, adamw])
    def test_one_step_windows_are_the_plain_loop_bit_for_bit(self, optimizer):
        data = batches([5, 3, 8, 1, 7], dtype=torch.float32)
        ours, twin = small_model(dtype=torch.float32), small_model(dtype=torch.float32)
        ours_optimizer, twin_optimizer = optimizer(ours), optimizer(twin)
        with ab.BatchController(ours, ours_optimizer, rule=ab.Fixed(1)) as controller:
            run(controller, data)
        reference.hand_written_loop(twin, twin_optimizer, squared, [[x] for x in data])
        assert equal_state(ours, twin)
        for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
            for name, value in twin_optimizer.state[q].items():
                assert torch.equal(torch.as_tensor(ours_optimizer.state[p][name]), torch.as_tensor(value))

    @pytest.mark.parametrize("k", [2, 3, 5])
    def test_equal_micro_batches_are_the_usual_accumulation_loop_bit_for_bit(self, k):
        data = batches([7] * (3 * k), dtype=torch.float32)
        ours, twin = small_model(dtype=torch.float32), small_model(dtype=torch.float32)
        with ab.BatchController(ours, adamw(ours), rule=ab.Fixed(k)) as controller:
            run(controller, data)
        optimizer = adamw(twin)
        for index, x in enumerate(data, start=1):
            (squared(twin, x) / k).backward()
            if index % k == 0:
                optimizer.step()
                optimizer.zero_grad()
        assert equal_state(ours, twin)

    @pytest.mark.parametrize(
        "model",
        [Checkpointed(False, False), Checkpointed(False, True), Checkpointed(True, False)],
        ids=["checkpoint", "checkpoint shared", "reentrant"],
    )
    def test_with_activation_checkpointing(self, model):
        ours, twin = copy.deepcopy(model).double(), copy.deepcopy(model).double()
        data = [x.requires_grad_() for x in batches([3, 5, 2])]

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            return model(x).square().sum(dim=-1).mean()

        with ab.BatchController(ours, sgd(ours), rule=ab.Fixed(3)) as controller:
            run(controller, data, loss)
        reference.hand_written_loop(twin, sgd(twin), loss, [data])
        for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)

    def test_with_sparse_frozen_and_unused_parameters(self):
        torch.manual_seed(0)
        ours = TiedLanguageModel(sparse=True).double()
        ours.frozen, ours.unused = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
        twin = copy.deepcopy(ours)
        data = [torch.tensor([1, 2, 2]), torch.tensor([2, 5])]

        def loss(model: nn.Module, tokens: Tensor) -> Tensor:
            return model(tokens).square().sum(dim=-1).mean()

        with ab.BatchController(ours, torch.optim.SGD(ours.parameters(), lr=0.1), rule=ab.Fixed(2)) as controller:
            run(controller, data, loss)
        reference.hand_written_loop(twin, torch.optim.SGD(twin.parameters(), lr=0.1), loss, [data])
        for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        assert controller.history.to_pandas()["noise_trace"].iloc[0] > 0

    def test_two_forwards_and_one_backward(self):
        ours, twin = small_model(), small_model()
        data = batches([4, 6])

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            return squared(model, x) + squared(model, 2 * x)

        with ab.BatchController(ours, sgd(ours), rule=ab.Fixed(2)) as controller:
            run(controller, data, loss)
        reference.hand_written_loop(twin, sgd(twin), loss, [data])
        for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)

    def test_a_due_window_is_clipped_as_in_any_loop(self):
        ours, twin = small_model(), small_model()
        data = batches([4, 2, 6])
        controller = ab.BatchController(ours, sgd(ours), rule=ab.Fixed(3))
        for x in data:
            controller.backward(squared(ours, x), weight=len(x))
        norm = controller.grad_norm
        assert float(nn.utils.clip_grad_norm_(ours.parameters(), 0.01)) == pytest.approx(float(norm), rel=1e-9)
        controller.step()
        optimizer = sgd(twin)
        squared(twin, torch.cat(data)).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.01)
        optimizer.step()
        for p, q in zip(ours.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


class TestMeasurement:
    @pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [9, 4, 2], [1, 1]], ids=str)
    def test_rows_equal_the_analysis_of_variance_of_the_cells(self, sizes):
        model, data = small_model(), batches(sizes)
        parameters = list(model.parameters())
        cells = []
        for x in data:
            gradients = torch.autograd.grad(squared(model, x), parameters)
            cells.append((float(len(x)), torch.cat([g.reshape(-1) for g in gradients]).numpy()))
        trace, signal = reference.anova(cells, population=100)
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(len(sizes)), population=100)
        run(controller, data)
        row = controller.history.to_pandas().iloc[0]
        assert row["noise_trace"] == pytest.approx(trace, rel=1e-5)
        assert row["grad_sq_norm"] == pytest.approx(signal, rel=1e-5)
        assert row["loss"] == pytest.approx(squared(small_model(), torch.cat(data)).item(), rel=1e-12)
        assert row["noise_scale"] == pytest.approx(max(trace, 0) / signal if signal > 0 else math.inf, rel=1e-4)

    def test_finds_the_batch_of_a_known_noise_scale(self):
        """Loss |w - x|^2 / 2 with a still w: G = w - mean(x), tr(Sigma) = 1, so that B = 1 / |G|^2 = 100."""
        generator = torch.Generator().manual_seed(6)

        class Point(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(torch.full((25,), 0.02))

        model = Point()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with ab.BatchController(model, optimizer, rule=ab.RelativeStandardError(memory=4000.0)) as controller:
            for _ in range(600):
                while not controller.step_due:
                    x = torch.randn(8, 25, generator=generator) / 5
                    controller.backward((model.w - x).square().sum(dim=1).mean() / 2, weight=8)
                controller.step()
        table = controller.history.to_pandas()
        last = table.iloc[-1]
        assert last["noise_scale_low"] < 100 < last["noise_scale_high"]
        assert 70 < last["global_batch"] < 140
        assert set(table["reason"]) <= {"undecided", "grow", "growth_limited", "hold", "shrink", "signal_lost"}
        assert table["accumulation_steps"].iloc[0] == 2

    def test_one_micro_batch_holds_no_evidence(self):
        model = small_model()
        with ab.BatchController(model, sgd(model), rule=ab.Fixed(1)) as controller:
            run(controller, batches([4, 4]))
        table = controller.history.to_pandas()
        columns = [
            "grad_sq_norm",
            "noise_trace",
            "noise_scale",
            "noise_scale_low",
            "noise_scale_high",
            "relative_error",
        ]
        assert table[columns].isna().all(axis=None)
        assert table["loss"].notna().all()

    def test_history_is_the_documented_table(self, tmp_path):
        model = small_model()
        with ab.BatchController(model, sgd(model), rule=ab.Fixed(2)) as controller:
            run(controller, batches([4, 4, 4]))
            run(controller, batches([5, 5]))
        table = controller.history.to_pandas()
        assert list(table.columns) == list(COLUMNS)
        assert {name: str(kind) for name, kind in table.dtypes.items()} == COLUMNS
        assert table["optimizer_step"].tolist() == [1, 2, 3]
        assert table["examples_seen"].tolist() == [8, 12, 22]
        assert table["backward_passes"].tolist() == [2, 3, 5]
        assert table["accumulation_steps"].tolist() == [2, 1, 2]
        assert (table["wall_seconds"].diff().dropna() > 0).all()
        assert table["lr"].eq(0.05).all()
        controller.history.to_parquet(tmp_path / "history.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "history.parquet"), table)
        assert repr(controller.history) == "History(3 windows)"

    def test_a_partial_window_does_not_set_the_size_of_a_micro_batch(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        decisions = run(controller, batches([8, 8, 1]))
        assert [decision.target_batch for decision in decisions] == [16.0, 16.0]

    def test_a_tensor_learning_rate_is_recorded(self):
        model = small_model()
        optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.125), capturable=False, foreach=False)
        controller = ab.BatchController(model, optimizer, rule=ab.Fixed(2))
        run(controller, batches([3, 3]))
        assert controller.history.to_pandas()["lr"].tolist() == [0.125]


class TestNonfinite:
    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_a_nonfinite_window_is_skipped(self, poison):
        model = small_model()
        optimizer = adamw(model)
        controller = ab.BatchController(model, optimizer, rule=ab.RelativeStandardError())
        data = batches([4] * 6)
        run(controller, data[:2])
        parameters, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        evidence = controller.history.to_pandas()["noise_scale"].iloc[-1]
        bad = data[2].clone()
        bad[0, 0] = poison
        (decision,) = run(controller, [bad, data[3]])
        assert decision.reason == "nonfinite"
        assert all(torch.equal(parameters[name], value) for name, value in model.state_dict().items())
        assert str(optimizer.state_dict()) == str(state)
        row = controller.history.to_pandas().iloc[-1]
        assert bool(row["skipped"])
        assert row["optimizer_step"] == 1
        assert row["examples_seen"] == 16
        assert math.isnan(row["noise_trace"])
        assert row["noise_scale"] == evidence
        run(controller, data[4:])
        after = controller.history.to_pandas().iloc[-1]
        assert after["optimizer_step"] == 2
        assert not after["skipped"]
        assert all(p.isfinite().all() for p in model.parameters())

    def test_it_is_taken_when_told_so(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), skip_nonfinite=False)
        data = batches([4, 4])
        data[0][0, 0] = math.nan
        (decision,) = run(controller, data)
        assert decision.reason == "nonfinite"
        assert not controller.history.to_pandas()["skipped"].iloc[0]
        assert not all(p.isfinite().all() for p in model.parameters())

    def test_a_finite_gradient_whose_norm_overflows_is_taken(self):
        """A float32 norm above 1.8e19 is infinite though the gradient is not: the plain loop would step, so we do."""
        weight = nn.Parameter(torch.zeros(2))
        model = nn.ParameterList([weight])
        controller = ab.BatchController(model, torch.optim.SGD([weight], lr=1e-20), rule=ab.Fixed(2))
        for _ in range(2):
            controller.backward((weight * 1e20).sum(), weight=1)
        assert controller.step().reason == "nonfinite"
        assert weight.tolist() == pytest.approx([-1.0, -1.0])
        assert not controller.history.to_pandas()["skipped"].iloc[0]


@dataclass(frozen=True)
class LastDigits:
    """A user's own rule: the size hangs on the last digits of the evidence, so that one lost bit would show."""

    closed_loop = True
    memory = 100.0

    def decide(
        self, evidence: ab.records.Evidence, progress: ab.records.Progress, limits: ab.Limits
    ) -> ab.records.Decision:
        if math.isnan(evidence.pooled.noise_trace):
            return ab.records.Decision(2, math.nan, "undecided")
        return ab.records.Decision(2 + int(1e12 * evidence.pooled.noise_trace) % 4, math.nan, "hold")


def adaptive(model: nn.Module) -> tuple[ab.BatchController, torch.optim.Optimizer]:
    optimizer = adamw(model)
    return ab.BatchController(model, optimizer, rule=LastDigits()), optimizer


def without_times(state: dict) -> dict:
    return state | {"wall_seconds": 0, "loop": state["loop"] | {"seconds": []}}


class TestState:
    def test_resumes_to_the_last_bit(self):
        data = batches([4, 3, 5] * 60, dtype=torch.float32)
        whole = small_model(dtype=torch.float32)
        controller, _ = adaptive(whole)
        windows = 0
        for index, x in enumerate(data):
            controller.backward(squared(whole, x), weight=len(x))
            if controller.step_due:
                controller.step()
                windows += 1
                if windows == 20:
                    half = small_model(seed=1, dtype=torch.float32)
                    other, other_optimizer = adaptive(half)
                    saved = io.BytesIO()
                    torch.save([whole.state_dict(), controller.optimizer.state_dict(), controller.state_dict()], saved)
                    rest = data[index + 1 :]
        saved.seek(0)
        model_state, optimizer_state, controller_state = torch.load(saved)
        half.load_state_dict(model_state)
        other_optimizer.load_state_dict(optimizer_state)
        other.load_state_dict(controller_state)
        for x in rest:
            other.backward(squared(half, x), weight=len(x))
            if other.step_due:
                other.step()
        assert equal_state(whole, half)
        expected = controller.history.to_pandas().iloc[20:].drop(columns="wall_seconds").reset_index(drop=True)
        assert expected["accumulation_steps"].nunique() > 2
        pd.testing.assert_frame_equal(
            other.history.to_pandas().drop(columns="wall_seconds"), expected, check_exact=True
        )
        controller.discard_window()
        other.discard_window()
        # By their texts: NaN stands where nothing is coupled.
        assert repr(without_times(other.state_dict())) == repr(without_times(controller.state_dict()))

    def test_time_goes_on_after_a_load(self):
        model = small_model()
        first, second = ab.BatchController(model, sgd(model)), ab.BatchController(model, sgd(model))
        state = first.state_dict() | {"wall_seconds": 1000.0}
        second.load_state_dict(state)
        run(second, batches([4, 4]))
        assert second.history.to_pandas()["wall_seconds"].iloc[0] >= 1000.0

    @settings(max_examples=30)
    @given(
        stop=st.integers(0, 40),
        options=st.sampled_from(
            [
                {"rule": LastDigits()},
                {"rule": ab.rules.InnerProductTest()},
                {"rule": LastDigits(), "phase": True},
                {"rule": LastDigits(), "metric": "adam"},
                {"rule": ab.rules.Replay([1, 3, 2, 5]), "ghost": True},
                {"rule": LastDigits(), "scaler": True},
            ]
        ),
        optimizer_first=st.booleans(),
    )
    def test_resumes_after_any_micro_batch_to_the_last_bit(self, stop, options, optimizer_first):
        """Through torch.save and the default torch.load, also within a window, loaded in either order."""
        data = batches([4, 3, 5] * 16, dtype=torch.float32)

        def fresh(seed: int) -> tuple[ab.BatchController, torch.amp.GradScaler | None]:
            model = small_model(seed, dtype=torch.float32)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.5))
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if "scaler" in options else None
            return ab.BatchController(model, optimizer, **(options | {"scaler": scaler})), scaler

        def go_on(controller: ab.BatchController, data: Sequence[Tensor]) -> None:
            for x in data:
                controller.backward(squared(controller.model, x), weight=len(x))
                if controller.step_due:
                    controller.step()

        (whole, scaler), (half, other_scaler) = fresh(0), fresh(1)
        go_on(whole, data[:stop])
        saved = io.BytesIO()
        state = [whole.model.state_dict(), whole.optimizer.state_dict(), whole.state_dict()]
        torch.save([*state, scaler.state_dict() if scaler else None], saved)
        done = len(whole.history)
        go_on(whole, data[stop:])
        saved.seek(0)
        model, optimizer, controller, scale = torch.load(saved)
        half.model.load_state_dict(model)
        loads = [lambda: half.optimizer.load_state_dict(optimizer), lambda: half.load_state_dict(controller)]
        for load in loads if optimizer_first else loads[::-1]:
            load()
        if other_scaler:
            other_scaler.load_state_dict(scale)
        go_on(half, data[stop:])
        assert equal_state(whole.model, half.model)
        for p, q in zip(whole.model.parameters(), half.model.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            assert p.grad is None or torch.equal(p.grad, q.grad)
        expected = whole.history.to_pandas().iloc[done:].drop(columns="wall_seconds").reset_index(drop=True)
        # The first micro-batch that ghost norms hear is rebuilt and checked: another order of the same sums.
        exact = {"rtol": 1e-5} if "ghost" in options else {"check_exact": True}
        pd.testing.assert_frame_equal(half.history.to_pandas().drop(columns="wall_seconds"), expected, **exact)

    def test_a_saved_window_is_a_copy(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(3))
        data = batches([4, 4, 4])
        controller.backward(squared(model, data[0]), weight=4)
        state = controller.state_dict()
        before = copy.deepcopy(state["sensor"]["gradients"])
        controller.backward(squared(model, data[1]), weight=4)
        assert all(torch.equal(a, b) for a, b in zip(state["sensor"]["gradients"], before, strict=True))

    def test_refuses_to_load_within_a_window(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(3))
        state = controller.state_dict()
        controller.backward(squared(model, batches([4])[0]), weight=4)
        with pytest.raises(RuntimeError, match=r"load_state_dict\(\) is for between windows, got one with 1 of 3"):
            controller.load_state_dict(state)

    def test_the_end_of_the_data_is_known_where_it_is_told_of_a_due_window(self):
        """A short last micro-batch in a full window says nothing of what a micro-batch weighs."""
        model = small_model()
        c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        for index, x in enumerate(batches([4, 4, 4, 1]), start=1):
            c.backward(squared(model, x), weight=len(x))
            if index == 4:
                c.close_window()
            if c.step_due:
                c.step()
        assert c._state.progress.micro_batch_examples == 4.0
        assert c._state.unequal == 0

    @pytest.mark.parametrize("phase", [False, True])
    @pytest.mark.parametrize("clips", [False, True])
    def test_a_due_window_goes_on_to_the_last_bit(self, phase, clips):
        data, outcomes = batches([4, 4, 4, 4]), []
        for resumes in (False, True):
            model = small_model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            c = ab.BatchController(model, optimizer, rule=ab.Fixed(2), phase=phase)
            for x in data:
                c.backward(squared(model, x), weight=4)
                if c.step_due and resumes:
                    states = copy.deepcopy([model.state_dict(), optimizer.state_dict(), c.state_dict()])
                    c.discard_window()
                    model = small_model(1)
                    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
                    c = ab.BatchController(model, optimizer, rule=ab.Fixed(2), phase=phase)
                    c.load_state_dict(states[2])
                    model.load_state_dict(states[0])
                    optimizer.load_state_dict(states[1])
                if c.step_due:
                    if clips:
                        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
                    c.step()
            outcomes.append((*model.parameters(), c._state.pooled, c.history.to_pandas().iloc[-1]))
        *plain, pooled, row = outcomes[0]
        *resumed, pooled_again, row_again = outcomes[1]
        assert all(torch.equal(p, q) for p, q in zip(plain, resumed, strict=True))
        assert pooled == pooled_again
        for name in ("batch_grad_norm", "applied_grad_norm", "consecutive_product", "loss"):
            assert row[name] == row_again[name] or (math.isnan(row[name]) and math.isnan(row_again[name]))

    def test_refuses_to_save_a_due_window_with_a_scaler(self):
        model = small_model(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu")
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(1), scaler=scaler)
        controller.backward(squared(model, batches([4], dtype=torch.float32)[0]), weight=4)
        with pytest.raises(RuntimeError, match=r"state_dict\(\) is too late in a due window whose loss scale"):
            controller.state_dict()

    def test_refuses_a_window_of_another_model(self):
        model, other = small_model(), nn.Linear(4, 3).double()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(3))
        controller.backward(squared(model, batches([4])[0]), weight=4)
        stranger = ab.BatchController(other, sgd(other), rule=ab.Fixed(3))
        with pytest.raises(ValueError, match=r"state\['sensor'\]\['gradients'\] must be of the 2 parameters that are"):
            stranger.load_state_dict(controller.state_dict())
        stranger.backward(squared(other, batches([4])[0]), weight=4)

    def test_a_window_whose_parameters_are_frozen_after_the_load_keeps_their_part(self):
        """What was accumulated for them is part of the mean, in whichever order model and controller are changed."""
        steps = []
        for frozen in (False, True):
            model = small_model()
            first, other = (ab.BatchController(model, sgd(model), rule=ab.Fixed(2)) for _ in range(2))
            first.backward(squared(model, batches([4])[0]), weight=4)
            state = first.state_dict()
            first.discard_window()
            model[0].requires_grad_(not frozen)
            other.load_state_dict(state)
            other.close_window()
            other.step()
            steps.append([p.detach().clone() for p in model.parameters()])
        assert all(torch.equal(p, q) for p, q in zip(*steps, strict=True))

    def test_a_saved_state_loads_twice(self):
        """What a rule keeps of the window is copied: going on does not change the state."""
        model, data = small_model(), batches([4] * 3)
        controller = ab.BatchController(model, sgd(model), rule=ab.rules.InnerProductTest())
        controller.backward(squared(model, data[0]), weight=4)
        state, tables = controller.state_dict(), []
        controller.discard_window()
        for _ in range(2):
            other_model = small_model()
            other = ab.BatchController(other_model, sgd(other_model), rule=ab.rules.InnerProductTest())
            other.load_state_dict(state)
            other.backward(squared(other_model, data[1]), weight=4)
            other.step()
            tables.append(other.state_dict()["loop"]["window"])
        assert tables[0] == pytest.approx(tables[1], rel=0, abs=0, nan_ok=True)
        assert len(state["sensor"]["kept"]["sums"]) == 1

    def test_a_window_that_began_without_keeping_its_gradients_does_not_tell_their_parts(self):
        model, data = small_model(), batches([4] * 2)
        plain, keeping = (
            ab.BatchController(model, sgd(model), rule=r) for r in (ab.Fixed(2), ab.rules.InnerProductTest())
        )
        plain.backward(squared(model, data[0]), weight=4)
        state = plain.state_dict()
        plain.discard_window()
        keeping.load_state_dict(state)
        keeping.backward(squared(model, data[1]), weight=4)
        keeping.step()
        radial = keeping.state_dict()["loop"]["window"][4]
        assert math.isnan(radial)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"version": 99}, r"state must have version 7, got version = 99; it was saved by another release"),
            ({"surplus": 1}, r"state must have exactly the known keys, got unknown \['surplus'\] and missing \[\]"),
            (
                {"late_window": {"names": []}},
                r"state\['late_window'\] must have exactly the known keys, got unknown \['names'\] and missing \['app",
            ),
            (
                {"loop": saved(State(Progress())) | {"pooled": {}}},
                r"state\['loop'\]\['pooled'\] must have exactly the known keys, got unknown \[\] and missing \['lag",
            ),
        ],
        ids=["version", "unknown", "late", "pooled"],
    )
    def test_refuses_a_state_that_is_not_its_own(self, change, message):
        model = small_model()
        controller = ab.BatchController(model, sgd(model))
        before = controller.state_dict()
        with pytest.raises(ValueError, match=message):
            controller.load_state_dict(before | change)
        assert controller.state_dict()["loop"]["pooled"] == before["loop"]["pooled"]

    def test_refuses_a_state_with_a_missing_key(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model))
        state = controller.state_dict()
        del state["optimizer_step"]
        with pytest.raises(ValueError, match=r"got unknown \[\] and missing \['optimizer_step'\]"):
            controller.load_state_dict(state)


class TestLateReading:
    """What a GPU does without the check before the step: numbers reach the host, and the decision, one window late."""

    @staticmethod
    def late(model: nn.Module) -> ab.BatchController:
        controller, _ = adaptive(model)
        controller._read_late = True
        return controller

    def test_decides_from_the_window_before_and_completes_every_row(self):
        data = batches([4, 3, 5] * 40)
        model = small_model()
        controller = self.late(model)
        run(controller, data)
        table = controller.history.to_pandas()
        assert table[["loss", "lr"]].notna().all(axis=None)
        full = table["accumulation_steps"] > 1
        assert table.loc[full, ["grad_sq_norm", "noise_trace"]].notna().all(axis=None)
        assert math.isnan(table["noise_scale"].iloc[0])
        assert table["accumulation_steps"].nunique() > 2
        # The pooled pair after window t is that of windows up to t - 1: row 1 knows row 0 alone.
        first = table.iloc[0]
        ratio = first["noise_trace"] / first["grad_sq_norm"]
        assert table["noise_scale"].iloc[1] == pytest.approx(ratio if first["grad_sq_norm"] > 0 else math.inf)

    def test_resumes_with_the_window_that_waits(self):
        data = batches([4, 4] * 30)
        model = small_model()
        controller = self.late(model)
        run(controller, data[:20])
        other_model = copy.deepcopy(model)
        other = self.late(other_model)
        other.optimizer.load_state_dict(copy.deepcopy(controller.optimizer.state_dict()))
        other.load_state_dict(copy.deepcopy(controller.state_dict()))
        done = len(controller.history)
        run(controller, data[20:])
        run(other, data[20:])
        assert equal_state(model, other_model)
        expected = controller.history.to_pandas().iloc[done:].drop(columns="wall_seconds").reset_index(drop=True)
        pd.testing.assert_frame_equal(
            other.history.to_pandas().drop(columns="wall_seconds"), expected, check_exact=True
        )

    def test_a_waiting_window_is_not_lost_where_nothing_waits(self):
        """A state saved on a GPU, loaded where windows are read at once: the waiting one is pooled with the next."""
        data = batches([4, 4] * 6)
        model = small_model()
        controller = self.late(model)
        run(controller, data[:8])
        prompt, _ = adaptive(model)
        prompt.load_state_dict(controller.state_dict())
        before = controller.state_dict()["loop"]["pooled"]["weight"]
        run(prompt, data[8:10])
        windows_since = sum(row["accumulation_steps"] - 1 for row in [*controller.history, *prompt.history][-2:])
        assert prompt.state_dict()["loop"]["pooled"]["weight"] == pytest.approx(before + windows_since, rel=0.2)
        assert prompt.state_dict()["late_window"] is None


class TestParameters:
    def test_replaced_parameters_are_refused_while_the_optimizer_holds_the_old(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model))
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        with pytest.raises(RuntimeError, match=r"the optimizer holds parameters that the model no longer has"):
            controller.backward(squared(model, batches([4])[0]), weight=4)

    def test_replaced_parameters_are_hooked_again(self):
        model, twin = small_model(), small_model()
        controller = ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.1), rule=ab.Fixed(2))
        data = batches([4, 2, 3, 5])
        run(controller, data[:2])
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        controller.optimizer.param_groups[0]["params"] = list(model.parameters())
        run(controller, data[2:])
        reference.hand_written_loop(twin, torch.optim.SGD(twin.parameters(), lr=0.1), squared, [data[:2], data[2:]])
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
        assert controller.history.to_pandas()["noise_trace"].notna().all()

    def test_a_parameter_unfrozen_between_windows_is_heard(self):
        model = small_model()
        model[0].requires_grad_(False)
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        run(controller, batches([4, 4]))
        model[0].requires_grad_(True)
        run(controller, batches([4, 4], seed=1))
        assert model[0].weight._backward_hooks

    def test_close_removes_every_hook_and_refuses_to_go_on(self):
        model = small_model()
        with ab.BatchController(model, sgd(model)) as controller:
            assert all(p._backward_hooks for p in model.parameters())
        assert all(not p._backward_hooks for p in model.parameters())
        controller.close()
        with pytest.raises(RuntimeError, match="the controller is closed and hears nothing; make a new one"):
            controller.backward(squared(model, batches([4])[0]), weight=4)

    def test_closing_an_open_window_warns(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model))
        controller.backward(squared(model, batches([4])[0]), weight=4)
        with pytest.warns(UserWarning, match=r"closed with 1 micro-batches of an unfinished window in \.grad"):
            controller.close()

    def test_an_error_in_the_loop_passes_through_alone(self):
        model = small_model()

        def broken_loop() -> None:
            with ab.BatchController(model, sgd(model)) as controller:
                controller.backward(squared(model, batches([4])[0]), weight=4)
                raise KeyError("mine")

        # pytest turns warnings into errors: none may stand in front of the user's own.
        with pytest.raises(KeyError, match="mine"):
            broken_loop()
        assert all(not p._backward_hooks for p in model.parameters())


class TestLoop:
    def test_the_last_item_closes_the_window_whatever_the_loader(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(4))
        run(controller, (x for x in batches([2] * 6)))
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [4, 2]
        assert list(controller.micro_batches([])) == []

    def test_a_skipped_last_item_leaves_the_window_open_for_the_next_epoch(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(3))
        data = batches([2, 2, 2])

        def epoch() -> None:
            for index, x in enumerate(controller.micro_batches(data)):
                if index < 2:
                    controller.backward(squared(model, x), weight=len(x))

        with pytest.warns(UserWarning, match="stays open with 2 micro-batches"):
            epoch()
        assert not controller.step_due
        run(controller, data[:1])
        assert controller.history.to_pandas()["global_batch"].tolist() == [6]

    def test_breaking_out_leaves_the_controller_usable(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        for x in controller.micro_batches(batches([2] * 5)):
            controller.backward(squared(model, x), weight=len(x))
            break
        with pytest.warns(UserWarning, match="goes on with the 1 micro-batches that it holds"):
            run(controller, batches([2] * 3))
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [2, 2]

    def test_a_hand_written_loop(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(4))
        for x in batches([2, 3]):
            with controller.micro_batch():
                controller.backward(squared(model, x), weight=len(x))
        assert not controller.step_due
        controller.close_window()
        assert controller.step_due
        controller.step()
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [2]
        controller.close_window()
        assert not controller.step_due, "an empty window has nothing to step"

    def test_a_failed_backward_can_be_discarded(self):
        model, twin = small_model(), small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        data = batches([2, 2, 2])
        controller.backward(squared(model, data[0]), weight=2)

        def explode(grad: Tensor) -> None:
            raise MemoryError("boom")

        handle = model[0].weight.register_hook(explode)
        with pytest.raises(MemoryError, match="boom"):
            controller.backward(squared(model, data[1]), weight=2)
        handle.remove()
        with pytest.raises(RuntimeError, match=r"last backward\(\) failed, .* discard_window\(\)"):
            controller.backward(squared(model, data[1]), weight=2)
        with pytest.raises(RuntimeError, match=r"last backward\(\) failed"):
            controller.close_window()
        controller.discard_window()
        run(controller, data[1:])
        reference.hand_written_loop(twin, sgd(twin), squared, [data[1:]])
        assert len(controller.history) == 1
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def _early_step(c: ab.BatchController, x: Tensor) -> None:
    c.backward(squared(c.model, x), weight=4)
    c.step()


def _due_backward(c: ab.BatchController, x: Tensor) -> None:
    for _ in range(3):
        c.backward(squared(c.model, x), weight=4)


def _two_backwards(c: ab.BatchController, x: Tensor) -> None:
    with c.micro_batch():
        c.backward(squared(c.model, x), weight=4)
        c.backward(squared(c.model, x), weight=4)


def _nested(c: ab.BatchController, x: Tensor) -> None:
    with c.micro_batch(), c.micro_batch():
        pass


def _foreign_gradient(c: ab.BatchController, x: Tensor) -> None:
    squared(c.model, x).backward()
    c.backward(squared(c.model, x), weight=4)


MISUSE = {
    "early step": (_early_step, RuntimeError, r"step\(\) is early: the window has 1 of 2 micro-batches; wait for"),
    "early norm": (lambda c, x: c.grad_norm, RuntimeError, r"grad_norm is early: the window has 0 of 2"),
    "due backward": (_due_backward, RuntimeError, r"a step is due: call step\(\) before the next backward\(\)"),
    "two backwards": (_two_backwards, RuntimeError, r"one micro-batch takes one backward\(\): add its losses"),
    "nested scopes": (_nested, RuntimeError, r"micro_batch\(\) scopes must not be nested"),
    "left gradients": (_foreign_gradient, RuntimeError, r"gradients are left from before this window .*zero_grad"),
    "zero weight": (
        lambda c, x: c.backward(squared(c.model, x), weight=0),
        ValueError,
        r"weight must be positive and finite, got weight = 0; skip an empty micro-batch",
    ),
    "infinite weight": (lambda c, x: c.backward(squared(c.model, x), math.inf), ValueError, r"got weight = inf"),
    "nan weight": (lambda c, x: c.backward(squared(c.model, x), math.nan), ValueError, r"got weight = nan"),
    "tensor weight": (
        lambda c, x: c.backward(squared(c.model, x), torch.tensor(4.0)),
        ValueError,
        r"weight must be a Python number, got a tensor",
    ),
    "vector loss": (
        lambda c, x: c.backward(c.model(x).square().sum(-1), 4),
        ValueError,
        r"loss must be a scalar tensor with a graph, .* got shape \(4,\), requires_grad=True",
    ),
    "detached loss": (
        lambda c, x: c.backward(squared(c.model, x).detach(), 4),
        ValueError,
        r"loss must be a scalar .* got shape \(\), requires_grad=False",
    ),
    "float loss": (lambda c, x: c.backward(1.5, 4), ValueError, r"loss must be a scalar tensor .* got 1.5"),
    "foreign loss": (
        lambda c, x: c.backward(torch.ones((), requires_grad=True) * 2, 4),
        RuntimeError,
        r"no hook heard a gradient in this backward pass: the loss does not reach a parameter",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MISUSE.values(), ids=MISUSE)
def test_misuse_is_refused(call, error, message):
    model = small_model()
    controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    with pytest.raises(error, match=message):
        call(controller, batches([4])[0])


def test_construction_refuses_what_cannot_work(monkeypatch):
    model = small_model()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match=r"population must be at least 1 example, got population = 0; None: unlimited"):
        ab.BatchController(model, optimizer, population=0)
    with pytest.raises(ValueError, match=r"scaler must be a torch\.amp\.GradScaler or None, got bool without"):
        ab.BatchController(model, optimizer, scaler=False)
    with pytest.raises(ValueError, match=r"min_steps must be at least 2 for RelativeStandardError on one rank"):
        ab.BatchController(model, optimizer, limits=ab.Limits(min_steps=1))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: 0)
    with pytest.raises(
        ValueError, match=r"model must synchronise its gradients in a world of 4 ranks, got a plain Seq"
    ):
        ab.BatchController(model, optimizer)
    monkeypatch.undo()
    model.requires_grad_(False)
    for untrained in (optimizer, torch.optim.SGD([{"params": []}], lr=0.1)):
        with pytest.raises(ValueError, match=r"optimizer must hold at least one parameter with requires_grad=True"):
            ab.BatchController(model, untrained)


def test_defaults_are_the_documented_ones():
    model = small_model()
    controller = ab.BatchController(model, sgd(model))
    assert controller.rule == ab.RelativeStandardError(theta=1.0)
    assert controller.limits == ab.Limits(min_steps=2, max_steps=64, max_growth=2.0, max_shrink=0.8)
    assert controller.accumulation_steps == 2
    assert np.isneginf(controller.state_dict()["loop"]["changed_at"])


class TestGhost:
    """Examples instead of micro-batches as cells: evidence from one micro-batch."""

    def test_one_micro_batch_equals_the_analysis_of_variance_of_its_examples(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=True)
        data = batches([9, 5, 7])
        for x in controller.micro_batches(data):
            gradients = reference.per_example_gradients(model, squared, x)
            trace, signal = reference.anova([(1.0, gradient) for gradient in gradients])
            controller.backward(squared(model, x), weight=len(x))
            controller.step()
            row = controller.history.to_pandas().iloc[-1]
            assert row["noise_trace"] == pytest.approx(trace, rel=1e-9)
            assert row["grad_sq_norm"] == pytest.approx(signal, rel=1e-9, abs=1e-12 * trace)

    def test_windows_of_several_unequal_micro_batches(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(3), ghost=True)
        data = batches([9, 5, 2])
        gradients = reference.per_example_gradients(model, squared, torch.cat(data))
        trace, signal = reference.anova([(1.0, gradient) for gradient in gradients])
        run(controller, data)
        row = controller.history.to_pandas().iloc[0]
        assert row["noise_trace"] == pytest.approx(trace, rel=1e-9)
        assert row["grad_sq_norm"] == pytest.approx(signal, rel=1e-9, abs=1e-12 * trace)
        assert row["accumulation_steps"] == 3

    def test_training_is_the_plain_loop_bit_for_bit(self):
        data = batches([8] * 6)
        heard, plain = small_model(), small_model()
        run(ab.BatchController(heard, sgd(heard), rule=ab.Fixed(1), ghost=True), data)
        reference.hand_written_loop(plain, sgd(plain), squared, [[x] for x in data])
        assert equal_state(heard, plain)

    def test_a_closed_loop_rule_starts_at_one_and_grows(self):
        """One direction of signal in noise: B far above the micro-batch, seen without a second one."""
        model = nn.Linear(4, 1, bias=False).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        rule = ab.RelativeStandardError(memory=400.0)
        controller = ab.BatchController(model, optimizer, rule=rule, limits=ab.Limits(max_steps=8), ghost=True)
        assert controller.limits.min_steps == 1
        generator = torch.Generator().manual_seed(0)
        data = [torch.randn(8, 4, generator=generator, dtype=torch.float64) + 0.1 for _ in range(300)]
        run(controller, data, loss=lambda m, x: m(x).mean())
        steps = controller.history.to_pandas()["accumulation_steps"]
        assert steps.iloc[0] == 1
        assert steps.iloc[-2] == 8

    def test_the_noise_of_single_layers_adds_up(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=True)
        (x,) = batches([9])
        gradients = reference.per_example_gradients(model, squared, x)
        controller.backward(squared(model, x), weight=9)
        layers = controller.layer_noise()
        assert list(layers) == [name for name, _ in model.named_parameters()]
        first = next(iter(model.parameters())).numel()
        trace, signal = reference.anova([(1.0, gradient[:first]) for gradient in gradients])
        assert layers["0.weight"].noise_trace == pytest.approx(trace, rel=1e-9)
        assert layers["0.weight"].grad_sq_norm == pytest.approx(signal, rel=1e-9, abs=1e-12 * trace)
        controller.step()
        row = controller.history.to_pandas().iloc[-1]
        assert sum(pair.noise_trace for pair in layers.values()) == pytest.approx(row["noise_trace"], rel=1e-9)
        assert sum(pair.grad_sq_norm for pair in layers.values()) == pytest.approx(row["grad_sq_norm"], rel=1e-6)

    def test_the_noise_of_single_layers_needs_one_micro_batch(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), ghost=True)
        for x in batches([4, 4]):
            controller.backward(squared(model, x), weight=4)
        with pytest.raises(
            RuntimeError, match="needs ghost=True and a window of one micro-batch, got GhostProbe and 2"
        ):
            controller.layer_noise()

    def test_weights_are_examples(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), ghost=True)
        (x,) = batches([6])
        with pytest.raises(ValueError, match=r"weight must be the number of examples .* weight = 60.0 for 6 examples"):
            controller.backward(squared(model, x), weight=60)
        controller.discard_window()

    def test_batch_norm_is_refused(self):
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        with pytest.raises(ValueError, match=r"1 \(BatchNorm1d\) couples the examples .*min_steps=2"):
            ab.BatchController(model, sgd(model), ghost=True)


class TestCoupling:
    """The learning rate follows the batch for the time of a step, and nobody else notices."""

    COUPLING = ab.LearningRate("sqrt", reference_batch=8, max_change=4.0)

    def test_equals_a_loop_with_the_scaled_rate(self):
        data = batches([8] * 6)
        coupled, plain = small_model(), small_model()
        optimizer = torch.optim.SGD(coupled.parameters(), lr=0.05)
        controller = ab.BatchController(
            coupled, optimizer, rule=ab.rules.Replay([1, 4, 1]), learning_rate=self.COUPLING
        )
        run(controller, data)
        by_hand = torch.optim.SGD(plain.parameters(), lr=0.05)
        for window, rate in zip(split(data, [1, 4, 1]), (0.05, 0.1, 0.05), strict=True):
            by_hand.param_groups[0]["lr"] = rate
            reference.hand_written_loop(plain, by_hand, squared, [window])
        for p, q in zip(coupled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        assert optimizer.param_groups[0]["lr"] == 0.05
        rows = controller.history.to_pandas()
        assert rows["lr_factor"].tolist() == [1.0, 2.0, 1.0]
        assert rows["lr"].tolist() == pytest.approx([0.05, 0.1, 0.05])
        assert rows["beta2"].isna().all()

    def test_a_partial_window_keeps_the_rate_of_a_full_one(self):
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(4), learning_rate=self.COUPLING)
        run(controller, batches([8] * 5))
        assert controller.history.to_pandas()["lr_factor"].tolist() == [2.0, 2.0]

    def test_the_second_moment_and_its_decay_are_in_the_history(self):
        model = small_model()
        coupling = ab.LearningRate(reference_batch=8, beta2="half-life", rescale_second_moment=True)
        controller = ab.BatchController(model, adamw(model), rule=ab.rules.Replay([2, 4]), learning_rate=coupling)
        run(controller, batches([8] * 6))
        rows = controller.history.to_pandas()
        assert rows["beta2"].tolist() == pytest.approx([0.999**2, 0.999**4])
        assert rows["second_moment_factor"].iloc[0] == 1.0
        assert 0.5 <= rows["second_moment_factor"].iloc[1] < 1.0

    def test_nothing_is_coupled_by_default(self):
        model = small_model()
        controller = ab.BatchController(model, adamw(model), rule=ab.rules.Replay([1, 4]))
        run(controller, batches([8] * 5))
        rows = controller.history.to_pandas()
        assert (rows[["lr_factor", "second_moment_factor"]] == 1.0).all(axis=None)
        assert (rows["beta2"] == 0.999).all()

    def test_a_checkpoint_carries_it(self):
        model = small_model()
        make = lambda: ab.BatchController(  # noqa: E731
            model, sgd(model), rule=ab.Fixed(4), learning_rate=ab.LearningRate("sqrt", reference_batch=8)
        )
        first, second = make(), make()
        run(first, batches([8] * 4))
        second.load_state_dict(first.state_dict())
        run(second, batches([8] * 4))
        assert second.history.to_pandas()["lr_factor"].tolist() == pytest.approx([1.1**2])

    def test_an_optimizer_without_a_second_moment_is_refused(self):
        model = small_model()
        with pytest.raises(ValueError, match=r"optimizer must be one with a second moment .* got SGD"):
            ab.BatchController(model, sgd(model), learning_rate=ab.LearningRate(rescale_second_moment=True))


class TestLimits:
    """Changed under way: an open window keeps its size, the next one is within the new limits."""

    @staticmethod
    def made(**options: object) -> ab.BatchController:
        model = small_model()
        return ab.BatchController(model, sgd(model), **options)

    def test_between_windows_the_next_size_is_bounded_at_once(self):
        controller = self.made(rule=ab.rules.Replay([4, 4, 4, 4]))
        run(controller, batches([4] * 4))
        controller.limits = ab.Limits(max_steps=3)
        assert controller.accumulation_steps == 3
        assert "the rule wants more and max_steps does not allow it" in controller.explain()
        controller.limits = ab.Limits(max_steps=8)
        # More room is for the rule to take, at its next decision.
        assert controller.accumulation_steps == 3
        run(controller, batches([4] * 7))
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [4, 3, 4]

    def test_an_open_window_keeps_its_size(self):
        controller = self.made(rule=ab.rules.Replay([3, 3, 3]))
        data = batches([4] * 3)
        controller.backward(squared(controller.model, data[0]), weight=4)
        controller.limits = ab.Limits(min_steps=5)
        for x in data[1:]:
            assert controller.accumulation_steps == 3
            controller.backward(squared(controller.model, x), weight=4)
        decision = controller.step()
        assert (decision.accumulation_steps, decision.reason) == (5, "at_min")

    def test_an_open_scope_keeps_its_size(self):
        """It said already whether its backward synchronises."""
        controller = self.made(rule=ab.Fixed(2))
        for x in controller.micro_batches(batches([4] * 3)):
            controller.limits = ab.Limits(max_steps=1)
            assert controller.accumulation_steps == (2 if len(controller.history) == 0 else 1)
            controller.backward(squared(controller.model, x), weight=4)
            if controller.step_due:
                controller.step()
        assert controller.history.to_pandas()["accumulation_steps"].tolist() == [2, 1]

    def test_a_discarded_window_is_no_longer_open(self):
        controller = self.made(rule=ab.Fixed(4))
        controller.backward(squared(controller.model, batches([4])[0]), weight=4)
        controller.limits = ab.Limits(max_steps=2)
        controller.discard_window()
        assert controller.accumulation_steps == 2

    def test_a_checkpoint_is_brought_within_them(self):
        controller = self.made(rule=ab.Fixed(4))
        run(controller, batches([4] * 4))
        other = self.made(rule=ab.Fixed(4), limits=ab.Limits(max_steps=2))
        other.load_state_dict(controller.state_dict())
        assert other.accumulation_steps == 2
        other.load_state_dict(other.state_dict())

    def test_a_closed_loop_rule_decides_from_the_size_that_they_allow(self):
        controller = self.made(rule=ab.RelativeStandardError(theta=0.01, memory=100.0, dead_time=0.0))
        run(controller, batches([4] * 400))
        grown = controller.accumulation_steps
        assert grown > 8
        controller.limits = ab.Limits(max_steps=8, max_growth=1.5)
        assert controller.accumulation_steps == 8
        assert controller.state_dict()["loop"]["changed_at"] == controller.examples_seen
        run(controller, batches([4] * 80))
        assert controller.history.to_pandas()["accumulation_steps"].iloc[-5:].max() == 8

    def test_before_the_first_window_it_is_no_change_of_size(self):
        controller = self.made(rule=ab.RelativeStandardError())
        controller.limits = ab.Limits(min_steps=4)
        assert controller.accumulation_steps == 4
        assert np.isneginf(controller.state_dict()["loop"]["changed_at"])

    def test_wrong_ones_change_nothing(self):
        controller = self.made()
        before = controller.limits
        with pytest.raises(ValueError, match="min_steps must be at least 2 for RelativeStandardError on one rank"):
            controller.limits = ab.Limits(min_steps=1)
        assert controller.limits == before
