"""A transformer block around its attention, as functions of tensors that all layers share, so compiled once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.models.linear import linear

Angles = tuple[Tensor, Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `RMSNorm`."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return weight * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rotary_angles(position_ids: Tensor, head_size: int, theta: float) -> Angles:
    """Cosines and sines `[B, 1, T, head_size]` (float32) of the rotary angles at `position_ids` `[B, T]`.

    The sines of the first half are negated, as `rotate` takes them.
    """
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angles = position_ids[:, None, :, None].float() * (1.0 / theta**exponent)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate pairs of channels, one from each half of the last dimension, in float32."""
    cos, sin = angles
    wide = x.float()
    swapped = torch.cat(wide.chunk(2, dim=-1)[::-1], dim=-1)
    return swapped.mul_(sin).add_(wide * cos).to(x.dtype)


def attention_inputs(
    x: Tensor, norm: Tensor, weight: Tensor, angles: Angles, eps: float, n_heads: int, n_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries `[B, H, T, hd]`, rotated keys and values `[B, kv_heads, T, hd]` of `x` `[B, T, d_model]`.

    `norm` is the norm's weight, `weight` `[(H + 2 kv_heads) hd, d_model]` that of queries, keys and values.
    """
    heads = linear(rms_norm(x, norm, eps), weight).unflatten(2, (n_heads + 2 * n_kv_heads, -1)).transpose(1, 2)
    rotated = rotate(heads[:, : n_heads + n_kv_heads], angles)
    return rotated[:, :n_heads], rotated[:, n_heads:], heads[:, n_heads + n_kv_heads :]


def block_output(
    x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """The block's output `[B, T, d_model]`: `x` plus the attention `attended` `[B, H, T, hd]`, plus SwiGLU of the sum.

    `out`, `gate_up` and `down` are projection weights, `norm` is the weight of the norm before SwiGLU. Sums are taken
    in place: on a CPU a new tensor of some MB costs more in page faults than the addition.
    """
    x = linear(attended.transpose(1, 2).flatten(2), out).add_(x)
    gate, up = linear(rms_norm(x, norm, eps), gate_up).chunk(2, dim=-1)
    return linear(F.silu(gate).mul_(up), down).add_(x)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by `torch.compile`, once per process. A new shape compiles again, then for any size.

    Not `fullgraph=True`, with which a decode would fail at the ninth form of its inputs (PyTorch's `recompile_limit`).
    Without it, further forms run uncompiled.
    """
    return torch.compile(function)
