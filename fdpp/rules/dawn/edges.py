"""The dependency graph: edges of a block's positions from queries and keys, one bit per key."""

from __future__ import annotations

from typing import Protocol

import torch
import triton
from torch import Tensor

from fdpp.kernels.dependency import Case, Inputs, Strides, column_kernel, edges_kernel, lse_kernel
from fdpp.selection import DTYPES

WORD = 32
"""Columns in a word of edges."""

TILE = 64
"""Queries and keys in a tile of the passes over all fed queries: 32 scores a thread with 4 warps."""

BLOCK_T = 16
"""Queries a program of the last pass: the least that a matrix instruction takes, for twice as many programs."""


class Thresholds(Protocol):
    """The numbers of `Dawn`."""

    @property
    def tau_sink(self) -> float: ...
    @property
    def tau_edge(self) -> float: ...
    @property
    def tau_induce(self) -> float: ...
    @property
    def tau_low(self) -> float: ...
    @property
    def tau_high(self) -> float: ...


def check_edges(
    queries: list[Tensor],
    own: list[Tensor],
    shared: list[Tensor],
    key_mask: Tensor | None,
    start: int,
    first: int,
    T: int,
) -> None:
    """Raise `ValueError` that names the argument, what was expected and what came."""
    if not queries or len(own) != len(queries) or len(shared) not in (0, len(queries)):
        raise ValueError(
            "dependency_edges: expected queries and keys of the same layers, "
            f"got {len(queries)} queries, {len(own)} own and {len(shared)} shared keys"
        )
    q, k, stored = queries[0], own[0], shared[0] if shared else own[0]
    if q.dim() != 4 or k.dim() != 4 or stored.dim() != 4 or q.dtype not in (*DTYPES, torch.float64):
        raise ValueError(
            f"queries: expected [rows, H, n, hd] per layer in a floating dtype, got {list(q.shape)} in {q.dtype}"
        )
    rows, H, n, hd = q.shape
    b, S, kv = stored.shape[0], stored.shape[2], k.shape[1]
    if tuple(k.shape) != (rows, kv, n, hd) or H % kv:
        raise ValueError(f"own: expected keys [{rows}, a divisor of {H}, {n}, {hd}], got {list(k.shape)}")
    if shared and (rows % b or tuple(stored.shape) != (b, kv, S, hd) or start + n > S or start < 0):
        raise ValueError(
            f"shared: expected keys [a divisor of {rows}, {kv}, at least {start + n}, {hd}], got {list(stored.shape)}"
        )
    if not shared and start != 0:
        raise ValueError(f"start: expected 0 without shared keys, got {start}")
    for name, tensors in (("queries", queries), ("own", own), ("shared", shared)):
        for x in tensors:
            if x.shape != tensors[0].shape or x.dtype != q.dtype or x.device != q.device:
                raise ValueError(
                    f"{name}: expected every layer to be {list(tensors[0].shape)} {q.dtype} on {q.device}, "
                    f"got {list(x.shape)} {x.dtype} on {x.device}"
                )
    if not start <= first <= first + T <= start + n or T < 1:
        raise ValueError(f"first, T: expected a block within the fed columns {start} to {start + n}, got {first}, {T}")
    if key_mask is not None and (tuple(key_mask.shape) != (b, S) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask: expected [{b}, {S}] bool, got {list(key_mask.shape)} {key_mask.dtype}")


def dependency_edges(
    queries: list[Tensor],
    own: list[Tensor],
    shared: list[Tensor] | None = None,
    *,
    rule: Thresholds,
    start: int,
    first: int,
    T: int,
    key_mask: Tensor | None = None,
) -> Tensor:
    """The edges of a block: int32 `[rows, T, ceil(S / 32)]`; bit j % 32 of word j // 32 of row i: i <- column j.

    Sinks are columns whose attention, averaged over the *fed* queries, is above `rule.tau_sink`. Padding counts neither
    as a key nor as a query. The fed queries are those of

    - all columns in a full forward: the mean is the published one;
    - the columns from the block on with the prefix cache, the block's own with the dual cache, and the one before the
      block in a model that reads a token off it. There are no others, and a column that attracts all of these is a sink
      to them, which is what the removal is about.

    Args:
        queries: per layer `[rows, H, n, hd]`, after the rotary embedding, of the fed columns `start..start+n`.
        own: per layer `[rows, kv_heads, n, hd]`, the keys of the same columns.
        shared: per layer `[b, kv_heads, S, hd]`, the keys of all columns; those of fed columns are not read. Row i
            belongs to sequence i // (rows / b). None or empty after a full forward: S = n then.
        rule: thresholds.
        first, T: the block is columns `first..first+T`, all of them fed.
        key_mask: `[b, S]` bool, False at padding.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    shared = shared or []
    check_edges(queries, own, shared, key_mask, start, first, T)
    arguments = (queries, own, shared, key_mask, start, first, T, float(rule.tau_sink), float(rule.tau_edge))
    if torch.compiler.is_compiling():
        return edges_op(*arguments)
    return (edges_cpu if queries[0].device.type == "cpu" else edges_gpu)(*arguments)


def pack_bits(edges: Tensor) -> Tensor:
    """Bool `[..., S]` as int32 words `[..., ceil(S / 32)]`, the lowest column in the lowest bit."""
    words = torch.nn.functional.pad(edges, (0, -edges.shape[-1] % WORD)).unflatten(-1, (-1, WORD)).long()
    return (words << torch.arange(WORD, device=edges.device)).sum(-1).to(torch.int32)


def unpack_bits(bits: Tensor, S: int) -> Tensor:
    """The inverse of `pack_bits`: bool `[..., S]`."""
    return ((bits[..., None] >> torch.arange(WORD, device=bits.device)) & 1).bool().flatten(-2)[..., :S]


def edges_cpu(
    queries: list[Tensor],
    own: list[Tensor],
    shared: list[Tensor],
    key_mask: Tensor | None,
    start: int,
    first: int,
    T: int,
    tau_sink: float,
    tau_edge: float,
) -> Tensor:
    """`dependency_edges` in PyTorch, layer by layer, in float32 or the wider dtype of the queries."""
    rows, H, n, hd = queries[0].shape
    S = shared[0].shape[2] if shared else n
    dtype = torch.promote_types(queries[0].dtype, torch.float32)
    total = torch.zeros(rows, n, S, dtype=dtype, device=queries[0].device)
    real = None
    if key_mask is not None:
        real = key_mask.repeat_interleave(rows // key_mask.shape[0], dim=0)
    for layer, q in enumerate(queries):
        k = own[layer]
        if shared:
            k = shared[layer].repeat_interleave(rows // shared[layer].shape[0], dim=0)
            k[:, :, start : start + n] = own[layer]
        grouped = (q.to(dtype) * hd**-0.5).unflatten(1, (k.shape[1], -1))
        scores = grouped.flatten(2, 3) @ k.to(dtype).transpose(2, 3)
        if real is not None:
            scores.masked_fill_(~real[:, None, None], -torch.inf)
        total += scores.softmax(-1).view(rows, H, n, S).sum(1)
    total /= H * len(queries)
    column = torch.arange(S, device=total.device)
    removed = (column == column[first : first + T, None]).expand(rows, T, S)
    if real is None:
        sink = total.sum(1) > tau_sink * n
    else:
        fed = real[:, start : start + n]
        sink = (total * fed[:, :, None]).sum(1) > tau_sink * fed.sum(1, keepdim=True, dtype=dtype)
        sink = sink | ~real
    edges = (total[:, first - start :][:, :T] >= tau_edge) & ~removed & ~sink[:, None]
    return pack_bits(edges)


def aligned(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The layers' tensors with equal strides, the last one 1, and aligned to 16 bytes: as the kernels address them.

    Float64, which only tests of a decode use, is rounded to float32.
    """
    if tensors[0].dtype == torch.float64:
        tensors = [x.float() for x in tensors]
    fits = tensors[0].stride(-1) == 1 and all(
        x.stride() == tensors[0].stride() and x.data_ptr() % 16 == 0 for x in tensors
    )
    return tuple(tensors) if fits else tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)


