"""The embedded model: its problems, its tokenizer, its training and its checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re

import pytest
import torch
from transformers import AutoTokenizer

import fdpp
from fdpp import cli, tiny
from fdpp.attention.cache import BlockCache
from fdpp.cli.options import config_of
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.tiny import problems, train
from fdpp.tiny.tokenizer import SPECIAL, build_tokenizer


@pytest.fixture(scope="module")
def loaded():
    return tiny.load()


def chain_of(problem):
    return problem.start, problem.changes


def test_the_split_is_a_function_of_the_numbers_alone():
    trained, held_out = tiny.generate("train", 5000, seed=3), tiny.generate("held-out", 2000, seed=3)
    assert all(problems.split_of(*chain_of(problem)) == "train" == problem.split for problem in trained)
    assert all(problems.split_of(*chain_of(problem)) == "held-out" == problem.split for problem in held_out)
    assert not {chain_of(problem) for problem in trained} & {chain_of(problem) for problem in held_out}


def test_every_chain_belongs_to_one_split_and_an_eighth_is_held_out():
    rng = random.Random(0)
    chains = [problems._chain(rng, 6) for _ in range(8000)]
    splits = [problems.split_of(*chain) for chain in chains]
    assert set(splits) == set(problems.SPLITS)
    assert splits.count("held-out") / len(splits) == pytest.approx(1 / problems.HELD_OUT_SHARE, abs=0.02)


def test_training_draws_from_the_training_split_only(monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "generate", lambda split, *args: drawn.append(split) or tiny.generate(split, *args))
    train.make_batch(build_tokenizer(), 0, 1024)
    assert set(drawn) == {"train"}


@pytest.mark.parametrize("steps", range(problems.MIN_STEPS, problems.MAX_STEPS + 1))
def test_the_worked_solution_is_right(steps):
    tokenizer = build_tokenizer()
    for problem in tiny.generate("held-out", 100, seed=1, steps=steps):
        value = problem.start
        lines = re.findall(r"In (\w+ \w+) (\w+) (\d+) , so \w+ \w+ (\d+) (\w+) \.", problem.response)
        for (when, verb, change, after, thing), expected in zip(lines, problem.changes, strict=True):
            assert (verb in problems.GAINS) == (expected > 0)
            assert (verb in problems.LOSSES) == (expected < 0)
            assert int(change) == abs(expected)
            value += expected
            assert int(after) == value
            assert 0 < value <= problems.MAX_VALUE
            assert f"In {when} {verb} {change} ." in problem.prompt
            assert f"many {thing} now" in problem.prompt
        assert value == problem.answer == tiny.answer_of(problem.response)
        assert 50 <= len(tokenizer(problem.response)["input_ids"]) <= 102


def test_problems_repeat_for_a_seed_and_differ_between_seeds():
    assert tiny.generate("train", 20, seed=5) == tiny.generate("train", 20, seed=5)
    assert tiny.generate("train", 20, seed=5) != tiny.generate("train", 20, seed=6)
    assert {len(problem.changes) for problem in tiny.generate("train", 200)} == {4, 5, 6, 7, 8}


def test_unknown_split_and_length_are_named():
    with pytest.raises(ValueError, match="'test'"):
        tiny.generate("test", 1)
    with pytest.raises(ValueError, match="got 9"):
        tiny.generate("train", 1, steps=9)


def test_grading_reads_the_final_answer_before_eos():
    problem = tiny.generate("held-out", 1)[0]
    assert tiny.is_exact(problem.response + " <eos> <eos>", problem)
    assert not tiny.is_exact(f"Answer : {problem.answer + 1} coins .", problem)
    assert not tiny.is_exact(f"<eos> Answer : {problem.answer} coins .", problem)
    assert tiny.answer_of("In May she finds 2 , so there are 4 coins .") is None
    assert tiny.answer_of("Answer : coins .") is None


def test_tokenizer_round_trip():
    tokenizer = build_tokenizer()
    assert len(tokenizer) == len(set(problems.WORDS)) + len(SPECIAL)
    for problem in tiny.generate("train", 200, seed=2):
        for text in (problem.prompt, problem.response):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert tokenizer.unk_token_id not in ids
    assert tokenizer("Mia has 12 apples.")["input_ids"] == tokenizer("Mia has 12 apples .")["input_ids"]
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer("<mask><eos>")["input_ids"] == [tokenizer.mask_token_id, tokenizer.eos_token_id]


def test_batch_masks_what_it_says():
    tokenizer = build_tokenizer()
    for seed in range(6):
        noisy, target, weight, first = train.make_batch(tokenizer, seed, 2048)
        assert (first == -1).all()
        trained = target != -100
        masked = noisy == tokenizer.mask_token_id
        assert trained.any(1).all()
        assert (masked | ~trained).all()
        assert ((weight > 0) | ~trained).all()
        assert weight[trained].sum().item() == pytest.approx(1.0, rel=1e-5)
        torch.testing.assert_close(train.make_batch(tokenizer, seed, 2048)[:3], (noisy, target, weight))


def test_cached_batch_holds_the_block_at_its_start_and_now():
    tokenizer = build_tokenizer()
    for seed in range(6):
        batch = train.make_batch(tokenizer, seed, 2048, cached=True)
        length = batch.noisy.shape[1] - train.BLOCK
        assert (batch.target[:, :length] == -100).all()
        assert batch.weight[batch.target != -100].sum().item() == pytest.approx(1.0, rel=1e-5)
        for noisy, target, first in zip(batch.noisy, batch.target, batch.first, strict=True):
            assert (noisy[first:length] == tokenizer.mask_token_id).all()
            assert (noisy[:first] != tokenizer.mask_token_id).all()
            assert ((noisy[length:] == tokenizer.mask_token_id) == (target[length:] != -100)).all()
            assert (target[length:] != -100).any()


def test_cached_training_sees_what_the_dual_cache_gives():
    """Logits of the copied block are those of a block forward over the cache of the sequence at the block's start."""
    model, tokenizer = train.build_model(0), build_tokenizer()
    batch = train.make_batch(tokenizer, 3, 1024, cached=True)
    length = batch.noisy.shape[1] - train.BLOCK
    sees, positions = train.dual_cache(batch.first, length)
    with torch.no_grad():
        trained = model.model(batch.noisy, sees, positions)[:, length:]
        for row, first in enumerate(batch.first.tolist()):
            cache = BlockCache()
            model.model(batch.noisy[row : row + 1, :length], cache=cache)
            decoded = model.model(batch.noisy[row : row + 1, length:], cache=cache, start=first)
            torch.testing.assert_close(trained[row : row + 1], decoded)


