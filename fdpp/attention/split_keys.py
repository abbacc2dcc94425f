"""Attention of a block's queries over a cache of left-padded sequences.

What `scaled_dot_product_attention` has for a short block:

- The flash kernel splits the keys where `batch * heads * ceil(n / 64)` is below 1.6 times the multiprocessors
  (`set_params_splitkv` in PyTorch's `flash_api.cpp`), so the device stays busy. But it takes no mask, which padding
  needs.
- With a mask the memory-efficient kernel runs one program per head and tile of queries: 32 for a block of LLaDA, on 108
  multiprocessors or more.
- With cuDNN above 9.15, PyTorch tries cuDNN first on sm_90 and sm_100, masked or not. How that splits its work is not
  public.

None takes branches (alternative contents of one block that share the rest of a sequence) without a copy of the cache
for each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fdpp.kernels.attend import Part, Strides, attend_kernel
from fdpp.kernels.launch import ATTEND_PROGRAMS, attend_launch
from fdpp.selection import DTYPES

Own = tuple[Tensor, Tensor]
"""A block's own keys and values, in place of the cache's."""


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    own: Own | None = None,
    column: Tensor | None = None,
    stops: Tensor | None = None,
    holes: Tensor | None = None,
) -> None:
    """Raise `ValueError` that names the argument, what was expected and what came."""
    if q.dim() != 4 or q.dtype not in DTYPES:
        raise ValueError(f"q: expected [B, H, n, d] in bfloat16, float16 or float32, got {list(q.shape)} in {q.dtype}")
    if (own is None) != (column is None):
        raise ValueError(f"own and column: expected both or neither, got {'column' if own is None else 'own'} alone")
    rows, H, _, d = q.shape
    for name, x in (("k", k), ("v", v)):
        fits = x.dim() == 4 and x.shape[1] > 0 and H % x.shape[1] == 0 and x.shape[3] == d
        fits = fits and (x.shape[0] == rows or (own is not None and x.shape[0] > 0 and rows % x.shape[0] == 0))
        if not fits or x.shape != k.shape or x.dtype != q.dtype or x.device != q.device:
            B = rows if own is None else f"a divisor of {rows}"
            raise ValueError(
                f"{name}: expected [{B}, a divisor of {H}, S, {d}] {q.dtype} on {q.device}, both alike, "
                f"got {list(x.shape)} {x.dtype} on {x.device}"
            )
    B, kv_heads, S, _ = k.shape
    if own is not None:
        if len(own) != 2:
            raise ValueError(f"own: expected keys and values, got {len(own)} tensors")
        for i, x in enumerate(own):
            fits = x.dim() == 4 and (*x.shape[:2], x.shape[3]) == (rows, kv_heads, d) and x.shape[2] <= S
            if not fits or x.shape != own[0].shape or x.dtype != q.dtype or x.device != q.device:
                raise ValueError(
                    f"own[{i}]: expected [{rows}, {kv_heads}, at most {S}, {d}] {q.dtype} on {q.device}, both alike, "
                    f"got {list(x.shape)} {x.dtype} on {x.device}"
                )
    if column is not None and (column.dtype != torch.int64 or column.numel() == 0 or column.device != q.device):
        raise ValueError(
            f"column: expected int64 of at least one element on {q.device}, "
            f"got {list(column.shape)} {column.dtype} on {column.device}"
        )
    if left is not None:
        wrong = tuple(left.shape) != (B,) or left.dtype not in (torch.int32, torch.int64)
        if wrong or left.device != q.device:
            raise ValueError(
                f"left: expected [{B}] int32 or int64 on {q.device}, "
                f"got {list(left.shape)} {left.dtype} on {left.device}"
            )
    for name, columns in (("stops", stops), ("holes", holes)):
        if columns is None:
            continue
        wrong = tuple(columns.shape) != (q.shape[2],) or columns.dtype != torch.int64
        if wrong or columns.device != q.device:
            raise ValueError(
                f"{name}: expected [{q.shape[2]}] int64 on {q.device}, "
                f"got {list(columns.shape)} {columns.dtype} on {columns.device}"
            )


def visible(left: Tensor, length: int) -> Tensor:
    """Which of `length` columns hold a token, bool `[b, length]`: those from `left` `[b]` on."""
    return torch.arange(length, device=left.device) >= left[:, None]


def with_own(cached: Tensor, columns: Tensor | slice, own: Tensor) -> Tensor:
    """A copy of `cached` `[b, kv_heads, S, d]` for every branch, with its `own` `[b * branches, ...]` at `columns`."""
    copy = cached.repeat_interleave(len(own) // len(cached), dim=0)
    if isinstance(columns, Tensor):
        return copy.index_copy_(2, columns, own)  # which refuses a negative column
    copy[:, :, columns] = own
    return copy


def attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    scale: float,
    own_k: Tensor | None = None,
    own_v: Tensor | None = None,
    column: Tensor | None = None,
    stops: Tensor | None = None,
    holes: Tensor | None = None,
) -> Tensor:
    """`fdpp::block_attention` by PyTorch's own kernels; each branch gets a copy of the cache."""
    mask = None
    if left is not None:
        mask = visible(left, k.shape[2])[:, None, None]
    if own_k is not None and own_v is not None and column is not None and len(q):
        columns = column.flatten()[0] + torch.arange(own_k.shape[2], device=k.device)
        k, v = with_own(k, columns, own_k), with_own(v, columns, own_v)
        if mask is not None:
            mask = mask.repeat_interleave(len(q) // len(mask), dim=0).index_fill_(3, columns, True)
    if stops is not None:
        before = torch.arange(k.shape[2], device=k.device) < stops[:, None]
        mask = before if mask is None else mask & before
    if holes is not None:
        others = torch.arange(k.shape[2], device=k.device) != holes[:, None]
        mask = others if mask is None else mask & others
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).contiguous()


