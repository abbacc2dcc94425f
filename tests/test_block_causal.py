"""Decodes by block-causal models: with and without a cache, alone and in a batch, wherever the prompt ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captures import captured_on_cpu
from decoding import Recorder, forwards
from small import BLOCK_CAUSAL, EOS, MASK, PAD, RULES, exact, left_pad, prompts
from torch import Tensor
from transformers import StoppingCriteriaList

import fdpp
from fdpp.attention.cache import BlockCache, block_causal_mask, seen, tree_mask
from fdpp.decoding import block_causal
from fdpp.decoding.block_causal import BlockCausalLoop
from fdpp.decoding.layout import Layout

FAMILIES = ("SDAR", "Fast-dLLM v2")
each_family = pytest.mark.parametrize("family", FAMILIES)
LENGTHS = (3, 9, 12, 0)
"""Of prompts in blocks of 4 or 8: ends within a block, before and behind its middle, at its end, and nothing."""
NEW = 10
MODELS: dict[str, Any] = {}


def model_of(family: str) -> Any:
    return MODELS.setdefault(family, exact(family))


def ragged() -> tuple[Tensor, Tensor]:
    return left_pad([prompts(1, n, seed=n)[0] for n in LENGTHS])


def decode(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    return model.generate(ids, mask, **{"max_new_tokens": NEW, "stop_at_eos": False, "cache": "prefix", **options})


def same(a: Any, b: Any, *fields: str) -> bool:
    return all(torch.equal(a[field], b[field]) for field in fields or ("sequences", "commit_step"))


def plain(model: Any, prompt: list[int], tau: float) -> tuple[list[int], int]:
    """One row, written out: the response, and how many forwards it took. A full forward each, over what is known.

    Above `tau`, and the most confident one, commit; in an anchored model a block's first position does so alone. What
    stands wholly behind the response is not decoded.
    """
    grid, part = model.default_block_length, model.default_sub_block_length or model.default_block_length
    tokens, taken = list(prompt), 0

    def read(columns: list[int]) -> Tensor:
        """Probabilities of the tokens at some columns."""
        ids = torch.tensor([tokens])
        hidden = model.model(ids, attention_mask=block_causal_mask(len(tokens), grid, ids.device)[None])[0]
        return model.project(hidden[[max(c - model.shift, 0) for c in columns]]).double().softmax(-1)

    while len(tokens) < len(prompt) + NEW:
        if model.anchored and tokens and len(tokens) % grid == 0:
            p = read([len(tokens)])[0]
            p[MASK] = -1.0
            tokens.append(int(p.argmax()))
            taken += 1
        tokens += [MASK] * (-len(tokens) % grid or grid)
        first = len(tokens) - grid
        parts = [list(range(s, s + part)) for s in range(first, first + grid, part)]
        if model.anchored:
            parts = [[first], parts[0][1:], *parts[1:]]
        for span in parts:
            if span[0] >= len(prompt) + NEW:
                break
            while masked := [c for c in span if tokens[c] == MASK]:
                p = read(masked)
                p[:, MASK] = -1.0
                confidence, proposal = p.max(-1)
                best = confidence.argmax()
                for i, column in enumerate(masked):
                    if confidence[i] >= tau or i == best:
                        tokens[column] = int(proposal[i])
                taken += 1
    return tokens[len(prompt) : len(prompt) + NEW], taken


@each_family
@pytest.mark.parametrize("length", range(18))
def test_against_a_decode_written_out(family: str, length: int) -> None:
    """At every offset of the prompt in its block; a prefill and commits of blocks cost no forward."""
    model, ids = model_of(family), prompts(1, length, seed=length)
    want, taken = plain(model, ids[0].tolist(), 0.5)
    for cache in ("none", "prefix"):
        out = decode(model, ids, rule=fdpp.Threshold(0.5), cache=cache)
        assert out.sequences[0].tolist() == ids[0].tolist() + want
        assert int(out.nfe) == taken


OF_BLOCKS = (
    fdpp.ThresholdQuota(0.6, 2),
    fdpp.Leftmost(2),
    fdpp.ThresholdLeftmost(0.5, 2),
    fdpp.EntropySum(1.0),
    fdpp.LeftmostRun(0.4),
    fdpp.Editing(0.5, edit=0.4, post=3),
)


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        *((family, rule) for family in FAMILIES for rule in (*RULES, *OF_BLOCKS)),
        *(("LLaDA2", rule) for rule in (RULES[0], RULES[4], RULES[-1], OF_BLOCKS[-1])),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_any_rule_with_and_without_a_cache_alone_and_in_a_batch(family: str, rule: fdpp.Rule) -> None:
    model, (ids, mask) = model_of(family), ragged()
    uncached = decode(model, ids, mask, rule=rule, cache="none")
    assert not (uncached.sequences[:, -NEW:] == MASK).any()
    cached = decode(model, ids, mask, rule=rule)
    assert same(cached, uncached, "sequences", "commit_step", "nfe")
    for b, n in enumerate(LENGTHS):
        alone = decode(model, ids[b : b + 1, ids.shape[1] - n :], rule=rule)
        assert alone.sequences[0, n:].equal(cached.sequences[b, -NEW:])
        assert alone.commit_step[0].equal(cached.commit_step[b]) and alone.nfe[0] == cached.nfe[b]


OPTIONS: list[dict[str, Any]] = [
    {"drafts": 3},
    {"drafts": 3, "branches": "tree"},
    {"drafts": "auto", "cache": "none"},
    {"drafts": 2, "cache": "none", "branches": "tree"},
    {"engine": "static"},
    {"engine": "static", "cache": "none", "drafts": 2},
    {"engine": "static", "drafts": 3, "branches": "tree"},
    {"engine": "static", "drafts": "auto", "cache": "dual"},
]


@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, kind) for family in FAMILIES for kind in OPTIONS), *(("LLaDA2", OPTIONS[i]) for i in (1, 4, 7))],
    ids=str,
)
@pytest.mark.parametrize(
    "settings",
    [
        {"rule": fdpp.Quota()},
        {"rule": fdpp.Frechet(0.1), "temperature": 0.6, "seed": 5},
        {"rule": fdpp.Editing(0.5, edit=0.4, post=3)},
    ],
    ids=("greedy", "drawn", "edited"),
)
def test_drafts_and_static_steps_change_nothing(family: str, settings: dict[str, Any], options: dict[str, Any]) -> None:
    model, (ids, mask) = model_of(family), ragged()
    kept = options.get("cache", "prefix")
    want = decode(model, ids, mask, **{**settings, "cache": kept})
    out = decode(model, ids, mask, **settings, **options)
    assert same(out, want)
    assert (out.nfe <= want.nfe).all() if "drafts" in options else out.nfe.equal(want.nfe)


@each_family
def test_settings_that_change_logits(family: str) -> None:
    """Guidance, penalties and processors, which see the block's columns: cached, static and alone."""
    model, (ids, mask) = model_of(family), ragged()
    for settings in (
        {"cfg_scale": 0.7},
        {"repetition_penalty": 1.4, "bad_words_ids": [[3, 7]], "top_k": 9},
        {"logits_processor": [lambda ids, scores, cur_step: scores - 0.1 * ids.shape[1] * (scores.argsort(-1) % 3)]},
    ):
        want = decode(model, ids, mask, cache="none", **settings)
        assert same(decode(model, ids, mask, **settings), want)
        if "logits_processor" not in settings:
            assert same(decode(model, ids, mask, engine="static", **settings), want)
            alone = decode(model, ids[1:2, -9:], **settings)
            assert alone.sequences[0, 9:].equal(want.sequences[1, -NEW:])


