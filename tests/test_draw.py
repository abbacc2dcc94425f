"""Draws from softmax(l / T): as often as they should be, and the same in PyTorch, in float64 and in the kernels."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import INTERPRETED, generator, on_gpu
from torch import Tensor

from fdpp.kernels.vocab import summarize_row
from fdpp.step import draw as twin
from fdpp.step.draw import draw
from fdpp.step.noise import GROUP, group_gumbel

# The interpreter computes with NumPy, which warns of the infinities and NaN that `tl.where` then leaves out.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

KERNEL_DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
INF, NAN = float("inf"), float("nan")
BLOCKS = {1: 16, 20: 32, 63: 64, 64: 64, 65: 128, 1000: 256}
"""Sizes of a vocabulary, and of tiles for each: short ones are shorter than a group."""


@triton.jit(do_not_specialize=["V", "split_len"])
def draw_kernel(logits, seeds, positions, temperature, score, logit, token, V, split_len, BLOCK_V: tl.constexpr):
    """Grid (rows, splits)."""
    i, i_s, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    start = i_s * split_len
    stop = tl.minimum(start + split_len, V)
    seed, i_t = tl.load(seeds + i), tl.load(positions + i)
    part = summarize_row(logits + i * V, start, stop, -1, seed, i_t, temperature, 1.0, True, "confidence", BLOCK_V)
    tl.store(score + i * splits + i_s, part.score)
    tl.store(logit + i * splits + i_s, part.logit)
    tl.store(token + i * splits + i_s, part.token)


def in_kernel(
    device: str, logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float, block_v: int, splits: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Score, token and the token's logit `[n]`."""
    n, V = logits.shape
    split_len = -(-V // (splits * block_v)) * block_v
    score, logit = (torch.empty(n, splits, device=device) for _ in range(2))
    token = torch.empty(n, splits, dtype=torch.int32, device=device)
    inputs = (x.to(device) for x in (logits.contiguous(), seeds, positions.int()))
    draw_kernel[(n, splits)](*inputs, temperature, score, logit, token, V, split_len, BLOCK_V=block_v)
    best, i = score.cpu().max(1)
    return best, *(x.cpu().gather(1, i[:, None])[:, 0] for x in (token.long(), logit))


def rows_of_every_kind(V: int, temperature: float) -> Tensor:
    """`[n, V]` float32, as far apart as `temperature` is hot: flat, peaked, tied, and with infinities and NaN."""
    rows = torch.randn(14, V, generator=generator(V)) * temperature
    rows[0] = 0.0
    rows[1, V // 2] += 12.0 * temperature
    rows[2, :: max(V // 3, 1)] = 6.0 * temperature
    rows[3, 0] = rows[4, -1] = 9.0 * temperature
    rows[5, : V // 2] = -INF
    rows[6, : V - 1] = -INF
    rows[7] = -INF
    rows[8, V // 3] = NAN
    rows[9] = NAN
    rows[10, V // 3] = INF
    rows[11, 1:] = NAN
    rows[12, V // 2 :] = INF
    rows[13] -= 300.0
    return rows


@on_gpu(lambda V: V == 1000)
@pytest.mark.parametrize("temperature", [1e-3, 0.7, 100.0])
@pytest.mark.parametrize("V", BLOCKS)
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_kernel_twin_and_float64_draw_the_same(device: str, V: int, temperature: float) -> None:
    rows = rows_of_every_kind(V, temperature)
    seeds, positions = torch.arange(len(rows)) - 7, torch.arange(len(rows)) * 3
    score, token = draw(rows, seeds, positions, temperature)
    exact = draw(rows.double(), seeds, positions, temperature)
    assert token.equal(exact[1]) and (token >= 0).all() and (token < V).all()
    torch.testing.assert_close(score.double(), exact[0], rtol=1e-6, atol=1e-5 * temperature)
    best, drawn, logit = in_kernel(device, rows, seeds, positions, temperature, BLOCKS[V])
    assert drawn.equal(token)
    torch.testing.assert_close(best, score, rtol=1e-6, atol=1e-5 * temperature)
    held = rows.nan_to_num(nan=-INF, posinf=INF, neginf=-INF)
    assert logit.equal(held.gather(1, token[:, None])[:, 0])
    # A token of a row that has logits is one of them; next to +inf nothing else is.
    some = (held > -INF).any(1)
    assert (held.gather(1, token[:, None])[some] > -INF).all() and (held[[10, 12], token[[10, 12]]] == INF).all()
    assert token[[6, 11]].tolist() == [V - 1, 0]


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_draws_do_not_depend_on_tiles_splits_or_rows_beside(device: str) -> None:
    V, n = 1000, 7
    rows = torch.randn(n, V, generator=generator(0)) * 3
    seeds, positions = torch.arange(n), torch.arange(n) % 3
    token = draw(rows, seeds, positions, 0.9)[1]
    assert len(set(token.tolist())) > n // 2
    cases = ((64, 2), (256, 1)) if device == "cuda" else ((64, 2), (128, 8), (256, 1), (1024, 1))
    for block_v, splits in cases:
        found = in_kernel(device, rows, seeds, positions, 0.9, block_v, splits)[1]
        assert found.equal(token), (block_v, splits)
    for i in (0, 3, n - 1):
        alone = draw(rows[i : i + 1], seeds[i : i + 1], positions[i : i + 1], 0.9)[1]
        assert alone.equal(token[i : i + 1])


@pytest.mark.parametrize("first", [64, 320, 960])
def test_parts_of_a_row(first: int) -> None:
    rows = torch.randn(30, 1000, generator=generator(1)) * 3
    seeds, positions = torch.arange(30), torch.arange(30)
    score, token = draw(rows, seeds, positions, 1.1)
    low, high = draw(rows[:, :first], seeds, positions, 1.1), draw(rows[:, first:], seeds, positions, 1.1, first)
    assert torch.maximum(low[0], high[0]).equal(score)
    assert torch.where(low[0] >= high[0], low[1], high[1] + first).equal(token)


def quantile(freedoms: int) -> float:
    """That of chi-square that 99.9 of 100 statistics stay below (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedoms)
    return freedoms * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


def statistic(drawn: Tensor, p: Tensor) -> tuple[float, int]:
    """Pearson's, and its degrees of freedom; ids that are expected less than five times count as one."""
    counts, wanted = drawn.bincount(minlength=len(p)).double(), p * len(drawn)
    rare = wanted < 5
    counts, wanted = (torch.cat((x[~rare], x[rare].sum()[None])) for x in (counts, wanted))
    assert not counts[wanted == 0].any()
    counts, wanted = counts[wanted > 0], wanted[wanted > 0]
    return float(((counts - wanted) ** 2 / wanted).sum()), len(counts) - 1


@pytest.mark.parametrize("temperature", [1e-3, 0.7, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["flat", "peaked", "spread", "with holes"])
@pytest.mark.parametrize("V", BLOCKS)
def test_frequencies(V: int, kind: str, temperature: float) -> None:
    """10,000 draws of other positions and streams follow softmax(l / T)."""
    x = torch.randn(V, generator=generator(V)) * (2.0 if kind == "spread" else 0.1)
    if kind == "peaked":
        x[V // 3] += 5.0
    if kind == "with holes":
        x[1::2] = -INF
    logits, n = x * temperature, 10_000
    positions = torch.arange(n) % 500
    drawn = draw(logits.expand(n, V), torch.arange(n) // 500, positions, temperature)[1]
    found, freedoms = statistic(drawn, (logits.double() / temperature).softmax(0))
    assert found < quantile(freedoms) if freedoms else found == 0.0


@pytest.mark.parametrize("device", KERNEL_DEVICES)
@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-39, 1e37, 1e300], ids=str)
def test_temperatures_that_float32_cannot_divide_by(device: str, temperature: float) -> None:
    """Cold ones take the largest logit, hot ones any that is not -inf."""
    rows = torch.randn(20, 130, generator=generator(3))
    rows[:, 100:] = -INF
    seeds, positions = torch.arange(20), torch.arange(20)
    token = draw(rows, seeds, positions, temperature)[1]
    assert in_kernel(device, rows, seeds, positions, temperature, 256)[1].equal(token)
    if temperature < 1.0:
        assert token.equal(rows.argmax(1))
    else:
        assert (token < 100).all() and len(set(token.tolist())) > 12


def test_a_temperature_for_each_row() -> None:
    rows, seeds = torch.randn(6, 200, generator=generator(4)), torch.arange(6)
    temperatures = torch.tensor([0.1, 0.5, 1.0, 2.0, 5.0, 50.0])
    together = draw(rows, seeds, seeds, temperatures)
    for i, temperature in enumerate(temperatures.tolist()):
        alone = draw(rows[i : i + 1], seeds[i : i + 1], seeds[i : i + 1], temperature)
        assert all(whole[i : i + 1].equal(part) for whole, part in zip(together, alone, strict=True))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    V=st.integers(1, 700),
    temperature=st.sampled_from((1e-3, 0.3, 1.0, 20.0, 1e4)),
    scale=st.sampled_from((0.0, 1.0, 10.0, 1e3)),
    levels=st.sampled_from((1.0, 1e4)),
)
def test_groups_that_are_left_out_lose(seed: int, V: int, temperature: float, scale: float, levels: float) -> None:
    """Against the scores of all groups, and from the whole group's cumulative sums."""
    g = generator(seed)
    rows = (torch.randn(5, V, generator=g) * levels).round() / levels * scale
    rows[torch.rand(5, V, generator=g) < 0.2] = -INF
    seeds, positions = torch.randint(0, 2**40, (5,), generator=g), torch.arange(5)
    groups = torch.nn.functional.pad(rows, (0, -V % GROUP), value=-INF).unflatten(1, (-1, GROUP))
    peak, mass = twin.masses(groups, temperature)
    t = torch.tensor(temperature)
    scores = peak[..., 0] + t * (mass.sum(2).log() + group_gumbel(seeds, positions, groups.shape[1]))
    score, token = draw(rows, seeds, positions, temperature)
    best, group = scores.max(1)
    torch.testing.assert_close(score, best, rtol=1e-6, atol=0.0)
    assert (token // GROUP).equal(group)


@pytest.mark.parametrize(
    ("mass", "part", "wanted"),
    [
        ([1.0, 1.0, 2.0], 0.2499, 0),
        ([1.0, 1.0, 2.0], 0.25, 1),
        ([1.0, 1.0, 2.0], 0.4999, 1),
        ([1.0, 1.0, 2.0], 0.5, 2),
        ([1.0, 1.0, 2.0], 1.0, 2),
        ([0.0, 1.0, 0.0, 1.0, 0.0], 1e-10, 1),
        ([0.0, 1.0, 0.0, 1.0, 0.0], 0.5, 3),
        ([0.0, 1.0, 0.0, 1.0, 0.0], 1.0, 3),
        ([0.0, 0.0], 0.5, 0),
        ([0.0, INF, 0.0, INF, 0.0], 0.3, 3),
    ],
)
def test_the_place_in_a_group(mass: list[float], part: float, wanted: int) -> None:
    """The first id whose cumulative mass exceeds the part, never one without a mass; the last one of u = 1."""
    for dtype in (torch.float32, torch.float64):
        assert int(twin.column(torch.tensor([mass], dtype=dtype), torch.tensor([part], dtype=dtype))) == wanted
