"""The measurement of quantised weights: it compares the same problems, and goes on where it was stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch

pytest.importorskip("torchao.quantization")


def measured(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    arguments = ["quantised.py", "--problems", "3", "--tasks", "stories", "--out", str(out), "--weights", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    quantised.main()
    return json.loads(out.read_text())["runs"]


def test_runs_are_compared_with_those_of_whole_weights_and_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, run, made = tmp_path / "quantised.json", quantised.run, []

    def noted(task: str, rule: Any, weights: str, count: int) -> dict[str, Any]:
        made.append(weights)
        if len(made) == 4:
            raise KeyboardInterrupt
        return run(task, rule, weights, count)

    monkeypatch.setattr(quantised, "run", noted)
    with pytest.raises(KeyboardInterrupt):
        measured(monkeypatch, out, "int8")
    rows = measured(monkeypatch, out, "int8")
    assert made == ["float32", "int8", "float32", "int8", "int8"] and not out.with_suffix(".partial.json").exists()
    assert [(row["rule"], row["weights"]) for row in rows] == [
        (rule, weights) for rule in ("Frechet(0.25)", "Threshold(0.9)") for weights in ("float32", "int8")
    ]
    assert all(0 <= row["same"] <= 3 and row["nfe"] > 1 and "responses" not in row for row in rows)
    assert all(row["same"] == 3 for row in rows if row["weights"] == "float32")
    assert "| stories, `Threshold(0.9)` | float32 |" in capsys.readouterr().out
    measured(monkeypatch, out, "float8")
    assert made[5:] == ["float32", "float8"] * 2


def test_the_table() -> None:
    facts = {"task": "sums", "rule": "Quota(1)", "problems": 200, "nfe": 7.5}
    rows = [
        {**facts, "weights": "float32", "right": 190, "same": 200},
        {**facts, "weights": "int8", "right": 188, "same": 150},
    ]
    last = "| sums, `Quota(1)` | int8 | 94.0 (89.8 to 96.5) | 150 of 200 | 7.50 |"
    assert quantised.table(rows).splitlines()[2:] == [
        "| sums, `Quota(1)` | float32 | 95.0 (91.0 to 97.3) |  | 7.50 |",
        last,
    ]
