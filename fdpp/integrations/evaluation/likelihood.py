"""Log-likelihoods of masked-diffusion models by LLaDA's Monte Carlo estimate (arXiv 2502.09992, equation 6).

A sample masks l of a target's L tokens, l uniform over 1 to L and the positions uniform. Its value is L / l times the
sum of the masked tokens' log-probabilities. The mean over samples is reported; its expectation is a lower bound on the
log-likelihood. The l of all samples are drawn systematically, from one uniform number, which lowers the variance.

A block-causal model sees earlier blocks as they are: the estimates of a target's blocks add up, each given the tokens
before it (BD3-LM, arXiv 2503.09573). Published evaluations of SDAR and LLaDA2 score responses alone. That
of Fast-dLLM v2 scores the first token of a target, with the target's other tokens in sight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.integrations.evaluation.responses import left_pad
from fdpp.models.language_model import DiffusionLM


class Pair(NamedTuple):
    """Token ids of a context, which may be empty, and of the target to score, which must not be."""

    context: list[int]
    target: list[int]


def draw_masks(length: int, samples: int, generator: torch.Generator) -> Tensor:
    """`[samples, length]` bool masks of a target; a target of one token has one mask, `[1, 1]`."""
    cpu = torch.device("cpu")  # the generator's
    if length == 1:
        return torch.ones(1, 1, dtype=torch.bool, device=cpu)
    at = torch.rand((), generator=generator, dtype=torch.float64, device=cpu) + torch.arange(samples, device=cpu)
    counts = (at / samples * length).long().clamp(max=length - 1) + 1
    order = torch.rand(samples, length, generator=generator, dtype=torch.float32, device=cpu).argsort(1).argsort(1)
    return order < counts[:, None]


def generator_for(pair: Pair, seed: int) -> torch.Generator:
    """The same stream for the same pair and seed, whatever else is scored."""
    digest = hashlib.sha256(repr((seed, pair)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def by_blocks(pair: Pair, block_length: int) -> list[Pair]:
    """The part of the target in each block, given all before it; blocks are counted from the context's first token."""
    ids, start = [*pair.context, *pair.target], len(pair.context)
    cuts = [start, *range((start // block_length + 1) * block_length, len(ids), block_length), len(ids)]
    return [Pair(ids[:a], ids[a:b]) for a, b in pairwise(cuts)]


@torch.no_grad()
def score(model: DiffusionLM, rows: Sequence[tuple[Pair, Tensor]], block_length: int | None = None) -> list[float]:
    """L / l times the log-probability of the masked tokens, for every pair with its mask `[L]`."""
    device, config = model.device, model.settled(None, {})
    mask_id, pad_id = config.mask_token_id, config.pad_token_id
    assert mask_id is not None and pad_id is not None
    ids, attention_mask = left_pad([[*pair.context, *pair.target] for pair, _ in rows], pad_id, device)
    masked = torch.zeros_like(ids, dtype=torch.bool)
    for b, (_, mask) in enumerate(rows):
        masked[b, ids.shape[1] - len(mask) :] = mask.to(device)
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
    sees = attention_mask
    if model.block_causal:
        sees = model.no_later_block(ids.shape, attention_mask, device, block_length)
    hidden = model.aligned(model.model(ids.masked_fill(masked, mask_id), sees, position_ids), attention_mask)
    losses = F.cross_entropy(model.project(hidden[masked]).float(), ids[masked], reduction="none")
    sums = torch.zeros(len(rows), dtype=torch.float64, device=device)
    sums.index_add_(0, masked.nonzero()[:, 0], -losses.double())
    return [len(mask) / int(mask.sum()) * total for (_, mask), total in zip(rows, sums.tolist(), strict=True)]


def log_likelihoods(
    model: DiffusionLM,
    pairs: Iterable[Pair],
    samples: int = 128,
    batch_size: int = 1,
    seed: int = 0,
    block_length: int | None = None,
) -> Iterator[float]:
    """The estimate for every pair, in order; masked rows of neighbouring pairs share forwards of `batch_size` rows.

    `block_length` is that of a block-causal model; None: its own.
    """

    def parts(pair: Pair) -> list[Pair]:
        return by_blocks(pair, block_length or model.default_block_length) if model.block_causal else [pair]

    rows = (
        ((i, j), (part, mask))
        for i, pair in enumerate(pairs)
        for j, part in enumerate(parts(pair))
        for mask in draw_masks(len(part.target), samples, generator_for(part, seed))
    )

    def scored() -> Iterator[tuple[tuple[int, int], float]]:
        while batch := list(islice(rows, batch_size)):
            yield from zip((at for at, _ in batch), score(model, [row for _, row in batch], block_length), strict=True)

    for _, of_pair in groupby(scored(), key=lambda item: item[0][0]):
        total = 0.0
        for _, values in groupby(of_pair, key=lambda item: item[0][1]):
            estimates = [value for _, value in values]
            total += sum(estimates) / len(estimates)
        yield total
