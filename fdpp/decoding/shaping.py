"""How a logits processor and LLaDA's options change logits and commits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fdpp.step.noise import philox_bits

NO_TOKEN = 0xFFFFFFFF
"""Stands for the id in the counter of noise that is drawn once per position: no vocabulary is that large."""


def processed(processor: Callable[..., Tensor], logits: Tensor, states: Tensor, before: Tensor, mask_id: int) -> Tensor:
    """`logits` `[b, D, T, V]` of `states` `[b, D, T]` after a `LogitsProcessorList`; `before` `[b, S]` precedes them.

    The processor sees every state as a row, as in transformers' text diffusion: `input_ids` `[b * D, S]` end before the
    block, `scores` are `[b * D, T, V]`. A processor that asks for `cur_step` gets the masks left, `[b * D, 1, 1]`.

    Raises:
        ValueError: it returns another shape.
    """
    scores = logits.flatten(0, 1)
    left = (states == mask_id).sum(2).view(-1, 1, 1)
    result = processor(before.repeat_interleave(states.shape[1], dim=0), scores, cur_step=left)
    if result.shape != scores.shape:
        raise ValueError(f"logits_processor: expected scores of {list(scores.shape)}, got {list(result.shape)}")
    return result.unflatten(0, logits.shape[:2])


def without(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """`logits` `[..., V]` with -inf at `ids`."""
    logits = logits.clone()
    for token in ids:
        logits[..., token] = -torch.inf
    return logits


def ranked_last(logits: Tensor, proposal: Tensor, ids: tuple[int, ...], mask_id: int) -> Tensor:
    """Logits `[n, T, V]` under which positions that propose one of `ids` have confidence 0.

    The proposals `[n, T]` stay what they are. Elsewhere `ids` have no share in the softmax, as in LLaDA's `generate`.
    The mask id is never proposed but counts in the softmax: a huge mask logit leaves no probability to the proposal.
    """
    last = torch.zeros_like(proposal, dtype=torch.bool)
    for token in ids:
        last = last | (proposal == token)
    logits = logits.clone()
    for token in ids:
        logits[..., token] = logits[..., token].masked_fill(~last, -torch.inf)
    logits[..., mask_id] = logits[..., mask_id].masked_fill(last, torch.finfo(logits.dtype).max)
    return logits


def drawn(tokens: Tensor, k: Tensor, seeds: Tensor, mask_id: int) -> Tensor:
    """`k` `[n]` masked positions of every row of `tokens` `[n, T]`, drawn uniformly: bool `[n, T]`.

    A row's choice depends on its seed `[n]` and its own masks alone.
    """
    masked = tokens == mask_id
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    bits = philox_bits(seeds[:, None], torch.full_like(positions, NO_TOKEN), positions)
    order = bits.masked_fill(~masked, -1).argsort(dim=1, descending=True, stable=True)
    return masked & (order.argsort(dim=1) < k[:, None])
