"""Streamers and stopping criteria."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from decoding import EOS_SCRIPT, Recorder, Scripted, forwards, no_prompt
from small import MASK, PAD, prompts, small_model
from torch import Tensor
from transformers import (
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextDiffusionStreamer,
    TextStreamer,
)

from fdpp import LLaDAModelLM, Quota


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return small_model()


def test_streamer_protocol(llada: LLaDAModelLM) -> None:
    recorder, prompt = Recorder(), prompts(2, 5)
    settings = {"max_new_tokens": 20, "block_length": 8, "rule": Quota(4), "stop_at_eos": False}
    out = llada.generate(prompt, streamer=recorder, **settings)
    steps = {8: 2, 4: 1}
    expected = [("put", (2, 5))]
    for T in (8, 8, 4):
        expected += [("draft", (2, T))] * steps[T] + [("put", (2, T))]
    assert [(name, tuple(value.shape)) for name, value in recorder.events[:-1]] == expected
    assert recorder.events[-1] == ("end", None)
    puts = [value for name, value in recorder.events if name == "put"]
    assert torch.equal(torch.cat(puts, 1), out.sequences)
    first_draft = recorder.events[1][1]
    assert (first_draft == MASK).sum(1).tolist() == [4, 4]


class Words:
    """As much of a tokenizer as a streamer needs."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"<{int(i)}> " for i in ids)


def test_transformers_diffusion_streamer(capsys: pytest.CaptureFixture[str]) -> None:
    model = Scripted([5, 6, 7, 8], [0.9, 0.8, 0.7, 0.6], prompt=2)
    settings = {"max_new_tokens": 4, "block_length": 2, "rule": Quota(1)}
    model.generate(torch.tensor([[3, 4]]), streamer=TextDiffusionStreamer(Words()), **settings)
    shown = capsys.readouterr().out
    drafts = re.findall(r"\033\[33m(.*?)\033\[0m", shown)
    assert drafts == [f"<5> <{MASK}> ", "<5> <6> ", f"<7> <{MASK}> ", "<7> <8> "]
    confirmed = re.sub(r"\0337\033\[33m.*?\033\[0m\0338\033\[J", "", shown)
    assert confirmed.split() == ["<3>", "<4>", "<5>", "<6>", "<7>", "<8>"]


def test_a_streamer_without_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    model = Scripted([5, 6, 7, 8], [0.9, 0.8, 0.7, 0.6], prompt=1)
    model.generate(torch.tensor([[3]]), streamer=TextStreamer(Words(), skip_prompt=True), max_new_tokens=4)
    assert capsys.readouterr().out.split() == ["<5>", "<6>", "<7>", "<8>"]


class StopWhen(StoppingCriteria):
    """Stops sequences that hold `token`; keeps the ids it was called with."""

    def __init__(self, token: int) -> None:
        self.token, self.calls = token, []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.calls.append(input_ids.clone())
        return (input_ids == self.token).any(1)


def test_stopping_criteria_end_sequences_after_a_block(llada: LLaDAModelLM) -> None:
    settings = {"max_new_tokens": 20, "block_length": 4, "stop_at_eos": False}
    prompt = prompts(3, 5)
    free = llada.generate(prompt, **settings)
    token = int(free.sequences[1, 5 + 4])
    criterion = StopWhen(token)
    with forwards(llada) as seen:
        out = llada.generate(prompt, stopping_criteria=StoppingCriteriaList([criterion]), **settings)
    assert sum(size for size, _ in seen) == out.nfe.sum()
    for b in range(3):
        hit = (free.sequences[b] == token).nonzero().flatten().tolist()
        response = out.sequences[b, 5:].tolist()
        if not hit or hit[0] >= 21:
            assert response == free.sequences[b, 5:].tolist()
            continue
        stop = max(4, -(-(hit[0] - 5 + 1) // 4) * 4)
        assert response == free.sequences[b, 5 : 5 + stop].tolist() + [PAD] * (20 - stop)
        assert out.nfe[b] < free.nfe[b]
    for block, ids in enumerate(criterion.calls):
        assert ids.shape[1] == 5 + 4 * (block + 1)
        assert not (ids[:, 5:] == MASK).any()
    assert criterion.calls[0].shape[0] == 3


def test_a_row_of_the_stopping_criteria_is_the_same_sequence_after_others_have_ended(llada: LLaDAModelLM) -> None:
    settings = {"max_new_tokens": 20, "block_length": 4, "stop_at_eos": False}
    free = llada.generate(prompts(3, 5), **settings).sequences
    stop = [lambda ids, scores, **_: torch.tensor([True, False, False])]
    out = llada.generate(prompts(3, 5), stopping_criteria=stop, **settings).sequences
    assert out[0].tolist() == free[0, :9].tolist() + [PAD] * 16
    assert torch.equal(out[1:], free[1:])


def test_padding_after_a_stop_is_not_a_token() -> None:
    model = Scripted([*range(20, 36)], [0.9] * 16)
    settings = {"max_new_tokens": 16, "block_length": 4, "rule": Quota(1)}
    out = model.generate(no_prompt(), stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(8)]), **settings)
    assert out.sequences.tolist() == [[*range(20, 28)] + [PAD] * 8]
    assert out.nfe.tolist() == [8]
    assert out.tokens_per_forward.tolist() == [1.0]


def test_stopping_criteria_and_eos() -> None:
    """The criteria are not asked about sequences that have ended."""
    model, criterion = Scripted([*range(20, 28), *EOS_SCRIPT[0]], [0.5] * 8 + EOS_SCRIPT[1]), StopWhen(-1)
    settings = {"max_new_tokens": 16, "block_length": 8, "rule": Quota(1)}
    model.generate(no_prompt(), stopping_criteria=StoppingCriteriaList([criterion]), **settings)
    assert [tuple(ids.shape) for ids in criterion.calls] == [(1, 8)]


def test_a_plain_list_of_stopping_criteria() -> None:
    model = Scripted([*range(20, 36)], [0.9] * 16)
    out = model.generate(no_prompt(), stopping_criteria=[MaxLengthCriteria(4)], max_new_tokens=16, block_length=4)
    assert out.sequences.tolist() == [[*range(20, 24)] + [PAD] * 12]
