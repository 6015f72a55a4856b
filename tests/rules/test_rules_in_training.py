"""Every rule in a real loop: the controller measures what each of them asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import adaptbatch as ab
from tests.models import batches, run, small_model, squared

RULES = {
    "clt": ab.RelativeStandardError(),
    "plain moments": ab.RelativeStandardError(channel="pooled"),
    "norm test": ab.rules.NormTest(theta=0.3),
    "debiased": ab.rules.NormTest(theta=0.3, debiased=True, grow_only=False),
    "inner product": ab.rules.InnerProductTest(theta=0.3, nu=0.3),
    "cosine": ab.rules.CosineSimilarity(),
    "noise scale": ab.rules.NoiseScale(),
    "pareto": ab.Pareto(price=1000.0),
    "goodput": ab.rules.Goodput(initial_batch=8.0),
    "cabs": ab.rules.CABS(scale=100.0),
    "dive batch": ab.rules.DiveBatch(delta=1.0, epoch_examples=200.0),
    "schedule": ab.Schedule(examples=(0, 400), accumulation_steps=(1, 3)),
    "seesaw": ab.rules.Seesaw(start=1, milestones=(400.0, 800.0)),
    "increments": ab.Ramp(start=1, stop=5, examples=1000, shape="increments", increment=2),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_finds_what_it_asks_for(rule):
    """Not one of them is left without its evidence, and every example is used."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    controller = ab.BatchController(model, optimizer, rule=rule, limits=ab.Limits(max_steps=8))
    run(controller, batches([4] * 400))
    rows = controller.history.to_pandas()
    assert rows["examples_seen"].iloc[-1] == 1600.0
    settled = rows.iloc[len(rows) // 2 :]
    assert (settled["reason"] != "undecided").any()
    assert settled["target_batch"].notna().any()


def test_the_time_model_is_measured():
    model = small_model()
    controller = ab.BatchController(
        model, torch.optim.SGD(model.parameters(), lr=1e-3), rule=ab.rules.Goodput(initial_batch=8.0)
    )
    run(controller, batches([4] * 100))
    evidence = controller._state.evidence()
    assert evidence.step_seconds > 0.0
    assert evidence.example_seconds > 0.0
    # Means of parts of the time that has passed.
    wall = controller.history.to_pandas()["wall_seconds"].iloc[-1]
    assert evidence.step_seconds + 8 * evidence.example_seconds < wall


def test_the_seconds_of_the_step_are_told_from_the_rest(monkeypatch):
    """By a clock that goes ten seconds in each step of the optimizer, and one in each micro-batch."""
    clock = SimpleNamespace(now=0.0)
    for module in ("controller", "sizing"):
        monkeypatch.setattr(f"adaptbatch.{module}.time", SimpleNamespace(perf_counter=lambda: clock.now))
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    controller = ab.BatchController(model, optimizer, rule=ab.Fixed(3))

    def pass_by(seconds: float) -> None:
        clock.now += seconds

    optimizer.register_step_post_hook(lambda *_: pass_by(10.0))
    for x in controller.micro_batches(batches([4] * 30)):
        pass_by(1.0)
        controller.backward(squared(model, x), weight=len(x))
        if controller.step_due:
            controller.step()
    evidence = controller._state.evidence()
    assert evidence.step_seconds == pytest.approx(10.0)
    assert evidence.example_seconds == pytest.approx(3.0 / 12.0)
    assert controller.history.to_pandas()["wall_seconds"].tolist() == pytest.approx([13.0 * n for n in range(1, 11)])
