"""All positions above a confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)

from fdpp.rules.rule import Rule, number


@triton.jit
def threshold(n, last, total, p0, p1):  # type: ignore[no-untyped-def]
    return 1.0 - last >= p0


@dataclass(frozen=True)
class Threshold(Rule):
    """All positions with c >= tau: Fast-dLLM's confidence-aware parallel decoding (arXiv 2505.22618, section 3.2)."""

    tau: float = number(0.9, "[0, 1]", "confidence, 0 to 1; less is faster", line=True)
    predicate: ClassVar = threshold
    name: ClassVar = "threshold"
    title: ClassVar = "threshold"
    about: ClassVar = "all confident ones"

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return 1.0 / (1.0 + residuals[-1]) >= self.tau
