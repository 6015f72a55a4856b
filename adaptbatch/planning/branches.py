"""``critical_batch``: short trainings from one state at several batches, so that a plan's assumption is measured."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from adaptbatch.checks import require_pair, require_scaler, require_shared_parameter
from adaptbatch.controller import BatchController
from adaptbatch.optimizer.learning_rate import LearningRate
from adaptbatch.planning.aside import loader_generators, set_aside, twin
from adaptbatch.planning.verdict import CriticalBatch, judge
from adaptbatch.rules import Fixed
from adaptbatch.rules.base import require_positive

Coupling = Literal["sqrt", "linear"]
LossFunction = Callable[[nn.Module, Any], tuple[Tensor, float]]
Validation = Callable[[nn.Module], float | Tensor]


def critical_batch(
    trained: BatchController | tuple[nn.Module, Optimizer],
    loader: Iterable[Any],
    loss_fn: LossFunction,
    validate: Validation,
    batches: Sequence[int] = (1, 2, 4, 8, 16, 32),
    *,
    examples: float | Sequence[float],
    learning_rate: Coupling | None = "sqrt",
    reference: int | None = None,
    repeats: int = 4,
    tolerance: float = 0.01,
    confidence: float = 0.95,
    before_step: Callable[[], object] | None = None,
    scaler: GradScaler | None = None,
    generators: Iterable[torch.Generator] = (),
    seed: int = 0,
    progress: bool = True,
) -> CriticalBatch:
    """The largest batch that costs nothing, found by short trainings from the present state.

    From here the model is trained on ``examples`` at each of ``batches``, on the same micro-batches in the same order
    with the same dropout, with the optimizer's state carried along and its rate times ``sqrt(n / n0)``, and then
    evaluated on the same data. That is repeated in other orders of the data. A batch passes where its loss is above
    that of the smallest by less than the tolerance::

        mean_r (L_n - L_small) + t sd_r(L_n - L_small) / sqrt(repeats)  <=  tolerance |L_small|

    with Student's one-sided ``t``. Repeats are what is independent: over the parts of one validation set the same two
    branches are compared again and again, and what the order of the data did to them is in every one.

    The training is untouched to the last bit, see :func:`~adaptbatch.planning.aside.set_aside`: the optimizer and the
    scaler are never stepped, copies are. One copy of the model and of the optimizer's state is held at a time, and the
    micro-batches of one repeat.

    When it is wrong: a larger batch at a rate that grows less than the batch *anneals*: it ends lower in a short branch
    and falls behind in a long one. Two lengths tell, and ``notes`` say so. A local answer: the critical batch grows
    along a training, so measure again.

    Args:
        trained: A controller between two windows, or ``(model, optimizer)``. One process only.
        loader: Of micro-batches, iterated anew and as often as needed.
        loss_fn: ``loss_fn(model, micro_batch)`` gives the mean loss and what it is over, as for
            :meth:`~adaptbatch.BatchController.backward`: ``(loss, len(x))``.
        validate: ``validate(model)`` gives the loss on data of its own, a number; called in evaluation mode without
            gradients.
        batches: Accumulation steps to compare; at least two.
        examples: Length of the branches; two of them to see what only anneals [examples]. Rounded up to whole windows
            of all batches.
        learning_rate: ``"sqrt"`` for Adam, ``"linear"`` for SGD, None for the same rate at every batch; the laws of
            :class:`~adaptbatch.LearningRate` without its caps.
        reference: Accumulation steps that the present rate was chosen for; None: the controller's present ones, or the
            smallest of ``batches``.
        repeats: Orders of the data, at least two.
        tolerance: Loss that may be lost, as a share of the smallest batch's loss [1].
        confidence: One-sided, in (0.5, 1).
        before_step: Called when ``.grad`` is the mean, as to clip it.
        scaler: The loop's GradScaler; None: the controller's.
        generators: Those of your own that ``loss_fn``, ``validate`` or ``loader`` draw from.
        seed: Of the branches; dropout and order follow it.
        progress: Whether to show a bar with the time left, where tqdm is installed.

    Raises:
        TypeError: If ``trained`` is neither, or a function is none.
        ValueError: If an argument is out of range; nothing has been trained then.
        RuntimeError: If the controller is within a window, or ranks are several.

    Source:
        Merrill et al. 2025, arXiv:2505.23971 (branched training).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> data = [torch.randn(8, 4) for _ in range(32)]
        >>> model = nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> def loss_fn(model, x):
        ...     return (model(x) - x.sum(1, keepdim=True)).square().mean(), len(x)
        >>> found = critical_batch(
        ...     (model, optimizer), data, loss_fn, lambda model: loss_fn(model, torch.cat(data))[0], (1, 2, 4),
        ...     examples=512, learning_rate="linear", tolerance=0.1, progress=False,
        ... )
        >>> found.table["batch"].tolist(), found.table["steps"].tolist(), found.critical in (8.0, 16.0, 32.0)
        ([8.0, 16.0, 32.0], [64, 32, 16], True)
    """
    model, optimizer, own_scaler, present = _parts(trained)
    sizes = _whole_numbers("batches", batches, 2)
    (repeats,) = _whole_numbers("repeats", [repeats], 1, least=2)
    (reference,) = _whole_numbers("reference", [present or sizes[0] if reference is None else reference], 1)
    lengths = _lengths(examples)
    _require_arguments(loader, loss_fn, validate, before_step, learning_rate, tolerance, confidence)
    require_scaler(scaler)
    drawn = [*loader_generators(loader), *generators]
    with set_aside(model, optimizer, drawn) as begin, _bar(progress) as (advance, lasts):
        branches = _Branches(
            model, optimizer, scaler or own_scaler, loss_fn, validate, before_step, learning_rate, begin, advance, drawn
        )
        _seed(seed, drawn)
        stream = _endless(loader)
        first = next(stream)
        weight = branches.try_out(first)
        counts = _micro_batches(lengths, weight, sizes)
        lasts(len(sizes) * repeats * counts[-1])
        stream = chain([first], stream)
        for index in range(repeats):
            items = list(islice(stream, counts[-1]))
            for size in sizes:
                branches.run(size, items, counts, reference * weight, seed + 1 + index)
    measured = next(size for size in sizes if size > 1)
    windows = pd.concat(branches.windows[measured], ignore_index=True)
    return judge(branches.losses, windows, weight, tolerance, confidence)


@dataclass
class _Branches:
    """Trains from one state, and keeps what came of it: losses by size and length, rows of windows by size."""

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler | None
    loss_fn: LossFunction
    validate: Validation
    before_step: Callable[[], object] | None
    coupling: Coupling | None
    begin: Callable[[], None]
    advance: Callable[[], object]
    generators: Sequence[torch.Generator]
    losses: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    windows: dict[int, list[pd.DataFrame]] = field(default_factory=dict)

    def try_out(self, item: Any) -> float:
        """What a micro-batch weighs; refuse functions that do not give what they should, before anything is trained."""
        self.begin()
        with torch.no_grad():
            given = self.loss_fn(self.model, item)
        if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], Tensor)):
            raise ValueError(
                f"loss_fn must give (loss, weight), the mean loss of a micro-batch and what it is over, got "
                f"{type(given).__name__}; return loss, len(x)."
            )
        require_positive("weight of loss_fn", given[1], "return loss, len(x)")
        self.evaluated()
        return float(given[1])

    def evaluated(self) -> float:
        """The loss on the data of ``validate``; modes are as before."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        with torch.no_grad():
            loss = self.validate(self.model)
        for module, training in modes:
            module.training = training
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return float(loss)
        if isinstance(loss, bool) or not isinstance(loss, Real):
            raise ValueError(
                f"validate must give one number, the loss on data of its own, got {type(loss).__name__}; average it."
            )
        return float(loss)

    def run(self, size: int, items: Sequence[Any], counts: Sequence[int], reference_batch: float, seed: int) -> None:
        """One branch of ``size`` micro-batches a step; evaluated after each of ``counts`` micro-batches."""
        self.begin()
        _seed(seed, self.generators)
        coupling = None
        if self.coupling is not None:
            coupling = LearningRate(self.coupling, reference_batch, max_factor=math.inf, max_change=math.inf)
        controller = BatchController(
            self.model,
            twin(self.optimizer),
            rule=Fixed(size),
            learning_rate=coupling,
            scaler=copy.deepcopy(self.scaler),
            skip_nonfinite=False,
        )
        try:
            for done, item in enumerate(items, start=1):
                controller.backward(*self.loss_fn(self.model, item))
                if controller.step_due:
                    if self.before_step is not None:
                        self.before_step()
                    controller.step()
                if done in counts:
                    self.losses.setdefault((size, done), []).append(self.evaluated())
                self.advance()
        except BaseException:
            controller.discard_window()
            raise
        finally:
            controller.close()
        self.windows.setdefault(size, []).append(controller.history.to_pandas())


