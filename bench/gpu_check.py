"""All checks on a GPU in some minutes, the most telling first: `make gpu-check`.

It may be cut off at any moment: `summary.txt` is rewritten after every stage, results after every setting, failures of
tests as they happen. No stage can hold up the run:

- A stage has its own seconds and what earlier ones left over. Then it is killed with all that it started.
- What cannot be killed is left behind.
- A watchdog ends everything after `--minutes`.

The exit status is 1 unless all that could run here has passed.

It needs torch, triton, transformers and pytest. It also uses pytest-xdist (one run of the tests instead of one per
file) and compute-sanitizer where they are installed. `--rehearse` runs the same stages on small shapes without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTEST = [sys.executable, "-m", "pytest"]
TESTS = [*PYTEST, "-v", "--tb=short", "-p", "at_once", "-p", "no:cacheprovider"]
PROCESSES = min(8, os.cpu_count() or 1)
SECONDS = "<seconds>"
"""Stands in a command for most of its stage's time."""

GRACE = 2.0
"""Seconds in which a killed process must be gone."""

LEAST = 5.0
"""Seconds below which no stage is started; half its own seconds for a short one."""


@dataclass(frozen=True)
class Stage:
    """Commands that run side by side, up to `processes` at once, and the seconds that they may take.

    Attributes:
        missing: why the stage must be left out here, "" if it need not.
        probe: a command that must succeed, or the stage is left out.
        required: without it nothing else makes sense.
        nothing: an exit status that is no failure: pytest's 5 for no tests, the gate's for a machine too noisy to say.
    """

    name: str
    commands: list[list[str]]
    seconds: float
    missing: str = ""
    probe: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    processes: int = 1
    required: bool = False
    nothing: int = 0


def script(name: str, *options: str | Path) -> list[str]:
    return [sys.executable, f"bench/{name}.py", *map(str, options)]


def side_by_side(selection: list[str], files: list[Path]) -> list[list[str]]:
    """The selected tests of the files: by pytest-xdist, or in one run per file."""
    command = [*TESTS, *selection]
    if importlib.util.find_spec("xdist"):
        return [[*command, "-n", str(PROCESSES), "--dist", "worksteal", *map(str, files)]]
    return [[*command, str(path)] for path in files]


def files_for_a_gpu() -> list[Path]:
    """Those with tests for a GPU, the long ones first."""
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda path: -path.stat().st_size)
    return [path for path in files if re.search("mark.gpu|IMPLEMENTATIONS", path.read_text())]


def sanitizer(tool: str, out: Path, rehearse: bool, seconds: float, **environment: str) -> Stage:
    """Each kernel once, under one of compute-sanitizer's tools."""
    here = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    missing = "" if shutil.which("compute-sanitizer") else "no compute-sanitizer here"
    return Stage(
        tool,
        [[*here, "--log-file", str(out / f"{tool}.txt"), *script("gpu_smoke", "--kernels", "--out", out / tool)]],
        seconds,
        "a rehearsal has no GPU" if rehearse else missing,
        probe=[*here, sys.executable, "-c", "import torch; torch.ones(1).cuda()"],
        environment=environment,
    )


