"""Complete published block-diffusion decodes, reproduced by `generate`: tokens, commit steps, forwards and edits.

`data/block/FORMAT.md` describes the runs; numbers in brackets are its sections. Runs that rounding can change (`stable`
false) are not compared. Ours count the forwards that decide: what is stored of a block comes with the next block's
first forward, where the published loops have a call of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from golden_block import DATA, FAMILIES, BlockRun, runs
from plain_dream import PlainDream
from plain_fast_dllm import PlainBlocks, plain_blocks
from published_block import PipelineEditing
from torch import Tensor
from transformers import TemperatureLogitsWarper

import fdpp

MODELS = {"sdar": "SDARModelLM", "llada2": "LLaDA2ModelLM", "fastdllm2": "FastDLLMModelLM"}
EOS = {"sdar": 301, "llada2": 271, "fastdllm2": 271}


@functools.cache
def model(family: str) -> Any:
    return getattr(fdpp, MODELS[family]).from_pretrained(DATA / family / "model_tiny").eval()


def rule_of(run: BlockRun, row: int) -> fdpp.Rule:
    params, facts = run.settings(row), run.facts
    match run.peer:
        case "sdar" | "jetengine":
            strategy = params["remasking_strategy"]
            tau = params.get(
                "confidence_threshold", params.get("dynamic_threshold", 0.9 if run.peer == "jetengine" else 0.85)
            )
            # In `postprocess_loop`, which nobody reaches, the two are alike [3].
            most_confident = run.peer == "sdar" or facts["postprocess"] == "postprocess_loop"
            return {
                "low_confidence_static": lambda: fdpp.Quota(),
                "sequential": lambda: fdpp.Leftmost(None),
                "low_confidence_dynamic": lambda: (fdpp.ThresholdQuota if most_confident else fdpp.ThresholdLeftmost)(
                    tau, None
                ),
                "entropy_bounded": lambda: fdpp.EntropySum(params["eb_threshold"]),
            }[strategy]()
        case "freedave":
            tau = params["confidence_threshold"]
            if params["alg_temp"] == -1:
                return fdpp.Leftmost(1) if tau is None else fdpp.LeftmostRun(tau)
            return fdpp.Quota(1) if tau is None else fdpp.Threshold(tau)
        case "llada20":
            return fdpp.ThresholdQuota(min(params["threshold"], 1.0), None)
        case "llada21":
            k, post = params.get("num_to_transfer", 1), params["max_post_steps"]
            return fdpp.Editing(params["threshold"], k, params["editing_threshold"], post)
        case "diffusers":
            if not params["editing_threshold"]:
                return fdpp.ThresholdQuota(params["threshold"], None)
            # The schedule's first share is enough: after the others no more masks are left than theirs.
            steps, post = params["num_inference_steps"], params["max_post_steps"] + 1
            k = -(-run.block_length // steps)
            return PipelineEditing(params["threshold"], k, params["editing_threshold"], post, steps=steps)
        case "dinfer":
            named = facts["decoder_params"]
            if facts["decoder"] == "hierarchy":
                high = 1.0 if named["threshold"] is None else named["threshold"]
                return fdpp.Hierarchy(named.get("low_threshold", 0.0), high)
            kind = fdpp.Credit if facts["decoder"] == "credit" else fdpp.Threshold
            return kind(named["threshold"])
        case _:
            return fdpp.ThresholdQuota(params["threshold"], 1)


def steps_of_block(run: BlockRun, row: int) -> int:
    """The steps of a block's schedule."""
    params = run.settings(row)
    if run.peer == "llada20":
        return min(params["steps"], run.new // params.get("minimal_topk", 1))
    return params.get("denoising_steps", params.get("num_inference_steps"))


def cache_of(run: BlockRun) -> str:
    if run.peer in ("llada20", "llada21", "diffusers") or run.facts.get("cache") is False:
        return "none"
    return "prefix"


@dataclass(frozen=True)
class Decode:
    """`tokens`, `commit_step` and `confidence` `[L]` of every row without its padding, its forwards and fed columns."""

    tokens: list[Tensor]
    commit_step: list[Tensor]
    confidence: list[Tensor]
    nfe: list[int]
    queries: list[int]


@functools.cache
def decoded(family: str, prompts: tuple[tuple[int, ...], ...], temperature: float, how: tuple[Any, ...]) -> Decode:
    """Our decode of `prompts` with the settings `how`, names and values."""
    n = max(map(len, prompts))
    pads = [n - len(prompt) for prompt in prompts]
    input_ids = torch.tensor([(EOS[family],) * k + prompt for prompt, k in zip(prompts, pads, strict=True)])
    mask = torch.tensor([[0] * k + [1] * (n - k) for k in pads]) if any(pads) else None
    processors = [] if temperature in (0.0, 1.0) else [TemperatureLogitsWarper(temperature)]
    settings = {k: list(v) if isinstance(v, tuple) else v for k, v in how}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "generate: the prompt holds masks")
        out = model(family).generate(input_ids, attention_mask=mask, logits_processor=processors, **settings)
    none = torch.full((n,), -1)
    return Decode(
        tokens=[out.sequences[i, k:] for i, k in enumerate(pads)],
        commit_step=[torch.cat((none[k:], out.commit_step[i])) for i, k in enumerate(pads)],
        confidence=[torch.cat((none[k:].float(), out.confidence[i])) for i, k in enumerate(pads)],
        nfe=out.nfe.tolist(),
        queries=out.query_tokens.tolist(),
    )


