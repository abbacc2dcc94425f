"""The launches of `fdpp.kernels.layers`: what a block does around its products and its attention, on a GPU."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fdpp.kernels.launch import ROUTE_EXPERTS, SWIGLU_BLOCK, norm_warps, product_launch
from fdpp.kernels.layers import rms_norm_kernel, swiglu_kernel
from fdpp.kernels.product import Parts, product_kernel
from fdpp.kernels.route import route_kernel
from fdpp.selection import DTYPES
from fdpp.step.gpu import ticket_for


def on_kernels(x: Tensor) -> bool:
    """Whether our kernels take `x`: on a GPU, where no gradient is recorded and no compiler fuses."""
    if not x.is_cuda or x.dtype not in DTYPES or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled(x.device.type)


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


def route_gpu(logits: Tensor, bias: Tensor, k: int, groups: int, kept: int, scale: float) -> tuple[Tensor, Tensor]:
    """`fdpp.models.experts.route` of a router's `logits` `[N, E]`, float32, in one launch."""
    rows, experts = logits.shape
    index = logits.new_empty(rows, k, dtype=torch.int64)
    weights = logits.new_empty(rows, k)
    if rows == 0:
        return index, weights
    size = experts // groups
    with torch.cuda.device_of(logits):
        route_kernel[(rows,)](
            logits.contiguous(),
            bias,
            index,
            weights,
            scale,
            SIZE=size,
            GROUPS=groups,
            KEPT=kept,
            K=k,
            BLOCK_G=triton.next_power_of_2(groups),
            BLOCK_S=triton.next_power_of_2(size),
            BLOCK_K=triton.next_power_of_2(k),
            num_warps=1,
            enable_fp_fusion=True,
        )
    return index, weights


def routes(logits: Tensor, groups: int) -> bool:
    """Whether `route_gpu` takes the `logits` `[N, E]` of experts in so many groups."""
    tile = triton.next_power_of_2(groups) * triton.next_power_of_2(logits.shape[1] // groups)
    return on_kernels(logits) and logits.dtype == torch.float32 and tile <= ROUTE_EXPERTS


def in_rows(x: Tensor) -> bool:
    """Whether `x` `[..., n, F]` is dense rows at one distance from each other."""
    apart = x.stride(-2)
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size > 1 and stride != apart:
            return False
        apart *= size
    return x.stride(-1) == 1


def byte_product_gpu(x: Tensor, weight: Tensor, scale: Tensor, added: Tensor | None = None) -> Tensor:
    """`x @ weight.T * scale` `[..., N]` of `x` `[..., K]` in one launch; with `added` `[..., N]` in place, plus that.

    Args:
        x: bfloat16 or float16, of at most `PRODUCT_ROWS` rows.
        weight: `[N, K]` int8 or float8 (e4m3), contiguous.
        scale: N numbers, of the weight's rows.
        added: contiguous, of the dtype of `x`.
    """
    rows = x.reshape(-1, x.shape[-1])
    (M, K), N = rows.shape, weight.shape[0]
    out = x.new_empty(*x.shape[:-1], N) if added is None else added
    if out.numel() == 0:
        return out
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    config = product_launch(M, N, K)
    parts = Parts(out, out)
    if config.splits > 1:
        sums = torch.empty(config.splits, M, N, dtype=torch.float32, device=x.device)
        parts = Parts(sums, ticket_for(x.device, config.tiles))
    with torch.cuda.device_of(x):
        product_kernel[(config.tiles, config.splits)](
            rows,
            weight,
            scale,
            out,
            out,
            parts,
            M,
            N,
            K,
            rows.stride(0),
            config.split_len,
            ADDS=added is not None,
            SPLITS=config.splits,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out
