"""The PyTorch twin of `fdpp.kernels.draw`: a group of 64 ids by its mass, then an id inside it."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.step.noise import GROUP, group_gumbel, place

COLDEST, HOTTEST = 2.0**-126, 2.0**100
"""Float32 divides by temperatures in between, and products with noise are finite; others count as the nearer one."""

MOST = 4.2
"""Above log(64), the most that a group's mass adds to its largest logit over the temperature; the least is 0."""


def masses(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """Of `[..., G]`: the largest logit `[..., 1]`, and exp((l - largest) / temperature)."""
    peak = logits.amax(-1, keepdim=True)
    # From a finite number: -inf - -inf would be NaN. Next to +inf nothing else has a mass.
    start = peak.nan_to_num(neginf=0.0)
    return peak, ((logits - start) / temperature).exp_()


def draw(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float | Tensor, first_id: int = 0
) -> tuple[Tensor, Tensor]:
    """Score `[n]` and column `[n]` drawn from softmax(l / temperature) of every row of `logits` `[n, V]`.

    Float32 or float64, which the noise has too; a NaN counts as -inf. Of parts of a row the largest score counts.

    Args:
        seeds, positions: `[n]` int64.
        temperature: above 0, one or `[n]`.
        first_id: the first column's id, a multiple of 64.
    """
    n, V = logits.shape
    peak = peaks(logits)
    if peak.isnan().any():
        logits = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        peak = peaks(logits)
    t = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device).clamp(COLDEST, HOTTEST).expand(n)
    first_group, groups = first_id // GROUP, peak.shape[1]
    noise = group_gumbel(seeds, positions, groups, logits.dtype, first_group)
    # Most groups lose whatever their mass is, which is then never computed. Rounding is monotonic.
    at_least, at_most = (peak + t[:, None] * (log_mass + noise) for log_mass in (0.0, MOST))
    row, group = (at_most >= at_least.amax(1, keepdim=True)).nonzero(as_tuple=True)
    ids = (group * GROUP)[:, None] + torch.arange(GROUP, device=logits.device)
    inside = torch.where(ids < V, logits[row[:, None], ids.clamp(max=V - 1)], -torch.inf)
    mass = masses(inside, t[row, None])[1]
    scores = torch.full_like(peak, -torch.inf)
    scores[row, group] = peak[row, group] + t[row] * (mass.sum(1).log_() + noise[row, group])
    score, chosen = scores.max(1)
    where = torch.searchsorted(row * groups + group, torch.arange(n, device=row.device) * groups + chosen)
    part = place(seeds, positions, chosen + first_group, logits.dtype)
    return score, chosen * GROUP + column(mass[where], part)


def peaks(logits: Tensor) -> Tensor:
    """The largest logit of every group `[n, groups]` of `logits` `[n, V]`; NaN where a group holds one."""
    whole = logits.shape[1] // GROUP * GROUP
    peak = logits[:, :whole].unflatten(1, (-1, GROUP)).amax(2)
    if whole == logits.shape[1]:
        return peak
    return torch.cat((peak, logits[:, whole:].amax(1, keepdim=True)), dim=1)


def column(mass: Tensor, part: Tensor) -> Tensor:
    """The first column `[n]` of `mass` `[n, G]` whose cumulative sum exceeds the `part` `[n]` of the whole."""
    # In float64: in which order a device adds them up then decides no draw.
    total = mass.double().cumsum(1)
    # Sums are rounded, so only ids with a mass of their own are asked; the last of them where u is rounded to 1.
    held = mass > 0
    over = held & (total > part[:, None] * total.amax(1, keepdim=True))
    last = mass.shape[1] - 1 - held.flip(1).int().argmax(1)
    return torch.where(over.any(1), over.int().argmax(1), torch.where(held.any(1), last, 0))
