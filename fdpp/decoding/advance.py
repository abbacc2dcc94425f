"""One forward of a decode and the steps taken on it, as a function of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fdpp.cache import BlockCache
from fdpp.decoding.config import DiffusionGenerationConfig
from fdpp.decoding.drafts import Chain
from fdpp.decoding.evidence import Evidence
from fdpp.decoding.forwards import Forwards
from fdpp.decoding.state import BlockState, Outcome, Window, ends
from fdpp.klass import Klass
from fdpp.reference import Selection

STEP_STRIDE = 0x5851F42D4C957F2D
"""Odd, so a sequence's steps draw from different noise streams (Knuth's multiplier for 64-bit generators)."""


def stop_ids(config: DiffusionGenerationConfig, device: torch.device) -> Tensor | None:
    """The ids that end a sequence, int64; None where nothing does."""
    return torch.tensor(config.eos_token_id, dtype=torch.int64, device=device) if config.stop_at_eos else None


class Advance:
    """Draft, forward, verify, commit. It holds nothing that changes: `(state, ...) -> (state, outcome)`.

    No operation waits for the device or depends in shape on data, so a call can be captured in a CUDA graph; `eos`, as
    `stop_ids` makes it, then stands at the address that the graph reads.
    """

    def __init__(
        self,
        model: Any,
        config: DiffusionGenerationConfig,
        eos: Tensor | None,
        processor: Callable[..., Tensor] | None = None,
    ) -> None:
        assert config.mask_token_id is not None
        self.config, self.mask_id = config, config.mask_token_id
        self.forwards = Forwards(model, config, processor)
        self.eos = eos
        self.carries_evidence = config.drafts != 1 or isinstance(config.rule, Klass)

    def __call__(
        self, state: BlockState, window: Window, schedule: Tensor, cache: BlockCache | None, drafts: int
    ) -> tuple[BlockState, Outcome]:
        """Evaluate the current tokens and `drafts - 1` guesses of what follows, and take all steps that hold.

        `schedule` `[S, 3]` are the packed rules of the block's successive steps; the last one goes on.
        """
        states = self.draft(state, window, schedule, drafts)
        index = state.steps[:, None] + torch.arange(drafts, device=states.device)
        evidence, anchors = self.forwards(state, states, window, cache)
        chosen = self.select(state, evidence, states, index, schedule, window)
        chain = Chain(states, chosen, self.mask_id, self.eos)

        sequences, commit_step = state.sequences.clone(), state.commit_step.clone()
        sequences[:, window.block] = chain.tokens
        commit_step[:, window.block] = chain.commit_step(index, commit_step[:, window.block])
        offered, accepted = state.offered, state.accepted
        if offered is not None and accepted is not None and drafts > 1:
            offered, accepted = offered.clone(), accepted.clone()
            offered[:, : drafts - 1] += chain.offered
            accepted[:, : drafts - 1] += chain.right[:, 1:]
        after = state._replace(
            sequences=sequences,
            commit_step=commit_step,
            nfe=state.nfe + 1,
            steps=state.steps + chain.accepted,
            query_tokens=state.query_tokens + drafts * window.width() * self.config.passes,
            offered=offered,
            accepted=accepted,
            evidence=evidence.each(chain.last_state) if self.carries_evidence else None,
            anchors=anchors,
        )

        ended = ends(chain.tokens, self.mask_id, self.eos)
        remaining = chain.remaining.masked_fill(ended, 0)
        counts = [chain.nonfinite, ended, remaining == 0, remaining, chain.accepted]
        if state.fillers is not None:
            counts = [count.masked_fill(state.fillers, 0) for count in counts]
        unusable, over, closed, left, accepted = counts
        summary = torch.stack((unusable.sum(), over.sum(), closed.sum(), left.max(), accepted.max()))
        return after, Outcome(state.row, states, chosen, chain.accepted, remaining, ended, chain.nonfinite, summary)

    def draft(self, state: BlockState, window: Window, schedule: Tensor, drafts: int) -> Tensor:
        """The current block and guesses of the following states, `[b, drafts, T]`."""
        states = state.sequences[:, window.block][:, None]
        after = state.evidence
        for depth in range(drafts - 1):
            assert after is not None
            after = after.unchanged()
            guess = self.select(state, after, states[:, -1:], state.steps[:, None] + depth, schedule, window)
            states = torch.cat((states, guess.tokens), dim=1)
        return states

    def select(
        self, state: BlockState, evidence: Evidence, states: Tensor, index: Tensor, schedule: Tensor, window: Window
    ) -> Selection:
        """One step on each of the `states` `[b, D, T]` by its `evidence`; fields of shape `[b, D, ...]`.

        `index` `[b, D]` is the number of each step in its sequence: it names the noise and the entry of the `schedule`.
        """
        if schedule.shape[0] == 1:
            params = schedule.expand(index.numel(), -1)
        else:
            params = schedule[(index - state.first_step[:, None]).clamp(max=schedule.shape[0] - 1).flatten()]
        seeds = None if state.streams is None else (state.streams[:, None] + index * STEP_STRIDE).flatten()
        return evidence.select(
            self.config.rule,
            states,
            params,
            step=self.forwards.step,
            mask_id=self.mask_id,
            first=window.first,
            temperature=self.config.temperature,
            seeds=seeds,
            last=self.config.last_ids,
            random=self.config.remasking == "random",
        )
