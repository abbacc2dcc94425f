"""The training of the embedded models: its batches, what a cached batch sees, and stopping and resuming."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from fdpp import tiny
from fdpp.attention.cache import BlockCache
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.tiny import sums, train
from fdpp.tiny.task import Task
from fdpp.tiny.tokenizer import build_tokenizer

each_task = pytest.mark.parametrize("task", tiny.TASKS.values(), ids=tiny.TASKS)
each_model = pytest.mark.parametrize("task", tiny.MODELS.values(), ids=tiny.MODELS)
SEEDS = range(12)
TOKENS = 1024


class Drawn:
    """A batch, the tokenizer and the problems that it was made of."""

    def __init__(self, task: Task, seed: int, cached: bool = False) -> None:
        calls: list[tuple[str, list[Any]]] = []

        def generate(split: str, *args: Any) -> Any:
            calls.append((split, list(task.generate(split, *args))))
            return calls[-1][1]

        self.tokenizer = build_tokenizer(task.words)
        recorded = dataclasses.replace(task, generate=generate)
        self.batch = train.make_batch(recorded, self.tokenizer, seed, TOKENS, cached)
        self.splits = {split for split, _ in calls}
        self.problems = calls[-1][1]
        self.prompt = len(self.tokenizer(self.problems[0].prompt)["input_ids"])
        self.mask = self.tokenizer.mask_token_id

    def clean(self, length: int, holes: bool = False) -> Tensor:
        """The ids of prompts and responses, or of responses alone, filled up with EOS: `[B, length]`."""
        texts = [p.response if holes else f"{p.prompt} {p.response}" for p in self.problems]
        rows = [self.tokenizer(text)["input_ids"] for text in texts]
        return torch.tensor([row + [self.tokenizer.eos_token_id] * (length - len(row)) for row in rows])

    def feeds(self) -> list[tuple[Tensor, Tensor]]:
        """The ids `[B, n]` and columns `[B, n]` of every forward of a cached batch."""
        feed = self.batch.feed
        assert (feed == feed[:1]).all() and (feed[0].diff() >= 0).all()
        sizes = feed[0].bincount().tolist()
        return list(zip(self.batch.noisy.split(sizes, 1), self.batch.column.split(sizes, 1), strict=True))


@each_task
def test_training_draws_from_the_training_split_only(task: Task) -> None:
    for seed, cached in itertools.product(SEEDS, (False, True)):
        drawn = Drawn(task, seed, cached)
        assert drawn.splits == {"train"}
        assert {problem.split for problem in drawn.problems} == {"train"}


@each_task
@pytest.mark.parametrize("cached", [False, True], ids=["full", "cached"])
def test_batches_repeat_for_a_seed_and_differ_between_seeds(task: Task, cached: bool) -> None:
    tokenizer = build_tokenizer(task.words)
    batches = [train.make_batch(task, tokenizer, seed, TOKENS, cached) for seed in (*SEEDS, *SEEDS)]
    for one, again in zip(batches[: len(SEEDS)], batches[len(SEEDS) :], strict=True):
        assert all(map(torch.equal, one, again))
    assert len({tuple(batch.noisy.flatten().tolist()) for batch in batches}) == len(SEEDS)


@each_task
def test_a_batch_masks_what_it_says(task: Task) -> None:
    kinds = set()
    for seed in SEEDS:
        drawn = Drawn(task, seed)
        noisy, target, weight, column, feed = drawn.batch
        trained, masked = target != -100, noisy == drawn.mask
        assert noisy.shape == target.shape == weight.shape == column.shape == feed.shape
        assert (column == torch.arange(noisy.shape[1])).all() and not feed.any()
        assert trained.any(1).all() and (masked | ~trained).all()
        assert (weight[trained] > 0).all()
        torch.testing.assert_close((weight * trained).sum(1), torch.full((len(noisy),), 1 / len(noisy)))

        holes = noisy.shape[1] < drawn.prompt + task.block_length
        prompt = 0 if holes else drawn.prompt
        clean = drawn.clean(noisy.shape[1], holes)
        assert torch.where(masked, clean, noisy).equal(clean)
        assert target.equal(clean.where(trained, -100))
        assert not masked[:, :prompt].any()

        late = after(task.recipe.late, drawn.tokenizer, clean)
        block = (torch.arange(noisy.shape[1]) - prompt) // task.block_length
        for row in range(len(noisy)):
            skipped = masked[row] & ~trained[row]
            if holes:
                kinds.add("holes")
                assert not skipped.any()
            elif skipped.any():
                kinds.add("a block")
                [of] = set(block[trained[row]].tolist())
                assert skipped.equal(block > of)
            elif late[row][trained[row]].all():
                kinds.add("late")
            elif len(set(block[trained[row]].tolist())) > 1:
                kinds.add("all")
    assert kinds >= {"a block", "all"}
    assert ("holes" in kinds) == task.recipe.holes
    assert ("late" in kinds) or not task.recipe.late


def after(words: tuple[str, ...], tokenizer: Any, ids: Tensor) -> Tensor:
    """Where ids follow one of `words`, one by one."""
    found = torch.zeros(ids.shape, dtype=torch.bool)
    for row, column in itertools.product(range(ids.shape[0]), range(1, ids.shape[1])):
        found[row, column] = tokenizer.convert_ids_to_tokens(int(ids[row, column - 1])) in words
    return found


@each_task
def test_a_response_fills_its_block_or_the_whole_length(task: Task) -> None:
    lengths = set()
    for seed in SEEDS:
        drawn = Drawn(task, seed, cached=True)
        length = int(drawn.batch.column.max()) + 1 - drawn.prompt
        assert length % task.block_length == 0 and length <= task.max_new_tokens
        longest = max(len(drawn.tokenizer(problem.response)["input_ids"]) for problem in drawn.problems)
        assert longest < length
        lengths.add(length)
    assert lengths == {task.max_new_tokens} if task.sizes is None else len(lengths) > 1


@each_task
def test_a_cached_batch_holds_every_feed_of_a_decode(task: Task) -> None:
    """All at a block's start, then the block as it is now; or of every block before, its start and the one before."""
    seen_recent, blocks = False, set()
    for seed in SEEDS:
        drawn = Drawn(task, seed, cached=True)
        feeds, size = drawn.feeds(), task.block_length
        length = feeds[0][0].shape[1]
        clean = drawn.clean(length)
        assert (feeds[0][1] == torch.arange(length)).all()

        now, here = feeds[-1]
        target, weight = drawn.batch.target[:, -size:], drawn.batch.weight[:, -size:]
        trained, first = target != -100, here[:, 0]
        assert now.shape[1] == size and ((first - drawn.prompt) % size == 0).all()
        assert (here == first[:, None] + torch.arange(size)).all()
        assert (drawn.batch.target[:, :-size] == -100).all() and not drawn.batch.weight[:, :-size].any()
        assert trained.any(1).all() and trained.equal(now == drawn.mask)
        assert target.equal(clean.gather(1, here).where(trained, -100))
        assert now.equal(clean.gather(1, here).where(~trained, drawn.mask))
        torch.testing.assert_close((weight * trained).sum(1), torch.full((len(now),), 1 / len(now)))

        blocks |= set(((first - drawn.prompt) // size).tolist())
        recent = len(feeds) > 2
        starts = torch.full_like(first, drawn.prompt) if recent else first
        assert feeds[0][0].equal(clean.where(torch.arange(length) < starts[:, None], drawn.mask))
        for of, (ids, columns) in enumerate(feeds[1:-1], start=1):
            start = drawn.prompt + of * size
            assert (columns == torch.arange(start - size, start + size)).all()
            assert (ids[:, size:] == drawn.mask).all()
            assert ids[:, :size].equal(clean[:, start - size : start])
        if recent:
            assert (first == drawn.prompt + (len(feeds) - 2) * size).all()
        seen_recent |= recent
    assert seen_recent == task.recipe.recent
    assert blocks == set(range(task.max_new_tokens // task.block_length))


def test_a_column_is_seen_as_it_was_fed_last() -> None:
    """Columns 0 to 2, then 1 and 2, then 2."""
    column, feed = torch.tensor([[0, 1, 2, 1, 2, 2]]), torch.tensor([[0, 0, 0, 1, 1, 2]])
    once, twice, last = [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 0, 1]
    expected = torch.tensor([once, once, once, twice, twice, last], dtype=torch.bool)
    assert train.seen(column, feed).equal(expected[None, None])


def test_rows_may_feed_other_columns() -> None:
    column, feed = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 2]]), torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1]])
    sees = train.seen(column, feed)[:, 0, -1].tolist()
    assert sees == [[False, True, True, True], [True, True, False, True]]


