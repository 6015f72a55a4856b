"""Watching a run: TensorBoard, Weights & Biases and one line in the terminal.

``history.watch(logger)`` hands over each row of the history once it is complete. Curves are drawn over
``examples_seen``, where runs of different batch sizes can be compared; a value that is NaN or infinite is left out.
Each package is imported when its logger is made; of torch only the writer that it has for TensorBoard.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import weakref
from collections.abc import Callable, Mapping
from os import PathLike
from types import ModuleType
from typing import Any, Literal, Protocol, TextIO, runtime_checkable

from adaptbatch.checks import require_unit


@runtime_checkable
class Logger(Protocol):
    """What a history tells its rows to; ``contextlib.closing`` closes it."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Take one complete row: the columns of the history, as plain ints, floats, bools and strings."""
        ...

    def close(self) -> None:
        """Write what is left and let go; again is harmless."""
        ...


class TensorBoardLogger:
    """Draws every column over ``examples_seen``, whole examples as TensorBoard's step, and writes each new ``reason``.

    Where weights are below one, each row has a step of its own all the same, one after the last.

    Costs about a millisecond a row.

    Args:
        writer: A directory for a writer of its own, or a ``SummaryWriter`` (torch's, or any with its ``add_scalar``,
            ``add_text`` and ``flush``), which is flushed but stays open at :meth:`close`.
        prefix: Group of the curves, as in ``adaptbatch/loss``.

    Raises:
        ModuleNotFoundError: If tensorboard is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     logger = TensorBoardLogger(directory)
        ...     logger.log({"examples_seen": 64.0, "loss": 0.5, "noise_scale": float("nan"), "reason": "grow"})
        ...     logger.close()
    """

    def __init__(self, writer: str | PathLike[str] | Any, *, prefix: str = "adaptbatch") -> None:
        self._owned = isinstance(writer, str | PathLike)
        self.writer: Any = writer
        if self._owned:
            self.writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(writer))
        self.prefix = prefix
        self._reason: str | None = None
        self._step = -1

    def log(self, row: Mapping[str, Any]) -> None:
        """Add the row's points, and its reason where it is another than before."""
        step = self._step = max(round(row["examples_seen"]), self._step + 1)
        for name, value in finite(row).items():
            self.writer.add_scalar(f"{self.prefix}/{name}", value, step)
        if row["reason"] != self._reason:
            self._reason = row["reason"]
            self.writer.add_text(f"{self.prefix}/reason", self._reason, step)

    def close(self) -> None:
        """Write what is left; the writer of a directory is closed."""
        self.writer.flush()
        if self._owned:
            self.writer.close()


class WandbLogger:
    """Logs every column to a Weights & Biases run, with ``examples_seen`` as the axis of the curves.

    The run's own step counts calls of ``run.log`` as always, so your own metrics may be logged beside; to draw them
    over examples too, log ``adaptbatch/examples_seen`` with them and name it in ``run.define_metric``.

    Args:
        run: What ``wandb.init`` returned; finishing it stays yours.
        prefix: Group of the curves, as in ``adaptbatch/loss``.

    Example:
        >>> class Run:
        ...     def define_metric(self, name, **axis): ...
        ...     def log(self, data):
        ...         print(data)
        >>> WandbLogger(Run()).log({"examples_seen": 64.0, "loss": float("nan"), "reason": "grow"})
        {'adaptbatch/examples_seen': 64.0, 'adaptbatch/reason': 'grow'}
    """

    def __init__(self, run: Any, *, prefix: str = "adaptbatch") -> None:
        self.run = run
        self.prefix = prefix
        run.define_metric(f"{prefix}/examples_seen")
        run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/examples_seen")

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the row, its reason as text."""
        values = finite(row) | {"reason": row["reason"]}
        self.run.log({f"{self.prefix}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        """Nothing: the run is not this logger's."""


