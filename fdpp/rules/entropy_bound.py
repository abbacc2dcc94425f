"""As many of the most certain positions as an entropy budget allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)

from fdpp.rules.rule import TEMPERED, Rule, number


@triton.jit
def entropy_bound(n, last, total, p0, p1):  # type: ignore[no-untyped-def]
    return total - last <= p0


@dataclass(frozen=True)
class EntropyBound(Rule):
    """The longest prefix, by entropy ascending, with sum_{j<n} H_(j) <= gamma (EB-sampler, arXiv 2505.24857).

    Entropies and `gamma` are in nats. With `tempered` and a temperature T > 0 they are of softmax(l / T), as the
    confidences then are, too: DiffusionGemma's sampler has them so. Without a temperature nothing changes.
    """

    gamma: float = number(0.1, "[0, inf)", "budget in nats, 0 or more; more is faster", unit="NATS")
    tempered: bool = False
    order: ClassVar = "entropy"
    predicate: ClassVar = entropy_bound
    name: ClassVar = "entropy"
    title: ClassVar = "entropy"
    about: ClassVar = "the most certain, up to a budget"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.tempered, bool):
            raise ValueError(f"{type(self).__name__}: expected tempered as a bool, got {self.tempered!r}")

    def tested(self) -> str:
        return self.key() + TEMPERED * self.tempered

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return sum(entropies[:-1]) <= self.gamma
