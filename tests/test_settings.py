"""Settings of a decode: defaults, what is refused, and what comes back."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from decoding import RULES, check
from small import EOS, MASK, V, prompts, small_model
from torch import Tensor

import fdpp
from fdpp import DiffusionGenerationConfig, Frechet, LLaDAModelLM, Quota


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return small_model()


def test_sequences_alone(llada: LLaDAModelLM) -> None:
    prompt = prompts(2, 4)
    sequences = llada.generate(prompt, max_new_tokens=8, return_dict_in_generate=False)
    assert isinstance(sequences, Tensor)
    assert torch.equal(sequences, llada.generate(prompt, max_new_tokens=8).sequences)


def test_output_reads_like_transformers_outputs(llada: LLaDAModelLM) -> None:
    out = llada.generate(prompts(2, 4), max_new_tokens=8)
    assert out["sequences"] is out.sequences is out[0]
    assert out.nfe.shape == out.tokens_per_forward.shape == (2,)


def test_defaults() -> None:
    config = DiffusionGenerationConfig()
    assert (config.max_new_tokens, config.per_block, config.rule, config.steps) == (256, 32, Frechet(0.25), None)
    assert (config.cache, config.stop_at_eos, config.temperature, config.seed) == ("dual", True, 0.0, None)


def test_settings_by_name_win(llada: LLaDAModelLM) -> None:
    config = DiffusionGenerationConfig(max_new_tokens=8, rule=Quota(1), stop_at_eos=False, return_dict_in_generate=True)
    assert llada.generate(prompts(1, 4), generation_config=config).nfe.item() == 8
    out = llada.generate(prompts(1, 4), generation_config=config, max_new_tokens=6, rule=Quota(2))
    assert (out.nfe.item(), out.sequences.shape[1]) == (3, 10)
    assert (config.max_new_tokens, config.rule) == (8, Quota(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", -3),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", None),
        ("max_new_tokens", True),
        ("block_length", 0),
        ("block_length", 1025),
        ("block_length", "32"),
        ("rule", "fréchet"),
        ("rule", Quota),
        ("rule", None),
        ("steps", 0),
        ("steps", 1.0),
        ("cache", "both"),
        ("cache", None),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "warm"),
    ],
)
def test_settings_are_validated(llada: LLaDAModelLM, field: str, value: Any) -> None:
    rule = {} if field == "rule" else {"rule": Quota()}
    with pytest.raises(ValueError, match=f"{field}.*{re.escape(str(value))}"):
        DiffusionGenerationConfig(**{field: value, **rule})
    with pytest.raises(ValueError, match=field):
        llada.generate(prompts(1, 4), **{field: value, **rule})


@pytest.mark.parametrize("rule", RULES[1:], ids=str)
def test_steps_are_for_quota_without_k(rule: fdpp.Rule) -> None:
    with pytest.raises(ValueError, match="steps=4"):
        DiffusionGenerationConfig(rule=rule, steps=4)


@pytest.mark.parametrize("seed", [1.5, "one", 2**63])
def test_a_seed_is_an_int(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"seed.*{seed}"):
        DiffusionGenerationConfig(temperature=0.5, seed=seed)


def test_a_model_without_mask_id() -> None:
    model = small_model(mask_token_id=None)
    with pytest.raises(ValueError, match="mask_token_id"):
        model.generate(prompts(1, 4), max_new_tokens=4)
    check(model.generate(prompts(1, 4), max_new_tokens=4, mask_token_id=MASK), prompts(1, 4), 4, 4)


@pytest.mark.parametrize("name", ["pad_token_id", "eos_token_id"])
def test_no_other_id_may_be_the_masks(llada: LLaDAModelLM, name: str) -> None:
    with pytest.raises(ValueError, match=f"mask_token_id.*{MASK}"):
        llada.generate(prompts(1, 4), max_new_tokens=4, **{name: MASK})


@pytest.mark.parametrize("name", ["mask_token_id", "pad_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, V, 2.0])
def test_ids_outside_the_vocabulary(llada: LLaDAModelLM, name: str, value: Any) -> None:
    value = [EOS, value] if name == "eos_token_id" else value
    with pytest.raises(ValueError, match=f"{name}.*{V}"):
        llada.generate(prompts(1, 4), max_new_tokens=4, **{name: value})
