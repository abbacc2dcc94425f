"""The matrix product `x @ weight.T` by the fastest library at hand, and which layers are no more than that."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdpp.models.weights import is_quantised, product

ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""oneDNN's product, which PyTorch's compiler calls. For float32 `F.linear` calls MKL: 100 GFLOP/s per core on an AMD
EPYC with AVX-512, where oneDNN does 220; on another one 95 and 103, and at 4096 x 4096 60 and 80."""

SMALL = 1 << 22
"""Multiplications below which MKL is faster, since a call of oneDNN costs 10 us more. Both lose where the other machine
wins: on the faster one oneDNN is ahead from a quarter as many on, on the slower one from twice as many (M = 96, 128 x
704: 178 us each), there with two cores from here on."""


PER_BLOCK = 7
"""Linear layers of a block: queries, keys, values and the output of attention; gate, up and down of SwiGLU."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` `[..., d]` times the transpose of `weight` `[n, d]`, quantised by torchao or not, plus `bias`: `[..., n]`."""
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if is_quantised(weight):
        return product(x, weight) if bias is None else product(x, weight).add_(bias)
    fits = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if (
        not fits
        or ONEDNN is None
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or x.numel() * weight.shape[0] < SMALL
    ):
        return F.linear(x, weight, bias)
    return ONEDNN(x, weight, bias, "none", [], "")


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward and nothing else: no hook, no forward of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_bare(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether `layer` is `nn.Linear` with a weight that is a `Parameter`, no subclass of one."""
    return type(layer) is nn.Linear and type(layer._parameters.get("weight")) is nn.Parameter


def is_plain(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether `layer` is nothing but its weight, so that its product may be taken without calling it.

    An adapter, a quantised, sharded, offloaded or hooked layer is not plain, nor is one with a bias.
    """
    return is_bare(layer) and layer._parameters["bias"] is None and is_untouched(layer)


def is_product(layer: nn.Module | None, biased: bool = False) -> TypeGuard[nn.Linear]:
    """Whether calling `layer` is `F.linear` with its weight, plain or quantised by torchao, and nothing else.

    With `biased` it may also add its bias.
    """
    if type(layer) is not nn.Linear or not is_untouched(layer):
        return False
    bias = layer._parameters["bias"]
    if bias is not None and not (biased and type(bias) is nn.Parameter):
        return False
    weight = layer._parameters.get("weight")
    return type(weight) is nn.Parameter or is_quantised(weight)


def apply(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, by `linear` where the layer is a product and nothing but its result is wanted."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not is_product(layer, biased=True):
        return layer(x)
    return linear(x, layer.weight, layer.bias)
