"""What `fdpp.klass` held: the rule, and its step for a loop of one's own."""

from __future__ import annotations

from torch import Tensor

from fdpp.rules import Proposed
from fdpp.rules.klass import Klass, Stability, divergence, stable_steps
from fdpp.selection import Selection, candidates
from fdpp.step.operators import prefix_step
from fdpp.step.terms import Terms, pack

__all__ = ["Klass", "divergence", "select", "stable_steps"]


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
    """One denoising step of `rule`; fields are those of `fdpp.select`, `stable` `[b, T]` counts as `stable_steps`."""
    params = pack(rule, logits.device) if params is None else params
    step = prefix_step(logits, tokens, None, Terms(params, rule.key(), mask_id, temperature, seeds))
    return rule.decide(Proposed(step, tokens, candidates(tokens, mask_id), mask_id, Stability(stable)))
