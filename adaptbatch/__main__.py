"""``python -m adaptbatch plan run.parquet``: what :func:`adaptbatch.plan` says of a run that was written to a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_FLOATS = {
    "micro-batch": "examples of one backward pass on one device; the run's unless given",
    "seconds-per-step": "seconds of a window whatever its size; fitted to the run unless given",
    "seconds-per-example": "seconds of an example on one device beside that; fitted unless given",
    "seconds-per-sync": "seconds of a window's synchronisation on several devices",
    "calibration": "the critical batch over the noise scale, as adaptbatch.critical_batch measures it",
    "confidence": "coverage of the intervals",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 2 and a sentence where it cannot be done.

    Example:
        >>> main(["plan", "nowhere.parquet"])
        Traceback (most recent call last):
        SystemExit: 2
    """
    parser = _parser()
    options = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    del options["command"]
    runs, devices = options.pop("runs"), options.pop("devices", [None])

    from adaptbatch.planning.advice import plan

    for run in runs:
        for count in devices:
            try:
                text = repr(plan(run, devices=count, **options))
            except (OSError, ValueError, ImportError) as error:
                parser.error(f"{run}: {error}")
            print(f"{run}\n{text}\n" if len(runs) > 1 else f"{text}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="adaptbatch", description="What the gradient noise of a run tells.")
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="which batch, on how many devices, and at what cost in examples")
    plan.add_argument("runs", nargs="+", metavar="RUN", help="a history's Parquet or CSV file")
    plan.add_argument("--batches", nargs="+", type=float, metavar="N", help="to compare; powers of two unless given")
    plan.add_argument("--devices", nargs="+", type=int, metavar="D", help="to share a window; a plan for each")
    plan.add_argument("--measured-on", type=int, metavar="D", help="devices of the run; 1 unless given")
    for name, text in _FLOATS.items():
        plan.add_argument(f"--{name}", type=float, metavar="X", help=text)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
