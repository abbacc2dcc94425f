"""A denoising step over a vocabulary that is sharded over processes.

Under tensor parallelism every process holds the logits of its own slice of the vocabulary. Gathering them would move
V numbers per masked row and step. A row's summary is three numbers: the slice's largest logit, its id, and the
logarithm of the sum of exp(l) over the rest of the slice. One all-gather exchanges them, and every process decides
alike. When sampling, a group of ids is drawn whole (`fdpp.step.draw`) by the process that holds its first id: another
all-gather hands it the others.
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
from fdpp.step.draw import draw
from fdpp.step.noise import GROUP
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
    16 more with a temperature, 24 more with a rule that orders by entropy, and 8 more with one that orders by margin.
    With a temperature, another one moves 260.

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
        # Any id that is not the first of its group, which this slice would draw.
        logits, first_id = F.pad(logits, (0, 1), value=-torch.inf), 1
    check(logits, tokens, active, terms.seeds)
    check_seeds(terms)
    candidate = candidates(tokens, terms.mask_id, active)
    b, t = candidate.nonzero(as_tuple=True)
    proposals, (residuals, rank_by) = (
        tokens.clone(),
        torch.full((2, *tokens.shape), torch.inf, dtype=torch.float32, device=tokens.device),
    )
    if b.numel():
        rest_of_group = logits.new_empty((b.numel(), 0))
        if terms.sampled:
            lent = exchange(lend(logits, terms, b, t, first_id), group)
            rest_of_group = borrowed(torch.stack(lent), first_id + logits.shape[2])
        at_once = max(cpu.CHUNK // logits.shape[2], 1)
        chunks = [
            summarize(cpu.rows_of(logits, i_b, i_t).float(), terms, i_b, i_t, first_id, others)
            for i_b, i_t, others in zip(*(x.split(at_once) for x in (b, t, rest_of_group)), strict=True)
        ]
        summaries = torch.stack(exchange(torch.cat(chunks, dim=1), group))
        proposals[b, t], residuals[b, t], rank_by[b, t] = merge(summaries, terms.sampled, terms.order)
    return cpu.decide(proposals, residuals, rank_by, tokens, candidate, terms)


def lend(logits: Tensor, terms: Terms, b: Tensor, t: Tensor, first_id: int) -> Tensor:
    """What the slice `logits` `[B, T, v]` holds of a group that starts in another one: float32 `[n, 65]`.

    The logits by id % 64, -inf at the mask id and where it holds none; and the number of the group.
    """
    at, count = first_id % GROUP, min(-first_id % GROUP, logits.shape[2])
    lent = logits.new_full((b.numel(), GROUP + 1), -torch.inf, dtype=torch.float32)
    lent[:, at : at + count] = cpu.rows_of(logits[..., :count], b, t)
    if terms.tempered:
        lent /= terms.temperature
    cpu.take_mask(lent[:, :GROUP], terms.mask_id - (first_id - at))
    lent[:, GROUP] = first_id // GROUP
    return lent


def borrowed(lent: Tensor, stop: int) -> Tensor:
    """The logits `[n, 64]`, by id % 64, that others have `lent` `[processes, n, 65]` of the group of id `stop` - 1."""
    logits, number = lent.split((GROUP, 1), dim=2)
    return torch.where(number == (stop - 1) // GROUP, logits, -torch.inf).amax(0)


def drawn(
    rows: Tensor, terms: Terms, b: Tensor, t: Tensor, first_id: int, rest_of_group: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Token, score and logit `[n]` of what is drawn from the groups that start in the slice `rows` `[n, v]`; a score
    of -inf where none does.

    `rest_of_group`: as `borrowed` makes it, of the slice's last group.
    """
    lead = -first_id % GROUP
    rows = rows[:, lead:]
    if not rows.shape[1]:
        low = rows.new_full(b.shape, -torch.inf)
        return torch.full_like(b, first_id), low, low
    groups = F.pad(rows, (0, -rows.shape[1] % GROUP), value=-torch.inf)
    groups[:, -GROUP:] = torch.maximum(groups[:, -GROUP:], rest_of_group)
    assert terms.seeds is not None
    score, column = draw(groups, terms.seeds[b], t, terms.drawn_at, first_id + lead)
    return first_id + lead + column, score, groups.gather(1, column[:, None])[:, 0]


