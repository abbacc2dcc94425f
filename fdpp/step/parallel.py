"""A denoising step over a vocabulary that is sharded over processes.

Under tensor parallelism every process holds the logits of its own slice of the vocabulary. Gathering them would move
V numbers per masked row and step. A row's summary is three numbers: the slice's largest logit, its id, and the
logarithm of the sum of exp(l) over the rest of the slice. One all-gather exchanges them, and every process decides
alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from fdpp.rules import Rule
from fdpp.selection import Selection, candidates, check
from fdpp.step import cpu
from fdpp.step.operators import check_seeds, decided
from fdpp.step.terms import Terms, terms_of


def exchange(mine: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """All-gather: every rank's value, in rank order; all of one shape and dtype."""
    everyones = [
        torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))
    ]
    dist.all_gather(everyones, mine.contiguous(), group=group)
    return everyones


@dataclass(frozen=True)
class VocabularySlice:
    """This process's part of a vocabulary: `width` ids for each rank of `group`, fewer or none for the last ranks.

    Attributes:
        size: ids in the whole vocabulary.
    """

    size: int
    width: int
    group: dist.ProcessGroup

    @property
    def first(self) -> int:
        """The slice's first id."""
        return min(self.group.rank() * self.width, self.size)

    @property
    def held(self) -> int:
        """How many ids the slice has."""
        return min(self.width, self.size - self.first)

    def agreed(self, number: Tensor) -> Tensor:
        """The first process's `number`, of one shape and dtype in all."""
        return exchange(number, self.group)[0]

    def gather(self, logits: Tensor) -> Tensor:
        """The whole logits `[..., size]` from every process's `[..., held]`."""
        parts = exchange(F.pad(logits, (0, self.width - self.held)), self.group)
        return torch.cat(parts, dim=-1)[..., : self.size]


