"""Quantised models: the layers are replaced, and a decode is that of the model's own forward."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from family_of_others import FAMILIES, TIED
from plain import plain_llada
from small import MASK, layer_of, prompts, put, small_model
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

import fdpp
from fdpp import LLaDAModelLM
from fdpp.decoding.identity import held_by, identity
from fdpp.models import linear as products
from fdpp.models.language_model import DiffusionLM

HEADS = {"LLaDA": "model.transformer.ff_out", "Dream": "lm_head"}
HEAD = HEADS["LLaDA"]
SIZES: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8, "stop_at_eos": False}
PROMPT = prompts(1, 6)
WIDE = {"d_model": 64, "mlp_hidden_size": 128}
WIDER = {
    "LLaDA": WIDE,
    "Dream": {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.3},
    "Gist": {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.3},
}
"""What bitsandbytes on a CPU asks for in 4 bit: inputs in multiples of 64."""


def bitsandbytes(bits: int, **options: Any) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    return BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **options)


def torchao(kind: str, *arguments: Any) -> Any:
    return getattr(pytest.importorskip("torchao.quantization"), kind)(*arguments)


# LLM.int8() by its default threshold looks at all rows to decide how to multiply each.
SCHEMES: dict[str, Callable[..., Any]] = {
    "bitsandbytes 4 bit": lambda skip: bitsandbytes(4, llm_int8_skip_modules=skip),
    "bitsandbytes 8 bit": lambda skip: bitsandbytes(8, llm_int8_skip_modules=skip, llm_int8_threshold=0.0),
    "torchao int8": lambda skip: TorchAoConfig(torchao("Int8WeightOnlyConfig"), modules_to_not_convert=skip),
    "torchao int4": lambda skip: TorchAoConfig(
        torchao("IntxWeightOnlyConfig", torch.int4), modules_to_not_convert=skip
    ),
    "torchao float8": lambda skip: TorchAoConfig(torchao("Float8WeightOnlyConfig"), modules_to_not_convert=skip),
}
CASES = pytest.mark.parametrize(
    ("family", "scheme", "head"),
    [
        *(("LLaDA", scheme, head) for scheme in SCHEMES for head in (False, True)),
        *(("Dream", scheme, "8 bit" in scheme) for scheme in SCHEMES),
        ("Dream", "torchao int8", True),
        ("Gist", "torchao int8", False),
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    for family in FAMILIES:
        whole(family).save_pretrained(path / family)
    return path


def whole(family: str) -> DiffusionLM:
    return FAMILIES[family](seed=4, **WIDER[family])


@pytest.fixture(scope="module")
def load(folder: Path) -> Callable[[str, str, bool], DiffusionLM]:
    """By family and scheme, and whether the head is quantised too; each is loaded once."""
    loaded: dict[Any, DiffusionLM] = {}

    def load(family: str, scheme: str, head: bool) -> DiffusionLM:
        if (family, scheme, head) not in loaded:
            config, kind = SCHEMES[scheme]([] if head else None), type(FAMILIES[family]())
            loaded[family, scheme, head] = kind.from_pretrained(folder / family, quantization_config=config)
        return loaded[family, scheme, head]

    return load


def quantised(model: DiffusionLM, family: str = "LLaDA") -> set[str]:
    """The names of the linear layers that are no plain ones any more."""
    names = [name for name, layer in FAMILIES[family]().named_modules() if type(layer) is nn.Linear]
    return {name for name in names if not products.is_bare(model.get_submodule(name))}


@CASES
def test_the_layers_are_replaced_and_their_memory_shrinks(load: Any, family: str, scheme: str, head: bool) -> None:
    model, before = load(family, scheme, head), whole(family)
    names = quantised(model, family)
    assert len(names) == 14 + head and (HEADS.get(family) in names) == head
    if "bitsandbytes" in scheme:
        assert model.get_memory_footprint() < 0.5 * before.get_memory_footprint()
    for name in names:
        now, former = model.get_submodule(name), before.get_submodule(name)
        assert sum(part.nbytes for part in held_by(now.weight)) < 0.3 * former.weight.nbytes
        assert former.bias is None or torch.equal(now.bias.float(), former.bias)


@CASES
def test_a_quantised_decode_is_that_of_the_models_own_forward(load: Any, family: str, scheme: str, head: bool) -> None:
    model = load(family, scheme, head)
    expected = plain_llada(model, PROMPT[0], steps=8, max_new_tokens=16)
    settings = {**SIZES, "rule": fdpp.Quota(), "steps": 8}
    for options in ({"cache": "none"}, {"cache": "none", "drafts": 3}, {"cache": "none", "engine": "static"}):
        assert model.generate(PROMPT, **settings, **options).sequences[0].equal(expected), options
    dual = model.generate(PROMPT, **settings)
    for options in ({"drafts": 3}, {"drafts": 3, "branches": "tree", "engine": "static"}):
        assert model.generate(PROMPT, **settings, **options).sequences.equal(dual.sequences), options
    if head:
        with pytest.raises(ValueError, match=r"head: expected a plain weight .*not quantised"):
            model.generate(PROMPT, head="fused", **settings)
    else:
        assert model.generate(PROMPT, head="fused", **settings).sequences.equal(dual.sequences)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [*(("LLaDA", scheme) for scheme in SCHEMES), ("Dream", "torchao int8"), ("Gist", "torchao int4")],
)
def test_in_bfloat16_with_a_tied_head(family: str, scheme: str, tmp_path: Path) -> None:
    tied = FAMILIES[family](**TIED[family], **WIDER[family]).bfloat16()
    tied.save_pretrained(tmp_path)
    model = type(tied).from_pretrained(tmp_path, quantization_config=SCHEMES[scheme](None))
    assert model(PROMPT).logits.dtype == torch.bfloat16 and model.get_output_embeddings() is None
    out = model.generate(PROMPT, **SIZES)
    assert not out.sequences.eq(MASK).any()
    for options in ({"engine": "static"}, {"head": "fused"}):
        assert model.generate(PROMPT, **SIZES, **options).sequences.equal(out.sequences)


@CASES
def test_a_quantised_model_is_saved_and_loaded_as_such(
    load: Any, family: str, scheme: str, head: bool, tmp_path: Path
) -> None:
    model = load(family, scheme, head)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert quantised(again, family) == quantised(model, family)
    with torch.no_grad():
        assert again(PROMPT).logits.equal(model(PROMPT).logits)


def test_llm_int8_by_its_own_threshold_fills_every_position(folder: Path) -> None:
    model = LLaDAModelLM.from_pretrained(folder / "LLaDA", quantization_config=bitsandbytes(8))
    for options in ({}, {"drafts": 3}, {"cfg_scale": 1.0}):
        assert not model.generate(prompts(2, 6), **SIZES, **options).sequences.eq(MASK).any()


# In place


def test_torchao_in_place_lets_go_of_the_former_joined_weights() -> None:
    torchao("Int8WeightOnlyConfig")
    from torchao.quantization import quantize_

    model = small_model(seed=4)
    with torch.no_grad():
        model(PROMPT)
    block = model.model.transformer["blocks"][0]
    assert block.qkv.weight is not None
    before = identity(model)
    quantize_(model, torchao("Int8WeightOnlyConfig"))
    assert len(quantised(model)) == 15 and identity(model) != before
    expected = plain_llada(model, PROMPT[0], steps=8, max_new_tokens=16)
    out = model.generate(PROMPT, **SIZES, rule=fdpp.Quota(), steps=8, cache="none")
    assert out.sequences[0].equal(expected)
    assert type(block.qkv.weight) is type(block.q_proj.weight) and type(block.gate_up.weight) is type(block.qkv.weight)


def test_int8_in_float32_at_a_vocabulary_that_goes_to_onednn() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = small_model(vocab_size=8000, d_model=128, n_layers=1)
    whole = copy.deepcopy(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    hidden = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(0))
    assert hidden.numel() * 8000 >= products.SMALL
    with torch.no_grad():
        logits, expected = model.project(hidden), whole.project(hidden)
    assert logits.shape == (2, 64, 8000) and (logits - expected).std() < 0.02 * expected.std()
    assert not model.generate(PROMPT, **SIZES).sequences.eq(MASK).any()


def test_an_embedding_that_is_the_head_and_quantised() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    whole = small_model(weight_tying=True, vocab_size=8000, embedding_size=8064, d_model=128, n_layers=1)
    model = copy.deepcopy(whole)
    config = quantization.IntxWeightOnlyConfig(torch.int8)
    quantization.quantize_(model, config, filter_fn=lambda module, _: isinstance(module, (nn.Linear, nn.Embedding)))
    with torch.no_grad():
        logits, expected = model(PROMPT).logits, whole(PROMPT).logits
    assert logits.shape == expected.shape and (logits - expected).std() < 0.2 * expected.std()
    plain = plain_llada(model, PROMPT[0], steps=8, max_new_tokens=16)
    out = model.generate(PROMPT, **SIZES, rule=fdpp.Quota(), steps=8, cache="none")
    assert out.sequences[0].equal(plain)
    with pytest.raises(ValueError, match=r"head: expected a plain weight .*not quantised.*IntxUnpackedToInt8Tensor"):
        model.generate(PROMPT, head="fused", **SIZES)


def dynamic(model: LLaDAModelLM) -> LLaDAModelLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch announces that it will drop this way
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def test_pytorchs_dynamic_quantisation_replaces_all_layers() -> None:
    whole = small_model(seed=4)
    with torch.no_grad():
        expected = whole(PROMPT).logits
        model = dynamic(whole)
        assert len(quantised(model)) == 15
        assert (model(PROMPT).logits - expected).std() < 0.3 * expected.std()
    out = model.generate(prompts(2, 6), **SIZES)
    assert not out.sequences.eq(MASK).any()
    assert model.generate(prompts(2, 6), **SIZES, engine="static").sequences.equal(out.sequences)
    assert not model.generate(prompts(2, 6), **SIZES, drafts=3).sequences.eq(MASK).any()


def test_what_was_quantised_in_place_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_pretrained: expected plain weights, got model\.transformer.*q_proj"):
        dynamic(small_model()).save_pretrained(tmp_path)
    quantization = pytest.importorskip("torchao.quantization")
    model = small_model()
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(
        ValueError, match=r"save_pretrained: expected plain weights, got .*Int8Tensor.*quantization_con"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# Refusals


def test_a_quantisation_that_replaces_nothing_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"expected bitsandbytes to replace linear layers, .* none of 15 .*: model\)"):
        LLaDAModelLM.from_pretrained(
            folder / "LLaDA", quantization_config=bitsandbytes(4, llm_int8_skip_modules=["model"])
        )


@pytest.mark.parametrize("scheme", ["bitsandbytes 4 bit", "torchao int8"])
def test_dreams_head_is_left_out_by_its_name(folder: Path, scheme: str) -> None:
    """In Dream it is called as in most models, and its layers as in no LLaDA."""
    load = partial(fdpp.DreamModelLM.from_pretrained, folder / "Dream")
    model = load(quantization_config=SCHEMES[scheme](["lm_head"]))
    assert len(quantised(model, "Dream")) == 14 and "lm_head" not in quantised(model, "Dream")
    expected = "got 'ff_out', .* the head is 'lm_head', a block's last layer 'model.layers.0.mlp.down_proj'"
    with pytest.raises(ValueError, match=expected):
        load(quantization_config=SCHEMES[scheme](["ff_out"]))


@pytest.mark.parametrize(("scheme", "name"), [("bitsandbytes 4 bit", "lm_head"), ("torchao int8", "ff_out")])
def test_a_head_that_is_to_be_left_out_by_a_name_that_it_does_not_have(folder: Path, scheme: str, name: str) -> None:
    """Else it is quantised without a word. torchao's configuration wants whole names, that of bitsandbytes ends."""
    with pytest.raises(ValueError, match=f"got '{name}', which leaves out none; the head is '{HEAD}'"):
        LLaDAModelLM.from_pretrained(folder / "LLaDA", quantization_config=SCHEMES[scheme]([name]))
    model = LLaDAModelLM.from_pretrained(folder / "LLaDA", quantization_config=SCHEMES[scheme]([HEAD]))
    assert len(quantised(model)) == 14 and HEAD not in quantised(model)


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="what GPTQ needs is there")
def test_gptq_says_what_it_needs(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ImportError, match="GPTQ quantized model requires optimum"):
        LLaDAModelLM.from_pretrained(tmp_path)


