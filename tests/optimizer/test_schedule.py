"""schedule.py: whatever the windows, the learning rate after n examples is the plain loop's, and the end is the end."""

from __future__ import annotations

import io
import itertools
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs

import adaptbatch as ab
from adaptbatch.optimizer.schedule import ScheduleDriver
from tests.searches import costly

UNIT = 32
Make = Callable[[Optimizer, int], lrs.LRScheduler]


def sgd(lr: float = 0.5) -> Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=lr, momentum=0.9)


def cosine(optimizer: Optimizer, total: int) -> lrs.LRScheduler:
    return lrs.CosineAnnealingLR(optimizer, T_max=total)


def warm_then_cosine(optimizer: Optimizer, total: int) -> lrs.LRScheduler:
    parts = [lrs.LinearLR(optimizer, 0.1, total_iters=total // 4), cosine(optimizer, total - total // 4)]
    return lrs.SequentialLR(optimizer, parts, milestones=[total // 4])


def warm_times_decay(optimizer: Optimizer, total: int) -> lrs.LRScheduler:
    return lrs.ChainedScheduler([warm_then_cosine(optimizer, total), lrs.ExponentialLR(optimizer, 0.99)])


SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda optimizer, total: lrs.LambdaLR(optimizer, lambda step: 1.0 - step / total),
    "MultiplicativeLR": lambda optimizer, total: lrs.MultiplicativeLR(optimizer, lambda step: 0.97),
    "StepLR": lambda optimizer, total: lrs.StepLR(optimizer, 7),
    "MultiStepLR": lambda optimizer, total: lrs.MultiStepLR(optimizer, [total // 3, total // 2]),
    "ConstantLR": lambda optimizer, total: lrs.ConstantLR(optimizer, total_iters=total // 2),
    "LinearLR": lambda optimizer, total: lrs.LinearLR(optimizer, total_iters=total),
    "ExponentialLR": lambda optimizer, total: lrs.ExponentialLR(optimizer, 0.9),
    "PolynomialLR": lambda optimizer, total: lrs.PolynomialLR(optimizer, total),
    "CosineAnnealingLR": cosine,
    "CosineAnnealingWarmRestarts": lambda optimizer, total: lrs.CosineAnnealingWarmRestarts(optimizer, 5),
    "CyclicLR": lambda optimizer, total: lrs.CyclicLR(optimizer, 0.1, 0.5, 5),
    "OneCycleLR": lambda optimizer, total: lrs.OneCycleLR(optimizer, 0.5, total_steps=total),
    "SequentialLR": warm_then_cosine,
    "ChainedScheduler": warm_times_decay,
}


def plain(make: Make, total: int) -> list[list[float]]:
    """The learning rates of one call a micro-batch, before the first and after each."""
    optimizer = sgd()
    scheduler = make(optimizer, total)
    rates = [scheduler.get_last_lr()]
    for _ in range(total):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr())
    return rates


def driven(
    make: Callable[[Optimizer, int], lrs.LRScheduler], total: int, unit: float
) -> tuple[Optimizer, ScheduleDriver]:
    optimizer = sgd()
    return optimizer, ScheduleDriver(make(optimizer, total), unit=unit)


@pytest.mark.parametrize("name", SCHEDULERS)
@costly(15)
@given(windows=st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_after_every_window_it_is_the_plain_loop(name: str, windows: list[int]):
    make, total = SCHEDULERS[name], sum(windows)
    rates = plain(make, total)
    optimizer, driver = driven(make, total, UNIT)
    for steps in itertools.accumulate(windows):
        optimizer.step()
        driver.advance_to(steps * UNIT)
        assert driver.steps == steps
        assert driver.scheduler.get_last_lr() == rates[steps] == [group["lr"] for group in optimizer.param_groups]


@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=12),
    total=st.integers(1, 60),
    name=st.sampled_from(["LambdaLR", "CosineAnnealingLR", "SequentialLR", "OneCycleLR"]),
)
def test_any_windows_and_any_total_end_on_the_budget(sizes: list[int], total: int, name: str):
    make, budget = SCHEDULERS[name], sum(sizes)
    optimizer, driver = driven(make, max(total, 4), budget / max(total, 4))
    for seen in itertools.accumulate(sizes):
        optimizer.step()
        driver.advance_to(float(seen))
    assert driver.steps == max(total, 4)
    assert driver.scheduler.get_last_lr() == plain(make, max(total, 4))[-1]


@given(unit=st.integers(1, 10_000), steps=st.integers(0, 90), left=st.integers(0, 9_999))
def test_whole_numbers_are_floored_exactly(unit: int, steps: int, left: int):
    optimizer, driver = driven(SCHEDULERS["StepLR"], 1, unit)
    optimizer.step()
    driver.advance_to(steps * unit + left % unit)
    assert driver.steps == steps


@pytest.mark.parametrize("weight", [0.1, 1 / 3, 1e-3, 2.0**40 / 3])
def test_a_sum_that_rounds_down_is_not_late(weight: float):
    optimizer, driver = driven(SCHEDULERS["StepLR"], 1, 10 * weight)
    optimizer.step()
    seen, steps = 0.0, []
    for _ in range(1000):
        seen += weight
        driver.advance_to(seen)
        steps.append(driver.steps)
    assert steps == [index // 10 for index in range(1, 1001)]


def test_a_partial_last_window_ends_on_the_budget_and_no_call_is_too_many():
    optimizer, driver = driven(SCHEDULERS["OneCycleLR"], 10, UNIT)
    for seen in (4 * UNIT, 9 * UNIT + 5, 10 * UNIT, 10 * UNIT + 31, 14 * UNIT):
        optimizer.step()
        driver.advance_to(seen)
    assert driver.total_steps == driver.steps == 10
    with pytest.raises(ValueError, match="Tried to step 11 times"):
        driver.scheduler.step()


def test_a_given_total_keeps_a_cosine_from_climbing_again():
    optimizer = sgd()
    driver = ScheduleDriver(cosine(optimizer, 8), unit=UNIT, total_steps=8)
    optimizer.step()
    driver.advance_to(13 * UNIT)
    assert driver.steps == 8
    assert driver.scheduler.get_last_lr() == [0.0]


@pytest.mark.parametrize("name", ["LambdaLR", "SequentialLR", "ChainedScheduler", "OneCycleLR"])
def test_nothing_warns_though_the_first_windows_were_skipped(name: str):
    optimizer, driver = driven(SCHEDULERS[name], 12, UNIT)
    for seen in (2, 5, 7):
        driver.advance_to(seen * UNIT)
    optimizer.step()
    driver.advance_to(12 * UNIT)
    assert driver.scheduler.get_last_lr() == plain(SCHEDULERS[name], 12)[-1]


def test_warnings_of_the_scheduler_itself_are_heard():
    class Loud(lrs.StepLR):
        def step(self, epoch: int | None = None) -> None:
            super().step(epoch)
            if self.last_epoch > 0:
                warnings.warn("a rate of its own", stacklevel=1)

    driver = ScheduleDriver(Loud(sgd(), 3), unit=UNIT)
    with pytest.warns(UserWarning, match="a rate of its own"):
        driver.advance_to(UNIT)


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"CyclicLR"}))
@pytest.mark.parametrize("stop", [1, 3])
def test_a_resumed_run_goes_on_to_the_last_bit(name: str, stop: int):
    ends = [3, 5, 11, 12, 20]

    def advance(optimizer: Optimizer, driver: ScheduleDriver, part: Sequence[int]) -> list[list[float]]:
        rates = []
        for steps in part:
            optimizer.step()
            driver.advance_to(steps * UNIT)
            rates.append(driver.scheduler.get_last_lr())
        return rates

    whole = advance(*driven(SCHEDULERS[name], 20, UNIT), ends)
    optimizer, driver = driven(SCHEDULERS[name], 20, UNIT)
    first = advance(optimizer, driver, ends[:stop])
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "driver": driver.state_dict()}, file)
    file.seek(0)
    saved, schedule = torch.load(file, weights_only=True), driver.scheduler.state_dict()
    optimizer, driver = driven(SCHEDULERS[name], 20, UNIT)
    optimizer.load_state_dict(saved["optimizer"])
    driver.scheduler.load_state_dict(schedule)
    driver.load_state_dict(saved["driver"])
    assert first + advance(optimizer, driver, ends[stop:]) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surplus": 1}, r"state must have exactly the known keys, got unknown \['surplus'\] and missing \[\]"),
        ({"version": 7}, r"state\['version'\] must be 1, got 7; .* another release"),
        ({"unit": 64.0}, r"state\['unit'\] must be 32\.0, got 64\.0; make the driver with the unit"),
        ({"total_steps": 9}, r"state\['total_steps'\] must be 20, got 9"),
        ({"steps": 5}, r"state\['steps'\] must be 0, got 5; load the scheduler's own state first"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_is_refused_by_name(change: dict[str, object], message: str):
    _, driver = driven(SCHEDULERS["OneCycleLR"], 20, UNIT)
    with pytest.raises(ValueError, match=message):
        driver.load_state_dict(driver.state_dict() | change)


def test_a_missing_key_is_refused_by_name():
    _, driver = driven(cosine, 20, UNIT)
    with pytest.raises(ValueError, match=r"got unknown \[\] and missing \['unit'\]"):
        driver.load_state_dict({name: value for name, value in driver.state_dict().items() if name != "unit"})


class TestRefusals:
    def test_a_scheduler_of_validations(self):
        with pytest.raises(TypeError, match=r"got ReduceLROnPlateau.*call its step\(metric\) after each validation"):
            ScheduleDriver(lrs.ReduceLROnPlateau(sgd()), unit=UNIT)

    def test_a_wrapped_scheduler(self):
        class Wrapper:
            scheduler = cosine(sgd(), 3)

        with pytest.raises(TypeError, match=r"got Wrapper; of a wrapped one \(accelerate\) pass the scheduler inside"):
            ScheduleDriver(Wrapper(), unit=UNIT)  # type: ignore[arg-type]

    @pytest.mark.parametrize("unit", [0, -1.0, float("nan"), float("inf")])
    def test_a_unit_out_of_range(self, unit: float):
        with pytest.raises(ValueError, match=f"unit must be positive and finite, got unit = {unit!r}"):
            ScheduleDriver(cosine(sgd(), 3), unit=unit)

    @pytest.mark.parametrize("total", [0, 2.5, 11])
    def test_a_total_out_of_range(self, total: int):
        scheduler = lrs.OneCycleLR(sgd(), 0.5, total_steps=10)
        with pytest.raises(ValueError, match=f"at most the 10 of OneCycleLR, got total_steps = {total!r}; None"):
            ScheduleDriver(scheduler, unit=UNIT, total_steps=total)

    @pytest.mark.parametrize("seen", [-1.0, float("nan"), float("inf")])
    def test_examples_out_of_range(self, seen: float):
        with pytest.raises(ValueError, match="examples_seen must be finite and not negative, got examples_seen"):
            ScheduleDriver(cosine(sgd(), 3), unit=UNIT).advance_to(seen)

    def test_a_scheduler_that_someone_else_steps(self):
        optimizer, driver = driven(cosine, 30, UNIT)
        optimizer.step()
        for _ in range(3):
            driver.scheduler.step()
        with pytest.raises(ValueError, match=r"worth 2 calls at unit = 32\.0, after 3 calls; call scheduler\.step"):
            driver.advance_to(2 * UNIT)
        assert driver.steps == 3


def test_a_call_made_elsewhere_is_not_made_again():
    optimizer, driver = driven(cosine, 30, UNIT)
    optimizer.step()
    driver.scheduler.step()
    driver.advance_to(4 * UNIT)
    assert driver.steps == 4


def test_beside_a_controller_the_schedule_ends_with_the_budget():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [torch.randn(8, 3) for _ in range(13)]
    data[2][0, 0] = torch.nan  # the second window is skipped
    driver = ScheduleDriver(cosine(optimizer, 13), unit=8)
    with ab.BatchController(model, optimizer, rule=ab.rules.Replay([1, 3, 2, 4])) as controller:
        for x in controller.micro_batches(data):
            controller.backward(model(x).square().mean(), weight=len(x))
            if controller.step_due:
                controller.step()
                driver.advance_to(controller.examples_seen)
    rows = controller.history.to_pandas()
    assert rows["skipped"].tolist() == [False, True, False, False, False]
    rates = [rate for [rate] in plain(cosine, 13)]
    scaled = [rate / 5 for rate in rates]
    assert rows["lr"].tolist() == pytest.approx([scaled[at] for at in (0, 1, 4, 6, 10)], rel=1e-12)
    assert driver.steps == 13
    assert optimizer.param_groups[0]["lr"] == 0.0