def slice_of(weight: Tensor, size: int) -> VocabularySlice | None:
    """The slice that a head's `weight` gives logits of, None if its rows are not sharded.

    `weight` `[rows, d]` has a row per id of the vocabulary and perhaps padding after the first `size`.

    Raises:
        ValueError: a sharding other than tensor parallelism's, which is of the rows over a mesh of one dimension.
    """
    if not isinstance(weight, DTensor) or all(placement.is_replicate() for placement in weight.placements):
        return None
    mesh = weight.device_mesh
    # Under FSDP every process has other rows of a batch, and their hidden states.
    if mesh.mesh_dim_names not in (None, ("tp",)) or not (mesh.ndim == 1 and weight.placements[0].is_shard(0)):
        raise ValueError(f"head: expected rows sharded over a mesh ('tp',), got {weight.placements} over {mesh}")
    group = mesh.get_group()
    return VocabularySlice(size, -(-weight.shape[0] // group.size()), group)


def local(weight: Tensor) -> Tensor:
    """This process's shard of `weight`."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def select(
    logits: Tensor,
    tokens: Tensor,
    *,
    rule: Rule,
    mask_id: int,
    first_id: int,
    group: dist.ProcessGroup | None = None,
    active: Tensor | None = None,
    temperature: float = 0.0,
    seed: int | Tensor | None = None,
) -> Selection:
    """`fdpp.select` on logits whose vocabulary is sharded over the processes of `group`.

    Every process calls it with its own `logits` and otherwise equal arguments, and gets the result of `fdpp.select` on
    all of them, up to the rounding of a residual in float32. One collective moves 24 bytes per masked row and process,
    8 more with a temperature, 24 more with a rule that orders by entropy, and 16 more with one that orders by margin.

    Args:
        logits: `[B, T, v]`, of the vocabulary ids `first_id, ..., first_id + v - 1`. Over the group the slices cover
            every id once; their sizes may differ, and v may be 0.
        first_id: the slice's first id.
        group: the processes; None: all of them.
        tokens, rule, mask_id, active, temperature, seed: as for `fdpp.select`; ids are those of the whole vocabulary.

    Raises:
        ValueError: as `fdpp.select` does, before anything is exchanged.
    """
    terms = terms_of(rule, mask_id, temperature, seed, logits)
    step = prefix_step(logits, tokens, active, terms, first_id=first_id, group=group)
    return decided(step, tokens, active, rule, mask_id)


def prefix_step(
    logits: Tensor,
    tokens: Tensor,
    active: Tensor | None,
    terms: Terms,
    *,
    first_id: int,
    group: dist.ProcessGroup | None = None,
) -> Selection:
    """`fdpp.step.operators.prefix_step` on a slice of the logits; arguments as those of `select`."""
    logits = logits.detach()
    if logits.shape[-1] == 0:
        logits = F.pad(logits, (0, 1), value=-torch.inf)
    check(logits, tokens, active, terms.seeds)
    check_seeds(terms)
    candidate = candidates(tokens, terms.mask_id, active)
    where_b, where_t = candidate.nonzero(as_tuple=True)
    rows_at_once = max(cpu.CHUNK // logits.shape[2], 1)
    chunks = [
        summarize(cpu.rows_of(logits, b, t).float(), terms, b, t, first_id)
        for b, t in zip(where_b.split(rows_at_once), where_t.split(rows_at_once), strict=True)
    ]
    unknown = torch.full((2, *tokens.shape), torch.inf, dtype=torch.float32, device=tokens.device)
    proposals, residuals, rank_by = tokens.clone(), *unknown
    if where_b.numel():
        summaries = torch.stack(exchange(torch.cat(chunks, dim=1), group))
        merged = merge(summaries, terms.sampled, terms.order)
        proposals[where_b, where_t], residuals[where_b, where_t], rank_by[where_b, where_t] = merged
    return cpu.decide(proposals, residuals, rank_by, tokens, candidate, terms)


def summarize(rows: Tensor, terms: Terms, b: Tensor, t: Tensor, first_id: int) -> Tensor:
    """What the processes exchange about `rows` `[n, v]` float32, which are overwritten: float64 `[k, n]`.

    The rows are of positions `t` `[n]` in sequences `b` `[n]`.

    - the id of the slice's proposal and its score, which is its logit unless there is noise;
    - the logarithm of the sum of exp(l) over the rest of the slice, the mask id included; NaN if the row is unusable;
    - with a temperature, the proposal's logit;
    - by margin: the slice's largest logit and its second largest; the rest is then what the largest leaves;
    - by entropy: the slice's largest logit p, the sum of exp(l - p) and that of exp(l - p)(p - l).
    """
    index = torch.arange(rows.shape[0], device=rows.device)
    score, column, mask_logit = cpu.propose(rows, terms, b, t, first_id)
    logit = rows[index, column]
    top = rows.amax(1) if terms.sampled else score
    left_out = column
    if terms.order == "margin":
        top, left_out = cpu.first_argmax(rows) if terms.sampled else (score, column)
        second = rows.scatter(1, left_out[:, None], -torch.inf).amax(1)
    # A slice may hold nothing but -inf; its row is usable all the same if another slice's is.
    shift = torch.where(top > -torch.inf, top, 0.0)
    rows.sub_(shift[:, None])
    weights = cpu.exp_(rows.clone() if terms.order == "entropy" else rows)
    weights[index, left_out] = 0.0
    rest = weights.sum(1).double()
    top, logit, mask_logit = top.double(), logit.double(), mask_logit.double()
    log_rest = torch.logaddexp(shift + rest.log(), mask_logit)
    log_rest[~(logit < torch.inf) | ~(mask_logit < torch.inf)] = torch.nan
    summary = [first_id + column.double(), score.double(), log_rest]
    if terms.sampled:
        summary.append(logit)
    if terms.order == "margin":
        summary += [top, second.double()]
    if terms.order == "entropy":
        slope = -(weights * rows.clamp_(min=-1e4)).sum(1).double()
        one, zero = torch.ones_like(rest), torch.zeros_like(rest)
        peak = torch.maximum(top, mask_logit)
        parts = ((top, rest, slope), (logit, one, zero), (mask_logit, one, zero))
        masses, slopes = zip(*(seen_from(peak, *part) for part in parts), strict=True)
        summary += [peak, sum(masses), sum(slopes)]
    return torch.stack(summary)


def seen_from(peak: Tensor, top: Tensor, mass: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The sums `mass` of exp(l - top) and `slope` of exp(l - top)(top - l), rebased from `top` to `peak`."""
    exists = top > -torch.inf
    scale = torch.where(exists, (top - peak).exp(), 0.0)
    return scale * mass, scale * (slope + torch.where(exists, peak - top, 0.0) * mass)


def merge(parts: Tensor, sampled: bool, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Proposal, residual and what the rule ranks by `[n]` (see `cpu.summarize`), from summaries `[processes, k, n]`."""
    token, score, log_rest = parts[:, :3].unbind(1)
    logit = parts[:, 3] if sampled else score
    best = score == score.amax(0)
    proposal = torch.where(best, token, torch.inf).amin(0)
    chosen = best & (token == proposal)
    top = torch.where(chosen, logit, -torch.inf).amax(0)
    if order == "margin":
        residual, rank = by_margin(log_rest, top, *parts[:, -2:].unbind(1))
        return proposal.long(), residual, rank
    others = torch.where(chosen, -torch.inf, logit)
    residual = (torch.cat((log_rest, others)).logsumexp(0) - top).exp()
    residual[~(top.abs() < torch.inf)] = torch.nan
    if order == "confidence":
        return proposal.long(), residual.float(), residual.float()
    peak, mass, slope = parts[:, -3:].unbind(1)
    highest = peak.amax(0)
    mass, slope = (part.sum(0) for part in seen_from(highest, peak, mass, slope))
    log_mass = torch.where(top == highest, residual.log1p(), mass.log())
    return proposal.long(), residual.float(), (log_mass + slope / mass).clamp(min=0.0).float()


def by_margin(log_rest: Tensor, logit: Tensor, tops: Tensor, seconds: Tensor) -> tuple[Tensor, Tensor]:
    """Residual and odds against the margin `[n]`, float32, from the slices' `[processes, n]` and the proposal's `logit`
    `[n]`."""
    # Of slices that tie the first; a slice without a logit has nothing to leave out.
    ranked = torch.cat((tops, seconds)).topk(2, dim=0).values
    top, second = ranked
    behind = tops.clone().scatter_(0, tops.argmax(0, keepdim=True), -torch.inf)
    others = (torch.cat((log_rest, behind)).logsumexp(0) - top).exp()
    residual = cpu.proposals_residual(others, top, logit)
    residual[~(logit.abs() < torch.inf)] = torch.nan
    return residual.float(), cpu.odds(others, second - top).float()
