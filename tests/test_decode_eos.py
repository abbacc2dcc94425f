"""EOS ends a sequence once everything before it is committed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import CACHES, EOS_SCRIPT, Recorder, Scripted, no_prompt
from small import EOS, MASK, PAD, prompts

from fdpp import Quota


@pytest.mark.parametrize("cache", CACHES)
def test_eos_counts_once_everything_before_it_is_committed(cache: str) -> None:
    model, recorder = Scripted(*EOS_SCRIPT), Recorder()
    settings = {"max_new_tokens": 8, "block_length": 8, "rule": Quota(1), "cache": cache}
    out = model.generate(no_prompt(), streamer=recorder, **settings)
    assert out.sequences.tolist() == [[5, 6, 7, EOS, PAD, PAD, PAD, PAD]]
    assert out.nfe.tolist() == [5] and len(model.fed) == 5
    assert out.tokens_per_forward.tolist() == [3 / 5]
    assert recorder.blocks()[0][3].tolist() == [[5, MASK, 7, EOS, 8, MASK, MASK, MASK]]


def test_without_eos_stop_everything_is_decoded() -> None:
    model = Scripted(*EOS_SCRIPT)
    out = model.generate(no_prompt(), max_new_tokens=8, block_length=8, rule=Quota(1), stop_at_eos=False)
    assert out.sequences.tolist() == [EOS_SCRIPT[0]]
    assert out.nfe.tolist() == [8]
    assert out.tokens_per_forward.tolist() == [3 / 8]


def test_blocks_after_eos_are_not_computed() -> None:
    tokens = [*EOS_SCRIPT[0], *range(20, 36)]
    model, recorder = Scripted(tokens, EOS_SCRIPT[1] + [0.5] * 16), Recorder()
    out = model.generate(no_prompt(), max_new_tokens=24, block_length=8, rule=Quota(1), streamer=recorder)
    assert out.sequences.tolist() == [[5, 6, 7, EOS] + [PAD] * 20]
    assert out.nfe.tolist() == [5] and len(model.fed) == 5
    assert [len(block) for block in recorder.blocks()] == [5 + 1]


def test_eos_in_a_later_block() -> None:
    model = Scripted([*range(20, 28), *EOS_SCRIPT[0]], [0.5] * 8 + EOS_SCRIPT[1], prompt=3)
    out = model.generate(prompts(1, 3), max_new_tokens=16, block_length=8, rule=Quota(1))
    assert out.sequences[0, 3:].tolist() == [*range(20, 28), 5, 6, 7, EOS, PAD, PAD, PAD, PAD]
    assert out.nfe.tolist() == [8 + 5]
    assert out.tokens_per_forward.tolist() == [11 / 13]


def test_an_earlier_eos_may_come_later() -> None:
    model = Scripted([5, EOS, 6, EOS, 7, 8], [0.6, 0.5, 0.7, 0.9, 0.8, 0.2])
    out = model.generate(no_prompt(), max_new_tokens=6, block_length=6, rule=Quota(1))
    assert out.sequences.tolist() == [[5, EOS, PAD, PAD, PAD, PAD]]
    assert out.nfe.tolist() == [5]


def test_eos_as_the_first_token() -> None:
    out = Scripted([EOS, 5, 6, 7], [0.9, 0.5, 0.5, 0.5]).generate(no_prompt(), max_new_tokens=4, rule=Quota(1))
    assert out.sequences.tolist() == [[EOS, PAD, PAD, PAD]]
    assert out.nfe.tolist() == [1]
    assert out.tokens_per_forward.tolist() == [0.0]


def test_eos_as_the_last_token() -> None:
    out = Scripted([5, 6, 7, EOS], [0.9, 0.8, 0.7, 0.6]).generate(no_prompt(), max_new_tokens=4, rule=Quota(1))
    assert out.sequences.tolist() == [[5, 6, 7, EOS]]
    assert out.nfe.tolist() == [4]
    assert out.tokens_per_forward.tolist() == [3 / 4]


@pytest.mark.parametrize("eos", [[10, 7], (10, 7), [7]])
def test_several_eos_ids(eos: Any) -> None:
    out = Scripted(*EOS_SCRIPT).generate(no_prompt(), max_new_tokens=8, rule=Quota(1), eos_token_id=eos)
    assert out.sequences.tolist() == [[5, 6, 7, PAD, PAD, PAD, PAD, PAD]]
    assert out.tokens_per_forward.tolist() == [2 / 5]


def test_eos_in_the_prompt_ends_nothing() -> None:
    model = Scripted([5, 6, 7, 8], [0.9, 0.8, 0.7, 0.6], prompt=3)
    out = model.generate(torch.tensor([[EOS, EOS, 4]]), max_new_tokens=4, rule=Quota(1))
    assert out.sequences.tolist() == [[EOS, EOS, 4, 5, 6, 7, 8]]
    assert out.tokens_per_forward.tolist() == [1.0]


def test_a_model_without_eos() -> None:
    model = Scripted(*EOS_SCRIPT)
    model.config.eos_token_id = None
    out = model.generate(no_prompt(), max_new_tokens=8, rule=Quota(1))
    assert out.sequences.tolist() == [EOS_SCRIPT[0]]
    assert out.tokens_per_forward.tolist() == [1.0]
    model.config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id"):
        model.generate(no_prompt(), max_new_tokens=8)


def test_padding_falls_back_to_eos() -> None:
    model = Scripted(*EOS_SCRIPT)
    model.config.pad_token_id = None
    out = model.generate(no_prompt(), max_new_tokens=8, rule=Quota(1), eos_token_id=[EOS, 40])
    assert out.sequences.tolist() == [[5, 6, 7, EOS, EOS, EOS, EOS, EOS]]
