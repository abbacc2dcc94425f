"""`Credit`: credit of a few tokens, against recorded decodes and against credit of the whole vocabulary."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from further import assert_as_recorded, runs
from hypothesis import given, settings
from hypothesis import strategies as st
from rules_of_others.credit import Accumulated as Dense
from rules_of_others.credit import DenseCredit
from small import EOS, MASK, exact_model, left_pad, prompts
from torch import Tensor

import fdpp
from fdpp.rules import Proposed, Sight, credit
from fdpp.rules.credit import KEPT, Accumulated
from fdpp.selection import Selection

RUNS = runs("credit")


@pytest.mark.parametrize("run", [pytest.param(run, id=run["run"]) for run in RUNS])
def test_the_published_decode(run: dict[str, Any]) -> None:
    numbers = (run["params"][name] for name in ("threshold", "credit_alpha", "boost_gamma", "decay_beta"))
    try:
        assert_as_recorded("credit", run, fdpp.Credit(*numbers))
    except AssertionError:
        if run["stable"]:
            raise
        pytest.skip("rounding decides it")


def test_all_recorded_decodes_but_one_have_to_come_out() -> None:
    assert len(RUNS) == 48 and sum(run["stable"] for run in RUNS) == 47


def sight(logits: Tensor, masked: Tensor, mask_id: int) -> Sight:
    """A forward with `logits` `[b, D, T, V]`, of states that are masked where `masked` `[b, D, T]` says so."""
    states = torch.where(masked, mask_id, 0)
    rest: Any = (None, None, True, 0, None, mask_id, None, None, lambda: None)
    return Sight(states, logits, states, *rest)


def observed(rule: Any, forwards: list[tuple[Tensor, Tensor]]) -> Any:
    """The memory after `forwards`, of which each has logits `[b, D, T, V]` and masked positions `[b, D, T]`."""
    memory, before = None, None
    for logits, masked in forwards:
        memory = rule.observe(sight(logits, masked, logits.shape[-1] - 1), before)
        before = (logits[:, -1:], type(memory)(*(part[:, -1:] for part in memory)))
    return memory


def dense(memory: Accumulated, V: int) -> Tensor:
    """The credit `[b, D, T, V]` of every token; raises where a token has two places."""
    held = memory.tokens >= 0
    assert not (memory.credit * ~held).any()
    names = torch.where(held, memory.tokens, V + torch.arange(held.shape[-1]))
    assert (names.sort(-1).values.diff(dim=-1) > 0).all()
    return memory.credit.new_zeros(*memory.tokens.shape[:-1], V + held.shape[-1]).scatter(-1, names, memory.credit)[
        ..., :V
    ]


numbers = st.tuples(
    st.sampled_from([0.0, 0.7, 2.0]), st.sampled_from([0.0, 0.2, 1.0, 400.0]), st.sampled_from([0.0, 0.8, 1.0])
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(numbers, st.integers(1, 8), st.integers(1, 3), st.integers(1, 9), st.sampled_from([2, 5, KEPT]), st.data())
def test_credit_is_that_of_the_whole_vocabulary(
    numbers: tuple[float, float, float], forwards: int, D: int, T: int, tops: int, data: Any
) -> None:
    """While no position had more than K most likely tokens; ties of logits, half precision and masks that go."""
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    V, masked, seen = 40, torch.ones(2, 1, T, dtype=torch.bool), []
    for _ in range(forwards):
        logits = torch.randn(2, D, T, V, generator=g)
        top = torch.randint(0, tops, (2, D, T, 1), generator=g) * (V - 1) // (KEPT - 1)
        logits.scatter_(-1, top, 3.0 + logits.gather(-1, top).abs().round())
        logits[:, :, :, -2] = logits[:, :, :, 0]
        states = [masked := masked & (torch.rand(2, 1, T, generator=g) < 0.8) for _ in range(D)]
        seen.append((logits.to(dtype), torch.cat(states, dim=1)))
    ours, theirs = fdpp.Credit(0.9, *numbers), DenseCredit(0.9, *numbers)
    memory, expected = observed(ours, seen), observed(theirs, seen)
    assert memory.tokens.shape == memory.credit.shape == (2, D, T, KEPT)
    torch.testing.assert_close(dense(memory, V), expected.credit, rtol=1e-5, atol=0.0)
    logits = seen[-1][0]
    given, flat, whole = logits.clone(), flattened(memory), Dense(expected.credit.flatten(0, 1))
    weighed = ours.weigh(logits.flatten(0, 1), flat)
    assert weighed.dtype == torch.float32 and logits.equal(given)
    torch.testing.assert_close(weighed, theirs.weigh(logits.flatten(0, 1), whole), rtol=1e-6, atol=1e-6)
    assert ours.again(logits, memory).tokens.shape == memory.tokens.shape
    torch.testing.assert_close(
        dense(ours.again(logits, memory), V), theirs.again(logits, expected).credit, rtol=1e-5, atol=0.0
    )


def flattened(memory: Accumulated) -> Accumulated:
    """As a step gets it."""
    return Accumulated(*(part.flatten(0, 1) for part in memory))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("drafts", [1, 3])
def test_a_decode_is_that_with_credit_of_the_whole_vocabulary(cache: str, drafts: int) -> None:
    prompt, mask = left_pad([prompts(1, 4 + 3 * b, seed=b)[0] for b in range(3)])
    fewer = 0
    for numbers in ((0.5, 0.7, 0.2, 0.8), (0.8, 2.0, 0.5, 0.5), (0.9, 1.0, 1.0, 1.0)):
        sizes = {"max_new_tokens": 20, "block_length": 10, "cache": cache, "drafts": drafts, "eos_token_id": EOS}
        ours, theirs, plain = (
            exact_model(3).generate(prompt, attention_mask=mask, rule=rule, **sizes)
            for rule in (fdpp.Credit(*numbers), DenseCredit(*numbers), fdpp.Credit(numbers[0], alpha=0.0))
        )
        assert ours.sequences.equal(theirs.sequences) and ours.commit_step.equal(theirs.commit_step)
        assert ours.nfe.equal(theirs.nfe)
        fewer += int(plain.nfe.sum() - ours.nfe.sum())
    assert fewer > 0


def one(tokens: list[int], V: int = 8, top: float = 4.0) -> list[tuple[Tensor, Tensor]]:
    """Forwards of one masked position at which `tokens` are most likely in turn."""
    logits = torch.zeros(len(tokens), V)
    logits[torch.arange(len(tokens)), tokens] = top
    return [(row[None, None, None], torch.ones(1, 1, 1, dtype=torch.bool)) for row in logits]


def test_a_token_has_one_place() -> None:
    memory = observed(fdpp.Credit(0.9, 1.0, 0.0, 0.5), one([0, 3, 0, 0]))
    assert memory.tokens.flatten().tolist() == [0, 3] + [-1] * (KEPT - 2)
    assert memory.credit.flatten().tolist() == [1 + 0.5 + 0.125, 0.25] + [0.0] * (KEPT - 2)


def test_beyond_its_places_the_smallest_credit_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit, "KEPT", 2)
    rule = fdpp.Credit(0.9, 1.0, 0.0, 0.5)
    memory = observed(rule, one([1, 1, 2, 5]))
    assert memory.tokens.flatten().tolist() == [5, 2] and memory.credit.flatten().tolist() == [1.0, 0.5]
    back = observed(rule, one([1, 1, 2, 5, 1]))
    assert back.tokens.flatten().tolist() == [5, 1] and back.credit.flatten().tolist() == [0.5, 1.0]
    kept = observed(rule, one([1, 1, 1, 2, 5]))
    assert kept.tokens.flatten().tolist() == [5, 2], "1.75 / 4 is less than 0.5"


def test_a_place_without_credit_is_as_good_as_free() -> None:
    """With a decay of 0 every forward starts anew."""
    memory = observed(fdpp.Credit(0.9, 1.0, 1.0, 0.0), one([1, 2, 3, 2]))
    held = memory.credit.flatten() > 0
    assert memory.tokens.flatten()[held].tolist() == [2]


def test_free_places_change_no_logit() -> None:
    """They stand at id 0, whatever its logit."""
    memory = flattened(observed(fdpp.Credit(), one([3])))
    for value in (-torch.inf, -0.0, 65000.0):
        logits = torch.zeros(1, 1, 8)
        logits[0, 0, 0] = value
        weighed = fdpp.Credit().weigh(logits, memory)
        assert weighed[0, 0, 0] == value and weighed[0, 0, 3] > 0 and not weighed[0, 0, [1, 2, 4, 5, 6, 7]].any()


def test_a_position_that_is_not_masked_gains_nothing() -> None:
    forwards = [*one([2]), (one([3])[0][0] * math.nan, torch.zeros(1, 1, 1, dtype=torch.bool))]
    memory = observed(fdpp.Credit(0.9, 1.0, 0.0, 0.5), forwards)
    assert dense(memory, 8).flatten().tolist() == [0, 0, 0.5, 0, 0, 0, 0, 0]


def test_a_guess_is_the_state_after_as_if_nothing_had_changed() -> None:
    rule, forwards = fdpp.Credit(), one([2, 3])
    guess, seen = rule.again(forwards[-1][0], observed(rule, forwards)), observed(rule, [*forwards, forwards[-1]])
    assert all(a.equal(b) for a, b in zip(guess, seen, strict=True))


def decided(rule: fdpp.Credit, confidence: list[float], masked: list[bool] | None = None) -> list[list[int]]:
    """The positions that `decide` and `reference` commit of a block with these confidences."""
    candidate = torch.tensor([masked or [True] * len(confidence)])
    tokens, c = torch.where(candidate, MASK, 3), torch.tensor([confidence], dtype=torch.float64)
    first = torch.zeros_like(candidate)
    if candidate.any():
        first[0, c.masked_fill(~candidate, -1.0).argmax()] = True
    step = Selection(tokens, tokens, c, first, candidate.sum(1), torch.zeros(1))
    found = Proposed(step, tokens, candidate, MASK)
    return [out.committed[0].nonzero().flatten().tolist() for out in (rule.decide(found), rule.reference(found))]


@pytest.mark.parametrize(
    ("tau", "confidence", "expected"),
    [
        (0.9, [0.9, math.nextafter(0.9, 0), 0.95], [0, 2]),
        (0.9, [0.5, 0.4], [0]),
        (0.9, [0.5, 0.5, 0.4], [0, 1]),
        (0.9, [0.5 - 1e-5, 0.5, 0.5 - 1.1e-5], [0, 1]),
        (0.9, [0.9, 0.9 - 0.9e-5], [0, 1]),
        (0.9, [0.9 + 2e-5, 0.9, 0.9 - 0.9e-5], [0, 1]),
        (0.0, [0.9, 0.1, 0.0], [0, 1]),
        (1.0, [1.0, 1.0 - 0.9e-5, 0.9], [0, 1]),
        (0.9, [0.0, 0.0], [0]),
        (0.9, [5e-6, 0.0], [0]),
    ],
    ids=str,
)
def test_what_commits(tau: float, confidence: list[float], expected: list[int]) -> None:
    assert decided(fdpp.Credit(tau), confidence) == [expected, expected]
    assert decided(fdpp.Credit(tau), [*confidence, 1.0], [True] * len(confidence) + [False]) == [expected, expected]
    assert decided(fdpp.Credit(tau), confidence, [False] * len(confidence)) == [[], []]


def test_the_mask_id_is_not_proposed_and_takes_credit() -> None:
    """Credit of the mask id makes a position less confident of what it proposes."""
    logits, masks = torch.zeros(1, 2, 8), torch.full((1, 2), 7)
    logits[0, :, 3], logits[0, 1, 7] = 2.0, 3.0
    rule = fdpp.Credit(alpha=2.0)
    memory = flattened(observed(rule, [(logits[:, None], torch.ones(1, 1, 2, dtype=torch.bool))] * 3))
    plain, fused = (fdpp.select(x, masks, rule=rule, mask_id=7) for x in (logits, rule.weigh(logits, memory)))
    assert fused.proposal.tolist() == [[3, 3]]
    assert fused.confidence[0, 0] > plain.confidence[0, 0] and fused.confidence[0, 1] < plain.confidence[0, 1]


def test_alone_it_is_its_threshold() -> None:
    logits, tokens = 4 * torch.randn(2, 8, 30, generator=torch.Generator().manual_seed(0)), torch.full((2, 8), 29)
    ours = fdpp.select(logits, tokens, rule=fdpp.Credit(0.6), mask_id=29)
    assert ours.committed.equal(fdpp.select(logits, tokens, rule=fdpp.Threshold(0.6), mask_id=29).committed)
    assert 2 < int(ours.committed.sum()) < 16


@pytest.mark.parametrize(
    "numbers", [{"tau": 1.1}, {"alpha": -0.1}, {"alpha": math.inf}, {"gamma": math.nan}, {"beta": 1.1}, {"beta": None}]
)
def test_bad_numbers_are_named(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Credit: expected {next(iter(numbers))} in"):
        fdpp.Credit(**numbers)
