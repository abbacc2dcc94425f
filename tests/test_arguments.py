"""What users of transformers pass to `generate`: taken, or refused in a sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import EOS, MASK, PAD, V, left_pad, prompts, small_model
from transformers import BatchEncoding, GenerationConfig, set_seed

import fdpp
from fdpp import DiffusionGenerationConfig, Frechet, LLaDAModelLM, Quota, Threshold
from fdpp.decoding import arguments

SIZES: dict[str, Any] = {"max_new_tokens": 10, "block_length": 5, "stop_at_eos": False}


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return small_model()


@pytest.fixture(autouse=True)
def warnings_come_again() -> None:
    arguments.warn_once.cache_clear()


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.sequences, other.sequences) and torch.equal(one.nfe, other.nfe)


# Prompts


@pytest.mark.parametrize("form", [list, BatchEncoding, dict, "inputs", "lists of several"])
def test_prompts_in_other_forms(llada: LLaDAModelLM, form: Any) -> None:
    ids = prompts(1 if form is list else 2, 6)
    expected = llada.generate(ids, **SIZES)
    if form == "inputs":
        assert same(llada.generate(inputs=ids, **SIZES), expected)
    elif form is list:
        assert same(llada.generate(ids[0].tolist(), **SIZES), expected)
    elif form == "lists of several":
        assert same(llada.generate(ids.tolist(), torch.ones_like(ids).tolist(), **SIZES), expected)
    else:
        assert same(llada.generate(form({"input_ids": ids}), **SIZES), expected)


def test_a_batch_encoding_brings_its_attention_mask(llada: LLaDAModelLM) -> None:
    ids, mask = left_pad([prompts(1, 3)[0], prompts(1, 6, seed=1)[0]])
    expected = llada.generate(ids, mask, **SIZES)
    inputs = BatchEncoding({"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)})
    assert same(llada.generate(inputs, **SIZES), expected)
    assert same(llada.generate(**inputs, **SIZES), expected)


def test_no_prompt_is_an_empty_one(llada: LLaDAModelLM) -> None:
    assert llada.generate(**SIZES).sequences.shape == (1, 10)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("Why is the sky blue?", TypeError, r"expected the ids of a tokenizer, tokenizer\(text.*got text"),
        (["Why?", "Who?"], TypeError, "expected the ids of a tokenizer"),
        ({"ids": [1]}, TypeError, r"expected them in the mapping, got its keys \['ids'\]"),
        (3, TypeError, "expected a tensor .* or lists of ids, got int"),
        ([1.5, 2.0], TypeError, r"expected ints, got \[1.5, 2.0\]"),
        ([[1, 2], [3]], ValueError, r"rows of one length, padded on the left, got lengths \[2, 1\]"),
        (torch.zeros(4, dtype=torch.int64), ValueError, r"expected \[B, P\] int64.*got \[4\]"),
        (torch.zeros(1, 4), ValueError, "torch.float32"),
        ([1, V, 2], ValueError, f"ids from 0 to {V - 1}, the model's vocabulary, got {V}"),
        ([1, -100, 2], ValueError, "got -100"),
    ],
    ids=str,
)
def test_prompts_that_are_none(llada: LLaDAModelLM, given: Any, error: type[Exception], message: str) -> None:
    """Before any forward, which would fail in a kernel on a GPU."""
    fed: list[Any] = []
    handle = llada.model.register_forward_pre_hook(lambda *call: fed.append(call))
    try:
        with pytest.raises(error, match=message):
            llada.generate(given, **SIZES)
    finally:
        handle.remove()
    assert not fed


# Padding without an attention mask


def test_padding_is_inferred_from_its_id(llada: LLaDAModelLM) -> None:
    ids, mask = left_pad([prompts(1, 3)[0], prompts(1, 6, seed=1)[0], prompts(1, 0)[0]])
    assert same(llada.generate(ids, **SIZES), llada.generate(ids, mask, **SIZES))
    assert not same(llada.generate(ids, **SIZES), llada.generate(ids, torch.ones_like(mask), **SIZES))


def test_a_padding_id_that_also_ends_texts_warns_once(llada: LLaDAModelLM, caplog: pytest.LogCaptureFixture) -> None:
    ids, mask = left_pad([prompts(1, 3)[0], prompts(1, 6, seed=1)[0]])
    ids = torch.where(mask.bool(), ids, EOS)
    settings = {**SIZES, "pad_token_id": EOS}
    out = llada.generate(ids, **settings)
    assert same(out, llada.generate(ids, torch.ones_like(mask), **settings))
    llada.generate(ids, **settings)
    [record] = caplog.records
    assert f"no attention_mask, and rows of input_ids start or end with {EOS}" in record.getMessage()


def test_padding_on_the_right_is_refused(llada: LLaDAModelLM) -> None:
    with pytest.raises(ValueError, match=f"padding on the left alone, got rows that end with the padding id {PAD}"):
        llada.generate(torch.tensor([[1, 2, 3], [1, 2, PAD]]), **SIZES)


# Sampling


def test_without_a_seed_pytorchs_generator_decides(llada: LLaDAModelLM) -> None:
    settings = {**SIZES, "temperature": 1.0}
    ids, outs = prompts(2, 4), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(llada.generate(ids, **settings))
    first, again, other = outs
    assert same(first, again) and not same(first, other)
    assert not same(other, llada.generate(ids, **settings))
    set_seed(3)
    assert same(llada.generate(ids, **settings), first)
    torch.manual_seed(3)
    assert same(llada.generate(ids, seed=8, **settings), llada.generate(ids, seed=8, **settings))


def test_a_greedy_decode_and_a_warm_up_draw_nothing(llada: LLaDAModelLM) -> None:
    before = torch.get_rng_state()
    llada.generate(prompts(1, 4), **SIZES)
    llada.generate(prompts(1, 4), temperature=0.5, seed=3, **SIZES)
    llada.warmup(4, temperature=0.5, **SIZES)
    assert torch.equal(torch.get_rng_state(), before)


def test_random_remasking_draws_its_seed_too(llada: LLaDAModelLM) -> None:
    settings = {**SIZES, "rule": Quota(2), "remasking": "random"}
    torch.manual_seed(3)
    first = llada.generate(prompts(1, 4), **settings)
    assert not torch.equal(llada.generate(prompts(1, 4), **settings).commit_step, first.commit_step)


@pytest.mark.parametrize(
    ("given", "own", "temperature"),
    [
        ({"do_sample": True}, 0.0, 1.0),
        ({"do_sample": True}, 0.4, 0.4),
        ({"do_sample": True, "temperature": 0.7}, 0.0, 0.7),
        ({"do_sample": False}, 0.4, 0.0),
        ({"do_sample": False, "temperature": 0.0}, 0.4, 0.0),
        ({"do_sample": None, "temperature": 0.7}, 0.0, 0.7),
    ],
    ids=str,
)
def test_do_sample_means_a_temperature(
    llada: LLaDAModelLM, given: dict[str, Any], own: float, temperature: float
) -> None:
    assert llada.settled(DiffusionGenerationConfig(temperature=own), given).temperature == temperature


@pytest.mark.parametrize(
    "given",
    [{"do_sample": False, "temperature": 0.7}, {"do_sample": True, "temperature": 0}, {"do_sample": "yes"}],
    ids=str,
)
def test_contradictions_are_refused(llada: LLaDAModelLM, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="do_sample"):
        llada.generate(prompts(1, 4), **SIZES, **given)


def test_several_responses_to_a_prompt(llada: LLaDAModelLM) -> None:
    ids, mask = left_pad([prompts(1, 3)[0], prompts(1, 6, seed=1)[0]])
    out = llada.generate(ids, mask, num_return_sequences=3, temperature=1.0, seed=5, **SIZES)
    twice = llada.generate(ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), temperature=1.0, seed=5, **SIZES)
    assert same(out, twice) and len(out.sequences[:3].unique(dim=0)) == 3
    with pytest.raises(ValueError, match="num_return_sequences=3 would be the same 3 times: expected a temperature"):
        llada.generate(ids, mask, num_return_sequences=3, **SIZES)
    with pytest.raises(ValueError, match="num_return_sequences: expected an int of at least 1, got 0"):
        llada.generate(ids, mask, num_return_sequences=0, **SIZES)


# Settings by transformers' names, and by those of other projects


def test_what_changes_nothing_is_taken(llada: LLaDAModelLM) -> None:
    nothing = {**arguments.NEUTRAL, "do_sample": False, "num_return_sequences": 1, "top_h": None, "bos_token_id": 3}
    assert same(llada.generate(prompts(1, 4), **SIZES, **nothing), llada.generate(prompts(1, 4), **SIZES))


def test_the_settings_of_a_generation_config_count_as_given_by_name(llada: LLaDAModelLM) -> None:
    theirs = GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5, num_beams=1)
    seen = llada.settled(theirs, {"max_new_tokens": 8})
    assert (seen.max_new_tokens, seen.temperature, seen.rule) == (8, 0.5, Frechet(0.25))
    with pytest.raises(TypeError, match="num_beams=4"):
        llada.generate(prompts(1, 4), generation_config=GenerationConfig(num_beams=4))


def test_max_length_counts_the_prompt(llada: LLaDAModelLM) -> None:
    assert llada.generate(prompts(2, 4), max_length=11).sequences.shape == (2, 11)
    assert llada.generate(prompts(2, 4), max_length=11, max_new_tokens=3).sequences.shape == (2, 7)
    with pytest.raises(ValueError, match="max_length: expected an int above the prompt's 4 columns, got 4"):
        llada.generate(prompts(2, 4), max_length=4)


@pytest.mark.parametrize("rule", ["Quota", "quota", {"name": "quota"}, {"name": "Quota", "k": 1}], ids=str)
def test_a_rule_by_its_name(llada: LLaDAModelLM, rule: Any) -> None:
    assert same(
        llada.generate(prompts(1, 4), rule=rule, **SIZES), llada.generate(prompts(1, 4), rule=Quota(1), **SIZES)
    )
    assert DiffusionGenerationConfig(rule={"name": "frechet", "margin": 0.1}).rule == Frechet(0.1)
    with pytest.raises(ValueError, match=r"rule: expected a Rule, a name or .*frechet.*; got 'swift'"):
        DiffusionGenerationConfig(rule="swift")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gen_length": 64}, r"gen_length=64 has another name here, max_new_tokens=64"),
        ({"threshold": 0.9}, r"threshold=0.9 has another name here, rule=Threshold\(0.9\)"),
        ({"frechet_margin": 0.2}, r"rule=Frechet\(0.2\)"),
        ({"factor": 1.0}, r"rule=Factor\(1.0\)"),
        ({"k": 2}, r"k=2 is a rule's, .* or rule=Quota\(k=2\)"),
        ({"margin": 0.2}, r"margin=0.2 is a rule's, rule=Frechet\(margin=0.2\)"),
        ({"radius": 3}, r"rule=LocalLeap\(radius=3\)"),
        ({"use_cache": False}, 'use_cache=False has another name here, cache="none"'),
        ({"dual_cache": True}, 'cache="dual"'),
        ({"mask_id": 3}, "mask_token_id=3"),
        ({"small_block_size": 8}, "small_block_size=8 has another name here, sub_block_length=8"),
        ({"editing_threshold": 0.5}, r"rule=Editing\(edit=0.5\)"),
        ({"threshold_back": 0.8}, r"rule=Wino\(back=0.8\)"),
        ({"low_threshold": 0.4}, r"rule=Hierarchy\(low=0.4\)"),
        ({"credit_alpha": 0.6}, r"rule=Credit\(alpha=0.6\)"),
        ({"boost_gamma": 0.3}, r"rule=Credit\(gamma=0.3\)"),
        ({"decay_beta": 0.7}, r"rule=Credit\(beta=0.7\)"),
        ({"answer_start_pos": 90}, r"rule=Prophet\(answer=...\), which is counted from the response's first position"),
        ({"early_exit_thresholds": {"early": 7.5}}, r"rule=Prophet\(early=..., mid=..., late=...\)"),
        ({"n": 2}, r"n=2 is a rule's, rule=Saber\(n=2\)"),
        ({"guidance_scale": 2.0}, "cfg_scale, which is guidance_scale - 1"),
        ({"num_beams": 4}, "num_beams=4 is of autoregressive generation.*expected 1, which changes nothing"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is of autoregressive generation and has no meaning"),
        ({"assistant_model": [0] * 999}, r"unknown setting assistant_model=\[0, 0, 0, 0, 0, 0, ...\]; known are"),
        ({"blocks": 4}, "unknown setting blocks=4; known are max_new_tokens, block_length"),
    ],
    ids=str,
)
def test_what_is_not_taken_says_what_is(llada: LLaDAModelLM, given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        llada.generate(prompts(1, 4), **SIZES, **given)


def test_every_published_name_leads_to_one_that_works() -> None:
    """The names that `ELSEWHERE` says are settings of a decode."""
    for text in arguments.ELSEWHERE.values():
        name = text.split("=")[0].split(",")[0]
        assert name in (*arguments.SETTINGS, "input_ids", "streamer")
    assert DiffusionGenerationConfig(rule=Threshold(0.9), remasking="low_confidence") == DiffusionGenerationConfig(
        rule=fdpp.Threshold(0.9)
    )


def test_masks_in_a_prompt_warn_once(llada: LLaDAModelLM, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        out = llada.generate([1, MASK, 2], **SIZES)
        assert out.sequences[0, :3].tolist() == [1, MASK, 2]
    [record] = caplog.records
    assert "the prompt holds masks, which stay as they are; `infill`" in record.getMessage()
