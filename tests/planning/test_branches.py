"""planning/branches.py: short trainings from one state say which batch costs nothing; the training is untouched."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import adaptbatch as ab
from adaptbatch.planning.verdict import judge

DATA = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))


def loss_of(model: nn.Module, item: Any) -> tuple[Tensor, int]:
    (x,) = item
    return (model(x) - x.sum(1, keepdim=True)).square().mean(), len(x)


def validate(model: nn.Module) -> Tensor:
    return loss_of(model, (DATA,))[0]


class Job:
    """A training whose every random number counts."""

    def __init__(self, scaled: bool) -> None:
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3, 0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=4) if scaled else None
        self.generator = torch.Generator().manual_seed(3)
        data = torch.utils.data.TensorDataset(DATA)
        self.loader = torch.utils.data.DataLoader(data, 16, shuffle=True, generator=self.generator)
        self.controller = ab.BatchController(self.model, self.optimizer, rule=ab.Fixed(2), scaler=self.scaler)
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)

    def epoch(self) -> None:
        for item in self.controller.micro_batches(self.loader):
            self.controller.backward(*loss_of(self.model, item))
            if self.controller.step_due:
                self.controller.step()
                self.scheduler.step()

    def branches(self, **options: Any) -> Any:
        options = {"batches": (1, 2, 4), "examples": 256, "repeats": 2, "progress": False} | options
        return ab.critical_batch(self.controller, self.loader, loss_of, options.pop("validate", validate), **options)

    def state(self) -> list[Any]:
        tensors = [*self.model.state_dict().values()]
        tensors += [torch.as_tensor(v) for s in self.optimizer.state.values() for v in s.values()]
        tensors += [torch.get_rng_state(), self.generator.get_state()]
        scaler = None if self.scaler is None else self.scaler.state_dict()
        numbers = (random.getstate(), str(np.random.get_state()), self.optimizer.param_groups[0]["lr"])  # noqa: NPY002
        return [[t.clone() for t in tensors], scaler, numbers, [m.training for m in self.model.modules()]]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and one[1:] == other[1:]


class TestUntouched:
    @pytest.mark.parametrize("scaled", [False, True])
    def test_a_training_that_was_asked_in_between_is_the_one_that_was_not(self, scaled: bool):
        states = []
        for asked in (False, True):
            job = Job(scaled)
            job.epoch()
            if asked:
                found = job.branches(examples=(128, 256))
                assert found.table["loss"].notna().all()
            job.epoch()
            states.append(job.state())
        assert same(*states)

    @pytest.mark.parametrize("error", [KeyError("mine"), KeyboardInterrupt()])
    def test_also_after_an_error(self, error: BaseException):
        job, calls = Job(False), []
        job.epoch()
        twin = Job(False)
        twin.epoch()

        def fails(model: nn.Module) -> float:
            calls.append(model.training)
            if len(calls) == 3:
                raise error
            return 1.0

        with pytest.raises(type(error)):
            job.branches(validate=fails)
        assert calls == [False] * 3
        assert same(job.state(), twin.state())

    def test_gradients_and_hooks_are_those_of_before(self):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        gradients = [torch.ones_like(p) for p in model.parameters()]
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        items = [(x,) for x in DATA.split(16)]
        ab.critical_batch((model, optimizer), items, loss_of, validate, (1, 2), examples=128, progress=False)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            assert p.grad is gradient
            assert bool((gradient == 1.0).all())
            assert not p._backward_hooks
        assert not optimizer.state
        assert not optimizer._optimizer_step_pre_hooks


class TestBranches:
    def test_a_branch_is_the_training_by_hand(self):
        """The loss of each batch is that of a plain loop from the same state, the rate scaled, the items the same."""
        model = nn.Linear(6, 1)
        start = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        items = [(x,) for x in DATA.split(16)]
        found = ab.critical_batch(
            (model, optimizer), items, loss_of, validate, (1, 4), examples=512, repeats=2, progress=False
        )
        for size, loss in zip((1, 4), found.table["loss"], strict=True):
            losses = []
            for repeat in range(2):
                model.load_state_dict(start)
                other = torch.optim.SGD(model.parameters(), lr=0.01 * size**0.5, momentum=0.9)
                mine = (items * 2)[32 * repeat : 32 * repeat + 32]
                for begin in range(0, 32, size):
                    for item in mine[begin : begin + size]:
                        (loss_of(model, item)[0] / size).backward()
                    other.step()
                    other.zero_grad()
                losses.append(float(validate(model).detach()))
            assert loss == pytest.approx(np.mean(losses), rel=1e-5)

    def test_where_noise_rules_large_batches_are_free_and_where_it_does_not_they_cost(self):
        """Far from the optimum every step counts; at the floor of a high rate, averaging is all there is."""
        weight = nn.Parameter(torch.full((4,), 10.0))
        model = nn.ParameterList([weight])
        noise = [(x,) for x in 4.0 * torch.randn(512, 8, 4, generator=torch.Generator().manual_seed(0))]

        def quadratic(model: nn.Module, item: Any) -> tuple[Tensor, int]:
            (x,) = item
            return (weight.square().sum() / 2 + x.mean(0) @ weight), len(x)

        def away(model: nn.Module) -> Tensor:
            return weight.square().sum() / 2 + 1.0

        outcomes = {}
        for name, where, lr in (("far", 10.0, 0.002), ("near", 0.0, 0.2)):
            with torch.no_grad():
                weight.fill_(where)
            optimizer = torch.optim.SGD(model.parameters(), lr=lr)
            outcomes[name] = ab.critical_batch(
                (model, optimizer),
                noise,
                quadratic,
                away,
                (1, 2, 4, 8, 16),
                examples=1024,
                learning_rate=None,
                repeats=4,
                tolerance=0.05,
                progress=False,
            )
        assert outcomes["far"].critical == 8.0
        assert outcomes["far"].excluded == 16.0
        assert outcomes["near"].critical == 128.0
        assert np.isinf(outcomes["near"].excluded)
        assert any("anneals" in note for note in outcomes["near"].notes)

    def test_the_verdict_feeds_the_plan_and_the_rule(self):
        losses = {(size, 64): [1.0 + 0.001 * size + 0.01 * r for r in range(4)] for size in (1, 2, 4, 8, 16, 32)}
        rows = pd.DataFrame({"grad_sq_norm": [1.0] * 40, "noise_trace": [90.0, 110.0] * 20})
        found = judge(losses, rows.assign(global_batch=32.0), weight=16.0, tolerance=0.01, confidence=0.95)
        # A loss of 0.001 a size is 1 % above that of size one at size eleven.
        assert (found.critical, found.excluded) == (8 * 16.0, 16 * 16.0)
        assert found.calibration == pytest.approx(1.28, rel=0.01)
        assert ab.RelativeStandardError(theta=found.theta).theta == pytest.approx(1.28**-0.5, rel=0.01)
        assert "256 is shown to be worse" in repr(found)
        assert "<table" in found._repr_html_()

    def test_a_branch_that_diverged_is_worse_than_all(self):
        losses = {(1, 8): [1.0, 1.1], (2, 8): [1.0, float("nan")], (4, 8): [1.0, 1.1]}
        found = judge(losses, pd.DataFrame({"noise_trace": []}), 16.0, 0.01, 0.95)
        assert found.table["within"].tolist() == [True, False, True]
        assert found.table["worse"].tolist() == [False, True, False]


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batches": (4,)}, ValueError, r"batches must be at least 2 different sizes, got batches = \[4\]"),
    ({"batches": (0, 2)}, ValueError, r"batches must be whole, of at least 1, got batches = \[0, 2\]"),
    ({"repeats": 1}, ValueError, r"repeats must be whole, of at least 2, got repeats = 1"),
    ({"reference": 0}, ValueError, r"reference must be whole, of at least 1, got reference = 0"),
    ({"examples": 0.0}, ValueError, r"examples must be positive and finite, got examples = 0.0"),
    ({"examples": ()}, ValueError, r"examples must be a length or a few, got examples = \[\]"),
    ({"examples": 20.0}, ValueError, r"examples must be at least one window of the largest batch, got examples = 20"),
    ({"tolerance": -1.0}, ValueError, r"tolerance must be positive and finite, got tolerance = -1.0"),
    ({"confidence": 0.5}, ValueError, r"confidence must be in \(0.5, 1\), got confidence = 0.5"),
    ({"learning_rate": "cube"}, ValueError, r"learning_rate must be 'sqrt', 'linear' or None, got .*'cube'"),
    ({"loss_fn": None}, TypeError, r"loss_fn must be a function, got loss_fn = None"),
    ({"loss_fn": lambda model, item: 1.0}, ValueError, r"loss_fn must give \(loss, weight\), .* got float"),
    ({"validate": lambda model: "low"}, ValueError, r"validate must give one number, .* got str"),
    ({"loader": iter([])}, TypeError, r"loader must be iterable anew, got list_iterator"),
    ({"trained": 3}, TypeError, r"trained must be a BatchController or the pair \(model, optimizer\), got int"),
    ({"scaler": 3}, ValueError, r"scaler must be a torch.amp.GradScaler or None, got int"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_input_costs_nothing(options: dict[str, Any], error: type[Exception], message: str):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    given: dict[str, Any] = {
        "trained": (model, optimizer),
        "loader": [(x,) for x in DATA.split(16)],
        "loss_fn": loss_of,
        "validate": validate,
        "batches": (1, 2, 4),
        "examples": 256,
        "progress": False,
    }
    given |= options
    places: list[Callable[[], Any]] = [given.pop(name) for name in ("trained", "loader", "loss_fn", "validate")]
    with pytest.raises(error, match=message):
        ab.critical_batch(*places, **given)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_an_open_window_is_refused():
    job = Job(False)
    job.controller.backward(*loss_of(job.model, (DATA[:16],)))
    with pytest.raises(RuntimeError, match=r"critical_batch\(\) is for between windows, got one with 1 of 2"):
        job.branches()


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch):
    job = Job(False)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"critical_batch\(\) is for one process, got 2 ranks; load a checkpoint"):
        job.branches()
