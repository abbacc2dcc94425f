"""What a model does to its head's outputs before they are logits: a soft cap, and a temperature."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tanh(x):
    """From an exponential of a number that is not positive; near 0, where 1 - e loses its digits, from the series."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    b_far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.05396825 + square * 0.02186949))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -b_far, b_far))


@triton.jit
def shaped(b_output, cap, scale, CAPPED: tl.constexpr):
    """`scale` * l of a head's outputs h, float32: l = cap tanh(h / cap), or l = h."""
    b_logit = b_output.to(tl.float32)
    if CAPPED:
        b_logit = cap * tanh(b_logit / cap)
    return b_logit * scale
