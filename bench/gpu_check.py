"""Everything to run on a machine with a GPU, within ten minutes, with a summary last: `make gpu-check`.

It takes torch, triton, transformers and pytest; with pytest-benchmark the gate runs as well, with compute-sanitizer
memcheck and racecheck. Logs and results go into a folder. The exit status is 1 if a stage failed or ran out of time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest", "-q"]
SANITIZED = [
    *PYTEST,
    *(f"tests/test_{name}.py" for name in ("gpu", "kernels", "project", "attention", "dawn")),
    *("-m", "gpu and not slow"),
    *("-k", "(test_gpu or test_kernels or opcheck) and not compile and not graph and not captured"),
]
"""Small launches of every kernel. Graphs need the caching allocator that memcheck goes without; a compiler under the
sanitizer takes minutes."""


@dataclass(frozen=True)
class Stage:
    """A command, the seconds it may take and what it needs."""

    name: str
    command: list[str]
    seconds: float
    needs: Callable[[], str] = lambda: ""
    """Why it must be left out here, "" if nothing is missing."""

    environment: tuple[tuple[str, str], ...] = ()


@cache
def sanitizer_missing() -> str:
    if shutil.which("compute-sanitizer") is None:
        return "no compute-sanitizer here"
    probe = ["compute-sanitizer", "--error-exitcode", "1", sys.executable, "-c", "import torch; torch.ones(1).cuda()"]
    works = ended(probe, 60.0, subprocess.DEVNULL) == 0
    return "" if works else "compute-sanitizer does not work here"


def ended(command: list[str], seconds: float, output: Any, environment: dict[str, str] | None = None) -> int | None:
    """A command's exit status; None if it ran out of time and was killed with all that it had started."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def benchmark_missing() -> str:
    return "" if importlib.util.find_spec("pytest_benchmark") else "no pytest-benchmark here"


def stages(out: Path) -> list[Stage]:
    """In the order in which they run. The seconds add up to less than ten minutes."""

    def sanitizer(tool: str, *options: str) -> list[str]:
        log = str(out / f"{tool}.txt")
        return ["compute-sanitizer", "--tool", tool, *options, "--error-exitcode", "1", "--log-file", log, *SANITIZED]

    def script(name: str, *options: str) -> list[str]:
        return [sys.executable, f"bench/{name}.py", *options]

    gate = str(out / "gate.json")
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    return [
        Stage("tests", [*PYTEST, "-m", "gpu and not slow", f"--junitxml={out}/tests.xml"], 175),
        Stage("stress", [*PYTEST, "-m", "gpu and slow", f"--junitxml={out}/stress.xml"], 60),
        # Every tensor an allocation of its own, so that reading past one is seen.
        Stage("memcheck", sanitizer("memcheck"), 60, sanitizer_missing, uncached),
        Stage("racecheck", sanitizer("racecheck"), 35, sanitizer_missing),
        Stage("select", script("bench_select", "--out", str(out)), 50),
        Stage("kernels", script("bench_kernels", "--out", str(out)), 25),
        Stage("decode", script("bench_decode", "--out", str(out), "--budget", "75"), 130),
        Stage("gate timing", [*PYTEST, "bench/bench_gate.py", f"--benchmark-json={gate}"], 40, benchmark_missing),
        Stage("gate", script("gate", gate), 15, benchmark_missing),
    ]


def with_checkout(more: tuple[tuple[str, str], ...] = ()) -> dict[str, str]:
    """The environment with this checkout importable, compiled kernels and `more`."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path, **dict(more)}


def outcome(stage: Stage, out: Path, seconds: float) -> tuple[str, str]:
    """Run a stage with at most `seconds`; how it ended and what there is to say."""
    missing = stage.needs()
    if missing:
        return "left out", missing
    log = out / f"{stage.name.replace(' ', '-')}.log"
    with log.open("w") as file:
        code = ended(stage.command, seconds, file, with_checkout(stage.environment))
    if code is None:
        return "OUT OF TIME", f"see {log}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or [""]
    if code:
        print("\n".join(lines[-40:]))
    return ("passed" if code == 0 else "FAILED"), lines[-1].strip("= ")


def count(path: Path, what: str) -> tuple[str, str] | None:
    """Of the tests in a JUnit file those with `what` in their name; None if there are none."""
    if not path.exists():
        return None
    cases = [case for case in ElementTree.parse(path).iter("testcase") if what in (case.get("name") or "")]
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    verdict = "FAILED" if failed else "passed" if len(cases) > skipped else "left out"
    return (verdict, f"{len(cases) - failed - skipped} of {len(cases)}, {skipped} skipped") if cases else None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in stages(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "local", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for all of it (default: %(default)s)")
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for stale in (out / "tests.xml", out / "stress.xml"):
        stale.unlink(missing_ok=True)
    began, summary = time.monotonic(), []
    wanted = [stage for stage in stages(out) if stage.name in options.only]
    # The time of what must be left out goes to the first that wants more, as the tests may: they find nothing compiled.
    spare = sum(stage.seconds for stage in wanted if stage.needs())
    for stage in wanted:
        print(f"{stage.name} ...", flush=True)
        start = time.monotonic()
        left = 60 * options.minutes - (start - began)
        verdict, detail = outcome(stage, out, min(stage.seconds + spare, left))
        spare -= max(time.monotonic() - start - stage.seconds, 0.0)
        summary.append((stage.name, verdict, time.monotonic() - start, detail))
        if stage.name == "tests":
            found = ((f"  {what}", count(out / "tests.xml", what)) for what in ("opcheck", "compile", "graph"))
            summary += [(what, result[0], 0.0, result[1]) for what, result in found if result]
    if {"select", "kernels", "decode"} & set(options.only):
        table = [sys.executable, "bench/report.py", str(out)]
        subprocess.run(table, cwd=ROOT, env=with_checkout(), check=False)
    text = "\n".join(
        f"{name:<12} {verdict:<12} {seconds:6.1f} s  {detail}" for name, verdict, seconds, detail in summary
    )
    (out / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n{time.monotonic() - began:.0f} s in all; logs and results in {out}")
    return int(any(verdict in ("FAILED", "OUT OF TIME") for _, verdict, _, _ in summary))


if __name__ == "__main__":
    raise SystemExit(main())
