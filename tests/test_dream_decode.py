"""Complete published Dream decodes, reproduced by `generate` and `infill`: tokens, forwards and commit steps.

`data/dream/FORMAT.md` describes the runs; numbers in brackets are its sections. Runs that rounding can change (`stable`
false) are not compared. Calls that decide nothing, which Dream's schedule has, are left out of ours.

The published cached loops decide a block's first token unconditionally, since no row of theirs predicts it later [5].
Ours feed the column before the block, and the rule decides every position. `published_loops.imitated` makes ours do as
the published ones do, so that all else can be compared.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from golden import seen_by_rows
from golden_dream import MASK, PAD, PEERS, DreamRun, model, plain, runs, schedule_tables
from plain_dream import factor, frechet, plain_decode, threshold
from published_loops import (
    FirstFrechet,
    FirstLeastEntropy,
    FirstLeftToRight,
    FirstQuota,
    FirstThreshold,
    PublishedFactor,
    QuotaThreshold,
    Recorder,
    imitated,
)
from torch import Tensor

import fdpp
from fdpp.decoding import choice
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.rules.dream import schedule

RANKED = {"maskgit_plus": fdpp.MaskgitPlus, "topk_margin": fdpp.TopkMargin, "entropy": fdpp.LeastEntropy}
GIVEN = 7
"""Tokens of prompt `m`, whose other two positions are masks."""


class OfMasks:
    """Before a rule as a base: Dream's schedule for the masks of a text that starts with prompt `m`.

    In an infill ours is that of all positions from the first mask on.
    """

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[fdpp.Rule]:
        return super().successive(start, stop - GIVEN, length - GIVEN, steps)  # type: ignore[misc]


class MaskgitPlusOfMasks(OfMasks, fdpp.MaskgitPlus):
    pass


class TopkMarginOfMasks(OfMasks, fdpp.TopkMargin):
    pass


class LeastEntropyOfMasks(OfMasks, fdpp.LeastEntropy):
    pass


OF_MASKS = {"maskgit_plus": MaskgitPlusOfMasks, "topk_margin": TopkMarginOfMasks, "entropy": LeastEntropyOfMasks}


def with_masks(prompt: Tensor, new: int) -> Tensor:
    """The text `[B, P + new]` that a response is filled into."""
    return torch.cat((prompt, torch.full((len(prompt), new), MASK)), dim=1)


def cached(run: DreamRun) -> bool:
    """Whether the published loop has a cache."""
    return run.run["func"] in ("block", "baseline", "freedave")


def fills(run: DreamRun) -> bool:
    """Whether the published loop fills the masks of the prompt as well."""
    return run.run["prompt"] == "m" and not cached(run)


def rule_of(run: DreamRun) -> fdpp.Rule:
    params = run.run["params"]
    alg = params.get("alg")
    if run.peer == "freedave":
        tau = params["confidence_threshold"]
        if params["alg_temp"] == -1:
            return FirstLeftToRight(2.0 if tau is None else tau)
        return FirstQuota(1) if tau is None else FirstThreshold(tau)
    if params.get("frechet_margin") is not None:
        return FirstFrechet(params["frechet_margin"])
    if cached(run):
        blocks = run.new // (params["block_length"] or run.new)
        if alg == "confidence_threshold":
            return FirstThreshold(params["threshold"])
        return FirstLeastEntropy(params["steps"] // blocks)
    if alg in RANKED:
        return (OF_MASKS if fills(run) else RANKED)[alg](eps=params.get("eps", 1e-3))
    if alg == "confidence_threshold" and run.peer == "fastdllm":
        masks = run.new + int((run.prompt == MASK).sum())
        return QuotaThreshold(params["threshold"], masks // params["steps"], masks)
    if alg == "dawn":
        taus = {name: params[name] for name in ("tau_sink", "tau_edge", "tau_induce")}
        layers = 4 if run.run["model"] == "model_deep28" else 2
        return fdpp.Dawn(**taus, tau_low=params["conf_threshold"], layers=layers)
    return {
        "origin": lambda: fdpp.Origin(params.get("eps", 1e-3)),
        "confidence_threshold": lambda: fdpp.Threshold(params["threshold"]),
        "factor": lambda: PublishedFactor(params["factor"]),
        "local_leap": lambda: fdpp.LocalLeap(*(params[n] for n in ("conf_threshold", "relaxed_threshold", "radius"))),
        "klass": lambda: fdpp.Klass(params["conf_threshold"], params["kl_threshold"], 2),
    }[alg]()


@dataclass(frozen=True)
class Decode:
    """`step_of` `[B, L]` and `forwards` count the batch's forwards, `nfe` and `queries` those of each row."""

    sequences: Tensor
    step_of: Tensor
    forwards: int
    commit_step: Tensor
    nfe: Tensor
    queries: Tensor


