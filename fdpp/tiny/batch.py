"""A batch of an embedded model's training, what its ids see, and what batches are made with."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU = torch.device("cpu")
"""Where batches are made, whatever the default device."""


class Batch(NamedTuple):
    """Attributes:
    noisy: ids `[B, n]`.
    target: of the same shape, -100 where no loss is taken.
    weight: of the same shape.
    column: of the same shape, the column of the sequence that an id stands in.
    feed: of the same shape, which forward of a cached decode feeds it, from 0 on; 0 throughout without a cache.
    """

    noisy: Tensor
    target: Tensor
    weight: Tensor
    column: Tensor
    feed: Tensor


def uniform(shape: int | tuple[int, ...], noise: torch.Generator) -> Tensor:
    """Float32 numbers in [0, 1)."""
    return torch.rand(shape, generator=noise, dtype=torch.float32, device=CPU)


def whole_number(low: int, high: int, noise: torch.Generator, shape: tuple[int, ...] = (1,)) -> Tensor:
    """Int64 numbers from `low` to below `high`."""
    return torch.randint(low, high, shape, generator=noise, dtype=torch.int64, device=CPU)


def seen(column: Tensor, feed: Tensor) -> Tensor:
    """What each id of a cached batch sees, bool `[B, 1, n, n]`: of every column what was fed last, by then."""
    later = (column[:, :, None] == column[:, None]) & (feed[:, :, None] < feed[:, None])
    replaced = torch.where(later, feed[:, None], feed.shape[1]).amin(2)
    return ((feed[:, None] <= feed[:, :, None]) & (replaced[:, None] > feed[:, :, None]))[:, None]


def after(words: tuple[str, ...], tokenizer: Any, response: Tensor) -> Tensor:
    """Where `response` `[B, L]` follows one of `words`: bool `[B, L]`."""
    return torch.isin(response.roll(1, dims=1), response.new_tensor(tokenizer.convert_tokens_to_ids(list(words))))


def encode(tokenizer: Any, texts: list[str], length: int) -> Tensor:
    """Texts padded with EOS: ids `[B, length]`."""
    rows = tokenizer(texts)["input_ids"]
    padded = [row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=CPU)
