"""The kernel as GPUs would get it: compiled here, without one, for every target and kind of launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SPILLS_ALLOWED = {
    # ptxas gives up 8 bytes to get down to 80 registers, which lets three programs share a multiprocessor.
    "sm_80-Frechet-256x128x126464-bfloat16-sampled": 8,
}


@pytest.fixture(scope="module")
def builds() -> dict[str, dict[str, Any]]:
    """What `aot.py` reports, by name."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("aot.py")],
        env=os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert len({report["name"] for report in reports}) == len(reports) >= 30
    return {report["name"]: report for report in reports}


def before_ticket(build: dict[str, Any]) -> list[str]:
    ticket = next(i for i, operation in enumerate(build["memory"]) if "atom" in operation)
    return build["memory"][:ticket]


def test_every_target_and_kind_is_built(builds: dict[str, dict[str, Any]]) -> None:
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        kinds = {(b["by_entropy"], b["sampled"]) for b in builds.values() if b["target"] == target}
        assert kinds == {(False, False), (True, False), (True, True), (False, True)}, target


def test_no_spills(builds: dict[str, dict[str, Any]]) -> None:
    spills = {name: b["stack"] + b["local"] for name, b in builds.items() if b["stack"] + b["local"]}
    assert all(size <= SPILLS_ALLOWED.get(name, 0) for name, size in spills.items()), spills


def test_registers(builds: dict[str, dict[str, Any]]) -> None:
    """At most what was measured with Triton 3.7.1, rounded up to eight: 128 registers let two programs of 256 threads
    share a multiprocessor of sm_90, 80 let three; 64 vector registers let eight waves share a SIMD of gfx942."""
    for name, build in builds.items():
        if build["target"] == "gfx942":
            bound = 64
        elif build["sampled"] or build["T"] == 1024:
            bound = 128
        else:
            bound = 88 if build["active"] else 80
        assert build["registers"] <= bound, (name, build["registers"])


def test_logits_are_read_sixteen_bytes_at_a_time(builds: dict[str, dict[str, Any]]) -> None:
    """Where rows start on 16 bytes; a tile is 2048 logits over 256 threads."""
    for name, build in builds.items():
        if build["target"] == "gfx942":
            continue
        # The token (b64), whether it is active (b8) and the seed (b64) come first, each once.
        loads = [operation for operation in before_ticket(build) if operation.startswith("ld.")]
        loads = loads[1 + build["active"] + build["sampled"] :]
        size = 4 if build["dtype"] == "float32" else 2
        if build["V"] % 16 == 0:
            assert loads == ["ld.global.v4.b32"] * (2048 // build["threads"] * size // 16), name
        else:
            assert loads == [f"ld.global.b{8 * size}"] * (2048 // build["threads"]), name


def test_summaries_are_stored_before_the_ticket_is_taken(builds: dict[str, dict[str, Any]]) -> None:
    """Partial results, then a barrier of the whole program, then one releasing and acquiring atomic."""
    for name, build in builds.items():
        operations = before_ticket(build)
        kinds = ["barrier" if "bar" in op else "store" if "st." in op or "store" in op else "load" for op in operations]
        stores = 3 + 2 * build["sampled"] + build["by_entropy"]
        assert kinds.count("store") == stores, name
        assert kinds[-1] == "barrier" and kinds[-1 - stores : -1] == ["store"] * stores, name
        tickets = [operation for operation in build["memory"] if "atom" in operation]
        wanted = "global_atomic_add" if build["target"] == "gfx942" else "atom.global.gpu.acq_rel.add.u32"
        assert tickets == [wanted], name


def test_other_programs_summaries_are_not_read_from_l1(builds: dict[str, dict[str, Any]]) -> None:
    for name, build in builds.items():
        if build["target"] != "gfx942":
            after = build["memory"][len(before_ticket(build)) :]
            planes = 3 + 2 * build["sampled"] + build["by_entropy"]
            assert sum(operation.startswith("ld.global.cg") for operation in after) >= planes, name


def test_floating_point_fusion_is_pinned(builds: dict[str, dict[str, Any]]) -> None:
    assert all(build["fp_fusion"] for build in builds.values())
