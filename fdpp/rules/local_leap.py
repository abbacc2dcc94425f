"""A threshold that is lower beside confident positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from fdpp.rules.rule import Proposed, Rule, number, whole
from fdpp.rules.threshold import threshold as above
from fdpp.selection import Selection


@dataclass(frozen=True)
class LocalLeap(Rule):
    """`Threshold(threshold)`, relaxed around confident positions (LocalLeap, arXiv 2510.07081).

    An anchor is a masked position with c >= threshold; positions at most `radius` away from one commit with
    c >= relaxed.
    """

    threshold: float = number(0.9, "[0, 1]", "confidence, 0 to 1; less is faster", option="tau", line=True)
    relaxed: float = number(0.75, "[0, 1]", "confidence near a confident token, 0 to 1", line=True)
    radius: int = whole(4, 0, "how many tokens away is near")
    predicate: ClassVar = above
    name: ClassVar = "localleap"
    title: ClassVar = "LocalLeap"
    about: ClassVar = "all confident ones and, near those, less confident ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.relaxed > self.threshold:
            raise ValueError(f"LocalLeap: expected relaxed at most threshold={self.threshold}, got {self.relaxed}")

    def decide(self, proposed: Proposed) -> Selection:
        step, candidate = proposed.step, proposed.candidate
        usable, confidence = candidate & (step.confidence > 0.0), step.confidence.double()
        anchor = usable & (confidence >= self.threshold)
        radius = min(self.radius, candidate.shape[1])
        near = F.max_pool1d(anchor[:, None].float(), 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0
        return proposed.commit(step.committed | (usable & near & (confidence >= self.relaxed)))

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return 1.0 / (1.0 + residuals[-1]) >= self.threshold

    def reference(self, proposed: Proposed) -> Selection:
        committed = proposed.step.committed.clone()
        for b, row in enumerate(proposed.step.confidence.tolist()):
            usable = [t for t in proposed.candidate[b].nonzero().flatten().tolist() if row[t] > 0.0]
            anchors = [t for t in usable if row[t] >= self.threshold]
            for t in usable:
                near = any(abs(t - anchor) <= self.radius for anchor in anchors)
                committed[b, t] |= near and row[t] >= self.relaxed
        return proposed.commit(committed)
