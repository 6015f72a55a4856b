"""What the tests' own arrangement relies on."""

import os

import pytest


@pytest.mark.xdist_group("alone")
def test_tests_of_a_group_run_in_one_process(request):
    """With pytest 9.2, pytest-xdist 3.8 forgets groups and does not say so: what is shared is made in every process."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@alone")