def stages(out: Path, rehearse: bool = False) -> list[Stage]:
    """In the order in which they run; the seconds are those of a GPU."""
    small, repeats = (["--smoke"], "1") if rehearse else ([], "3")
    gated = ["--only", "select", "--baselines", out / "baselines"] if rehearse else []
    device = "import torch; print(torch.__version__, torch.cuda.get_device_name())"
    tests = side_by_side(["-m", "gpu and not slow"], files_for_a_gpu())
    stress = [[*TESTS, "-m", "gpu and slow"]]
    if rehearse:
        device = "import torch; print(torch.__version__, 'on a CPU')"
        twins = ["-m", "not gpu", "-k", "any_number_of_splits or captured_launches or opcheck_of_awkward"]
        tests = side_by_side(twins, [ROOT / "tests" / f"test_{name}.py" for name in ("kernels", "ops")])
        stress = [[*TESTS, "-m", "not gpu", "tests/test_kernels.py", "-k", "tickets_are_left"]]
    return [
        Stage("device", [[sys.executable, "-c", device]], 20, required=True),
        Stage("smoke", [script("gpu_smoke", "--out", out)], 80),
        Stage(
            "decode",
            [script("bench_decode", "--headline", *small, "--repeats", repeats, "--budget", SECONDS, "--out", out)],
            105,
        ),
        Stage("select", [script("bench_select", *small, "--out", out)], 30),
        Stage("kernels", [script(name, *small, "--out", out) for name in ("bench_kernels", "bench_canvas")], 40),
        Stage("report", [script("report", out)], 5),
        Stage(
            "tests",
            tests,
            120,
            processes=PROCESSES,
            nothing=5,
            environment={"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // PROCESSES, 1))},
        ),
        Stage("stress", stress, 30),
        Stage("gate", [script("gate", "--out", out, *gated)], 35, nothing=os.EX_TEMPFAIL),
        # One allocation per tensor, so that reading past one is seen.
        sanitizer("memcheck", out, rehearse, 45, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        sanitizer("racecheck", out, rehearse, 30),
    ]


class Summary:
    """One line per stage, in a file that is rewritten at every change."""

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path, self.lock = path, threading.Lock()
        self.rows = {name: ("not begun", 0.0, "") for name in names}
        self.write()

    def text(self) -> str:
        rows = self.rows.items()
        return "\n".join(
            f"{name:<12} {verdict:<12} {s:6.1f} s  {detail}".rstrip() for name, (verdict, s, detail) in rows
        )

    def write(self) -> None:
        part = self.path.with_suffix(".part")
        with part.open("w") as file:
            file.write(self.text() + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def note(self, name: str, verdict: str, seconds: float = 0.0, detail: str = "") -> None:
        with self.lock:
            self.rows[name] = (verdict, seconds, detail)
            self.write()

    def cut(self, minutes: float) -> None:
        """The summary that the watchdog leaves. It waits for nothing, not even for the lock."""
        held = self.lock.acquire(timeout=1.0)
        for name, (verdict, seconds, _) in self.rows.items():
            if verdict == "running":
                self.rows[name] = ("OUT OF TIME", seconds, f"everything was ended after {minutes:g} minutes")
            elif verdict == "not begun":
                self.rows[name] = ("no time", 0.0, "")
        self.write()
        if held:
            self.lock.release()

    def passed(self) -> bool:
        return all(verdict in ("passed", "left out") for verdict, _, _ in self.rows.values())


class Children:
    """Processes, each the leader of its own group; every wait for one has a limit."""

    def __init__(self) -> None:
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(child)
        return child

    def kill(self) -> list[int]:
        """Kill all running processes with what they started; returns the ids of those that survived."""
        for child in self.running:
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
        until, stuck = time.monotonic() + GRACE, []
        for child in self.running:
            try:
                child.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                stuck.append(child.pid)
        self.running.clear()
        return stuck

    def run(
        self, commands: list[list[str]], logs: list[Path], seconds: float, at_once: int, environment: dict[str, str]
    ) -> tuple[list[int | None], list[int]]:
        """Exit statuses of the commands, None if too late or not started; and the ids of processes that survived."""
        until = time.monotonic() + seconds
        waiting = list(zip(commands, logs, strict=True))
        codes: list[int | None] = []
        while True:
            codes = [child.poll() for child in self.running]
            free = at_once - codes.count(None)
            if time.monotonic() > until or not (waiting or codes.count(None)):
                break
            for command, log in waiting[: max(free, 0)]:
                self.start(command, log, environment)
            waiting = waiting[max(free, 0) :]
            time.sleep(0.02)
        return codes + [None] * len(waiting), self.kill()


def with_checkout(out: Path, rehearse: bool, more: dict[str, str]) -> dict[str, str]:
    """The environment with this checkout importable and kernels compiled, or interpreted on a CPU."""
    paths = [str(ROOT), str(ROOT / "bench"), *filter(None, [os.environ.get("PYTHONPATH")])]
    device = {"TRITON_INTERPRET": "0"}
    if rehearse:  # with one thread: on shapes this small more of them only slow each other
        device = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {
        **os.environ,
        **device,
        "PYTHONPATH": os.pathsep.join(paths),
        "FAILURES": str(out / "failures.txt"),
        **more,
    }


RESULT = re.compile(
    r"^(?:\[gw\d+\] \[ *\d+%\] (?P<first>[A-Z]+) (?P<after>.*)|(?P<before>\S+::.*?) (?P<last>[A-Z]+)\b.*)$"
)


def counts(lines: list[str]) -> str:
    """Verdicts of tests logged one per line: how many of each, and how many passed of the kinds that matter most."""
    found = []
    for line in lines:
        match = RESULT.match(line)
        verdict = match and (match["first"] or match["last"])
        if match and verdict in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
            found.append((match["after"] or match["before"], verdict))
    if not found:
        return ""
    of = Counter(verdict.lower() for _, verdict in found)
    text = ", ".join(f"{of[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if of[kind])
    for kind in ("opcheck", "compile", "graph"):
        these = [verdict for name, verdict in found if kind in name and verdict != "SKIPPED"]
        if these:
            text += f"; {kind} {these.count('PASSED')} of {len(these)}"
    return text


class Run:
    """The stages one after another, within `minutes`."""

    def __init__(self, wanted: list[Stage], out: Path, minutes: float, rehearse: bool) -> None:
        self.wanted, self.out, self.minutes, self.rehearse = wanted, out, minutes, rehearse
        self.children, self.done = Children(), threading.Event()
        self.began = time.monotonic()
        self.summary = Summary(out / "summary.txt", [stage.name for stage in wanted])
        total = 60.0 * minutes
        # Leaves time to report a stage that is stopped at its limit.
        self.end = self.began + total - min(GRACE + 1.0, 0.05 * total)
        planned = sum(stage.seconds for stage in wanted if not stage.missing)
        # The others get the time of stages that are left out.
        self.scale = max((self.end - self.began) / planned, 1.0) if planned else 1.0

    def plan(self) -> str:
        lines = [f"in {self.minutes:g} minutes at most, in {self.out}:"]
        for stage in self.wanted:
            limit = f"left out: {stage.missing}" if stage.missing else f"{self.scale * stage.seconds:5.0f} s at most"
            lines.append(f"  {stage.name:<12} {limit}")
        return "\n".join([*lines, "  a stage's unused time goes to those after it"])

    def watch(self) -> None:
        """Ends the program after `minutes`, whatever it is doing."""
        if self.done.wait(self.began + 60.0 * self.minutes - time.monotonic()):
            return
        self.summary.cut(self.minutes)
        for child in list(self.children.running):
            with contextlib.suppress(OSError):
                os.killpg(child.pid, signal.SIGKILL)
        os.write(1, f"\n{self.summary.text()}\nended by the watchdog after {self.minutes:g} minutes\n".encode())
        os._exit(1)

    def all(self) -> bool:
        """Run the stages; returns whether all that could run passed."""
        print(self.plan(), flush=True)
        threading.Thread(target=self.watch, daemon=True).start()
        # In case even the watchdog's thread is held up.
        faulthandler.dump_traceback_later(60.0 * self.minutes + GRACE, exit=True, file=sys.__stderr__)
        try:
            planned, unfit = 0.0, ""
            for stage in self.wanted:
                if stage.missing or unfit:
                    self.summary.note(stage.name, "left out", detail=stage.missing or unfit)
                    continue
                planned += self.scale * stage.seconds
                began = time.monotonic()
                limit = min(self.began + planned, self.end) - began
                if limit < min(LEAST, stage.seconds / 2):
                    self.summary.note(stage.name, "no time")
                    continue
                print(f"{stage.name}: {limit:.0f} s at most ...", flush=True)
                self.summary.note(stage.name, "running")
                try:
                    verdict, detail = self.outcome(stage, limit)
                except Exception as error:  # a missing command, an unreadable log
                    self.children.kill()
                    verdict, detail = "FAILED", f"{type(error).__name__}: {error}"
                self.summary.note(stage.name, verdict, time.monotonic() - began, detail)
                print(f"{stage.name}: {verdict}, {time.monotonic() - began:.1f} s, {detail}", flush=True)
                if stage.required and verdict != "passed":
                    unfit = f"{stage.name} has not passed"
        finally:
            self.done.set()
            faulthandler.cancel_dump_traceback_later()
        return self.summary.passed()

    def outcome(self, stage: Stage, limit: float) -> tuple[str, str]:
        """Run a stage; returns its verdict and a detail."""
        name, until = stage.name.replace(" ", "-"), time.monotonic() + limit
        environment = with_checkout(self.out, self.rehearse, stage.environment)
        if stage.probe:
            log = self.out / f"{name}-probe.log"
            codes, _ = self.children.run([stage.probe], [log], min(30.0, limit / 2), 1, environment)
            if codes != [0]:
                return "left out", f"{stage.probe[0]} does not work here, see {log}"
        several = len(stage.commands) > 1
        logs = [self.out / (f"{name}-{i}.log" if several else f"{name}.log") for i in range(len(stage.commands))]
        commands = [[part.replace(SECONDS, f"{0.85 * limit:.0f}") for part in each] for each in stage.commands]
        codes, stuck = self.children.run(commands, logs, until - time.monotonic(), stage.processes, environment)
        lines = [line for log in logs if log.exists() for line in log.read_text(errors="replace").splitlines()]
        lines = [line for line in lines if line.strip()] or [""]
        detail = counts(lines) or lines[-1].strip("= ")
        if stuck:
            detail += f"; processes {stuck} could not be killed"
        wrong = any(code not in (None, 0, stage.nothing) for code in codes)
        verdict = "FAILED" if wrong else "OUT OF TIME" if None in codes else "passed"
        if verdict != "passed":
            detail += f"; see {logs[0] if not several else self.out / f'{name}-*.log'}"
        elif stage.name == "report":
            detail = f"the tables are in {logs[0]}"
        if verdict != "passed" or stage.name == "report":
            print("\n".join(lines[-40:]), flush=True)
        return verdict, detail


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in stages(Path())]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "local", help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all of it (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="the same stages without a GPU, on small shapes")
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "failures.txt").unlink(missing_ok=True)
    wanted = [stage for stage in stages(out, options.rehearse) if stage.name in options.only or stage.required]
    run = Run(wanted, out, options.minutes, options.rehearse)
    passed = run.all()
    print(f"\n{run.summary.text()}\n{time.monotonic() - run.began:.0f} s in all; logs and results in {out}")
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