def attention_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    scale: float,
    own_k: Tensor | None = None,
    own_v: Tensor | None = None,
    column: Tensor | None = None,
    stops: Tensor | None = None,
    holes: Tensor | None = None,
    tickets: Tensor | None = None,
) -> Tensor:
    """`fdpp::block_attention` in one launch (see `fdpp.kernels.attend`), and a fill if it has to make `tickets`."""
    (rows, H, n, d), (B, kv_heads, S, _) = q.shape, k.shape
    out = torch.empty(rows, n, H, d, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    # None is a constant to the kernel, so launches without branches do not pay for them.
    n_own: int | None = None
    own_strides: tuple[int | None, ...] = (None,) * 6
    if own_k is not None and own_v is not None:
        own_k, own_v = (x if x.stride(3) == 1 else x.contiguous() for x in (own_k, own_v))
        n_own, own_strides = own_k.shape[2], (*own_k.stride()[:3], *own_v.stride()[:3])
    group = H // kv_heads
    exact = q.dtype == torch.float32
    config = attend_launch(rows * kv_heads, group * n, S, exact)
    parts = Part(out, out, out, out)
    if config.splits > 1:
        acc = torch.empty(rows * n * H, config.splits, d, dtype=torch.float32, device=q.device)
        high, total = torch.empty(2, rows * n * H, config.splits, dtype=torch.float32, device=q.device)
        parts = Part(acc, high, total, new_tickets(q.device) if tickets is None else tickets)
    with torch.cuda.device_of(q):
        attend_kernel[(rows * kv_heads * triton.cdiv(group * n, config.block_m), config.splits)](
            q,
            k,
            v,
            own_k,
            own_v,
            q if left is None else left.contiguous(),
            column,
            q if stops is None else stops.contiguous(),
            None if holes is None else holes.contiguous(),
            out,
            parts,
            S,
            n,
            n_own,
            scale * math.log2(math.e),
            Strides(q.stride()[:3], k.stride()[:3], v.stride()[:3], own_strides[:3], own_strides[3:]),
            config.split_len,
            HEADS=H,
            GROUP=group,
            HAS_LEFT=left is not None,
            HAS_OWN=own_k is not None,
            HAS_STOPS=stops is not None,
            HAS_HOLES=holes is not None,
            HEAD_SIZE=d,
            BRANCHES=rows // B,
            SPLITS=config.splits,
            BLOCK_M=config.block_m,
            BLOCK_S=config.block_s,
            BLOCK_D=max(triton.next_power_of_2(d), 16),
            # Three products of TF32 are as good as one of float32, for which NVIDIA has no matrix instruction.
            PRECISION="tf32x3" if exact and torch.version.hip is None else "ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=True,
        )
    return out


def new_tickets(device: torch.device) -> Tensor:
    """Zeroed tickets for launches that do not overlap; each leaves them at zero."""
    return torch.zeros(ATTEND_PROGRAMS, dtype=torch.int32, device=device)


@torch.library.custom_op("fdpp::block_attention", mutates_args=(), device_types="cpu")
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None,
    scale: float,
    own_k: Tensor | None = None,
    own_v: Tensor | None = None,
    column: Tensor | None = None,
    stops: Tensor | None = None,
    holes: Tensor | None = None,
) -> Tensor:
    """`fdpp::block_attention`: `[B * branches, m, H, d]`, contiguous."""
    return attention_cpu(q, k, v, left, scale, own_k, own_v, column, stops, holes)


