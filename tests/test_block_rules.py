"""Rules of block-diffusion models: thresholds with a quota, from left to right, and tokens that change again."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from decoding import no_prompt
from small import MASK, exact_model, left_pad, prompts
from torch import Tensor

import fdpp
from fdpp import Editing, EntropySum, Leftmost, LeftmostRun, Quota, ThresholdLeftmost, ThresholdQuota
from fdpp.decoding.arena import uncaptured
from fdpp.rules import Needs

SIZE = 30


def committed(rule: fdpp.Rule, confidences: list[float | None]) -> list[int]:
    """The positions that a step commits; None is a token, NaN a position without usable logits."""
    logits, tokens = torch.zeros(1, len(confidences), SIZE), torch.full((1, len(confidences)), SIZE - 1)
    for t, c in enumerate(confidences):
        if c is None:
            tokens[0, t] = 5
        else:
            logits[0, t, 3] = torch.tensor(c * (SIZE - 1) / (1 - c)).double().log()
    return fdpp.select(logits, tokens, rule=rule, mask_id=SIZE - 1).committed[0].nonzero().flatten().tolist()


NAN = float("nan")


@pytest.mark.parametrize(
    ("rule", "confidences", "expected"),
    [
        (ThresholdQuota(0.5), [0.2, 0.6, 0.3, 0.7], [1, 3]),
        (ThresholdQuota(0.5), [0.2, 0.3, None, 0.1], [1]),
        (ThresholdQuota(0.5, 2), [0.2, 0.6, 0.3, 0.7], [1, 3]),
        (ThresholdQuota(0.5, 3), [0.2, 0.6, 0.3, 0.7], [1, 2, 3]),
        (ThresholdQuota(0.5, 9), [0.2, None, 0.3], [0, 2]),
        (ThresholdQuota(0.5, 2), [0.2, NAN, NAN], [0]),
        (Leftmost(), [None, 0.1, 0.9, 0.8], [1]),
        (Leftmost(2), [0.1, None, 0.9], [0]),
        (Leftmost(3), [None, 0.1, None, 0.9, 0.8], [1, 3]),
        (Leftmost(9), [0.1, 0.2, None, 0.3], [0, 1, 3]),
        (Leftmost(2), [NAN, 0.3, 0.4, 0.9], [1, 2]),
        (Leftmost(2), [None, NAN, NAN], [1]),
        (ThresholdLeftmost(0.5), [0.2, 0.6, 0.3, 0.7], [1, 3]),
        (ThresholdLeftmost(0.5), [0.2, 0.3, 0.4], [0]),
        (ThresholdLeftmost(0.5, 2), [0.2, None, 0.6, 0.3], [0]),
        (ThresholdLeftmost(0.5, 3), [0.2, 0.6, 0.3, 0.7], [0, 1, 2]),
        (ThresholdLeftmost(0.5, 2), [None, NAN, 0.3, 0.9], [2, 3]),
        (LeftmostRun(0.5), [0.6, 0.7, 0.4, 0.9], [0, 1]),
        (LeftmostRun(0.5), [0.4, 0.9, 0.9], [0]),
        (LeftmostRun(0.5), [0.6, None, 0.7, 0.2, 0.8], [0, 2]),
        (LeftmostRun(0.5), [None, 0.6, 0.7], [1, 2]),
        (LeftmostRun(0.5), [NAN, 0.6, 0.2], [1]),
        (LeftmostRun(0.5), [NAN, NAN], [0]),
        (EntropySum(0.0), [0.9, 0.99], [1]),
        (EntropySum(9.0), [0.9, None, 0.99], [0, 2]),
        (Editing(0.5), [0.2, None, 0.6, 0.7], [2, 3]),
    ],
    ids=str,
)
def test_positions_by_hand(rule: fdpp.Rule, confidences: list[float | None], expected: list[int]) -> None:
    assert committed(rule, confidences) == expected


@pytest.mark.parametrize("tau", [0.5, 0.8])
def test_equality_passes_a_run_and_no_strict_threshold(tau: float) -> None:
    """Two tokens alone, with c = 1/2; or five, the fifth part of the probability for each of the four others."""
    tokens, logits = torch.full((1, 3), 9), torch.full((1, 3, 10), -torch.inf)
    logits[0, :, 0] = 0.0
    if tau == 0.5:
        logits[0, :, 1] = 0.0
    else:  # r = 1/4 = four sixteenths, all exact in float32
        logits[0, :, 1:5] = torch.tensor(1.0 / 16.0).log()
    first, every = [[True, False, False]], [[True, True, True]]
    for rule, expected in (
        (ThresholdQuota(tau), first), (ThresholdLeftmost(tau), first), (LeftmostRun(tau), every),
        (ThresholdQuota(tau - 1e-6), every), (ThresholdLeftmost(tau - 1e-6), every), (LeftmostRun(tau + 1e-6), first),
    ):  # fmt: skip
        out = fdpp.select(logits, tokens, rule=rule, mask_id=9)
        assert out.committed.tolist() == expected, (rule, out.confidence)


def test_a_strict_threshold_is_exact_where_one_minus_a_cost_is_not() -> None:
    """All c of at least 0.01 that have few decimals and an r that float32 holds exactly."""
    accepts: Any = getattr(ThresholdQuota.predicate, "fn", ThresholdQuota.predicate)
    powers = [(2.0**j, 5.0**i) for i in range(5) for j in range(10)]
    found = [(part / whole, whole / part - 1.0) for part, whole in powers if part <= whole <= 100 * part]
    off = 0
    for c, r in found:
        cost = r / (1.0 + r)
        assert not accepts(2, cost, cost, 1.0, c) and accepts(2, cost, cost, 1.0, c - 1e-12), c
        assert ThresholdQuota(c).accepts([r], []) and not ThresholdQuota(c).accepts([r, r], []), c
        off += 1.0 - cost > c
    assert len(found) > 20 and off > 2


def test_none_follows_the_schedule() -> None:
    model, ids = exact_model(), prompts(1, 5)
    settings: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8, "steps": 6, "stop_at_eos": False}
    by_steps = model.generate(ids, rule=Leftmost(None), **settings)
    assert by_steps.commit_step.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5]]
    assert int(by_steps.nfe) == 6
    same = [
        (ThresholdQuota(1.0, None), Quota()), (ThresholdLeftmost(1.0, None), Leftmost(None)),
        (Editing(1.0, None, edit=1.0, post=0), Quota()),
    ]  # fmt: skip
    for rule, plain in same:
        for drafts in (1, 3):
            a, b = (model.generate(ids, rule=r, drafts=drafts, **settings) for r in (rule, plain))
            assert a.sequences.equal(b.sequences) and a.commit_step.equal(b.commit_step), (rule, drafts)
        with pytest.raises(ValueError, match=rf"{type(rule).__name__}: k is None"):
            rule.params()
    for rule, _ in same:
        config = fdpp.DiffusionGenerationConfig(rule=rule, steps=6)
        assert fdpp.DiffusionGenerationConfig.from_dict(config.to_dict()) == config
        with pytest.raises(ValueError, match="schedule"):
            fdpp.DiffusionGenerationConfig(rule=type(rule)(), steps=6)
    labels = [rule.label(steps) for rule in (Leftmost(), Leftmost(2), Leftmost(None)) for steps in (None, 4)]
    assert labels == ["leftmost"] * 2 + ["leftmost, 2 at once"] * 2 + ["leftmost", "leftmost, 4 steps"]
    assert ThresholdQuota(0.8, 2).label() == "threshold-quota 0.8, 2 at once"


def test_left_to_right_rules_decode_from_left_to_right() -> None:
    model, ids = exact_model(2), prompts(2, 5)
    settings: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8, "stop_at_eos": False}
    one = model.generate(ids, rule=Leftmost(), **settings)
    assert one.commit_step.equal(torch.arange(16).expand(2, -1))
    assert model.generate(ids, rule=LeftmostRun(1.0), **settings).sequences.equal(one.sequences)
    run = model.generate(ids, rule=LeftmostRun(0.4), **settings)
    assert (run.commit_step.diff(dim=1) >= 0).all() and (run.nfe < 16).all()
    whole = model.generate(ids, rule=LeftmostRun(0.0), **settings)
    assert whole.nfe.tolist() == [2, 2]


def edited_by_hand(target: Any, text: Tensor, rule: Editing, block: int) -> tuple[Tensor, Tensor, int, Counter[str]]:
    """LLaDA2.1's loop as published, without a cache: tokens, the step that last changed each, forwards, and a tally."""
    tokens, step_of, calls, tally = text.clone(), torch.full((len(text),), -1), 0, Counter[str]()
    given = text != MASK
    start = int((text == MASK).nonzero()[0])
    for first in range(start, len(text), block):
        columns, post = range(first, min(first + block, len(text))), 0
        while True:
            masks = [t for t in columns if tokens[t] == MASK]
            if not masks:
                post += 1
                if post > rule.post:
                    tally["out of looks"] += 1
                    break
            with torch.no_grad():
                p = target.project(target.model(tokens[None])[0]).double().softmax(-1)
            p[:, MASK] = 0.0
            c, x0 = p.max(-1)
            chosen = [t for t in masks if c[t] > rule.tau]
            if len(chosen) < rule.k:
                chosen = sorted(masks, key=lambda t: (-c[t].item(), t))[: rule.k]
            others = [t for t in columns if t not in masks and not given[t]]
            edits = [t for t in others if c[t] > rule.edit and x0[t] != tokens[t]]
            for t in (*chosen, *edits):
                tokens[t], step_of[t] = x0[t], calls
            calls += 1
            tally["edits beside masks" if masks else "edits"] += len(edits)
            if not masks and not edits:
                tally["settled"] += 1
                break
    return tokens, step_of, calls, tally


