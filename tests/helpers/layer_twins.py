"""A block's kernels written out in PyTorch's operators, to stand in for them where a whole decode runs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.attention.rotary import rotate
from fdpp.kernels.layers import HeadNorms


def rotate_twin(
    heads: Tensor,
    n_heads: int,
    n_kv_heads: int,
    angles: tuple[Tensor, Tensor],
    place: Any,
    norms: HeadNorms | None = None,
) -> None:
    """`rotate_in_place`, written out."""
    q, k, v = heads.transpose(1, 2).split((n_heads, n_kv_heads, n_kv_heads), dim=1)
    weights: tuple[Any, Any] = (None, None) if norms is None else (norms.q, norms.k)
    for part, weight in zip((q, k), weights, strict=True):
        turning = part.clone() if norms is None else norm_twin(part, weight, norms.eps)
        part.copy_(rotate(turning, angles))
    if place is not None:
        start, rows = place.start, slice(None) if place.fillers is None else ~place.fillers
        columns = torch.arange(start, start + k.shape[2]) if isinstance(start, int) else start
        for stored, new in ((place.keys, k), (place.values, v)):
            stored[rows] = stored[rows].index_copy(2, columns, new[rows])


def norm_twin(x: Tensor, weight: Tensor, eps: float, added: Tensor | None = None) -> Tensor:
    return F.rms_norm(x if added is None else x.add_(added), x.shape[-1:], weight, eps)


def swiglu_twin(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


TWINS = {"rms_norm_gpu": norm_twin, "swiglu_gpu": swiglu_twin, "rotate_in_place": rotate_twin}
"""By their names in `fdpp.models.layers`."""
