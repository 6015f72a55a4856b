"""What is asked, a file a study: its plan, tables, claims and figure."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from studies.engine.sweep import Study


def catalogue() -> dict[str, Study]:
    """The studies that ``python -m studies run`` knows, by name: every ``STUDY`` of a module here, in their order.

    Raises:
        ValueError: If two have one name: the second would write over the first one's results.
    """
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    studies: list[Study] = [module.STUDY for module in modules if hasattr(module, "STUDY")]
    names = [study.name for study in studies]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"every STUDY must have a name of its own, got {sorted(repeated)} more than once.")
    return {study.name: study for study in sorted(studies, key=lambda study: (study.order, study.name))}
