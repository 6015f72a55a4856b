"""optimizer_state.py against the steps that torch.optim itself takes, and against explicit weighted means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, optim
from torch.nn import Parameter
from torch.optim import Optimizer

from adaptbatch.optimizer import second_moment as optimizer_state
from adaptbatch.optimizer.learning_rate import UNTOUCHED, Adjustment, LearningRate, half_life_beta2
from adaptbatch.optimizer.second_moment import metric_scales, require_coupling, scaled_step, second_moments
from adaptbatch.records import NoiseEstimate

Make = Callable[[list[dict[str, object]]], Optimizer]
LR = 0.1


def adam_like(kind: type[Optimizer], **options: object) -> Make:
    """Without momentum: the update is then the preconditioned gradient itself."""
    return lambda groups: kind([{"betas": (0.0, 0.9), **group} for group in groups], lr=LR, **options)


def other(kind: type[Optimizer], **options: object) -> Make:
    """Optimizers without betas."""
    return lambda groups: kind([{k: v for k, v in g.items() if k != "betas"} for g in groups], lr=LR, **options)


OPTIMIZERS: dict[str, Make] = {
    "adam": adam_like(optim.Adam, foreach=False),
    "adam foreach": adam_like(optim.Adam, foreach=True),
    "adam fused": adam_like(optim.Adam, fused=True),
    "adam amsgrad": adam_like(optim.Adam, amsgrad=True),
    "adamw": adam_like(optim.AdamW, weight_decay=0.0),
    "adamw amsgrad fused": adam_like(optim.AdamW, weight_decay=0.0, amsgrad=True, fused=True),
    "nadam": adam_like(optim.NAdam),
    "radam": adam_like(optim.RAdam),
    "rmsprop": other(optim.RMSprop),
    "rmsprop centered": other(optim.RMSprop, centered=True),
    "adagrad": other(optim.Adagrad, lr_decay=0.01, initial_accumulator_value=0.3),
    "adagrad fused": other(optim.Adagrad, fused=True),
}
EVERY = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
BIAS_CORRECTED = pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam])


def two_groups(make: Make, dtype: torch.dtype = torch.float64) -> tuple[Optimizer, list[Parameter]]:
    """Groups that differ in decay and in an eps large enough for its place to matter."""
    parameters = [Parameter(torch.ones(shape, dtype=dtype)) for shape in ((3, 2), (4,), (5,))]
    first: dict[str, object] = {"params": parameters[:2], "eps": 0.5}
    second: dict[str, object] = {"params": parameters[2:], "eps": 0.03, "betas": (0.0, 0.99)}
    optimizer = make([first, second])
    if "alpha" in optimizer.param_groups[0]:
        optimizer.param_groups[0]["alpha"] = 0.9
    return optimizer, parameters


def take_steps(optimizer: Optimizer, parameters: list[Parameter], steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for i, p in enumerate(parameters):
            # Shrinking gradients, so that amsgrad's maximum is not the last average.
            p.grad = (torch.randn(p.shape, generator=generator, dtype=p.dtype) + i) * 3.0 / (1.0 + t)
        optimizer.step()


def group_of(optimizer: Optimizer, p: Parameter) -> dict[str, float]:
    """Of the three parameters, the last is alone in the second group."""
    return optimizer.param_groups[1 if p.shape == (5,) else 0]


def extra_factor(optimizer: Optimizer, p: Parameter) -> float:
    """What the update has besides the learning rate and the preconditioned gradient."""
    group, t = group_of(optimizer, p), float(optimizer.state[p]["step"])
    if isinstance(optimizer, optim.RAdam):
        beta2 = group["betas"][1]
        rho_inf = 2.0 / (1.0 - beta2) - 1.0
        rho = rho_inf - 2.0 * t * beta2**t / (1.0 - beta2**t)
        return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
    return 1.0 / (1.0 + (t - 1.0) * group["lr_decay"]) if isinstance(optimizer, optim.Adagrad) else 1.0


class TestMetric:
    @EVERY
    def test_is_the_preconditioner_of_the_step(self, make):
        optimizer, parameters = two_groups(make)
        take_steps(optimizer, parameters, 30)
        before = [p.detach().clone() for p in parameters]
        take_steps(optimizer, parameters, 1, seed=1)
        scales = metric_scales(optimizer, parameters)
        for p, old, s in zip(parameters, before, scales, strict=True):
            step = -LR * extra_factor(optimizer, p) * p.grad * s**2
            # The difference of two parameters near 1 carries their rounding.
            torch.testing.assert_close(p.detach() - old, step, rtol=1e-9, atol=1e-14)

    @EVERY
    def test_is_built_from_the_second_moment(self, make):
        optimizer, parameters = two_groups(make)
        take_steps(optimizer, parameters, 30)
        moments, scales = second_moments(optimizer, parameters), metric_scales(optimizer, parameters)
        for p, v, s in zip(parameters, moments, scales, strict=True):
            group = group_of(optimizer, p)
            eps = group["eps"]
            if isinstance(optimizer, optim.RAdam):
                eps /= math.sqrt(1.0 - group["betas"][1] ** 30)
            torch.testing.assert_close(s, (v.sqrt() + eps) ** -0.5, rtol=1e-12, atol=0.0)

    @EVERY
    def test_reading_changes_nothing(self, make):
        optimizer, parameters = two_groups(make)
        second_moments(optimizer, parameters)
        # Adagrad has its state from the start.
        assert isinstance(optimizer, optim.Adagrad) or not optimizer.state
        take_steps(optimizer, parameters, 30)
        kept = [{k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()} for p in parameters]
        for tensor in second_moments(optimizer, parameters) + metric_scales(optimizer, parameters):
            tensor.zero_()
        for p, state in zip(parameters, kept, strict=True):
            assert all(torch.equal(torch.as_tensor(optimizer.state[p][name]), value) for name, value in state.items())

    def test_amsgrad_takes_the_maximum(self):
        optimizer, parameters = two_groups(OPTIMIZERS["adam amsgrad"])
        take_steps(optimizer, parameters, 30)
        state = optimizer.state[parameters[0]]
        assert (state["max_exp_avg_sq"] > 1.5 * state["exp_avg_sq"]).all()
        expected = state["max_exp_avg_sq"] / (1 - 0.9**30)
        torch.testing.assert_close(second_moments(optimizer, parameters)[0], expected)

    @pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
    def test_at_least_single_precision(self, dtype, wide):
        optimizer, parameters = two_groups(OPTIMIZERS["adam"], dtype)
        take_steps(optimizer, parameters, 30)
        read = metric_scales(optimizer, parameters) + second_moments(optimizer, parameters)
        assert {tensor.dtype for tensor in read} == {wide}

    def test_a_constant_gradient_never_divides_by_a_negative_variance(self):
        weight = Parameter(torch.zeros(100))
        optimizer = optim.RMSprop([weight], centered=True, alpha=0.5)
        for _ in range(40):
            weight.grad = torch.linspace(0.1, 3.0, 100)
            optimizer.step()
        state = optimizer.state[weight]
        assert (state["square_avg"] - state["grad_avg"].square()).min() < 0.0
        assert metric_scales(optimizer, [weight])[0].isfinite().all()


class TestWarmth:
    @pytest.mark.parametrize(
        ("make", "first"),
        [
            (lambda p: optim.Adam(p, betas=(0.9, 0.99)), 10),
            (lambda p: optim.Adam(p, betas=(0.9, 0.999)), 100),
            (lambda p: optim.RMSprop(p, alpha=0.998), 50),
            (lambda p: optim.Adagrad(p), 10),
        ],
        ids=["adam .99", "adam .999", "rmsprop .998", "adagrad"],
    )
    def test_after_ten_steps_and_a_tenth_of_the_memory(self, make, first):
        weight = Parameter(torch.zeros(2))
        optimizer = make([weight])
        take_steps(optimizer, [weight], first - 1)
        assert metric_scales(optimizer, [weight]) is None
        take_steps(optimizer, [weight], 1)
        assert metric_scales(optimizer, [weight]) is not None

    def test_the_latest_parameter_decides(self):
        early, late = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
        optimizer = optim.Adam([early, late], betas=(0.9, 0.9))
        take_steps(optimizer, [early], 20)
        assert second_moments(optimizer, [late, early])[0] is None
        assert second_moments(optimizer, [late, early])[1] is not None
        assert metric_scales(optimizer, [early, late]) is None
        take_steps(optimizer, [early, late], 9)
        assert metric_scales(optimizer, [early, late]) is None
        take_steps(optimizer, [early, late], 1)
        assert metric_scales(optimizer, [early, late]) is not None

    def test_a_count_given_is_believed(self):
        optimizer, parameters = two_groups(OPTIMIZERS["adam"])
        take_steps(optimizer, parameters, 30)
        expected = metric_scales(optimizer, parameters)
        for p in parameters:
            # A count that could not be read, as one still on its way to the host.
            optimizer.state[p]["step"] = torch.empty((), device="meta")
        for found, scale in zip(metric_scales(optimizer, parameters, steps_taken=30), expected, strict=True):
            assert torch.equal(found, scale)
        assert metric_scales(optimizer, parameters, steps_taken=9) is None


def weighted_mean(gradients: np.ndarray, betas: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """The slow twin: ``v_t`` after every step as an explicit mean of all squared gradients, and the last weights.

    A step under ``beta2`` gives the newest square ``(1 - beta2) / (1 - beta2^t)`` and the older ones the rest, in the
    proportions they had.
    """
    weights, means = np.zeros(len(gradients)), []
    for t, beta2 in enumerate(betas, start=1):
        newest = (1.0 - beta2) / (1.0 - beta2**t)
        weights *= 1.0 - newest
        weights[t - 1] = newest
        means.append(weights @ gradients**2)
    return np.array(means), weights


class TestBeta2:
    exponents = [1.0] * 100 + [16.0] * 20 + [4.0] * 20 + [1.0] * 20 + [0.2] * 20

    @BIAS_CORRECTED
    def test_the_second_moment_stays_a_mean(self, kind):
        gradients = np.random.default_rng(0).standard_normal((len(self.exponents), 6))
        betas = [half_life_beta2(0.999, exponent) for exponent in self.exponents]
        expected, weights = weighted_mean(gradients, betas)
        assert weights.sum() == pytest.approx(1.0, abs=1e-12)
        weight = Parameter(torch.zeros(6, dtype=torch.float64))
        optimizer, previous = kind([weight], betas=(0.9, 0.999)), UNTOUCHED
        for gradient, exponent, mean in zip(gradients, self.exponents, expected, strict=True):
            weight.grad = torch.from_numpy(gradient)
            adjustment = Adjustment(beta2_exponent=exponent)
            with scaled_step(optimizer, adjustment, previous):
                optimizer.step()
            previous = adjustment
            np.testing.assert_allclose(second_moments(optimizer, [weight], previous)[0].numpy(), mean, rtol=1e-10)
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)

    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_without_the_correction_it_is_off_by_the_ratio_of_the_sums(self, amsgrad):
        """Unit gradients: every mean of squares is 1, and what is read is the sum of the weights."""
        weight = Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = optim.Adam([weight], betas=(0.9, 0.999), amsgrad=amsgrad)
        for _ in range(100):
            weight.grad = torch.ones(1, dtype=torch.float64)
            optimizer.step()
        assert second_moments(optimizer, [weight])[0].item() == pytest.approx(1.0)
        optimizer.param_groups[0]["betas"] = (0.9, 0.984)
        trap = second_moments(optimizer, [weight])[0].item()
        assert 1.0 / trap == pytest.approx((1 - 0.984**100) / (1 - 0.999**100), rel=1e-12)
        assert 1.0 / trap == pytest.approx(8.4, abs=0.05)
        optimizer.param_groups[0]["betas"] = (0.9, 0.999)
        adjustment = Adjustment(beta2_exponent=16.0)
        with scaled_step(optimizer, adjustment):
            optimizer.step()
        assert second_moments(optimizer, [weight], adjustment)[0].item() == pytest.approx(1.0, rel=1e-12)

    def test_the_metric_reads_the_beta2_of_the_last_step(self):
        """Unit gradients: ``v`` is 1 under the beta2 that made it, and warm by that one's memory."""
        weight, adjustment = Parameter(torch.zeros(1, dtype=torch.float64)), Adjustment(beta2_exponent=16.0)
        optimizer, previous = optim.Adam([weight], betas=(0.9, 0.999), eps=0.0), UNTOUCHED
        for _ in range(20):
            weight.grad = torch.ones(1, dtype=torch.float64)
            with scaled_step(optimizer, adjustment, previous):
                optimizer.step()
            previous = adjustment
        assert metric_scales(optimizer, [weight], adjustment)[0].item() == pytest.approx(1.0, rel=1e-12)
        assert metric_scales(optimizer, [weight]) is None

    def test_each_group_keeps_its_own(self):
        optimizer, parameters = two_groups(OPTIMIZERS["adam"])
        take_steps(optimizer, parameters, 30)
        with scaled_step(optimizer, Adjustment(beta2_exponent=0.5)):
            assert [group["betas"] for group in optimizer.param_groups] == [(0.0, 0.9**0.5), (0.0, 0.99**0.5)]
        assert [group["betas"] for group in optimizer.param_groups] == [(0.0, 0.9), (0.0, 0.99)]

    def test_rmsprop_changes_alpha_and_nothing_else(self):
        optimizer, parameters = two_groups(OPTIMIZERS["rmsprop"])
        take_steps(optimizer, parameters, 3)
        kept = optimizer.state[parameters[0]]["square_avg"].clone()
        with scaled_step(optimizer, Adjustment(beta2_exponent=0.5)):
            assert optimizer.param_groups[0]["alpha"] == 0.9**0.5
            assert torch.equal(optimizer.state[parameters[0]]["square_avg"], kept)
        assert optimizer.param_groups[0]["alpha"] == 0.9

    def test_betas_that_are_tensors_stay_tensors(self):
        weight = Parameter(torch.zeros(2))
        optimizer = optim.Adam([weight], betas=(torch.tensor(0.9), torch.tensor(0.999)), foreach=False)
        own = optimizer.param_groups[0]["betas"]
        weight.grad = torch.ones(2)
        with scaled_step(optimizer, Adjustment(beta2_exponent=16.0)):
            assert optimizer.param_groups[0]["betas"][1].item() == pytest.approx(0.999**16, rel=1e-6)
            optimizer.step()
        assert optimizer.param_groups[0]["betas"] is own
        assert torch.equal(own[1], torch.tensor(0.999))

    def test_the_first_step_needs_no_correction(self):
        optimizer, parameters = two_groups(OPTIMIZERS["adam"])
        with scaled_step(optimizer, Adjustment(beta2_exponent=2.0, second_moment_factor=0.5)):
            take_steps(optimizer, parameters, 1)
        moment = second_moments(optimizer, parameters, Adjustment(beta2_exponent=2.0))[0]
        torch.testing.assert_close(moment, parameters[0].grad.square())

    def test_a_state_made_ahead_of_the_first_step(self):
        optimizer, parameters = two_groups(OPTIMIZERS["adam"])
        take_steps(optimizer, parameters, 1)
        for p in parameters:
            for value in optimizer.state[p].values():
                value.zero_()
        assert second_moments(optimizer, parameters) == [None] * 3
        with scaled_step(optimizer, Adjustment(beta2_exponent=2.0)):
            take_steps(optimizer, parameters, 1)
        moment = second_moments(optimizer, parameters, Adjustment(beta2_exponent=2.0))[0]
        torch.testing.assert_close(moment, parameters[0].grad.square())


