"""The embedded models: what their tasks have in common, their tokenizers and their checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import fdpp
from fdpp import cli, tiny
from fdpp.cli.options import config_of
from fdpp.tiny.task import SPLITS, Task
from fdpp.tiny.tokenizer import SPECIAL, build_tokenizer

ASKED = {"sums": (12, 0.8), "sudoku": (20, 0.7), "stories": (20, 0.8)}
"""By task: how many problems a model is asked, and the share that is right at least."""

each_task = pytest.mark.parametrize("task", tiny.TASKS.values(), ids=tiny.TASKS)
each_model = pytest.mark.parametrize("task", tiny.MODELS.values(), ids=tiny.MODELS)


def problems_of(task: Task, count: int, seed: int = 0) -> list[Any]:
    """Of both splits."""
    return [problem for split in SPLITS for problem in task.generate(split, count, seed)]


def filled(text: str, length: int) -> list[str]:
    """The words of a response, filled up with `<eos>`."""
    words = text.split()
    return words + ["<eos>"] * (length - len(words))


@each_task
def test_problems_repeat_for_a_seed_and_differ_between_seeds(task: Task) -> None:
    for split in SPLITS:
        problems = task.generate(split, 20, seed=5)
        assert problems == task.generate(split, 20, seed=5)
        assert problems != task.generate(split, 20, seed=6)
        assert task.generate(split, 20) == task.generate(split, 20, 0)
        assert {problem.split for problem in problems} == {split}


@each_task
def test_an_unknown_split_is_named(task: Task) -> None:
    with pytest.raises(ValueError, match="split: expected one of train, held-out, got 'test'"):
        task.generate("test", 1)


@each_task
def test_the_own_response_is_right_and_may_hold_anything_after_its_end(task: Task) -> None:
    for problem in problems_of(task, 50, seed=1):
        assert task.is_right(problem.response, problem)
        assert task.is_right(f"{problem.response} <eos> {problem.response} <mask>", problem)
        assert not task.is_right(f"<eos> {problem.response}", problem)
        assert not task.is_right("", problem)


@each_task
def test_the_own_response_can_be_completed_from_any_of_its_words(task: Task) -> None:
    noise = torch.Generator().manual_seed(0)
    for problem in problems_of(task, 5, seed=2):
        words = filled(problem.response, task.max_new_tokens)
        for share in (0.0, 0.3, 0.7, 1.0):
            open_at = torch.rand(len(words), generator=noise) < share
            state = ["<mask>" if hidden else word for word, hidden in zip(words, open_at, strict=True)]
            assert task.completable(state, problem)
        assert not task.completable(["<eos>", *words[1:]], problem)
        assert not task.completable(["<unk>", *["<mask>"] * (len(words) - 1)], problem)
        assert not task.completable(words[:10], problem)


@each_task
def test_tokenizer_round_trip(task: Task) -> None:
    tokenizer = build_tokenizer(task.words)
    assert len(tokenizer) == len(set(task.words)) + len(SPECIAL) == len(task.words) + len(SPECIAL)
    for problem in problems_of(task, 100, seed=2):
        for text in (problem.prompt, problem.response):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
            assert len(ids) == len(text.split())
            assert tokenizer.unk_token_id not in ids
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]
    assert tokenizer("<mask><eos>")["input_ids"] == [tokenizer.mask_token_id, tokenizer.eos_token_id]


def test_signs_need_no_space() -> None:
    tokenizer = build_tokenizer(tiny.TASKS["sums"].words)
    assert tokenizer("Mia has 12 apples.")["input_ids"] == tokenizer("Mia has 12 apples .")["input_ids"]


def weights_of(checkpoint: Path | str) -> tuple[dict[str, Any], dict[str, int]]:
    """And the words."""
    model, tokenizer = tiny.load(checkpoint)
    return model.state_dict(), tokenizer.get_vocab()


@each_model
def test_a_model_loads_by_name_and_by_folder(task: Task) -> None:
    weights, vocabulary = weights_of(task.name)
    assert set(vocabulary) == {*SPECIAL, *task.words}
    for folder in (task.checkpoint, str(task.checkpoint)):
        again, same = weights_of(folder)
        assert same == vocabulary and again.keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())


def test_the_default_is_the_sums() -> None:
    assert tiny.load()[1].get_vocab() == tiny.load("sums")[1].get_vocab()
    assert tiny.TASKS["sums"].generate is tiny.generate and tiny.TASKS["sums"].is_right is tiny.is_right


@pytest.mark.parametrize("kind", [str, Path])
def test_a_missing_checkpoint_is_named(tmp_path: Path, kind: Any) -> None:
    expected = "expected one of sums, sudoku, stories, stories-block, or a folder with a checkpoint .*, got "
    with pytest.raises(FileNotFoundError, match=expected + str(tmp_path)):
        tiny.load(kind(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{expected}{tmp_path}/none"):
        tiny.load(kind(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=f"{expected}chess"):
        tiny.load(kind("chess"))


def test_a_task_without_its_checkpoint_is_named_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fdpp.tiny.task.CHECKPOINTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"got {tmp_path}/sudoku"):
        tiny.load("sudoku")


@each_model
def test_a_checkpoint_is_small_and_of_its_task(task: Task) -> None:
    model, tokenizer = tiny.load(task.name)
    assert not model.training and {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000
    assert sum(path.stat().st_size for path in task.checkpoint.iterdir()) <= 8 * 2**20
    assert tokenizer.get_vocab() == build_tokenizer(task.words).get_vocab()
    assert model.config.vocab_size == len(tokenizer)
    for name in ("mask_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(tokenizer, name)


@each_model
def test_a_checkpoints_own_settings_leave_room_for_every_problem(task: Task) -> None:
    model, tokenizer = tiny.load(task.name)
    own = model.generation_config
    assert (own.max_new_tokens, own.block_length) == (task.max_new_tokens, task.block_length)
    assert own.max_new_tokens % own.block_length == 0
    problems = problems_of(task, 50)
    if task.sizes is not None:
        problems = [problem for split in SPLITS for problem in task.generate(split, 50, 0, task.sizes[-1])]
    prompt, response = (
        max(len(tokenizer(text)["input_ids"]) for text in texts)
        for texts in zip(*((problem.prompt, problem.response) for problem in problems), strict=True)
    )
    assert prompt + own.max_new_tokens <= model.config.max_position_embeddings
    assert response < own.max_new_tokens


def test_the_sums_decode_with_the_defaults_of_the_command_line() -> None:
    model, tokenizer = tiny.load()
    own = model.generation_config
    problem = tiny.generate("held-out", 1)[0]
    ids = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids)
    assert tiny.is_right(tokenizer.decode(out.sequences[0, ids.shape[1] :]), problem)
    assert out.sequences.shape == (1, ids.shape[1] + 128)
    typed = config_of(cli.build_parser().parse_args(["generate", "--prompt", "x"]))
    assert (own.max_new_tokens, own.block_length, own.rule, own.cache) == (128, 32, fdpp.Frechet(0.25), "dual")
    assert dataclasses.replace(typed, seed=own.seed) == own


def test_the_block_diffusion_model_is_of_the_stories() -> None:
    blocks, stories = tiny.MODELS["stories-block"], tiny.TASKS["stories"]
    same = {"name": stories.name, "family": "llada", "block_length": 24, "recipe": stories.recipe}
    assert dataclasses.replace(blocks, **same) == stories and blocks.checkpoint != stories.checkpoint
    model, _ = tiny.load("stories-block")
    assert isinstance(model, fdpp.SDARModelLM) and model.block_causal
    assert model.default_block_length == blocks.block_length == 16


def test_the_block_diffusion_model_answers_with_a_forward_per_token() -> None:
    """Until EOS stands behind the story: 3 forwards in the block that the prompt opens, 16 in all others."""
    task = tiny.MODELS["stories-block"]
    model, tokenizer = tiny.load(task.name)
    problems = task.generate("held-out", 8, seed=7)
    ids = tokenizer([problem.prompt for problem in problems], return_tensors="pt")["input_ids"]
    out = model.generate(ids, rule=fdpp.Quota(1), stop_at_eos=False)
    texts = tokenizer.batch_decode(out.sequences[:, ids.shape[1] :])
    assert sum(map(task.is_right, texts, problems)) >= 7
    assert out.nfe.tolist() == [3 + 3 * 16] * 8 and out.sequences.shape == (8, 13 + 48)


@pytest.mark.slow
@each_task
def test_a_model_answers_and_repeats_itself(task: Task) -> None:
    count, share = ASKED[task.name]
    model, tokenizer = tiny.load(task.name)
    sample = task.generate("held-out", count, seed=7)
    batch = tokenizer([problem.prompt for problem in sample], padding=True, return_tensors="pt")
    sizes = {"max_new_tokens": task.max_new_tokens, "block_length": task.block_length}

    def decode() -> torch.Tensor:
        return model.generate(**batch, **sizes, rule=fdpp.Quota(1), cache="none").sequences

    first = decode()
    assert torch.equal(first, decode())
    texts = tokenizer.batch_decode(first[:, batch["input_ids"].shape[1] :])
    assert sum(map(task.is_right, texts, sample)) >= share * len(sample)
