"""The order "margin": by the lead of the most likely token over the next one, against the float64 specification."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import (
    IMPLEMENTATIONS,
    Lead,
    Problem,
    assert_as_specified,
    expected,
    is_close_call,
    on_gpu,
    random_problem,
    run,
    run_in_block,
)
from torch import Tensor

import fdpp
from fdpp import Rule, TopkMargin
from fdpp.step import cpu, reference
from fdpp.step.terms import Terms, pack

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide by zero|All-NaN):RuntimeWarning")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)

V, MASK = 23, 7
INF, NAN = float("inf"), float("nan")
LOWEST = torch.finfo(torch.float32).min


def all_masked(logits: Tensor, rule: Rule, mask_id: int = MASK) -> Problem:
    """One sequence with `logits` `[T, V]`."""
    return Problem(logits[None], torch.full((1, len(logits)), mask_id), (rule,), mask_id)


def pairs(*logits: tuple[float, float], size: int = V) -> Tensor:
    """Rows `[T, size]` whose tokens 3 and 11 have these logits, and all others -inf."""
    rows = torch.full((len(logits), size), -INF)
    for t, (first, second) in enumerate(logits):
        rows[t, 3], rows[t, 11] = first, second
    return rows


def order_of(implementation: str, logits: Tensor, mask_id: int = MASK) -> list[int]:
    """The positions in the order in which one a step would commit them from the same logits."""
    order = []
    for k in range(1, len(logits) + 1):
        committed = run_in_block(implementation, all_masked(logits, TopkMargin(k), mask_id)).committed[0]
        order += [t for t in committed.nonzero().flatten().tolist() if t not in order]
    return order


@each_implementation
def test_the_lead_decides_and_not_the_confidence(implementation: str) -> None:
    """A row of two rivals is more confident than one of many, and leads less."""
    rivals, many = torch.full((V,), -INF), torch.full((V,), 0.0)
    rivals[:2] = torch.tensor([0.55, 0.45]).log()
    many[5] = math.log(20.0)
    logits = torch.stack((rivals, many))
    out = run_in_block(implementation, all_masked(logits, TopkMargin(1)))
    assert out.confidence[0, 0] > out.confidence[0, 1]
    assert out.committed.tolist() == [[False, True]]
    assert run_in_block(implementation, all_masked(logits, fdpp.MaskgitPlus(1))).committed.tolist() == [[True, False]]


@each_implementation
def test_ties_of_the_two_best_lead_by_nothing(implementation: str) -> None:
    """They are usable, and the lower position comes first; next to them is the smallest lead that there is."""
    logits = pairs((2.0, 2.0), (0.0, -1e-6), (-5.0, -5.0), (3.0, -INF), (1.0, 0.0), (LOWEST, LOWEST))
    assert order_of(implementation, logits) == [3, 4, 1, 0, 2, 5]
    everything = run_in_block(implementation, all_masked(logits, Lead(0.0)))
    assert everything.committed.all() and not everything.nonfinite.any()
    strict = run_in_block(implementation, all_masked(logits, Lead(1e-9)))
    assert strict.committed.tolist() == [[False, True, False, True, True, False]]


@each_implementation
def test_unusable_rows_come_last(implementation: str) -> None:
    logits = pairs((1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.5, -INF))
    logits[0, 20], logits[1, 20], logits[2], logits[3, MASK] = NAN, INF, -INF, NAN
    problem = all_masked(logits, Lead(0.0))
    out = run_in_block(implementation, problem)
    assert out.committed.tolist() == [[False, False, False, False, True, True]] and out.nonfinite.tolist() == [4]
    assert_as_specified(out, problem)
    assert order_of(implementation, logits) == [5, 4], "unusable ones commit where there is nothing else"
    alone = run_in_block(implementation, all_masked(logits[:3], Lead(0.0)))
    assert alone.committed.tolist() == [[True, False, False]]


@on_gpu(lambda size: size == 17)
@each_implementation
@pytest.mark.parametrize("logit", [0.0, -80.0, 80.0, LOWEST, -LOWEST], ids=str)
@pytest.mark.parametrize("size", [2, 17, 9001])
def test_a_token_without_a_rival_leads_by_its_probability(implementation: str, size: int, logit: float) -> None:
    logits = torch.full((2, size), -INF)
    logits[:, 1] = logit
    logits[1, 0] = logit  # the mask id: no rival, but a share of the softmax
    out = run_in_block(implementation, all_masked(logits, Lead(0.6), mask_id=0))
    assert out.committed.tolist() == [[True, False]]
    assert run_in_block(implementation, all_masked(logits, Lead(0.4), mask_id=0)).committed.all()
    assert out.proposal.tolist() == [[1, 1]]


@each_implementation
def test_the_mask_is_none_of_the_two(implementation: str) -> None:
    """Nor is it left out of the probabilities."""
    logits = pairs((2.0, 0.0), (2.0, 0.0), (2.0, 0.0))
    logits[0, MASK], logits[1, MASK] = 1.9, 6.0
    problem = all_masked(logits, Lead(0.3))
    assert_as_specified(run_in_block(implementation, problem), problem)
    assert order_of(implementation, logits) == [2, 0, 1]


@on_gpu(lambda temperature: temperature > 0.0)
@each_implementation
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_two_best_anywhere(implementation: str, temperature: float) -> None:
    """In one lane, in one tile, in two tiles and in two splits, whose borders are multiples of 1024 and 2048."""
    size = 9001
    places = [(0, 1), (3, 2051), (2047, 2048), (5, 4101), (4095, 8192), (8999, 0), (10, 8202), (MASK + 1, MASK - 1)]
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(len(places), size, generator=g)
    for t, (first, second) in enumerate(places):
        logits[t, first], logits[t, second] = 12.0, 12.0 - 0.3 * (t + 1)
    for k in (1, 3, 6):
        problem = all_masked(logits, TopkMargin(k))
        if temperature:
            problem = Problem(*(getattr(problem, f) for f in ("logits", "tokens", "rules", "mask_id", "active")),
                              temperature, torch.tensor([5]))  # fmt: skip
        out = run(implementation, problem)
        assert_as_specified(out, problem)
        assert out.committed[0, -k:].all()


@on_gpu(lambda: False)
@each_implementation
def test_samples_change_no_lead(implementation: str) -> None:
    """So hot that unlikely tokens are proposed: they are committed in the order of the two most likely ones' lead."""
    problem = random_problem(3, 2, 12, 40, TopkMargin(4), masked=1.0, temperature=30.0)
    hot, cold = (
        run(implementation, problem),
        run(implementation, random_problem(3, 2, 12, 40, TopkMargin(4), masked=1.0)),
    )
    assert hot.committed.equal(cold.committed) and not hot.proposal.equal(cold.proposal)
    assert (hot.confidence < 1e-3).any()
    assert_as_specified(hot, problem)


