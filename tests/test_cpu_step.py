"""The arithmetic of the step on a CPU: how exact its exponentials and residuals are, and which rows it copies."""

from __future__ import annotations

import pytest
import torch
from inputs import generator

from fdpp import Threshold
from fdpp.step import cpu, reference
from fdpp.step.terms import Terms, pack

V, MASK = 126464, 126336


def test_an_exponential_is_exact_to_its_argument() -> None:
    x = torch.cat((-torch.rand(10_000, generator=generator(0)) * 85.0, torch.tensor([0.0, 1.0, 80.0, -torch.inf])))
    exact = x.double().exp()
    error = (cpu.exp_(x.clone()).double() - exact).abs()
    assert (error <= 1e-7 * (1.0 + x.abs().nan_to_num(posinf=0.0)) * exact).all()
    nan, *others = cpu.exp_(torch.tensor([torch.nan, torch.inf, -200.0])).tolist()
    assert nan != nan and others == [torch.inf, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_residuals_keep_six_digits_down_to_1e_minus_14(dtype: torch.dtype) -> None:
    """The proposal 12, 20, 30 and 44 above the others: 1 - c from a float32 c would have no digit left."""
    peaks = torch.tensor([12.0, 20.0, 30.0, 44.0])
    rows = torch.randn(4, V, generator=generator(1))
    rows[torch.arange(4), torch.tensor([5, 70_000, 126_463, 0])] = peaks
    rows = rows.to(dtype)
    exact = torch.tensor([reference.residual(row, int(row.argmax())) for row in rows], dtype=torch.float64)
    terms = Terms(pack(Threshold(0.9)), Threshold.key(), MASK)
    proposal, residual, _ = cpu.summarize(rows.float(), terms, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    assert proposal.tolist() == [5, 70_000, 126_463, 0]
    assert exact[0] > 0.1 and exact[3] < 2e-14
    torch.testing.assert_close(residual.double(), exact, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("stride", [(35, 7, 1), (7, 28, 1), (1, 4, 20), (0, 0, 1), (0, 9, 2), (12, 18, 1)], ids=str)
def test_selected_rows_are_the_indexed_ones(stride: tuple[int, int, int]) -> None:
    logits = torch.arange(300.0).as_strided((4, 5, 6), stride, 3)
    b, t = torch.tensor([[0, 0], [3, 1], [2, 4], [3, 4], [3, 4]]).unbind(1)
    assert cpu.rows_of(logits, b, t).equal(logits[b, t])
    assert cpu.rows_of(logits[:0], b[:0], t[:0]).shape == (0, 6)
