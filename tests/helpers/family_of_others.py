"""A family of somebody else's, whole: its configuration, the names of its layers, where its logits come from.

Nothing in fdpp knows of it. Its layers lie in lists, its head is the embedding, and its rows predict the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small import SMALL
from torch import nn
from transformers import PretrainedConfig

from fdpp.models.block import Block, Layers, RMSNorm
from fdpp.models.joined import Joined
from fdpp.models.language_model import DiffusionLM
from fdpp.models.transformer import Transformer


class GistConfig(PretrainedConfig):
    model_type = "gist"

    def __init__(
        self,
        vocab_size: int = 64,
        hidden_size: int = 32,
        intermediate_size: int = 48,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 2,
        max_position_embeddings: int = 256,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.5,
        mask_token_id: int = 62,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.max_position_embeddings = num_key_value_heads, max_position_embeddings
        self.rope_theta, self.rms_norm_eps = rope_theta, rms_norm_eps
        self.initializer_range, self.mask_token_id = initializer_range, mask_token_id
        super().__init__(**{"pad_token_id": 61, "eos_token_id": 63, **kwargs, "tie_word_embeddings": True})


class GistBlock(Block):
    def __init__(self, config: GistConfig, layer: int) -> None:
        super().__init__(config, layer)
        d, kv, hidden = config.hidden_size, config.num_key_value_heads * self.head_size, config.intermediate_size
        self.norms = nn.ModuleList(RMSNorm(d, config.rms_norm_eps) for _ in range(2))
        self.attention = nn.ModuleList(nn.Linear(d, size, bias=False) for size in (d, kv, kv, d))
        self.feed = nn.ModuleDict({name: nn.Linear(d, hidden, bias=False) for name in ("gate", "up")})
        self.down = nn.Linear(hidden, d, bias=False)
        self.qkv = Joined(self.attention._modules, "0", "1", "2")
        self.gate_up = Joined(self.feed._modules, "gate", "up")

    def layers(self) -> Layers:
        first, second = self.norms
        return Layers(first, *self.attention, second, self.feed["gate"], self.feed["up"], self.down)


class GistTransformer(Transformer):
    config_class = GistConfig

    def __init__(self, config: GistConfig) -> None:
        super().__init__(config)
        self.words: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(GistBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.last = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @property
    def blocks(self) -> Sequence[Block]:
        return self.stack  # type: ignore[return-value]

    @property
    def final_norm(self) -> nn.Module:
        return self.last

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.words = value


class GistLM(DiffusionLM):
    config_class = GistConfig
    transformer_class = GistTransformer
    shift = 1

    def make_head(self) -> None:
        """The embedding is the head."""

    def get_output_embeddings(self) -> nn.Module | None:
        return None


def small_gist(seed: int = 0, **config: Any) -> GistLM:
    """The same seed and configuration give the same weights, as with `small_model`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GistLM(GistConfig(**config)).eval()


FAMILIES = {**SMALL, "Gist": small_gist}
"""A small model of every family, that of others too."""

EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)

TIED: dict[str, dict[str, Any]] = {
    "LLaDA": {"weight_tying": True},
    "Dream": {"tie_word_embeddings": True},
    "Gist": {},
}
"""What makes the embedding a family's head."""
