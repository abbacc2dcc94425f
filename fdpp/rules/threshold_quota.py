"""All positions above a confidence, and a number of positions in any case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)

from fdpp.rules.quota import OnShares
from fdpp.rules.rule import Rule, number, whole


@triton.jit
def threshold_quota(n, last, total, p0, p1):  # type: ignore[no-untyped-def]
    # Not 1 - last > p1: 1 - r / (1 + r) may round to more than 1 / (1 + r), and equality is no pass.
    return (n <= p0) | (last < 1.0 - p1)


@dataclass(frozen=True)
class ThresholdQuota(OnShares, Rule):
    """All positions with c > tau (strict) if these are at least k, otherwise the k most confident.

    SDAR's "low_confidence_dynamic" (arXiv 2510.06303, `generate.py`: tau 0.85), and what LLaDA2.0's `generate` does
    (tau 0.95).

    `k=None`, for `generate` alone, follows the step schedule, as in `Quota`.
    """

    tau: float = number(0.9, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    k: int | None = whole(1, 1, "tokens a forward at least (default: 1, or as --steps asks)", optional=True)
    predicate: ClassVar = threshold_quota
    name: ClassVar = "threshold-quota"
    title: ClassVar = "threshold-quota"
    about: ClassVar = "all confident ones, and a number in any case"

    def params(self) -> tuple[float, float]:
        return self.at_once(), float(self.tau)

    def label(self, steps: int | None = None) -> str:
        return self.with_k(super().label(), steps)

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return len(residuals) <= self.at_once() or 1.0 / (1.0 + residuals[-1]) > self.tau
