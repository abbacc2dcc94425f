"""The sums: arithmetic word problems of the default embedded model."""

from __future__ import annotations

import random
import re

import pytest

from fdpp import tiny
from fdpp.tiny import sums
from fdpp.tiny.task import HELD_OUT_SHARE, SPLITS
from fdpp.tiny.tokenizer import build_tokenizer


def chain_of(problem):
    return problem.start, problem.changes


def test_the_split_is_a_function_of_the_numbers_alone():
    trained, held_out = tiny.generate("train", 5000, seed=3), tiny.generate("held-out", 2000, seed=3)
    assert all(sums.split_of(*chain_of(problem)) == "train" == problem.split for problem in trained)
    assert all(sums.split_of(*chain_of(problem)) == "held-out" == problem.split for problem in held_out)
    assert not {chain_of(problem) for problem in trained} & {chain_of(problem) for problem in held_out}


def test_every_chain_belongs_to_one_split_and_an_eighth_is_held_out():
    rng = random.Random(0)
    chains = [sums._chain(rng, 6) for _ in range(8000)]
    splits = [sums.split_of(*chain) for chain in chains]
    assert set(splits) == set(SPLITS)
    assert splits.count("held-out") / len(splits) == pytest.approx(1 / HELD_OUT_SHARE, abs=0.02)


@pytest.mark.parametrize("steps", range(sums.MIN_STEPS, sums.MAX_STEPS + 1))
def test_the_worked_solution_is_right(steps):
    tokenizer = build_tokenizer(sums.WORDS)
    for problem in tiny.generate("held-out", 100, seed=1, steps=steps):
        value = problem.start
        lines = re.findall(r"In (\w+ \w+) (\w+) (\d+) , so \w+ \w+ (\d+) (\w+) \.", problem.response)
        for (when, verb, change, after, thing), expected in zip(lines, problem.changes, strict=True):
            assert (verb in sums.GAINS) == (expected > 0)
            assert (verb in sums.LOSSES) == (expected < 0)
            assert int(change) == abs(expected)
            value += expected
            assert int(after) == value
            assert 0 < value <= sums.MAX_VALUE
            assert f"In {when} {verb} {change} ." in problem.prompt
            assert f"many {thing} now" in problem.prompt
        assert value == problem.answer == tiny.answer_of(problem.response)
        assert 50 <= len(tokenizer(problem.response)["input_ids"]) <= 102


def test_every_length_is_drawn_and_another_one_is_named():
    assert {len(problem.changes) for problem in tiny.generate("train", 200)} == {4, 5, 6, 7, 8}
    with pytest.raises(ValueError, match="expected 4 to 8, got 9"):
        tiny.generate("train", 1, steps=9)


def test_grading_reads_the_final_answer_before_eos():
    problem = tiny.generate("held-out", 1)[0]
    assert tiny.is_right(problem.response + " <eos> <eos>", problem)
    assert not tiny.is_right(f"Answer : {problem.answer + 1} coins .", problem)
    assert not tiny.is_right(f"<eos> Answer : {problem.answer} coins .", problem)
    assert tiny.answer_of("In May she finds 2 , so there are 4 coins .") is None
    assert tiny.answer_of("Answer : coins .") is None


def test_only_prompts_that_it_was_trained_on_are_problems():
    written = [problem.prompt for split in SPLITS for problem in tiny.generate(split, 300)]
    assert all(map(tiny.is_problem, written))
    assert all(tiny.is_problem(re.sub(r" ([.?])", r"\1", text)) for text in written[:50])
    text = tiny.generate("held-out", 1, steps=4)[0].prompt
    first, *changes, question, _ = re.split(r"(?<=[.?]) ?", text)
    assert len(changes) == 4
    others = [
        ("nothing", []),
        ("another question", ["What is the capital of France ?"]),
        ("no question", [first, *changes]),
        ("three changes", [first, *changes[:3], question]),
        ("nine changes", [first, *["In May he finds 1 . In June he loses 1 ."] * 4, changes[0], question]),
        ("something after it", [*text.split(), "now"]),
        ("other things", [first, *changes, "How many pens now ?" if "pens" not in text else "How many coins now ?"]),
        ("a verb that it does not know", [first, "In May he eats 1 .", *changes[1:], question]),
        ("too much", ["Max has 20 pens .", *["In May he finds 1 ."] * 4, "How many pens now ?"]),
        ("less than nothing", ["Max has 2 pens .", *["In May he loses 1 ."] * 4, "How many pens now ?"]),
    ]
    assert [name for name, parts in others if tiny.is_problem(" ".join(parts))] == []


def test_any_wording_can_be_completed_and_another_result_cannot():
    problem = tiny.generate("held-out", 1, seed=2)[0]
    filled = [*problem.response.split(), *["<eos>"] * 128][:128]
    opening = filled.index("so") + 1
    name = problem.prompt.split()[0]
    for first, second in ((name, "has"), ("that", "makes"), ("there", "are")):
        words = ["<mask>"] * opening + [first, second] + filled[opening + 2 :]
        open_later = [word if word.isdigit() or at < opening + 2 else "<mask>" for at, word in enumerate(words)]
        assert sums.completable(open_later, problem)
    assert not sums.completable([*filled[:opening], "there", "has", *filled[opening + 2 :]], problem)
    for at in (at for at, word in enumerate(filled) if word.isdigit()):
        other = "1" if filled[at] != "1" else "2"
        assert not sums.completable([*filled[:at], other, *filled[at + 1 :]], problem)
    assert not sums.completable(filled[:20], problem)
