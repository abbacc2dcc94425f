"""The choice of experts for a position, of those that a router scored: one launch in the place of some fifteen."""

import triton
import triton.language as tl


@triton.jit
def best(b_score, o_at):
    """The number in `o_at` of the largest of a tile `[G, S]`; of equals the lowest number."""
    b_held = tl.where(b_score == tl.max(tl.max(b_score, 1), 0), o_at, 2147483647)
    return tl.min(tl.min(b_held, 1), 0)


@triton.jit
def in_kept_groups(b_score, o_s, KEPT: tl.constexpr, BLOCK_G: tl.constexpr):
    """A tile `[G, S]` of scores, -inf outside of the KEPT groups whose two largest have the largest sums."""
    o_g = tl.arange(0, BLOCK_G)
    b_first = tl.max(b_score, 1)
    b_at = tl.min(tl.where(b_score == b_first[:, None], o_s[None, :], 2147483647), 1)
    b_second = tl.max(tl.where(o_s[None, :] == b_at[:, None], -float("inf"), b_score), 1)
    b_sum = b_first + b_second
    m_kept = o_g < 0
    for _i in tl.static_range(KEPT):
        b_open = tl.where(m_kept, -float("inf"), b_sum)
        b_most = tl.min(tl.where((b_open == tl.max(b_open, 0)) & (m_kept == 0), o_g, BLOCK_G), 0)
        m_kept = m_kept | (o_g == b_most)
    return tl.where(m_kept[:, None], b_score, -float("inf"))


@triton.jit
def route_kernel(
    logits,
    bias,
    index,
    weights,
    scale,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (rows): K experts `index` int64 and their `weights` float32 of `logits` `[N, GROUPS SIZE]` float32.

    As `fdpp.models.experts.route` has it. A score that is no number ranks as -inf.
    """
    i_row = tl.program_id(0).to(tl.int64)
    o_g, o_s, o_k = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_K)
    o_e = o_g[:, None] * SIZE + o_s[None, :]
    m_e = (o_g < GROUPS)[:, None] & (o_s < SIZE)[None, :]
    b_logit = tl.load(logits + i_row * (GROUPS * SIZE) + o_e, mask=m_e, other=0.0)
    b_s = 1.0 / (1.0 + tl.exp(-b_logit))
    b_r = b_s + tl.load(bias + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_r = tl.where(m_e & (b_r == b_r), b_r, -float("inf"))
    if KEPT < GROUPS:
        b_r = in_kept_groups(b_r, o_s, KEPT, BLOCK_G)
    o_free = tl.where(m_e, o_e, 2147483647)
    b_index, b_weight = tl.zeros((BLOCK_K,), tl.int32), tl.zeros((BLOCK_K,), tl.float32)
    for k in tl.static_range(K):
        b_at = best(b_r, o_free)
        m_at = o_e == b_at
        b_index = tl.where(o_k == k, b_at, b_index)
        b_weight = tl.where(o_k == k, tl.sum(tl.sum(tl.where(m_at & m_e, b_s, 0.0), 1), 0), b_weight)
        b_r = tl.where(m_at, -float("inf"), b_r)
        o_free = tl.where(m_at, 2147483647, o_free)
    if K > 1:
        b_weight = b_weight / (tl.sum(b_weight, 0) + 1e-20)
    tl.store(index + i_row * K + o_k, b_index.to(tl.int64), mask=o_k < K)
    tl.store(weights + i_row * K + o_k, b_weight * scale, mask=o_k < K)
