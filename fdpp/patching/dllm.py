"""The decisions of dllm's samplers (ZHZisZZ/dllm), and of FreeDave's and Dream's code, computed by fdpp's step.

Every function here has the parameters of the one that it replaces, and returns what that one does, or None for a call
that goes to the original; `fdpp.patching.scripts` says under which name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdpp.patching.transfer import by_quota_or_threshold, transferred
from fdpp.rules import Quota, Threshold
from fdpp.selection import DTYPES, MAX_POSITIONS
from fdpp.step.operators import prefix_step
from fdpp.step.terms import Terms


def diffusion_step_block(
    logits: Tensor, x_block: Tensor, mask_block: Tensor, num_transfer_step: Tensor, temperature: float, remasking: str
) -> Tensor | None:
    """The block's tokens int64 `[B, L]` after a step by the quotas `num_transfer_step` `[B]`."""
    if num_transfer_step.shape != x_block.shape[:1]:
        return None
    step = transferred(logits, temperature, remasking, mask_block, x_block, (Quota, num_transfer_step))
    return None if step is None else torch.where(step[1], step[0], x_block)


def transferred_tokens(
    logits: Tensor, temperature: float, mask_index: Tensor, x: Tensor, num_transfer_tokens: Any, threshold: Any
) -> tuple[Tensor, Tensor] | None:
    """`(x0, transfer_index)` `[B, L]`, as `get_transfer_index` by the most confident."""
    criterion = by_quota_or_threshold(num_transfer_tokens, threshold)
    return transferred(logits, temperature, "low_confidence", mask_index, x, criterion)


def confidence_and_token(
    logits: Tensor, temperature: float, top_p: Any, top_k: Any, margin_confidence: bool, neg_entropy: bool
) -> tuple[Tensor, Tensor] | None:
    """The largest softmax probability, in the dtype of `logits` `[..., V]`, and its token int64, both `[...]`.

    Filters change the probability of the most likely token, too.
    """
    filtered = (top_p is not None and top_p < 1) or (top_k is not None and top_k < logits.shape[-1])
    if temperature != 0 or filtered or margin_confidence or neg_entropy:
        return None
    return most_likely(logits)


def token_and_probability(logits: Tensor, temperature: float, top_k: Any, top_p: Any) -> tuple[Tensor, Tensor] | None:
    """As `confidence_and_token`, the token first. Without a temperature the originals do not look at the filters."""
    found = most_likely(logits) if temperature == 0 else None
    return None if found is None else (found[1], found[0])


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor] | None:
    """Confidence and proposal of positions that are all masked, with an unknown mask id."""
    if logits.dtype not in DTYPES or logits.device.type not in ("cpu", "cuda"):
        return None
    # As sequences of one position there may be any number of them; a block stays as it is, for it may be a slice.
    block = logits.dim() == 3 and logits.shape[1] <= MAX_POSITIONS
    rows = logits if block else logits.reshape(-1, 1, logits.shape[-1])
    tokens = torch.full(rows.shape[:2], -1, dtype=torch.int64, device=rows.device)
    # Any rule that ranks by confidence: what it commits is not read.
    params = torch.zeros(1, 3, dtype=torch.float64, device=rows.device)
    step = prefix_step(rows, tokens, None, Terms(params, Threshold.key(), -1))
    shape = logits.shape[:-1]
    return step.confidence.to(logits.dtype).reshape(shape), step.proposal.reshape(shape)
