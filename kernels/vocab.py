"""Softmax confidence of one position, as a reduction over its row of logits.

A summary of some part of a row is (top, rest, score, logit, token): the part's largest logit, the sum of exp(l - top)
over all of it but the proposal, and the proposal's score, logit and id. Leaving the proposal out of the sum keeps the
residual r = (sum over v != proposal of exp(l_v)) / exp(l_proposal), from which 1 - c = r / (1 + r) has full relative
precision; 1 - c computed from a float32 c has none where it matters. `slope`, the sum of exp(l - top) (top - l), is
what the entropy needs on top. NaN anywhere in the row ends up in `rest`.
"""

import triton
import triton.language as tl

from fdpp.kernels.noise import gumbel


@triton.jit
def decay(low, high):
    """exp(low - high) for low <= high, 0 where low is -inf."""
    return tl.where(low == float("-inf"), 0.0, tl.exp(low - high))


@triton.jit
def summarize_tile(b_logit, o_v, m_v, seed, i_t, temperature, SAMPLED: tl.constexpr, BY_ENTROPY: tl.constexpr):
    """The summary of one tile of logits; `o_v` are its vocabulary ids, `m_v` the ids that may be proposed."""
    b_clean = tl.where(m_v & (b_logit == b_logit), b_logit, float("-inf"))
    b_score = b_clean
    if SAMPLED:
        b_score += temperature * gumbel(seed, o_v, i_t)
    score, i_best = tl.max(b_score, 0, return_indices=True, return_indices_tie_break_left=True)
    token = tl.min(o_v, 0) + i_best
    m_token = o_v == token
    if SAMPLED:
        top = tl.max(b_clean, 0)
        logit = tl.sum(tl.where(m_token, b_clean, 0.0), 0)
    else:
        top = score
        logit = score
    b_weight = tl.where(m_v, tl.exp(b_logit - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    rest = tl.sum(tl.where(m_token & (b_logit == b_logit), 0.0, b_weight), 0)
    slope = 0.0
    if BY_ENTROPY:
        slope = tl.sum(tl.where(b_weight > 0.0, b_weight * (top - b_logit), 0.0), 0)
    return top, rest, score, logit, token, slope


@triton.jit
def merge(top1, rest1, score1, logit1, token1, slope1, top2, rest2, score2, logit2, token2, slope2):
    """The summary of two parts of a row; the first holds the lower ids, so it wins a tie."""
    top = tl.maximum(top1, top2)
    decay1, decay2 = decay(top1, top), decay(top2, top)
    slope = decay1 * slope1 + decay2 * slope2
    slope += tl.where(decay1 > 0.0, (top - top1) * (decay1 * rest1 + decay(logit1, top)), 0.0)
    slope += tl.where(decay2 > 0.0, (top - top2) * (decay2 * rest2 + decay(logit2, top)), 0.0)
    first = score1 >= score2
    loser = tl.where(first, logit2, logit1)
    rest = decay1 * rest1 + decay2 * rest2 + decay(loser, top)
    return (
        top,
        rest,
        tl.where(first, score1, score2),
        tl.where(first, logit1, logit2),
        tl.where(first, token1, token2),
        slope,
    )


@triton.jit
def summarize_row(
    row,
    start,
    stop,
    mask_id,
    seed,
    i_t,
    temperature,
    SAMPLED: tl.constexpr,
    BY_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The summary of `row[start:stop]`, the mask id left out."""
    top, rest, score, logit, token, slope = float("-inf"), 0.0, float("-inf"), float("-inf"), start, 0.0
    for i_v in range(start, stop, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < stop
        b_logit = tl.load(row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        tile = summarize_tile(b_logit, o_v, m_v & (o_v != mask_id), seed, i_t, temperature, SAMPLED, BY_ENTROPY)
        top, rest, score, logit, token, slope = merge(
            top, rest, score, logit, token, slope, tile[0], tile[1], tile[2], tile[3], tile[4], tile[5]
        )
    return top, rest, score, logit, token, slope
