"""What people touch, on block-causal models: streams, criteria, infills, commands, traces, evaluations."""

from __future__ import annotations

import io
import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import block_files
import pytest
import sglang_like
import torch
from small import BLOCK_CAUSAL, MASK, PAD, left_pad, make_exact, prompts
from torch import Tensor
from transformers import AutoTokenizer, StoppingCriteria, pipeline

import fdpp
from fdpp import cli, tiny
from fdpp.cli.live import LiveView
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.integrations.evaluation.evaluator import Evaluator, Request
from fdpp.integrations.evaluation.likelihood import Pair, draw_masks, generator_for, log_likelihoods
from fdpp.models import families
from fdpp.models.language_model import DiffusionLM
from fdpp.trace.record import record

EACH = pytest.mark.parametrize("family", BLOCK_CAUSAL)
NEW = 21
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "rule": fdpp.Threshold(0.5)}
ROWS = [prompts(1, n, seed=n)[0] for n in (9, 3, 4, 13)]
"""Of lengths before, on and behind the ends of blocks of 4 and 8."""


def exactly(family: str, **config: Any) -> DiffusionLM:
    """In float64, so that no rounding decides a commit."""
    model = BLOCK_CAUSAL[family](**config)
    make_exact(model)
    return model


class Kept:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.finished: list[Tensor] = []
        self.drafts: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.finished.append(value)

    def put_draft(self, value: Tensor) -> None:
        self.drafts.append(value)

    def end(self) -> None: ...


@EACH
@pytest.mark.parametrize("stop_at_eos", [True, False])
def test_a_stream_is_the_sequences(family: str, stop_at_eos: bool) -> None:
    model = exactly(family)
    alone = [(row[None], torch.ones_like(row[None])) for row in ROWS]
    for ids, mask in [*alone, left_pad(ROWS)]:
        streamer = Kept()
        out = model.generate(ids, mask, streamer=streamer, stop_at_eos=stop_at_eos, **SETTINGS)
        told = torch.cat(streamer.finished, 1)
        assert told.equal(out.sequences[:, : told.shape[1]]) and (out.sequences[:, told.shape[1] :] == PAD).all()
        assert all(part.shape[1] for part in streamer.finished) and len(streamer.drafts) >= int(out.nfe.max())
        assert stop_at_eos or told.shape == out.sequences.shape


class Holds(StoppingCriteria):
    """Ends a sequence whose response holds `token`."""

    def __init__(self, start: int, token: int) -> None:
        self.start, self.token, self.new = start, token, 0

    def __call__(self, input_ids: Tensor, scores: Any, new_token_length: int = 0, **kwargs: Any) -> Tensor:
        self.new += new_token_length
        return (input_ids[:, self.start :] == self.token).any(1)


class Numbers:
    """A tokenizer whose words are the ids."""

    def decode(self, ids: list[int], **kwargs: Any) -> str:
        return "".join(f" {token} " for token in ids)


@EACH
def test_criteria_and_stop_strings_see_responses(family: str) -> None:
    """The prompt's tokens in the first block are no part of them, nor is what the last block has behind them."""
    model, (ids, mask) = exactly(family), left_pad(ROWS)
    P, free = ids.shape[1], model.generate(ids, mask, stop_at_eos=False, **SETTINGS).sequences[:, ids.shape[1] :]
    token = int(free[:, :-1].flatten().mode().values)
    assert (free == token).any(1).sum() >= 2 and not (free == token).all()
    ended: dict[str, Any] = {"stop_strings": f" {token} ", "tokenizer": Numbers()}
    both = model.generate(ids, mask, stopping_criteria=[Holds(P, token)], stop_at_eos=False, **SETTINGS)
    strings = model.generate(ids, mask, stop_at_eos=False, **ended, **SETTINGS)
    for b, row in enumerate(ROWS):
        criterion = Holds(len(row), token)
        by_criterion = model.generate(row[None], stopping_criteria=[criterion], stop_at_eos=False, **SETTINGS)
        by_string = model.generate(row[None], stop_at_eos=False, **ended, **SETTINGS)
        found = by_criterion.sequences[0, len(row) :]
        if token in free[b]:
            first = free[b].tolist().index(token)
            assert found[: first + 1].equal(free[b, : first + 1])
            assert by_string.sequences[0, len(row) :].tolist() == [*free[b, :first].tolist(), *[PAD] * (NEW - first)]
        else:
            assert found.equal(free[b]) and criterion.new == NEW and by_string.sequences[0, len(row) :].equal(free[b])
        assert both.sequences[b, P:].equal(found)
        assert strings.sequences[b, P:].equal(by_string.sequences[0, len(row) :])


