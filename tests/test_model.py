"""LLaDA as a transformers model: configuration, checkpoints, forward."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import MASK, V, left_pad, prompts, small_model
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from fdpp import LLaDAConfig, LLaDAModelLM

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
}

BLOCK_KEYS = ("q_proj", "k_proj", "v_proj", "attn_out", "attn_norm", "ff_norm", "ff_proj", "up_proj", "ff_out")


def expected_keys(n_layers: int, tied: bool) -> set[str]:
    names = [f"blocks.{n}.{part}" for n in range(n_layers) for part in BLOCK_KEYS] + ["wte", "ln_f"]
    return {f"model.transformer.{name}.weight" for name in names + ["ff_out"] * (not tied)}


def naive_logits(model: LLaDAModelLM, x: Tensor, visible: Tensor | None = None) -> Tensor:
    """The architecture in float64, row by row and head by head: logits `[B, T, V]`.

    `visible` `[B, T]` or `[B, T, T]` bool: the keys that all positions of a sequence see, or that each of them sees.
    """
    config, weights = model.config, {k: v.double() for k, v in model.state_dict().items()}
    size, shared = config.d_model // config.n_heads, config.n_heads // config.n_kv_heads
    T = x.shape[1]

    def weight(name: str) -> Tensor:
        return weights[f"model.transformer.{name}.weight"]

    def norm(h: Tensor, name: str) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight(name)

    def rope(h: Tensor) -> Tensor:
        """Pairs (j, j + size / 2) as complex numbers, turned by position * theta^(-2j / size)."""
        turns = torch.arange(T)[:, None] * config.rope_theta ** (-torch.arange(0, size, 2).double() / size)
        turned = torch.complex(h[:, : size // 2], h[:, size // 2 :]) * torch.polar(torch.ones_like(turns), turns)
        return torch.cat((turned.real, turned.imag), -1)

    logits = []
    for b in range(x.shape[0]):
        h = weight("wte")[x[b]]
        for n in range(config.n_layers):
            a = norm(h, f"blocks.{n}.attn_norm")
            q, k, v = (a @ weight(f"blocks.{n}.{part}_proj").T for part in "qkv")
            heads = []
            for head in range(config.n_heads):
                own, kv = slice(head * size, head * size + size), slice(*(head // shared * size + i for i in (0, size)))
                scores = rope(q[:, own]) @ rope(k[:, kv]).T / math.sqrt(size)
                if visible is not None:
                    scores = scores.masked_fill(~visible[b], -torch.inf)
                heads.append(scores.softmax(-1) @ v[:, kv])
            h = h + torch.cat(heads, -1) @ weight(f"blocks.{n}.attn_out").T
            a = norm(h, f"blocks.{n}.ff_norm")
            gate, up = (a @ weight(f"blocks.{n}.{part}_proj").T for part in ("ff", "up"))
            h = h + (gate * gate.sigmoid() * up) @ weight(f"blocks.{n}.ff_out").T
        logits.append(norm(h, "ln_f") @ weight("wte" if config.weight_tying else "ff_out").T)
    return torch.stack(logits)


def write_checkpoint(path: Path, change: Callable[[dict[str, Tensor]], Any] = lambda weights: None) -> Path:
    """A checkpoint of `small_model`, its tensors changed."""
    small_model().save_pretrained(path)
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


@pytest.mark.parametrize("model_type", ["llada", "lladamoe"])
def test_experts_are_refused_as_llada_moe(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **MIXTURE}))
    for load in (LLaDAConfig, LLaDAModelLM):
        with pytest.raises(ValueError, match=r"expected a dense LLaDA, got experts, as LLaDA-MoE.*num_experts=64"):
            load.from_pretrained(tmp_path)
    if model_type == "llada":
        with pytest.raises(ValueError, match="LLaDA-MoE"):
            AutoModelForCausalLM.from_pretrained(tmp_path)


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
def test_save_and_load(tied: bool, shard: str, tmp_path: Path) -> None:
    model = small_model(weight_tying=tied, n_kv_heads=2)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) == 1) == (shard == "1GB")
    assert {key for file in files for key in load_file(file)} == expected_keys(2, tied)
    loaded = LLaDAModelLM.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() == {**model.config.to_diff_dict(), "architectures": ["LLaDAModelLM"]}
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    x = prompts(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [V + 9, V - 3])
def test_another_vocabulary(size: int, tied: bool, tmp_path: Path) -> None:
    llada, same = small_model(weight_tying=tied), min(size, V)
    ids = prompts(2, 6) % (V - 3)
    before = llada(ids).logits
    llada.resize_token_embeddings(size, mean_resizing=False)
    assert (llada.config.vocab_size, llada.config.embedding_size) == (size, size)
    assert llada(ids).logits.shape[-1] == size
    assert torch.equal(llada(ids).logits[..., :same], before[..., :same])
    llada.save_pretrained(tmp_path)
    again = LLaDAModelLM.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 8, "mask_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert torch.equal(again.generate(ids, **settings).sequences, llada.generate(ids, **settings).sequences)


def test_tied_head_is_the_embedding() -> None:
    model = small_model(weight_tying=True)
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.project(hidden), hidden @ model.get_input_embeddings().weight.T)
    assert model.get_output_embeddings() is None
    assert small_model().get_output_embeddings().weight.shape == (V, 32)


def test_missing_key_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, lambda weights: weights.pop("model.transformer.blocks.1.up_proj.weight"))
    with pytest.raises(ValueError, match=r"missing.*blocks\.1\.up_proj\.weight"):
        LLaDAModelLM.from_pretrained(tmp_path)


def test_unexpected_key_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, lambda weights: weights.update({"model.transformer.wpe.weight": torch.zeros(4, 32)}))
    with pytest.raises(ValueError, match=r"unexpected.*model\.transformer\.wpe\.weight"):
        LLaDAModelLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", [LLaDAModelLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_mismatched_key_is_named(load: Callable[[Path], Any], tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, lambda weights: weights.update({"model.transformer.ff_out.weight": torch.zeros(V + 1, 32)})
    )
    with pytest.raises(ValueError, match=r"mismatched.*model\.transformer\.ff_out\.weight"):
        load(tmp_path)


def test_a_head_in_a_tied_checkpoint_is_unexpected(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "weight_tying": True, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match=r"unexpected.*model\.transformer\.ff_out\.weight"):
        LLaDAModelLM.from_pretrained(tmp_path)


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


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM])
def test_auto_classes_run_no_remote_code(auto: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A published folder holds code and an `auto_map` to it; nobody is asked about it and it never runs."""
    write_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": PUBLISHED["auto_map"]}))
    for name in ("configuration_llada.py", "modeling_llada.py"):
        (tmp_path / name).write_text("raise RuntimeError('remote code ran')")

    def prompt(*_: Any) -> str:
        raise AssertionError("asked whether to trust remote code")

    monkeypatch.setattr("builtins.input", prompt)
    assert type(AutoConfig.from_pretrained(tmp_path)) is LLaDAConfig
    model = auto.from_pretrained(tmp_path)
    assert type(model) is LLaDAModelLM
    x = prompts(1, 6)
    with torch.no_grad():
        assert torch.equal(model(x).logits, small_model()(x).logits)


