"""transformers' text-generation pipeline over a model of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Pipeline, pipeline

from fdpp import Threshold, tiny

PROBLEMS = [problem.prompt for problem in tiny.generate("held-out", 2)]


@pytest.fixture
def generator() -> Pipeline:
    model, tokenizer = tiny.load()
    model.generation_config.update(max_new_tokens=128, return_dict_in_generate=False)
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def expected(prompts: list[str], **settings: Any) -> list[str]:
    model, tokenizer = tiny.load()
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    out = model.generate(**inputs, **{"max_new_tokens": 128, **settings})
    return tokenizer.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def spaceless(text: str) -> str:
    """Some versions of transformers take out the spaces before punctuation."""
    return text.replace(" ", "")


def test_one_prompt(generator: Pipeline) -> None:
    [record] = generator(PROBLEMS[0])
    [answer] = expected(PROBLEMS[:1])
    assert list(record) == ["generated_text"]
    assert spaceless(record["generated_text"]) == spaceless(PROBLEMS[0] + answer)


def test_it_is_greedy_unless_asked(generator: Pipeline) -> None:
    settings = {"max_new_tokens": 64, "return_full_text": False}
    records = [generator(PROBLEMS[0], **settings) for _ in range(2)]
    assert records[0] == records[1]
    hot = generator(PROBLEMS[0], do_sample=True, temperature=3.0, num_return_sequences=2, **settings)
    assert len({record["generated_text"] for record in hot}) == 2


def test_a_batch_with_settings_of_ours(generator: Pipeline) -> None:
    settings = {"rule": Threshold(0.8), "cache": "none", "drafts": 2, "max_new_tokens": 40}
    records = generator(PROBLEMS, batch_size=2, return_full_text=False, **settings)
    texts = [record["generated_text"] for [record] in records]
    assert [*map(spaceless, texts)] == [*map(spaceless, expected(PROBLEMS, **settings))]


def test_a_folder(generator: Pipeline, tmp_path: Path) -> None:
    generator.save_pretrained(tmp_path)
    [record] = pipeline("text-generation", model=str(tmp_path))(PROBLEMS[0], return_full_text=False)
    assert spaceless(record["generated_text"]) == spaceless(expected(PROBLEMS[:1])[0])


@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_with_the_default_the_figures_come_along(drafts: int) -> None:
    model, tokenizer = tiny.load()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    [record] = generator(PROBLEMS[0], max_new_tokens=40, drafts=drafts)
    assert record["generated_text"].startswith(PROBLEMS[0]) and {"nfe", "log_prob"} <= record.keys()


def test_an_empty_prompt_and_a_total_length(generator: Pipeline) -> None:
    assert isinstance(generator("", max_new_tokens=8)[0]["generated_text"], str)
    [record] = generator(PROBLEMS[0], max_length=80, return_full_text=False)
    length = len(generator.tokenizer(PROBLEMS[0])["input_ids"])
    assert spaceless(record["generated_text"]) == spaceless(expected(PROBLEMS[:1], max_new_tokens=80 - length)[0])
