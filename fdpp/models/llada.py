"""LLaDA (Nie et al., Large Language Diffusion Models, arXiv 2502.09992): LLaDA-8B, LLaDA-1.5 and their fine-tunes.

Bidirectional attention, RMSNorm, SwiGLU, rotary positions, no biases; a masked position's own row predicts its token.
The parameter names are those of the published checkpoints, so their safetensors load without a conversion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fdpp.models.block import Block, Layers, RMSNorm
from fdpp.models.joined import Joined
from fdpp.models.language_model import DiffusionLM
from fdpp.models.llada_config import LLaDAConfig
from fdpp.models.transformer import Transformer

LAYERS = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
"""A block's layers in the order of `Layers`."""


class LLaDABlock(Block):
    """A block with its layers side by side."""

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__(config, layer)
        d_model, kv_size = config.d_model, config.n_kv_heads * self.head_size
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, kv_size, bias=False)
        self.v_proj = nn.Linear(d_model, kv_size, bias=False)
        self.attn_out = nn.Linear(d_model, d_model, bias=False)
        self.attn_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.ff_norm = RMSNorm(d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, d_model, bias=False)
        self.qkv = Joined(self._modules, "q_proj", "k_proj", "v_proj")
        self.gate_up = Joined(self._modules, "ff_proj", "up_proj")

    def layers(self) -> Layers:
        # A module finds its attributes ten times as slowly.
        held: Any = self._modules
        return Layers(*[held[name] for name in LAYERS])


class LLaDAModel(Transformer):
    """The transformer up to its final norm; it also holds the head's weight, as the published checkpoints do."""

    config_class = LLaDAConfig
    _no_split_modules = ("LLaDABlock",)
    transformer: Any

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config, layer) for layer in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(parts)
        self.post_init()

    @property
    def blocks(self) -> Sequence[Block]:
        blocks: Sequence[Block] = self.transformer["blocks"]
        return blocks

    @property
    def final_norm(self) -> nn.Module:
        return self.transformer["ln_f"]

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value


class LLaDAModelLM(DiffusionLM):
    """LLaDA with its language-model head and `generate`."""

    config_class = LLaDAConfig
    transformer_class = LLaDAModel
    published = "LLaDAModelLM"
    _no_split_modules = ("LLaDABlock",)
    model: LLaDAModel

    def make_head(self) -> None:
        """The transformer holds it."""

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.weight_tying else self.model.transformer["ff_out"]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["ff_out"] = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers; also sets `config.embedding_size`, the rows that a checkpoint has."""
        embedding: Any = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = embedding.weight.shape[0]
        return embedding
