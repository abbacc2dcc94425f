"""A pytest plugin for runs that may be cut: every failure is written down when it happens, not in the end.

`pytest -p at_once` appends to the file that `FAILURES` names.
"""

from __future__ import annotations

import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    # Where tests run in several processes, what they report comes by here once more in the one that started them.
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ["FAILURES"], "a") as file:
            file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")
