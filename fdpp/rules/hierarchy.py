"""Hierarchical decoding: the best position of every run of adjacent masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fdpp.rules.quota import MostConfident
from fdpp.rules.rule import Proposed, Rule, number
from fdpp.selection import Selection


@dataclass(frozen=True)
class Hierarchy(MostConfident, Rule):
    """All positions with c > high and, of every run of adjacent masks, the most confident if its c > low.

    Positions that equal the best of their run commit with it. The most confident position of all commits in any case.
    It is the `HierarchyDecoder` of dInfer (github.com/inclusionAI/dInfer), whose `threshold` is `high`, its
    `low_threshold` `low`. Committed positions divide a run, so that tokens which commit together stay apart unless
    they are sure.

    Both comparisons are strict, as published, so `high=1` commits nothing by itself: dInfer's `threshold=None`. With
    `low=0` the best of a run always commits, dInfer's `low_threshold=None`, unless its confidence is 0. That takes
    unusable logits, or a mask id that has all of the probability; dInfer then proposes the mask.
    """

    low: float = number(0.5, "[0, 1]", "confidence of a run's best token, 0 to 1; less is faster", line=True)
    high: float = number(0.9, "[0, 1]", "confidence of tokens that commit in any case, 0 to 1", line=True)
    name: ClassVar = "hierarchy"
    title: ClassVar = "hierarchy"
    about: ClassVar = "the best of every run of masks, and all confident ones"

    def decide(self, proposed: Proposed) -> Selection:
        step, candidate = proposed.step, proposed.candidate
        b, T = candidate.shape
        confidence = step.confidence.double().masked_fill(~candidate, -1.0)
        run = (~candidate).cumsum(1)
        runs = confidence.new_full((b, T + 1), -1.0)
        best = runs.scatter_reduce(1, run, confidence, "amax").gather(1, run)
        chosen = ((confidence == best) & (best > self.low)) | (confidence > self.high)
        return proposed.commit(step.committed | (candidate & chosen))

    def reference(self, proposed: Proposed) -> Selection:
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
