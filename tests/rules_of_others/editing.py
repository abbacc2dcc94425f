"""Token editing, as LLaDA2.1 decodes: two thresholds, one to commit by and one to change a committed token by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import fdpp
from fdpp.rules import MostConfident, Needs, Proposed, number
from fdpp.selection import Selection


@dataclass(frozen=True)
class Editing(MostConfident, fdpp.Rule):
    """`Threshold(tau)`, and a committed token gives way to another of confidence at least `edit`.

    While a block holds a mask every step commits one, so it ends.
    """

    tau: float = number(0.7, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    edit: float = number(0.9, "[0, 1]", "confidence of a token that takes the place of another", line=True)
    needs: ClassVar = Needs(logits=True, block=True)
    revokes: ClassVar = True
    name: ClassVar = "editing"
    title: ClassVar = "editing"
    about: ClassVar = "all confident ones; committed ones may change"

    def decide(self, proposed: Proposed) -> Selection:
        step, candidate = proposed.step, proposed.candidate
        c = step.confidence.masked_fill(~candidate, -1.0)
        committed = candidate & ((c >= self.tau) | first_of(c))
        # Outside of a decode there is nothing to edit: no confidence stands at committed positions.
        other = (step.proposal != proposed.tokens) & (proposed.block is not None)
        edited = ~candidate & other & (step.confidence >= self.edit)
        return written(proposed, committed | (edited & candidate.any(1, keepdim=True)))

    def reference(self, proposed: Proposed) -> Selection:
        step, candidate = proposed.step, proposed.candidate
        committed = torch.zeros_like(candidate)
        for b, row in enumerate(step.confidence.tolist()):
            masked = candidate[b].nonzero().flatten().tolist()
            if not masked:
                continue
            committed[b, max(masked, key=lambda t: (row[t], -t))] = True
            for t, confidence in enumerate(row):
                if t in masked:
                    committed[b, t] |= confidence >= self.tau
                elif proposed.block is not None and step.proposal[b, t] != proposed.tokens[b, t]:
                    committed[b, t] = confidence >= self.edit
        return written(proposed, committed)


def first_of(confidence: Tensor) -> Tensor:
    """The first largest value of every row, bool `[N, T]`."""
    return torch.zeros_like(confidence, dtype=torch.bool).scatter(1, confidence.argmax(1, keepdim=True), True)


def written(proposed: Proposed, committed: Tensor) -> Selection:
    """The step with `committed` `[N, T]`, which may name positions that were committed before."""
    step, tokens, candidate = proposed.step, proposed.tokens, proposed.candidate
    return Selection(
        tokens=torch.where(committed, step.proposal, tokens),
        proposal=torch.where(candidate | committed, step.proposal, tokens),
        confidence=step.confidence.masked_fill(~candidate, 0.0),
        committed=committed,
        remaining=(candidate & ~committed).sum(1, dtype=torch.int32),
        nonfinite=step.nonfinite,
    )
