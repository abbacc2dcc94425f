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
from family_of_others import TIED
from golden import model as golden_model
from plain import EOT, SIZES, model_with_ends, ragged
from small import EOS, MASK, PAD, SMALL, layer_of, name_of, prompts
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
from fdpp.models.language_model import DiffusionLM

ACCELERATE = importlib.util.find_spec("accelerate") is not None


EACH = pytest.mark.parametrize("family", SMALL)


@pytest.fixture(scope="module", params=SMALL)
def model(request: pytest.FixtureRequest) -> DiffusionLM:
    """Proposes EOS and EoT often. Shared: no test may change it."""
    return model_with_ends(request.param)


# Loading


def test_transformers_finds_the_model_once_fdpp_is_imported(tmp_path: Path) -> None:
    """In a new process, as nothing else may have imported the model."""
    for family in SMALL:
        SMALL[family]().save_pretrained(tmp_path / family)
    lines = """
        import sys, fdpp, transformers
        for folder in sys.argv[1:]:
            for name in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM"):
                print(type(getattr(transformers, name).from_pretrained(folder)).__name__)
    """
    command = [sys.executable, "-c", "if True:" + lines, *(str(tmp_path / family) for family in SMALL)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.split() == ["LLaDAModelLM"] * 3 + ["DreamModelLM"] * 3, done.stderr


@EACH
def test_bfloat16_round_trip(family: str, tmp_path: Path) -> None:
    model = SMALL[family]().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    ids, mask = ragged()
    settings = {"cfg_scale": 1.0, "confidence_eos_eot_inf": True, "eot_token_id": EOT, **SIZES}
    expected = model.generate(ids, mask, **settings).sequences
    assert torch.equal(loaded.generate(ids, mask, **settings).sequences, expected)


@pytest.mark.skipif(not ACCELERATE, reason="needs accelerate")
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@EACH
def test_device_map(family: str, device_map: Any, tmp_path: Path) -> None:
    model = SMALL[family]()
    model.save_pretrained(tmp_path)
    expected = model.generate(prompts(2, 5), **SIZES).sequences
    loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(loaded.generate(prompts(2, 5).to(loaded.device), **SIZES).sequences.cpu(), expected)


@pytest.mark.skipif(ACCELERATE, reason="accelerate is installed")
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
@EACH
def test_device_map_names_accelerate_where_it_is_missing(family: str, device_map: Any, tmp_path: Path) -> None:
    SMALL[family]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="requires `accelerate`"):
        AutoModel.from_pretrained(tmp_path, device_map=device_map)


@pytest.mark.skipif(not ACCELERATE, reason="needs accelerate")
@pytest.mark.parametrize("tied", [False, True])
@EACH
def test_weights_on_a_disk(family: str, tied: bool, tmp_path: Path) -> None:
    model = SMALL[family](**TIED[family] if tied else {})
    model.save_pretrained(tmp_path)
    first, second = model.model.blocks
    places = {model.get_input_embeddings(): "cpu", first: "cpu", second: "disk", model.model.final_norm: "disk"}
    places |= {} if tied else {model.get_output_embeddings(): "disk"}
    names = {name_of(model, module): device for module, device in places.items()}
    loaded = AutoModel.from_pretrained(tmp_path, device_map=names, offload_folder=tmp_path / "offload")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
    expected = model.generate(prompts(2, 5), **SIZES).sequences
    assert torch.equal(loaded.generate(prompts(2, 5), **SIZES).sequences, expected)


@pytest.mark.skipif(not ACCELERATE, reason="needs accelerate")
@EACH
def test_an_offloaded_embedding_is_no_head(family: str, tmp_path: Path) -> None:
    model = SMALL[family](**TIED[family])
    model.save_pretrained(tmp_path)
    names = {name_of(model, module): "cpu" for module in (*model.model.blocks, model.model.final_norm)}
    names[name_of(model, model.get_input_embeddings())] = "disk"
    loaded = AutoModel.from_pretrained(tmp_path, device_map=names, offload_folder=tmp_path / "offload")
    with pytest.raises(ValueError, match=r"device_map.*offloaded"):
        loaded.generate(prompts(1, 3), **SIZES)


