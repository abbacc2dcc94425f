"""A published Dream's repository: model and tokenizer are loaded from it, and none of its code runs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import dream_files
import pytest
from dream_files import BOS, EOS, MASK, START, TURN
from small import small_dream
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import fdpp
from fdpp.models.dream_tokenizer import DreamTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("dream")
    dream_files.write_checkpoint(path, small_dream(**dream_files.IDS))
    return path


def test_the_tokenizer_is_loaded_without_its_code(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is DreamTokenizer
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert special == (BOS, EOS, EOS, MASK)
    hello = dream_files.WORDS.index("hello")
    assert tokenizer("hello hello<|im_end|>")["input_ids"] == [hello, hello + 1, TURN], "no BOS of its own accord"
    assert tokenizer.decode([hello, TURN, hello + 1, EOS], skip_special_tokens=True) == "hello hello"
    turn = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    assert [token for token in turn["input_ids"] if token >= EOS] == [START, TURN, START]


@pytest.mark.parametrize(
    "text", ["é e\u0301", "it's 12 x", " two  spaces\n\n\tand", "12345", "?!<|mask|> ", "日本語", "", "I'LL\r\n"]
)
def test_texts_come_back(folder: Path, text: str) -> None:
    import unicodedata

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)


def test_a_saved_tokenizer_is_the_same(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is DreamTokenizer and again.get_vocab() == tokenizer.get_vocab()
    assert again("hello hello")["input_ids"] == tokenizer("hello hello")["input_ids"]


def test_the_model_is_loaded_without_its_code(folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is fdpp.DreamConfig
    for auto in (AutoModel, AutoModelForCausalLM):
        assert type(auto.from_pretrained(folder)) is fdpp.DreamModelLM


@pytest.mark.parametrize("imports", ["import fdpp, transformers", "import transformers.models.auto, fdpp"])
def test_it_is_registered_in_any_order_of_imports(folder: Path, imports: str) -> None:
    load = f"print(type(AutoTokenizer.from_pretrained({str(folder)!r})))"
    code = f"{imports}\nfrom transformers import AutoTokenizer\n{load}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "<class 'fdpp.models.dream_tokenizer.DreamTokenizer'>"


def test_a_subclass_behind_another_class_takes_no_familys_place() -> None:
    from fdpp.models.families import families

    class Beside:
        pass

    class Derived(Beside, fdpp.DreamModelLM):
        pass

    assert families()["Dream"] is fdpp.DreamModelLM
