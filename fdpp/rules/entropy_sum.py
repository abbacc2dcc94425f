"""As many of the most certain positions as an entropy budget covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)

from fdpp.rules.rule import Rule, number


@triton.jit
def entropy_sum(n, last, total, p0, p1):  # type: ignore[no-untyped-def]
    return total < p0


@dataclass(frozen=True)
class EntropySum(Rule):
    """The longest prefix, by entropy ascending, with sum_{j<=n} H_(j) < bound (strict).

    "entropy_bounded" of JetEngine, the engine of SDAR (arXiv 2510.06303). `EntropyBound` leaves the last position out
    of the sum. Entropies and `bound` are in nats.
    """

    bound: float = number(0.35, "[0, inf)", "bound on the sum in nats, 0 or more; more is faster", unit="NATS")
    order: ClassVar = "entropy"
    predicate: ClassVar = entropy_sum
    name: ClassVar = "entropy-sum"
    title: ClassVar = "entropy sum"
    about: ClassVar = "the most certain while their entropies sum up to less than a bound"

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return sum(entropies) < self.bound
