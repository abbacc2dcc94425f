"""A whole denoising step of the rule."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp import ops
from fdpp.dawn.decide import commit
from fdpp.dawn.rule import Dawn
from fdpp.reference import Selection


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

    Every position of the block is proposed for, since committed ones may be anchors; so `nonfinite` counts them too.

    Args:
        logits: `[b, T, V]` of the block, columns `first..first+T`.
        tokens: `[b, T]` int64.
        edges: int32 `[b, T, ceil(S / 32)]`.
        committed_confidence: `[b, S]` float32; the block's columns are taken from `logits` instead.
        params: `fdpp.ops.pack(rule)` on the device, made here if None.
        temperature, seeds: as in `fdpp.ops.select_packed`.
    """
    params = ops.pack(rule, logits.device) if params is None else params
    everywhere = torch.full_like(tokens, mask_id)
    base = ops.select_packed(logits, everywhere, None, params, rule, mask_id, temperature, seeds)
    candidate = tokens == mask_id
    known = base.confidence if temperature == 0.0 else softmax_maximum(logits, mask_id)
    anchors = committed_confidence.clone()
    anchors[:, first : first + tokens.shape[1]] = known.masked_fill(candidate, 0.0)
    committed = commit(base.confidence, candidate, anchors, edges, rule=rule, first=first)
    return Selection(
        tokens=torch.where(committed, base.proposal, tokens),
        proposal=torch.where(candidate, base.proposal, tokens),
        confidence=base.confidence.masked_fill(~candidate, 0.0),
        committed=committed,
        remaining=(candidate & ~committed).sum(1, dtype=torch.int32),
        nonfinite=base.nonfinite,
    )


def softmax_maximum(logits: Tensor, mask_id: int) -> Tensor:
    """The confidence a masked position with these `logits` `[b, n, V]` would have: float32 `[b, n]`, for anchors."""
    b, n, _ = logits.shape
    tokens = torch.full((b, n), mask_id, dtype=torch.int64, device=logits.device)
    params = ops.pack(Dawn(), logits.device)
    parts = zip(logits.split(ops.MAX_POSITIONS, 1), tokens.split(ops.MAX_POSITIONS, 1), strict=True)
    found = [ops.select_packed(l, t, None, params, Dawn(), mask_id).confidence for l, t in parts]  # noqa: E741
    return torch.cat(found, dim=1)
