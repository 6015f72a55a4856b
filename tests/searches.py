"""How long a costly random search is: what takes milliseconds an example has fewer than the profile gives others."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

# Times as many as in the deterministic run.
LONGER = {"same": 1, "random": 5, "thorough": 20}


def costly(examples: int, **options: Any) -> settings:
    """Settings of a search of so many examples, and of more where the profile searches at random."""
    return settings(max_examples=examples * LONGER[os.environ.get("HYPOTHESIS_PROFILE", "same")], **options)
