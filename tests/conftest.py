"""Hypothesis: the same examples at every CI run, new ones at every local run. An sdist: the package's tests alone."""

import importlib.util
import os
import re
from pathlib import Path

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("local", deadline=None)
settings.register_profile("thorough", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local"))

# A source distribution leaves out the studies and the paper, and so the tests that are of them.
ABSENT = [name for name in ("studies", "paper") if importlib.util.find_spec(name) is None]
OF_THEM = re.compile(rf"^(?:from|import) (?:{'|'.join(ABSENT)})\b", re.MULTILINE)
collect_ignore = [
    path.name for path in Path(__file__).parent.glob("test_*.py") if ABSENT and OF_THEM.search(path.read_text())
]
