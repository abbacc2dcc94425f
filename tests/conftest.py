"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before Triton is imported.

With and without one, memory that nothing was written to holds NaN (see `unwritten`).
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import stand_in
import torch
import unwritten

stand_in.install()
unwritten.install()
sys.path.append(str(Path(__file__).parents[1] / "bench"))
GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell's background jobs ignore Ctrl-C, and so would the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


COUNTED = 10
"""Coverage is counted in every tenth case of a test, from the first on: the others run the same lines, and to count
them makes a decode take a third longer."""


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """End the coverage that a worker began as a subprocess; `no_cover` pauses only the one that pytest-cov begins."""
    if "PYTEST_XDIST_WORKER" in os.environ and "coverage" in sys.modules:
        while (counting := sys.modules["coverage"].Coverage.current()) is not None:
            counting.stop()


def left_out(item: pytest.Item) -> bool:
    """Whether a GPU leaves this case to the others (see `inputs.on_gpu`)."""
    marker = item.get_closest_marker("cases")
    if marker is None or not item.get_closest_marker("gpu"):
        return False
    where = marker.kwargs["where"]
    return not where(**{name: item.callspec.params[name] for name in inspect.signature(where).parameters})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = [item for item in items if left_out(item)]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = [item for item in items if item not in unwanted]
    skip = pytest.mark.skip(reason="needs a CUDA device")
    cases: Counter[str] = Counter()
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(skip)
        # Tracing makes Triton's interpreter take three to five times as long.
        test = item.nodeid.partition("[")[0]
        if cases[test] % COUNTED or re.search(r"\binterpreter\b", item.name):
            item.add_marker("no_cover")
        cases[test] += 1