def test_results_are_the_running_values_and_the_answer():
    tokenizer = build_tokenizer()
    for problem in tiny.generate("train", 20, seed=4):
        ids = tokenizer(problem.response, return_tensors="pt")["input_ids"]
        values = list(itertools.accumulate(problem.changes, initial=problem.start))[1:]
        stated = tokenizer.decode(ids[train.results(tokenizer, ids)]).split()
        assert [int(value) for value in stated] == [*values, problem.answer]


def test_plain_attention_equals_the_fused_one():
    model = train.build_model(0)
    ids = torch.randint(4, 80, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = model(ids).logits
        with train.PlainAttention():
            plain = model(ids).logits
    torch.testing.assert_close(plain, fused)


STEPS = ("--steps", "2", "--cached-steps", "3")


def run_training(folder, *more):
    settings = {"out": folder / "out", "state": folder / "state.pt", "device": "cpu", "tokens": 256}
    settings |= {"save-every": 100, "eval-problems": 0}
    train.main([*(f"--{name}={value}" for name, value in settings.items()), *more])
    return torch.load(folder / "state.pt", weights_only=True)


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    monkeypatch.setattr(train, "evaluate", lambda *_: 0.0)
    expected = run_training(whole, *STEPS)

    make_batch, batches = train.make_batch, []

    def interrupted(*args):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(args)
        return make_batch(*args)

    monkeypatch.setattr(train, "make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_training(parts, *STEPS, "--save-every", "2")
    monkeypatch.setattr(train, "make_batch", make_batch)
    assert torch.load(parts / "state.pt", weights_only=True)["step"] == 2
    resumed = run_training(parts, *STEPS)

    assert resumed["step"] == expected["step"] == 5
    for name, weight in expected["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    assert AutoTokenizer.from_pretrained(whole / "out").mask_token == "<mask>"
    trained, shipped = (
        DiffusionGenerationConfig.from_pretrained(folder) for folder in (whole / "out", tiny.CHECKPOINT)
    )
    assert trained == shipped


def test_training_stops_at_its_time_budget_and_reports_at_its_end(tmp_path, capsys):
    assert run_training(tmp_path, *STEPS, "--minutes", "0")["step"] == 0
    run_training(tmp_path, "--steps", "1", "--cached-steps", "1", "--eval-problems", "2")
    assert capsys.readouterr().out.count("held-out problems") == 3


def test_checkpoint_is_small(loaded):
    model, tokenizer = loaded
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    assert sum(path.stat().st_size for path in tiny.CHECKPOINT.iterdir()) <= 8 * 2**20
    assert model.config.vocab_size == len(tokenizer) == len(build_tokenizer())
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)


def test_the_models_own_settings_decode_it(loaded):
    """Any problem and its response fit the window, and the command line has the same defaults."""
    model, tokenizer = loaded
    longest = max(
        len(tokenizer(problem.prompt)["input_ids"])
        for split in problems.SPLITS
        for problem in tiny.generate(split, 50, steps=problems.MAX_STEPS)
    )
    own = model.generation_config
    assert longest + own.max_new_tokens <= model.config.max_sequence_length
    problem = tiny.generate("held-out", 1)[0]
    ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids)
    assert tiny.is_exact(tokenizer.decode(out.sequences[0, ids.shape[1] :]), problem)
    assert out.sequences.shape == (1, ids.shape[1] + 128)
    typed = config_of(cli.build_parser().parse_args(["generate", "--prompt", "x"]))
    assert (own.max_new_tokens, own.block_length, own.rule, own.cache) == (128, 32, fdpp.Frechet(0.25), "dual")
    assert dataclasses.replace(typed, seed=own.seed) == own


def test_only_prompts_that_it_was_trained_on_are_problems():
    written = [problem.prompt for split in problems.SPLITS for problem in tiny.generate(split, 300)]
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


def test_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint"):
        tiny.load(tmp_path)


@pytest.mark.slow
def test_the_model_answers_and_repeats_itself(loaded):
    model, tokenizer = loaded
    sample = tiny.generate("held-out", 12, seed=7)
    batch = tokenizer([problem.prompt for problem in sample], padding=True, return_tensors="pt")

    def decode():
        return model.generate(**batch, max_new_tokens=128, block_length=32, rule=fdpp.Quota(1), cache="none").sequences

    first = decode()
    assert torch.equal(first, decode())
    texts = tokenizer.batch_decode(first[:, batch["input_ids"].shape[1] :])
    exact = sum(tiny.is_exact(text, problem) for text, problem in zip(texts, sample, strict=True))
    assert exact >= 0.8 * len(sample)
