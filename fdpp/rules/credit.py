"""CreditDecoding (arXiv 2510.06133): evidence for a token that adds up over a block's steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fdpp.rules.quota import MostConfident
from fdpp.rules.rule import Needs, Proposed, Rule, Sight, number
from fdpp.selection import Selection

KEPT = 16
"""Tokens with credit that a position keeps, K.

The most that were counted at a position of a block are 7 in decodes of the embedded models and 14 in those recorded of
a random one, whose tokens and steps come out with 5.
"""

CLOSE = 1e-5
"""Confidences that are less than this below the highest one count as equal to it, as published."""


class Accumulated(NamedTuple):
    """What `Credit` remembers. Tokens without a place in `tokens` have no credit; -1 is a free place.

    Attributes:
        tokens: `[b, D, T, K]` int64, distinct apart from free places.
        credit: `[b, D, T, K]` float32, 0 at free places.
        top: `[b, D, T]` int64, the most likely token by the model's own logits.
        gain: `[b, D, T]` float32, what it gains in credit at a masked position.
    """

    tokens: Tensor
    credit: Tensor
    top: Tensor
    gain: Tensor


@dataclass(frozen=True)
class Credit(MostConfident, Rule):
    """`Threshold(tau)` on logits + alpha ln(1 + W), where the credit W adds up over the block's steps.

    Every step first multiplies W by beta. Then at each masked position the most likely token, with probability p by the
    model's own logits, gains p^gamma. A token that stays most likely so becomes confident, step by step. Positions
    within 1e-5 of the most confident one commit with it. It is CreditDecoding as in dInfer
    (github.com/inclusionAI/dInfer, `CreditThresholdParallelDecoder`), with its numbers.

    A position keeps credit of K = 16 tokens, not of the whole vocabulary. While no more than K were most likely there
    during a block that is all there is; with more, the token with the smallest credit loses it to the new one.

    Where it differs from dInfer: the mask id is never proposed. It may be most likely and gain credit, as there; but
    such a position is then less confident of its proposal, where dInfer passes it over. Every block begins without
    credit; dInfer's decoder keeps it after a decode that was interrupted.

    `fdpp.select` with it is without credit, since it sees no history.
    """

    tau: float = number(0.9, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    alpha: float = number(0.7, "[0, inf)", "weight of the credit; more is faster", unit="A")
    gamma: float = number(0.2, "[0, inf)", "power of a probability that becomes credit", unit="G", option="boost")
    beta: float = number(0.8, "[0, 1]", "part of the credit that a forward keeps, 0 to 1", unit="B")
    needs: ClassVar = Needs(logits=True)
    name: ClassVar = "credit"
    title: ClassVar = "credit"
    about: ClassVar = "confident ones, by evidence that adds up"

    def observe(self, sight: Sight, before: tuple[Tensor, Accumulated] | None) -> Accumulated:
        # As published. `logsumexp` in its place makes as many float32 copies of the logits and reads them more often.
        p, top = sight.logits.softmax(-1, dtype=torch.float32).max(-1)
        gain, masked = p.pow(self.gamma), sight.states == sight.mask_id
        if before is None:
            tokens = top.new_full((*top[:, 0].shape, KEPT), -1)
            credit = gain.new_zeros(tokens.shape)
        else:
            tokens, credit = before[1].tokens[:, 0], before[1].credit[:, 0]
        held, earned = [], []
        for depth in range(top.shape[1]):
            tokens, credit = self.more(tokens, credit, top[:, depth], gain[:, depth], masked[:, depth])
            held.append(tokens)
            earned.append(credit)
        return Accumulated(torch.stack(held, dim=1), torch.stack(earned, dim=1), top, gain)

    def again(self, logits: Tensor, memory: Accumulated) -> Accumulated:
        # As if every position were masked: a guess need not be right.
        everywhere = torch.ones_like(memory.top, dtype=torch.bool)
        return Accumulated(*self.more(*memory, everywhere), memory.top, memory.gain)

    def more(self, tokens: Tensor, credit: Tensor, top: Tensor, gain: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """`tokens` and `credit` `[..., T, K]` after a step that found `top`, `gain` and `masked` `[..., T]`."""
        credit, here = credit * self.beta, tokens == top[..., None]
        # The token's own place if it has one, else a free one, else that of the smallest credit.
        place = torch.where(here, -1.0, credit).argmin(-1, keepdim=True)
        gained = torch.where(here, credit, 0.0).sum(-1) + gain
        chosen = masked[..., None] & (torch.arange(tokens.shape[-1], device=tokens.device) == place)
        return torch.where(chosen, top[..., None], tokens), torch.where(chosen, gained[..., None], credit)

    def weigh(self, logits: Tensor, memory: Accumulated) -> Tensor:
        # In float32 as published: half precision would round most of what is added away.
        weighed = logits.to(torch.float32, copy=True)
        return weighed.scatter_add_(-1, memory.tokens.clamp(min=0), self.alpha * memory.credit.log1p())

    def decide(self, proposed: Proposed) -> Selection:
        step, candidate = proposed.step, proposed.candidate
        confidence = step.confidence.double().masked_fill(~candidate, -1.0)
        least = (confidence.amax(1, keepdim=True) - CLOSE).clamp(max=self.tau)
        return proposed.commit(step.committed | (candidate & (confidence > 0.0) & (confidence >= least)))

    def shown(self, memory: Accumulated) -> dict[str, Tensor]:
        return {"credit": memory.credit.amax(-1).double().round(decimals=2)}

    def reference(self, proposed: Proposed) -> Selection:
        step, candidate = proposed.step, proposed.candidate
        committed = step.committed.clone()
        for b, row in enumerate(step.confidence.tolist()):
            usable = [t for t in candidate[b].nonzero().flatten().tolist() if row[t] > 0.0]
            for t in usable:
                committed[b, t] |= row[t] >= min(self.tau, max(row[u] for u in usable) - CLOSE)
        return proposed.commit(committed)
