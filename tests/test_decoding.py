"""The block loop and `generate`: what is decoded, what it costs, what is never touched, and how it ends."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import EOS, MASK, PAD, V, exact_model, left_pad, prompts, small_model
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextDiffusionStreamer,
    TextStreamer,
)

import fdpp
from fdpp import DiffusionGenerationConfig, EntropyBound, Factor, Frechet, LLaDAConfig, LLaDAModelLM, Quota, Threshold
from fdpp.decoding.generate import DiffusionGenerationMixin

CACHES = ("none", "prefix", "dual")
RULES = (Quota(), Quota(3), Threshold(0.5), Factor(1.2), Frechet(0.1), EntropyBound(1.0))
SIZES = ((1, 1), (1, 32), (2, 3), (7, 7), (13, 5), (17, 1), (24, 64), (31, 32), (33, 32))
"""Response and block lengths: single positions, primes, a block longer than the response, a last block of one."""


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return small_model()


@pytest.fixture(scope="module")
def exact() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return exact_model(seed=1)


@contextmanager
def forwards(model: LLaDAModelLM) -> Iterator[list[tuple[int, int]]]:
    """Batch size and length of every forward of the transformer."""
    seen: list[tuple[int, int]] = []
    inner = model.model.forward
    model.model.forward = lambda ids, **kwargs: seen.append(tuple(ids.shape)) or inner(ids, **kwargs)
    try:
        yield seen
    finally:
        del model.model.forward


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Tensor | None]] = []

    def put(self, value: Tensor) -> None:
        self.events.append(("put", value.clone()))

    def put_draft(self, value: Tensor) -> None:
        self.events.append(("draft", value.clone()))

    def end(self) -> None:
        self.events.append(("end", None))

    def blocks(self) -> list[list[Tensor]]:
        """The drafts of every block, its final tokens last."""
        blocks: list[list[Tensor]] = [[]]
        for name, value in self.events[1:-1]:
            blocks[-1].append(value)
            if name == "put":
                blocks.append([])
        return blocks[:-1]


class Scripted(DiffusionGenerationMixin):
    """A model that proposes `tokens[t]` with confidence `confidences[t]` at column t, whatever it is fed."""

    def __init__(self, tokens: list[int], confidences: list[float], prompt: int = 0) -> None:
        self.config = LLaDAConfig(
            vocab_size=V, d_model=V, n_heads=1, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=PAD
        )
        c = torch.tensor([0.5] * prompt + confidences)[:, None]
        self.logits = ((1 - c) / (V - 1)).log().repeat(1, V)
        self.logits[torch.arange(len(c)), torch.tensor([0] * prompt + tokens)] = c.log().squeeze(1)
        self.fed: list[Tensor] = []

    def parameters(self) -> list[Tensor]:
        return [self.logits]

    def model(self, input_ids: Tensor, *, start: int, wanted: slice | None, **_: Any) -> Tensor:
        self.fed.append(input_ids.clone())
        logits = self.logits[start : start + input_ids.shape[1]].expand(len(input_ids), -1, -1)
        return logits if wanted is None else logits[:, wanted]

    def project(self, hidden: Tensor) -> Tensor:
        return hidden


def no_prompt(B: int = 1) -> Tensor:
    return torch.empty(B, 0, dtype=torch.int64)


def check(out: fdpp.DiffusionGenerationOutput, prompt: Tensor, new: int, block: int) -> None:
    """What holds of every decode."""
    P = prompt.shape[1]
    assert out.sequences.shape == (len(prompt), P + new)
    assert out.sequences.dtype == out.nfe.dtype == torch.int64
    assert torch.equal(out.sequences[:, :P], prompt)
    response = out.sequences[:, P:]
    assert not (response == MASK).any()
    assert bool(((response >= 0) & (response < V)).all())
    for row, nfe, rate in zip(response, out.nfe.tolist(), out.tokens_per_forward.tolist(), strict=True):
        ends = (row == EOS).nonzero().flatten().tolist()
        written = ends[0] if ends else new
        assert 1 <= nfe <= new
        assert rate == written / nfe


# Every decode ends


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cache", CACHES)
def test_no_mask_is_left(llada: LLaDAModelLM, cache: str, rule: fdpp.Rule) -> None:
    prompt = prompts(1, 4)
    for new, block in SIZES:
        for stop_at_eos in (True, False):
            settings = {"max_new_tokens": new, "block_length": block, "stop_at_eos": stop_at_eos}
            out = llada.generate(prompt, rule=rule, cache=cache, **settings)
            check(out, prompt, new, block)
            if not stop_at_eos:
                assert out.nfe >= -(-new // block)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 13, 40, 1000])
@pytest.mark.parametrize("cache", CACHES)
def test_any_number_of_steps(llada: LLaDAModelLM, cache: str, steps: int) -> None:
    prompt = prompts(2, 4)
    for new, block in SIZES:
        settings = {"max_new_tokens": new, "block_length": block, "steps": steps, "stop_at_eos": False}
        out = llada.generate(prompt, rule=Quota(), cache=cache, **settings)
        check(out, prompt, new, block)
        blocks = -(-new // block)
        assert bool((out.nfe <= max(steps, blocks)).all())
        if steps >= new:
            assert out.nfe.tolist() == [new, new]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_argmax_at_the_mask_id(rule: fdpp.Rule, cache: str) -> None:
    """The published loops never end here: the mask token would be committed and still be masked."""
    model = small_model()
    project = model.project
    model.project = lambda hidden: project(hidden) + 50.0 * (torch.arange(V) == MASK)
    prompt = prompts(2, 3)
    out = model.generate(prompt, max_new_tokens=12, block_length=5, rule=rule, cache=cache)
    check(out, prompt, 12, 5)


# Quota's schedule


def published_schedule(new: int, block: int, steps: int) -> list[list[int]]:
    """LLaDA's commits per block and step; both divisions must come out even."""
    assert new % block == 0 and steps % (new // block) == 0
    per_block = steps // (new // block)
    commits = [block // per_block + (step < block % per_block) for step in range(per_block)]
    return [[n for n in commits if n]] * (new // block)


@pytest.mark.parametrize(
    ("new", "block", "steps"),
    [(64, 16, 64), (64, 16, 20), (64, 32, 32), (64, 64, 20), (12, 4, 6), (30, 10, 9), (16, 16, 1), (8, 2, 16)],
)
def test_quota_schedule_is_lladas(llada: LLaDAModelLM, new: int, block: int, steps: int) -> None:
    recorder = Recorder()
    settings = {"max_new_tokens": new, "block_length": block, "steps": steps, "stop_at_eos": False}
    out = llada.generate(prompts(1, 4), rule=Quota(), streamer=recorder, **settings)
    committed = []
    for drafts in recorder.blocks():
        masks = [block, *(int((draft == MASK).sum()) for draft in drafts[:-1])]
        committed.append([before - after for before, after in itertools.pairwise(masks)])
    assert committed == published_schedule(new, block, steps)
    assert out.nfe.item() == min(steps, new)


@pytest.mark.parametrize(("new", "block"), SIZES)
def test_quota_without_steps_commits_one_at_a_time(llada: LLaDAModelLM, new: int, block: int) -> None:
    out = llada.generate(prompts(1, 4), max_new_tokens=new, block_length=block, rule=Quota(), stop_at_eos=False)
    assert out.nfe.item() == new


def test_quota_of_k(llada: LLaDAModelLM) -> None:
    settings = {"max_new_tokens": 20, "block_length": 8, "stop_at_eos": False}
    assert llada.generate(prompts(1, 4), rule=Quota(3), **settings).nfe.item() == 3 + 3 + 2


# Batches of unequal rows


def ragged() -> list[Tensor]:
    return [prompts(1, P, seed=P + 4)[0] for P in (3, 9, 0, 5)]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_row_of_a_batch_is_the_row_alone(
    exact: LLaDAModelLM, rule: fdpp.Rule, temperature: float, cache: str
) -> None:
    settings = {"max_new_tokens": 22, "block_length": 8, "rule": rule, "cache": cache, "temperature": temperature}
    input_ids, attention_mask = left_pad(ragged())
    out = exact.generate(input_ids, attention_mask, seed=11, **settings)
    check(out, input_ids, 22, 8)
    for b, row in enumerate(ragged()):
        alone = exact.generate(row[None], seed=11 + b, **settings)
        assert torch.equal(out.sequences[b, -22:], alone.sequences[0, -22:])
        assert out.nfe[b] == alone.nfe[0]
        assert out.tokens_per_forward[b] == alone.tokens_per_forward[0]


def test_the_ragged_rows_differ_in_cost(exact: LLaDAModelLM) -> None:
    """The test above compares rows that finish at different times, some of them by EOS."""
    input_ids, attention_mask = left_pad(ragged())
    out = exact.generate(input_ids, attention_mask, max_new_tokens=22, block_length=8, rule=Frechet(0.1))
    assert len(set(out.nfe.tolist())) == 4
    assert 0 < (out.sequences[:, -22:] == EOS).any(1).sum() < 4


@pytest.mark.parametrize("cache", CACHES)
def test_finished_rows_cost_nothing(exact: LLaDAModelLM, cache: str) -> None:
    input_ids, attention_mask = left_pad(ragged())
    settings = {"max_new_tokens": 22, "block_length": 8, "rule": Frechet(0.1), "cache": cache}
    with forwards(exact) as seen:
        out = exact.generate(input_ids, attention_mask, **settings)
    sizes = [size for size, _ in seen]
    assert sum(sizes) == out.nfe.sum()
    assert len(set(sizes)) >= 3
    full = [size for size, length in seen if length == input_ids.shape[1] + 22]
    if cache == "dual":
        assert full == sorted(full, reverse=True)
        assert len(full) == 3


def test_finished_rows_are_not_written_again(exact: LLaDAModelLM) -> None:
    input_ids, attention_mask = left_pad(ragged())
    recorder = Recorder()
    out = exact.generate(input_ids, attention_mask, max_new_tokens=22, block_length=8, streamer=recorder)
    drafts = recorder.blocks()
    for block in drafts:
        for before, after in itertools.pairwise(block):
            closed = (before != MASK).all(1)
            assert torch.equal(before[closed], after[closed])
            # What is committed changes only to padding, behind an EOS.
            changed = (before != MASK) & (before != after)
            behind_eos = (after == EOS).cumsum(1) > 0
            assert bool((behind_eos & (after == PAD))[changed].all())
    assert torch.equal(torch.cat([block[-1] for block in drafts], 1), out.sequences[:, input_ids.shape[1] :])


@pytest.mark.parametrize("cache", CACHES)
def test_padding_ids_do_not_matter(exact: LLaDAModelLM, cache: str) -> None:
    input_ids, attention_mask = left_pad(ragged())
    settings = {"max_new_tokens": 16, "block_length": 8, "cache": cache}
    out = exact.generate(input_ids, attention_mask, **settings)
    for pad in (0, MASK, EOS):
        other = torch.where(attention_mask.bool(), input_ids, pad)
        again = exact.generate(other, attention_mask.bool(), **settings)
        assert torch.equal(again.sequences[:, -16:], out.sequences[:, -16:])
        assert torch.equal(again.sequences[:, :-16], other)


@pytest.mark.parametrize("cache", CACHES)
def test_positions_count_real_tokens(cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary attention only knows distances, so the logits would not tell; a long padding would leave the window."""
    model, seen = small_model(), []
    inner = model.model.forward

    def spy(ids: Tensor, *, position_ids: Tensor, start: int, **kwargs: Any) -> Tensor:
        seen.append((start, position_ids.clone()))
        return inner(ids, position_ids=position_ids, start=start, **kwargs)

    monkeypatch.setattr(model.model, "forward", spy)
    input_ids, attention_mask = left_pad([prompts(1, P)[0] for P in (2, 6)])
    settings = {"max_new_tokens": 6, "block_length": 3, "rule": Quota(2), "stop_at_eos": False}
    model.generate(input_ids, attention_mask, cache=cache, **settings)
    columns = torch.tensor([[0, 0, 0, 0, *range(8)], [*range(12)]])
    assert len(seen) == 4
    for start, position_ids in seen:
        assert torch.equal(position_ids, columns[:, start : start + position_ids.shape[1]])


def test_mask_of_ones_is_no_mask(llada: LLaDAModelLM) -> None:
    prompt = prompts(2, 5)
    with_mask = llada.generate(prompt, torch.ones(2, 5), max_new_tokens=12)
    assert torch.equal(with_mask.sequences, llada.generate(prompt, max_new_tokens=12).sequences)


# EOS


EOS_SCRIPT = ([5, 6, 7, EOS, 8, 9, 10, 11], [0.6, 0.5, 0.7, 0.9, 0.8, 0.2, 0.3, 0.4])
"""Commits one at a time in the order 3 (EOS), 4, 2, 0, 1, 7, 6, 5: EOS counts after the fifth."""


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


# Prompts


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_prompt_is_never_changed(llada: LLaDAModelLM, rule: fdpp.Rule, cache: str) -> None:
    prompt = torch.tensor([[MASK, 3, EOS, MASK, PAD], [1, MASK, MASK, MASK, MASK]])
    given_prompt = prompt.clone()
    out = llada.generate(prompt, max_new_tokens=12, block_length=5, rule=rule, cache=cache)
    check(out, given_prompt, 12, 5)
    assert torch.equal(prompt, given_prompt)


@pytest.mark.parametrize("cache", CACHES)
def test_masks_in_the_prompt_do_not_compete(cache: str) -> None:
    """They are fed as they are to every forward, and no commit goes to them."""
    model = Scripted([5, 6, 7, 8], [0.9, 0.8, 0.7, 0.6], prompt=2)
    model.logits[:2] = 0.0
    model.logits[:2, 9] = 100.0
    out = model.generate(torch.tensor([[MASK, MASK]]), max_new_tokens=4, rule=Quota(1), cache=cache)
    assert out.sequences.tolist() == [[MASK, MASK, 5, 6, 7, 8]]
    assert out.nfe.tolist() == [4]
    assert all(fed[0, :2].tolist() == [MASK, MASK] for fed in model.fed if fed.shape[1] == 6)


@pytest.mark.parametrize("cache", CACHES)
def test_empty_prompt(llada: LLaDAModelLM, cache: str) -> None:
    for attention_mask in (None, torch.empty(3, 0, dtype=torch.int64)):
        out = llada.generate(no_prompt(3), attention_mask, max_new_tokens=10, block_length=4, cache=cache)
        check(out, no_prompt(3), 10, 4)
        assert torch.equal(out.sequences[0], out.sequences[2])


def test_prompt_longer_than_the_window(llada: LLaDAModelLM) -> None:
    window = llada.config.max_sequence_length
    with pytest.raises(ValueError, match=rf"{window - 3}.* 4 .*{window}"):
        llada.generate(prompts(1, window - 3), max_new_tokens=4)
    out = llada.generate(prompts(1, window - 4), max_new_tokens=4)
    check(out, prompts(1, window - 4), 4, 4)


def test_padding_does_not_count_against_the_window() -> None:
    model = small_model(max_sequence_length=12)
    input_ids, attention_mask = left_pad([prompts(1, 8)[0], prompts(1, 2)[0]])
    input_ids = torch.nn.functional.pad(input_ids, (4, 0), value=PAD)
    attention_mask = torch.nn.functional.pad(attention_mask, (4, 0))
    check(model.generate(input_ids, attention_mask, max_new_tokens=4), input_ids, 4, 4)
    with pytest.raises(ValueError, match=r"8.* 5 .*12"):
        model.generate(input_ids, attention_mask, max_new_tokens=5)


@pytest.mark.parametrize(
    ("input_ids", "attention_mask", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), None, r"input_ids: expected \[B, P\] int64.*\[3\] torch.int64"),
        (torch.zeros(1, 3), None, r"input_ids.*\[1, 3\] torch.float32"),
        (torch.zeros(0, 3, dtype=torch.int64), None, r"input_ids.*\[0, 3\]"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 4), r"attention_mask: expected \[1, 3\].*\[1, 4\]"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 1, 0]]), "left alone"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[1, 0, 1]]), "left alone"),
    ],
)
def test_prompts_that_do_not_fit(
    llada: LLaDAModelLM, input_ids: Tensor, attention_mask: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        llada.generate(input_ids, attention_mask, max_new_tokens=4)


# Logits that cannot be used


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_unusable_logits_raise(rule: fdpp.Rule, bad: float) -> None:
    model = Scripted([5, 6, 7, 8, 9, 10], [0.9] * 6)
    if bad < 0:
        model.logits[4] = bad
    else:
        model.logits[4, 20] = bad
    with pytest.raises(FloatingPointError, match=r"sequences \[0\]"):
        model.generate(no_prompt(), max_new_tokens=6, block_length=3, rule=rule)
    # Its first block is sound, and so is a decode that never reads the row.
    assert model.generate(no_prompt(), max_new_tokens=3, rule=rule).sequences.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize("cache", CACHES)
def test_unusable_sequences_are_named(cache: str) -> None:
    model = small_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    prompt = prompts(4, 6).clamp(min=8)
    prompt[1, 2] = prompt[3, 0] = 7
    with pytest.raises(FloatingPointError, match=r"sequences \[1, 3\]"):
        model.generate(prompt, max_new_tokens=8, block_length=4, cache=cache)


def test_minus_infinity_is_a_usable_logit() -> None:
    """How callers ban tokens."""
    model = small_model()
    project = model.project
    banned = torch.arange(V) % 2 == 0
    model.project = lambda hidden: project(hidden).masked_fill(banned, -torch.inf)
    out = model.generate(prompts(2, 4), max_new_tokens=16, stop_at_eos=False)
    assert bool((out.sequences[:, 4:] % 2 == 1).all())


# Sampling


@pytest.mark.parametrize("cache", CACHES)
def test_samples_are_reproducible(llada: LLaDAModelLM, cache: str) -> None:
    settings = {"max_new_tokens": 16, "block_length": 8, "temperature": 1.0, "stop_at_eos": False, "cache": cache}
    samples = [llada.generate(prompts(1, 4), seed=seed, **settings).sequences for seed in (1, 2, 3, 1)]
    assert torch.equal(samples[0], samples[3])
    assert len({tuple(sample[0].tolist()) for sample in samples}) == 3


def test_equal_rows_sample_differently(llada: LLaDAModelLM) -> None:
    prompt = prompts(1, 4).repeat(3, 1)
    settings = {"max_new_tokens": 16, "stop_at_eos": False}
    sampled = llada.generate(prompt, temperature=1.0, seed=5, **settings).sequences
    assert len({tuple(row.tolist()) for row in sampled}) == 3
    greedy = llada.generate(prompt, seed=5, **settings).sequences
    assert torch.equal(greedy[0], greedy[1])


def test_blocks_and_steps_draw_fresh_noise() -> None:
    """With flat logits a token is its noise: no two commits may share it."""
    model = Scripted([5] * 64, [1 / V] * 64)
    out = model.generate(
        no_prompt(), max_new_tokens=64, block_length=8, rule=Quota(1), temperature=1.0, seed=0, stop_at_eos=False
    )
    counts = out.sequences.flatten().bincount(minlength=V)
    assert 30 <= (counts > 0).sum() <= 55
    assert counts.max() <= 6


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_global_generator_is_not_touched(llada: LLaDAModelLM, temperature: float) -> None:
    before = torch.random.get_rng_state()
    first = llada.generate(prompts(1, 4), max_new_tokens=8, temperature=temperature, seed=3).sequences
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = llada.generate(prompts(1, 4), max_new_tokens=8, temperature=temperature, seed=3).sequences
    assert torch.equal(first, again)


# What a forward costs


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_nfe_counts_every_forward(llada: LLaDAModelLM, rule: fdpp.Rule, cache: str) -> None:
    calls = []
    handle = llada.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        out = llada.generate(prompts(1, 5), max_new_tokens=21, block_length=8, rule=rule, cache=cache)
    finally:
        handle.remove()
    assert out.nfe.tolist() == [len(calls)]


@pytest.mark.parametrize(("cache", "later"), [("none", (26, 26, 26)), ("prefix", (21, 13, 5)), ("dual", (8, 8, 5))])
def test_what_each_cache_feeds(llada: LLaDAModelLM, cache: str, later: tuple[int, ...]) -> None:
    """A block's first forward is a full one; then everything, everything from the block on, or the block."""
    settings = {"max_new_tokens": 21, "block_length": 8, "rule": Quota(4), "stop_at_eos": False}
    with forwards(llada) as seen:
        llada.generate(prompts(2, 5), cache=cache, **settings)
    assert seen == [(2, length) for rest in later for length in (26, rest)]


@pytest.mark.parametrize("cache", CACHES)
def test_the_head_sees_masked_positions_of_the_block_alone(cache: str) -> None:
    model = small_model()
    project, rows = model.project, []
    model.project = lambda hidden: rows.append(hidden.shape[:-1].numel()) or project(hidden)
    settings = {"max_new_tokens": 21, "block_length": 8, "rule": Quota(4), "stop_at_eos": False}
    out = model.generate(prompts(2, 5), cache=cache, **settings)
    assert rows == [2 * masks for masks in (8, 4, 8, 4, 5, 1)]
    assert out.nfe.tolist() == [6, 6]
    rows.clear()
    model.generate(prompts(2, 5), cache=cache, drafts=2, **settings)
    assert rows[0] == 2 * 8 and set(rows) <= {2 * T * D for T in (8, 5) for D in (1, 2)}


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model = small_model().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = model.generate(prompts(2, 4), max_new_tokens=8)
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()
    assert not out.sequences.requires_grad
    # Decoding left no inference tensors behind in the model.
    model(out.sequences).logits.sum().backward()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, cache: str) -> None:
    model = small_model().to(dtype)
    input_ids, attention_mask = left_pad(ragged())
    for rule in RULES:
        out = model.generate(input_ids, attention_mask, max_new_tokens=12, block_length=8, rule=rule, cache=cache)
        check(out, input_ids, 12, 8)


# Streaming and stopping


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


# Settings


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
    assert (config.max_new_tokens, config.block_length, config.rule, config.steps) == (256, 32, Frechet(0.25), None)
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
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", None),
        ("max_new_tokens", True),
        ("block_length", 0),
        ("block_length", 1025),
        ("block_length", "32"),
        ("rule", "frechet"),
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


def test_sampling_needs_a_seed() -> None:
    with pytest.raises(ValueError, match=r"temperature=0\.5.*seed"):
        DiffusionGenerationConfig(temperature=0.5)


@pytest.mark.parametrize("seed", [1.5, "one", 2**63])
def test_a_seed_is_an_int(seed: Any) -> None:
    with pytest.raises(ValueError, match=f"seed.*{seed}"):
        DiffusionGenerationConfig(temperature=0.5, seed=seed)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DiffusionGenerationConfig().max_new_tokens = 3


@pytest.mark.parametrize("name", ["gen_length", "do_sample", "blocks"])
def test_unknown_settings(llada: LLaDAModelLM, name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}.*max_new_tokens"):
        llada.generate(prompts(1, 4), **{name: 4})


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


def test_another_kind_of_generation_config(llada: LLaDAModelLM) -> None:
    with pytest.raises(TypeError, match="DiffusionGenerationConfig, got GenerationConfig"):
        llada.generate(prompts(1, 4), generation_config=GenerationConfig())


# Drafts and the record of steps


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("branches", ["batch", "tree"])
def test_drafts_change_nothing_but_the_cost(exact: LLaDAModelLM, branches: str, cache: str, rule: fdpp.Rule) -> None:
    input_ids, attention_mask = left_pad(ragged())
    for temperature, stop_at_eos, drafts in ((0.0, True, 3), (0.7, False, 2), (0.0, False, "auto")):
        settings = {"temperature": temperature, "seed": 11, "stop_at_eos": stop_at_eos, "rule": rule, "cache": cache}
        settings |= {"max_new_tokens": 22, "block_length": 8}
        plain = exact.generate(input_ids, attention_mask, **settings)
        with forwards(exact) as seen:
            out = exact.generate(input_ids, attention_mask, drafts=drafts, branches=branches, **settings)
        assert torch.equal(out.sequences, plain.sequences)
        assert bool((out.nfe <= plain.nfe).all())
        assert out.query_tokens.sum() == sum(size * length for size, length in seen)
        decoded = plain.sequences[:, -22:] != PAD
        assert torch.equal(out.commit_step[decoded], plain.commit_step[decoded])


def test_commit_steps_are_those_of_the_drafts(llada: LLaDAModelLM) -> None:
    recorder = Recorder()
    settings = {"max_new_tokens": 20, "block_length": 8, "stop_at_eos": False, "rule": Frechet(0.1)}
    out = llada.generate(prompts(1, 5), streamer=recorder, **settings)
    step, expected = 0, []
    for drafts in recorder.blocks():
        masked = torch.stack([draft[0] == MASK for draft in drafts[:-1]])
        expected += (step + masked.sum(0)).tolist()
        step += len(masked)
    assert out.commit_step.tolist() == [expected]
    assert out.nfe.tolist() == [step]


def test_what_is_not_computed_has_no_commit_step() -> None:
    out = Scripted(*EOS_SCRIPT).generate(no_prompt(), max_new_tokens=8, rule=Quota(1))
    assert out.commit_step.tolist() == [[3, 4, 2, 0, 1, -1, -1, -1]]


# Any configuration


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_decode_ends(data: st.DataObject) -> None:
    draw = data.draw
    model = small_model(
        seed=draw(st.integers(0, 3)),
        d_model=16,
        n_layers=draw(st.integers(1, 2)),
        n_kv_heads=draw(st.sampled_from([1, 2, 4])),
        weight_tying=draw(st.booleans()),
        init_std=draw(st.sampled_from([0.0, 0.02, 0.5, 2.0])),
    )
    B, P = draw(st.integers(1, 4)), draw(st.integers(0, 9))
    ids = st.lists(st.integers(0, V - 1), min_size=P, max_size=P)
    prompt = torch.tensor([draw(ids) for _ in range(B)], dtype=torch.int64).reshape(B, P)
    padding = torch.tensor([draw(st.integers(0, P)) for _ in range(B)])
    attention_mask = (torch.arange(P)[None] >= padding[:, None]).long() if draw(st.booleans()) else None
    new, block = draw(st.integers(1, 20)), draw(st.integers(1, 24))
    steps = draw(st.none() | st.integers(1, 30))
    rules = [
        Quota(draw(st.integers(1, 9))),
        Threshold(draw(st.floats(0, 1))),
        Factor(draw(st.floats(0.01, 5))),
        Frechet(draw(st.floats(0, 2)), draw(st.floats(0, 0.99))),
        EntropyBound(draw(st.floats(0, 10))),
    ]
    out = model.generate(
        prompt,
        attention_mask,
        max_new_tokens=new,
        block_length=block,
        rule=Quota() if steps else draw(st.sampled_from(rules)),
        steps=steps,
        cache=draw(st.sampled_from(CACHES)),
        stop_at_eos=draw(st.booleans()),
        temperature=draw(st.sampled_from([0.0, 0.3, 5.0])),
        seed=draw(st.integers(0, 2**40)),
    )
    check(out, prompt, new, block)
