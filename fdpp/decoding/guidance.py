"""Classifier-free guidance: what a sequence's prompt changes in the logits, enlarged."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.attention.cache import marked
from fdpp.decoding.state import BlockState, Window


def with_unconditional(state: BlockState, tokens: Tensor, window: Window, mask_id: int) -> tuple[BlockState, Tensor]:
    """`tokens` `[b, D, n]` of the window, each sequence followed by itself with its prompt masked: `[2b, D, n]`.

    The prompt is what no step has committed. The returned state has what these rows are fed with: positions, padding,
    and the embeddings of the prompts that are not masked.
    """
    decoded = marked(state.commit_step[:, window.fed] >= 0, window.inner)
    unconditional = torch.where(decoded[:, None], tokens, mask_id)
    embedded = state.embedded
    if embedded is not None:
        embedded = torch.stack((embedded, torch.zeros_like(embedded)), dim=1).flatten()
    twice = state._replace(
        position_ids=state.position_ids.repeat_interleave(2, dim=0),
        padding=None if state.padding is None else state.padding.repeat_interleave(2, dim=0),
        embeds=None if state.embeds is None else state.embeds.repeat_interleave(2, dim=0),
        embedded=embedded,
    )
    return twice, torch.stack((tokens, unconditional), dim=1).flatten(0, 1)


def guided(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, as LLaDA's `generate` has it: u + (scale + 1)(l - u), in the logits' dtype.

    `logits` `[2b, ...]` are rows l and u in turns (`with_unconditional`); the result is `[b, ...]`.
    """
    conditional, unconditional = logits.unflatten(0, (-1, 2)).unbind(1)
    return unconditional + (scale + 1.0) * (conditional - unconditional)