@each_task
def test_cached_training_sees_what_a_decode_sees(task: Task) -> None:
    """Hidden states of every feed equal those of forwards, one after the other, over the keys and values so far."""
    model, counts = train.build_model(task, 0), set()
    # Weights so large that what a position sees decides its hidden state.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ".blocks." in name:
                weight.mul_(5)
    for seed in SEEDS:
        drawn = Drawn(task, seed, cached=True)
        feeds = [(ids[:2], columns[:2]) for ids, columns in drawn.feeds()]
        if len(feeds) in counts:
            continue
        counts.add(len(feeds))
        noisy, column, feed = (tensor[:2] for tensor in (drawn.batch.noisy, drawn.batch.column, drawn.batch.feed))
        with torch.no_grad():
            trained = model.model(noisy, train.seen(column, feed), column)
            free = model.model(noisy, feed[:, None] <= feed[:, :, None], column)
            for row in range(len(noisy)):
                cache, parts = BlockCache(), []
                for ids, columns in feeds:
                    at = int(columns[row, 0])
                    parts.append(model.model(ids[row : row + 1], cache=cache, start=at))
                decoded = torch.cat(parts, dim=1)[0]
                torch.testing.assert_close(trained[row], decoded, rtol=1e-4, atol=1e-4)
                size = task.block_length
                assert (free[row, -size:] - decoded[-size:]).abs().max() > 0.01
    assert counts >= ({2, 3} if task.recipe.recent else {2})


