"""From left to right as far as confidence holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fdpp.rules.leftmost import committed_of, usable_in_rows, usable_of
from fdpp.rules.quota import MostConfident
from fdpp.rules.rule import Proposed, Rule, number
from fdpp.selection import Selection


@dataclass(frozen=True)
class LeftmostRun(MostConfident, Rule):
    """The masked positions from the first one on up to the first with c < tau, and the first in any case.

    FreeDave's `alg_temp=-1` with a threshold (arXiv 2510.00294, published code). Tokens that stand between two masks do
    not end a run. Without a threshold it is `Leftmost(1)`.
    """

    tau: float = number(0.9, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    name: ClassVar = "run"
    title: ClassVar = "run"
    about: ClassVar = "from left to right as far as they are confident"

    def decide(self, proposed: Proposed) -> Selection:
        step, usable = proposed.step, usable_of(proposed)
        ended = (usable & (step.confidence < self.tau)).cumsum(1) > 0
        first = usable & (usable.cumsum(1) == 1)
        return committed_of(proposed, usable, (usable & ~ended) | first)

    def reference(self, proposed: Proposed) -> Selection:
        committed = proposed.step.committed.clone()
        for b, usable in enumerate(usable_in_rows(proposed)):
            weak = [t for t in usable if proposed.step.confidence[b, t] < self.tau]
            if usable:
                committed[b] = False
                committed[b, [t for t in usable if t == usable[0] or not weak or t < weak[0]]] = True
        return proposed.commit(committed)
