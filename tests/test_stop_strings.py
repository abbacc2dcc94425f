"""Stop strings: `generate(stop_strings=..., tokenizer=...)` ends a response before the first of them."""

from __future__ import annotations

import string
from typing import Any

import pytest
import torch
from decoding import CACHES, Recorder, Scripted, no_prompt
from small import EOS, MASK, PAD, V, exact_model, left_pad, prompts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StopStringCriteria

from fdpp import DiffusionGenerationConfig, Quota
from fdpp.decoding.stops import cut_at_stop, first_stop

PIECES = [*string.ascii_lowercase, " ", "\n", "st", "op", "xst", "oper", "\n\n", ".\n", "<end>"]
PIECES += [chr(ord("A") + i) for i in range(61 - len(PIECES))]
ID = {piece: i for i, piece in enumerate(PIECES)} | {"<pad>": PAD, "<mask>": MASK, "<eos>": EOS}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A piece of text for every id; it encodes letter by letter."""
    inner = Tokenizer(models.WordLevel(ID, unk_token="<pad>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    inner.add_special_tokens(["<pad>", "<mask>", "<eos>", "<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def scripted(pieces: list[str], prompt: int = 0) -> Scripted:
    return Scripted([ID[piece] for piece in pieces], [0.9] * len(pieces), prompt)


def text_of(tokenizer: Any, ids: Tensor) -> str:
    return tokenizer.decode([i for i in ids.tolist() if i != PAD])


@pytest.mark.parametrize("block", [3, 8, 32])
def test_a_string_completed_anywhere_in_a_block_ends_the_response_before_it(tokenizer: Any, block: int) -> None:
    """The block that completes it is the last one."""
    for at in (0, 1, 2, 5, 7, 8, 10, 22):
        pieces = list(string.ascii_lowercase[:24])
        pieces[at : at + 2] = "\n", "\n"
        settings = {"max_new_tokens": 24, "block_length": block, "rule": Quota(32)}
        out = scripted(pieces).generate(no_prompt(), stop_strings=["\n\n", "zz"], tokenizer=tokenizer, **settings)
        assert text_of(tokenizer, out.sequences[0]) == string.ascii_lowercase[:at]
        assert out.sequences[0, at:].tolist() == [PAD] * (24 - at)
        assert out.nfe.item() == -(-(at + 2) // block)
        assert out.tokens_per_forward.item() == at / out.nfe.item()
        assert bool((out.commit_step[0, :at] >= 0).all()) and out.commit_step[0, at:].tolist() == [-1] * (24 - at)
        assert out.confidence[0, at:].tolist() == [1.0] * (24 - at)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["a", "st", "op", "b"], "stop", "a"),
        (["a", "xst", "oper", "b"], "stop", "a"),  # the x goes with its token
        (["s", "t", "o", "p", "b"], ["zz", "stop"], ""),
        (["a", ".\n", "\n", "b"], ["\n\n"], "a"),
        (["a", "b", "<end>", "c"], ["<end>"], "ab"),  # a special token has its text
        (["a", "\n\n", "st", "op"], ["stop", "\n\n"], "a"),
        (["a", "b", "c", "d", "e", "f"], ["bc", "abcde"], "a"),  # the one that is complete first
        (["a", "b", "c", "d", "e", "f"], ["c", "abc"], ""),  # of two that end together the longer one
        (["a", "b", "c"], ["d", "cb"], "abc"),
        (["a", "b"], [], "ab"),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 8])
def test_where_a_response_ends(tokenizer: Any, block: int, pieces: list[str], stops: Any, expected: str) -> None:
    """Whatever the blocks."""
    settings = {"max_new_tokens": len(pieces), "block_length": block, "rule": Quota(1)}
    out = scripted(pieces).generate(no_prompt(), stop_strings=stops, tokenizer=tokenizer, **settings)
    assert text_of(tokenizer, out.sequences[0]) == expected
    assert all(
        stop not in text_of(tokenizer, out.sequences[0]) for stop in ([stops] if isinstance(stops, str) else stops)
    )


def test_a_string_of_the_prompt_counts_if_the_response_completes_it(tokenizer: Any) -> None:
    """As in transformers. Padding of other prompts is no text."""
    rows = [["a", "\n", "\n", "b"], ["a", "\n"], ["\n", "b"], []]
    ids, mask = left_pad([torch.tensor([ID[piece] for piece in row], dtype=torch.int64) for row in rows])
    settings = {"max_new_tokens": 6, "block_length": 2, "rule": Quota(1), "tokenizer": tokenizer}
    model = scripted(["\n", "c", "d", "\n", "\n", "e"], prompt=4)
    out = model.generate(ids, mask, stop_strings="\n\n", **settings)
    assert [text_of(tokenizer, row) for row in out.sequences[:, 4:]] == ["\ncd", "", "\ncd", "\ncd"]
    assert torch.equal(out.sequences[:, :4], ids) and out.nfe.tolist() == [6, 2, 6, 6]
    out = model.generate(ids, mask, stop_strings=["<pad>\n", ">\nc"], **settings)
    assert [text_of(tokenizer, row) for row in out.sequences[:, 4:]] == ["\ncd\n\ne"] * 4


def test_stop_strings_and_eos(tokenizer: Any) -> None:
    """What is complete before EOS counts, though both are of one block; what stands after it does not."""
    settings = {"max_new_tokens": 8, "block_length": 8, "rule": Quota(1), "stop_strings": "op", "tokenizer": tokenizer}
    for stop_at_eos in (True, False):
        out = scripted(["a", "b", "o", "p", "c", "<eos>", "d", "e"]).generate(
            no_prompt(), stop_at_eos=stop_at_eos, **settings
        )
        assert text_of(tokenizer, out.sequences[0]) == "ab"
    after = scripted(["a", "b", "<eos>", "c", "o", "p", "d", "e"])
    assert text_of(tokenizer, after.generate(no_prompt(), **settings).sequences[0]) == "ab<eos>"
    out = after.generate(no_prompt(), stop_at_eos=False, **settings)
    assert text_of(tokenizer, out.sequences[0]) == "ab<eos>c"


@pytest.mark.parametrize(("cache", "engine"), [*zip(CACHES, ["eager"] * 3, strict=True), ("dual", "static")])
def test_every_row_stops_by_itself(tokenizer: Any, cache: str, engine: str) -> None:
    """With drafts too, and as it does alone; the others go on as if nothing had happened."""
    model, settings = exact_model(), {"max_new_tokens": 20, "block_length": 4, "stop_at_eos": False, "cache": cache}
    ids, mask = left_pad([prompts(1, P, seed=P)[0] for P in (3, 7, 5)])
    settings |= {"rule": Quota(2), "engine": engine}
    free = model.generate(ids, mask, **settings)
    stops = [tokenizer.decode(free.sequences[b, 7 + at : 9 + at]) for b, at in ((0, 1), (2, 10))]
    settings |= {"stop_strings": stops, "tokenizer": tokenizer}
    out = model.generate(ids, mask, **settings)
    for b in range(3):
        text = tokenizer.decode(free.sequences[b, 7:])
        cut = first_stop(text, stops)
        assert text_of(tokenizer, out.sequences[b, 7:]) == (text if cut is None else text[:cut])
        alone = model.generate(ids[b : b + 1, 7 - int(mask[b].sum()) :], **settings)
        assert torch.equal(alone.sequences[0, -20:], out.sequences[b, -20:])
        assert torch.equal(alone.commit_step[0], out.commit_step[b])
    assert out.nfe.tolist()[0] == 2 and out.nfe[2] < free.nfe[2]
    drafted = model.generate(ids, mask, drafts=3, **settings)
    assert torch.equal(drafted.sequences, out.sequences) and torch.equal(drafted.commit_step, out.commit_step)


def test_several_responses_to_a_prompt_stop_each_by_itself(tokenizer: Any) -> None:
    model, settings = exact_model(), {"max_new_tokens": 8, "block_length": 4, "temperature": 2.0, "seed": 1}
    settings |= {"num_return_sequences": 3, "stop_at_eos": False}
    free = model.generate(prompts(2, 5), **settings).sequences[:, 5:]
    stop = tokenizer.decode(free[4, 1:3])
    out = model.generate(prompts(2, 5), stop_strings=stop, tokenizer=tokenizer, **settings).sequences[:, 5:]
    for row, whole in zip(out, free, strict=True):
        assert text_of(tokenizer, row) == text_of(tokenizer, whole).split(stop)[0]


def test_what_is_streamed_ends_before_a_string_of_its_block(tokenizer: Any) -> None:
    recorder = Recorder()
    settings = {"max_new_tokens": 12, "block_length": 4, "rule": Quota(1), "tokenizer": tokenizer}
    model = scripted(["a", "b", "c", "d", "e", "s", "t", "f", *"ghij"])
    model.generate(no_prompt(), streamer=recorder, stop_strings="st", **settings)
    assert "".join(text_of(tokenizer, ids[0]) for name, ids in recorder.events if name == "put") == "abcde"


# StopStringCriteria of transformers


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 6])
def test_the_criterion_of_transformers_sees_every_token_of_a_block(tokenizer: Any, at: int) -> None:
    """It ends the sequence after the block, as any criterion; the text is not cut."""
    pieces = list("abcdefghijkl")
    pieces[at : at + 2] = "st", "op"
    criterion = StopStringCriteria(tokenizer, ["stop"])
    settings = {"max_new_tokens": 12, "block_length": 4, "rule": Quota(1)}
    out = scripted(pieces).generate(no_prompt(), stopping_criteria=[criterion], **settings)
    stop = -(-(at + 2) // 4) * 4
    assert text_of(tokenizer, out.sequences[0]) == "".join(pieces[:stop]) and out.nfe.item() == stop


def test_the_criterion_ends_the_same_sequences_as_stop_strings(tokenizer: Any) -> None:
    """Of ten blocks three are decoded, where the string is completed amid the third."""
    pieces = [*"abcdefgh" * 10]
    pieces[18:21] = "xst", "oper", "\n"
    settings = {"max_new_tokens": 80, "block_length": 8, "rule": Quota(2)}
    asked = scripted(pieces).generate(
        no_prompt(2), stopping_criteria=[StopStringCriteria(tokenizer, "stop")], **settings
    )
    out = scripted(pieces).generate(no_prompt(2), stop_strings="stop", tokenizer=tokenizer, **settings)
    assert asked.nfe.tolist() == out.nfe.tolist() == [12, 12]
    assert text_of(tokenizer, out.sequences[0]) == "".join(pieces[:18])
    assert text_of(tokenizer, asked.sequences[1]) == "".join(pieces[:24])


# Settings


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"stop_strings='stop': expected the model's tokenizer as well, tokenizer="):
        scripted(["a"]).generate(no_prompt(), max_new_tokens=1, stop_strings="stop")
    with pytest.raises(ValueError, match="expected the model's tokenizer"):
        config = DiffusionGenerationConfig(stop_strings=["stop"], max_new_tokens=1)
        scripted(["a"]).generate(no_prompt(), generation_config=config)


@pytest.mark.parametrize("stops", ["", ["a", ""], 3, [3], {"a": 1}], ids=str)
def test_stop_strings_that_are_none(stops: Any) -> None:
    with pytest.raises(ValueError, match="stop_strings: expected a string that is not empty or a list of such, got"):
        DiffusionGenerationConfig(stop_strings=stops)


@pytest.mark.parametrize("stops", ["\n\n", ["\n\n", "é"]], ids=str)
def test_stop_strings_are_saved(stops: Any, tmp_path: Any) -> None:
    config = DiffusionGenerationConfig(stop_strings=stops)
    config.save_pretrained(tmp_path)
    assert DiffusionGenerationConfig.from_pretrained(tmp_path) == config


def test_a_loop_of_the_callers_gets_the_strings_as_a_criterion(tokenizer: Any) -> None:
    def loop(model: Any, input_ids: Tensor, stopping_criteria: Any, **_: Any) -> list[list[bool]]:
        texts = torch.tensor([[ID[piece] for piece in row] for row in (["s", "t", "a"], ["a", "b", "c"])])
        return stopping_criteria(torch.cat((input_ids, texts), dim=1), None).tolist()

    ids = torch.tensor([[ID["a"]]] * 2)
    settings = {"max_new_tokens": 3, "stop_strings": "st", "tokenizer": tokenizer, "custom_generate": loop}
    assert scripted(["a"] * 4).generate(ids, **settings) == [True, False]


def test_text_before_a_string_is_exact_where_text_is_wanted(tokenizer: Any) -> None:
    ids = [ID[piece] for piece in ("a", "xst", "oper")]
    assert cut_at_stop(tokenizer, ids, ["stop"]) == ("ax", 1)
    assert cut_at_stop(tokenizer, ids, ["stops"]) == ("axstoper", 3)


def test_vocabulary_of_the_tests() -> None:
    assert len(ID) == V
