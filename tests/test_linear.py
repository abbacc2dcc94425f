"""The matrix product of the models: `F.linear`'s result, by whichever library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from small import prompts, small_model
from torch import nn

from fdpp.models import linear as module
from fdpp.models.linear import apply, is_plain, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 7), (0, 7), (2, 0, 7)], ids=str)
def test_same_as_f_linear(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(11, 7, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
        torch.testing.assert_close(linear(x, weight[3:8]), F.linear(x, weight[3:8]))
        torch.testing.assert_close(linear(x.mT.contiguous().mT, weight), F.linear(x, weight))


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(5, 7), torch.randn(11, 7)
    with torch.no_grad():
        expected = linear(x, weight)
        monkeypatch.setattr(module, "ONEDNN", None)
        torch.testing.assert_close(linear(x, weight), expected)


def test_gradients_flow() -> None:
    layer, x = nn.Linear(7, 11, bias=False), torch.randn(5, 7)
    apply(layer, x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(11, 7))


def test_what_is_more_than_a_weight_is_called() -> None:
    """By whatever means: each of these changes what a call gives, or what it does beside it."""
    x = torch.randn(5, 7)
    ways: list[Callable[[nn.Linear], Any]] = [
        lambda layer: setattr(layer, "bias", nn.Parameter(torch.ones(11))),
        lambda layer: setattr(layer, "forward", lambda x: 2 * F.linear(x, layer.weight)),
        lambda layer: layer.register_forward_hook(lambda *_: torch.zeros(5, 11)),
        lambda layer: layer.register_forward_pre_hook(lambda _, inputs: inputs[0] + 1),
        lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
    ]
    for change in ways:
        layer = nn.Linear(7, 11, bias=False)
        assert is_plain(layer)
        change(layer)
        with torch.no_grad():
            assert not is_plain(layer) and torch.equal(apply(layer, x), layer(x))


def test_a_row_does_not_depend_on_its_company() -> None:
    """What drafts and batches rest on."""
    x, weight = torch.randn(96, 128), torch.randn(384, 128)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight)[32:64], linear(x[32:64], weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wanted", [slice(3, 8), torch.tensor([0, 4, 8]), slice(0, 9)], ids=str)
def test_wanted_positions_are_those_of_all(wanted: slice | torch.Tensor) -> None:
    llada, ids = small_model(), prompts(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(llada.model(ids, wanted=wanted), llada.model(ids)[:, wanted])
