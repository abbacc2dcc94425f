"""The options of LLaDA's own `generate`: guidance, EOS that comes late or never, random remasking."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain import CACHES, EOT, LLADA_OPTIONS, SIZES, model_with_ends, plain_llada, ragged
from small import EOS, MASK, V, prompts, small_model

import fdpp
from fdpp import DiffusionGenerationConfig, Frechet, LLaDAConfig, LLaDAModelLM, Quota, tiny

RANDOM = {"remasking": "random", "seed": 5}


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Proposes EOS and EoT often. Shared: no test may change it."""
    return model_with_ends()


@pytest.mark.parametrize("steps", [24, 9])
@pytest.mark.parametrize("options", [{}, *LLADA_OPTIONS], ids=str)
def test_lladas_options_against_a_plain_decode(llada: LLaDAModelLM, options: dict[str, Any], steps: int) -> None:
    settings = {"rule": Quota(), "steps": steps, "cache": "none", "stop_at_eos": False, "max_new_tokens": 24}
    seen = set()
    for seed in range(4):
        prompt = prompts(1, 6, seed=seed)
        expected = plain_llada(llada, prompt[0], steps=steps, **options)
        out = llada.generate(prompt, block_length=8, **settings, **options)
        assert torch.equal(out.sequences[0], expected)
        assert out.nfe.item() == steps
        without_options = plain_llada(llada, prompt[0], steps=steps)
        seen.add(torch.equal(expected, without_options))
    assert seen == {True} if not options else False in seen


@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_the_options_act_where_they_should(llada: LLaDAModelLM, temperature: float) -> None:
    settings = {"rule": Quota(), "stop_at_eos": False, "temperature": temperature, "seed": 5, **SIZES}
    ids, mask = ragged()
    free = llada.generate(ids, mask, **settings)
    assert bool((free.sequences[:, -20:] == EOS).any())
    for eos in (EOS, [EOS, EOT]):
        never = llada.generate(ids, mask, logits_eos_inf=True, eos_token_id=eos, **settings)
        assert not bool(torch.isin(never.sequences[:, -20:], torch.tensor(eos)).any())
    late = llada.generate(ids, mask, confidence_eos_eot_inf=True, **settings)
    few, many = (int(torch.isin(out.sequences[:, -20:], torch.tensor([EOS, EOT])).sum()) for out in (late, free))
    assert few < many / 2


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", [*LLADA_OPTIONS, RANDOM], ids=str)
def test_a_row_of_a_batch_is_the_row_alone(llada: LLaDAModelLM, options: dict[str, Any], cache: str) -> None:
    """Rows leave the batch at different steps, so that their two passes move in the cache."""
    ids, mask = ragged()
    rule = Quota(2) if "remasking" in options else Frechet(0.1)
    settings = {"rule": rule, "cache": cache, **SIZES}
    out = llada.generate(ids, mask, **settings, **options)
    for b, length in enumerate(mask.sum(1).tolist()):
        own = options | ({"seed": 5 + b} if "seed" in options else {})
        alone = llada.generate(ids[b : b + 1, ids.shape[1] - length :], **settings, **own)
        assert torch.equal(out.sequences[b, -20:], alone.sequences[0, -20:])
        assert torch.equal(out.commit_step[b], alone.commit_step[0])
        assert out.nfe[b] == alone.nfe[0]


