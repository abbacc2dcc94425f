"""The leftmost masked positions, with a threshold or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fdpp.rules.quota import OnShares
from fdpp.rules.rule import Proposed, Rule, number, whole
from fdpp.selection import Selection


@dataclass(frozen=True)
class Leftmost(OnShares, Rule):
    """The masked positions among the k columns from the first masked one on.

    "sequential" of SDAR (arXiv 2510.06303) and of its engine JetEngine. Where decided tokens stand between, these are
    fewer than k.

    `k=None`, for `generate` alone, follows the step schedule, as in `Quota`.
    """

    k: int | None = whole(1, 1, "tokens a forward (default: 1, or as --steps asks)", optional=True)
    name: ClassVar = "leftmost"
    title: ClassVar = "leftmost"
    about: ClassVar = "from left to right"

    def label(self, steps: int | None = None) -> str:
        return self.with_k(self.title, steps)

    def decide(self, proposed: Proposed) -> Selection:
        usable = usable_of(proposed)
        return committed_of(proposed, usable, leftmost(usable, self.at_once_of(proposed)))

    def reference(self, proposed: Proposed) -> Selection:
        committed = proposed.step.committed.clone()
        for b, usable in enumerate(usable_in_rows(proposed)):
            if usable:
                committed[b] = False
                committed[b, [t for t in usable if t < usable[0] + at_once_in(proposed, b, self)]] = True
        return proposed.commit(committed)


@dataclass(frozen=True)
class ThresholdLeftmost(OnShares, Rule):
    """All positions with c > tau (strict) if these are at least k, otherwise `Leftmost(k)`.

    "low_confidence_dynamic" of JetEngine, the engine of SDAR. Unlike `ThresholdQuota` a step without enough confident
    positions drops those that there are.

    `k=None`, for `generate` alone, follows the step schedule, as in `Quota`.
    """

    tau: float = number(0.9, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    k: int | None = whole(1, 1, "tokens a forward (default: 1, or as --steps asks)", optional=True)
    name: ClassVar = "threshold-leftmost"
    title: ClassVar = "threshold-leftmost"
    about: ClassVar = "all confident ones; without enough of them, from left to right"

    def label(self, steps: int | None = None) -> str:
        return self.with_k(super().label(), steps)

    def decide(self, proposed: Proposed) -> Selection:
        step, usable, k = proposed.step, usable_of(proposed), self.at_once_of(proposed)
        above = usable & (step.confidence > self.tau)
        chosen = torch.where(above.sum(1, keepdim=True) >= k, above, leftmost(usable, k))
        return committed_of(proposed, usable, chosen)

    def reference(self, proposed: Proposed) -> Selection:
        committed = proposed.step.committed.clone()
        for b, usable in enumerate(usable_in_rows(proposed)):
            k = at_once_in(proposed, b, self)
            above = [t for t in usable if proposed.step.confidence[b, t] > self.tau]
            if usable:
                committed[b] = False
                committed[b, above if len(above) >= k else [t for t in usable if t < usable[0] + k]] = True
        return proposed.commit(committed)


def usable_of(proposed: Proposed) -> Tensor:
    """The candidates whose logits give a token, bool `[N, T]`."""
    return proposed.candidate & (proposed.step.confidence > 0.0)


def committed_of(proposed: Proposed, usable: Tensor, chosen: Tensor) -> Selection:
    """The step that commits the `chosen` of the `usable` `[N, T]`; where none is usable, the prefix test's."""
    return proposed.commit(torch.where(usable.any(1, keepdim=True), chosen, proposed.step.committed))


def leftmost(usable: Tensor, k: Tensor | float) -> Tensor:
    """The `usable` `[N, T]` among k columns from the first of them on."""
    columns = torch.arange(usable.shape[1], device=usable.device)
    begun = usable.cumsum(1) > 0
    first = (~begun).sum(1, keepdim=True)
    return usable & (columns < first + k)


def usable_in_rows(proposed: Proposed) -> list[list[int]]:
    """`usable_of` as columns, row by row, for references."""
    rows = zip(proposed.candidate.tolist(), proposed.step.confidence.tolist(), strict=True)
    return [[t for t, c in enumerate(confidence) if candidate[t] and c > 0.0] for candidate, confidence in rows]


def at_once_in(proposed: Proposed, b: int, rule: OnShares) -> int:
    """k of row `b`, for references."""
    return int(rule.at_once() if proposed.numbers is None else proposed.numbers[b % len(proposed.numbers), 0])
