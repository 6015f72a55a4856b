"""One row per window: what was measured, what was decided and why."""

from __future__ import annotations

import importlib.util
import math
import warnings
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptbatch import estimate
from adaptbatch.records import Decision, Evidence, NoiseEstimate, WindowResult
from adaptbatch.reporting.loggers import Logger
from adaptbatch.state import State

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from adaptbatch.measure.result import PendingResult

#: The columns of a history in their order, with their pandas types.
COLUMNS: dict[str, str] = {
    "optimizer_step": "int64",
    "examples_seen": "float64",
    "backward_passes": "int64",
    "wall_seconds": "float64",
    "accumulation_steps": "int64",
    "global_batch": "float64",
    "target_batch": "float64",
    "reason": "str",
    "loss": "float64",
    "grad_sq_norm": "float64",
    "noise_trace": "float64",
    "noise_scale": "float64",
    "noise_scale_low": "float64",
    "noise_scale_high": "float64",
    "relative_error": "float64",
    "noise_scale_typical": "float64",
    "noise_scale_metric": "float64",
    "tail_excess": "float64",
    "tail_share": "float64",
    "elasticity": "float64",
    "consecutive_product": "float64",
    "batch_grad_norm": "float64",
    "applied_grad_norm": "float64",
    "shard_ratio": "float64",
    "lr": "float64",
    "lr_factor": "float64",
    "beta2": "float64",
    "second_moment_factor": "float64",
    "skipped": "bool",
}


