"""What `fdpp.dawn` held: the rule, its operators, and its step for a loop of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.attention import Probe
from fdpp.rules.dawn import Dawn, Dependencies, commit, dependency_edges
from fdpp.selection import MAX_POSITIONS, Selection, candidates
from fdpp.step.operators import prefix_step
from fdpp.step.terms import Terms, pack

__all__ = ["Dawn", "Probe", "commit", "dependency_edges", "select", "softmax_maximum"]


__path__: list[str] = []
"""Makes this module a package, so that `fdpp.dawn.rule` and the others can be imported."""


def select(
    logits: Tensor,
    tokens: Tensor,
    *,
    rule: Dawn,
    mask_id: int,
    edges: Tensor,
    committed_confidence: Tensor,
    first: int,
    params: Tensor | None = None,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
) -> Selection:
    """One denoising step of `rule` on a block; the fields are those of `fdpp.select`.

    Committed positions get a proposal too, since they may be anchors; so `nonfinite` counts them as well.

    Args:
        logits: `[b, T, V]` of the block, columns `first..first+T`.
        tokens: `[b, T]` int64.
        edges: int32 `[b, T, ceil(S / 32)]`.
        committed_confidence: `[b, S]` float32; the block's columns are taken from `logits` instead.
        params: `fdpp.step.terms.pack(rule)` on the device, made here if None.
        temperature, seeds: as in `fdpp.step.terms.Terms`.
    """
    params = pack(rule, logits.device) if params is None else params
    everywhere, candidate = torch.full_like(tokens, mask_id), candidates(tokens, mask_id)
    step = prefix_step(logits, everywhere, None, Terms(params, rule.key(), mask_id, temperature, seeds))
    if temperature > 0.0:
        confidence = torch.where(candidate, step.confidence, softmax_maximum(logits, mask_id))
        step = step._replace(confidence=confidence)
    memory, block = Dependencies(edges, committed_confidence), slice(first, first + tokens.shape[1])
    return rule.decide(step, tokens, candidate, memory, block, mask_id)


def softmax_maximum(logits: Tensor, mask_id: int) -> Tensor:
    """The confidence a masked position with these `logits` `[b, n, V]` would have: float32 `[b, n]`, for anchors."""
    b, n, _ = logits.shape
    tokens = torch.full((b, n), mask_id, dtype=torch.int64, device=logits.device)
    terms = Terms(pack(Dawn(), logits.device), Dawn.key(), mask_id)
    parts = zip(logits.split(MAX_POSITIONS, 1), tokens.split(MAX_POSITIONS, 1), strict=True)
    return torch.cat([prefix_step(rows, masks, None, terms).confidence for rows, masks in parts], dim=1)
