"""Siblings of the faults beside this file: other programs of the same kinds, right to rounding or refused."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils.data import DataLoader, Dataset

import adaptbatch as ab
from tests.controller.programs import controlled, goes_on
from tests.models import batches, sgd, small_model, squared


def fed(c: ab.BatchController, data: list[Tensor]) -> None:
    for x in data:
        c.backward(squared(c.model, x), weight=len(x))
        if c.step_due:
            c.step()


# --- C. a channel changes its unit -----------------------------------------------------------------------------------


def adam(model: nn.Module) -> torch.optim.Optimizer:
    # Warm after ten steps.
    return torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.9))


class TestTheUnitOfTheEvidence:
    def test_a_checkpoint_of_adams_metric_goes_on_without_it(self):
        """What was known in the metric says nothing to a controller that is Euclidean, and would decide for ever."""
        model, limits = small_model(), ab.Limits(max_steps=8)
        before = ab.BatchController(model, adam(model), metric="adam", limits=limits)
        fed(before, batches([4] * 120))
        assert not math.isnan(before.history.to_pandas()["noise_scale_metric"].iloc[-1])
        models = copy.deepcopy(model), copy.deepcopy(model)
        loaded, fresh = (ab.BatchController(m, torch.optim.SGD(m.parameters(), lr=1e-4), limits=limits) for m in models)
        loaded.load_state_dict(before.state_dict())
        for c in (loaded, fresh):
            c.limits = ab.Limits(min_steps=2, max_steps=2)
            fed(c, batches([4] * 400, seed=1))
        ours, theirs = (c.history.to_pandas().iloc[-1] for c in (loaded, fresh))
        assert math.isnan(ours["noise_scale_metric"])
        assert ours["noise_scale_typical"] == pytest.approx(theirs["noise_scale_typical"], rel=1e-9)
        # The pooled evidence was Euclidean all the time, and is kept.
        assert loaded._state.pooled.weight > 1.2 * fresh._state.pooled.weight

    def test_a_metric_whose_optimizer_forgot_its_second_moment_waits_for_it(self):
        """A warm restart by ``optimizer.state.clear()``: until it is warm again windows have no metric."""
        model = small_model()
        c = ab.BatchController(model, adam(model), rule=ab.Fixed(2), metric="adam")
        fed(c, batches([4] * 100))
        c.optimizer.state.clear()
        fed(c, batches([4] * 60, seed=1))
        rows = c.history.to_pandas()[["noise_scale_metric", "noise_scale_typical", "noise_scale"]]
        resting = rows.iloc[49:59]
        assert (resting[["noise_scale_metric", "noise_scale_typical"]].nunique() == 1).all()
        assert resting["noise_scale"].nunique() == len(resting)
        assert (rows.iloc[62:].nunique() == len(rows) - 62).all()


# --- E. the loader is asked as a plain loop asks ---------------------------------------------------------------------


class Failing(Dataset):
    """Items, of which one cannot be read."""

    def __init__(self, count: int, bad: int) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index == self.bad:
            raise OSError("disk")
        return torch.full((4,), float(index), dtype=torch.float64)


class HardFirst:
    """A loader with a length that picks what the model did worst on so far, when it is asked."""

    def __init__(self, pool: list[Tensor], model: nn.Module) -> None:
        self.pool, self.model = pool, model
        self.picked: list[int] = []

    def __len__(self) -> int:
        return len(self.pool)

    def __iter__(self) -> Iterator[Tensor]:
        left = set(range(len(self.pool)))
        while left:
            with torch.no_grad():
                worst = max(left, key=lambda index: float(squared(self.model, self.pool[index])))
            left.discard(worst)
            self.picked.append(worst)
            yield self.pool[worst]


class TestWhenTheLoaderIsAsked:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_workers_error_comes_after_every_item_before_it(self, workers: int):
        loader = DataLoader(Failing(12, bad=7), batch_size=2, num_workers=workers)
        used, plain = [], []
        c = controlled(4)

        def ours() -> None:
            for x in c.micro_batches(loader):
                c.backward(squared(c.model, x), weight=2)
                used.append(x)
                if c.step_due:
                    c.step()

        def theirs() -> None:
            for x in loader:
                plain.append(x)

        for loop in (ours, theirs):
            with pytest.raises(OSError, match="disk"):
                loop()
        assert len(used) == len(plain) == 3
        assert all(torch.equal(a, b) for a, b in zip(used, plain, strict=True))
        with pytest.warns(UserWarning, match="left within a window, which goes on with the 3 micro-batches"):
            next(c.micro_batches(batches([2])))
        goes_on(c)

    @pytest.mark.parametrize("steps", [1, 3])
    def test_a_curriculum_sees_the_model_that_a_plain_loop_shows_it(self, steps: int):
        pool = batches([3] * 9)
        ours, twin = small_model(), small_model()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in (ours, twin)]
        loaders = [HardFirst(pool, m) for m in (ours, twin)]
        c = ab.BatchController(ours, optimizers[0], rule=ab.Fixed(steps))
        for x in c.micro_batches(loaders[0]):
            c.backward(squared(ours, x), weight=3)
            if c.step_due:
                c.step()
        for index, x in enumerate(loaders[1], start=1):
            (squared(twin, x) / steps).backward()
            if index % steps == 0:
                optimizers[1].step()
                optimizers[1].zero_grad()
        assert loaders[0].picked == loaders[1].picked
        assert loaders[0].picked != sorted(loaders[0].picked)

    def test_an_endless_loader_is_asked_for_what_is_used(self):
        """``itertools.cycle`` and a budget of steps: the loader stands where a plain loop leaves it."""
        asked = itertools.count()
        c, x = controlled(3), batches([3])[0]
        for item in c.micro_batches(x + 0.1 * next(asked) for _ in itertools.count()):
            c.backward(squared(c.model, item), weight=3)
            if c.step_due:
                c.step()
                if len(c.history) == 4:
                    break
        assert next(asked) == 12


# --- F. what is not finite is absorbed in no sum ---------------------------------------------------------------------


def test_a_term_that_is_only_logged_may_be_infinite():
    """A perplexity that overflows, added without a gradient: CABS reads the loss of the windows that have one."""
    model = small_model()
    c = ab.BatchController(
        model, torch.optim.SGD(model.parameters(), lr=0.01), rule=ab.rules.CABS(), limits=ab.Limits(max_steps=4)
    )
    losses = []
    for index, x in enumerate(batches([4] * 40)):
        loss = squared(model, x)
        if index % 5 == 1:
            loss = loss + torch.tensor(1e3, dtype=torch.float64).exp()
        elif index % 5 == 3:
            loss = loss + torch.tensor(math.nan)
        c.backward(loss, weight=4)
        if c.step_due:
            c.step()
            losses.append(loss)
    rows = c.history.to_pandas()
    assert rows["skipped"].sum() == 0
    assert rows["target_batch"].iloc[2:].notna().all()
    assert math.isfinite(c._state.evidence().loss)
    finite = rows["loss"][rows["loss"].map(math.isfinite)]
    assert finite.min() <= c._state.evidence().loss <= finite.max()


def test_a_loss_that_overflows_in_half_precision_has_a_gradient_that_does_not():
    """300^2 is infinite in float16, and its slope 600: the window counts, its loss does not."""
    weight = Parameter(torch.tensor([300.0, 2.0]))
    c = ab.BatchController(nn.ParameterList([weight]), torch.optim.SGD([weight], lr=0.0), rule=ab.Fixed(2))
    for scale in (0.25, 0.25, 1.0, 1.0, 0.25, 0.25):
        c.backward((weight.half() * scale).square().sum(), weight=1)
        if c.step_due:
            c.step()
    rows = c.history.to_pandas()
    assert rows["loss"].map(math.isfinite).tolist() == [True, False, True]
    assert rows["skipped"].sum() == 0
    length = 2.0 * math.hypot(300.0, 2.0)
    assert rows["batch_grad_norm"].tolist() == pytest.approx([length / 16.0, length, length / 16.0])
    assert c._state.evidence().loss == pytest.approx(rows["loss"].iloc[0])


# --- G. no single micro-batch sets the reference ---------------------------------------------------------------------


class HalfOnTheWay(nn.Module):
    """Its gradient passes through float16, as under autocast."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.weight = Parameter(torch.randn(64, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).half().float().square().mean()


