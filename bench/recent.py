"""A decode whose blocks begin without feeding everything, which the library does not offer.

A block's first forward feeds the block before it and the block itself, the others feed the block. All other columns
keep the keys and values of the forward that fed them last. The first block begins with everything.
"""

from __future__ import annotations

import torch

import fdpp
from fdpp.attention import BlockCache


@torch.no_grad()
def decode(
    model: fdpp.LLaDAModelLM, ids: torch.Tensor, rule: fdpp.Rule, everything: bool = False
) -> fdpp.DiffusionGenerationOutput:
    """`model.generate(ids, rule=rule)` with the model's own lengths and such a refresh, for prefix rules alone.

    `ids` `[B, P]` int64, without padding. With `everything` each block begins as with the dual cache.
    """
    config, settings = model.config, model.generation_config
    (B, P), N, T = ids.shape, settings.max_new_tokens, settings.block_length
    mask_id, eos, pad = config.mask_token_id, config.eos_token_id, config.pad_token_id
    tokens = torch.cat((ids, torch.full((B, N), mask_id)), dim=1)
    steps, cache = torch.full((B, N), -1), BlockCache()
    nfe, fed_tokens = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    for block in range(P, P + N, T):
        columns = slice(block, min(block + T, P + N))
        fed = slice(0, P + N) if everything or block == P else slice(block - T, columns.stop)
        while (open_rows := (tokens[:, columns] == mask_id).any(1) & ~ended(tokens, P, mask_id, eos)).any():
            hidden = model.model(tokens[:, fed], cache=cache, start=fed.start)
            logits = model.project(hidden[:, columns.start - fed.start : columns.stop - fed.start])
            step = fdpp.select(logits, tokens[:, columns], rule=rule, mask_id=mask_id)
            # A finished row is fed on with the others. What it stores then is replaced when the next block begins.
            committed = step.committed & open_rows[:, None]
            tokens[:, columns] = torch.where(committed, step.proposal, tokens[:, columns])
            steps[:, columns.start - P : columns.stop - P][committed] = nfe[:, None].expand_as(committed)[committed]
            nfe += open_rows
            fed_tokens += open_rows * (fed.stop - fed.start)
            fed = columns
    response = tokens[:, P:]
    before = (response == eos).cumsum(1) == 0
    after = (response == eos).cumsum(1).cumsum(1) > 1
    return fdpp.DiffusionGenerationOutput(
        sequences=torch.cat((ids, response.masked_fill(after, pad)), dim=1),
        nfe=nfe,
        tokens_per_forward=before.sum(1).double() / nfe,
        commit_step=steps,
        query_tokens=fed_tokens,
    )


def ended(tokens: torch.Tensor, prompt: int, mask_id: int, eos: int) -> torch.Tensor:
    """Whether an EOS stands in each response `[B]` behind which nothing counts: no mask is before it."""
    response = tokens[:, prompt:]
    at_end, at_mask = (response == eos).cumsum(1) > 0, response == mask_id
    return at_end.any(1) & ~(at_mask & ~at_end).any(1)
