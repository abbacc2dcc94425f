"""A rule that takes tokens back and feeds nothing beside a block, so that it goes with caches and drafts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import fdpp
from fdpp.rules import MostConfident, Needs, Proposed
from fdpp.selection import Selection


@dataclass(frozen=True)
class Doubting(MostConfident, fdpp.Rule):
    """Commit two, and at some numbers of masks take one back that is no longer what the model would say."""

    needs: ClassVar = Needs(logits=True, block=True)
    revokes: ClassVar = True

    def decide(self, proposed: Proposed) -> Selection:
        step, candidate = proposed.step, proposed.candidate
        if proposed.given is None:
            return step
        c = step.confidence.masked_fill(~candidate, -1.0)
        committed = candidate & (c.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < 2)
        doubted = ~candidate & ~proposed.given & (step.proposal != proposed.tokens)
        now = candidate.sum(1, keepdim=True) % 5 == 0
        taken = doubted & now & (doubted.cumsum(1) < committed.sum(1, keepdim=True))
        return proposed.take_back(proposed.commit(committed), taken)