EDITS = (Editing(0.6, 1, 0.25), Editing(0.4, 2, 0.1, 2), Editing(0.5, 1, 0.2, 0), Editing(), Editing(0.7, 3, 0.3, 1))


def test_editing_is_its_published_loop() -> None:
    """Blocks of a response, and an infill whose given tokens never change."""
    tally: Counter[str] = Counter()
    settings: dict[str, Any] = {"block_length": 7, "cache": "none", "stop_at_eos": False}
    for seed, rule in enumerate(EDITS):
        target, ids = exact_model(seed), prompts(1, 5, seed)
        text = torch.cat((ids, torch.full((1, 18), MASK)), dim=1)
        holes = prompts(1, 24, seed)
        holes[0, [3, 4, 5, 6, 8, 9, 12, 14, 15, 17, 20, 22, 23]] = MASK
        for given, decode in (
            (text, partial(target.generate, ids, rule=rule, max_new_tokens=18, **settings)),
            (holes, partial(target.infill, holes, rule=rule, **settings)),
        ):
            tokens, step_of, calls, counted = edited_by_hand(target, given[0], rule, 7)
            tally += counted
            for drafts in (1, 3):
                out = decode(drafts=drafts)
                assert out.sequences[0].equal(tokens), rule
                assert out.commit_step[0].equal(step_of[-out.commit_step.shape[1] :]), rule
                assert int(out.nfe) == calls if drafts == 1 else int(out.nfe) <= calls
            with uncaptured():
                assert decode(engine="static").sequences[0].equal(tokens)
    assert min(tally[what] for what in ("edits", "edits beside masks", "settled", "out of looks")) > 2, tally


