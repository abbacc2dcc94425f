"""Forwards of block-causal families against those of the published model code, and what their folders may hold."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import naive_logits
from plain_block import PlainQwen, block_causal
from safetensors.torch import load_file, save_file
from small import BLOCK_CAUSAL, small_fast_dllm, small_sdar
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import fdpp
from fdpp.attention.cache import BlockCache
from fdpp.models.families import load
from fdpp.models.language_model import DiffusionLM

DATA = Path(__file__).parent / "data/block"
ATOL = 2e-4
"""Float32 and float64 runs of the published code differ by up to 6e-5."""


@functools.cache
def model(folder: str) -> DiffusionLM:
    """Shared: no test may change it."""
    made: DiffusionLM = load(str(DATA / folder / "model_tiny"), dtype=torch.float32).eval()
    return made


@functools.cache
def arrays(folder: str) -> dict[str, Tensor]:
    with np.load(DATA / folder / "trajectories/forward.npz") as stored:
        tensors = {name: torch.from_numpy(array) for name, array in stored.items()}
    return {name: tensor.long() if name.endswith("_x") else tensor for name, tensor in tensors.items()}


def close(ours: Tensor, folder: str, name: str) -> None:
    torch.testing.assert_close(ours, arrays(folder)[name], rtol=0, atol=ATOL)


FULL = [("sdar", "a", 4), ("sdar", "b", 4), ("sdar", "c", 8), ("sdar", "f", 32), ("fastdllm2", "a", 8)]
in_full = pytest.mark.parametrize(("folder", "name", "block_length"), FULL)


@in_full
def test_logits_are_the_published_ones(folder: str, name: str, block_length: int) -> None:
    """Not shifted, in SDAR as in Fast-dLLM v2, with weights joined and, for gradients, layer by layer."""
    x, wanted = arrays(folder)[f"{name}_x"], arrays(folder)[f"{name}_logits"]
    mask = block_causal(x.shape[1], block_length).expand(len(x), -1, -1)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            logits = model(folder)(x, attention_mask=mask).logits.detach()
        close(logits[:, -wanted.shape[1] :], folder, f"{name}_logits")
    with torch.no_grad():
        everywhere = model(folder)(x, attention_mask=torch.ones_like(mask)).logits[:, -wanted.shape[1] :]
    assert block_length > x.shape[1] or (everywhere - wanted).abs().amax() > 100 * ATOL, "the mask counts"


def test_hidden_states() -> None:
    x = arrays("sdar")["a_x"]
    with torch.no_grad():
        out = model("sdar")(x, attention_mask=block_causal(22, 4)[None], output_hidden_states=True)
    close(torch.stack(out.hidden_states), "sdar", "a_hidden")


@in_full
def test_bfloat16_is_as_good_as_the_published_arithmetic(folder: str, name: str, block_length: int) -> None:
    """Of the same rounded weights: as far from float64 as the published operators in bfloat16, or nearer."""
    x, path = arrays(folder)[f"{name}_x"], DATA / folder / "model_tiny"
    x = torch.cat((x, x.flip(1), x.roll(3, 1)))  # so many logits that their mean error tells
    exact = PlainQwen(path, torch.float64, rounded=torch.bfloat16)(x, block_length)
    theirs = PlainQwen(path, torch.bfloat16)(x, block_length)
    mask = block_causal(x.shape[1], block_length).expand(len(x), -1, -1)
    with torch.no_grad():
        ours = load(str(path), dtype=torch.bfloat16).eval()(x, attention_mask=mask).logits
    assert ours.dtype == torch.bfloat16
    errors = [(logits.double() - exact).square().mean().sqrt() for logits in (ours, theirs)]
    assert 0 < errors[0] <= 1.05 * errors[1]


@in_full
def test_the_plain_forward(folder: str, name: str, block_length: int) -> None:
    """The oracle above against the records."""
    wanted = arrays(folder)[f"{name}_logits"]
    logits = PlainQwen(DATA / folder / "model_tiny", torch.float32)(arrays(folder)[f"{name}_x"], block_length)
    close(logits[:, -wanted.shape[1] :], folder, f"{name}_logits")


@pytest.mark.parametrize("made", [small_sdar, small_fast_dllm], ids=["SDAR", "Fast-dLLM v2"])
def test_against_a_forward_written_out_in_float64(made: Any) -> None:
    """Also with layers that are called, and so nothing joined."""
    small, x = made(num_attention_heads=6, num_key_value_heads=3, head_dim=10).double(), torch.arange(22).view(2, 11)
    mask = block_causal(11, 4).expand(2, -1, -1)
    wanted = naive_logits(small, x, mask)
    with torch.no_grad():
        # Norms and angles are in float32 in one and in float64 in the other.
        torch.testing.assert_close(small(x, attention_mask=mask).logits, wanted, rtol=0, atol=1e-4)
        called: list[Any] = []
        layer = small.model.blocks[1].layers()
        for hooked in (layer.q_norm or layer.norm, layer.k):
            hooked.register_forward_hook(lambda module, args, out: called.append(module))
        torch.testing.assert_close(small(x, attention_mask=mask).logits, wanted, rtol=0, atol=1e-4)
    assert len(called) == 2


def test_a_block_after_its_prefix_and_with_the_block_before() -> None:
    """Denoising calls replace the block's own keys. What is published as a commit call is part of the next forward."""
    sdar, held = arrays("sdar"), BlockCache(grid=4, sequences=1, columns=16)
    x = sdar["a_x"]
    masks = torch.full((1, 4), model("sdar").config.mask_token_id)
    fed = {
        "prefill": (x[:, :8], 0),
        "block1": (sdar["cache_block1_x"], 8),
        "block2": (sdar["cache_block2_x"], 8),
        "commit, next": (torch.cat((x[:, 8:12], masks), dim=1), 8),
    }
    for names, (ids, start) in fed.items():
        with torch.no_grad():
            logits = model("sdar").project(model("sdar").model(ids, cache=held, start=start))
        for name, part in zip(names.split(", "), logits.split((8 if start == 0 else 4), dim=1), strict=True):
            close(part, "sdar", f"cache_{name}_logits")
        close(held.keys[0][:, :, :8], "sdar", "cache_k0")
        close(held.values[0][:, :, :8], "sdar", "cache_v0")


