"""controller.py: a state goes on to the last bit, and what does not fit is refused whole."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptbatch as ab
from adaptbatch.records import Progress
from adaptbatch.schema import saved
from adaptbatch.state import State
from tests.models import (
    LastDigits,
    adaptive,
    batches,
    equal_state,
    run,
    sgd,
    small_model,
    squared,
)
from tests.searches import costly


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

    @costly(30)
    @given(
        stop=st.integers(0, 40),
        options=st.sampled_from(
            [
                {"rule": LastDigits()},
                {"rule": ab.rules.InnerProductTest()},
                {"rule": LastDigits(), "consecutive": True},
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
        """A full window of the data's last, unequal micro-batches says nothing of what a micro-batch weighs."""
        model = small_model()
        c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
        for index, x in enumerate(batches([4, 4, 3, 1]), start=1):
            c.backward(squared(model, x), weight=len(x))
            if index == 4:
                c.close_window()
            if c.step_due:
                c.step()
        assert c._state.progress.micro_batch_examples == 4.0
        assert c._state.unequal == 0

    @pytest.mark.parametrize("consecutive", [False, True])
    @pytest.mark.parametrize("clips", [False, True])
    def test_a_due_window_goes_on_to_the_last_bit(self, consecutive, clips):
        data, outcomes = batches([4, 4, 4, 4]), []
        for resumes in (False, True):
            model = small_model()
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            c = ab.BatchController(model, optimizer, rule=ab.Fixed(2), consecutive=consecutive)
            for x in data:
                c.backward(squared(model, x), weight=4)
                if c.step_due and resumes:
                    states = copy.deepcopy([model.state_dict(), optimizer.state_dict(), c.state_dict()])
                    c.discard_window()
                    model = small_model(1)
                    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
                    c = ab.BatchController(model, optimizer, rule=ab.Fixed(2), consecutive=consecutive)
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

    def test_a_window_that_was_loaded_can_be_discarded(self):
        ours, twin, data = small_model(), small_model(), batches([4] * 4)
        first, second, fresh = (ab.BatchController(m, sgd(m), rule=ab.Fixed(2)) for m in (small_model(), ours, twin))
        first.backward(squared(first.model, data[0]), weight=4)
        second.load_state_dict(first.state_dict())
        with pytest.raises(RuntimeError, match=r"optimizer\.step\(\) was called within an open window"):
            second.optimizer.step()
        second.discard_window()
        # Nobody's window is open.
        second.optimizer.step()
        run(second, data)
        run(fresh, data)
        assert equal_state(ours, twin)

    def test_what_the_data_set_is_belongs_to_the_controller_that_loads(self):
        made = [ab.BatchController(m, sgd(m), population=n) for n in (None, 100) for m in [small_model()]]
        made[1].load_state_dict(made[0].state_dict())
        rows = []
        for c in made:
            run(c, batches([10, 10]))
            rows.append(c.history.to_pandas().iloc[0])
        # Of the difference to the data set's own gradient only the part that was not drawn is left.
        assert rows[1]["relative_error"] < rows[0]["relative_error"]

    def test_seconds_before_a_load_are_no_windows(self, monkeypatch):
        clock = SimpleNamespace(now=0.0)
        for module in ("controller", "checkpoint"):
            monkeypatch.setattr(f"adaptbatch.{module}.time", SimpleNamespace(perf_counter=lambda: clock.now))
        model = small_model()
        controller = ab.BatchController(model, sgd(model), rule=ab.Fixed(1))
        clock.now = 1000.0
        controller.load_state_dict(controller.state_dict())
        clock.now += 4.0
        run(controller, batches([4]))
        assert controller._state.evidence().example_seconds == pytest.approx(1.0)

    def test_a_due_window_that_was_clipped_before_it_was_saved_says_so(self):
        ours, theirs = (ab.BatchController(m, sgd(m), rule=ab.Fixed(2)) for m in (small_model(), small_model()))
        for x in batches([4, 4]):
            ours.backward(squared(ours.model, x), weight=4)
        nn.utils.clip_grad_norm_(ours.model.parameters(), 1e-3)
        theirs.load_state_dict(ours.state_dict())
        for c in (ours, theirs):
            c.step()
            assert c.history.to_pandas()["applied_grad_norm"].tolist() == [pytest.approx(1e-3, rel=1e-3)]

    def test_what_was_loaded_can_be_saved_again(self):
        first, second = (ab.BatchController(m, sgd(m), rule=ab.Fixed(2)) for m in (small_model(), small_model()))
        first.backward(squared(first.model, batches([4])[0]), weight=4)
        state = first.state_dict()
        second.load_state_dict(state)
        again = second.state_dict()
        assert repr(again["sensor"]) == repr(state["sensor"])
        with pytest.raises(
            ValueError, match=r"state\['sensor'\]\['cells'\] must be at least state\['window'\]\['micro_batches'\] = 1"
        ):
            second.discard_window() or second.load_state_dict(again | {"sensor": again["sensor"] | {"cells": 0}})

    def test_a_load_forgets_the_gradient_before_it(self):
        """Of the training that is left no gradient is multiplied by one of the training that is gone on with."""
        used, fresh = (
            ab.BatchController(m, torch.optim.SGD(m.parameters(), lr=0.0), rule=ab.Fixed(2), consecutive=True)
            for m in (small_model(), small_model())
        )
        state = fresh.state_dict()
        run(used, batches([4] * 8))
        used.load_state_dict(state)
        for c in (used, fresh):
            run(c, batches([4] * 4))
        ours, theirs = (c.history.to_pandas()["consecutive_product"].tolist() for c in (used, fresh))
        assert math.isnan(ours[0])
        assert ours[1:] == theirs[1:]

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
            ({"version": 99}, r"state must have version 8, got version = 99; it was saved by another release"),
            ({"surplus": 1}, r"state must have exactly the known keys, got unknown \['surplus'\] and missing \[\]"),
            (
                {"late_window": {"names": []}},
                r"state\['late_window'\] must have exactly the known keys, got unknown \['names'\] and missing \['app",
            ),
            (
                {"loop": saved(State(Progress())) | {"pooled": {}}},
                r"state\['loop'\]\['pooled'\] must have exactly the known keys, got unknown \[\] and missing \['inf",
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
