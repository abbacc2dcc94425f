"""A family's transformer up to its final norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fdpp.attention.cache import BlockCache
from fdpp.attention.rotary import rotary_angles
from fdpp.models.block import Block, RMSNorm, rotary_dim_of
from fdpp.models.experts import Router
from fdpp.models.layers import keys_to_see
from fdpp.models.linear import is_untouched


class DiffusionPreTrainedModel(PreTrainedModel):
    """What transformers asks of a model, with or without a head. The configuration has transformers' names."""

    config: Any
    base_model_prefix = "model"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, Router):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            nn.init.zeros_(module.expert_bias)


class Transformer(DiffusionPreTrainedModel):
    """Embedding, blocks and final norm. A family says under which names it has them."""

    @property
    def blocks(self) -> Sequence[Block]:
        raise NotImplementedError

    @property
    def final_norm(self) -> nn.Module:
        raise NotImplementedError

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BlockCache | None = None,
        start: int | Tensor = 0,
        hidden_states: list[Tensor] | None = None,
        wanted: slice | Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[B, T, d_model]` after the final norm of `input_ids` `[B, T]`.

        Args:
            attention_mask: `[B, S]`, `[B, T, S]` or `[B, heads or 1, T, S]`, True or 1 at keys to see (S: the cache's
                length, else T), see `fdpp.models.layers.keys_to_see`. None: every position sees every other.
            position_ids: `[B, T]`, by default the columns.
            cache: replaces its keys and values at the T columns by those of this forward; attention is over all S.
            start: the first column, or all of them, int64 `[T]`.
            hidden_states: a list, which receives the input of every block and the returned tensor.
            wanted: a slice or indices `[m]` of the T positions: only their hidden states are returned,
                `[B, m, d_model]`, and the last block computes no others.
            inputs_embeds: `[B, T, d_model]`, what stands in the place of the ids' embeddings.
        """
        B, T = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:2]
        device = input_ids.device if inputs_embeds is None else inputs_embeds.device
        config = self.config
        if position_ids is None:
            at = torch.arange(start, start + T, device=device) if isinstance(start, int) else start
            position_ids = at[None]
        if attention_mask is not None:
            keys = T if cache is None else None
            attention_mask = keys_to_see(attention_mask, B, T, keys, config.num_attention_heads)
        embedding = self.get_input_embeddings()
        x = embedding(input_ids) if inputs_embeds is None else inputs_embeds
        # On a GPU a block overwrites its input, which is a hook's or the caller's here.
        if inputs_embeds is not None or not is_untouched(embedding):
            x = x.clone()
        angles = rotary_angles(position_ids, rotary_dim_of(config), config.rope_theta)
        for block in self.blocks:
            if hidden_states is not None:
                hidden_states.append(x.clone())
            last = block.layer == config.num_hidden_layers - 1
            x = block(x, angles, attention_mask, cache, start, wanted if last else None)
        x = self.final_norm(x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x
