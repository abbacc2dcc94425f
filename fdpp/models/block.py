"""The transformer block that families share: pre-norm, attention over all positions, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdpp.attention.cache import BlockCache, attend
from fdpp.attention.rotary import Angles, rotate
from fdpp.kernels.layers import HeadNorms
from fdpp.models.joined import Joined
from fdpp.models.layers import (
    attention_inputs,
    attention_inputs_gpu,
    attention_output,
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
    """The layers of a block, in the order in which they run; `q` to `v` have biases all together or not at all.

    `q`, `k` and `v` are one and the same layer where it projects all three, queries first. `gate` to `down` are None
    in a block with a `feed_forward` of its own. `q_norm` and `k_norm` normalise each head before it is rotated.
    """

    norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    ff_norm: nn.Module
    gate: nn.Module | None
    up: nn.Module | None
    down: nn.Module | None
    q_norm: nn.Module | None = None
    k_norm: nn.Module | None = None


def head_size_of(config: Any) -> int:
    """Channels of a head: `config.head_dim`, where a configuration has that, else an equal share of `hidden_size`."""
    size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return size


def rotary_dim_of(config: Any) -> int:
    """Channels of a head that turn with the position: `config.rotary_dim`, where there is that, else all."""
    size: int = getattr(config, "rotary_dim", None) or head_size_of(config)
    return size


class Block(nn.Module):
    """A block of a family that names its layers.

    Args:
        config: with transformers' names, `hidden_size`, `num_attention_heads` and `num_key_value_heads`, and perhaps
            `head_dim`.
        layer: the block's number.

    Attributes:
        qkv, gate_up: the weights that read the same input, as one matrix; `gate_up` is None in a block with a
            `feed_forward` of its own.
        qkv_bias: the biases that belong to `qkv`; None in a family without.
        compile_layers: see `DiffusionLM.compile_layers`.
    """

    qkv: Joined
    gate_up: Joined | None = None
    qkv_bias: Joined | None = None

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_size = head_size_of(config)
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
        layers, qkv = self.layers(), self.qkv.matrix()
        gate_up = None if self.gate_up is None else self.gate_up.matrix()
        bias = None if self.qkv_bias is None else self.qkv_bias.matrix()
        fused = qkv is not None and is_product(layers.out)
        fused = fused and (self.gate_up is None or (gate_up is not None and is_product(layers.down)))
        normed = [norm for norm in (layers.norm, layers.ff_norm, layers.q_norm, layers.k_norm) if norm is not None]
        fused = fused and all(type(norm) is RMSNorm and is_untouched(norm) for norm in normed)
        fused = fused and (self.qkv_bias is None or bias is not None)
        run: Callable[..., Any] = compiled if self.compile_layers else lambda function: function
        norm: Any = layers.norm
        stored, heads, norms = False, (self.n_heads, self.n_kv_heads), head_norms(layers) if fused else None
        if fused and qkv is not None and not self.compile_layers and on_kernels(x):
            place = None if cache is None else partial(cache.place, self.layer, start)
            q, k, v, stored = attention_inputs_gpu(x, norm.weight, qkv, angles, norm.eps, *heads, place, bias, norms)
            # `block_output` overwrites its input, which a hook on this block may keep.
            x = x if is_untouched(self) else x.clone()
        elif fused:
            q, k, v = run(attention_inputs)(x, norm.weight, qkv, angles, norm.eps, *heads, bias, norms)
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
        norm = layers.ff_norm
        if fused and gate_up is not None and layers.down is not None:
            weights = layers.out.weight, norm.weight, gate_up, layers.down.weight
            return run(block_output)(x, h, *weights, norm.eps)
        if fused:
            x, h = run(attention_output)(x, h, layers.out.weight, norm.weight, norm.eps)
        else:
            x = x + apply(layers.out, h.transpose(1, 2).flatten(2))
            h = norm(x)
        return x + self.feed_forward(layers, h)

    def feed_forward(self, layers: Layers, h: Tensor) -> Tensor:
        """What a block adds `[B, T, d_model]` after its attention, of the normalised `h`: SwiGLU, layer by layer.

        A block with another one overrides this and has no `gate_up`; all else of it may then still be fused.
        """
        assert layers.gate is not None and layers.up is not None and layers.down is not None
        return apply(layers.down, swiglu(apply(layers.gate, h), apply(layers.up, h)))

    def heads(self, layers: Layers, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """`attention_inputs`, layer by layer."""
        h = layers.norm(x)
        parts: Sequence[Tensor]
        if layers.k is layers.q:
            sizes = [n * self.head_size for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads)]
            parts = apply(layers.q, h).split(sizes, dim=2)
        else:
            parts = [apply(layer, h) for layer in (layers.q, layers.k, layers.v)]
        q, k, v = (part.unflatten(2, (-1, self.head_size)) for part in parts)
        if layers.q_norm is not None and layers.k_norm is not None:
            q, k = layers.q_norm(q), layers.k_norm(k)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return rotate(q, angles), rotate(k, angles), v


def head_norms(layers: Layers) -> HeadNorms | None:
    """The norms of queries and keys as their weights, where a block has them."""
    if layers.q_norm is None or layers.k_norm is None:
        return None
    q, k = layers.q_norm, layers.k_norm
    return HeadNorms(q.weight, k.weight, q.eps)
