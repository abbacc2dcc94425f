"""What precedes a position: the tokens that an autoregressive decode would have when it comes to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fdpp.decoding.state import BlockState, Window


@dataclass(frozen=True)
class Contexts:
    """The contexts of positions. A position's context is the first `length` of its `tokens`.

    Attributes:
        tokens: `[..., L]` int64, a sequence's tokens in order, without padding and masks.
        length: `[...]` int64, how many of them stand before the position.
    """

    tokens: Tensor
    length: Tensor

    def at(self, chosen: Tensor) -> Contexts:
        """Those of some positions, by a bool mask of all."""
        return Contexts(self.tokens[chosen], self.length[chosen])

    def inside(self) -> Tensor:
        """Which of `tokens` belong to the context, `[..., L]` bool."""
        return torch.arange(self.tokens.shape[-1], device=self.tokens.device) < self.length[..., None]

    def last(self, n: int) -> tuple[Tensor, Tensor]:
        """The last n tokens of every context `[..., n]`, and whether it has as many `[...]`."""
        at = self.length[..., None] - torch.arange(n, 0, -1, device=self.length.device)
        return self.tokens.gather(-1, at.clamp(min=0)), self.length >= n


def contexts_of(state: BlockState, states: Tensor, window: Window, mask_id: int) -> Contexts:
    """The contexts of every position of the block, `[b, D, T]`, in the `states` `[b, D, T]` of `state`'s sequences.

    They hold the tokens before the block, then those before the position in the block that are committed. No operation
    waits for the device or has a shape that depends on data.
    """
    tokens = state.sequences[:, None].repeat(1, states.shape[1], 1)
    tokens[:, :, window.block] = states
    holds = tokens != mask_id
    if state.padding is not None:
        columns = torch.arange(tokens.shape[2], device=tokens.device)
        holds = holds & (columns >= state.padding[:, None, None])
    before = holds.cumsum(2) - holds.long()
    order = holds.logical_not().to(torch.uint8).argsort(dim=2, stable=True)
    length = before[:, :, window.block]
    return Contexts(tokens.gather(2, order)[:, :, None].expand(*length.shape, -1), length)
