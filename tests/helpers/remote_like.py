"""A stand-in for the code that comes with LLaDA's checkpoints: its modules, their names and its configuration."""

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
