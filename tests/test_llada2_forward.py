"""LLaDA2's forwards against those of the published model code; its configuration and its checkpoints."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captures import captured_on_cpu
from plain import naive_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import MASK, left_pad, make_exact, prompts, small_llada2
from torch import Tensor, nn

import fdpp
from fdpp import LLaDA2Config, LLaDA2ModelLM
from fdpp.attention.cache import BlockCache
from fdpp.models import experts
from fdpp.models.experts import MoE, route
from fdpp.models.families import load
from fdpp.models.quantised import quantise

DATA = Path(__file__).parent / "data/block/llada2"
ATOL = 2e-4
"""Float32 and float64 runs of the published code differ by up to 5.7e-5."""


@functools.cache
def arrays() -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in np.load(DATA / "trajectories/forward.npz").items()}


@functools.cache
def model() -> LLaDA2ModelLM:
    """Shared: no test may change it."""
    return LLaDA2ModelLM.from_pretrained(DATA / "model_tiny").eval()


def sees(length: int, block_length: int) -> Tensor:
    """`[1, L, L]`: full attention within blocks, causal between them."""
    block = torch.arange(length) // block_length
    return (block[:, None] >= block)[None]


def recorded(name: str) -> tuple[Tensor, Tensor]:
    """Ids and mask of a recorded forward."""
    facts = json.loads((DATA / "trajectories/forward.json").read_text())
    x = arrays()[f"{name}_x"].long()
    return x, sees(x.shape[1], facts[f"{name}_block_length"]).expand(len(x), -1, -1)


def forward(name: str, model: LLaDA2ModelLM) -> Any:
    return model(*recorded(name), output_hidden_states=True)


@pytest.mark.parametrize("joined", [True, False], ids=["joined", "layer by layer"])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_recorded_forwards(name: str, joined: bool) -> None:
    with torch.set_grad_enabled(not joined):
        out = forward(name, model())
    torch.testing.assert_close(out.logits.detach(), arrays()[f"{name}_logits"], rtol=0, atol=ATOL)
    if name == "a":
        states = torch.stack([state.detach() for state in out.hidden_states])
        torch.testing.assert_close(states, arrays()["a_hidden"], rtol=0, atol=ATOL)


def test_a_causal_forward_is_another() -> None:
    """So that the test above can fail."""
    x, _ = recorded("a")
    for other in (sees(x.shape[1], 1), sees(x.shape[1], x.shape[1])):
        with torch.no_grad():
            assert (model()(x, other).logits - arrays()["a_logits"]).abs().max() > 100 * ATOL


def test_recorded_routes() -> None:
    mixtures, seen = [block.mlp for block in model().model.layers if isinstance(block.mlp, MoE)], []
    hooks = [moe.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for moe in mixtures]
    with torch.no_grad():
        forward("a", model())
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(mixtures) == len(arrays()["a_router_idx"])
    for layer, (moe, h) in enumerate(zip(mixtures, seen, strict=True)):
        assert moe.routing == (4, 4, 2, 2.5)
        index, weights = route(h[0], moe.gate.weight, moe.gate.expert_bias, moe.routing)
        order, of_record = index.sort(), arrays()["a_router_idx"][layer].long().sort()
        assert torch.equal(order.values, of_record.values)
        of_weights = arrays()["a_router_weight"][layer].gather(1, of_record.indices)
        torch.testing.assert_close(weights.gather(1, order.indices).detach(), of_weights, rtol=0, atol=1e-5)


def test_rows_do_not_depend_on_each_other() -> None:
    with torch.no_grad():
        for small in (small_llada2(), small_llada2(num_shared_experts=0, first_k_dense_replace=0)):
            small.double()
            ids, mask = prompts(3, 16), sees(16, 8)
            together = small(ids, mask.expand(3, -1, -1)).logits
            torch.testing.assert_close(together, torch.cat([small(row[None], mask).logits for row in ids]))


def test_against_a_forward_written_out_in_float64() -> None:
    """Also with layers that are called, and so nothing joined."""
    small, x = small_llada2(num_attention_heads=6, num_key_value_heads=3, partial_rotary_factor=0.75), prompts(2, 13)
    wanted = naive_logits(small.double(), x, sees(13, 4).expand(2, -1, -1))
    with torch.no_grad():
        for _ in range(2):
            # Norms and angles are in float32 in one and in float64 in the other.
            logits = small(x, sees(13, 4).expand(2, -1, -1)).logits
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
            small.model.layers[1].attention.query_key_value.register_forward_hook(lambda *of_call: None)


def test_a_block_after_its_prefix() -> None:
    held, x = BlockCache(grid=8, sequences=1, columns=24), arrays()["a_x"].long()
    with torch.no_grad():
        for name, ids, start in (("prefill", x[:, :16], 0), ("block", arrays()["cache_block_x"].long(), 16)):
            logits = model().project(model().model(ids, cache=held, start=start))
            torch.testing.assert_close(logits, arrays()[f"cache_{name}_logits"], rtol=0, atol=ATOL)
    for stored, name in ((held.keys, "k0"), (held.values, "v0")):
        torch.testing.assert_close(stored[0][:, :, :16], arrays()[f"cache_{name}"], rtol=0, atol=ATOL)


# Decodes

IDS, MASKED = left_pad([prompts(1, 7, seed=1)[0], prompts(1, 12, seed=2)[0]])
SIZES: dict[str, Any] = {"max_new_tokens": 14, "stop_at_eos": False}
KINDS: list[dict[str, Any]] = [{"cache": "none"}, {"engine": "static"}, {"drafts": 3}, {"rule": fdpp.Frechet(0.1)}]


def decoded(model: Any, **settings: Any) -> Any:
    return model.generate(IDS, MASKED, **SIZES, **settings)


def test_every_engine_and_draft_decodes_alike() -> None:
    small = small_llada2()
    make_exact(small)
    wanted = decoded(small).sequences
    assert not (wanted == MASK).any()
    for kind in KINDS[:3]:
        assert decoded(small, **kind).sequences.equal(wanted), kind
    alone = [
        small.generate(row[seen.bool()][None], **SIZES).sequences[0, -14:]
        for row, seen in zip(IDS, MASKED, strict=True)
    ]
    assert torch.stack(alone).equal(wanted[:, -14:])


@pytest.mark.parametrize("way", ["grouped", "every"])
def test_captured_steps_run_every_expert_in_shapes_of_their_own(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: all operators of a capture were in its warm-up, whatever the routes."""
    small, calls = small_llada2(), []

    def run(self: MoE, rows: Tensor, index: Tensor) -> Tensor:
        calls.append(len(rows))
        gate_up, down = self.gate_up.stack(), self.down.stack()
        assert gate_up is not None and down is not None
        return getattr(experts, way)(rows, index, gate_up, down)

    wanted = decoded(small)
    monkeypatch.setattr(MoE, "run", run)
    with captured_on_cpu() as captures:
        out = decoded(small, engine="static")
    assert out.sequences.equal(wanted.sequences) and out.nfe.equal(wanted.nfe) and calls
    assert captures.logs
    for step, warm, captured in captures.logs:
        assert step.graph is not None and step.graph.replays
        assert {*captured} <= {*warm}