@EACH
def test_a_string_that_ends_behind_the_response_ends_nothing(family: str) -> None:
    model, prompt = exactly(family), ROWS[0][None]
    longer = model.generate(prompt, stop_at_eos=False, **{**SETTINGS, "max_new_tokens": NEW + 2}).sequences
    string = "".join(f" {token} " for token in longer[0, prompt.shape[1] :].tolist())
    ended = model.generate(prompt, stop_strings=string, tokenizer=Numbers(), stop_at_eos=False, **SETTINGS).sequences
    assert ended.equal(model.generate(prompt, stop_at_eos=False, **SETTINGS).sequences)


@EACH
def test_texts_of_any_lengths_are_filled_as_alone(family: str) -> None:
    model, texts = exactly(family), [prompts(1, n, seed=n)[0] for n in (19, 12, 26)]
    for text, masked in zip(texts, ([2, 3, 7, 16], [9, 10, 11], [14, 15, 20]), strict=True):
        text[masked] = MASK
    ids, mask = left_pad(texts)
    out = model.infill(ids, mask, rule=fdpp.Threshold(0.5))
    assert not (out.sequences == MASK).any()
    for b, text in enumerate(texts):
        alone = model.infill(text[None], rule=fdpp.Threshold(0.5), cache="none")
        for name in ("sequences", "commit_step"):
            assert out[name][b, -len(text) :].equal(alone[name][0]), name
        assert out.nfe[b] == alone.nfe[0] > 0


def test_what_stands_alone_behind_a_response_is_not_decoded() -> None:
    """The response ends with a block's first token, which Fast-dLLM v2 decides by the block before."""
    model, prompt = exactly("Fast-dLLM v2"), ROWS[2][None]
    at_end, one_more = (
        model.generate(prompt, stop_at_eos=False, **{**SETTINGS, "max_new_tokens": n}) for n in (NEW - 1, NEW)
    )
    assert one_more.sequences[0, :-1].equal(at_end.sequences[0]) and one_more.nfe == at_end.nfe + 1


TRACED: dict[str, dict[str, Any]] = {
    "prefix": {"cache": "prefix"},
    "drafts": {"drafts": 3, "rule": fdpp.Quota(), "steps": 9},
    "whole length": {"stop_at_eos": False, "cache": "none"},
    "editing": {"rule": fdpp.Editing(tau=0.5, edit=0.5, post=2), "stop_at_eos": False},
}


@EACH
@pytest.mark.parametrize("settings", TRACED.values(), ids=TRACED)
def test_a_trace_is_the_decode(family: str, settings: dict[str, Any]) -> None:
    """Prompts that end amid a block, and blocks that end behind the response."""
    model = exactly(family)
    for row in ROWS[::2]:
        config = DiffusionGenerationConfig(**{**SETTINGS, **settings})
        trace, out = record(model, row[None], config), model.generate(row[None], generation_config=config)
        assert trace.response == out.sequences[0, len(row) :].tolist()
        assert trace.commit_step == out.commit_step[0].tolist() and trace.output.nfe.equal(out.nfe)
        tokens, steps = [MASK] * (NEW + len(trace.behind)), [-1] * (NEW + len(trace.behind))
        ends = [stop for _, stop in trace.blocks]
        assert [start for start, _ in trace.blocks] == [0, *ends[:-1]] and ends[-1] == len(tokens) >= NEW
        assert all(start < NEW for start, _ in trace.blocks)
        for number, step in enumerate(trace.steps):
            [block] = {next(b for b in trace.blocks if b[0] <= p < b[1]) for p in step.positions}
            masks = {p for p in range(*block) if tokens[p] == MASK}
            changed = {p for p, taken in zip(step.positions, step.committed, strict=True) if taken}
            assert set(step.positions) == (set(range(*block)) if step.settled else masks | changed)
            assert not (step.settled and (masks or changed)) and step.missing == sorted(step.missing)
            for p, token in zip(step.positions, step.proposals, strict=True):
                if p in changed:
                    assert tokens[p] != token
                    tokens[p], steps[p] = token, number
        decided = [*zip(trace.response, trace.commit_step, strict=True), *trace.behind]
        over = next((p + 1 for p, token in enumerate(trace.response) if token in trace.config.eos_ids), len(decided))
        over = over if config.stop_at_eos else len(decided)
        assert list(zip(tokens, steps, strict=True))[:over] == decided[:over]


