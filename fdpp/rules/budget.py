"""The sure positions within a budget of error, and the next one if waiting would not make it surer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)
from torch import Tensor

from fdpp.rules.rule import Needs, Proposed, Rule, Sight, number, shortfall
from fdpp.selection import Selection


@triton.jit
def within_budget(n, last, total, p0, p1):  # type: ignore[no-untyped-def]
    return (total - last <= p0) & (1.0 - last >= p1)


class Trend(NamedTuple):
    """What `Budget` remembers.

    Attributes:
        confidence: `[b, D, T]` float32, the highest probability of a token that may be proposed.
        rising: `[b, D, T]` bool, where it has risen by more than `rise` since the state before; True where none was.
    """

    confidence: Tensor
    rising: Tensor


@dataclass(frozen=True)
class Budget(Rule):
    """The longest prefix with c_(n) >= sure and sum_{j<n} (1 - c_(j)) <= budget, and one position more.

    The one more is the next of the profile, if its confidence is at least `floor`, all that the others may cost is
    within the budget, and its confidence has not risen by more than `rise` since the block's last forward. A block's
    first forward takes none.

    Why it costs little: let A be that the others' proposals are right together, and c the confidence of the one more.
    By Fréchet's bound P(A) >= 1 - budget, whatever the dependence between positions. Given A its proposal has a
    probability of at least c - budget, and any other token there at most (1 - c) / (1 - budget). Where the former is
    the larger, it would be proposed again had the others been committed first: it needs no forward of its own. What the
    bound does not see is that the others may tell what it should be. Then its confidence rises from forward to
    forward, and it is worth the wait.

    `fdpp.select` with it commits the prefix alone, since it sees no history. `generate` applies all of it.
    """

    budget: float = number(0.05, "[0, inf)", "sum of 1 - confidence of all but one, 0 or more; more is faster")
    sure: float = number(0.9, "[0, 1]", "confidence of these, 0 to 1; less is faster", line=True)
    floor: float = number(0.3, "[0, 1]", "least confidence of the one more, 0 to 1; less is faster", line=True)
    rise: float = number(0.1, "[0, 1]", "most that its confidence may have risen, 0 to 1; more is faster")
    predicate: ClassVar = within_budget
    needs: ClassVar = Needs(logits=True)
    name: ClassVar = "budget"
    title: ClassVar = "budget"
    about: ClassVar = "the sure ones within a budget of error, and one more that waiting would not make surer"

    def label(self, steps: int | None = None) -> str:
        others = [name for name in ("sure", "floor", "rise") if getattr(self, name) != getattr(Budget, name)]
        return ", ".join([super().label(), *(f"{name} {getattr(self, name):g}" for name in others)])

    def params(self) -> tuple[float, float]:
        return float(self.budget), float(self.sure)

    def observe(self, sight: Sight, before: tuple[Tensor, Trend] | None) -> Trend:
        confidence = highest(sight.logits, sight.mask_id)
        if before is None:
            return Trend(confidence, torch.ones_like(confidence, dtype=torch.bool))
        earlier = torch.cat((before[1].confidence, confidence[:, :-1]), dim=1)
        return Trend(confidence, confidence - earlier > self.rise)

    def again(self, logits: Tensor, memory: Trend) -> Trend:
        return Trend(memory.confidence, torch.zeros_like(memory.rising))

    def decide(self, proposed: Proposed) -> Selection:
        step, memory = proposed.step, proposed.memory
        if memory is None:
            return step
        confidence = step.confidence.double()
        spent = (1.0 - confidence).masked_fill(~step.committed, 0.0).sum(1, keepdim=True)
        left = confidence.masked_fill(~proposed.candidate | step.committed, -1.0)
        at_best = left == left.amax(1, keepdim=True)
        following = at_best & (at_best.cumsum(1) == 1)
        free = (spent <= self.budget) & (left >= self.floor) & (left > 0.0) & ~memory.rising
        return proposed.commit(step.committed | (following & free))

    def shown(self, memory: Trend) -> dict[str, Tensor]:
        return {"rising": memory.rising}

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return sum(map(shortfall, residuals[:-1])) <= self.budget and 1.0 / (1.0 + residuals[-1]) >= self.sure

    def reference(self, proposed: Proposed) -> Selection:
        step, memory = proposed.step, proposed.memory
        if memory is None:
            return step
        committed = step.committed.clone()
        for b, row in enumerate(step.confidence.tolist()):
            taken = step.committed[b].nonzero().flatten().tolist()
            open_ones = [t for t in proposed.candidate[b].nonzero().flatten().tolist() if t not in taken and row[t] > 0]
            if not open_ones or sum(1.0 - row[t] for t in taken) > self.budget:
                continue
            best = -max((row[t], -t) for t in open_ones)[1]
            if row[best] >= self.floor and not memory.rising[b, best]:
                committed[b, best] = True
        return proposed.commit(committed)


def highest(logits: Tensor, mask_id: int) -> Tensor:
    """The highest softmax probability but the mask's, float32 `[..., T]`, of logits `[..., T, V]`."""
    probabilities = logits.float().softmax(-1)
    probabilities[..., mask_id] = 0.0
    return probabilities.amax(-1)
