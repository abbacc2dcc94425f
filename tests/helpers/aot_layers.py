"""Compile what a block of a model would launch around its products, for GPUs that this machine lacks; prints JSON.

See `aot.py`.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
import triton
from aot import TARGETS, Compiled, TargetDriver, assembly, facts, like, watched
from aot_project import tiles

from fdpp.attention import rotary
from fdpp.attention.rotary import Place
from fdpp.kernels.layers import HeadNorms
from fdpp.models import launches


@dataclass(frozen=True)
class Layer:
    """A block of a model over `n` positions of a sequence."""

    target: str
    n: int = 32
    d_model: int = 4096
    hidden: int = 12288
    heads: int = 32
    kv_heads: int = 32
    dtype: str = "bfloat16"
    captured: bool = True
    head_dim: int | None = None
    rotary_dim: int | None = None
    normed: bool = False

    @property
    def name(self) -> str:
        facts = [self.target, f"{self.n}x{self.d_model}x{self.heads}x{self.kv_heads}", self.dtype]
        facts += ["eager"] * (not self.captured) + ["normed"] * self.normed
        return "-".join(facts + [f"{self.rotary_dim}-turning"] * (self.rotary_dim is not None))

    def launch(self) -> None:
        dtype = getattr(torch, self.dtype)
        x, weight = like(dtype, 1, self.n, self.d_model), like(dtype, self.d_model)
        launches.rms_norm_gpu(x, weight, 1e-5)
        launches.swiglu_gpu(*like(dtype, 1, self.n, 2 * self.hidden).chunk(2, dim=-1))
        hd = self.head_dim or self.d_model // self.heads
        cos, sin = (like(torch.float32, 1, 1, self.n, self.rotary_dim or hd) for _ in range(2))
        keys, values = (like(dtype, 1, self.kv_heads, 1056, hd) for _ in range(2))
        start = like(torch.int64, self.n) if self.captured else 0
        fillers = like(torch.bool, 1) if self.captured else None
        heads = like(dtype, 1, self.n, self.heads + 2 * self.kv_heads, hd)
        place = Place(keys, values, start, fillers)
        norms = HeadNorms(like(dtype, hd), like(dtype, hd), 1e-6) if self.normed else None
        rotary.rotate_in_place(heads, self.heads, self.kv_heads, (cos, sin), place, norms)


@dataclass(frozen=True)
class Product:
    """A product with weights of one byte, added to or not."""

    target: str
    M: int = 32
    N: int = 12288
    K: int = 4096
    weights: str = "int8"
    dtype: str = "bfloat16"
    adds: bool = False

    @property
    def name(self) -> str:
        return f"{self.target}-{self.M}x{self.N}x{self.K}-{self.weights}" + "-added" * self.adds

    def launch(self) -> None:
        dtype = getattr(torch, self.dtype)
        x, weight = like(dtype, 1, self.M, self.K), like(getattr(torch, self.weights), self.N, self.K)
        added = like(dtype, 1, self.M, self.N) if self.adds else None
        launches.byte_product_gpu(x, weight, like(torch.float32, self.N, 1), added)


def products() -> list[Product]:
    found = []
    for target in TARGETS:
        # The projections of LLaDA, whose last is split; few rows, and two tiles of them.
        found += [Product(target), Product(target, N=4096, K=12288, adds=True)]
        found += [Product(target, M=5), Product(target, M=128)]
        # Those of Dream: a block and the column before it are a tile of 64 rows, of which two are split.
        found += [Product(target, M=33, N=4608, K=3584), Product(target, M=33, N=3584, K=18944, adds=True)]
    return found + [Product(target, weights="float8_e4m3fn") for target in ("sm_90", "sm_100")]


SDAR_4B: dict[str, Any] = {"n": 4, "d_model": 2560, "hidden": 9728, "kv_heads": 8, "head_dim": 128}
SDAR_8B: dict[str, Any] = {"n": 4, "d_model": 4096, "hidden": 12288, "kv_heads": 8, "head_dim": 128}
LLADA2_MINI: dict[str, Any] = {"d_model": 2048, "hidden": 5120, "heads": 16, "kv_heads": 4, "rotary_dim": 64}
"""Blocks with norms of queries and keys. SDAR's first block of a decode and LLaDA2's have more positions than these."""


def layers() -> list[Layer]:
    found, dream = [], {"n": 33, "d_model": 3584, "hidden": 18944, "heads": 28, "kv_heads": 4}
    for target in TARGETS:
        found += [Layer(target), Layer(target, captured=False), Layer(target, **dream)]
        found += [Layer(target, **shape, normed=True) for shape in (SDAR_4B, SDAR_8B, LLADA2_MINI)]
    return [*found, Layer("sm_90", dtype="float32"), Layer("sm_90", dtype="float16", d_model=8192, heads=64)]


@dataclass(frozen=True)
class Route:
    """The choice of experts for a block's positions; by default of LLaDA2.0."""

    target: str
    experts: int = 256
    groups: int = 8
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.target}-{self.experts}-of-{self.groups}"

    def launch(self) -> None:
        logits, bias = like(torch.float32, 32, self.experts), like(torch.bfloat16, self.experts)
        launches.route_gpu(logits, bias, 8, self.groups, self.groups // 2, 2.5)


def routes() -> list[Route]:
    return [Route(target) for target in TARGETS] + [Route("sm_90", experts=1024, groups=8)]


def compiled(variant: Layer | Product | Route, kernels: dict[str, Compiled]) -> list[dict[str, Any]]:
    triton.runtime.driver.set_active(TargetDriver(variant.target))
    variant.launch()
    found = []
    for name, kernel in kernels.items():
        if kernel.last is None:
            continue
        written = assembly(kernel)
        widths = [0] + [int(vector or 1) * int(bits) // 8 for vector, bits in WIDTH.findall(written)]
        widths += [DWORDS[suffix] for suffix in AMD_WIDTH.findall(written)]
        found.append(
            {"name": f"{name}-{variant.name}", "kernel": name, "target": variant.target, "dtype": variant.dtype}
            | facts(kernel)
            | tiles(kernel)
            | {"widest": max(widths)}
        )
        kernel.last = None
    return found


WIDTH = re.compile(r"ld\.global(?:\.v(\d))?\.b(\d+)")
AMD_WIDTH = re.compile(r"(?:global|buffer)_load_(dwordx4|dwordx2|dword|ushort|u16|ubyte)")
DWORDS = {"dwordx4": 16, "dwordx2": 8, "dword": 4, "ushort": 2, "u16": 2, "ubyte": 1}
"""Bytes that a load brings to a thread."""


if __name__ == "__main__":
    modules = {
        "rms_norm_kernel": launches,
        "swiglu_kernel": launches,
        "rotate_kernel": rotary,
        "product_kernel": launches,
        "route_kernel": launches,
    }
    kernels = watched(modules)
    json.dump(
        [facts for variant in (*layers(), *products(), *routes()) for facts in compiled(variant, kernels)], sys.stdout
    )
