"""Gumbel noise from a counter: the same numbers whatever the tiles, the device and the batch."""

import triton
import triton.language as tl


@triton.jit
def gumbel(seed, o_v, i_t):
    """-log(E), E exponential, for vocabulary ids `o_v` at position `i_t` of the stream `seed`.

    E = -log(1 - u) with u = (bits + 1/2) / 2^32. Large noise comes from small u, where float32 is finest; there the
    logarithm's series stands in for it, since 1 - u would round u away.
    """
    o_v = o_v.to(tl.uint32)
    zero = tl.zeros_like(o_v)
    bits, _, _, _ = tl.philox(seed, o_v, zero + i_t.to(tl.uint32), zero, zero)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = u * (1.0 + u * (0.5 + u * 0.33333333333))
    return -tl.log(tl.where(u < 0.001, series, -tl.log(1.0 - tl.minimum(u, 0.99999994))))
