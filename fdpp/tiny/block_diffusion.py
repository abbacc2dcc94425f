"""Batches that train a block-diffusion model: attention is full inside a block and causal between blocks.

As BD3-LM (arXiv 2503.09573, section 3) and SDAR (arXiv 2510.06303) train, a batch holds every row twice, as a noised
and as a clean copy. A block's noised copy sees itself and the clean copies of the blocks before it, as a decode does
with its cache; a block's clean copy sees itself and those before it, as the forward does that stores it. So one forward
trains all blocks of a row.

Blocks lie on a grid from the row's first column. The prompt ends anywhere in a block, whose noised copy then begins
with tokens of the prompt, which are never masked.

The noise is `fdpp.tiny.train`'s, drawn for each block alone: l of a block's L response tokens are masked, l uniform in
1..L, in place of a probability t ~ U(0, 1), and weighted L/l, in place of 1/t. A third of the rows masks what confident
decoding leaves for last (`Recipe.late`) and nothing else. Behind its end a response is EOS up to the end of the grid.
"""

from __future__ import annotations

from typing import Any

import torch

from fdpp.tiny.batch import CPU, Batch, after, encode, uniform, whole_number
from fdpp.tiny.task import Task


def make_block_batch(task: Task, tokenizer: Any, seed: int, tokens: int) -> Batch:
    """One batch of about `tokens` tokens, both copies counted: the noised copies, then the clean ones.

    All prompts of a batch have the same length. Blocks of nothing but prompt have no noised copy, and the last block,
    which no other sees, has no clean one. `Batch.feed` counts as a decode feeds: 2k for the noised and 2k + 1 for the
    clean copy of block k.
    """
    noise, block_length = torch.Generator().manual_seed(seed), task.block_length
    size = [] if task.sizes is None else [int(whole_number(task.sizes.start, task.sizes.stop, noise))]
    prompt = len(tokenizer(task.generate("train", 1, seed, *size)[0].prompt)["input_ids"])
    blocks, first = -(-(prompt + task.max_new_tokens) // block_length), prompt // block_length
    length, start = blocks * block_length, first * block_length
    B = max(1, tokens // (2 * length - start - block_length))
    problems = task.generate("train", B, seed, *size)
    clean = encode(tokenizer, [f"{problem.prompt} {problem.response}" for problem in problems], length)

    column = torch.arange(length, device=CPU).expand(B, -1)
    only_late = uniform((B, 1), noise) < (1 / 3 if task.recipe.late else 0)
    current = (column >= prompt) & (~only_late | after(task.recipe.late, tokenizer, clean))
    by_block = current[:, start:].unflatten(1, (-1, block_length))
    size_of = by_block.sum(2, keepdim=True)
    masked_count = (uniform((B, blocks - first, 1), noise) * size_of).floor() + 1
    order = uniform(by_block.shape, noise).masked_fill(~by_block, 2.0).argsort(2).argsort(2)
    chosen = (by_block & (order < masked_count)).flatten(1)

    noisy = clean[:, start:].masked_fill(chosen, tokenizer.mask_token_id)
    target = clean[:, start:].where(chosen, -100)
    # A mean over what a row may mask.
    weight = (
        (size_of / masked_count / (B * size_of.sum(1, keepdim=True).clamp(min=1)))
        .expand(-1, -1, block_length)
        .flatten(1)
    )
    stored = clean[:, :-block_length]
    return Batch(
        torch.cat([noisy, stored], dim=1),
        torch.cat([target, torch.full_like(stored, -100)], dim=1),
        torch.cat([weight, torch.zeros(stored.shape, dtype=weight.dtype, device=CPU)], dim=1),
        torch.cat([column[:, start:], column[:, :-block_length]], dim=1),
        torch.cat([column[:, start:] // block_length * 2, column[:, :-block_length] // block_length * 2 + 1], dim=1),
    )
