"""Whether the numbers can be trusted: the sections on studies in which the truth is known."""

from __future__ import annotations

import math

import pandas as pd

from studies.engine.provenance import caption
from studies.engine.results import RESULTS
from studies.output.markdown import Cell, known, markdown, number, spread, table


def loop_section() -> str:
    """How the default rule follows a noise scale that is known."""
    every = pd.read_parquet(RESULTS / "closed-loop" / "table.parquet")
    cells = {
        "true noise scale": "{profile}",
        "switches": "{switches:.1f}",
        "reversals": "{reversals:.1f}",
        "rms log error of k": "{rms log error:.2f}",
        "says noise_floor": "{noise floor:.0%}",
        "says guard": "{guard:.0%}",
    }
    rms = every.set_index(["rule", "profile"])["rms log error"]
    hard = "ramp x32, catastrophes"
    return (
        f"{table(every[every['rule'] == 'CLT'], cells)}\n\n"
        f"Where one window in four hundred has gradients a thousand to ten thousand times longer, "
        f"the plain moments freeze (rms {rms['CLT, pooled', hard]:.2f} on the ramp) and the typical channel follows "
        f"(rms {rms['CLT', hard]:.2f}).\n\n"
        f"{_listening_less(every)} "
        f"{caption('closed-loop')}"
    )


def _listening_less(every: pd.DataFrame) -> str:
    """What measuring some windows only makes of the same rule."""
    less, whole = (every[every["rule"] == rule].set_index("profile") for rule in ("CLT, listens less", "CLT"))
    worse = less["rms log error"] / whole["rms log error"]
    still = [rows.loc["constant", "covered"] for rows in (less, whole)]
    return (
        f"Listening less (`listen='auto'`) measures {less['measured'].median():.0%} of the windows (median over "
        f"profiles). Its error is {worse.median():.2f} times that of listening to all, from {worse.min():.2f} "
        f"({worse.idxmin()}) to {worse.max():.2f} ({worse.idxmax()}); it switches "
        f"{less['switches'].mean() / whole['switches'].mean():.2f} times as often, and where the noise scale stands "
        f"still its 95 % interval holds it in {still[0]:.1%} of the windows ({still[1]:.1%} with all measured)."
    )


def calibration_section() -> str:
    """Coverage of the intervals, and the error of every estimator."""
    coverage = pd.read_parquet(RESULTS / "calibration" / "coverage.parquet")
    error = pd.read_parquet(RESULTS / "calibration" / "error.parquet")
    signal = coverage["B / n"].map(math.isfinite)
    lost, alone, chained = coverage[~signal], coverage[signal & (coverage["r"] == 0)], coverage[coverage["r"] > 0]
    most = error["windows"].max()
    last = error[error["windows"] == most]
    equal = last[~last["setting"].str.contains("unequal")]
    rows = []
    for name in last["estimator"].unique():
        own = equal[equal["estimator"] == name].set_index("setting")["rms"]
        rows.append({"estimator": name} | {setting: _rms(rms) for setting, rms in own.items()})
    peers = error[~error["estimator"].str.startswith("adaptbatch")]
    compared = peers["further by"].dropna()
    closer, finite = int((compared < -2.0).sum()), len(peers) - len(compared)
    return (
        f"Over {len(alone)} cases of {alone['runs'].iloc[0]:,} intervals each (B/n of 0.25, 1 and 4; Gaussian and "
        f"heavy-tailed; 10 to 100 windows) the nominal 95 % interval covers the true noise scale in "
        f"{spread(alone['coverage'])} of them, {alone['coverage'].mean():.1%} on average; where the errors of "
        f"consecutive windows are correlated by half, in {spread(chained['coverage'])}. Without any signal it is "
        f"unbounded in {spread(lost['unbounded'])}.\n\n"
        f"Root mean square of log(estimate / truth) after {most} windows, on the same gradients:\n\n"
        f"{markdown(rows)}\n\n"
        f"In {closer} of {len(compared)} comparisons a peer was closer to the truth than the controller by more than "
        f"two standard errors; {finite} more, of the weakest signal after few windows, have no comparison: the "
        f"controller sometimes says there that the noise scale is unbounded, where estimators that clip give a number. "
        f"`python -m studies calibration` repeats all of it. {caption('calibration')}"
    )


