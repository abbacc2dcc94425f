"""Stand-ins for the functions of dllm's samplers, FreeDave's and Dream's code: their names, parameters and results.

Written from the formulas, in float64 and with the lower position or id of equals first: they are the oracle, too.
"""

from __future__ import annotations

from typing import Any

import torch
from script_like import first, proposed
from torch import Tensor


def diffusion_step_block(
    logits: Any, x_block: Any, mask_block: Any, num_transfer_step: Any, temperature: Any, remasking: Any
) -> Tensor:
    """Of the block diffusion sampler (core/samplers/bd3lm.py)."""
    x0, _, order = proposed(logits, temperature, remasking, mask_block, x_block)
    quotas = torch.stack([num_transfer_step[b] for b in range(len(x_block))])
    return torch.where(first(quotas, order, mask_block), x0, x_block)


def nemotron_tokens(
    logits: Any, temperature: Any, mask_index: Any, x: Any, num_transfer_tokens: Any, threshold: Any = None
) -> tuple[Tensor, Tensor]:
    """`sample_tokens` of the sampler for Nemotron's diffusion models."""
    x0, confidence, order = proposed(logits, temperature, "low_confidence", mask_index, x)
    if threshold is not None:
        num_transfer_tokens = (confidence >= threshold).sum(1).clamp(min=1)
    return x0, first(num_transfer_tokens, order, mask_index)


def likeliest(probs: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of `probs` `[..., V]` and its lowest id, both `[...]`."""
    top = probs.amax(-1)
    ids = torch.arange(probs.shape[-1])
    return top, torch.where(probs == top[..., None], ids, probs.shape[-1]).amin(-1)


def drawn(probs: Tensor) -> tuple[Tensor, Tensor]:
    token = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1).reshape(probs.shape[:-1])
    return probs.gather(-1, token[..., None])[..., 0], token


def filtered(logits: Tensor, top_k: Any, top_p: Any) -> Tensor:
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = logits.masked_fill(logits < kept, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.masked_fill(torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, before > top_p), -1e30)
    return logits


def dream_tokens(
    logits: Any,
    temperature: Any = 0.0,
    top_p: Any = None,
    top_k: Any = None,
    margin_confidence: Any = False,
    neg_entropy: Any = False,
) -> tuple[Tensor, Tensor]:
    """`sample_tokens` of Dream's code, its copies, and the samplers for Dream."""
    probs = filtered(logits.double() / (temperature or 1.0), top_k, top_p).softmax(-1)
    confidence, token = drawn(probs) if temperature > 0 else likeliest(probs)
    if margin_confidence:
        two = probs.topk(2)[0]
        confidence = two[..., 0] - two[..., 1]
    if neg_entropy:
        confidence = (probs * (probs + 1e-10).log()).sum(-1)
    return confidence.to(logits.dtype), token


def llada2_tokens(logits: Any, temperature: Any, top_k: Any, top_p: Any) -> tuple[Tensor, Tensor]:
    """`sample_tokens` of the samplers for LLaDA2 and LLaDA2.1, and, with defaults, of FreeDave."""
    if temperature == 0.0:
        confidence, token = likeliest(logits.double().softmax(-1))
    else:
        confidence, token = drawn(filtered(logits.double() / temperature, top_k, top_p).softmax(-1))
    return token, confidence.to(logits.dtype)
