"""A transformer block around its attention, as functions of tensors that all layers share, so compiled once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdpp.attention.rotary import Angles, Place, rotate, rotate_in_place
from fdpp.kernels.layers import HeadNorms
from fdpp.models.launches import on_kernels, rms_norm_gpu, swiglu_gpu
from fdpp.models.linear import linear
from fdpp.models.weights import add_byte_product, takes_bytes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `RMSNorm`."""
    if on_kernels(x) and x.dtype == weight.dtype:
        return rms_norm_gpu(x, weight, eps)
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return weight * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer, arXiv 2002.05202)."""
    if on_kernels(gate):
        return swiglu_gpu(gate, up)
    gate = F.silu(gate)
    return gate * up if torch.is_grad_enabled() else gate.mul_(up)


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
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    angles: Angles,
    eps: float,
    n_heads: int,
    n_kv_heads: int,
    bias: Tensor | None = None,
    norms: HeadNorms | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries `[B, H, T, hd]`, rotated keys and values `[B, kv_heads, T, hd]` of `x` `[B, T, d_model]`.

    `norm` is the norm's weight, `weight` `[(H + 2 kv_heads) hd, d_model]` that of queries, keys and values, and `bias`
    theirs. `norms` are those of queries and keys, before they are rotated.
    """
    heads = linear(rms_norm(x, norm, eps), weight, bias).unflatten(2, (n_heads + 2 * n_kv_heads, -1)).transpose(1, 2)
    if norms is not None:
        q, k, v = heads.split((n_heads, n_kv_heads, n_kv_heads), dim=1)
        return rotate(rms_norm(q, norms.q, norms.eps), angles), rotate(rms_norm(k, norms.k, norms.eps), angles), v
    rotated = rotate(heads[:, : n_heads + n_kv_heads], angles)
    return rotated[:, :n_heads], rotated[:, n_heads:], heads[:, n_heads + n_kv_heads :]


def attention_inputs_gpu(
    x: Tensor,
    norm: Tensor,
    weight: Tensor,
    angles: Angles,
    eps: float,
    n_heads: int,
    n_kv_heads: int,
    place_of: Callable[[Tensor], Place | None] | None,
    bias: Tensor | None = None,
    norms: HeadNorms | None = None,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """`attention_inputs` in three launches, and whether keys and values are stored already.

    `place_of` says where, given the keys; None: nowhere.
    """
    heads = linear(rms_norm(x, norm, eps), weight, bias).unflatten(2, (n_heads + 2 * n_kv_heads, -1))
    q, k, v = heads.transpose(1, 2).split((n_heads, n_kv_heads, n_kv_heads), dim=1)
    place = None if place_of is None else place_of(k)
    rotate_in_place(heads, n_heads, n_kv_heads, angles, place, norms)
    return q, k, v, place is not None


def plus_product(x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """`x` `[..., d]` plus the product of `h` `[..., k]` and the transpose of `weight` `[d, k]`.

    On a GPU the product adds to `x` in place. On a CPU the sum is taken in the product's memory: a new tensor of some
    MB costs more in page faults than the addition.
    """
    if on_kernels(x) and is_whole(weight):
        x.view(-1, x.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), weight.t())
        return x
    if on_kernels(x) and takes_bytes(h, weight):
        return add_byte_product(x, h, weight)
    return linear(h, weight).add_(x)


def is_whole(weight: Tensor) -> bool:
    """Whether `weight` is no subclass of a tensor, as quantised ones are."""
    return type(weight) in (Tensor, nn.Parameter)


def attention_output(x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x` `[B, T, d_model]` plus the attention `attended` `[B, H, T, hd]`, and the norm of the sum.

    `out` is a projection weight, `norm` the weight of the norm. On a GPU `x` is overwritten.
    """
    attended = attended.transpose(1, 2).flatten(2)
    if on_kernels(x) and not (is_whole(out) or takes_bytes(attended, out)):
        return x, rms_norm_gpu(x, norm, eps, added=linear(attended, out))
    x = plus_product(x, attended, out)
    return x, rms_norm(x, norm, eps)


def block_output(
    x: Tensor, attended: Tensor, out: Tensor, norm: Tensor, gate_up: Tensor, down: Tensor, eps: float
) -> Tensor:
    """The block's output `[B, T, d_model]`: `attention_output`, plus SwiGLU of its norm.

    `gate_up` and `down` are projection weights. On a GPU `x` is overwritten.
    """
    x, h = attention_output(x, attended, out, norm, eps)
    return plus_product(x, swiglu(*linear(h, gate_up).chunk(2, dim=-1)), down)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by `torch.compile`, once per process. A new shape compiles again, then for any size.

    Not `fullgraph=True`, with which a decode would fail at the ninth form of its inputs (PyTorch's `recompile_limit`).
    Without it, further forms run uncompiled.
    """
    return torch.compile(function)
