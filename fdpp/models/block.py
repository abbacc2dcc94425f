"""The transformer block that families share: pre-norm, attention over all positions, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdpp.attention.cache import BlockCache, attend
from fdpp.attention.rotary import Angles, rotate
from fdpp.models.joined import Joined
from fdpp.models.layers import (
    attention_inputs,
    attention_inputs_gpu,
    block_output,
    compiled,
    on_kernels,
    rms_norm,
    swiglu,
)
from fdpp.models.linear import apply, is_product, is_untouched


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)`, the quotient in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Layers(NamedTuple):
    """The layers of a block, in the order in which they run; `q` to `v` have biases all together or not at all."""

    norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    ff_norm: nn.Module
    gate: nn.Module
    up: nn.Module
    down: nn.Module


class Block(nn.Module):
    """A block of a family that names its layers.

    Args:
        config: with transformers' names, `hidden_size`, `num_attention_heads` and `num_key_value_heads`.
        layer: the block's number.

    Attributes:
        qkv, gate_up: the weights that read the same input, as one matrix.
        qkv_bias: the biases that belong to `qkv`; None in a family without.
        compile_layers: see `DiffusionLM.compile_layers`.
    """

    qkv: Joined
    gate_up: Joined
    qkv_bias: Joined | None = None

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.compile_layers = False

    def layers(self) -> Layers:
        """The layers as they are now: one may have been replaced."""
        raise NotImplementedError

    def joins(self) -> list[Joined]:
        """What is joined, for those who part or forbid it."""
        return [joined for joined in (self.qkv, self.gate_up, self.qkv_bias) if joined is not None]

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        attention_mask: Tensor | None,
        cache: BlockCache | None,
        start: int | Tensor,
        wanted: slice | Tensor | None = None,
    ) -> Tensor:
        layers, qkv, gate_up = self.layers(), self.qkv.matrix(), self.gate_up.matrix()
        bias = None if self.qkv_bias is None else self.qkv_bias.matrix()
        fused = qkv is not None and gate_up is not None and is_product(layers.out) and is_product(layers.down)
        fused = fused and all(type(norm) is RMSNorm and is_untouched(norm) for norm in (layers.norm, layers.ff_norm))
        fused = fused and (self.qkv_bias is None or bias is not None)
        run: Callable[..., Any] = compiled if self.compile_layers else lambda function: function
        norm: Any = layers.norm
        stored, heads = False, (self.n_heads, self.n_kv_heads)
        if fused and qkv is not None and not self.compile_layers and on_kernels(x):
            place = None if cache is None else partial(cache.place, self.layer, start)
            q, k, v, stored = attention_inputs_gpu(x, norm.weight, qkv, angles, norm.eps, *heads, place, bias)
            # `block_output` overwrites its input, which a hook on this block may keep.
            x = x if is_untouched(self) else x.clone()
        elif fused:
            q, k, v = run(attention_inputs)(x, norm.weight, qkv, angles, norm.eps, *heads, bias)
        else:
            q, k, v = self.heads(layers, x, angles)
        if wanted is not None:
            x, q = x[:, wanted].contiguous(), q[:, :, wanted]
            if attention_mask is not None and attention_mask.shape[2] > 1:
                attention_mask = attention_mask[:, :, wanted]
        if cache is None:
            h = attend(q, k, v, attention_mask)
        else:
            h = cache.attend(self.layer, q, k, v, attention_mask, start, stored, wanted)
        if fused:
            norm = layers.ff_norm
            weights = layers.out.weight, norm.weight, gate_up, layers.down.weight
            return run(block_output)(x, h, *weights, norm.eps)
        x = x + apply(layers.out, h.transpose(1, 2).flatten(2))
        h = layers.ff_norm(x)
        return x + apply(layers.down, swiglu(apply(layers.gate, h), apply(layers.up, h)))

    def heads(self, layers: Layers, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """`attention_inputs`, layer by layer."""
        h = layers.norm(x)
        parts = [apply(layer, h) for layer in (layers.q, layers.k, layers.v)]
        q, k, v = (part.unflatten(2, (-1, self.head_size)).transpose(1, 2) for part in parts)
        return rotate(q, angles), rotate(k, angles), v
