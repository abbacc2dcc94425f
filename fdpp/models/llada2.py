"""LLaDA2 (Bie et al., LLaDA2.0: Scaling Up Diffusion Language Models to 100B, arXiv 2512.15745): LLaDA2.0-mini, -flash,
LLaDA2.1 and others of this architecture.

Full attention within a block of positions, causal between blocks; one projection for queries, keys and values, norms of
queries and keys, rotary positions on some of a head's channels; a mixture of experts in all layers but the first ones.
The parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fdpp.models.block import Block, Layers, RMSNorm
from fdpp.models.experts import MLP, MoE, Routing
from fdpp.models.joined import Joined
from fdpp.models.language_model import DiffusionLM
from fdpp.models.llada2_config import LLaDA2Config
from fdpp.models.qwen import QwenTransformer

PARALLEL = ("tp_plan", "tp_size", "device_mesh", "distributed_config")
"""Arguments of transformers' `from_pretrained` that ask for tensor or expert parallelism."""


class LLaDA2Attention(nn.Module):
    """Holds a block's attention layers, under the published names."""

    def __init__(self, config: LLaDA2Config, head_size: int) -> None:
        super().__init__()
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.query_key_value = nn.Linear(config.hidden_size, heads * head_size, bias=False)
        self.query_layernorm = RMSNorm(head_size, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(head_size, config.rms_norm_eps)
        self.dense = nn.Linear(config.num_attention_heads * head_size, config.hidden_size, bias=False)


class LLaDA2Block(Block):
    """A block with one projection for queries, keys and values; dense, or with experts."""

    mlp: MLP | MoE

    def __init__(self, config: LLaDA2Config, layer: int) -> None:
        super().__init__(config, layer)
        self.attention = LLaDA2Attention(config, self.head_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.qkv = Joined(self.attention._modules, "query_key_value")
        if layer < config.first_k_dense_replace:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
            self.gate_up = Joined(self.mlp._modules, "gate_proj", "up_proj")
        else:
            routing = Routing(
                config.num_experts_per_tok, config.n_group, config.topk_group, config.routed_scaling_factor
            )
            width, experts, shared = config.moe_intermediate_size, config.num_experts, config.num_shared_experts
            self.mlp = MoE(config.hidden_size, width, experts, shared, routing)

    def layers(self) -> Layers:
        attn, mlp = self.attention, self.mlp
        qkv, norms = attn.query_key_value, (attn.query_layernorm, attn.key_layernorm)
        attention = self.input_layernorm, qkv, qkv, qkv, attn.dense, self.post_attention_layernorm
        if isinstance(mlp, MoE):
            return Layers(*attention, None, None, None, *norms)
        return Layers(*attention, mlp.gate_proj, mlp.up_proj, mlp.down_proj, *norms)

    def joins(self) -> list[Joined]:
        return super().joins() + (self.mlp.joins() if isinstance(self.mlp, MoE) else [])

    def feed_forward(self, layers: Layers, h: Tensor) -> Tensor:
        return self.mlp(h) if layers.gate is None else super().feed_forward(layers, h)


class LLaDA2Transformer(QwenTransformer):
    """The transformer up to its final norm, of the parts that Qwen's has, too, but for its blocks."""

    config_class = LLaDA2Config
    block_class = LLaDA2Block
    embedding = "word_embeddings"
    _no_split_modules = ("LLaDA2Block",)


class LLaDA2ModelLM(DiffusionLM):
    """LLaDA2 with its language-model head and `generate`."""

    config_class = LLaDA2Config
    transformer_class = LLaDA2Transformer
    published = "LLaDA2MoeModelLM"
    block_causal = True
    _no_split_modules = ("LLaDA2Block",)
    model: LLaDA2Transformer

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `DiffusionLM.from_pretrained`.

        Raises:
            ValueError: as there; a request for tensor parallelism, whose styles split neither the one projection of
                queries, keys and values by heads nor experts without a sum over all processes for each.
        """
        asked = [f"{name}={kwargs[name]!r}" for name in PARALLEL if kwargs.get(name) is not None]
        if asked:
            raise ValueError(f"LLaDA2: expected one process, got {', '.join(asked)}; it is not sharded")
        return super().from_pretrained(*args, **kwargs)
