"""The k most certain positions, k from Dream's schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fdpp.rules.dream.schedule import OnSchedule
from fdpp.rules.rule import Rule, number, whole


@dataclass(frozen=True)
class MaskgitPlus(OnSchedule, Rule):
    """The k most confident positions (Dream's alg "maskgit_plus").

    `k=None`, for `generate` alone, follows Dream's schedule, whose times end at `eps`.
    """

    k: int | None = whole(None, 1, "tokens a forward (default: 1, or as --steps asks)")
    eps: float = number(1e-3, "(0, 1)", "where the times of Dream's schedule end, 0 to 1", unit="T")
    name: ClassVar = "maskgit_plus"
    about: ClassVar = "as many of the most confident as Dream's schedule says"


@dataclass(frozen=True)
class TopkMargin(OnSchedule, Rule):
    """The k positions whose most likely token leads the next one most, by p1 - p2 (Dream's alg "topk_margin").

    `k=None`, for `generate` alone, follows Dream's schedule, whose times end at `eps`.
    """

    k: int | None = whole(None, 1, "tokens a forward (default: 1, or as --steps asks)")
    eps: float = number(1e-3, "(0, 1)", "where the times of Dream's schedule end, 0 to 1", unit="T")
    order: ClassVar = "margin"
    name: ClassVar = "topk_margin"
    about: ClassVar = "as many as Dream's schedule says of those with the widest lead over the second most likely token"


@dataclass(frozen=True)
class LeastEntropy(OnSchedule, Rule):
    """The k positions with the lowest entropy (Dream's alg "entropy").

    `k=None`, for `generate` alone, follows Dream's schedule, whose times end at `eps`.
    """

    k: int | None = whole(None, 1, "tokens a forward (default: 1, or as --steps asks)")
    eps: float = number(1e-3, "(0, 1)", "where the times of Dream's schedule end, 0 to 1", unit="T")
    order: ClassVar = "entropy"
    name: ClassVar = "least_entropy"
    about: ClassVar = "as many of the most certain, by entropy, as Dream's schedule says"