@pytest.mark.parametrize("branches", ["batch", "tree"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", [*LLADA_OPTIONS, RANDOM], ids=str)
def test_drafts_change_nothing_but_the_cost(
    llada: LLaDAModelLM, options: dict[str, Any], cache: str, branches: str
) -> None:
    ids, mask = ragged()
    settings = {"rule": Quota(1), "cache": cache, "stop_at_eos": False, **SIZES, **options}
    plain = llada.generate(ids, mask, **settings)
    out = llada.generate(ids, mask, drafts=3, branches=branches, **settings)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.commit_step, plain.commit_step)
    assert bool((out.nfe < plain.nfe).all())


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("options", [*LLADA_OPTIONS, RANDOM], ids=str)
def test_static_steps_take_the_same_decode(
    llada: LLaDAModelLM, options: dict[str, Any], cache: str, drafts: int
) -> None:
    """Those of other options, which the model holds as well, must not be reused."""
    ids, mask = ragged()
    for own in ({}, options):
        settings = {"rule": Quota(2), "cache": cache, "drafts": drafts, **SIZES, **own}
        eager, static = (llada.generate(ids, mask, engine=engine, **settings) for engine in ("eager", "static"))
        assert torch.equal(static.sequences, eager.sequences)
        assert torch.equal(static.nfe, eager.nfe)


def test_random_remasking_commits_what_the_model_proposes(llada: LLaDAModelLM) -> None:
    """The positions are drawn, the tokens are not; another seed draws others."""
    prompt, settings = prompts(1, 6), {"rule": Quota(), "steps": 9, "cache": "none", "stop_at_eos": False}
    settings |= {"max_new_tokens": 24, "block_length": 8, "remasking": "random"}
    out = llada.generate(prompt, seed=3, **settings)
    order = out.commit_step[0]
    assert torch.equal(plain_llada(llada, prompt[0], steps=9, commit_step=order), out.sequences[0])
    assert sorted(order.tolist()) == sorted([step for step in range(9) for _ in range(3 - (step % 3 == 2))])
    assert torch.equal(llada.generate(prompt, seed=3, **settings).commit_step, out.commit_step)
    assert not torch.equal(llada.generate(prompt, seed=4, **settings).commit_step, out.commit_step)
    by_confidence = llada.generate(prompt, **(settings | {"remasking": "low_confidence"}))
    assert not torch.equal(by_confidence.commit_step, out.commit_step)


# Settings that do not go together


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"remasking": "low"}, "remasking: expected one of low_confidence, random, got 'low'"),
        ({"remasking": "random", "seed": 1}, r"remasking='random'.*rule=Quota.*got Frechet\(margin=0.25"),
        ({"remasking": "random", "rule": Quota(), "seed": 1, "confidence_eos_eot_inf": True}, "confidence_eos_eot_inf"),
        (
            {"confidence_eos_eot_inf": True, "rule": fdpp.EntropyBound()},
            "confidence_eos_eot_inf: EntropyBound.*entropy",
        ),
        ({"confidence_eos_eot_inf": 1}, "confidence_eos_eot_inf: expected a bool, got 1"),
        ({"logits_eos_inf": None}, "logits_eos_inf: expected a bool, got None"),
        ({"cfg_scale": -0.5}, "cfg_scale.*-0.5"),
        ({"cfg_scale": float("nan")}, "cfg_scale.*nan"),
        ({"cfg_scale": "2"}, "cfg_scale.*'2'"),
        ({"cfg_scale": 1.0, "rule": fdpp.Dawn()}, r"cfg_scale=1.0.*Dawn\("),
    ],
    ids=str,
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionGenerationConfig(**settings)


def test_ids_that_the_eos_options_need() -> None:
    late = {"confidence_eos_eot_inf": True, **SIZES}
    with pytest.raises(ValueError, match=f"eot_token_id: expected an id below the vocabulary's {V}, got 126348"):
        small_model(eot_token_id=126348).generate(prompts(1, 3), **late)
    model = small_model(eot_token_id=126348)
    assert model.generate(prompts(1, 3), **SIZES).nfe.item() >= 1
    assert model.generate(prompts(1, 3), eot_token_id=EOT, **late).nfe.item() >= 1
    assert small_model(eot_token_id=None).generate(prompts(1, 3), **late).nfe.item() >= 1
    with pytest.raises(ValueError, match="eos_token_id: logits_eos_inf"):
        small_model(eos_token_id=None).generate(prompts(1, 3), logits_eos_inf=True, **SIZES)


def test_ids_of_lladas_that_a_smaller_vocabulary_lacks() -> None:
    ids = ("mask_token_id", "eos_token_id", "pad_token_id", "eot_token_id")
    assert [getattr(LLaDAConfig(), name) for name in ids] == [126336, 126081, 126081, 126348]
    small = LLaDAConfig(vocab_size=126082, eot_token_id=7)
    assert [getattr(small, name) for name in ids] == [None, 126081, 126081, 7]
    assert LLaDAConfig(**small.to_dict()).to_dict() == small.to_dict()
    model, tokenizer = tiny.load()
    prompt = tokenizer("Mia has 3 apples", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, confidence_eos_eot_inf=True, **SIZES).nfe.item() >= 1
    assert model.config.eot_token_id is None


def test_confidence_options_with_dawn() -> None:
    model = small_model(seed=3, eot_token_id=EOT)
    settings = {"rule": fdpp.Dawn(), "stop_at_eos": False, **SIZES}
    out = model.generate(prompts(2, 5), confidence_eos_eot_inf=True, logits_eos_inf=True, **settings)
    assert not bool(torch.isin(out.sequences[:, 5:], torch.tensor([EOS, MASK])).any())
