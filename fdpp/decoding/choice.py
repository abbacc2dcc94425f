"""The steps that a rule takes on the evidence of a forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdpp.decoding.evidence import Evidence
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.shaping import drawn, ranked_last, uniform
from fdpp.rules import Proposed, Rule
from fdpp.selection import Selection, candidates, recommit
from fdpp.step import cpu
from fdpp.step.operators import prefix_step
from fdpp.step.terms import Terms


class Choice:
    """Takes one step on every state.

    Args:
        config: its rule decides. Positions that propose one of `last_ids` rank last. With random remasking a rule that
            counts draws its k positions at random.
        step: the prefix test's step on the head's logits, called as `fdpp.step.operators.prefix_step`.
    """

    def __init__(self, config: DiffusionGenerationConfig, step: Callable[..., Selection]) -> None:
        self.rule, self.step, self.last = config.rule, step, config.last_ids
        self.random = config.remasking == "random"
        self.decides = type(config.rule).decide is not Rule.decide

    def __call__(
        self,
        evidence: Evidence,
        states: Tensor,
        terms: Terms,
        block: slice | Tensor,
        streams: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Selection:
        """One step on each of the `states` `[b, D, T]` of the columns `block`; fields of shape `[b, D, ...]`.

        `terms` are for the `b * D` states; `streams` `[b * D]` int64 are noise streams that a block's steps share;
        `given` `[b, T]` bool is where no step decided the token.
        """
        tokens = states.flatten(0, 1)
        only_masked = evidence.logits.dim() == 2
        flat = evidence if only_masked else evidence.each(lambda part: part.flatten(0, 1))
        logits = flat.logits if flat.memory is None else self.rule.weigh(flat.logits, flat.memory)
        if self.last:
            proposal = prefix_step(logits, tokens, None, terms).proposal
            logits = ranked_last(logits, proposal, self.last, terms.mask_id)
        if only_masked:
            chosen = cpu.select(logits, tokens, None, terms)
        elif self.rule.needs.block:
            chosen = everywhere(self.step, logits, tokens, terms)
        else:
            chosen = self.step(logits, tokens, None, terms)
        if self.decides:
            candidate = candidates(tokens, terms.mask_id)
            fixed, fresh = (self.uniform(seeds, tokens.shape[1]) for seeds in (streams, terms.seeds))
            if given is not None:
                given = given[:, None].expand_as(states).flatten(0, 1)
            proposed = Proposed(
                chosen, tokens, candidate, terms.mask_id, flat.memory, block, terms.params, fixed, fresh, given
            )
            chosen = self.rule.decide(proposed)
        if self.random:
            chosen = self.drawn(chosen, tokens, terms)
        return Selection(*(field.view(*states.shape[:2], *field.shape[1:]) for field in chosen))

    def uniform(self, seeds: Tensor | None, T: int) -> Tensor | None:
        """Numbers of T positions for a rule that draws."""
        return uniform(seeds, T) if self.rule.draws and seeds is not None else None

    def drawn(self, step: Selection, tokens: Tensor, terms: Terms) -> Selection:
        """`step` with its k positions drawn at random."""
        assert terms.seeds is not None
        committed = drawn(tokens, terms.params[:, 0], terms.seeds, terms.mask_id)
        return recommit(step, tokens, candidates(tokens, terms.mask_id), committed)


def everywhere(take: Callable[..., Selection], logits: Tensor, tokens: Tensor, terms: Terms) -> Selection:
    """The step by `take` as if all positions were masked; at those that are not, of the most likely token."""
    masks = torch.full_like(tokens, terms.mask_id)
    step = take(logits, masks, None, terms)
    if not terms.sampled:
        return step
    sure = take(logits, masks, None, terms._replace(temperature=0.0))
    masked = tokens == terms.mask_id
    proposal = torch.where(masked, step.proposal, sure.proposal)
    return step._replace(proposal=proposal, confidence=torch.where(masked, step.confidence, sure.confidence))
