"""`make quality`: its interval, its right responses, its labels, and a stopped run that resumes."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import quality
import quality_plot
import torch

from fdpp import tiny


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert quality.interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_every_wording_is_a_right_response() -> None:
    for problem in tiny.generate("held-out", 20):
        texts = quality.worded(problem)
        assert texts[0] == problem.response
        assert len(set(texts)) == 3 and all(tiny.is_exact(text, problem) for text in texts)


def test_every_proposal_is_in_a_bin() -> None:
    confidence = torch.tensor([0.0, 0.04, 0.05, 0.93, 0.97, 1.0])
    bins = quality.binned(confidence, torch.tensor([0.0, 0.0, 1.0, 1.0, 0.0, 1.0]).double())
    assert [b["count"] for b in bins] == [2, 1, 1, 2]
    assert [b["correct"] for b in bins] == [0.0, 1.0, 1.0, 0.5]


def test_a_batch_holds_prompts_of_one_length() -> None:
    problems = tiny.generate("held-out", 300)
    batches = quality.batches(problems)
    assert sorted(index for batch in batches for index in batch) == list(range(300))
    assert all(len({len(problems[i].changes) for i in batch}) == 1 and len(batch) <= 25 for batch in batches)


def test_the_stored_results_are_of_these_settings() -> None:
    stored = json.loads((Path(quality.__file__).parent / "results/quality.json").read_text())
    for name, settings in (("runs", quality.SETTINGS), ("bfloat16", quality.IN_BFLOAT16)):
        assert {(run["rule"], run["cache"], run["drafts"]) for run in stored[name]} <= set(settings)


@pytest.mark.slow
def test_a_stopped_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality.json"
    digest = hashlib.sha256((tiny.CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()[:12]
    drafted = [setting for setting in quality.IN_BFLOAT16 if setting[1] == "dual"]
    done: dict[str, Any] = {
        "environment": quality.environment(),
        "checkpoint": digest,
        "problems": 2,
        # No decode gives these responses and seconds, so a rerun would show.
        "runs": [{**quality.run("klass", "dual", 1, 2), "seconds": -1.0, "responses": [[1], [2]]}],
        "bfloat16": [
            {"rule": rule, "cache": cache, "drafts": drafts, "problems": 1, "same_as_undrafted": 1}
            for rule, cache, drafts in drafted
        ],
        "calibration": [{"confidence": 0.5, "correct": 0.5, "count": 2}],
    }
    out.with_suffix(".partial.json").write_text(json.dumps(done))
    options = ["--problems", "2", "--caches", "dual", "--no-sweep", "--jobs", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["quality", *options])
    drawn: list[Path] = []
    monkeypatch.setattr(quality_plot, "draw", lambda results, folder: drawn.append(folder))
    quality.main()

    results = json.loads(out.read_text())
    runs = {(run["rule"], run["drafts"]): run for run in results["runs"]}
    assert set(runs) == {(rule, 1) for rule in quality.MAIN} | set(quality.DRAFTED["dual"])
    assert runs["klass", 1]["seconds"] == -1.0 and runs["klass", 1]["agreement"] == 0
    for run in results["runs"]:
        assert run["same_as_undrafted"] == (0 if (run["rule"], run["drafts"]) == ("klass", 4) else run["problems"])
    assert runs[quality.ONE, 8]["nfe"] < runs[quality.ONE, 1]["nfe"]
    assert results["calibration"] == done["calibration"] and drawn == [tmp_path]
    assert not out.with_suffix(".partial.json").exists() and "responses" not in json.dumps(results)
    assert "in bfloat16, threshold 0.9, dual, 8 drafts: 1 of 1" in capsys.readouterr().out


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = json.loads((Path(quality.__file__).parent / "results/quality.json").read_text())
    quality_plot.draw(results, tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    labels = (tmp_path / "quality.svg").read_text()
    assert all(f"<!-- {name} -->" in labels for name, *_ in quality_plot.LOOKS.values())


def test_every_rule_has_a_marker_of_its_own_and_coinciding_ones_a_size_too() -> None:
    """`threshold 0.9` and `localleap` lie within 0.02 tokens per forward at the same share of exact answers."""
    results = json.loads((Path(quality.__file__).parent / "results/quality.json").read_text())
    defaults = {quality_plot.kind_of(run): run for run in reversed(results["runs"]) if run["cache"] == "dual"}
    assert defaults.keys() == quality_plot.LOOKS.keys()
    looks = {kind: look[1:3] for kind, look in quality_plot.LOOKS.items()}
    assert len({marker for marker, _ in looks.values()}) == len(looks)
    coinciding = [
        (a, b)
        for a, b in itertools.combinations(defaults, 2)
        if defaults[a]["exact"] == defaults[b]["exact"]
        and abs(defaults[a]["tokens_per_forward"] - defaults[b]["tokens_per_forward"]) < 0.1
    ]
    assert ("threshold", "localleap") in [tuple(sorted(pair, reverse=True)) for pair in coinciding]
    assert all(looks[a][1] != looks[b][1] for a, b in coinciding)