@on_gpu(lambda temperature: temperature == 0.0)
@each_implementation
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_full_vocabulary(implementation: str, temperature: float) -> None:
    problem = random_problem(
        1, 1, 3, 126464, Lead(0.2), masked=1.0, mask_id=126336, dtype=torch.bfloat16, temperature=temperature
    )
    problem.logits[0, 0, problem.mask_id] = 13.0
    problem.logits[0, 1, 126463] = problem.logits[0, 1, 4] = 30.0
    assert_as_specified(run(implementation, problem), problem)


@on_gpu(lambda: False)
@each_implementation
def test_odd_rows(implementation: str) -> None:
    """One position, a padded block, strided rows, a part that is active."""
    for T, masked in ((1, 1.0), (2, 1.0), (33, 0.9), (129, 0.2)):
        problem = random_problem(T, 2, T, 17, Lead(0.4), TopkMargin(3), masked=masked, active=T == 33)
        problem = Problem(*(problem.logits, problem.tokens, (Lead(0.4),), problem.mask_id, problem.active))
        truth = expected(problem)
        if not any(is_close_call(problem, truth, b) for b in range(2)):
            assert_as_specified(run(implementation, problem), problem, truth)
    wide = random_problem(8, 2, 6, 40, Lead(0.4))
    logits = torch.full((2, 6, 64), NAN)
    logits[:, :, :40] = wide.logits
    strided = Problem(logits[:, :, :40], *(wide.tokens, wide.rules, wide.mask_id))
    assert_as_specified(run(implementation, strided), strided)


logits_of_rows = st.lists(
    st.lists(st.floats(-60.0, 60.0, width=32), min_size=6, max_size=6), min_size=2, max_size=6
).map(lambda rows: torch.tensor(rows, dtype=torch.float32))


def margins(logits: Tensor, mask_id: int) -> list[float]:
    """p1 - p2 in float64, plainly."""
    p = logits.double().softmax(-1)
    p[:, mask_id] = 0.0
    best = p.topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


@settings(deadline=None, max_examples=200, derandomize=True)
@given(logits=logits_of_rows, mask_id=st.integers(0, 5))
def test_odds_rise_as_margins_fall(logits: Tensor, mask_id: int) -> None:
    m = margins(logits, mask_id)
    R = [reference.odds(row, mask_id) for row in logits]
    assert all(0.0 <= value <= 1.0 for value in m) and all(value >= 0.0 for value in R)
    for value, odds in zip(m, R, strict=True):
        assert math.isclose(1.0 / (1.0 + odds), value, rel_tol=1e-9, abs_tol=1e-15)
        if value < 1.0 - 1e-9 and odds < INF:
            assert math.isclose(odds / (1.0 + odds), 1.0 - value, rel_tol=1e-6)
    for a, b in zip(range(len(m)), range(1, len(m)), strict=False):
        if m[a] > m[b] * (1.0 + 1e-9) + 1e-15:
            assert R[a] < R[b]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(logits=logits_of_rows, mask_id=st.integers(0, 5), temperature=st.sampled_from([0.0, 3.0]))
def test_the_order_is_that_of_float64_margins(logits: Tensor, mask_id: int, temperature: float) -> None:
    at = torch.arange(len(logits))
    terms = Terms(pack(Lead(0.5)), Lead.key(), mask_id, temperature, torch.full((len(logits),), 3))
    _, residual, odds = cpu.summarize(logits.clone(), terms, at, at)
    plain = Terms(pack(fdpp.Frechet()), fdpp.Frechet.key(), mask_id, temperature, terms.seeds)
    torch.testing.assert_close(residual, cpu.summarize(logits.clone(), plain, at, at)[1], rtol=2e-5, atol=1e-30)
    truth = [reference.odds(row, mask_id) for row in logits]
    for a in range(len(truth)):
        for b in range(len(truth)):
            if truth[a] < truth[b] * (1.0 - 1e-5):
                assert odds[a] <= odds[b]
            if truth[a] < truth[b] * (1.0 - 1e-5) and 1e-30 < truth[b] < 1e30:
                assert odds[a] < odds[b]


@pytest.mark.parametrize("size", [1, 2])
def test_the_specification_of_one_token(size: int) -> None:
    logits = torch.zeros(size)
    assert reference.odds(logits, mask_id=size - 1 if size == 2 else 5) == (1.0 if size == 2 else 0.0)
