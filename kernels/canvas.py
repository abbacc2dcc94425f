"""One step of a canvas of uniform noise in one launch: the heads' outputs in, the next canvas out.

Other than in `fdpp.kernels.vocab`, everything comes from groups of ids (see `fdpp.kernels.draw`): a group's largest
logit, its mass and its share of the entropy give sample, argmax, entropy and lse, for one exponential a logit. Logits
are in bits, x log2(e), so that an exponential needs no factor.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fdpp.kernels.decide import load_plane, log1p
from fdpp.kernels.draw import draw_inside
from fdpp.kernels.noise import GROUP, group_gumbel, renoise
from fdpp.kernels.profile import commit_by_sort, sort_key
from fdpp.kernels.shape import shaped
from fdpp.kernels.ticket import is_last
from fdpp.kernels.vocab import LOWEST, NO_TILE

LN_2 = tl.constexpr(0.6931471805599453)


class Groups(NamedTuple):
    """What lanes, one for each group of a tile, have met of a part of a row; all `[N]`.

    Attributes:
        top: the largest logit in bits, `LOWEST` before there is one.
        first: the group it is in, `NO_TILE` before there is one.
        own: the sum of 2^(x - top) over that group.
        others: the same sum over all other groups. One of the two is NaN if there was a NaN or +inf.
        slope: the sum of 2^(x - top) (top - x) over all.
        race: the largest of 2^(peak - top) own / E over all groups, E their exponential noise.
        drawn: the group that has it, `NO_TILE` while it is 0.
    """

    top: tl.tensor
    first: tl.tensor
    own: tl.tensor
    others: tl.tensor
    slope: tl.tensor
    race: tl.tensor
    drawn: tl.tensor


class Part(NamedTuple):
    """Of a part of a row, or of several rows: its largest logit, the sum of 2^(x - top) over all but one of the largest
    logits, the sum of 2^(x - top) (top - x), the drawn group's race, the id drawn in it, and the lowest likeliest id.
    """

    top: tl.tensor
    rest: tl.tensor
    slope: tl.tensor
    race: tl.tensor
    sample: tl.tensor
    argmax: tl.tensor


@triton.jit
def load_bits(row, i_v, stop, cap, scale, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr):
    """The logits in bits `[BLOCK_V]` from id `i_v` on, -inf from `stop` on; ids are compared in the last tile alone."""
    o_v = i_v + tl.arange(0, BLOCK_V)
    whole = i_v + BLOCK_V <= stop
    b_output = tl.load(row + o_v) if whole else tl.load(row + o_v, mask=o_v < stop, other=0.0)
    b_x = shaped(b_output, cap, scale, CAPPED)
    if not whole:
        b_x = tl.where(o_v < stop, b_x, float("-inf"))
    return b_x


@triton.jit
def at_least_lowest(x):
    """`x`, `LOWEST` in the place of -inf and NaN; differences of what remains are no NaN."""
    return tl.where(x > LOWEST, x, LOWEST)


@triton.jit
def of_groups(b_x):
    """Of each row of `b_x` `[N, GROUP]`, a group's logits in bits: the largest, the sum of 2^(x - largest), and that of
    2^(x - largest) (largest - x)."""
    b_peak = at_least_lowest(tl.max(b_x, 1))
    b_gap = b_x - b_peak[:, None]
    b_mass = tl.exp2(b_gap)
    # Not -inf: times a mass of 0 it would be NaN.
    return b_peak, tl.sum(b_mass, 1), tl.sum(b_mass * tl.minimum(-b_gap, 1e4), 1)


@triton.jit
def meet_groups(groups, b_peak, b_own, b_slope, b_noise, o_group):
    """The lanes after one group each, `o_group`, above those before: the lower id wins a tie by >.

    `b_noise` is 1 / E. The largest of mass / E is that of log(mass) - log(E), and needs no logarithm of the mass.
    """
    m_new = (b_peak > groups.top) | (groups.first == NO_TILE)
    b_step = tl.minimum(tl.abs(b_peak - groups.top), 1e4)
    b_decay = tl.exp2(-b_step)
    b_low = b_decay * tl.where(m_new, groups.own + groups.others, b_own)
    b_low_slope = tl.where(m_new, groups.slope, b_slope)
    b_high_slope = tl.where(m_new, b_slope, groups.slope)
    b_race = b_own * b_noise * tl.where(m_new, 1.0, b_decay)
    b_best = groups.race * tl.where(m_new, b_decay, 1.0)
    m_better = b_race > b_best
    return Groups(
        tl.maximum(b_peak, groups.top),
        tl.where(m_new, o_group, groups.first),
        tl.where(m_new, b_own, groups.own),
        b_low + tl.where(m_new, 0.0, groups.others),
        b_high_slope + b_decay * b_low_slope + b_step * b_low,
        tl.where(m_better, b_race, b_best),
        tl.where(m_better, o_group, groups.drawn),
    )


@triton.jit
def load_group(row, group, stop, cap, scale, CAPPED: tl.constexpr):
    """A group that was met before: its first id, its logits in bits `[GROUP]`; -inf where there is no such group."""
    i_v = tl.where(group == NO_TILE, stop, group * GROUP)
    return i_v, load_bits(row, i_v, stop, cap, scale, CAPPED, GROUP)


@triton.jit
def gather_groups(groups, row, stop, seed, i_t, cap, scale, CAPPED: tl.constexpr):
    """The `Part` of all lanes. Two groups are read once more: the drawn one, and the one with the largest logit, whose
    sum would else lose what little a certain position leaves beside it."""
    o_g = tl.arange(0, GROUP)
    top = tl.max(groups.top, 0)
    first = tl.min(tl.where(groups.top == top, groups.first, NO_TILE), 0)
    i_top, b_x = load_group(row, first, stop, cap, scale, CAPPED)
    column = tl.min(tl.where(at_least_lowest(b_x) == top, o_g, GROUP - 1), 0)
    own = tl.sum(tl.where(o_g == column, 0.0, tl.exp2(b_x - top)), 0)

    b_step = tl.minimum(top - groups.top, 1e4)
    b_decay = tl.exp2(-b_step)
    b_met = groups.own + groups.others
    rest = own + tl.sum(b_decay * tl.where(groups.first == first, groups.others, b_met), 0)
    slope = tl.sum(b_decay * (groups.slope + b_step * b_met), 0)

    b_race = b_decay * groups.race
    race = tl.max(b_race, 0)
    drawn = tl.min(tl.where(b_race == race, groups.drawn, NO_TILE), 0)
    i_drawn, b_x = load_group(row, drawn, stop, cap, scale, CAPPED)
    o_drawn = i_drawn // GROUP + tl.zeros([1], tl.int32)
    inside = tl.sum(draw_inside(b_x[None, :] * LN_2, o_drawn, seed, i_t, 1.0), 0)
    return Part(top, rest, slope, race, i_drawn + inside, i_top + column)


@triton.jit
def summarize_part(
    row, start, stop, seed, i_t, cap, scale, CAPPED: tl.constexpr, BLOCK_V: tl.constexpr, TILES: tl.constexpr
):
    """The `Part` `row[start:stop]`; `start` is a multiple of `GROUP`.

    Noise is made for `TILES` tiles at a time: made for one, all threads that share a group would make the same.
    """
    N: tl.constexpr = BLOCK_V // GROUP
    b_zero, b_none = tl.zeros([N], tl.float32), tl.full([N], NO_TILE, tl.int32)
    groups = Groups(b_zero + LOWEST, b_none, b_zero, b_zero, b_zero, b_zero, b_none)
    o_lane, o_tile = tl.arange(0, N), tl.arange(0, TILES)[None, :]
    tiles = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_V)
    for i in range(0, tiles, TILES):
        i_block = start + i * BLOCK_V
        b_noise = tl.exp(group_gumbel(seed, i_block // GROUP + o_tile * N + o_lane[:, None], i_t))
        for i_tile in range(0, tl.minimum(tiles - i, TILES)):
            i_v = i_block + i_tile * BLOCK_V
            b_x = load_bits(row, i_v, stop, cap, scale, CAPPED, BLOCK_V)
            b_peak, b_own, b_slope = of_groups(tl.reshape(b_x, [N, GROUP]))
            b_here = tl.sum(tl.where(o_tile == i_tile, b_noise, 0.0), 1)
            groups = meet_groups(groups, b_peak, b_own, b_slope, b_here, i_v // GROUP + o_lane)
    return gather_groups(groups, row, stop, seed, i_t, cap, scale, CAPPED)


@triton.jit
def store_part(partial, i_bt, i_s, part, B, T, SPLITS: tl.constexpr):
    """Write the `part` of split `i_s` where `load_plane` reads it."""
    plane = B.to(tl.int64) * T * SPLITS
    offset = i_bt * SPLITS + i_s
    tl.store(partial.planes + offset, part.top)
    tl.store(partial.planes + plane + offset, part.rest)
    tl.store(partial.planes + 2 * plane + offset, part.slope)
    tl.store(partial.planes + 3 * plane + offset, part.race)
    tl.store(partial.token + offset, part.sample)
    tl.store(partial.token + plane + offset, part.argmax)


@triton.jit
def merge_parts(partial, i_b, o_t, m_t, B, T, SPLITS: tl.constexpr):
    """The `Part` of every whole row, from those of its splits, which are loaded before any is used."""
    o_s = tl.arange(0, SPLITS)
    m_ts = m_t[:, None] & (o_s >= 0)[None, :]
    b_top = load_plane(partial.planes, 0, i_b, o_t, o_s, m_ts, LOWEST, B, T, SPLITS)
    b_rest = load_plane(partial.planes, 1, i_b, o_t, o_s, m_ts, 0.0, B, T, SPLITS)
    b_slope = load_plane(partial.planes, 2, i_b, o_t, o_s, m_ts, 0.0, B, T, SPLITS)
    b_race = load_plane(partial.planes, 3, i_b, o_t, o_s, m_ts, 0.0, B, T, SPLITS)
    b_sample = load_plane(partial.token, 0, i_b, o_t, o_s, m_ts, 0, B, T, SPLITS)
    b_argmax = load_plane(partial.token, 1, i_b, o_t, o_s, m_ts, 0, B, T, SPLITS)

    top, i_top = tl.max(b_top, 1, return_indices=True, return_indices_tie_break_left=True)
    b_step = tl.minimum(top[:, None] - b_top, 1e4)
    b_decay = tl.exp2(-b_step)
    m_top = o_s[None, :] == i_top[:, None]
    rest = tl.sum(b_decay * (b_rest + tl.where(m_top, 0.0, 1.0)), 1)
    slope = tl.sum(b_decay * (b_slope + b_step * (b_rest + 1.0)), 1)
    race, i_race = tl.max(b_decay * b_race, 1, return_indices=True, return_indices_tie_break_left=True)
    sample = tl.sum(tl.where(o_s[None, :] == i_race[:, None], b_sample, 0), 1)
    return Part(top, rest, slope, race, sample, tl.sum(tl.where(m_top, b_argmax, 0), 1))


@triton.jit
def take_step(
    numbers,
    out,
    partial,
    seed,
    i_b,
    B,
    T,
    V,
    ACCEPTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """All outputs of sequence `i_b`, from the parts of its rows; `out` is a `fdpp.CanvasStep` of pointers."""
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < T
    i_bt = i_b.to(tl.int64) * T
    bound = tl.load(numbers)
    part = merge_parts(partial, i_b, o_t, m_t, B, T, SPLITS)

    # A NaN or +inf is in the sum, even where it is the largest.
    m_usable = m_t & (part.rest == part.rest) & (part.top > LOWEST) & (part.top < float("inf"))
    log_rest = log1p(part.rest)
    b_entropy = tl.where(m_usable, log_rest + LN_2 * part.slope / (1.0 + part.rest), float("inf"))
    b_key = sort_key(b_entropy, o_t, m_t, m_usable)
    # At least one position commits there, usable or not.
    m_accepted = m_usable & commit_by_sort(b_key, 0.0, bound, 0.0, ACCEPTS, "entropy", BLOCK_T)

    b_fresh = renoise(seed, o_t, V)
    b_sample = tl.where(m_usable, part.sample.to(tl.int64), b_fresh)
    tl.store(out.canvas + i_bt + o_t, tl.where(m_accepted, b_sample, b_fresh), mask=m_t)
    tl.store(out.sample + i_bt + o_t, b_sample, mask=m_t)
    tl.store(out.argmax + i_bt + o_t, part.argmax.to(tl.int64), mask=m_t)
    tl.store(out.entropy + i_bt + o_t, b_entropy, mask=m_t)
    tl.store(out.lse + i_bt + o_t, tl.where(m_usable, LN_2 * part.top + log_rest, float("nan")), mask=m_t)
    tl.store(out.accepted + i_bt + o_t, m_accepted, mask=m_t)
    total = tl.sum(tl.where(m_t, b_entropy, 0.0).to(tl.float64), 0)
    tl.store(out.mean_entropy + i_b, (total / T).to(tl.float32))


@triton.jit
def keep_canvas(canvas, argmax, out, i_b, T, BLOCK_T: tl.constexpr):
    """All outputs of a finished sequence."""
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < T
    i_bt = i_b.to(tl.int64) * T
    b_canvas = tl.load(canvas + i_bt + o_t, mask=m_t)
    b_argmax = tl.load(argmax + i_bt + o_t, mask=m_t)
    b_zero = tl.zeros([BLOCK_T], tl.float32)
    tl.store(out.canvas + i_bt + o_t, b_canvas, mask=m_t)
    tl.store(out.sample + i_bt + o_t, b_canvas, mask=m_t)
    tl.store(out.argmax + i_bt + o_t, b_argmax, mask=m_t)
    tl.store(out.entropy + i_bt + o_t, b_zero, mask=m_t)
    tl.store(out.lse + i_bt + o_t, b_zero, mask=m_t)
    tl.store(out.accepted + i_bt + o_t, b_zero > 0.0, mask=m_t)
    tl.store(out.mean_entropy + i_b, 0.0)


# As in `select_kernel`; V is no constant where it is 1, since an id is drawn below it.
@triton.jit(
    do_not_specialize=["B", "T", "V", "stride_nb"],
    do_not_specialize_on_alignment=["canvas", "argmax", "finished", "numbers", "seeds"],
)
def canvas_kernel(
    logits,
    canvas,
    argmax,
    finished,
    numbers,
    seeds,
    out,
    partial,
    ticket,
    B,
    T,
    V,
    stride_lb,
    stride_lt,
    stride_nb,
    split_len,
    cap,
    ACCEPTS: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_FINISHED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Grid (B * T * SPLITS): each program summarizes one split of one row; a sequence's last one takes the step.

    Nobody waits, as in `select_kernel`. Of finished sequences no logit is read.
    """
    i_s = tl.program_id(0) % SPLITS
    i_t = tl.program_id(0) // SPLITS % T
    i_b = tl.program_id(0) // SPLITS // T

    running = True
    if HAS_FINISHED:
        running = tl.load(finished + i_b) == 0
    seed = tl.load(seeds + i_b)
    if running:
        temperature = tl.load(numbers + i_b * stride_nb + 1)
        scale = (1.4426950408889634 / temperature).to(tl.float32)
        row = logits + i_b.to(tl.int64) * stride_lb + i_t.to(tl.int64) * stride_lt
        start = i_s * split_len
        stop = tl.minimum(start + split_len, V)
        part = summarize_part(row, start, stop, seed, i_t, cap, scale, CAPPED, BLOCK_V, TILES)
        store_part(partial, i_b.to(tl.int64) * T + i_t, i_s, part, B, T, SPLITS)

    if is_last(ticket + i_b, T * SPLITS):
        if running:
            take_step(numbers + i_b * stride_nb, out, partial, seed, i_b, B, T, V, ACCEPTS, SPLITS, BLOCK_T)
        else:
            keep_canvas(canvas, argmax, out, i_b, T, BLOCK_T)
