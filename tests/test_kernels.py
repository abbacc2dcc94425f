"""What holds of the kernel however its work is cut up, and what it leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import INTERPRETED, assert_as_specified, assert_equal, on_gpu, random_problem, run
from torch import Tensor

from fdpp import EntropyBound, Frechet, Quota, Rule
from fdpp.kernels import launch
from fdpp.kernels.launch import MERGE_TILE, TILES_AT_ONCE, select_launch
from fdpp.step import gpu

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")

KERNELS = [
    pytest.param("interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(B=st.integers(1, 300), T=st.integers(1, 1024), V=st.integers(1, 300_000), sampled=st.booleans())
def test_launch_configurations_cover_the_vocabulary(B: int, T: int, V: int, sampled: bool) -> None:
    config = select_launch(B, T, V, sampled)
    assert config.splits.bit_count() == config.block_t.bit_count() == config.block_v.bit_count() == 1
    assert T <= config.block_t < max(2 * T, 3)
    assert config.block_t * config.splits <= MERGE_TILE
    assert config.split_len % config.block_v == 0
    assert config.splits * config.split_len >= V
    assert config.splits == 1 or config.splits // 2 * TILES_AT_ONCE * config.block_v < V
    assert config == select_launch(B, T, V, sampled) and hash(config)


def test_launch_configurations_fill_the_device() -> None:
    """One 32-token block at LLaDA's vocabulary is cut into hundreds of programs, a big batch into one per row."""
    for rows in (1, 8, 32, 40, 256):
        assert min(264, 31 * rows) <= rows * select_launch(1, rows, 126464).splits <= 1024, rows
    assert select_launch(256, 32, 126464).splits == 1


@on_gpu(lambda rule, T: (T, rule.order) in [(2, "entropy"), (31, "confidence")])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", [Frechet(0.1), EntropyBound(2.0)], ids=str)
@pytest.mark.parametrize("T", [2, 11, 31, 32])
def test_counting_and_sorting_agree(kernel: str, rule: Rule, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(T, 2, T, 30, rule, masked=0.8)
    problem.logits[1, T // 2] = problem.logits[1, 0]
    problem.logits[1, T - 1] = float("nan")
    results = []
    for limit in (1024, 1):
        monkeypatch.setattr(launch, "COUNT_RANKS_UP_TO", limit)
        assert select_launch(2, T, 30).count_ranks == (limit == 1024)
        results.append(run(kernel, problem))
    assert_equal(*results)
    assert_as_specified(results[0], problem)


@on_gpu(lambda rule, temperature: rule.order == "entropy" and temperature > 0.0)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", [Frechet(0.1), EntropyBound(6.0)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_any_number_of_splits(kernel: str, rule: Rule, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tiles as one split, as two, and as eight, some of them empty."""
    problem = random_problem(2, 1, 6, 5000, rule, masked=1.0, temperature=temperature)
    problem.logits[0, 3] = -float("inf")
    problem.logits[0, 3, 4500] = 2.0
    monkeypatch.setattr(launch, "BLOCK_V", 1024)
    results = []
    for programs, splits in ((1, 1), (12, 2), (1024, 4)):
        monkeypatch.setattr(launch, "PROGRAMS", programs)
        assert select_launch(1, 6, 5000).splits == splits
        results.append(run(kernel, problem))
        assert_as_specified(results[-1], problem)
    for result in results[1:]:
        assert result.proposal.equal(results[0].proposal)
        torch.testing.assert_close(result.confidence, results[0].confidence, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_tickets_are_left_at_zero(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next launch on the stream may use them as they are."""
    kept: dict[torch.device, Tensor] = {}

    def ticket_for(device: torch.device, B: int) -> Tensor:
        return kept.setdefault(device, torch.zeros(8, dtype=torch.int32, device=device))

    monkeypatch.setattr(gpu, "ticket_for", ticket_for)
    for B, T, V in ((3, 5, 21), (8, 5, 9001), (1, 40, 21), (3, 5, 21)):
        problem = random_problem(B, B, T, V, Quota(2))
        assert_as_specified(run(kernel, problem), problem)
        (tickets,) = kept.values()
        assert not tickets.any()


def test_captured_launches_share_no_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs start at multiples of 16 bytes, for which the kernel was compiled before the capture."""
    device, slab = torch.device("cpu"), torch.zeros(13, dtype=torch.int32)
    monkeypatch.setattr(gpu, "spare", {device: slab})
    monkeypatch.setattr(gpu, "slabs", [slab])
    first, second = gpu.ticket_of_graph(device, 3), gpu.ticket_of_graph(device, 5)
    first += 1
    second += 2
    assert slab.tolist() == [1] * 3 + [0] + [2] * 5 + [0] * 4
    assert gpu.ticket_of_graph(device, 2).tolist() == [0, 0] and gpu.spare[device].numel() == 1
    gpu.reset_tickets()
    assert not slab.any()


@pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
def test_scratch_is_written_for_masked_active_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new tensor starts as NaN or 77. None of it comes through, and no other row leaves a summary."""
    made: list[Tensor] = []

    def rubbish(*shape: Any, **options: Any) -> Tensor:
        made.append(original(*shape, **options))
        return made[-1].fill_(float("nan") if made[-1].is_floating_point() else 77)

    problem = random_problem(3, 2, 6, 5000, EntropyBound(2.0), temperature=1.0, active=True)
    clean = run("interpreter", problem)
    original = torch.empty
    monkeypatch.setattr(torch, "empty", rubbish)
    assert_equal(run("interpreter", problem), clean)
    (summaries,) = (tensor for tensor in made if tensor.dim() == 4)
    assert not problem.candidate.all()
    assert summaries.isnan().equal(~problem.candidate[None, :, :, None].expand_as(summaries))