def test_a_sub_block_is_fed_alone() -> None:
    """Fast-dLLM v2: it sees the other sub-blocks as they were when the whole block was last fed."""
    v2, ours, held = arrays("fastdllm2"), model("fastdllm2"), BlockCache(grid=8, sequences=1, columns=24)
    fed = {
        "": (v2["a_x"][:1, :16], 0),
        "block": (v2["block_x"], 16),
        "blockcache": (v2["block_x"], 16),
        "sub": (v2["sub_x"], 20),
        "commit": (v2["commit_x"], 16),
    }
    for name, (ids, start) in fed.items():
        with torch.no_grad():
            logits = ours.project(ours.model(ids, cache=held, start=start))
        if name:
            close(logits, "fastdllm2", f"{name}_logits")
        if name == "sub":
            close(held.keys[0][:, :, 16:], "fastdllm2", "block_k0_after_sub")
        close(held.keys[0][:, :, :16], "fastdllm2", "cache_k0")
        close(held.values[0][:, :, :16], "fastdllm2", "cache_v0")


def test_blocks_are_the_models_own_and_begin_with_a_rows_first_token() -> None:
    """Where no mask says what is seen."""
    x, wanted = arrays("sdar")["a_x"], arrays("sdar")["a_logits"]
    padded = torch.cat((torch.full((1, 3), 7), x), dim=1)
    real = torch.arange(25)[None] >= 3
    with torch.no_grad():
        close(model("sdar")(x).logits, "sdar", "a_logits")
        logits = model("sdar")(torch.cat((padded, padded.flip(1))), torch.cat((real, real | True)).long()).logits
    torch.testing.assert_close(logits[:1, 3:], wanted, rtol=0, atol=ATOL)


# Folders


SDAR_4B = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig", "AutoModel": "modeling_sdar.SDARForCausalLM"},
    "block_size": 4,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 9728,
    "mask_token_id": 151669,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