# Checkpoints


def test_the_names_are_the_published_ones(tmp_path: Path) -> None:
    """And so they are after the weights were joined, in files and out of them."""
    with safe_open(DATA / "model_tiny/model.safetensors", "pt") as published:
        names = {*published.keys()}
        assert {*model().state_dict()} == names
        model().save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as ours:
            assert {*ours.keys()} == names
            assert all(torch.equal(ours.get_tensor(name), published.get_tensor(name)) for name in names)
    again = load(str(tmp_path))
    assert type(again) is LLaDA2ModelLM
    assert again.config.to_diff_dict() == model().config.to_diff_dict()
    with torch.no_grad():
        torch.testing.assert_close(forward("a", again).logits, arrays()["a_logits"], rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["experts.5.up_proj.weight", "gate.expert_bias", "shared_experts.down_proj.weight"])
def test_a_checkpoint_without_a_weight_is_refused_by_name(name: str, tmp_path: Path) -> None:
    weights = load_file(DATA / "model_tiny/model.safetensors")
    del weights[f"model.layers.1.mlp.{name}"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((DATA / "model_tiny/config.json").read_text())
    with pytest.raises(ValueError, match=rf"1 missing keys: model\.layers\.1\.mlp\.{name}"):
        LLaDA2ModelLM.from_pretrained(tmp_path)


def test_a_tied_head(tmp_path: Path) -> None:
    made = small_llada2(tie_word_embeddings=True)
    made.save_pretrained(tmp_path)
    again = LLaDA2ModelLM.from_pretrained(tmp_path)
    assert not any(name.startswith("lm_head") for name in again.state_dict())
    with torch.no_grad():
        assert torch.equal(again(prompts(1, 8)).logits, made(prompts(1, 8)).logits)


def test_biases_of_experts_survive_a_load(tmp_path: Path) -> None:
    """They are a buffer, and a load initialises what it does not find."""
    made = small_llada2()
    made.save_pretrained(tmp_path)
    biases = [moe.gate.expert_bias for moe in (made.model.layers[1].mlp, load(str(tmp_path)).model.layers[1].mlp)]
    assert biases[0].abs().sum() > 0 and torch.equal(*biases)


@pytest.mark.parametrize("name", ["tp_plan", "device_mesh", "distributed_config"])
def test_tensor_parallelism_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"LLaDA2: expected one process, got {name}='auto'"):
        LLaDA2ModelLM.from_pretrained(DATA / "model_tiny", **{name: "auto"})


