"""`top_k`, `top_p`, `min_p`, `repetition_penalty`, `bad_words_ids`, `suppress_tokens`: settings of transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decoding import Scripted, no_prompt
from plain import CACHES, SIZES, model_with_ends, ragged
from small import EOS, MASK, PAD, V, prompts, small_model
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import fdpp
from fdpp import DiffusionGenerationConfig, Frechet, LLaDAModelLM, Quota
from fdpp.decoding import filters
from fdpp.decoding.contexts import Contexts, contexts_of
from fdpp.decoding.filters import Filters, active_filters
from fdpp.decoding.state import Window
from fdpp.decoding.static import steps_of

WORDS = [[t, u] for t in range(40) for u in range(t % 3, 60, 3)] + [[9], [1, 2, 3], [EOS]]
EVERYTHING: dict[str, Any] = {
    "top_k": 9,
    "top_p": 0.8,
    "min_p": 0.05,
    "repetition_penalty": 1.4,
    "bad_words_ids": WORDS,
    "suppress_tokens": [3, 30, EOS],
}
PROCESSORS: dict[str, Any] = {
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "bad_words_ids": lambda words: NoBadWordsLogitsProcessor(words, EOS),
    "suppress_tokens": lambda ids: SuppressTokensLogitsProcessor(ids, device="cpu"),
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
"""Transformers' own, in their order."""