def _rms(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "no estimate"


def overhead_section() -> str:
    """Cost and bias, from the overhead study."""
    cost = pd.read_parquet(RESULTS / "overhead" / "cost.parquet")
    bias = pd.read_parquet(RESULTS / "overhead" / "bias.parquet")
    cells: dict[str, Cell] = {
        "one window": "{contender}",
        "time": "{ratio:.3f}",
        "95 % interval": "{ratio low:.3f} to {ratio high:.3f}",
        "host reads": known("host reads"),
        "extra memory allocated": lambda row: (
            number(row["extra bytes"] / 1e6, ",.2f") + " MB" * math.isfinite(row["extra bytes"])
        ),
    }
    return (
        f"{table(cost, cells)}\n\n"
        "Median ratio to the hand-written loop, or of the controller with clipping, AMP, a compiled loss, ranks or on "
        "another network to the same loop without it; interleaved in one process on one CPU thread (DDP and FSDP2: two "
        "processes): 8 micro-batches of 256, 80 layers of width 128, unless the row says otherwise. `adaptbatch` "
        "measures every window (`listen=1.0`), `one window in four` is the default once the noise scale is known. Host "
        "reads and memory are above the same loop's; memory is the sum of all tensors newly allocated in a window.\n\n"
        f"{_profile()}\n\n"
        "The estimates are unbiased: against the exact per-example covariance of a small network the mean over "
        f"{bias['windows'].iloc[0]:,} windows is off by at most {bias['bias %'].abs().max():.1f} % "
        f"and by no more than {bias['bias in SE'].abs().max():.1f} standard errors, with equal and unequal "
        f"micro-batches. `python -m studies overhead` measures all of this on your machine. {caption('overhead')}"
    )


def _profile() -> str:
    """What each part of the controller takes."""
    parts = pd.read_parquet(RESULTS / "overhead" / "profile.parquet")
    parts["setting"] = parts["network"] + parts["measured"].map(lambda share: ", all" if share == 1.0 else ", 1 in 4")
    said = [f"{us:,.0f} us ({100 * share:.2f} %)" for us, share in zip(parts["us"], parts["share"], strict=True)]
    wide = parts.assign(said=said).pivot_table("said", "part", "setting", aggfunc="first")
    wide = wide.loc[parts["part"].unique(), parts["setting"].unique()].reset_index()
    cells: dict[str, Cell] = {name: f"{{{name}}}" for name in wide}
    return (
        f"Where a window's time goes, by the network and the windows that are measured (medians; what each part is "
        f"says `studies/questions/overhead/profile.py`):\n\n{table(wide, cells)}"
    )


def planning_section() -> str:
    """What one run foretold of every other batch, beside what tuned fixed batches took."""
    folder = RESULTS / "planning"
    foretold, claims = (pd.read_parquet(folder / f"{name}.parquet") for name in ("predictions", "claims"))
    blind = pd.read_parquet(folder / "blind.parquet")
    columns: dict[str, Cell] = {
        "task": "{task}",
        "batch": "{batch:,.0f}",
        "updates it took": known("updates", ",.0f"),
        "foretold (95 %)": lambda row: _between(row, "predicted", ",.0f"),
        "calibrated by branches": known("calibrated", ",.0f"),
    }
    verdicts: dict[str, Cell] = {
        "": "{claim}",
        "claim": "{what}",
        "task": "{where}",
        "value (95 %)": lambda row: _between(row, "value", ".2f"),
        "verdict": "{verdict}",
    }
    beside = ", ".join(
        f"{way} at every batch: {' to '.join(sorted({f'{error:.2f}' for error in own}))}"
        for way, own in blind.groupby("predictor", sort=False)["error"]
    )
    return (
        f"{table(foretold, columns)}\n\n"
        f"From one run at {' or '.join(f'{n:.0f}' for n in foretold['start'].unique())} examples or characters a step: "
        f"updates that a tuned fixed batch takes to "
        f"the loss at which that run ended, each decaying its rate over its own budget, and what `ab.plan` made of the "
        f"run's noise. What expects nothing of the noise is off by a median factor of ({beside}).\n\n"
        f"{table(claims, verdicts)}"
    )


def _between(row: pd.Series, name: str, form: str) -> str:
    return f"{number(row[name], form)} ({number(row['low'], form)} to {number(row['high'], form)})"
