"""Compile what `fdpp.step.canvas.conditioning` would launch, for GPUs that this machine lacks; prints JSON.

See `aot.py`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import torch
import triton
from aot import INSTRUCTION, TARGETS, Compiled, TargetDriver, assembly, dumped, facts, like, watched
from aot_layers import AMD_WIDTH, DWORDS, WIDTH

from fdpp.step.canvas import conditioning


@dataclass(frozen=True)
class Canvas:
    """What a step of `B` canvases at DiffusionGemma's vocabulary tells the next forward, both ways."""

    target: str
    B: int = 1
    given: str = "bfloat16"
    dtype: str = "bfloat16"
    softcap: float = 30.0
    finished: bool = False

    @property
    def name(self) -> str:
        facts = [self.target, f"{self.B}", self.given, self.dtype]
        return "-".join(facts + ["capped"] * bool(self.softcap) + ["finished"] * self.finished)

    def launch(self) -> None:
        B, T, V, D = self.B, 256, 262144, 2816
        dtype = getattr(torch, self.dtype)
        logits, numbers = like(getattr(torch, self.given), B, T, V), like(torch.float64, 1, 2)
        finished = like(torch.bool, B) if self.finished else None
        x, soft = (like(dtype, B, T, n) if self.finished else None for n in (V, D))
        conditioning.process_gpu(logits, numbers, self.softcap, dtype, finished, x)
        lse, weight = like(torch.float32, B, T), like(dtype, V, D)
        conditioning.embed_gpu(logits, lse, numbers, weight, self.softcap, 53.0, finished, soft)


def canvases() -> list[Canvas]:
    found = []
    for target in TARGETS:
        found += [Canvas(target), Canvas(target, B=32, finished=True)]
        found.append(Canvas(target, given="float32", softcap=0.0, finished=True))
    return [*found, Canvas("sm_90", given="float32", dtype="float32"), Canvas("sm_90", given="float16")]


def compiled(variant: Canvas, kernels: dict[str, Compiled]) -> list[dict[str, Any]]:
    triton.runtime.driver.set_active(TargetDriver(variant.target))
    variant.launch()
    found = []
    for name, kernel in kernels.items():
        written = assembly(kernel)
        widths = [int(vector or 1) * int(bits) // 8 for vector, bits in WIDTH.findall(written)]
        widths += [DWORDS[suffix] for suffix in AMD_WIDTH.findall(written)]
        found.append(
            {"name": f"{name}-{variant.name}", "kernel": name, "target": variant.target}
            | facts(kernel)
            | {"widest": max(widths), "shared": kernel.last.metadata.shared}
        )
        if variant.target == "sm_90":
            found[-1]["instructions"] = len(INSTRUCTION.findall(dumped(kernel.last.asm["cubin"], "-sass")))
    return found


if __name__ == "__main__":
    kernels = watched({"process_kernel": conditioning, "weights_kernel": conditioning})
    json.dump([facts for variant in canvases() for facts in compiled(variant, kernels)], sys.stdout)