ALONE: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7},
    {"repetition_penalty": 1e6},
    {"bad_words_ids": WORDS},
    {"suppress_tokens": [*range(20), EOS]},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.3},
    EVERYTHING,
]


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Proposes EOS often, in float64. Shared: no test may change it."""
    return model_with_ends()


def same(a: Any, b: Any) -> None:
    assert torch.equal(a.sequences, b.sequences) and torch.equal(a.commit_step, b.commit_step)
    torch.testing.assert_close(a.confidence, b.confidence, rtol=1e-5, atol=1e-7)


def twice(settings: dict[str, Any], *prompt: Tensor, llada: LLaDAModelLM, cache: str) -> None:
    processors = [make(settings[name]) for name, make in PROCESSORS.items() if name in settings]
    decode = {"rule": Quota(4), "cache": cache, "stop_at_eos": False, **SIZES, "max_new_tokens": 12}
    out = llada.generate(*prompt, **settings, **decode)
    same(out, llada.generate(*prompt, logits_processor=processors, **decode))
    assert not out.confidence.equal(llada.generate(*prompt, **decode).confidence)


@pytest.mark.parametrize("settings", ALONE, ids=lambda settings: "+".join(settings))
def test_settings_equal_the_processors_of_transformers(llada: LLaDAModelLM, settings: dict[str, Any]) -> None:
    twice(settings, prompts(2, 7), llada=llada, cache="none")


@pytest.mark.parametrize("cache", CACHES)
def test_settings_together_equal_the_processors_of_transformers(llada: LLaDAModelLM, cache: str) -> None:
    twice(EVERYTHING, *ragged(), llada=llada, cache=cache)


@pytest.mark.parametrize(("cache", "branches"), [("none", "batch"), ("prefix", "tree"), ("dual", "batch")])
def test_drafts_and_static_steps_take_the_same_filtered_decode(llada: LLaDAModelLM, cache: str, branches: str) -> None:
    """And every row that of the row alone. Steps that the model made for other settings are not reused."""
    ids, mask = ragged()
    other = {**EVERYTHING, "repetition_penalty": 1.2, "suppress_tokens": [5]}
    settings = {"rule": Quota(2), "cache": cache, "branches": branches, **SIZES, "max_new_tokens": 12}
    plain = llada.generate(ids, mask, **EVERYTHING, **settings)
    for own in (other, EVERYTHING):
        static = llada.generate(ids, mask, engine="static", drafts=3, **own, **settings)
    same(static, plain)
    same(llada.generate(ids, mask, drafts="auto", **EVERYTHING, **settings), plain)
    alone = llada.generate(ids[3:, 4:], engine="static", **EVERYTHING, **settings)
    assert torch.equal(alone.sequences[0], plain.sequences[3, 4:])


def test_static_steps_read_constants_that_stay(llada: LLaDAModelLM) -> None:
    """Those of the bucket, not of the decode that captured the step."""
    settings = {"engine": "static", "rule": Quota(2), **SIZES, **EVERYTHING}
    llada.forget_captures()
    settings["max_new_tokens"] = 8
    llada.generate(prompts(1, 5), **settings)
    [bucket] = llada.__dict__["_static_steps"].buckets.values()
    held = bucket.filters
    llada.generate(prompts(1, 6), **settings)
    [bucket] = llada.__dict__["_static_steps"].buckets.values()
    assert bucket.filters is held and held.never is not None


def test_contexts_of_an_infill_end_before_the_position(llada: LLaDAModelLM) -> None:
    """Given tokens behind it are none, on either engine."""
    text = prompts(2, 24)
    text[:, 4:7], text[:, 9:20] = MASK, MASK
    settings = {"rule": Quota(2), "block_length": 8, "stop_at_eos": False}
    out = llada.infill(text, **EVERYTHING, **settings)
    processors = [make(EVERYTHING[name]) for name, make in PROCESSORS.items()]
    same(out, llada.infill(text, logits_processor=processors, **settings))
    same(out, llada.infill(text, engine="static", drafts=2, **EVERYTHING, **settings))
    assert not torch.equal(out.sequences, llada.infill(text, **settings).sequences)


def test_where_a_processor_of_the_callers_stands(llada: LLaDAModelLM) -> None:
    """After penalty, bad words and suppressed tokens, before the cut-offs."""
    seen = []

    def look(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.isinf().sum(1))
        return scores.index_fill(1, torch.tensor([EOS]), 99.0)

    settings = {"rule": Quota(4), "stop_at_eos": False, "top_k": 1, "suppress_tokens": [EOS, 5], **SIZES}
    out = llada.generate(prompts(1, 4), logits_processor=[look], **settings)
    assert bool((out.sequences[:, 4:] == EOS).all()) and bool((out.confidence > 0.99).all())
    assert all(bool((count == 2).all()) for count in seen)
    never = llada.generate(prompts(1, 4), logits_eos_inf=True, **settings)
    assert not bool(torch.isin(never.sequences[:, 4:], torch.tensor([EOS, 5])).any())


# The cut-offs by themselves


def filters_of(mask_id: int = MASK, **settings: Any) -> Filters:
    return Filters(DiffusionGenerationConfig(mask_token_id=mask_id, seed=0, **settings), torch.device("cpu"))


def plain_cut(row: list[float], top_k: int, top_p: float, min_p: float, T: float) -> list[bool]:
    """Which tokens stay, in float64; what is within 1e-5 of a cut-off may go either way and is left out."""
    kept = [math.isfinite(x) for x in row]
    if top_k:
        least = sorted((x for x in row), reverse=True)[: min(top_k, len(row))][-1]
        kept = [k and x >= least for k, x in zip(kept, row, strict=True)]
    weights = [math.exp((x - max(row)) / T) if k else 0.0 for k, x in zip(kept, row, strict=True)]
    Z = sum(weights)
    above = [sum(w for w, y in zip(weights, row, strict=True) if y > x) / Z for x in row]
    kept = [k and (a < top_p or a == 0.0) for k, a in zip(kept, above, strict=True)]
    return [k and w >= min_p * max(weights) for k, w in zip(kept, weights, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [0.0, 0.4, 2.0])
@pytest.mark.parametrize(
    "cut", [(5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.1), (9, 0.8, 0.2), (20, 0.3, 0.0), (99, 0.0, 0.0)]
)
def test_cut_offs_against_a_plain_float64_loop(cut: tuple[int, float, float], T: float, dtype: torch.dtype) -> None:
    """bfloat16 logits have many equal ones, at cut-offs too: of these all stay."""
    top_k, top_p, min_p = cut
    logits = (3 * torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(top_k))).to(dtype)
    logits[0, :, 7] = -torch.inf
    before = logits.clone()
    out = filters_of(39, top_k=top_k, top_p=top_p, min_p=min_p, temperature=T).cut(logits)
    assert torch.equal(logits, before) and out.dtype == dtype
    for row, got in zip(logits.flatten(0, 1), out.flatten(0, 1), strict=True):
        kept = torch.tensor(plain_cut(row.tolist(), top_k, top_p, min_p, T or 1.0))
        if not bool(kept[:39].any()):
            kept[row[:39].argmax()] = True
        assert torch.equal(got, row.masked_fill(~kept, -torch.inf))


@pytest.mark.parametrize("T", [0.4, 1.5])
def test_cut_offs_at_a_temperature_leave_what_transformers_leave(T: float) -> None:
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    logits[:, 39] = -20.0
    settings = {"top_k": 12, "top_p": 0.7, "min_p": 0.15}
    warpers = [TemperatureLogitsWarper(T), *(PROCESSORS[name](value) for name, value in settings.items())]
    theirs = LogitsProcessorList(warpers)(torch.zeros(50, 0, dtype=torch.int64), logits)
    ours = filters_of(39, temperature=T, **settings).cut(logits)
    assert torch.equal(ours > -torch.inf, theirs > -torch.inf)
    assert torch.equal(ours[ours > -torch.inf], logits[ours > -torch.inf])


def test_equal_logits_at_a_cut_off_all_stay() -> None:
    row = torch.tensor([4.0, 2.0, 2.0, 2.0, 1.0, 1.0, -9.0])
    for settings in ({"top_k": 2}, {"top_p": 0.8}, {"top_k": 2, "top_p": 0.99}, {"min_p": math.exp(-2.0)}):
        assert filters_of(6, **settings).cut(row).isfinite().tolist() == [True] * 4 + [False] * 3
    # The nucleus of what top_k leaves counts all of the equal ones: 4 of 7, so 0.6 needs a second token.
    row = torch.tensor([math.log(4.0), 0.0, 0.0, 0.0, -9.0])
    assert filters_of(4, top_k=2, top_p=0.55).cut(row).isfinite().tolist() == [True] + [False] * 4
    assert filters_of(4, top_k=2, top_p=0.6).cut(row).isfinite().tolist() == [True] * 4 + [False]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0.0}, {"min_p": 1.0}], ids=str)
def test_the_mask_id_never_leaves_a_position_without_a_proposal(settings: dict[str, Any]) -> None:
    for mask_id in (0, 3, 5):
        row = torch.tensor([1.0, 0.5, 2.0, 3.0, 2.5, 1.5])
        row[mask_id] = 9.0
        best = row.clone()
        best[mask_id] = 0.0
        out = filters_of(mask_id, **settings).cut(row)
        assert out.isfinite().nonzero().flatten().tolist() == sorted([mask_id, int(best.argmax())])
    model = small_model()
    project = model.project
    model.project = lambda hidden: project(hidden) + 50.0 * (torch.arange(V) == MASK)
    free, cut = (model.generate(prompts(1, 3), max_new_tokens=6, **own) for own in ({}, settings))
    assert torch.equal(cut.sequences, free.sequences)


@pytest.mark.parametrize(
    "settings", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, EVERYTHING], ids=lambda s: "+".join(s)
)
def test_unusable_logits_are_reported_and_minus_infinity_is_usable(settings: dict[str, Any]) -> None:
    for bad in (torch.nan, torch.inf):
        model = Scripted([5, 6, 7, 8, 9, 10], [0.9] * 6)
        model.logits[4, 20] = bad
        with pytest.raises(FloatingPointError, match=r"sequences \[0\]"):
            model.generate(no_prompt(), max_new_tokens=6, block_length=3, **settings)
    rows = torch.full((2, V), -torch.inf)
    rows[0, 5] = rows[0, 50] = 1.0
    assert filters_of(**settings).cut(rows).isfinite().nonzero().tolist() == [[0, 5], [0, 50]]


@pytest.mark.parametrize("p", [0.2, 0.9, 0.999])
def test_a_large_vocabularys_nucleus_is_found_without_a_sort(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or with one, where it is wide. Both give the same."""
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(1))
    logits[::2] *= 4.0
    cut = filters_of(top_p=p).cut(logits)
    sorts = []
    sort = Tensor.sort
    monkeypatch.setattr(Tensor, "sort", lambda *args, **kwargs: sorts.append(1) or sort(*args, **kwargs))
    narrow = filters_of(top_p=p).cut(logits[::2])
    assert bool(sorts) is (p == 0.999)
    monkeypatch.setattr(filters, "HEAD", 10**6)
    whole = filters_of(top_p=p).cut(logits)
    assert sorts and torch.equal(cut, whole) and torch.equal(narrow, whole[::2])
    p_kept = logits.double().softmax(-1).masked_fill(whole.isinf(), 0.0).sum(1)
    assert bool((p_kept >= p - 1e-6).all()) and whole.isinf().any()