def test_bf16_load(tmp_path: Path) -> None:
    original, x = small_model(init_std=0.2), prompts(2, 12)
    original.save_pretrained(tmp_path)
    model = LLaDAModelLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits, expected = model(x).logits, naive_logits(original, x)
    assert logits.dtype == torch.bfloat16
    assert (logits.double() - expected).square().mean().sqrt() < 0.03 * expected.std()


# Forward


@pytest.mark.parametrize(
    "config",
    [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"weight_tying": True}, {"rope_theta": 100.0, "rms_norm_eps": 0.1}],
    ids=str,
)
def test_forward_against_naive_twin(config: dict[str, Any]) -> None:
    model = small_model(**config)
    # RMSNorm starts at 1, where a forgotten weight would not show.
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    x = prompts(2, 11)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits.double(), naive_logits(model, x), rtol=0, atol=2e-4)


def test_tiny_checkpoint_against_naive_twin() -> None:
    model = LLaDAModelLM.from_pretrained(MODEL_TINY).eval()
    x = torch.cat((prompts(2, 10), torch.full((2, 14), model.config.mask_token_id)), 1)
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits.double(), naive_logits(model, x), rtol=0, atol=5e-4)


def test_attention_mask_against_naive_twin() -> None:
    model, x = small_model(n_kv_heads=2), prompts(2, 10)
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
def test_left_padding_changes_nothing(shifted: bool) -> None:
    """With positions from the mask, and without: rotary attention only knows distances."""
    model, rows = small_model(), [prompts(1, 12)[0], prompts(1, 5, seed=1)[0]]
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


def test_hidden_states() -> None:
    model, x = small_model(), prompts(2, 7)
    with torch.no_grad():
        out = model(x, output_hidden_states=True)
        assert [tuple(h.shape) for h in out.hidden_states] == [(2, 7, 32)] * 3
        assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(x))
        assert torch.equal(model.project(out.hidden_states[-1]), out.logits)
        assert model(x).hidden_states is None


@pytest.mark.parametrize(("name", "value"), [("labels", 0), ("past_key_values", ()), ("attn_mask", None)])
def test_unknown_argument_is_named(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=name):
        small_model()(prompts(1, 4), **{name: value})


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


def test_backward_reaches_every_parameter() -> None:
    model = small_model(n_kv_heads=2).train()
    model(prompts(2, 6)).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())
