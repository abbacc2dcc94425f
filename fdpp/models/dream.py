"""Dream (Ye et al., Dream 7B: Diffusion Large Language Models, arXiv 2508.15487): Dream-v0-Base-7B, -Instruct-7B,
Dream-Coder and others of this architecture.

A Qwen2.5 transformer with bidirectional attention: RMSNorm, SwiGLU, rotary positions, grouped key heads, biases on
queries, keys and values. It was trained on from an autoregressive model, and so the row of a position predicts the next
position's token. The parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fdpp.models.block import Block, Layers, RMSNorm
from fdpp.models.dream_config import DreamConfig
from fdpp.models.joined import Joined
from fdpp.models.language_model import DiffusionLM
from fdpp.models.transformer import Transformer


class Attention(nn.Module):
    """Holds a block's attention layers, under the published names."""

    def __init__(self, config: DreamConfig, head_size: int) -> None:
        super().__init__()
        d_model, kv_size = config.hidden_size, config.num_key_value_heads * head_size
        self.q_proj = nn.Linear(d_model, d_model, bias=True)
        self.k_proj = nn.Linear(d_model, kv_size, bias=True)
        self.v_proj = nn.Linear(d_model, kv_size, bias=True)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)


class MLP(nn.Module):
    """Holds a block's SwiGLU layers, under the published names."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class DreamBlock(Block):
    """A block with its layers in two holders, which are never called themselves."""

    def __init__(self, config: DreamConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.self_attn = Attention(config, self.head_size)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        qkv = "q_proj", "k_proj", "v_proj"
        self.qkv = Joined(self.self_attn._modules, *qkv, biased=True)
        self.qkv_bias = Joined(self.self_attn._modules, *qkv, biased=True, what="bias")
        self.gate_up = Joined(self.mlp._modules, "gate_proj", "up_proj")

    def layers(self) -> Layers:
        attn, mlp = self.self_attn, self.mlp
        attention = self.input_layernorm, attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj
        return Layers(*attention, self.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


class DreamTransformer(Transformer):
    """The transformer up to its final norm."""

    config_class = DreamConfig
    _no_split_modules = ("DreamBlock",)

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @property
    def blocks(self) -> Sequence[Block]:
        return self.layers  # type: ignore[return-value]

    @property
    def final_norm(self) -> nn.Module:
        return self.norm

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value


class DreamModelLM(DiffusionLM):
    """Dream with its language-model head and `generate`."""

    config_class = DreamConfig
    transformer_class = DreamTransformer
    published = "DreamModel"
    shift = 1
    _no_split_modules = ("DreamBlock",)
    _tp_plan = {"lm_head": "colwise"}  # noqa: RUF012
    model: DreamTransformer

    def make_head(self) -> None:
        if not self.config.tie_word_embeddings:
            self.lm_head: nn.Module = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.tie_word_embeddings else self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value
