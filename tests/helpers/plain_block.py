"""A forward of a published block-causal folder as its program has it, from `data/block/FORMAT.md`: no code of fdpp.

Every operator rounds to the weights' dtype, RMSNorm and rotary angles are in float32 as published (in float64 where the
weights are). Read from the published key names; the fields that two families do not share are told apart by their keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor


def block_causal(length: int, block_length: int) -> Tensor:
    """`[L, L]` bool, which keys a query sees: those of its own block and of all before."""
    block = torch.arange(length) // block_length
    return block[:, None] >= block[None, :]


class PlainQwen:
    """SDAR or Fast-dLLM v2."""

    def __init__(self, folder: Path, dtype: torch.dtype, rounded: torch.dtype | None = None) -> None:
        """`rounded`: the weights are those of this dtype first."""
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        held = load_file(folder / "model.safetensors")
        self.weights = {name: weight.to(rounded or dtype).to(dtype) for name, weight in held.items()}
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.size = self.config.get("head_dim") or self.config["hidden_size"] // self.heads
        self.wide = dtype if dtype == torch.float64 else torch.float32

    def norm(self, name: str, x: Tensor) -> Tensor:
        wide = x.to(self.wide)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return self.weights[f"{name}.weight"] * wide.to(x.dtype)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def rotated(self, x: Tensor) -> Tensor:
        """`x` `[B, H, T, hd]`."""
        rates = self.config["rope_theta"] ** -(torch.arange(0, self.size, 2, dtype=self.wide) / self.size)
        angles = torch.outer(torch.arange(x.shape[2], dtype=self.wide), rates).repeat(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos().to(x.dtype) + torch.cat((-second, first), -1) * angles.sin().to(x.dtype)

    @torch.no_grad()
    def __call__(self, x: Tensor, block_length: int) -> Tensor:
        """Logits `[B, L, V]` of `x` `[B, L]`, row by row as the head gives them."""
        visible = block_causal(x.shape[1], block_length)
        hidden = self.weights["model.embed_tokens.weight"][x]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            h = self.norm(f"{name}.input_layernorm", hidden)
            parts = (self.linear(f"{name}.self_attn.{part}_proj", h).unflatten(2, (-1, self.size)) for part in "qkv")
            q, k, v = parts
            if f"{name}.self_attn.q_norm.weight" in self.weights:
                q, k = self.norm(f"{name}.self_attn.q_norm", q), self.norm(f"{name}.self_attn.k_norm", k)
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (self.rotated(k), v))
            scores = (self.rotated(q) @ k.transpose(2, 3)) * self.size**-0.5
            p = scores.masked_fill(~visible, -torch.inf).to(self.wide).softmax(-1).to(scores.dtype)
            hidden = hidden + self.linear(f"{name}.self_attn.o_proj", (p @ v).transpose(1, 2).flatten(2))
            h = self.norm(f"{name}.post_attention_layernorm", hidden)
            gated = F.silu(self.linear(f"{name}.mlp.gate_proj", h)) * self.linear(f"{name}.mlp.up_proj", h)
            hidden = hidden + self.linear(f"{name}.mlp.down_proj", gated)
        return self.linear("lm_head", self.norm("model.norm", hidden))
