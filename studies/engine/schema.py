"""The one results schema: a row is one optimizer step of one run.

The columns of ``controller.history`` (see :class:`adaptbatch.History`) and, around them, which run the row belongs to
and what the training loop measured beside the controller. What a whole run shares (network, data, versions, commit) is
in the table's ``attrs``, under ``runs``.
"""

from __future__ import annotations

import math

import pandas as pd

RUN_COLUMNS: dict[str, str] = {
    "study": "str",  # name of the study
    "arm": "str",  # name of the arm
    "seed": "int64",  # of initialisation, data order and sampled codes
}
HISTORY_COLUMNS: dict[str, str] = {
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
LOOP_COLUMNS: dict[str, str] = {
    "at_limit": "bool",  # a closed-loop rule's k stood at min_steps or max_steps
    "micro_batch_loss_max": "float64",  # largest micro-batch loss of the window
    "spikes": "int64",  # micro-batches of the window whose loss is a spike (studies.engine.analysis.spike_flags)
    "validation_loss": "float64",  # mean loss on the fixed probe set after the step; NaN where it was not evaluated
}
# Joined after results of this schema were stored, where they are NaN.
JOINED = ("batch_grad_norm", "applied_grad_norm", "shard_ratio")
COLUMNS = RUN_COLUMNS | HISTORY_COLUMNS | LOOP_COLUMNS
SCHEMA_VERSION = 3


def conform(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` with exactly the schema's columns, order and types; those of :data:`JOINED` may be missing.

    Raises:
        ValueError: If a column is unknown or missing.
    """
    table = table.assign(**{name: math.nan for name in JOINED if name not in table})
    unknown, missing = sorted(set(table) - set(COLUMNS)), sorted(set(COLUMNS) - set(table))
    if unknown or missing:
        raise ValueError(f"table must have the columns of the schema, got unknown {unknown} and missing {missing}.")
    return table[list(COLUMNS)].astype(COLUMNS)