def decode(run: BlockRun, rows: list[int] | None = None, **changes: Any) -> Decode:
    """Our decode of a run, of some of its rows or with other settings."""
    rows = list(range(len(run.prompts))) if rows is None else rows
    params, family, rule = run.settings(rows[0]), FAMILIES[run.peer], rule_of(run, rows[0])
    new = max(run.canvas(row) - len(run.prompts[row]) for row in rows)
    how: dict[str, Any] = {
        "rule": rule,
        "cache": cache_of(run),
        "block_length": run.block_length,
        "sub_block_length": params.get("small_block_size"),
        "max_new_tokens": new,
        "steps": math.ceil(steps_of_block(run, rows[0]) * new / run.block_length) if rule.takes_steps() else None,
        "top_k": params.get("top_k") if run.peer == "sdar" else None,
        "top_p": params.get("top_p") if run.peer == "sdar" else None,
        "stop_at_eos": False,
        "mask_token_id": run.mask,
        "pad_token_id": EOS[family],
        "eos_token_id": EOS[family],
        **changes,
    }
    prompts = tuple(tuple(run.prompts[row].tolist()) for row in rows)
    settings = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in how.items())
    return decoded(family, prompts, params.get("temperature", 1.0), settings)


def joined(decodes: list[Decode]) -> Decode:
    fields = (f.name for f in dataclasses.fields(Decode))
    return Decode(**{name: [row for decode in decodes for row in getattr(decode, name)] for name in fields})


@functools.cache
def ours(peer: str, index: int) -> Decode:
    run = runs(peer)[index]
    if any(run.settings(row) != run.settings(0) for row in range(len(run.prompts))):
        return joined([decode(run, [row]) for row in range(len(run.prompts))])
    return decode(run)


def is_drafted(run: BlockRun) -> bool:
    return run.peer == "freedave" and run.facts["mode"] == "freedave"


def kind(run: BlockRun) -> str:
    """What is asked of a run, or why it cannot be compared."""
    facts, params = run.facts, run.params
    if params.get("eager_acceptance_mode"):
        return "not offered: drafts across a block's end"
    if "error" in facts:
        return "raises"
    if not facts["stable"]:
        return "unstable"
    if facts.get("tie_overwrites"):
        return "overwrites decided tokens"
    if facts.get("sampling") == "multinomial" and params["top_k"] != 1:
        return "drawn"
    if params.get("repetition_penalty") or facts.get("diversity_enforce"):
        return "not offered: a penalty, a rule for some tokens"
    if run.peer == "jetengine" and facts["masks_left"]:
        return "masks left"
    if not run.alone:
        return "rows edit on together"
    if not any(decided(run, row).any() for row in run.alone):
        return "ends while its first block is edited"
    if facts.get("loop") == "dualdiffusion":
        return "a stale block cache"
    if run.peer == "generate" and len(run.prompts[0]) == run.block_length:
        return "prompt not seen"
    if run.peer == "generate" and run.block_length > 32:
        return "blocks of 32 in a block of 64"
    if params.get("use_block_cache"):
        return "block cache" if run.peer == "generate" and params["stop_token"] == -1 else "block cache, not compared"
    return "drafted" if is_drafted(run) else "reproduced"


def of_kind(*wanted: str) -> list[tuple[str, int]]:
    return [(peer, index) for peer in FAMILIES for index, run in enumerate(runs(peer)) if kind(run) in wanted]


def peers_of(*wanted: str) -> list[str]:
    return [peer for peer in FAMILIES if any(kind(run) in wanted for run in runs(peer))]


