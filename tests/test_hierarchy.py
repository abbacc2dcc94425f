"""`Hierarchy`: the best of every run of masks, against recorded decodes, by hand and at its boundaries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from further import assert_as_recorded, runs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fdpp
from fdpp.rules import Proposed
from fdpp.selection import Selection

MASK = 9
RUNS = runs("hierarchy")


@pytest.mark.parametrize("run", [pytest.param(run, id=run["run"]) for run in RUNS])
def test_the_published_decode(run: dict[str, Any]) -> None:
    low, high = run["params"]["low_threshold"], run["params"]["threshold"]
    assert run["stable"]
    assert_as_recorded("hierarchy", run, fdpp.Hierarchy(0.0 if low is None else low, 1.0 if high is None else high))


def test_the_recorded_decodes_have_every_kind_of_threshold() -> None:
    numbers = [(run["params"]["low_threshold"], run["params"]["threshold"]) for run in RUNS]
    assert len(RUNS) == 48
    assert any(low is None for low, high in numbers) and any(high is None for low, high in numbers)


def proposed(block: list[float | None]) -> Proposed:
    """A block of masks with these confidences, all proposing 5; None is a committed position."""
    confidence = torch.tensor([[c or 0.0 for c in block]], dtype=torch.float64)
    candidate = torch.tensor([[c is not None for c in block]])
    tokens = torch.where(candidate, MASK, 3)
    first = torch.zeros_like(candidate)
    if candidate.any():
        first[0, confidence.masked_fill(~candidate, -1.0).argmax()] = True
    proposal = torch.where(candidate, 5, tokens)
    after = torch.where(first, proposal, tokens)
    remaining = (candidate & ~first).sum(1, dtype=torch.int32)
    return Proposed(Selection(after, proposal, confidence, first, remaining, remaining * 0), tokens, candidate, MASK)


def commits(rule: fdpp.Hierarchy, block: list[float | None]) -> list[int]:
    out = rule.decide(proposed(block))
    committed = out.committed[0].nonzero().flatten().tolist()
    assert out.tokens[0].tolist() == [5 if t in committed else 3 if c is None else MASK for t, c in enumerate(block)]
    assert int(out.remaining) == sum(c is not None for c in block) - len(committed)
    return committed


@pytest.mark.parametrize(
    ("low", "high", "block", "expected"),
    [
        (0.5, 0.9, [None, None], []),
        (0.5, 0.9, [0.1], [0]),
        (0.5, 0.9, [0.6, 0.7, 0.8], [2]),
        (0.5, 0.9, [0.6, None, 0.8], [0, 2]),
        (0.5, 0.9, [0.4, None, 0.8, 0.7, None, 0.3], [2]),
        (0.5, 0.9, [0.95, 0.6, 0.92, None, 0.91], [0, 2, 4]),
        (0.5, 0.9, [0.3, 0.2, None, 0.3], [0]),
        (0.0, 0.9, [0.3, 0.2, None, 0.3], [0, 3]),
        (0.5, 0.9, [0.6, 0.6, None, 0.7, 0.7, 0.1], [0, 1, 3, 4]),
        (0.5, 0.9, [0.2, 0.2, None, 0.2], [0]),
        (0.5, 0.9, [0.5, None, 0.9, 0.95, 0.9], [3]),
        (0.0, 1.0, [1.0, 1.0, 0.9, None, 0.8, 1.0], [0, 1, 5]),
        (1.0, 1.0, [1.0, 1.0, None, 1.0], [0]),
        (0.0, 0.0, [0.3, 0.2, None, 0.1], [0, 1, 3]),
        (0.0, 0.9, [0.3, None, 0.0, 0.0, None, 0.2], [0, 5]),
        (0.0, 0.9, [0.0, None, 0.0], [0]),
    ],
    ids=lambda value: str(value).replace("None", "-"),
)
def test_by_hand(low: float, high: float, block: list[float | None], expected: list[int]) -> None:
    assert commits(fdpp.Hierarchy(low, high), block) == expected


GRID = [0.0, 0.25, 0.5, math.nextafter(0.5, 0), math.nextafter(0.5, 1), 0.75, 0.9, math.nextafter(0.9, 1), 1.0]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    st.lists(st.sampled_from([None, *GRID]), min_size=1, max_size=17),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    st.sampled_from([0.5, 0.75, 0.9, 1.0]),
)
def test_runs_by_their_definition(block: list[float | None], low: float, high: float) -> None:
    """A position commits if it is sure, the best between the two held positions beside it, or the first of the best."""
    rule, expected = fdpp.Hierarchy(low, high), []
    masked = [t for t, c in enumerate(block) if c is not None]
    c = {t: block[t] or 0.0 for t in masked}
    for t in masked:
        start = max((u for u in range(t) if block[u] is None), default=-1)
        stop = min((u for u in range(t, len(block)) if block[u] is None), default=len(block))
        best_of_run = c[t] == max(c[u] for u in range(start + 1, stop))
        first_of_all = t == min(masked, key=lambda u: (-c[u], u))
        if c[t] > high or (best_of_run and c[t] > low) or first_of_all:
            expected.append(t)
    assert commits(rule, block) == expected
    assert rule.reference(proposed(block)).committed[0].nonzero().flatten().tolist() == expected


def logits_of(block: list[float | None], V: int = 10) -> tuple[Tensor, Tensor]:
    """Float32 logits with these confidences of token 5, and the tokens; a NaN gives a row of NaN."""
    p = torch.tensor([[0.5 if c is None else c for c in block]], dtype=torch.float64)
    logits = ((1 - p) / (V - 1)).log()[..., None].repeat(1, 1, V)
    logits[..., 5] = p.log()
    return logits.float(), torch.tensor([[3 if c is None else MASK for c in block]])


def test_an_unusable_position_commits_only_where_no_other_is_left() -> None:
    logits, tokens = logits_of([0.6, None, math.nan, None, 0.7])
    for low in (0.0, 0.5):
        out = fdpp.select(logits, tokens, rule=fdpp.Hierarchy(low), mask_id=MASK)
        assert out.committed.tolist() == [[True, False, False, False, True]]


def test_inactive_masks_divide_runs() -> None:
    logits, tokens = logits_of([0.6, 0.7, 0.6])
    rule, active = fdpp.Hierarchy(), torch.tensor([[True, False, True]])
    assert fdpp.select(logits, tokens, rule=rule, mask_id=MASK).committed.tolist() == [[False, True, False]]
    out = fdpp.select(logits, tokens, rule=rule, mask_id=MASK, active=active)
    assert out.committed.tolist() == [[True, False, True]]


def test_a_mask_id_that_takes_all_probability_is_not_written() -> None:
    logits, tokens = logits_of([0.6, None, 0.7])
    logits[0, 2, MASK] = 300.0
    out = fdpp.select(logits, tokens, rule=fdpp.Hierarchy(0.0), mask_id=MASK)
    assert out.confidence[0, 2] == 0.0 and out.committed.tolist() == [[True, False, False]]


def test_it_compiles_without_a_graph_break() -> None:
    logits, tokens = 4 * torch.randn(2, 16, 50), torch.full((2, 16), 49)
    tokens[:, ::5] = 3
    step = fdpp.DenoisingStep(fdpp.Hierarchy(0.2, 0.6), mask_id=49)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(logits, tokens), step(logits, tokens), strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("numbers", [{"low": -0.1}, {"low": 1.1}, {"high": math.nan}, {"high": None}, {"low": True}])
def test_bad_numbers_are_named(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Hierarchy: expected {next(iter(numbers))} in"):
        fdpp.Hierarchy(**numbers)