@attention_op.register_kernel("cuda")
def _(q, k, v, left, scale, own_k=None, own_v=None, column=None, stops=None, holes=None):  # type: ignore[no-untyped-def]
    return attention_gpu(q, k, v, left, scale, own_k, own_v, column, stops, holes)


@attention_op.register_fake
def _(q, k, v, left, scale, own_k=None, own_v=None, column=None, stops=None, holes=None):  # type: ignore[no-untyped-def]
    rows, H, m, d = q.shape
    return q.new_empty((rows, m, H, d))


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor | None = None,
    scale: float | None = None,
    *,
    own: Own | None = None,
    column: Tensor | None = None,
    stops: Tensor | None = None,
    holes: Tensor | None = None,
    tickets: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a block's queries over all keys of a cache but the padding: `[B * branches, H, m, d]`.

    With `own` and `column` (both or neither) rows may be branches: alternative contents of the same columns of a
    sequence. They share its cache, but each has its own keys and values in those columns.

    Args:
        q: `[B * branches, H, m, d]` bfloat16, float16 or float32; row r belongs to sequence r // branches. One branch
            unless `own` is given.
        k, v: `[B, kv_heads, S, d]` of the same dtype, any strides; head h reads head h // (H / kv_heads).
        left: `[B]` int32 or int64, columns of padding on the left: sequence b sees columns `left[b]..S`, the others are
            not read. Where it sees none, the result is zeros. None: all S columns.
        scale: of the scores, 1 / sqrt(d) unless given.
        own: keys and values `[B * branches, kv_heads, n, d]` of the same dtype, any strides, n at most S. They
            replace the n columns of `k` and `v` from `column` on, which are not read. They are no padding: a row sees
            all n of them, even in columns before `left`.
        column: int64 of at least one element; the first element is the block's first column, from 0 to S - n. It is
            read on the device, so it may change between replays of a captured graph. On a GPU it is not checked:
            outside that range no other memory is read, but the result is meaningless.
        stops: `[m]` int64, for each query the column behind those that it sees, own ones included: none of a later
            block, say. None: all S columns.
        holes: `[m]` int64, for each query one column that it does not see, own ones included, or -1: a mask row that
            predicts a token's position again, say, does not see the token. Read on the device, as `column` is. A query
            that sees nothing gets zeros. None: no query has one.
        tickets: `new_tickets`, on a GPU, of launches that follow each other on one stream; None: made for this one.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or one of `own` and `column` without the other.
        IndexError: on a CPU, a block that does not fit into the S columns.
    """
    check(q, k, v, left, own, column, stops, holes)
    own_k, own_v = (None, None) if own is None else own
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    given = (q, k, v, left, scale, own_k, own_v, column, stops, holes)
    if torch.compiler.is_compiling():
        return attention_op(*given).transpose(1, 2)
    return (attention_cpu(*given) if q.device.type == "cpu" else attention_gpu(*given, tickets)).transpose(1, 2)
