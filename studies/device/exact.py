"""Exactness: against one large batch and the hand-written loop, across a resume, and when a loss scale overflows."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import adaptbatch as ab
from studies.device.cases import Case, adam, autocast, cases, hand_written, steady
from studies.device.harness import Report
from studies.device.machine import deterministic

SIZES = (28, 20, 11, 5)
STEPS, WINDOWS = 4, 6
# Steps until a GradScaler doubles its scale: a few, so that it does.
GROWTH = 3
# Of the sum of k rounding errors that behave as random ones: larger than this many sqrt(k) u once in e^(8^2 / 2).
SIGMAS = 8.0


def run(report: Report, device: str, tiny: bool) -> None:
    """Rows of each check; a deviation is a relative error, or a count of values that differ where every bit counts."""
    known = cases(tiny).values()
    checks: dict[Callable[..., None], tuple[Any, ...]] = {
        overflow: ("fp16",),
        one_batch: (torch.float64, torch.float32),
        by_hand: ("float32", "fp16"),
        resume: tuple(RESUMED),
    }
    todo = [(check, case, setting) for check, settings in checks.items() for setting in settings for case in known]
    # The fused kernels of attention add up as they finish.
    with deterministic(), sdpa_kernel(SDPBackend.MATH):
        for turn, (check, case, setting) in enumerate(todo):
            if report.left < 0.0:
                report.note(f"no time was left for the last {len(todo) - turn} of {len(todo)} checks")
                break
            tried = {"check": check.__name__, "network": case.name, "precision": str(setting)}
            report.attempt(partial(check, report, case, device, setting), **tried)


# --- one large batch ----------------------------------------------------------------------------------------------


def one_batch(report: Report, case: Case, device: str, dtype: torch.dtype) -> None:
    """Unequal micro-batches give the gradient of the whole batch, and its norm, up to rounding.

    A sum of ``k`` terms is wrong by about ``sqrt(k) u`` of the sum of their sizes (Higham and Mary 2019, in
    probability), here the examples' gradients: ``condition`` is their mean length over the length of their mean.
    """
    model = case.network(device, dtype=dtype)
    batches = case.batches(device, SIZES, dtype=dtype)
    truth_model = copy.deepcopy(model).double()
    whole = torch.cat(batches).double() if case.vocabulary == 0 else torch.cat(batches)
    truth = gradient(truth_model, whole)
    at_once = gradient(copy.deepcopy(model), torch.cat(batches))
    lengths = [float(gradient(truth_model, x[None]).norm()) for x in whole]
    condition = sum(lengths) / len(lengths) / float(truth.norm())
    terms = case.terms + len(whole) * case.positions
    # Ours and what it is compared with are both rounded.
    bound = 2.0 * SIGMAS * math.sqrt(terms) * torch.finfo(dtype).eps / 2.0 * condition
    with ab.BatchController(model, torch.optim.SGD(model.parameters(), lr=0.0), rule=ab.Fixed(len(SIZES))) as one:
        for x in batches:
            one.backward(model(x), weight=len(x))
        found = flat(model)
        one.step()
    precision = str(dtype).removeprefix("torch.")
    shared = {"network": case.name, "precision": precision}
    error, theirs = _relative(found, truth), _relative(at_once, truth)
    report.row(
        error <= bound,
        check="gradient of one batch",
        **shared,
        deviation=error,
        bound=bound,
        one_batch_deviation=theirs,
    )
    (row,) = one.history.to_pandas().to_dict("records")
    error = abs(row["batch_grad_norm"] / float(truth.norm()) - 1.0)
    report.row(error <= bound, check="its norm, recorded", **shared, deviation=error, bound=bound)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Of the mean loss, as one vector in float64."""
    model.zero_grad()
    model(x).backward()
    found = flat(model)
    model.zero_grad()
    return found


def flat(model: nn.Module) -> Tensor:
    """``.grad`` of all parameters."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _relative(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


# --- bit for bit --------------------------------------------------------------------------------------------------


def by_hand(report: Report, case: Case, device: str, precision: str) -> None:
    """Training is that of the hand-written loop; which is itself the same twice, or else nothing can be said."""
    batches = case.batches(device, [case.micro_batch] * STEPS * WINDOWS)

    def trained(ours: bool) -> nn.Module:
        if ours:
            job = Job(case, device, precision, steady(STEPS))
            job.run(batches)
            return job.model
        model = case.network(device)
        scaler = torch.amp.GradScaler(device, growth_interval=GROWTH) if precision == "fp16" else None
        window = hand_written(model, job_optimizer(model), device, precision, scaler)
        for first in range(0, len(batches), STEPS):
            window(batches[first : first + STEPS])
        return model

    plain = trained(ours=False)
    for check, other in (("hand-written loop twice", trained(ours=False)), ("hand-written loop", trained(ours=True))):
        count = differing(plain, other)
        report.row(count == 0, check=check, network=case.name, precision=precision, deviation=float(count), bound=0.0)


def differing(one: nn.Module, other: nn.Module) -> int:
    """Parameters' values that are not the same bits."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return sum(int((a.detach().nan_to_num(7e7) != b.detach().nan_to_num(7e7)).sum()) for a, b in pairs)


# --- resume -------------------------------------------------------------------------------------------------------

