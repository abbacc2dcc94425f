"""Products with weights of one byte: against float64, however they are cut, and in forwards of quantised models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import INTERPRETED, generator, on_gpu
from layer_twins import TWINS
from small import prompts, small_model
from torch import Tensor

from fdpp.kernels import launch
from fdpp.kernels.launch import PRODUCT_DEPTH, PRODUCT_PROGRAMS, PRODUCT_ROWS, PRODUCT_SPLITS, product_launch
from fdpp.models import block, launches, layers, weights
from fdpp.models.launches import byte_product_gpu
from fdpp.models.quantised import quantise

DEVICES = [
    pytest.param("cpu", id="interpreter", marks=pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
on_each_device = pytest.mark.parametrize("device", DEVICES)


def random(M: int, N: int, K: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    g = generator(M + N + K)
    x = torch.randn(1, M, K, generator=g).to(dtype)
    weight = torch.randint(-128, 128, (N, K), dtype=torch.int8, generator=g)
    return x, weight, torch.rand(N, 1, generator=g) / 100 + 1e-3


def exact(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.double() @ weight.double().T * scale.double().T


def assert_as_good(out: Tensor, truth: Tensor, theirs: Tensor) -> None:
    """At most as far from float64 as a library's product of widened weights, which rounds before it scales."""
    assert (out.cpu() - truth).abs().amax() <= (theirs - truth).abs().amax() + 1e-6 * truth.abs().amax()


