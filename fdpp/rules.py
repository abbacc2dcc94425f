"""Rules: which prefix of the sorted confidence profile may be committed together.

A profile is the sequence's masked positions sorted by confidence, c_(1) >= ... >= c_(n), equal ones by position. A rule
accepts some prefix lengths; a step commits the longest accepted one, and at least one position while any is masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from fdpp.kernels import predicates


class Rule:
    """Base of all rules: a frozen dataclass and one predicate.

    A subclass names `predicate`, a `@triton.jit` function `(n, last, total, p0, p1) -> bool` of plain arithmetic (see
    `fdpp.kernels.predicates`), and may override `params`, the two numbers it is called with. The predicate is compiled
    into the fused kernel on a GPU and applied to PyTorch tensors on the CPU.

    Attributes of the class:
        predicate: the prefix test.
        order: "confidence" sorts by confidence, descending, and a position costs 1 - c; "entropy" sorts by entropy,
            ascending, and a position costs its entropy in nats.
    """

    predicate: ClassVar[Callable[..., Any]]
    order: ClassVar[str] = "confidence"
    calibration: float = 0.0

    registry: ClassVar[dict[str, type[Rule]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.order not in ("confidence", "entropy"):
            raise ValueError(f'{cls.__name__}.order: expected "confidence" or "entropy", got {cls.order!r}')
        if not callable(getattr(cls, "predicate", None)):
            raise TypeError(f"{cls.__name__} must name a @triton.jit predicate(n, last, total, p0, p1)")
        Rule.registry[cls.key()] = cls

    @classmethod
    def key(cls) -> str:
        """The name under which the operators find the rule."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def params(self) -> tuple[float, float]:
        """The predicate's `p0` and `p1`."""
        return 0.0, 0.0

    def extend(self, confidence: Tensor, candidate: Tensor, committed: Tensor) -> Tensor:
        """The commit mask `[B, T]` after the prefix test gave `committed`; a rule that looks at positions overrides it.

        `confidence` `[B, T]` float32 is 0 outside `candidate` `[B, T]`, the masked positions that may commit.
        """
        return committed


def number_in(rule: Rule, name: str, interval: str) -> None:
    """Raise `ValueError` unless the field `name` of `rule` is a finite number in an interval such as `"[0, 1)"`."""
    value = getattr(rule, name)
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    excluded = (interval[0] == "(" and value == low) or (interval[-1] == ")" and value == high)
    # Not by `math.isfinite`, which PyTorch 2.11's compiler cannot follow; a NaN is in no interval.
    if not is_number or not low <= value <= high or excluded or value in (math.inf, -math.inf):
        raise ValueError(f"{type(rule).__name__}: expected {name} in {interval}, got {value!r}")


def int_from(rule: Rule, name: str, low: int, *, optional: bool = False) -> None:
    """Raise `ValueError` unless the field `name` of `rule` is an int of at least `low`, or None where `optional`."""
    value = getattr(rule, name)
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        expected = f"{name} as an int of at least {low}{', or None' if optional else ''}"
        raise ValueError(f"{type(rule).__name__}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class Quota(Rule):
    """The k most confident positions: LLaDA's low-confidence remasking (arXiv 2502.09992, section 2.4).

    `k=None` is for `generate` alone: the step schedule, which shares a block's masks out evenly over its steps.
    """

    k: int | None = None
    predicate: ClassVar[Callable[..., Any]] = predicates.quota

    def __post_init__(self) -> None:
        int_from(self, "k", 1, optional=True)

    def params(self) -> tuple[float, float]:
        if self.k is None:
            raise ValueError("Quota: k is None, which only `generate` can fill in from its step schedule")
        return float(self.k), 0.0


@dataclass(frozen=True)
class Threshold(Rule):
    """All positions with c >= tau: Fast-dLLM's confidence-aware parallel decoding (arXiv 2505.22618, section 3.2)."""

    tau: float = 0.9
    predicate: ClassVar[Callable[..., Any]] = predicates.threshold

    def __post_init__(self) -> None:
        number_in(self, "tau", "[0, 1]")

    def params(self) -> tuple[float, float]:
        return float(self.tau), 0.0


@dataclass(frozen=True)
class Factor(Rule):
    """The longest prefix with (n + 1)(1 - c_(n)) < f: Fast-dLLM's factor rule (arXiv 2505.22618, section 3.2)."""

    f: float = 0.75
    predicate: ClassVar[Callable[..., Any]] = predicates.factor

    def __post_init__(self) -> None:
        number_in(self, "f", "(0, inf)")

    def params(self) -> tuple[float, float]:
        return float(self.f), 0.0


@dataclass(frozen=True)
class Frechet(Rule):
    """The longest prefix with G_n = L_n - U_n > margin: Fréchet profile decoding (Fast-dLLM++, arXiv 2606.02955).

    L_n = sum_{j<=n} c_(j) - (n - 1) bounds from below the probability that all n proposals are jointly right, and
    U_n = 1 - c_(n) bounds any competing tuple from above; with L_n > U_n the proposals are the joint mode, whatever
    the dependence between positions (theorem 4.1). `calibration` lowers every confidence to max(0, c - calibration)
    first (appendix C).
    """

    margin: float = 0.25
    calibration: float = 0.0
    predicate: ClassVar[Callable[..., Any]] = predicates.frechet

    def __post_init__(self) -> None:
        number_in(self, "margin", "[0, inf)")
        number_in(self, "calibration", "[0, 1)")

    def params(self) -> tuple[float, float]:
        return float(self.margin), 0.0


@dataclass(frozen=True)
class EntropyBound(Rule):
    """The longest prefix, by entropy ascending, with sum_{j<n} H_(j) <= gamma (EB-sampler, arXiv 2505.24857).

    Entropies and `gamma` are in nats.
    """

    gamma: float = 0.1
    order: ClassVar[str] = "entropy"
    predicate: ClassVar[Callable[..., Any]] = predicates.entropy_bound

    def __post_init__(self) -> None:
        number_in(self, "gamma", "[0, inf)")

    def params(self) -> tuple[float, float]:
        return float(self.gamma), 0.0


@dataclass(frozen=True)
class LocalLeap(Rule):
    """`Threshold(threshold)`, relaxed around confident positions (LocalLeap, arXiv 2510.07081).

    An anchor is a masked position with c >= threshold; positions at most `radius` away from one commit with
    c >= relaxed.
    """

    threshold: float = 0.9
    relaxed: float = 0.75
    radius: int = 4
    predicate: ClassVar[Callable[..., Any]] = predicates.threshold

    def __post_init__(self) -> None:
        number_in(self, "threshold", "[0, 1]")
        number_in(self, "relaxed", "[0, 1]")
        if self.relaxed > self.threshold:
            raise ValueError(f"LocalLeap: expected relaxed at most threshold={self.threshold}, got {self.relaxed}")
        int_from(self, "radius", 0)

    def params(self) -> tuple[float, float]:
        return float(self.threshold), 0.0

    def extend(self, confidence: Tensor, candidate: Tensor, committed: Tensor) -> Tensor:
        usable = candidate & (confidence > 0.0)
        anchor = usable & (confidence.double() >= self.threshold)
        radius = min(self.radius, confidence.shape[1])
        near = F.max_pool1d(anchor[:, None].float(), 2 * radius + 1, stride=1, padding=radius)[:, 0] > 0
        return committed | (usable & near & (confidence.double() >= self.relaxed))
