"""The specification: one denoising step in plain float64 PyTorch, as short as the formulas."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdpp import rules
from fdpp.noise import gumbel


class Selection(NamedTuple):
    """What a step decides for `[B, T]` positions.

    Attributes:
        tokens: `[B, T]` int64, a new tensor: the tokens with the committed proposals written in.
        proposal: `[B, T]` int64, the proposed token at active masked positions, the token itself elsewhere.
        confidence: `[B, T]` float32, softmax(logits) at the proposal at active masked positions, 0 elsewhere.
        committed: `[B, T]` bool.
        remaining: `[B]` int32, active positions still masked after this step.
        nonfinite: `[B]` int32, active masked positions whose logits held NaN or +inf, or nothing but -inf.
    """

    tokens: Tensor
    proposal: Tensor
    confidence: Tensor
    committed: Tensor
    remaining: Tensor
    nonfinite: Tensor


def residual(logits: Tensor, proposal: int) -> float:
    """r = sum over v != proposal of exp(l_v - l_proposal), so that c = 1 / (1 + r) and 1 - c = r / (1 + r)."""
    weights = (logits.double() - logits[proposal].double()).exp()
    weights[proposal] = 0.0
    return float(weights.sum())


def entropy(logits: Tensor) -> float:
    """H = -sum_v p_v log p_v in nats."""
    log_p = logits.double().log_softmax(-1)
    return float(-(log_p.exp() * log_p).nan_to_num(nan=0.0).sum())


def accepted(rule: rules.Rule, residuals: list[float], entropies: list[float]) -> int:
    """The largest n whose prefix `rule` accepts, 0 if none, of a profile that is already sorted."""
    longest = 0
    confidences = [1.0 / (1.0 + r) for r in residuals]
    missing = [r / (1.0 + r) if r < float("inf") else 1.0 for r in residuals]
    for n in range(1, len(residuals) + 1):
        match rule:
            case rules.Quota():
                ok = n <= rule.params()[0]
            case rules.Threshold(tau) | rules.LocalLeap(tau):
                ok = confidences[n - 1] >= tau
            case rules.Factor(f):
                ok = (n + 1) * missing[n - 1] < f
            case rules.Frechet(margin, eta):
                lowered = [min(1.0, d + eta) for d in missing[:n]]
                ok = 1.0 - sum(lowered) - lowered[-1] > margin
            case rules.EntropyBound(gamma):
                ok = sum(entropies[: n - 1]) <= gamma
            case _:
                costs = entropies if rule.order == "entropy" else [min(1.0, d + rule.calibration) for d in missing]
                accepts = getattr(type(rule).predicate, "fn", type(rule).predicate)
                ok = bool(accepts(n, costs[n - 1], sum(costs[:n]), *rule.params()))
        if ok:
            longest = n
    return longest


def select(
    logits: Tensor,
    tokens: Tensor,
    rule: rules.Rule,
    mask_id: int,
    active: Tensor | None = None,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
) -> Selection:
    """One denoising step, position by position; arguments and result as `fdpp.select`, the confidence in float64.

    1. A masked position's proposal is its largest logit, the mask id left out (the lowest id of equals); with a
       temperature, the largest of logit + temperature * Gumbel noise.
    2. The profile is sorted by confidence (or entropy), the lower position first among equals, unusable rows last.
    3. The longest accepted prefix of the usable part is committed, and at least one position.
    """
    B, T, V = logits.shape
    candidate = tokens == mask_id if active is None else (tokens == mask_id) & active
    proposal, committed = tokens.clone(), torch.zeros_like(candidate)
    confidence = torch.zeros(B, T, dtype=torch.float64, device=logits.device)
    unusable = torch.zeros(B, dtype=torch.int32, device=logits.device)
    for b in range(B):
        profile = []
        for t in candidate[b].nonzero().flatten().tolist():
            row = logits[b, t].double()
            score = row.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
            if temperature > 0.0:
                assert seeds is not None
                position = torch.tensor([t], device=row.device)
                score = score + temperature * gumbel(seeds[b : b + 1], position, V, torch.float64)[0]
            if 0 <= mask_id < V:
                score[mask_id] = -torch.inf
            choice = int(score.argmax())
            proposal[b, t] = choice
            if row.isnan().any() or (row == torch.inf).any() or score[choice] == -torch.inf:
                unusable[b] += 1
                profile.append((True, 0.0, t, torch.inf, torch.inf))
                continue
            r, h = residual(row, choice), entropy(row) if rule.order == "entropy" else 0.0
            confidence[b, t] = 1.0 / (1.0 + r)
            profile.append((False, h if rule.order == "entropy" else r, t, r, h))
        profile.sort()
        usable = [entry for entry in profile if not entry[0]]
        n = accepted(rule, [entry[3] for entry in usable], [entry[4] for entry in usable])
        for entry in profile[: max(n, 1)]:
            committed[b, entry[2]] = True
        if isinstance(rule, rules.LocalLeap):
            anchors = [t for _, _, t, _, _ in usable if confidence[b, t] >= rule.threshold]
            for _, _, t, _, _ in usable:
                near = any(abs(t - anchor) <= rule.radius for anchor in anchors)
                committed[b, t] |= near and bool(confidence[b, t] >= rule.relaxed)
    remaining = (candidate & ~committed).sum(1).int()
    return Selection(torch.where(committed, proposal, tokens), proposal, confidence, committed, remaining, unusable)
