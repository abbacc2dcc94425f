"""`make quality`: intervals, keys and resuming, why decodes fail, partial refreshes, calibration, tables and plots."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import calibration
import failures
import pytest
import quality
import quality_plot
import quality_report
import quality_runs
import torch
from quality_runs import Setting

import fdpp
from fdpp import tiny
from fdpp.rules import MostConfident, Proposed, whole
from fdpp.tiny import train
from fdpp.tiny.tokenizer import build_tokenizer


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert quality_report.interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_a_batch_holds_rows_of_one_length_and_first_mask() -> None:
    rows = [[1, 9, 2], [1, 2], [1, 9, 9], [1, 2, 9], [3, 4], *([[5]] * 60)]
    groups = quality_runs.batches(rows, mask_id=9)
    assert sorted(index for group in groups for index in group) == list(range(65))
    assert groups[:3] == [[0, 2], [1, 4], [3]] and [len(group) for group in groups[3:]] == [50, 10]


@dataclass(frozen=True)
class Within(MostConfident, fdpp.Rule):
    """A rule with one in it, and a number that can be None."""

    rule: fdpp.Rule
    at_most: int | None = whole(4, 1, "tokens", optional=True)

    def decide(self, proposed: Proposed) -> fdpp.Selection:
        return proposed.step


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (fdpp.Quota(2), "Quota(2)"),
        (fdpp.Frechet(0.5, calibration=0.02), "Frechet(0.5, calibration=0.02)"),
        (fdpp.Frechet(), "Frechet(0.25)"),
        (fdpp.LocalLeap(), "LocalLeap()"),
        (fdpp.LocalLeap(threshold=0.8), "LocalLeap(threshold=0.8)"),
        (fdpp.Wino(cap=None), "Wino(cap=None)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rules_are_named_as_one_writes_them(rule: fdpp.Rule, name: str) -> None:
    assert quality_runs.named(rule) == name
    assert eval(f"fdpp.{name}") == rule


def test_a_rule_with_one_in_it_is_named_and_is_default_with_it() -> None:
    rules = Within(fdpp.Frechet(0.25)), Within(fdpp.LocalLeap(), at_most=None), Within(fdpp.Threshold(0.7), at_most=2)
    names = "Within(Frechet(0.25))", "Within(LocalLeap(), at_most=None)", "Within(Threshold(0.7), at_most=2)"
    assert tuple(map(quality_runs.named, rules)) == names
    assert [*map(quality_runs.is_default, (*rules, Within(fdpp.Threshold(0.7))))] == [True, False, False, False]


OF_BLOCK_MODELS = {*(fdpp.EntropySum, fdpp.Leftmost, fdpp.LeftmostRun, fdpp.ThresholdLeftmost, fdpp.ThresholdQuota)}
"""Rules that were published with models of another kind than the three measured ones."""

UNMEASURED = {fdpp.Prophet}
"""It has to know where the answer stands."""


def test_every_rule_of_the_library_that_decides_how_many_is_measured_at_its_default() -> None:
    """Those of Dream commit as many as a schedule says, whatever their confidence; one per step stands for them."""
    ours = {kind for kind in fdpp.Rule.named().values() if kind.__module__.startswith("fdpp.")}
    named = ours - OF_BLOCK_MODELS - UNMEASURED
    kinds = {kind for kind in named if not kind.__module__.startswith("fdpp.rules.dream.")}
    assert len(named - kinds) == 5 and all(kind().takes_steps() for kind in named - kinds)
    assert {type(rule) for rule in quality_runs.DEFAULTS} == kinds
    assert len(kinds) == len(quality_runs.FAMILIES)
    of_two = [fdpp.Revocable(fdpp.Frechet()), fdpp.Revocable(fdpp.Threshold())]
    assert [rule for rule in quality_runs.DEFAULTS if isinstance(rule, fdpp.Revocable)] == of_two
    assert len(quality_runs.DEFAULTS) == len(kinds) + 1
    assert {name: {type(rule).__name__ for rule in rules} for name, rules in quality_runs.FAMILIES.items()} == {
        name: {name} for name in quality_runs.FAMILIES
    }


def test_settings_are_distinct_and_leave_out_what_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_runs, "digest", lambda task: task)
    every = [
        s
        for task in tiny.TASKS
        for s in quality_runs.settings_of(task, quality.PARTS, quality_runs.CACHES, 500, True, 0.1234567)
    ]
    keys = [quality_runs.key_of(s.facts()) for s in every]
    assert len(set(keys)) == len(keys)
    assert keys == [quality_runs.key_of(json.loads(json.dumps(s.facts()))) for s in every]
    assert {s.rule.calibration for s in every} == {0.0, 0.1235}
    assert {s.task for s in every if s.how == "holes"} == {"sudoku"}
    blocks = quality_runs.settings_of("stories-block", quality.PARTS, quality_runs.CACHES, 500, True, None)
    assert {(s.cache, s.how) for s in blocks} == {("dual", "plain"), ("dual", "bfloat16")}
    assert {s.rule for s in blocks if s.problems == 500} == {*quality_runs.DEFAULTS}
    assert {s.rule for s in blocks} - {s.rule for s in every} == {*quality_runs.OF_BLOCKS}
    assert quality_runs.settings_of("stories-block", ["refresh", "int8"], ["none", "dual"], 500, True, None) == []
    some = quality_runs.settings_of("sums", ["rules"], ["prefix"], 20, True, None)
    assert some == [Setting("sums", rule, "prefix", problems=20) for rule in quality_runs.DEFAULTS]


@pytest.mark.parametrize(
    "change", [{"checkpoint": "other"}, {"problems": 3}, {"cache": "none"}, {"how": "int8"}, {"drafts": 4}], ids=str
)
def test_a_run_of_something_else_has_another_key(change: dict[str, Any]) -> None:
    facts = {"task": "sums", "checkpoint": "a", "numbers": {"name": "Quota", "k": 1}, "cache": "dual", "drafts": 1}
    facts |= {"how": "plain", "problems": 2}
    assert quality_runs.key_of(facts) == quality_runs.key_of(facts | {"seconds": 3.0})
    assert quality_runs.key_of(facts) != quality_runs.key_of(facts | change)


def run_quality(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> dict[str, Any]:
    """The results of `make quality` on two problems of the sums, one per step and two other runs."""
    monkeypatch.setattr(quality_runs, "FAMILIES", {"Quota": (fdpp.Quota(1),), "Threshold": (fdpp.Threshold(),)})
    monkeypatch.setattr(quality_runs, "DEFAULTS", [fdpp.Quota(1), fdpp.Threshold()])
    monkeypatch.setattr(quality_runs, "DRAFTED", {"dual": ((fdpp.Threshold(), 4),)})
    monkeypatch.setattr(quality_runs, "CACHES", ("dual",))
    monkeypatch.setattr(quality, "CACHES", ("dual",))
    monkeypatch.setattr(quality_plot, "draw", lambda results, folder: None)
    argv = ["quality", "--problems", "2", "--tasks", "sums", "--caches", "dual", "--jobs", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, *options])
    quality.main()
    return json.loads(out.read_text())


def test_what_blocks_begin_with() -> None:
    sudoku = tiny.TASKS["sudoku"]
    found = {how: quality_runs.blocks_of(sudoku, how) for how in ("plain", "undivided", *quality_runs.REFRESHED)}
    assert found["plain"] == {"block_length": 14, "refresh": "all"}
    assert found["undivided"] == {"block_length": 42, "refresh": "all"}
    assert found["onward"] == {"block_length": 14, "refresh": "window:14:end"}
    assert found["short"] == {"block_length": 5, "refresh": "all"}
    assert found["short onward"] == {"block_length": 5, "refresh": "window:5:end"}
    assert found["short recent:4"] == {"block_length": 5, "refresh": "recent:4"}
    for how in found:
        fdpp.DiffusionGenerationConfig(**found[how])
    for name, task in tiny.TASKS.items():
        assert 8 <= -(-task.max_new_tokens // quality_runs.SHORT[name]) <= 9


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_only_what_changed_is_measured_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "quality.json"
    # No decode gives these seconds and marks, so a rerun would show.
    done = quality.marked(Setting("sums", fdpp.Threshold(), "dual", problems=2)) | {"seconds": -1.0, "marks": "???###"}
    other = done | {"checkpoint": "of before"}
    out.with_suffix(".partial.json").write_text(json.dumps({"runs": [other, done], "calibration": []}))
    results = run_quality(monkeypatch, out, "--only", "rules", "drafts")
    assert not out.with_suffix(".partial.json").exists()
    runs = {(run["rule"], run["how"], run["drafts"]): run for run in results["runs"]}
    assert len(runs) == len(results["runs"]) == 3 + 6
    kept, one = runs["Threshold(0.9)", "plain", 1], runs["Quota(1)", "plain", 1]
    assert kept["seconds"] == -1.0 and kept["same_as_one"] == 0 and one["same_as_one"] == 2
    assert runs["Threshold(0.9)", "plain", 4]["same_as_undrafted"] == 0
    assert runs["Threshold(0.9)", "bfloat16", 8]["same_as_undrafted"] == 1
    assert one["nfe"] > 10 * kept["nfe"] and one["right"] == "11" and "failures" not in one
    assert {key for key, run in runs.items() if "marks" in run} == {key for key in runs if key[2] == 1}
    assert "## sums: drafts" in capsys.readouterr().out

    monkeypatch.setattr(quality, "marked", None)
    assert run_quality(monkeypatch, out, "--only", "rules", "drafts")["runs"] == results["runs"]
    # What is not asked for stays.
    assert run_quality(monkeypatch, out, "--only", "rules")["runs"] == results["runs"]


def test_rows_are_compared_by_their_marks_and_kept_as_they_are_without() -> None:
    def row(rule: fdpp.Rule, marks: str, **facts: Any) -> dict[str, Any]:
        about = {"task": "sums", "cache": "dual", "how": "plain", "drafts": 1, "numbers": rule.saved(), "marks": marks}
        return about | facts

    one, swept = row(fdpp.Quota(1), "abcdefghi"), row(fdpp.Threshold(0.5), "abc___ghi")
    drafted = row(fdpp.Threshold(), "abcdef", drafts=4)
    alone, elsewhere = row(fdpp.Threshold(), "abcxyzghi"), row(fdpp.Quota(1), "_________", cache="none")
    before = row(fdpp.Frechet(), "", same_as_one=7)
    del before["marks"]
    partial = row(fdpp.Threshold(), "abcxyz___", how="onward")
    short = [row(fdpp.Threshold(), "___xyz___", how=how) for how in ("short", "short block")]
    assert [run.get("same_as_full") for run in quality.compared([alone, partial, *short])] == [None, 2, None, 3]
    rows = quality.compared([elsewhere, one, swept, alone, drafted, before])
    assert [row.get("same_as_one") for row in rows] == [3, 3, 2, 2, 2, 7]
    assert [row.get("same_as_undrafted") for row in rows] == [None, None, None, None, 1, None]
    assert [row for row in rows if "marks" in row] == [elsewhere, one, alone]
    assert quality.marks([[1], [2], [1]])[:3] == quality.marks([[1]]) != quality.marks([[2]])


PAIRS = {("a", "b"), ("c", "d")}


def pair_or_open(words: Sequence[str]) -> bool:
    """Right are a b and c d, and any word may follow them."""
    return any(all(word in (of, failures.OPEN) for word, of in zip(words, pair, strict=False)) for pair in PAIRS)


@pytest.mark.parametrize(
    ("words", "steps", "failure"),
    [
        ("a d x", (0, 0, 1), failures.Failure("coupling", 2, 2)),
        ("a d x", (0, 0, 0), failures.Failure("coupling", 3, 2)),
        ("a d x", (1, 0, 2), failures.Failure("confidence", 1)),
        ("x d y", (0, 1, 2), failures.Failure("confidence", 1)),
        ("x y a", (2, 2, 0), failures.Failure("confidence", 2)),
        ("a b x", (0, 1, 2), failures.Failure("never")),
        ("a d <pad>", (0, 0, -1), failures.Failure("coupling", 2, 2)),
    ],
)
def test_why_a_decode_failed(words: str, steps: tuple[int, ...], failure: failures.Failure) -> None:
    assert failures.explained(words.split(), steps, pair_or_open) == failure


def test_three_commits_that_only_conflict_together() -> None:
    def completable(words: Sequence[str]) -> bool:
        return list(words).count("a") < 3

    assert failures.explained(list("aaa"), (1, 1, 1), completable) == failures.Failure("coupling", 3, 3)
    assert failures.explained(list("aaa"), (0, 1, 1), completable) == failures.Failure("coupling", 2, 2)


def test_failures_of_a_real_task() -> None:
    """A digit twice in a row of cells: at once it is a coupling, one after the other a wrong confidence."""
    task = tiny.TASKS["sudoku"]
    problem = task.generate("held-out", 1, 0, 4)[0]
    words = [*problem.response.split(), failures.END]
    free = [at for at in range(6) if problem.givens[at] == 0]
    opened = [failures.OPEN] * len(words)

    def may_stand(digit: str, at: int) -> bool:
        return task.completable([*opened[:at], digit, *opened[at + 1 :]], problem)

    digit, here, there = next(
        (digit, here, there)
        for digit in "123456"
        for here in free
        for there in free
        if here < there and may_stand(digit, here) and may_stand(digit, there)
    )
    words[here] = words[there] = digit
    for second, kind in ((0, "coupling"), (1, "confidence")):
        steps = [2] * len(words)
        steps[here], steps[there] = 0, second
        assert failures.explained(words, steps, lambda said: task.completable(said, problem)).kind == kind


def test_failures_add_up() -> None:
    assert failures.counted([])["commits"] == 0.0
    kinds = ("confidence", 1), ("coupling", 4, 2), ("coupling", 4, 3), ("never",)
    expected = {"wrong": 4, "confidence": 1, "coupling": 2, "never": 1, "pairs": 1, "commits": 2.25}
    assert failures.counted([failures.Failure(*kind) for kind in kinds]) == expected


def test_every_proposal_is_in_a_bin() -> None:
    confidence = torch.tensor([0.0, 0.04, 0.05, 0.93, 0.95, 0.97, 0.98, 0.985, 0.99, 1.0])
    bins = calibration.binned(confidence, torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 1, 1]).bool())
    assert [b["from"] for b in bins] == [0.0, 0.05, 0.9, 0.95, 0.98, 0.99]
    assert [b["count"] for b in bins] == [2, 1, 1, 2, 2, 2]
    assert [b["correct"] for b in bins] == [0.0, 1.0, 1.0, 0.5, 1.0, 1.0]


def test_what_bins_sum_up_to() -> None:
    bins = [
        {"from": 0.3, "confidence": 0.3, "correct": 0.1, "count": 400},
        {"from": 0.5, "confidence": 0.5, "correct": 0.6, "count": 300},
        {"from": 0.6, "confidence": 0.6, "correct": 0.5, "count": 200},
        {"from": 0.7, "confidence": 0.7, "correct": 0.2, "count": 100},
    ]
    found = calibration.summed_up(bins)
    assert found["error"] == pytest.approx((0.2 * 400 + 0.1 * 300 + 0.1 * 200 + 0.5 * 100) / 1000)
    assert found["allowance"] == pytest.approx(0.1), "neither of the bin below 0.5 nor of the one with too few"
    assert found["allowance_mean"] == pytest.approx((0.1 * 200 + 0.5 * 100) / 600)
    assert calibration.summed_up(bins[:2])["allowance"] == 0.0


def test_calibration_scores_states_of_the_problems_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is sure of the own token, from its second block on of another one."""
    task = tiny.TASKS["sudoku"]
    tokenizer = build_tokenizer(task.words)
    problem = task.generate("train", 1, 1)[0]
    own = tokenizer(f"{problem.prompt} {problem.response}")["input_ids"] + [tokenizer.eos_token_id]
    states = []

    class Sure(torch.nn.Module):
        config = train.build_model(task, 0).config

        def model(self, tokens: torch.Tensor) -> torch.Tensor:
            states.append(tokens.clone())
            logits = torch.zeros(*tokens.shape, self.config.vocab_size)
            said = torch.tensor(own) if len(states) <= 7 else torch.full((len(own),), 4)
            return logits.scatter(2, said.expand(1, -1)[..., None], 20.0)

        def project(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden

    monkeypatch.setattr(calibration, "model_of", lambda task, how: (Sure(), tokenizer))
    monkeypatch.setattr(calibration, "digest", lambda task: "none")
    found = calibration.scored("sudoku", "train", 1)
    assert len(states) == 42 / 2
    for at, state in enumerate(states):
        said = state[0] != tokenizer.mask_token_id
        assert state[0, said].tolist() == [own[i] for i in said.nonzero().flatten().tolist()]
        assert said.sum() == len(own) - 42 + 2 * at
    # Blocks of 14, 12, ... masked positions; the last one's EOS does not count.
    assert found["proposals"] == 3 * 56 - sum(state[0, -1] == tokenizer.mask_token_id for state in states[14:])
    assert [b["from"] for b in found["bins"]] == [0.99] and 0.3 < found["bins"][0]["correct"] < 0.6


def synthetic() -> dict[str, Any]:
    """Results of two tasks with made-up numbers, and a family that no plot knows."""
    runs = []
    for task in ("sums", "sudoku"):
        for cache in ("none", "dual"):
            for at, (name, number) in enumerate([("Quota", 1), ("Threshold", 0.9), ("Threshold", 0.5), ("New", 1)]):
                right = 20 - 4 * at
                row = {
                    "task": task, "checkpoint": "a", "rule": f"{name}({number})", "cache": cache, "how": "plain",
                    "numbers": {"name": name, "number": number}, "drafts": 1, "problems": 20, "share": right / 20,
                    "low": right / 20 - 0.1, "high": right / 20 + 0.05, "nfe": 40.0 / (at + 1), "nfe_error": 0.1,
                    "tokens_per_forward": 1.0 + at, "query_tokens": 100.0, "right": "1" * right + "0" * (20 - right),
                    "same_as_one": 20 - at, "nfe_of": {"8": 30.0},
                    "failures": {"wrong": 20 - right, "confidence": at, "coupling": 3 * at, "pairs": 2 * at,
                                 "never": 0, "commits": 2.5},
                }  # fmt: skip
                runs.append(row)
                if (task, cache) == ("sudoku", "none"):
                    runs.append(row | {"how": "undivided", "nfe": 30.0 / (at + 1)})
                if name == "Threshold" and cache == "dual":
                    runs.append(row | {"drafts": 4, "nfe": 5.0, "same_as_undrafted": 19, "query_tokens": 150.0})
                    runs.append(row | {"how": "int8", "problems": 8, "right": "01111111"})
                    runs.append(row | {"how": "short", "query_tokens": 80.0})
                    partial = {"how": "short block", "query_tokens": 20.0, "right": "0" * 20, "same_as_full": 7}
                    runs.append(row | partial)
    rows = [row for row in runs if row["task"] == "sums" and row["rule"] == "Threshold(0.9)" and row["drafts"] == 1]
    numbers = {"name": "Threshold", "number": 0.9, "calibration": 0.1}
    runs += [row | {"numbers": numbers, "rule": "calibrated"} for row in rows if row["how"] == "plain"]
    bins = [{"from": i / 10, "confidence": i / 10, "correct": i / 12, "count": 300} for i in range(10)]
    scored = [
        {"task": task, "checkpoint": "a", "split": split, "problems": 9} | calibration.summed_up(bins)
        for task in ("sums", "sudoku")
        for split in ("held-out", "train")
    ]
    return {"runs": runs, "calibration": scored}


def test_tables() -> None:
    text = quality_report.report(synthetic())
    chapters = {part.split("\n")[0]: part for part in text.split("## ")[1:]}
    assert {name.split(": ")[0] for name in chapters} == {"all tasks", "sums", "sudoku"}
    beside = (
        "| `Threshold(0.9)` | 80.0 (58.4 to 91.9) | 20.00 ± 0.10 | 100 | 80.0 (58.4 to 91.9) | 20.00 ± 0.10 | 100 |"
    )
    assert beside in chapters["all tasks: dual"]
    assert "all tasks: prefix" not in chapters
    undivided = "| `Threshold(0.9)` | 80.0 (58.4 to 91.9) | 15.00 ± 0.10 | 2.00 | 100 | 4 | 1 | 3 |"
    assert undivided in chapters["sudoku: in one block"] and "sums: in one block" not in chapters
    assert "one block, by NFE: `New(1)` 40.0% at 7.50" in chapters["sudoku: frontier"]
    rules = chapters["sums: every rule"]
    cells = "80.0 (58.4 to 91.9) | 20.00 ± 0.10 | 2.00 | 100"
    assert f"| `Threshold(0.9)` | {cells} |  |  |  |  | {cells} | 19 of 20 |" in rules and "calibrated" not in rules
    assert "| `Threshold(0.9)` | 4 |  |  |  |  | 20.0 → 5.0 | 19 of 20 | 1.5x |" in chapters["sums: drafts"]
    int8 = (
        "| `Threshold(0.9)`, dual | 8 | 100.0 (67.6 to 100.0) | 30.00 | 87.5 (52.9 to 97.8) | 20.00 ± 0.10 | 1, 0 |  |"
    )
    assert int8 in chapters["sums: weights in int8"]
    short = (
        "| `Threshold(0.9)`, short | all | 20 | 80.0 (58.4 to 91.9) | 20.00 ± 0.10 | 80 |  |  |  |\n"
        "| `Threshold(0.9)`, short | block | 20 | 0.0 (0.0 to 16.1) | 20.00 ± 0.10 | 20 | 0.25x | 16, 0 | 7 of 20 |"
    )
    refreshes = chapters["sums: partial refreshes"]
    assert short in refreshes and ", own" not in refreshes
    assert "| `New(1)` | 12 | 3 | 9 | 6 | 0 | 2.5 |" in chapters["sums: why decodes failed"]
    assert "| `calibrated` | 80.0" in chapters["sums: calibrated"] and "sudoku: calibrated" not in chapters
    assert "sums: as holes" not in chapters
    assert all(
        len({line.count("|") for line in part.split("\n") if line[:1] == "|"}) <= 1 for part in chapters.values()
    )


def test_a_block_diffusion_model_stands_beside_the_llada_of_its_task() -> None:
    rows = synthetic()["runs"]
    blocks = [row | {"task": "sums-block", "nfe": row["nfe"] / 2, "query_tokens": 60.0} for row in rows]
    assert quality_report.pairs_table(rows, "sums") == ""
    table = quality_report.pairs_table([*rows, *(row for row in blocks if row["cache"] == "dual")], "sums-block")
    lines = table.split("\n")
    assert lines[0].startswith("| rule | problems | sums: right, % | NFE | tok/fwd | positions fed | sums-block: right")
    cells = "| 80.0 (58.4 to 91.9) | {:.2f} ± 0.10 | 2.00 | {} "
    assert f"| `Threshold(0.9)` | 20 {cells.format(20, 100)}{cells.format(10, 60)}|" in lines
    assert f"| `Threshold(0.9)`, drafts 4 | 20 {cells.format(5, 150)}{cells.format(2.5, 60)}|" in lines


def test_the_frontier_leaves_out_what_another_beats() -> None:
    rows = [{"nfe": nfe, "share": share} for nfe, share in ((5, 0.5), (6, 0.5), (6, 0.7), (7, 0.6), (9, 0.7), (9, 0.9))]
    assert quality_report.frontier(rows) == [rows[0], rows[2], rows[5]]
    fed = [{"nfe": 6, "query_tokens": 90, "share": 0.7}, {"nfe": 5, "query_tokens": 180, "share": 0.7}]
    assert quality_report.frontier(fed) == [fed[1]] and quality_report.frontier(fed, "query_tokens") == [fed[0]]


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quality_plot.draw(synthetic(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{suffix}"
        for name in ("quality-sums", "quality-sudoku", "quality-sudoku-undivided", "calibration")
        for suffix in ("png", "svg")
    }
    labels = (tmp_path / "quality-sums.svg").read_text()
    assert all(labels.count(f"<!-- {name} -->") == 2 for name in ("Threshold", "New"))
    assert labels.count("<!-- one per step: 100.0%, 40 forwards -->") == 2
    first = (tmp_path / "quality-sums.svg").read_bytes()
    quality_plot.draw(synthetic(), tmp_path)
    assert (tmp_path / "quality-sums.svg").read_bytes() == first


def test_no_name_covers_another() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(4, 4))
    pytest.importorskip("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    axes = figure.subplots()
    row = synthetic()["runs"][0]
    # Eight families at one point.
    runs = [row | {"numbers": {"name": name}, "nfe": 8 + at / 100} for at, name in enumerate(quality_plot.LOOKS)]
    looks = quality_plot.looks_of(list(quality_plot.LOOKS))
    quality_plot.prepare(axes, runs, looks, quality_plot.Window(5, 15, 50, 100))
    quality_plot.name_lines(axes, quality_plot.families(runs), looks)
    figure.canvas.draw()
    boxes = [text.get_bbox_patch().get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == list(quality_plot.LOOKS)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 and box.y1 < frame.y1 for box in boxes)


def test_families_look_different() -> None:
    looks = quality_plot.looks_of([*quality_runs.FAMILIES, "Another", "YetAnother"])
    assert len({marker for marker, _ in looks.values()}) == len({colour for _, colour in looks.values()}) == len(looks)


def test_results_of_a_run_on_a_line(tmp_path: Path) -> None:
    results = {"environment": {"a": 1}, "runs": [{"x": 1}, {"y": [2]}], "calibration": []}
    text = quality.written(results)
    assert json.loads(text) == results and '\n{"x": 1},\n{"y": [2]}\n' in text
