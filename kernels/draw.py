"""A draw from softmax(l / temperature) in one pass: a group of 64 ids by its mass, then an id inside it.

The group is the largest of log(mass) + Gumbel noise, the Gumbel-max trick on groups. The id is the first whose
cumulative mass exceeds a uniform part of the group's. So a group costs a quarter of a Philox and two logarithms, where
noise for every id would cost 64 times as much, and groups are all that tiles, splits and programs need to keep whole.
"""

import triton
import triton.language as tl

from fdpp.kernels.noise import GROUP, group_gumbel, place
from fdpp.kernels.shape import LOG2_E

HIGHEST = tl.constexpr(3.4028234663852886e38)
"""The highest finite float32."""
COLDEST, HOTTEST = tl.constexpr(2.0**-126), tl.constexpr(2.0**100)
"""Temperatures beyond count as these: float32 divides by all in between, and their products with noise are finite."""


@triton.jit
def clamped(temperature):
    return tl.minimum(tl.maximum(temperature, COLDEST), HOTTEST)


@triton.jit
def inverse(temperature):
    return 1.0 / clamped(temperature)


@triton.jit
def masses(b_logit, temperature):
    """Of a tile `[N, G]`: the largest logit of each row, and exp((l - largest) / temperature); a NaN counts as -inf."""
    b_clean = tl.where(b_logit == b_logit, b_logit, float("-inf"))
    b_peak = tl.max(b_clean, 1)
    # From a finite number: -inf - -inf would be NaN. Next to +inf nothing else has a mass.
    b_from = tl.where(b_peak == float("-inf"), 0.0, tl.minimum(b_peak, HIGHEST))
    return b_peak, tl.exp2((b_clean - b_from[:, None]) * (LOG2_E / clamped(temperature)))


@triton.jit
def group_scores(b_logit, o_group, seed, i_t, temperature):
    """The score `[N]` of each of the groups `o_group` `[N]`, whose logits are the rows of `b_logit` `[N, G]`."""
    b_peak, b_mass = masses(b_logit, temperature)
    return b_peak + clamped(temperature) * (tl.log(tl.sum(b_mass, 1)) + group_gumbel(seed, o_group, i_t))


@triton.jit
def draw_inside(b_logit, o_group, seed, i_t, temperature):
    """The column `[N]` drawn in each of the groups `o_group` `[N]`, whose logits are the rows of `b_logit` `[N, G]`."""
    _, b_mass = masses(b_logit, temperature)
    b_sum = tl.cumsum(b_mass, 1)
    b_target = place(seed, o_group, i_t) * tl.max(b_sum, 1)
    o_g = tl.arange(0, b_logit.shape[1])[None, :]
    # Sums are rounded, so only ids with a mass of their own are asked; the last of them where u is rounded to 1.
    m_held = b_mass > 0.0
    column = tl.min(tl.where(m_held & (b_sum > b_target[:, None]), o_g, GROUP), 1)
    return tl.where(column < GROUP, column, tl.max(tl.where(m_held, o_g, 0), 1))
