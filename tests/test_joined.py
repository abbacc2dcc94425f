"""Joined weights: one matrix product for layers with the same input, and nothing else changes."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from small import prompts, small_model
from torch import nn

from fdpp import LLaDAModelLM
from fdpp.models import block as module
from fdpp.models import layers

SIZES = {"n_kv_heads": 2}


def is_joined(model: LLaDAModelLM) -> bool:
    """Whether every block's layers are the rows of one matrix that its forward uses."""
    with torch.no_grad():
        return all(
            joined.matrix() is not None
            and joined.modules[joined.names[-1]].weight.untyped_storage().data_ptr()
            == joined.weight.untyped_storage().data_ptr()
            for block in model.model.transformer["blocks"]
            for joined in (block.qkv, block.gate_up)
        )


def separately(model: LLaDAModelLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits by the layers one by one: recording gradients keeps them apart."""
    with torch.enable_grad():
        return model(ids).logits.detach()


def joined(model: LLaDAModelLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture
def llada() -> LLaDAModelLM:
    return small_model(**SIZES)


IDS = prompts(2, 9)


def test_same_logits(llada: LLaDAModelLM) -> None:
    expected = separately(llada, IDS)
    torch.testing.assert_close(joined(llada, IDS), expected)
    assert is_joined(llada)


def test_names_and_values_stay(llada: LLaDAModelLM) -> None:
    before = {name: value.clone() for name, value in llada.state_dict().items()}
    parameters = dict(llada.named_parameters())
    joined(llada, IDS)
    after = llada.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter is parameters[name] for name, parameter in llada.named_parameters())


def test_a_checkpoint_after_joining(llada: LLaDAModelLM, tmp_path: Path) -> None:
    expected = joined(llada, IDS)
    llada.save_pretrained(tmp_path)
    again = LLaDAModelLM.from_pretrained(tmp_path)
    assert again.model.transformer["blocks"][0].qkv.weight is not None
    assert torch.equal(joined(again, IDS), expected)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 1.1 * sum(parameter.numel() for parameter in llada.parameters()) * 4 + 10_000


@pytest.mark.parametrize("assign", [False, True])
def test_loading_other_weights(llada: LLaDAModelLM, assign: bool) -> None:
    joined(llada, IDS)
    other = small_model(seed=1, **SIZES)
    llada.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(joined(llada, IDS), joined(other, IDS))


def test_moving_to_another_dtype(llada: LLaDAModelLM) -> None:
    joined(llada, IDS)
    llada.double()
    assert joined(llada, IDS).dtype == torch.float64
    torch.testing.assert_close(joined(llada, IDS), separately(llada, IDS))
    assert is_joined(llada)


def test_a_copy_has_weights_of_its_own(llada: LLaDAModelLM) -> None:
    expected = joined(llada, IDS)
    other = copy.deepcopy(llada)
    with torch.no_grad():
        for parameter in llada.parameters():
            parameter.zero_()
    assert torch.equal(joined(other, IDS), expected)


def test_an_optimizer_step_reaches_the_matrix(llada: LLaDAModelLM) -> None:
    before = joined(llada, IDS)
    optimizer = torch.optim.SGD(llada.parameters(), lr=0.1)
    llada(IDS).logits.square().mean().backward()
    optimizer.step()
    after = joined(llada, IDS)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, separately(llada, IDS))
    assert is_joined(llada)


def test_a_replaced_layer_is_called() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    llada = small_model(**SIZES)
    before = joined(llada, IDS)
    block = llada.model.transformer["blocks"][0]
    for name in ("v_proj", "up_proj"):
        layer = getattr(block, name)
        setattr(block, name, Doubled(layer))
        changed = joined(llada, IDS)
        assert not torch.allclose(changed, before)
        torch.testing.assert_close(changed, separately(llada, IDS))
        setattr(block, name, layer)
        assert torch.equal(joined(llada, IDS), before)


def test_hooks_are_called(llada: LLaDAModelLM) -> None:
    joined(llada, IDS)
    calls: list[str] = []
    block = llada.model.transformer["blocks"][1]
    block.q_proj.register_forward_hook(lambda *_: calls.append("q"))
    block.up_proj.register_forward_pre_hook(lambda *_: calls.append("up"))
    joined(llada, IDS)
    assert calls == ["q", "up"]


@pytest.mark.parametrize("name", ["attn_norm", "ff_norm", "q_proj", "up_proj", "attn_out", "ff_out"])
def test_a_forward_of_its_own_is_called(llada: LLaDAModelLM, name: str) -> None:
    """Adapters and offloading put a forward on the instance."""
    layer = getattr(llada.model.transformer["blocks"][0], name)
    layer.forward = functools.partial(lambda forward, x: 2.0 * forward(x), layer.forward)
    torch.testing.assert_close(joined(llada, IDS), separately(llada, IDS))


@pytest.mark.parametrize("name", ["attn_norm", "ff_norm"])
def test_hooks_of_norms_are_called(llada: LLaDAModelLM, name: str) -> None:
    plain, calls = joined(llada, IDS), []
    getattr(llada.model.transformer["blocks"][1], name).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(joined(llada, IDS), plain)
    assert calls == [1]


def test_hooks_of_the_head_are_called(llada: LLaDAModelLM) -> None:
    plain = joined(llada, IDS)
    llada.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: -logits)
    torch.testing.assert_close(joined(llada, IDS), -plain)
    prompt = IDS[:, :4]
    with torch.no_grad():
        hooked = llada.generate(prompt, max_new_tokens=8, block_length=8, stop_at_eos=False).sequences
        llada.get_output_embeddings()._forward_hooks.clear()
        with_hook_gone = llada.generate(prompt, max_new_tokens=8, block_length=8, stop_at_eos=False).sequences
    assert not hooked.equal(with_hook_gone)


def test_compiled_layers_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """As functions of tensors, without a graph break; PyTorch's own code generator is left out to save its time."""
    calls: list[str] = []

    def compiled(function: Any) -> Any:
        calls.append(function.__name__)
        return torch.compile(function, fullgraph=True, backend="eager")

    llada = small_model(**SIZES)
    settings: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8}
    expected = llada.generate(IDS, **settings).sequences
    assert calls == []
    monkeypatch.setattr(module, "compiled", functools.cache(compiled))
    llada.compile_layers()
    assert torch.equal(llada.generate(IDS, **settings).sequences, expected)
    assert sorted(calls) == ["attention_inputs", "block_output"]
    llada.compile_layers(False)
    assert torch.equal(llada.generate(IDS, **settings).sequences, expected)


