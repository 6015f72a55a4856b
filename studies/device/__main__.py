"""``python -m studies.device OUT_FOLDER``: all sections, or those that are named."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from studies.device.harness import SHARES, Options, Supervisor


def parse(arguments: list[str] | None = None) -> Options:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.device", description=__doc__)
    parser.add_argument("folder", type=Path, help="where tables and texts go; the table of training goes on from there")
    parser.add_argument("--seconds", type=float, default=450.0, help="for all sections together [s]")
    parser.add_argument("--sections", nargs="+", choices=SHARES, default=list(SHARES), help="all if not given")
    parser.add_argument("--no-table", action="store_true", help="without the table of training at full size")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="a GPU if there is one")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a trial of the check itself")
    given = parser.parse_args(arguments)
    wanted = [name for name in SHARES if name in given.sections and not (given.no_table and name == "table")]
    return Options(given.folder, tuple(wanted), given.seconds, given.device, given.tiny)


def main() -> int:
    """Run it; the exit status."""
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    # cuBLAS reads it once, at its first call; without it, its sums are not the same twice.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return Supervisor(options).run()


if __name__ == "__main__":
    sys.exit(main())
