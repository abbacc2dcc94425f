"""dInfer's hierarchical decoding: the best of every run of adjacent masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import fdpp
from fdpp.rules import number
from fdpp.rules.rule import Memory
from fdpp.selection import recommit


@dataclass(frozen=True)
class Hierarchy(fdpp.Rule):
    """Commits all positions with c > high, and the best one in any case.

    Of every run of adjacent masked positions it also commits the most confident if c > low, and those that equal it.
    """

    low: float = number(0.5, "[0, 1]", "confidence of a run's best token, 0 to 1; less is faster", line=True)
    high: float = number(0.9, "[0, 1]", "confidence of tokens that commit in any case", line=True)
    predicate: ClassVar = fdpp.Quota.predicate
    name: ClassVar = "hierarchy"
    title: ClassVar = "hierarchy"
    about: ClassVar = "the best of every run of masks"

    def params(self) -> tuple[float, float]:
        return 1.0, 0.0

    def decide(
        self,
        step: fdpp.Selection,
        tokens: Tensor,
        candidate: Tensor,
        memory: Memory | None,
        block: slice | Tensor | None,
        mask_id: int,
    ) -> fdpp.Selection:
        if not tokens.shape[1]:
            return step
        confidence = step.confidence.masked_fill(~candidate, -1.0)
        run = (~candidate).cumsum(1)
        runs = confidence.new_full((tokens.shape[0], tokens.shape[1] + 1), -1.0)
        best = runs.scatter_reduce(1, run, confidence, "amax").gather(1, run)
        chosen = candidate & (((confidence == best) & (confidence > self.low)) | (confidence > self.high))
        return recommit(step, tokens, candidate, step.committed | chosen)

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return len(residuals) == 1

    def reference(
        self,
        step: fdpp.Selection,
        tokens: Tensor,
        candidate: Tensor,
        memory: Memory | None,
        block: slice | Tensor | None,
        mask_id: int,
    ) -> fdpp.Selection:
        committed = step.committed.clone()
        for b, row in enumerate(step.confidence.tolist()):
            runs: list[list[int]] = [[]]
            for t, masked in enumerate(candidate[b].tolist()):
                runs[-1].append(t) if masked else runs.append([])
            for run in filter(None, runs):
                best = max(row[t] for t in run)
                for t in run:
                    committed[b, t] |= (row[t] == best and best > self.low) or row[t] > self.high
        return recommit(step, tokens, candidate, committed)
