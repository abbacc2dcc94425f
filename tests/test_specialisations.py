"""How many kernels the GPU tests compile, which is most of what their first run takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from inputs import TRITON

MOST = 323
"""At half a second to two per kernel, some minutes for a run with an empty Triton cache. 43 of them are those of layers
and of weights of one byte, four those of a step by margin, ten those of block-causal models: their rules, the norms of
heads, last columns in attention, and the choice of experts. Six are attention's of queries with holes: a cache alone,
one branch, three, bfloat16, a replay, and the operator; three those of a decode with rows beside its blocks. Two
draw from a row, and do no more; four are of tempered steps and the plain ones beside them. 26 take steps of canvases,
and 16 make what their next forward is conditioned on: dtypes, softcaps, splits and layouts."""


@pytest.mark.skipif(TRITON == "3.6", reason="Triton 3.6 has no name for a rule's predicate")
def test_gpu_tests_compile_few_kernels() -> None:
    """Choose cases that share kernels (`inputs.on_gpu`) before raising the limit."""
    root = Path(__file__).parents[1]
    # Not the settings of the run that this test is part of, nor its coverage, which would take twice as long.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV"))}
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "helpers" / "specialisations.py"],
        env=environment | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert report["stopped"] == {}
    total = sum(report["kernels"].values())
    worst = [f"{own:4} of its own, {every:4} in all: {test}" for test, (every, own) in report["tests"].items()]
    assert total <= MOST, "\n".join([f"{total} kernels, expected at most {MOST}: {report['kernels']}", *worst[:12]])
    assert total > MOST // 2, "the count misses launches"
