"""Softmax confidence of one position, as a reduction over its row of logits.

A `Summary` leaves the proposal out of its sum, `rest`. That keeps the residual
r = (sum over v != proposal of exp(l_v)) / exp(l_proposal), from which 1 - c = r / (1 + r) has full relative precision;
1 - c computed from a float32 c has none where it matters.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fdpp.kernels.noise import gumbel


class Summary(NamedTuple):
    """The summary of a part of a row of logits, or of several rows.

    Attributes:
        top: the part's largest logit.
        rest: the sum of exp(l - top) over all of the part but the proposal; NaN if it holds a NaN.
        score: the proposal's logit with its noise.
        logit: the proposal's logit.
        token: the proposal.
        slope: the sum of exp(l - top) (top - l), which only the entropy needs.
    """

    top: tl.tensor
    rest: tl.tensor
    score: tl.tensor
    logit: tl.tensor
    token: tl.tensor
    slope: tl.tensor


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
    return Summary(top, rest, score, logit, token, slope)


@triton.jit
def merge(a, b):
    """The summary of two parts of a row; `a` holds the lower ids, so it wins a tie."""
    top = tl.maximum(a.top, b.top)
    decay_a, decay_b = decay(a.top, top), decay(b.top, top)
    slope = decay_a * a.slope + decay_b * b.slope
    slope += tl.where(decay_a > 0.0, (top - a.top) * (decay_a * a.rest + decay(a.logit, top)), 0.0)
    slope += tl.where(decay_b > 0.0, (top - b.top) * (decay_b * b.rest + decay(b.logit, top)), 0.0)
    first = a.score >= b.score
    loser = tl.where(first, b.logit, a.logit)
    rest = decay_a * a.rest + decay_b * b.rest + decay(loser, top)
    score, logit = tl.where(first, a.score, b.score), tl.where(first, a.logit, b.logit)
    return Summary(top, rest, score, logit, tl.where(first, a.token, b.token), slope)


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
    summary = Summary(float("-inf"), 0.0, float("-inf"), float("-inf"), start, 0.0)
    for i_v in range(start, stop, BLOCK_V):
        o_v = i_v + tl.arange(0, BLOCK_V)
        m_v = o_v < stop
        b_logit = tl.load(row + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
        tile = summarize_tile(b_logit, o_v, m_v & (o_v != mask_id), seed, i_t, temperature, SAMPLED, BY_ENTROPY)
        summary = merge(summary, tile)
    return summary