def decode(
    run: DreamRun,
    rule: fdpp.Rule,
    prompt: Tensor | None = None,
    new: int | None = None,
    imitate: bool = True,
    **changes: Any,
) -> Decode:
    """Our decode of a run with a rule, and optionally of another prompt, length or with other settings."""
    params, dream = run.run["params"], model(run.run["model"])
    mask = run.attention_mask if prompt is None else None
    prompt = run.prompt if prompt is None else prompt
    recorder = Recorder(MASK)
    how: dict[str, Any] = {
        "rule": rule,
        "cache": ("dual" if params["dual_cache"] else "prefix") if cached(run) else "none",
        "block_length": params.get("block_length") or run.new,
        "steps": params["steps"] if rule.takes_steps() else None,
        "top_k": params.get("top_k", 50 if "max_new_tokens" in params else None),
        "top_p": params.get("top_p"),
        "stop_at_eos": False,
        "streamer": recorder,
        **changes,
    }
    with warnings.catch_warnings(), imitated() if cached(run) and imitate else contextlib.nullcontext():
        warnings.filterwarnings("ignore", "generate: the prompt holds masks")
        if fills(run):
            text = with_masks(prompt, run.new)
            how["block_length"] = how["block_length"] if run.peer == "dawn" else text.shape[1]
            out = dream.infill(text, **how)
            step_of = recorder.step_of.masked_fill(text != MASK, -1)
        else:
            out = dream.generate(prompt, attention_mask=mask, max_new_tokens=new or run.new, **how)
            step_of = torch.cat((torch.full_like(prompt, -1), recorder.step_of), dim=1)
    return Decode(out.sequences, step_of, recorder.forwards, out.commit_step, out.nfe, out.query_tokens)


