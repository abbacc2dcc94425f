"""The terms of a step: its rule, the mask id, the temperature and the noise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdpp.rules import Rule
from fdpp.rules.rule import TEMPERED
from fdpp.selection import check_temperature


class Terms(NamedTuple):
    """The last arguments of every operator, in the order of their schemas.

    Attributes:
        params: `[1, 3]` float64, as `pack` makes it, or one such row per sequence.
        rule: `Rule.tested()`.
        mask_id: the id that marks a masked position.
        temperature: 0 for greedy proposals.
        seeds: `[B]` int64, a noise stream per sequence; required with a temperature.
    """

    params: Tensor
    rule: str
    mask_id: int
    temperature: float = 0.0
    seeds: Tensor | None = None

    @property
    def kind(self) -> type[Rule]:
        return Rule.registry[self.rule.removesuffix(TEMPERED)]

    @property
    def order(self) -> str:
        return self.kind.order

    @property
    def sampled(self) -> bool:
        return self.temperature > 0.0

    @property
    def tempered(self) -> bool:
        """Whether all of the step is of softmax(l / T), so that logits are divided and the draw is at temperature 1."""
        return self.sampled and self.rule.endswith(TEMPERED)

    @property
    def drawn_at(self) -> float:
        return 1.0 if self.tempered else self.temperature


def pack(rule: Rule, device: torch.device | str | None = None) -> Tensor:
    """The rule's numbers as the operators take them: `[1, 3]` float64, `(p0, p1, calibration)`.

    Float64 and a tensor, because a scalar argument of a kernel would be rounded to float32.
    """
    return torch.tensor([[*rule.params(), rule.calibration]], dtype=torch.float64, device=device)


def check_rule(rule: object) -> Rule:
    """`rule`; `ValueError` if it is not a `Rule`."""
    if not isinstance(rule, Rule):
        raise ValueError(f"rule: expected a fdpp.Rule such as fdpp.Frechet(0.25), got {rule!r}")
    return rule


def terms_of(rule: Rule, mask_id: int, temperature: float, seed: int | Tensor | None, rows: Tensor) -> Terms:
    """The terms of `rule` for `rows` `[B, ...]`, on their device; raises what `fdpp.select` does."""
    check_rule(rule)
    check_temperature(temperature)
    if temperature > 0.0 and seed is None:
        raise ValueError(f"temperature={temperature} samples: expected a seed")
    seeds = None
    if temperature > 0.0:
        seeds = seed if isinstance(seed, Tensor) else streams(seed or 0, rows.shape[0], rows.device)
    return Terms(pack(rule, rows.device), rule.tested(), mask_id, temperature, seeds)


def streams(seed: int, B: int, device: torch.device) -> Tensor:
    """The noise streams of B sequences, `[B]` int64: seed, seed + 1, ..."""
    return seed + torch.arange(B, dtype=torch.int64, device=device)
