"""What a kernel fails to write shows, in every test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import unwritten
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def copy_all_but_the_last(source, target, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target + i, tl.load(source + i), mask=i < N - 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda like, dtype: torch.empty(4, 3, dtype=dtype),
        lambda like, dtype: torch.empty(size=(4, 3), dtype=dtype, device=DEVICE),
        lambda like, dtype: torch.empty_like(like, dtype=dtype),
        lambda like, dtype: torch.empty_strided((4, 3), (1, 4), dtype=dtype),
        lambda like, dtype: like.new_empty((4, 3), dtype=dtype),
        lambda like, dtype: like.new_empty(4, 3, dtype=dtype),
    ],
    ids=["empty", "empty, size by name", "empty_like", "empty_strided", "new_empty", "new_empty, sizes apart"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool], ids=str)
def test_what_is_allocated_here_is_filled(make: Any, dtype: torch.dtype) -> None:
    tensor = make(torch.zeros(4, 3), dtype)
    assert tensor.shape == (4, 3) and tensor.dtype is dtype
    if dtype.is_floating_point:
        assert bool(tensor.isnan().all())
    else:
        assert bool((tensor == (1 if dtype is torch.bool else torch.iinfo(dtype).max)).all())


def test_an_output_that_a_kernel_leaves_out_shows() -> None:
    source = torch.arange(8.0, device=DEVICE)
    target = torch.empty_like(source)
    copy_all_but_the_last[(1,)](source, target, 8)
    assert target[:7].equal(source[:7]) and bool(target[7].isnan())


@pytest.mark.parametrize("file, filled", [("fdpp/some.py", True), ("tests/some.py", True), ("else/some.py", False)])
def test_it_is_for_callers_in_this_project(file: str, filled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(unwritten, "fill", calls.append)
    exec(compile("torch.empty(2)", str(Path(__file__).parents[1] / file), "exec"), {"torch": torch})
    assert len(calls) == filled


def test_it_can_be_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unwritten, "fill", pytest.fail)
    with unwritten.left_alone():
        torch.empty(2)


def test_a_device_context_still_reaches_it() -> None:
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.empty_strided((2,), (1,)).is_meta


def test_it_compiles() -> None:
    """Also for lengths that the compiler leaves open: to read them would tie it to one."""

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def doubled(x: Tensor) -> Tensor:
        return torch.empty_like(x).copy_(x) * 2 + x.new_empty(x.shape).copy_(x) + torch.empty(x.shape).copy_(x)

    assert [doubled(torch.ones(n)).tolist() for n in (3, 5)] == [[4.0] * 3, [4.0] * 5]


def test_gradients_and_inference_mode() -> None:
    assert torch.empty(2, requires_grad=True).requires_grad
    with torch.inference_mode():
        assert torch.empty(2).is_inference()