class History:
    """Rows of decisions, one per window (skipped ones included), in the order of :data:`.COLUMNS`.

    ====================  ==========================================================================================
    optimizer_step        steps taken so far, this one included; a skipped window repeats the number
    examples_seen         sum of all weights so far [examples]
    backward_passes       backward passes so far
    wall_seconds          seconds since the controller was made
    accumulation_steps    backward passes of this window
    global_batch          sum of this window's weights ``n`` [examples]
    target_batch          the batch the rule wants next, unrounded and unlimited [examples]
    reason                why the next window has its size
    loss                  weighted mean loss of the window
    grad_sq_norm          this window's unbiased ``|G|^2``; may be negative
    noise_trace           this window's unbiased ``tr(Sigma)`` [g^2 example]
    noise_scale           pooled ``B = tr(Sigma) / |G|^2`` [examples], with its 95 % interval ``_low``, ``_high``
    relative_error        pooled ``sqrt(phi(n) tr(Sigma)) / |G|`` of this window's gradient [1]
    noise_scale_typical   ``B`` of an ordinary window (:mod:`~adaptbatch.estimate.typical`), in its metric [examples]
    noise_scale_metric    pooled ``B`` in the optimizer's metric [examples]; NaN without one or while it is not warm
    tail_excess           this window's ``Q / n`` over the median of those before [1]
    tail_share            share of the pooled sum of squares beyond the bound of the typical channel [1]
    elasticity            ``d ln B / d ln n`` over the present climb [1]; near 1 at a noise floor
    consecutive_product   ``<g_t, g_{t-1}>`` [g^2]; NaN without ``consecutive=True``
    batch_grad_norm       ``|g|`` of this window's mean gradient, before clipping
    applied_grad_norm     the same as the optimizer got it, after clipping (not a trainer's own)
    shard_ratio           scatter between the ranks' means over that within ranks [1]: near 1 where shards are alike;
                          NaN in one process, with FSDP2 and ``sync="every"``
    lr                    learning rate of the first parameter group, as applied
    lr_factor             what a coupling multiplied it by; 1 without one
    beta2                 decay of the first group's second moment, as applied; NaN where it has none
    second_moment_factor  what a coupling multiplied the second moment by before the step; 1 without one
    skipped               whether the step was left out: not finite, or an exceedance that a guard skips
    ====================  ==========================================================================================

    NaN where a window holds no evidence (one micro-batch); ``noise_scale_high`` is infinite for an unbounded interval.

    Example:
        >>> history = History()
        >>> len(history), list(history.to_pandas().columns)[:3]
        (0, ['optimizer_step', 'examples_seen', 'backward_passes'])
    """

    def __init__(self, settle: Callable[[], None] | None = None, unit: str = "examples") -> None:
        self.unit = unit
        # Columns of machine numbers take a sixth of the memory of a dictionary for each row.
        self._columns: dict[str, Any] = {name: _empty(kind) for name, kind in COLUMNS.items()}
        self._late = settle
        self._complete = 0
        self._loggers: list[Logger] = []

    def __getstate__(self) -> dict[str, Any]:
        # Rows travel to other processes; the controller that fills them, and who watches, do not.
        self._settle()
        return self.__dict__ | {"_late": None, "_loggers": []}

    def _settle(self) -> None:
        """Have what is still on its way to the host written down."""
        if self._late is not None:
            self._late()

    def release(self) -> None:
        """Be complete, and let go of the controller: its rows do not keep a model in memory."""
        self._settle()
        self._late = None

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; its keys are exactly :data:`.COLUMNS`."""
        if row.keys() != COLUMNS.keys():
            raise ValueError(f"row must have exactly the history's columns, differs in {row.keys() ^ COLUMNS.keys()}.")
        for name, value in row.items():
            self._columns[name].append(value)

    def cut(self, length: int) -> int:
        """Drop all rows but the first ``length``; returns how many are left.

        Example:
            >>> history = History()
            >>> for _ in range(3):
            ...     history.append(dict.fromkeys(COLUMNS, 0))
            >>> history.cut(2), history.cut(5), history.cut(-1)
            (2, 2, 0)
        """
        self._settle()
        for column in self._columns.values():
            del column[max(length, 0) :]
        self._complete = min(self._complete, len(self))
        return len(self)

    def amend(self, index: int, values: dict[str, float]) -> None:
        """Fill in what reached the host late; this row, and any before it, is complete then."""
        for name, value in values.items():
            self._columns[name][index] = value
        new = range(self._complete, index + 1)
        self._complete = max(self._complete, index + 1)
        for logger in self._loggers:
            self._tell(logger, new)

    def fill(self, pending: PendingResult, population: float) -> None:
        """Fill in a window's own measurement, if its row waits for it; reads the host.

        Args:
            pending: Of the window.
            population: Examples in the data set, or infinity.
        """
        if pending.row is not None:
            self.amend(pending.row, result_row(pending.result, population))
            pending.row = None

    def watch(self, logger: Logger) -> None:
        """Give ``logger`` every row from now on, in order, as soon as it is complete.

        On a GPU that may be one window late. The last row comes when the history is read, with :meth:`unwatch` or with
        the controller's ``close()``; so the logger closes last::

            with closing(TensorBoardLogger("runs/1")) as logger, controller:
                controller.history.watch(logger)

        In a distributed run every rank has the same rows: watch on rank 0 only.

        A logger that raises is left out from then on, with a warning: a full disk must not end a training whose rows
        are all here, and must not leave the other ranks waiting for this one.

        Args:
            logger: One of :mod:`adaptbatch.reporting.loggers`, or any object with its ``log(row)`` and ``close()``.

        Raises:
            TypeError: If ``logger`` is none.
            ValueError: If it is watching already.

        Example:
            >>> class Reasons:
            ...     def log(self, row):
            ...         print(row["optimizer_step"], row["reason"])
            ...
            ...     def close(self): ...
            >>> history = History()
            >>> history.watch(Reasons())
            >>> history.append(dict.fromkeys(COLUMNS, 0) | {"optimizer_step": 7, "reason": "grow"})
            >>> history.amend(0, {"loss": 0.5})
            7 grow
        """
        if not isinstance(logger, Logger):
            raise TypeError(
                f"logger must have the methods log(row) and close(), got {type(logger).__name__}; "
                f"adaptbatch.reporting.loggers wraps TensorBoard, Weights & Biases and the terminal."
            )
        if any(one is logger for one in self._loggers):
            raise ValueError(f"logger must not be watching already, got {logger!r} again; unwatch() it first.")
        self._loggers = [*self._loggers, logger]

    def unwatch(self, logger: Logger) -> None:
        """Give ``logger`` what is complete by now and nothing more; closing it is left to its owner."""
        self._settle()
        self._loggers = [one for one in self._loggers if one is not logger]

    def _tell(self, logger: Logger, indices: range) -> None:
        try:
            for index in indices:
                logger.log({name: _plain(column[index], COLUMNS[name]) for name, column in self._columns.items()})
        except Exception as error:
            self._loggers = [one for one in self._loggers if one is not logger]
            warnings.warn(
                f"{type(logger).__name__} raised {error!r} and is told nothing more; the training goes on and the "
                f"history is complete. Once the cause is mended, history.watch(logger) goes on from there.",
                RuntimeWarning,
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self._columns["reason"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._settle()
        return (dict(zip(COLUMNS, values, strict=True)) for values in zip(*self._columns.values(), strict=True))

    def __repr__(self) -> str:
        return f"History({len(self)} windows)"

    def to_pandas(self) -> pd.DataFrame:
        """All rows as a DataFrame with the documented types; ``attrs["unit"]`` says what weights count."""
        import pandas as pd

        self._settle()
        columns = {name: pd.Series(list(self._columns[name]), dtype=kind) for name, kind in COLUMNS.items()}
        table = pd.DataFrame(columns)
        table.attrs["unit"] = self.unit
        return table

    def to_parquet(self, path: str | Path) -> None:
        """Write all rows to one Parquet file (needs the ``parquet`` extra).

        Raises:
            ModuleNotFoundError: If pyarrow is not installed.
        """
        if importlib.util.find_spec("pyarrow") is None:
            raise ModuleNotFoundError('history.to_parquet() needs pyarrow: pip install "adaptbatch[parquet]".')
        self.to_pandas().to_parquet(path, index=False)

    def to_html(self, path: str | Path, *, title: str = "adaptbatch") -> Path:
        """Write one self-contained page about this run, see :func:`adaptbatch.report` (needs the ``report`` extra)."""
        from adaptbatch.reporting.html import report

        return report(self, path, title=title)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the batch and the noise scale with its interval over the examples seen (needs the ``plot`` extra).

        Args:
            ax: Where to draw; None: a figure of its own.

        Returns:
            The matplotlib axes, both logarithmic in examples; an interval without an upper end reaches the top.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            ValueError: If there is no window yet.

        Example:
            >>> history = History()
            >>> row = dict.fromkeys(COLUMNS, 1) | {"reason": "hold"}
            >>> for step in (1, 2, 3):
            ...     history.append(row | {"examples_seen": 64.0 * step, "optimizer_step": step})
            >>> history.plot().get_xlabel()
            'examples seen'
        """
        from adaptbatch.reporting.plot import draw_history

        return draw_history(self.to_pandas(), ax)

    def _repr_html_(self) -> str:
        from adaptbatch.reporting.html import notebook

        return notebook(self.to_pandas())


