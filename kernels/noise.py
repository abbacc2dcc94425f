"""Random numbers from a counter: the same whatever the tiles, the splits, the device and the batch.

Philox4x32-10 (Salmon et al., SC 2011) with a stream's seed as key. Its counter is (number, position, use, 0): what is
drawn for one use says nothing of another's.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(64)
"""Ids of a group (see `fdpp.kernels.draw`): a tile of the fused head."""
CHOICE, PLACE, RENOISE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Uses: the choice of a group, the place inside it, and the id of a position that is made anew."""


@triton.jit
def bits(seed, number, i_t, USE: tl.constexpr):
    """Philox's four outputs, uint32 of the shape of `number` int32; `seed` and `i_t` broadcast with it."""
    number = number.to(tl.uint32)
    zero = tl.zeros_like(number)
    return tl.philox(seed, number, zero + i_t.to(tl.uint32), zero + USE, zero)


@triton.jit
def uniform(b_bits):
    """In (0, 1], float32; 1 only by rounding."""
    return (b_bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def gumbel(b_bits):
    """-log(E), E exponential.

    E = -log(1 - u) with u = (bits + 1/2) / 2^32. Large noise comes from small u, where float32 is finest; there the
    logarithm's series stands in for it, since 1 - u would round u away.
    """
    u = uniform(b_bits)
    series = u * (1.0 + u * (0.5 + u * 0.33333333333))
    return -tl.log(tl.where(u < 0.001, series, -tl.log(1.0 - tl.minimum(u, 0.99999994))))


@triton.jit
def group_gumbel(seed, o_group, i_t):
    """The noise of the groups `o_group` int32: four of them share one Philox, one output each."""
    b0, b1, b2, b3 = bits(seed, o_group // 4, i_t, CHOICE)
    o_output = o_group % 4
    return gumbel(tl.where(o_output < 2, tl.where(o_output == 0, b0, b1), tl.where(o_output == 2, b2, b3)))


@triton.jit
def place(seed, o_group, i_t):
    """Where in its group a draw falls: a uniform number for each of `o_group`."""
    b0, _, _, _ = bits(seed, o_group, i_t, PLACE)
    return uniform(b0)


@triton.jit
def renoise(seed, o_t, V):
    """An id below `V`, uniform to within V / 2^32, for each of the positions `o_t`."""
    b0, _, _, _ = bits(seed, tl.zeros_like(o_t), o_t, RENOISE)
    return tl.umulhi(b0, (tl.zeros_like(b0) + V).to(tl.uint32)).to(tl.int64)