def test_every_run_is_accounted_for() -> None:
    counts = {peer: dict(Counter(map(kind, runs(peer)))) for peer in FAMILIES}
    assert counts == {
        "sdar": {"reproduced": 62, "unstable": 3, "overwrites decided tokens": 11, "drawn": 4, "raises": 4},
        "jetengine": {"reproduced": 84, "masks left": 10, "not offered: a penalty, a rule for some tokens": 3},
        "freedave": {"reproduced": 31, "drafted": 48, "not offered: drafts across a block's end": 6, "raises": 3},
        "llada20": {"reproduced": 42, "unstable": 1},
        "llada21": {"reproduced": 41, "unstable": 2},
        "diffusers": {
            "reproduced": 29,
            "rows edit on together": 2,
            "ends while its first block is edited": 4,
            "unstable": 2,
        },
        "dinfer": {"reproduced": 41, "raises": 2},
        "generate": {
            "reproduced": 26,
            "block cache": 22,
            "block cache, not compared": 2,
            "a stale block cache": 3,
            "prompt not seen": 2,
            "blocks of 32 in a block of 64": 1,
        },
        "batch_sample": {"reproduced": 16, "block cache, not compared": 12},
    }
    skipped = [row for peer, index in of_kind("reproduced") for row in others(runs(peer)[index])]
    assert len(skipped) == 9


def others(run: BlockRun) -> list[int]:
    """Rows that a reproduced batch made other than they are alone."""
    return [row for row in range(len(run.prompts)) if row not in run.alone]


