"""LLaDA and the other families as transformers models: configurations, checkpoints, forward."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_of_others import EACH_FAMILY, FAMILIES, TIED
from plain import naive_logits
from safetensors.torch import load_file, save_file
from small import EOS, MASK, V, layer_of, left_pad, name_of, prompts, small_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from fdpp import DreamModelLM, LLaDAConfig, LLaDAModelLM
from fdpp.models import families

MODEL_TINY = Path(__file__).parent / "data/model_tiny"

PUBLISHED = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
"""Every key of the published LLaDA-8B `config.json`."""

UNIMPLEMENTED = {
    "block_type": "sequential",
    "block_group_size": 2,
    "activation_type": "swiglu",
    "layer_norm_type": "low_precision",
    "layer_norm_with_affine": False,
    "attention_layer_norm": True,
    "input_emb_norm": True,
    "scale_logits": True,
    "rope": False,
    "alibi": True,
    "include_bias": True,
    "include_qkv_bias": True,
    "bias_for_layer_norm": True,
    "clip_qkv": 8.0,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "yarn": True,
}

BLOCK_KEYS = ("q_proj", "k_proj", "v_proj", "attn_out", "attn_norm", "ff_norm", "ff_proj", "up_proj", "ff_out")


def expected_keys(n_layers: int, tied: bool) -> set[str]:
    names = [f"blocks.{n}.{part}" for n in range(n_layers) for part in BLOCK_KEYS] + ["wte", "ln_f"]
    return {f"model.transformer.{name}.weight" for name in names + ["ff_out"] * (not tied)}


def write_checkpoint(
    path: Path, change: Callable[[dict[str, Tensor]], Any] = lambda weights: None, family: str = "LLaDA"
) -> Path:
    """A checkpoint of a family's small model, its tensors changed."""
    FAMILIES[family]().save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


# Configuration


def test_published_config_loads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    config = LLaDAConfig.from_pretrained(tmp_path)
    shape = ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "vocab_size", "embedding_size")
    rest = ("max_sequence_length", "rope_theta", "rms_norm_eps", "weight_tying", "init_std")
    ids = ("mask_token_id", "eos_token_id", "pad_token_id")
    assert [getattr(config, key) for key in shape + rest + ids] == [PUBLISHED[key] for key in shape + rest + ids]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (4096, 32, 32)
    assert (config.intermediate_size, config.max_position_embeddings, config.num_key_value_heads) == (12288, 4096, 32)
    with torch.device("meta"):
        model = LLaDAModelLM(config)
    assert set(model.state_dict()) == expected_keys(32, tied=False)
    assert sum(p.numel() for p in model.parameters()) == 8_015_581_184


def test_defaults_are_those_of_llada_8b() -> None:
    config = LLaDAConfig()
    shape = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "max_sequence_length", "rope_theta")
    ids = ("mask_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps", "weight_tying")
    assert [getattr(config, key) for key in shape + ids] == [PUBLISHED[key] for key in shape + ids]


@pytest.mark.parametrize("option", UNIMPLEMENTED)
def test_unimplemented_options_are_named(option: str, tmp_path: Path) -> None:
    value = UNIMPLEMENTED[option]
    with pytest.raises(ValueError, match=re.escape(f"{option}={value!r}")):
        LLaDAConfig(**{option: value})
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, option: value}))
    with pytest.raises(ValueError, match=re.escape(f"{option}={value!r}")):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_model": 30, "n_heads": 4}, "d_model=30"),
        ({"d_model": 32, "n_heads": 4, "n_kv_heads": 3}, "n_kv_heads=3"),
        ({"d_model": 12, "n_heads": 4}, "even head size, got 3"),
        ({"vocab_size": 64, "embedding_size": 60}, "embedding_size=60"),
        ({"n_heads": 4, "n_kv_heads": 2, "multi_query_attention": True}, "n_kv_heads=2"),
        ({"n_heads": 0}, "n_heads=0"),
        ({"n_layers": 0}, "n_layers=0"),
        ({"weight_tying": False, "tie_word_embeddings": True}, "tie_word_embeddings.*weight_tying=False"),
    ],
)
def test_sizes_that_do_not_fit(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLaDAConfig(**sizes)


ALIASES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
}


