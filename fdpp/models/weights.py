"""torchao's quantised weights, seen without importing it: what they consist of, and their product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parts = dict[str, Tensor]
"""The tensors that hold a weight, under the names of its attributes."""

ROWWISE = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
"""Classes of torchao's in which every part has a row for each row of the weight, unless rows share a scale."""

NAMES = ("qdata", "scale", "zero_point")
"""Of their parts."""

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
    held = vars(weight)
    how = held.get("act_quant_kwargs")
    fits = type(weight).__name__ == "Int8Tensor" and how is not None and how.mapping_type.name == "SYMMETRIC"
    if not fits or any(size % 8 for size in held["qdata"].shape):
        return F.linear(x, weight)
    if held.get("act_quant_scale") is not None or held.get("act_pre_scale") is not None:
        return F.linear(x, weight)
    return int8_product(x, weight)


def int8_product(x: Tensor, weight: Any) -> Tensor:
    """`F.linear(x, weight)`, bit for bit, of an int8 `weight` whose inputs are quantised as they come.

    torchao's own prints its input for every product on a GPU, to find out whether the compiler looks on: that waits for
    the device, which a CUDA graph's capture forbids. On a CPU it adds up the whole weight for every product.
    """
    how = weight.act_quant_kwargs
    options = {"mapping_type": how.mapping_type, "reduce_range": getattr(how, "reduce_range", False)}
    inputs = type(weight).from_hp(x.reshape(-1, x.shape[-1]), how.granularity, **options)
    count = inputs.qdata.shape[0]
    rows = F.pad(inputs.qdata, (0, 0, 0, max(FEWEST - count, 0)))
    sums = torch._int_mm(rows, weight.qdata.t())[:count]
    scaled = (sums.to(inputs.scale.dtype) * inputs.scale).to(x.dtype)
    return (scaled * weight.scale.flatten()).to(x.dtype).reshape(*x.shape[:-1], -1)
