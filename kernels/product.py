"""The product of few rows with weights of one byte, int8 or float8, which are widened on the way to the multiplier.

The weights are read once, and nothing else is of their size: at few rows a product takes as long as its weights take to
arrive, half as long as those of two bytes. Scales belong to rows of the weight, so they are applied to sums.

Where one tile for each program would leave multiprocessors idle, the depth is split, too: as in `attend`, each split
leaves its part, and the one that draws its tile's last ticket adds them up, in their order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fdpp.kernels.ticket import is_last


class Parts(NamedTuple):
    """What the splits of a tile leave for the last of them, float32 `[SPLITS, M, N]`; tickets are zero before and after
    a launch."""

    sums: tl.tensor
    ticket: tl.tensor


@triton.jit
def store_product(b_sum, scale, added, out, o_m, o_n, m_mn, N, ADDS: tl.constexpr):
    """Write a tile of sums, scaled, and with `ADDS` plus `added`."""
    b_out = b_sum * tl.load(scale + o_n, mask=o_n < N, other=0.0).to(tl.float32)[None, :]
    o_out = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    if ADDS:
        b_out += tl.load(added + o_out, mask=m_mn, other=0.0).to(tl.float32)
    tl.store(out + o_out, b_out, mask=m_mn)


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    x,
    weight,
    scale,
    added,
    out,
    parts,
    M,
    N,
    K,
    stride_x,
    split_len,
    ADDS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (tiles, SPLITS): `out = x @ weight.T * scale` of `x` `[M, K]` and `weight` `[N, K]`; tiles of the same rows
    of the weight run side by side."""
    tiles = tl.cdiv(M, BLOCK_M)
    i_m, i_n, i_s = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    o_m, o_n = i_m * BLOCK_M + tl.arange(0, BLOCK_M), i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    start = i_s * split_len
    stop = tl.minimum(start + split_len, K)
    p_x = x + o_m.to(tl.int64)[:, None] * stride_x
    p_w = weight + o_n.to(tl.int64)[None, :] * K
    b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_k in range(start, stop, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        m_k = o_k < stop
        b_x = tl.load(p_x + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_w = tl.load(p_w + o_k[:, None], mask=m_n[None, :] & m_k[:, None], other=0.0)
        b_sum = tl.dot(b_x, b_w.to(b_x.dtype), b_sum)
    m_mn = m_m[:, None] & m_n[None, :]
    if SPLITS == 1:
        store_product(b_sum, scale, added, out, o_m, o_n, m_mn, N, ADDS)
    else:
        o_part = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
        tl.store(parts.sums + i_s * M.to(tl.int64) * N + o_part, b_sum, mask=m_mn)
        if is_last(parts.ticket + tl.program_id(0), SPLITS):
            b_sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            # Some parts are asked for at once, as many as registers hold beside the sum.
            for i_part in tl.range(0, SPLITS, loop_unroll_factor=128 // BLOCK_M):
                p_part = parts.sums + i_part * M.to(tl.int64) * N + o_part
                b_sum += tl.load(p_part, mask=m_mn, other=0.0, cache_modifier=".cg")
            store_product(b_sum, scale, added, out, o_m, o_n, m_mn, N, ADDS)
