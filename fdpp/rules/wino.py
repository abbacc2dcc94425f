"""WINO (Hong et al., arXiv 2507.18578): many tokens are committed, and those that others contradict are taken back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fdpp.rules.quota import MostConfident
from fdpp.rules.rule import Proposed, Rule, number, whole
from fdpp.rules.verified import Verified, taking_back, taking_back_in_reference
from fdpp.selection import Selection, rank


@dataclass(frozen=True)
class Wino(Verified, MostConfident, Rule):
    """All positions with c > tau, the most confident one if there is none; tokens with a verdict below `back` go again.

    What a verdict is, and how many tokens may go, says `fdpp.rules.verified`. A forward feeds the block twice.

    With a `cap` a step commits at most min(max(floor(0.7 m), 5), cap) of its m masks, the most confident ones, as
    published: three forwards for a block of 32 that is sure of everything, eight for 128. `cap=None` commits all.

    The published configurations have tau 0.5 to 0.8 by task, back 0.9 and blocks of 128. There a block's first step may
    take back up to 29 tokens; it has none but those of a prompt or an infill, which stay here.

    `fdpp.select` with it takes nothing back, since it sees no verdicts.
    """

    tau: float = number(0.6, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    back: float = number(0.9, "[0, 1]", "verdict below which a token is taken back", line=True)
    cap: int | None = whole(20, 1, "most positions that a step commits", optional=True)
    name: ClassVar = "wino"
    title: ClassVar = "WINO"
    about: ClassVar = "confident ones, of which some are taken back"

    def decide(self, proposed: Proposed) -> Selection:
        step = proposed.commit(self.chosen(proposed))
        return step if proposed.memory is None else taking_back(proposed, step, self.back)

    def chosen(self, proposed: Proposed) -> Tensor:
        candidate = proposed.candidate
        c = proposed.step.confidence.masked_fill(~candidate, -1.0)
        sure = candidate & (c > self.tau)
        chosen = torch.where(sure.any(1, keepdim=True), sure, proposed.step.committed)
        if self.cap is None:
            return chosen
        most = (candidate.sum(1, keepdim=True) * 7 // 10).clamp(min=5).clamp(max=self.cap)
        return chosen & (rank(c, descending=True) < most)

    def reference(self, proposed: Proposed) -> Selection:
        committed = torch.zeros_like(proposed.candidate)
        for b, row in enumerate(proposed.step.confidence.tolist()):
            masked = proposed.candidate[b].nonzero().flatten().tolist()
            ranked = sorted(masked, key=lambda t: (-row[t], t))
            sure = [t for t in ranked if row[t] > self.tau] or ranked[:1]
            cap = len(ranked) if self.cap is None else min(max(7 * len(ranked) // 10, 5), self.cap)
            committed[b, sure[:cap]] = True
        step = proposed.commit(committed)
        return step if proposed.memory is None else taking_back_in_reference(proposed, step, self.back)
