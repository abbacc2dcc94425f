"""Dream's own decoding (its `alg`, Ye et al., arXiv 2508.15487): a schedule says how many positions a step commits.

- `MaskgitPlus`, `TopkMargin` and `LeastEntropy` (Dream's "entropy"): the most certain ones, by one of three orders.
- `Origin`: each of its own accord, at random.
- `Drawn`: any of the first three with an `alg_temp`, which draws them.
"""

from __future__ import annotations

from fdpp.rules.dream.drawn import Drawn
from fdpp.rules.dream.origin import Origin
from fdpp.rules.dream.ranked import LeastEntropy, MaskgitPlus, TopkMargin
from fdpp.rules.dream.schedule import schedule
from fdpp.rules.rule import Rule

__all__ = ["Drawn", "LeastEntropy", "MaskgitPlus", "Origin", "TopkMargin", "rule_of", "schedule"]

RANKED: dict[str, type[MaskgitPlus | TopkMargin | LeastEntropy]] = {
    "maskgit_plus": MaskgitPlus,
    "topk_margin": TopkMargin,
    "entropy": LeastEntropy,
}


def rule_of(alg: str, eps: float = 1e-3, alg_temp: float | None = None) -> Rule:
    """The rule for settings of Dream's `diffusion_generate`. "origin" reads no `alg_temp`, as published.

    Raises:
        ValueError: an `alg` that Dream does not have, or a number that does not fit.
    """
    if alg == "origin":
        return Origin(eps)
    if alg not in RANKED:
        raise ValueError(f"alg: expected one of {', '.join(('origin', *RANKED))}, got {alg!r}")
    return Drawn(alg, eps=eps, alg_temp=alg_temp) if alg_temp else RANKED[alg](eps=eps)