def test_what_follows_from_a_size_follows_from_its_other_name(tmp_path: Path) -> None:
    config = LLaDAConfig(hidden_size=32, num_attention_heads=4)
    assert (config.d_model, config.n_heads, config.n_kv_heads, config.mlp_hidden_size) == (32, 4, 4, 128)
    assert LLaDAConfig(hidden_size=32, num_attention_heads=4, multi_query_attention=True).n_kv_heads == 1
    assert config.to_dict() == LLaDAConfig(d_model=32, n_heads=4).to_dict()
    config.save_pretrained(tmp_path)
    assert LLaDAConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("alias", ALIASES)
def test_both_names_of_a_size(alias: str, tmp_path: Path) -> None:
    name, rest = LLaDAConfig.attribute_map[alias], {key: ALIASES[key] for key in ALIASES if key != alias}
    by_alias, by_name = LLaDAConfig(**ALIASES), LLaDAConfig(**rest, **{name: ALIASES[alias]})
    assert by_alias.to_dict() == by_name.to_dict() == LLaDAConfig(**ALIASES, **{name: ALIASES[alias]}).to_dict()
    assert getattr(by_alias, name) == getattr(by_alias, alias) == ALIASES[alias]
    # Also the name that has LLaDA-8B's value.
    other = getattr(LLaDAConfig(), name)
    with pytest.raises(ValueError, match=f"{alias}={ALIASES[alias]} contradicts {name}={other}"):
        LLaDAConfig(**ALIASES, **{name: other})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada", **ALIASES}))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert [getattr(loaded, key) for key in ALIASES] == list(ALIASES.values())


MIXTURE = {
    "architectures": ["LLaDAMoEModelLM"],
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "expert_intermediate_size": 1024,
    "shared_expert_intermediate_size": None,
    "dense_intermediate_size": 8192,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_layer_freq": [1],
    "qk_layernorm": True,
    "vocab_size": 157184,
}
"""After LLaDA-MoE-7B-A1B, which calls itself "llada" too."""


@pytest.mark.parametrize("model_type", ["llada", "lladamoe", "llada_moe"])
def test_experts_are_refused_as_llada_moe(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **MIXTURE}))
    for kind in (LLaDAConfig, LLaDAModelLM):
        with pytest.raises(ValueError, match=r"expected a dense LLaDA, got experts, as LLaDA-MoE.*num_experts=64"):
            kind.from_pretrained(tmp_path)
    for load in (families.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="LLaDA-MoE" if model_type == "llada" else rf"{model_type}\b"):
            load(str(tmp_path))


RELATIVES: dict[str, dict[str, Any]] = {
    "as published": {},
    "LLaDA-1.5": {
        **{"flash_attention": True, "flash_attention_version": "2", "rope_full_precision": False, "use_cache": True},
        **{"yarn": False, "yarn_scale": 1.0, "yarn_original_max_position_embeddings": 4096},
    },
    "saved by transformers 4": {"torch_dtype": "bfloat16", "_name_or_path": "GSAI-ML/LLaDA-8B-Base"},
    "saved by transformers 5": {"dtype": "bfloat16", "rope_parameters": None, "chunk_size_feed_forward": 0},
    "a chat's ids": {"eos_token_id": [EOS, 5], "pad_token_id": EOS, "eot_token_id": 5, "bos_token_id": 7},
    "without ids": {"eos_token_id": None, "pad_token_id": None},
    "keys of tomorrow": {
        "of_somebody": {"a": [1]},
        "n_kv_heads": None,
        "multi_query_attention": False,
        "num_labels": 3,
    },
}
"""What fine-tuned LLaDAs change in their `config.json`; LLaDA-1.5's as in a public copy of its folder."""


