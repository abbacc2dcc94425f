"""Evaluation without a harness: responses and what they cost, the journal, likelihoods, presets, the command line."""

import itertools
import logging
import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small import EOS, MASK, PAD, exact, exact_model, prompts
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

import fdpp
from fdpp import cli, tiny
from fdpp.cli import eval as eval_command
from fdpp.cli.options import CommandError, config_of
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.integrations.evaluation import likelihood, progress
from fdpp.integrations.evaluation.evaluator import Evaluator, Request
from fdpp.integrations.evaluation.journal import Journal, fingerprint
from fdpp.integrations.evaluation.likelihood import Pair, draw_masks, log_likelihoods, score
from fdpp.integrations.evaluation.presets import PRESETS
from fdpp.integrations.evaluation.progress import Progress
from fdpp.integrations.evaluation.responses import cut_at_stop, respond
from fdpp.integrations.evaluation.settings import asked_by
from fdpp.rules.dream import LeastEntropy

CONFIG = DiffusionGenerationConfig(max_new_tokens=32, block_length=8, rule=fdpp.Threshold(0.3), cache="none")


def word_tokenizer(**special):
    """The words w0 to w60 and the special tokens of `small_model`; BOS, if there is one, is added to every text."""
    words = {f"w{i}": i for i in range(PAD)} | {"<pad>": PAD, "<mask>": MASK, "<eos>": EOS}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words[bos])])
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, **special)


MAKERS = {
    "LLaDA": partial(exact, "LLaDA", max_sequence_length=64),
    "Dream": partial(exact, "Dream", 9, max_position_embeddings=64),
}
"""Small models with a window of 64, of seeds whose responses differ and seldom hold PAD."""


