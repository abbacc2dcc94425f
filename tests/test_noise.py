"""The counter-based noise: Philox as published, the same in PyTorch and in the kernels, and its distributions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from inputs import INTERPRETED, generator
from torch import Tensor

from fdpp.kernels import noise as kernel
from fdpp.step import noise

KERNEL_DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
USES = {"choice": noise.CHOICE, "place": noise.PLACE, "renoise": noise.RENOISE}


@triton.jit(do_not_specialize=["V"])
def numbers_kernel(seeds, positions, numbers, bits, choices, places, ids, V, BLOCK: tl.constexpr):
    """Row i: all that the stream `seeds[i]` has at `positions[i]` for `numbers` `[BLOCK]`, position and seed spread."""
    i = tl.program_id(0)
    o = tl.arange(0, BLOCK)
    seed, i_t = tl.load(seeds + i + 0 * o), tl.load(positions + i + 0 * o)
    b_number = tl.load(numbers + o)
    b0, b1, b2, b3 = kernel.bits(seed, b_number, i_t, kernel.CHOICE)
    tl.store(bits + (i * BLOCK + o) * 4, b0.to(tl.int64))
    tl.store(bits + (i * BLOCK + o) * 4 + 1, b1.to(tl.int64))
    tl.store(bits + (i * BLOCK + o) * 4 + 2, b2.to(tl.int64))
    tl.store(bits + (i * BLOCK + o) * 4 + 3, b3.to(tl.int64))
    tl.store(choices + i * BLOCK + o, kernel.group_gumbel(seed, o, i_t))
    tl.store(places + i * BLOCK + o, kernel.place(seed, b_number, i_t))
    tl.store(ids + i * BLOCK + o, kernel.renoise(seed, b_number, V))


def counters() -> tuple[Tensor, Tensor, Tensor]:
    """Seeds that use all 64 bits, positions, and numbers on both sides of 2^16."""
    seeds = torch.randint(-(2**63), 2**63 - 1, (12,), generator=generator(0))
    seeds[:5] = torch.tensor([0, 1, -1, 2**32, 2**63 - 1])
    positions = torch.randint(0, 1024, (12,), generator=generator(1))
    numbers = torch.cat((torch.arange(64), torch.randint(0, 2**31 - 1, (64,), generator=generator(2))))
    return seeds, positions, numbers


def plain_philox(key: int, *counter: int) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, from the paper (Salmon et al., SC 2011, figure 2 and table 2)."""
    k0, k1, (c0, c1, c2, c3) = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF, counter
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def test_known_answers() -> None:
    """Random123's three vectors of philox4x32-10."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    zeros = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert plain_philox(0, 0, 0, 0, 0) == zeros
    assert plain_philox(2**64 - 1, ones, ones, ones, ones) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert plain_philox(0x299F31D0A4093822, *pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    zero = torch.zeros(1, dtype=torch.int64)
    assert tuple(map(int, noise.philox(zero, zero, zero))) == zeros


@pytest.mark.parametrize("use", USES)
def test_philox_in_pytorch(use: str) -> None:
    seeds, positions, numbers = counters()
    outputs = torch.stack(noise.philox(seeds[:, None], numbers[None], positions[:, None], USES[use]), dim=2)
    for i, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
        wanted = [plain_philox(seed, number, position, USES[use], 0) for number in numbers.tolist()]
        assert outputs[i].tolist() == list(map(list, wanted))


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("V", [1, 7, 262144])
def test_kernels_draw_the_same(device: str, V: int) -> None:
    seeds, positions, numbers = counters()
    n, BLOCK = len(seeds), len(numbers)

    def room(dtype: torch.dtype, *more: int) -> Tensor:
        return torch.empty(n, BLOCK, *more, dtype=dtype, device=device)

    bits, ids = room(torch.int64, 4), room(torch.int64)
    choices, places = room(torch.float32), room(torch.float32)
    inputs = (x.to(device) for x in (seeds, positions.int(), numbers.int()))
    numbers_kernel[(n,)](*inputs, bits, choices, places, ids, V, BLOCK=BLOCK)
    assert bits.cpu().equal(torch.stack(noise.philox(seeds[:, None], numbers[None], positions[:, None]), dim=2))
    torch.testing.assert_close(choices.cpu(), noise.group_gumbel(seeds, positions, BLOCK), rtol=1e-6, atol=1e-6)
    for i in range(n):
        seed, position = seeds[i].expand(BLOCK), positions[i].expand(BLOCK)
        assert places[i].cpu().equal(noise.place(seed, position, numbers))
        assert ids[i].cpu().equal(noise.renoise(seed, numbers, V))


def test_four_groups_share_a_philox() -> None:
    """Group g has output g % 4 of number g // 4, wherever a slice of the groups begins."""
    seeds, positions, _ = counters()
    whole = noise.group_gumbel(seeds, positions, 23)
    outputs = noise.philox(seeds[:, None], torch.arange(6)[None], positions[:, None])
    for group in range(23):
        assert whole[:, group].equal(noise.gumbel(outputs[group % 4][:, group // 4]))
    for first, count in itertools.product(range(9), range(1, 7)):
        part = noise.group_gumbel(seeds, positions, count, first_group=first)
        assert part.equal(whole[:, first : first + count]), (first, count)


def test_float32_noise_is_float64_noise() -> None:
    """Closest where it matters: the largest noise of a vocabulary decides what is drawn, the lowest never."""
    seeds, positions = torch.arange(20), torch.arange(20)
    single, double = (noise.group_gumbel(seeds, positions, 5000, dtype) for dtype in (torch.float32, torch.float64))
    error = (single.double() - double).abs()
    assert error.max() < 1e-2 and error[double > -2.2].max() < 1e-4 and error[double > 7.0].max() < 2e-6


@pytest.mark.parametrize("bits", [0, 1, 1000, 2**31, 2**32 - 2**16, 2**32 - 1])
def test_the_ends_of_the_range(bits: int) -> None:
    """u stops at 1 - 2^-24 for a Gumbel, so that the smallest is -2.81 instead of -3.13: it never wins a draw."""
    wanted = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
    for dtype in (torch.float32, torch.float64):
        value = float(noise.gumbel(torch.tensor(bits), dtype))
        assert value == pytest.approx(max(wanted, -2.8115408), rel=1e-3)
        part = float(noise.uniform(torch.tensor(bits), dtype))
        assert 0.0 < part <= 1.0 and part == pytest.approx((bits + 0.5) / 2**32, rel=1e-7)


@pytest.mark.parametrize("V", [1, 2, 1000, 262144, 2**31 - 1])
def test_the_ends_of_the_vocabulary(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = torch.zeros(3, dtype=torch.int64)
    monkeypatch.setattr(noise, "philox", lambda *_: (torch.tensor([0, 2**31, 2**32 - 1]),))
    assert noise.renoise(zero, zero, V).tolist() == [0, V // 2, V - 1]


def distance(values: Tensor, cdf: Any) -> float:
    """Kolmogorov and Smirnov's, times the root of the number of values: below 1.95 in 99.9 of 100 cases."""
    values = values.flatten().double().sort()[0]
    empirical = torch.arange(1, len(values) + 1) / len(values)
    return float((cdf(values) - empirical).abs().max()) * math.sqrt(len(values))


def test_distributions() -> None:
    """100,000 numbers of each kind."""
    seeds, positions = torch.arange(10), torch.arange(10)
    choices = noise.group_gumbel(seeds, positions, 10_000, torch.float64)
    assert distance(choices, lambda x: torch.exp(-torch.exp(-x))) < 1.95
    seeds, positions = (x.repeat_interleave(10_000) for x in (seeds, positions))
    numbers = torch.arange(10_000).repeat(10)
    assert distance(noise.place(seeds, positions, numbers), lambda x: x) < 1.95
    ids = noise.renoise(seeds, numbers, 262144)
    assert distance((ids + 0.5) / 262144, lambda x: x) < 1.95
    # Few ids, each as often: Pearson's statistic of 7 ids, below its 99.9% quantile.
    counts = noise.renoise(seeds, numbers, 7).bincount(minlength=7).double()
    assert float(((counts - 1e5 / 7) ** 2 / (1e5 / 7)).sum()) < 22.5


def test_streams_are_unrelated() -> None:
    """Neighbouring seeds, positions and numbers, a seed's high half, uses, and the four outputs."""
    number = torch.arange(4096)
    seed, position = torch.full_like(number, 5), torch.full_like(number, 5)
    base, *outputs = noise.philox(seed, number, position)
    others = {
        "seed": noise.philox(seed + 1, number, position)[0],
        "position": noise.philox(seed, number, position + 1)[0],
        "high half": noise.philox(seed + 2**32, number, position)[0],
        "number": base.roll(1),
        **{f"use {use}": noise.philox(seed, number, position, USES[use])[0] for use in ("place", "renoise")},
        **{f"output {i}": output for i, output in enumerate(outputs, 1)},
    }
    for name, other in others.items():
        assert not other.equal(base), name
        pair = torch.stack((base, other)).double()
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / 64, name