@contextlib.contextmanager
def blocks_of_dawn(run: DreamRun) -> Iterator[None]:
    """In DAWN's loop the first block of an infill also holds the prompt."""
    P, T = run.prompt.shape[1], run.run["params"]["block_length"]
    with pytest.MonkeyPatch.context() as patch:
        if fills(run):
            ends = [P + T * (i + 1) for i in range(run.new // T)]
            blocks = list(zip([0, *ends[:-1]], ends, strict=True))
            patch.setattr(DiffusionGenerationConfig, "blocks", lambda config: blocks)
        yield


@functools.cache
def ours(peer: str, index: int) -> Decode:
    run = runs(peer)[index]
    drafts = run.run["params"].get("draft_steps", 1)
    more = {} if drafts == 1 else {"drafts": drafts, "branches": "tree" if is_tree(run) else "batch"}
    with blocks_of_dawn(run) if run.peer == "dawn" else contextlib.nullcontext():
        return decode(run, rule_of(run), **more)


def is_tree(run: DreamRun) -> bool:
    return run.run["params"]["draft_mode"] == "tree_attention"


def kind(run: DreamRun) -> str:
    """What is asked of a run, or why it cannot be compared."""
    facts, params = run.run, run.run["params"]
    if params.get("eager_acceptance_mode"):
        return "not offered: drafts across a block's end"
    if "error" in facts:
        if "AssertionError" in facts["error"]:
            return "refused by an assert"
        return "never ends" if "no end" in facts["error"] else "raises"
    if not facts["stable"]:
        return "unstable"
    if facts["masks_left"] > int((run.prompt == MASK).sum()) * cached(run):
        return "masks left"
    alg, B = params.get("alg"), len(run.prompt)
    if run.peer == "dream_v0" and B > 1:
        return "rows compete"
    if params.get("frechet_margin") is not None and not all(facts.get("rows_equal_batch1", [True])):
        return "rows disturb each other"
    if alg == "dawn":
        return "dawn, batch" if B > 1 else "dawn, padded" if run.attention_mask is not None else "dawn"
    if alg == "klass" and params["block_length"] < run.new and facts["n_forward"] < run.new:
        return "klass remembers over blocks"
    if alg == "origin" and params["steps"] > 1 and not cached(run):
        return "drawn"
    if params.get("top_p") is not None:
        return "ties"
    return "drafted" if facts["func"] == "freedave" else "reproduced"


def of_kind(*wanted: str) -> list[Any]:
    return [
        pytest.param(peer, index, id=run.id)
        for peer in PEERS
        for index, run in enumerate(runs(peer))
        if kind(run) in wanted
    ]


def in_order(step_of: Tensor) -> tuple[Tensor, int]:
    """`step_of` counted over the calls that decided something, and how many they are."""
    calls = step_of[step_of >= 0].unique()
    return torch.where(step_of >= 0, torch.searchsorted(calls, step_of), -1), len(calls)


def test_every_run_is_accounted_for() -> None:
    counts = {peer: Counter(map(kind, runs(peer))) for peer in PEERS}
    assert counts == {
        "dream": {"reproduced": 54, "drawn": 4, "ties": 2, "unstable": 3},
        "dream_v0": {"reproduced": 12, "unstable": 2, "rows compete": 8},
        "fastdllm": {
            "reproduced": 75,
            "unstable": 3,
            "refused by an assert": 6,
            "masks left": 2,
            "never ends": 2,
            "raises": 10,
        },
        "fastdllmpp": {"reproduced": 91, "rows disturb each other": 1, "never ends": 2, "raises": 6},
        "dawn": {
            "reproduced": 40,
            "dawn": 26,
            "dawn, batch": 4,
            "dawn, padded": 1,
            "klass remembers over blocks": 2,
            "unstable": 4,
            "never ends": 1,
        },
        "freedave": {"reproduced": 28, "drafted": 34, "not offered: drafts across a block's end": 6},
    }


def test_schedules() -> None:
    """Counts of every call, those of nothing included [9]."""
    tables = schedule_tables()
    assert len(tables) == 54
    for table in tables:
        assert list(schedule(table["masks"], table["steps"], table["eps"])) == table["counts"], table


@pytest.mark.parametrize("peer, index", of_kind("reproduced"))
def test_reproduced(peer: str, index: int) -> None:
    run, out = runs(peer)[index], ours(peer, index)
    assert out.sequences.equal(run.out)
    step_of, calls = in_order(run.step_of)
    assert out.step_of.equal(step_of)
    assert out.forwards == calls
    if len(run.prompt) == 1:
        decided = run.step_of[run.step_of >= 0].unique()
        assert out.nfe.tolist() == [calls]
        assert out.queries.tolist() == [int(run.calls[decided, 1].sum())]
    if not (run.peer.startswith("dream") or "entropy" in run.id or run.run["params"].get("alg") in RANKED):
        assert calls == run.run["n_forward"]
    if not fills(run):
        block_length = run.run["params"].get("block_length") or run.new
        commit_step, nfe = seen_by_rows(step_of[:, -run.new :], block_length)
        assert out.commit_step.equal(commit_step)
        assert out.nfe.equal(nfe)


def uniform_of(run: DreamRun) -> Tensor:
    """Numbers `[1, T]` by which `Origin` takes every position in the step in which the recorded draws take it [3].

    The positions are the response, and before it the prompt if that is filled as well.
    """
    steps, eps = run.run["params"]["steps"], run.run["params"].get("eps", 1e-3)
    text = with_masks(run.prompt, run.new)[0]
    step, masked, used = torch.zeros(len(text)), text == MASK, 0
    t = torch.linspace(1, eps, steps + 1)
    for i in range(steps):
        n = int(masked.sum())
        assert run.run["rand_sizes"][i] == n
        share = 1 - t[i + 1] / t[i] if i < steps - 1 else 1
        taken = masked.nonzero().flatten()[run.draws[used : used + n] < share]
        step[taken], masked[taken], used = i, False, used + n
    u = 1 - (step.double() + 0.5) * (1 - eps) / steps
    return u[None] if fills(run) else u[None, -run.new :]


@pytest.mark.parametrize("peer, index", of_kind("drawn"))
def test_drawn(peer: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the recorded draws in the place of ours."""
    run = runs(peer)[index]
    monkeypatch.setattr(choice, "uniform", lambda seeds, T: uniform_of(run))
    out = decode(run, rule_of(run), seed=0)
    step_of, calls = in_order(run.step_of)
    assert out.sequences.equal(run.out)
    assert out.step_of.equal(step_of)
    assert out.forwards == calls <= run.run["n_forward"]


@pytest.mark.parametrize("peer, index", of_kind("drafted"))
def test_drafts_are_lossless(peer: str, index: int) -> None:
    """FreeDave's decode in as many forwards; with a threshold its own drafts lead to another than its baseline's."""
    run, out = runs(peer)[index], ours(peer, index)
    baseline = undrafted(run)
    assert out.sequences.equal(baseline.sequences)
    assert out.commit_step.equal(baseline.commit_step)
    if run.run["params"]["confidence_threshold"] is None:
        assert out.sequences.equal(run.out)
        assert out.forwards == run.run["nfe"]
    assert out.forwards <= baseline.forwards


def undrafted(run: DreamRun) -> Decode:
    """The decode without drafts, that of the recorded baseline if there is one."""
    params = {name: value for name, value in run.run["params"].items() if name not in DRAFTING}
    for index, other in enumerate(runs(run.peer)):
        if other.run["prompt"] == run.run["prompt"] and other.run["params"] == params:
            return ours(run.peer, index)
    return decode(run, rule_of(run))


DRAFTING = ("draft_steps", "draft_mode", "eager_acceptance_mode")


def overwrites(run: DreamRun) -> list[tuple[int, int, int]]:
    """DAWN's fault: the calls after which position 0 is overwritten, what was there and what is then [6]."""
    return [(call, old, new) for call, _row, position, old, new in run.run.get("change_events", []) if position == 0]


def state_before(run: DreamRun, call: int) -> Tensor:
    """The text `[1, L]` that a call saw."""
    text = torch.where((run.step_of >= call), MASK, run.out)
    changes = overwrites(run)
    before = [new for at, _old, new in changes if at < call]
    if changes and text[0, 0] != MASK:
        text[0, 0] = before[-1] if before else changes[0][1]
    return text


def stretches(run: DreamRun) -> list[tuple[int, int]]:
    """First and last call of every stretch without a fault; the calls that overwrite position 0 end one."""
    ends = sorted({at + 1 for at, _old, _new in overwrites(run)} | {run.run["n_forward"]})
    return list(zip([0, *ends[:-1]], ends, strict=True))


@pytest.mark.parametrize("peer, index", of_kind("dawn"))
def test_dawn(peer: str, index: int) -> None:
    """Every call of it: from the prompt up to the first fault, and on from what each fault leaves [6]."""
    run = runs(peer)[index]
    P, T = run.prompt.shape[1], run.run["params"]["block_length"]
    for begin, end in stretches(run):
        text = state_before(run, begin)
        start = int((text[0] == MASK).nonzero()[0])
        ends = [P + T * (i + 1) - start for i in range(run.new // T)]
        blocks = [(max(stop - T, 0) if i else 0, stop) for i, stop in enumerate(ends) if stop > 0]
        recorder = Recorder(MASK)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DiffusionGenerationConfig, "blocks", lambda config, blocks=blocks: blocks)
            out = model(run.run["model"]).infill(
                text, rule=rule_of(run), cache="none", block_length=T, stop_at_eos=False, streamer=recorder
            )
        step_of = torch.cat((torch.full((1, start), -1), recorder.step_of), dim=1).masked_fill(text != MASK, -1)
        same = (run.step_of >= begin) & (run.step_of < end)
        assert step_of[same].equal(run.step_of[same] - begin)
        same[:, 0] &= not overwrites(run)
        assert out.sequences[same].equal(run.out[same])
        assert out.sequences[text != MASK].equal(text[text != MASK])
        if end == run.run["n_forward"]:
            assert recorder.forwards == end - begin


@pytest.mark.parametrize("peer, index", of_kind("ties"))
def test_nucleus_up_to_ties(peer: str, index: int) -> None:
    """A nucleus of one token has confidence 1, and such positions tie: which of them commit is an accident of `topk`.

    So the recorded calls are looked at one by one: ours propose the same tokens there, and none is less certain than
    one that had to wait.
    """
    run, ties = runs(peer)[index], 0
    top_p = run.run["params"]["top_p"]
    for call in range(run.run["n_forward"]):
        text, taken = state_before(run, call), run.step_of == call
        all_at_once = model("model_tiny").infill(
            text, rule=fdpp.Quota(128), cache="none", block_length=128, top_p=top_p, stop_at_eos=False
        )
        assert all_at_once.sequences[taken].equal(run.out[taken])
        p = nucleus(plain("model_tiny")(text)[0, :-1], top_p)
        masked = text[0, 1:] == MASK
        torch.testing.assert_close(all_at_once.confidence[0, 1:][masked], p.amax(1)[masked], rtol=0, atol=1e-4)
        certain = torch.cat((torch.zeros(1), p.amax(1) if run.run["params"]["alg"] != "entropy" else -entropy(p)))[None]
        waits = (text == MASK) & ~taken
        if waits.any() and taken.any():
            assert certain[taken].min() >= certain[waits].max() - 1e-5
            ties += bool(certain[taken].min() == certain[waits].max())
    assert ties > 0


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Probabilities `[n, V]` of the fewest most likely tokens that hold `top_p`."""
    p, order = logits.softmax(-1).sort(dim=-1, descending=True)
    kept = (p.cumsum(-1) - p <= top_p) * p
    return torch.zeros_like(p).scatter(1, order, kept / kept.sum(-1, keepdim=True))


def entropy(p: Tensor) -> Tensor:
    return -(p * (p + 1e-10).log()).sum(-1)


@pytest.mark.parametrize("peer, index", of_kind("unstable", "klass remembers over blocks"))
def test_what_is_not_compared_ends_all_the_same(peer: str, index: int) -> None:
    run, out = runs(peer)[index], ours(peer, index)
    given = run.prompt != MASK
    assert out.sequences[:, : run.prompt.shape[1]][given].equal(run.prompt[given])
    assert not (out.sequences[:, -run.new :] == MASK).any()


def rows_of(run: DreamRun) -> list[Tensor]:
    """The prompts of a batch, each without its padding."""
    return [row[row != PAD][None] if run.attention_mask is not None else row[None] for row in run.prompt]


SHIPPED = {
    FirstThreshold: lambda rule: fdpp.Threshold(rule.tau),
    FirstFrechet: lambda rule: fdpp.Frechet(max(rule.margin, 0.0)),
    FirstLeastEntropy: lambda rule: fdpp.LeastEntropy(),
    FirstQuota: lambda rule: fdpp.Quota(),
    QuotaThreshold: lambda rule: fdpp.Threshold(rule.tau),
    PublishedFactor: lambda rule: fdpp.Factor(rule.f),
}
"""The rules that fdpp has in the place of those imitated above."""


def is_faulty(run: DreamRun) -> bool:
    return kind(run) in FAULTY or (kind(run) == "dawn" and bool(overwrites(run)))


FAULTY = {
    "raises": "the cached loops, with a batch or with padding [5]",
    "never ends": "a threshold, whose loops write row 0 alone, or rows that undo each other [5, 6]",
    "refused by an assert": "lengths and steps that do not divide each other, or a batch [4, 5]",
    "masks left": "a schedule of one step [5]",
    "rows compete": "a quota that counts the masks of all rows [3]",
    "rows disturb each other": "a finished row that goes on selecting [5]",
    "dawn, batch": "rows that share a decision [6]",
    "dawn, padded": "a mask added to the attention scores [6]",
}
"""Runs that show a fault of the published code, by their kind."""


@pytest.mark.parametrize(
    "peer, index", [pytest.param(p, i, id=r.id) for p in PEERS for i, r in enumerate(runs(p)) if is_faulty(r)]
)
def test_no_published_fault_is_ours(peer: str, index: int) -> None:
    """The decode ends, no mask is left, no prompt is changed, and each row is what it would be alone."""
    run = runs(peer)[index]
    rule = rule_of(run)
    rule = SHIPPED.get(type(rule), lambda rule: rule)(rule)
    how = {"steps": run.run["params"].get("steps") if rule.takes_steps() else None, "imitate": False, "new": 40}
    out = decode(run, rule, **how)
    P, given = run.prompt.shape[1], run.prompt != MASK
    assert out.sequences[:, :P][given].equal(run.prompt[given])
    assert not (out.sequences[:, P:] == MASK).any()
    if len(run.prompt) > 1 or run.attention_mask is not None:
        for b, prompt in enumerate(rows_of(run)):
            alone = decode(run, rule, prompt, **how)
            assert alone.sequences[0, prompt.shape[1] :].equal(out.sequences[b, P:])
            assert alone.nfe[0] == out.nfe[b]


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_a_predicted_mask_id_is_never_committed(cache: str) -> None:
    """The published loops would not end [5]."""
    dream = copy.deepcopy(model("model_tiny"))
    prompt = runs("dream")[0].prompt
    with torch.no_grad():
        head = dream.get_output_embeddings().weight
        head[MASK] = 2 * head[dream(prompt).logits[0, -1].argmax()]
        assert (dream(prompt).logits.argmax(-1) == MASK).any()
    out = dream.generate(prompt, max_new_tokens=24, block_length=8, rule=fdpp.Threshold(0.9), cache=cache)
    assert not (out.sequences == MASK).any()


def test_rows_with_unequal_masks_are_all_filled() -> None:
    """Published quotas are those of the mean, so a row with more masks would keep some [3]."""
    rows = torch.cat((runs("dream")[0].prompt, runs("dream")[1].prompt))[:, :9]
    text = torch.cat((rows, torch.full((2, 16), MASK)), dim=1)
    text[1, 3:5] = MASK
    text[0, 3] = MASK
    how = {"rule": fdpp.MaskgitPlus(), "steps": 5, "cache": "none", "block_length": 32, "stop_at_eos": False}
    out = model("model_tiny").infill(text, **how)
    assert not (out.sequences == MASK).any()
    assert out.sequences[text != MASK].equal(text[text != MASK])
    for row in range(2):
        assert model("model_tiny").infill(text[row : row + 1], **how).sequences[0].equal(out.sequences[row])


PLAIN = {
    "threshold": (fdpp.Threshold(0.7), threshold(0.7)),
    "frechet": (fdpp.Frechet(0.25), frechet(0.25)),
    "factor": (fdpp.Factor(0.75), factor(0.75)),
}


@pytest.mark.parametrize("rule", PLAIN)
@pytest.mark.parametrize("cache, block_length", [("none", 16), ("prefix", 9), ("dual", 9), ("dual", 32)])
@pytest.mark.parametrize("how", [{}, {"engine": "static"}, {"drafts": 3}], ids=["eager", "static", "drafts"])
def test_our_own_loop_against_a_plain_one(rule: str, cache: str, block_length: int, how: dict[str, Any]) -> None:
    """Every position by the rule, and the column before a block is fed with it."""
    ours, choose = PLAIN[rule]
    how = {"block_length": block_length, "rule": ours, "cache": cache, "stop_at_eos": False, **how}
    for prompt in (runs("dream")[i].prompt for i in (0, 4, 5)):
        text = with_masks(prompt, 40)
        start = int((text[0] == MASK).nonzero()[0])
        expected = plain_decode(plain("model_tiny"), text[0], start, choose, block=block_length, cache=cache)
        out = model("model_tiny").infill(text, **how)
        assert out.sequences[0].equal(expected.sequence)
        assert out.commit_step[0].equal(expected.step_of)
        assert int(out.nfe) <= expected.forwards
        if "drafts" not in how:
            assert int(out.nfe) == expected.forwards
        if "drafts" not in how and "engine" not in how:
            assert int(out.query_tokens) == expected.queries


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_without_a_prompt(cache: str) -> None:
    """Position 0 has its own row, as there is none before it. All rows are alike at first: ties decide what commits."""
    out = model("model_tiny").generate(
        torch.zeros(1, 0, dtype=torch.int64), max_new_tokens=20, block_length=8, cache=cache, stop_at_eos=False
    )
    assert out.sequences.shape == (1, 20) and not (out.sequences == MASK).any()


def is_by_threshold(run: DreamRun) -> bool:
    return run.run["func"] == "block" and run.run["params"]["alg"] == "confidence_threshold"


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(index, id=run.id)
        for index, run in enumerate(runs("fastdllm"))
        if kind(run) == "reproduced" and is_by_threshold(run) and run.run["prompt"] in "am"
    ],
)
def test_the_plain_loop_as_published(index: int) -> None:
    """The oracle above, set to do as the published cached loops do, against their records."""
    run = runs("fastdllm")[index]
    params, P = run.run["params"], run.prompt.shape[1]
    out = plain_decode(
        plain("model_tiny"),
        with_masks(run.prompt, run.new)[0],
        P,
        threshold(params["threshold"]),
        block=params["block_length"] or run.new,
        cache="dual" if params["dual_cache"] else "prefix",
        first="alone",
        before=False,
    )
    assert out.sequence.equal(run.out[0])
    assert out.step_of.equal(run.step_of[0])
    assert (out.forwards, out.queries) == (run.run["n_forward"], int(run.calls[:, 1].sum()))