def test_a_folder_of_an_unknown_method_says_so(tmp_path: Path) -> None:
    small_model(d_model=64, mlp_hidden_size=96).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "of_tomorrow"}, "d_model": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"LLaDA checkpoint quantised by of_tomorrow .*mismatched keys"):
        LLaDAModelLM.from_pretrained(tmp_path)


# What is plain


def test_an_exchanged_quantised_weight_is_noticed() -> None:
    """Its class has no memory of its own, and so no address."""
    quantization = pytest.importorskip("torchao.quantization")
    model, other = small_model(), small_model(seed=1)
    for each in (model, other):
        quantization.quantize_(each, quantization.Int8WeightOnlyConfig())
    before = identity(model)
    assert identity(model) == before
    layer, theirs = (each.model.transformer["blocks"][1].ff_out for each in (model, other))
    assert layer.weight.data_ptr() == theirs.weight.data_ptr()
    layer.weight = theirs.weight
    assert identity(model) != before


@pytest.mark.parametrize("family", HEADS)
def test_plain_layers_beside_a_wrapped_one_take_the_fast_product(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    class Marked(nn.Parameter):
        pass

    model, fast = FAMILIES[family](), []
    product = products.linear
    monkeypatch.setattr(products, "linear", lambda x, weight, bias: fast.append(weight) or product(x, weight, bias))
    put(model.model.blocks[0], "q", Wrapped(layer_of(model, "q")))
    layer_of(model, "up").weight = Marked(layer_of(model, "up").weight.data)
    layer_of(model, "out").register_forward_hook(lambda *_: None)
    expected = model(PROMPT).logits
    assert fast == []
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected)
    assert [id(weight) for weight in fast] == [id(layer_of(model, role).weight) for role in ("k", "v", "gate", "down")]
