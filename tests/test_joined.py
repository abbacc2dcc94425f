"""Joined weights: one matrix product for layers with the same input, and nothing else changes."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_of_others import FAMILIES
from small import layer_of, prompts, put
from torch import nn

from fdpp.models import block as module
from fdpp.models import layers
from fdpp.models.joined import Joined
from fdpp.models.language_model import DiffusionLM
from fdpp.models.linear import linear


def is_joined(model: DiffusionLM) -> bool:
    """Whether every block's layers are the rows of one matrix that its forward uses."""
    with torch.no_grad():
        return all(
            joined.matrix() is not None
            and getattr(joined.layers()[-1], joined.what).untyped_storage().data_ptr()
            == joined.weight.untyped_storage().data_ptr()
            for block in model.model.blocks
            for joined in block.joins()
        )


def separately(model: DiffusionLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits by the layers one by one: recording gradients keeps them apart."""
    with torch.enable_grad():
        return model(ids).logits.detach()


def joined(model: DiffusionLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def made(family: str, seed: int = 0) -> DiffusionLM:
    """With as many key heads as divide the heads."""
    return FAMILIES[family](seed, num_key_value_heads=2)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(family: str) -> DiffusionLM:
    return made(family)


IDS = prompts(2, 9)


def test_same_logits(model: DiffusionLM) -> None:
    expected = separately(model, IDS)
    torch.testing.assert_close(joined(model, IDS), expected)
    assert is_joined(model)


def test_names_and_values_stay(model: DiffusionLM) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    joined(model, IDS)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_a_checkpoint_after_joining(model: DiffusionLM, tmp_path: Path) -> None:
    expected = joined(model, IDS)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(joint.weight is not None for joint in again.model.blocks[0].joins())
    assert torch.equal(joined(again, IDS), expected)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 1.1 * sum(parameter.numel() for parameter in model.parameters()) * 4 + 10_000


@pytest.mark.parametrize("assign", [False, True])
def test_loading_other_weights(model: DiffusionLM, family: str, assign: bool) -> None:
    joined(model, IDS)
    other = made(family, seed=1)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(joined(model, IDS), joined(other, IDS))


def test_moving_to_another_dtype(model: DiffusionLM) -> None:
    joined(model, IDS)
    model.double()
    assert joined(model, IDS).dtype == torch.float64
    torch.testing.assert_close(joined(model, IDS), separately(model, IDS))
    assert is_joined(model)


def test_a_copy_has_weights_of_its_own(model: DiffusionLM) -> None:
    expected = joined(model, IDS)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(joined(other, IDS), expected)


def test_an_optimizer_step_reaches_the_matrix(model: DiffusionLM) -> None:
    before = joined(model, IDS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS).logits.square().mean().backward()
    optimizer.step()
    after = joined(model, IDS)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, separately(model, IDS))
    assert is_joined(model)


def test_a_replaced_layer_is_called(model: DiffusionLM) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    before, block = joined(model, IDS), model.model.blocks[0]
    for role in ("v", "up"):
        layer = layer_of(model, role)
        put(block, role, Doubled(layer))
        changed = joined(model, IDS)
        assert not torch.allclose(changed, before)
        torch.testing.assert_close(changed, separately(model, IDS))
        put(block, role, layer)
        assert torch.equal(joined(model, IDS), before)


def test_hooks_are_called(model: DiffusionLM) -> None:
    joined(model, IDS)
    calls: list[str] = []
    layer_of(model, "q", 1).register_forward_hook(lambda *_: calls.append("q"))
    layer_of(model, "up", 1).register_forward_pre_hook(lambda *_: calls.append("up"))
    joined(model, IDS)
    assert calls == ["q", "up"]


@pytest.mark.parametrize("role", ["norm", "ff_norm", "q", "up", "out", "down"])
def test_a_forward_of_its_own_is_called(model: DiffusionLM, role: str) -> None:
    """Adapters and offloading put a forward on the instance."""
    layer = layer_of(model, role)
    layer.forward = functools.partial(lambda forward, x: 2.0 * forward(x), layer.forward)
    torch.testing.assert_close(joined(model, IDS), separately(model, IDS))


@pytest.mark.parametrize("role", ["norm", "ff_norm"])
def test_hooks_of_norms_are_called(model: DiffusionLM, role: str) -> None:
    plain, calls = joined(model, IDS), []
    layer_of(model, role, 1).register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(joined(model, IDS), plain)
    assert calls == [1]


@pytest.mark.parametrize("family", ["LLaDA", "Dream"], indirect=True)
def test_hooks_of_the_head_are_called(model: DiffusionLM) -> None:
    plain = joined(model, IDS)
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: -logits)
    torch.testing.assert_close(joined(model, IDS), -plain)
    prompt = IDS[:, :4]
    with torch.no_grad():
        hooked = model.generate(prompt, max_new_tokens=8, block_length=8, stop_at_eos=False).sequences
        model.get_output_embeddings()._forward_hooks.clear()
        with_hook_gone = model.generate(prompt, max_new_tokens=8, block_length=8, stop_at_eos=False).sequences
    assert not hooked.equal(with_hook_gone)


def test_compiled_layers_give_the_same_tokens(model: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """As functions of tensors, without a graph break; PyTorch's own code generator is left out to save its time."""
    calls: list[str] = []

    def compiled(function: Any) -> Any:
        calls.append(function.__name__)
        return torch.compile(function, fullgraph=True, backend="eager")

    settings: dict[str, Any] = {"max_new_tokens": 16, "block_length": 8}
    expected = model.generate(IDS, **settings).sequences
    assert calls == []
    monkeypatch.setattr(module, "compiled", functools.cache(compiled))
    model.compile_layers()
    assert torch.equal(model.generate(IDS, **settings).sequences, expected)
    assert sorted(calls) == ["attention_inputs", "block_output"]
    model.compile_layers(False)
    assert torch.equal(model.generate(IDS, **settings).sequences, expected)


@pytest.mark.parametrize("family", ["LLaDA"], indirect=True)
def test_more_shapes_than_may_be_compiled_run_as_they_are(model: DiffusionLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(module, "compiled", functools.cache(layers.compiled.__wrapped__))
    torch._dynamo.reset()
    settings = {"max_new_tokens": 16, "block_length": 8}
    expected = model.generate(IDS, **settings).sequences
    model.compile_layers()
    with torch._dynamo.config.patch(recompile_limit=1):
        assert torch.equal(model.generate(IDS, **settings).sequences, expected)


def test_a_layer_that_was_wrapped_for_a_while_moves_no_weight(model: DiffusionLM) -> None:
    """Its matrix is let go of, and found again where it lay: captured steps know its address."""
    joined(model, IDS)
    block = model.model.blocks[0]
    before = [parameter.data_ptr() for parameter in model.parameters()]
    handle = layer_of(model, "k").register_forward_hook(lambda *_: None)
    expected = joined(model, IDS)
    assert block.qkv.weight is None and (block.qkv_bias is None or block.qkv_bias.weight is None)
    handle.remove()
    torch.testing.assert_close(joined(model, IDS), expected)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before and is_joined(model)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1)], ids=str)
