"""torchao's quantised weights, seen without importing it: what they consist of, and their product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdpp.kernels.launch import PRODUCT_ROWS
from fdpp.models.launches import byte_product_gpu, on_kernels

BYTES = (torch.int8, torch.float8_e4m3fn)

Parts = dict[str, Tensor]
"""The tensors that hold a weight, under the names of its attributes."""

ROWWISE = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
"""Classes of torchao's in which every part has a row for each row of the weight, unless rows share a scale."""

NAMES = ("qdata", "scale", "zero_point")
"""Of their parts."""

EPS = torch.finfo(torch.float32).eps
"""The least scale of a row."""

FEWEST = 17
"""Rows that PyTorch's int8 product takes on a GPU at least; it wants sizes in multiples of 8, too."""


def is_quantised(weight: Any) -> bool:
    """Whether `weight` is a tensor of torchao's, whose product is `F.linear(x, weight)`."""
    return type(weight).__module__.partition(".")[0] == "torchao"


def parts_of(weight: Tensor) -> Parts | None:
    """The parts of `weight` `[n, d]`, n rows each; a plain weight's is itself. None: it does not consist of rows."""
    if type(weight) in (nn.Parameter, Tensor):
        return {"data": weight}
    if type(weight).__name__ not in ROWWISE or not is_quantised(weight):
        return None
    held = vars(weight)
    parts = {name: held[name] for name in NAMES if held.get(name) is not None}
    rows = parts["qdata"].shape[0]
    return parts if all(part.dim() == 2 and part.shape[0] == rows for part in parts.values()) else None


def parts_of_all(weights: list[Tensor]) -> list[Parts] | None:
    """The parts of each weight; None unless all are of one class and consist of the same parts."""
    found: list[Parts] = []
    for weight in weights:
        parts = parts_of(weight)
        if parts is None or type(weight) is not type(weights[0]) or (found and parts.keys() != found[0].keys()):
            return None
        found.append(parts)
    return found


def differ_in_rows(weights: list[Tensor]) -> bool:
    """Whether `weights`, see `parts_of_all`, may be the rows of one weight: all else that they have is the same."""
    if not is_quantised(weights[0]):
        return True
    held: list[Any] = [weight.__tensor_flatten__() for weight in weights]  # type: ignore[attr-defined]
    # A part beside those named, such as the static scale of activations, belongs to all rows.
    return set(held[0][0]) <= set(NAMES) and all(each == held[0] for each in held)


def assembled(parts: Parts, like: Any) -> Tensor:
    """The weight that consists of `parts` and is otherwise as the weight `like`."""
    if "data" in parts:
        return parts["data"]
    whole: Tensor = type(like).__tensor_unflatten__(parts, like.__tensor_flatten__()[1], None, None)
    return whole


def product(x: Tensor, weight: Any) -> Tensor:
    """`x` `[..., d]` times the transpose of a quantised `weight` `[n, d]`: `[..., n]` in the dtype of `x`."""
    if on_kernels(x) and takes_bytes(x, weight):
        if few(x):
            return byte_product_gpu(x, weight.qdata, weight.scale)
        return F.linear(x, weight.qdata.to(x.dtype)).mul_(weight.scale.flatten())
    return int8_product(x, weight) if takes_int8(weight) else F.linear(x, weight)


def add_byte_product(x: Tensor, h: Tensor, weight: Any) -> Tensor:
    """`x` plus `product(h, weight)` of a `weight` that the kernel takes, in place."""
    if few(h):
        return byte_product_gpu(h, weight.qdata, weight.scale, x)
    return x.addcmul_(F.linear(h, weight.qdata.to(h.dtype)), weight.scale.flatten())


def few(x: Tensor) -> bool:
    """Whether so few rows that weights are best widened within the product, not before it."""
    return x.numel() // x.shape[-1] <= PRODUCT_ROWS


def takes_bytes(x: Tensor, weight: Any) -> bool:
    """Whether the product of `x` and `weight` is ours, on a GPU: one with weights of one byte.

    They are int8 or float8 (e4m3), alone (inputs stay as they are) and with a scale for each row; their zero points,
    which are zero, torchao's own products do not read either. Float8 is widened by GPUs from compute capability 8.9 on.
    """
    known = type(weight).__name__ in ("Int8Tensor", "Float8Tensor") and is_quantised(weight)
    if not known or x.dtype not in (torch.bfloat16, torch.float16):
        return False
    held, others = vars(weight), ("act_quant_kwargs", "act_pre_scale")
    data = held["qdata"]
    if data.dtype not in BYTES or any(held.get(name) is not None for name in others):
        return False
    by_row = held["scale"].shape == (data.shape[0], 1) and data.is_contiguous()
    return by_row and (data.dtype == torch.int8 or widens_float8(data.device))


def widens_float8(device: torch.device) -> bool:
    """Whether the GPU `device` has an instruction for it."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def takes_int8(weight: Any) -> bool:
    """Whether `weight` is of int8 and its product quantises every row of its input around zero, as it comes."""
    held = vars(weight)
    how = held.get("act_quant_kwargs")
    if type(weight).__name__ != "Int8Tensor" or how is None or getattr(how, "reduce_range", False):
        return False
    by_row = type(how.granularity).__name__ == "PerRow" and how.mapping_type.name == "SYMMETRIC"
    # Scales that were measured before, as SmoothQuant's.
    given = any(held.get(name) is not None for name in ("act_quant_scale", "act_quant_zero_point", "act_pre_scale"))
    return by_row and not given and all(size % 8 == 0 for size in held["qdata"].shape)


def int8_product(x: Tensor, weight: Any) -> Tensor:
    """`F.linear(x, weight)`, bit for bit, of a `weight` that `takes_int8`, by 12 operators where torchao takes 25.

    torchao's own prints its input for every product on a GPU, to find out whether the compiler looks on: that waits for
    the device, which a CUDA graph's capture forbids. On a CPU it adds up the whole weight for every product.
    """
    rows = x.reshape(-1, x.shape[-1])
    scale = (torch.linalg.vector_norm(rows, float("inf"), dim=-1, keepdim=True) / 127.5).clamp_(min=EPS).float()
    whole = (rows * scale.reciprocal()).round_().clamp_(-128, 127).to(torch.int8)
    if len(rows) < FEWEST:
        whole = F.pad(whole, (0, 0, 0, FEWEST - len(rows)))
    sums = torch._int_mm(whole, weight.qdata.t())[: len(rows)]
    # Rounded to the dtype of `x` after each factor.
    scaled = torch.mul(sums, scale, out=torch.empty_like(sums, dtype=x.dtype))
    out = torch.mul(scaled, weight.scale.flatten(), out=torch.empty_like(scaled))
    return out.reshape(*x.shape[:-1], out.shape[-1])
