"""As many positions as Dream's schedule says, drawn by how certain they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fdpp.rules.dream.schedule import OnSchedule
from fdpp.rules.rule import Needs, Proposed, Rule, Sight, number, whole
from fdpp.selection import Selection, rank

ALGS = ("maskgit_plus", "topk_margin", "entropy")


class Scores(NamedTuple):
    """What `Drawn` remembers.

    Attributes:
        score: `[b, D, T]` float32, of every position.
    """

    score: Tensor


@dataclass(frozen=True)
class Drawn(OnSchedule, Rule):
    """k positions, drawn one after the other with probabilities softmax(score / alg_temp) among those that are left
    (Dream's `alg_temp`).

    The score is the confidence ("maskgit_plus"), the lead p1 - p2 of the most likely token over the next one
    ("topk_margin") or the negative entropy, sum p log(p + 1e-10) ("entropy"). The k largest of score / alg_temp +
    Gumbel noise are such a draw, without its k turns.

    `k=None`, for `generate` alone, follows Dream's schedule, whose times end at `eps`. `fdpp.select` with it commits
    the k most confident positions, whatever the `alg`, since it has no noise for them.
    """

    alg: str = "maskgit_plus"
    k: int | None = whole(None, 1, "tokens a forward (default: 1, or as --steps asks)")
    eps: float = number(1e-3, "(0, 1)", "where the times of Dream's schedule end, 0 to 1", unit="T")
    alg_temp: float = number(0.1, "(0, inf)", "temperature of the draw; more is more random", unit="T")
    needs: ClassVar = Needs(logits=True)
    draws: ClassVar = True
    name: ClassVar = "drawn"
    about: ClassVar = "as many as Dream's schedule says, drawn by their confidence"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alg not in ALGS:
            raise ValueError(f"Drawn: expected alg as one of {', '.join(ALGS)}, got {self.alg!r}")

    def label(self, steps: int | None = None) -> str:
        return f"{super().label(steps)}, {self.alg} at {self.alg_temp:g}"

    def observe(self, sight: Sight, before: tuple[Tensor, Scores] | None) -> Scores | None:
        if self.alg == "maskgit_plus":
            return None
        p = sight.logits.float().softmax(-1)
        if self.alg == "entropy":
            return Scores((p * (p + 1e-10).log()).sum(-1))
        p[..., sight.mask_id] = 0.0
        best = p.topk(min(2, p.shape[-1]), dim=-1).values
        return Scores(best[..., 0] - best[..., 1:].sum(-1))

    def decide(self, proposed: Proposed) -> Selection:
        if proposed.fresh is None or proposed.numbers is None:
            return proposed.step
        step = proposed.step
        score = step.confidence if proposed.memory is None else proposed.memory.score
        noise = -(-proposed.fresh.log()).log()
        usable = proposed.candidate & (step.confidence > 0.0)
        key = (score.double() / self.alg_temp + noise).masked_fill(~usable, -torch.inf)
        chosen = usable & (rank(key, descending=True) < proposed.numbers[:, :1])
        return proposed.commit(torch.where(usable.any(1, keepdim=True), chosen, step.committed))

    def reference(self, proposed: Proposed) -> Selection:
        if proposed.fresh is None or proposed.numbers is None:
            return proposed.step
        step = proposed.step
        committed = step.committed.clone()
        score = step.confidence if proposed.memory is None else proposed.memory.score
        for b, row in enumerate(step.confidence.tolist()):
            usable = [t for t in proposed.candidate[b].nonzero().flatten().tolist() if row[t] > 0.0]
            key = {t: float(score[b, t]) / self.alg_temp - math.log(-math.log(proposed.fresh[b, t])) for t in usable}
            k = int(proposed.numbers[b % len(proposed.numbers), 0])
            if usable:
                committed[b] = False
                committed[b, sorted(usable, key=lambda t: (-key[t], t))[:k]] = True
        return proposed.commit(committed)
