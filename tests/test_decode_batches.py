"""Prompts and batches: each row is decoded as it would be alone, and no prompt is written."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from decoding import CACHES, RULES, Recorder, Scripted, check, forwards, no_prompt, ragged
from small import EOS, MASK, PAD, exact_model, left_pad, prompts, small_model
from torch import Tensor

import fdpp
from fdpp import Frechet, LLaDAModelLM, Quota
from fdpp.attention.cache import attend, left_padding
from fdpp.models.linear import linear


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return small_model()


@pytest.fixture(scope="module")
def exact() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return exact_model(seed=1)


# Batches of unequal rows


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


# Prompts


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_prompt_is_never_changed(llada: LLaDAModelLM, rule: fdpp.Rule, cache: str) -> None:
    prompt = torch.tensor([[MASK, 3, EOS, MASK, PAD], [1, MASK, MASK, MASK, MASK]])
    given_prompt = prompt.clone()
    out = llada.generate(prompt, torch.ones_like(prompt), max_new_tokens=12, block_length=5, rule=rule, cache=cache)
    check(out, given_prompt, 12, 5)
    assert torch.equal(prompt, given_prompt)


@pytest.mark.parametrize("cache", CACHES)
def test_masks_in_the_prompt_do_not_compete(cache: str) -> None:
    """Every forward is fed them as they are, and none is committed."""
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


# Rounding


def assert_products_are_of_rows(dtype: torch.dtype) -> None:
    """Skips where a row of a matrix product depends on how many rows there are, as some libraries have it."""
    x, weight = torch.randn(96, 32, generator=torch.Generator().manual_seed(0)).to(dtype), torch.eye(48, 32).to(dtype)
    weight += torch.randn(48, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    if any(not linear(x[:n], weight).equal(linear(x, weight)[:n]) for n in (1, 5, 16, 29, 64)):
        pytest.skip(f"products in {dtype} depend on the number of rows here")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("lengths", [[17] * 12, [3, 38, 21, 8, 30, 12, 25, 5, 17, 34, 28, 9]], ids=["equal", "padded"])
def test_rows_in_bfloat16_are_those_alone_without_drafts(cache: str, lengths: list[int]) -> None:
    """To the bit, so whatever rounding decides: logits of two forwards of the batch, and all tokens of its decode."""
    assert_products_are_of_rows(torch.bfloat16)
    model = small_model(seed=1, n_kv_heads=2, d_model=64, mlp_hidden_size=128).to(torch.bfloat16)
    rows = [prompts(1, P, seed=i)[0] for i, P in enumerate(lengths)]
    settings = {"max_new_tokens": 16, "block_length": 8, "rule": Frechet(0.1), "cache": cache}

    def decode(ids: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
        logits: list[Tensor] = []
        project, kept = model.project, logits.append
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "project", lambda hidden: (kept(project(hidden)), logits[-1])[1])
            sequences = model.generate(ids, mask, **settings).sequences
        return logits, sequences[:, -16:]

    logits, tokens = decode(*left_pad(rows))
    for b, row in enumerate(rows):
        alone, response = decode(row[None], None)
        assert logits[0].unflatten(0, (12, -1))[b].equal(alone[0])
        assert tokens[b].equal(response[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [5, 90])
def test_padding_changes_no_rows_attention(dtype: torch.dtype, queries: int) -> None:
    """`queries` of all 90 columns, or of a block: bit for bit those of the row without its padding."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, heads, 90, 16, generator=g).to(dtype) for heads in (4, 2, 2))
    left = torch.tensor([0, 13, 41])
    mask = (torch.arange(90) >= left[:, None])[:, None, None]
    together = attend(q[:, :, -queries:], k, v, mask)
    for b, first in enumerate(left.tolist()):
        n = min(queries, 90 - first)
        row = slice(b, b + 1)
        assert together[row, :, -n:].equal(attend(q[row, :, -n:], k[row, :, first:], v[row, :, first:], None))
    assert together.isfinite().all()


def test_a_mask_of_other_columns_is_a_mask() -> None:
    """Holes, hidden ends and rows without a key are no padding on the left."""
    q = torch.randn(2, 1, 4, 8, generator=torch.Generator().manual_seed(0))
    for hidden in ([1], [3], [0, 2]):
        mask = torch.ones(2, 1, 1, 4, dtype=torch.bool)
        mask[1, ..., hidden] = False
        scores = (q @ q.transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf)
        torch.testing.assert_close(attend(q, q, q, mask), scores.softmax(-1) @ q)
        torch.testing.assert_close(attend(q, q, q, mask[1:]), scores.masked_fill(~mask[1:], -torch.inf).softmax(-1) @ q)
    assert left_padding(torch.zeros(1, 1, 1, 4, dtype=torch.bool), 1) is None
