"""Attention of a short block of queries over a long cache, split along the keys so that every multiprocessor has work.

Rows of a tile are the queries of all heads that share one head of keys and values. A program takes one tile over one
split of the keys and keeps the running maximum m, the sum l of 2^(s - m) and the weighted values; `combine_kernel`
joins the splits. A sequence's keys start at `first`: what is to the left of it is padding. Scores are in units of
log 2, which turns the exponential into the hardware's own.
"""

import triton
import triton.language as tl


@triton.jit
def normalized(b_acc, total):
    """The weighted values over the sum of their weights; zeros where no key was seen."""
    return b_acc / tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["S", "n"])
def attend_kernel(
    q,
    k,
    v,
    first,
    out,
    part,
    part_max,
    part_sum,
    S,
    n,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    split_len,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (B * kv_heads * row tiles, SPLITS): tiles of one head share its keys in L2. One split writes `out`, several
    the parts; both lie as `[B, n, heads, ...]`."""
    tiles = tl.cdiv(GROUP * n, BLOCK_M)
    i_m, i_bk, i_s = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    i_b, i_k = i_bk // (HEADS // GROUP), i_bk % (HEADS // GROUP)
    i_b = i_b.to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < GROUP * n
    o_h, o_n = i_k * GROUP + o_m // n, o_m % n
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_SIZE
    o_q = i_b * stride_qb + o_h.to(tl.int64) * stride_qh + o_n.to(tl.int64) * stride_qn
    b_q = tl.load(q + o_q[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)

    start = i_s * split_len
    stop = tl.minimum(start + split_len, S)
    if HAS_FIRST:
        start = tl.maximum(start, tl.load(first + i_b).to(tl.int32))
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    k += i_b * stride_kb + i_k.to(tl.int64) * stride_kh
    v += i_b * stride_vb + i_k.to(tl.int64) * stride_vh
    for i_c in range(start, stop, BLOCK_S):
        o_s = i_c + tl.arange(0, BLOCK_S)
        m_s = o_s < stop
        o_s = o_s.to(tl.int64)
        b_k = tl.load(k + o_s[None, :] * stride_ks + o_d[:, None], mask=m_s[None, :] & m_d[:, None], other=0.0)
        b_score = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        b_score = tl.where(m_s[None, :], b_score, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        b_weight = tl.exp2(b_score - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_v = tl.load(v + o_s[:, None] * stride_vs + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
        b_acc = tl.dot(b_weight.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_max = b_new

    o_row = (i_b * n + o_n) * HEADS + o_h
    m_md = m_m[:, None] & m_d[None, :]
    if SPLITS == 1:
        tl.store(out + o_row[:, None] * HEAD_SIZE + o_d[None, :], normalized(b_acc, b_sum[:, None]), mask=m_md)
    else:
        o_part = o_row * SPLITS + i_s
        tl.store(part + o_part[:, None] * HEAD_SIZE + o_d[None, :], b_acc, mask=m_md)
        tl.store(part_max + o_part, b_max, mask=m_m)
        tl.store(part_sum + o_part, b_sum, mask=m_m)


@triton.jit
def combine_kernel(part, part_max, part_sum, out, HEAD_SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Grid (B * n * heads): the splits of one query, weighted by what they hold of the softmax."""
    i_row = tl.program_id(0).to(tl.int64)
    o_s, o_d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_SIZE
    b_max = tl.load(part_max + i_row * SPLITS + o_s)
    b_sum = tl.load(part_sum + i_row * SPLITS + o_s)
    # A split without keys has no maximum, and a query without keys none in any split.
    b_weight = tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - tl.max(b_max, 0)))
    o_part = (i_row * SPLITS + o_s)[:, None] * HEAD_SIZE + o_d[None, :]
    b_part = tl.load(part + o_part, mask=m_d[None, :], other=0.0)
    b_out = normalized(tl.sum(b_weight[:, None] * b_part, 0), tl.sum(b_weight * b_sum, 0))
    tl.store(out + i_row * HEAD_SIZE + o_d, b_out, mask=m_d)
