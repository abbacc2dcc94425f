"""Compile what `fdpp.rules.dawn` would launch, for GPUs that this machine lacks; prints JSON. See `aot.py`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from aot import TARGETS, Compiled, TargetDriver, facts, like, watched

from fdpp.rules.dawn import decide, edges

KERNELS = {"lse_kernel": edges, "column_kernel": edges, "edges_kernel": edges, "independent_kernel": decide}
"""Every kernel and the module that launches it."""


@dataclass(frozen=True)
class Variant:
    """A step on a block of `T` columns at `first` of `S`, with the dual cache's shared keys or without."""

    target: str
    T: int = 32
    S: int = 512
    heads: int = 32
    kv_heads: int = 32
    hd: int = 128
    layers: int = 4
    dtype: str = "bfloat16"
    shared: bool = False
    padded: bool = False


def variants() -> list[Variant]:
    found = [Variant(target, shared=True, padded=True) for target in TARGETS]
    found += [Variant("sm_90"), Variant("sm_90", dtype="float32", shared=True)]
    found += [Variant("sm_90", heads=28, kv_heads=4, hd=64, layers=3, dtype="float16")]
    found += [Variant(target, heads=28, kv_heads=4, shared=True, padded=True) for target in TARGETS]
    # The passes over queries and keys do not depend on T: here they are those of `Variant("sm_90")`.
    found += [Variant("sm_90", T=T, S=2048) for T in (64, 128, 256, 1024)]
    return found


def compiled(variant: Variant, kernels: dict[str, Compiled]) -> list[dict[str, Any]]:
    triton.runtime.driver.set_active(TargetDriver(variant.target))
    T, S, first = variant.T, variant.S, variant.S // 2
    start, n = (first, T) if variant.shared else (0, S)

    def per_layer(rows: int, heads: int, columns: int) -> list[torch.Tensor]:
        dtype = getattr(torch, variant.dtype)
        return [like(dtype, rows, columns, heads, variant.hd).transpose(1, 2) for _ in range(variant.layers)]

    bits = edges.edges_gpu(
        per_layer(2, variant.heads, n),
        per_layer(2, variant.kv_heads, n),
        per_layer(1, variant.kv_heads, S) if variant.shared else [],
        like(torch.bool, 1 if variant.shared else 2, S) if variant.padded else None,
        *(start, first, T, 0.01, 0.07),
    )
    confidence, candidate = like(torch.float32, 2, T), like(torch.bool, 2, T)
    decide.commit_gpu(confidence, candidate, like(torch.float32, 2, S), bits, first, 0.9, 0.7, 0.75)
    return [{"kernel": name, **asdict(variant), **facts(kernel)} for name, kernel in kernels.items()]


if __name__ == "__main__":
    kernels = watched(KERNELS)
    json.dump([facts for variant in variants() for facts in compiled(variant, kernels)], sys.stdout)
