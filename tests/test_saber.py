"""Saber: commits of what is surer than before, and tokens taken back, against the published decodes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import golden
import pytest
import torch
from further import recorded, runs
from small import EOS, MASK, exact_model, left_pad, prompts
from torch import Tensor

import fdpp
from fdpp import Saber
from fdpp.rules import Proposed
from fdpp.rules.saber import Course, turn
from fdpp.selection import Selection

RUNS = {run["run"]: run for run in runs("saber")}
NOT_COMPARED = {name for name, run in RUNS.items() if run["tie"]}
"""The published program fills up a step that finds fewer masks than n with what its top-k happens to return."""


def by_hand(
    target: Any, prompt: Tensor, mask_id: int, n: int, length: int, block: int, own: bool
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Tokens `[1, L]`, the forward that last committed each, and what every forward committed and took back.

    As published, or with blocks of their `own`: each decoded as the published program decodes its first one.
    """
    P, calls = prompt.shape[1], []
    tokens = torch.cat((prompt[0], torch.full((length,), mask_id)))
    step_of, before, kept = torch.full((length,), -1), torch.zeros(length), dict[int, float]()
    for start in range(0, length, block):
        end, first, low = min(start + block, length), True, start if own else 0
        if own:
            before, kept = torch.zeros(length), {}
        while True:
            with torch.no_grad():
                p = target.project(target.model(tokens[None])[0])[P:].softmax(-1)
            p[:, mask_id] = 0.0
            q, x0 = p.max(-1)
            change = q - before
            if first and not own and start:
                change[start:end] = torch.inf
            tau = sum(kept.values()) / len(kept) if kept else 1.0
            masks = sorted((t for t in range(low, end) if tokens[P + t] == mask_id), key=lambda t: (-float(q[t]), t))
            chosen = [t for t in masks if q[t] > tau]
            chosen = chosen if len(chosen) >= n else masks[:n]
            for t in chosen:
                tokens[P + t], step_of[t], kept[t] = x0[t], len(calls), float(q[t])
            before, first = q, False
            if len(chosen) == len(masks):
                calls.append((len(chosen), 0))
                break
            held = sorted((t for t in range(low, end) if tokens[P + t] != mask_id), key=lambda t: (float(change[t]), t))
            taken = held[: min(max(n // 2, -(-len(chosen) // 8)), len(chosen) - 1)]
            tokens[[P + t for t in taken]], step_of[taken] = mask_id, -1
            calls.append((len(chosen), len(taken)))
    return tokens[None], step_of[None], calls


@pytest.mark.parametrize("name", sorted(RUNS.keys() - NOT_COMPARED))
def test_the_published_decode(name: str) -> None:
    """As recorded where the response is one block. Where it has several: as the published program decodes one."""
    params, (prompt, tokens, step_of) = RUNS[name]["params"], recorded("saber", RUNS[name])
    n, length, block = params["n"], params["gen_length"], params["block_length"]
    settings: dict[str, Any] = {"max_new_tokens": length, "block_length": block, "cache": "none"}
    model = golden.model("model_tiny")
    out = model.generate(prompt, rule=Saber(n), stop_at_eos=False, **settings)
    if block < length:
        if RUNS[name]["stable"]:
            theirs, when, calls = by_hand(model, prompt, 500, n, length, block, own=False)
            assert theirs.equal(tokens) and when.equal(step_of) and len(calls) == RUNS[name]["n_forward"]
        tokens, step_of, calls = by_hand(model, prompt, 500, n, length, block, own=True)
        assert int(out.nfe) == len(calls)
    else:
        assert int(out.nfe) == RUNS[name]["n_forward"]
    assert out.sequences.equal(tokens) and out.commit_step.equal(step_of)


def test_what_the_published_decodes_cover() -> None:
    """Of 48, 15 are not compared. 23 of the others have several blocks; 2 of these take back nothing."""
    tally: Counter[str] = Counter()
    for name, run in RUNS.items():
        params = run["params"]
        if name in NOT_COMPARED:
            tally["filled up by an accident"] += 1
            assert params["n"] > 2
        elif params["gen_length"] == params["block_length"]:
            tally["one block"] += 1
            assert run["revoked"]
        else:
            tally["several blocks, some taken back" if run["revoked"] else "several blocks, none taken back"] += 1
    assert tally == {
        "filled up by an accident": 15,
        "one block": 10,
        "several blocks, some taken back": 21,
        "several blocks, none taken back": 2,
    }


def proposed_of(masked: Tensor, confidence: Tensor, change: Tensor, kept: Tensor) -> Proposed:
    """Positions `[N, T]` that propose token 7."""
    tokens, proposal = torch.where(masked, 9, 3), torch.where(masked, 7, 3)
    shown = confidence.double() * masked
    none = torch.zeros(masked.shape[0], dtype=torch.int32)
    step = Selection(tokens, proposal, shown, torch.zeros_like(masked), masked.sum(1, dtype=torch.int32), none)
    given = ~masked & (kept < 0.0)
    return Proposed(step, tokens, masked, 9, Course(masked, confidence, change, kept), given=given)


def randomly(g: torch.Generator, T: int, grid: int) -> Proposed:
    """States of T positions with numbers in steps of 1 / grid, so that many are equal, tau and a confidence too."""
    masked = torch.rand(64, T, generator=g) < torch.rand(64, 1, generator=g)
    masked[:2] = torch.tensor([[True], [False]])
    parts = torch.randint(0, grid + 1, (3, 64, T), generator=g).float() / grid
    never = torch.rand(64, T, generator=g) < torch.rand(64, 1, generator=g)
    return proposed_of(masked, parts[0].clamp(min=1 / grid), parts[1] - parts[2], parts[2].masked_fill(never, -1.0))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("T", [1, 2, 7, 33])
def test_a_step_is_as_specified(T: int, n: int) -> None:
    g, tally = torch.Generator().manual_seed(T), Counter[str]()
    for grid in (2, 8, 4096):
        proposed = randomly(g, T, grid)
        ours, truth = Saber(n).decide(proposed), Saber(n).reference(proposed)
        for field in ("tokens", "committed", "remaining"):
            assert getattr(ours, field).equal(getattr(truth, field)), field
        masks, left = proposed.candidate.sum(1), ours.remaining
        taken = (proposed.tokens != 9) & (ours.tokens == 9)
        assert ((left < masks) | (masks == 0)).all(), "a step gains"
        assert proposed.given is not None and not (taken & proposed.given).any()
        assert ours.tokens[~taken & ~proposed.candidate].eq(3).all()
        committed, undone = turn(proposed.memory, n)
        assert (committed.sum(1) >= masks.clamp(max=n)).all() and not undone[left == 0].any()
        tally["taken back"] += int(taken.sum())
        tally["at once"] += int((committed & undone).sum())
    if T == 33 and n < 9:
        assert min(tally["taken back"], tally["at once"]) > 20, tally


@pytest.mark.parametrize(
    ("n", "committed", "taken"), [(1, 1, 0), (1, 2, 1), (1, 17, 3), (2, 2, 1), (2, 9, 2), (3, 3, 1), (8, 8, 4)]
)
def test_how_many_are_taken_back(n: int, committed: int, taken: int) -> None:
    """Of 40 masks some are above tau, which is 0.5."""
    masked, kept = torch.ones(1, 41, dtype=torch.bool), torch.full((1, 41), -1.0)
    masked[0, 40], kept[0, 40] = False, 0.5
    confidence = torch.where(torch.arange(41) < (0 if committed == n else committed), 0.75, 0.5)[None]
    memory = Course(masked, confidence, torch.zeros(1, 41), kept)
    chosen, undone = turn(memory, n)
    assert chosen.nonzero()[:, 1].tolist() == list(range(committed))
    assert undone.nonzero()[:, 1].tolist() == list(range(taken))


class Masks:
    """A streamer that counts the masks of a block after every forward."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def put(self, value: Tensor) -> None: ...
    def end(self) -> None: ...

    def put_draft(self, value: Tensor) -> None:
        self.left.append(int((value == MASK).sum()))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_block_ends_within_as_many_forwards_as_positions(n: int) -> None:
    back = 0
    for seed in range(3):
        seen, settings = Masks(), {"max_new_tokens": 24, "block_length": 24, "stop_at_eos": False, "cache": "none"}
        out = exact_model(seed).generate(prompts(1, 5, seed), rule=Saber(n), streamer=seen, **settings)
        assert int(out.nfe) <= 24 and all(b < a for a, b in zip([24, *seen.left], seen.left, strict=False))
        *_, calls = by_hand(exact_model(seed), prompts(1, 5, seed), MASK, n, 24, 24, own=True)
        assert seen.left == [24 - sum(c - t for c, t in calls[: i + 1]) for i in range(len(calls))]
        back += sum(taken for _, taken in calls)
    assert back > 5


def test_given_tokens_stay() -> None:
    model, holes = exact_model(1), prompts(2, 24, 3)
    holes[:, [3, 4, 5, 6, 8, 9, 12, 14, 15, 17, 20, 22, 23]] = MASK
    for rule in (Saber(1), Saber(), Saber(4)):
        for drafts in (1, 3):
            out = model.infill(holes, rule=rule, block_length=9, drafts=drafts)
            assert out.sequences[holes != MASK].equal(holes[holes != MASK]) and not (out.sequences == MASK).any()


def test_drafts_save_forwards_where_nothing_is_taken_back() -> None:
    """What the n most confident are can be guessed; which tokens will have fallen back most, hardly."""
    model, settings = exact_model(2), {"max_new_tokens": 32, "block_length": 16, "stop_at_eos": False}
    for rule in (Saber(1), Saber(), Saber(6)):
        plain, drafted = (model.generate(prompts(1, 6), rule=rule, drafts=d, **settings) for d in (1, 4))
        assert drafted.sequences.equal(plain.sequences) and drafted.commit_step.equal(plain.commit_step)
        assert int(drafted.nfe) < int(plain.nfe) if rule.n == 1 else int(drafted.nfe) <= int(plain.nfe)


def test_positions_that_rank_last_commit_last() -> None:
    """With a prompt's end everywhere, whatever is surer."""
    model, lift = exact_model(0), torch.zeros(64)
    lift[EOS] = 5.0
    plain, (ids, mask) = model.project, left_pad([prompts(1, P, seed=P)[0] for P in (4, 9)])
    model.project = lambda hidden: plain(hidden) + lift
    settings: dict[str, Any] = {"rule": Saber(), "max_new_tokens": 16, "block_length": 16, "stop_at_eos": False}
    out = model.generate(ids, mask, confidence_eos_eot_inf=True, **settings)
    ends = out.sequences[:, -16:] == EOS
    assert ends.any(1).all() and not ends.all()
    first = out.commit_step.masked_fill(~ends, 99).amin(1)
    assert (first > out.commit_step.masked_fill(ends, -1).float().quantile(0.5, dim=1)).all()


def test_select_commits_the_n_most_confident() -> None:
    logits, tokens = 4 * torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(0)), torch.full((3, 9), 19)
    ours, plain = (fdpp.select(logits, tokens, rule=rule, mask_id=19) for rule in (Saber(3), fdpp.Quota(3)))
    assert ours.tokens.equal(plain.tokens)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, None])
def test_n_is_checked(n: Any) -> None:
    with pytest.raises(ValueError, match=r"Saber: expected n as an int of at least 1"):
        Saber(n)
