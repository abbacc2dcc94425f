"""CreditDecoding (arXiv 2510.06133) as in dInfer, with credit of the whole vocabulary: a third party's rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

import fdpp
from fdpp.rules import MostConfident, Needs, Proposed, Sight, number


class Accumulated(NamedTuple):
    """What the rule remembers: `credit` `[b, D, T, V]` float32."""

    credit: Tensor


@dataclass(frozen=True)
class DenseCredit(MostConfident, fdpp.Rule):
    """`Threshold(tau)` on logits + alpha ln(1 + W), and all positions within 1e-5 of the most confident one.

    Every step multiplies the credit W by beta and adds c^gamma at each masked position's most likely token.
    """

    tau: float = number(0.9, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    alpha: float = number(0.7, "[0, inf)", "weight of the credit", unit="A")
    gamma: float = number(0.2, "[0, inf)", "power of a confidence", unit="G")
    beta: float = number(0.8, "[0, 1]", "decay of the credit", unit="B")
    needs: ClassVar = Needs(logits=True)

    def observe(self, sight: Sight, before: tuple[Tensor, Accumulated] | None) -> Accumulated:
        masked = sight.states == sight.mask_id
        credit = None if before is None else before[1].credit[:, 0]
        found = []
        for depth in range(sight.states.shape[1]):
            credit = self.more(credit, sight.logits[:, depth], masked[:, depth])
            found.append(credit)
        return Accumulated(torch.stack(found, dim=1))

    def again(self, logits: Tensor, memory: Accumulated) -> Accumulated:
        # As if every position were masked: a guess need not be right.
        every = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
        return Accumulated(self.more(memory.credit, logits, every))

    def more(self, credit: Tensor | None, logits: Tensor, masked: Tensor) -> Tensor:
        top, token = logits.float().softmax(-1).max(-1, keepdim=True)
        before = torch.zeros_like(logits, dtype=torch.float32) if credit is None else credit * self.beta
        return before.scatter_add(-1, token, top.pow(self.gamma) * masked[..., None])

    def weigh(self, logits: Tensor, memory: Accumulated) -> Tensor:
        return logits + self.alpha * memory.credit.log1p()

    def decide(self, proposed: Proposed) -> fdpp.Selection:
        step, candidate = proposed.step, proposed.candidate
        confidence = step.confidence.masked_fill(~candidate, -1.0)
        least = (confidence.amax(1, keepdim=True) - 1e-5).clamp(max=self.tau)
        return proposed.commit(candidate & (confidence >= least))

    def reference(self, proposed: Proposed) -> fdpp.Selection:
        step, candidate = proposed.step, proposed.candidate
        committed = step.committed.clone()
        for b, row in enumerate(step.confidence.tolist()):
            masked = candidate[b].nonzero().flatten().tolist()
            least = min(self.tau, max((row[t] for t in masked), default=0.0) - 1e-5)
            for t in masked:
                committed[b, t] = row[t] >= least
        return proposed.commit(committed)
