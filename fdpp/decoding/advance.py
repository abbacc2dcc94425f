"""One forward of a decode and the steps taken on it, as a function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fdpp.attention import BlockCache
from fdpp.decoding.choice import Choice
from fdpp.decoding.drafts import Chain
from fdpp.decoding.evidence import Evidence
from fdpp.decoding.filters import Filters
from fdpp.decoding.forwards import Forwards
from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.state import BlockState, Outcome, Window, ends, written
from fdpp.selection import Selection
from fdpp.step.terms import Terms

STEP_STRIDE = 0x5851F42D4C957F2D
"""Odd, so a sequence's steps draw from different noise streams (Knuth's multiplier for 64-bit generators)."""


def stop_ids(config: DiffusionGenerationConfig, device: torch.device) -> Tensor | None:
    """The ids that end a sequence, int64; None where nothing does."""
    return torch.tensor(config.eos_token_id, dtype=torch.int64, device=device) if config.stop_at_eos else None


class Advance:
    """Draft, forward, verify, commit. It holds nothing that changes: `(state, ...) -> (state, outcome)`.

    No operation waits for the device or has a shape that depends on data, so a CUDA graph can capture a call. The graph
    reads `eos`, as `stop_ids` makes it, and `filters` at their addresses.
    """

    def __init__(
        self,
        model: DiffusionModel,
        config: DiffusionGenerationConfig,
        eos: Tensor | None,
        processor: Iterable[Callable[..., Tensor]] | None = None,
        filters: Filters | None = None,
        grid: int | None = None,
    ) -> None:
        assert config.mask_token_id is not None
        self.config, self.rule, self.mask_id = config, config.rule, config.mask_token_id
        filters = filters or Filters(config, next(iter(model.parameters())).device)
        self.forwards = Forwards(model, config, filters, processor, grid)
        self.step = Choice(config, self.forwards.step)
        self.eos = eos

    def __call__(
        self, state: BlockState, window: Window, schedule: Tensor, cache: BlockCache | None, drafts: int
    ) -> tuple[BlockState, Outcome]:
        """Evaluate the current tokens and `drafts - 1` guesses of what follows, and take all steps that hold.

        `schedule` `[S, 3]` are the packed rules of the block's successive steps; the last one repeats.
        """
        states = self.draft(state, window, schedule, drafts)
        index = state.steps[:, None]
        if drafts > 1:
            index = index + torch.arange(drafts, device=states.device)
        evidence = self.forwards(state, states, window, cache)
        chosen = self.choose(state, evidence, states, index, schedule, window)
        allowed = state.ends_allowed(window.block)
        chain = Chain(states, chosen, self.mask_id, self.eos, self.rule.revokes, allowed)

        block = window.block
        commit_step = chain.at_commit(index[:, :, None], state.commit_step[:, block], -1)
        confidence = chain.at_commit(chosen.confidence, state.confidence[:, block], 1.0)
        offered, accepted = state.offered, state.accepted
        if offered is not None and accepted is not None and drafts > 1:
            offered, accepted = offered.clone(), accepted.clone()
            offered[:, : drafts - 1] += chain.offered
            accepted[:, : drafts - 1] += chain.right[:, 1:]
        carried = self.config.drafts != 1 or evidence.memory is not None
        after = state._replace(
            sequences=written(state.sequences, block, chain.tokens),
            commit_step=written(state.commit_step, block, commit_step),
            confidence=written(state.confidence, block, confidence),
            nfe=state.nfe + 1,
            steps=state.steps + chain.accepted,
            query_tokens=state.query_tokens + self.forwards.queries(state, window, drafts),
            offered=offered,
            accepted=accepted,
            evidence=evidence.each(chain.last_state) if carried else None,
        )

        ended = ends(chain.tokens, self.mask_id, self.eos, allowed)
        if self.rule.revokes:
            # Until then the EOS may be taken back.
            ended = ended & (chain.remaining == 0)
        remaining = chain.remaining.masked_fill(ended, 0)
        # Of one dtype: on a CPU a stack of several takes four times as long.
        counts = torch.stack([count.long() for count in (chain.nonfinite, ended, remaining, chain.accepted)])
        return after, Outcome(state.row, states, chosen, chain.accepted, remaining, ended, chain.nonfinite, counts)

    def feed(self, state: BlockState, window: Window, cache: BlockCache) -> BlockState:
        """Store the keys and values of the window, which holds no block."""
        self.forwards.feed(state, window, cache)
        queries = window.width() * self.config.passes
        return state._replace(nfe=state.nfe + 1, query_tokens=state.query_tokens + queries)

    def draft(self, state: BlockState, window: Window, schedule: Tensor, drafts: int) -> Tensor:
        """The current block and guesses of the following states, `[b, drafts, T]`."""
        states = state.sequences[:, window.block][:, None]
        after = state.evidence
        for depth in range(drafts - 1):
            assert after is not None
            after = after.unchanged(self.rule)
            guess = self.choose(state, after, states[:, -1:], state.steps[:, None] + depth, schedule, window)
            states = torch.cat((states, guess.tokens), dim=1)
        return states

    def choose(
        self, state: BlockState, evidence: Evidence, states: Tensor, index: Tensor, schedule: Tensor, window: Window
    ) -> Selection:
        """One step on each of the `states` `[b, D, T]` by its `evidence`; fields of shape `[b, D, ...]`.

        `index` `[b, D]` is the number of each step in its sequence: it selects the noise and the `schedule`'s entry.
        """
        if schedule.shape[0] == 1:
            params = schedule
        else:
            params = schedule[(index - state.first_step[:, None]).clamp(max=schedule.shape[0] - 1).flatten()]
        seeds = streams = None
        if state.streams is not None:
            seeds = (state.streams[:, None] + index * STEP_STRIDE).flatten()
            # Of its first step: no other block of the sequence has it, whatever the padding.
            first = state.streams + state.first_step * STEP_STRIDE
            streams = first[:, None].expand_as(index).flatten()
        terms = Terms(params, self.rule.tested(), self.mask_id, self.config.temperature, seeds)
        given = self.given(state, window.block) if self.step.decides else None
        return self.step(evidence, states, terms, window.block, streams, given)

    def given(self, state: BlockState, block: slice | Tensor) -> Tensor:
        """`[b, T]` bool: where the block holds a token that no step decided. It is the same in all drafts."""
        return (state.commit_step[:, block] < 0) & (state.sequences[:, block] != self.mask_id)
