"""Compile what `fdpp.step.project` and `fdpp.attention` would launch, for GPUs that this machine lacks; prints JSON.

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

import fdpp
from fdpp.attention import split_keys
from fdpp.rules.rule import TEMPERED
from fdpp.step import project
from fdpp.step.terms import Terms, pack

MATRIX = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")
"""The matrix instructions of the targets."""


@dataclass(frozen=True)
class Head:
    """A step on the hidden states of `B` sequences of `T` positions."""

    target: str
    rule: fdpp.Rule = fdpp.Frechet(0.25)  # noqa: RUF009
    B: int = 1
    T: int = 32
    D: int = 4096
    V: int = 126464
    dtype: str = "bfloat16"
    sampled: bool = False

    @property
    def name(self) -> str:
        rule = type(self.rule).__name__ + "-tempered" * self.rule.tested().endswith(TEMPERED)
        facts = [self.target, rule, f"{self.B}x{self.T}", self.dtype]
        return "-".join(facts + ["sampled"] * self.sampled)

    @property
    def rows(self) -> int:
        """Rows to share out among tiles."""
        return self.B * self.T

    def launch(self) -> None:
        dtype = getattr(torch, self.dtype)
        project.project_gpu(
            like(dtype, self.B, self.T, self.D),
            like(dtype, self.V, self.D),
            like(torch.int64, self.B, self.T),
            None,
            Terms(
                pack(self.rule, "meta"),
                self.rule.tested(),
                126336,
                1.0 if self.sampled else 0.0,
                like(torch.int64, self.B) if self.sampled else None,
            ),
        )


def heads() -> list[Head]:
    entropy, margin, found = fdpp.EntropyBound(0.1), fdpp.TopkMargin(2), []
    for target in TARGETS:
        # One short tile, one of the common block, several full ones.
        for B, T in ((1, 16), (1, 32), (8, 32)):
            found.append(Head(target, B=B, T=T))
            found.append(Head(target, entropy, B=B, T=T))
            found.append(Head(target, margin, B=B, T=T))
        found += [Head(target, B=B, sampled=True) for B in (1, 8)]
        found += [Head(target, rule, B=B, sampled=True) for B in (1, 8) for rule in (entropy, margin)]
        found += [Head(target, fdpp.EntropyBound(0.1, tempered=True), sampled=True)]
        found += [Head(target, T=1024), Head(target, entropy, T=1024, sampled=True)]
        found += [Head(target, margin, T=1024, sampled=True)]
    found += [Head("sm_90", B=B, dtype="float32", sampled=sampled) for B in (1, 8) for sampled in (False, True)]
    return found


@dataclass(frozen=True)
class Block:
    """Attention of `n` columns of `B` sequences over `S`, in so many branches each if there are any."""

    target: str
    B: int = 1
    n: int = 32
    S: int = 1056
    heads: int = 32
    kv_heads: int = 32
    d: int = 128
    dtype: str = "bfloat16"
    padded: bool = True
    branches: int = 0
    stops: bool = False
    holes: bool = False

    @property
    def name(self) -> str:
        facts = [self.target, f"{self.B}x{self.n}", f"{self.S}x{self.kv_heads}x{self.d}", self.dtype]
        branches = [f"{self.branches}branches"] * bool(self.branches)
        facts += ["unpadded"] * (not self.padded) + branches
        return "-".join(facts + ["stops"] * self.stops + ["holes"] * self.holes)

    @property
    def rows(self) -> int:
        """Rows to share out among tiles, which have at most 32 in float32."""
        rows = self.n * self.heads // self.kv_heads
        return min(rows, 32) if self.dtype == "float32" else rows

    def launch(self) -> None:
        def states(rows: int, number: int, columns: int) -> torch.Tensor:
            return like(getattr(torch, self.dtype), rows, columns, number, self.d).transpose(1, 2)

        rows = self.B * max(self.branches, 1)
        left = like(torch.int64, self.B) if self.padded else None
        k, v = (states(self.B, self.kv_heads, self.S) for _ in range(2))
        own = [states(rows, self.kv_heads, self.n) for _ in range(2)] if self.branches else [None, None]
        column = like(torch.int64, self.n) if self.branches else None
        stops, holes = (like(torch.int64, self.n) if there else None for there in (self.stops, self.holes))
        split_keys.attention_gpu(states(rows, self.heads, self.n), k, v, left, self.d**-0.5, *own, column, stops, holes)


DREAM: dict[str, Any] = {"n": 33, "heads": 28, "kv_heads": 4}
"""A block of Dream-7B with the column before it: 231 queries of a group, four tiles."""


SDAR: dict[str, Any] = {"n": 8, "heads": 32, "kv_heads": 8}
"""Two blocks of SDAR-4B."""


BESIDE: dict[str, Any] = {"n": 64, "S": 1088, "stops": True, "holes": True}
"""A block of LLaDA-8B and as many mask rows beside it, whose keys stand behind the sequence's."""


def blocks() -> list[Block]:
    found = []
    for target in TARGETS:
        # One split and several; a block, few queries, all heads of a group.
        found += [Block(target), Block(target, B=16), Block(target, n=5), Block(target, **DREAM)]
        found.append(Block(target, B=16, **DREAM))
        # The same with branches.
        found += [Block(target, branches=4), Block(target, **DREAM, branches=4)]
        found += [Block(target, n=5, branches=4), Block(target, B=4, branches=4)]
        # Two blocks of a block-causal model, and a piece of its prompt.
        found += [Block(target, **SDAR, stops=True), Block(target, **{**SDAR, "n": 1024}, stops=True)]
        # Mask rows beside a block, with one split, several, and branches; those alone that a full forward feeds.
        found += [Block(target, **BESIDE, B=16), Block(target, **BESIDE), Block(target, **BESIDE, branches=4)]
        found += [Block(target, **{**BESIDE, "n": 32, "stops": False}, padded=padded) for padded in (True, False)]
    found += [
        Block("sm_90", dtype="float32", **DREAM, branches=4),
        Block("sm_90", padded=False, branches=4),
        Block("sm_90", dtype="float32", **DREAM),
        Block("sm_90", padded=False),
        Block("sm_90", S=65536, kv_heads=1),
    ]
    return [*found, Block("sm_90", d=80), Block("sm_90", d=64, dtype="float16")]


def tiles(kernel: Compiled) -> dict[str, Any]:
    """Shared memory of the last launch, the sizes of its copies to there, and its matrix instructions."""
    written = assembly(kernel)
    return {
        "shared": kernel.last.metadata.shared,
        "copies": sorted(set(re.findall(r"cp\.async\.c\w\S* \[.*?\], \[.*?\], (0x\w+)", written))),
        "matrix": [instruction for instruction in MATRIX if instruction in written],
    }


def compiled(variant: Head | Block, kernels: dict[str, Compiled]) -> list[dict[str, Any]]:
    triton.runtime.driver.set_active(TargetDriver(variant.target))
    variant.launch()
    found = []
    for name, kernel in kernels.items():
        if kernel.last is None:
            continue
        found.append(
            {
                "name": f"{name}-{variant.name}",
                "kernel": name,
                "target": variant.target,
                "rows": variant.rows,
                **facts(kernel),
                **tiles(kernel),
            }
        )
        kernel.last = None
    return found


if __name__ == "__main__":
    modules = {
        "project_kernel": project,
        "decide_kernel": project,
        "attend_kernel": split_keys,
    }
    kernels = watched(modules)
    json.dump([facts for variant in (*heads(), *blocks()) for facts in compiled(variant, kernels)], sys.stdout)