def summarize(rows: Tensor, terms: Terms, b: Tensor, t: Tensor, first_id: int, rest_of_group: Tensor) -> Tensor:
    """What the processes exchange about `rows` `[n, v]` float32, which are overwritten: float64 `[k, n]`.

    The rows are of positions `t` `[n]` in sequences `b` `[n]`; `rest_of_group`, which only sampling needs: see `drawn`.

    - the id of the slice's proposal;
    - the slice's largest logit, which is the proposal's unless it was drawn;
    - the logarithm of the sum of exp(l) over the rest of the slice, the mask id included; NaN if the row is unusable;
    - with a temperature, the proposal's score and its logit, which another slice may hold;
    - by margin, the slice's second largest logit;
    - by entropy: the largest logit p with the mask's, the sum of exp(l - p) and that of exp(l - p)(p - l).
    """
    if terms.tempered:
        rows /= terms.temperature
    index = torch.arange(rows.shape[0], device=rows.device)
    mask_logit = cpu.take_mask(rows, terms.mask_id - first_id)
    top, column = cpu.largest(rows)
    token = first_id + column
    more: list[Tensor] = []
    if terms.sampled:
        token, *more = drawn(rows, terms, b, t, first_id, rest_of_group)
    if terms.order == "margin":
        more.append(rows.scatter(1, column[:, None], -torch.inf).amax(1))
    unusable = ~(rows[index, column] < torch.inf) | ~(mask_logit < torch.inf)
    # A slice may hold nothing but -inf; its row is usable all the same if another slice's is.
    shift = torch.where(top > -torch.inf, top, 0.0)
    rows.sub_(shift[:, None])
    weights = cpu.exp_(rows.clone() if terms.order == "entropy" else rows)
    weights[index, column] = 0.0
    rest = weights.sum(1).double()
    top, mask_logit = top.double(), mask_logit.double()
    log_rest = torch.logaddexp(shift + rest.log(), mask_logit).masked_fill(unusable, torch.nan)
    if terms.order == "entropy":
        slope = -(weights * rows.clamp_(min=-1e4)).sum(1).double()
        peak = torch.maximum(top, mask_logit)
        parts = ((top, rest + 1.0, slope), (mask_logit, torch.ones_like(rest), torch.zeros_like(rest)))
        masses, slopes = zip(*(seen_from(peak, *part) for part in parts), strict=True)
        more += [peak, sum(masses), sum(slopes)]
    return torch.stack([part.double() for part in (token, top, log_rest, *more)])


def seen_from(peak: Tensor, top: Tensor, mass: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The sums `mass` of exp(l - top) and `slope` of exp(l - top)(top - l), rebased from `top` to `peak`."""
    exists = top > -torch.inf
    scale = torch.where(exists, (top - peak).exp(), 0.0)
    return scale * mass, scale * (slope + torch.where(exists, peak - top, 0.0) * mass)


def merge(parts: Tensor, sampled: bool, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Proposal, residual and what the rule ranks by `[n]` (see `cpu.summarize`), from summaries `[processes, k, n]`."""
    token, tops, log_rest = parts[:, :3].unbind(1)
    score, logit = parts[:, 3:5].unbind(1) if sampled else (tops, tops)
    best = score == score.amax(0)
    proposal = torch.where(best, token, torch.inf).amin(0)
    logit = torch.where(best & (token == proposal), logit, -torch.inf).amax(0)
    # Of slices that tie the first; a slice without a logit has nothing to leave out.
    top = tops.amax(0)
    behind = tops.clone().scatter_(0, tops.argmax(0, keepdim=True), -torch.inf)
    others = (torch.cat((log_rest, behind)).logsumexp(0) - top).exp()
    residual = cpu.proposals_residual(others, top, logit)
    residual[~(logit.abs() < torch.inf)] = torch.nan
    rank = residual
    if order == "margin":
        second = torch.cat((tops, parts[:, -1])).topk(2, dim=0).values[1]
        rank = cpu.odds(others, second - top)
    if order == "entropy":
        peak, mass, slope = parts[:, -3:].unbind(1)
        highest = peak.amax(0)
        mass, slope = (part.sum(0) for part in seen_from(highest, peak, mass, slope))
        log_mass = torch.where(logit == highest, residual.log1p(), mass.log())
        rank = (log_mass + slope / mass).clamp(min=0.0)
    return proposal.long(), residual.float(), rank.float()