def decision_row(state: State, evidence: Evidence, decision: Decision, batch: float) -> dict[str, Any]:
    """The part of a row that follows from what is pooled; the window's own numbers are NaN until they arrive.

    Args:
        state: After the decision.
        evidence: It was made on.
        decision: For the next window.
        batch: ``n`` of the window that ended [examples].
    """
    in_metric = state.metric.estimate()
    euclidean = state.pooled.estimate() if state.metric.weight > 0.0 else evidence.pooled
    low, high = estimate.noise_scale_interval(euclidean)
    own = ("loss", "grad_sq_norm", "noise_trace", "consecutive_product", "batch_grad_norm", "applied_grad_norm", "lr")
    return dict.fromkeys(own, math.nan) | {
        "examples_seen": state.progress.examples_seen,
        "global_batch": batch,
        "target_batch": decision.target_batch,
        "reason": decision.reason,
        "noise_scale": estimate.noise_scale(euclidean),
        "noise_scale_low": low,
        "noise_scale_high": high,
        "relative_error": estimate.relative_error(evidence.pooled, batch, state.progress.population),
        "noise_scale_typical": estimate.noise_scale(evidence.typical),
        "noise_scale_metric": estimate.noise_scale(in_metric),
        "tail_excess": evidence.tail.excess,
        "tail_share": evidence.tail.share,
        "elasticity": evidence.response.elasticity,
        "shard_ratio": state.shards.ratio(),
    }


def result_row(result: WindowResult, population: float) -> dict[str, float]:
    """The part of a row that is a window's own measurement.

    Args:
        result: Of the window.
        population: Examples in the data set, or infinity.
    """
    measured = result.measurement
    pair = estimate.estimate_window(measured, population) if measured.finite else _NO_EVIDENCE
    return {
        "loss": result.loss,
        "lr": result.lr,
        "grad_sq_norm": pair.grad_sq_norm,
        "noise_trace": pair.noise_trace,
        "consecutive_product": measured.consecutive_product,
        "batch_grad_norm": math.sqrt(measured.batch_sq_norm),
        "applied_grad_norm": math.sqrt(result.applied_sq_norm),
    }


_NO_EVIDENCE = NoiseEstimate(grad_sq_norm=math.nan, noise_trace=math.nan)


def _plain(value: Any, kind: str) -> Any:
    return bool(value) if kind == "bool" else value


def _empty(kind: str) -> Any:
    return array({"int64": "q", "float64": "d", "bool": "b"}[kind]) if kind != "str" else []
