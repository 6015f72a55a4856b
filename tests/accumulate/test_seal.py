"""seal.py: in the first windows every gradient is looked at, later all of them in turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from adaptbatch.accumulate.seal import EVERY, FIRST, HANDFUL, PARTS, SELDOM, GradientSeal, checks_all


def gradients(count: int) -> list[Parameter]:
    made = [Parameter(torch.ones(3)) for _ in range(count)]
    for index, p in enumerate(made):
        p.grad = torch.full((3,), 1.0 + index)
    return made


def noticed(parameters: list[Parameter], turn: int) -> list[bool]:
    """Of a write to each gradient alone, whether it is noticed."""
    found = []
    for p in parameters:
        seal = GradientSeal()
        seal.close(parameters, turn)
        assert p.grad is not None
        p.grad.data.mul_(0.5)
        found.append(bool(seal.rewritten()))
        p.grad.data.mul_(2.0)
    return found


@pytest.mark.parametrize("turn", [0, FIRST - 1, EVERY, 3 * EVERY])
def test_habits_show_in_the_first_windows_and_now_and_then(turn: int):
    assert checks_all(turn)
    assert all(noticed(gradients(40), turn))


def first_noticed(count: int, period: int, write: Callable[[Tensor], object], which: slice) -> int:
    """The micro-batches until writes to some gradients, after one micro-batch in ``period``, are noticed."""
    parameters, seal, since = gradients(count), GradientSeal(), FIRST + 1
    for micro_batch in range(1, 10_000):
        seal.close(parameters, since)
        if micro_batch % period == 0:
            for p in parameters[which]:
                assert p.grad is not None
                write(p.grad)
        if not seal.stamped(parameters) or seal.rewritten():
            return micro_batch
    raise AssertionError("never noticed")


@pytest.mark.parametrize("period", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [HANDFUL, 20, 40, 200])
class TestInBetween:
    def test_what_is_done_to_all_is_noticed_at_once(self, count: int, period: int):
        assert first_noticed(count, period, lambda g: g.add_(1.0), slice(None)) == period
        assert first_noticed(count, period, lambda g: g.data.add_(1.0), slice(None)) <= period * SELDOM

    @pytest.mark.parametrize("index", [0, 7, -1])
    def test_every_gradient_has_its_turn(self, count: int, period: int, index: int):
        one = slice(index, index + 1 or None)
        assert first_noticed(count, period, lambda g: g.add_(1.0), one) <= period * SELDOM
        assert first_noticed(count, period, lambda g: g.data.add_(1.0), one) <= period * SELDOM * PARTS


def test_a_handful_is_looked_at_whole():
    assert all(noticed(gradients(HANDFUL - 1), FIRST + 3))


def test_gradients_that_come_or_go_are_noticed_and_nan_is_itself():
    parameters, seal = gradients(3), GradientSeal()
    parameters[0].grad = torch.full((3,), torch.nan)
    seal.close(parameters, 0)
    assert not seal.rewritten()
    for p in parameters:
        p.grad = None
    assert seal.rewritten()
    assert not seal.stamped(parameters)


def test_parameters_that_are_added_have_none():
    parameters, seal = gradients(3), GradientSeal()
    seal.close(parameters, 0)
    assert seal.stamped([*parameters, Parameter(torch.ones(2))])
    assert not seal.stamped(gradients(4))
