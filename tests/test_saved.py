"""`generation_config.json`: settings of a decode beside a checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import triton
from plain import SIZES
from small import EOS, MASK, prompts, small_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, GenerationConfig

import fdpp
from fdpp import DiffusionGenerationConfig, Frechet, LLaDAConfig, LLaDAModelLM, Quota, Threshold

RULES = [
    Quota(),
    Quota(3),
    Threshold(0.7),
    fdpp.Factor(1.1),
    Frechet(0.1, 0.02),
    fdpp.EntropyBound(0.3),
    fdpp.LocalLeap(0.8, 0.6, 2),
    fdpp.Klass(0.5, 0.02, 3),
    fdpp.Budget(0.1, 0.8, 0.4, 0.2),
    fdpp.Hierarchy(0.3, 0.8),
    fdpp.Credit(0.8, 2.0, 0.5, 0.6),
    fdpp.Saber(3),
    fdpp.Prophet(2, 5, 3.0, 2.0, 1.0),
    fdpp.Wino(0.5, 0.8, 12),
    fdpp.Revocable(fdpp.Threshold(0.7), 0.8, 3),
    fdpp.Dawn(tau_low=0.7, layers=2),
]


@triton.jit
def few(n, last, total, p0, p1):
    return n <= p0


@dataclasses.dataclass(frozen=True)
class Few(fdpp.Rule):
    most: int = 2
    predicate = few

    def params(self) -> tuple[float, float]:
        return float(self.most), 0.0


@pytest.mark.parametrize("rule", [*RULES, Few(3)], ids=str)
def test_settings_survive_the_file(rule: fdpp.Rule, tmp_path: Path) -> None:
    config = DiffusionGenerationConfig(max_new_tokens=9, rule=rule, cache="prefix", drafts="auto", eos_token_id=[3, 4])
    config.save_pretrained(tmp_path)
    assert DiffusionGenerationConfig.from_pretrained(tmp_path) == config
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["rule"]["name"] == (f"{__name__}.Few" if rule == Few(3) else type(rule).__name__)
    assert saved["transformers_version"]


def test_every_setting_survives_the_file(tmp_path: Path) -> None:
    config = DiffusionGenerationConfig(
        max_new_tokens=7,
        block_length=3,
        sub_block_length=4,
        rule=Quota(),
        steps=5,
        cache="prefix",
        refresh="recent:4",
        stop_at_eos=False,
        drafts=2,
        branches="tree",
        engine="eager",
        temperature=0.5,
        top_k=9,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        bad_words_ids=[[1], [2, 3]],
        suppress_tokens=[5],
        stop_strings=["a"],
        seed=11,
        remasking="random",
        cfg_scale=1.5,
        logits_eos_inf=True,
        return_dict_in_generate=False,
        mask_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        eot_token_id=4,
    )
    assert [f.name for f in dataclasses.fields(config) if getattr(config, f.name) == f.default] == [
        "head",
        "confidence_eos_eot_inf",
    ]
    # Each is refused together with some of the others.
    apart = DiffusionGenerationConfig(head="fused"), DiffusionGenerationConfig(confidence_eos_eot_inf=True)
    for each in (config, *apart):
        each.save_pretrained(tmp_path)
        assert DiffusionGenerationConfig.from_pretrained(tmp_path) == each


@pytest.mark.parametrize("auto", [LLaDAModelLM, AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM])
def test_a_checkpoint_brings_its_settings(auto: Any, tmp_path: Path) -> None:
    model = small_model()
    model.generation_config = DiffusionGenerationConfig(rule=Quota(2), stop_at_eos=False, **SIZES)
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is LLaDAModelLM and loaded.generation_config == model.generation_config
    out = loaded.generate(prompts(1, 4))
    assert (out.sequences.shape[1], out.nfe.item()) == (24, 4 + 4 + 2)
    # Arguments win, and a whole config replaces the model's.
    assert loaded.generate(prompts(1, 4), rule=Quota(4)).nfe.item() == 2 + 2 + 1
    other = DiffusionGenerationConfig(rule=Quota(1), max_new_tokens=6, stop_at_eos=False)
    assert loaded.generate(prompts(1, 4), generation_config=other).nfe.item() == 6
    assert auto.from_pretrained(tmp_path, generation_config=other).generation_config == other
    assert isinstance(AutoConfig.from_pretrained(tmp_path), LLaDAConfig)


def test_a_checkpoint_in_a_subfolder(tmp_path: Path) -> None:
    model = small_model()
    model.generation_config = DiffusionGenerationConfig(rule=Quota(2))
    model.save_pretrained(tmp_path / "inner")
    assert LLaDAModelLM.from_pretrained(tmp_path, subfolder="inner").generation_config.rule == Quota(2)


def test_token_ids_of_the_file_come_before_the_configurations(tmp_path: Path) -> None:
    model = small_model()
    model.generation_config = DiffusionGenerationConfig(eos_token_id=[EOS, 5], pad_token_id=9)
    model.save_pretrained(tmp_path)
    loaded = LLaDAModelLM.from_pretrained(tmp_path)
    seen = loaded.generate(
        prompts(1, 4),
        generation_config=DiffusionGenerationConfig(max_new_tokens=4, pad_token_id=8),
        custom_generate=lambda model, input_ids, generation_config, **_: generation_config,
    )
    assert (seen.mask_token_id, seen.eos_token_id, seen.pad_token_id) == (MASK, [EOS, 5], 8)


def test_a_model_of_its_own_has_defaults(tmp_path: Path) -> None:
    model = small_model()
    assert model.generation_config == DiffusionGenerationConfig()
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert LLaDAModelLM.from_pretrained(tmp_path).generation_config == DiffusionGenerationConfig()


PUBLISHED = {
    "_from_model_config": True,
    "bos_token_id": 126080,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "transformers_version": "4.46.3",
    "use_cache": False,
}


def write(path: Path, settings: Any) -> Path:
    (path / "generation_config.json").write_text(settings if isinstance(settings, str) else json.dumps(settings))
    return path


def test_the_file_of_a_published_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = DiffusionGenerationConfig.from_pretrained(write(tmp_path, PUBLISHED))
    assert config == DiffusionGenerationConfig(eos_token_id=126081, pad_token_id=126081)
    assert not caplog.records
    config = DiffusionGenerationConfig.from_pretrained(
        write(tmp_path, PUBLISHED | {"typical_p": 0.9, "do_sample": True})
    )
    assert config == DiffusionGenerationConfig(eos_token_id=126081, pad_token_id=126081)
    assert "do_sample, typical_p" in caplog.text


@pytest.mark.parametrize("written", ["Frechet", "frechet", {"name": "frechet"}], ids=str)
def test_a_rule_written_by_hand(written: Any, tmp_path: Path) -> None:
    assert DiffusionGenerationConfig.from_pretrained(write(tmp_path, {"rule": written})).rule == Frechet()


def test_the_temperature_of_another_way_to_draw_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In a file with settings of autoregressive generation alone; beside one of ours it is ours."""
    theirs = PUBLISHED | {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "do_sample": True, "max_new_tokens": 9}
    config = DiffusionGenerationConfig.from_pretrained(write(tmp_path, theirs))
    assert (config.temperature, config.top_p, config.top_k, config.max_new_tokens) == (0.0, None, None, 9)
    assert "no effect: do_sample, temperature, top_k, top_p" in caplog.text
    caplog.clear()
    config = DiffusionGenerationConfig.from_pretrained(write(tmp_path, {"temperature": 0.7, "cache": "none"}))
    assert config.temperature == 0.7 and not caplog.records


