"""The counter-based noise: Philox as published, the same in PyTorch and in the kernels, and Gumbel distributed."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from inputs import INTERPRETED, generator
from torch import Tensor

from fdpp.kernels.noise import gumbel as gumbel_in_kernel
from fdpp.step import noise

KERNEL_DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@triton.jit
def draw(seeds, positions, ids, bits, values, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    seed, position = tl.load(seeds + i), tl.load(positions + i)
    b_id = tl.load(ids + o)
    zero = tl.zeros_like(b_id).to(tl.uint32)
    first, _, _, _ = tl.philox(seed, b_id.to(tl.uint32), zero + position.to(tl.uint32), zero, zero)
    tl.store(bits + i * BLOCK + o, first.to(tl.int64))
    tl.store(values + i * BLOCK + o, gumbel_in_kernel(seed, b_id, position))


def counters() -> tuple[Tensor, Tensor, Tensor]:
    """Seeds that use all 64 bits, positions, and vocabulary ids on both sides of 2^16."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (12,), generator=generator(0))
    seeds[:5] = torch.tensor([0, 1, -1, 2**32, 2**63 - 1])
    positions = torch.randint(0, 1024, (12,), generator=generator(1))
    ids = torch.cat((torch.arange(64), torch.randint(0, 2**31 - 1, (64,), generator=generator(2)))).int()
    return seeds, positions, ids


def test_known_answers() -> None:
    """Random123's vectors of philox4x32-10, those whose last two counter words are ours: all zero."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert int(noise.philox_bits(zero, zero, zero)) == 0x6627E8D5


def plain_philox(key: int, c0: int, c1: int) -> int:
    """Philox4x32-10 in Python's integers, from the paper (Salmon et al., SC 2011, figure 2 and table 2)."""
    k0, k1, c2, c3 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF, 0, 0
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0


def test_philox_in_pytorch() -> None:
    seeds, positions, ids = counters()
    bits = noise.philox_bits(seeds[:, None], ids[None].long(), positions[:, None])
    for i, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        assert bits[i].tolist() == [plain_philox(seed, v, position) for v in ids.tolist()]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernels_draw_the_same(device: str) -> None:
    seeds, positions, ids = counters()
    bits = torch.empty(len(seeds), len(ids), dtype=torch.int64, device=device)
    values = torch.empty(len(seeds), len(ids), device=device)
    draw[(len(seeds),)](seeds.to(device), positions.int().to(device), ids.to(device), bits, values, BLOCK=len(ids))
    wanted = noise.philox_bits(seeds[:, None], ids[None].long(), positions[:, None])
    assert bits.cpu().equal(wanted)
    for i in range(len(seeds)):
        twin = noise.gumbel(seeds[i : i + 1], positions[i : i + 1], 64)[0]
        torch.testing.assert_close(values[i, :64].cpu(), twin, rtol=1e-6, atol=1e-6)


def test_float32_noise_is_float64_noise() -> None:
    """Closest where it matters: the largest noise of a vocabulary decides who is drawn."""
    seeds, positions = torch.arange(20), torch.arange(20)
    single, double = noise.gumbel(seeds, positions, 5000), noise.gumbel(seeds, positions, 5000, torch.float64)
    error = (single.double() - double).abs()
    assert error.max() < 1e-4 and error[double > 7.0].max() < 2e-6


@pytest.mark.parametrize("bits", [0, 1, 1000, 2**31, 2**32 - 2**16, 2**32 - 1])
def test_the_ends_of_the_range_are_finite(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """u stops at 1 - 2^-24, so that the smallest noise is -2.81 instead of -3.13: it never wins a draw."""
    monkeypatch.setattr(noise, "philox_bits", lambda *_: torch.tensor([[bits]]))
    zero = torch.zeros(1, dtype=torch.int64)
    wanted = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
    for dtype in (torch.float32, torch.float64):
        value = float(noise.gumbel(zero, zero, 1, dtype))
        assert value == pytest.approx(max(wanted, -2.8115408), rel=1e-3)


def test_gumbel_distribution() -> None:
    """Kolmogorov-Smirnov over 100,000 draws: below 1.95 / sqrt(n), the 99.9% quantile."""
    draws = noise.gumbel(torch.arange(10), torch.arange(10), 10_000, torch.float64).flatten().sort()[0]
    theory = torch.exp(-torch.exp(-draws))
    empirical = torch.arange(1, len(draws) + 1) / len(draws)
    assert float((theory - empirical).abs().max()) < 1.95 / math.sqrt(len(draws))


def test_streams_are_unrelated() -> None:
    """Neighbouring seeds, positions and ids, and a seed's high half."""
    one = torch.tensor([5])
    base = noise.gumbel(one, one, 4096, torch.float64)[0]
    for other in (
        noise.gumbel(one + 1, one, 4096, torch.float64)[0],
        noise.gumbel(one, one + 1, 4096, torch.float64)[0],
        noise.gumbel(one + 2**32, one, 4096, torch.float64)[0],
        base.roll(1),
    ):
        assert abs(float(torch.corrcoef(torch.stack((base, other)))[0, 1])) < 4 / 64