def test_more_shapes_than_may_be_compiled_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(module, "compiled", functools.cache(layers.compiled.__wrapped__))
    torch._dynamo.reset()
    llada, settings = small_model(**SIZES), {"max_new_tokens": 16, "block_length": 8}
    expected = llada.generate(IDS, **settings).sequences
    llada.compile_layers()
    with torch._dynamo.config.patch(recompile_limit=1):
        assert torch.equal(llada.generate(IDS, **settings).sequences, expected)


def test_a_layer_that_was_wrapped_for_a_while_moves_no_weight(llada: LLaDAModelLM) -> None:
    """Its matrix is let go of, and found again where it lay: captured steps know its address."""
    joined(llada, IDS)
    block = llada.model.transformer["blocks"][0]
    before = [parameter.data_ptr() for parameter in llada.parameters()]
    handle = block.k_proj.register_forward_hook(lambda *_: None)
    expected = joined(llada, IDS)
    assert block.qkv.weight is None
    handle.remove()
    torch.testing.assert_close(joined(llada, IDS), expected)
    assert [parameter.data_ptr() for parameter in llada.parameters()] == before and is_joined(llada)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)], ids=str)
def test_weights_of_one_memory_in_another_order_are_joined_anew(llada: LLaDAModelLM, order: tuple[int, ...]) -> None:
    block, memory = llada.model.transformer["blocks"][0], torch.randn(3 * 32, 32)
    layers = (block.q_proj, block.k_proj, block.v_proj)
    for layer, at in zip(layers, order, strict=True):
        layer.weight.data = memory[at * 32 : at * 32 + layer.weight.shape[0]]
    torch.testing.assert_close(joined(llada, IDS), separately(llada, IDS))
    assert is_joined(llada)
