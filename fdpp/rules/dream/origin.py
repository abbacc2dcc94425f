"""Every position of its own accord, at a step drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from fdpp.rules.quota import MostConfident, steps_of_block
from fdpp.rules.rule import Proposed, Rule, number
from fdpp.selection import Selection, is_int


@dataclass(frozen=True)
class Origin(MostConfident, Rule):
    """Every mask with probability 1 - t[i+1] / t[i] at step i, and 1 at the last (Dream's alg "origin").

    The S steps of a block have the times t[j] = 1 - j (1 - eps) / S. As published, every forward draws a number for
    every mask, and many forwards commit nothing. Here a position draws one number u, uniform in (0, 1), for its block:
    it commits at the first step i with u >= t[i+1], at the last if there is none. A forward commits those of the
    earliest step at which a mask is left; so none is idle, and no step between could have changed a token.

    The distribution is the same. A mask outlives step i with probability t[i+1], since u < t[i+1] is all that it takes;
    as published with (t[1] / t[0]) ... (t[i+1] / t[i]), which is t[i+1] / t[0] = t[i+1]; the last step it outlives with
    probability 0 both here and there. The steps of one position have the same distribution, then, and positions are
    independent of each other and of the predictions, here and there.

    `fdpp.select` with it commits the most confident position, since it has no schedule.

    Attributes:
        steps: of a block; None, for `generate`, takes the block's share of its `steps`.
    """

    eps: float = number(1e-3, "(0, 1)", "where the times of Dream's schedule end, 0 to 1", unit="T")
    steps: int | None = field(default=None)
    draws: ClassVar = True
    name: ClassVar = "origin"
    about: ClassVar = "random ones, as many as Dream's schedule leaves to chance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps is not None and (not is_int(self.steps) or self.steps < 1):
            raise ValueError(f"Origin: expected steps as an int of at least 1, or None, got {self.steps!r}")

    def params(self) -> tuple[float, float]:
        return 1.0, float(self.steps or 0)

    def takes_steps(self) -> bool:
        return self.steps is None

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[Rule]:
        return [replace(self, steps=self.steps or steps_of_block(start, stop, length, steps))]

    def decide(self, proposed: Proposed) -> Selection:
        if proposed.fixed is None or proposed.numbers is None:
            return proposed.step
        steps = proposed.numbers[:, 1:2]
        turn = torch.minimum(((1.0 - proposed.fixed) * steps / (1.0 - self.eps)).ceil(), steps)
        turn = turn.masked_fill(~proposed.candidate, torch.inf)
        return proposed.commit(proposed.candidate & (turn == turn.amin(1, keepdim=True)))

    def label(self, steps: int | None = None) -> str:
        steps = self.steps or steps
        return "origin" if steps is None else f"origin, {steps} steps"

    def reference(self, proposed: Proposed) -> Selection:
        if proposed.fixed is None or proposed.numbers is None:
            return proposed.step
        committed = torch.zeros_like(proposed.candidate)
        for b, row in enumerate(proposed.fixed.tolist()):
            steps = int(proposed.numbers[b % len(proposed.numbers), 1])
            times = [1.0 - j * (1.0 - self.eps) / steps for j in range(1, steps)]
            turn = {
                t: next((i for i, time in enumerate(times) if row[t] >= time), steps - 1)
                for t in proposed.candidate[b].nonzero().flatten().tolist()
            }
            committed[b, [t for t, i in turn.items() if i == min(turn.values())]] = True
        return proposed.commit(committed)
