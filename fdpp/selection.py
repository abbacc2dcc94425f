"""The result of a step, which positions it may commit, and the checks that all operators share."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_POSITIONS = 1024


class Selection(NamedTuple):
    """What a step decides for `[B, T]` positions.

    Attributes:
        tokens: `[B, T]` int64, a new tensor: the tokens with the committed proposals written in.
        proposal: `[B, T]` int64, the proposed token at active masked positions, the token itself elsewhere.
        confidence: `[B, T]` float32, softmax(logits) at the proposal at active masked positions, 0 elsewhere.
        committed: `[B, T]` bool.
        remaining: `[B]` int32, active positions still masked after this step.
        nonfinite: `[B]` int32, active masked positions whose logits held NaN or +inf, or nothing but -inf.
    """

    tokens: Tensor
    proposal: Tensor
    confidence: Tensor
    committed: Tensor
    remaining: Tensor
    nonfinite: Tensor


def candidates(tokens: Tensor, mask_id: int, active: Tensor | None = None) -> Tensor:
    """The positions that may commit, bool `[B, T]`."""
    return tokens == mask_id if active is None else (tokens == mask_id) & active


def recommit(selection: Selection, tokens: Tensor, candidate: Tensor, committed: Tensor) -> Selection:
    """`selection`, a step from `tokens`, with another commit mask `[B, T]` that holds `candidate` positions alone."""
    # Not by `_replace`, which PyTorch 2.11's compiler cannot follow.
    return Selection(
        tokens=torch.where(committed, selection.proposal, tokens),
        proposal=selection.proposal,
        confidence=selection.confidence,
        committed=committed,
        remaining=(candidate & ~committed).sum(1, dtype=torch.int32),
        nonfinite=selection.nonfinite,
    )


def masked_again(selection: Selection, taken: Tensor, mask_id: int) -> Selection:
    """`selection` with the positions `taken` `[B, T]`, of which it commits none, as masks."""
    tokens = selection.tokens.masked_fill(taken, mask_id)
    return selection._replace(tokens=tokens, remaining=(tokens == mask_id).sum(1, dtype=torch.int32))


def rank(value: Tensor, descending: bool = False) -> Tensor:
    """Where each position of `value` `[..., T]` comes in order, from 0; the lower position first among equals."""
    return value.argsort(dim=-1, descending=descending, stable=True).argsort(dim=-1)


def expect(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise `ValueError` unless the argument `name` has this shape, dtype and device."""
    if tuple(value.shape) != shape or value.dtype != dtype or value.device != device:
        raise ValueError(
            f"{name}: expected {list(shape)} {dtype} on {device}, "
            f"got {list(value.shape)} {value.dtype} on {value.device}"
        )


def check(logits: Tensor, tokens: Tensor, active: Tensor | None, seeds: Tensor | None) -> None:
    """Raise `ValueError` that names the argument of a step, what was expected and what came."""
    if logits.dim() != 3 or logits.dtype not in DTYPES:
        raise ValueError(
            f"logits: expected [B, T, V] in bfloat16, float16 or float32, got {list(logits.shape)} in {logits.dtype}"
        )
    B, T, V = logits.shape
    if T > MAX_POSITIONS or V == 0:
        raise ValueError(f"logits: expected at most {MAX_POSITIONS} positions and a vocabulary, got T={T}, V={V}")
    expect("tokens", tokens, (B, T), torch.int64, logits.device)
    if active is not None:
        expect("active", active, (B, T), torch.bool, logits.device)
    if seeds is not None:
        expect("seeds", seeds, (B,), torch.int64, logits.device)


def check_temperature(temperature: float) -> None:
    """Raise `ValueError` unless `temperature` is a finite number of at least 0."""
    if not isinstance(temperature, (int, float)) or not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number of at least 0, got {temperature!r}")


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
