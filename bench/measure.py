"""What a figure needs beside the time: peak memory, and on what it was measured."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def status_kib(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match.group(1))


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory `call` holds on top of what was held before: the allocator's on a GPU, resident on a CPU."""
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed by the first call would hide the second's
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident size
    before = status_kib("VmRSS")
    call()
    return max(status_kib("VmHWM") - before, 0) * 1024


def environment() -> dict[str, Any]:
    """Device, versions, commit and date of a measurement."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {cpu[1] if cpu else '?'}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "triton", "transformers")},
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "date": datetime.date.today().isoformat(),
    }