_ADAPTIVE: dict[str, Any] = {"rule": ab.RelativeStandardError(), "limits": ab.Limits(min_steps=3, max_steps=8)}
RESUMED: dict[str, dict[str, Any]] = {
    "resume, read before the step": _ADAPTIVE,
    "resume, read late": _ADAPTIVE | {"skip_nonfinite": False},
    "resume, read late, in Adam's metric, consecutive gradients": _ADAPTIVE
    | {"skip_nonfinite": False, "metric": "adam", "consecutive": True},
    "resume, fp16": _ADAPTIVE,
}


def job_optimizer(model: nn.Module) -> torch.optim.Adam:
    """Its metric is warm after ten steps."""
    return adam(model, betas=(0.9, 0.9))


class Job:
    """A training that can be put away between any two micro-batches."""

    def __init__(self, case: Case, device: str, precision: str, options: dict[str, Any], seed: int = 0) -> None:
        self.device, self.precision = device, precision
        self.model = case.network(device, seed)
        self.optimizer = job_optimizer(self.model)
        self.scaler = torch.amp.GradScaler(device, growth_interval=GROWTH) if precision == "fp16" else None
        self.controller = ab.BatchController(self.model, self.optimizer, scaler=self.scaler, **options)

    def run(self, batches: Sequence[Tensor]) -> None:
        """Train on micro-batches."""
        for x in batches:
            with autocast(self.device, self.precision):
                loss = self.model(x)
            self.controller.backward(loss, weight=len(x))
            if self.controller.step_due:
                self.controller.step()

    def parts(self) -> dict[str, Any]:
        """What has a state."""
        found = {"model": self.model, "optimizer": self.optimizer, "controller": self.controller}
        return found if self.scaler is None else found | {"scaler": self.scaler}

    def saved(self) -> bytes:
        """A file."""
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in self.parts().items()}, file)
        return file.getvalue()

    def load(self, saved: bytes, where: str) -> None:
        """Go on from a file that is read onto a device."""
        state = torch.load(io.BytesIO(saved), map_location=where)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])


def resume(report: Report, case: Case, device: str, label: str) -> None:
    """Within a window, put away and gone on with in a new process's objects: the same bits, and the same decisions."""
    precision, options = "fp16" if label.endswith("fp16") else "float32", RESUMED[label]
    # Adam's metric is warm after ten steps, of at least three micro-batches.
    batches = case.batches(device, [case.micro_batch] * 48)
    whole = Job(case, device, precision, options)
    whole.run(batches)
    expected = whole.controller.history.to_pandas()
    for where in dict.fromkeys((device, "cpu")):
        first = Job(case, device, precision, options)
        cut = 37
        first.run(batches[:cut])
        while first.controller.state_dict()["window"] is None:
            first.run(batches[cut : cut + 1])
            cut += 1
        second = Job(case, device, precision, options, seed=9)
        second.load(first.saved(), where)
        second.run(batches[cut:])
        own = second.controller.history.to_pandas()
        # Seconds are the machine's.
        rows = [table.drop(columns="wall_seconds").reset_index(drop=True) for table in (own, expected.tail(len(own)))]
        count = differing(whole.model, second.model) + _differing_rows(*rows)
        report.row(
            count == 0 and len(own) > 0,
            check=label if where == device else f"{label}, by way of the host",
            network=case.name,
            precision=precision,
            deviation=float(count),
            bound=0.0,
            windows=len(own),
        )


def _differing_rows(one: pd.DataFrame, other: pd.DataFrame) -> int:
    return len(one) if len(one) != len(other) else int(((one != other) & ~(one.isna() & other.isna())).sum().sum())


# --- overflow -----------------------------------------------------------------------------------------------------


def overflow(report: Report, case: Case, device: str, precision: str) -> None:
    """A scale that is far too large, and later a micro-batch that is not finite: such windows are left out, whole."""
    if case.vocabulary:
        # Ids are finite.
        return
    model = case.network(device)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    controller = ab.BatchController(model, adam(model), scaler=scaler, **steady(STEPS))
    wrong, skips, steps = [], 0, 0
    data = case.batches(device, [case.micro_batch] * STEPS)
    poisoned = [*data[:1], torch.full_like(data[1], math.inf), *data[2:]]
    for turn in range(50):
        before, scale = copy.deepcopy(model), scaler.get_scale()
        poison = turn == 40
        for x in poisoned if poison else data:
            with autocast(device, precision):
                loss = model(x)
            controller.backward(loss, weight=len(x))
        decision = controller.step()
        (row,) = controller.history.to_pandas().tail(1).to_dict("records")
        skipped = bool(row["skipped"])
        skips, steps = skips + skipped, steps + (not skipped)
        checks = {
            "reason": (decision.reason == "nonfinite") == skipped,
            "parameters": (differing(before, model) == 0) == skipped,
            "scale": scaler.get_scale() == (scale / 2.0 if skipped else scale),
            "steps": row["optimizer_step"] == steps,
            "poison": skipped or not poison,
        }
        wrong += [f"window {turn}: {name}" for name, right in checks.items() if not right]
    controller.close()
    if wrong:
        report.note(f"overflow, {case.name}: {', '.join(wrong)}")
    report.row(
        not wrong and skips > 1 and steps > 1,
        check="overflow is left out",
        network=case.name,
        precision=precision,
        deviation=float(len(wrong)),
        bound=0.0,
        windows=skips + steps,
        skipped=skips,
    )
