"""The run on a GPU machine: it keeps to its time and leaves its results whatever its stages do; and its rehearsal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_check
import gpu_smoke
import pytest
import torch
from gpu_check import Stage
from inputs import INTERPRETED

from fdpp.step import project

SLEEP = "import time; time.sleep(60)"


def python(name: str, code: str, seconds: float = 60.0, **settings: Any) -> Stage:
    return Stage(name, [[sys.executable, "-c", code]], seconds, **settings)


def check(out: Path, found: list[Stage], monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, dict[str, str]]:
    """Exit status, and the line of the summary of every stage without its name."""
    monkeypatch.setattr(gpu_check, "stages", lambda out, rehearse=False: found)
    # The watchdog would end the tests as well.
    monkeypatch.setattr(gpu_check.os, "_exit", lambda status: None)
    monkeypatch.setattr(gpu_check.faulthandler, "dump_traceback_later", lambda *_, **__: None)
    status = gpu_check.main(["--out", str(out), *options])
    return status, summary(out)


def summary(out: Path) -> dict[str, str]:
    lines = (out / "summary.txt").read_text().splitlines()
    return {line[:12].strip(): line[13:].strip() for line in lines}


def verdicts(lines: dict[str, str]) -> list[str]:
    return [line[:12].strip() for line in lines.values()]


def test_every_stage_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        python("slow", SLEEP, 0.5),
        python("good", "print('all well')"),
        python("bad", "raise SystemExit(3)"),
        python("missing", "raise SystemExit(1)", missing="no such tool"),
        python("unfit", "raise SystemExit(1)", probe=[sys.executable, "-c", "raise SystemExit(1)"]),
    ]
    status, lines = check(tmp_path, found, monkeypatch, "--minutes", "0.5")
    assert status == 1 and verdicts(lines) == ["OUT OF TIME", "passed", "FAILED", "left out", "left out"]
    assert "all well" in lines["good"] and "no such tool" in lines["missing"]
    assert check(tmp_path, found, monkeypatch, "--only", "good", "missing", "unfit")[0] == 0


def test_the_plan_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [python("first", "", 30.0), python("second", "", missing="no such tool")]
    check(tmp_path, found, monkeypatch, "--minutes", "1")
    plan = capsys.readouterr().out.split("first: ")[0]
    # What is left out leaves its time to the others.
    assert "in 1 minutes at most" in plan and "57 s at most" in plan and "left out: no such tool" in plan


def test_the_summary_is_there_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = f"print(open({str(tmp_path / 'summary.txt')!r}).read())"
    found = [python("first", look), python("second", look), python("third", "")]
    check(tmp_path, found, monkeypatch)
    for name, seen in (
        ("first", ["running", "not begun", "not begun"]),
        ("second", ["passed", "running", "not begun"]),
    ):
        lines = (tmp_path / f"{name}.log").read_text().split("\n")
        assert [line[13:25].strip() for line in lines if line.strip()] == seen


def gone(pid: int) -> bool:
    """Whether a process has ended, waited for by its parent or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_stage_that_ignores_signals_ends_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal, subprocess, sys\nfor s in (signal.SIGTERM, signal.SIGINT): signal.signal(s, lambda *_: 0)\n"
    )
    code += f"child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}])\nprint(os.getpid(), child.pid, flush=True)\n"
    found = [python("deaf", code + "while True: signal.pause()", 3.0), python("after", "")]
    began = time.monotonic()
    _, lines = check(tmp_path, found, monkeypatch, "--minutes", "1")
    monkeypatch.undo()
    assert verdicts(lines) == ["OUT OF TIME", "passed"] and time.monotonic() - began < 20.0
    pids = [int(pid) for pid in (tmp_path / "deaf.log").read_text().split()]
    assert len(pids) == 2
    for _ in range(100):
        if all(map(gone, pids)):
            break
        time.sleep(0.05)
    assert all(map(gone, pids))


def test_a_process_that_cannot_be_waited_for_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, poll, stuck = subprocess.Popen.wait, subprocess.Popen.poll, []

    def waited(self: Any, timeout: float | None = None) -> int:
        if "stuck" not in self.args:
            return wait(self, timeout)
        stuck.append(self)
        assert timeout is not None, "a wait without end"
        time.sleep(timeout)
        raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", waited)
    monkeypatch.setattr(subprocess.Popen, "poll", lambda self: None if "stuck" in self.args else poll(self))
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    found = [Stage("stuck", [[sys.executable, "-c", SLEEP, "stuck"]], 0.5), python("after", "", 30.0)]
    began = time.monotonic()
    _, lines = check(tmp_path, found, monkeypatch, "--minutes", "0.4")
    assert time.monotonic() - began < 20.0
    assert verdicts(lines) == ["OUT OF TIME", "passed"] and "could not be killed" in lines["stuck"]
    wait(stuck[0], 5.0)


