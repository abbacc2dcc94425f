"""The confidence and the log-probability that a decode reports of every token, at the step that committed it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from decoding import CACHES, Recorder
from plain import EOT, model_with_ends, ragged
from small import EOS, MASK, RULES, exact_model, prompts
from torch import Tensor

import fdpp
from fdpp import LLaDAModelLM, Quota, Threshold, Wino

PREFIX_RULES = RULES[:6]
SIZES: dict[str, Any] = {"max_new_tokens": 18, "block_length": 7}


@torch.no_grad()
def replayed(model: LLaDAModelLM, out: fdpp.DiffusionGenerationOutput, row: int, P: int) -> Tensor:
    """The probability of every token in float64, from a full forward of the state before the step that committed it."""
    expected = torch.ones(out.commit_step.shape[1], dtype=torch.float64)
    final = out.sequences[row].clone()
    step_of = torch.cat((torch.full((P,), -1), out.commit_step[row]))
    for step in range(int(step_of.max()) + 1):
        state = torch.where(step_of < step, final, MASK)
        p = model(state[None]).logits[0].double().softmax(-1)
        for t in (step_of == step).nonzero().flatten().tolist():
            expected[t - P] = p[t, final[t]]
    return expected


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "seed": 3}, {"drafts": 3}, {"engine": "static"}], ids=str)
@pytest.mark.parametrize("rule", PREFIX_RULES, ids=str)
def test_confidence_is_the_probability_at_the_commit(rule: fdpp.Rule, options: dict[str, Any]) -> None:
    model, ids = exact_model(), prompts(2, 5)
    out = model.generate(ids, rule=rule, cache="none", stop_at_eos=False, **SIZES, **options)
    assert out.confidence.dtype == out.log_prob.dtype == torch.float32
    for row in range(2):
        expected = replayed(model, out, row, 5)
        torch.testing.assert_close(out.confidence[row].double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out.log_prob[row].double(), expected.log(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_drafts_and_the_engine_report_the_same(rule: fdpp.Rule, cache: str) -> None:
    model, (ids, mask) = exact_model(seed=1), ragged()
    settings = {"rule": rule, "cache": cache, **SIZES}
    base = model.generate(ids, mask, **settings)
    engines = [{"drafts": 3}] if rule.needs.attention else [{"drafts": 3}, {"engine": "static"}]
    for options in engines:
        out = model.generate(ids, mask, **settings, **options)
        written = (base.commit_step >= 0) & (base.sequences[:, ids.shape[1] :] != model.config.pad_token_id)
        assert torch.equal(out.sequences, base.sequences)
        torch.testing.assert_close(out.confidence[written], base.confidence[written], rtol=1e-5, atol=1e-6)


def test_what_no_step_committed_is_certain() -> None:
    """So that sums over a response need no mask."""
    model = model_with_ends()
    out = model.generate(prompts(4, 5), max_new_tokens=32, block_length=8, rule=Threshold(0.4))
    never = out.commit_step < 0
    assert never.any() and not never.all()
    assert bool((out.confidence[never] == 1).all() and (out.log_prob[never] == 0).all())
    assert bool((out.confidence[~never] < 1).all() and (out.log_prob[~never] < 0).all())


def test_a_token_taken_back_counts_as_it_was_last_committed() -> None:
    """The expected probabilities are of full forwards of the states that a streamer saw."""
    model, ids, recorder = exact_model(), prompts(1, 5), Recorder()
    settings = {"rule": Wino(0.3, 0.5), "cache": "none", "stop_at_eos": False, "max_new_tokens": 16, "block_length": 16}
    out = model.generate(ids, streamer=recorder, **settings)
    states = [torch.full((1, 16), MASK), *recorder.blocks()[0][:-1]]
    expected, taken_back = torch.ones(16, dtype=torch.float64), 0
    for before, after in itertools.pairwise(states):
        with torch.no_grad():
            p = model(torch.cat((ids, before), dim=1)).logits[0, 5:].double().softmax(-1)
        for t in range(16):
            taken_back += before[0, t] != MASK and after[0, t] == MASK
            if before[0, t] == MASK and after[0, t] != MASK:
                expected[t] = p[t, after[0, t]]
    assert taken_back > 0
    torch.testing.assert_close(out.confidence[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_ranking_an_end_last_shows_in_its_confidence() -> None:
    model = model_with_ends()
    settings = {"rule": Quota(2), "confidence_eos_eot_inf": True, "stop_at_eos": False, **SIZES}
    out = model.generate(prompts(4, 5), **settings)
    last = torch.isin(out.sequences[:, 5:], torch.tensor([EOS, EOT]))
    assert last.any() and torch.equal(out.confidence == 0, last)
