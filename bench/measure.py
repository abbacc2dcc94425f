"""How the benchmarks time, count and weigh what they run, and on what it was measured."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch.autograd import DeviceType

from fdpp.models.linear import linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
RESULTS = Path(__file__).parent / "results"


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def median_seconds(call: Callable[[], Any], *, calls: int = 1, rounds: int = 3, budget: float = 0.5) -> float:
    """Median wall time of a `call`: rounds of `calls` in a row, at least `rounds` and for `budget` seconds."""
    call()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < rounds or time.perf_counter() - started < budget:
        synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / calls


def captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the `calls`, one after another."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()  # compiles what is compiled on first use
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def graph_seconds(calls: Sequence[Callable[[], Any]], replays: int = 20) -> float:
    """Median time of one of the `calls`, captured together and replayed."""
    graph = captured(calls)
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times) / len(calls)


def launches(call: Callable[[], Any]) -> int | None:
    """What `call` sends to the device: kernels, copies and fills. None if the profiler sees no device."""
    call()
    synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in profiler.events()) or None


def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written per second by a copy of `nbytes`."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * nbytes / median_seconds(lambda: target.copy_(source), calls=10 if ON_GPU else 1, rounds=5)


@torch.no_grad()
def matmul_rate(size: int, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product, on random data; by oneDNN on a CPU, as in our model."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: linear(a, b), calls=10 if ON_GPU else 1)


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size


def status_kib(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None, f"/proc/self/status has no {field}"
    return int(match.group(1))


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory `call` holds on top of what was held before: the allocator's on a GPU, resident on a CPU."""
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory that was freed before would hide what is held now
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident size
    before = status_kib("VmRSS")
    call()
    return max(status_kib("VmHWM") - before, 0) * 1024


def environment() -> dict[str, Any]:
    """Device, versions, commit and date of a measurement."""

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:
            return ""

    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else f"CPU, {cpu[1].strip() if cpu else '?'}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, triton, transformers)},
        **({"cuda": torch.version.cuda} if ON_GPU else {}),
        "commit": (git("rev-parse", "--short", "HEAD") or os.environ.get("GITHUB_SHA", "?"))
        + ("+changes" if git("status", "--porcelain") else ""),
        "date": datetime.date.today().isoformat(),
    }


def slug(device: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"\W+", "-", device.lower()).strip("-")


def write(folder: Path, kind: str, results: dict[str, Any]) -> Path:
    """Store `results` with their environment as `<kind>-<cpu or the GPU's name>.json`."""
    about = environment()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{slug(about['device']) if ON_GPU else 'cpu'}.json"
    path.write_text(json.dumps({"environment": about, **results}, indent=1) + "\n")
    return path
