"""Attention of a block's queries over a cache of left-padded sequences.

PyTorch's flash kernel cuts the keys into splits where `batch * heads * ceil(n / 64)` is below 0.8 times twice the
multiprocessors (`set_params_splitkv` in its `flash_api.cpp`, which `scaled_dot_product_attention` leaves the number
to), so a short block keeps the device busy. But it takes no mask, which padding needs: then the memory-efficient kernel
runs, one program per head and tile of queries, 32 for a block of LLaDA where there are 108 multiprocessors or more.
With cuDNN above 9.15, PyTorch asks that first on sm_90 and sm_100, masked or not; how it cuts its work is not public.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fdpp.kernels.attend import attend_kernel, combine_kernel
from fdpp.kernels.launch import attend_launch
from fdpp.ops import DTYPES


def check(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> None:
    """Raise `ValueError` that names the argument, what was expected and what came."""
    if q.dim() != 4 or q.dtype not in DTYPES:
        raise ValueError(f"q: expected [B, H, n, d] in bfloat16, float16 or float32, got {list(q.shape)} in {q.dtype}")
    B, H, _, d = q.shape
    for name, x in (("k", k), ("v", v)):
        fits = x.dim() == 4 and x.shape[0] == B and x.shape[1] > 0 and H % x.shape[1] == 0 and x.shape[3] == d
        if not fits or x.shape != k.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name}: expected [{B}, a divisor of {H}, S, {d}] {q.dtype} on {q.device}, both alike, "
                f"got {list(x.shape)} {x.dtype} on {x.device}"
            )
    if first is not None:
        wrong = tuple(first.shape) != (B,) or first.dtype not in (torch.int32, torch.int64)
        if wrong or first.device != q.device:
            raise ValueError(
                f"first: expected [{B}] int32 or int64 on {q.device}, "
                f"got {list(first.shape)} {first.dtype} on {first.device}"
            )


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
    """`fdpp::block_attention` by PyTorch's own kernels."""
    mask = None
    if first is not None:
        mask = (torch.arange(k.shape[2], device=k.device) >= first[:, None])[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous()


def attention_gpu(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
    """`fdpp::block_attention` in one launch, or two where the keys are split (see `fdpp.kernels.attend`)."""
    (B, H, n, d), (kv_heads, S) = q.shape, k.shape[1:3]
    out = torch.empty(B, n, H, d, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    group = H // kv_heads
    exact = q.dtype == torch.float32
    config = attend_launch(B * kv_heads, group * n, S, exact)
    part, part_max, part_sum = out, out, out
    if config.splits > 1:
        part = torch.empty(B * n * H, config.splits, d, dtype=torch.float32, device=q.device)
        part_max, part_sum = torch.empty(2, B * n * H, config.splits, dtype=torch.float32, device=q.device)
    shape = {
        "HEAD_SIZE": d,
        "SPLITS": config.splits,
        "BLOCK_D": max(triton.next_power_of_2(d), 16),
        "num_warps": config.num_warps,
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(q):
        attend_kernel[(B * kv_heads * triton.cdiv(group * n, config.block_m), config.splits)](
            q,
            k,
            v,
            q if first is None else first.contiguous(),
            out,
            part,
            part_max,
            part_sum,
            S,
            n,
            scale * math.log2(math.e),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            config.split_len,
            HEADS=H,
            GROUP=group,
            HAS_FIRST=first is not None,
            BLOCK_M=config.block_m,
            BLOCK_S=config.block_s,
            # Three products of TF32 are as good as one of float32, for which NVIDIA has no matrix instruction.
            PRECISION="tf32x3" if exact and torch.version.hip is None else "ieee",
            num_stages=config.num_stages,
            **shape,
        )
        if config.splits > 1:
            combine_kernel[(B * n * H,)](part, part_max, part_sum, out, **shape)
    return out


@torch.library.custom_op("fdpp::block_attention", mutates_args=(), device_types="cpu")
def attention_op(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scale: float) -> Tensor:
    """`fdpp::block_attention`, with the heads of a query side by side: `[B, n, H, d]`, contiguous."""
    return attention_cpu(q, k, v, first, scale)


@attention_op.register_kernel("cuda")
def _(q, k, v, first, scale):  # type: ignore[no-untyped-def]
    return attention_gpu(q, k, v, first, scale)


@attention_op.register_fake
def _(q, k, v, first, scale):  # type: ignore[no-untyped-def]
    B, H, n, d = q.shape
    return q.new_empty((B, n, H, d))


def block_attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention of a block's queries over all keys of a cache but the padding: `[B, H, n, d]`.

    Args:
        q: `[B, H, n, d]` bfloat16, float16 or float32.
        k, v: `[B, kv_heads, S, d]` of the same dtype, any strides; head h reads head h // (H / kv_heads).
        first: `[B]` int32 or int64: the keys of sequence b are columns `first[b]` to S, what is to the left is padding
            and not read. A sequence of nothing but padding gets zeros. None: all S columns.
        scale: of the scores, 1 / sqrt(d) unless given.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    check(q, k, v, first)
    run = attention_cpu if q.device.type == "cpu" else attention_gpu
    run = attention_op if torch.compiler.is_compiling() else run
    return run(q, k, v, first, q.shape[3] ** -0.5 if scale is None else float(scale)).transpose(1, 2)
