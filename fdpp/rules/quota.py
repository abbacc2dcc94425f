"""A fixed number of positions per step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter insists on seeing it)
from torch import Tensor

from fdpp.rules.rule import Proposed, Rule, whole


@triton.jit
def quota(n, last, total, p0, p1):  # type: ignore[no-untyped-def]
    return n <= p0


class MostConfident:
    """Beside `Rule` as a base: the prefix test commits the most confident position alone.

    It is for rules that say in `decide` what else commits.
    """

    predicate: ClassVar = quota

    def params(self) -> tuple[float, float]:
        return 1.0, 0.0

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return len(residuals) <= 1


class OnShares:
    """Beside `Rule` as a base: a number k of positions, which None leaves to LLaDA's schedule.

    A block's steps are proportional to its length, and its masks are shared out over them. The prefix test commits k
    positions; one of another predicate has `params` that begin with k.
    """

    k: int | None
    predicate: ClassVar = quota

    def params(self) -> tuple[float, float]:
        return self.at_once(), 0.0

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        return len(residuals) <= self.at_once()

    def at_once(self) -> float:
        """k."""
        if self.k is None:
            raise ValueError(
                f"{type(self).__name__}: k is None, which only `generate` can fill in from its step schedule"
            )
        return float(self.k)

    def at_once_of(self, proposed: Proposed) -> Tensor | float:
        """k of every state in `proposed`, `[N, 1]` or `[1, 1]`; a number outside of a decode."""
        return self.at_once() if proposed.numbers is None else proposed.numbers[:, :1]

    def takes_steps(self) -> bool:
        return self.k is None

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[Rule]:
        own: Any = self
        if self.k is not None:
            return [own]
        counts = shares(stop - start, steps_of_block(start, stop, length, steps))
        return [replace(own, k=k) for k in without_repeats(counts)]

    def with_k(self, label: str, steps: int | None) -> str:
        """`label`, and k where it is not 1."""
        if self.k is not None:
            return label if self.k == 1 else f"{label}, {self.k} at once"
        return label if steps is None else f"{label}, {steps} steps"


@dataclass(frozen=True)
class Quota(OnShares, Rule):
    """The k most confident positions: LLaDA's low-confidence remasking (arXiv 2502.09992, section 2.4).

    `k=None`, for `generate` alone, follows the step schedule: a block's masks are shared out evenly over its steps.
    """

    k: int | None = whole(None, 1, "tokens a forward (default: 1, or as --steps asks)")
    name: ClassVar = "quota"
    about: ClassVar = "a fixed number of tokens"
    counts: ClassVar = True

    def label(self, steps: int | None = None) -> str:
        if self.k is not None:
            return f"quota {self.k}"
        return "one per step" if steps is None else f"schedule of {steps} steps"


def shares(total: int, parts: int) -> list[int]:
    """`total` split into at most `parts` positive ints that differ by at most 1, the larger ones first."""
    base, larger = divmod(total, parts)
    return [base + (part < larger) for part in range(min(parts, total))]


def steps_of_block(start: int, stop: int, length: int, steps: int | None) -> int:
    """How many of the `steps` of a response of `length` its positions `start` to `stop` get, at least 1.

    None: as many steps as positions.
    """
    total = steps or length
    return max(total * stop // length - total * start // length, 1)


def without_repeats(counts: list[int]) -> list[int]:
    """`counts` without those at the end that repeat the one before."""
    changes = [i for i in range(1, len(counts)) if counts[i] != counts[i - 1]]
    return counts[: max(changes, default=0) + 1]
