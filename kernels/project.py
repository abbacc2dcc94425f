"""The head and the confidence in one pass: the logits of a tile are made, summarized and forgotten.

A program multiplies a tile of rows by one split of the vocabulary and keeps only the rows' summaries (see `vocab`).
Rows come compacted: `order` lists the masked ones first, `count` says how many there are, and a program whose rows are
all beyond it ends at once, so the grid does not depend on data.
"""

import triton
import triton.language as tl

from fdpp.kernels.decide import decide, store_partial
from fdpp.kernels.draw import draw_inside, group_scores, inverse
from fdpp.kernels.noise import GROUP
from fdpp.kernels.vocab import Summary, merge


@triton.jit
def tile_logits(hidden, weight, o_h, m_r, o_v, m_v, D, stride_w, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Logits `[R, V]` in float32 of the rows at `hidden + o_h` and the vocabulary ids `o_v`."""
    b_logit = tl.zeros([o_h.shape[0], o_v.shape[0]], dtype=tl.float32)
    o_w = o_v.to(tl.int64) * stride_w
    for i_d in range(0, D, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_h = tl.load(hidden + o_h[:, None] + o_d[None, :], mask=m_r[:, None] & m_d[None, :], other=0.0)
        b_w = tl.load(weight + o_w[None, :] + o_d[:, None], mask=m_v[None, :] & m_d[:, None], other=0.0)
        b_logit = tl.dot(b_h, b_w, b_logit, input_precision=PRECISION)
    return b_logit


@triton.jit
def summarize_rows(b_logit, i_v, b_seed, o_t, temperature, SAMPLED: tl.constexpr, ORDER: tl.constexpr):
    """The summary of every row of a tile `[R, V]` with ids from `i_v` on, -inf at ids that may not be proposed.

    When sampling the tile is a group (see `fdpp.kernels.draw`): its logits are there now, and no more when it has won.
    """
    o_v = i_v + tl.arange(0, b_logit.shape[1])
    b_clean = tl.where(b_logit == b_logit, b_logit, float("-inf"))
    top, i_best = tl.max(b_clean, 1, return_indices=True, return_indices_tie_break_left=True)
    m_left_out = o_v[None, :] == (i_v + i_best)[:, None]
    score, logit, token = top, top, i_v + i_best
    if SAMPLED:
        o_group = tl.zeros_like(i_best) + i_v // GROUP
        score = group_scores(b_clean, o_group, b_seed, o_t, temperature)
        token = i_v + draw_inside(b_clean, o_group, b_seed, o_t, temperature)
        logit = tl.max(tl.where(o_v[None, :] == token[:, None], b_clean, float("-inf")), 1)
    b_weight = tl.exp(b_logit - tl.where(top == float("-inf"), 0.0, top)[:, None])
    rest = tl.sum(tl.where(m_left_out & (b_logit == b_logit), 0.0, b_weight), 1)
    second = top
    if ORDER == "margin":
        second = tl.max(tl.where(m_left_out, float("-inf"), b_clean), 1)
    slope = tl.zeros_like(top)
    if ORDER == "entropy":
        slope = tl.sum(tl.where(b_weight > 0.0, b_weight * (top[:, None] - b_logit), 0.0), 1)
    return Summary(top, rest, score, logit, token, slope, second)


@triton.jit(do_not_specialize=["B", "T", "V", "mask_id"], do_not_specialize_on_alignment=["seeds"])
def project_kernel(
    hidden,
    weight,
    order,
    count,
    seeds,
    partial,
    mask_logit,
    B,
    T,
    V,
    D,
    stride_hb,
    stride_ht,
    stride_w,
    split_len,
    mask_id,
    temperature,
    ORDER: tl.constexpr,
    SAMPLED: tl.constexpr,
    TEMPERED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid (row tiles, SPLITS): the programs of one split run side by side and share its weights in L2."""
    scale = 1.0
    if TEMPERED:
        scale, temperature = inverse(temperature), 1.0
    i_r, i_s = tl.program_id(0), tl.program_id(1)
    wanted = tl.load(count)
    if i_r * BLOCK_R < wanted:
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < wanted
        o_bt = tl.load(order + o_r, mask=m_r, other=0)
        o_b, o_t = o_bt // T, (o_bt % T).to(tl.int32)
        o_h = o_b * stride_hb + o_t.to(tl.int64) * stride_ht
        b_seed = o_b
        if SAMPLED:
            b_seed = tl.load(seeds + o_b, mask=m_r, other=0)
        start = i_s * split_len
        stop = tl.minimum(start + split_len, V)
        b_low, b_zero = tl.full([BLOCK_R], float("-inf"), dtype=tl.float32), tl.zeros([BLOCK_R], dtype=tl.float32)
        summary = Summary(b_low, b_zero, b_low, b_low, tl.zeros([BLOCK_R], dtype=tl.int32) + start, b_zero, b_low)
        for i_v in range(start, stop, BLOCK_V):
            o_v = i_v + tl.arange(0, BLOCK_V)
            m_v = o_v < stop
            b_logit = tile_logits(hidden, weight, o_h, m_r, o_v, m_v, D, stride_w, BLOCK_D, PRECISION) * scale
            if (i_v <= mask_id) & (mask_id < tl.minimum(i_v + BLOCK_V, stop)):
                b_mask_logit = tl.sum(tl.where((o_v == mask_id)[None, :], b_logit, 0.0), 1)
                tl.store(mask_logit + o_bt, b_mask_logit, mask=m_r)
            b_logit = tl.where((m_v & (o_v != mask_id))[None, :], b_logit, float("-inf"))
            tile = summarize_rows(b_logit, i_v, b_seed, o_t, temperature, SAMPLED, ORDER)
            summary = merge(summary, tile, ORDER)
        store_partial(partial, o_bt, i_s, m_r, summary, B, T, SAMPLED, ORDER, SPLITS)


# As in `select_kernel`.
@triton.jit(
    do_not_specialize=["B", "T", "V", "stride_pb", "mask_id"],
    do_not_specialize_on_alignment=["tokens", "active", "numbers"],
)
def decide_kernel(
    tokens,
    active,
    numbers,
    out,
    partial,
    mask_logit,
    B,
    T,
    V,
    stride_pb,
    mask_id,
    ACCEPTS: tl.constexpr,
    ORDER: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COUNT_RANKS: tl.constexpr,
):
    """Grid (B): one program a sequence.

    A launch of its own: a tile of compacted rows may hold those of several sequences, so no ticket of a sequence could
    say when all of its rows are there.
    """
    i_b = tl.program_id(0)
    decide(
        tokens,
        active,
        numbers,
        out,
        partial,
        mask_logit + i_b.to(tl.int64) * T,
        i_b,
        B,
        T,
        V,
        1,
        stride_pb,
        mask_id,
        1.0,
        ACCEPTS,
        ORDER,
        SAMPLED,
        HAS_ACTIVE,
        SPLITS,
        BLOCK_T,
        COUNT_RANKS,
    )
