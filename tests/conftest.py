"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before Triton is imported.

With and without one, memory that nothing was written to holds NaN (see `unwritten`).
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
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


REPEATED = (
    *("test_block_decode", "test_captures", "test_contract", "test_dream_decode", "test_families"),
    *("test_golden_dawn", "test_golden_decode", "test_refresh"),
)
"""Modules of many decodes, whose lines other tests run as well: coverage is not counted in them."""


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
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(skip)
        # Tracing makes Triton's interpreter take three to five times as long, and these modules half as long again.
        if re.search(r"\binterpreter\b", item.name) or item.path.stem in REPEATED:
            item.add_marker("no_cover")
