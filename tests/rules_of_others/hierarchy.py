"""dInfer's hierarchical decoding: the best of every run of adjacent masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import fdpp
from fdpp.rules import MostConfident, Proposed, number


@dataclass(frozen=True)
class Hierarchy(MostConfident, fdpp.Rule):
    """Commits all positions with c > high, and the best one in any case.

    Of every run of adjacent masked positions it also commits the most confident if c > low, and those that equal it.
    """

    low: float = number(0.5, "[0, 1]", "confidence of a run's best token, 0 to 1; less is faster", line=True)
    high: float = number(0.9, "[0, 1]", "confidence of tokens that commit in any case", line=True)
    name: ClassVar = "hierarchy"
    title: ClassVar = "hierarchy"
    about: ClassVar = "the best of every run of masks"

    def decide(self, proposed: Proposed) -> fdpp.Selection:
        step, candidate = proposed.step, proposed.candidate
        b, T = candidate.shape
        confidence = step.confidence.masked_fill(~candidate, -1.0)
        run = (~candidate).cumsum(1)
        runs = confidence.new_full((b, T + 1), -1.0)
        best = runs.scatter_reduce(1, run, confidence, "amax").gather(1, run)
        chosen = candidate & (((confidence == best) & (confidence > self.low)) | (confidence > self.high))
        return proposed.commit(step.committed | chosen)

    def reference(self, proposed: Proposed) -> fdpp.Selection:
        step, candidate = proposed.step, proposed.candidate
        committed = step.committed.clone()
        for b, row in enumerate(step.confidence.tolist()):
            runs: list[list[int]] = [[]]
            for t, masked in enumerate(candidate[b].tolist()):
                runs[-1].append(t) if masked else runs.append([])
            for run in filter(None, runs):
                best = max(row[t] for t in run)
                for t in run:
                    committed[b, t] |= (row[t] == best and best > self.low) or row[t] > self.high
        return proposed.commit(committed)
