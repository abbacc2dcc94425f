"""The training of block-diffusion models: what a batch holds, what each copy sees, and that a decode sees the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from fdpp import tiny
from fdpp.tiny import train
from fdpp.tiny.batch import after, encode, seen
from fdpp.tiny.block_diffusion import make_block_batch
from fdpp.tiny.task import Task
from fdpp.tiny.tokenizer import build_tokenizer

BLOCKS = tiny.MODELS["stories-block"]
TASKS = {
    "stories-block": BLOCKS,
    # Of another prompt length by batch, blocks of prompt alone before the first, and nothing that is left for last.
    "sums": dataclasses.replace(
        tiny.TASKS["sums"], block_length=11, recipe=dataclasses.replace(tiny.TASKS["sums"].recipe, late=())
    ),
    # Its prompt of 13 tokens ends where a block does.
    "aligned": dataclasses.replace(BLOCKS, block_length=13),
}
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
SEEDS = range(6)
TOKENS = 2048


class Drawn:
    """A batch of `[B, n]` in its two copies, beside the rows `[B, length]` that it was made of."""

    def __init__(self, task: Task, seed: int) -> None:
        asked: list[tuple[str, list[Any]]] = []

        def generate(split: str, *args: Any) -> Any:
            asked.append((split, list(task.generate(split, *args))))
            return asked[-1][1]

        self.tokenizer, self.size = build_tokenizer(task.words), task.block_length
        self.batch = make_block_batch(dataclasses.replace(task, generate=generate), self.tokenizer, seed, TOKENS)
        self.splits, problems = {split for split, _ in asked}, asked[-1][1]
        self.prompt = len(self.tokenizer(problems[0].prompt)["input_ids"])
        self.blocks = -(-(self.prompt + task.max_new_tokens) // self.size)
        self.first = self.prompt // self.size
        texts = [f"{problem.prompt} {problem.response}" for problem in problems]
        self.clean = encode(self.tokenizer, texts, self.blocks * self.size)
        self.noised = (self.blocks - self.first) * self.size
        """Ids of the noised copies, which come first."""


@each_task
def test_a_batch_repeats_for_a_seed_and_is_of_the_training_split(task: Task) -> None:
    made = []
    for seed in SEEDS:
        drawn = Drawn(task, seed)
        assert drawn.splits == {"train"}
        assert all(map(torch.equal, drawn.batch, Drawn(task, seed).batch))
        made.append(tuple(drawn.batch.noisy.flatten().tolist()))
        fed = drawn.batch.noisy.numel()
        assert TOKENS - drawn.batch.noisy.shape[1] < fed <= TOKENS
    assert len(set(made)) == len(SEEDS)


@each_task
def test_every_block_stands_noised_and_clean(task: Task) -> None:
    for seed in SEEDS:
        drawn = Drawn(task, seed)
        noisy, target, weight, column, feed = drawn.batch
        size, first, blocks = drawn.size, drawn.first, drawn.blocks
        assert noisy.shape == target.shape == weight.shape == column.shape == feed.shape
        columns = [*range(first * size, blocks * size), *range((blocks - 1) * size)]
        assert (column == torch.tensor(columns)).all()
        copies = [2 * (at // size) + (place >= drawn.noised) for place, at in enumerate(columns)]
        assert (feed == torch.tensor(copies)).all()
        assert noisy[:, drawn.noised :].equal(drawn.clean[:, :-size])
        assert (target[:, drawn.noised :] == -100).all() and not weight[:, drawn.noised :].any()


@each_task
def test_masks_are_those_of_the_response_block_by_block(task: Task) -> None:
    kinds, counts = set(), set()
    for seed in SEEDS:
        drawn = Drawn(task, seed)
        mask, start = drawn.tokenizer.mask_token_id, drawn.first * drawn.size
        noisy, target, weight = (part[:, : drawn.noised] for part in drawn.batch[:3])
        own, masked = drawn.clean[:, start:], noisy == mask
        assert noisy.equal(own.where(~masked, mask)) and target.equal(own.where(masked, -100))
        assert not masked[:, : drawn.prompt - start].any(), "the prompt's tokens in the first block stay"

        may = torch.arange(start, start + drawn.noised).expand_as(noisy) >= drawn.prompt
        late = may & after(task.recipe.late, drawn.tokenizer, drawn.clean)[:, start:]
        for row in range(len(noisy)):
            only_late = bool((late[row] | ~masked[row]).all())
            of = late[row] if only_late else may[row]
            kinds.add(only_late)
            for block in range(drawn.blocks - drawn.first):
                part = slice(block * drawn.size, (block + 1) * drawn.size)
                L, count = int(of[part].sum()), int(masked[row, part].sum())
                assert (count > 0) == (L > 0) and count <= L
                counts.add(count / L if L else None)
                expected = L / max(count, 1) / int(of.sum()) / len(noisy)
                torch.testing.assert_close(weight[row, part], torch.full((drawn.size,), expected))
    assert kinds == ({False, True} if task.recipe.late else {False})
    assert 1.0 in counts and min(count for count in counts if count) < 0.2


def test_the_first_block_of_a_story_begins_with_tokens_of_the_prompt() -> None:
    drawn = Drawn(BLOCKS, 0)
    assert (drawn.prompt, drawn.first, drawn.blocks) == (13, 0, 4)
    given = drawn.batch.noisy[:, :13]
    assert given.equal(drawn.clean[:, :13]) and (drawn.batch.noisy[:, 13:16] == drawn.tokenizer.mask_token_id).any()


@each_task
def test_a_noised_block_sees_itself_and_the_clean_ones_before(task: Task) -> None:
    drawn = Drawn(task, 1)
    sees = seen(drawn.batch.column, drawn.batch.feed)
    assert sees.shape[1] == 1 and (sees == sees[:1]).all()
    for query, row in enumerate(sees[0, 0]):
        block, is_noised = int(drawn.batch.column[0, query]) // drawn.size, query < drawn.noised
        blocks, noised = drawn.batch.column[0] // drawn.size, torch.arange(len(row)) < drawn.noised
        expected = (blocks < block) & ~noised | (blocks == block) & (noised == is_noised)
        assert row.equal(expected)
        if is_noised:
            own = (drawn.batch.column[0] == drawn.batch.column[0, query]) & ~noised
            assert not row[own].any(), "its own clean token"


def loud(task: Task) -> Any:
    """An untrained model, with weights so large that what a position sees decides its hidden state."""
    model = train.build_model(task, 0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ".layers." in name:
                weight.mul_(5)
    return model


def alone(model: Any, ids: Tensor, size: int) -> Tensor:
    """Hidden states of the last block of `ids` `[B, n]`, all of whose blocks are seen from it."""
    block = torch.arange(ids.shape[1]) // size
    sees = (block[:, None] >= block).expand(len(ids), -1, -1)
    return model.model(ids, sees)[:, -size:]


def test_training_sees_what_a_decode_sees() -> None:
    """Hidden states of every noised block are those of a forward of its own over the clean ones before it."""
    model, drawn = loud(BLOCKS), Drawn(BLOCKS, 2)
    noisy, _, _, column, feed = (part[:2] for part in drawn.batch)
    with torch.no_grad():
        trained = model.model(noisy, seen(column, feed), column)
        free = model.model(noisy, feed[:, None] // 2 <= feed[:, :, None] // 2, column)
        for block in range(drawn.blocks):
            here = slice(block * drawn.size, (block + 1) * drawn.size)
            ids = torch.cat((drawn.clean[:2, : here.start], noisy[:, here]), dim=1)
            expected = alone(model, ids, drawn.size)
            torch.testing.assert_close(trained[:, here], expected, rtol=1e-4, atol=1e-4)
            assert (free[:, here] - expected).abs().max() > 0.01


def test_the_loss_is_that_of_every_block_by_itself() -> None:
    model, drawn = train.build_model(BLOCKS, 1), Drawn(BLOCKS, 3)
    batch, expected = train.Batch(*(part[:1] for part in drawn.batch)), 0.0
    with torch.no_grad():
        for block in range(drawn.blocks):
            here = slice(block * drawn.size, (block + 1) * drawn.size)
            ids = torch.cat((drawn.clean[:1, : here.start], batch.noisy[:, here]), dim=1)
            masked = batch.target[0, here] != -100
            logits = model.project(alone(model, ids, drawn.size)[0, masked])
            each = torch.nn.functional.cross_entropy(logits, batch.target[0, here][masked], reduction="none")
            expected += float((each * batch.weight[0, here][masked]).sum())
        got = float(train.diffusion_loss(model, batch))
    assert got == pytest.approx(expected, rel=0.02)
