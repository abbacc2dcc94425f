"""Recorded selections: the published selectors' inputs and outputs against ours.

`formula` recomputes every decision in float64 from the papers. Ours must agree with it on every row, and so must the
published code except where FORMAT.md says that it breaks its own rule (`deviates_rows`): there the two must differ.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import SelectorCase, selector_case, selector_index
from torch import Tensor

import fdpp
from fdpp.selection import Selection
from fdpp.step import gpu, operators
from fdpp.step.terms import Terms, pack

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = 1e-6
"""Distance to a decision below which float32 may take another of two nearly equal confidences."""
ROUNDING = 1e-15
"""The same for float64: confidences closer to 1 than 1e-16 tie in the formula, but not by their residuals."""

COMPARED = {
    "get_transfer_index",
    "get_transfer_index_dynamic",
    "get_transfer_index_frechet_profile",
    "generate (one inner step)",
}
INDEX = selector_index()
GROUPS = {
    group: [entry["id"] for entry in INDEX if entry["group"] == group] for group in ("std", "edge", "orig", "attn")
}
GROUPS["few"] = ["s010", "s097", "o009", "o015", "e000", "e004", "e007", "e010", "e011", "e014", "e015", "e016"]
"""The cases for the kernel in the interpreter, where it is slow; a GPU runs all."""

CENSUS = {
    "std": {"equal": 4060, "quota of none": 92, "published code breaks its rule": 98},
    "edge": {
        "equal": 597,
        "quota of none": 26,
        "published code breaks its rule": 23,
        "published order of ties": 23,
        "exact tie": 40,
        "mask id is the argmax": 34,
    },
    "orig": {"equal": 106, "exact tie": 8, "published order of ties": 1},
    "attn": {"equal": 453, "published code breaks its rule": 32},
    "few": {
        "equal": 265,
        "quota of none": 10,
        "published code breaks its rule": 13,
        "published order of ties": 2,
        "exact tie": 23,
        "mask id is the argmax": 34,
    },
}
"""Rows compared and how each was decided, so that none is left out unnoticed."""


Select = Callable[[Tensor, Tensor, Tensor, list[fdpp.Rule], int], Selection]


def reference(logits: Tensor, tokens: Tensor, active: Tensor, rules: list[fdpp.Rule], mask_id: int) -> Selection:
    rows = [
        fdpp.step.reference.select(logits[b : b + 1], tokens[b : b + 1], rule, mask_id, active[b : b + 1])
        for b, rule in enumerate(rules)
    ]
    return Selection(*map(torch.cat, zip(*rows, strict=True)))


def cpu(logits: Tensor, tokens: Tensor, active: Tensor, rules: list[fdpp.Rule], mask_id: int) -> Selection:
    if all(rule == rules[0] for rule in rules):
        return fdpp.select(logits, tokens, rule=rules[0], mask_id=mask_id, active=active)
    params = torch.cat([pack(rule) for rule in rules])
    return operators.prefix_step(logits, tokens, active, Terms(params, rules[0].key(), mask_id))


def kernel(logits: Tensor, tokens: Tensor, active: Tensor, rules: list[fdpp.Rule], mask_id: int) -> Selection:
    params = torch.cat([pack(rule, DEVICE) for rule in rules])
    logits, tokens, active = logits.to(DEVICE), tokens.to(DEVICE), active.to(DEVICE)
    outputs = gpu.select(logits, tokens, active, Terms(params, rules[0].key(), mask_id))
    return Selection(*(output.cpu() for output in outputs))


def selectable(case: SelectorCase, run: dict[str, Any]) -> Tensor:
    """Positions `[B, L]` that the call could commit."""
    if run["peer"] != "llada" and not run["params"].get("mask_limited_to_block"):
        return case.mask
    block_end = next(other["params"]["block_end"] for other in case.runs if other["peer"] == "llada")
    return case.mask & (torch.arange(case.mask.shape[1]) < block_end)


def rules_of(run: dict[str, Any], rows: int) -> list[fdpp.Rule]:
    """Our rule for every row of a published call; ours has no quota of 0, so that becomes 1."""
    params = run["params"]
    if params.get("threshold") is not None:
        return [fdpp.Threshold(params["threshold"])] * rows
    if "factor" in params:
        return [fdpp.Factor(params["factor"])] * rows
    if "margin" in params:
        return [fdpp.Frechet(params["margin"])] * rows
    return [fdpp.Quota(max(k, 1)) for k in params["num_transfer_tokens"]]


def proposal_and_confidence(case: SelectorCase) -> tuple[Tensor, Tensor]:
    """Argmax `[B, L]` with the mask id left out, and its float64 softmax with the mask id in the normaliser."""
    logits = case.logits.double()
    proposal = logits.clone().index_fill_(2, torch.tensor([case.mask_id]), -torch.inf).argmax(-1)
    return proposal, logits.softmax(-1).gather(-1, proposal[..., None])[..., 0]


def formula(rule: fdpp.Rule, confidence: Tensor, mask: Tensor) -> tuple[Tensor, float]:
    """Commit mask `[L]` of one row, and the distance of its closest decision to going the other way."""
    positions = mask.nonzero().flatten().tolist()
    positions.sort(key=lambda i: (-float(confidence[i]), i))
    c = [float(confidence[i]) for i in positions]
    prefixes = range(1, len(c) + 1)
    match rule:
        case fdpp.Quota(k):
            margins = [float("inf") if n <= k else -float("inf") for n in prefixes]
            allowed = [n <= k for n in prefixes]
        case fdpp.Threshold(tau):
            margins = [c[n - 1] - tau for n in prefixes]
            allowed = [m >= 0 for m in margins]
        case fdpp.Factor(f):
            margins = [f - (n + 1) * (1 - c[n - 1]) for n in prefixes]
            allowed = [m > 0 for m in margins]
        case fdpp.Frechet(margin):
            margins = [sum(c[:n]) - (n - 1) - (1 - c[n - 1]) - margin for n in prefixes]
            allowed = [m > 0 for m in margins]
        case _:
            raise AssertionError(rule)
    count = max([1, *(n for n in prefixes if allowed[n - 1])]) if c else 0
    slack = min((abs(m) for m in margins[1:]), default=float("inf"))
    if 0 < count < len(c):
        slack = min(slack, c[count - 1] - c[count])
    committed = torch.zeros_like(mask)
    committed[positions[:count]] = True
    return committed, slack


def check_row(
    select: Select,
    case: SelectorCase,
    index: int,
    row: int,
    rule: fdpp.Rule,
    out: Selection,
    own: tuple[Tensor, Tensor],
) -> str:
    """Compare one row of one published call; returns how it was decided, for the census."""
    run, theirs = case.runs[index], case.transfer_index[index, row]
    tokens, mask = case.x[row], selectable(case, run)[row]
    proposal, confidence, ours = own[0][row], own[1][row], out.committed[row]
    assert not (ours & ~mask).any()
    assert out.proposal[row].equal(torch.where(mask, proposal, tokens))
    torch.testing.assert_close(out.confidence[row].double(), torch.where(mask, confidence, 0.0), rtol=2e-6, atol=1e-12)
    assert out.tokens[row].equal(torch.where(ours, proposal, tokens))
    assert int(out.remaining[row]) == int((mask & ~ours).sum())
    assert int(out.nonfinite[row]) == 0

    expected, slack = formula(rule, confidence, mask)
    if slack > (ROUNDING if select is reference else CLOSE):
        assert ours.equal(expected)
    else:
        assert_same_confidences(confidence, ours, expected)

    if run["params"].get("num_transfer_tokens", [1] * (row + 1))[row] == 0:
        assert not theirs.any()
        return "quota of none"
    if (mask & (case.argmax[row] == case.mask_id)).any():
        return "mask id is the argmax"
    if row in run["deviates_rows"]:
        assert slack <= CLOSE or not ours.equal(theirs)
        return "published order of ties" if theirs.sum() == ours.sum() else "published code breaks its rule"
    assert torch.where(theirs, case.x0[index, row], tokens).equal(torch.where(theirs, proposal, tokens))
    if run["slack"] == 0 or slack == 0:
        assert_same_confidences(confidence, ours, theirs)
        return "exact tie"
    assert ours.equal(theirs)
    if case.x_after is not None and run["peer"] == "llada":
        assert out.tokens[row].equal(case.x_after[row])
    return "equal"


def assert_same_confidences(confidence: Tensor, ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(confidence[ours].sort()[0], confidence[theirs].sort()[0], rtol=0, atol=CLOSE)


def check_cases(select: Select, case_ids: list[str]) -> Counter[str]:
    census: Counter[str] = Counter()
    for case_id in case_ids:
        case = selector_case(case_id)
        own = proposal_and_confidence(case)
        usual = case.argmax != case.mask_id
        assert own[0][usual].equal(case.argmax[usual])
        torch.testing.assert_close(own[1][usual], case.conf64[usual], rtol=1e-12, atol=0)
        assert case.x[case.mask].eq(case.mask_id).all()
        for index, run in enumerate(case.runs):
            if run["func"] not in COMPARED:
                continue
            rules = rules_of(run, len(case.x))
            out = select(case.logits, case.x, selectable(case, run), rules, case.mask_id)
            for row, rule in enumerate(rules):
                try:
                    census[check_row(select, case, index, row, rule, out, own)] += 1
                except AssertionError as error:
                    raise AssertionError(
                        f"case {case_id}, run {index} {run['func']} {run['params']}, row {row}"
                    ) from error
    return census


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("select", [reference, cpu])
def test_selects_as_published(select: Select, group: str) -> None:
    assert check_cases(select, GROUPS[group]) == CENSUS[group]


@pytest.mark.no_cover
@pytest.mark.parametrize("group", ["few"] if INTERPRETED else GROUPS)
def test_kernel_selects_as_published(group: str) -> None:
    assert check_cases(kernel, GROUPS[group]) == CENSUS[group]