def test_editing_in_a_batch_looks_at_each_row_for_itself() -> None:
    model = exact_model(1)
    ids, mask = left_pad([prompts(1, P, seed=P)[0] for P in (3, 8, 5)])
    settings: dict[str, Any] = {"max_new_tokens": 14, "block_length": 7, "rule": EDITS[0], "cache": "dual"}
    out = model.generate(ids, mask, **settings)
    for b in range(3):
        alone = model.generate(ids[b : b + 1, mask[b] == 1], **settings)
        assert out.sequences[b, -14:].equal(alone.sequences[0, -14:]) and out.nfe[b] == alone.nfe[0]
    assert len(set(out.nfe.tolist())) > 1


def test_editing_reports_the_confidence_of_an_edit() -> None:
    model = exact_model(0)
    out = model.generate(no_prompt(), rule=EDITS[0], max_new_tokens=14, block_length=7, stop_at_eos=False)
    assert (out.confidence[0, -14:] > 0.0).all() and (out.commit_step >= 0).all()


def test_rules_say_what_they_need() -> None:
    assert Editing.revokes and Editing.needs == Needs(logits=True, block=True)
    kinds = (ThresholdQuota, ThresholdLeftmost, Leftmost, LeftmostRun, EntropySum)
    assert all(kind.needs == Needs() and not kind.revokes for kind in kinds)


def test_left_to_right_compiles_without_a_graph_break() -> None:
    logits, tokens = 4 * torch.randn(2, 16, 50), torch.full((2, 16), 49)
    step = fdpp.DenoisingStep(ThresholdLeftmost(0.5, 2), mask_id=49)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(logits, tokens), step(logits, tokens), strict=True):
        assert ours.equal(theirs)
