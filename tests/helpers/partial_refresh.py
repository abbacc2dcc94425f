"""Decodes with a partial refresh, written plainly: one row, no batch, no drafts, no static steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from plain import predicting
from torch import Tensor

import fdpp
from fdpp.attention import BlockCache
from fdpp.models.language_model import DiffusionLM
from fdpp.step import reference

First = Callable[[int, int, int, int, int], tuple[int, int]]
"""(number of the block, its start, its stop, start of the block decoded before, L): what its first forward feeds."""

FIRST: dict[str, First] = {
    "all": lambda number, start, stop, before, L: (0, L),
    "recent": lambda number, start, stop, before, L: (before, stop),
    "recent:2": lambda number, start, stop, before, L: (0, L) if number % 2 == 0 else (before, stop),
    "block": lambda number, start, stop, before, L: (start, stop),
    "window:3:5": lambda number, start, stop, before, L: (max(start - 3, 0), min(stop + 5, L)),
    "window:9:end": lambda number, start, stop, before, L: (min(max(start - 9, 0), before), L),
    "window:start:0": lambda number, start, stop, before, L: (0, stop),
}
"""For blocks of 4 to 9 positions: a window of 3 never reaches back over the block before, and one of 9 always does."""


@torch.no_grad()
def decode(
    model: DiffusionLM,
    text: Tensor,
    start: int,
    block_length: int,
    rule: fdpp.Rule,
    first: First,
    cache: str = "dual",
    stop_at_eos: bool = True,
    cfg_scale: float = 0.0,
) -> tuple[Tensor, Tensor, int, int]:
    """Fill the masks of `text` `[L]` from column `start` on, for prefix rules alone; with guidance, what precedes
    `start` is the prompt.

    Returns its tokens `[L]`, the step that committed each (-1: none did), forwards, and positions fed.
    """
    config: Any = model.config
    mask, eos, L = config.mask_token_id, config.eos_token_id, len(text)
    x, step_of, kept, unconditional = text.clone(), torch.full_like(text, -1), BlockCache(), BlockCache()
    given = (text[start:] != mask).nonzero().flatten()
    may_end = start + int(given.max()) + 1 if len(given) else start
    step = queries = before = 0

    def project(tokens: Tensor, fed: slice, read: Tensor, kept: BlockCache) -> Tensor:
        hidden = model.model(tokens[None, fed], cache=kept, start=fed.start)
        return model.project(hidden[:, read - fed.start])

    def end() -> int | None:
        """The column of an EOS behind which nothing counts."""
        ends = [t for t in range(may_end, L) if x[t] == eos]
        return ends[0] if stop_at_eos and ends and not (x[start : ends[0]] == mask).any() else None

    for number, column in enumerate(range(start, L, block_length)):
        block = slice(column, min(column + block_length, L))
        lead, of_block = min(model.shift, column), predicting(model.shift, block)
        fed = slice(*((0, L) if number == 0 else first(number, block.start, block.stop, before, L)))
        others = slice(block.start - lead, L if cache == "prefix" else block.stop)
        fed = slice(min(max(fed.start - lead, 0), others.start), max(fed.stop, others.stop))
        while (x[block] == mask).any() and end() is None:
            before = column
            logits = project(x, fed, of_block, kept)
            if cfg_scale:
                blank = torch.where(torch.arange(L) < start, mask, x)
                other = project(blank, fed, of_block, unconditional)
                logits = other + (cfg_scale + 1) * (logits - other)
            chosen = reference.select(logits.double(), x[None, block], rule, mask)
            step_of[block][chosen.committed[0]] = step
            x[block] = chosen.tokens[0]
            step, queries, fed = step + 1, queries + (1 + (cfg_scale > 0)) * (fed.stop - fed.start), others
    at = end()
    if at is not None:
        x[at + 1 :] = config.pad_token_id
    return x, step_of, step, queries
