"""What a step of a canvas gives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CanvasStep(NamedTuple):
    """What a step makes of a canvas; x = l / t are the logits l over the temperature, p = softmax(x).

    A finished sequence keeps its canvas and its argmax. Its sample is its canvas, and its other numbers are 0.

    Attributes:
        canvas: `[B, T]` int64, the next canvas: the sample where accepted, elsewhere a uniformly random id.
        sample: `[B, T]` int64, a token drawn from p at every position; where there is no p, a uniformly random one.
        argmax: `[B, T]` int64, the lowest of the most likely tokens.
        entropy: `[B, T]` float32, H(p) in nats; +inf where a position's logits hold NaN or +inf, or nothing but -inf.
        lse: `[B, T]` float32, log sum exp(x); NaN where the entropy is +inf.
        accepted: `[B, T]` bool.
        mean_entropy: `[B]` float32, the mean of `entropy` over the canvas.
    """

    canvas: Tensor
    sample: Tensor
    argmax: Tensor
    entropy: Tensor
    lse: Tensor
    accepted: Tensor
    mean_entropy: Tensor