@EACH
def test_an_offloaded_layer_is_called_and_its_neighbours_are_not_joined(family: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = SMALL[family]()
    model.save_pretrained(tmp_path)
    expected, offloaded = model.generate(prompts(2, 5), **SIZES).sequences, name_of(model, layer_of(model, "k", 1))
    names = {name: "cpu" for name, module in model.named_modules() if not any(True for _ in module.children())}
    loaded = AutoModel.from_pretrained(tmp_path, device_map=names | {offloaded: "disk"}, offload_folder=tmp_path / "d")
    assert {name for name, p in loaded.named_parameters() if p.is_meta} == {
        name for name, _ in loaded.named_parameters() if name.startswith(offloaded)
    }
    assert torch.equal(loaded.generate(prompts(2, 5), **SIZES).sequences, expected)


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


def test_eos_anywhere_in_a_block_meets_transformers_criterion(model: DiffusionLM) -> None:
    settings = {"max_new_tokens": 40, "block_length": 8, "stop_at_eos": False}
    free = model.generate(prompts(3, 5), **settings)
    out = model.generate(prompts(3, 5), stopping_criteria=[EosTokenCriteria(EOS)], **settings)
    stopped = 0
    for b in range(3):
        at = (free.sequences[b, 5:] == EOS).nonzero().flatten().tolist()
        end = (at[0] // 8 + 1) * 8 if at else 40
        assert torch.equal(out.sequences[b, 5 : 5 + end], free.sequences[b, 5 : 5 + end])
        assert bool((out.sequences[b, 5 + end :] == PAD).all())
        stopped += end < 40
    assert stopped


def test_a_streamer_of_logits_is_refused(model: DiffusionLM) -> None:
    class OfLogits(TextDiffusionStreamer):
        _takes_logits = True

        def __init__(self) -> None: ...

    with pytest.raises(ValueError, match="streamer: expected one of tokens, got OfLogits, which takes logits"):
        model.generate(prompts(1, 3), streamer=OfLogits(), **SIZES)


# A decode of the caller's


def test_custom_generate_gets_prepared_inputs(model: DiffusionLM) -> None:
    seen: dict[str, Any] = {}

    def one_forward(model, input_ids, attention_mask, logits_processor, stopping_criteria, generation_config, bias=0):
        seen.update(locals())
        return model(input_ids, attention_mask).logits.argmax(-1) + bias

    prompt, processor = prompts(2, 5), LogitsProcessor()
    out = model.generate(
        prompt, custom_generate=one_forward, logits_processor=[processor], max_new_tokens=7, rule=Quota(2), bias=100
    )
    with torch.no_grad():
        assert torch.equal(out, model(prompt).logits.argmax(-1) + 100)
    assert seen["model"] is model and torch.equal(seen["attention_mask"], torch.ones(2, 5, dtype=torch.int64))
    assert isinstance(seen["logits_processor"], LogitsProcessorList) and seen["logits_processor"] == [processor]
    assert isinstance(seen["stopping_criteria"], StoppingCriteriaList) and not seen["stopping_criteria"]
    config = seen["generation_config"]
    assert (config.max_new_tokens, config.rule, config.mask_token_id, config.eos_token_id) == (7, Quota(2), MASK, [EOS])


def test_custom_generate_may_take_everything(model: DiffusionLM) -> None:
    ids, mask = ragged()
    streamer = object()

    def loop(model: Any, input_ids: Tensor, **everything: Any) -> dict[str, Any]:
        return everything

    got = model.generate(ids, mask, custom_generate=loop, streamer=streamer, max_new_tokens=3, gamma=0.5)
    assert got["streamer"] is streamer and got["gamma"] == 0.5 and torch.equal(got["attention_mask"], mask)
    assert set(got) == {
        *("attention_mask", "generation_config", "logits_processor", "stopping_criteria", "streamer", "gamma")
    }


def test_custom_generate_is_checked(model: DiffusionLM) -> None:
    with pytest.raises(TypeError, match=r"custom_generate: expected a callable.*'someone/decoder'"):
        model.generate(prompts(1, 4), custom_generate="someone/decoder")
    with pytest.raises(TypeError, match="gamma=1 is a rule's"):
        model.generate(prompts(1, 4), custom_generate=lambda model, input_ids: None, gamma=1)
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(torch.zeros(3), custom_generate=lambda model, input_ids: None)