FAST_DLLM_7B = {
    "architectures": ["Fast_dLLM_QwenForCausalLM"],
    "attention_dropout": 0.0,
    "bd_size": 32,
    "bos_token_id": 151643,
    "conplemenrary_mask": True,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "layer_types": ["full_attention"] * 28,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "Fast_dLLM_Qwen",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
"""Published `config.json`s: the keys of the recorded models, with the values of 4B and 7B."""

PUBLISHED: dict[str, tuple[dict[str, Any], Any, Any, int]] = {
    "SDAR": (SDAR_4B, fdpp.SDARConfig, fdpp.SDARModelLM, 4_411_424_256),
    "Fast-dLLM v2": (FAST_DLLM_7B, fdpp.FastDLLMConfig, fdpp.FastDLLMModelLM, 7_615_616_512),
}
"""With the number of parameters: as many as Qwen3-4B, whose head is its embedding, and another head; as Qwen2.5-7B."""

each_published = pytest.mark.parametrize("family", PUBLISHED)


def folder_of(path: Path, config: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


@each_published
@pytest.mark.filterwarnings("error")
def test_a_published_config_loads_in_whole(family: str, tmp_path: Path) -> None:
    given, kind, published, parameters = PUBLISHED[family]
    config = AutoConfig.from_pretrained(folder_of(tmp_path, given))
    assert type(config) is kind
    for key in given.keys() - {"torch_dtype", "use_cache", "rope_scaling"}:
        assert getattr(config, key) == given[key], key
    assert config.dtype == torch.bfloat16 and config.block_length == given.get("block_size", given.get("bd_size"))
    assert config.mask_token_id == {"SDAR": 151669, "Fast-dLLM v2": 151665}[family]
    with torch.device("meta"):
        made = published(config)
    assert sum(p.numel() for p in made.parameters()) == parameters
    recorded = {"SDAR": "sdar", "Fast-dLLM v2": "fastdllm2"}[family]
    names = {name.replace(".0.", ".*.") for name in load_file(DATA / recorded / "model_tiny/model.safetensors")}
    deeper = {name for name in names if ".1." in name or ".2." in name}
    assert {name.replace(".0.", ".*.") for name in made.state_dict() if ".0." in name or ".layers" not in name} == (
        names - deeper
    )
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize(
    ("family", "option", "value"),
    [
        ("SDAR", "attention_bias", True),
        ("SDAR", "hidden_act", "gelu"),
        ("SDAR", "rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("SDAR", "use_sliding_window", True),
        ("Fast-dLLM v2", "attention_dropout", 0.1),
        ("Fast-dLLM v2", "rope_parameters", {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5.0}),
        ("Fast-dLLM v2", "layer_types", ["full_attention"] * 27 + ["sliding_attention"]),
    ],
    ids=str,
)
def test_options_that_are_not_implemented_are_named(family: str, option: str, value: Any, tmp_path: Path) -> None:
    path = folder_of(tmp_path, PUBLISHED[family][0] | {option: value})
    for load_it in (AutoConfig.from_pretrained, AutoModel.from_pretrained, load):
        with pytest.raises(ValueError, match=rf"{family} config: {option}=.* is not implemented, expected") as error:
            load_it(path)
        assert f"{option}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("SDAR", {"head_dim": 7}, "SDAR config: rotary embedding needs an even head size, got 7"),
        ("SDAR", {"head_dim": 0}, "SDAR config: expected sizes of at least 1, got .*head_dim=0"),
        ("SDAR", {"num_key_value_heads": 3}, "SDAR config: expected num_key_value_heads to divide num_att"),
        ("SDAR", {"block_size": 0}, "SDAR config: expected a block_size of at least 1, got 0"),
        ("Fast-dLLM v2", {"bd_size": 0}, r"Fast-dLLM v2 config: expected a bd_size of at least 1, got 0"),
        ("Fast-dLLM v2", {"hidden_size": 30}, r"Fast-dLLM v2 config: .*hidden_size=30, num_attention_heads=4"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(family: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BLOCK_CAUSAL[family](**sizes)


def test_ids_outside_of_the_vocabulary_are_none() -> None:
    config = fdpp.FastDLLMConfig(vocab_size=64, pad_token_id=64)
    assert config.mask_token_id is config.eos_token_id is config.pad_token_id is None
    config = fdpp.FastDLLMConfig(vocab_size=64, mask_token_id=63, eos_token_id=[1, 70], pad_token_id=0)
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (63, [1, 70], 0)
    assert fdpp.SDARConfig(vocab_size=64).mask_token_id is None
    assert fdpp.SDARConfig(block_length=8).block_size == 8 == fdpp.SDARConfig(block_size=8).block_length


@pytest.mark.parametrize(
    ("folder", "changed"), [("sdar", "model.layers.1.self_attn.q_norm.weight"), ("fastdllm2", "lm_head.weight")]
)
def test_a_checkpoint_with_other_weights_is_refused(folder: str, changed: str, tmp_path: Path) -> None:
    source = DATA / folder / "model_tiny"
    path = folder_of(tmp_path, json.loads((source / "config.json").read_text()))
    weights = load_file(source / "model.safetensors")
    held = weights.pop(changed)
    for others, message in (
        ({}, f"1 missing keys: {changed}"),
        ({changed: held[1:]}, "1 mismatched keys: .*" + changed),
        ({changed: held, "model.layers.0.self_attn.k_bias": held.clone()}, r"1 unexpected keys: model"),
    ):
        save_file(weights | others, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(path)


def test_tied_heads_and_auto_classes(tmp_path: Path) -> None:
    for made in (small_sdar, small_fast_dllm):
        tied = made(tie_word_embeddings=True)
        tied.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(loaded) is type(tied) and "lm_head.weight" not in loaded.state_dict()
        assert loaded.config.base_model_tp_plan["embed_tokens"] == "embedding_rowwise"
        ids, mask = torch.arange(11)[None], block_causal(11, 4)[None]
        with torch.no_grad():
            assert loaded(ids, attention_mask=mask).logits.equal(tied(ids, attention_mask=mask).logits)