def test_the_whole_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [python(name, SLEEP, seconds) for name, seconds in (("a", 1.0), ("b", 1.0), ("c", 60.0), ("d", 60.0))]
    began = time.monotonic()
    status, lines = check(tmp_path, found, monkeypatch, "--minutes", "0.15")
    assert status == 1 and time.monotonic() - began < 12.0
    assert verdicts(lines) == ["OUT OF TIME", "OUT OF TIME", "OUT OF TIME", "no time"]


@pytest.mark.parametrize(("before", "verdict"), [(6.0, "passed"), (0.5, "OUT OF TIME")])
def test_what_is_left_over_is_for_those_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: float, verdict: str
) -> None:
    found = [python("quick", "", before), python("slow", "import time; time.sleep(2.5)", 1.0), python("rest", "", 60.0)]
    _, lines = check(tmp_path, found, monkeypatch, "--minutes", "0.5")
    assert lines["slow"].startswith(verdict)


def test_without_what_is_required_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [python("device", "raise SystemExit(1)", required=True), python("smoke", "")]
    status, lines = check(tmp_path, found, monkeypatch, "--only", "smoke")
    assert status == 1 and verdicts(lines) == ["FAILED", "left out"]


def test_a_command_that_is_not_there_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Stage("gone", [["/no/such/program"]], 30.0), python("after", "")]
    status, lines = check(tmp_path, found, monkeypatch)
    assert status == 1 and verdicts(lines) == ["FAILED", "passed"] and "/no/such/program" in lines["gone"]


def test_a_probe_that_hangs_leaves_its_stage_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [python("unfit", "", 2.0, probe=[sys.executable, "-c", SLEEP]), python("after", "", 60.0)]
    began = time.monotonic()
    _, lines = check(tmp_path, found, monkeypatch, "--minutes", "0.5")
    assert verdicts(lines) == ["left out", "passed"] and time.monotonic() - began < 15.0


def test_the_watchdog_ends_what_hangs_by_itself(tmp_path: Path) -> None:
    code = f"""
import sys, time, gpu_check
gpu_check.stages = lambda out, rehearse=False: [
    gpu_check.Stage("first", [[sys.executable, "-c", "print(1)"]], 4.0),
    gpu_check.Stage("second", [], 1.0),
    gpu_check.Stage("third", [], 1.0),
]
run = gpu_check.Children.run
gpu_check.Children.run = lambda self, commands, *rest: run(self, commands, *rest) if commands else time.sleep(60)
raise SystemExit(gpu_check.main(["--out", {str(tmp_path)!r}, "--minutes", "0.1"]))
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(gpu_check.ROOT / "bench")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1 and time.monotonic() - began < 20.0, done.stderr
    lines = summary(tmp_path)
    assert verdicts(lines) == ["passed", "OUT OF TIME", "no time"] and "after 0.1 minutes" in lines["second"]
    assert "ended by the watchdog" in done.stdout and "third" in done.stdout


def test_commands_run_side_by_side_but_not_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for another one to start; the third starts when one of them has ended."""
    here = "import pathlib, sys, time; a, b = map(pathlib.Path, sys.argv[1:]); a.touch()\n"
    meet = here + "while not b.exists(): time.sleep(0.01)\n"
    files = [str(tmp_path / name) for name in "abc"]
    commands = [[sys.executable, "-c", meet, *files[:2]], [sys.executable, "-c", meet, files[1], files[0]]]
    commands.append([sys.executable, "-c", here + "raise SystemExit(5)", files[2], files[0]])
    stage = Stage("several", commands, 30.0, processes=2, nothing=5)
    status, lines = check(tmp_path, [stage], monkeypatch)
    assert status == 0 and len(list(tmp_path.glob("several-*.log"))) == 3, lines


def test_tests_are_counted_from_what_is_logged() -> None:
    lines = [
        "[gw1] [  7%] PASSED tests/test_ops.py::test_opcheck[cuda-Frechet(margin=0.25, calibration=0.0)] ",
        "[gw0] [ 14%] FAILED tests/test_ops.py::test_opcheck_of_awkward_arguments[cuda] ",
        "tests/test_gpu.py::test_graph_replays_equal_eager[0] PASSED              [ 21%]",
        "tests/test_gpu.py::test_x[Frechet(margin=0.25, calibration=0.0)] SKIPPED (needs two) [ 28%]",
        "======= 1 failed, 2 passed in 3.1s =======",
    ]
    assert gpu_check.counts(lines) == "2 passed, 1 failed, 1 skipped; opcheck 1 of 2; graph 1 of 1"
    assert gpu_check.counts(["nothing of the kind"]) == ""


