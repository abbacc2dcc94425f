"""Infilling: masks between given tokens, against a plain decode in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from decoding import CACHES, Recorder, forwards
from plain import model_with_ends, plain_infill
from small import EOS, MASK, PAD, RULES, exact_model, left_pad, prompts, small_model
from torch import Tensor
from transformers import StoppingCriteria

import fdpp
from fdpp import Frechet, LLaDAModelLM, Quota, Threshold, Wino, tiny

PREFIX_RULES = RULES[:7]


@pytest.fixture(scope="module")
def exact() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return exact_model(seed=1)


def texts() -> list[Tensor]:
    """Masks in runs and alone, within a block and across blocks, at the end and at the start, and none."""
    found = []
    for seed, masks in enumerate(
        ([3, 4, 5, 12, 21], [3, 11, 12, 13], [20, 21, 22, 23], [0, 23], [], [3, *range(9, 24)])
    ):
        text = prompts(1, 24, seed=seed)[0]
        text[masks] = MASK
        found.append(text)
    return found


@pytest.mark.parametrize("options", [{}, {"drafts": 3}, {"engine": "static"}], ids=str)
@pytest.mark.parametrize("rule", PREFIX_RULES, ids=str)
def test_against_a_plain_decode(exact: LLaDAModelLM, rule: fdpp.Rule, options: dict[str, Any]) -> None:
    ids = torch.stack(texts())
    settings = {"rule": rule, "cache": "none", "stop_at_eos": False, "block_length": 7}
    out = exact.infill(ids, **settings, **options)
    plain = dataclasses.replace(rule, k=1) if rule == Quota() else rule
    for b, text in enumerate(ids):
        tokens, step_of, steps = plain_infill(exact, text, plain, 7)
        assert torch.equal(out.sequences[b], tokens)
        assert torch.equal(out.commit_step[b], step_of)
        assert out.nfe[b] == steps if "drafts" not in options else out.nfe[b] <= steps
    assert torch.equal(out.commit_step >= 0, ids == MASK)
    assert torch.equal(out.confidence < 1, ids == MASK)
    assert torch.equal(out.sequences[ids != MASK], ids[ids != MASK])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", [*RULES, Wino(0.3, 0.5)], ids=str)
def test_a_row_of_a_batch_is_the_row_alone_whatever_is_combined(
    exact: LLaDAModelLM, rule: fdpp.Rule, cache: str
) -> None:
    if rule.needs.rows and cache != "none":
        pytest.skip("the rule takes no cache")
    ids, mask = left_pad([*texts(), texts()[0][3:], texts()[3][:5]])
    settings = {"rule": rule, "cache": cache, "block_length": 7, "temperature": 0.6}
    alone = []
    for b, row in enumerate(ids):
        alone.append(exact.infill(row[mask[b].bool()][None], seed=9 + b, **settings))
    ways: list[dict[str, Any]] = [{}]
    if not rule.needs.attention:
        ways.append({"engine": "static"})
    if not rule.needs.rows:
        ways.append({"drafts": 3, "branches": "tree" if cache == "dual" else "batch"})
    for options in ways:
        out = exact.infill(ids, mask, seed=9, **settings, **options)
        for b, one in enumerate(alone):
            P = one.sequences.shape[1]
            assert torch.equal(out.sequences[b, -P:], one.sequences[0])
            assert torch.equal(out.commit_step[b, -P:], one.commit_step[0])
            assert out.nfe[b] == one.nfe[0] if "drafts" not in options else out.nfe[b] <= one.nfe[0]


@pytest.mark.parametrize("options", [{}, {"cfg_scale": 0.7}, {"drafts": "auto"}, {"engine": "static"}], ids=str)
@pytest.mark.parametrize("stop_at_eos", [True, False])
def test_masks_at_the_end_are_a_response(stop_at_eos: bool, options: dict[str, Any]) -> None:
    """`generate` says the same, EOS and the padding behind it included."""
    model = model_with_ends()
    ids, mask = left_pad([prompts(1, P, seed=P)[0] for P in (3, 9, 6)])
    settings = {"block_length": 8, "rule": Threshold(0.4), "stop_at_eos": stop_at_eos, **options}
    expected = model.generate(ids, mask, max_new_tokens=30, **settings)
    longer = torch.cat((ids, torch.full((3, 30), MASK)), 1), torch.cat((mask, torch.ones(3, 30, dtype=mask.dtype)), 1)
    for out in (model.infill(*longer, **settings), model.generate(*longer, max_new_tokens=0, **settings)):
        assert torch.equal(out.sequences, expected.sequences)
        assert torch.equal(out.nfe, expected.nfe)
        assert torch.equal(out.tokens_per_forward, expected.tokens_per_forward)
        assert torch.equal(out.commit_step[:, -30:], expected.commit_step)
    assert stop_at_eos == bool((expected.commit_step < 0).any())


@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("drafts", [1, 4])
def test_an_eos_ends_nothing_before_a_given_token(engine: str, drafts: int) -> None:
    model = model_with_ends()
    ids = torch.full((4, 40), MASK)
    ids[:, :5], ids[:, 20] = prompts(4, 5), 7
    ids[3, 30] = EOS
    settings = {"block_length": 8, "rule": Threshold(0.4), "engine": engine, "drafts": drafts}
    out = model.infill(ids, **settings)
    given = ids != MASK
    assert torch.equal(out.sequences[given], ids[given])
    assert bool((out.sequences[:, 5:20] == EOS).any()) and not bool((out.sequences == MASK).any())
    assert bool((out.commit_step[:, 5:20] >= 0).all())
    ended = out.sequences[:3] == PAD
    assert ended.any()
    for row, padded in zip(out.sequences[:3], ended, strict=True):
        if padded.any():
            assert row[int(padded.long().argmax()) - 1] == EOS and int(padded.long().argmax()) > 21


def test_blocks_without_masks_cost_nothing() -> None:
    model, ids = small_model(), prompts(2, 200)
    ids[0, [4, 190]] = MASK
    ids[1, 4] = MASK
    with forwards(model) as seen:
        out = model.infill(ids, block_length=8, cache="dual")
    assert seen == [(2, 200), (1, 200)] and out.nfe.tolist() == [2, 1]
    assert out.query_tokens.tolist() == [400, 200]
    with forwards(model) as seen:
        out = model.infill(prompts(2, 20))
    assert not seen and out.nfe.tolist() == [0, 0] and torch.equal(out.sequences, prompts(2, 20))


def test_padding_that_holds_the_masks_id_is_no_mask(exact: LLaDAModelLM) -> None:
    text = texts()[0]
    ids, mask = torch.cat((torch.full((3,), MASK), text))[None], torch.tensor([[0] * 3 + [1] * 24])
    out = exact.infill(ids, mask, block_length=7)
    assert torch.equal(out.sequences[0, 3:], exact.infill(text[None], block_length=7).sequences[0])
    assert out.sequences[0, :3].tolist() == [MASK] * 3


def test_a_streamer_gets_what_is_before_the_first_mask_and_then_the_blocks(exact: LLaDAModelLM) -> None:
    ids, recorder = torch.stack(texts()[:2]), Recorder()
    out = exact.infill(ids, block_length=7, streamer=recorder)
    name, before = recorder.events[0]
    assert name == "put" and torch.equal(before, ids[:, :3])
    assert torch.equal(torch.cat([block[-1] for block in recorder.blocks()], 1), out.sequences[:, 3:])
    with pytest.raises(
        ValueError, match=r"in one column of all sequences, got columns 0 of .*, 3 of sequences \[0, 1, 5\]"
    ):
        exact.infill(torch.stack(texts()), streamer=recorder)


class After(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: None, **_: Any) -> Tensor:
        return torch.ones(input_ids.shape[0], dtype=torch.bool)


def test_a_stopping_criterion_leaves_given_tokens(exact: LLaDAModelLM) -> None:
    ids = texts()[0][None]
    out = exact.infill(ids, block_length=7, stopping_criteria=[After()])
    assert out.sequences[0, [12, 21]].tolist() == [PAD, PAD] and not bool((out.sequences[0, 3:6] == PAD).any())
    given = ids != MASK
    assert torch.equal(out.sequences[given], ids[given])


def test_what_an_infill_refuses(exact: LLaDAModelLM) -> None:
    ids = texts()[0][None]
    with pytest.raises(ValueError, match="infill: expected no max_new_tokens, the text has its length"):
        exact.infill(ids, max_new_tokens=8)
    with pytest.raises(ValueError, match="exceed the model's window of 256"):
        exact.infill(torch.full((1, 257), MASK))
    with pytest.raises(ValueError, match="max_new_tokens=0 fills the masks of a prompt, got one without"):
        exact.generate(prompts(1, 4), max_new_tokens=0)


def test_several_fillings_of_a_text(exact: LLaDAModelLM) -> None:
    ids, settings = torch.stack(texts()[:2]), {"block_length": 7, "temperature": 2.0, "seed": 4}
    out = exact.infill(ids, num_return_sequences=3, **settings)
    assert torch.equal(out.sequences, exact.infill(ids.repeat_interleave(3, 0), **settings).sequences)
    assert len(out.sequences[:3].unique(dim=0)) == 3
    again = exact.generate(ids, max_new_tokens=0, num_return_sequences=3, **settings)
    assert torch.equal(again.sequences, out.sequences)


def test_the_sequences_alone(exact: LLaDAModelLM) -> None:
    ids = torch.stack(texts())
    out = exact.infill(ids, rule=Frechet(0.1), return_dict_in_generate=False)
    assert isinstance(out, Tensor) and torch.equal(out, exact.infill(ids, rule=Frechet(0.1)).sequences)


def test_a_stop_string_ends_a_text_behind_its_last_given_token() -> None:
    """As in `generate` where masks are all that follows; one among given tokens or before them ends nothing."""
    model, tokenizer = tiny.load()
    question = tiny.generate("held-out", 1)[0].prompt
    ids = tokenizer(question, return_tensors="pt")["input_ids"]
    settings = {"block_length": 16, "stop_strings": ["wins 7 ,"], "tokenizer": tokenizer}
    expected = model.generate(ids, max_new_tokens=96, **settings)
    longer = torch.cat((ids, torch.full((1, 96), model.config.mask_token_id)), dim=1)
    out = model.infill(longer, **settings)
    assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.nfe, expected.nfe)
    text = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    assert text.endswith("In February he") and out.nfe < model.infill(longer, block_length=16).nfe
    given = longer.clone()
    given[0, -6] = tokenizer("apples")["input_ids"][0]
    out = model.infill(given, **settings)
    assert "wins 7 ," in tokenizer.decode(out.sequences[0, ids.shape[1] :])
    assert not bool((out.sequences[:, :-5] == model.config.mask_token_id).any())
    assert out.sequences[0, -6] == given[0, -6]
