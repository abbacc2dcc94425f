"""Selection at LLaDA's vocabulary: the fused step against the published float64 way, in the same run.

`make bench` runs it with pytest-benchmark and writes `select-<device>.json` under its `OUT`.
"""

from __future__ import annotations

import pytest
import torch
from measure import DEVICE, peak_bytes
from published import select_frechet

import fdpp

V, MASK_ID = 126464, 126336
MARGIN = 0.25
SIZES = {"32 positions, all masked": 32, "256 positions, 32 masked": 256, "1024 positions, 32 masked": 1024}


@pytest.fixture(scope="module", params=SIZES, ids=[str(T) for T in SIZES.values()])
def problem(request: pytest.FixtureRequest) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Bfloat16 logits with confidences from 0 to 1, the last 32 positions masked."""
    T = SIZES[request.param]
    generator = torch.Generator(DEVICE).manual_seed(0)
    logits = torch.randn(1, T, V, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    peak = 4.0 + 24.0 * torch.rand(T, device=DEVICE, generator=generator)
    winner = torch.randint(0, MASK_ID, (T,), device=DEVICE, generator=generator)
    logits[0, torch.arange(T, device=DEVICE), winner] = peak.bfloat16()
    tokens = torch.zeros(1, T, dtype=torch.int64, device=DEVICE)
    tokens[:, -32:] = MASK_ID
    return request.param, logits, tokens


@pytest.mark.parametrize("way", ["fdpp", "published"])
def test_select(benchmark, problem, way):  # type: ignore[no-untyped-def]
    size, logits, tokens = problem
    step = fdpp.DenoisingStep(fdpp.Frechet(MARGIN), MASK_ID).to(DEVICE)

    def call():  # type: ignore[no-untyped-def]
        out = step(logits, tokens) if way == "fdpp" else select_frechet(logits, tokens, MASK_ID, MARGIN)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return out

    expected, committed = select_frechet(logits, tokens, MASK_ID, MARGIN)
    assert torch.equal(step(logits, tokens).tokens, expected)
    benchmark.extra_info.update(size=size, way=way, peak_bytes=peak_bytes(call), committed=int(committed.sum()))
    benchmark.group = size
    benchmark.pedantic(call, rounds=5 if way == "published" else 30, warmup_rounds=1)