@pytest.mark.parametrize("relative", RELATIVES)
def test_relatives_load(relative: str, tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())
    small = {key: own[key] for key in PUBLISHED.keys() & own.keys() - {"architectures", "transformers_version"}}
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, **small, **RELATIVES[relative]}))
    ids = prompts(2, 6)
    for load in (families.load, LLaDAModelLM.from_pretrained, AutoModel.from_pretrained):
        loaded = load(str(tmp_path), dtype=torch.float32)
        assert type(loaded) is LLaDAModelLM and loaded(ids).logits.equal(model(ids).logits)
        for key, value in RELATIVES[relative].items():
            if key.endswith("_token_id"):
                assert getattr(loaded.config, key) == value
        settings = {"max_new_tokens": 8, "stop_at_eos": relative != "without ids"}
        out = loaded.generate(ids, **settings | ({"pad_token_id": 0} if relative == "without ids" else {}))
        assert not out.sequences.eq(MASK).any()


def test_no_experts_are_none() -> None:
    assert LLaDAConfig(num_experts=0, num_experts_per_tok=None).n_layers == 32


def test_kv_heads_and_mlp_size_have_llada_defaults() -> None:
    assert LLaDAConfig(n_heads=8, d_model=64).n_kv_heads == 8
    assert LLaDAConfig(n_heads=8, d_model=64, multi_query_attention=True).n_kv_heads == 1
    assert LLaDAConfig(n_heads=8, d_model=64, mlp_ratio=3).mlp_hidden_size == 192


# Checkpoints


def test_state_dict_keys() -> None:
    assert set(small_model().state_dict()) == expected_keys(2, tied=False)
    assert set(small_model(weight_tying=True).state_dict()) == expected_keys(2, tied=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "16KB"])
@EACH_FAMILY
def test_save_and_load(family: str, tied: bool, shard: str, tmp_path: Path) -> None:
    config = {"n_kv_heads": 2} if family == "LLaDA" else {}
    model = FAMILIES[family](**config | (TIED[family] if tied else {}))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard == "1GB")
    assert {key for file in files for key in load_file(file)} == set(model.state_dict())
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    x = prompts(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [V + 9, V - 3])
@EACH_FAMILY
def test_another_vocabulary(family: str, size: int, tied: bool, tmp_path: Path) -> None:
    llada, same = FAMILIES[family](**TIED[family] if tied else {}), min(size, V)
    ids = prompts(2, 6) % (V - 3)
    before = llada(ids).logits
    llada.resize_token_embeddings(size, mean_resizing=False)
    assert llada.config.vocab_size == getattr(llada.config, "embedding_size", size) == size
    assert llada(ids).logits.shape[-1] == size
    assert torch.equal(llada(ids).logits[..., :same], before[..., :same])
    llada.save_pretrained(tmp_path)
    again = type(llada).from_pretrained(tmp_path)
    settings = {"max_new_tokens": 8, "mask_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **settings).sequences, llada.generate(ids, **settings).sequences)


@EACH_FAMILY
def test_tied_head_is_the_embedding(family: str) -> None:
    model = FAMILIES[family](**TIED[family])
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.project(hidden), hidden @ model.get_input_embeddings().weight.T)
    assert model.get_output_embeddings() is None
    if family != "Gist":
        assert FAMILIES[family]().get_output_embeddings().weight.shape == (V, 32)


def parameter(family: str, role: str) -> str:
    """The name of a weight of a small model's second block."""
    model = FAMILIES[family]()
    return name_of(model, layer_of(model, role, 1)) + ".weight"


@pytest.mark.parametrize("role", ["norm", "q", "up"])
@EACH_FAMILY
def test_missing_key_is_named(family: str, role: str, tmp_path: Path) -> None:
    name = parameter(family, role)
    write_checkpoint(tmp_path, lambda weights: weights.pop(name), family)
    with pytest.raises(ValueError, match=rf"checkpoint: 1 missing keys: {re.escape(name)}"):
        type(FAMILIES[family]()).from_pretrained(tmp_path)


