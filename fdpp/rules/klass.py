"""KLASS (Kim et al., arXiv 2511.05664): commit positions whose prediction has stopped moving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fdpp.rules.quota import MostConfident
from fdpp.rules.rule import Needs, Proposed, Rule, Sight, number, whole
from fdpp.selection import Selection


class Stability(NamedTuple):
    """What `Klass` remembers.

    Attributes:
        stable: `[b, D, T]` int64, steps in a row over which a prediction held still.
    """

    stable: Tensor


@dataclass(frozen=True)
class Klass(MostConfident, Rule):
    """All positions that are confident and stable; the most confident position if there is none.

    Stable: in each of the last `window` steps of the block KL(p_now || p_before), in nats, was below `kl`. Confident:
    c >= `confidence`. A block's first forward has nothing before it, so it never finds a stable position.

    `fdpp.select` with it commits the most confident position, since it sees no history. `generate` applies all of it.
    """

    confidence: float = number(0.6, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    kl: float = number(0.015, "(0, inf)", "most that a prediction may change in a forward", unit="NATS")
    window: int = whole(2, 1, "forwards over which it may not change more")
    needs: ClassVar = Needs(logits=True)
    name: ClassVar = "klass"
    title: ClassVar = "KLASS"
    about: ClassVar = "those that have stopped changing"

    def observe(self, sight: Sight, before: tuple[Tensor, Stability] | None) -> Stability:
        if before is None:
            return Stability(torch.zeros_like(sight.states))
        logits, memory = before
        return Stability(stable_steps(sight.logits, logits[:, 0], memory.stable[:, 0], self))

    def again(self, logits: Tensor, memory: Stability) -> Stability:
        return Stability(memory.stable + 1)

    def decide(self, proposed: Proposed) -> Selection:
        step, memory = proposed.step, proposed.memory
        if memory is None:
            return step
        ready = proposed.candidate & (step.confidence >= self.confidence) & (memory.stable >= self.window)
        return proposed.commit(torch.where(ready.any(1, keepdim=True), ready, step.committed))

    def shown(self, memory: Stability) -> dict[str, Tensor]:
        return {"held still": memory.stable}

    def reference(self, proposed: Proposed) -> Selection:
        step, candidate, memory = proposed.step, proposed.candidate, proposed.memory
        if memory is None:
            return step
        committed = step.committed.clone()
        for b, row in enumerate(step.confidence.tolist()):
            sure = [t for t in candidate[b].nonzero().flatten().tolist() if row[t] >= self.confidence]
            ready = [t for t in sure if memory.stable[b, t] >= self.window]
            if ready:
                committed[b] = False
                committed[b, ready] = True
        return proposed.commit(committed)


def divergence(now: Tensor, before: Tensor) -> Tensor:
    """KL(p_now || p_before) in nats, float32 `[..., T]`, of the softmaxes of logits `[..., T, V]`."""
    log_now, log_before = now.float().log_softmax(-1), before.float().log_softmax(-1)
    # A logit of -inf has no part in p_now; 0 * (-inf - x) must not spoil the sum.
    return torch.where(log_now > -torch.inf, log_now.exp() * (log_now - log_before), 0.0).sum(-1)


def stable_steps(logits: Tensor, before: Tensor, count: Tensor, rule: Klass) -> Tensor:
    """Steps in a row, int64 `[b, D, T]`, over which predictions held still, for D successive states.

    `logits` `[b, D, T, V]` are those of the states; `before` `[b, T, V]` and `count` `[b, T]` the logits and the steps
    of the state before the first.
    """
    counts = []
    for state in logits.unbind(1):
        count = torch.where(divergence(state, before) < rule.kl, count + 1, 0)
        counts.append(count)
        before = state
    return torch.stack(counts, dim=1)
