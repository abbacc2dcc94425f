"""The kernels as GPUs would get them: compiled here, without one, for every target and kind of launch."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from inputs import TRITON

from fdpp.rules.rule import ORDERS

SPILLS_ALLOWED = {
    "attend_kernel-sm_90-1x32-1056x32x64-float16": 8,
    # ptxas spills to get to 168 registers: three of its programs share a multiprocessor.
    "attend_kernel-sm_100-1x8-1056x8x128-bfloat16-stops": 8,
    # ptxas spills to get to 80 registers, with which six programs of four warps share a multiprocessor.
    "canvas_kernel-sm_90-16x256x262144-bfloat16-capped": 8,
    # All 255 registers are taken; spilled before the loop and read behind it.
    "attend_kernel-sm_80-1x64-1088x32x128-bfloat16-stops-holes": 16,
    "attend_kernel-sm_80-1x64-1088x32x128-bfloat16-4branches-stops-holes": 24,
    # Rows of two tiles of 32 in one of 64: all 255 registers are taken in the loop.
    "product_kernel-sm_80-33x3584x18944-int8-added": 8,
}
if TRITON == "3.6":
    SPILLS_ALLOWED |= {
        "sm_90-Frechet-1x32x126464-float16-active": 8,
        "sm_90-Frechet-1x32x126464-float32-active": 8,
        "decide_kernel-sm_80-EntropyBound-1x32-bfloat16": 56,
        "decide_kernel-sm_90-EntropyBound-1x32-bfloat16": 56,
        "decide_kernel-sm_100-EntropyBound-1x32-bfloat16": 48,
        "decide_kernel-sm_80-TopkMargin-1x32-bfloat16": 32,
        "decide_kernel-sm_90-TopkMargin-1x32-bfloat16": 32,
        "decide_kernel-sm_90-TopkMargin-1x1024-bfloat16-sampled": 8,
        "project_kernel-sm_90-Frechet-1x32-bfloat16": 8,
        "project_kernel-gfx942-Frechet-1x32-bfloat16-sampled": 6,
        "project_kernel-gfx942-EntropyBound-1x32-bfloat16-sampled": 6,
        "project_kernel-gfx942-TopkMargin-1x32-bfloat16-sampled": 8,
        "attend_kernel-sm_80-1x64-1088x32x128-bfloat16-stops-holes": 40,
        "attend_kernel-sm_90-1x33-1056x4x128-float32": 32,
        "attend_kernel-sm_90-1x33-1056x4x128-float32-4branches": 32,
        "product_kernel-sm_80-128x12288x4096-int8": 8,
        "product_kernel-sm_80-33x4608x3584-int8": 8,
        "product_kernel-sm_80-33x3584x18944-int8-added": 16,
        "product_kernel-sm_90-32x4096x12288-int8-added": 8,
    }
if TRITON == "3.8":
    SPILLS_ALLOWED |= {
        "project_kernel-sm_90-Frechet-1x32-float32": 32,
    }

SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that a program may take."""


