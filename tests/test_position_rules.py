"""Rules that look beyond the sorted profile: LocalLeap at neighbours, Klass and Budget at the steps before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from golden import Trajectory, model, selector_case, selector_index, trajectories
from small import EOS, MASK, exact_model, prompts
from torch import Tensor

import fdpp
from fdpp.rules import MostConfident, Proposed, budget, klass
from fdpp.selection import Selection
from fdpp.step import reference

LEAP = "get_transfer_index_localleap"
LEAP_CASES = [case["id"] for case in selector_index() if case["group"] in ("std", "attn", "edge")]


@pytest.mark.parametrize("case_id", LEAP_CASES)
def test_localleap_selects_as_published(case_id: str) -> None:
    """Where no tie decides and the published code follows its rule, the same positions."""
    case = selector_case(case_id)
    tokens = torch.where(case.mask, case.mask_id, case.x)
    for r, run in enumerate(case.runs):
        if run["func"] != LEAP or run["slack"] == 0 or (case.argmax == case.mask_id)[case.mask].any():
            continue
        params = run["params"]
        rule = fdpp.LocalLeap(params["threshold"], params["relaxed_threshold"], params["radius"])
        rows = [b for b in range(len(tokens)) if b not in run["deviates_rows"] and case.mask[b].any()]
        for select in (reference.select, by_operator):
            out = select(case.logits, tokens, rule, case.mask_id, case.mask)
            assert out.committed[rows].equal(case.transfer_index[r][rows])
            assert out.tokens[rows].equal(torch.where(out.committed, case.argmax, tokens)[rows])
            assert out.remaining.equal((case.mask & ~out.committed).sum(1).int())


def by_operator(logits: Tensor, tokens: Tensor, rule: fdpp.Rule, mask_id: int, active: Tensor) -> fdpp.Selection:
    return fdpp.select(logits, tokens, rule=rule, mask_id=mask_id, active=active)


def leap_decodes() -> list[Any]:
    runs = [t for t in trajectories("dawn") if t.run["mode"] == "localleap"]
    assert len(runs) == 16 and all(t.run["stable"] for t in runs)
    return [pytest.param(t, id=t.id) for t in runs]


@pytest.mark.parametrize("trajectory", leap_decodes())
def test_localleap_decodes_as_published(trajectory: Trajectory) -> None:
    params = trajectory.run["params"]
    out = model(trajectory.run["model"]).generate(
        trajectory.prompt,
        max_new_tokens=64,
        block_length=params["block_length"],
        rule=fdpp.LocalLeap(params["threshold"], params["relaxed_threshold"], params["radius"]),
        cache="none",
        stop_at_eos=False,
    )
    assert out.sequences.equal(trajectory.out)
    if len(trajectory.out) == 1:
        assert out.nfe.item() == trajectory.run["nfe"]


@pytest.mark.parametrize("rule", [fdpp.LocalLeap(0.9, 0.0), fdpp.LocalLeap(0.0, 0.0, 0)], ids=str)
def test_localleap_leaves_unusable_positions_masked(rule: fdpp.LocalLeap) -> None:
    logits, tokens = torch.zeros(1, 4, 10), torch.full((1, 4), 9)
    logits[0, 1, 3], logits[0, 2] = 20.0, torch.nan
    assert fdpp.select(logits, tokens, rule=rule, mask_id=9).committed.tolist() == [[True, True, False, True]]


def test_localleap_of_no_positions() -> None:
    tokens = torch.empty(1, 0, dtype=torch.int64)
    assert fdpp.select(torch.randn(1, 0, 10), tokens, rule=fdpp.LocalLeap(), mask_id=9).committed.shape == (1, 0)


def test_localleap_takes_any_radius() -> None:
    logits, tokens = 4 * torch.randn(2, 16, 50), torch.full((2, 16), 49)
    wide = fdpp.select(logits, tokens, rule=fdpp.LocalLeap(0.5, 0.3, 2**40), mask_id=49)
    assert wide.committed.equal(reference.select(logits, tokens, fdpp.LocalLeap(0.5, 0.3, 16), 49).committed)


def test_localleap_compiles_without_a_graph_break() -> None:
    logits, tokens = 4 * torch.randn(2, 16, 50), torch.full((2, 16), 49)
    step = fdpp.DenoisingStep(fdpp.LocalLeap(0.5, 0.3, 2), mask_id=49)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(logits, tokens), step(logits, tokens), strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (lambda: fdpp.LocalLeap(threshold=1.1), "threshold"),
        (lambda: fdpp.LocalLeap(relaxed=-0.1), "relaxed"),
        (lambda: fdpp.LocalLeap(threshold=0.5, relaxed=0.6), "relaxed"),
        (lambda: fdpp.LocalLeap(radius=-1), "radius"),
        (lambda: fdpp.Klass(confidence=2.0), "confidence"),
        (lambda: fdpp.Klass(kl=0.0), "kl"),
        (lambda: fdpp.Klass(window=0), "window"),
        (lambda: fdpp.Klass(window=True), "window"),
    ],
)
def test_bad_settings_are_named(rule: Any, field: str) -> None:
    with pytest.raises(ValueError, match=f"expected {field}"):
        rule()


def test_divergence_is_that_of_float64() -> None:
    now, before = 3 * torch.randn(2, 5, 40), 3 * torch.randn(2, 5, 40)
    now[0, 0, 3] = -torch.inf
    p, q = now.double().softmax(-1), before.double().softmax(-1)
    expected = torch.where(p > 0, p * (p.log() - q.log()), 0.0).sum(-1)
    assert torch.allclose(klass.divergence(now, before).double(), expected, atol=1e-5)
    assert klass.divergence(now, now).abs().max() < 1e-6


def klass_by_hand(target: Any, ids: Tensor, rule: fdpp.Klass, length: int) -> tuple[Tensor, int]:
    """One block, no cache: the definition, one forward after the other."""
    tokens = torch.cat((ids, torch.full((1, length), MASK)), dim=1)
    before, count, forwards = None, torch.zeros(length), 0
    while (tokens == MASK).any():
        with torch.no_grad():
            logits = target.project(target.model(tokens)[0, ids.shape[1] :]).double()
        forwards += 1
        if before is not None:
            p, q = logits.softmax(-1), before.softmax(-1)
            count = torch.where((p * (p.log() - q.log())).sum(-1) < rule.kl, count + 1, 0)
        before = logits
        p = logits.softmax(-1)
        p[:, MASK] = 0.0
        confidence, proposal = p.max(-1)
        masked = tokens[0, ids.shape[1] :] == MASK
        ready = masked & (confidence >= rule.confidence) & (count >= rule.window)
        if not ready.any():
            ready[torch.where(masked, confidence, -1.0).argmax()] = True
        tokens[0, ids.shape[1] :][ready] = proposal[ready]
    return tokens, forwards


@pytest.mark.parametrize("rule", [fdpp.Klass(0.3, 0.5, 1), fdpp.Klass(0.2, 2.0, 2), fdpp.Klass()], ids=str)
def test_klass_is_its_definition(rule: fdpp.Klass) -> None:
    for seed in range(3):
        target, ids = exact_model(seed), prompts(1, 6, seed)
        expected, forwards = klass_by_hand(target, ids, rule, 14)
        out = target.generate(ids, rule=rule, max_new_tokens=14, block_length=14, cache="none", stop_at_eos=False)
        assert out.sequences.equal(expected)
        assert out.nfe.item() == forwards


def budget_by_hand(target: Any, ids: Tensor, rule: fdpp.Budget, length: int) -> tuple[Tensor, int, int, int]:
    """One block, no cache: the definition, one forward after the other; how often one more was taken, and waited."""
    tokens = torch.cat((ids, torch.full((1, length), MASK)), dim=1)
    before: list[float] | None = None
    forwards = more = waited = 0
    while (tokens == MASK).any():
        with torch.no_grad():
            p = target.project(target.model(tokens)[0, ids.shape[1] :]).double().softmax(-1)
        forwards += 1
        p[:, MASK] = 0.0
        c, proposal = p.max(-1)
        masked = [t for t in range(length) if tokens[0, ids.shape[1] + t] == MASK]
        profile = sorted(masked, key=lambda t: (-c[t].item(), t))
        n = 0
        while n < len(profile) and c[profile[n]] >= rule.sure and sum(1 - c[t] for t in profile[:n]) <= rule.budget:
            n += 1
        taken, rest = profile[: max(n, 1)], profile[max(n, 1) :]
        if before is not None and rest and sum(1 - c[t] for t in taken) <= rule.budget and c[rest[0]] >= rule.floor:
            rising = c[rest[0]] - before[rest[0]] > rule.rise
            waited += rising
            more += not rising
            taken = taken if rising else [*taken, rest[0]]
        for t in taken:
            tokens[0, ids.shape[1] + t] = proposal[t]
        before = c.tolist()
    return tokens, forwards, more, waited


@pytest.mark.parametrize(
    "rule",
    [fdpp.Budget(0.9, 0.5, 0.1, 0.02), fdpp.Budget(0.6, 0.5, 0.2, 1.0), fdpp.Budget(9.0, 1.0, 0.0, 0.0)],
    ids=str,
)
def test_budget_is_its_definition(rule: fdpp.Budget) -> None:
    more = waited = 0
    for seed in range(4):
        target, ids = exact_model(seed), prompts(1, 6, seed)
        expected, forwards, taken, rose = budget_by_hand(target, ids, rule, 14)
        out = target.generate(ids, rule=rule, max_new_tokens=14, block_length=14, cache="none", stop_at_eos=False)
        assert out.sequences.equal(expected)
        assert out.nfe.item() == forwards
        more, waited = more + taken, waited + rose
    assert more > 2 and (waited > 0 or rule.rise == 1.0)


def test_budget_takes_the_lower_of_equals_and_none_that_is_unusable() -> None:
    rule, tokens = fdpp.Budget(1.0, 0.9, 0.2, 0.1), torch.full((1, 5), 9)
    logits = torch.zeros(1, 5, 10)
    logits[0, 0, 3], logits[0, 1:3, 4] = 20.0, 2.0
    logits[0, 3:] = torch.nan
    step = fdpp.select(logits, tokens, rule=rule, mask_id=9)
    assert step.committed.tolist() == [[True, False, False, False, False]]
    calm = budget.Trend(torch.zeros(1, 5), torch.zeros(1, 5, dtype=torch.bool))
    decided = rule.decide(Proposed(step, tokens, tokens == 9, 9, calm))
    assert decided.committed.tolist() == [[True, True, False, False, False]]
    rising = calm._replace(rising=torch.tensor([[False, True, False, False, False]]))
    waits = rule.decide(Proposed(step, tokens, tokens == 9, 9, rising))
    assert waits.committed.equal(step.committed), "the next of the profile is worth the wait, not the one after it"
    logits[0, 1:3] = torch.nan
    step = fdpp.select(logits, tokens, rule=fdpp.Budget(1.0, 0.9, 0.0, 1.0), mask_id=9)
    none = fdpp.Budget(1.0, 0.9, 0.0, 1.0).decide(Proposed(step, tokens, tokens == 9, 9, calm))
    assert none.committed.equal(step.committed)


def test_alone_budget_is_its_sure_prefix() -> None:
    logits, tokens = 3 * torch.randn(2, 8, 30), torch.full((2, 8), 29)
    logits[0, :4, 5] = 12.0
    out = fdpp.select(logits, tokens, rule=fdpp.Budget(9.0, 0.9, 0.0, 1.0), mask_id=29)
    assert out.committed.equal(fdpp.select(logits, tokens, rule=fdpp.Threshold(0.9), mask_id=29).committed)
    assert fdpp.select(logits, tokens, rule=fdpp.Budget(0.0), mask_id=29).committed.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    "rule",
    [fdpp.Klass(0.2, 2.0, 2), fdpp.LocalLeap(0.5, 0.3, 2), fdpp.Budget(0.6, 0.5, 0.2, 0.3), fdpp.Dawn()],
    ids=str,
)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("branches", ["batch", "tree"])
def test_drafts_are_lossless(rule: fdpp.Rule, cache: str, branches: str) -> None:
    target, ids = exact_model(5), prompts(2, 6)
    if isinstance(rule, fdpp.Dawn):
        target = model("model_tiny")
    settings = {"rule": rule, "cache": cache, "max_new_tokens": 18, "block_length": 9, "eos_token_id": EOS}
    base = target.generate(ids, **settings)
    out = target.generate(ids, drafts=4, branches=branches, **settings)
    assert out.sequences.equal(base.sequences) and out.commit_step.equal(base.commit_step)
    assert (out.nfe <= base.nfe).all()


def test_alone_klass_is_its_fallback() -> None:
    logits, tokens = torch.randn(2, 8, 30), torch.full((2, 8), 29)
    out = fdpp.select(logits, tokens, rule=fdpp.Klass(), mask_id=29)
    assert out.committed.equal(fdpp.select(logits, tokens, rule=fdpp.Quota(1), mask_id=29).committed)


@dataclass(frozen=True)
class Watching(MostConfident, fdpp.Rule):
    """Keeps what it is told of given tokens."""

    seen: ClassVar[list[Any]] = []

    def decide(self, proposed: Proposed) -> Selection:
        self.seen.append((proposed.given, proposed.block, proposed.tokens))
        return proposed.step


@pytest.mark.parametrize("drafts", [1, 3])
def test_a_rule_sees_which_tokens_were_given(drafts: int) -> None:
    """Those of an infill, in every state of every draft, whatever was decided in the meantime."""
    model, text = exact_model(), prompts(1, 20, seed=4)
    text[0, [3, 4, 5, 8, 9, 12, 15, 16, 19]] = MASK
    Watching.seen.clear()
    model.infill(text, rule=Watching(), block_length=6, drafts=drafts, cache="none", stop_at_eos=False)
    assert len(Watching.seen) >= 9 and any(len(tokens) > 1 for _, _, tokens in Watching.seen) == (drafts > 1)
    for given, block, tokens in Watching.seen:
        assert given.equal((text[:, block] != MASK).expand_as(tokens))
    Watching.seen.clear()
    model.generate(prompts(1, 4), rule=Watching(), max_new_tokens=6, block_length=3, stop_at_eos=False)
    assert not any(given.any() for given, _, _ in Watching.seen), "the prompt is before the block"
    fdpp.select(torch.zeros(1, 2, 10), torch.full((1, 2), 9), rule=Watching(), mask_id=9)
    assert Watching.seen[-1][:2] == (None, None)