def test_edits_show_in_a_trace() -> None:
    config = DiffusionGenerationConfig(
        **SETTINGS | {"rule": fdpp.Editing(tau=0.5, edit=0.5, post=2), "stop_at_eos": False}
    )
    trace = record(exactly("LLaDA2"), ROWS[0][None], config)
    changes = Counter(
        position
        for step in trace.steps
        for position, taken in zip(step.positions, step.committed, strict=True)
        if taken
    )
    assert any(step.settled for step in trace.steps) and max(changes.values()) > 1


def test_masks_of_a_prompt_that_would_be_decided_are_not_traced() -> None:
    with pytest.raises(ValueError, match="expected no mask in the block in which the response begins"):
        record(BLOCK_CAUSAL["SDAR"](), torch.tensor([[1, 2, 3, 4, MASK]]), DiffusionGenerationConfig(**SETTINGS))


SAY = ("--gen-length", "18", "--device", "cpu")


@EACH
def test_commands_take_a_published_folder(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but `--model` says what it is; blocks are the model's own, and the template's turn ends an answer."""
    model = block_files.written(family, tmp_path)
    tokenizer, model_option = AutoTokenizer.from_pretrained(tmp_path), ("--model", str(tmp_path))

    def printed(*argv: str) -> str:
        capsys.readouterr()
        assert cli.main([*argv, *model_option, *SAY]) == 0
        return capsys.readouterr().out

    def answer(turns: list[dict[str, str]], **settings: Any) -> str:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ends = [block_files.dream_files.EOS, block_files.TURN[family]]
        out = model.generate(ids, max_new_tokens=18, eos_token_id=ends, **settings).sequences[0, ids.shape[1] :]
        return str(tokenizer.decode(out, skip_special_tokens=True)).strip()

    ask = [{"role": "user", "content": "hello hello"}]
    expected = answer(ask) + "\n"
    assert printed("generate", "--prompt", "hello hello") == expected
    assert printed("generate", "--prompt", "hello hello", "--stream").strip() == expected.strip()
    sub = printed("generate", "--prompt", "hello hello", "--sub-block-length", "2", "--cache", "prefix")
    assert sub == answer(ask, sub_block_length=2, cache="prefix") + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello hello\nhello\n"))
    turns = [*ask, {"role": "assistant", "content": expected.strip()}, {"role": "user", "content": "hello"}]
    assert printed("chat").split() == [*expected.split(), *answer(turns).split()]
    printed("trace", "--prompt", "hello hello", "-o", str(tmp_path / "page.html"))
    assert f'"block length":{model.default_block_length},' in (tmp_path / "page.html").read_text()
    assert cli.main(["generate", "--prompt", "hello", "--refresh", "recent", *model_option, *SAY]) == 2
    assert (
        capsys.readouterr().err
        == "fdpp: error: refresh='recent': nothing of a block-causal model has to be fed again\n"
    )


def test_a_sub_block_of_a_model_without_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = tiny.generate("held-out", 1)[0].prompt
    assert cli.main(["generate", "--prompt", prompt, "--sub-block-length", "8", *SAY]) == 2
    assert "sub_block_length=8: expected a block-causal model" in capsys.readouterr().err


@EACH
def test_the_live_view_ends_with_the_response(family: str) -> None:
    """It redraws a block from its masks, whether or not the response begins or ends amid one."""
    model, tokenizer = BLOCK_CAUSAL[family](), tiny.load()[1]
    for row in ROWS[:2]:
        out = io.StringIO()
        with LiveView(tokenizer, MASK, out) as view:
            decoded = model.generate(row[None], streamer=view, stop_at_eos=False, **SETTINGS)
        assert view.done == decoded.sequences[0, len(row) :].tolist() and view.forwards == decoded.nfe


@EACH
def test_a_likelihood_adds_up_over_blocks(family: str) -> None:
    """The first block of the target begins amid the context's last one; in blocks of one token nothing is estimated."""
    model, (context, target) = exactly(family), (ROWS[0].tolist(), prompts(1, 11, seed=5)[0].tolist())
    whole, grid = [*context, *target], model.default_block_length

    def log_p(ids: list[int], masked: list[int], block_length: int) -> float:
        tokens = torch.tensor([ids])
        seen = tokens.clone()
        seen[0, masked] = MASK
        mask = model.no_later_block(tokens.shape, None, tokens.device, block_length)
        with torch.no_grad():
            logits = model.aligned(model(seen, mask).logits)[0, masked].double()
        return float(logits.log_softmax(-1).gather(1, tokens[0, masked][:, None]).sum())

    ends = [n for n in range(10, 21) if n % grid == 0 or n == 20]
    pair, expected = Pair(context, target), 0.0
    for start, stop in zip([9, *ends[:-1]], ends, strict=True):
        generator = generator_for(Pair(whole[:start], whole[start:stop]), 0)
        masks = draw_masks(stop - start, 4, generator)
        values = [
            (stop - start) / int(mask.sum()) * log_p(whole[:stop], (start + mask.nonzero()[:, 0]).tolist(), grid)
            for mask in masks
        ]
        expected += sum(values) / len(values)
    neighbours = [Pair([], target[:5]), pair, Pair(context[:2], target[:1])]
    got = list(log_likelihoods(model, neighbours, samples=4, batch_size=3))
    assert got[1] == pytest.approx(expected, abs=1e-4)
    chain = sum(log_p(whole[: n + 1], [n], 1) for n in range(9, 20))
    assert next(log_likelihoods(model, [pair], samples=4, block_length=1)) == pytest.approx(chain, abs=1e-4)


@EACH
def test_an_evaluation_answers_in_batches_as_alone(family: str, tmp_path: Path) -> None:
    block_files.written(family, tmp_path)
    loaded, tokenizer = families.load(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    make_exact(loaded)
    requests = [Request("task", text, {"max_gen_toks": 14, "until": ["l"]}) for text in ("hello", "a", "hello " * 9)]
    answers = [Evaluator(loaded, tokenizer, batch_size=n) for n in (3, 1)]
    together, alone = (evaluator.responses(requests) for evaluator in answers)
    assert together == alone and answers[0].tallies == answers[1].tallies | {
        name: replace(tally, seconds=answers[0].tallies[name].seconds) for name, tally in answers[1].tallies.items()
    }
    prompt, step = tokenizer("a", return_tensors="pt")["input_ids"], {"rule": fdpp.Quota(1), "cache": "none"}
    out = loaded.generate(prompt, max_new_tokens=9, stop_at_eos=False, **step)
    evaluator = Evaluator(loaded, tokenizer, mc_num=1, check_greedy=True)
    greedy = Pair([out.sequences[0, 0].item()], out.sequences[0, 1:].tolist())
    assert evaluator.is_greedy(greedy) and not evaluator.is_greedy(greedy._replace(target=greedy.target[::-1]))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Any:
    """fdpp's plugin on the stand-in for SGLang, by name of the algorithm."""
    for name, module in sglang_like.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "fdpp.integrations.sglang", raising=False)
    plugin = import_module("fdpp.integrations.sglang")
    plugin.register()
    yield sys.modules["sglang.srt.dllm.algorithm"].algo_name_to_cls
    del sys.modules["fdpp.integrations.sglang"], sys.modules["fdpp.integrations"].sglang


SERVED = {
    "ThresholdQuota": fdpp.ThresholdQuota(0.5, 2),
    "Leftmost": fdpp.Leftmost(3),
    "Hierarchy": fdpp.Hierarchy(low=0.3, high=0.6),
    "Editing": fdpp.Editing(tau=0.5, edit=0.5, post=2),
    "EditingAtOnce": fdpp.Editing(tau=0.5, k=2, edit=0.3, post=0),
}


@pytest.mark.parametrize("fdfo", [False, True], ids=["synchronous", "first done"])
@pytest.mark.parametrize("rule", SERVED.values(), ids=SERVED)
def test_sglangs_loops_give_the_tokens_of_generate(rule: fdpp.Rule, fdfo: bool, served: Any) -> None:
    """Requests of different lengths, block by block; each is one further as soon as its block is done, which a forward
    of its last tokens must have been before."""
    model = exactly("LLaDA2")
    T, blocks = model.default_block_length, 2

    def logits(context: list[int], block: list[int]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([context + block])).logits[0, -T:]

    algorithm = served[f"{type(rule).__name__}Profile"](
        sglang_like.DllmConfig("", {**vars(rule), "block_size": T}, T, MASK, fdfo)
    )
    texts, states = [row.tolist() for row in ROWS], [None] * len(ROWS)
    lengths = [(len(row) // T + blocks) * T for row in ROWS]
    runner = sglang_like.Runner(logits)
    now = {b: [*text[len(text) // T * T :], *[MASK] * (T - len(text) % T)] for b, text in enumerate(texts)}
    while now:
        ids = list(now)
        given = [max(len(ROWS[b]) - len(texts[b]) // T * T, 0) for b in ids]
        runner.contexts = [texts[b][: len(texts[b]) // T * T] for b in ids]
        batch = sglang_like.batch_of([now[b] for b in ids], given)
        _, out, accepted, after, _ = algorithm.run(runner, batch, [states[b] for b in ids] if fdfo else None)
        for i, b in enumerate(ids):
            whole = out[i] if fdfo else [*now[b][: given[i]], *out[i].tolist()]
            states[b], now[b] = (after[i] if fdfo else None), whole
            if not fdfo or accepted[i]:
                assert runner.seen[i] == whole
                texts[b] = [*runner.contexts[i], *whole]
                now[b] = [MASK] * T
                if len(texts[b]) == lengths[b]:
                    del now[b]
    for row, text in zip(ROWS, texts, strict=True):
        settings: dict[str, Any] = {"max_new_tokens": len(text) - len(row), "stop_at_eos": False}
        assert model.generate(row[None], rule=rule, **settings).sequences[0].tolist() == text


def test_sglang_edits_no_prompt_and_fills_no_mask_in_it(served: Any) -> None:
    algorithm = served["EditingProfile"](sglang_like.DllmConfig("", {"tau": 0.1, "edit": 0.0}, 6, MASK))
    batch = sglang_like.batch_of([[5, MASK, 7, MASK, MASK, MASK], [8] * 6], [3, 6])
    table = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    runner = sglang_like.Runner(lambda context, block: table[context[0]])
    runner.contexts = [[0], [1]]
    algorithm.run(runner, batch)
    best = table[0].index_fill(1, torch.tensor(MASK), -torch.inf).argmax(1).tolist()
    assert batch.input_ids[:6].tolist() == [5, MASK, 7, *best[3:]]
    assert batch.input_ids[6:].tolist() == [8] * 6


@EACH
def test_a_pipeline_takes_a_published_folder(family: str, tmp_path: Path) -> None:
    model = block_files.written(family, tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    tokenizer: Any = generator.tokenizer
    texts, settings = ["hello hello a", "b"], {"max_new_tokens": 9, "rule": fdpp.ThresholdQuota(0.5), "cache": "none"}
    tokenizer.padding_side = "left"
    records: Any = generator(texts, batch_size=2, return_full_text=False, return_dict_in_generate=False, **settings)
    for text, [answer] in zip(texts, records, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, **settings).sequences[0, ids.shape[1] :]
        assert answer["generated_text"] == tokenizer.decode(alone, skip_special_tokens=True)
        told = Kept()
        generator.model.generate(ids, streamer=told, **settings)
        assert torch.cat(told.finished[1:], 1)[0].equal(alone)
