"""A pytest plugin for runs that may be cut off: it writes each failure when it happens, not at the end.

`pytest -p at_once` appends to the file that `FAILURES` names.
"""

from __future__ import annotations

import os

import pytest


class AtOnce:
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with open(os.environ["FAILURES"], "a") as file:
                file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")


def pytest_configure(config: pytest.Config) -> None:
    # Under pytest-xdist the process that started the workers sees their reports again.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce())
