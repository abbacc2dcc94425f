"""A sequence's decision from the summaries of its rows: merge the splits, rank, apply the rule, write all outputs."""

from typing import NamedTuple

import triton
import triton.language as tl

from fdpp.kernels.profile import commit_by_count, commit_by_sort, cost, sort_key
from fdpp.kernels.vocab import Summary, decay


class Partial(NamedTuple):
    """Scratch for the summaries of all splits: `planes` float32 `[5, B, T, SPLITS]`, `token` int32 `[B, T, SPLITS]`.

    The planes are top, rest, score, logit and, by entropy, slope or, by margin, second; only those that the launch
    needs are written and read.
    """

    planes: tl.tensor
    token: tl.tensor


@triton.jit
def load_plane(planes, plane, i_b, o_t, o_s, m_ts, other, B, T, SPLITS: tl.constexpr):
    """Plane `plane` of `planes` `[planes, B, T, SPLITS]` at sequence `i_b`, positions `o_t` and splits `o_s`."""
    # .cg skips this multiprocessor's L1, which may be stale: other programs wrote these.
    first = (plane * B + i_b).to(tl.int64) * T * SPLITS
    return tl.load(
        planes + first + (o_t[:, None] * SPLITS + o_s[None, :]), mask=m_ts, other=other, cache_modifier=".cg"
    )


@triton.jit
def store_partial(
    partial, o_bt, i_s, m_bt, summary, B, T, SAMPLED: tl.constexpr, ORDER: tl.constexpr, SPLITS: tl.constexpr
):
    """Write the summaries of split `i_s` where `load_plane` reads them; `o_bt`: one flat position or a tile of them."""
    plane = B.to(tl.int64) * T * SPLITS
    offset = o_bt * SPLITS + i_s
    tl.store(partial.planes + offset, summary.top, mask=m_bt)
    tl.store(partial.planes + plane + offset, summary.rest, mask=m_bt)
    if SAMPLED:
        tl.store(partial.planes + 2 * plane + offset, summary.score, mask=m_bt)
        tl.store(partial.planes + 3 * plane + offset, summary.logit, mask=m_bt)
    if ORDER == "entropy":
        tl.store(partial.planes + 4 * plane + offset, summary.slope, mask=m_bt)
    if ORDER == "margin":
        tl.store(partial.planes + 4 * plane + offset, summary.second, mask=m_bt)
    tl.store(partial.token + offset, summary.token, mask=m_bt)


