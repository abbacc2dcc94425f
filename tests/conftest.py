"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import stand_in
import torch

stand_in.install()
sys.path.append(str(Path(__file__).parents[1] / "bench"))
GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A shell starts its background jobs with Ctrl-C ignored, and so would be the programs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(skip)
