"""What a release says of itself, in three places, is the same."""

from __future__ import annotations

import re
from pathlib import Path

import adaptbatch as ab

ROOT = Path(__file__).parents[2]


def test_the_citation_is_of_this_version():
    assert f"\nversion: {ab.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_has_this_version_and_a_date_once_it_is_released():
    text = (ROOT / "CHANGELOG.md").read_text()
    released, _, development = ab.__version__.partition(".dev")
    heading = re.search(rf"^## \[{re.escape(released)}\] - (unreleased|\d{{4}}-\d\d-\d\d)$", text, re.MULTILINE)
    assert heading is not None
    assert (heading[1] == "unreleased") == bool(development)
