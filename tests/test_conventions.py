"""What users of transformers expect around `generate`: loading, streamers, stopping criteria, a loop of their own."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import model as golden_model
from plain import EOT, SIZES, model_with_ends, ragged
from small import EOS, MASK, PAD, prompts, small_model
from torch import Tensor
from transformers import (
    AutoModel,
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
    TextDiffusionStreamer,
)

from fdpp import LLaDAModelLM, Quota, tiny

ACCELERATE = importlib.util.find_spec("accelerate") is not None


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Proposes EOS and EoT often. Shared: no test may change it."""
    return model_with_ends()


# Loading


def test_transformers_finds_the_model_once_fdpp_is_imported(tmp_path: Path) -> None:
    """In a new process, as nothing else may have imported the model."""
    small_model().save_pretrained(tmp_path)
    lines = """
        import sys, fdpp, transformers
        for name in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"):
            print(type(getattr(transformers, name).from_pretrained(sys.argv[1])).__name__)
    """
    command = [sys.executable, "-c", "if True:" + lines, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.split() == ["LLaDAModelLM"] * 3, done.stderr


def test_bfloat16_round_trip(tmp_path: Path) -> None:
    model = small_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    ids, mask = ragged()
    settings = {"cfg_scale": 1.0, "confidence_eos_eot_inf": True, "eot_token_id": EOT, **SIZES}
    expected = model.generate(ids, mask, **settings).sequences
    assert torch.equal(loaded.generate(ids, mask, **settings).sequences, expected)


@pytest.mark.skipif(not ACCELERATE, reason="needs accelerate")
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map(device_map: Any, tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    expected = model.generate(prompts(2, 5), **SIZES).sequences
    loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(loaded.generate(prompts(2, 5).to(loaded.device), **SIZES).sequences.cpu(), expected)


@pytest.mark.skipif(ACCELERATE, reason="accelerate is installed")
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map_names_accelerate_where_it_is_missing(device_map: Any, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="requires `accelerate`"):
        LLaDAModelLM.from_pretrained(tmp_path, device_map=device_map)


@pytest.mark.skipif(not ACCELERATE, reason="needs accelerate")
@pytest.mark.parametrize("tied", [False, True])
def test_weights_on_a_disk(tied: bool, tmp_path: Path) -> None:
    model = small_model(weight_tying=tied)
    model.save_pretrained(tmp_path)
    names = {"model.transformer.wte": "cpu", "model.transformer.blocks.0": "cpu", "model.transformer.blocks.1": "disk"}
    names |= {"model.transformer.ln_f": "disk"} | ({} if tied else {"model.transformer.ff_out": "disk"})
    loaded = AutoModel.from_pretrained(tmp_path, device_map=names, offload_folder=tmp_path / "offload")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
    expected = model.generate(prompts(2, 5), **SIZES).sequences
    assert torch.equal(loaded.generate(prompts(2, 5), **SIZES).sequences, expected)


@pytest.mark.skipif(not ACCELERATE, reason="needs accelerate")
def test_an_offloaded_embedding_is_no_head(tmp_path: Path) -> None:
    small_model(weight_tying=True).save_pretrained(tmp_path)
    names = {"model.transformer.wte": "disk", "model.transformer.blocks": "cpu", "model.transformer.ln_f": "cpu"}
    loaded = AutoModel.from_pretrained(tmp_path, device_map=names, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"device_map.*offloaded"):
        loaded.generate(prompts(1, 3), **SIZES)


def test_golden_model_keeps_its_decode_through_a_round_trip(tmp_path: Path) -> None:
    model = golden_model("model_tiny")
    model.save_pretrained(tmp_path)
    prompt = prompts(2, 12)
    again = LLaDAModelLM.from_pretrained(tmp_path).generate(prompt, **SIZES)
    assert torch.equal(again.sequences, model.generate(prompt, **SIZES).sequences)


# Streaming and stopping


def test_the_readmes_way_with_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny.load()
    problem = tiny.generate("held-out", 1)[0]
    inputs = tokenizer(problem.prompt, return_tensors="pt")
    streamer = TextDiffusionStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = inputs["input_ids"]
    criteria = [EosTokenCriteria(model.config.eos_token_id)]
    settings = {"max_new_tokens": 64, "cache": "none", "stop_at_eos": False}
    out = model.generate(ids, streamer=streamer, stopping_criteria=criteria, **settings)
    shown = capsys.readouterr().out
    confirmed = re.sub(r"\0337\033\[33m.*?\033\[0m\0338\033\[J", "", shown, flags=re.DOTALL)
    answer = tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)
    assert confirmed.split() == answer.split() and "\033[33m" in shown


def test_eos_anywhere_in_a_block_meets_transformers_criterion(llada: LLaDAModelLM) -> None:
    settings = {"max_new_tokens": 40, "block_length": 8, "stop_at_eos": False}
    free = llada.generate(prompts(3, 5), **settings)
    out = llada.generate(prompts(3, 5), stopping_criteria=[EosTokenCriteria(EOS)], **settings)
    stopped = 0
    for b in range(3):
        at = (free.sequences[b, 5:] == EOS).nonzero().flatten().tolist()
        end = (at[0] // 8 + 1) * 8 if at else 40
        assert torch.equal(out.sequences[b, 5 : 5 + end], free.sequences[b, 5 : 5 + end])
        assert bool((out.sequences[b, 5 + end :] == PAD).all())
        stopped += end < 40
    assert stopped


def test_a_streamer_of_logits_is_refused(llada: LLaDAModelLM) -> None:
    class OfLogits(TextDiffusionStreamer):
        _takes_logits = True

        def __init__(self) -> None: ...

    with pytest.raises(ValueError, match="streamer: expected one of tokens, got OfLogits, which takes logits"):
        llada.generate(prompts(1, 3), streamer=OfLogits(), **SIZES)


# A decode of the caller's


def test_custom_generate_gets_prepared_inputs(llada: LLaDAModelLM) -> None:
    seen: dict[str, Any] = {}

    def one_forward(model, input_ids, attention_mask, logits_processor, stopping_criteria, generation_config, bias=0):
        seen.update(locals())
        return model(input_ids, attention_mask).logits.argmax(-1) + bias

    prompt, processor = prompts(2, 5), LogitsProcessor()
    out = llada.generate(
        prompt, custom_generate=one_forward, logits_processor=[processor], max_new_tokens=7, rule=Quota(2), bias=100
    )
    with torch.no_grad():
        assert torch.equal(out, llada(prompt).logits.argmax(-1) + 100)
    assert seen["model"] is llada and torch.equal(seen["attention_mask"], torch.ones(2, 5, dtype=torch.int64))
    assert isinstance(seen["logits_processor"], LogitsProcessorList) and seen["logits_processor"] == [processor]
    assert isinstance(seen["stopping_criteria"], StoppingCriteriaList) and not seen["stopping_criteria"]
    config = seen["generation_config"]
    assert (config.max_new_tokens, config.rule, config.mask_token_id, config.eos_token_id) == (7, Quota(2), MASK, [EOS])


def test_custom_generate_may_take_everything(llada: LLaDAModelLM) -> None:
    ids, mask = ragged()
    streamer = object()

    def loop(model: Any, input_ids: Tensor, **everything: Any) -> dict[str, Any]:
        return everything

    got = llada.generate(ids, mask, custom_generate=loop, streamer=streamer, max_new_tokens=3, gamma=0.5)
    assert got["streamer"] is streamer and got["gamma"] == 0.5 and torch.equal(got["attention_mask"], mask)
    assert set(got) == {
        *("attention_mask", "generation_config", "logits_processor", "stopping_criteria", "streamer", "gamma")
    }


def test_custom_generate_is_checked(llada: LLaDAModelLM) -> None:
    with pytest.raises(TypeError, match=r"custom_generate: expected a callable.*'someone/decoder'"):
        llada.generate(prompts(1, 4), custom_generate="someone/decoder")
    with pytest.raises(TypeError, match="gamma=1 is a rule's"):
        llada.generate(prompts(1, 4), custom_generate=lambda model, input_ids: None, gamma=1)
    with pytest.raises(ValueError, match="input_ids"):
        llada.generate(torch.zeros(3), custom_generate=lambda model, input_ids: None)
