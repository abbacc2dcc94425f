"""Prophet: a schedule that ends early, once the model is sure of the answer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fdpp.rules.quota import OnShares, shares, steps_of_block
from fdpp.rules.rule import Needs, Proposed, Rule, Sight, number, whole
from fdpp.selection import Selection

COLUMNS = 5
"""Positions of the answer that are looked at, as published."""


class Gaps(NamedTuple):
    """What `Prophet` remembers.

    Attributes:
        gap: `[b, D, T]` float32, the largest logit less the second one, of tokens that may be proposed.
    """

    gap: Tensor


@dataclass(frozen=True)
class Prophet(OnShares, Rule):
    """`Quota(k)`, until the answer is certain: then all that is masked in its block commits.

    Prophet (arXiv 2508.19982). `answer` is where the answer begins, counted from the response's first position. Its
    region is five positions from there, cut at the end of their block. It is certain once the mean gap between the two
    largest logits of these positions, committed or masked, is at least `early` in steps with f < 0.33, `mid` in those
    with f < 0.67 and `late` in later ones. f is the share of the response's steps that are done with this one.

    The exit is that of the block in which the region begins: the blocks before and after it follow the schedule. The
    published program commits the whole response by its exit, blocks that no step has looked at included, and tests it
    in earlier blocks too. With one block, as long as the response, both are the same.

    `k=None`, for `generate` alone, follows the step schedule, as in `Quota`. A block-causal model's blocks do not begin
    with the response, so each of them counts as the first one.

    `fdpp.select` with it is `Quota(k)`.
    """

    k: int | None = whole(None, 1, "tokens a forward (default: 1, or as --steps asks)")
    answer: int = whole(0, 0, "position of the response where the answer begins, from 0")
    early: float = number(7.5, "[0, inf)", "lead in logits that ends a decode in its first third", unit="GAP")
    mid: float = number(5.0, "[0, inf)", "the same in the second third", unit="GAP")
    late: float = number(2.5, "[0, inf)", "the same in the last third", unit="GAP")
    needs: ClassVar = Needs(logits=True)
    name: ClassVar = "prophet"
    title: ClassVar = "Prophet"
    about: ClassVar = "a fixed number of tokens, and all once the answer is certain"

    def label(self, steps: int | None = None) -> str:
        return self.with_k(f"{self.title}, answer at {self.answer}", steps)

    @property
    def calibration(self) -> float:  # type: ignore[override]
        """`answer`: the third of the numbers that a step has. A quota reads no calibration."""
        return float(self.answer)

    def params(self) -> tuple[float, float]:
        return self.at_once(), float(self.early)

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[Rule]:
        """Every step with its own k and threshold, and with `answer` counted from the block's first position."""
        T = stop - start
        counts = shares(T, steps_of_block(start, stop, length, steps)) if self.k is None else [self.k] * -(-T // self.k)
        begins = self.answer - start if start <= self.answer < stop else T
        rules: list[Rule] = []
        for step, k in enumerate(counts, 1):
            done = (start * len(counts) + step * T) / (length * len(counts))
            limit = self.early if done < 0.33 else self.mid if done < 0.67 else self.late
            rules.append(replace(self, k=k, answer=begins, early=limit, mid=limit, late=limit))
        return rules

    def observe(self, sight: Sight, before: tuple[Tensor, Gaps] | None) -> Gaps:
        return Gaps(gap(sight.logits, sight.mask_id))

    def decide(self, proposed: Proposed) -> Selection:
        step, memory, numbers = proposed.step, proposed.memory, proposed.numbers
        if memory is None or numbers is None:
            return step
        limit, begins = numbers[:, 1:2], numbers[:, 2:3]
        column = torch.arange(memory.gap.shape[1], device=memory.gap.device)
        region = (column >= begins) & (column < begins + COLUMNS)
        mean = torch.where(region, memory.gap.double(), 0.0).sum(1, keepdim=True) / region.sum(1, keepdim=True)
        # A mean of nothing is NaN, which is no exit.
        return proposed.commit(step.committed | (proposed.candidate & (mean >= limit)))

    def shown(self, memory: Gaps) -> dict[str, Tensor]:
        return {"gap": memory.gap}

    def reference(self, proposed: Proposed) -> Selection:
        step, memory, numbers = proposed.step, proposed.memory, proposed.numbers
        if memory is None or numbers is None:
            return step
        committed = step.committed.clone()
        for b, row in enumerate(memory.gap.tolist()):
            _, limit, begins = numbers[b % len(numbers)].tolist()
            region = row[int(begins) : int(begins) + COLUMNS]
            if region and sum(region) / len(region) >= limit:
                committed[b] |= proposed.candidate[b]
        return proposed.commit(committed)


def gap(logits: Tensor, mask_id: int) -> Tensor:
    """The largest logit less the second one, the mask's left out, float32 `[..., T]`, of logits `[..., T, V]`."""
    top, ids = logits.topk(min(3, logits.shape[-1]), dim=-1)
    two = top.float().masked_fill(ids == mask_id, -torch.inf).topk(2, dim=-1).values
    return two[..., 0] - two[..., 1]
