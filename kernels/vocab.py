"""Softmax confidence of one position, as a reduction over its row of logits.

A `Summary` leaves the proposal out of its sum, `rest`. That keeps the residual
r = (sum over v != proposal of exp(l_v)) / exp(l_proposal), from which 1 - c = r / (1 + r) has full relative precision;
1 - c computed from a float32 c has none where it matters.

A program reads its part of a row tile by tile, and each lane of the tile keeps `Lanes` of the ids that it meets: the
loop is elementwise, and lanes are brought together once, behind it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fdpp.kernels.draw import draw_inside, group_scores
from fdpp.kernels.noise import GROUP
from fdpp.kernels.shape import LOG2_E

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""The lowest finite float32."""
NO_TILE = tl.constexpr(0x7FFF0000)
"""Plus a lane it is above every id, and still an int32."""


class Summary(NamedTuple):
    """The summary of a part of a row of logits, or of several rows.

    Attributes:
        top: the part's largest logit.
        rest: the sum of exp(l - top) over all of the part but one of the largest logits, which sampling need not
            propose; NaN if the part holds a NaN.
        score: the proposal's logit or, when sampling, its group's score (see `fdpp.kernels.draw`).
        logit: the proposal's logit.
        token: the proposal.
        slope: the sum of exp(l - top) (top - l), which only the entropy needs.
        second: the largest logit but one, equal to `top` where two tie, which only the margin needs.
    """

    top: tl.tensor
    rest: tl.tensor
    score: tl.tensor
    logit: tl.tensor
    token: tl.tensor
    slope: tl.tensor
    second: tl.tensor


@triton.jit
def decay(low, high):
    """exp(low - high) for low <= high, 0 where low is -inf."""
    return tl.where(low == float("-inf"), 0.0, tl.exp(low - high))


class Lanes(NamedTuple):
    """What the lanes of a tile have met of a part of a row; `[BLOCK_V]`, and what is of groups `[BLOCK_V / GROUP]`.

    Attributes:
        top: the largest logit, `LOWEST` before there is one.
        others: the sum of exp(l - top) over all but one of the largest logits; NaN if there was a NaN. It starts at -1,
            what an empty sum without its largest member is: the first logit needs no case of its own.
        slope: the sum of exp(l - top) (top - l), which only the entropy needs.
        second: the largest logit but one, at least `LOWEST` once there is one logit; only the margin needs it.
        tile: the first id of the tile that the largest logit is in, `NO_TILE` before there is one.
        score, group: the best score of a group, `LOWEST` before there is one, and the group. Only sampling needs them.
    """

    top: tl.tensor
    others: tl.tensor
    slope: tl.tensor
    second: tl.tensor
    tile: tl.tensor
    score: tl.tensor
    group: tl.tensor


@triton.jit
def load_tile(row, i_v, start, stop, mask_id, BLOCK_V: tl.constexpr):
    """The logits `[BLOCK_V]` from id `i_v` on, -inf at `mask_id` and outside `start` to `stop`.

    Ids are compared in the tiles that need it alone. The logits keep their dtype, so that nothing waits for them here.
    """
    o_v = i_v + tl.arange(0, BLOCK_V)
    if (i_v < start) | (i_v + BLOCK_V > stop) | ((i_v <= mask_id) & (mask_id < i_v + BLOCK_V)):
        b_logit = tl.load(row + o_v, mask=(o_v >= start) & (o_v < stop), other=float("-inf"))
        b_logit = tl.where(o_v == mask_id, tl.full([BLOCK_V], float("-inf"), tl.float32).to(b_logit.dtype), b_logit)
    else:
        b_logit = tl.load(row + o_v)
    return b_logit


