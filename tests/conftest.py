"""Hypothesis: the same examples at every run; ``HYPOTHESIS_PROFILE=thorough`` searches at random. An sdist: the
package's tests alone.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest
from hypothesis import settings

# One thread a process: the tests run in as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("random", deadline=None, max_examples=1000)
settings.register_profile("thorough", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

# A source distribution leaves out the studies and the paper, and so the tests that are of them.
ABSENT = [name for name in ("studies", "paper") if importlib.util.find_spec(name) is None]
OF_THEM = re.compile(rf"^(?:from|import) (?:{'|'.join(ABSENT)})\b", re.MULTILINE)
HERE = Path(__file__).parent
collect_ignore = [
    str(path.relative_to(HERE)) for path in HERE.rglob("*.py") if ABSENT and OF_THEM.search(path.read_text())
]

# Fixtures that are expensive to make, once for their module: whoever uses them runs in one process. Those named found
# are made by several ranks.
SHARED = {"browser", "built", "depths", "environment", "found", "ledger", "opened", "trial"}

# Files with the longest tests: begun first, so that no worker is left with one of them at the end.
LONG = {"test_device", "test_planning", "test_readme", "test_reference", "test_studies", "test_sweep"}


def _group(item: pytest.Item) -> str | None:
    """Of the tests that run in one process: those that share a fixture, and those that need the server of processes."""
    function = getattr(item, "function", None)
    if function is not None:
        called = (function.__globals__.get(name) for name in function.__code__.co_names)
        if any(getattr(one, "__module__", None) == "tests.processes" for one in called):
            return "processes"
    names = SHARED.intersection(getattr(item, "fixturenames", ()))
    if "found" in names:
        return "processes"
    return Path(item.location[0]).stem if names else None


# Before xdist reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: Path(item.location[0]).stem not in LONG)
    for item in items:
        if group := _group(item):
            item.add_marker(pytest.mark.xdist_group(group))
