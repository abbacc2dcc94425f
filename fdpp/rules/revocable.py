"""Any rule whose tokens are taken back where others contradict them, as WINO's are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdpp.rules.frechet import Frechet
from fdpp.rules.quota import MostConfident
from fdpp.rules.rule import Curve, Needs, Proposed, Rule, Sight, number, whole
from fdpp.rules.verified import Verdicts, Verified, taking_back, taking_back_in_reference
from fdpp.selection import Selection


@dataclass(frozen=True)
class Revocable(Verified, MostConfident, Rule):
    """What `rule` commits; tokens with a verdict below `below` are taken back, at most `at_most` a step.

    What a verdict is, and how many tokens may go, says `fdpp.rules.verified`; `at_most=None` sets no other limit. A
    forward feeds the block twice. `Revocable(rule, below=0)` commits what `rule` does.

    Wrapped is any rule that takes nothing back itself and reads no attention. With a schedule of steps, masks that are
    left when it ends are committed by its last step.

    `fdpp.select` with it is `rule`, since it sees no verdicts.

    Args:
        rule: a `Rule`, or what `Rule.of` takes.

    Raises:
        ValueError: a rule that revokes or reads attention.
    """

    rule: Rule = field(default_factory=Frechet)
    below: float = number(0.9, "[0, 1]", "verdict below which a token is taken back", line=True)
    at_most: int | None = whole(None, 0, "most tokens that a step takes back")
    name: ClassVar = "revocable"
    title: ClassVar = "revocable"
    about: ClassVar = "those of another rule, of which some are taken back"

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = Rule.of(self.rule)
        if not self.may_wrap(type(rule)):
            why = "takes tokens back itself" if rule.revokes else "reads attention"
            raise ValueError(f"Revocable: expected a rule that takes nothing back and reads no attention, {rule} {why}")
        needs = Needs(logits=True, rows=True, fed=rule.needs.fed)
        own = {"order": rule.order, "draws": rule.draws, "calibration": rule.calibration, "needs": needs}
        for name, value in {"rule": rule, **own}.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def may_wrap(kind: type[Rule]) -> bool:
        """Whether a rule of this `kind` takes nothing back itself and reads no attention."""
        return not kind.revokes and not kind.needs.attention

    def saved(self) -> dict[str, Any]:
        return {"name": self.saved_name(), "rule": self.rule.saved(), "below": self.below, "at_most": self.at_most}

    def label(self, steps: int | None = None) -> str:
        return f"{self.title} {self.rule.label(steps)}"

    def tested(self) -> str:
        return self.rule.tested()

    def params(self) -> tuple[float, float]:
        return self.rule.params()

    def takes_steps(self) -> bool:
        return self.rule.takes_steps()

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[Rule]:
        return self.rule.successive(start, stop, length, steps)

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return self.rule.accepts(residuals, entropies)

    def curve(self, missing: list[float]) -> Curve | None:
        return self.rule.curve(missing)

    def observe(self, sight: Sight, before: tuple[Tensor, Verdicts] | None) -> Verdicts:
        inner = None if before is None else (before[0], before[1].inner)
        verdicts: Verdicts = super().observe(sight, before)
        return verdicts._replace(inner=self.rule.observe(sight, inner))

    def again(self, logits: Tensor, memory: Verdicts) -> Verdicts:
        after: Verdicts = super().again(logits, memory)
        return after if after.inner is None else after._replace(inner=self.rule.again(logits, after.inner))

    def weigh(self, logits: Tensor, memory: Verdicts) -> Tensor:
        return logits if memory.inner is None else self.rule.weigh(logits, memory.inner)

    def shown(self, memory: Verdicts) -> dict[str, Tensor]:
        inner = {} if memory.inner is None else self.rule.shown(memory.inner)
        # Of what has a verdict the wrapped rule decides nothing.
        masked = memory.verdict.isnan()
        return {**super().shown(memory), **{name: torch.where(masked, x, torch.nan) for name, x in inner.items()}}

    def decide(self, proposed: Proposed) -> Selection:
        step = self.rule.decide(inner_of(proposed))
        return step if proposed.memory is None else taking_back(proposed, step, self.below, self.at_most)

    def reference(self, proposed: Proposed) -> Selection:
        step = self.rule.reference(inner_of(proposed))
        if proposed.memory is None:
            return step
        return taking_back_in_reference(proposed, step, self.below, self.at_most)


def inner_of(proposed: Proposed) -> Proposed:
    """What the wrapped rule decides on."""
    return proposed if proposed.memory is None else proposed._replace(memory=proposed.memory.inner)
