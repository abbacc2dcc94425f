"""What every family's model does, by the block-causal ones: folders, quantised weights, adapters, patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import remote_like
import torch
from small import BLOCK_CAUSAL, left_pad, make_exact, prompts
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, TorchAoConfig

import fdpp
from fdpp.models import linear
from fdpp.models.families import load
from fdpp.models.language_model import DiffusionLM

FAMILIES = ("SDAR", "Fast-dLLM v2")
"""Those with Qwen's layers; the other has experts, and tests of its own."""
EACH = pytest.mark.parametrize("family", FAMILIES)
SIZES: dict[str, Any] = {"max_new_tokens": 14, "stop_at_eos": False}
WAYS: list[dict[str, Any]] = [{"cache": "none"}, {"engine": "static"}, {"drafts": 3}]
IDS, MASK = left_pad([prompts(1, 7, seed=1)[0], prompts(1, 4, seed=2)[0]])


def decoded(model: Any, **settings: Any) -> Tensor:
    tokens: Tensor = model.generate(IDS, MASK, **SIZES, **settings).sequences
    return tokens


def exactly(family: str, **config: Any) -> DiffusionLM:
    """In float64, so that no rounding decides a commit."""
    model = BLOCK_CAUSAL[family](**config)
    make_exact(model)
    return model


@EACH
def test_a_folder_is_loaded_by_its_model_type(family: str, tmp_path: Path) -> None:
    made = BLOCK_CAUSAL[family]()
    made.save_pretrained(tmp_path)
    wanted = decoded(made)
    for loader in (load, type(made).from_pretrained, AutoModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        loaded = loader(str(tmp_path))
        assert type(loaded) is type(made) and decoded(loaded).equal(wanted)


@EACH
def test_quantised_layers_are_joined_and_decode_alike(family: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    whole = BLOCK_CAUSAL[family](hidden_size=64, intermediate_size=128)
    whole.save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=[])
    model = type(whole).from_pretrained(tmp_path, quantization_config=config)
    names = [name for name, layer in whole.named_modules() if type(layer) is nn.Linear]
    assert len(names) == 15 and not any(linear.is_bare(model.get_submodule(name)) for name in names)
    with torch.no_grad():
        assert model.model.blocks[1].qkv.matrix() is not None
    wanted = decoded(model)
    for way in WAYS:
        assert decoded(model, **way).equal(wanted), way


@EACH
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_an_adapter_counts(family: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "up_proj", "lm_head"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = peft.get_peft_model(exactly(family), config).eval()
    ways = [decoded(made, **way) for way in WAYS]
    with made.disable_adapter():
        assert decoded(made).equal(decoded(exactly(family)))
    merged = decoded(made.merge_and_unload())
    assert all(tokens.equal(merged) for tokens in ways) and not merged.equal(decoded(exactly(family)))


REMOTE = {
    "SDAR": (remote_like.SDARForCausalLM, remote_like.SDARConfig),
    "Fast-dLLM v2": (remote_like.Fast_dLLM_QwenForCausalLM, remote_like.Fast_dLLM_QwenConfig),
}


@EACH
def test_a_patched_model_of_the_published_code_decodes_as_ours(family: str) -> None:
    ours, (published, config) = BLOCK_CAUSAL[family](), REMOTE[family]
    theirs = published(config(**ours.config.to_dict())).eval()
    theirs.load_state_dict(ours.state_dict())
    held = {name: parameter.data_ptr() for name, parameter in theirs.named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits)
    with fdpp.patch(theirs):
        for way in ({"rule": fdpp.Frechet(0.1)}, *WAYS):
            out, wanted = (model.generate(IDS, MASK, **SIZES, **way) for model in (theirs, ours))
            assert out.sequences.equal(wanted.sequences) and out.nfe.equal(wanted.nfe), way
        assert type(theirs.denoising_step) is fdpp.DenoisingStep
    assert "generate" not in vars(theirs)
    assert {name: parameter.data_ptr() for name, parameter in theirs.named_parameters()} == held
    del theirs.model.layers[1].self_attn.q_proj
    with pytest.raises(ValueError, match=r"missing model\.layers\.1\.self_attn\.q_proj\.weight"):
        fdpp.patch(theirs)
