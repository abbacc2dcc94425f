"""The yardsticks of one step: the published way, written from the papers, and a plain softmax in float32.

Fast-dLLM++ (arXiv 2606.02955) and Fast-dLLM (arXiv 2505.22618) take a float64 softmax over the whole vocabulary at
every position that was fed, masked or not, gather the confidence of the argmax and sort each sequence's confidences.
The sorting is written for all sequences at once, as the authors have it for these rules.

Their programs for Dream take the softmax in the logits' own dtype and at masked positions alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp import Frechet, Quota, Rule, Threshold, ThresholdQuota


def plain(logits: Tensor, tokens: Tensor, mask_id: int, tau: float) -> Tensor:
    """What a careful user would write for a threshold `tau`: new tokens `[B, T]`, a float32 softmax of masked rows.

    It sorts, scans and counts nothing, may propose the mask id, and knows of a 1 - c only what a float32 c leaves.
    """
    masked = tokens == mask_id
    # The rows themselves where all are masked: indexing would copy them.
    rows = logits.flatten(0, 1) if masked.all() else logits[masked]
    confidence, proposal = rows.float().softmax(-1).max(-1)
    score = confidence.new_zeros(tokens.shape).masked_scatter(masked, confidence)
    committed = masked & ((score >= tau) | (score == score.amax(1, keepdim=True)))
    return torch.where(committed, tokens.masked_scatter(masked, proposal), tokens)


def select(
    logits: Tensor, tokens: Tensor, masked: Tensor, rule: Rule, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """New tokens and commit mask `[B, T]`; `masked` `[B, T]` says which positions may commit, `dtype` is the softmax's.

    SDAR's `generate.py` takes the logits' own, and decides by these rules where it takes the most probable tokens.
    """
    proposal = logits.argmax(dim=-1)
    probability = logits.to(dtype).softmax(dim=-1)
    confidence = probability.gather(-1, proposal.unsqueeze(-1)).squeeze(-1)
    committed = first(torch.where(masked, confidence, -torch.inf), rule) & masked
    return torch.where(committed, proposal, tokens), committed


def select_dream(logits: Tensor, tokens: Tensor, masked: Tensor, rule: Rule, width: int) -> tuple[Tensor, Tensor]:
    """`select` as Fast-dLLM's programs for Dream have it, which let the first `width` positions commit.

    `masked` says where a softmax is taken, which with a prefix cache is behind the block as well.
    """
    most, best = logits[masked].softmax(dim=-1).max(dim=-1)
    proposal, confidence = tokens.clone(), logits.new_full(tokens.shape, -torch.inf)
    proposal[masked], confidence[masked] = best, most
    confidence[:, width:] = -torch.inf
    committed = first(confidence, rule) & masked & (confidence > -torch.inf)
    return torch.where(committed, proposal, tokens), committed


def first(confidence: Tensor, rule: Rule) -> Tensor:
    """`[B, T]` bool: the positions that `rule` accepts, the most confident one at least."""
    profile, order = confidence.sort(dim=1, descending=True)
    n = torch.arange(1, profile.shape[1] + 1, device=profile.device)
    match rule:
        case Quota(int(k)):
            accepted = n <= k
        case Threshold(tau):
            accepted = profile >= tau
        case ThresholdQuota(tau, int(k)):
            accepted = (n <= k) | (profile > tau)
        case Frechet(margin):
            accepted = profile.cumsum(1) - (n - 1) - (1.0 - profile) > margin
        case _:
            raise ValueError(f"expected a Quota, Threshold, ThresholdQuota or Frechet, got {rule!r}")
    longest = accepted.expand_as(profile).sum(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(confidence, dtype=torch.bool).scatter(1, order, n <= longest)
