"""Where the tokens of prompts and responses stand while a block-causal model decodes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.decoding.settings import DiffusionGenerationConfig


class Layout(NamedTuple):
    """Where the tokens of a text `[B, S]`, prompts and responses, stand while they are decoded, L columns a row.

    Rows are padded on the left by whole blocks, so that all begin to decode in the same columns, and all blocks lie on
    one grid.

    Attributes:
        text: `[B, S]` int64, as it is returned, but for what is decoded.
        response: columns of the text before its responses.
        tokens: `[B, L]` int64: padding, tokens, masks up to the end of the row's last block, padding.
        padding: `[B]` int64, columns on the left that hold no token, whole blocks.
        prompt: columns before the first block that is decoded.
        at: `[B, S]` int64, the column of each token of the text, not below 0.
        real: `[B, S]` bool, which columns of the text hold a token or a mask.
        source: `[B, L]` int64, the column of the text from which a column is taken.
        first: `[B]` int64, the column behind the last given token.
    """

    text: Tensor
    response: int
    tokens: Tensor
    padding: Tensor
    prompt: int
    at: Tensor
    real: Tensor
    source: Tensor
    first: Tensor

    @classmethod
    def of(
        cls, text: Tensor, response: int, real: Tensor, first: Tensor, grid: int, mask_id: int, pad_id: int
    ) -> Layout:
        """Of `text` `[B, S]`, left-padded where it is not `real`, whose first position to decode is `first` `[B]`."""
        S, device = text.shape[1], text.device
        length = real.sum(1)
        left = S - length
        before = first // grid * grid
        behind = (length + grid - 1) // grid * grid
        prompt, canvas = torch.stack((before.amax(), (behind - before).amax())).tolist()
        padding = prompt - before
        position = torch.arange(prompt + canvas, device=device) - padding[:, None]
        source = (position + left[:, None]).clamp(0, max(S - 1, 0))
        inside = (position >= 0) & (position < length[:, None])
        tokens = torch.where(inside, text.gather(1, source), pad_id)
        unfinished = (position >= length[:, None]) & (position < behind[:, None])
        tokens = tokens.masked_fill(unfinished, mask_id)
        at = (torch.arange(S, device=device) - left[:, None] + padding[:, None]).clamp(min=0)
        given = real & (text != mask_id)
        last = (torch.arange(1, S + 1, device=device) * given).amax(1) if S else left
        behind_given = torch.maximum(last - left, first) + padding
        return cls(text, response, tokens, padding, prompt, at, real, source, behind_given)

    @classmethod
    def of_prompts(
        cls, prompts: Tensor, attention_mask: Tensor | None, given: Tensor | None, config: DiffusionGenerationConfig
    ) -> Layout:
        """Of `prompts` `[B, P]` and masks behind them, or what is `given` `[B, max_new_tokens]` of the responses.

        `attention_mask` is of the prompts or of all of the text. A response begins behind the prompt or, where some of
        it is given, with its first mask.
        """
        assert config.mask_token_id is not None and config.pad_token_id is not None
        B, P = prompts.shape
        rest = prompts.new_full((B, config.max_new_tokens), config.mask_token_id) if given is None else given
        text = torch.cat((prompts, rest), dim=1)
        real = torch.ones_like(text, dtype=torch.bool)
        if attention_mask is not None:
            real[:, : attention_mask.shape[1]] = attention_mask
        before = torch.arange(text.shape[1], device=text.device) < P
        if given is not None:
            before = before | (((text == config.mask_token_id) & real & ~before).cumsum(1) == 0)
        first = (real & before).sum(1)
        return cls.of(text, P, real, first, config.per_block, config.mask_token_id, config.pad_token_id)

    def prompts(self) -> tuple[Tensor, Tensor | None]:
        """The columns before the first block, and their attention mask; None where there is no padding."""
        columns = torch.arange(self.prompt, device=self.tokens.device)
        mask = columns >= self.padding[:, None] if bool(self.padding.any()) else None
        return self.tokens[:, : self.prompt], mask

    def embedded(self, embeds: Tensor, extra: int) -> Tensor:
        """`embeds` `[B, P, d_model]` of the prompts in their columns, `[B, extra + L, d_model]`; others are arbitrary.

        `extra` columns are before those of the layout.
        """
        source = F.pad(self.source, (extra, 0)).clamp(max=max(embeds.shape[1] - 1, 0))
        return embeds.gather(1, source[:, :, None].expand(-1, -1, embeds.shape[2]))
