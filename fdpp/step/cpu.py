"""`select` on the CPU: vectorised PyTorch over the masked rows alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fdpp.selection import Selection, candidates
from fdpp.step.noise import gumbel
from fdpp.step.terms import Terms

CHUNK = 1 << 19
"""Logits taken at a time, 2 MB in float32: four rows of LLaDA's vocabulary. On two cores 32 rows then take 3.0 ms,
against 4.8 ms one at a time (an operator's overhead is then a third of its time) and 2.7 ms eight at a time."""

UNUSABLE = 1e300
"""Sorts after every usable cost (at most float32's largest) and before absent positions (+inf)."""


LANES = 512
"""Columns per run of the two-stage argmax; PyTorch's one-stage argmax is scalar and takes ten times as long as amax."""


def first_argmax(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value and its lowest index `[n]` of `rows` `[n, V]`: the best run of columns, then the best within it."""
    V = rows.shape[1]
    if V < 4 * LANES:
        return rows.max(1)
    body = V - V % LANES
    run_tops = rows[:, :body].unflatten(1, (-1, LANES)).amax(2)
    if body < V:
        run_tops = torch.cat((run_tops, rows[:, body:].amax(1, keepdim=True)), dim=1)
    start = (run_tops.argmax(1) * LANES).clamp(max=V - LANES)
    top, offset = rows.gather(1, start[:, None] + torch.arange(LANES, device=rows.device)).max(1)
    return top, start + offset


def propose(rows: Tensor, terms: Terms, b: Tensor, t: Tensor, first_id: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Score and column of every row's proposal, and the mask id's logit, which is then -inf in `rows` `[n, V]` float32.

    The rows are of positions `t` `[n]` in sequences `b` `[n]`; their columns are the vocabulary ids from `first_id` on.
    A score is never NaN.
    """
    n, V = rows.shape
    mask_logit = rows.new_full((n,), -torch.inf)
    if first_id <= terms.mask_id < first_id + V:
        mask_logit = rows[:, terms.mask_id - first_id].clone()
        rows[:, terms.mask_id - first_id] = -torch.inf
    score = rows
    if terms.sampled and terms.seeds is not None:
        score = rows + terms.temperature * gumbel(terms.seeds[b], t, V, first_id=first_id)
    best, column = first_argmax(score)
    if not bool((best.abs() < torch.inf).all()):
        best, column = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).max(1)
    return best, column, mask_logit


def summarize(rows: Tensor, terms: Terms, b: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Proposal, residual and entropy (nats) `[n]` of `rows` `[n, V]` float32, which are overwritten.

    The rows are of positions `t` `[n]` in sequences `b` `[n]`.
    """
    by_entropy = terms.by_entropy
    index = torch.arange(rows.shape[0], device=rows.device)
    _, proposal, mask_logit = propose(rows, terms, b, t)
    logit = rows[index, proposal]
    top = torch.maximum(rows.amax(1), mask_logit) if by_entropy else logit
    distance = rows - top[:, None] if by_entropy else rows
    rows.sub_(logit[:, None]).exp_()
    rows[index, proposal] = 0.0
    residual = rows.sum(1) + (mask_logit - logit).exp()
    residual[(logit.abs() == torch.inf) | ~(mask_logit < torch.inf)] = torch.nan
    if not by_entropy:
        return proposal, residual, residual
    distance = torch.cat((distance, (mask_logit - top)[:, None]), dim=1)
    weight = distance.exp()
    Z = weight.sum(1)
    slope = -(weight * distance.clamp_(min=-1e4)).sum(1)
    log_z = torch.where(logit == top, residual.log1p(), Z.log())
    return proposal, residual, (log_z + slope / Z).clamp_(min=0.0)


def select(logits: Tensor, tokens: Tensor, active: Tensor | None, terms: Terms) -> Selection:
    """See `fdpp.step.operators.select_op`.

    `logits` may also be the rows of the candidates alone, `[m, V]` in their order.
    """
    tokens = tokens.contiguous()
    candidate = candidates(tokens, terms.mask_id, active)
    at_once = max(CHUNK // logits.shape[-1], 1)
    b, t = (where.split(at_once) for where in candidate.nonzero(as_tuple=True))
    # Copies, since they are overwritten: indexing makes one, and so does a cast.
    if logits.dim() == 3:
        rows = (logits[at].float() for at in zip(b, t, strict=True))
    else:
        rows = (part.to(torch.float32, copy=True) for part in logits.split(at_once))
    parts = zip(b, t, rows, strict=True)
    return select_parts(parts, tokens, candidate, terms)


def select_parts(
    parts: Iterable[tuple[Tensor, Tensor, Tensor]], tokens: Tensor, candidate: Tensor, terms: Terms
) -> Selection:
    """`select` from parts: sequences `[n]`, positions `[n]` and logits `[n, V]` float32 of some candidates each.

    The logits are overwritten.
    """
    unknown = torch.full((2, *tokens.shape), torch.inf, dtype=torch.float32, device=tokens.device)
    proposals, residuals, rank_by = tokens.clone(), *unknown
    for b, t, rows in parts:
        summary = summarize(rows, terms, b, t)
        proposals[b, t], residuals[b, t], rank_by[b, t] = summary
    return decide(proposals, residuals, rank_by, tokens, candidate, terms)


def decide(
    proposals: Tensor,
    residuals: Tensor,
    rank_by: Tensor,
    tokens: Tensor,
    candidate: Tensor,
    terms: Terms,
) -> Selection:
    """The outputs of `select`, given what `summarize` says of the candidates; all `[B, T]`, unusable residuals NaN."""
    usable = candidate & ~residuals.isnan()
    committed = commit(rank_by, candidate, usable, terms) if tokens.shape[1] else candidate
    confidence = torch.where(usable, 1.0 / (1.0 + residuals), 0.0)
    remaining = (candidate & ~committed).sum(1, dtype=torch.int32)
    nonfinite = (candidate & ~usable).sum(1, dtype=torch.int32)
    tokens = torch.where(committed, proposals, tokens)
    return Selection(tokens, proposals, confidence, committed, remaining, nonfinite)


def commit(rank_by: Tensor, candidate: Tensor, usable: Tensor, terms: Terms) -> Tensor:
    """The commit mask `[B, T]`: sort the profiles, apply the rule's predicate to all prefixes at once."""
    kind = terms.kind
    key = rank_by.double().clamp(max=torch.finfo(torch.float32).max)
    key = key.masked_fill(~usable, UNUSABLE).masked_fill(~candidate, torch.inf)
    key, order = key.sort(dim=1, stable=True)
    p0, p1, calibration = terms.params.unbind(1)
    last = torch.where(key < UNUSABLE, key, 0.0)
    if not terms.by_entropy:
        last = (last / (1.0 + last) + calibration[:, None]).clamp(max=1.0)
    n = torch.arange(1, key.shape[1] + 1, device=key.device)[None]
    accepts = getattr(kind.predicate, "fn", kind.predicate)
    ok = accepts(n, last, last.cumsum(1), p0[:, None], p1[:, None]) & (key < UNUSABLE)
    longest = (ok * n).amax(1, keepdim=True).clamp(min=1)
    return torch.zeros_like(candidate).scatter(1, order, (n <= longest) & (key < torch.inf))