@each_task
def test_the_loss_of_a_cached_batch_is_that_of_the_decodes_forward(task: Task) -> None:
    model = train.build_model(task, 1)
    drawn = Drawn(task, 2, cached=True)
    batch, row, parts = drawn.batch, 0, []
    cache = BlockCache()
    with torch.no_grad():
        for ids, columns in drawn.feeds():
            parts.append(model.model(ids[row : row + 1], cache=cache, start=int(columns[row, 0])))
        logits, target = model.project(torch.cat(parts, dim=1)[0]), batch.target[row]
        trained = target != -100
        each = torch.nn.functional.cross_entropy(logits[trained], target[trained], reduction="none")
        expected = (each * batch.weight[row][trained]).sum()
        got = train.diffusion_loss(model, train.Batch(*(tensor[row : row + 1] for tensor in batch)))
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0)


def test_results_of_sums_are_the_running_values_and_the_answer() -> None:
    tokenizer = build_tokenizer(sums.WORDS)
    for problem in tiny.generate("train", 20, seed=4):
        ids = tokenizer(problem.response, return_tensors="pt")["input_ids"]
        values = list(itertools.accumulate(problem.changes, initial=problem.start))[1:]
        stated = tokenizer.decode(ids[train.after(sums.TASK.recipe.late, tokenizer, ids)]).split()
        assert [int(value) for value in stated] == [*values, problem.answer]


def test_what_stories_leave_for_last_are_their_numbers() -> None:
    task = tiny.TASKS["stories"]
    tokenizer = build_tokenizer(task.words)
    for problem in task.generate("train", 100, seed=4):
        ids = tokenizer(problem.response, return_tensors="pt")["input_ids"]
        stated = tokenizer.decode(ids[train.after(task.recipe.late, tokenizer, ids)]).split()
        assert stated == [word for word in problem.response.split() if word.isdigit()]