def test_a_sub_block_alone_is_fed_with_a_dual_cache() -> None:
    """Beside it the block is as its first forward saw it; drafts, static steps and a batch change nothing."""
    model, (ids, mask) = model_of("Fast-dLLM v2"), ragged()
    want = decode(model, ids, mask, cache="dual", sub_block_length=4)
    assert not same(want, decode(model, ids, mask, sub_block_length=4))
    with forwards(model) as fed:
        decode(model, ids[2:3], cache="dual", sub_block_length=4)
    # The prompt and the block, then the sub-block with the column before it; the anchor; the block, ...
    assert [n for _, n in fed] == [16, 5, 5, 5, 8, 8, 4, 4, 8, 5, 5, 5]
    for options in ({"drafts": 3}, {"drafts": 2, "branches": "tree", "engine": "static"}):
        assert same(decode(model, ids, mask, cache="dual", sub_block_length=4, **options), want)
    for b, n in enumerate(LENGTHS):
        alone = decode(model, ids[b : b + 1, ids.shape[1] - n :], cache="dual", sub_block_length=4)
        assert alone.sequences[0, n:].equal(want.sequences[b, -NEW:])


@each_family
@pytest.mark.parametrize("engine", ["eager", "static"])
def test_long_prompts_are_fed_in_pieces(family: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, (ids, mask) = model_of(family), left_pad([prompts(1, n, seed=n)[0] for n in (70, 37, 5)])
    want = decode(model, ids, mask)
    monkeypatch.setattr(block_causal, "PIECE", 17)
    with forwards(model) as fed:
        out = decode(model, ids, mask, engine=engine)
    # 16 columns each, the largest multiple of a block, and at most as many beside the block.
    piece, grid = 16, model.default_block_length
    pieces = -(-(70 // grid * grid) // piece) - 1
    assert [n for _, n in fed][:pieces] == [piece] * pieces and max(n for _, n in fed) <= piece + grid
    assert same(out, want) and out.nfe.equal(want.nfe + pieces)


@each_family
def test_eos_ends_a_sequence_and_only_in_its_response(family: str) -> None:
    model, (ids, mask) = model_of(family), ragged()
    ids = ids.clone()
    ids[0, -1] = ids[1, -1] = EOS  # in the first block that is decoded
    want = decode(model, ids, mask)
    eos = int(want.sequences[1, -NEW + 3])
    out = decode(model, ids, mask, stop_at_eos=True, eos_token_id=eos)
    for b in range(len(LENGTHS)):
        row = want.sequences[b, -NEW:].tolist()
        end = row.index(eos) + 1 if eos in row else NEW
        assert out.sequences[b, -NEW:].tolist()[:end] == row[:end]
        assert (out.sequences[b, ids.shape[1] + end :] == model.config.pad_token_id).all()
    assert (out.nfe <= want.nfe).all() and (out.nfe < want.nfe).any()
    assert out.sequences[:, : ids.shape[1]].equal(ids)


@each_family
def test_blocks_are_streamed_without_the_prompt(family: str) -> None:
    model = model_of(family)
    for n in (8, 11, 13):
        ids, recorder = prompts(1, n, seed=n), Recorder()
        out = decode(model, ids, streamer=recorder)
        assert recorder.events[0][1].equal(ids)
        assert torch.cat([drafts[-1] for drafts in recorder.blocks()], 1).equal(out.sequences[:, n:])
    ids, mask = ragged()
    recorder = Recorder()
    out = decode(model, ids, mask, streamer=recorder)
    text = torch.cat([drafts[-1] for drafts in recorder.blocks()], 1)
    for b in range(len(LENGTHS)):
        assert [t for t in text[b].tolist() if t != model.config.pad_token_id] == out.sequences[b, -NEW:].tolist()


@each_family
def test_masks_are_filled_in_the_midst_of_a_text(family: str) -> None:
    """Rows whose first masks stand in different columns, blocks without masks between, each as it is alone."""
    model = model_of(family)
    texts = [prompts(1, n, seed=n)[0] for n in (21, 30, 9)]
    for text, holes in zip(texts, ((5, 6, 19), (17, 18, 29), ()), strict=True):
        text[list(holes)] = MASK
    ids, mask = left_pad(texts)
    out = model.infill(ids, mask, cache="prefix", stop_at_eos=False)
    assert same(out, model.infill(ids, mask, cache="none", stop_at_eos=False))
    assert same(out, model.infill(ids, mask, cache="prefix", engine="static", stop_at_eos=False))
    holes = (ids == MASK) & mask.bool()
    assert out.sequences[~holes].equal(ids[~holes]) and not (out.sequences[holes] == MASK).any()
    assert (out.commit_step >= 0).equal(holes)
    for b, text in enumerate(texts):
        alone = model.infill(text[None], cache="prefix", stop_at_eos=False)
        assert alone.sequences[0].equal(out.sequences[b, -len(text) :]) and alone.nfe[0] == out.nfe[b]


@each_family
def test_masks_of_the_prompt_are_filled_where_the_response_begins(family: str) -> None:
    model, ids = model_of(family), prompts(1, 19, seed=1)
    ids[0, 2], ids[0, 18] = MASK, MASK
    out = decode(model, ids)
    assert int(out.sequences[0, 2]) == MASK and int(out.sequences[0, 18]) != MASK
    assert out.sequences[0, 3:18].equal(ids[0, 3:18])


@each_family
def test_prompts_as_embeddings(family: str) -> None:
    model, (ids, mask) = model_of(family), ragged()
    embeds = model.get_input_embeddings()(ids)
    for options in ({}, {"engine": "static"}, {"drafts": 2}):
        want = decode(model, ids, mask, **options)
        assert same(decode(model, ids, mask, inputs_embeds=embeds, **options), want)
        assert decode(model, None, mask, inputs_embeds=embeds, **options).sequences.equal(want.sequences[:, -NEW:])


@each_family
def test_stopping_criteria_and_stop_strings_see_left_padded_rows(family: str) -> None:
    model, (ids, mask) = model_of(family), ragged()
    seen_rows: list[Tensor] = []

    def criterion(sequences: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        seen_rows.append(sequences)
        return torch.tensor([True, False, False, False])

    want, out = decode(model, ids, mask), decode(model, ids, mask, stopping_criteria=StoppingCriteriaList([criterion]))
    assert out.sequences[1:].equal(want.sequences[1:])
    # The first row ends with the first block that its response is in, whatever is asked before.
    end = model.default_block_length - 3 if model.default_sub_block_length is None else 8 - 3
    assert out.sequences[0, -NEW:].tolist() == [*want.sequences[0, -NEW:][:end].tolist(), *[PAD] * (NEW - end)]
    pad, held = model.config.pad_token_id, seen_rows[-1]
    for b, n in enumerate(LENGTHS[1:], start=1):
        row = held[b][held[b] != pad]
        assert row[: n + NEW].equal(want.sequences[b, -n - NEW :])


@pytest.mark.parametrize("family", BLOCK_CAUSAL)
def test_a_warm_up_leaves_nothing_to_capture(family: str) -> None:
    """But the first forward of other prompts, which feeds as many columns as they have."""
    model = (model_of if family in FAMILIES else exact)(family)
    settings = {"engine": "static", "rule": fdpp.Frechet(0.1)}
    with captured_on_cpu() as captures:
        model.warmup(12, 2, max_new_tokens=NEW, cache="prefix", stop_at_eos=False, **settings)
        known = len(captures.logs)
        for lengths in ((12, 12), (12, 10), (11, 9), (10,)):
            decode(model, *left_pad([prompts(1, n, seed=n)[0] for n in lengths]), **settings)
        assert all(step.window.full for step, _, _ in captures.logs[known:])
        found = len(captures.logs)
        decode(model, prompts(1, 12), **settings)
        assert known <= 16 and len(captures.logs) == found <= known + 3
    model.forget_captures()


REFUSED = [
    ({"refresh": "recent"}, "refresh='recent'"),
    ({"block_length": 0}, "block_length"),
    ({"sub_block_length": 0}, "sub_block_length"),
]


@pytest.mark.parametrize(("settings", "named"), REFUSED, ids=str)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        decode(model_of("SDAR"), prompts(1, 5), **settings)


def test_sub_blocks_need_a_block_causal_model() -> None:
    with pytest.raises(ValueError, match="sub_block_length=4: expected a block-causal model"):
        decode(exact("LLaDA"), prompts(1, 5), sub_block_length=4)


@each_family
def test_blocks_are_the_models_own_unless_asked_for(family: str) -> None:
    model, ids = model_of(family), prompts(1, 9)
    own = model.default_block_length
    assert same(decode(model, ids), decode(model, ids, block_length=own))
    for length in (1, 3, 5, 32):
        out = decode(model, ids, block_length=length, cache="dual", sub_block_length=length)
        assert same(out, decode(model, ids, block_length=length, cache="none", sub_block_length=length))


@each_family
def test_steps_are_shared_out_to_whole_blocks(family: str) -> None:
    """A row's schedule does not depend on where its prompt ends, nor on other rows."""
    model, (ids, mask) = model_of(family), ragged()
    out = decode(model, ids, mask, rule=fdpp.Quota(), steps=5, block_length=4, sub_block_length=4, max_new_tokens=8)
    for b, n in enumerate(LENGTHS):
        alone = decode(
            model,
            ids[b : b + 1, ids.shape[1] - n :],
            rule=fdpp.Quota(),
            steps=5,
            block_length=4,
            sub_block_length=4,
            max_new_tokens=8,
        )
        assert alone.commit_step[0].equal(out.commit_step[b])


def test_a_prefill_and_a_decode_of_layouts() -> None:
    """Rows keep their tokens, in order, on one grid; masks up to the end of their last block, then padding."""
    text = torch.tensor([[61, 61, 61, 1, 2, 62, 62], [1, 2, 3, 4, 5, 62, 62]])
    real = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7]).bool()
    laid = Layout.of(text, 5, real, torch.tensor([2, 5]), 4, 62, 61)
    assert laid.tokens.tolist() == [[61] * 4 + [1, 2, 62, 62], [1, 2, 3, 4, 5, 62, 62, 62]]
    assert (laid.prompt, laid.padding.tolist(), laid.first.tolist()) == (4, [4, 0], [6, 5])
    assert text.equal(torch.where(real, laid.tokens.gather(1, laid.at), text))


def test_masks_of_a_grid() -> None:
    """Every way to make one, against the definition."""
    grid, L, device = 3, 9, torch.device("cpu")
    column = torch.arange(L)
    want = column[:, None] // grid >= column // grid
    assert block_causal_mask(L, grid, device).equal(want)
    two = slice(3, 9)
    assert seen(None, L, two, 6, 1, device, grid)[0, 0].equal(want[two])
    assert seen(None, L, slice(6, 9), 3, 1, device, grid) is None
    padding = torch.tensor([0, 3])
    padded = seen(padding, L, column, 9, 1, device, grid)[:, 0]
    real = column >= padding[:, None]
    assert padded[0].equal(want) and padded[1][3:].equal((want & real[1])[3:]) and padded.any(2).all()
    sees = tree_mask(L, two, 6, 2, device, None, want[two])[0, 0]
    assert sees[:6, :9].equal(want[two]) and not sees[:6, 9:].any()
    assert sees[6:, :3].equal(want[two][:, :3]) and not sees[6:, 3:9].any() and sees[6:, 9:].equal(want[two][:, two])


def test_a_cache_of_a_grid_holds_what_blocks_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of finished blocks are those of one forward over the final text."""
    model, ids = model_of("SDAR"), prompts(1, 9)
    caches: list[BlockCache] = []
    memory = BlockCausalLoop.memory
    monkeypatch.setattr(BlockCausalLoop, "memory", lambda loop: (found := memory(loop), caches.append(found[0]))[0])
    out = decode(model, ids)
    whole = BlockCache(grid=4, columns=20)
    text = torch.cat((out.sequences, out.sequences[:, :1]), 1)  # the last block's excess is not known
    model.model(text, cache=whole, start=0)
    for mine, theirs in zip(caches[0].keys + caches[0].values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(mine[:, :, :16], theirs[:, :, :16], rtol=0, atol=1e-9)


@each_family
def test_forwards_without_a_cache_see_no_later_block(family: str) -> None:
    """`model(ids)` by itself, padded on the left or not."""
    model, (ids, mask) = model_of(family), ragged()
    grid, together = model.default_block_length, model(ids, mask.long(), position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for b, n in enumerate(LENGTHS[:3]):
        row = ids[b : b + 1, ids.shape[1] - n :]
        alone = model(row).logits[0]
        torch.testing.assert_close(together.logits[b, -n:], alone, rtol=0, atol=1e-9)
        torch.testing.assert_close(model(row[:, :grid]).logits[0], alone[:grid], rtol=0, atol=1e-9)
