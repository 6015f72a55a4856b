"""controller.py: exact for every window, whatever the limits, the coupling and the parameters do."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adaptbatch as ab
from tests import reference
from tests.models import (
    Checkpointed,
    TiedLanguageModel,
    adamw,
    batches,
    equal_state,
    run,
    sgd,
    small_model,
    split,
    squared,
)
from tests.searches import costly


class TestExactness:
    @costly(40)
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

    def test_nothing_is_wrapped_and_checkpoints_are_those_of_the_plain_loop(self):
        ours, twin = small_model(), small_model()
        data = batches([3, 2, 4, 3])
        loops = []
        for model in (ours, twin):
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            loops.append((model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)))
        controller = ab.BatchController(ours, loops[0][1], rule=ab.Fixed(1))
        for x in controller.micro_batches(data):
            assert any(x is one for one in data)
            controller.backward(squared(ours, x), weight=len(x))
            controller.step()
            loops[0][2].step()
        for x in data:
            squared(twin, x).backward()
            loops[1][1].step()
            loops[1][1].zero_grad()
            loops[1][2].step()
        made = [[(type(one), sorted(vars(one))) for one in (*loop[0].modules(), *loop[1:])] for loop in loops]
        assert made[0] == made[1]
        for one, other in zip(*loops, strict=True):
            assert repr(one.state_dict()) == repr(other.state_dict())

    def test_a_windows_size_does_not_depend_on_its_own_data(self):
        """Two trainings whose data part in the window of index 40: only what comes after it differs."""
        tables = []
        for scale in (1.0, 100.0):
            model = small_model()
            controller = ab.BatchController(model, sgd(model), rule=ab.rules.NoiseScale(memory=200.0))
            for x in batches([4] * 2000):
                later = len(controller.history) >= 40
                controller.backward(squared(model, x * scale if later else x), weight=len(x))
                if controller.step_due:
                    controller.step()
            tables.append(controller.history.to_pandas())
        sizes, targets = ([table[name] for table in tables] for name in ("accumulation_steps", "target_batch"))
        assert (sizes[0][:41] == sizes[1][:41]).all()
        assert (targets[0][:40] == targets[1][:40]).all()
        assert targets[0][40] != targets[1][40]

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
