"""seal.py: in the first windows every gradient is looked at, later all of them in turn."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from adaptbatch.seal import EVERY, FIRST, PARTS, GradientSeal, checks_all


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


@pytest.mark.parametrize("count", [8, 40, 200])
def test_in_between_every_gradient_has_its_turn(count: int):
    parameters, parts = gradients(count), min(PARTS, count // 4)
    turns = [noticed(parameters, FIRST + 1 + t) for t in range(parts)]
    assert [sum(column) for column in zip(*turns, strict=True)] == [1] * count
    assert max(sum(row) for row in turns) == -(-count // parts)


def test_a_handful_is_looked_at_whole():
    assert all(noticed(gradients(7), FIRST + 3))


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
