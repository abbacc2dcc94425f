"""The matrix product of the models: `F.linear`'s result, by whichever library."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small import prompts, small_model

from fdpp.models import linear as module
from fdpp.models.linear import Linear, linear


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
    layer, x = Linear(7, 11), torch.randn(5, 7)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(11, 7))


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