class TestSecondMomentFactor:
    @EVERY
    def test_scales_what_the_step_divides_by(self, make):
        optimizer, parameters = two_groups(make)
        take_steps(optimizer, parameters, 30)
        before = second_moments(optimizer, parameters)
        with scaled_step(optimizer, Adjustment(second_moment_factor=0.3)):
            for v, old in zip(second_moments(optimizer, parameters), before, strict=True):
                torch.testing.assert_close(v, 0.3 * old, rtol=1e-9, atol=0.0)

    def stationary(self, beta1: float, coupling: LearningRate, wait: int) -> tuple[float, float]:
        """Pure noise, batch 64 then 256: RMS update after over RMS update before, and its standard error."""
        generator, dimension, beta2 = torch.Generator().manual_seed(2), 2000, 0.995
        weight = Parameter(torch.zeros(dimension))
        optimizer, previous = optim.Adam([weight], lr=1.0, betas=(beta1, beta2)), UNTOUCHED
        squares: list[Tensor] = []
        change = 1000
        for t in range(change + wait + 8):
            n = 64.0 if t < change else 256.0
            adjustment = coupling.adjust(n, NoiseEstimate(0.0, float(dimension)), previous)
            weight.grad = torch.randn(dimension, generator=generator) / math.sqrt(n)
            old = weight.detach().clone()
            with scaled_step(optimizer, adjustment, previous):
                optimizer.step()
            previous = adjustment
            squares.append((weight.detach() - old).square())
        after, before = torch.stack(squares[-8:]).mean(0), torch.stack(squares[change - 8 : change]).mean(0)
        ratio = math.sqrt(after.mean() / before.mean())
        # Relative variances of two means over the coordinates, halved by the root.
        variance = sum(float(x.var() / x.mean() ** 2) / dimension for x in (after, before)) / 4.0
        return ratio, ratio * math.sqrt(variance)

    @pytest.mark.parametrize(("beta1", "wait"), [(0.0, 0), (0.9, 30)], ids=["no momentum", "momentum"])
    def test_takes_away_the_lag_after_a_growth(self, beta1, wait):
        ratio, error = self.stationary(beta1, LearningRate(rescale_second_moment=True), wait)
        assert ratio == pytest.approx(1.0, abs=5 * error)
        lagging, error = self.stationary(beta1, LearningRate(), wait)
        # By then v has learnt 1 - beta2^(wait + 4) of the way down from 1 to 1/4.
        v = 0.25 + 0.75 * 0.995 ** (wait + 4.5)
        assert lagging == pytest.approx(0.5 / math.sqrt(v), abs=5 * error)
        assert 5 * error < 0.2

    def test_the_first_moment_still_holds_the_old_noise(self):
        """The limit that LearningRate names: with momentum, updates right after are longer, below the root of 4."""
        ratio, error = self.stationary(0.9, LearningRate(rescale_second_moment=True), wait=0)
        assert 1.0 + 5 * error < ratio < 2.0

    def test_a_growth_and_back_is_no_change(self):
        optimizer, parameters = two_groups(OPTIMIZERS["rmsprop centered"])
        take_steps(optimizer, parameters, 30)
        kept = optimizer.state[parameters[0]]["square_avg"].clone()
        for factor in (0.25, 4.0):
            with scaled_step(optimizer, Adjustment(second_moment_factor=factor)):
                pass
        torch.testing.assert_close(optimizer.state[parameters[0]]["square_avg"], kept, rtol=1e-12, atol=0.0)


