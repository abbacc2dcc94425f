"""The matrix product `x @ weight.T` by the fastest library at hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""oneDNN's product, which PyTorch's compiler calls. For float32 `F.linear` calls MKL: 100 GFLOP/s per core on an AMD
EPYC with AVX-512, where oneDNN does 220."""

SMALL = 1 << 20
"""Multiplications below which MKL is faster, since a call of oneDNN costs 10 us more. On one core MKL takes 14 us and
oneDNN 18 at half as many, 24 and 22 at as many; on two cores oneDNN wins a little later."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x` `[..., d]` times the transpose of `weight` `[n, d]`: `[..., n]`."""
    fits = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if (
        not fits
        or ONEDNN is None
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or x.numel() * weight.shape[0] < SMALL
    ):
        return F.linear(x, weight)
    return ONEDNN(x, weight, None, "none", [], "")


class Linear(nn.Linear):
    """`nn.Linear` without a bias, by `linear`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) if type(self.weight) is nn.Parameter else F.linear(x, self.weight)
