"""Qwen's layers, which Dream, SDAR and Fast-dLLM v2 were trained on from, under their published names.

RMSNorm, SwiGLU, rotary positions and grouped key heads. A family says whether queries, keys and values have biases, as
in Qwen2.5, and whether queries and keys have norms, as in Qwen3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import nn

from fdpp.models.block import Block, Layers, RMSNorm
from fdpp.models.joined import Joined
from fdpp.models.language_model import DiffusionLM
from fdpp.models.qwen_config import QwenConfig
from fdpp.models.transformer import Transformer


class Attention(nn.Module):
    """Holds a block's attention layers, under the published names."""

    def __init__(self, config: QwenConfig, head_size: int, biased: bool, normed: bool) -> None:
        super().__init__()
        d_model, size = config.hidden_size, config.num_attention_heads * head_size
        kv_size = config.num_key_value_heads * head_size
        self.q_proj = nn.Linear(d_model, size, bias=biased)
        self.k_proj = nn.Linear(d_model, kv_size, bias=biased)
        self.v_proj = nn.Linear(d_model, kv_size, bias=biased)
        self.o_proj = nn.Linear(size, d_model, bias=False)
        if normed:
            self.q_norm = RMSNorm(head_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_size, config.rms_norm_eps)


class MLP(nn.Module):
    """Holds a block's SwiGLU layers, under the published names."""

    def __init__(self, config: QwenConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class QwenBlock(Block):
    """A block with its layers in two holders, which are never called themselves.

    Attributes of the class:
        biased: whether queries, keys and values have biases.
        normed: whether every query and key is normalised before its rotation.
    """

    biased: ClassVar[bool] = False
    normed: ClassVar[bool] = False

    def __init__(self, config: QwenConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.self_attn = Attention(config, self.head_size, self.biased, self.normed)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        qkv = "q_proj", "k_proj", "v_proj"
        self.qkv = Joined(self.self_attn._modules, *qkv, biased=self.biased)
        if self.biased:
            self.qkv_bias = Joined(self.self_attn._modules, *qkv, biased=True, what="bias")
        self.gate_up = Joined(self.mlp._modules, "gate_proj", "up_proj")

    def layers(self) -> Layers:
        attn, mlp = self.self_attn, self.mlp
        attention = self.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
        norms = (attn.q_norm, attn.k_norm) if self.normed else ()
        return Layers(*attention, self.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj, *norms)


class QwenTransformer(Transformer):
    """The transformer up to its final norm; a family names its `block_class` and perhaps its `embedding`."""

    block_class: ClassVar[type[Block]]
    embedding: ClassVar[str] = "embed_tokens"

    def __init__(self, config: QwenConfig) -> None:
        super().__init__(config)
        self.add_module(self.embedding, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(self.block_class(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @property
    def blocks(self) -> Sequence[Block]:
        return self.layers  # type: ignore[return-value]

    @property
    def final_norm(self) -> nn.Module:
        return self.norm

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule(self.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self, self.embedding, value)


class QwenLM(DiffusionLM):
    """A transformer of Qwen's layers with its head, which may be the embedding."""

    _tp_plan = {"lm_head": "colwise"}  # noqa: RUF012
    model: QwenTransformer