def test_quantised_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a model without experts, got LLaDA2ModelLM"):
        quantise(small_llada2(), "int8", torch.device("cpu"))


# Configurations


def test_the_defaults_are_those_of_mini() -> None:
    config = LLaDA2Config()
    assert (config.rotary_dim, config.partial_rotary_factor, config.rope_theta) == (64, 0.5, 600000.0)
    assert (config.block_length, config.mask_token_id, config.eos_token_id) == (32, 156895, 156892)
    assert config.base_model_tp_plan == {}


def test_a_published_file_names_no_ids_and_perhaps_no_norms() -> None:
    file = json.loads((DATA / "model_tiny/config.json").read_text())
    del file["use_qk_norm"]
    config = LLaDA2Config.from_dict({**file, "vocab_size": 157184})
    assert (config.mask_token_id, config.eos_token_id, config.pad_token_id) == (156895, 156892, 271)
    outside = LLaDA2Config.from_dict({**file, "pad_token_id": 500})
    assert (outside.mask_token_id, outside.eos_token_id, outside.pad_token_id) == (None, None, None)
    assert LLaDA2Config(vocab_size=64, mask_token_id=MASK).mask_token_id == MASK


@pytest.mark.parametrize(
    ("given", "turned"),
    [
        ({"partial_rotary_factor": 1.0}, 16),
        ({"rotary_dim": 4}, 4),
        ({"partial_rotary_factor": 0.25, "rotary_dim": 4}, 4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75}}, 12),
        ({}, 8),
    ],
    ids=str,
)
def test_channels_that_turn(given: dict[str, Any], turned: int) -> None:
    config = LLaDA2Config(head_dim=16, **given)
    assert (config.rotary_dim, config.partial_rotary_factor) == (turned, turned / 16)
    assert config.rope_theta == (5e4 if "rope_parameters" in given else 6e5)
    again = LLaDA2Config.from_dict(config.to_dict())
    assert (again.rotary_dim, again.rope_theta) == (turned, config.rope_theta)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_qk_norm": False}, "use_qk_norm=False is not implemented, expected True"),
    ({"score_function": "softmax"}, "score_function='softmax' is not implemented, expected 'sigmoid'"),
    ({"use_qkv_bias": True}, "use_qkv_bias=True"),
    ({"router_dtype": "bf16"}, "router_dtype='bf16' is not implemented, expected 'fp32' or 'float32'"),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
    ({"num_experts": 30}, "n_group groups of at least two.*got num_experts=30, n_group=8"),
    ({"num_experts": 8}, "n_group groups of at least two"),
    ({"topk_group": 9}, "got num_experts=256, n_group=8, topk_group=9"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok=129"),
    ({"n_group": 0}, "sizes of at least 1, got .*n_group=0"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"rotary_dim": 32, "partial_rotary_factor": 0.5}, "rotary_dim=32, partial_rotary_factor=0.5, head_dim=128"),
    ({"rotary_dim": 130}, "rotary_dim=130"),
    ({"rotary_dim": 5}, "rotary_dim=5"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[str(given) for given, _ in REFUSED])
def test_what_does_not_fit_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^LLaDA2 config: .*{message}"):
        LLaDA2Config(**given)


# The published class


class LLaDA2MoeGate(nn.Module):
    """As the published router has its weights; it returns what ours does not."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> Any:
        raise AssertionError("called")


class LLaDA2MoeModelLM(nn.Module):
    """Stands in for a model of the remote code, with layers of its names."""

    def __init__(self, made: LLaDA2ModelLM) -> None:
        super().__init__()
        self.config, self.model, self.lm_head = made.config, made.model, made.lm_head
        for block in made.model.layers:
            if isinstance(block.mlp, MoE):
                gate = LLaDA2MoeGate(made.config)
                gate.load_state_dict(block.mlp.gate.state_dict())
                block.mlp.gate = gate


def test_a_patched_model_of_the_published_class_decodes_as_ours() -> None:
    """From its own modules: no weight moves."""
    ours, theirs = small_llada2(), LLaDA2MoeModelLM(small_llada2())
    before = {name: value.data_ptr() for name, value in theirs.named_parameters()}
    with fdpp.patch(theirs):
        for kind in KINDS:
            out, wanted = decoded(theirs, **kind), decoded(ours, **kind)
            assert out.sequences.equal(wanted.sequences) and out.nfe.equal(wanted.nfe), kind
        assert type(theirs.denoising_step) is fdpp.DenoisingStep
        theirs.model.layers[1].mlp.experts[2].up_proj = nn.Linear(3, 16)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.2\.up_proj"):
            decoded(theirs)
    assert not hasattr(theirs, "generate")
    del before["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert before.items() <= {name: value.data_ptr() for name, value in theirs.named_parameters()}.items()
