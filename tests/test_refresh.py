"""Partial refreshes: what a block's first forward feeds, against plain decodes of single rows in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import forwards, no_prompt
from partial_refresh import FIRST, decode
from plain import model_with_ends, ragged
from small import EOS, MASK, exact_model, left_pad, prompts, small_model
from torch import Tensor

import fdpp
from fdpp import DiffusionGenerationConfig, LLaDAModelLM, cli, tiny
from fdpp.decoding.refresh import ALL, BLOCK, Recent, Refresh, Window
from fdpp.decoding.static import steps_of
from fdpp.tiny import train
from fdpp.trace.page import settings_of

PARTIAL = [text for text in FIRST if text != "all"]
COVERING = ["recent", "recent:2", "window:9:end", "window:start:0"]
RULES = [fdpp.Quota(3), fdpp.Frechet(0.1)]
CACHES = ["prefix", "dual"]
DYNAMIC: dict[str, Any] = {"rule": fdpp.Frechet(0.1), "max_new_tokens": 27, "block_length": 6}


@pytest.fixture(scope="module")
def exact() -> LLaDAModelLM:
    """Shared: no test may change it. Proposes EOS often."""
    return model_with_ends()


def plainly(model: LLaDAModelLM, prompt: Tensor, new: int, block: int, **how: Any) -> tuple[Tensor, Tensor, int, int]:
    text = torch.cat((prompt, torch.full((new,), MASK)))
    return decode(model, text, len(prompt), block, **how)


@pytest.mark.parametrize("refresh", FIRST)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_against_a_plain_decode(exact: LLaDAModelLM, rule: fdpp.Rule, cache: str, refresh: str) -> None:
    """Blocks that do not divide the response, one block, rows that finish a block early and come back, rows that end;
    both engines, and every row of a batch as if it were alone."""
    ids, mask = ragged()
    for new, block in ((27, 6), (20, 9), (5, 7)):
        settings = {"rule": rule, "cache": cache, "refresh": refresh, "max_new_tokens": new, "block_length": block}
        together = [exact.generate(ids, mask, engine=engine, **settings) for engine in ("eager", "static")]
        for b, P in enumerate(mask.sum(1).tolist()):
            prompt = ids[b, ids.shape[1] - P :]
            x, step_of, steps, fed = plainly(exact, prompt, new, block, rule=rule, first=FIRST[refresh], cache=cache)
            alone = exact.generate(prompt[None], **settings)
            assert alone.query_tokens.tolist() == [fed]
            for out, row in ((alone, 0), *((out, b) for out in together)):
                assert torch.equal(out.sequences[row, -new:], x[P:])
                assert torch.equal(out.commit_step[row], step_of[P:])
                assert out.nfe[row] == steps


@pytest.mark.parametrize("cache", CACHES)
def test_refreshes_differ(exact: LLaDAModelLM, cache: str) -> None:
    """The test above compares decodes that are not all the same one."""
    ids, mask = ragged()
    outs = {text: exact.generate(ids, mask, cache=cache, refresh=text, **DYNAMIC) for text in FIRST}
    assert len(set(outs["recent"].nfe.tolist())) > 1 and (outs["recent"].sequences[:, -27:] == EOS).any()
    made = {tuple(out.sequences.flatten().tolist()) for out in outs.values()}
    assert len(made) > (4 if cache == "dual" else 2)
    fed = {text: int(out.query_tokens.sum()) / int(out.nfe.sum()) for text, out in outs.items()}
    assert fed["block"] < fed["recent"] < fed["recent:2"] < fed["all"]


def test_all_is_what_it_was(exact: LLaDAModelLM) -> None:
    ids, mask = ragged()
    plain = exact.generate(ids, mask, **DYNAMIC)
    for refresh in ("all", Window(), Window(40, 40), Recent(1)):
        out = exact.generate(ids, mask, refresh=refresh, **DYNAMIC)
        assert torch.equal(out.sequences, plain.sequences) and torch.equal(out.query_tokens, plain.query_tokens)


@pytest.mark.parametrize("refresh", PARTIAL)
@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("options", [{}, {"cfg_scale": 0.7}, {"rule": fdpp.Klass(0.3, 0.5, 1)}], ids=str)
def test_a_row_of_a_batch_is_the_row_alone_in_float32(options: dict[str, Any], engine: str, refresh: str) -> None:
    """Sequences keep their own keys and values while others leave, come back and end.

    Static batches of five run with a filler in the row of a sixth sequence that will come back."""
    model, (ids, mask) = small_model(4), left_pad([prompts(1, P, seed=P)[0] for P in (3, 12, 7, 9, 1, 5)])
    settings = {**DYNAMIC, "refresh": refresh, "stop_at_eos": False, **options}
    out = model.generate(ids, mask, engine=engine, **settings)
    assert len(set(out.nfe.tolist())) > 1
    for b, P in enumerate(mask.sum(1).tolist()):
        alone = model.generate(ids[b : b + 1, ids.shape[1] - P :], **settings)
        assert torch.equal(out.sequences[b, -27:], alone.sequences[0, -27:])
        torch.testing.assert_close(out.confidence[b], alone.confidence[0], rtol=1e-4, atol=1e-5)
        assert torch.equal(out.commit_step[b], alone.commit_step[0])


@pytest.mark.parametrize("refresh", COVERING)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("branches", ["batch", "tree"])
def test_drafts_change_nothing(exact: LLaDAModelLM, branches: str, cache: str, refresh: str) -> None:
    ids, mask = ragged()
    settings = {**DYNAMIC, "cache": cache, "refresh": refresh}
    base = exact.generate(ids, mask, **settings)
    for drafts, engine in ((2, "eager"), (5, "static"), ("auto", "eager")):
        out = exact.generate(ids, mask, drafts=drafts, branches=branches, engine=engine, **settings)
        assert torch.equal(out.sequences, base.sequences) and torch.equal(out.commit_step, base.commit_step)
        assert out.nfe.sum() < base.nfe.sum()


def infills() -> Tensor:
    """Texts of 40 whose first mask is at 4, with blocks of 6 that other rows have no masks in."""
    rows = []
    for seed, masks in enumerate(
        ([*range(4, 40)], [*range(4, 10), *range(22, 31)], [4, 5, *range(16, 22), 39], [4, *range(10, 22), 30, 31])
    ):
        text = prompts(1, 40, seed=seed)[0]
        text[masks] = MASK
        rows.append(text)
    return torch.stack(rows)


@pytest.mark.parametrize("refresh", FIRST)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("engine", ["eager", "static"])
def test_infill(exact: LLaDAModelLM, engine: str, cache: str, refresh: str) -> None:
    """Rows that leave out blocks are refreshed from the block on that they decoded last, each as if alone."""
    ids, rule = infills(), fdpp.Threshold(0.6)
    settings = {"rule": rule, "cache": cache, "refresh": refresh, "block_length": 6}
    out = exact.infill(ids, engine=engine, **settings)
    drafted = exact.infill(ids, engine=engine, drafts=3, **settings) if refresh in COVERING else out
    for b, text in enumerate(ids):
        x, step_of, steps, fed = decode(exact, text, 4, 6, rule, FIRST[refresh], cache)
        assert torch.equal(out.sequences[b], x) and torch.equal(drafted.sequences[b], x)
        assert torch.equal(out.commit_step[b], step_of) and torch.equal(drafted.commit_step[b], step_of)
        assert out.nfe[b] == steps
        assert out.query_tokens[b] == fed or engine == "static"


def test_an_infill_reaches_back_over_what_it_left_out() -> None:
    """Blocks 1 and 2 hold no mask: the first forward of block 3 feeds it, them and block 0."""
    model, text = small_model(), prompts(1, 40)
    text[:, [4, 23]] = MASK
    with forwards(model) as seen:
        model.infill(text, rule=fdpp.Quota(6), block_length=6, refresh="recent")
    assert seen == [(1, 40), (1, 24)]


@pytest.mark.parametrize("refresh", ["all", "recent", "recent:2", "block"])
def test_positions_fed(refresh: str) -> None:
    """Five blocks of 4, the last of 2, two forwards each; a prompt of 7: 25 columns."""
    model, ids = small_model(), prompts(2, 7)
    with forwards(model) as seen:
        out: Any = model.generate(
            ids, rule=fdpp.Quota(2), refresh=refresh, max_new_tokens=18, block_length=4, stop_at_eos=False
        )
    first = {
        "all": [25, 25, 25, 25, 25],
        "recent": [25, 8, 8, 8, 6],
        "recent:2": [25, 8, 25, 8, 25],
        "block": [25, 4, 4, 4, 2],
    }[refresh]
    assert [n for _, n in seen] == [first[0], 4, first[1], 4, first[2], 4, first[3], 4, first[4]]
    assert out.query_tokens.tolist() == [sum(first) + 16] * 2 and out.nfe.tolist() == [9, 9]


def test_guidance_feeds_both_passes_of_a_partial_refresh(exact: LLaDAModelLM) -> None:
    settings = {"rule": fdpp.Quota(4), "refresh": "recent", "max_new_tokens": 12, "block_length": 4}
    out: Any = exact.generate(prompts(1, 7), cfg_scale=0.5, stop_at_eos=False, **settings)
    assert out.query_tokens.tolist() == [2 * (19 + 8 + 8)] and out.nfe.tolist() == [3]


def test_static_steps_of_all_blocks_are_one_capture() -> None:
    """A first forward of everything, one of two blocks, and one of the block; nothing is left to capture behind a
    warm-up, and a decode with another refresh finds what it shares."""
    model, ids = small_model(), prompts(1, 8)
    settings = {"rule": fdpp.Quota(1), "engine": "static", "max_new_tokens": 24, "block_length": 6}
    model.warmup(8, refresh="recent", **settings)
    steps = steps_of(model)
    assert sorted(step.window.width() for step in steps) == [6, 12, 32]
    model.generate(ids, refresh="recent", **settings)
    assert steps_of(model) == steps
    model.generate(ids, refresh="recent:2", **settings)
    assert steps_of(model) == steps
    model.generate(ids, refresh="window:6:end", **settings)
    assert sorted(step.window.width() for step in steps_of(model)) == [6, 12, 18, 24, 32]


def test_windows_of_one_width_with_the_block_elsewhere_are_steps_of_their_own() -> None:
    """Blocks 1 and 4 feed six columns: two before the block, at the start, and four before it, at the end."""
    settings = {**DYNAMIC, "refresh": Window(4, 2), "max_new_tokens": 10, "block_length": 2, "stop_at_eos": False}
    eager, static = (exact_model(1).generate(no_prompt(), engine=engine, **settings) for engine in ("eager", "static"))
    assert torch.equal(eager.sequences, static.sequences) and torch.equal(eager.commit_step, static.commit_step)


def test_a_recent_refresh_is_one_masked_forward_over_all_that_was_fed() -> None:
    """The forward that `fdpp.tiny.train` trains: of every column it sees what was fed last."""
    model, tokenizer = tiny.load()
    asked = [problem.prompt for problem in tiny.generate("held-out", 2, 0, 6)]
    ids = tokenizer(asked, return_tensors="pt")["input_ids"]
    settings, mask_id = model.generation_config, model.config.mask_token_id
    P, N, T = ids.shape[1], settings.max_new_tokens, settings.block_length
    tokens = torch.cat((ids, torch.full((2, N), mask_id)), dim=1)
    fed: list[tuple[Tensor, slice]] = []
    for block in range(P, P + N, T):
        columns = slice(block, block + T)
        now = slice(0, P + N) if block == P else slice(block - T, block + T)
        while (tokens[:, columns] == mask_id).any():
            fed.append((tokens[:, now].clone(), now))
            column = torch.cat([torch.arange(part.start, part.stop) for _, part in fed]).expand(2, -1)
            feed = torch.cat([torch.full((2, x.shape[1]), at) for at, (x, _) in enumerate(fed)], dim=1)
            with torch.no_grad():
                hidden = model.model(torch.cat([x for x, _ in fed], dim=1), train.seen(column, feed), column)
            logits = model.project(hidden[:, now.start - now.stop :][:, columns.start - now.start :][:, :T])
            tokens[:, columns] = fdpp.select(logits, tokens[:, columns], rule=fdpp.Quota(16), mask_id=mask_id).tokens
            now = columns
    got: Any = model.generate(ids, rule=fdpp.Quota(16), refresh="recent", stop_at_eos=False)
    assert torch.equal(got.sequences, tokens)
    assert got.nfe.tolist() == [8, 8]
    exact: Any = model.generate(ids, rule=fdpp.Quota(16), stop_at_eos=False)
    assert not torch.equal(exact.sequences, tokens) and (exact.query_tokens > got.query_tokens).all()


@pytest.mark.parametrize("text", [*FIRST, "recent:1", "window:0:1", "window:start:7"])
def test_the_text_of_a_refresh_is_the_refresh(text: str) -> None:
    refresh = Refresh.of(text)
    assert str(refresh) == text and Refresh.of(refresh) == refresh
    config = DiffusionGenerationConfig(refresh=text)  # type: ignore[arg-type]
    assert config.refresh == refresh and config.to_dict()["refresh"] == text
    assert DiffusionGenerationConfig.from_dict(config.to_dict()) == config
    assert ("refresh" in config.to_diff_dict()) == (text != "all")
    assert settings_of(config).get("refresh", "all") == text


def test_the_texts_mean_what_they_say() -> None:
    assert [Refresh.of(text) for text in ("all", "block", "recent:4")] == [ALL, BLOCK, Recent(4)]
    assert Refresh.of("window:start:end") == Window(None, None) == ALL
    assert Refresh.of("window:0:0") == BLOCK and Refresh.of("window:14:end") == Window(14, None)


@pytest.mark.parametrize(
    "refresh",
    [
        "",
        "none",
        "recent:0",
        "recent:x",
        "recent:1:2",
        "window:1",
        "window:end:start",
        "window:-1:0",
        "ALL",
        None,
        3,
        {},
    ],
    ids=repr,
)
def test_what_is_no_refresh(refresh: Any) -> None:
    with pytest.raises(ValueError, match=r"refresh: expected all, recent, recent:EVERY, .*got"):
        DiffusionGenerationConfig(refresh=refresh)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recent(0), "every .*got 0"),
        (lambda: Recent(True), "every .*got True"),
        (lambda: Window(-1), "before .*got -1"),
        (lambda: Window(1, 2.0), "after .*got 2.0"),  # type: ignore[arg-type]
    ],
    ids=["zero", "bool", "negative", "float"],
)
def test_numbers_that_do_not_fit(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache": "none", "refresh": "recent"}, "refresh='recent' keeps keys.*cache='none'"),
        ({"rule": fdpp.Dawn(), "refresh": "block"}, "refresh='block'.*Dawn.*reads all columns"),
        ({"drafts": 2, "refresh": "block"}, "refresh='block'.*drafts=2.*from 32 before"),
        ({"drafts": "auto", "refresh": Window(31)}, "refresh='window:31:end'.*drafts='auto'"),
    ],
    ids=["none", "dawn", "block", "window"],
)
def test_what_a_partial_refresh_is_refused_with(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionGenerationConfig(**settings)


def test_what_goes_with_it() -> None:
    DiffusionGenerationConfig(cache="none", refresh="all")  # type: ignore[arg-type]
    DiffusionGenerationConfig(rule=fdpp.Dawn(), refresh=Window())
    DiffusionGenerationConfig(drafts=2, refresh=Window(32, 0))


def test_an_option_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    asked = tiny.generate("held-out", 1)[0].prompt
    assert cli.main(["generate", "--prompt", asked, "--refresh", "recent:2"]) == 0
    model, tokenizer = tiny.load()
    out: Any = model.generate(tokenizer(asked, return_tensors="pt")["input_ids"], refresh=Recent(2))
    assert f"{out.nfe.item()} forwards" in capsys.readouterr().err
    assert cli.main(["generate", "--prompt", asked, "--refresh", "sometimes"]) == 2
    assert "--refresh: refresh: expected all, recent" in capsys.readouterr().err
