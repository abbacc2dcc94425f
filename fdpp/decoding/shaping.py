"""How a logits processor and LLaDA's options change logits and commits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fdpp.decoding.contexts import Contexts
from fdpp.step import noise

NO_GROUP = 0xFFFFFFFF
"""The number in the counter of noise that is drawn once per position: no vocabulary has as many groups of ids."""


def processed(
    processors: Iterable[Callable[..., Tensor]],
    logits: Tensor,
    states: Tensor,
    before: Tensor,
    contexts: Contexts,
    mask_id: int,
) -> Tensor:
    """`logits` `[b, D, T, V]` of `states` `[b, D, T]` after `processors`, one after the other.

    A processor whose `__call__` takes `cur_step` is one of transformers' text diffusion. It sees every state as a row:
    `input_ids` `[b * D, S]` are the columns `before` `[b, S]` the block, `scores` are `[b * D, T, V]`, and `cur_step`
    are the masks left, `[b * D, 1, 1]`.

    Any other is one of autoregressive generation. It sees every position as a row with its own context (`contexts`
    `[b, D, T]`): see `by_context`.

    Raises:
        ValueError: a processor returns another shape, or wants to be called otherwise.
    """
    left = (states == mask_id).sum(2).view(-1, 1, 1)
    for processor in processors:
        if takes_step(processor):
            scores = logits.flatten(0, 1)
            result = processor(before.repeat_interleave(states.shape[1], dim=0), scores, cur_step=left)
            check_scores(result, scores)
        else:
            result = by_context(processor, logits.flatten(0, 2), contexts)
        logits = result.unflatten(0, logits.shape[: 5 - result.dim()])
    return logits


def takes_step(processor: Callable[..., Tensor]) -> bool:
    """Whether a processor is one of text diffusion.

    Raises:
        ValueError: it asks for an argument that neither kind is given.
    """
    parameters = inspect.signature(processor).parameters
    required = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if set(required[2:]) - {"cur_step"}:
        raise ValueError(
            f"logits_processor: expected one called with input_ids, scores and perhaps cur_step, "
            f"{type(processor).__name__} asks for {', '.join(required)}"
        )
    return "cur_step" in parameters


def by_context(processor: Callable[..., Tensor], logits: Tensor, contexts: Contexts) -> Tensor:
    """`logits` `[n, V]` after an autoregressive processor, each row with its own context as `input_ids`.

    Rows with contexts of one length S are one call, `input_ids` `[m, S]` and `scores` `[m, V]`: all rows, where nothing
    of the block is committed and prompts are of one length. There is no padding, neither that of the prompts nor any to
    make the contexts a rectangle, for no token is neutral: a penalty or a count takes it for a token of the text, an
    n-gram or a watermark for a neighbour. And by the width of a rectangle `MinNewTokensLengthLogitsProcessor` would
    count tokens that are not there. So every row comes out as it would alone, whatever else the batch holds. What a
    processor keeps from call to call is of rows of other positions and sequences.
    """
    tokens, length = contexts.tokens.flatten(0, -2), contexts.length.flatten()
    order, parts = length.argsort(stable=True), []
    lengths, counts = length.unique(return_counts=True)
    for S, rows in zip(lengths.tolist(), order.split(counts.tolist()), strict=True):
        scores = logits[rows]
        parts.append(processor(tokens[rows, :S], scores))
        check_scores(parts[-1], scores)
    return torch.cat(parts)[order.argsort()]


def check_scores(result: Tensor, scores: Tensor) -> None:
    if result.shape != scores.shape:
        raise ValueError(f"logits_processor: expected scores of {list(scores.shape)}, got {list(result.shape)}")


def without(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """`logits` `[..., V]` with -inf at `ids`."""
    logits = logits.clone()
    for token in ids:
        logits[..., token] = -torch.inf
    return logits


def ranked_last(logits: Tensor, proposal: Tensor, ids: tuple[int, ...], mask_id: int) -> Tensor:
    """Logits `[n, T, V]` under which positions that propose one of `ids` have confidence 0.

    The proposals `[n, T]` stay what they are. Elsewhere `ids` have no share in the softmax, as in LLaDA's `generate`.
    The mask id is never proposed but counts in the softmax: a huge mask logit leaves no probability to the proposal.
    """
    last = torch.zeros_like(proposal, dtype=torch.bool)
    for token in ids:
        last = last | (proposal == token)
    logits = logits.clone()
    for token in ids:
        logits[..., token] = logits[..., token].masked_fill(~last, -torch.inf)
    logits[..., mask_id] = logits[..., mask_id].masked_fill(last, torch.finfo(logits.dtype).max)
    return logits


def drawn(tokens: Tensor, k: Tensor, seeds: Tensor, mask_id: int) -> Tensor:
    """`k` `[n]` masked positions of every row of `tokens` `[n, T]`, drawn uniformly: bool `[n, T]`.

    A row's choice depends on its seed `[n]` and its own masks alone.
    """
    masked = tokens == mask_id
    order = position_bits(seeds, tokens.shape[1]).masked_fill(~masked, -1).argsort(dim=1, descending=True, stable=True)
    return masked & (order.argsort(dim=1) < k[:, None])


def position_bits(seeds: Tensor, T: int) -> Tensor:
    """32 random bits of every position, int64 `[n, T]`, of the noise streams `seeds` `[n]`."""
    positions = torch.arange(T, device=seeds.device)[None]
    return noise.philox(seeds[:, None], torch.full_like(positions, NO_GROUP), positions)[0]


def uniform(seeds: Tensor, T: int) -> Tensor:
    """A random number in (0, 1) of every position, float64 `[n, T]`, of the noise streams `seeds` `[n]`."""
    return noise.uniform(position_bits(seeds, T), torch.float64)