def decided(run: BlockRun, row: int) -> Tensor:
    """Which columns `[L]` hold what the run decided and ours decide too."""
    n, out, T = len(run.prompts[row]), run.out[row], run.block_length
    columns = torch.arange(len(out))
    same = run.step_of[row] >= 0 if run.step_of else (columns >= n) & (out != run.mask)
    if not run.step_of and run.stops:
        same &= columns <= end(out, n, run.stops)
    if run.peer == "diffusers":
        # Columns behind what was asked for are hidden there as keys, so a last block with some is another [5].
        same &= columns < (n + run.new) // T * T
        if run.facts["masks_left"]:
            # It ended within its last block, whose tokens ours go on to edit.
            same &= columns < int(columns[run.step_of[row] >= 0][-1]) // T * T
    if run.peer == "dinfer" and run.stops and run.facts["early_stop"]:
        # The columns behind its block are EOS.
        same &= columns < (end(out, n, run.stops) // T + 1) * T
    if run.peer == "jetengine" and run.facts["masks_left"] and (out == run.mask).any():
        same &= columns < int((out == run.mask).nonzero()[0]) // T * T
    return same & (columns < run.canvas(row))


def end(tokens: Tensor, n: int, stops: list[int]) -> int:
    """The column of the first of `stops` from column `n` on, or the last one."""
    found = torch.isin(tokens[n:], torch.tensor(stops)).nonzero()
    return n + int(found[0]) if len(found) else len(tokens) - 1


def check(run: BlockRun, out: Decode) -> None:
    """Tokens and commit steps of what was decided, and the forwards where that is all."""
    for row in run.alone:
        n, same = len(run.prompts[row]), decided(run, row)
        expected, L = run.out[row], min(len(same), run.canvas(row))
        assert out.tokens[row][:L][same[:L]].equal(expected[:L][same[:L]]), run.id
        assert out.tokens[row][:n].equal(expected[:n]), run.id
        if not run.step_of or (run.edits_tokens and len(run.prompts) > 1):
            continue
        commit_step, behind = run.commit_step(row)[n:L], same[n:L]
        assert out.commit_step[row][n:L][behind].equal(commit_step[behind]), run.id
        if behind.sum() == run.canvas(row) - n == len(out.tokens[row]) - n:
            calls = run.facts["n_forward"] if run.edits_tokens else int(commit_step.max()) + 1
            assert out.nfe[row] == calls, run.id


def of_peer(peer: str, *wanted: str) -> Iterator[tuple[BlockRun, Decode]]:
    for index, run in enumerate(runs(peer)):
        if kind(run) in wanted:
            yield run, ours(peer, index)


@pytest.mark.parametrize("peer", peers_of("reproduced", "masks left"))
def test_reproduced(peer: str) -> None:
    for run, out in of_peer(peer, "reproduced", "masks left"):
        check(run, out)


def fed(run: BlockRun) -> int | None:
    """The columns that ours feed, where the published calls say so; the last commit call is none of ours."""
    columns = int(run.calls[:, 1].sum())
    if len(run.prompts) > 1 or len(run.out[0]) < run.canvas(0) or run.facts["masks_left"]:
        return None
    if run.peer in ("llada20", "llada21"):
        return columns
    if run.peer in ("sdar", "jetengine", "freedave", "generate", "batch_sample"):
        return columns - run.block_length
    return None


def test_columns_fed() -> None:
    """A block's commit call costs its columns there, the next block's first forward as many more here."""
    compared: Counter[str] = Counter()
    for peer in FAMILIES:
        for run, out in of_peer(peer, "reproduced"):
            if (columns := fed(run)) is not None:
                compared[peer] += 1
                assert out.queries == [columns], run.id
    assert compared == {
        "sdar": 56,
        "jetengine": 32,
        "freedave": 28,
        "llada20": 36,
        "llada21": 38,
        "generate": 24,
        "batch_sample": 4,
    }


def test_confidences() -> None:
    """JetEngine's, at commit."""
    compared = 0
    for run, out in of_peer("jetengine", "reproduced"):
        for row, logprobs in enumerate(run.logprobs):
            same, compared = decided(run, row), compared + 1
            ours = out.confidence[row][: len(same)][same].log()
            torch.testing.assert_close(ours, logprobs[same], rtol=0, atol=1e-3, msg=run.id)
    assert compared == 86


@pytest.mark.parametrize("peer", FAMILIES)
def test_caches_and_engines_agree(peer: str) -> None:
    """Nothing goes stale, so a decode without a cache is the cached one; and so is one on static steps."""
    for run, out in list(of_peer(peer, "reproduced"))[::12]:
        sub_blocks = run.params.get("small_block_size", run.block_length) < run.block_length
        caches = ({"cache": "none"}, {"cache": "prefix"}, {"cache": "dual"})[: 2 if sub_blocks else 3]
        static = {"cache": "prefix", "engine": "static"}
        for how in (*caches, static) if run.params.get("temperature", 1.0) in (0.0, 1.0) else caches:
            assert same_decode(decode(run, **how), out), (run.id, how)


def same_decode(a: Decode, b: Decode) -> bool:
    """Tokens, commit steps and forwards."""
    rows = zip((*a.tokens, *a.commit_step), (*b.tokens, *b.commit_step), strict=True)
    return a.nfe == b.nfe and all(x.equal(y) for x, y in rows)


class Edits:
    """A streamer that notes `[call, position, old, new]` of every token that changed, for one row."""

    def __init__(self, mask_id: int, n: int) -> None:
        self.mask_id, self.start, self.calls = mask_id, n, 0
        self.before: Tensor | None = None
        self.found: list[list[int]] = []

    def put(self, value: Tensor) -> None:
        if self.calls:
            self.start, self.before = self.start + value.shape[1], None

    def put_draft(self, value: Tensor) -> None:
        before = torch.full_like(value, self.mask_id) if self.before is None else self.before
        for _, t in ((before != self.mask_id) & (before != value)).nonzero().tolist():
            self.found.append([self.calls, self.start + t, int(before[0, t]), int(value[0, t])])
        self.before, self.calls = value.clone(), self.calls + 1

    def end(self) -> None:
        pass


def test_edits() -> None:
    """Every edit of LLaDA2.1's own decodes: when, where, and from what to what."""
    edits = 0
    for run, _ in list(of_peer("llada21", "reproduced"))[::5]:
        streamer = Edits(run.mask, len(run.prompts[0]))
        decode(run, streamer=streamer)
        found = [edit for edit in streamer.found if edit[0] < run.facts["n_forward"]]
        assert found == [[call, at, old, new] for call, _row, at, old, new in run.edits.tolist()], run.id
        edits += len(found)
    assert edits > 500


def test_drafts_are_lossless() -> None:
    """FreeDave's tokens, which are its baseline's; without a threshold, by which it drafts other states, its calls."""
    fewer: Counter[bool] = Counter()
    for run in runs("freedave"):
        if kind(run) != "drafted":
            continue
        params, baseline = run.params, ours("freedave", baseline_of(run))
        branches = "tree" if params["draft_mode"] == "tree_attention" else "batch"
        out = decode(run, drafts=params["draft_steps"], branches=branches)
        check(run, dataclasses.replace(out, nfe=baseline.nfe))
        assert out.commit_step[0].equal(baseline.commit_step[0]), run.id
        calls = int((run.calls[:, 3] == 0).sum())
        assert out.nfe[0] <= baseline.nfe[0], run.id
        assert out.nfe == [calls] or params["confidence_threshold"] is not None, run.id
        fewer[out.nfe[0] <= calls] += 1
    assert fewer == {True: 47, False: 1}


def baseline_of(run: BlockRun) -> int:
    params = {name: value for name, value in run.params.items() if name not in DRAFTING}
    same = (i for i, other in enumerate(runs("freedave")) if other.params == params and other.names == run.names)
    return next(same)


DRAFTING = ("draft_steps", "draft_mode", "eager_acceptance_mode")


def test_ends() -> None:
    """Ours end with the first stop token; published loops with its block, or once it has no mask before it."""
    compared: Counter[str] = Counter()
    for peer, index in of_kind("reproduced"):
        run = runs(peer)[index]
        if not run.stops or run.stops == [EOS[FAMILIES[peer]]] or peer == "diffusers":
            continue
        out = decode(run, stop_at_eos=True, eos_token_id=run.stops)
        for row, prompt in enumerate(run.prompts):
            n, text = len(prompt), run.out[row][: run.canvas(row)]
            last = end(text, n, run.stops) + 1
            assert out.tokens[row][:last].equal(text[:last]), run.id
            assert (out.tokens[row][last : len(text)] == EOS[FAMILIES[peer]]).all(), run.id
            compared[peer] += last < run.canvas(row)
    assert compared == {
        "sdar": 3,
        "jetengine": 3,
        "llada20": 6,
        "llada21": 6,
        "dinfer": 4,
        "generate": 2,
        "batch_sample": 4,
    }


@pytest.mark.parametrize("how", [{}, {"engine": "static"}, {"drafts": 3}], ids=["eager", "static", "drafts"])
def test_sub_blocks_alone(how: dict[str, Any]) -> None:
    """Ours feed the column before a sub-block, where published calls feed the block until its first token is decided.

    So most decodes are others; they are those of the plain loop that does the same.
    """
    other = 0
    for index in with_block_cache()[:: 3 if how else 1]:
        run, expected = runs("generate")[index], plainly(index, before=True)
        L, out = run.canvas(0), decode(run, cache="dual", **how)
        assert out.tokens[0].equal(expected.sequence[:L]), run.id
        calls = expected.step_of[:L].unique()[1:]
        step_of = torch.where(expected.step_of[:L] >= 0, torch.searchsorted(calls, expected.step_of[:L]), -1)
        assert out.commit_step[0].equal(step_of), run.id
        if not how:
            assert out.nfe == [len(calls)] and out.queries == [sum(expected.calls) - run.block_length], run.id
        other += not expected.sequence[:L].equal(run.out[0][:L])
    assert how or other == 17


def with_block_cache() -> list[int]:
    return [index for _, index in of_kind("block cache")]


@functools.cache
def plainly(index: int, before: bool) -> PlainBlocks:
    run, plain = runs("generate")[index], PlainDream(DATA / "fastdllm2/model_tiny")
    how = {"block": run.block_length, "sub": run.params["small_block_size"], "before": before}
    rounds, tau = run.new // run.block_length, run.params["threshold"]
    return plain_blocks(plain, run.prompts[0], rounds, tau, block_cache=run.params["use_block_cache"], **how)


def test_the_plain_loop_as_published() -> None:
    """The oracle above, set to do as the published loop does, against its records."""
    for index in with_block_cache():
        run, out = runs("generate")[index], plainly(index, before=False)
        assert out.sequence.equal(run.out[0]) and out.step_of.equal(run.step_of[0]), run.id
        assert out.calls == run.calls[:, 1].tolist(), run.id


FAULTS = (
    "raises",
    "overwrites decided tokens",
    "masks left",
    "prompt not seen",
    "blocks of 32 in a block of 64",
    "rows edit on together",
)


@pytest.mark.parametrize("peer", peers_of(*FAULTS))
def test_no_published_fault_is_ours(peer: str) -> None:
    """The decode ends, no mask of the response is left, no prompt is changed, each row is what it would be alone."""
    for index, run in enumerate(runs(peer)):
        if kind(run) not in FAULTS or run.params.get("denoising_steps") == 0:
            continue
        out = ours(peer, index)
        for row, prompt in enumerate(run.prompts):
            n, given = len(prompt), prompt != run.mask
            assert out.tokens[row][:n][given].equal(prompt[given]), run.id
            assert not (out.tokens[row][n:] == run.mask).any(), run.id
            if len(run.prompts) > 1:
                alone = decode(run, [row]).tokens[0]
                assert alone.equal(out.tokens[row][: len(alone)]), run.id
