"""The origin's table at full size: residual VAEs of 80 layers, 200 epochs, small, large and adaptive batch.

A process for each row and class, all on one device. Each puts itself away after every epoch, and when time is up, and
goes on from there when the check is run again with the same folder.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import Tensor

import adaptbatch as ab
from studies import data
from studies.device.harness import Report, write
from studies.device.machine import stamp
from studies.engine.networks import Autoencoder

CLASSES = (0, 1)
LR, MAX_STEPS = 1e-2, 64
# Rule and micro-batch, as in studies.questions.origin.
ROWS: dict[str, tuple[ab.rules.Rule, int]] = {
    "residual VAE, 256": (ab.Fixed(1), 256),
    "residual VAE, 4000": (ab.Fixed(4), 1000),
    "residual VAE, adaptive": (ab.RelativeStandardError(), 128),
}
# Seconds that a process may take to put itself away.
LATE_S = 10.0


@dataclass(frozen=True)
class Size:
    """Of the network and of the training; ``examples`` of the training set, None: all."""

    depth: int = 80
    widths: tuple[int, int] = (128, 32)
    code: int = 16
    epochs: int = 200
    examples: int | None = None


TINY_ROWS = ("residual VAE, 256", "residual VAE, adaptive")
TINY = Size(depth=8, widths=(16, 8), code=4, epochs=2, examples=600)


def run(report: Report, device: str, tiny: bool) -> None:
    """Train until time is up; a row for each process, with its last epoch."""
    size, names, classes = (TINY, TINY_ROWS, CLASSES[:1]) if tiny else (Size(), tuple(ROWS), CLASSES)
    # Each forked from a server that has imported all and has touched no GPU.
    context, processes = multiprocessing.get_context("forkserver"), {}
    context.set_forkserver_preload(["studies.device.table", "torch._dynamo"])
    for name, anomaly in itertools.product(names, classes):
        arguments = (name, anomaly, size, report.folder, device, report.ends)
        processes[name, anomaly] = context.Process(target=train, args=arguments)
        processes[name, anomaly].start()
    for (name, anomaly), process in processes.items():
        process.join(max(report.left + LATE_S, 0.0))
        if process.is_alive():
            process.kill()
            process.join()
        path = report.folder / f"{file_name(name, anomaly)}.csv"
        last = pd.read_csv(path).tail(1).to_dict("records") if path.is_file() else []
        if not last:
            report.note(f"{name}, class {anomaly}: the first epoch is not done")
        known = last[0] if last else {"row": name, "class": anomaly, "epoch": 0, "epochs": size.epochs}
        report.row(process.exitcode == 0, **known)


def train(name: str, anomaly: int, size: Size, folder: Path, device: str, ends: float) -> None:
    """One process: a row on one class, until ``ends`` [s since the epoch]."""
    torch.set_num_threads(1)
    training = Training(name, anomaly, size, folder, device)
    training.run(lambda: time.time() > ends)


def file_name(name: str, anomaly: int) -> str:
    """Of the files of a row and a class."""
    return f"table-{name.split()[-1]}-class-{anomaly}"


class Training:
    """A row of the table on one class, from where its files stand.

    Args:
        name: A key of :data:`ROWS`.
        anomaly: The class that is not trained on.
        size: Of network and training.
        folder: Of its checkpoint and its table, a line for each epoch.
        device: Where to train.

    Raises:
        ValueError: If the checkpoint is of another training.
    """

    def __init__(self, name: str, anomaly: int, size: Size, folder: Path, device: str) -> None:
        self._rule, self._micro_batch = ROWS[name]
        self._identity = {"row": name, "class": anomaly, "device": device, **asdict(size)}
        self._size, self._device = size, device
        self._place = folder / file_name(name, anomaly)
        self._parts = data.split("mnist", anomaly)
        self._inputs = torch.from_numpy(self._parts.train[: size.examples]).to(device)
        torch.manual_seed(0)
        self._model = Autoencoder(size.depth, size.widths, size.code, "identity", "branch").to(device)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=LR, fused=True)
        self._controller = ab.BatchController(
            self._model,
            self._optimizer,
            rule=self._rule,
            limits=ab.Limits(max_steps=MAX_STEPS),
            # As in a plain loop: what breaks a row is its own.
            skip_nonfinite=False,
        )
        self._codes = torch.Generator(device).manual_seed(0)
        self.position = 0
        self.rows: list[dict[str, Any]] = []
        self._updates, self._seconds, self._loss_sum = 0, 0.0, torch.zeros((), dtype=torch.float64, device=device)
        self._load()

    def run(self, stop: Callable[[], bool]) -> bool:
        """Train; put away what there is when ``stop()``, asked after every micro-batch.

        Returns:
            Whether all epochs are done.
        """
        began, before, controller = time.perf_counter(), self._seconds, self._controller
        if self._finished:
            return True
        for index, ends_epoch in controller.micro_batches(itertools.islice(self._indices(), self.position, None)):
            x = self._inputs[index]
            loss = self._model.loss(x, self._codes)
            controller.backward(loss, weight=len(x))
            self._loss_sum += loss.detach().double() * len(x)
            if controller.step_due:
                controller.step()
                self._updates += 1
            self.position += 1
            self._seconds = before + time.perf_counter() - began
            if ends_epoch:
                self._note_epoch()
            stopped = stop()
            if ends_epoch or stopped:
                self._save()
            if stopped and not self._finished:
                return False
        controller.close()
        return True

    @property
    def _finished(self) -> bool:
        return len(self.rows) == self._size.epochs

    def _indices(self) -> Iterator[tuple[Tensor, bool]]:
        """Places of the examples of each micro-batch, a new random order each epoch; and whether it is its last."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(self._size.epochs):
            order = torch.randperm(len(self._inputs), generator=generator).to(self._device)
            parts = order.split(self._micro_batch)
            yield from zip(parts, [False] * (len(parts) - 1) + [True], strict=True)

    def _note_epoch(self) -> None:
        examples = len(self._inputs)
        seen = examples * (len(self.rows) + 1)
        row = {name: self._identity[name] for name in ("row", "class", "epochs")} | {"epoch": len(self.rows) + 1}
        row |= {"updates": self._updates, "mean_batch": seen / max(self._updates, 1)}
        row |= {"accumulation_steps": self._controller.accumulation_steps}
        row |= {"train_loss": float(self._loss_sum) / examples, **self._score(), "seconds": self._seconds}
        row |= stamp(self._device)
        self._loss_sum.zero_()
        self.rows.append(row)
        print(
            f"  table: {row['row']}, class {row['class']}: epoch {row['epoch']} of {row['epochs']}, "
            f"train {row['train_loss']:.2f}, valid {row['valid_loss']:.2f}, AUROC {row['auroc']:.3f}, "
            f"{row['seconds']:.0f} s",
            flush=True,
        )

    @torch.no_grad()
    def _score(self) -> dict[str, float]:
        """Mean loss of the normal test rows, and how well the reconstruction error tells the anomalies from them."""
        codes = torch.Generator(self._device).manual_seed(0)
        losses, errors = [], []
        for x in torch.from_numpy(self._parts.test).to(self._device).split(2_048):
            losses.append(self._model.example_losses(x, codes))
            errors.append(self._model.reconstruction_errors(x))
        loss, error = (torch.cat(parts).cpu().double().numpy() for parts in (losses, errors))
        anomalous = self._parts.anomalous
        areas = {"auroc": auroc(anomalous, error), "auprc": average_precision(anomalous, error)}
        return {"valid_loss": float(loss[~anomalous].mean()), **areas}

    def _save(self) -> None:
        """The checkpoint, then the table: that is written anew from what the checkpoint holds."""
        state = {
            "identity": self._identity,
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "controller": self._controller.state_dict(),
            "codes": self._codes.get_state(),
            "loss_sum": self._loss_sum,
            "rows": self.rows,
            "counts": (self.position, self._updates, self._seconds),
        }
        path = self._place.with_suffix(".pt")
        unfinished = path.with_suffix(".unfinished")
        torch.save(state, unfinished)
        os.replace(unfinished, path)
        if self.rows:
            write(self._place.with_suffix(".csv"), pd.DataFrame(self.rows).to_csv(index=False))

    def _load(self) -> None:
        path = self._place.with_suffix(".pt")
        if not path.is_file():
            return
        # The generator's state stays on the host; the others put theirs where it belongs.
        state = torch.load(path, map_location="cpu")
        if state["identity"] != self._identity:
            raise ValueError(
                f"{path} must be of {self._identity}, got one of {state['identity']}; give another folder, or delete "
                f"this file."
            )
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._controller.load_state_dict(state["controller"])
        self._codes.set_state(state["codes"])
        self._loss_sum.copy_(state["loss_sum"])
        self.rows = list(state["rows"])
        self.position, self._updates, self._seconds = state["counts"]


def auroc(positive: np.ndarray, score: np.ndarray) -> float:
    """Share of the pairs of a positive and a negative whose scores are in that order, ties half; NaN if not finite.

    Example:
        >>> auroc(np.array([False, True, True]), np.array([0.1, 0.5, 0.1]))
        0.75
    """
    if not np.isfinite(score).all():
        return float("nan")
    count = int(positive.sum())
    above = rankdata(score)[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(score) - count)))


def average_precision(positive: np.ndarray, score: np.ndarray) -> float:
    """Mean precision at the thresholds, weighted by the recall that each one adds; NaN if not finite.

    Example:
        >>> average_precision(np.array([True, False, True]), np.array([0.9, 0.5, 0.1]))
        0.8333333333333333
    """
    if not np.isfinite(score).all():
        return float("nan")
    order = np.argsort(-score, kind="stable")
    last = np.append(np.diff(score[order]) != 0, True)
    hits = np.cumsum(positive[order])[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])
