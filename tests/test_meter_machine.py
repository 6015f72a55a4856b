"""meter.py through random sequences of what a loop may do, beside a slow twin that keeps every gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

import adaptbatch as ab
from tests import reference
from tests.models import small_model, squared
from tests.searches import costly

# What every loss is divided by: a loop need not know how long its windows get.
DIVISOR = 4
Loop = tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler | None]


@dataclass
class Twin:
    """Every gradient of the open window, and the rows that are due.

    Attributes:
        cells: Examples and mean gradient of each backward pass.
        declared: Whether each was weighed by :meth:`NoiseMeter.weight`.
        troubled: Whether the open window cannot be measured.
        failed: Whether a backward pass failed since the last one that ended.
        each: Whether the accumulated gradient is measured after every pass: where it was clipped before, or scaled.
        rows: Of finished windows: examples, passes, whether skipped, and the moments; None: not measured.
    """

    scaled: bool
    cells: list[tuple[int, np.ndarray]] = field(default_factory=list)
    declared: list[bool] = field(default_factory=list)
    troubled: bool = False
    failed: bool = False
    each: bool = True
    rows: list[tuple[float, int, bool, tuple[float, float] | None]] = field(default_factory=list)

    def passed(self, examples: int, gradient: np.ndarray, declared: bool) -> None:
        self.troubled |= self.failed
        self.failed = False
        self.cells.append((examples, gradient))
        self.declared.append(declared)

    def dropped(self) -> None:
        self.cells, self.declared, self.troubled = [], [], False

    def stepped(self, changed: bool, skipped: bool) -> None:
        if not self.cells:
            return
        n, k = sum(examples for examples, _ in self.cells), len(self.cells)
        known = not self.troubled and k > 1 and len(set(self.declared)) == 1 and (self.each or not changed)
        if known:
            # The mean of which the loop adds the parts: 1 / DIVISOR of each, or its examples' share.
            whole = n if self.declared[0] else k
            weights = [examples if self.declared[0] else n / k for examples, _ in self.cells]
            cells = [(w, g * (whole / DIVISOR)) for w, (_, g) in zip(weights, self.cells, strict=True)]
            moments = reference.anova(cells)
        self.rows.append((float(n), k, skipped, moments if known and not skipped else None))
        self.each = changed or self.scaled
        self.dropped()


class Meter(RuleBasedStateMachine):
    """One loop with the meter, one without; the twin's gradients are those of the other."""

    @initialize(scaled=st.booleans(), fused=st.booleans(), to_none=st.booleans())
    def begin(self, scaled: bool, fused: bool, to_none: bool) -> None:
        self.scaled, self.fused, self.to_none = scaled, fused, to_none
        self.generator = torch.Generator().manual_seed(0)
        self.loops: list[Loop] = []
        for _ in range(2):
            model = small_model(dtype=torch.float32)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2) if scaled else None
            self.loops.append((model, optimizer, scaler))
        model, optimizer, scaler = self.loops[0]
        self.meter = ab.NoiseMeter(model, optimizer, scaler=scaler)
        self.twin = Twin(scaled)
        self.open, self.poisoned = True, False

    def both(self, act: Callable[[nn.Module, torch.optim.Optimizer, Any], object]) -> None:
        with warnings.catch_warnings():
            # What cannot be measured it says.
            warnings.filterwarnings("ignore", "NoiseMeter", RuntimeWarning)
            for loop in self.loops:
                act(*loop)

    def drawn(self, size: int) -> Tensor:
        return torch.randn(size, 4, generator=self.generator)

    def gradient(self, x: Tensor) -> np.ndarray:
        model = self.loops[1][0]
        parts = torch.autograd.grad(squared(model, x), list(model.parameters()))
        return torch.cat([part.reshape(-1) for part in parts]).double().numpy()

    @rule(size=st.integers(1, 6), declared=st.sampled_from([False, False, False, True]))
    def backward(self, size: int, declared: bool) -> None:
        x = self.drawn(size)
        if declared and self.open:
            self.meter.weight(size)
        share = size / DIVISOR if declared else 1.0 / DIVISOR
        gradient = self.gradient(x)

        def act(model: nn.Module, optimizer: object, scaler: Any) -> None:
            loss = squared(model, x) * share
            (loss if scaler is None else scaler.scale(loss)).backward()

        self.both(act)
        self.twin.passed(size, gradient, declared)
        # Only what is written after the last pass is seen as a change at the window's end.
        self.partial = False

    @rule(
        sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
        declared=st.booleans(),
        infinite=st.booleans(),
        clip=st.booleans(),
    )
    def window(self, sizes: list[int], declared: bool, infinite: bool, clip: bool) -> None:
        """As a loop has it, after what was left of another one."""
        for size in sizes:
            self.backward(size, declared)
        if infinite and self.scaled:
            self.backward_of_infinity()
        self.step(clip)

    @precondition(lambda self: self.scaled and self.twin.cells)
    @rule()
    def backward_of_infinity(self) -> None:
        self.both(lambda model, _, scaler: scaler.scale(squared(model, torch.full((2, 4), torch.inf))).backward())
        self.twin.passed(2, self.gradient(self.drawn(2)), declared=False)
        self.partial = False
        self.poisoned = True

    @rule()
    def backward_fails(self) -> None:
        x = self.drawn(3)

        def fail(grad: Tensor) -> None:
            raise KeyError("mine")

        def act(model: Any, optimizer: object, scaler: Any) -> None:
            hidden = model[0](x)
            hidden.register_hook(fail)
            loss = model[1:](hidden).square().mean()
            with pytest.raises(KeyError, match="mine"):
                (loss if scaler is None else scaler.scale(loss)).backward()

        self.both(act)
        self.partial = True
        self.twin.failed = True

    @rule()
    def looks_aside(self) -> None:
        """Gradients that are added to nothing, an evaluation, and an item that does not fit, which loops leave out."""
        x = self.drawn(8)

        def act(model: nn.Module, *_: object) -> None:
            torch.autograd.grad(squared(model, x), list(model.parameters()))
            with torch.no_grad():
                model(x)
            with pytest.raises(RuntimeError, match="cannot be multiplied"):
                model(torch.zeros(9, 5))

        self.both(act)

    partial = False

    @rule()
    def drop(self) -> None:
        self.both(lambda model, optimizer, scaler: optimizer.zero_grad(set_to_none=self.to_none))
        self.twin.dropped()
        self.partial = self.poisoned = False

    @precondition(lambda self: self.twin.cells)
    @rule(clip=st.booleans())
    def step(self, clip: bool) -> None:
        skipped, changed = self.poisoned, clip or self.partial

        def act(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
            if clip:
                if scaler is not None:
                    scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad(set_to_none=self.to_none)

        self.both(act)
        self.twin.stepped(changed, skipped)
        self.partial = self.poisoned = False

    @precondition(lambda self: self.open and len(self.twin.rows) > 2)
    @rule()
    def close(self) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "NoiseMeter", RuntimeWarning)
            self.meter.close()
        self.open = False
        self.closed_with = len(self.twin.rows)

    @invariant()
    def untouched(self) -> None:
        (ours, _, _), (theirs, _, _) = self.loops
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)

    def teardown(self) -> None:
        if not hasattr(self, "meter"):
            return
        if self.open:
            self.close()
        table, rows = self.meter.history.to_pandas(), self.twin.rows[: self.closed_with]
        assert table["global_batch"].tolist() == [n for n, *_ in rows]
        assert table["accumulation_steps"].tolist() == [k for _, k, *_ in rows]
        assert table["skipped"].tolist() == [skipped for _, _, skipped, _ in rows]
        assert table["backward_passes"].tolist() == np.cumsum([k for _, k, *_ in rows]).tolist()
        for found, (_, _, skipped, moments) in zip(table.itertuples(), rows, strict=True):
            if moments is None:
                assert skipped or np.isnan(found.noise_trace)
                continue
            trace, signal = moments
            assert found.noise_trace == pytest.approx(trace, rel=1e-3, abs=1e-6)
            assert found.grad_sq_norm == pytest.approx(signal, abs=1e-4 * (abs(signal) + trace) + 1e-6)
        model, optimizer, _ = self.loops[0]
        assert not any(p._backward_hooks for p in model.parameters())
        assert not any([*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks])


TestMeter = Meter.TestCase
TestMeter.settings = costly(60, stateful_step_count=20)
