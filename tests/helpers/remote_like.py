"""Stand-ins for the code that comes with checkpoints of each family: modules, their names, configurations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"

    def __init__(self, use_cache: bool = False, **kwargs: Any) -> None:
        super().__init__(use_cache=use_cache, **{"flash_attention": False, "precision": "amp_bf16", **kwargs})


class RMSLayerNorm(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class LLaDALlamaBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, hidden = config, config.mlp_hidden_size
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.ff_out = nn.Linear(hidden, config.d_model, bias=False)
        self.dropout = nn.Dropout(0.0)
        self.attn_norm, self.ff_norm = RMSLayerNorm(config), RMSLayerNorm(config)
        kv_size = config.d_model // config.n_heads * config.n_kv_heads
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.ff_proj = nn.Linear(config.d_model, hidden, bias=False)
        self.up_proj = nn.Linear(config.d_model, hidden, bias=False)

    def rotated(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        frequency = self.config.rope_theta ** -(torch.arange(0, size, 2, device=x.device).float() / size)
        angle = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), frequency).repeat(1, 2)
        wide = x.float()
        turned = torch.cat((-wide[..., size // 2 :], wide[..., : size // 2]), dim=-1)
        return (wide * angle.cos() + turned * angle.sin()).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        h, heads = self.attn_norm(x), self.config.d_model // self.config.n_heads
        q, k, v = (p(h).unflatten(2, (-1, heads)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, enable_gqa=True)
        x = x + self.dropout(self.attn_out(h.transpose(1, 2).flatten(2)))
        h = self.ff_norm(x)
        return x + self.dropout(self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h)))


class LLaDAModel(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        size = config.embedding_size or config.vocab_size
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(size, config.d_model),
                "emb_drop": nn.Dropout(0.0),
                "ln_f": RMSLayerNorm(config),
                "blocks": nn.ModuleList(LLaDALlamaBlock(config) for _ in range(config.n_layers)),
            }
        )
        self.transformer["ff_out"] = (
            self.transformer["wte"] if config.weight_tying else nn.Linear(config.d_model, size, bias=False)
        )


class LLaDAModelLM(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)

    def forward(self, input_ids: Tensor, **nothing: None) -> CausalLMOutputWithPast:
        assert not any(nothing.values())
        transformer = self.model.transformer
        x = transformer.emb_drop(transformer.wte(input_ids))
        for block in transformer.blocks:
            x = block(x)
        h = transformer.ln_f(x)
        tied = self.config.weight_tying
        return CausalLMOutputWithPast(logits=F.linear(h, transformer.wte.weight) if tied else transformer.ff_out(h))


class DreamConfig(PretrainedConfig):
    model_type = "Dream"

    def __init__(self, rope_theta: float = 10000.0, use_cache: bool = False, **kwargs: Any) -> None:
        self.rope_theta, self.rope_scaling = rope_theta, None
        super().__init__(use_cache=use_cache, **{"use_sliding_window": False, "attention_dropout": 0.0, **kwargs})


class DreamRMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class DreamAttention(nn.Module):
    biased, normed = True, False

    def __init__(self, config: Any) -> None:
        super().__init__()
        size, biased = config.hidden_size, self.biased
        self.head_size = getattr(config, "head_dim", None) or size // config.num_attention_heads
        q_size, kv_size = (self.head_size * n for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(size, q_size, bias=biased)
        self.k_proj, self.v_proj = nn.Linear(size, kv_size, bias=biased), nn.Linear(size, kv_size, bias=biased)
        self.o_proj = nn.Linear(q_size, size, bias=False)
        if self.normed:
            self.q_norm, self.k_norm = (DreamRMSNorm(self.head_size, config.rms_norm_eps) for _ in range(2))
        frequency = config.rope_theta ** -(torch.arange(0, self.head_size, 2).float() / self.head_size)
        self.register_buffer("inv_freq", frequency, persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[-2], device=x.device).float(), self.inv_freq).repeat(1, 2)
        half = self.head_size // 2
        return x * angle.cos().to(x.dtype) + torch.cat((-x[..., half:], x[..., :half]), -1) * angle.sin().to(x.dtype)

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (project(h).unflatten(2, (-1, self.head_size)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        h = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v, mask, enable_gqa=True)
        return self.o_proj(h.transpose(1, 2).flatten(2))


class DreamMLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class DreamDecoderLayer(nn.Module):
    def __init__(self, config: Any, attention: type[DreamAttention] = DreamAttention) -> None:
        super().__init__()
        self.self_attn, self.mlp = attention(config), DreamMLP(config)
        self.input_layernorm = DreamRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DreamRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class DreamBaseModel(nn.Module):
    def __init__(self, config: Any, attention: type[DreamAttention] = DreamAttention) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DreamDecoderLayer(config, attention) for _ in range(config.num_hidden_layers))
        self.norm = DreamRMSNorm(config.hidden_size, config.rms_norm_eps)


class DreamModel(PreTrainedModel):
    """The row of a position predicts the next position's token."""

    config_class = DreamConfig
    base_model_prefix = "model"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, **nothing: None) -> CausalLMOutputWithPast:
        assert not any(nothing.values())
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x)
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(x)))

    def diffusion_generate(self, input_ids: Tensor) -> Tensor:
        """The published loop, of which a patch knows nothing."""
        return input_ids


class SDARConfig(DreamConfig):
    model_type = "sdar"


class SDARAttention(DreamAttention):
    biased, normed = False, True


class BlockCausalModel(PreTrainedModel):
    """What the code of both block-causal families has in common; the blocks' length is the configuration's."""

    base_model_prefix = "model"
    attention: type[DreamAttention] = DreamAttention
    length = "bd_size"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = DreamBaseModel(config, self.attention)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, **nothing: None) -> CausalLMOutputWithPast:
        assert not any(nothing.values())
        block = torch.arange(input_ids.shape[1]) // getattr(self.config, self.length)
        x = self.model.embed_tokens(input_ids)
        for layer in self.model.layers:
            x = layer(x, block[:, None] >= block)
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(x)))


class SDARForCausalLM(BlockCausalModel):
    config_class = SDARConfig
    attention = SDARAttention
    length = "block_size"


class Fast_dLLM_QwenConfig(DreamConfig):  # noqa: N801
    model_type = "Fast_dLLM_Qwen"


class Fast_dLLM_QwenForCausalLM(BlockCausalModel):  # noqa: N801
    config_class = Fast_dLLM_QwenConfig