def library(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (x @ weight.to(x.dtype).T) * scale.to(x.dtype).T


SIZES = [(1, 1, 16), (3, 40, 100), (17, 129, 256), (32, 130, 300), (70, 64, 129)]


@on_each_device
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
@pytest.mark.parametrize("splits", [1, 2, 8])
@on_gpu(lambda M, splits: (M, splits) in ((32, 1), (32, 8)))
def test_against_float64(device: str, M: int, N: int, K: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and added to; the last splits may have no depth left."""
    monkeypatch.setattr(launch, "PRODUCT_DEPTH", max(K // splits, 1))
    assert product_launch(M, N, K).splits == splits or splits > K
    x, weight, scale = random(M, N, K)
    given = [tensor.to(device) for tensor in (x, weight, scale)]
    truth, theirs = exact(x, weight, scale), library(x, weight, scale)
    out = byte_product_gpu(*given)
    assert out.dtype == x.dtype
    assert_as_good(out, truth, theirs)
    added = torch.randn(1, M, N, generator=generator(1)).half()
    held = added.clone().to(device)
    assert byte_product_gpu(*given, held) is held
    assert_as_good(held, truth + added.double(), theirs + added)


@on_each_device
def test_tickets_are_zero_again(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PRODUCT_DEPTH", 64)
    tickets = torch.zeros(8, dtype=torch.int32, device=device)
    monkeypatch.setattr(launches, "ticket_for", lambda device, n: tickets)
    x, weight, scale = (tensor.to(device) for tensor in random(20, 200, 256))
    first = byte_product_gpu(x, weight, scale)
    assert not tickets.any() and byte_product_gpu(x, weight, scale).equal(first)


@on_each_device
def test_rows_apart_and_no_rows(device: str) -> None:
    x, weight, scale = (tensor.to(device) for tensor in random(6, 40, 64))
    wide = torch.full((1, 6, 200), float("nan"), dtype=x.dtype, device=device)
    wide[..., 100:164] = x
    assert byte_product_gpu(wide[..., 100:164], weight, scale).equal(byte_product_gpu(x, weight, scale))
    assert byte_product_gpu(x[:, :0], weight, scale).shape == (1, 0, 40)


@on_each_device
def test_what_is_not_finite_stays_in_its_row(device: str) -> None:
    x, weight, scale = random(4, 20, 64)
    x[0, 1, 5] = float("nan")
    out = byte_product_gpu(*(tensor.to(device) for tensor in (x, weight, scale))).cpu()
    assert out[0, 1].isnan().all() and out[0, [0, 2, 3]].isfinite().all()


OLD = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)


@pytest.mark.gpu
@pytest.mark.skipif(OLD, reason="needs compute capability 8.9")
def test_float8() -> None:
    x, weight, scale = random(32, 256, 2048, torch.bfloat16)
    narrow = (weight.float() / 16).to(torch.float8_e4m3fn)
    out = byte_product_gpu(x.cuda(), narrow.cuda(), scale.cuda())
    assert_as_good(out, exact(x, narrow.float(), scale), library(x, narrow, scale))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.integers(1, 128), st.integers(1, 200_000), st.integers(1, 50_000))
def test_launch_configurations_cover_the_product(M: int, N: int, K: int) -> None:
    config = product_launch(M, N, K)
    assert config.splits.bit_count() == config.block_m.bit_count() == 1
    assert config.splits * config.split_len >= K and config.split_len % config.block_k == 0
    assert config.splits == 1 or config.splits <= min(K // PRODUCT_DEPTH, PRODUCT_SPLITS)
    assert config.tiles * config.block_m * config.block_n >= M * N
    assert config.splits == 1 or config.tiles < PRODUCT_PROGRAMS, "tickets are few"


def test_launch_configurations_fill_the_device() -> None:
    """The four products of LLaDA's layers, at 32 positions."""
    found = [product_launch(32, N, K) for N, K in ((12288, 4096), (4096, 4096), (24576, 4096), (4096, 12288))]
    assert [config.tiles * config.splits for config in found] == [192, 128, 384, 256]


def weight_like(**held: Any) -> Any:
    """Looks as torchao's weight-only int8 does."""
    found: Any = type("Int8Tensor", (SimpleNamespace,), {"__module__": "torchao.quantization"})()
    parts = {"qdata": torch.zeros(8, 16, dtype=torch.int8), "scale": torch.ones(8, 1)}
    vars(found).update({**parts, "act_quant_kwargs": None, **held})
    return found


def test_what_the_kernel_takes() -> None:
    x = torch.zeros(1, 32, 16, dtype=torch.bfloat16)
    assert weights.takes_bytes(x, weight_like())
    assert weights.takes_bytes(x.half(), weight_like())
    assert weights.few(torch.zeros(2, PRODUCT_ROWS // 2, 16)) and not weights.few(torch.zeros(1, PRODUCT_ROWS + 1, 16))
    assert not weights.takes_bytes(x.float(), weight_like())
    assert not weights.takes_bytes(x, torch.zeros(8, 16, dtype=torch.int8))
    for held in (
        {"act_quant_kwargs": object()},
        {"act_pre_scale": torch.ones(16)},
        {"scale": torch.ones(1, 1)},
        {"scale": torch.ones(8, 2)},
        {"qdata": torch.zeros(16, 8, dtype=torch.int8).T},
        {"qdata": torch.zeros(8, 16, dtype=torch.uint8)},
    ):
        assert not weights.takes_bytes(x, weight_like(**held)), held


@torch.no_grad()
@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
def test_a_forward_of_a_quantised_model(many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every product of a layer is one launch of the kernel, and two of them add the residual.

    With more rows weights are widened before a library's product.
    """
    pytest.importorskip("torchao")
    model = quantise(small_model(n_kv_heads=2).half(), "int8", torch.device("cpu"))
    ids = prompts(2, 5)
    want = model.model(ids)
    launched: list[bool] = []

    def product(x: Tensor, weight: Tensor, scale: Tensor, added: Tensor | None = None) -> Tensor:
        launched.append(added is not None)
        out = exact(x, weight, scale).to(x.dtype)
        return out if added is None else added.add_(out)

    for module in (layers, block, weights):
        monkeypatch.setattr(module, "on_kernels", lambda x: True)
    monkeypatch.setattr(weights, "byte_product_gpu", product)
    if many:
        monkeypatch.setattr(weights, "PRODUCT_ROWS", 9)
    for name, twin in TWINS.items():
        monkeypatch.setattr(layers, name, twin)
    out = model.model(ids)
    assert launched == ([] if many else [False, True, False, True] * model.config.n_layers)
    torch.testing.assert_close(out, want, rtol=0.03, atol=0.03)