def _parts(
    trained: object,
) -> tuple[nn.Module, Optimizer, GradScaler | None, int | None]:
    """Model, optimizer, loss scaler and present accumulation steps of what is trained."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            f"critical_batch() is for one process, got {torch.distributed.get_world_size()} ranks; load a checkpoint "
            f"in one, and compare batches there."
        )
    if isinstance(trained, BatchController):
        trained._require_open()
        trained._require_between_windows("critical_batch()")
        return trained.model, trained.optimizer, trained._stepper._scaler, trained.accumulation_steps
    if not (isinstance(trained, tuple) and len(trained) == 2):
        raise TypeError(
            f"trained must be a BatchController or the pair (model, optimizer), got {type(trained).__name__}; "
            f"critical_batch((model, optimizer), ...)."
        )
    require_pair(*trained)
    require_shared_parameter(*trained)
    if isinstance(getattr(trained[1], "optimizer", None), Optimizer):
        raise TypeError(
            f"optimizer must be no wrapper of another, got {type(trained[1]).__name__}, whose copy would step it; pass "
            f"optimizer.optimizer."
        )
    return (*trained, None, None)


def _whole_numbers(name: str, values: Iterable[int], count: int, least: int = 1) -> list[int]:
    """So many different ones, in order."""
    given = list(values)
    if not all(isinstance(one, Integral) and not isinstance(one, bool) and one >= least for one in given):
        shown = given[0] if count == 1 else given
        raise ValueError(f"{name} must be whole, of at least {least}, got {name} = {shown!r}; 4 is one.")
    found = sorted({int(one) for one in given})
    if len(found) < count:
        raise ValueError(f"{name} must be at least {count} different sizes, got {name} = {given!r}; (1, 2, 4, 8).")
    return found


def _lengths(examples: float | Sequence[float]) -> list[float]:
    given = list(examples) if isinstance(examples, Sequence) else [examples]
    for one in given:
        require_positive("examples", one, "the length of a branch; two lengths show what only anneals")
    if not given:
        raise ValueError("examples must be a length or a few, got examples = []; 100_000 is one.")
    return sorted({float(one) for one in given})


def _require_arguments(
    loader: object,
    loss_fn: object,
    validate: object,
    before_step: object,
    learning_rate: object,
    tolerance: float,
    confidence: float,
) -> None:
    for name, value in (("loss_fn", loss_fn), ("validate", validate), ("before_step", before_step)):
        if not callable(value) and not (name == "before_step" and value is None):
            raise TypeError(f"{name} must be a function, got {name} = {value!r}; see the example of critical_batch.")
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise TypeError(
            f"loader must be iterable anew, got {type(loader).__name__}; pass the loader itself, not what iterates it."
        )
    if hasattr(loader, "load_state_dict"):
        raise TypeError(
            f"loader must not keep where it is, got {type(loader).__name__} with a state of its own, which belongs to "
            f"the training; make a second one over the same data."
        )
    if learning_rate not in (None, "sqrt", "linear"):
        raise ValueError(
            f"learning_rate must be 'sqrt', 'linear' or None, got learning_rate = {learning_rate!r}; 'sqrt' for Adam."
        )
    require_positive("tolerance", tolerance, "0.01 allows one per cent of the loss")
    if not (isinstance(confidence, Real) and 0.5 < confidence < 1.0):
        raise ValueError(f"confidence must be in (0.5, 1), got confidence = {confidence!r}; 0.95 is usual.")


def _micro_batches(lengths: Sequence[float], weight: float, sizes: Sequence[int]) -> list[int]:
    """Whole windows of every size, for each length."""
    whole = math.lcm(*sizes)
    if lengths[0] < sizes[-1] * weight:
        raise ValueError(
            f"examples must be at least one window of the largest batch, got examples = {lengths[0]:g} for "
            f"{sizes[-1]} micro-batches of {weight:g}; some twenty windows tell more."
        )
    return sorted({math.ceil(length / weight / whole - 1e-9) * whole for length in lengths})


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's items, pass after pass."""
    while True:
        empty = True
        for item in loader:
            empty = False
            yield item
        if empty:
            raise ValueError("loader must have at least one micro-batch, it has none.")


def _seed(seed: int, generators: Iterable[torch.Generator] = ()) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    for generator in generators:
        generator.manual_seed(seed)


@contextmanager
def _bar(shown: bool) -> Iterator[tuple[Callable[[], object], Callable[[int], object]]]:
    """What advances a bar by one micro-batch, and what tells it how many there are."""
    if not shown or importlib.util.find_spec("tqdm") is None:
        yield lambda: None, lambda total: None
        return
    with importlib.import_module("tqdm").tqdm(desc="branches", unit=" micro-batches", delay=1e-9) as bar:
        yield bar.update, bar.reset
