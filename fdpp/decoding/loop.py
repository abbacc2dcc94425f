"""The block loop: forward, step, until the block holds no mask."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from fdpp.cache import BlockCache
from fdpp.decoding.config import DiffusionGenerationConfig, DiffusionGenerationOutput
from fdpp.decoding.drafts import Chain, DraftDepth
from fdpp.decoding.evidence import Evidence
from fdpp.decoding.forwards import Forwards
from fdpp.ops import pack, streams
from fdpp.reference import Selection

STEP_STRIDE = 0x5851F42D4C957F2D
"""Odd, so a sequence's steps draw from different noise streams (Knuth's multiplier for 64-bit generators)."""


class BlockLoop:
    """The state of one decode.

    All sequences end at the same column, so a block is the same columns in every row. Rows leave the batch as soon as
    their block is complete: the `rows` of a block are those that still hold masks in it, `live` those with blocks to
    come. A forward evaluates one state of every row or, with drafts, several (`fdpp.decoding.drafts`).

    Attributes:
        sequences: `[B, L]` int64, prompts and responses, masks included.
        nfe, steps_taken, query_tokens: `[B]` int64, so far; `block_start`: `steps_taken` at the block's start.
        commit_step: `[B, L]` int64.
        live: indices of unfinished sequences.
    """

    def __init__(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, config: DiffusionGenerationConfig
    ) -> None:
        if config.mask_token_id is None or config.pad_token_id is None:
            raise ValueError("BlockLoop: expected a config with its mask and padding ids filled in")
        self.mask_id, self.pad_id = config.mask_token_id, config.pad_token_id
        B, self.prompt_length = input_ids.shape
        self.device = input_ids.device
        response = input_ids.new_full((B, config.max_new_tokens), self.mask_id)
        self.config = config
        self.sequences = torch.cat((input_ids, response), dim=1)
        self.length = self.sequences.shape[1]
        if attention_mask is not None:
            attention_mask = torch.cat((attention_mask, torch.ones_like(response, dtype=torch.bool)), dim=1)
        self.forwards = Forwards(model, config.rule, self.sequences, attention_mask, self.mask_id, config.branches)
        self.nfe, self.steps_taken, self.query_tokens = torch.zeros(3, B, dtype=torch.int64, device=self.device)
        self.block_start = self.steps_taken
        self.commit_step = torch.full_like(self.sequences, -1)
        self.live = torch.arange(B, device=self.device)
        self.streams = streams(config.seed or 0, B, self.device) if config.temperature > 0.0 else None
        self.eos = torch.tensor(config.eos_token_id, dtype=torch.int64, device=self.device)
        self.depth = DraftDepth(config.drafts, self.device)

    def block_columns(self, block: int) -> slice:
        start, stop = self.config.blocks()[block]
        return slice(self.prompt_length + start, self.prompt_length + stop)

    def block_tokens(self, block: int) -> Tensor:
        """The block's tokens `[B, T]` of all sequences."""
        return self.sequences[:, self.block_columns(block)]

    def finished(self) -> bool:
        return self.live.numel() == 0

    def steps(self, block: int) -> Iterator[Tensor]:
        """Decode one block; yields its tokens `[B, T]`, masks included, after every forward.

        The first forward is a full one and its logits commit like any other's; the following ones feed what the cache
        leaves over: everything, everything from the block on, or the block alone.
        """
        columns, everything = self.block_columns(block), slice(0, self.length)
        later = {"none": everything, "prefix": slice(columns.start, self.length), "dual": columns}[self.config.cache]
        cache = None
        if self.config.cache != "none":
            widest = 0 if self.config.drafts == 1 or self.config.branches == "batch" else self.depth.most - 1
            cache = BlockCache(self.config.branches, spare=widest * (later.stop - later.start))
        schedule = torch.cat([pack(rule, self.device) for rule in self.config.block_rules()[block]])
        self.block_start = self.steps_taken.clone()
        rows, fed, evidence = self.live, everything, None
        states = self.sequences[rows, columns][:, None]
        while rows.numel():
            index = self.steps_taken[rows, None] + torch.arange(states.shape[1], device=self.device)
            evidence = self.forwards.evidence(rows, states, columns, fed, cache, evidence)
            chosen = self.select(rows, evidence, states, index, schedule, columns)
            chain = Chain(states, chosen, self.ends(states))
            self.sequences[rows, columns] = chain.tokens
            self.commit_step[rows, columns] = chain.commit_step(index, self.commit_step[rows, columns])
            self.nfe[rows] += 1
            self.steps_taken[rows] += chain.accepted
            self.query_tokens[rows] += states.shape[1] * (fed.stop - fed.start)
            self.depth.count(chain)

            ended = self.ends(chain.tokens)
            remaining = chain.remaining.masked_fill(ended, 0)
            # The forward's only synchronisation: all that the host must know, in one transfer.
            unusable, any_ended, closed, most_remaining, most_accepted = torch.stack(
                (chain.nonfinite.sum(), ended.sum(), (remaining == 0).sum(), remaining.max(), chain.accepted.max())
            ).tolist()
            if unusable:
                raise FloatingPointError(
                    f"the model's logits held NaN, +inf or only -inf at {unusable} masked positions of sequences "
                    f"{rows[chain.nonfinite > 0].tolist()} (block {block})"
                )
            if any_ended:
                self.end_after_eos(rows[ended], columns.start)
            tokens = chain.tokens
            if states.shape[1] > 1:
                evidence = evidence.each(chain.last_state)
            if closed:
                kept = remaining.nonzero().flatten()
                rows, tokens = rows[kept], tokens[kept]
                evidence = evidence.each(partial(torch.index_select, dim=0, index=kept))
                if cache is not None and kept.numel():
                    cache.keep(kept)
            fed, states = later, tokens[:, None]
            after = evidence
            for _ in range(min(self.depth.next(most_accepted), most_remaining) - 1):
                index = self.steps_taken[rows, None] + states.shape[1] - 1
                after = after.unchanged()
                guess = self.select(rows, after, states[:, -1:], index, schedule, columns)
                states = torch.cat((states, guess.tokens), dim=1)
            yield self.block_tokens(block)

    def select(
        self, rows: Tensor, evidence: Evidence, states: Tensor, index: Tensor, schedule: Tensor, columns: slice
    ) -> Selection:
        """One step on each of the `states` `[b, D, T]` by its `evidence`; fields of shape `[b, D, ...]`.

        `index` `[b, D]` is the number of each step in its sequence: it names the noise and the entry of the `schedule`.
        """
        entry = (index - self.block_start[rows, None]).clamp(max=schedule.shape[0] - 1)
        seeds = None if self.streams is None else (self.streams[rows, None] + index * STEP_STRIDE).flatten()
        return evidence.select(
            self.config.rule,
            states,
            schedule[entry.flatten()],
            mask_id=self.mask_id,
            first=columns.start,
            temperature=self.config.temperature,
            seeds=seeds,
        )

    def ends(self, tokens: Tensor) -> Tensor:
        """`[...]` bool: where the block's `tokens` `[..., T]` hold a committed EOS and no mask before it."""
        if not self.config.stop_at_eos:
            return torch.zeros(tokens.shape[:-1], dtype=torch.bool, device=tokens.device)
        open_before = tokens.eq(self.mask_id).cumsum(-1) > 0
        return (torch.isin(tokens, self.eos) & ~open_before).any(-1)

    def end_after_eos(self, rows: Tensor, start: int) -> None:
        """Pad `rows` after their first EOS at or after column `start` and take them out of the decode."""
        tail = self.sequences[rows, start:]
        after = torch.isin(tail, self.eos).cumsum(1).cumsum(1) > 1
        self.sequences[rows, start:] = tail.masked_fill(after, self.pad_id)
        self.live = self.live[~torch.isin(self.live, rows)]

    def stop(self, criteria: StoppingCriteriaList, block: int) -> None:
        """End the live sequences for which `criteria` holds after `block`; what follows the block becomes padding."""
        if self.finished():
            return
        stop = self.block_columns(block).stop
        done = criteria(self.sequences[self.live, :stop], None)
        self.sequences[self.live[done], stop:] = self.pad_id
        self.live = self.live[~done]

    def output(self) -> DiffusionGenerationOutput:
        response = self.sequences[:, self.prompt_length :]
        before_eos = torch.isin(response, self.eos).cumsum(1) == 0
        written = (before_eos & (self.commit_step[:, self.prompt_length :] >= 0)).sum(1)
        return DiffusionGenerationOutput(
            sequences=self.sequences,
            nfe=self.nfe,
            tokens_per_forward=written.double() / self.nfe.clamp(min=1),
            commit_step=self.commit_step[:, self.prompt_length :],
            query_tokens=self.query_tokens,
            acceptance=self.depth.acceptance(),
        )
