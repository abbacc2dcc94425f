"""The small operators of a transformer block, one launch each: norm, rotation with the write into the cache, SwiGLU.

Sums and products are in float32. What a model rounds to its dtype between two of them, these round, too: the normalised
input before the norm's weight, and the sum of two residuals before its norm.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Stored(NamedTuple):
    """Where keys and values go: two caches `[B, kv_heads, L, hd]` with the strides of their rows, heads and columns.

    `columns` `[n]` int64 are those of the n positions; None: they follow each other. A row that is True in `fillers`
    `[B]` is not written; None: all are.
    """

    k: tl.tensor
    v: tl.tensor
    strides_k: tuple[tl.tensor, tl.tensor, tl.tensor]
    strides_v: tuple[tl.tensor, tl.tensor, tl.tensor]
    columns: tl.tensor
    fillers: tl.tensor


class HeadNorms(NamedTuple):
    """The weights `[hd]` of the RMSNorm of every query and of every key before its rotation, and their epsilon."""

    q: tl.tensor
    k: tl.tensor
    eps: tl.tensor


@triton.jit
def rms_norm_kernel(x, added, weight, out, D, eps, ADDS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (rows): `out = weight * x / sqrt(mean(x^2) + eps)` of each row; with `ADDS` of `x + added`, kept in `x`."""
    i_row = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(x + i_row * D + o_d, mask=m_d, other=0.0)
    b_weight = tl.load(weight + o_d, mask=m_d, other=0.0)
    if ADDS:
        b_added = tl.load(added + i_row * D + o_d, mask=m_d, other=0.0)
        b_x = (b_x.to(tl.float32) + b_added.to(tl.float32)).to(b_x.dtype)
        tl.store(x + i_row * D + o_d, b_x, mask=m_d)
    b_wide = b_x.to(tl.float32)
    b_normed = b_wide * tl.rsqrt(tl.sum(b_wide * b_wide, 0) / D + eps)
    b_out = b_normed.to(b_x.dtype).to(tl.float32) * b_weight.to(tl.float32)
    tl.store(out + i_row * D + o_d, b_out, mask=m_d)


@triton.jit
def swiglu_kernel(gate, up, out, F, stride_g, stride_u, BLOCK_F: tl.constexpr):
    """Grid (rows, tiles): `out = gate / (1 + exp(-gate)) * up` of rows of F channels."""
    i_row, i_f = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    b_gate = tl.load(gate + i_row * stride_g + o_f, mask=m_f, other=0.0).to(tl.float32)
    b_up = tl.load(up + i_row * stride_u + o_f, mask=m_f, other=0.0).to(tl.float32)
    tl.store(out + i_row * F + o_f, b_gate / (1.0 + tl.exp(-b_gate)) * b_up, mask=m_f)


@triton.jit
def store_heads(cache, strides, i_b, o_h, column, o_first, apart, m_hd, b_first, b_second):
    """Write the channels `o_first` of heads `o_h`, and those `apart` from them, to their column of `cache`."""
    o_cache = i_b * strides[0] + o_h.to(tl.int64)[:, None] * strides[1] + column * strides[2] + o_first[None, :]
    tl.store(cache + o_cache, b_first, mask=m_hd)
    tl.store(cache + o_cache + apart, b_second, mask=m_hd)


