"""What a canvas step tells the next forward: its tempered logits, or their probabilities a slab of ids at a time.

x = l / t are the logits l, soft-capped or not, over the temperature. Both kernels are elementwise, and read the logits
of a sequence that has finished nowhere.
"""

import triton
import triton.language as tl

from fdpp.kernels.shape import LOG2_E, shaped


@triton.jit
def tempered(logits, numbers, i_b, i_t, o_v, m_v, stride_lb, stride_lt, stride_nb, cap, CAPPED: tl.constexpr):
    """x of the ids `o_v` at position `i_t` of sequence `i_b`, float32; `numbers` end in the temperature, float64."""
    scale = (1.0 / tl.load(numbers + i_b * stride_nb + 1)).to(tl.float32)
    b_output = tl.load(logits + i_b * stride_lb + i_t * stride_lt + o_v, mask=m_v, other=0.0)
    return shaped(b_output, cap, scale, CAPPED)


@triton.jit
def has_finished(finished, i_b):
    done = False
    if finished is not None:
        done = tl.load(finished + i_b) != 0
    return done


@triton.jit(do_not_specialize=["T", "stride_nb"], do_not_specialize_on_alignment=["finished", "numbers"])
def process_kernel(
    logits,
    numbers,
    finished,
    before,
    out,
    T,
    V,
    stride_lb,
    stride_lt,
    stride_nb,
    cap,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (B * T, tiles of ids): `out` `[B, T, V]` = x; of finished sequences what `before` holds, or 0 if None."""
    i_row, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_t = i_row // T, i_row % T
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < V
    if has_finished(finished, i_b):
        b_kept = tl.zeros([BLOCK_V], dtype=out.dtype.element_ty)
        if before is not None:
            b_kept = tl.load(before + i_row * V + o_v, mask=m_v, other=0.0)
        tl.store(out + i_row * V + o_v, b_kept, mask=m_v)
    else:
        b_x = tempered(logits, numbers, i_b, i_t, o_v, m_v, stride_lb, stride_lt, stride_nb, cap, CAPPED)
        tl.store(out + i_row * V + o_v, b_x, mask=m_v)


@triton.jit(do_not_specialize=["T", "stride_nb"], do_not_specialize_on_alignment=["finished", "numbers", "lse"])
def weights_kernel(
    logits,
    lse,
    numbers,
    finished,
    out,
    T,
    width,
    stride_lb,
    stride_lt,
    stride_nb,
    cap,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (B * T, tiles of ids): `out` `[B * T, width]` = exp(x - lse) of a slab of ids; 0 of finished sequences."""
    i_row, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_b, i_t = i_row // T, i_row % T
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_v = o_v < width
    if has_finished(finished, i_b):
        tl.store(out + i_row * width + o_v, tl.zeros([BLOCK_V], dtype=out.dtype.element_ty), mask=m_v)
    else:
        b_x = tempered(logits, numbers, i_b, i_t, o_v, m_v, stride_lb, stride_lt, stride_nb, cap, CAPPED)
        b_weight = tl.exp2((b_x - tl.load(lse + i_row)) * LOG2_E)
        tl.store(out + i_row * width + o_v, b_weight, mask=m_v)