class ProgressLine:
    """One live line in the terminal, by rich or tqdm::

        10% 12,800 of 130,000 examples  loss 41.2  k 4  n 128  B 51 (35 to 127)  hold  [00:04<00:38]

    ``B`` is the pooled noise scale with its 95 % interval, ``-`` while it is unknown.

    Args:
        budget: Examples of the whole training; None: unknown, and so is the time that is left.
        package: ``"rich"``, ``"tqdm"``, or None for what is installed, rich first. Into a file rich writes the last
            state only, tqdm one after the other.
        file: Where to; None: standard error.
        unit: What weights count, as the controller was told.

    Raises:
        ModuleNotFoundError: If the package, or both, are not installed.
        ValueError: If ``budget`` is not positive or ``package`` is another.

    Example:
        >>> import io
        >>> line = ProgressLine(130_000, package="tqdm", file=io.StringIO())
        >>> line.log({"examples_seen": 64.0, "accumulation_steps": 2, "global_batch": 64.0, "noise_scale": 51.2,
        ...     "noise_scale_low": 35.1, "noise_scale_high": 127.4, "reason": "hold", "loss": 41.23})
        >>> line.text
        '0% 64 of 130,000 examples  loss 41.23  k 2  n 64  B 51 (35 to 127)  hold'
        >>> line.close()
    """

    def __init__(
        self,
        budget: float | None = None,
        *,
        package: Literal["rich", "tqdm"] | None = None,
        file: TextIO | None = None,
        unit: str = "examples",
    ) -> None:
        require_unit(unit)
        if budget is not None and not 0.0 < budget < math.inf:
            raise ValueError(f"budget must be positive and finite, got budget = {budget!r}; None: it is unknown.")
        if package not in (None, "rich", "tqdm"):
            raise ValueError(f"package must be 'rich', 'tqdm' or None for either, got package = {package!r}.")
        self.budget, self.unit = budget, unit
        self.text = ""
        self._package = _imported_line(package)
        self._file = file
        self._show: Callable[[float, str], object] | None = None
        self._stop: Callable[[], object] = lambda: None

    def log(self, row: Mapping[str, Any]) -> None:
        """Show the row; the first one starts the line, where a resumed run stands."""
        seen, end = row["examples_seen"], math.inf if self.budget is None else self.budget
        self.text = _line_text(row, self.budget, self.unit)
        if self._show is None:
            start = _rich_line if self._package.__name__ == "rich" else _tqdm_line
            begun = min(seen - row["global_batch"], end)
            self._show, stop = start(self.text, begun, self.budget, self._file or sys.stderr)
            # rich hides the cursor until it is stopped, which a run that dies never does.
            self._stop = weakref.finalize(self, stop)
        self._show(min(seen, end), self.text)

    def close(self) -> None:
        """Leave the last state standing."""
        self._stop()


def finite(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row that a curve can show: no text, no NaN, no infinity; a truth is 0 or 1.

    Example:
        >>> finite({"loss": 0.5, "noise_scale_high": float("inf"), "reason": "grow", "skipped": True})
        {'loss': 0.5, 'skipped': 1}
    """
    numbers = {name: value for name, value in row.items() if not isinstance(value, str) and math.isfinite(value)}
    return {name: int(value) if isinstance(value, bool) else value for name, value in numbers.items()}


def _line_text(row: Mapping[str, Any], budget: float | None, unit: str) -> str:
    size, low, high = (_size(row[f"noise_scale{end}"]) for end in ("", "_low", "_high"))
    scale = size if "-" in (size, low, high) else f"{size} ({low} to {high})"
    seen, loss = row["examples_seen"], row["loss"]
    examples = f"{_size(seen)} {unit}"
    if budget is not None:
        examples = f"{seen / budget:.0%} {_size(seen)} of {_size(budget)} {unit}"
    return (
        f"{examples}  loss {'-' if math.isnan(loss) else format(loss, '.4g')}  k {row['accumulation_steps']}  "
        f"n {_size(row['global_batch'])}  B {scale}  {row['reason']}"
    )


def _size(examples: float) -> str:
    return "-" if math.isnan(examples) else f"{examples:,.0f}"


_Line = tuple[Callable[[float, str], object], Callable[[], object]]


def _rich_line(text: str, begun: float, budget: float | None, file: TextIO) -> _Line:
    """A line that stands at ``begun`` examples: how to show another state, and how to stop."""
    progress, console, table = (importlib.import_module(f"rich.{part}") for part in ("progress", "console", "table"))
    # Of a narrow terminal the times take what they need, the text what is left.
    rest = table.Column(ratio=1, no_wrap=True)
    columns = [progress.TextColumn("{task.description}", markup=False, table_column=rest), progress.TimeElapsedColumn()]
    if budget is not None:
        columns += [progress.TimeRemainingColumn()]
    line = progress.Progress(*columns, console=console.Console(file=file), expand=True)
    task = line.add_task(text, total=budget, completed=begun)
    line.start()
    return lambda seen, text: line.update(task, completed=seen, description=text), line.stop


def _tqdm_line(text: str, begun: float, budget: float | None, file: TextIO) -> _Line:
    """The same."""
    form = "{desc}  [{elapsed}]" if budget is None else "{desc}  [{elapsed}<{remaining}]"
    tqdm = importlib.import_module("tqdm").tqdm
    # The delay leaves out a first line without text.
    line = tqdm(total=budget, initial=begun, file=file, bar_format=form, dynamic_ncols=True, delay=1e-9)
    line.set_description_str(text)

    def show(seen: float, text: str) -> None:
        line.set_description_str(text, refresh=False)
        line.update(seen - line.n)

    return show, line.close


def _imported_line(package: str | None) -> ModuleType:
    installed = (name for name in ("rich", "tqdm") if importlib.util.find_spec(name) is not None)
    return _imported(package or next(installed, "rich"), "progress")


def _imported(module: str, extra: str) -> ModuleType:
    """An optional package, when its logger is made."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} must be installed for this logger; pip install 'adaptbatch[{extra}]'.", name=error.name
        ) from error
