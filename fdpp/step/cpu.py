"""`select` on the CPU: vectorised PyTorch over the masked rows alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fdpp.selection import Selection, candidates
from fdpp.step.draw import draw
from fdpp.step.terms import Terms

CHUNK = 1 << 19
"""Logits taken at a time, 2 MB in float32: four rows of LLaDA's vocabulary. One row at a time takes 1.5 times as long,
for an operator's overhead is then a third of its time; eight at a time take 0.97 times as long."""

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


def propose(rows: Tensor, terms: Terms, b: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Score and id of every row's proposal, and the mask id's logit, which is then -inf in `rows` `[n, V]` float32.

    The rows are of positions `t` `[n]` in sequences `b` `[n]`. A score is never NaN.
    """
    mask_logit = take_mask(rows, terms.mask_id)
    if terms.sampled and terms.seeds is not None:
        return *draw(rows, terms.seeds[b], t, terms.drawn_at), mask_logit
    return *largest(rows), mask_logit


def take_mask(rows: Tensor, column: int) -> Tensor:
    """The logits `[n]` of the mask id's `column`, which are then -inf in `rows` `[n, V]`; -inf if V has none such."""
    if not 0 <= column < rows.shape[1]:
        return rows.new_full(rows.shape[:1], -torch.inf)
    mask_column = rows[:, column]
    mask_logit = mask_column.clone()
    mask_column.fill_(-torch.inf)
    return mask_logit


def largest(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit and its lowest column `[n]` of `rows` `[n, V]`, where a NaN counts as -inf."""
    best, column = first_argmax(rows)
    if not math.isfinite(best.sum()):
        best, column = rows.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).max(1)
    return best, column


def exp_(x: Tensor) -> Tensor:
    """The exponential of `x` float32, in place, with a relative error of at most 1e-7 (1 + |x|).

    On an AMD EPYC torch 2.13 takes three times as long for `exp_`, whose relative error is 1e-7.
    """
    return x.mul_(math.log2(math.e)).exp2_()


def summarize(rows: Tensor, terms: Terms, b: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Proposal, residual and what the rule ranks by `[n]` of `rows` `[n, V]` float32, which are overwritten.

    Ranked are residuals, entropies in nats, or the odds against margins (`reference.odds`).

    The rows are of positions `t` `[n]` in sequences `b` `[n]`.
    """
    if terms.tempered:
        rows /= terms.temperature
    logit, proposal, mask_logit = propose(rows, terms, b, t)
    column = proposal[:, None]
    if terms.sampled:
        logit = rows.gather(1, column)[:, 0]
    if terms.order == "margin":
        return by_margin(rows, logit, proposal, mask_logit, terms.sampled)
    if terms.order == "entropy":
        top = torch.maximum(rows.amax(1), mask_logit)
        distance = torch.cat((rows - top[:, None], (mask_logit - top)[:, None]), dim=1)
    residual = exp_(rows.sub_(logit[:, None])).scatter_(1, column, 0.0).sum(1).add_(exp_(mask_logit - logit))
    mark_unusable(residual, logit, mask_logit)
    if terms.order == "confidence":
        return proposal, residual, residual
    weight = exp_(distance.clone())
    Z = weight.sum(1)
    slope = -(weight * distance.clamp_(min=-1e4)).sum(1)
    log_z = torch.where(logit == top, residual.log1p(), Z.log())
    return proposal, residual, (log_z + slope / Z).clamp_(min=0.0)


def mark_unusable(residual: Tensor, logit: Tensor, mask_logit: Tensor) -> None:
    """Put NaN in the place of the `residual` `[n]` of unusable rows with these logits of the proposal and the mask."""
    # Finite only if all factors are: then every row is usable, which is the rule, and costs one operator to know.
    if not math.isfinite(residual.dot(logit)):
        usable = (logit.abs() < torch.inf) & (mask_logit < torch.inf)
        residual.masked_fill_(~usable, torch.nan)


def by_margin(
    rows: Tensor, logit: Tensor, proposal: Tensor, mask_logit: Tensor, sampled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`summarize` by margin, given what `propose` left in `rows` and the proposal's `logit` `[n]`."""
    top, best = first_argmax(rows) if sampled else (logit, proposal)
    second = rows.scatter_(1, best[:, None], -torch.inf).amax(1)
    others = exp_(rows.sub_(top[:, None])).sum(1).add_(exp_(mask_logit - top))
    residual = proposals_residual(others, top, logit) if sampled else others.clone()
    mark_unusable(residual, logit, mask_logit)
    return proposal, residual, odds(others, second - top)


def proposals_residual(others: Tensor, top: Tensor, logit: Tensor) -> Tensor:
    """The residual of a proposal with this `logit`, given that of the largest logit `top`.

    The proposal is one of the others unless it is the largest: 1 + (others - exp(logit - top)) loses no precision.
    """
    return torch.where(logit == top, others, (1.0 + (others - (logit - top).exp())) * (top - logit).exp())


def odds(others: Tensor, gap: Tensor) -> Tensor:
    """(1 - m) / m of the margin m, given the residual of the largest logit and `gap`, from it to the second."""
    # Not by the sign: of a tie it would make -inf.
    return (others + gap.exp()) / gap.expm1().abs()


def rows_of(logits: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """`logits[b, t]` `[n, V]` of `logits` `[B, T, V]`, by a selection of rows: indexing takes three times as long."""
    (B, T, V), (per_b, per_t, per_v) = logits.shape, logits.stride()
    if not len(b):
        return logits.new_empty(0, V)
    # All rows lie a multiple of this apart, whatever the strides; those between them are never read.
    apart = math.gcd(per_b, per_t) or 1
    per_b, per_t = per_b // apart, per_t // apart
    rows = logits.as_strided(((B - 1) * per_b + (T - 1) * per_t + 1, V), (apart, per_v))
    return rows.index_select(0, b * per_b + t * per_t)


def in_parts(rows: Tensor, at_once: int) -> Sequence[Tensor]:
    """`rows` `[n, ...]` in parts of `at_once`, at least one."""
    return (rows,) if rows.shape[0] <= at_once else rows.split(at_once)


def select(logits: Tensor, tokens: Tensor, active: Tensor | None, terms: Terms) -> Selection:
    """See `fdpp.step.operators.select_op`.

    `logits` may also be the rows of the candidates alone, `[m, V]` in their order.
    """
    tokens = tokens.contiguous()
    candidate = candidates(tokens, terms.mask_id, active)
    at_once = max(CHUNK // logits.shape[-1], 1)
    b, t = (in_parts(where, at_once) for where in candidate.nonzero().unbind(1))
    # Copies, since they are overwritten: selecting makes one, and so does a cast.
    if logits.dim() == 3:
        rows = (rows_of(logits, *at).float() for at in zip(b, t, strict=True))
    else:
        rows = (part.to(torch.float32, copy=True) for part in in_parts(logits, at_once))
    parts = zip(b, t, rows, strict=True)
    return select_parts(parts, tokens, candidate, terms)


def select_parts(
    parts: Iterable[tuple[Tensor, Tensor, Tensor]], tokens: Tensor, candidate: Tensor, terms: Terms
) -> Selection:
    """`select` from parts: sequences `[n]`, positions `[n]` and logits `[n, V]` float32 of all candidates, in order.

    The logits are overwritten.
    """
    summaries = [summarize(rows, terms, b, t) for b, t, rows in parts]
    proposal, residual, rank = (
        torch.cat(values) if len(values) > 1 else values[0] for values in zip(*summaries, strict=True)
    )
    unknown = torch.full(tokens.shape, torch.inf, dtype=torch.float32, device=tokens.device)
    proposals = tokens.masked_scatter(candidate, proposal)
    residuals = unknown.masked_scatter(candidate, residual)
    rank_by = residuals if terms.order == "confidence" else unknown.masked_scatter(candidate, rank)
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
    unusable = residuals.isnan()
    committed = commit(rank_by, candidate, unusable, terms) if tokens.shape[1] else candidate
    # 0 at positions that are no candidates: their residual is infinite.
    confidence = (residuals + 1.0).reciprocal_().nan_to_num_(nan=0.0)
    remaining = (candidate ^ committed).sum(1, dtype=torch.int32)
    nonfinite = unusable.sum(1, dtype=torch.int32)
    tokens = torch.where(committed, proposals, tokens)
    return Selection(tokens, proposals, confidence, committed, remaining, nonfinite)


def commit(rank_by: Tensor, candidate: Tensor, unusable: Tensor, terms: Terms) -> Tensor:
    """The commit mask `[B, T]`: sort the profiles, apply the rule's predicate to all prefixes at once."""
    kind = terms.kind
    key = rank_by.double().clamp_(max=torch.finfo(torch.float32).max)
    key = key.masked_fill_(unusable, UNUSABLE).masked_fill_(~candidate, torch.inf)
    key, order = key.sort(dim=1, stable=True)
    p0, p1, calibration = terms.params[:, :, None].unbind(1)
    # What is unusable or absent comes last, where it changes no other position's sum.
    last = key if terms.order == "entropy" else (key / (key + 1.0)).add_(calibration).clamp_(max=1.0)
    n = torch.arange(1, key.shape[1] + 1, device=key.device)
    accepts = getattr(kind.predicate, "fn", kind.predicate)
    ok = accepts(n, last, last.cumsum(1), p0, p1) & (key < UNUSABLE)
    longest = (ok * n).amax(1, keepdim=True).clamp_(min=1)
    return torch.empty_like(candidate).scatter_(1, order, n <= longest).logical_and_(candidate)
