"""What users bring from plain loops: refused by a sentence that says the way out, warned of, or harmless."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adaptbatch as ab
from tests.models import batches, sgd, small_model, squared


def controlled(steps: int = 4, **more: object) -> ab.BatchController:
    model = small_model()
    return ab.BatchController(model, sgd(model), rule=ab.Fixed(steps), **more)  # type: ignore[arg-type]


def zero_gradients(c: ab.BatchController) -> None:
    c.optimizer.zero_grad()


def zero_gradients_and_keep_them(c: ab.BatchController) -> None:
    c.optimizer.zero_grad(set_to_none=False)


def clip(c: ab.BatchController) -> None:
    nn.utils.clip_grad_norm_(c.model.parameters(), 1e-3)


def another_loss(c: ab.BatchController) -> None:
    c.model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()


CHANGES = [zero_gradients, zero_gradients_and_keep_them, clip, another_loss]


class TestGradientsChangedWithinAWindow:
    @pytest.mark.parametrize("change", CHANGES)
    def test_the_next_micro_batch_is_refused(self, change: Callable[[ab.BatchController], None]):
        c = controlled()
        first, second = batches([3, 3])
        c.backward(squared(c.model, first), weight=3)
        change(c)
        with pytest.raises(RuntimeError, match=r"backward\(\) found gradients that were changed within the window"):
            c.backward(squared(c.model, second), weight=3)

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_window_cannot_be_closed(self, change: Callable[[ab.BatchController], None]):
        c = controlled(steps=3)
        c.backward(squared(c.model, batches([3])[0]), weight=3)
        change(c)
        for call in (c.close_window, c.state_dict):
            message = rf"{call.__name__}\(\) found gradients .*clipping waits until step_due"
            with pytest.raises(RuntimeError, match=message):
                call()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (zero_gradients, r"gradients are gone.*discard_window\(\)"),
            (zero_gradients_and_keep_them, r"gradients are gone.*discard_window\(\)"),
            (another_loss, r"another backward pass added.*discard_window\(\)"),
        ],
    )
    @pytest.mark.parametrize("ghost", [False, True])
    def test_a_due_window_that_is_no_mean_any_more_is_refused(
        self, change: Callable[[ab.BatchController], None], message: str, ghost: bool
    ):
        c = controlled(steps=2, ghost=ghost)
        before = copy.deepcopy(c.model.state_dict())
        for x in batches([3, 3]):
            c.backward(squared(c.model, x), weight=3)
        change(c)
        with pytest.raises(RuntimeError, match=message):
            c.step()
        assert all(torch.equal(before[name], value) for name, value in c.model.state_dict().items())
        c.discard_window()
        for x in batches([3, 3]):
            c.backward(squared(c.model, x), weight=3)
        clip(c)
        c.step()
        assert len(c.history) == 1

    def test_gradients_by_autograd_grad_are_nobodys(self):
        c = controlled(steps=2)
        for x in batches([3, 3]):
            c.backward(squared(c.model, x), weight=3)
            torch.autograd.grad(squared(c.model, x), list(c.model.parameters()))
        c.step()

    def test_two_optimizers_are_two_controllers(self):
        """Each hears its own loss only, and the second equals one that is trained alone on the same inputs."""
        both, alone = (nn.ModuleList([small_model(0), nn.Linear(3, 1).double()]) for _ in range(2))
        alone.load_state_dict(both.state_dict())
        first, second, single = (
            ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.0), rule=ab.Fixed(2))
            for model in (both[0], both[1], alone[1])
        )
        for x in batches([3, 3, 3, 3]):
            for c, loss in (
                (second, lambda x=x: both[1](both[0](x).detach()).square().mean()),
                (single, lambda x=x: alone[1](alone[0](x).detach()).square().mean()),
            ):
                c.backward(loss(), weight=3)
            both[1].requires_grad_(False)
            first.backward(both[1](both[0](x)).square().mean(), weight=3)
            both[1].requires_grad_(True)
            for c in (first, second, single):
                if c.step_due:
                    c.step()
        columns = ["batch_grad_norm", "noise_trace", "grad_sq_norm"]
        ours, theirs = (c.history.to_pandas()[columns] for c in (second, single))
        assert ours.equals(theirs)
        assert len(ours) == len(first.history) == 2


class TestItemsThatAreSkipped:
    def test_a_last_item_without_a_backward_leaves_the_window_open_and_says_so(self):
        c = controlled()

        def epoch() -> None:
            for index, x in enumerate(c.micro_batches(batches([3, 3, 3, 3]))):
                if index < 3:
                    c.backward(squared(c.model, x), weight=3)

        with pytest.warns(UserWarning, match=r"the last item had no backward\(\).*stays open with 3 micro-batches"):
            epoch()
        c.close_window()
        c.step()
        assert c.history.to_pandas()["accumulation_steps"].tolist() == [3]

    def test_a_loop_that_never_calls_the_controller_is_told(self):
        c = controlled()

        def epoch() -> None:
            for x in c.micro_batches(batches([3, 3])):
                squared(c.model, x).backward()

        with pytest.warns(UserWarning, match=r"controller\.backward\(loss, weight\) in place of loss\.backward\(\)"):
            epoch()

    def test_two_iterations_at_once_are_refused(self):
        c = controlled()
        outer, inner = (c.micro_batches(batches([3, 3])) for _ in range(2))
        next(outer)
        next(inner)
        with pytest.raises(RuntimeError, match="one such iteration ends before the next begins"):
            next(outer)
        c.backward(squared(c.model, batches([3])[0]), weight=3)

    def test_an_iteration_left_early_does_not_block_the_next(self):
        c = controlled(steps=1)
        for x in c.micro_batches(batches([3, 3])):
            c.backward(squared(c.model, x), weight=3)
            c.step()
            break
        for x in c.micro_batches(batches([3, 3])):
            c.backward(squared(c.model, x), weight=3)
            c.step()
        assert len(c.history) == 3


def factors(sizes: list[int], steps: int, epochs: int = 1) -> np.ndarray:
    """What a linear coupling to a batch of 32 multiplied the rate by, step by step."""
    coupling = ab.LearningRate("linear", reference_batch=32, max_change=100)
    c = controlled(steps, learning_rate=coupling)
    for _ in range(epochs):
        for x in c.micro_batches(batches(sizes)):
            c.backward(squared(c.model, x), weight=len(x))
            if c.step_due:
                c.step()
    return c.history.to_pandas()["lr_factor"].to_numpy()


class TestTheSizeOfAMicroBatch:
    def test_a_short_last_batch_of_an_epoch_couples_nothing(self):
        assert factors([32, 32, 5], steps=1, epochs=4).tolist() == [1.0] * 12
        assert factors([16, 16, 16, 5], steps=2, epochs=4).tolist() == [1.0] * 8

    def test_batches_that_change_are_followed_at_once(self):
        assert factors([16] * 4 + [32] * 4, steps=2).tolist() == [1.0, 1.0, 1.0, 2.0]

    def test_unequal_ones_are_their_mean(self):
        """At a constant ``k`` a coupling stays where it is, but for what is not known of the mean yet."""
        rng = np.random.default_rng(0)
        sizes = [int(size) for size in rng.integers(1, 32, size=1200)]
        late = factors(sizes, steps=2)[300:] * 32 / 2
        # The mean over an effective 289 micro-batches of a deviation of 9.2.
        assert np.abs(late - 16.0).max() < 4 * 9.2 / np.sqrt(289)


class TestWhatIsLeft:
    def test_a_history_outlives_its_model(self):
        c = controlled(steps=1)
        for x in c.micro_batches(batches([3, 3])):
            c.backward(squared(c.model, x), weight=3)
            c.step()
        c.close()
        history, model = c.history, weakref.ref(c.model)
        del c
        gc.collect()
        assert model() is None
        assert len(history.to_pandas()) == 2

    def test_a_history_travels_alone(self):
        c = controlled(steps=1)
        for x in c.micro_batches(batches([3, 3])):
            c.backward(squared(c.model, x), weight=3)
            c.step()
        for there in (pickle.loads(pickle.dumps(c.history)), copy.deepcopy(c.history)):
            assert there.to_pandas().equals(c.history.to_pandas())
        with pytest.raises(TypeError, match=r"cannot be copied or pickled; take state_dict\(\)"):
            pickle.dumps(c)
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copy.deepcopy(c)

    @pytest.mark.parametrize("ghost", [False, True])
    def test_a_controller_that_was_dropped_leaves_no_hook(self, ghost: bool):
        model = small_model()
        for _ in range(3):
            c = ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=ghost)
            x = batches([3])[0]
            c.backward(squared(model, x), weight=3)
            c.step()
        del c
        gc.collect()
        assert not any(p._backward_hooks for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    @pytest.mark.parametrize("measures", ["ghost", "meter"])
    def test_hooks_may_go_while_their_module_is_called(self, measures: str):
        """As where the collector comes by then, and takes a controller that was dropped."""
        model = small_model()
        if measures == "ghost":
            one = ab.BatchController(model, sgd(model), rule=ab.Fixed(1), ghost=True)
            register = model[0].register_forward_hook
        else:
            one = ab.NoiseMeter(model, sgd(model))
            register = model.register_forward_pre_hook
        handle = register(lambda *_: one.close(), prepend=True)
        x = batches([3])[0]
        squared(model, x).backward()
        handle.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert squared(model, x).isfinite()

    def test_a_closed_controller_hears_saves_and_loads_nothing(self):
        c = controlled()
        state = c.state_dict()
        c.backward(squared(c.model, batches([3])[0]), weight=3)
        with pytest.warns(UserWarning, match="closed with 1 micro-batches of an unfinished window"):
            c.close()
        for call in (c.state_dict, lambda: c.load_state_dict(state), lambda: c.micro_batches([])):
            with pytest.raises(RuntimeError, match="the controller is closed"):
                call()


class TestKinds:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"rule": ab.RelativeStandardError}, r"rule must be a Rule or None, got rule = RelativeStandardError"),
            ({"rule": 4}, r"rule must be a Rule or None, got rule = 4; .*Fixed\(4\)"),
            ({"guard": True}, r"guard must be a Guard or None, got guard = True; Guard\(\)"),
            ({"learning_rate": 0.1}, r"learning_rate must be a LearningRate or None, got learning_rate = 0\.1"),
        ],
    )
    def test_another_kind_is_refused_at_once(self, arguments: dict, message: str):
        model = small_model()
        with pytest.raises(TypeError, match=message):
            ab.BatchController(model, sgd(model), **arguments)

    def test_model_and_optimizer_have_an_order(self):
        model = small_model()
        with pytest.raises(TypeError, match=r"got SGD and Sequential; BatchController\(model, optimizer\)"):
            ab.BatchController(sgd(model), model)  # type: ignore[arg-type]

    def test_an_optimizer_that_evaluates_the_loss_is_refused(self):
        model = small_model()
        with pytest.raises(ValueError, match="optimizer must step without a closure, got LBFGS"):
            ab.BatchController(model, torch.optim.LBFGS(model.parameters()))

    @pytest.mark.parametrize("value", ["1", None])
    def test_numbers_are_numbers(self, value: object):
        with pytest.raises(ValueError, match="theta must be positive and finite"):
            ab.RelativeStandardError(theta=value)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="max_growth must be finite and above 1"):
            ab.Limits(max_growth=value)  # type: ignore[arg-type]
        c = controlled()
        loss = squared(c.model, batches([3])[0])
        with pytest.raises(ValueError, match="weight must be positive and finite"):
            c.backward(loss, weight=value)  # type: ignore[arg-type]

    @pytest.mark.parametrize("decided", [4, ab.records.Decision(float("nan"), 1.0, "hold")])  # type: ignore[arg-type]
    def test_a_rule_of_ones_own_must_decide(self, decided: object):
        class Own:
            closed_loop, memory = False, None

            def decide(self, evidence: ab.records.Evidence, progress: ab.records.Progress, limits: ab.Limits) -> object:
                return decided

        model = small_model()
        with pytest.raises(TypeError, match=r"Own\.decide\(\) must return a Decision with a number of accumulation"):
            ab.BatchController(model, sgd(model), rule=Own())  # type: ignore[arg-type]

    def test_a_constant_baseline_is_what_it_says(self):
        assert controlled(128).accumulation_steps == 128
        assert controlled(128, limits=ab.Limits(max_steps=16)).accumulation_steps == 16
        assert controlled(128, guard=ab.Guard()).accumulation_steps == 64


class TestExplanations:
    def test_an_open_loop_does_not_speak_of_evidence(self):
        c = controlled(2)
        assert "it goes up, whatever the noise" in c.explain()
        for x in c.micro_batches(batches([3, 3, 3, 3])):
            c.backward(squared(c.model, x), weight=3)
            if c.step_due:
                c.step()
        assert "reason hold): it keeps its size." in c.explain()

    def test_a_word_of_ones_own_is_its_own(self):
        class Own:
            closed_loop, memory = True, None

            def decide(
                self, evidence: ab.records.Evidence, progress: ab.records.Progress, limits: ab.Limits
            ) -> ab.records.Decision:
                return ab.records.Decision(2, 6.0, "because")  # type: ignore[arg-type]

        model = small_model()
        assert "reason because)." in ab.BatchController(model, sgd(model), rule=Own()).explain()

    def test_a_metric_that_is_not_there_yet_is_told(self):
        model = small_model()
        c = ab.BatchController(model, torch.optim.Adam(model.parameters()), metric="adam")
        assert "the decision is Euclidean as yet" in c.explain()


class TestGradientsOfOtherKinds:
    def test_complex_gradients_have_a_real_product(self):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(5, dtype=torch.complex128))
        model, seen = nn.ParameterList([weight]), []
        c = ab.BatchController(model, torch.optim.SGD([weight], lr=0.1), rule=ab.Fixed(1), consecutive=True)
        for scale in (1.0, 2.0):
            c.backward((weight * (scale + 1j)).abs().square().sum(), weight=1)
            seen.append(weight.grad.clone())  # type: ignore[union-attr]
            c.step()
        expected = float((seen[1].conj() * seen[0]).real.sum())
        assert c.history.to_pandas()["consecutive_product"].iloc[1] == pytest.approx(expected)

    @pytest.mark.parametrize("size", [4, 2000])
    @pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
    def test_a_backward_pass_may_build_a_graph(self, size: int):
        weight = nn.Parameter(torch.ones(size))
        c = ab.BatchController(nn.ParameterList([weight]), torch.optim.SGD([weight], lr=0.1), rule=ab.Fixed(1))
        with c.observe(weight.pow(3).sum(), weight=1) as loss:
            loss.backward(create_graph=True)
        c.step()
        assert c.history.to_pandas()["batch_grad_norm"].iloc[0] == pytest.approx(3.0 * size**0.5)


class TestScaler:
    def loop(self, steps: int = 1) -> tuple[ab.BatchController, Tensor]:
        model = small_model(dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        x = batches([3], dtype=torch.float32)[0]
        return ab.BatchController(model, sgd(model), rule=ab.Fixed(steps), scaler=scaler), x

    def test_a_window_may_be_discarded_after_it_was_unscaled(self):
        c, x = self.loop()
        for _ in range(2):
            c.backward(squared(c.model, x), weight=3)
            c.discard_window()
        c.backward(squared(c.model, x), weight=3)
        c.step()
        assert len(c.history) == 1

    def test_a_step_that_is_skipped_before_it_was_unscaled_backs_off(self):
        c, x = self.loop()
        scaler = c._stepper._scaler
        assert scaler is not None
        with c.observe(squared(c.model, x) * float("inf"), weight=3) as weighted:
            scaler.scale(weighted).backward()
        c.step()
        assert c.history.to_pandas()["skipped"].tolist() == [True]
        assert scaler.get_scale() == 512.0

    def test_unscaling_by_hand_is_refused(self):
        c, x = self.loop(steps=2)
        c.backward(squared(c.model, x), weight=3)
        c._stepper._scaler.unscale_(c.optimizer)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match=r"changed within the window.*The controller unscales"):
            c.backward(squared(c.model, x), weight=3)
