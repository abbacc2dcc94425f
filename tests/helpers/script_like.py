"""A stand-in for the published scripts: their functions' names, parameters and results, written from the formulas.

Loaded anew by every test that patches it (`test_patch.script`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def proposed(
    logits: Tensor, temperature: float, remasking: str, mask_index: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Proposals, their confidence, and the positions by confidence; all `[B, L]`, masked positions first."""
    noisy = logits
    if temperature != 0:
        noisy = logits.double() - temperature * torch.log(-torch.log(torch.rand_like(logits, dtype=torch.float64)))
    x0 = noisy.argmax(-1)
    if remasking == "low_confidence":
        confidence = logits.double().softmax(-1).gather(-1, x0[..., None])[..., 0]
    elif remasking == "random":
        confidence = torch.rand(x0.shape, dtype=torch.float64, device=x0.device)
    else:
        raise NotImplementedError(remasking)
    confidence = torch.where(mask_index, confidence, -1.0)
    return torch.where(mask_index, x0, x), confidence, confidence.sort(dim=1, descending=True, stable=True)[1]


def first(count: Tensor, order: Tensor, mask_index: Tensor) -> Tensor:
    """The first `count` `[B]` positions of `order`, as far as they are masked."""
    chosen = torch.arange(order.shape[1], device=order.device) < count[:, None]
    return torch.zeros_like(mask_index).scatter(1, order, chosen) & mask_index


def get_transfer_index(
    logits: Any,
    temperature: Any,
    remasking: Any,
    mask_index: Any,
    x: Any,
    num_transfer_tokens: Any,
    threshold: Any = None,
) -> tuple[Tensor, Tensor]:
    x0, confidence, order = proposed(logits, temperature, remasking, mask_index, x)
    if threshold is not None:
        num_transfer_tokens = (confidence >= threshold).sum(1).clamp(min=1)
    return x0, first(num_transfer_tokens.flatten(), order, mask_index)


def get_transfer_index_dynamic(
    logits: Any, temperature: Any, remasking: Any, mask_index: Any, x: Any, num_transfer_tokens: Any, factor: Any = 1
) -> tuple[Tensor, Tensor]:
    x0, confidence, order = proposed(logits, temperature, remasking, mask_index, x)
    profile = confidence.gather(1, order)
    n = torch.arange(1, x.shape[1] + 1, device=x.device)
    accepted = ((n + 1) * (1 - profile) < factor) & (profile >= 0)
    return x0, first(accepted.sum(1).clamp(min=1), order, mask_index)


def get_transfer_index_frechet_profile(
    logits: Any, temperature: Any, remasking: Any, mask_index: Any, x: Any, margin: Any = 0.0
) -> tuple[Tensor, Tensor]:
    x0, confidence, order = proposed(logits, temperature, remasking, mask_index, x)
    profile = confidence.gather(1, order)
    n = torch.arange(1, x.shape[1] + 1, device=x.device)
    score = profile.cumsum(1) - (n - 1) - (1 - profile)
    return x0, first(((score > margin) & (profile >= 0)).sum(1).clamp(min=1), order, mask_index)


def _get_transfer_index(
    logits: Any,
    temperature: Any,
    remasking: Any,
    mask_index: Any,
    x: Any,
    num_transfer_tokens: Any = None,
    threshold: Any = None,
    factor: Any = None,
) -> tuple[Tensor, Tensor]:
    """Of dllm's Fast-dLLM sampler for LLaDA: a factor counts before a threshold, and that before a quota."""
    arguments = (logits, temperature, remasking, mask_index, x, num_transfer_tokens)
    if factor is not None:
        return get_transfer_index_dynamic(*arguments, factor)
    return get_transfer_index(*arguments, threshold)


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor,
    steps: int = 128,
    gen_length: int = 128,
    block_length: int = 128,
    temperature: float = 0.0,
    remasking: str = "low_confidence",
    mask_id: int = 126336,
    threshold: float | None = None,
    factor: float | None = None,
    frechet_margin: float | None = None,
) -> tuple[Tensor, int]:
    """Block by block without a cache; tokens `[B, P + gen_length]` and the forwards."""
    x = torch.cat((prompt, prompt.new_full((prompt.shape[0], gen_length), mask_id)), dim=1)
    per_block, nfe = steps // (gen_length // block_length), 0
    for end in range(prompt.shape[1] + block_length, x.shape[1] + 1, block_length):
        for step in range(block_length):
            mask_index = x == mask_id
            mask_index[:, end:] = False
            if not mask_index.any():
                break
            quota = block_length // per_block + (step < block_length % per_block)
            arguments = (model(x).logits, temperature, remasking, mask_index, x)
            if frechet_margin is not None:
                x0, transfer_index = get_transfer_index_frechet_profile(*arguments, frechet_margin)
            elif factor is not None:
                x0, transfer_index = get_transfer_index_dynamic(*arguments, None, factor)
            else:
                quotas = None if threshold is not None else torch.full((x.shape[0],), quota)
                x0, transfer_index = get_transfer_index(*arguments, quotas, threshold)
            x, nfe = torch.where(transfer_index, x0, x), nfe + 1
    return x, nfe
