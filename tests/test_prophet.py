"""Prophet: LLaDA's schedule and its early exit, against the published decodes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import golden
import pytest
import torch
from further import recorded, runs
from small import MASK, exact_model, left_pad, prompts
from torch import Tensor

import fdpp
from fdpp import Prophet, Quota
from fdpp.rules import Proposed
from fdpp.rules.prophet import Gaps, gap
from fdpp.rules.quota import shares
from fdpp.selection import Selection

RUNS = {run["run"]: run for run in runs("prophet")}
NEVER = 1e9


def always(answer: int, k: int | None = None) -> Prophet:
    """Exits at the first forward of the answer's block."""
    return Prophet(k, answer, 0.0, 0.0, 0.0)


def by_hand(
    target: Any, prompt: Tensor, mask_id: int, rule: Prophet, length: int, block: int, steps: int, own: bool
) -> tuple[Tensor, Tensor, int]:
    """Tokens `[1, L]`, the forward that committed each, and the number of forwards.

    As published, or with an exit of the answer's `own` block.
    """
    P, calls, blocks = prompt.shape[1], 0, length // block
    tokens, step_of = torch.cat((prompt[0], torch.full((length,), mask_id))), torch.full((length,), -1)
    for start in range(0, length, block):
        for k in shares(block, steps // blocks):
            masks = [t for t in range(start, start + block) if tokens[P + t] == mask_id]
            if not masks:
                break
            with torch.no_grad():
                logits = target.project(target.model(tokens[None])[0])[P:]
            p = logits.softmax(-1)
            p[:, mask_id] = 0.0
            c, x0 = p.max(-1)
            top = logits.topk(2).values
            f, end = (calls + 1) / steps, start + block if own else length
            limit = rule.early if f < 0.33 else rule.mid if f < 0.67 else rule.late
            leads = (top[:, 0] - top[:, 1])[rule.answer : min(rule.answer + 5, end)]
            here = start <= rule.answer < end or not own
            out = here and bool(leads.mean() >= limit)
            masks.sort(key=lambda t: (-float(c[t]), t))
            chosen = masks if out else masks[:k]
            if out and not own:
                chosen = [t for t in range(length) if tokens[P + t] == mask_id]
            for t in chosen:
                tokens[P + t], step_of[t] = x0[t], calls
            calls += 1
            if out and not own:
                return tokens[None], step_of[None], calls
    return tokens[None], step_of[None], calls


def rule_of(params: dict[str, Any]) -> Prophet:
    return Prophet(None, params["answer_offset"], **params["early_exit_thresholds"])


@pytest.mark.parametrize("name", RUNS)
def test_the_published_decode(name: str) -> None:
    """As recorded where the response is one block. Where it has several: with the exit of one block."""
    params, (prompt, tokens, step_of) = RUNS[name]["params"], recorded("prophet", RUNS[name])
    length, block, steps = params["gen_length"], params["block_length"], params["steps"]
    settings: dict[str, Any] = {"max_new_tokens": length, "block_length": block, "steps": steps, "cache": "none"}
    model, rule, calls = golden.model("model_tiny"), rule_of(params), RUNS[name]["n_forward"]
    out = model.generate(prompt, rule=rule, stop_at_eos=False, **settings)
    if block < length:
        theirs, when, counted = by_hand(model, prompt, 500, rule, length, block, steps, own=False)
        assert theirs.equal(tokens) and when.equal(step_of) and counted == calls
        tokens, step_of, calls = by_hand(model, prompt, 500, rule, length, block, steps, own=True)
    assert out.sequences.equal(tokens) and out.commit_step.equal(step_of) and int(out.nfe) == calls


def test_what_the_published_decodes_cover() -> None:
    """All 54 are stable and exit. Of the 40 with several blocks one exits where the answer's block is the last."""
    tally: Counter[str] = Counter()
    for run in RUNS.values():
        params, exit_step = run["params"], run["exit_decision_step"]
        assert run["stable"] and run["early_exit_triggered"] and run["n_forward"] == exit_step
        length, block, answer = params["gen_length"], params["block_length"], params["answer_offset"]
        decoded, last = (exit_step - 1) * length // params["steps"] // block, length // block - 1
        if last == 0:
            tally["one block"] += 1
        elif decoded < last:
            tally["blocks that no step has looked at are filled"] += 1
        else:
            tally["the last block's exit" if answer // block == last else "exit by a finished block"] += 1
    assert tally == {
        "one block": 14,
        "blocks that no step has looked at are filled": 37,
        "exit by a finished block": 2,
        "the last block's exit": 1,
    }


def numbers_of(rules: list[fdpp.Rule]) -> list[tuple[float, ...]]:
    return [(*rule.params(), rule.calibration) for rule in rules]


def test_a_step_has_its_threshold_and_its_share() -> None:
    rule = Prophet(None, 5, 7.0, 5.0, 3.0)
    assert numbers_of(rule.successive(0, 100, 100, 100)) == [
        (1.0, 7.0 if f < 33 else 5.0 if f < 67 else 3.0, 5.0) for f in range(1, 101)
    ]
    blocks = [numbers_of(rule.successive(start, start + 4, 12, 6)) for start in (0, 4, 8)]
    assert blocks == [[(2.0, 7.0, 4.0), (2.0, 5.0, 4.0)], [(2.0, 5.0, 1.0), (2.0, 5.0, 1.0)], [(2.0, 3.0, 4.0)] * 2]
    uneven = numbers_of(rule.successive(0, 7, 7, 3))
    assert uneven == [(3.0, 5.0, 5.0), (2.0, 5.0, 5.0), (2.0, 3.0, 5.0)]
    fixed = numbers_of(Prophet(3, 0, 7.0, 5.0, 3.0).successive(4, 12, 12, None))
    assert fixed == [(3.0, 5.0, 8.0), (3.0, 3.0, 8.0), (3.0, 3.0, 8.0)]


@pytest.mark.parametrize("drafts", [1, 3])
@pytest.mark.parametrize(("block", "steps"), [(16, 16), (16, 5), (6, 9), (32, None)])
def test_without_an_answer_it_is_the_schedule(block: int, steps: int | None, drafts: int) -> None:
    model, (ids, mask) = exact_model(1), left_pad([prompts(1, P, seed=P)[0] for P in (3, 8)])
    settings: dict[str, Any] = {"max_new_tokens": 16, "block_length": block, "steps": steps, "drafts": drafts}
    plain = model.generate(ids, mask, rule=Quota(), **settings)
    for rule in (Prophet(answer=16, early=0.0, mid=0.0, late=0.0), Prophet(None, 3, NEVER, NEVER, NEVER)):
        out = model.generate(ids, mask, rule=rule, **settings)
        assert out.sequences.equal(plain.sequences) and out.commit_step.equal(plain.commit_step)
        assert out.nfe.equal(plain.nfe)


@pytest.mark.parametrize("answer", [0, 5, 6, 11, 13, 15])
def test_the_exit_is_that_of_the_answers_block(answer: int) -> None:
    """Blocks of 6, 6 and 4: its own takes one forward, the others one a position."""
    model, settings = exact_model(2), {"max_new_tokens": 16, "block_length": 6, "stop_at_eos": False}
    out, own = model.generate(prompts(1, 5), rule=always(answer), **settings), answer // 6
    steps = [len(set(block.tolist())) for block in out.commit_step[0].split(6)]
    assert steps == [1 if block == own else size for block, size in enumerate((6, 6, 4))]
    fast = model.generate(prompts(1, 5), rule=always(answer, k=4), **settings)
    assert int(fast.nfe) == 1 + sum(-(-size // 4) for block, size in enumerate((6, 6, 4)) if block != own)


def test_a_row_exits_by_itself() -> None:
    model, (ids, mask) = exact_model(3), left_pad([prompts(1, P, seed=P)[0] for P in (3, 8, 5)])
    settings: dict[str, Any] = {"max_new_tokens": 12, "block_length": 12, "rule": Prophet(None, 2, 1.5, 1.0, 0.8)}
    out = model.generate(ids, mask, **settings)
    for b in range(3):
        alone = model.generate(ids[b : b + 1, mask[b] == 1], **settings)
        assert out.sequences[b, -12:].equal(alone.sequences[0, -12:]) and out.nfe[b] == alone.nfe[0]
    assert len(set(out.nfe.tolist())) > 1


def test_an_answer_in_an_infill_is_counted_from_its_first_mask() -> None:
    model, holes = exact_model(1), prompts(1, 18)
    holes[0, [4, 5, 7, 8, 9, 10, 12, 13, 15]] = MASK
    out = model.infill(holes, rule=always(7), block_length=6)
    steps = [len({*block.tolist()} - {-1}) for block in out.commit_step[0, 4:].split(6)]
    assert steps == [5, 1, 0] and not (out.sequences == MASK).any()
    assert out.sequences[holes != MASK].equal(holes[holes != MASK])


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([3.0, 1.0, 2.0, 0.0], 1.0),
        ([3.0, 1.0, 2.0, 9.0], 1.0),
        ([3.0, 1.0, 2.0, 2.5], 1.0),
        ([2.0, 2.0, 1.0, 0.0], 0.0),
        ([-INF, 2.0, -INF, 1.0], INF),
        ([-INF, -INF, -INF, 1.0], NAN),
        ([NAN, 1.0, 0.0, 0.0], NAN),
    ],
    ids=str,
)
def test_the_gap(logits: list[float], expected: float) -> None:
    """The last id is the mask's."""
    for dtype in (torch.float32, torch.bfloat16):
        found = gap(torch.tensor([[logits]], dtype=dtype), 3)
        assert found.shape == (1, 1) and found.dtype == torch.float32
        assert torch.tensor([[expected]]).allclose(found, rtol=0, atol=0, equal_nan=True)


def test_a_gap_of_two_tokens() -> None:
    assert gap(torch.tensor([[0.0, 1.0]]), 1).item() == INF


@pytest.mark.parametrize("T", [1, 4, 9])
def test_a_step_is_as_specified(T: int) -> None:
    """Means equal to the threshold, regions cut and empty, nothing masked, numbers of one row for all."""
    g, exits = torch.Generator().manual_seed(T), Counter[bool]()
    for rows in (1, 48):
        masked = torch.rand(48, T, generator=g) < 0.6
        masked[0] = False
        leads = torch.randint(0, 3, (48, T), generator=g).float()
        leads[1:3], leads[3] = torch.tensor([[INF], [NAN]]), -0.0
        numbers = torch.stack([torch.randint(0, 3, (rows,), generator=g).double() for _ in range(3)], 1)
        numbers[:, 2] = torch.randint(0, T + 1, (rows,), generator=g)
        first = masked & (masked.cumsum(1) == 1)
        tokens = torch.where(masked, 9, 3)
        step = Selection(
            torch.where(first, 7, tokens), torch.where(masked, 7, 3), masked * 0.5, first, masked.sum(1), masked.sum(1)
        )
        proposed = Proposed(step, tokens, masked, 9, Gaps(leads), numbers=numbers)
        ours, truth = Prophet(1).decide(proposed), Prophet(1).reference(proposed)
        for field in ("tokens", "committed", "remaining"):
            assert getattr(ours, field).equal(getattr(truth, field)), field
        exits.update((ours.committed.sum(1) > 1).tolist())
    if T > 1:
        assert min(exits[True], exits[False]) > 5, exits


def test_select_commits_k() -> None:
    logits, tokens = 4 * torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(0)), torch.full((3, 9), 19)
    ours, plain = (fdpp.select(logits, tokens, rule=rule, mask_id=19) for rule in (always(0, k=3), Quota(3)))
    assert ours.tokens.equal(plain.tokens)
    with pytest.raises(ValueError, match="Prophet: k is None"):
        fdpp.select(logits, tokens, rule=Prophet(), mask_id=19)


def test_labels() -> None:
    labels = Prophet().label(), Prophet().label(8), Prophet(2, 30).label()
    assert labels == ("Prophet, answer at 0", "Prophet, answer at 0, 8 steps", "Prophet, answer at 30, 2 at once")


@pytest.mark.parametrize("wrong", [{"k": 0}, {"answer": -1}, {"answer": None}, {"early": -0.1}, {"late": INF}], ids=str)
def test_numbers_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Prophet: expected {next(iter(wrong))}"):
        Prophet(**wrong)