@pytest.fixture(scope="module", params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.fixture(scope="module")
def model(make):
    return make()


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def words(ids):
    """The text of `ids`; a response may hold PAD, which has none."""
    return " ".join(f"w{i}" for i in ids if i != PAD)


def ragged(lengths, seed=0):
    """Prompts of the given lengths, as lists of ids."""
    return [prompts(1, n, seed + i)[0].tolist() for i, n in enumerate(lengths)]


def requests(lengths, task="task", **settings):
    return [Request(task, words(ids), {"until": [], "max_gen_toks": 32, **settings}) for ids in ragged(lengths)]


@pytest.fixture(scope="module")
def bpe():
    """A byte-level tokenizer, as LLaDA's is, whose tokens hold parts of stop strings."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["Question: why?\n\nAnswer: because, é. Question: who?\n\n"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class TestStopStrings:
    @pytest.mark.parametrize(
        "stops", [["Question:"], ["\n\n", "Question:"], ["Question:", "\n\n"], ["ause"], ["é"], ["\nA"], ["B"], ["?"]]
    )
    def test_text_ends_before_the_first_of_them(self, bpe, stops):
        text = "because, é.\n\nAnswer: I Question: why?\n\nAnswer:"
        ids = bpe(text)["input_ids"]
        cut = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        got, tokens = cut_at_stop(bpe, ids, stops)
        assert got == text[:cut]
        pieces = [bpe.decode(ids[:n]) for n in range(len(ids) + 1)]
        assert tokens == max(n for n, piece in enumerate(pieces) if text[:cut].startswith(piece))

    def test_a_special_token_is_found_and_not_shown(self, tokenizer):
        assert cut_at_stop(tokenizer, [1, PAD, 2, 3], ["<pad>"]) == ("w1 ", 1)
        assert cut_at_stop(tokenizer, [1, PAD, 2, 3], ["w3"]) == ("w1 w2 ", 3)
        assert cut_at_stop(tokenizer, [1, PAD, 2, 3], []) == ("w1 w2 w3", 4)


class TestResponses:
    def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(self, model, tokenizer):
        batch = ragged([3, 20, 9, 1])
        got = respond(model, tokenizer, batch, CONFIG)
        for ids, response in zip(batch, got, strict=True):
            out = model.generate(torch.tensor([ids]), generation_config=CONFIG)
            alone = out.sequences[0, len(ids) :].tolist()
            alone = alone[: alone.index(EOS)] if EOS in alone else alone
            assert (response.text, response.nfe) == (words(alone), int(out.nfe))
            assert response.tokens == len(alone) == round(float(out.tokens_per_forward) * int(out.nfe))
        assert len({response.text for response in got}) == len(batch)

    def test_a_stop_string_saves_the_blocks_after_it(self, model, tokenizer):
        [ids] = ragged([5])
        [whole] = respond(model, tokenizer, [ids], CONFIG)
        seen = whole.text.split()
        at = next(i for i in range(9, 24) if seen.index(seen[i]) == i)
        [stopped] = respond(model, tokenizer, [ids], CONFIG, stops=["", seen[at]])
        assert stopped.text.split() == seen[:at] and stopped.tokens == at
        assert stopped.nfe < whole.nfe

    def test_eos_and_padding_are_no_tokens(self):
        model, tokenizer = tiny.load()
        problems = tiny.generate("held-out", 4)
        batch = [tokenizer(problem.prompt)["input_ids"] for problem in problems]
        config = DiffusionGenerationConfig(max_new_tokens=128, cache="none")
        got = respond(model, tokenizer, batch, config)
        assert all("<" not in response.text for response in got)
        assert [response.tokens for response in got] == [len(response.text.split()) for response in got]
        assert max(response.tokens for response in got) < 128

    def test_an_eos_of_the_checkpoints_settings_ends_a_response(self, tokenizer):
        model, [ids] = exact_model(max_sequence_length=64), ragged([5])
        seen = respond(model, tokenizer, [ids], CONFIG)[0].text.split()
        model.generation_config = DiffusionGenerationConfig(eos_token_id=[EOS, int(seen[3].removeprefix("w"))])
        assert respond(model, tokenizer, [ids], CONFIG)[0].text.split() == seen[: seen.index(seen[3])]

    def test_without_stopping_every_block_is_decoded_and_the_text_is_the_same(self):
        model, tokenizer = tiny.load()
        batch = [tokenizer(problem.prompt)["input_ids"] for problem in tiny.generate("held-out", 2)]
        settings = {"max_new_tokens": 128, "cache": "none", "rule": fdpp.Threshold(0.9)}
        early = respond(model, tokenizer, batch, DiffusionGenerationConfig(**settings), ["Answer"])
        late = respond(model, tokenizer, batch, DiffusionGenerationConfig(**settings, stop_at_eos=False), ["Answer"])
        assert [r.text for r in early] == [r.text for r in late] and all("Answer" not in r.text for r in late)
        assert [r.tokens for r in early] == [r.tokens for r in late]
        assert all(e.nfe < n.nfe for e, n in zip(early, late, strict=True))


class TestJournal:
    def test_records_come_back(self, tmp_path):
        Journal(tmp_path / "new", rank=1).add({"a": {"text": "é\n"}})
        Journal(tmp_path / "new", rank=0).add({"b": {"text": "2"}})
        Journal(tmp_path / "new", rank=0).add({"c": {"text": "3"}})
        assert (tmp_path / "new" / "rank_0.jsonl").read_text().count("\n") == 2
        found = Journal(tmp_path / "new", rank=0)
        assert found.records == {"b": {"text": "2"}, "c": {"text": "3"}, "a": {"text": "é\n"}}

    @pytest.mark.parametrize("cut", [1, 2, 9, 20])
    def test_a_cut_last_line_is_passed_over_and_what_follows_is_kept(self, tmp_path, cut):
        Journal(tmp_path).add({"a": {"text": "one"}, "b": {"text": "two"}})
        path = tmp_path / "rank_0.jsonl"
        path.write_bytes(path.read_bytes()[:-cut])
        again = Journal(tmp_path)
        assert again["a"] == {"text": "one"} and ("b" in again) == (cut == 1)
        again.add({"c": {"text": "three"}})
        assert Journal(tmp_path)["c"] == {"text": "three"} and "a" in Journal(tmp_path)

    def test_a_fingerprint_is_that_of_the_weights(self):
        print_of = fingerprint(exact_model())
        assert fingerprint(exact_model()) == print_of
        changed = exact_model()
        with torch.no_grad():
            changed.model.transformer["blocks"][1].ff_out.weight.mul_(1.0001)
        assert len({print_of, fingerprint(changed), fingerprint(exact_model(seed=1))}) == 3
        assert fingerprint(exact_model().float()) != print_of


class TestEvaluator:
    def test_order_batches_and_counts(self, model, tokenizer, monkeypatch):
        lengths = [3, 20, 9, 1, 12, 3]
        alone = [Evaluator(model, tokenizer, CONFIG).responses([request])[0] for request in requests(lengths)]
        widths, generate = [], model.generate

        def spy(ids, *args, **kwargs):
            widths.append(tuple(ids.shape))
            return generate(ids, *args, **kwargs)

        monkeypatch.setattr(model, "generate", spy)
        evaluator = Evaluator(model, tokenizer, CONFIG, batch_size=4)
        assert evaluator.responses(requests(lengths)) == alone
        assert widths == [(4, 20), (2, 3)]
        tally = evaluator.tallies["task"]
        assert tally.responses == 6 and tally.tokens == sum(len(text.split()) for text in alone)
        report = tally.report()
        assert report["tokens_per_forward"] == tally.tokens / tally.nfe
        assert report["tokens_per_second"] == tally.tokens / tally.seconds

    def test_equal_requests_are_decoded_once_and_counted_once(self, model, tokenizer):
        evaluator = Evaluator(model, tokenizer, CONFIG)
        first, second = evaluator.responses(requests([4]) * 2)
        assert first == second == evaluator.responses(requests([4]))[0]
        assert evaluator.tallies["task"].responses == 1

    def test_the_task_decides_length_and_stop_strings_unless_told(self, model, tokenizer, monkeypatch):
        lengths, generate = [], model.generate

        def spy(ids, mask, config, **kwargs):
            lengths.append(config.max_new_tokens)
            return generate(ids, mask, config, **kwargs)

        monkeypatch.setattr(model, "generate", spy)
        evaluator = Evaluator(model, tokenizer, CONFIG)
        [text] = evaluator.responses(requests([4], max_gen_toks=16))
        stop = text.split()[5]
        assert evaluator.responses(requests([4], max_gen_toks=16, until=stop)) == [text.split(stop)[0]]
        Evaluator(model, tokenizer, CONFIG, gen_length=24).responses(requests([4], max_gen_toks=16))
        assert lengths == [16, 16, 24]

    def test_a_long_prompt_keeps_its_end(self, model, tokenizer, caplog):
        [ids] = ragged([60])
        evaluator = Evaluator(model, tokenizer, CONFIG)
        texts = evaluator.responses([Request("task", words(ids), {"max_gen_toks": 32})])
        assert texts == evaluator.responses([Request("task", words(ids[-32:]), {"max_gen_toks": 32})])
        assert len(caplog.records) == 1 and "60 tokens" in caplog.text
        with pytest.raises(ValueError, match="window of 64, got 65"):
            evaluator.responses(requests([4], max_gen_toks=65))

    def test_sampled_repeats_differ_and_do_not_depend_on_the_batch_size(self, model, tokenizer):
        asked = requests([4], do_sample=True, temperature=1.0) * 3 + requests([2, 7], do_sample=True, temperature=1.0)
        one, two = (Evaluator(model, tokenizer, CONFIG, batch_size=size).responses(asked) for size in (1, 2))
        assert one == two and len(set(one)) == 5

    def test_resume_decodes_only_what_is_missing(self, model, tokenizer, tmp_path, monkeypatch):
        asked = requests([3, 20, 9, 1])
        first = Evaluator(model, tokenizer, CONFIG, batch_size=2, resume=tmp_path)
        texts = first.responses(asked)
        path = tmp_path / "rank_0.jsonl"
        path.write_bytes(path.read_bytes()[:-5])
        rows, generate = [], model.generate

        def spy(ids, *args, **kwargs):
            rows.append(len(ids))
            return generate(ids, *args, **kwargs)

        monkeypatch.setattr(model, "generate", spy)
        again = Evaluator(model, tokenizer, CONFIG, batch_size=3, resume=tmp_path)
        assert again.responses(asked) == texts and rows == [1]
        assert again.tallies["task"].nfe == first.tallies["task"].nfe
        other = DiffusionGenerationConfig(block_length=8, rule=fdpp.Threshold(0.31), cache="none")
        Evaluator(model, tokenizer, other, resume=tmp_path).responses(asked)
        assert sum(rows) == 1 + 4, "another rule, other responses"

    def test_resume_does_not_take_the_responses_of_other_weights(self, model, tokenizer, tmp_path):
        [text] = Evaluator(model, tokenizer, CONFIG, resume=tmp_path).responses(requests([3]))
        other = exact_model(seed=1, max_sequence_length=64)
        assert Evaluator(other, tokenizer, CONFIG, resume=tmp_path).responses(requests([3])) != [text]

    def test_resume_does_not_take_the_responses_of_another_eos(self, tokenizer, tmp_path):
        model, asked = exact_model(max_sequence_length=64), requests([5])
        [before] = Evaluator(model, tokenizer, CONFIG, resume=tmp_path).responses(asked)
        model.generation_config = DiffusionGenerationConfig(eos_token_id=[EOS, int(before.split()[3][1:])])
        [after] = Evaluator(model, tokenizer, CONFIG, resume=tmp_path).responses(asked)
        assert after == Evaluator(model, tokenizer, CONFIG).responses(asked)[0] != before

    def test_bos_is_not_added_twice(self, model):
        evaluator = Evaluator(model, word_tokenizer(bos_token="w7"))
        assert evaluator.encode("w1 w2") == evaluator.encode("w7 w1 w2") == [7, 1, 2]

    def test_bos_is_put_before_prompts_where_the_tokenizer_puts_none(self, model, tmp_path):
        tokenizer = word_tokenizer()
        tokenizer.bos_token = "w7"
        plain, added = (
            Evaluator(model, tokenizer, CONFIG, add_bos_token=add, resume=tmp_path) for add in (False, True)
        )
        assert plain.encode("w1 w2") == [1, 2]
        assert added.encode("w1 w2") == added.encode("w7 w1 w2") == [7, 1, 2]
        assert added.pair_of("w1 ", "w2") == Pair([7, 1], [2]) and added.pair_of("", "w2") == Pair([7], [2])
        [text], [before] = added.responses(requests([4])), plain.responses(requests([4]))
        [ids] = ragged([4])
        assert plain.responses([Request("task", words([7, *ids]), {"max_gen_toks": 32})]) == [text] != [before]
        with pytest.raises(ValueError, match="add_bos_token: expected a tokenizer with a BOS token"):
            Evaluator(model, word_tokenizer(), add_bos_token=True)

    def test_refuses_settings_by_name(self, model, tokenizer):
        with pytest.raises(ValueError, match="batch_size: expected an int of at least 1, got 0"):
            Evaluator(model, tokenizer, batch_size=0)


NO_OPS = {
    **{"do_sample": False, "temperature": 0, "top_p": 0.95, "top_k": 50, "num_beams": 1, "use_cache": True},
    **{"repetition_penalty": 1.0, "num_return_sequences": 1, "no_repeat_ngram_size": 0, "early_stopping": True},
    **{"seed": None, "until": [], "bos_token_id": 3, "skip_special_tokens": True, "min_new_tokens": 0},
}


class TestSettingsOfTasks:
    @pytest.mark.parametrize(
        "settings, fields, stops",
        [
            ({"until": "b", "max_gen_toks": "16"}, {"max_new_tokens": 16}, ("b",)),
            ({"until": ["b", "a", "b"], "max_new_tokens": 16, "max_gen_toks": 8}, {"max_new_tokens": 8}, ("a", "b")),
            ({"stop": ["a"], "max_tokens": 16}, {"max_new_tokens": 16}, ("a",)),
            ({"stop_strings": "a", "gen_length": 16}, {"max_new_tokens": 16}, ("a",)),
            ({"do_sample": True}, {"temperature": 1.0}, ()),
            ({"do_sample": True, "temperature": "0.2"}, {"temperature": 0.2}, ()),
            ({"temperature": 0.2}, {"temperature": 0.2}, ()),
            ({"do_sample": False, "temperature": 0.2}, {}, ()),
            ({"do_sample": True, "temperature": 0.0}, {}, ()),
            (NO_OPS, {}, ()),
            (
                {"block_length": 8, "cfg_scale": 1.0, "remasking": "random", "cache": "none", "drafts": 2, "seed": 3},
                {"block_length": 8, "cfg_scale": 1.0, "remasking": "random", "cache": "none", "drafts": 2, "seed": 3},
                (),
            ),
            ({"rule": "quota", "steps": 4}, {"rule": fdpp.Quota(), "steps": 4}, ()),
            ({"rule": "threshold", "tau": 0.8}, {"rule": fdpp.Threshold(0.8)}, ()),
            ({"rule": {"name": "Threshold", "tau": 0.8}}, {"rule": fdpp.Threshold(0.8)}, ()),
            ({"margin": 0.1}, {"rule": fdpp.Frechet(0.1)}, ()),
        ],
        ids=str,
    )
    def test_are_taken(self, settings, fields, stops):
        assert asked_by(settings, fdpp.Frechet()) == (fields, stops)

    @pytest.mark.parametrize("name", DiffusionGenerationConfig.__dataclass_fields__)
    def test_every_field_of_a_decode_is_taken(self, name):
        """Also those that come later: none is lost in a list of names."""
        value = getattr(DiffusionGenerationConfig(), name)
        asked_by({name: value, "do_sample": True}, fdpp.Frechet())
        if name in ("rule", "return_dict_in_generate", "temperature", "max_new_tokens", "stop_strings"):
            return
        marker = object()  # a value that means something
        assert asked_by({name: marker, "do_sample": True}, fdpp.Frechet()).fields[name] is marker

    @pytest.mark.parametrize(
        "settings, message",
        [
            ({"num_beams": 4}, "num_beams=4 is of autoregressive generation and has no meaning"),
            ({"max_length": 64}, "max_length=64 has another name here, max_gen_toks"),
            (
                {"threshold": 0.9},
                "threshold=0.9 has another name here, rule=threshold with tau; .* no number of Frechet",
            ),
            ({"factor": 1.0}, "factor=1.0 has another name here, rule=factor"),
            ({"use_cache": False}, "use_cache=False has another name here, cache=none"),
            ({"block_size": 8}, "block_size=8 has another name here, block_length=8"),
            ({"no_such_setting": 1}, "no_such_setting=1"),
            ({"rule": "best"}, "rule: expected .* got 'best'"),
            ({"rule": "quota", "tau": 0.8}, "tau=0.8; it is no number of Quota"),
            ({"max_gen_toks": "long"}, "max_gen_toks: expected an int of at least 1, got 'long'"),
            ({"max_gen_toks": 0}, "max_gen_toks: expected an int of at least 1, got 0"),
            ({"temperature": "hot"}, "temperature: expected a number, got 'hot'"),
            ({"until": [3]}, "until: expected strings, got 3"),
            ({"steps": 8}, "steps=8 is a schedule"),
            ({"block_length": 0}, "block_length: expected"),
            ({"repetition_penalty": -1.0}, "repetition_penalty"),
        ],
        ids=str,
    )
    def test_are_refused_by_name_before_the_first_forward(self, model, tokenizer, monkeypatch, settings, message):
        monkeypatch.setattr(type(model), "generate", None)
        evaluator = Evaluator(model, tokenizer, DiffusionGenerationConfig(block_length=8), given=())
        asked = [*requests([3, 4]), Request("odd", "w1", settings)]
        with pytest.raises(ValueError, match=f"task odd: .*{message}"):
            evaluator.responses(asked)

    def test_requests_with_different_ones_each_decode_with_their_own(self, model, tokenizer):
        changes = ({}, {"block_length": 4}, {"cfg_scale": 1.5}, {"rule": "quota", "steps": 8}, {"max_gen_toks": 16})
        config = DiffusionGenerationConfig(block_length=8, rule=fdpp.Threshold(0.3), cache="none")
        asked = [request for settings in changes for request in requests([3, 9], **settings)]
        got = Evaluator(model, tokenizer, config, given=(), batch_size=8).responses(asked)
        expected = []
        for change in changes:
            rule = {"rule": fdpp.Quota()} if "rule" in change else {}
            length = {"max_new_tokens": change.get("max_gen_toks", 32)}
            fields = {**change, **rule, **length}
            fields.pop("max_gen_toks", None)
            for ids in ragged([3, 9]):
                out = model.generate(torch.tensor([ids]), generation_config=config, **fields)
                response = out.sequences[0, len(ids) :].tolist()
                expected.append(words(response[: response.index(EOS)] if EOS in response else response))
        assert got == expected and len(set(got)) > 6

    def test_what_was_given_stays_and_a_note_says_so_once(self, model, tokenizer, caplog):
        config = DiffusionGenerationConfig(block_length=8, rule=fdpp.Threshold(0.3), cache="none")
        evaluator = Evaluator(model, tokenizer, config, given={"block_length"}, gen_length=32)
        plain = evaluator.responses(requests([3, 5]))
        caplog.clear()
        assert evaluator.responses(requests([3, 5], block_length=4, max_gen_toks=16, cache="none")) == plain
        notes = sorted(record.getMessage() for record in caplog.records)
        assert notes == [
            "task task asks for block_length=4, 8 was given and stays",
            "task task asks for max_new_tokens=16, 32 was given and stays",
        ]
        assert Evaluator(model, tokenizer, config, given=()).responses(requests([3], block_length=4)) != plain[:1]

    def test_are_part_of_what_a_journal_knows_a_response_by(self, model, tokenizer, tmp_path, monkeypatch):
        rows, generate = [], model.generate

        def spy(ids, *args, **kwargs):
            rows.append(len(ids))
            return generate(ids, *args, **kwargs)

        monkeypatch.setattr(model, "generate", spy)
        config = DiffusionGenerationConfig(block_length=8, rule=fdpp.Threshold(0.3), cache="none")
        for settings, decoded in (
            ({}, 1),
            ({"block_length": 4}, 1),
            ({"block_length": 4, "num_beams": 1}, 0),
            (NO_OPS, 0),
            ({"rule": "threshold", "tau": 0.3}, 0),
            ({"tau": 0.31}, 1),
            ({"until": ["w1"]}, 1),
        ):
            evaluator = Evaluator(model, tokenizer, config, given=(), resume=tmp_path)
            evaluator.responses(requests([3], **settings))
            assert len(rows) == decoded, settings
            rows.clear()


class TestProgress:
    @pytest.fixture
    def clock(self, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
        return now

    def test_is_a_line_now_and_then_off_a_terminal(self, clock, capsys):
        with Progress("responses", 4000, done=20) as bar:
            for _ in range(3900):
                clock[0] += 1.0
                bar.update(1, "7 tok/s")
        lines = capsys.readouterr().err.splitlines()
        assert lines[:3] == [
            "responses: 20 of 4000 are in the journal",
            "responses: 30 of 4000, 0:00:10 elapsed, 7 tok/s",
            "responses: 40 of 4000, 0:00:20 elapsed, 7 tok/s",
        ]
        assert lines[-1] == "responses: 3920 of 4000, 1:05:00 elapsed, 7 tok/s" and 15 < len(lines) < 35

    def test_a_short_run_says_one_line(self, clock, capsys):
        with Progress("likelihoods", 2) as bar:
            bar.update()
            bar.update()
        assert capsys.readouterr().err == "likelihoods: 2 of 2, 0:00:00 elapsed\n"

    def test_nothing_is_said_of_nothing_or_by_other_processes(self, clock, capsys):
        with Progress("responses", 3):
            pass
        with Progress("responses", 3, done=1, shown=False) as bar:
            clock[0] = 1000.0
            bar.update()
        assert capsys.readouterr().err == ""

    def test_is_a_bar_in_a_terminal(self, monkeypatch, capsys):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        with Progress("responses", 4, done=1) as bar:
            bar.update(2, "7 tok/s")
        err = capsys.readouterr().err
        assert "3/4" in err and "7 tok/s" in err and "elapsed" not in err

    def test_tokens_per_second_are_those_of_the_run(self, model, tokenizer, capsys):
        """Not those of the last group alone."""
        evaluator = Evaluator(model, tokenizer, CONFIG)
        evaluator.responses([*requests([3, 9]), *requests([4], until=["w1"])])
        tally = evaluator.tallies["task"].report()
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("responses: 3 of 3, 0:00:")
        assert f"{tally['tokens_per_second']:.0f} tok/s, {tally['nfe_per_response']:.1f} NFE" in line


class TestLikelihood:
    def test_masks_are_uniform_in_number_and_place(self):
        masks = draw_masks(5, 2000, torch.Generator().manual_seed(0))
        counts = Counter(masks.sum(1).tolist())
        assert set(counts) == {1, 2, 3, 4, 5} and all(abs(count - 400) <= 1 for count in counts.values())
        assert (masks.double().mean(0) - 0.6).abs().max() < 0.06
        assert draw_masks(1, 128, torch.Generator()).tolist() == [[True]]

    def test_score_is_that_of_the_masked_targets_alone(self, model):
        contexts = ragged([7, 3, 0])
        contexts[0][2] = MASK  # a mask of the prompt's own is no target
        pairs = [Pair(context, prompts(1, 4, seed)[0].tolist()) for seed, context in enumerate(contexts)]
        masks = [torch.tensor(mask) for mask in ([1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1])]
        got = score(model, [(pair, mask.bool()) for pair, mask in zip(pairs, masks, strict=True)])
        for pair, mask, value in zip(pairs, masks, got, strict=True):
            target = torch.tensor(pair.target)
            ids = torch.cat((torch.tensor(pair.context, dtype=torch.int64), target.masked_fill(mask.bool(), MASK)))
            with torch.no_grad():
                logits = model.aligned(model(ids[None]).logits)
            log_p = logits[0, len(pair.context) :].log_softmax(-1).gather(1, target[:, None])[:, 0]
            assert value == pytest.approx(4 / int(mask.sum()) * float(log_p[mask.bool()].sum()), abs=1e-4)

    def test_token_ids_may_be_those_of_the_checkpoints_settings(self, model, make):
        pairs = [Pair(*ragged([6, 3])), Pair(*ragged([2, 1], seed=9))]
        rows = [(pair, torch.ones(len(pair.target), dtype=torch.bool)) for pair in pairs]
        other = make(mask_token_id=None, pad_token_id=None)
        other.generation_config = DiffusionGenerationConfig(mask_token_id=MASK)
        assert score(other, rows) == score(model, rows)

    def test_the_estimate_is_the_mean_over_all_masks(self, model):
        pair = Pair(*ragged([6, 3]))
        masks = [torch.tensor(mask) for mask in itertools.product((False, True), repeat=3) if any(mask)]
        weights = [1 / 3 / math.comb(3, int(mask.sum())) for mask in masks]
        scores = score(model, [(pair, mask) for mask in masks])
        exact = sum(w * s for w, s in zip(weights, scores, strict=True))
        spread = math.sqrt(sum(w * (s - exact) ** 2 for w, s in zip(weights, scores, strict=True)))
        [estimate] = log_likelihoods(model, [pair], samples=600, batch_size=200)
        assert spread > 0.1 and abs(estimate - exact) < 4 * spread / math.sqrt(600)

    def test_it_depends_neither_on_batches_nor_on_neighbours(self, model):
        pairs = [Pair(*ragged([6, 3])), Pair(*ragged([2, 1], seed=9)), Pair(*ragged([0, 5], seed=4))]
        one = [next(log_likelihoods(model, [pair], samples=8)) for pair in pairs]
        assert list(log_likelihoods(model, pairs, samples=8, batch_size=5)) == pytest.approx(one, abs=1e-4)
        assert next(log_likelihoods(model, pairs, samples=8, seed=1)) != pytest.approx(one[0], abs=1e-4)

    def test_a_target_of_one_token_takes_one_forward(self, model, monkeypatch):
        rows = []
        monkeypatch.setattr(likelihood, "score", lambda model, batch, _: rows.extend(batch) or [0.0] * len(batch))
        assert list(log_likelihoods(model, [Pair([1, 2], [3])], samples=128)) == [0.0] and len(rows) == 1

    def test_white_space_at_the_end_of_a_context_belongs_to_the_target(self, model, tokenizer, bpe):
        context, target = Evaluator(model, bpe).pair_of("Question: ", "why?")
        assert (bpe.decode(context), bpe.decode(target)) == ("Question:", " why?")
        assert Evaluator(model, tokenizer).pair_of("", "w3 w4") == Pair([], [3, 4])

    def test_requests_are_answered_in_order_and_resumed(self, model, tokenizer, tmp_path, monkeypatch):
        asked = [("w1", " w2"), ("w1 w5 w6", " w3 w4"), ("w1", ""), ("w1", " w2")]
        settings = {"mc_num": 4, "batch_size": 3, "resume": tmp_path}
        got = Evaluator(model, tokenizer, **settings).likelihoods(asked)
        assert got[0] == got[3] and got[2] == (0.0, True)
        [(value, _)] = Evaluator(model, tokenizer, mc_num=4).likelihoods([asked[1]])
        assert got[1] == (pytest.approx(value, abs=1e-4), False)
        monkeypatch.setattr(likelihood, "score", None)
        assert Evaluator(model, tokenizer, **settings).likelihoods(asked) == got

    def test_greedy_is_what_one_token_per_step_decodes(self, model, tokenizer):
        [ids] = ragged([5])
        out = model.generate(torch.tensor([ids]), max_new_tokens=6, block_length=6, rule=fdpp.Quota(1), cache="none")
        target = out.sequences[0, 5:].tolist()
        wrong = [*target[:5], (target[5] + 1) % PAD]
        evaluator = Evaluator(model, tokenizer, mc_num=1, check_greedy=True)
        asked = [(words(ids), " " + words(target)), (words(ids), " " + words(wrong))]
        assert [greedy for _, greedy in evaluator.likelihoods(asked)] == [True, False]


class TestCommand:
    @staticmethod
    def resolved(*argv):
        args = cli.build_parser().parse_args(["eval", *argv])
        eval_command.resolve(args)
        return args

    def test_presets_are_the_published_settings(self):
        args = self.resolved("--preset", "fast-dllm++/gsm8k")
        got = config_of(args)
        assert (args.tasks, args.num_fewshot, args.chat_template, args.multiturn) == ("gsm8k", 5, True, False)
        assert (got.rule, got.cache, got.max_new_tokens, got.block_length) == (fdpp.Frechet(0.25), "prefix", 256, 32)
        assert not got.stop_at_eos and got.drafts == 1
        assert config_of(self.resolved("--preset", "dawn/humaneval")).rule == fdpp.Dawn(tau_low=0.8)

    @pytest.mark.parametrize(
        ("name", "shots", "rule", "cache", "block_length", "drafts"),
        [
            ("ssd/gsm8k", 5, fdpp.Quota(1), "dual", 32, 4),
            ("saber/humaneval", 0, fdpp.Saber(2), "none", 256, 1),
            ("saber/gsm8k", 0, fdpp.Saber(2), "none", 128, 1),
            ("wino/gsm8k", 0, fdpp.Wino(0.6, 0.9), "none", 128, 1),
            ("wino/minerva_math500", 0, fdpp.Wino(0.7, 0.9), "none", 128, 1),
            ("wino/humaneval", 0, fdpp.Wino(0.7, 0.9), "none", 128, 1),
            ("wino/mbpp", 0, fdpp.Wino(0.8, 0.9), "none", 128, 1),
            ("credit/minerva_math", 4, fdpp.Credit(0.9, 0.7, 0.2, 0.8), "none", 32, 1),
            ("hierarchy/mbpp", 3, fdpp.Hierarchy(0.5, 0.9), "none", 32, 1),
        ],
    )
    def test_presets_with_blocks_and_drafts_of_their_own(self, name, shots, rule, cache, block_length, drafts):
        args = self.resolved("--preset", name)
        got = config_of(args)
        assert (args.tasks, args.num_fewshot, args.chat_template) == (name.split("/")[1], shots, True)
        assert (got.rule, got.cache, got.drafts) == (rule, cache, drafts)
        assert (got.max_new_tokens, got.block_length, got.stop_at_eos) == (256, block_length, False)

    @pytest.mark.parametrize(
        ("name", "task", "shots", "rule", "cache", "length", "drafts", "model", "chat"),
        [
            ("fast-dllm++/dream-base/gsm8k", "gsm8k", 5, fdpp.Frechet(0.25), "prefix", 256, 1, "Base", False),
            ("fast-dllm++/dream-base/humaneval", "humaneval_chat", 0, fdpp.Frechet(), "prefix", 256, 1, "Base", False),
            ("fast-dllm/dream-base/mbpp", "mbpp", 3, fdpp.Threshold(0.9), "prefix", 256, 1, "Base", False),
            (
                "dawn/dream-base/gsm8k",
                *("gsm8k", 5),
                fdpp.Dawn(tau_sink=0.03, tau_edge=0.05, tau_induce=0.75, tau_low=0.75, layers=4),
                *("none", 256, 1, "Base", False),
            ),
            (
                "dawn/dream-base/minerva_math",
                *("minerva_math", 4),
                fdpp.Dawn(tau_sink=0.03, tau_edge=0.05, tau_induce=0.75, tau_low=0.8, layers=4),
                *("none", 256, 1, "Base", False),
            ),
            (
                "dawn/dream-instruct/humaneval",
                *("humaneval", 0),
                fdpp.Dawn(tau_sink=0.03, tau_edge=0.1, tau_induce=0.75, tau_low=0.8, layers=4),
                *("none", 256, 1, "Instruct", False),
            ),
            ("freedave/dream-instruct/gsm8k", "gsm8k", 5, fdpp.Quota(1), "dual", 1024, 8, "Instruct", True),
            (
                "freedave++/dream-instruct/mbpp_instruct",
                *("mbpp_instruct", 3, fdpp.Threshold(0.95), "dual", 1024, 8, "Instruct", True),
            ),
        ],
    )
    def test_presets_of_dream_are_the_published_settings(
        self, name, task, shots, rule, cache, length, drafts, model, chat
    ):
        args = self.resolved("--preset", name)
        got = config_of(args)
        assert (args.tasks, args.num_fewshot, args.chat_template, args.multiturn) == (task, shots, chat, chat)
        assert (got.rule, got.cache, got.max_new_tokens, got.drafts) == (rule, cache, length, drafts)
        assert got.block_length == 32 and got.stop_at_eos == chat and args.add_bos_token
        assert PRESETS[name].model == (f"Dream-org/Dream-v0-{model}-7B", "Dream")

    def test_the_baseline_of_dreams_tables_is_a_preset_with_options(self):
        options = ("--rule", "least_entropy", "--steps", "256", "--block-length", "256", "--cache", "none")
        args = self.resolved("--preset", "fast-dllm/dream-base/gsm8k", *options)
        got = config_of(args)
        assert (got.rule, got.steps, got.blocks(), got.cache) == (LeastEntropy(), 256, [(0, 256)], "none")
        assert args.add_bos_token and not got.stop_at_eos and args.num_fewshot == 5

    @pytest.mark.parametrize("name", PRESETS)
    def test_the_model_of_a_preset_is_in_its_name(self, name):
        _, *variant, task = name.split("/")
        preset = PRESETS[name]
        size = {"": "LLaDA-8B-Instruct", "dream-base": "Dream-v0-Base-7B", "dream-instruct": "Dream-v0-Instruct-7B"}
        assert preset.model.name.split("/")[1] == size["".join(variant)]
        assert preset.model.model_type == ("Dream" if variant else "llada")
        assert preset.add_bos_token == bool(variant) and task.startswith(preset.task.removesuffix("_chat"))

    @pytest.mark.parametrize(
        ("name", "model_type", "fitting"),
        [
            ("dawn/dream-base/mbpp", "llada", "fast-dllm++/mbpp, fast-dllm/mbpp, dawn/mbpp"),
            (
                "fast-dllm/mbpp",
                "Dream",
                "fast-dllm++/dream-base/mbpp, fast-dllm/dream-base/mbpp, dawn/dream-base/mbpp, ",
            ),
            ("fast-dllm++/gsm8k-1024", "Dream", "none"),
        ],
    )
    def test_a_preset_of_another_family_is_refused_with_those_of_the_table_that_fit(self, name, model_type, fitting):
        args = self.resolved("--preset", name, "--model", "some/model")
        preset = PRESETS[name].model
        eval_command.check_preset(args, SimpleNamespace(config=SimpleNamespace(model_type=preset.model_type)))
        with pytest.raises(CommandError) as error:
            eval_command.check_preset(args, SimpleNamespace(config=SimpleNamespace(model_type=model_type)))
        assert (
            f"is of {preset.name}: expected a model of type {preset.model_type}, got {model_type} (some/model)"
            in str(error.value)
        )
        assert f"presets of {name.split('/')[-1]} are {fitting}" in str(error.value)
        eval_command.check_preset(self.resolved("--tasks", "gsm8k"), None)

    @pytest.mark.parametrize("name", PRESETS)
    def test_every_preset_is_what_its_options_decode(self, name):
        preset, args = PRESETS[name], self.resolved("--preset", name)
        got = config_of(args)
        assert (got.rule, got.cache, got.drafts) == (preset.rule, preset.cache, preset.drafts)
        assert (got.max_new_tokens, got.block_length, got.stop_at_eos) == (
            preset.gen_length,
            preset.block_length,
            preset.stop_early,
        )
        assert (args.chat_template, args.multiturn, args.add_bos_token) == (
            preset.chat_template,
            preset.multiturn,
            preset.add_bos_token,
        )

    @pytest.mark.parametrize("preset_first", [True, False])
    def test_options_win_over_a_preset(self, preset_first):
        preset = ("--preset", "fast-dllm++/gsm8k")
        # "dual" and 32 are what the options say without a preset, too.
        options = ("--rule", "factor", "--cache", "dual", "--gen-length", "64", "--num-fewshot", "0", "--stop-at-eos")
        args = self.resolved(*(preset + options if preset_first else options + preset))
        got = config_of(args)
        assert (got.rule, got.cache, got.max_new_tokens, got.stop_at_eos) == (fdpp.Factor(0.75), "dual", 64, True)
        assert (args.tasks, args.num_fewshot) == ("gsm8k", 0)
        assert config_of(self.resolved(*preset, "--margin", "0.02")).rule == fdpp.Frechet(0.02)

    def test_defaults_without_a_preset(self):
        args = self.resolved("--tasks", "gsm8k")
        assert args.gen_length is None and args.num_fewshot is None and not args.chat_template
        args.gen_length = 7
        expected = DiffusionGenerationConfig(max_new_tokens=7, block_length=32, seed=0)
        assert config_of(args) == expected

    @pytest.mark.parametrize(
        "texts, settings",
        [
            (["temperature=0.7,do_sample=true"], {"temperature": 0.7, "do_sample": True}),
            (["max_new_tokens=64", "block_length=8"], {"max_gen_toks": 64, "block_length": 8}),
            (["until=['a,b=c', 'd']"], {"until": ["a,b=c", "d"]}),
            (['until=["\\n\\n"],seed=3,'], {"until": ["\n\n"], "seed": 3}),
            (["rule=quota,steps=8"], {"rule": "quota", "steps": 8}),
            (['{"until": ["x"], "max_gen_toks": 8}'], {"until": ["x"], "max_gen_toks": 8}),
            (["stop=</s>,seed=None"], {"until": "</s>", "seed": None}),
        ],
        ids=str,
    )
    def test_gen_kwargs_are_written_as_the_harness_has_them(self, texts, settings):
        args = self.resolved("--tasks", "gsm8k", "--gen_kwargs", *texts)
        assert args.gen_kwargs == settings == self.resolved("--tasks", "a", "--gen-kwargs", *texts).gen_kwargs

    @pytest.mark.parametrize("text", ["temperature", "=3", "until=['a", "{temperature: 1}", "a=1,b", "until=a]"])
    def test_gen_kwargs_that_cannot_be_read_are_refused(self, text, capsys):
        assert cli.main(["eval", "--tasks", "tiny_sums", "--gen_kwargs", text]) == 2
        assert "expected " in capsys.readouterr().err

    def test_a_temperature_of_gen_kwargs_samples(self):
        """The harness leaves do_sample as the task has it, and a task that is greedy would drop the temperature."""
        assert self.resolved("--tasks", "a", "--gen_kwargs", "temperature=0.7").gen_kwargs["do_sample"] is True
        assert "do_sample" not in self.resolved("--tasks", "a", "--gen_kwargs", "temperature=0").gen_kwargs

    @pytest.mark.parametrize(
        "argv, message",
        [
            (["--gen-length", "64", "--gen_kwargs", "max_gen_toks=32"], "max_new_tokens is set by another option"),
            (["--tau", "0.8", "--rule", "threshold", "--gen_kwargs", "tau=0.7"], "rule is set by another option"),
            (["--no-stop-at-eos", "--gen_kwargs", "stop_at_eos=False"], "stop_at_eos is set by another option"),
            (["--gen_kwargs", "num_beams=4"], "--gen_kwargs: num_beams=4 is of autoregressive generation"),
        ],
        ids=str,
    )
    def test_gen_kwargs_are_refused_before_the_model_is_loaded(self, argv, message, capsys):
        assert cli.main(["eval", "--tasks", "tiny_sums", "--model", "/none", *argv]) == 2
        assert message in capsys.readouterr().err

    def test_options_and_presets_stay_whatever_a_task_asks(self):
        assert self.resolved("--tasks", "gsm8k").given == set()
        args = self.resolved("--tasks", "gsm8k", "--margin", "0.1", "--temperature", "0", "--cache", "dual")
        assert args.given == {"rule", "temperature", "cache"}
        preset = self.resolved("--preset", "fast-dllm++/gsm8k", "--gen_kwargs", "max_gen_toks=512,block_length=16")
        assert preset.given == {"rule", "cache", "drafts", "stop_at_eos"} and preset.gen_length is None

    def test_help_says_what_the_defaults_are(self, capsys):
        assert cli.main(["eval", "--help"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "what the task asks for, else 256)" in out and "(default: dual)" in out
        assert all(name in out for name in PRESETS)

    def test_one_line_where_the_harness_is_missing(self, monkeypatch, capsys):
        for module in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.delitem(sys.modules, "fdpp.integrations.lm_eval", raising=False)
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        assert cli.main(["eval", "--tasks", "tiny_sums"]) == 2
        out, err = capsys.readouterr()
        assert err.count("\n") == 1 and not out
        assert "pip install 'fdpp[eval]'" in err and "pip install '.[eval]' in its checkout" in err

    def test_every_message_on_an_extra_says_what_a_checkout_needs(self):
        """The package is not on PyPI: `pip install 'fdpp[...]'` alone works for those who have it installed."""
        files = Path(fdpp.__file__).parent.rglob("*.py")
        named = [path.name for path in files if "pip install 'fdpp" in path.read_text(encoding="utf-8")]
        assert named == ["extras.py"]

    def test_tasks_are_asked_for(self, capsys):
        assert cli.main(["eval"]) == 2
        assert "--tasks or --preset" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "argv, message",
        [
            ("--output .", "--output .: a folder, expected a file"),
            ("--output file/results.json", "--output file/results.json: no such folder as file"),
            ("--output no/such/results.json", "--output no/such/results.json: no such folder as no/such"),
            ("--output /proc/results.json", "--output: "),
            ("--resume file", "--resume file: a file, expected a folder"),
            ("--resume file/runs", "--resume: "),
            ("--resume /proc/runs", "--resume: "),
            ("--include-path no/such", "--include-path no/such: no such folder"),
        ],
    )
    def test_where_results_cannot_be_written_nothing_is_decoded(self, argv, message, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Path("file").touch()
        monkeypatch.setattr(eval_command, "evaluate", None)
        assert cli.main(["eval", "--tasks", "tiny_sums", *argv.split()]) == 2
        out, err = capsys.readouterr()
        assert err.startswith(f"fdpp: error: {message}") and err.count("\n") == 1 and not out
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_run_that_failed_leaves_no_empty_results(self, tmp_path):
        assert cli.main(["eval", "--tasks", "tiny_sums", "--output", str(tmp_path / "new"), "--model", "/none"]) == 2
        assert not (tmp_path / "new").exists()

    def test_libraries_are_quiet_and_notes_are_those_of_the_command(self, capsys):
        names = (*eval_command.LIBRARIES, "lm_eval.api.task")
        before = [logging.getLogger(name).getEffectiveLevel() for name in names]
        with eval_command.quiet():
            for name in names:
                logging.getLogger(name).warning("means nothing here")
            logging.getLogger("fdpp.integrations").warning("a prompt is cut")
        assert capsys.readouterr().err == "fdpp: note: a prompt is cut\n"
        assert [logging.getLogger(name).getEffectiveLevel() for name in names] == before

    def test_costs_are_a_table(self):
        cost = {"responses": 2, "tokens": 90, "nfe": 30, "tokens_per_second": 1.26}
        table = eval_command.cost_table({"sums": cost | {"nfe_per_response": 15.0, "tokens_per_forward": 3.0}})
        assert table.splitlines()[2] == "|sums|2|90|1.3|30|15.0|3.00|"
