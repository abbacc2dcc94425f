"""As `aot.py`, for a step of canvases of DiffusionGemma's vocabulary."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
from aot import TARGETS, Compiled, TargetDriver, exponential_loop, facts, like, watched

from fdpp.step.canvas import gpu


@dataclass(frozen=True)
class Variant:
    """One launch: `B` canvases of `T` positions."""

    target: str
    dtype: str = "bfloat16"
    softcap: float = 30.0
    B: int = 1
    T: int = 256
    V: int = 262144
    finished: bool = True

    @property
    def name(self) -> str:
        facts = [f"canvas_kernel-{self.target}", f"{self.B}x{self.T}x{self.V}", self.dtype]
        return "-".join(facts + ["capped"] * (self.softcap > 0.0) + ["finished"] * self.finished)


def variants() -> list[Variant]:
    found = [Variant(target, dtype) for target in TARGETS for dtype in ("bfloat16", "float32")]
    found += [Variant(target, softcap=0.0) for target in ("sm_90", "gfx942")]
    found += [Variant("sm_90", "float16"), Variant("sm_90", "float32", softcap=0.0), Variant("sm_90", T=1024)]
    return [*found, Variant("sm_90", B=16, finished=False), Variant("sm_90", V=262143)]


def compiled(variant: Variant, kernel: Compiled) -> dict[str, Any]:
    triton.runtime.driver.set_active(TargetDriver(variant.target))
    B, T = variant.B, variant.T
    gpu.denoise_canvas(
        like(getattr(torch, variant.dtype), B, T, variant.V),
        like(torch.int64, B, T),
        like(torch.int64, B, T),
        like(torch.bool, B) if variant.finished else None,
        like(torch.float64, 1, 2),
        like(torch.int64, B),
        variant.softcap,
    )
    metadata = kernel.last.metadata
    loop = [] if variant.target == "gfx942" else exponential_loop(kernel.last.asm["cubin"])
    kinds = {"exponentials": "MUFU.EX2", "barriers": "BAR", "shuffles": "SHFL", "shared": "STS", "loads": "LDG"}
    return {
        "name": variant.name,
        **asdict(variant),
        "loop": {kind: sum(name.startswith(start) for name in loop) for kind, start in kinds.items()},
        "instructions": len(loop),
        "threads": metadata.num_warps * TARGETS[variant.target].warp_size,
        "fp_fusion": metadata.enable_fp_fusion,
        **facts(kernel),
    }


if __name__ == "__main__":
    kernel = watched({"canvas_kernel": gpu})["canvas_kernel"]
    json.dump([compiled(variant, kernel) for variant in variants()], sys.stdout)
