"""The confidence profile of one sequence: order its candidates, find the longest prefix the rule accepts.

A candidate's key is (cost bits << 32) | position. A non-negative float32 orders like its bits, so ascending keys are
descending confidence (or margin, or ascending entropy) with the lower position first among equals. Unusable rows take
the first bit pattern above +inf, other positions the largest key.
"""

import triton
import triton.language as tl

UNUSABLE = tl.constexpr(0x7F800001)
ABSENT = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def sort_key(b_rank_by, o_t, m_candidate, m_usable):
    """The key of every position; `b_rank_by` is its residual, its entropy or the odds against its margin."""
    b_bits = tl.where(m_usable, b_rank_by.to(tl.int32, bitcast=True), UNUSABLE)
    return tl.where(m_candidate, (b_bits.to(tl.int64) << 32) | o_t, ABSENT)


@triton.jit
def cost(b_rank_by, calibration, ORDER: tl.constexpr):
    """What a position adds to the prefix sum, float64: its entropy, or min(1, 1 - c + calibration), by margin with m in
    the place of c."""
    b_value = b_rank_by.to(tl.float64)
    if ORDER != "entropy":
        b_value = tl.where(b_value == float("inf"), 1.0, b_value / (1.0 + b_value))
        b_value = tl.minimum(b_value + calibration, 1.0)
    return b_value


@triton.jit
def commit_by_count(b_key, b_cost, p0, p1, ACCEPTS: tl.constexpr):
    """Rank every candidate by comparing all pairs: no sort, for short blocks. Returns the commit mask."""
    m_candidate = b_key != ABSENT
    m_before = b_key[None, :] <= b_key[:, None]
    n = tl.sum(m_before.to(tl.int32), 1)
    total = tl.sum(tl.where(m_before, tl.where(m_candidate, b_cost, 0.0)[None, :], 0.0), 1)
    m_accepted = m_candidate & ((b_key >> 32) < UNUSABLE) & ACCEPTS(n, b_cost, total, p0, p1)
    longest = tl.max(tl.where(m_accepted, n, 1), 0)
    return m_candidate & (n <= longest)


@triton.jit
def commit_by_sort(b_key, calibration, p0, p1, ACCEPTS: tl.constexpr, ORDER: tl.constexpr, BLOCK_T: tl.constexpr):
    """Sort the keys, which carry the costs, and cut the candidates at the last accepted key."""
    b_sorted = tl.sort(b_key)
    m_usable = (b_sorted >> 32) < UNUSABLE
    n = 1 + tl.arange(0, BLOCK_T)
    b_rank_by = (b_sorted >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    b_cost = tl.where(m_usable, cost(b_rank_by, calibration, ORDER), 0.0)
    total = tl.cumsum(b_cost, 0)
    m_accepted = m_usable & ACCEPTS(n, b_cost, total, p0, p1)
    longest = tl.max(tl.where(m_accepted, n, 1), 0)
    last_key = tl.max(tl.where((n <= longest) & (b_sorted != ABSENT), b_sorted, -1), 0)
    return b_key <= last_key