def test_settings_can_be_assigned_and_are_checked_when_they_are_used(tmp_path: Path) -> None:
    model = small_model()
    model.generation_config.max_new_tokens = 6
    model.generation_config.rule = "quota"
    assert model.generate(prompts(1, 3)).sequences.shape[1] == 9
    assert model.generation_config.update(block_length=3, num_beams=2) == {"num_beams": 2}
    assert model.generate(prompts(1, 3), stop_at_eos=False).nfe.item() == 6
    model.save_pretrained(tmp_path)
    assert LLaDAModelLM.from_pretrained(tmp_path).generation_config.rule == Quota()
    model.generation_config.block_length = 0
    for use in (lambda: model.generate(prompts(1, 3)), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="block_length: expected an int from 1 to 1024, got 0"):
            use()


def test_settings_as_json() -> None:
    config = DiffusionGenerationConfig(max_new_tokens=6, rule=Quota(2), temperature=0.5)
    changed = {"max_new_tokens": 6, "rule": Quota(2).saved(), "temperature": 0.5, "do_sample": True}
    assert config.to_diff_dict() == changed == json.loads(config.to_json_string())
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    assert DiffusionGenerationConfig().to_diff_dict() == {"do_sample": False}
    assert copy.deepcopy(config) == config != DiffusionGenerationConfig()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": {"name": "Fréchet"}}, "rule: expected.*Frechet.*Quota.*got {'name': 'Fréchet'}"),
        ({"rule": "Fréchet"}, "rule: expected.*got 'Fréchet'"),
        ({"rule": ["Frechet"]}, "rule: expected.*got \\['Frechet'\\]"),
        ({"rule": {"name": "Frechet", "width": 2}}, "rule Frechet:.*width"),
        ({"rule": {"name": "Frechet", "margin": -1}}, "margin in.*-1"),
        ({"rule": {"margin": 0.2}}, "rule: expected"),
        ({"gen_length": 3}, r"unknown settings \['gen_length'\]; known are.*max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens.*-1"),
        ("{", "Expecting"),
        ("[1]", "expected a JSON object, got list"),
    ],
    ids=str,
)
def test_files_that_do_not_fit(settings: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        DiffusionGenerationConfig.from_pretrained(write(tmp_path, settings))
    assert "generation_config.json" in str(error.value)
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        LLaDAModelLM.from_pretrained(write(tmp_path, settings))


def test_settings_of_another_kind_are_refused(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    for refused in (
        lambda: LLaDAModelLM.from_pretrained(tmp_path, generation_config=GenerationConfig()),
        lambda: setattr(model, "generation_config", GenerationConfig()) or model.generate(prompts(1, 3)),
    ):
        with pytest.raises(TypeError, match="expected a DiffusionGenerationConfig, got GenerationConfig"):
            refused()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"generation_config\.json"):
        DiffusionGenerationConfig.from_pretrained(tmp_path)
