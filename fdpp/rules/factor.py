"""The longest prefix that is confident enough for its length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)

from fdpp.rules.rule import Curve, Rule, number, shortfall


@triton.jit
def factor(n, last, total, p0, p1):  # type: ignore[no-untyped-def]
    return (n + 1) * last < p0


@dataclass(frozen=True)
class Factor(Rule):
    """The longest prefix with (n + 1)(1 - c_(n)) < f: Fast-dLLM's factor rule (arXiv 2505.22618, section 3.2)."""

    f: float = number(
        0.75, "(0, inf)", "bound on (n + 1)(1 - confidence), above 0; more is faster", unit="F", option="factor"
    )
    predicate: ClassVar = factor
    name: ClassVar = "factor"
    title: ClassVar = "factor"
    about: ClassVar = "as many of the most confident as are confident enough for their number"

    def curve(self, missing: list[float]) -> Curve:
        """1 - (n + 1)(1 - c_(n)), accepted above 1 - f: `Frechet`'s G_n where all confidences are equal."""
        return Curve("factor score", 1.0 - self.f, [1.0 - (n + 1) * d for n, d in enumerate(missing, start=1)])

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return (len(residuals) + 1) * shortfall(residuals[-1]) < self.f
