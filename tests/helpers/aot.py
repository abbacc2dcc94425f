"""Compile what `fdpp.step.gpu.select` would launch, for GPUs that this machine lacks, and print the builds as JSON.

A process of its own (`TRITON_INTERPRET=0 python tests/helpers/aot.py`): the interpreter's flag decides at import what
`@triton.jit` makes. `gpu.select` itself runs, on tensors without memory; a stand-in for Triton's driver names the
target. So constants, argument types and alignment are those of a real launch.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import fdpp
from fdpp.rules.rule import TEMPERED
from fdpp.step import gpu
from fdpp.step.terms import Terms, pack

V = 126464
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Variant:
    """One launch: `B` sequences of `T` positions. Equal constants and types compile to the same kernel."""

    target: str
    rule: fdpp.Rule = fdpp.Frechet(0.25)  # noqa: RUF009
    B: int = 1
    T: int = 32
    V: int = V
    dtype: str = "bfloat16"
    sampled: bool = False
    active: bool = False

    @property
    def name(self) -> str:
        rule = type(self.rule).__name__ + "-tempered" * self.rule.tested().endswith(TEMPERED)
        facts = [self.target, rule, f"{self.B}x{self.T}x{self.V}", self.dtype]
        return "-".join(facts + ["sampled"] * self.sampled + ["active"] * self.active)


def variants() -> list[Variant]:
    entropy, margin = fdpp.EntropyBound(0.1), fdpp.TopkMargin(2)
    rules = (fdpp.Quota(2), fdpp.Threshold(0.9), fdpp.Factor(0.75), fdpp.Frechet(0.25, 0.1), entropy, margin)
    found = [Variant("sm_90", rule) for rule in (*rules, fdpp.ThresholdQuota(0.9), fdpp.EntropySum(0.35))]
    found += [Variant("sm_90", dtype=dtype, active=True) for dtype in ("float16", "float32")]
    found += [Variant("sm_90", V=126349), Variant("sm_90", V=126349, dtype="float32", sampled=True)]
    for T in (32, 64, 128, 256, 1024):
        found.append(Variant("sm_90", B=256, T=T))
        found.append(Variant("sm_90", entropy, B=256, T=T, sampled=True, active=True))
        found.append(Variant("sm_90", margin, B=256, T=T, sampled=True, active=True))
    for T in (64, 128, 256):
        found.append(Variant("sm_90", T=T))
    for target in ("sm_80", "sm_100", "gfx942"):
        found += [Variant(target), Variant(target, entropy), Variant(target, entropy, sampled=True)]
        found += [Variant(target, margin), Variant(target, margin, sampled=True)]
        found += [Variant(target, B=256, T=128, sampled=True)]
    found += [Variant(target, fdpp.EntropyBound(0.1, tempered=True), sampled=True) for target in TARGETS]
    found += [Variant("sm_80", T=1024), Variant("gfx942", T=1024), Variant("sm_100", T=1024)]
    return found


class TargetDriver:
    """The part of a Triton driver that the choice of a target needs."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target]

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """Stands in for a kernel: compiles instead of launching, and keeps the result."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.last: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            self.last = self.kernel.warmup(*args, grid=grid, **kwargs)

        return compile_only


def watched(modules: dict[str, Any]) -> dict[str, Compiled]:
    """The kernels by name, each replaced by its stand-in in the module that launches it."""
    kernels = {name: Compiled(getattr(module, name)) for name, module in modules.items()}
    for name, module in modules.items():
        setattr(module, name, kernels[name])
    return kernels


def like(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def assembly(kernel: Compiled) -> str:
    """The last launch's PTX or AMD assembly."""
    asm = kernel.last.asm
    return asm["amdgcn"] if "amdgcn" in asm else asm["ptx"]


def facts(kernel: Compiled) -> dict[str, Any]:
    """Registers, stack and local memory of the last launch, and its memory operations."""
    asm = kernel.last.asm
    used = resources_amd(asm["amdgcn"]) if "amdgcn" in asm else resources(asm["cubin"])
    return {**used, "memory": memory_operations(assembly(kernel))}


def dumped(cubin: bytes, option: str) -> str:
    """What `cuobjdump` tells with one option."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack and local memory per thread: spills are stack."""
    report = dumped(cubin, "-res-usage")
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "local": int(found["LOCAL"])}


def resources_amd(assembly: str) -> dict[str, int]:
    def number(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert match, name
        return int(match[1])

    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "local": number("vgpr_spill_count"),
    }


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)(.*?);", re.MULTILINE)


def exponential_loop(cubin: bytes) -> list[str]:
    """The instructions of the loop that takes exponentials, all sides of its branches, in an NVIDIA GPU's own code."""
    found = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(dumped(cubin, "-sass"))]
    for at, name, rest in found:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        body = [other for where, other, _ in found if target and int(target[1], 16) <= where <= at]
        if "MUFU.EX2" in body:
            return body
    raise ValueError("no loop with an exponential")


def counts_of_loop(cubin: bytes, warps: int, exponentials: int) -> dict[str, float]:
    """Of that loop, instructions of all warps and barriers for 4096 logits that take so many exponentials each."""
    body = exponential_loop(cubin)
    turns = 4096 * exponentials / (body.count("MUFU.EX2") * 32 * warps)
    counted = {"instructions": warps * len(body), "barriers": sum(name.startswith("BAR") for name in body)}
    shuffles = {"shuffles": sum(name.startswith(("SHFL", "REDUX")) for name in body)}
    return {name: turns * count for name, count in (counted | shuffles).items()}


MEMORY = re.compile(
    r"(?:^|\s)(ld\.global\S*|st\.global\S*|atom\.global\S*|bar\.sync"
    r"|(?:global|buffer)_(?:load|store|atomic)_\S+|s_barrier)\s"
)


def memory_operations(assembly: str) -> list[str]:
    """Global loads, stores and atomics and the barriers, as written."""
    return [match[1] for line in assembly.splitlines() if (match := MEMORY.search(line + " "))]


def compiled(variant: Variant, kernel: Compiled) -> dict[str, Any]:
    triton.runtime.driver.set_active(TargetDriver(variant.target))
    B, T = variant.B, variant.T
    gpu.select(
        like(getattr(torch, variant.dtype), B, T, variant.V),
        like(torch.int64, B, T),
        like(torch.bool, B, T) if variant.active else None,
        Terms(
            pack(variant.rule, "meta"),
            variant.rule.tested(),
            126336,
            1.0 if variant.sampled else 0.0,
            like(torch.int64, B) if variant.sampled else None,
        ),
    )
    counted = variant.target in ("sm_90", "sm_100")
    warps = kernel.last.metadata.num_warps
    exponentials = 1 + variant.sampled
    return {
        "name": variant.name,
        "loop": counts_of_loop(kernel.last.asm["cubin"], warps, exponentials) if counted else None,
        **{key: value for key, value in asdict(variant).items() if key != "rule"},
        "order": variant.rule.order,
        "threads": kernel.last.metadata.num_warps * TARGETS[variant.target].warp_size,
        "fp_fusion": kernel.last.metadata.enable_fp_fusion,
        **facts(kernel),
    }


if __name__ == "__main__":
    kernel = watched({"select_kernel": gpu})["select_kernel"]
    json.dump([compiled(variant, kernel) for variant in variants()], sys.stdout)