@triton.jit
def merge_splits(
    partial,
    i_b,
    o_t,
    m_t,
    m_candidate,
    B,
    T,
    SAMPLED: tl.constexpr,
    ORDER: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Each position's summary from those of its vocabulary splits (see `vocab.merge`).

    All are loaded before any is used, in one trip to L2; where there is no candidate nobody wrote what is read.
    """
    o_s = tl.arange(0, SPLITS)
    m_ts = m_t[:, None] & (o_s >= 0)[None, :]
    b_top = load_plane(partial.planes, 0, i_b, o_t, o_s, m_ts, float("-inf"), B, T, SPLITS)
    b_rest = load_plane(partial.planes, 1, i_b, o_t, o_s, m_ts, 0.0, B, T, SPLITS)
    if SAMPLED:
        b_score = load_plane(partial.planes, 2, i_b, o_t, o_s, m_ts, float("-inf"), B, T, SPLITS)
        b_logit = load_plane(partial.planes, 3, i_b, o_t, o_s, m_ts, float("-inf"), B, T, SPLITS)
    else:
        b_score, b_logit = b_top, b_top
    b_token = load_plane(partial.token, 0, i_b, o_t, o_s, m_ts, 0, B, T, SPLITS)
    if ORDER == "entropy":
        b_slope = load_plane(partial.planes, 4, i_b, o_t, o_s, m_ts, 0.0, B, T, SPLITS)
    if ORDER == "margin":
        b_second = load_plane(partial.planes, 4, i_b, o_t, o_s, m_ts, float("-inf"), B, T, SPLITS)

    b_top = tl.where(m_candidate[:, None], b_top, float("-inf"))
    b_score = tl.where(m_candidate[:, None], b_score, float("-inf"))
    top = tl.max(b_top, 1)
    score, i_best = tl.max(b_score, 1, return_indices=True, return_indices_tie_break_left=True)
    m_best = o_s[None, :] == i_best[:, None]
    logit = score
    if SAMPLED:
        logit = tl.sum(tl.where(m_best, b_logit, 0.0), 1)
    m_left_out = m_best
    if SAMPLED:
        _, i_top = tl.max(b_top, 1, return_indices=True, return_indices_tie_break_left=True)
        m_left_out = o_s[None, :] == i_top[:, None]
    b_decay = decay(b_top, top[:, None])
    rest = tl.sum(b_rest * b_decay + tl.where(m_left_out, 0.0, b_decay), 1)
    second = top
    if ORDER == "margin":
        b_second = tl.where(m_candidate[:, None], b_second, float("-inf"))
        second = tl.max(tl.where(m_left_out, b_second, b_top), 1)
    slope = tl.zeros_like(top)
    if ORDER == "entropy":
        b_shift = tl.where(b_decay > 0.0, (top[:, None] - b_top) * b_decay * (b_rest + 1.0), 0.0)
        slope = tl.sum(b_slope * b_decay + b_shift, 1)
    return Summary(top, rest, score, logit, tl.sum(tl.where(m_best, b_token, 0), 1), slope, second)


@triton.jit
def residual_and_rank(summary, b_mask_logit, ORDER: tl.constexpr, SAMPLED: tl.constexpr):
    """Residual, what positions are ranked by, and whether the row is usable, with the mask id's logit added to the
    normaliser.

    They are ranked by the residual, by the entropy in nats, or by the odds against the margin.
    """
    top, others, logit = summary.top, summary.rest, summary.logit
    m_usable = (others == others) & (top > float("-inf")) & (top < float("inf")) & (b_mask_logit < float("inf"))
    rest = others
    if SAMPLED:
        # The proposal is one of the others, so that the difference is at least 0.
        rest = tl.where(logit == top, others, 1.0 + (others - tl.exp(logit - top)))
    rank = others
    if ORDER == "margin":
        rank = tl.where(m_usable, odds(others, top, summary.second, b_mask_logit), float("inf"))
    residual = rest * tl.exp(top - logit) + tl.exp(b_mask_logit - logit)
    residual = tl.where(m_usable, residual, float("inf"))
    if ORDER == "confidence":
        rank = residual
    if ORDER == "entropy":
        # Relative to the largest logit of all: relative to an unlikely proposal, a weight would overflow.
        peak = tl.maximum(top, b_mask_logit)
        scale, mask_weight = decay(top, peak), decay(b_mask_logit, peak)
        weight = scale * (others + 1.0)
        total = weight + mask_weight
        spread = scale * summary.slope + tl.where(scale > 0.0, (peak - top) * weight, 0.0)
        spread += tl.where(mask_weight > 0.0, (peak - b_mask_logit) * mask_weight, 0.0)
        log_total = tl.where(logit == peak, log1p(residual), tl.log(total))
        rank = tl.where(m_usable, tl.maximum(log_total + spread / total, 0.0), float("inf"))
    return residual, rank, m_usable


@triton.jit
def odds(rest, top, second, b_mask_logit):
    """(1 - m) / m of the margin m = p1 - p2, float32: (r + e2) / (1 - e2) with e2 = exp(second - top) and the residual
    r of the largest logit; +inf where the two tie.

    Through float64: 1 - e2 of a float32 e2 has no precision where the two are close.
    """
    # A row of one token has no second one, and nothing left.
    e2 = tl.exp(tl.where(rest > 0.0, second - top, float("-inf")).to(tl.float64))
    residual = (rest + tl.exp(b_mask_logit - top)).to(tl.float64)
    return ((residual + e2) / (1.0 - e2)).to(tl.float32)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, through float64 so that a small x is not rounded away."""
    return tl.log(1.0 + x.to(tl.float64)).to(tl.float32)


@triton.jit
def decide(
    tokens,
    active,
    numbers,
    out,
    partial,
    mask_logit,
    i_b,
    B,
    T,
    V,
    stride_mt,
    stride_pb,
    mask_id,
    scale,
    ACCEPTS: tl.constexpr,
    ORDER: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COUNT_RANKS: tl.constexpr,
):
    """Decide all of sequence `i_b`; `mask_logit` points to the mask id's logit at its first position, others are
    `stride_mt` apart; it is yet to be multiplied by `scale`.

    `out` is a `fdpp.Selection` of pointers.
    """
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < T
    i_bt = i_b.to(tl.int64) * T
    # No load waits for another one.
    b_token = tl.load(tokens + i_bt + o_t, mask=m_t, other=-1)
    m_candidate = m_t & (b_token == mask_id)
    if HAS_ACTIVE:
        m_candidate = m_candidate & (tl.load(active + i_bt + o_t, mask=m_t, other=0) != 0)
    m_mask = m_t & (mask_id >= 0) & (mask_id < V)
    b_mask_logit = (
        tl.load(mask_logit + o_t.to(tl.int64) * stride_mt, mask=m_mask, other=float("-inf")).to(tl.float32) * scale
    )
    p0 = tl.load(numbers + i_b * stride_pb)
    p1 = tl.load(numbers + i_b * stride_pb + 1)
    calibration = tl.load(numbers + i_b * stride_pb + 2)
    summary = merge_splits(partial, i_b, o_t, m_t, m_candidate, B, T, SAMPLED, ORDER, SPLITS)

    b_residual, b_rank_by, m_usable = residual_and_rank(summary, b_mask_logit, ORDER, SAMPLED)
    m_usable = m_usable & m_candidate
    b_confidence = tl.where(m_usable, 1.0 / (1.0 + b_residual), 0.0)

    b_key = sort_key(b_rank_by, o_t, m_candidate, m_usable)
    if COUNT_RANKS:
        m_commit = commit_by_count(b_key, cost(b_rank_by, calibration, ORDER), p0, p1, ACCEPTS)
    else:
        m_commit = commit_by_sort(b_key, calibration, p0, p1, ACCEPTS, ORDER, BLOCK_T)

    b_proposal = tl.where(m_candidate, summary.token.to(tl.int64), b_token)
    tl.store(out.tokens + i_bt + o_t, tl.where(m_commit, b_proposal, b_token), mask=m_t)
    tl.store(out.proposal + i_bt + o_t, b_proposal, mask=m_t)
    tl.store(out.confidence + i_bt + o_t, b_confidence, mask=m_t)
    tl.store(out.committed + i_bt + o_t, m_commit, mask=m_t)
    tl.store(out.remaining + i_b, tl.sum((m_candidate & (m_commit == 0)).to(tl.int32), 0))
    tl.store(out.nonfinite + i_b, tl.sum((m_candidate & (m_usable == 0)).to(tl.int32), 0))
