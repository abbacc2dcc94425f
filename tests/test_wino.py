"""`Wino`: tokens that others contradict are taken back, against recorded decodes and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import Recorder
from further import arrays, assert_as_recorded, runs
from golden import model as golden_model
from hypothesis import given, settings
from hypothesis import strategies as st
from small import EOS, MASK, exact, prompts

import fdpp
from fdpp.rules import Proposed
from fdpp.rules.verified import Verdicts
from fdpp.selection import Selection

RUNS = runs("wino")
MASK_OF_RUNS = 500


@pytest.mark.parametrize("run", [pytest.param(run, id=run["run"]) for run in RUNS])
def test_the_published_decode(run: dict[str, Any]) -> None:
    """Tokens, forwards and steps; and every commit and revocation of every forward."""
    params, recorder = run["params"], Recorder()
    assert_as_recorded("wino", run, fdpp.Wino(params["threshold"], params["threshold_back"]), streamer=recorder)
    n, mask_id, events, call = arrays("wino")[f"prompt_{run['prompt']}"].shape[1], MASK_OF_RUNS, [], 0
    for number, states in enumerate(recorder.blocks()):
        before = torch.full_like(states[0], mask_id)
        for after in states[:-1]:  # the last one is the finished block
            for t in (before != after)[0].nonzero().flatten().tolist():
                commits = int(before[0, t]) == mask_id
                token = (after if commits else before)[0, t]
                assert mask_id in (int(before[0, t]), int(after[0, t]))
                events.append([call, int(commits), n + number * params["block_length"] + t, int(token)])
            before, call = after, call + 1
    assert sorted(events) == sorted(arrays("wino")[f"{run['run']}_events"].tolist())


def test_the_recorded_decodes_take_tokens_back() -> None:
    assert len(RUNS) == 112 and sum(run["revoked"] > 0 for run in RUNS) == 97


def test_a_forward_feeds_the_block_twice() -> None:
    run = RUNS[0]
    params, prompt = run["params"], arrays("wino")[f"prompt_{run['prompt']}"]
    out: Any = golden_model(run["model"]).generate(
        prompt,
        rule=fdpp.Wino(params["threshold"], params["threshold_back"]),
        max_new_tokens=params["gen_length"],
        block_length=params["block_length"],
        cache="none",
        stop_at_eos=False,
    )
    assert int(out.query_tokens) == run["query_tokens"]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_each_forward_feeds_a_row_for_each_position(cache: str) -> None:
    settings = {"max_new_tokens": 10, "block_length": 10, "cache": cache, "stop_at_eos": False}
    rule = fdpp.Threshold(0.4)
    plain, beside = (
        exact("LLaDA").generate(prompts(2, 7), rule=r, **settings) for r in (rule, fdpp.Revocable(rule, 0.0))
    )
    assert plain.nfe.equal(beside.nfe) and int(plain.nfe.max()) > 2
    assert beside.query_tokens.equal(plain.query_tokens + 10 * plain.nfe)


def proposed(
    confidence: list[float], held: list[float | None], commits: int, given: list[int] | None = None
) -> Proposed:
    """A block whose positions with a verdict in `held` hold token 3; the step before committed the first `commits`."""
    T = len(confidence)
    candidate = torch.tensor([[verdict is None for verdict in held]])
    tokens = torch.where(candidate, MASK, 3)
    before, left = tokens.clone(), commits
    for t in range(T):
        if left and not candidate[0, t]:
            before[0, t], left = MASK, left - 1
    verdict = torch.tensor([[torch.nan if v is None else v for v in held]], dtype=torch.float64)
    c = torch.tensor([confidence], dtype=torch.float64).masked_fill(~candidate, 0.0)
    best = candidate & (c == c.masked_fill(~candidate, -1.0).amax()) & (candidate.cumsum(1) > 0)
    best &= best.cumsum(1) == 1
    proposal = torch.where(candidate, 5, tokens)
    remaining = (candidate & ~best).sum(1, dtype=torch.int32)
    none = torch.zeros(1, dtype=torch.int32)
    step = Selection(torch.where(best, proposal, tokens), proposal, c, best, remaining, none)
    fixed = torch.zeros_like(candidate)
    fixed[0, given or []] = True
    return Proposed(step, tokens, candidate, MASK, Verdicts(verdict, tokens, before), given=fixed)


def after(rule: fdpp.Rule, at: Proposed) -> tuple[list[int], list[int]]:
    """The positions that a step commits, and those that it takes back; it is as specified."""
    step, truth = rule.decide(at), rule.reference(at)
    for name in ("tokens", "committed", "remaining"):
        assert getattr(step, name).equal(getattr(truth, name)), name
    assert int(step.remaining) == int((step.tokens == MASK).sum())
    taken = (at.tokens != MASK) & (step.tokens == MASK)
    return step.committed[0].nonzero().flatten().tolist(), taken[0].nonzero().flatten().tolist()


def test_what_a_step_does() -> None:
    rule = fdpp.Wino(0.6, 0.9)
    held = [0.95, 0.2, 0.9, 0.5, None, None, None]
    confidence = [0.0, 0.0, 0.0, 0.0, 0.7, 0.6, 0.8]
    # 0.6 is not above tau, 0.9 not below back. Of two doubted tokens the lower goes first.
    assert after(rule, proposed(confidence, held, 3)) == ([4, 6], [1, 3])
    assert after(rule, proposed(confidence, held, 2)) == ([4, 6], [1])
    assert after(rule, proposed(confidence, held, 1)) == ([4, 6], [])
    assert after(rule, proposed(confidence, held, 0)) == ([4, 6], [])
    assert after(rule, proposed(confidence, held, 3, given=[1])) == ([4, 6], [3])
    # A step that commits one position takes none back; equal verdicts, the lower position first.
    assert after(rule, proposed([0, 0, 0, 0, 0.7, 0.1, 0.2], held, 3)) == ([4], [])
    assert after(rule, proposed([0, 0, 0, 0, 0.1, 0.1, 0.1], held, 3)) == ([4], [])
    assert after(rule, proposed(confidence, [0.3, 0.3, 0.3, 0.3, None, None, None], 3)) == ([4, 6], [0, 1])
    # Nothing is held, nothing is masked.
    assert after(rule, proposed([0.7, 0.8], [None, None], 0)) == ([0, 1], [])
    assert after(rule, proposed([0.0, 0.0], [0.1, 0.1], 2)) == ([], [])


def test_a_draft_has_no_verdict_on_what_it_guesses() -> None:
    """The memory of the state before: the second token is new, the first is known."""
    at = proposed([0.0, 0.0, 0.0, 0.9, 0.9], [0.1, 0.1, 0.1, None, None], 3)
    verdicts = at.memory
    assert verdicts is not None
    known = verdicts.states.clone()
    known[0, 1] = MASK
    assert after(fdpp.Wino(0.6, 0.9), at._replace(memory=verdicts._replace(states=known))) == ([3, 4], [0, 2])
    again = fdpp.Wino().again(torch.zeros(1, 1, 5, 9), verdicts)
    assert again.before.equal(verdicts.states) and again.states.equal(verdicts.states)


@pytest.mark.parametrize(
    ("masks", "cap", "commits"),
    [(32, 20, [20, 8, 4]), (16, 20, [11, 5]), (128, 20, [20, 20, 20, 20, 20, 19, 6, 3]), (32, 3, [3] * 10 + [2])],
)
def test_the_cap_of_a_block_that_is_sure(masks: int, cap: int, commits: list[int]) -> None:
    found, left = [], masks
    while left:
        held = [1.0] * (masks - left) + [None] * left
        found.append(len(after(fdpp.Wino(0.6, 0.9, cap), proposed([0.99] * masks, held, 0))[0]))
        left -= found[-1]
    # Published: 8 forwards for 128.
    assert found == commits
    assert len(after(fdpp.Wino(0.6, 0.9, None), proposed([0.99] * masks, [None] * masks, 0))[0]) == masks


levels = st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 1.0])


@settings(max_examples=200, deadline=None)
@given(
    held=st.lists(st.one_of(st.none(), levels), min_size=1, max_size=12),
    confidence=st.lists(levels, min_size=12, max_size=12),
    rule=st.builds(
        fdpp.Wino, tau=levels, back=levels, cap=st.one_of(st.none(), st.integers(min_value=1, max_value=12))
    ),
    data=st.data(),
)
def test_any_step_is_as_specified(
    held: list[float | None], confidence: list[float], rule: fdpp.Wino, data: st.DataObject
) -> None:
    """Fewer go than the step before committed; only where two or more come; never a given one."""
    free = sum(verdict is not None for verdict in held)
    commits = data.draw(st.integers(min_value=0, max_value=free))
    fixed = data.draw(st.lists(st.integers(min_value=0, max_value=len(held) - 1), max_size=3))
    at = proposed(confidence[: len(held)], held, commits, fixed)
    committed, taken = after(rule, at)
    assert len(taken) <= max(commits - 1, 0) and (not taken or len(committed) > 1)
    assert not set(taken) & set(fixed) and len(committed) >= any(verdict is None for verdict in held)
    assert all((held[t] or 0.0) < rule.back for t in taken)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("back", [0.5, 1.0])
def test_a_block_ends_within_a_forward_per_position(back: float, cache: str) -> None:
    """Whatever is taken back; and something is."""
    model = exact("LLaDA")
    for rule in (fdpp.Wino(0.1, back, None), fdpp.Wino(0.3, back), fdpp.Revocable(fdpp.EntropyBound(9.0), back)):
        out: Any = model.generate(
            prompts(3, 5), rule=rule, max_new_tokens=20, block_length=10, cache=cache, stop_at_eos=False
        )
        assert int(out.nfe.max()) <= 20 and not (out.sequences == MASK).any()
    assert int(out.nfe.max()) > 2  # without revocations the last rule takes one forward a block


def test_an_infill_keeps_what_is_given() -> None:
    """Tokens amid the masks are verified like any, and stay."""
    model, text = exact("LLaDA"), prompts(2, 24)
    text[:, 6:20:3] = MASK
    text[:, 7:20:3] = MASK
    out: Any = model.infill(text, rule=fdpp.Wino(0.1, 1.0, None), block_length=8, stop_at_eos=False)
    assert out.sequences[text != MASK].equal(text[text != MASK]) and not (out.sequences == MASK).any()


def test_an_eos_that_is_taken_back_ends_nothing() -> None:
    """A streamer sees one that is gone later; the response goes on past its place."""
    model = exact("LLaDA")
    plain, lift = model.project, torch.zeros(64)
    lift[EOS] = 4.0
    model.project = lambda hidden: plain(hidden) + lift
    seen = 0
    for seed in range(8):
        recorder = Recorder()
        settings = {"rule": fdpp.Revocable(fdpp.EntropyBound(9.0), 1.0), "max_new_tokens": 24, "block_length": 12}
        out: Any = model.generate(prompts(1, 5, seed=seed), streamer=recorder, **settings)
        final = out.sequences[0, 5:]
        end = int((final == EOS).long().argmax()) if (final == EOS).any() else 24
        said = [
            12 * number + t
            for number, states in enumerate(recorder.blocks())
            for state in states
            for t in (state[0] == EOS).nonzero().flatten().tolist()
        ]
        seen += any(t < end for t in said)
        assert not (final == MASK).any()
    assert seen


def test_by_itself_it_takes_nothing_back() -> None:
    logits = torch.zeros(1, 4, 10)
    logits[0, :, 2] = torch.tensor([9.0, 9.0, 0.5, 9.0])
    tokens = torch.tensor([[9, 9, 9, 1]])
    step = fdpp.select(logits, tokens, rule=fdpp.Wino(), mask_id=9)
    assert step.tokens.tolist() == [[2, 2, 9, 1]] and step.committed.tolist() == [[True, True, False, False]]