@triton.jit
def weighted(b_wide, norms, is_query, o_d, m_d, DTYPE: tl.constexpr):
    """Normalised channels `o_d` of queries and keys, rounded, times their weights, rounded."""
    b_q = tl.load(norms.q + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_k = tl.load(norms.k + o_d, mask=m_d, other=0.0).to(tl.float32)
    return (b_wide.to(DTYPE).to(tl.float32) * tl.where(is_query, b_q, b_k)).to(DTYPE)


@triton.jit
def norm_heads(b_first, b_second, norms, is_query, o_first, apart, m_d, HALF: tl.constexpr):
    """Each query's and key's `2 HALF` channels, in two parts, after its norm, as `rms_norm_kernel` does rows'."""
    b_left, b_right = b_first.to(tl.float32), b_second.to(tl.float32)
    b_mean = (tl.sum(b_left * b_left, 1) + tl.sum(b_right * b_right, 1)) / (2 * HALF)
    b_scale = tl.rsqrt(b_mean + norms.eps)[:, None]
    b_left = weighted(b_left * b_scale, norms, is_query, o_first[None, :], m_d[None, :], b_first.dtype)
    b_right = weighted(b_right * b_scale, norms, is_query, o_first[None, :] + apart, m_d[None, :], b_first.dtype)
    return b_left, b_right


@triton.jit(do_not_specialize=["start", "n", "stride_ab"])
def rotate_kernel(
    heads,
    cos,
    sin,
    stored,
    norms,
    start,
    n,
    stride_hb,
    stride_hn,
    stride_ab,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TURNED: tl.constexpr,
    STORES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B * n, tiles of heads): rotate queries and keys of `heads` `[B, n, HEADS + 2 KV_HEADS, 2 HALF]` in place.

    Of `cos` and `sin` `[B or 1, n, 2 TURNED]` the second half is read. Channels beyond `2 TURNED` do not turn. Queries
    and keys are normalised first, unless `norms` is None. With `STORES` keys and values are also written to the cache,
    at `stored.columns` or from column `start` on.
    """
    i_bn, i_h = tl.program_id(0), tl.program_id(1)
    i_b, i_n = (i_bn // n).to(tl.int64), (i_bn % n).to(tl.int64)
    o_h = i_h * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HALF
    o_first, apart, m_angle = o_d, HALF, m_d
    if TURNED < HALF:
        # Pairs of the channels that turn, then pairs of the others.
        m_angle = o_d < TURNED
        o_first = o_d + tl.where(m_angle, 0, TURNED)
        apart = tl.where(m_angle, TURNED, HALF - TURNED)[None, :]
    m_turned = (o_h < HEADS + KV_HEADS)[:, None]
    m_hd = (o_h < HEADS + 2 * KV_HEADS)[:, None] & m_d[None, :]
    p_first = heads + i_b * stride_hb + i_n * stride_hn + o_h[:, None] * (2 * HALF) + o_first[None, :]
    b_first = tl.load(p_first, mask=m_hd, other=0.0)
    b_second = tl.load(p_first + apart, mask=m_hd, other=0.0)
    o_angle = i_b * stride_ab + i_n * (2 * TURNED) + TURNED + o_d
    b_cos = tl.load(cos + o_angle, mask=m_angle, other=1.0)[None, :]
    b_sin = tl.load(sin + o_angle, mask=m_angle, other=0.0)[None, :]
    b_left, b_right = b_first, b_second
    if norms is not None:
        b_left, b_right = norm_heads(b_first, b_second, norms, (o_h < HEADS)[:, None], o_first, apart, m_d, HALF)
    b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    b_first = tl.where(m_turned, (b_left * b_cos - b_right * b_sin).to(b_first.dtype), b_first)
    b_second = tl.where(m_turned, (b_right * b_cos + b_left * b_sin).to(b_second.dtype), b_second)
    tl.store(p_first, b_first, mask=m_hd & m_turned)
    tl.store(p_first + apart, b_second, mask=m_hd & m_turned)
    if STORES:
        column = i_n + start if stored.columns is None else tl.load(stored.columns + i_n)
        is_real = True if stored.fillers is None else tl.load(stored.fillers + i_b) == 0
        m_k = (m_hd & m_turned & (o_h >= HEADS)[:, None]) & is_real
        m_v = (m_hd & (m_turned == 0)) & is_real
        o_kv = o_h - HEADS
        store_heads(stored.k, stored.strides_k, i_b, o_kv, column, o_first, apart, m_k, b_first, b_second)
        o_kv -= KV_HEADS
        store_heads(stored.v, stored.strides_v, i_b, o_kv, column, o_first, apart, m_v, b_first, b_second)
