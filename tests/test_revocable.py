"""`Revocable`: any rule's commits, verified and taken back."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from small import MASK, exact, left_pad, prompts

import fdpp
from fdpp.decoding.arena import uncaptured
from fdpp.rules.dream import Drawn, LeastEntropy, Origin, TopkMargin
from fdpp.trace.record import record

INNER: list[tuple[fdpp.Rule, dict[str, Any]]] = [
    (fdpp.Quota(2), {}),
    (fdpp.Quota(), {"steps": 9}),
    (fdpp.Threshold(0.5), {}),
    (fdpp.Frechet(0.1, calibration=0.05), {}),
    (fdpp.EntropyBound(0.5), {}),
    (fdpp.Budget(0.6, 0.5, 0.2, 0.3), {}),
    (fdpp.Klass(0.3, 0.5, 1), {}),
    (fdpp.Credit(0.5), {}),
    (fdpp.Hierarchy(0.2, 0.6), {}),
    (TopkMargin(), {"steps": 8}),
    (LeastEntropy(2), {}),
    (Origin(), {"steps": 6}),
    (Drawn("maskgit_plus"), {"steps": 6}),
]
WAYS: list[dict[str, Any]] = [
    {"cache": "none"},
    {"cache": "dual"},
    {"cache": "prefix", "drafts": 3},
    {"cache": "dual", "engine": "static"},
    {"cache": "dual", "temperature": 0.7},
]
SIZES: dict[str, Any] = {"max_new_tokens": 18, "block_length": 8, "stop_at_eos": False, "seed": 5}


class Taken:
    """A streamer that counts tokens which become masks again."""

    def __init__(self) -> None:
        self.before: torch.Tensor | None = None
        self.count = 0

    def put(self, tokens: torch.Tensor) -> None:
        self.before = None

    def put_draft(self, tokens: torch.Tensor) -> None:
        if self.before is not None and self.before.shape == tokens.shape:
            self.count += int(((self.before != MASK) & (tokens == MASK)).sum())
        self.before = tokens.clone()

    def end(self) -> None:
        pass


def decode(rule: fdpp.Rule, family: str = "LLaDA", **more: Any) -> Any:
    model, ids = exact(family), left_pad([prompts(1, 4 + 3 * b, seed=b)[0] for b in range(2)])
    with uncaptured():
        out = model.generate(*ids, rule=rule, **SIZES | more)
    model.forget_captures()
    return out


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(("rule", "more"), INNER, ids=str)
def test_what_is_not_doubted_is_the_rule_s_own_decode(
    rule: fdpp.Rule, more: dict[str, Any], way: dict[str, Any]
) -> None:
    """Its memory, schedule, draws and order are those of the rule alone; to the bit, since no column sees a row."""
    ours, own = (decode(each, **more, **way) for each in (fdpp.Revocable(rule, below=0.0), rule))
    assert ours.sequences.equal(own.sequences) and ours.commit_step.equal(own.commit_step)
    assert ours.nfe.equal(own.nfe) and ours.confidence.equal(own.confidence)


@pytest.mark.parametrize("family", ["SDAR", "LLaDA2"])
def test_block_causal_models_verify_too(family: str) -> None:
    counts: list[int] = []
    for way in ({"cache": "dual"}, {"cache": "prefix", "sub_block_length": 2}, {"drafts": 2}, {"engine": "static"}):
        bold, taken = fdpp.Revocable(fdpp.EntropyBound(4.0), below=1.0), Taken()
        out = decode(bold, family, streamer=taken, **way)
        assert not (out.sequences == MASK).any() and int(out.nfe.max()) <= 18 + 8
        counts.append(taken.count)
    assert counts[0] == counts[2] == counts[3] > 2


def test_wide_in_is_a_threshold() -> None:
    """Without its cap WINO is a threshold whose tokens may go."""
    ours, theirs = (decode(rule) for rule in (fdpp.Revocable(fdpp.Threshold(0.3), 0.8), fdpp.Wino(0.3, 0.8, cap=None)))
    assert ours.sequences.equal(theirs.sequences) and ours.commit_step.equal(theirs.commit_step)


@pytest.mark.parametrize("at_most", [0, 1, 2, None])
def test_how_many_go_in_a_step(at_most: int | None) -> None:
    rule = fdpp.Revocable(fdpp.EntropyBound(9.0), below=1.0, at_most=at_most)
    config = fdpp.DiffusionGenerationConfig(rule=rule, max_new_tokens=16, block_length=16, stop_at_eos=False)
    trace = record(exact("LLaDA"), prompts(1, 6), config)
    most = max(len(step.taken) for step in trace.steps)
    assert most == at_most if at_most is not None else most > 2


def test_how_it_is_written() -> None:
    rule = fdpp.Revocable(fdpp.Threshold(0.7), below=0.8, at_most=3)
    assert fdpp.Revocable({"name": "Threshold", "tau": 0.7}, 0.8, 3) == rule and hash(rule) == hash(rule)
    assert fdpp.Revocable("balanced").rule == fdpp.Budget() and fdpp.Revocable().rule == fdpp.Frechet()
    saved = json.loads(json.dumps(rule.saved()))
    assert saved["rule"] == {"name": "Threshold", "tau": 0.7} and fdpp.Rule.of(saved) == rule
    config = fdpp.DiffusionGenerationConfig(rule=rule)
    assert fdpp.DiffusionGenerationConfig.from_dict(config.to_dict()).rule == rule
    assert rule.label() == "revocable threshold 0.7" or rule.label().startswith("revocable ")
    assert (rule.order, fdpp.Revocable(fdpp.EntropyBound()).order) == ("confidence", "entropy")


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (fdpp.Wino(), "takes tokens back itself"),
        (fdpp.Editing(), "takes tokens back itself"),
        (fdpp.Revocable(), "takes tokens back itself"),
        (fdpp.Dawn(), "reads attention"),
        ("none such", "expected a Rule, a name"),
    ],
    ids=str,
)
def test_what_it_does_not_take(inner: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fdpp.Revocable(inner)


def test_by_itself_it_is_the_rule() -> None:
    g = torch.Generator().manual_seed(0)
    logits, tokens = 6 * torch.randn(3, 7, 20, generator=g), torch.full((3, 7), 19)
    for rule, _ in INNER:
        if not rule.takes_steps():
            ours, own = (fdpp.select(logits, tokens, rule=each, mask_id=19) for each in (fdpp.Revocable(rule), rule))
            assert ours.tokens.equal(own.tokens)