def reported(script: str, least: int = 30) -> dict[str, dict[str, Any]]:
    """What a script of this folder reports, by name: at least so many builds."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "helpers" / script],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert len({report["name"] for report in reports}) == len(reports) >= least
    return {report["name"]: report for report in reports}


@pytest.fixture(scope="module")
def builds() -> dict[str, dict[str, Any]]:
    return reported("aot.py")


@pytest.fixture(scope="module")
def tiled() -> dict[str, dict[str, Any]]:
    """The builds of the fused head and of attention."""
    return reported("aot_project.py")


@pytest.fixture(scope="module")
def around() -> dict[str, dict[str, Any]]:
    """The builds of what a block of a model launches around its products and its attention."""
    return reported("aot_layers.py")


@pytest.fixture(scope="module")
def canvases() -> dict[str, dict[str, Any]]:
    """The builds of a step of a canvas."""
    return reported("aot_canvas.py", 15)


def before_ticket(build: dict[str, Any]) -> list[str]:
    ticket = next(i for i, operation in enumerate(build["memory"]) if "atom" in operation)
    return build["memory"][:ticket]


def test_every_target_and_kind_is_built(builds: dict[str, dict[str, Any]]) -> None:
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        kinds = {(b["order"], b["sampled"]) for b in builds.values() if b["target"] == target}
        assert kinds == set(itertools.product(ORDERS, (False, True))), target


def test_no_spills(
    builds: dict[str, dict[str, Any]],
    tiled: dict[str, dict[str, Any]],
    around: dict[str, dict[str, Any]],
    canvases: dict[str, dict[str, Any]],
) -> None:
    everything = builds | tiled | around | canvases
    spills = {name: b["stack"] + b["local"] for name, b in everything.items() if b["stack"] + b["local"]}
    assert all(size <= SPILLS_ALLOWED.get(name, 0) for name, size in spills.items()), spills


def test_registers(builds: dict[str, dict[str, Any]]) -> None:
    """At most what was measured with Triton 3.7.1, rounded up to eight: 128 registers let two programs of 256 threads
    share a multiprocessor of sm_90, 80 three, 64 four; 64 vector registers let eight waves share a SIMD of gfx942."""
    for name, build in builds.items():
        if build["target"] == "gfx942":
            bound = 64 if TRITON == "3.7" else 72
        elif build["sampled"] or build["T"] == 1024:
            bound = 120 if build["V"] % 16 == 0 else 80
        elif build["order"] != "confidence":
            bound = 112
        elif build["B"] > 1:
            bound = 64
        else:
            bound = 88 if build["active"] or build["V"] % 16 else 80
        assert build["registers"] <= bound, (name, build["registers"])


def test_logits_are_read_sixteen_bytes_at_a_time(builds: dict[str, dict[str, Any]]) -> None:
    """Where rows start on 16 bytes; two tiles of 2048 logits over 256 threads, when sampling one, of 1024 where they do
    not. Each is read by one of two loads: where ids must be compared, and where not. So is the group that was drawn."""
    for name, build in builds.items():
        if build["target"] == "gfx942":
            continue
        # The token (b64), whether it is active (b8) and the seed (b64) come first, each once.
        loads = [operation for operation in before_ticket(build) if operation.startswith("ld.")]
        loads = loads[1 + build["active"] + build["sampled"] :]
        size = 4 if build["dtype"] == "float32" else 2
        tiles, logits = 2 - build["sampled"], 1024 if build["sampled"] and build["V"] % 16 else 2048
        width = min(logits // build["threads"] * size, 16)
        if build["V"] % 16 == 0:
            wanted = [f"ld.global.v{width // 4}.b32"] * (logits // build["threads"] * size // width)
        else:
            wanted = [f"ld.global.b{8 * size}"] * (logits // build["threads"])
        assert loads == 2 * tiles * wanted + 4 * build["sampled"] * [f"ld.global.b{8 * size}"], name


def test_the_vocabulary_loop_is_short_and_elementwise(builds: dict[str, dict[str, Any]]) -> None:
    """Instructions of eight warps for 4096 logits, as measured with Triton 3.7.1 and rounded up; the loop holds a load
    for tiles whose ids must be compared, which few tiles take. Nothing in it crosses threads but a group's maximum and
    mass, which eight threads hold. Rows that do not start on 16 bytes are read one logit at a time, half as many
    instructions again; and two warps then hold a group."""
    bounds = {
        ("confidence", False): 2160,
        ("margin", False): 2400,
        ("entropy", False): 2800,
        ("confidence", True): 5700,
        ("margin", True): 6000,
        ("entropy", True): 6700,
    }
    for name, build in builds.items():
        if build["target"] in ("sm_90", "sm_100"):
            aligned, loop = build["V"] % 16 == 0, build["loop"]
            bound = bounds[build["order"], build["sampled"]] * (1.0 if aligned else 1.5)
            barriers, shuffles = 0, 12 * build["sampled"]
            if build["sampled"] and not aligned:
                bound, barriers, shuffles = 27700, 24, 168
            assert loop["instructions"] <= bound, (name, loop)
            assert loop["barriers"] == barriers and loop["shuffles"] == shuffles, (name, loop)


def test_summaries_are_stored_before_the_ticket_is_taken(builds: dict[str, dict[str, Any]]) -> None:
    """Partial results, then a barrier of the whole program, then one releasing and acquiring atomic."""
    for name, build in builds.items():
        operations = before_ticket(build)
        kinds = ["barrier" if "bar" in op else "store" if "st." in op or "store" in op else "load" for op in operations]
        stores = 3 + 2 * build["sampled"] + (build["order"] != "confidence")
        assert kinds.count("store") == stores, name
        assert kinds[-1] == "barrier" and kinds[-1 - stores : -1] == ["store"] * stores, name
        tickets = [operation for operation in build["memory"] if "atom" in operation]
        wanted = "global_atomic_add" if build["target"] == "gfx942" else "atom.global.gpu.acq_rel.add.u32"
        assert tickets == [wanted], name


def test_other_programs_summaries_are_not_read_from_l1(builds: dict[str, dict[str, Any]]) -> None:
    for name, build in builds.items():
        if build["target"] != "gfx942":
            after = build["memory"][len(before_ticket(build)) :]
            planes = 3 + 2 * build["sampled"] + (build["order"] != "confidence")
            assert sum(operation.startswith("ld.global.cg") for operation in after) >= planes, name


def test_floating_point_fusion_is_pinned(builds: dict[str, dict[str, Any]]) -> None:
    assert all(build["fp_fusion"] for build in builds.values())


def test_parts_are_stored_before_a_tiles_ticket_is_taken(tiled: dict[str, dict[str, Any]]) -> None:
    """Then a barrier, one releasing and acquiring atomic, and loads that skip L1."""
    split = {name: b for name, b in tiled.items() if any("atom" in operation for operation in b["memory"])}
    assert {b["target"] for b in split.values()} == set(SHARED) and all("attend" in name for name in split)
    for name, build in split.items():
        before = before_ticket(build)
        assert "bar" in before[-1] and "st" in before[-2], name
        tickets = [operation for operation in build["memory"] if "atom" in operation]
        wanted = "global_atomic_add" if build["target"] == "gfx942" else "atom.global.gpu.acq_rel.add.u32"
        assert tickets == [wanted], name
        after = [operation for operation in build["memory"][len(before) :] if operation.startswith("ld.")]
        assert all(operation.startswith("ld.global.cg") for operation in after), name


def test_operators_around_products_are_bound_by_memory(around: dict[str, dict[str, Any]]) -> None:
    """Sixteen bytes a load (on gfx942 eight of SwiGLU's and of a rotation of some channels), and so few registers that
    multiprocessors fill up: with norms of heads 40 to 71."""
    assert {b["target"] for b in around.values()} == set(SHARED)
    for name, build in around.items():
        if build["kernel"] in ("product_kernel", "route_kernel"):
            continue
        turns = build["kernel"] == "rotate_kernel" and "normed" in name
        assert build["registers"] <= (80 if turns else 64), name
        some = turns and "turning" in name
        narrow = build["target"] == "gfx942" and (build["kernel"] == "swiglu_kernel" or some)
        assert build["widest"] == (8 if narrow else 16), name
        assert not [load for load in build["memory"] if re.fullmatch(r"ld\.global\.b16|\S+_load_ushort", load)], name


def test_a_warp_ranks_experts_without_a_barrier(around: dict[str, dict[str, Any]]) -> None:
    """256 of them in 33 to 110 registers, 1,024 in 200; nothing goes through shared memory."""
    routers = {name: build for name, build in around.items() if build["kernel"] == "route_kernel"}
    assert {build["target"] for build in routers.values()} == set(SHARED)
    for name, build in routers.items():
        assert build["registers"] <= (208 if "1024" in name else 112) and build["shared"] == 0, name
        assert build["widest"] == 16 and not [at for at in build["memory"] if "bar" in at], name


def test_weights_of_one_byte_come_sixteen_at_a_time(around: dict[str, dict[str, Any]]) -> None:
    """Through shared memory to the matrix instructions; gfx942 has plain loads, as wide."""
    products = {name: build for name, build in around.items() if build["kernel"] == "product_kernel"}
    assert {build["target"] for build in products.values()} == set(SHARED)
    for name, build in products.items():
        assert build["shared"] <= SHARED[build["target"]] and build["matrix"], name
        assert build["widest"] == 16 if build["target"] == "gfx942" else build["copies"] == ["0x10"], name


def test_tiles_fit_into_shared_memory(tiled: dict[str, dict[str, Any]]) -> None:
    assert {build["target"] for build in tiled.values()} == set(SHARED)
    assert not [name for name, build in tiled.items() if build["shared"] > SHARED[build["target"]]]


def test_tiles_are_multiplied_by_matrix_instructions(tiled: dict[str, dict[str, Any]]) -> None:
    """Those of the newer targets need 64 rows; tiles of a head with one block or of few queries have fewer."""
    full = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma", "gfx942": "v_mfma"}
    for name, build in tiled.items():
        if build["kernel"] in ("project_kernel", "attend_kernel"):
            short = "v_mfma" if build["target"] == "gfx942" else "mma.sync"
            assert build["matrix"] == [full[build["target"]] if build["rows"] >= 64 else short], name
        else:
            assert build["matrix"] == [], name


def test_weights_keys_and_values_come_sixteen_bytes_at_a_time(tiled: dict[str, dict[str, Any]]) -> None:
    """Copied to shared memory while the tile before is multiplied; gfx942 has plain loads, as wide."""
    for name, build in tiled.items():
        bulk = build["kernel"] in ("project_kernel", "attend_kernel")
        loads = [operation for operation in build["memory"] if operation.startswith(("ld.", "buffer_l", "global_l"))]
        if build["target"] == "gfx942":
            assert not bulk or any(load.endswith("_load_dwordx4") for load in loads), name
        else:
            assert build["copies"] == (["0x10"] if bulk else []), name
        assert not any(load.endswith((".b16", ".u16", "ushort", "ushort_d16")) for load in loads), name


def test_a_canvas_takes_one_exponential_a_logit(canvases: dict[str, dict[str, Any]]) -> None:
    """Two with a soft cap, and one for each of a thread's groups, of which it has one in half precision and two in
    float32. Groups are shared inside a warp: nothing in the loop waits for other warps. The instructions are those
    measured with Triton 3.7.1, rounded up to ten, for 8 logits; a third of them or less are those of the last tile."""
    assert {build["target"] for build in canvases.values()} == set(SHARED)
    for name, build in canvases.items():
        if build["target"] == "gfx942" or build["V"] % 16:
            continue
        wide = build["dtype"] == "float32"
        capped = build["softcap"] > 0.0
        loop = build["loop"]
        assert loop["exponentials"] == 8 * (1 + capped) + (1 + wide), name
        assert loop["barriers"] == loop["shared"] == 0 and loop["shuffles"] == (32 if wide else 12), name
        bound = (470 if wide else 440) if capped else (280 if wide else 240)
        assert build["instructions"] <= bound, (name, build["instructions"])


def test_a_canvass_logits_are_read_once_sixteen_bytes_at_a_time(canvases: dict[str, dict[str, Any]]) -> None:
    """And the last tile's one by one. Behind the loop two groups are read again, 64 logits each."""
    for name, build in canvases.items():
        if build["target"] == "gfx942" or build["V"] % 16:
            continue
        loads = [operation for operation in before_ticket(build) if operation.startswith("ld.")]
        # Whether the canvas is finished (b8), its stream and its temperature (b64).
        loads = loads[2 + build["finished"] :]
        wide = build["dtype"] == "float32"
        single = f"ld.global.b{32 if wide else 16}"
        # One load for whole groups and one for those that are cut off, each of two groups.
        assert loads == [single] * 8 + ["ld.global.v4.b32"] * (1 + wide) + [single] * 4, name


def test_a_canvas_leaves_room_for_programs(canvases: dict[str, dict[str, Any]]) -> None:
    """80 registers let six programs of 128 threads share a multiprocessor of sm_90, 72 seven; 64 vector registers let
    eight waves share a SIMD of gfx942. 1,024 positions are merged at once, and rows that do not start on 16 bytes are
    read one logit at a time, by threads of all warps."""
    for name, build in canvases.items():
        bound = {"gfx942": 64}.get(build["target"], 80)
        if build["T"] == 1024 or build["V"] % 16:
            bound = 208
        assert build["registers"] <= bound, (name, build["registers"])


def test_a_canvass_parts_are_stored_before_the_ticket_is_taken(canvases: dict[str, dict[str, Any]]) -> None:
    """Then a barrier, one releasing and acquiring atomic, and loads that skip L1."""
    for name, build in canvases.items():
        before = before_ticket(build)
        assert "bar" in before[-1] and all("st" in operation for operation in before[-7:-1]), name
        assert not any("store" in operation or "st." in operation for operation in before[:-7]), name
        tickets = [operation for operation in build["memory"] if "atom" in operation]
        wanted = "global_atomic_add" if build["target"] == "gfx942" else "atom.global.gpu.acq_rel.add.u32"
        assert tickets == [wanted], name
        if build["target"] != "gfx942":
            after = build["memory"][len(before) :]
            assert sum(operation.startswith("ld.global.cg") for operation in after) >= 6, name
        assert build["fp_fusion"], name
