"""The published way to take one step, written from the papers, as the yardstick.

Fast-dLLM++ (arXiv 2606.02955) and Fast-dLLM (arXiv 2505.22618) take a float64 softmax over the whole vocabulary at
every position that was fed, masked or not, gather the confidence of the argmax and sort each sequence's confidences.
The sorting is written for all sequences at once, as the authors have it for these rules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp import Frechet, Quota, Rule, Threshold


def select(logits: Tensor, tokens: Tensor, masked: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """New tokens and commit mask `[B, T]`; `masked` `[B, T]` says which positions may commit."""
    proposal = logits.argmax(dim=-1)
    probability = logits.to(torch.float64).softmax(dim=-1)
    confidence = probability.gather(-1, proposal.unsqueeze(-1)).squeeze(-1)
    confidence = torch.where(masked, confidence, -torch.inf)
    profile, order = confidence.sort(dim=1, descending=True)
    n = torch.arange(1, profile.shape[1] + 1, device=profile.device)
    match rule:
        case Quota(int(k)):
            accepted = n <= k
        case Threshold(tau):
            accepted = profile >= tau
        case Frechet(margin):
            accepted = profile.cumsum(1) - (n - 1) - (1.0 - profile) > margin
        case _:
            raise ValueError(f"expected a Quota, Threshold or Frechet, got {rule!r}")
    longest = accepted.expand_as(profile).sum(1, keepdim=True).clamp(min=1)
    committed = torch.zeros_like(masked).scatter(1, order, n <= longest) & masked
    return torch.where(committed, proposal, tokens), committed
