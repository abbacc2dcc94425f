"""Rotary positions (Su et al., arXiv 2104.09864): pairs of channels, one from each half, turned by an angle."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fdpp.kernels.launch import ROTATE_PAIRS
from fdpp.kernels.layers import HeadNorms, Stored, rotate_kernel

Angles = tuple[Tensor, Tensor]


class Place(NamedTuple):
    """Where a cache wants the keys and values of the positions that are fed.

    Attributes:
        keys, values: `[b, kv_heads, L, hd]`, of any strides but the last.
        start: the first column, or an int64 tensor `[n]` of all of them.
        fillers: bool `[b]`, rows that are not written; None: all are.
    """

    keys: Tensor
    values: Tensor
    start: int | Tensor
    fillers: Tensor | None


def rotary_angles(position_ids: Tensor, rotary_dim: int, theta: float) -> Angles:
    """Cosines and sines `[B, 1, T, rotary_dim]` (float32) of the rotary angles at `position_ids` `[B, T]`.

    `rotary_dim` channels of a head turn, all of them in most families. The sines of the first half are negated, as
    `rotate` takes them.
    """
    key = rotary_dim, theta, position_ids.device
    plain = type(position_ids) is Tensor and not torch.compiler.is_compiling()
    rates = RATES.get(key) if plain else None
    if rates is None:
        rates = rotary_rates(*key)
        # What a capture allocates holds nothing before its replay.
        if plain and not (rates.is_cuda and torch.cuda.is_current_stream_capturing()):
            RATES[key] = rates
    angles = position_ids[:, None, :, None].float() * rates
    return angles.cos(), angles.sin()


RATES: dict[tuple[int, float, torch.device], Tensor] = {}
"""`rotary_rates` by its arguments, so that a forward does not make them anew."""


@torch.inference_mode(False)
def rotary_rates(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    """The angle per position of every channel, float32 `[rotary_dim]`, negative in the first half."""
    exponent = torch.arange(0, rotary_dim, 2, device=device, dtype=torch.float32) / rotary_dim
    rates = 1.0 / theta**exponent
    return torch.cat((-rates, rates))


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Rotate pairs of channels, one from each half of the last dimension, in float32.

    Of angles for fewer channels than `x` has, only the first ones turn.
    """
    cos, sin = angles
    if cos.shape[-1] < x.shape[-1]:
        turned, passed = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
        return torch.cat((rotate(turned, angles), passed), dim=-1)
    wide = x.float()
    swapped = torch.cat(wide.chunk(2, dim=-1)[::-1], dim=-1)
    return swapped.mul_(sin).add_(wide * cos).to(x.dtype)


def rotate_in_place(
    heads: Tensor,
    n_heads: int,
    n_kv_heads: int,
    angles: Angles,
    place: Place | None,
    norms: HeadNorms | None = None,
) -> None:
    """Rotate the queries and keys of `heads` where they are, and write keys and values to `place`, in one launch.

    Args:
        heads: `[b, n, n_heads + 2 n_kv_heads, hd]` on a GPU, queries, keys and values; the last two dimensions dense.
        angles: `rotary_angles` of the n positions, of every row or of one for all.
        place: of b rows; None: nothing is stored.
        norms: of queries and keys, before they turn; None: there are none.
    """
    b, n, _, hd = heads.shape
    cos, sin = angles
    start, stored, shown = 0, Stored(heads, heads, (0, 0, 0), (0, 0, 0), None, None), n_heads + n_kv_heads
    if place is not None:
        k, v, first, fillers = place
        start, columns = (first, None) if isinstance(first, int) else (0, first)
        stored, shown = Stored(k, v, k.stride()[:3], v.stride()[:3], columns, fillers), shown + n_kv_heads
    block_d = max(triton.next_power_of_2(hd // 2), 16)
    block_h = max(ROTATE_PAIRS // block_d, 1)
    with torch.cuda.device_of(heads):
        rotate_kernel[(b * n, triton.cdiv(shown, block_h))](
            heads,
            cos,
            sin,
            stored,
            norms,
            start,
            n,
            heads.stride(0),
            heads.stride(1),
            cos.stride(0) if cos.shape[0] > 1 else 0,
            HEADS=n_heads,
            KV_HEADS=n_kv_heads,
            HALF=hd // 2,
            TURNED=cos.shape[-1] // 2,
            STORES=place is not None,
            BLOCK_H=block_h,
            BLOCK_D=block_d,
            num_warps=4,
            enable_fp_fusion=True,
        )