# Contexts


def test_a_context_is_the_tokens_before_without_padding_and_masks(llada: LLaDAModelLM) -> None:
    from fdpp.decoding.loop import BlockLoop

    ids, mask = ragged()
    config = llada.settled(None, {"cache": "none", **SIZES})
    state = BlockLoop(llada, ids, mask.bool(), config).whole
    states = torch.full((4, 2, 8), MASK)
    states[:, 0, [1, 2, 5]] = torch.tensor([40, 41, 42])
    found = contexts_of(state, states, Window.of(slice(0, 29), slice(9, 17), True, 0), MASK)
    for b in range(4):
        prompt = ids[b][mask[b].bool()].tolist()
        for t in range(8):
            own = [[40, 41, 42][i] for i, at in enumerate((1, 2, 5)) if at < t]
            for d, expected in enumerate((prompt + own, prompt)):
                assert found.tokens[b, d, t, : found.length[b, d, t]].tolist() == expected
                assert int(found.inside()[b, d, t].sum()) == len(expected)
                tail, enough = (part[b, d, t] for part in found.last(2))
                assert bool(enough) is (len(expected) > 1)
                assert not enough or tail.tolist() == expected[-2:]


def test_filters_leave_the_models_logits_alone() -> None:
    """A model may hand out what it keeps."""
    model = Scripted([*range(20, 28)], [0.9] * 8)
    before = model.logits.clone()
    settings = {"suppress_tokens": [21], "repetition_penalty": 2.0, "top_k": 2, "bad_words_ids": [[20, 22]]}
    out = model.generate(no_prompt(), max_new_tokens=8, rule=Quota(1), **settings)
    assert torch.equal(model.logits, before) and 21 not in out.sequences[0].tolist()