def edges_gpu(
    queries: list[Tensor],
    own: list[Tensor],
    shared: list[Tensor],
    key_mask: Tensor | None,
    start: int,
    first: int,
    T: int,
    tau_sink: float,
    tau_edge: float,
) -> Tensor:
    """`dependency_edges` in three launches (see `fdpp.kernels.dependency`)."""
    rows, H, n, hd = queries[0].shape
    S = shared[0].shape[2] if shared else n
    heads, words, device = len(queries) * H, triton.cdiv(S, WORD), queries[0].device
    bits = torch.empty(rows, T, words, dtype=torch.int32, device=device)
    if rows == 0:
        return bits
    q, k, stored = aligned(queries), aligned(own), aligned(shared or own)
    lse = torch.empty(rows, heads, n, dtype=torch.float32, device=device)
    column = torch.empty(rows, heads, S, dtype=torch.float32, device=device)
    mask = lse if key_mask is None else key_mask.contiguous()
    real_queries = lse if key_mask is None else key_mask[:, start : start + n].sum(1, dtype=torch.float32)
    inputs = Inputs(q, k, stored, mask)
    at = (Strides(*(x[0].stride()[:3] for x in (q, k, stored))), start, n, S)
    # Float32 holds both parts of every operand in registers: smaller tiles, no prefetch, or it spills.
    exact = q[0].dtype == torch.float32
    tile = TILE // 2 if exact else TILE
    # Fewer fed queries than a tile, as with the dual cache, take a smaller one.
    block_q = 16 if exact else min(max(triton.next_power_of_2(n), 16), tile)
    case = Case(
        H=H,
        HD=hd,
        BLOCK_D=max(triton.next_power_of_2(hd), 16),
        GROUP=H // k[0].shape[1],
        BRANCHES=rows // stored[0].shape[0],
        LAYERS=len(queries),
        HAS_SHARED=bool(shared),
        HAS_MASK=key_mask is not None,
        # Three products of TF32 are as good as one of float32, for which NVIDIA has no matrix instruction.
        PRECISION="tf32x3" if exact and torch.version.hip is None else "ieee",
    )
    settings = {"CASE": case, "num_stages": 1 if exact else 3, "enable_fp_fusion": True}
    with torch.cuda.device_of(q[0]):
        lse_kernel[(triton.cdiv(n, block_q), heads, rows)](
            inputs, lse, *at, BLOCK_Q=block_q, BLOCK_K=tile, num_warps=4, **settings
        )
        column_kernel[(triton.cdiv(S, tile), heads, rows)](
            inputs, lse, column, *at, BLOCK_Q=block_q, BLOCK_K=tile, num_warps=4, **settings
        )
        edges_kernel[(words, triton.cdiv(T, BLOCK_T), rows)](
            inputs,
            lse,
            column,
            real_queries,
            bits,
            *at,
            first,
            T,
            tau_sink,
            tau_edge,
            BLOCK_Q=BLOCK_T,
            BLOCK_K=WORD,
            num_warps=4 if exact else 2,
            **settings,
        )
    return bits


@torch.library.custom_op("fdpp::dependency_edges", mutates_args=(), device_types="cpu")
def edges_op(
    queries: list[Tensor],
    own: list[Tensor],
    shared: list[Tensor],
    key_mask: Tensor | None,
    start: int,
    first: int,
    T: int,
    tau_sink: float,
    tau_edge: float,
) -> Tensor:
    """`fdpp::dependency_edges`, see `dependency_edges`."""
    return edges_cpu(queries, own, shared, key_mask, start, first, T, tau_sink, tau_edge)


@edges_op.register_kernel("cuda")
def _(queries, own, shared, key_mask, start, first, T, tau_sink, tau_edge):  # type: ignore[no-untyped-def]
    return edges_gpu(queries, own, shared, key_mask, start, first, T, tau_sink, tau_edge)


@edges_op.register_fake
def _(queries, own, shared, key_mask, start, first, T, tau_sink, tau_edge):  # type: ignore[no-untyped-def]
    S = (shared or own)[0].shape[2]
    return queries[0].new_empty((queries[0].shape[0], T, (S + WORD - 1) // WORD), dtype=torch.int32)
