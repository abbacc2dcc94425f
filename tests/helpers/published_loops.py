"""Rules of published programs with what they do against their own papers, and a streamer that counts forwards.

With them a published decode is compared to its end, whatever fault it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import fdpp
from fdpp.decoding.loop import BlockLoop
from fdpp.decoding.state import Window
from fdpp.rules import Proposed
from fdpp.selection import Selection


class Recorder:
    """A streamer that notes which forward decided every position of the response."""

    def __init__(self, mask_id: int = 500) -> None:
        self.mask_id = mask_id
        self.forwards = 0
        self.blocks: list[Tensor] = []
        self.step_of: Tensor | None = None

    def put(self, value: Tensor) -> None:
        if self.step_of is not None:
            self.blocks.append(self.step_of)
        self.step_of = None

    def put_draft(self, value: Tensor) -> None:
        if self.step_of is None:
            self.step_of = torch.full_like(value, -1)
        self.step_of[(value != self.mask_id) & (self.step_of < 0)] = self.forwards
        self.forwards += 1

    def end(self) -> None:
        self.step_of = torch.cat(self.blocks, dim=1)


def published_factor(n: Tensor, last: Tensor, total: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    """The factor rule as published code has it, over profiles `[B, T]` on the CPU.

    It accepts equality, and a first failure at the profile's last position looks like no failure. Columns past the end
    of a profile cost nothing.
    """
    accepted = ((n + 1) * last <= p0) | (n == 1)
    size = (last > 0).sum(1, keepdim=True)
    return accepted | (accepted | (n >= size)).all(1, keepdim=True)


@dataclass(frozen=True)
class PublishedFactor(fdpp.Rule):
    f: float
    predicate: ClassVar[Any] = published_factor

    def params(self) -> tuple[float, float]:
        return self.f, 0.0


@dataclass(frozen=True)
class LeftToRight(fdpp.Rule):
    """FreeDave's `alg_temp=-1`: the leading masked positions whose confidence is at least `tau`, or the first one."""

    tau: float
    predicate: ClassVar[Any] = published_factor

    def decide(self, proposed: Proposed) -> Selection:
        candidate = proposed.candidate
        leading = (~candidate | (proposed.step.confidence >= self.tau)).cumprod(1).bool()
        return proposed.commit(candidate & (leading | (candidate.cumsum(1) == 1)))


def within_quota(n: Tensor, last: Tensor, total: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    size = (~last.isnan()).sum(1, keepdim=True)  # those past the end of a profile are
    return (n == 1) | ((n <= p0 + size) & (1.0 - last >= p1))


@dataclass(frozen=True)
class QuotaThreshold(fdpp.Rule):
    """Fast-dLLM's `confidence_threshold` without a cache: a threshold, and after call i at most `per * (i + 1)` tokens.

    What a call refuses is added to the next one's quota, so the quotas count from the start. `masks` are those of the
    whole canvas.
    """

    tau: float
    per: int
    masks: int
    allowed: int = 0
    predicate: ClassVar[Any] = within_quota

    def params(self) -> tuple[float, float]:
        return float(self.allowed - self.masks), self.tau

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[fdpp.Rule]:
        return [replace(self, allowed=allowed) for allowed in range(self.per, self.masks + 1, self.per)]


class FirstAlone:
    """Before a rule as a base: in a block of masks the first position commits alone, whatever the rule says.

    That is what Dream's published cached loops do with the call that fills the cache.
    """

    def decide(self, proposed: Proposed) -> Selection:
        step = super().decide(proposed)  # type: ignore[misc]
        first = torch.zeros_like(proposed.candidate).index_fill(1, torch.tensor([0]), True)
        fresh = proposed.candidate.all(1, keepdim=True)
        return proposed.commit(torch.where(fresh, first, step.committed))


@dataclass(frozen=True)
class FirstThreshold(FirstAlone, fdpp.Threshold):
    """`Threshold` in a published cached loop."""


@dataclass(frozen=True)
class FirstQuota(FirstAlone, fdpp.Quota):
    """`Quota` in a published cached loop."""


@dataclass(frozen=True)
class FirstLeftToRight(FirstAlone, LeftToRight):
    """`LeftToRight` in a published cached loop."""


def over_margin(n: Tensor, last: Tensor, total: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    return 1.0 - total - last > p0


@dataclass(frozen=True)
class FirstFrechet(FirstAlone, fdpp.Rule):
    """The Fréchet rule in a published cached loop; recorded runs also have margins below 0."""

    margin: float
    predicate: ClassVar[Any] = over_margin

    def params(self) -> tuple[float, float]:
        return self.margin, 0.0


def at_most(n: Tensor, last: Tensor, total: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    return n <= p0


@dataclass(frozen=True)
class FirstLeastEntropy(FirstAlone, fdpp.Rule):
    """Dream's schedule by entropy in a published cached loop: the first token stands for step 0, whatever its quota.

    `steps` are those of a block. Steps that decide nothing are left out.
    """

    steps: int
    eps: float = 1e-3
    k: int = 1
    order: ClassVar[str] = "entropy"
    predicate: ClassVar[Any] = at_most

    def params(self) -> tuple[float, float]:
        return float(self.k), 0.0

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[fdpp.Rule]:
        t = torch.linspace(1, self.eps, self.steps + 1)
        left, counts = stop - start - 1, [1]
        for i in range(1, self.steps):
            k = left if i == self.steps - 1 else int(torch.tensor(float(left)) * (1 - t[i + 1] / t[i]))
            left -= k
            counts += [k] * (k > 0)
        return [replace(self, k=k) for k in counts]


@contextmanager
def imitated() -> Iterator[None]:
    """Cached forwards as published for Dream: without the column before a block, whose first token is known by then.

    Its row is never asked for: `FirstAlone` has committed it.
    """
    ours = BlockLoop.windows

    def windows(loop: BlockLoop, block: int, before: int) -> tuple[Window, Window]:
        first, others = ours(loop, block, before)
        if not others.full:
            fed = slice(others.block.start, others.fed.stop)
            others = Window.of(fed, others.block, False, others.padding, shift=1, own=True)
        return first, others

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockLoop, "windows", windows)
        yield
