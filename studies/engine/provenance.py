"""Which release a study measured, and whether the code that it measures has changed since. No torch.

What is compared is what Python executes: comments, docstrings, formatting, and where a module lies do not count.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from studies.engine.results import RESULTS

PACKAGE = Path(__file__).parents[2] / "adaptbatch"
FILE = "provenance.json"

# The package's modules by what they do, as paths within it.
DECISION = ("records.py", "state.py", "estimate/*.py", "rules/*.py")
MEASUREMENT = ("checks.py", "accumulate/*.py", "measure/*.py")
FRAME = ("controller.py", "sizing.py", "loop.py", "mechanics.py", "reporting/history.py")
LOOP = (*FRAME, "optimizer/*.py")

# What each study measures of the package itself.
MEASURED: dict[str, tuple[str, ...]] = {
    "quick": (*DECISION, *MEASUREMENT, *LOOP),
    "closed-loop": DECISION,
    "calibration": ("records.py", "state.py", "estimate/*.py", *MEASUREMENT, *FRAME),
    "overhead": (*DECISION, *MEASUREMENT, *LOOP, "measure/ghost/*.py"),
}


class ProvenanceError(LookupError):
    """What a study says that it measures is not there."""


def digest(modules: Iterable[str], package: Path = PACKAGE) -> str:
    """What Python executes of the modules, as SHA-256.

    Args:
        modules: Paths or globs within the package.
        package: Its folder.

    Raises:
        ProvenanceError: If there is no such module.
    """
    paths: set[Path] = set()
    for module in modules:
        found = set(package.glob(module))
        if not found:
            raise ProvenanceError(f"modules must be of {package.name}, got {module!r}; name what is measured anew.")
        paths |= found
    shapes = sorted(json.dumps(_shape(ast.parse(path.read_text()))) for path in paths)
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()


def _shape(node: object) -> object:
    """A syntax tree without positions and empty fields, in which releases of Python differ."""
    if isinstance(node, ast.AST):
        fields = {name: shape for name, value in ast.iter_fields(node) if (shape := _shape(value))}
        return [type(node).__name__, fields]
    if isinstance(node, list):
        return [_shape(item) for item in node if not _is_said(item) and not _is_own_import(item)]
    return None if node is None else repr(node)


def _is_said(node: object) -> bool:
    """A string that stands alone: a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_own_import(node: object) -> bool:
    """It says where a module lies, not what it does."""
    return isinstance(node, ast.ImportFrom) and (node.level > 0 or str(node.module).split(".")[0] == PACKAGE.name)


def record(study: str, folder: Path, package: Path = PACKAGE) -> None:
    """Write beside a study's new results what they were measured on."""
    from adaptbatch import __version__

    modules = MEASURED[study]
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"release": __version__, "digest": digest(modules, package), "modules": modules}
    (folder / FILE).write_text(json.dumps(kept, indent=2) + "\n")


def is_current(study: str, results: Path = RESULTS, package: Path = PACKAGE) -> bool:
    """Whether a study's results were measured on the code as it is."""
    return _kept(study, results)["digest"] == digest(MEASURED[study], package)


def caption(study: str, results: Path = RESULTS, package: Path = PACKAGE) -> str:
    """A sentence for what shows a study's results: the release, and whether the code is another since."""
    kept = _kept(study, results)
    if is_current(study, results, package):
        return f"Measured on {kept['release']}."
    if kept["digest"] is None:
        return f"Measured on {kept['release']}; whether the code that it measures has changed since is not known."
    return f"Measured on {kept['release']}; the code that it measures has changed since."


def warn(results: Path = RESULTS, package: Path = PACKAGE) -> None:
    """Say on stderr which studies were measured on other code."""
    for study in MEASURED:
        if not is_current(study, results, package):
            print(f"warning: {study}: {caption(study, results, package)}", file=sys.stderr)


def _kept(study: str, results: Path) -> dict[str, str | None]:
    path = results / study / FILE
    if not path.is_file():
        return {"release": "an unknown release", "digest": None}
    kept: dict[str, str | None] = json.loads(path.read_text())
    return kept
