"""The longest prefix that is provably the joint mode: Fréchet profile decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)

from fdpp.rules.rule import Curve, Rule, number, shortfall


@triton.jit
def frechet(n, last, total, p0, p1):  # type: ignore[no-untyped-def]
    return 1.0 - total - last > p0


@dataclass(frozen=True)
class Frechet(Rule):
    """The longest prefix with G_n = L_n - U_n > margin: Fréchet profile decoding (Fast-dLLM++, arXiv 2606.02955).

    L_n = sum_{j<=n} c_(j) - (n - 1) bounds from below the probability that all n proposals are jointly right, and
    U_n = 1 - c_(n) bounds any competing tuple from above; with L_n > U_n the proposals are the joint mode, whatever
    the dependence between positions (theorem 4.1). `calibration` lowers every confidence to max(0, c - calibration)
    first (appendix C).

    The default margin is the paper's. It loses answers on all three tasks of the embedded models, where a margin of
    0.75 loses few or none; docs/rules.md has the figures.
    """

    margin: float = number(0.25, "[0, inf)", "lead over any other reading, 0 or more; less is faster", unit="M")
    calibration: float = number(0.0, "[0, 1)", "taken off every confidence first, 0 to 1", unit="E")
    predicate: ClassVar = frechet
    name: ClassVar = "frechet"
    title: ClassVar = "Fréchet"
    about: ClassVar = "as many of the most confident as are likely to be right together"

    def label(self, steps: int | None = None) -> str:
        return super().label() + (f", calibration {self.calibration:g}" if self.calibration else "")

    def curve(self, missing: list[float]) -> Curve:
        """G_n of every prefix."""
        bounds, total = [], 0.0
        for d in missing:
            cost = min(1.0, d + self.calibration)
            total += cost
            bounds.append(1.0 - total - cost)
        return Curve("Fréchet bound", self.margin, bounds)

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        lowered = [min(1.0, shortfall(r) + self.calibration) for r in residuals]
        return 1.0 - sum(lowered) - lowered[-1] > self.margin
