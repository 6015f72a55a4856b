"""In place of the sections of the device check. Without torch: a quick start of the processes that run these."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from studies.device.harness import Options

STAMP = {"device": "x", "torch": "y", "adaptbatch": "z"}


def misbehaving(options: Options, names: tuple[str, ...], ends: float, pipe: Any) -> None:
    """One dies, one hangs after it has started a process, one fails, one is well."""
    os.setsid()
    for name in names:
        pipe.send((name, 0.0, STAMP))
        if name == "sync":
            os._exit(3)
        if name == "time":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (options.folder / "child").write_text(str(child.pid))
            time.sleep(600)
        pipe.send((name, name != "exact", "a row failed" if name == "exact" else ""))


def stillborn(options: Options, names: tuple[str, ...], ends: float, pipe: Any) -> None:
    os._exit(4)
