"""The block loop of models whose blocks see no later one (block diffusion, arXiv 2503.09573).

Blocks are counted from a sequence's first token, so the first block to decode may begin with tokens of the prompt.
These count as given (`Layout`).

The keys and values of a finished block are exact once it was fed as it is, and nothing before it ever changes. That
forward is the next block's first, which feeds both: one forward fewer for every block than where it stands alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from fdpp.decoding.layout import Layout
from fdpp.decoding.loop import BlockLoop
from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.runners import EagerRunner, StaticRunner
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.state import Window
from fdpp.decoding.static import LENGTH_BUCKET, StaticSteps
from fdpp.decoding.stops import asked
from fdpp.rules import Rule

PIECE = 1024
"""Columns of a prompt that a forward feeds at most, beside those of a block. Products of so many rows are bound by
arithmetic on every GPU that we have figures of, so that more at once gain nothing, and masks stay small. Derived, not
measured."""


class BlockCausalLoop(BlockLoop):
    """`BlockLoop` of a block-causal model.

    Blocks are what is decided together: those of the grid or, with `sub_block_length`, parts of them. In an anchored
    model the first position of a block of the grid is decided alone, before the block is fed, by the last column of
    the one before.

    Args:
        attention_mask: of `input_ids` or, with `given`, of both side by side.
        given: as in `BlockLoop`; rows may have their first mask in different columns.

    Attributes:
        asked: the settings; `config` has the columns of whole blocks as its `max_new_tokens`.
        stored: `[B]` int64, the column up to which the cache holds each sequence's final keys and values.
        end: `[B]` int64, the column behind each response.
    """

    grid: int

    def __init__(
        self,
        model: DiffusionModel,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        config: DiffusionGenerationConfig,
        processor: Iterable[Callable[..., Tensor]] | None = None,
        static: StaticSteps | None = None,
        given: Tensor | None = None,
        numbers: Tensor | None = None,
        embeds: Tensor | None = None,
    ) -> None:
        self.grid = config.per_block
        self.bucket_length = math.lcm(LENGTH_BUCKET, self.grid)
        self.anchored, self.asked = model.anchored, config
        if embeds is not None and config.mask_token_id is not None:
            # Prompts without ids are masks, and are not to be decoded.
            input_ids = input_ids.masked_fill(input_ids == config.mask_token_id, config.pad_token_id or 0)
        laid = self.laid = Layout.of_prompts(input_ids, attention_mask, given, config)
        prompts, mask = laid.prompts()
        canvas = laid.tokens[:, laid.prompt :]
        config = replace(config, max_new_tokens=canvas.shape[1])
        super().__init__(model, prompts, mask, config, processor, static, canvas, numbers)
        if embeds is not None:
            self.whole = self.whole._replace(embeds=laid.embedded(embeds, self.extra), embedded=self.first)
        self.blocks = self.spans(self.config.max_new_tokens)
        self.stored = torch.full_like(self.live, self.everything)
        self.end = laid.at[:, -1] + self.extra + 1

    @property
    def first(self) -> Tensor:
        """`[B]` int64, the column behind each sequence's last given token."""
        return self.laid.first + self.extra

    def behind_given(self, given: Tensor) -> Tensor:
        return self.first

    def spans(self, canvas: int) -> list[tuple[int, int]]:
        """Start and end of what is decided together, in a response of `canvas` columns."""
        part = self.config.sub_block_length or self.grid
        found = []
        for block in range(0, canvas, self.grid):
            for start in range(block, block + self.grid, part):
                stop = min(start + part, block + self.grid)
                if start == block and self.anchored:
                    found.append((start, start + 1))
                    start += 1
                if start < stop:
                    found.append((start, stop))
        return found

    def is_anchor(self, columns: slice) -> bool:
        return self.anchored and columns.start % self.grid == 0

    def rules(self, block: int) -> list[Rule]:
        """Every block has its whole share of the steps, whatever of it is given, so that rows do not compete."""
        part, asked = self.config.sub_block_length or self.config.per_block, self.asked
        return asked.rule.successive(0, part, max(asked.max_new_tokens, part), asked.steps)

    def parts(self, block: int) -> Iterator[tuple[int, Tensor]]:
        """The sequences `[c]` that have masks in `block`, and the column up to which the cache is theirs.

        What stands behind a response is decoded where the response's last tokens are decided with it, not alone.
        """
        columns = self.block_columns(block)
        masked = (self.whole.sequences[self.live, columns] == self.mask_id).any(1)
        rows = self.live[masked & (columns.start < self.end[self.live])]
        stored = self.stored[rows]
        self.stored[rows] = self.block_of(columns).start
        for column in stored.unique().tolist():
            yield column, rows[stored == column]

    def block_of(self, columns: slice) -> slice:
        """The block of the grid that `columns` are in."""
        start = columns.start // self.grid * self.grid
        return slice(start, start + self.grid)

    @property
    def everything(self) -> int:
        """The first column that holds a token, of any row."""
        return self.extra

    @property
    def piece(self) -> int:
        """Columns of a piece of a prompt, whole blocks."""
        return max(PIECE // self.grid, 1) * self.grid

    @property
    def feeds_all(self) -> bool:
        """Whether a block's first forward feeds everything: without a cache, and for a rule that looks at all of it."""
        return self.config.cache == "none" or self.config.rule.needs.attention or self.config.rule.needs.fed

    def pieces(self, block: int, before: int) -> list[slice]:
        """What is fed ahead of the block's first forward, given that all before column `before` is stored."""
        target = self.block_of(self.block_columns(block)).start
        count = 0 if self.feeds_all else max(math.ceil((target - before) / self.piece) - 1, 0)
        return [slice(start, start + self.piece) for start in range(before, before + count * self.piece, self.piece)]

    def prefill(self, runner: EagerRunner | StaticRunner, block: int, before: int) -> int:
        for columns in self.pieces(block, before):
            runner.feed(self.window(columns, columns, (0, False)))
            before = columns.stop
        return before

    def usual(self, block: int) -> list[int]:
        around, before = self.block_of(self.block_columns(block)), self.block_of(self.block_columns(max(block - 1, 0)))
        found = [] if block == 0 else [before.start]
        if around.start == self.prompt_length:  # where a prompt ends in this block, it is fed with it
            found.append(max([self.everything, *(columns.stop for columns in self.pieces(block, self.everything))]))
        return found

    def windows(self, block: int, before: int) -> tuple[Window, Window]:
        """The window of a block's first forward, and that of the others; before column `before` all is stored.

        The first one feeds what is not stored, and the block of the grid.
        """
        columns, everything = self.block_columns(block), self.everything
        around, reading = self.block_of(columns), (self.shift, self.bare and block == 0)
        needs = self.config.rule.needs
        sees_block = needs.attention or needs.fed or self.config.cfg_scale > 0.0 or reading[1]
        if self.is_anchor(columns) and not sees_block:
            # The column before it sees nothing of its block.
            others, stop = slice(max(columns.start - self.grid, everything), columns.start), columns.start
        else:
            fed, stop = columns if self.config.cache == "dual" else around, around.stop
            others = slice(max(min(fed.start, columns.start - self.shift), everything), fed.stop)
        first = self.window(slice(everything if self.feeds_all else min(before, others.start), stop), columns, reading)
        return first, first if self.config.cache == "none" else self.window(others, columns, reading)

    def window(self, fed: slice, columns: slice, reading: tuple[int, bool]) -> Window:
        full = fed.start == self.everything
        padding = self.padding if full else 0 if self.whole.padding is None else None
        return Window.of(fed, columns, full, padding, *reading)

    @property
    def sequences(self) -> Tensor:
        found = self.whole.sequences.gather(1, self.laid.at + self.extra)
        return torch.where(self.laid.real, found, self.laid.text)

    def of_response(self, held: Tensor) -> Tensor:
        return held.gather(1, self.laid.at[:, self.laid.response :] + self.extra)

    def reached(self, column: int) -> Tensor:
        """How many tokens of each response stand before `column`, `[B]` int64."""
        length = self.laid.text.shape[1] - self.laid.response
        return (column - (self.end - length)).clamp(0, length)

    def block_tokens(self, block: int, draft: bool = False) -> Tensor:
        """What is new of the responses, which begin in different columns of their first blocks.

        A draft goes as far as any of them has come. What all have come to is finished, and everything if no sequence
        goes on. So what is finished of all blocks makes the responses.
        """
        columns = self.block_columns(block)
        reached = self.reached(columns.stop)
        stop = int(reached.amax() if draft or self.finished() else reached.amin())
        start = int(self.reached(columns.start).amin()) if block else 0
        return self.sequences[:, self.laid.response + start : self.laid.response + stop]

    def ended_by(self, criteria: StoppingCriteriaList, block: int) -> Tensor:
        """They see the sequences as they are returned, each with as much of its response as it has."""
        columns, done = self.block_columns(block), torch.zeros_like(self.end, dtype=torch.bool)
        reached = self.reached(columns.stop)
        lengths = torch.stack((reached, reached - self.reached(columns.start)), dim=1)
        for length, new in lengths.unique(dim=0).tolist():
            if new:
                said = asked(criteria, self.sequences[:, : self.laid.response + length], new)
                done |= said & (lengths == lengths.new_tensor((length, new))).all(1)
        return done


def loop_of(model: DiffusionModel) -> type[BlockLoop]:
    """The loop that decodes `model`."""
    return BlockCausalLoop if model.block_causal else BlockLoop
