"""Attention of a short block of queries over a long cache, split along the keys so that every multiprocessor has work.

Rows of a tile are the queries of all heads that share one head of keys and values. A program takes one tile over one
split of the keys and keeps the running maximum m, the sum l of 2^(s - m) and the weighted values. Where there are
several splits, each leaves its part and takes its tile's ticket, and the one that draws the last joins them: as many
bytes as a launch of its own would move, and one launch less. The first `left` keys of a sequence are padding. A query
may stop before a column of its own, and leave out one other, its hole. Scores are in units of log 2, which turns the
exponential into the hardware's own.

Branches of a sequence read one cache, but each has a block of its own in the place of the same columns: every column
has one source, so there is one loop with one softmax, and the splits are those of the columns. Branches do not share a
tile, although the cached keys would then be read once for all of them: a value that is not finite would reach the other
branches, even with weight zero.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from fdpp.kernels.ticket import is_last

LOWEST = tl.constexpr(-1e30)
"""Below every score, and finite."""


class Part(NamedTuple):
    """What the splits of a tile leave for the last of them: each one's weighted values, maximum and sum.

    `ticket` counts the splits that have; it is zero before a launch and after it.
    """

    acc: tl.tensor
    max: tl.tensor
    sum: tl.tensor
    ticket: tl.tensor


class Strides(NamedTuple):
    """Strides of each input's rows, heads and columns; of `own_k` and `own_v` None where a block has no own keys."""

    q: tuple[tl.tensor, tl.tensor, tl.tensor]
    k: tuple[tl.tensor, tl.tensor, tl.tensor]
    v: tuple[tl.tensor, tl.tensor, tl.tensor]
    own_k: tuple[tl.tensor, tl.tensor, tl.tensor]
    own_v: tuple[tl.tensor, tl.tensor, tl.tensor]


@triton.jit
def normalized(b_acc, total):
    """The weighted values over the sum of their weights; zeros where no key was seen."""
    return b_acc / tl.where(total == 0.0, 1.0, total)


@triton.jit
def load_columns(cached, own, strides, strides_own, o_s, o_d, m_sd, column, n_own, HAS_OWN: tl.constexpr):
    """Channels `o_d` of keys or values of columns `o_s`: of the block's own from `column` on, else of the cache.

    Pointers chosen by a mask make it a single copy to shared memory, sixteen bytes at a time. Triton's compiler for AMD
    does not take such pointers (3.7), so there are two loads, each of the columns that the other leaves out.
    """
    p_s = cached + o_s.to(tl.int64) * strides[2] + o_d
    if HAS_OWN:
        o_own = o_s - column
        m_own = (o_own >= 0) & (o_own < n_own)
        p_own = own + o_own.to(tl.int64) * strides_own[2] + o_d
        if is_hip():
            b_own = tl.load(p_own, mask=m_sd & m_own, other=0.0)
            return tl.load(p_s, mask=m_sd & ~m_own, other=b_own)
        else:
            p_s = tl.where(m_own, p_own, p_s)
    return tl.load(p_s, mask=m_sd, other=0.0)


