"""How many positions each step commits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch

from fdpp.rules.quota import quota, steps_of_block, without_repeats
from fdpp.rules.rule import Rule


@cache
def schedule(masks: int, steps: int, eps: float) -> tuple[int, ...]:
    """The positions that each of Dream's `steps` commits of a row with so many `masks`, zeros included.

    With t = linspace(1, eps, steps + 1) step i commits int(n (1 - t[i+1] / t[i])) of the n masks left, the last step
    all of them. In float32, as published.
    """
    t = torch.linspace(1.0, eps, steps + 1, dtype=torch.float32, device="cpu")
    shares, left, counts = 1.0 - t[1:] / t[:-1], masks, []
    for share in shares[:-1]:
        counts.append(int(left * share))
        left -= counts[-1]
    return (*counts, left)


class OnSchedule:
    """Beside `Rule` as a base: the first k of the order, with k from Dream's schedule where the field is None.

    Steps that commit nothing are left out: their forwards would change nothing. So a block takes as many steps as its
    schedule has counts above 0.
    """

    predicate: ClassVar = quota
    name: ClassVar[str | None]
    k: int | None
    eps: float

    def params(self) -> tuple[float, float]:
        if self.k is None:
            raise ValueError(f"{type(self).__name__}: k is None, which only `generate` can fill in from its schedule")
        return float(self.k), 0.0

    def takes_steps(self) -> bool:
        return self.k is None

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[Rule]:
        """The block's share of the steps, as `Quota` has it, and Dream's schedule for a block of masks.

        A row of which some positions are given ends earlier.
        """
        own: Any = self
        if self.k is not None:
            return [own]
        counts = schedule(stop - start, steps_of_block(start, stop, length, steps), self.eps)
        return [replace(own, k=k) for k in without_repeats([k for k in counts if k])]

    def label(self, steps: int | None = None) -> str:
        if self.k is not None:
            return f"{self.name} {self.k}"
        return str(self.name) if steps is None else f"{self.name}, {steps} steps"

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return len(residuals) <= self.params()[0]
