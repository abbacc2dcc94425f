"""Which masked positions commit, decided by fdpp's step from the arguments of other people's selection functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fdpp.rules import Factor, Frechet, Quota, Rule, Threshold
from fdpp.selection import DTYPES, MAX_POSITIONS
from fdpp.step.operators import prefix_step
from fdpp.step.terms import Terms

Criterion = tuple[type[Rule], Any]
"""A rule and its number, one for all sequences or a tensor with one for each."""


def by_quota_or_threshold(num_transfer_tokens: Any, threshold: Any) -> Criterion:
    return (Quota, num_transfer_tokens) if threshold is None else (Threshold, threshold)


def by_factor(num_transfer_tokens: Any, factor: Any) -> Criterion:
    return Factor, factor


def by_margin(margin: Any) -> Criterion:
    return Frechet, margin


def by_any(num_transfer_tokens: Any, threshold: Any, factor: Any) -> Criterion:
    return by_quota_or_threshold(num_transfer_tokens, threshold) if factor is None else (Factor, factor)


def transferred(
    logits: Tensor, temperature: float, remasking: str, mask_index: Tensor, x: Tensor, criterion: Criterion
) -> tuple[Tensor, Tensor] | None:
    """`(x0, transfer_index)` as `fdpp.patching.scripts` has it, or None for a call that the step cannot reproduce."""
    rule, number = criterion
    if temperature != 0 or remasking != "low_confidence" or not fits(logits, mask_index, x, number):
        return None
    params = torch.zeros(x.shape[0], 3, dtype=torch.float64, device=x.device)
    params[:, 0] = number.flatten().to(x.device) if isinstance(number, Tensor) else number
    run = transfer_op if torch.compiler.is_compiling() else transfer
    try:
        x0, committed = run(logits, mask_index, x, params, rule.key())
    except SpreadError:
        return None
    return x0, committed & (params[:, :1] > 0) if rule is Quota else committed


def fits(logits: Tensor, mask_index: Tensor, x: Tensor, number: Any) -> bool:
    """Whether fdpp's step takes these arguments."""
    return (
        (number.numel() in (1, x.shape[0]) if isinstance(number, Tensor) else isinstance(number, (int, float)))
        and x.dim() == 2
        and logits.shape[:-1] == mask_index.shape == x.shape
        and logits.dtype in DTYPES
        and (mask_index.dtype, x.dtype) == (torch.bool, torch.int64)
        and logits.device == mask_index.device == x.device
        and x.device.type in ("cpu", "cuda")
    )


class SpreadError(ValueError):
    """The masked positions span more columns than a step takes."""


def transfer(logits: Tensor, mask_index: Tensor, x: Tensor, params: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """`(x0, transfer_index)` by the rule with the key `rule` and the numbers `params` `[B, 3]`."""
    x0 = x.clone(memory_format=torch.contiguous_format)
    transfer_index = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    mask = mask_index.cpu()
    columns = mask.any(0).nonzero().flatten().tolist()
    if not columns:
        return x0, transfer_index
    block = slice(columns[0], columns[-1] + 1)
    if block.stop - block.start > MAX_POSITIONS:
        raise SpreadError(
            f"mask_index: expected masked positions within {MAX_POSITIONS} columns, got {block.stop - block.start}"
        )
    held = x.cpu()[mask].unique().tolist()
    mask_id = held[0] if len(held) == 1 else -1
    active = mask_index[:, block]
    tokens = x[:, block].masked_fill(active, mask_id)
    selection = prefix_step(logits[:, block].detach(), tokens, active, Terms(params, rule, mask_id))
    x0[:, block] = selection.proposal
    transfer_index[:, block] = selection.committed
    return x0, transfer_index


# One operator for compiled callers: the mask id is data, and to read it would break their graph.
transfer_op = torch.library.custom_op("fdpp::transfer", transfer, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))


@transfer_op.register_fake
def _(logits, mask_index, x, params, rule):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bool)