def tokens_of(sizes: list[int], c: ab.BatchController, scaler: torch.amp.GradScaler, seed: int = 0) -> None:
    """Windows of those weights, each update compared with that of the mean over all tokens in float64."""
    generator = torch.Generator().manual_seed(seed)
    model = c.model
    window: list[tuple[Tensor, int]] = []
    for size in sizes:
        x = torch.rand(64, generator=generator)
        c.backward(model(x), weight=size)
        window.append((x, size))
        if c.step_due:
            exact = model.weight.detach().double().requires_grad_()
            total = sum(n for _, n in window)
            mean = sum(n / total * (exact * x.double()).square().mean() for x, n in window)
            (want,) = torch.autograd.grad(mean, exact)
            before = model.weight.detach().clone()
            c.step()
            lr = c.optimizer.param_groups[0]["lr"]
            torch.testing.assert_close((before - model.weight.detach()) / lr, want.float(), rtol=5e-3, atol=2e-5)
            window = []


class TestWeightsOfManySizes:
    def loop(self, scaler: torch.amp.GradScaler, seed: int = 0) -> ab.BatchController:
        model = HalfOnTheWay(seed)
        return ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.5), rule=ab.Fixed(4), scaler=scaler)

    @pytest.mark.parametrize("ascending", [True, False])
    def test_batches_that_are_sorted_by_length(self, ascending: bool):
        """Buckets of sequences: windows of short ones beside windows of long ones."""
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        c = self.loop(scaler)
        sizes = [n for n in (16, 64, 256, 1024) for _ in range(8)]
        tokens_of(sizes if ascending else sizes[::-1], c, scaler)
        assert c.history.to_pandas()["skipped"].sum() == 0
        assert scaler.get_scale() == 2.0**16

    def test_a_light_micro_batch_that_opens_a_window_of_a_shared_scaler(self):
        """Two networks and one scale: neither costs the other its steps."""
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for turn in range(3):
            for seed in (0, 1):
                c = self.loop(scaler, seed)
                tokens_of([1, 1024, 1024, 1024], c, scaler, turn)
                assert c.history.to_pandas()["skipped"].sum() == 0
        assert scaler.get_scale() == 2.0**16

    def test_a_window_that_is_gone_on_with_in_another_process_after_its_light_beginning(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        before, after = self.loop(scaler), self.loop(scaler)
        generator = torch.Generator().manual_seed(0)
        x = [torch.rand(64, generator=generator) for _ in range(4)]
        before.backward(before.model(x[0]), weight=1)
        after.load_state_dict(before.state_dict())
        for one in x[1:]:
            after.backward(after.model(one), weight=1024)
        exact = after.model.weight.detach().double().requires_grad_()
        mean = sum(
            n / 3073 * (exact * one.double()).square().mean() for n, one in zip((1, 1024, 1024, 1024), x, strict=True)
        )
        (want,) = torch.autograd.grad(mean, exact)
        gradient = after.model.weight.grad.clone()
        torch.testing.assert_close(gradient, want.float(), rtol=5e-3, atol=2e-5)
        after.step()
        assert after.history.to_pandas()["skipped"].tolist() == [False]


# --- J. bookkeeping that others see ----------------------------------------------------------------------------------


def test_who_hooks_the_optimizers_step_sees_one_step_a_window_and_its_mean():
    """As profilers and gradient loggers do: no loss scale is left, nothing is called for a window that is skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    model = small_model(dtype=torch.float32)
    c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2), scaler=scaler)
    seen: list[Tensor] = []
    c.optimizer.register_step_pre_hook(lambda *_: seen.append(model[0].weight.grad.clone()))
    calls: list[int] = []
    c.optimizer.register_step_post_hook(lambda *_: calls.append(len(seen)))
    want = []
    for index in range(3):
        x = batches([4, 4], seed=index, dtype=torch.float32)
        want.append(torch.autograd.grad(squared(model, torch.cat(x)), model[0].weight)[0])
        for one in x:
            c.backward(squared(model, one) * (math.inf if index == 1 else 1.0), weight=4)
        c.step()
    assert calls == [1, 2]
    for ours, theirs in zip(seen, (want[0], want[2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_the_loss_in_hand_stays_what_it_was():
    """``total += loss.item()`` after the backward pass, of any weight; and it may be kept."""
    c = controlled(3)
    for x in batches([1, 5, 9]):
        loss = squared(c.model, x)
        before, version = loss.item(), loss._version
        c.backward(loss, weight=len(x))
        assert (loss.item(), loss._version) == (before, version)
    c.step()


@pytest.mark.parametrize("wrong", [True, False])
def test_a_trainer_that_back_propagates_the_bare_loss_is_told(wrong: bool):
    """``observe()`` yields the loss with its share of the window; the one given to it has none."""
    c = controlled(2)
    x = batches([2, 6])
    want = torch.autograd.grad(squared(c.model, torch.cat(x)), list(c.model.parameters()))

    def one(x: Tensor, bare: bool) -> None:
        loss = squared(c.model, x)
        with c.observe(loss, weight=len(x)) as weighted:
            (loss if bare else weighted).backward()

    one(x[0], False)
    if wrong:
        with pytest.raises(RuntimeError, match=r"observe\(\) yields the loss to back-propagate.*discard_window\(\)"):
            one(x[1], True)
        c.discard_window()
        one(x[0], False)
    one(x[1], False)
    for p, g in zip(c.model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)


# --- M. named --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [False, True], ids=["all of it", "one layer"])
def test_parameters_that_a_load_replaced_are_refused_by_name(part: bool):
    """``load_state_dict(assign=True)``: the optimizer would go on with tensors that nobody uses."""
    c = controlled(2)
    module = c.model[2] if part else c.model
    fed(c, batches([3, 3]))
    module.load_state_dict(copy.deepcopy(module.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"parameters that the model no longer has.*load_state_dict\(assign=True\)"):
        c.backward(squared(c.model, batches([3])[0]), weight=3)


@pytest.mark.parametrize("how", ["data", "one layer"])
def test_a_type_that_changes_within_a_window_is_among_the_causes(how: str):
    model = small_model(dtype=torch.float32)
    c = ab.BatchController(model, sgd(model), rule=ab.Fixed(2))
    x = batches([3, 3], dtype=torch.float32)
    c.backward(squared(model, x[0]), weight=3)
    if how == "data":
        for p in model.parameters():
            p.data = p.data.double()
    else:
        model[2].double()

    def mixed(x: Tensor) -> Tensor:
        hidden = model[1](model[0](x.to(model[0].weight.dtype)))
        return model[2](hidden.double()).square().mean()

    with pytest.raises(RuntimeError, match=r"type.*discard_window\(\)"):
        c.backward(mixed(x[1]), weight=3)
    c.discard_window()
    for one in x:
        c.backward(mixed(one), weight=3)
    c.step()
    assert c.history.to_pandas()["batch_grad_norm"].map(math.isfinite).all()


def test_a_lazy_convolution_is_named_with_ghost_norms_too():
    model = nn.Sequential(nn.LazyConv2d(3, 2), nn.Flatten(), nn.Linear(27, 2))
    with pytest.raises(ValueError, match=r"got 2 parameters of lazy layers without a shape; run one forward pass"):
        ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.1), ghost=True)


def test_rows_of_fractions_have_steps_of_their_own_in_csv(tmp_path: Path):
    """Weights below one, as of normalised tokens: the table's rows are apart by their optimizer step."""
    c = controlled(1)
    for x in batches([3] * 4):
        c.backward(squared(c.model, x), weight=0.25)
        c.step()
    c.history.to_pandas().to_csv(tmp_path / "rows.csv")
    rows: Any = c.history.to_pandas()
    assert rows["optimizer_step"].tolist() == [1, 2, 3, 4]
    assert rows["examples_seen"].tolist() == [0.25, 0.5, 0.75, 1.0]
