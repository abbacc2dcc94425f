"""The experiment with a Fréchet bound over runs of masks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import runs
import torch
from torch import Tensor

import fdpp
from fdpp.rules import Proposed

MASK = 9


def proposed(confidence: Tensor, candidate: Tensor) -> Proposed:
    """States whose masks have these confidences, `[N, T]`, with the most confident mask committed."""
    tokens = torch.where(candidate, MASK, 1)
    best = confidence.masked_fill(~candidate, -1.0).argmax(1, keepdim=True)
    committed = candidate & (torch.arange(candidate.shape[1]) == best)
    none = torch.zeros(len(tokens), dtype=torch.int32)
    step = fdpp.Selection(tokens, torch.full_like(tokens, 2), confidence, committed, none, none)
    return Proposed(step, tokens, candidate, MASK)


@pytest.mark.parametrize("rule", [runs.FrechetRuns(*numbers) for numbers in ((), (0.5, 1.0), (-1.0, 8.0), (0.25, 2.0))])
def test_it_is_its_reference(rule: runs.FrechetRuns) -> None:
    """Sixteenths, so that many are equal and sums are exact; none, all and one of the positions masked."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.randint(0, 17, (300, 11), generator=generator) / 16.0
    confidence[::3] = 1.0 - confidence[::3] / 16.0
    candidate = torch.rand(300, 11, generator=generator) < 0.6
    candidate[0], candidate[1], candidate[2] = True, False, torch.arange(11) == 10
    of = proposed(confidence, candidate)
    found = rule.decide(of)
    assert found.committed.equal(rule.reference(of).committed)
    assert not (found.committed & ~candidate).any() and (found.committed.any(1) == candidate.any(1)).all()
    assert not (found.committed & (confidence == 0.0) & ~of.step.committed).any()
    assert found.remaining.equal((candidate & ~found.committed).sum(1, dtype=torch.int32))


def test_what_a_position_beside_a_surer_one_costs() -> None:
    confidence = torch.tensor([[0.75, 0.875, 0.875, 0.0, 0.875]])
    candidate = torch.tensor([[True, True, True, False, True]])
    of = proposed(confidence, candidate)
    # 1 - (1/8 + 1/8) - 1/8 = 5/8; with the third one at 4/8 in place of 1/8: 1 - 6/8 - 4/8.
    assert runs.FrechetRuns(0.5).decide(of).committed.tolist() == [[False, True, False, False, True]]
    assert runs.FrechetRuns(0.625).decide(of).committed.tolist() == [[False, True, False, False, False]]
    assert runs.FrechetRuns(0.25, beside=1.0).decide(of).committed.tolist() == [[False, True, True, False, True]]


@pytest.mark.parametrize("margin", [0.0, 0.25, 0.5])
def test_without_that_it_is_frechet(margin: float) -> None:
    logits = 4 * torch.randn(20, 12, 30, generator=torch.Generator().manual_seed(1))
    tokens = torch.where(torch.rand(20, 12, generator=torch.Generator().manual_seed(2)) < 0.7, 29, 3)
    one, other = runs.FrechetRuns(margin, beside=1.0), fdpp.Frechet(margin)
    steps = [fdpp.select(logits, tokens, rule=rule, mask_id=29).committed for rule in (one, other)]
    assert steps[0].equal(steps[1]) and (steps[0].sum(1) > 1).any()


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(setting: Any) -> dict[str, Any]:
        careful = setting.rule == fdpp.Threshold()
        row = {"rule": str(setting.rule), "right": "1101" if careful else "1110", "nfe": 9.0 if careful else 5.0}
        return row | {"nfe_error": 0.5, "query_tokens": 40.0}

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(sys, "argv", ["runs", "--scenes", "sums, dual", "--rules", "Budget"])
    runs.main()
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "## sums, dual" and "Budget" in lines[4] and "Budget" in lines[5] and "Threshold" in lines[6]
    assert lines[4].endswith("| 5.00 ± 0.50 | 40 | 1, 1 |") and lines[6].endswith("| 0, 0 |")