def test_a_bad_word_is_not_completed() -> None:
    model = Scripted([20, 21, 22, 23], [0.9, 0.8, 0.7, 0.6])
    for words, expected in (
        ([[20, 21]], [20, 0, 22, 23]),
        ([[20, 21, 22]], [20, 21, 0, 23]),
        ([[21]], [20, 0, 22, 23]),
        ([[20, 22], [21, 23]], [20, 21, 22, 23]),
        ([[22, 23], [9, 21]], [20, 21, 22, 0]),
    ):
        out = model.generate(no_prompt(), max_new_tokens=4, rule=Quota(1), bad_words_ids=words)
        assert out.sequences[0].tolist() == expected
    prompted = Scripted([20, 21, 22, 23], [0.9, 0.8, 0.7, 0.6], prompt=1)
    out = prompted.generate(torch.tensor([[9]]), max_new_tokens=4, rule=Quota(1), bad_words_ids=[[9, 20]])
    assert out.sequences[0, 1] != 20


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": -1}, "top_k: expected an int of at least 0, got -1"),
        ({"top_k": 2.0}, r"top_k.*got 2\.0"),
        ({"top_k": True}, "top_k.*got True"),
        ({"top_p": 1.1}, r"top_p: expected a number from 0 to 1, got 1\.1"),
        ({"top_p": "0.9"}, r"top_p.*got '0\.9'"),
        ({"min_p": -0.1}, r"min_p.*got -0\.1"),
        ({"min_p": math.nan}, "min_p.*got nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty: expected a finite number above 0, got 0\.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty.*got inf"),
        ({"bad_words_ids": [3]}, r"bad_words_ids: expected a list of non-empty lists of token ids, got \[3\]"),
        ({"bad_words_ids": [[]]}, r"bad_words_ids.*got \[\[\]\]"),
        ({"bad_words_ids": [[1, -2]]}, r"bad_words_ids.*got \[\[1, -2\]\]"),
        ({"suppress_tokens": 3}, "suppress_tokens: expected a list of token ids, got 3"),
        ({"suppress_tokens": [1.5]}, r"suppress_tokens.*got \[1\.5\]"),
        ({"top_k": 3, "head": "fused"}, "head='fused' keeps no logits, which top_k reads"),
        ({"repetition_penalty": 1.1, "head": "fused"}, "head='fused'.*repetition_penalty"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionGenerationConfig(**settings)


def test_ids_outside_of_the_vocabulary_are_refused_before_a_forward() -> None:
    model = small_model()
    model.model.forward = lambda *args, **kwargs: pytest.fail("a forward")
    for settings in ({"suppress_tokens": [5, V]}, {"bad_words_ids": [[1], [2, V]]}):
        [name] = settings
        with pytest.raises(ValueError, match=f"{name}: expected ids below the vocabulary's {V}, got {V}"):
            model.generate(prompts(1, 3), **settings, **SIZES)
    others = [token for token in range(V) if token not in (MASK, PAD)]
    with pytest.raises(ValueError, match=f"suppress_tokens, bad_words_ids: expected to leave one of {V} tokens"):
        model.generate(prompts(1, 3), suppress_tokens=others, bad_words_ids=[[PAD]], **SIZES)


def test_one_token_that_is_left_is_proposed_everywhere() -> None:
    others = [token for token in range(V) if token not in (MASK, 17)]
    out = small_model().generate(prompts(1, 3), suppress_tokens=others, rule=Frechet(), **SIZES)
    assert out.sequences[0, 3:].tolist() == [17] * 20


def test_neutral_values_are_no_filters(llada: LLaDAModelLM) -> None:
    """They are what a file of transformers may hold."""
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    neutral |= {"bad_words_ids": [], "suppress_tokens": []}
    config = DiffusionGenerationConfig(head="fused", **neutral)
    assert active_filters(config) == [] and not filters_of(**neutral).active
    same(llada.generate(prompts(2, 5), **neutral, **SIZES), llada.generate(prompts(2, 5), **SIZES))
    for name, value in EVERYTHING.items():
        assert active_filters(DiffusionGenerationConfig(**{name: value})) == [name]


def test_filters_are_saved_with_a_model(tmp_path: Any) -> None:
    config = DiffusionGenerationConfig(**EVERYTHING, rule=fdpp.Threshold(0.8))
    config.save_pretrained(tmp_path)
    assert DiffusionGenerationConfig.from_pretrained(tmp_path) == config


@pytest.mark.parametrize("rule", [Quota(2), fdpp.Klass(0.3, 0.5, 1)], ids=str)
def test_sampling_keeps_to_what_the_cut_offs_leave(llada: LLaDAModelLM, rule: fdpp.Rule) -> None:
    settings = {"rule": rule, "temperature": 3.0, "seed": 2, "stop_at_eos": False, "max_new_tokens": 8}
    greedy = llada.generate(prompts(2, 5), **settings | {"temperature": 0.0}, top_k=1)
    out = llada.generate(prompts(2, 5), **settings, top_k=1)
    assert torch.equal(out.sequences, greedy.sequences)
    assert not torch.equal(llada.generate(prompts(2, 5), **settings).sequences, greedy.sequences)


def test_contexts_of_some_positions() -> None:
    chosen = torch.tensor([[True, False], [False, True]])
    contexts = Contexts(torch.arange(12).view(2, 2, 3), torch.arange(4).view(2, 2)).at(chosen)
    assert contexts.tokens.tolist() == [[0, 1, 2], [9, 10, 11]] and contexts.length.tolist() == [0, 3]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [*ALONE, {"top_p": 0.8, "temperature": 0.7, "seed": 3}], ids=lambda s: "+".join(s))
def test_filters_are_captured_on_a_gpu(settings: dict[str, Any]) -> None:
    model = small_model().cuda()
    ids, mask = (part.cuda() for part in ragged())
    decode = {"rule": Quota(2), "drafts": 2, **SIZES, **settings}
    eager, *static = (model.generate(ids, mask, engine=engine, **decode) for engine in ("eager", "static", "static"))
    assert all(torch.equal(out.sequences, eager.sequences) for out in static)
    assert all(step.graph is not None for step in steps_of(model))
