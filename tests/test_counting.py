"""Where coverage is counted (see `conftest.py`)."""

from __future__ import annotations

import sys

import pytest


def counting() -> bool:
    return "coverage" in sys.modules and sys.modules["coverage"].Coverage.current() is not None


@pytest.mark.parametrize("case", range(3))
def test_in_the_first_case_of_a_test(case: int, pytestconfig: pytest.Config) -> None:
    """Also in a worker, in which coverage begins twice."""
    asked = pytestconfig.pluginmanager.hasplugin("_cov") and not pytestconfig.getoption("no_cov")
    assert counting() == (asked and case == 0)


@pytest.mark.parametrize("way", ["interpreter"])
def test_not_under_the_interpreter(way: str) -> None:
    assert not counting()
