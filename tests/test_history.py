"""The history of headline figures: a row per version and device, again the same, and with what failed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import history
import pytest

import fdpp

ENVIRONMENT = {"device": "CPU, Some", "date": "2030-01-02", "commit": "0000000", "torch": "9.9"}


def decode_row(shape: str, label: str, **found: Any) -> dict[str, Any]:
    return {"shape": shape, "cache": "dual", "batch": 1, "tokens_per_forward": label, **found}


def results(**environment: str) -> dict[str, Any]:
    about = {**ENVIRONMENT, **environment}
    fast = {"tokens_per_second": 1234.5}
    select = {"sequences": 1, "positions": 32, "rows": 32, "fdpp": {"us": 10.0}, "speedup": 20.0}
    return {
        "select": {"environment": about, "rows": [{**select, "positions": 64}, select]},
        "decode": {
            "environment": about,
            "rows": [
                decode_row("tiny", "Frechet(0.25)", fdpp=fast, speedup=2.0),
                decode_row("100m", "4.00, set", error="out of memory"),
            ],
            "left_out": [{"shape": "8b"}],
        },
    }


def folder_with(path: Path, found: dict[str, Any], device: str = "cpu") -> Path:
    path.mkdir(exist_ok=True)
    for kind, result in found.items():
        (path / f"{kind}-{device}.json").write_text(json.dumps(result))
    return path


@pytest.fixture
def update(tmp_path: Path) -> Any:
    """Runs the script on a folder; returns the rows and the table."""

    def run(folder: Path) -> tuple[list[dict[str, Any]], str]:
        store, table = tmp_path / "history.json", tmp_path / "history.md"
        history.main([str(folder), "--store", str(store), "--table", str(table)])
        return json.loads(store.read_text()), table.read_text()

    return run


def test_a_row_says_what_was_measured_and_what_was_not(update: Any, tmp_path: Path) -> None:
    rows, table = update(folder_with(tmp_path / "results", results()))
    measured, gpu = rows
    assert (measured["version"], measured["device"], measured["date"]) == (fdpp.__version__, "CPU, Some", "2030-01-02")
    assert measured["figures"] == {
        "select, 32 rows": "10 us, 20.0x",
        "embedded, dual, Frechet": "1,234 tok/s, 2.00x",
        "96 M, dual, 4.00": "failed: out of memory",
        "8 B, dual": "failed: no time",
        "embedded, exact, dual, Frechet": "not run: no quality results",
    }
    assert gpu["device"] == "GPU" and set(gpu["figures"].values()) == {"not run: no GPU"}
    assert table.count("\n| 0.") == 2 and "| failed: out of memory |" in table


def test_again_is_the_same(update: Any, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "results", results())
    assert update(folder) == update(folder)


def test_a_device_is_added_and_one_measured_anew_replaced(
    update: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_with(tmp_path / "results", results())
    update(folder)
    gpu = folder_with(tmp_path / "gpu", results(device="Some GPU", date="2030-01-03"), "some-gpu")
    rows, _ = update(gpu)
    assert [row["device"] for row in rows] == ["CPU, Some", "Some GPU"]
    rows, _ = update(folder_with(folder, results(date="2030-02-01")))
    assert [row["date"] for row in rows] == ["2030-02-01", "2030-01-03"]
    # The next version: rows of this one stay, and it has none of its own.
    monkeypatch.setattr(history, "version_now", lambda: "10.0.0")
    monkeypatch.setattr(history, "version_at", lambda commit: fdpp.__version__)
    rows, table = update(folder)
    assert [row["version"] for row in rows] == [fdpp.__version__] * 2 + ["10.0.0"] * 2
    assert [row["device"] for row in rows[2:]] == ["CPU", "GPU"] and "| not run: no CPU |" in table
    monkeypatch.setattr(history, "version_at", lambda commit: "10.0.0")
    rows, _ = update(folder)
    assert [row["device"] for row in rows[2:]] == ["CPU, Some", "GPU"]


def test_the_version_is_the_measured_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "ROOT", tmp_path)
    (tmp_path / "fdpp").mkdir()
    file = tmp_path / "fdpp" / "version.py"

    def git(*arguments: str) -> str:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *settings, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    commits = []
    (tmp_path / "setup.py").write_text('setup(\n    version="0.1.0",\n)\n')
    for version in (None, "0.2.0"):
        if version is not None:
            file.write_text(f'__version__ = "{version}"\n')
        git("add", "-A")
        git("commit", "-qm", "x")
        commits.append(git("rev-parse", "--short", "HEAD"))
    file.write_text('__version__ = "0.3.0"\n')
    assert [history.version_at(commit) for commit in commits] == ["0.1.0", "0.2.0"]
    assert history.version_at(commits[0] + "+changes") == "0.1.0"
    assert history.version_at("?") == history.version_now() == "0.3.0"


def test_versions_are_in_order() -> None:
    versions = ["0.9.0", "0.10.0", "0.10.1", "1.0.0"]
    assert sorted(reversed(versions), key=history.in_order) == versions


def test_a_folder_without_results_is_refused(update: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected one of select-\*.json.*, found none"):
        update(tmp_path)


def test_what_is_kept_is_up_to_date() -> None:
    kept = json.loads((history.RESULTS / "history.json").read_text(encoding="utf-8"))
    assert (history.ROOT / "bench" / "history.md").read_text(encoding="utf-8") == history.table(kept)
    assert {row["version"] for row in kept} >= {fdpp.__version__}
