"""Prompts that come as embeddings, as a vision model's own code prepares them: fed in the place of their ids'."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.state import BlockState, Window


def check_embeds(embeds: Any, model: DiffusionModel) -> Tensor:
    """`embeds`; `ValueError` unless it is `[B, P, d_model]` of floating point on the model's device."""
    width, device = model.config.hidden_size, next(iter(model.parameters())).device
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or not embeds.is_floating_point() or not embeds.shape[0]:
        got = f"{list(embeds.shape)} {embeds.dtype}" if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"inputs_embeds: expected [B, P, {width}] of floating point, got {got}")
    if embeds.shape[2] != width or embeds.device != device:
        raise ValueError(
            f"inputs_embeds: expected {width} channels on {device}, got {embeds.shape[2]} on {embeds.device}"
        )
    return embeds.detach()


def copied(embeds: Tensor, input_ids: Tensor, copies: int) -> Tensor:
    """Every prompt of `embeds` so many times, as in `input_ids`; `ValueError` unless these are of as many columns."""
    B, P, _ = embeds.shape
    if input_ids.shape != (B * copies, P):
        came = [input_ids.shape[0] // copies, input_ids.shape[1]]
        raise ValueError(f"inputs_embeds: expected those of input_ids {came}, got {[B, P]}")
    return embeds.repeat_interleave(copies, 0)


def check_settings(config: DiffusionGenerationConfig) -> None:
    """Refuse settings beside which a prompt cannot be embeddings."""
    if config.max_new_tokens == 0:
        raise ValueError("inputs_embeds: max_new_tokens=0 fills the masks of a prompt, expected at least 1")


def for_all_columns(embeds: Tensor, before: int, length: int) -> tuple[Tensor, Tensor]:
    """`embeds` `[b, P, d_model]`, `before` columns on their left, over all `length` columns of the sequences.

    Also how many columns from the left have their embedding given, int64 `[b]`.
    """
    stop = before + embeds.shape[1]
    given = torch.full((embeds.shape[0],), stop, dtype=torch.int64, device=embeds.device)
    return F.pad(embeds, (0, 0, before, length - stop)), given


def embeddings(embedding: Any, tokens: Tensor, state: BlockState, window: Window) -> Tensor:
    """What is fed for `tokens` `[b, D, n]` of the window, and of rows beside it: `[b, D, n, d_model]`."""
    assert state.embeds is not None and state.embedded is not None
    fed, own = window.fed, embedding(tokens)
    columns = torch.arange(fed.start, fed.stop, device=tokens.device) if isinstance(fed, slice) else fed
    given = (columns < state.embedded[:, None])[:, None, :, None]
    n = columns.shape[0]
    own, beside = own.tensor_split((n,), dim=2)
    own = torch.where(given, state.embeds[:, fed].to(own.dtype)[:, None], own)
    return torch.cat((own, beside), dim=2) if beside.shape[2] else own
