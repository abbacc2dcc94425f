"""Infilling: the masks between given tokens, which count as committed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fdpp.decoding.loop import BlockLoop
from fdpp.decoding.output import DiffusionGenerationOutput


def blanks(input_ids: Tensor, attention_mask: Tensor | None, mask_id: int) -> Tensor:
    """Where the sequences `[B, P]` are to be filled, bool; what padding holds does not count."""
    masks = input_ids == mask_id
    return masks if attention_mask is None else masks & attention_mask


def groups(blank: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The column of a first mask, and the sequences `[c]` whose first mask it is; not those without a mask.

    Blocks are the same columns in every sequence of a decode, and start at the first mask. So sequences that start at
    different columns are decoded one after another, each as it would be alone.
    """
    starts = torch.where(blank.any(1), blank.long().argmax(1), blank.shape[1])
    for start in starts.unique().tolist():
        if start < blank.shape[1]:
            yield start, (starts == start).nonzero().flatten()


def output_of(input_ids: Tensor, decodes: list[tuple[Tensor, BlockLoop]]) -> DiffusionGenerationOutput:
    """What came of `decodes`, each of some sequences `[c]` of `input_ids` `[B, P]`; of the others nothing changes."""
    B, P = input_ids.shape
    none = torch.zeros(B, dtype=torch.int64, device=input_ids.device)
    certain = torch.ones(B, P, dtype=torch.float32, device=input_ids.device)
    out = DiffusionGenerationOutput(
        sequences=input_ids.clone(),
        nfe=none,
        tokens_per_forward=none.double(),
        commit_step=torch.full_like(input_ids, -1),
        confidence=certain,
        log_prob=torch.zeros_like(certain),
        query_tokens=none.clone(),
    )
    for rows, loop in decodes:
        part = loop.output()
        for name in ("sequences", "commit_step", "confidence", "log_prob"):
            # Of the columns before the first mask a decode reports the tokens alone.
            out[name][rows, P - part[name].shape[1] :] = part[name]
        for name in ("nfe", "tokens_per_forward", "query_tokens"):
            out[name][rows] = part[name]
        if part.acceptance is not None:
            shares = torch.full((B, part.acceptance.shape[1]), torch.nan, dtype=torch.float64, device=input_ids.device)
            out.acceptance = shares if out.acceptance is None else out.acceptance
            out.acceptance[rows] = part.acceptance
    return out