def test_plain_attention_equals_the_fused_one() -> None:
    model = train.build_model(tiny.TASKS["sums"], 0)
    ids = torch.randint(4, 80, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        fused = model(ids).logits
        with train.PlainAttention():
            plain = model(ids).logits
    torch.testing.assert_close(plain, fused)


@each_model
def test_every_matrix_of_a_block_is_muons(task: Task) -> None:
    model = train.build_model(task, 0)
    muon, adamw = ([p for group in o.param_groups for p in group["params"]] for o in train.build_optimizers(model))
    assert len(muon) == 6 * 7 and {p.ndim for p in muon} == {2}
    assert len(muon) + len(adamw) == len(list(model.parameters()))
    assert {tuple(p.shape) for p in adamw if p.ndim == 2} == {(model.config.vocab_size, 128)}


STEPS = ("--steps", "2", "--cached-steps", "3")


def run_training(folder: Path, *more: str) -> dict[str, Any]:
    settings = {"out": folder / "out", "state": folder / "state.pt", "device": "cpu", "tokens": 256}
    settings |= {"save-every": 100, "eval-problems": 0}
    train.main([*(f"--{name}={value}" for name, value in settings.items()), *more])
    return torch.load(folder / "state.pt", weights_only=True)


@each_model
def test_training_resumes_to_the_same_weights(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    monkeypatch.setattr(train, "evaluate", lambda *_: 0.0)
    steps = ("--task", task.name, *STEPS)
    expected = run_training(whole, *steps)

    name = "make_block_batch" if task.family == "sdar" else "make_batch"
    make_batch, batches = getattr(train, name), []

    def interrupted(*args: Any) -> train.Batch:
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(args)
        return make_batch(*args)

    monkeypatch.setattr(train, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_training(parts, *steps, "--save-every", "2")
    monkeypatch.setattr(train, name, make_batch)
    assert torch.load(parts / "state.pt", weights_only=True)["step"] == 2
    resumed = run_training(parts, *steps)

    assert resumed["step"] == expected["step"] == 5
    for name, weight in expected["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    saved = AutoTokenizer.from_pretrained(whole / "out")
    assert saved.mask_token == "<mask>" and saved.get_vocab() == build_tokenizer(task.words).get_vocab()


@each_model
def test_a_trained_model_has_the_settings_of_the_one_in_the_package(task: Task, tmp_path: Path) -> None:
    run_training(tmp_path, "--task", task.name, "--steps", "0", "--cached-steps", "0")
    trained, shipped = (
        DiffusionGenerationConfig.from_pretrained(folder) for folder in (tmp_path / "out", task.checkpoint)
    )
    assert trained == shipped


def test_training_stops_at_its_time_budget_and_reports_at_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_training(tmp_path, *STEPS, "--minutes", "0")["step"] == 0
    run_training(tmp_path, "--steps", "1", "--cached-steps", "1", "--eval-problems", "2")
    assert capsys.readouterr().out.count("held-out problems") == 3


def test_the_steps_are_those_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the cached steps two in three train as caches decode, and a batch is of the task that was asked for."""
    recipe = dataclasses.replace(tiny.TASKS["stories"].recipe, steps=2, cached_steps=4, tokens=128)
    task = dataclasses.replace(tiny.TASKS["stories"], recipe=recipe)
    monkeypatch.setitem(tiny.MODELS, "stories", task)
    make_batch, asked = train.make_batch, []

    def recorded(*args: Any) -> train.Batch:
        asked.append((args[0].name, args[3], args[4]))
        return make_batch(*args)

    monkeypatch.setattr(train, "make_batch", recorded)
    folders = ("--out", str(tmp_path / "out"), "--state", str(tmp_path / "state.pt"))
    train.main(["--task", "stories", *folders, "--device", "cpu", "--eval-problems", "0"])
    assert asked == [("stories", 128, cached) for cached in (False, False, True, False, True, True)]
