"""The specification: one denoising step in plain float64 PyTorch, as short as the formulas."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fdpp.rules import Proposed, Rule
from fdpp.rules.rule import TEMPERED
from fdpp.selection import Selection
from fdpp.step.draw import draw


def residual(logits: Tensor, proposal: int) -> float:
    """r = sum over v != proposal of exp(l_v - l_proposal), so that c = 1 / (1 + r) and 1 - c = r / (1 + r)."""
    weights = (logits.double() - logits[proposal].double()).exp()
    weights[proposal] = 0.0
    return float(weights.sum())


def entropy(logits: Tensor) -> float:
    """H = -sum_v p_v log p_v in nats."""
    log_p = logits.double().log_softmax(-1)
    return float(-(log_p.exp() * log_p).nan_to_num(nan=0.0).sum())


def odds(logits: Tensor, mask_id: int) -> float:
    """R = (1 - m) / m = (r + e) / (1 - e) of the margin m = p1 - p2 between the two largest logits but the mask's.

    r is the residual of the largest and e = exp(l2 - l1), 0 where there is one token alone.
    """
    rivals = logits.double().clone()
    if 0 <= mask_id < len(rivals):
        rivals[mask_id] = -torch.inf
    (first, *second), (token, *_) = (part.tolist() for part in rivals.topk(min(2, len(rivals))))
    gap = second[0] - first if second else -math.inf
    missing = -math.expm1(gap)
    return (residual(logits, token) + math.exp(gap)) / missing if missing else math.inf


def costs(logits: Tensor, proposal: int, mask_id: int, order: str, t: int) -> tuple[float, int, float, float]:
    """What position `t` is sorted by, `t`, and its `residuals` and `entropies` for `Rule.accepts`."""
    if order == "entropy":
        h = entropy(logits)
        return h, t, residual(logits, proposal), h
    r = odds(logits, mask_id) if order == "margin" else residual(logits, proposal)
    return r, t, r, 0.0


def accepted(rule: Rule, residuals: list[float], entropies: list[float]) -> int:
    """The largest n whose prefix `rule` accepts, 0 if none, of a profile that is already sorted."""
    prefixes = range(1, len(residuals) + 1)
    return max((n for n in prefixes if rule.accepts(residuals[:n], entropies[:n])), default=0)


def select(
    logits: Tensor,
    tokens: Tensor,
    rule: Rule,
    mask_id: int,
    active: Tensor | None = None,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
) -> Selection:
    """One denoising step; arguments and result as `fdpp.select`, the confidence in float64.

    `prefix_step`, then the rule's `reference`.
    """
    candidate = tokens == mask_id if active is None else (tokens == mask_id) & active
    step = prefix_step(logits, tokens, rule, mask_id, active, temperature, seeds)
    return rule.reference(Proposed(step, tokens, candidate, mask_id))


def prefix_step(
    logits: Tensor,
    tokens: Tensor,
    rule: Rule,
    mask_id: int,
    active: Tensor | None = None,
    temperature: float = 0.0,
    seeds: Tensor | None = None,
) -> Selection:
    """The step that the rule's prefix test decides, position by position; arguments as those of `select`.

    1. A masked position's proposal is its largest logit, the mask id left out (the lowest id of equals); with a
       temperature, one drawn from softmax(l / temperature) (`fdpp.step.draw`). If the rule is tempered, l / temperature
       stands for l in all that follows, too.
    2. The profile is sorted by confidence (or margin or entropy), the lower position first among equals, unusable rows
       last.
    3. The longest accepted prefix of the usable part is committed, and at least one position.
    """
    if temperature > 0.0 and rule.tested().endswith(TEMPERED):
        logits, temperature = logits.double() / temperature, 1.0
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
            if 0 <= mask_id < V:
                score[mask_id] = -torch.inf
            choice = int(score.argmax())
            if temperature > 0.0:
                assert seeds is not None
                position = torch.tensor([t], dtype=torch.int64, device=row.device)
                choice = int(draw(score[None], seeds[b : b + 1], position, temperature)[1])
            proposal[b, t] = choice
            if row.isnan().any() or (row == torch.inf).any() or score[choice] == -torch.inf:
                unusable[b] += 1
                profile.append((True, 0.0, t, torch.inf, torch.inf))
                continue
            confidence[b, t] = 1.0 / (1.0 + residual(row, choice))
            profile.append((False, *costs(row, choice, mask_id, rule.order, t)))
        profile.sort()
        usable = [entry for entry in profile if not entry[0]]
        n = accepted(rule, [entry[3] for entry in usable], [entry[4] for entry in usable])
        for entry in profile[: max(n, 1)]:
            committed[b, entry[2]] = True
    remaining = (candidate & ~committed).sum(1).int()
    tokens_after = torch.where(committed, proposal, tokens)
    return Selection(tokens_after, proposal, confidence, committed, remaining, unusable)
