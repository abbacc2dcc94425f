"""The published way to take one step, written from the papers, as the yardstick.

Fast-dLLM++ (arXiv 2606.02955) and Fast-dLLM (arXiv 2505.22618) take a float64 softmax over the whole vocabulary at
every position, masked or not, gather the confidence of the argmax, and then sort each sequence's masked confidences in
a Python loop.
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_frechet(logits: Tensor, tokens: Tensor, mask_id: int, margin: float) -> tuple[Tensor, Tensor]:
    """New tokens and commit mask `[B, T]` of one Fréchet step."""
    masked = tokens == mask_id
    proposal = logits.argmax(dim=-1)
    probability = logits.to(torch.float64).softmax(dim=-1)
    confidence = probability.gather(-1, proposal.unsqueeze(-1)).squeeze(-1)
    committed = torch.zeros_like(masked)
    for b in range(logits.shape[0]):
        where = masked[b].nonzero().flatten()
        if where.numel() == 0:
            continue
        profile, order = confidence[b, where].sort(descending=True)
        n = torch.arange(1, profile.numel() + 1, device=profile.device)
        score = profile.cumsum(0) - (n - 1) - (1.0 - profile)
        longest = max(int((score > margin).sum().item()), 1)
        committed[b, where[order[:longest]]] = True
    return torch.where(committed, proposal, tokens), committed