@triton.jit
def meet(lanes, b_logit, i_v, seed, i_t, temperature, SAMPLED: tl.constexpr, ORDER: tl.constexpr):
    """The lanes after the tile `b_logit` `[BLOCK_V]` with ids from `i_v` on, below those of the tiles before.

    One exponential serves both cases, a logit below the top and one above. A NaN compares false and stays in the sum.
    """
    m_new = b_logit >= lanes.top
    b_gap = tl.abs(b_logit - lanes.top)
    b_decay = tl.exp2(b_gap * -LOG2_E)
    b_keep = tl.where(m_new, b_decay, 1.0)
    b_top = tl.where(m_new, b_logit, lanes.top)
    b_others = lanes.others * b_keep + b_decay
    b_slope = lanes.slope
    if ORDER == "entropy":
        b_shift = b_gap * tl.where(m_new, b_others, b_decay)
        b_slope = b_slope * b_keep + tl.where(b_decay > 0.0, b_shift, 0.0)
    b_second = lanes.second
    if ORDER == "margin":
        b_second = tl.maximum(b_second, tl.minimum(b_logit, lanes.top))
    b_score, b_group = lanes.score, lanes.group
    if SAMPLED:
        GROUPS: tl.constexpr = lanes.score.shape[0]
        o_group = i_v // GROUP + tl.arange(0, GROUPS)
        b_groups = tl.reshape(b_logit, [GROUPS, b_logit.shape[0] // GROUPS])
        b_new = group_scores(b_groups, o_group, seed, i_t, temperature)
        m_better = b_new >= b_score
        b_score, b_group = tl.where(m_better, b_new, b_score), tl.where(m_better, o_group, b_group)
    return Lanes(b_top, b_others, b_slope, b_second, tl.where(m_new, i_v, lanes.tile), b_score, b_group)


@triton.jit
def gather_lanes(lanes, start, ORDER: tl.constexpr):
    """The summary of all lanes, whose proposal is the largest logit; without one its token is `start`.

    A lane without one adds nothing: its weight, `others + 1`, is 0.
    """
    o_v = lanes.tile + tl.arange(0, lanes.tile.shape[0])
    top = tl.max(lanes.top, 0)
    token = tl.min(tl.where(lanes.top == top, o_v, NO_TILE), 0)
    m_best = o_v == token
    b_decay = tl.exp2((lanes.top - top) * LOG2_E)
    rest = tl.sum(lanes.others * b_decay + tl.where(m_best, 0.0, b_decay), 0)
    second = 0.0
    if ORDER == "margin":
        second = tl.max(tl.where(m_best, lanes.second, lanes.top), 0)
    slope = 0.0
    if ORDER == "entropy":
        b_shift = tl.where(b_decay > 0.0, (top - lanes.top) * (lanes.others + 1.0), 0.0)
        slope = tl.sum((lanes.slope + b_shift) * b_decay, 0)
    m_none = token >= NO_TILE
    # Without a proposal only lane 0 is left with its -1; a NaN stays.
    rest = tl.where(rest < 0.0, 0.0, rest)
    top = tl.where(m_none, float("-inf"), top)
    return Summary(top, rest, top, top, tl.where(m_none, start, token), slope, second)


@triton.jit
def drawn(lanes, row, start, stop, mask_id, seed, i_t, temperature, scale):
    """Score, logit and token of what the lanes' best group gives, whose logits are read once more."""
    WIDTH: tl.constexpr = lanes.top.shape[0] // lanes.score.shape[0]
    score = tl.max(lanes.score, 0)
    group = tl.min(tl.where(lanes.score == score, lanes.group, NO_TILE), 0)
    m_none = group >= NO_TILE
    i_v = tl.where(m_none, start, group * GROUP)
    b_logit = load_tile(row, i_v, start, stop, mask_id, WIDTH).to(tl.float32) * scale
    o_group = group + tl.zeros([1], tl.int32)
    column = tl.sum(draw_inside(b_logit[None, :], o_group, seed, i_t, temperature), 0)
    logit = tl.max(tl.where(tl.arange(0, WIDTH) == column, b_logit, float("-inf")), 0)
    low = float("-inf")
    score, logit = tl.where(m_none, low, score), tl.where(m_none, low, logit)
    return score, logit, tl.where(m_none, start, i_v + column)


@triton.jit
def merge(a, b, ORDER: tl.constexpr):
    """The summary of two parts of a row; `a` holds the lower ids, so it wins a tie."""
    top, low = tl.maximum(a.top, b.top), tl.minimum(a.top, b.top)
    decay_a, decay_b = decay(a.top, top), decay(b.top, top)
    slope = decay_a * a.slope + decay_b * b.slope
    slope += tl.where(decay_a > 0.0, (top - a.top) * decay_a * (a.rest + 1.0), 0.0)
    slope += tl.where(decay_b > 0.0, (top - b.top) * decay_b * (b.rest + 1.0), 0.0)
    second = a.second
    if ORDER == "margin":
        second = tl.maximum(tl.maximum(a.second, b.second), low)
    rest = decay_a * a.rest + decay_b * b.rest + decay(low, top)
    first = a.score >= b.score
    score, logit = tl.where(first, a.score, b.score), tl.where(first, a.logit, b.logit)
    return Summary(top, rest, score, logit, tl.where(first, a.token, b.token), slope, second)


@triton.jit
def summarize_row(
    row,
    start,
    stop,
    mask_id,
    seed,
    i_t,
    temperature,
    scale,
    SAMPLED: tl.constexpr,
    ORDER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The summary of `scale * row[start:stop]`, the mask id left out; nothing where `stop` is not above `start`.

    From the last tile to the first, so that the lower id wins a tie by >=. Two tiles are on their way at a time, but
    not when sampling, whose arithmetic takes longer than the wait.
    """
    GROUPS: tl.constexpr = BLOCK_V // GROUP if BLOCK_V > GROUP else 1
    b_lowest, b_zero = tl.full([BLOCK_V], LOWEST, dtype=tl.float32), tl.zeros([BLOCK_V], dtype=tl.float32)
    b_none = tl.full([BLOCK_V], NO_TILE, dtype=tl.int32)
    b_score, b_group = tl.full([GROUPS], LOWEST, dtype=tl.float32), tl.full([GROUPS], NO_TILE, dtype=tl.int32)
    lanes = Lanes(b_lowest, b_zero - 1.0, b_zero, b_zero + float("-inf"), b_none, b_score, b_group)
    tiles = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_V)
    for i in range(0, tiles, 1 if SAMPLED else 2):
        i_v = start + (tiles - 1 - i) * BLOCK_V
        b_high = load_tile(row, i_v, start, stop, mask_id, BLOCK_V)
        if not SAMPLED:
            b_low = load_tile(row, i_v - BLOCK_V, start, stop, mask_id, BLOCK_V)
        lanes = meet(lanes, b_high.to(tl.float32) * scale, i_v, seed, i_t, temperature, SAMPLED, ORDER)
        if not SAMPLED:
            lanes = meet(lanes, b_low.to(tl.float32) * scale, i_v - BLOCK_V, seed, i_t, temperature, SAMPLED, ORDER)
    summary = gather_lanes(lanes, start, ORDER)
    if SAMPLED:
        score, logit, token = drawn(lanes, row, start, stop, mask_id, seed, i_t, temperature, scale)
        summary = Summary(summary.top, summary.rest, score, logit, token, summary.slope, summary.second)
    return summary