@triton.jit(do_not_specialize=["S", "n", "n_own"], do_not_specialize_on_alignment=["left", "column", "stops", "holes"])
def attend_kernel(
    q,
    k,
    v,
    own_k,
    own_v,
    left,
    column,
    stops,
    holes,
    out,
    part,
    S,
    n,
    n_own,
    scale,
    strides,
    split_len,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_OWN: tl.constexpr,
    HAS_STOPS: tl.constexpr,
    HAS_HOLES: tl.constexpr,
    BRANCHES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (B * kv_heads * BRANCHES * row tiles, SPLITS): neighbours read the same keys and share them in L2.
    One split writes `out`, several write the parts; both lie as `[B * BRANCHES, n, heads, ...]`."""
    tiles = tl.cdiv(GROUP * n, BLOCK_M)
    i_m, i_bk, i_s = tl.program_id(0) % tiles, tl.program_id(0) // tiles, tl.program_id(1)
    i_branch, i_bk = i_bk % BRANCHES, i_bk // BRANCHES
    i_b, i_k = i_bk // (HEADS // GROUP), i_bk % (HEADS // GROUP)
    i_b = i_b.to(tl.int64)
    i_row = i_b * BRANCHES + i_branch
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < GROUP * n
    o_h, o_n = i_k * GROUP + o_m // n, o_m % n
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_SIZE
    o_q = i_row * strides.q[0] + o_h.to(tl.int64) * strides.q[1] + o_n.to(tl.int64) * strides.q[2]
    b_q = tl.load(q + o_q[:, None] + o_d[None, :], mask=m_m[:, None] & m_d[None, :], other=0.0)

    start = i_s * split_len
    stop = tl.minimum(start + split_len, S)
    b_column = 0
    if HAS_OWN:
        b_column = tl.load(column).to(tl.int32)
        own_k += i_row * strides.own_k[0] + i_k.to(tl.int64) * strides.own_k[1]
        own_v += i_row * strides.own_v[0] + i_k.to(tl.int64) * strides.own_v[1]
    if HAS_STOPS:
        b_stops = tl.load(stops + o_n, mask=m_m, other=0).to(tl.int32)
    if HAS_HOLES:
        b_holes = tl.load(holes + o_n, mask=m_m, other=-1).to(tl.int32)
    if HAS_LEFT:
        b_left = tl.load(left + i_b).to(tl.int32)
        if HAS_OWN:
            # The order of keys does not matter, so a block amid padding is moved to the padding's end: a tile without
            # a key would have the maximum -inf. Stops and holes in it move with it; holes in padding are none.
            b_left = tl.minimum(b_left, S)
            moved = tl.maximum(b_column, b_left - n_own)
            if HAS_STOPS:
                b_stops = tl.maximum(b_stops, tl.minimum(moved + b_stops - b_column, b_left))
            if HAS_HOLES:
                o_own = b_holes - b_column
                b_moved = tl.where((o_own >= 0) & (o_own < n_own), moved + o_own, -1)
                b_holes = tl.where(b_holes < b_left, b_moved, b_holes)
            b_column = moved
            b_left = tl.minimum(b_left, b_column)
        start = tl.maximum(start, b_left)
    if HAS_STOPS:
        stop = tl.minimum(stop, tl.max(b_stops, 0))
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    k += i_b * strides.k[0] + i_k.to(tl.int64) * strides.k[1]
    v += i_b * strides.v[0] + i_k.to(tl.int64) * strides.v[1]
    for i_c in range(start, stop, BLOCK_S):
        o_s = i_c + tl.arange(0, BLOCK_S)
        m_s = o_s < stop
        m_k, m_v = m_s[None, :] & m_d[:, None], m_s[:, None] & m_d[None, :]
        b_k = load_columns(
            k, own_k, strides.k, strides.own_k, o_s[None, :], o_d[:, None], m_k, b_column, n_own, HAS_OWN
        )
        b_score = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        b_score = tl.where(m_s[None, :], b_score, float("-inf"))
        if HAS_STOPS:
            b_score = tl.where(o_s[None, :] < b_stops[:, None], b_score, float("-inf"))
        if HAS_HOLES:
            b_score = tl.where(o_s[None, :] != b_holes[:, None], b_score, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, 1))
        if HAS_STOPS or HAS_HOLES:
            # A query may see none of these keys: the difference of two infinite maxima would be NaN.
            b_new = tl.maximum(b_new, LOWEST)
        b_weight = tl.exp2(b_score - b_new[:, None])
        b_decay = tl.exp2(b_max - b_new)
        b_v = load_columns(
            v, own_v, strides.v, strides.own_v, o_s[:, None], o_d[None, :], m_v, b_column, n_own, HAS_OWN
        )
        b_acc = tl.dot(b_weight.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
        b_sum = b_sum * b_decay + tl.sum(b_weight, 1)
        b_max = b_new

    o_row = (i_row * n + o_n) * HEADS + o_h
    m_md = m_m[:, None] & m_d[None, :]
    if SPLITS == 1:
        tl.store(out + o_row[:, None] * HEAD_SIZE + o_d[None, :], normalized(b_acc, b_sum[:, None]), mask=m_md)
    else:
        o_part = o_row * SPLITS + i_s
        tl.store(part.acc + o_part[:, None] * HEAD_SIZE + o_d[None, :], b_acc, mask=m_md)
        tl.store(part.max + o_part, b_max, mask=m_m)
        tl.store(part.sum + o_part, b_sum, mask=m_m)
        if is_last(part.ticket + tl.program_id(0), SPLITS):
            b_joined = joined(part, o_row, o_d, m_m, m_md, HEAD_SIZE, SPLITS, BLOCK_M, BLOCK_D)
            tl.store(out + o_row[:, None] * HEAD_SIZE + o_d[None, :], b_joined, mask=m_md)


@triton.jit
def joined(
    part,
    o_row,
    o_d,
    m_m,
    m_md,
    HEAD_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The attention `[BLOCK_M, BLOCK_D]` of a tile: its parts, weighted by their share of the softmax."""
    o_s = tl.arange(0, SPLITS)
    o_ms = o_row[:, None] * SPLITS + o_s[None, :]
    m_ms = m_m[:, None] & (o_s >= 0)[None, :]
    # .cg skips this multiprocessor's L1, which may be stale: other programs wrote these.
    b_max = tl.load(part.max + o_ms, mask=m_ms, other=float("-inf"), cache_modifier=".cg")
    b_sum = tl.load(part.sum + o_ms, mask=m_ms, other=0.0, cache_modifier=".cg")
    # A split without keys has no maximum, and a query without keys none in any split.
    top = tl.max(b_max, 1)
    total = tl.sum(tl.where(b_max == float("-inf"), 0.0, tl.exp2(b_max - top[:, None])) * b_sum, 1)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # Some parts are asked for at once, as many as registers hold beside the sum.
    for i_s in tl.range(0, SPLITS, loop_unroll_factor=128 // BLOCK_M):
        o_part = o_row * SPLITS + i_s
        high = tl.load(part.max + o_part, mask=m_m, other=float("-inf"), cache_modifier=".cg")
        b_part = tl.load(
            part.acc + o_part[:, None] * HEAD_SIZE + o_d[None, :], mask=m_md, other=0.0, cache_modifier=".cg"
        )
        b_weight = tl.where(high == float("-inf"), 0.0, tl.exp2(high - top))
        b_acc += b_weight[:, None] * b_part
    return normalized(b_acc, total[:, None])