def test_weights_of_one_memory_in_another_order_are_joined_anew(model: DiffusionLM, order: tuple[int, ...]) -> None:
    weights, biases = torch.randn(3 * 32, 32), torch.randn(3 * 32)
    for role, at in zip("qkv", order, strict=True):
        layer = layer_of(model, role)
        rows = slice(at * 32, at * 32 + layer.weight.shape[0])
        layer.weight.data = weights[rows]
        if layer.bias is not None:
            layer.bias.data = biases[rows]
    torch.testing.assert_close(joined(model, IDS), separately(model, IDS))
    assert is_joined(model)


# Biases


def test_a_moved_model_lets_go_of_its_matrices(model: DiffusionLM) -> None:
    joined(model, IDS)
    held = [joint for block in model.model.blocks for joint in block.joins()]
    assert all(joint.weight is not None for joint in held)
    model.to(torch.bfloat16)
    assert all(joint.weight is None for joint in held)
    model.to(torch.float32)
    torch.testing.assert_close(joined(model, IDS), separately(model, IDS))
    assert is_joined(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_joined_layers_with_biases_are_the_layers_bit_for_bit(dtype: torch.dtype) -> None:
    """Small whole numbers, of which every sum is exact."""

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape).to(dtype)

    linears = {name: nn.Linear(16, rows, dtype=dtype) for name, rows in (("q", 16), ("k", 8), ("v", 8))}
    x = whole(2, 5, 16)
    with torch.no_grad():
        for each in linears.values():
            each.weight.copy_(whole(*each.weight.shape))
            each.bias.copy_(whole(*each.bias.shape))
        expected = torch.cat([F.linear(x, each.weight, each.bias) for each in linears.values()], dim=-1)
        weight = Joined(linears, *linears, biased=True).matrix()  # type: ignore[arg-type]
        bias = Joined(linears, *linears, biased=True, what="bias").matrix()  # type: ignore[arg-type]
        assert weight is not None and bias is not None and bias.shape == (32,)
        assert linear(x, weight, bias).equal(expected) and not linear(x, weight).equal(expected)
        assert Joined(linears, *linears).matrix() is None  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["gone", "replaced", "a subclass", "zero"])
def test_biases_that_change_are_noticed(change: str) -> None:
    class Marked(nn.Parameter):
        pass

    model = made("Dream")
    before, block, layer = joined(model, IDS), model.model.blocks[0], layer_of(model, "k")
    if change == "gone":
        layer.bias = None
    elif change == "replaced":
        layer.bias = nn.Parameter(torch.ones(16))
    elif change == "a subclass":
        layer.bias = Marked(torch.ones(16))
    else:
        layer.bias.data.zero_()
    after = joined(model, IDS)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, separately(model, IDS))
    assert is_joined(model) == (change in ("replaced", "zero"))
    assert (block.qkv_bias.weight is None) == (change in ("gone", "a subclass"))
