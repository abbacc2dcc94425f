"""How the benchmarks measure time, launches and memory, and on what device.

All of it works on a CPU as well, so that it has run before it gets a GPU: calls are made one by one where there are no
graphs, and the clock is the host's where there are no events.
"""

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
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
import triton
from torch.autograd import DeviceType

from fdpp.models.linear import linear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
RESULTS = Path(__file__).parent / "results"
CALLS = 20 if ON_GPU else 1
"""How often a call that takes microseconds on a GPU is repeated."""


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


def in_turn(ways: dict[str, Callable[[], Any]], rounds: int, budget: float) -> dict[str, list[float]]:
    """Wall seconds of each way, round by round: all of them in turn, at least `rounds` times and for `budget` seconds.

    What else the machine does for longer than a round reaches all ways, so their ratio within a round is what to trust.
    """
    for call in ways.values():
        call()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    started, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - started < budget:
        for way, call in ways.items():
            synchronize()
            begin = time.perf_counter()
            call()
            synchronize()
            seconds[way].append(time.perf_counter() - begin)
        done += 1
    return seconds


class Replayed(Protocol):
    """What is captured once and replayed, like a `torch.cuda.CUDAGraph`."""

    def replay(self) -> None: ...


@dataclass(frozen=True)
class Calls:
    """Stands for a graph where there are none."""

    calls: Sequence[Callable[[], Any]]

    def replay(self) -> None:
        for call in self.calls:
            call()


def captured(calls: Sequence[Callable[[], Any]]) -> Replayed:
    """A CUDA graph of the `calls`, one after another; on a CPU the calls themselves."""
    if not ON_GPU:
        return Calls(calls)
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


def elapsed(call: Callable[[], Any]) -> float:
    """Seconds of one call, between two events on a GPU."""
    if not ON_GPU:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def replay_seconds(replay: Callable[[], Any], budget: float = 0.5) -> float:
    """Median seconds of 3 to 20 replays, as many as start within `budget` seconds."""
    replay()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (len(times) < 20 and time.perf_counter() - started < budget):
        times.append(elapsed(replay))
    return statistics.median(times)


def graph_seconds(calls: Sequence[Callable[[], Any]], budget: float = 0.5) -> float:
    """Median seconds of one of the `calls`, captured together and replayed."""
    return replay_seconds(captured(calls).replay, budget) / len(calls)


def launches(call: Callable[[], Any]) -> int | None:
    """What `call` sends to the device: kernels, copies and fills; on a CPU its operators. None if nothing is seen."""
    call()
    synchronize()
    activity, kind = ("CUDA", DeviceType.CUDA) if ON_GPU else ("CPU", DeviceType.CPU)
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, activity)]) as profiler:
        call()
        synchronize()
    return sum(event.device_type == kind for event in profiler.events()) or None


def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written per second by a copy of `nbytes`."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * nbytes / median_seconds(lambda: target.copy_(source), calls=CALLS, rounds=5)


@torch.no_grad()
def matmul_rate(size: int, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product, on random data; by oneDNN on a CPU, as in our model."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: linear(a, b), calls=CALLS)


def l2_bytes() -> int:
    """Size of the device's L2; on a CPU, where nothing depends on it, a page."""
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 1 << 12


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


@cache
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


def reason(error: Exception) -> str:
    """Type and message of an error, on one line. Running out of memory is a result, not an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `call` returns, or its failure as `error`, so that one setting does not cost the others."""
    try:
        return call()
    except Exception as error:
        traceback.print_exc()
        return {"error": reason(error)}


def errors(results: Any) -> list[str]:
    """All that is noted as an `error` in nested results."""
    if isinstance(results, dict):
        own = [results["error"]] if "error" in results else []
        return own + [found for value in results.values() for found in errors(value)]
    return [found for value in results for found in errors(value)] if isinstance(results, list) else []


def slug(device: str) -> str:
    """A device's name as part of a file name."""
    return re.sub(r"\W+", "-", device.lower()).strip("-")


def write(folder: Path, kind: str, results: dict[str, Any]) -> Path:
    """Store `results` with their environment as `<kind>-<cpu or the GPU's name>.json`."""
    about = environment()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{slug(about['device']) if ON_GPU else 'cpu'}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"environment": about, **results}, indent=1) + "\n")
    return part.replace(path)  # a run that is stopped while it writes keeps the earlier results


SMOKE = "Toy shapes (--smoke): they show that it runs. No time or ratio here says anything about speed."


def close(path: Path, results: dict[str, Any]) -> None:
    """Say where the results are, and exit with 1 if a setting failed for another reason than memory."""
    print(f"written to {path}")
    if results.get("smoke"):
        print(SMOKE)
    failed = [error for error in errors(results) if error != "out of memory"]
    if failed:
        raise SystemExit("\n".join(failed))
