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


def keys_to_see(mask: Tensor, rows: int, queries: int, keys: int | None, heads: int) -> Tensor:
    """An attention mask as bool `[B, heads, T, S]`, in which any dimension but the last may be 1.

    Args:
        mask: `[B, S]`, `[B, T, S]` or `[B, heads, T, S]`: True or 1 at keys to see. Floating point is taken with two
            dimensions alone, where all of transformers means 1 and 0 by it; with more, it may as well be added to
            scores, and zeros would then show what they hide here.
        rows, queries, keys, heads: B, T, S and the number of heads; `keys` None: any S.

    Raises:
        ValueError: another shape, or what looks like an additive mask.
    """
    given = list(mask.shape)
    if mask.is_floating_point() and (mask.dim() > 2 or not ((mask == 0) | (mask == 1)).all()):
        raise ValueError(
            f"attention_mask: expected True or 1 at keys to see and False or 0 at others, got {given} in {mask.dtype}, "
            "which may be an additive mask; for one of those pass `mask == 0`"
        )
    if mask.dim() in (2, 3):
        mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None]
    fits = mask.dim() == 4 and all(
        size in (1, expected) for size, expected in zip(mask.shape, (rows, heads, queries), strict=False)
    )
    if not fits or (keys is not None and mask.shape[3] != keys):
        S = "the cache's length" if keys is None else keys
        raise ValueError(
            "attention_mask: expected [B, S], [B, T, S] or [B, heads, T, S], "
            f"with B={rows}, T={queries}, S={S}, heads={heads} or 1, got {given}"
        )
    return mask.bool()


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