@pytest.mark.parametrize("processes", [[], ["-n", "1"]])
def test_a_failure_is_written_when_it_happens(tmp_path: Path, processes: list[str]) -> None:
    if processes:
        pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(
        "def test_a():\n    assert 1 == 2\ndef test_b():\n    import os; os._exit(9)\n"
    )
    command = [*gpu_check.TESTS, *processes, "test_it.py"]
    environment = gpu_check.with_checkout(tmp_path, True, {})
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=60, check=False)
    text = (tmp_path / "failures.txt").read_text()
    assert text.count("test_a (call)") == 1 and "assert 1 == 2" in text


def test_what_a_gpu_runs_fits_into_nine_minutes() -> None:
    found = gpu_check.stages(Path())
    assert sum(stage.seconds for stage in found) <= 540.0
    assert [stage.name for stage in found] == [stage.name for stage in gpu_check.stages(Path(), rehearse=True)]


def test_a_failed_check_leaves_the_others_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> str:
        raise RuntimeError("illegal\naccess")

    failed = gpu_smoke.run(iter([("a", wrong), ("b", lambda: "torch.bfloat16")]), tmp_path / "smoke.jsonl")
    first, second = capsys.readouterr().out.splitlines()
    assert failed == 1 and first.startswith("FAILED a: RuntimeError: illegal access (") and "ok b: bfloat16 (" in second
    lines = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    assert [(line["name"], line["ok"]) for line in lines] == [("a", False), ("b", True)]


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_the_smoke_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = project.project_gpu
    checks = dict(gpu_smoke.kernels())
    checks["fused head, odd sizes"]()
    monkeypatch.setattr(
        project, "project_gpu", lambda *a: tuple(x ^ 1 if x.dtype == torch.int64 else x for x in right(*a))
    )
    with pytest.raises(AssertionError, match="other proposals"):
        checks["fused head, odd sizes"]()


class Differing:
    """A model of which one call gives other tokens."""

    def __init__(self, wrong: int) -> None:
        self.model, self.wrong, self.calls = gpu_smoke.model_in(torch.float32), wrong, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, *arguments: Any, **keywords: Any) -> Any:
        out = self.model.generate(*arguments, **keywords)
        out.sequences[0, -1] += self.calls == self.wrong
        self.calls += 1
        return out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(1, "replayed: sequences differs"), (2, "uncaptured: sequences differs"), (3, "1 of 32 tokens differ"), (9, "")],
)
def test_the_smoke_sees_a_wrong_step(monkeypatch: pytest.MonkeyPatch, wrong: int, message: str) -> None:
    model = Differing(wrong)
    monkeypatch.setattr(gpu_smoke, "model_in", lambda *_: model)
    steps_of = gpu_smoke.steps_of
    monkeypatch.setattr(gpu_smoke, "steps_of", lambda model: steps_of(model.model))
    check = dict(gpu_smoke.decodes())["dual cache, no drafts, torch.float32"]
    if not message:
        assert "0 of 32 tokens differ" in check()
        return
    with pytest.raises(AssertionError, match=message):
        check()


def test_the_rehearsal(tmp_path: Path) -> None:
    """All stages to their end, with the files that a GPU would leave."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}
    done = subprocess.run(
        [sys.executable, "bench/gpu_check.py", "--rehearse", "--out", str(tmp_path)],
        cwd=gpu_check.ROOT,
        env={**kept, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    for stage in gpu_check.stages(tmp_path):
        expected = "left out" if stage.name in {"memcheck", "racecheck"} else "passed"
        assert summary(tmp_path)[stage.name].startswith(expected), done.stdout[-6000:]
    checks = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()[1:]]
    assert len(checks) > 40 and all(check["ok"] for check in checks)
    results = json.loads((tmp_path / "decode-cpu.json").read_text())["rows"]
    assert [(row["cache"], row["prompt"]) for row in results] == [
        ("dual", 8),
        ("prefix", 8),
        ("dual", 9),
        ("prefix", 9),
    ]
    for row in results:
        assert all(row[way]["steps"].keys() == {"ms_refresh", "ms_step"} for way in ("fdpp", "published"))
    sizes = json.loads((tmp_path / "select-cpu.json").read_text())["rows"]
    assert all({"us_warm", "us_cold", "launches_in_graph"} <= row["two launches"].keys() for row in sizes)
    assert "block_attention" in (tmp_path / "report.log").read_text()
