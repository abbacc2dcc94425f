"""The launches of `fdpp.kernels.layers`: what a block does around its products and its attention, on a GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fdpp.kernels.launch import SWIGLU_BLOCK, norm_warps
from fdpp.kernels.layers import rms_norm_kernel, swiglu_kernel


def rms_norm_gpu(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> Tensor:
    """`fdpp.models.layers.rms_norm` of `x` `[..., D]`; with `added` `[..., D]` of the sum, which `x` becomes.

    Only an `x` that is contiguous can become it.
    """
    rows, D = x.contiguous(), x.shape[-1]
    out = torch.empty_like(rows)
    if out.numel() == 0:
        return out
    block_d = max(triton.next_power_of_2(D), 32)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(out.numel() // D,)](
            rows,
            rows if added is None else added.contiguous(),
            weight,
            out,
            D,
            eps,
            ADDS=added is not None,
            BLOCK_D=block_d,
            num_warps=norm_warps(block_d),
            enable_fp_fusion=True,
        )
    return out


def swiglu_gpu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` `[..., F]`, contiguous. Rows may lie apart, as those of both in one matrix."""
    gate, up = (x if in_rows(x) else x.contiguous() for x in (gate, up))
    out, width = gate.new_empty(gate.shape), gate.shape[-1]
    if out.numel() == 0:
        return out
    block = min(SWIGLU_BLOCK, max(triton.next_power_of_2(width), 32))
    with torch.cuda.device_of(gate):
        swiglu_kernel[(out.numel() // width, triton.cdiv(width, block))](
            gate, up, out, width, gate.stride(-2), up.stride(-2), BLOCK_F=block, num_warps=4, enable_fp_fusion=True
        )
    return out


def in_rows(x: Tensor) -> bool:
    """Whether `x` `[..., n, F]` is dense rows at one distance from each other."""
    apart = x.stride(-2)
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size > 1 and stride != apart:
            return False
        apart *= size
    return x.stride(-1) == 1