class TestScaledStep:
    @pytest.mark.parametrize("kind", [optim.SGD, optim.Adam])
    def test_the_step_is_that_of_the_scaled_rate(self, kind):
        scaled, plain = Parameter(torch.ones(3)), Parameter(torch.ones(3))
        one, two = kind([scaled], lr=0.3), kind([plain], lr=0.3 * 1.7)
        scaled.grad, plain.grad = torch.ones(3), torch.ones(3)
        with scaled_step(one, Adjustment(lr_factor=1.7)):
            one.step()
        two.step()
        assert torch.equal(scaled, plain)
        assert one.param_groups[0]["lr"] == 0.3

    def test_untouched_is_a_plain_step(self):
        touched, plain = (two_groups(OPTIMIZERS["adam"]) for _ in range(2))
        for optimizer, parameters in (touched, plain):
            take_steps(optimizer, parameters, 12)
        with scaled_step(touched[0], UNTOUCHED):
            take_steps(*touched, 1)
        take_steps(*plain, 1)
        assert all(torch.equal(p, q) for p, q in zip(touched[1], plain[1], strict=True))

    def test_a_rate_that_is_a_tensor_keeps_its_place_and_bits(self):
        weights = [Parameter(torch.zeros(2)) for _ in range(3)]
        shared, own = torch.tensor(0.1), torch.tensor(0.7)
        groups = [{"params": [p], "lr": lr} for p, lr in zip(weights, (shared, shared, own), strict=True)]
        optimizer = optim.Adam(groups, foreach=False)
        # Divided out again, some of these factors would leave another last bit.
        for factor in np.linspace(1.01, 3.99, 20).tolist():
            with scaled_step(optimizer, Adjustment(lr_factor=factor)):
                assert optimizer.param_groups[0]["lr"] is shared
                assert (shared.item(), own.item()) == pytest.approx((0.1 * factor, 0.7 * factor), rel=1e-6)
            assert torch.equal(torch.stack([shared, own]), torch.tensor([0.1, 0.7]))

    @pytest.mark.parametrize("name", ["adam foreach", "adam amsgrad", "rmsprop centered"])
    def test_an_error_inside_leaves_everything_as_it_was(self, name):
        optimizer, parameters = two_groups(OPTIMIZERS[name])
        take_steps(optimizer, parameters, 12)
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        moments = second_moments(optimizer, parameters)
        adjustment = Adjustment(lr_factor=2.0, beta2_exponent=0.3, second_moment_factor=0.4)

        def fail() -> None:
            with scaled_step(optimizer, adjustment):
                assert optimizer.param_groups[0]["lr"] == 2.0 * LR
                assert not torch.allclose(second_moments(optimizer, parameters, adjustment)[0], moments[0])
                raise InterruptedError

        with pytest.raises(InterruptedError):
            fail()
        assert [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups] == settings
        for v, kept in zip(second_moments(optimizer, parameters), moments, strict=True):
            torch.testing.assert_close(v, kept, rtol=1e-12, atol=0.0)

    @pytest.mark.parametrize("name", ["StepLR", "OneCycleLR"])
    def test_schedulers_see_nothing(self, name):
        def train(coupled: bool) -> list[tuple[float, ...]]:
            optimizer, parameters = two_groups(adam_like(optim.Adam))
            scheduler: optim.lr_scheduler.LRScheduler
            if name == "StepLR":
                scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
            else:
                # Cycles beta1 in the same tuple that holds beta2.
                scheduler = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.5, 0.2], total_steps=20)
            coupling, previous, seen = LearningRate("sqrt", beta2="half-life"), UNTOUCHED, []
            for t in range(15):
                adjustment = coupling.adjust(64.0 * (1 + t), NoiseEstimate(1.0, 1.0), previous)
                with scaled_step(optimizer, adjustment if coupled else UNTOUCHED, previous if coupled else UNTOUCHED):
                    take_steps(optimizer, parameters, 1, seed=t)
                previous = adjustment
                scheduler.step()
                seen.append((*scheduler.get_last_lr(), *(b for g in optimizer.param_groups for b in g["betas"])))
            assert previous.lr_factor > 2.0
            return seen

        rates = train(coupled=True)
        assert rates == train(coupled=False)
        assert len(set(rates)) > 4


