"""The API reference: HTML from the docstrings, by Sphinx."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent
ROOT = SOURCE.parent.parent


def build(out: Path) -> Path:
    """Write the reference into ``out``, the same bytes for the same sources; every warning is an error.

    Args:
        out: The folder of the pages, made if it is missing.

    Returns:
        Its first page.

    Raises:
        RuntimeError: If Sphinx warned or failed, with what it said.
    """
    with tempfile.TemporaryDirectory() as doctrees:
        # A process of its own: Sphinx imports what it documents and leaves its handlers in logging.
        command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-E", "-n", "-W", "--keep-going", "-d", doctrees]
        done = subprocess.run([*command, str(SOURCE), str(out.resolve())], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"the reference was not built:\n{done.stderr}")
    return out / "index.html"