@EACH_FAMILY
def test_unexpected_keys_are_named(family: str, tmp_path: Path) -> None:
    """Also of layers, biases and a head that the family does not have."""
    last = parameter(family, "down")
    names = [last.replace(".1.", ".2."), last.removesuffix("weight") + "bias", "model.position.weight"]
    write_checkpoint(tmp_path, lambda weights: weights.update({name: torch.zeros(4) for name in names}), family)
    with pytest.raises(ValueError, match="checkpoint: 3 unexpected keys: ") as error:
        type(FAMILIES[family]()).from_pretrained(tmp_path)
    assert all(name in str(error.value) for name in names)


def test_a_missing_bias_is_named(tmp_path: Path) -> None:
    name = parameter("Dream", "k").removesuffix("weight") + "bias"
    write_checkpoint(tmp_path, lambda weights: weights.pop(name), "Dream")
    with pytest.raises(ValueError, match=rf"Dream checkpoint: 1 missing keys: {re.escape(name)}"):
        DreamModelLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto", [False, True])
@EACH_FAMILY
def test_mismatched_keys_are_named(family: str, auto: bool, tmp_path: Path) -> None:
    model, name = FAMILIES[family](), parameter(family, "k")
    head = name_of(model, model.head)
    shapes = {name: (9, 32), head: (V + 1, 32)}
    write_checkpoint(
        tmp_path, lambda weights: weights.update({key: torch.zeros(shape) for key, shape in shapes.items()}), family
    )
    with pytest.raises(ValueError, match="2 mismatched keys: ") as error:
        (AutoModelForCausalLM if auto else type(model)).from_pretrained(tmp_path)
    assert all(key in str(error.value) for key in shapes)


@pytest.mark.parametrize("family", ["LLaDA", "Dream"])
def test_a_head_in_a_tied_checkpoint_is_unexpected(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, family=family)
    model = FAMILIES[family]()
    config = json.loads((tmp_path / "config.json").read_text())
    tied = TIED[family] | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps({**config, **tied}))
    with pytest.raises(ValueError, match=rf"unexpected.*{re.escape(name_of(model, model.head))}"):
        type(model).from_pretrained(tmp_path)


def test_all_names_of_a_renamed_key(tmp_path: Path) -> None:
    def rename(weights: dict[str, Tensor]) -> None:
        weights["model.transformer.ln_g.weight"] = weights.pop("model.transformer.ln_f.weight")

    write_checkpoint(tmp_path, rename)
    with pytest.raises(ValueError, match=r"missing.*transformer\.ln_f.*unexpected.*transformer\.ln_g"):
        LLaDAModelLM.from_pretrained(tmp_path)


def test_loading_info_is_still_there_for_who_asks(tmp_path: Path) -> None:
    model, info = LLaDAModelLM.from_pretrained(write_checkpoint(tmp_path), output_loading_info=True)
    assert isinstance(model, LLaDAModelLM)
    assert not info["missing_keys"]