class TestRefusals:
    weight = Parameter(torch.zeros(2))

    @pytest.mark.parametrize("kind", [optim.SGD, optim.Adadelta, optim.Adamax])
    @pytest.mark.parametrize("read", [second_moments, metric_scales])
    def test_no_metric_without_a_second_moment(self, kind, read):
        with pytest.raises(ValueError, match=rf'Adagrad\), got {kind.__name__}; use metric="euclidean"'):
            read(kind([self.weight], lr=0.1), [self.weight])

    def test_parameters_of_another_kind(self):
        with pytest.raises(ValueError, match=r"held by the optimizer, got one of shape \(3,\) that is in none"):
            metric_scales(optim.Adam([self.weight]), [Parameter(torch.zeros(3))])
        wave = Parameter(torch.zeros(2, dtype=torch.complex64))
        with pytest.raises(ValueError, match=r"must be real for a metric, got one of torch.complex64; train"):
            second_moments(optim.Adam([wave]), [wave])

    @pytest.mark.parametrize(
        ("kind", "coupling", "adjustment", "message"),
        [
            (
                optim.SGD,
                LearningRate(rescale_second_moment=True),
                Adjustment(second_moment_factor=0.5),
                r"got SGD; use LearningRate\(rescale_second_moment=False\)",
            ),
            (
                optim.SGD,
                LearningRate(beta2="half-life"),
                Adjustment(beta2_exponent=2.0),
                r'got SGD; use LearningRate\(beta2="fixed"\)',
            ),
            (
                optim.Adagrad,
                LearningRate(beta2="half-life"),
                Adjustment(beta2_exponent=2.0),
                r'must have a beta2 \(or alpha\), got Adagrad; use LearningRate\(beta2="fixed"\)',
            ),
        ],
        ids=["rescale SGD", "half-life SGD", "half-life Adagrad"],
    )
    def test_couplings_without_their_state(self, kind, coupling, adjustment, message):
        optimizer = kind([self.weight], lr=0.1)
        with pytest.raises(ValueError, match=message):
            require_coupling(optimizer, coupling)
        block = scaled_step(optimizer, replace(adjustment, lr_factor=2.0))
        with pytest.raises(ValueError, match=message):
            block.__enter__()
        assert optimizer.param_groups[0]["lr"] == 0.1
        require_coupling(optimizer, LearningRate("linear"))
        require_coupling(optim.RMSprop([self.weight]), coupling)


@pytest.mark.parametrize("steps", [0, 1, 30])
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_counts_on_a_device_give_the_same_factors_without_a_read(monkeypatch, steps: int, factor: float):
    """As fused and capturable optimizers count there: the factor stays a tensor beside the count."""
    ends = []
    for on_host in (True, False):
        monkeypatch.setattr(optimizer_state, "_on_host", lambda count, on_host=on_host: on_host)
        weight, moved = Parameter(torch.zeros(2, dtype=torch.float64)), Adjustment(beta2_exponent=4.0)
        adam = optim.Adam([weight], lr=LR, betas=(0.9, 0.99), fused=True)
        for _ in range(steps):
            weight.grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
            adam.step()
        weight.grad = torch.tensor([0.5, 3.0], dtype=torch.float64)
        with scaled_step(adam, replace(moved, second_moment_factor=factor), UNTOUCHED):
            adam.step()
        ends.append(torch.stack([weight.detach(), adam.state[weight]["exp_avg_sq"]]))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)
