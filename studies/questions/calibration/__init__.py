"""Do the intervals hold, and is anyone closer to the truth? Two simulations in which the truth is known.

*Coverage*: how often the 95 % interval of the noise scale contains it, for Gaussian and heavy-tailed examples,
independent and autocorrelated windows, and without any signal.

*Error*: the noise scale of a real torch model, estimated from the same gradients by the controller and by every peer
that is installed (they live in the ``peers`` extra). The parameters stand still, so that the truth does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, product

import joblib
import pandas as pd

from studies.questions.calibration import coverage, error


def run(
    windows: Sequence[int] = (30, 200), repeats: int = 40, runs: int = 4000, workers: int = 2
) -> dict[str, pd.DataFrame]:
    """Both studies, some minutes.

    Args:
        windows: After which the estimators are read.
        repeats: Of each setting of the error study.
        runs: Intervals of each case of the coverage study.
        workers: Processes.

    Returns:
        ``"coverage"``, a row for each of :data:`coverage.CASES`, and ``"error"``, see :func:`error.error_table`.
    """
    parallel = joblib.Parallel(n_jobs=workers)
    covered = parallel(
        joblib.delayed(coverage.measure_coverage)(case, runs, seed) for seed, case in enumerate(coverage.CASES)
    )
    jobs = product(error.SETTINGS, [tuple(windows)], range(repeats))
    found = parallel(joblib.delayed(error.estimates)(*job) for job in jobs)
    return {"coverage": pd.DataFrame(covered), "error": error.error_table(pd.DataFrame(chain.from_iterable(found)))}
