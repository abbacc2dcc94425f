"""KLASS (Kim et al., arXiv 2511.05664): commit positions whose prediction has stopped moving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fdpp import ops
from fdpp.kernels import predicates
from fdpp.reference import Selection
from fdpp.rules import Rule, int_from, number_in


@dataclass(frozen=True)
class Klass(Rule):
    """All positions that are confident and stable, and the most confident one where there is none.

    Stable: in each of the last `window` steps of the block KL(p_now || p_before), in nats, was below `kl`. Confident:
    c >= `confidence`. A block's first forward has nothing before it, so it never finds a stable position.

    As a `Rule` it is its fallback: `fdpp.select` with it commits the most confident position, since it sees no history.
    `generate` and `fdpp.klass.select` apply all of it.
    """

    confidence: float = 0.6
    kl: float = 0.015
    window: int = 2
    predicate: ClassVar[Callable[..., Any]] = predicates.quota

    def __post_init__(self) -> None:
        number_in(self, "confidence", "[0, 1]")
        number_in(self, "kl", "(0, inf)")
        int_from(self, "window", 1)

    def params(self) -> tuple[float, float]:
        return 1.0, 0.0


def divergence(now: Tensor, before: Tensor) -> Tensor:
    """KL(p_now || p_before) in nats, float32 `[..., T]`, of the softmaxes of logits `[..., T, V]`."""
    log_now, log_before = now.float().log_softmax(-1), before.float().log_softmax(-1)
    # A logit of -inf has no part in p_now; 0 * (-inf - x) must not spoil the sum.
    return torch.where(log_now > -torch.inf, log_now.exp() * (log_now - log_before), 0.0).sum(-1)


def stable_steps(logits: Tensor, before: Tensor, count: Tensor, rule: Klass) -> Tensor:
    """Steps in a row, int64 `[b, D, T]`, over which predictions held still, for D successive states.

    `logits` `[b, D, T, V]` are those of the states; `before` `[b, T, V]` and `count` `[b, T]` the logits and the steps
    of the state before the first.
    """
    counts = []
    for state in logits.unbind(1):
        count = torch.where(divergence(state, before) < rule.kl, count + 1, 0)
        counts.append(count)
        before = state
    return torch.stack(counts, dim=1)


def select(
    logits: Tensor,
    tokens: Tensor,
    *,
    rule: Klass,
    mask_id: int,
    stable: Tensor,
    params: Tensor | None = None,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
) -> Selection:
    """One denoising step of `rule`; fields as those of `fdpp.select`, `stable` `[b, T]` as `stable_steps` counts."""
    params = ops.pack(rule, logits.device) if params is None else params
    base = ops.select_packed(logits, tokens, None, params, rule, mask_id, temperature, seeds)
    ready = (tokens == mask_id) & (base.confidence >= rule.confidence) & (stable >= rule.window)
    return ops.recommit(base, tokens, torch.where(ready.any(1, keepdim=True), ready, base.committed), mask_id)