REMOTE = {
    "LLaDA": PUBLISHED["auto_map"],
    "Dream": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
}


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
@pytest.mark.parametrize("family", REMOTE)
def test_auto_classes_run_no_remote_code(
    family: str, auto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A published folder holds code and an `auto_map` to it; nobody is asked about it and it never runs."""
    write_checkpoint(tmp_path, family=family)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": REMOTE[family]}))
    for name in {value.partition(".")[0] for value in REMOTE[family].values()}:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('remote code ran')")

    def prompt(*_: Any) -> str:
        raise AssertionError("asked whether to trust remote code")

    monkeypatch.setattr("builtins.input", prompt)
    expected = FAMILIES[family]()
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(expected.config)
    model = auto.from_pretrained(tmp_path)
    assert type(model) is type(expected)
    x = prompts(1, 6)
    with torch.no_grad():
        assert torch.equal(model(x).logits, expected(x).logits)


@EACH_FAMILY
def test_bf16_load(family: str, tmp_path: Path) -> None:
    original, x = FAMILIES[family](initializer_range=0.2), prompts(2, 12)
    original.save_pretrained(tmp_path)
    model = type(original).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits, expected = model(x).logits, naive_logits(original, x)
    assert logits.dtype == torch.bfloat16
    assert (logits.double() - expected).square().mean().sqrt() < 0.03 * expected.std()


# Forward


@pytest.mark.parametrize(
    ("family", "config"),
    [
        *(("LLaDA", {"n_kv_heads": kv_heads}) for kv_heads in (4, 2, 1)),
        ("LLaDA", {"weight_tying": True}),
        *(("Dream", {"num_key_value_heads": kv_heads}) for kv_heads in (4, 2, 1, None)),
        ("Dream", {"tie_word_embeddings": True}),
        ("Gist", {}),
        *((family, {"rope_theta": 100.0, "rms_norm_eps": 0.1}) for family in FAMILIES),
    ],
    ids=str,
)
def test_forward_against_naive_twin(family: str, config: dict[str, Any]) -> None:
    model = FAMILIES[family](**config)
    # RMSNorm starts at 1, where a forgotten weight would not show.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("bias"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    x = prompts(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits.double(), naive_logits(model, x), rtol=0, atol=2e-4)


def test_tiny_checkpoint_against_naive_twin() -> None:
    model = LLaDAModelLM.from_pretrained(MODEL_TINY).eval()
    x = torch.cat((prompts(2, 10), torch.full((2, 14), model.config.mask_token_id)), 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits.double(), naive_logits(model, x), rtol=0, atol=5e-4)


@EACH_FAMILY
def test_attention_mask_against_naive_twin(family: str) -> None:
    model, x = FAMILIES[family](), prompts(2, 10)
    attention_mask = torch.ones(2, 10, dtype=torch.int64)
    attention_mask[0, :4] = 0
    with torch.no_grad():
        logits = model(x, attention_mask=attention_mask).logits.double()
        torch.testing.assert_close(logits, naive_logits(model, x, attention_mask.bool()), rtol=0, atol=2e-4)
        assert (logits - model(x).logits)[0, 4:].abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8], ids=str)
def test_a_mask_of_each_position_against_naive_twin(dtype: torch.dtype) -> None:
    """As many rows as heads: the first dimension could be taken for either."""
    model = small_model(n_kv_heads=2)
    B, T = model.config.n_heads, 7
    x, g = prompts(B, T), torch.Generator().manual_seed(0)
    visible = (torch.rand(B, T, T, generator=g) < 0.5) | torch.eye(T, dtype=torch.bool)
    with torch.no_grad():
        expected = naive_logits(model, x, visible)
        for mask in (visible, visible[:, None], visible[:, None].expand(-1, B, -1, -1)):
            logits = model(x, attention_mask=mask.to(dtype)).logits.double()
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
        wanted = slice(2, 5)
        some = model.project(model.model(x, attention_mask=visible, wanted=wanted)).double()
        torch.testing.assert_close(some, expected[:, wanted], rtol=0, atol=2e-4)
        with_heads = visible[:1].expand(B, -1, -1).clone()
        with_heads[1] |= True
        assert not torch.allclose(
            model(x, attention_mask=with_heads[None]).logits, model(x, attention_mask=visible[:1]).logits, atol=0.01
        )


@pytest.mark.parametrize(
    "shape",
    [(7,), (2, 6), (2, 8), (3, 7), (2, 7, 6), (3, 7, 7), (2, 6, 7), (2, 3, 7, 7), (2, 1, 7, 6), (1, 1, 1, 1, 7)],
)
def test_masks_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    model, x = small_model(), prompts(2, 7)
    expected = re.escape(f"B=2, T=7, S=7, heads=4 or 1, got {list(shape)}")
    with pytest.raises(ValueError, match=f"attention_mask: expected .*{expected}"):
        model(x, attention_mask=torch.ones(shape, dtype=torch.bool))


def test_additive_masks_are_refused() -> None:
    """To read them as True and False would show what they hide; ones in floating point would be added to scores."""
    model, x = small_model(), prompts(2, 7)
    padding = torch.ones(2, 7)
    padding[0, :3] = 0
    with torch.no_grad():
        assert model(x, padding).logits.equal(model(x, padding.bool()).logits)
        assert model(x, padding.bfloat16()).logits.equal(model(x, padding.bool()).logits)
    for mask in (torch.zeros(2, 7, 7), torch.ones(2, 1, 7, 7), torch.full((2, 7), -1e9)):
        with pytest.raises(ValueError, match=r"attention_mask: expected True or 1 .*float32, which may be an additive"):
            model(x, attention_mask=mask)


def test_attention_is_bidirectional() -> None:
    model, x = small_model(), prompts(1, 8)
    changed = x.clone()
    changed[0, -1] = MASK
    with torch.no_grad():
        assert (model(x).logits - model(changed).logits)[0, 0].abs().max() > 0.01


@pytest.mark.parametrize("shifted", [False, True])
@EACH_FAMILY
def test_left_padding_changes_nothing(family: str, shifted: bool) -> None:
    """With positions from the mask, and without: rotary attention only knows distances."""
    model, rows = FAMILIES[family](), [prompts(1, 12)[0], prompts(1, 5, seed=1)[0]]
    input_ids, attention_mask = left_pad(rows)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0) if shifted else None
    with torch.no_grad():
        logits = model(input_ids, attention_mask=attention_mask, position_ids=position_ids).logits
        for b, row in enumerate(rows):
            alone = model(row[None]).logits[0]
            torch.testing.assert_close(logits[b, -len(row) :], alone, rtol=0, atol=2e-4)


def test_position_ids() -> None:
    model, x = small_model(), prompts(2, 7)
    with torch.no_grad():
        default = model(x).logits
        assert torch.equal(model(x, position_ids=torch.arange(7).expand(2, 7)).logits, default)
        order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
        moved = model(x[:, order], position_ids=order.expand(2, 7)).logits
        torch.testing.assert_close(moved, default[:, order], rtol=0, atol=2e-4)
        assert (model(x, position_ids=order.expand(2, 7)).logits - default).abs().max() > 0.1


@EACH_FAMILY
def test_hidden_states(family: str) -> None:
    model, x = FAMILIES[family](), prompts(2, 7)
    with torch.no_grad():
        out = model(x, output_hidden_states=True)
        assert [tuple(h.shape) for h in out.hidden_states] == [(2, 7, 32)] * 3
        assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(x))
        assert torch.equal(model.project(out.hidden_states[-1]), out.logits)
        assert model(x).hidden_states is None


@pytest.mark.parametrize(("name", "value"), [("labels", 0), ("past_key_values", ()), ("attn_mask", None)])
@EACH_FAMILY
def test_unknown_argument_is_named(family: str, name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        FAMILIES[family]()(prompts(1, 4), **{name: value})


def test_rows_that_pad_the_embedding_are_no_tokens() -> None:
    model, x = (
        small_model(vocab_size=60, embedding_size=V, **dict.fromkeys(("eos_token_id", "pad_token_id"), 1)),
        prompts(1, 5),
    )
    with torch.no_grad():
        assert model(x.clamp(max=59)).logits.shape == (1, 5, 60)
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (V, 32)


def test_tuples_are_not_offered() -> None:
    with pytest.raises(ValueError, match="return_dict=False"):
        small_model()(prompts(1, 4), return_dict=False)


@EACH_FAMILY
def test_backward_reaches_every_parameter(family: str) -> None:
    model = FAMILIES[family]().train()
    model(prompts(2, 6)).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
