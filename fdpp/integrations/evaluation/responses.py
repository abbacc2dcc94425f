"""Prompts in, texts out: left padding, stop strings, and what a response cost."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.models.llada import LLaDAModelLM


@dataclass(frozen=True)
class Response:
    """A response, cut before EOS and before the first stop string.

    Attributes:
        text: without special tokens.
        tokens: how many whole tokens the text has; EOS, padding and what follows a stop string are not counted.
        nfe: forwards this sequence took part in.
        seconds: its share of its batch's time.
    """

    text: str
    tokens: int
    nfe: int
    seconds: float


def left_pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their attention mask, int64 `[B, P]`."""
    P = max(map(len, rows))
    ids = [[pad_id] * (P - len(row)) + list(row) for row in rows]
    mask = [[0] * (P - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, dtype=torch.int64, device=device), torch.tensor(mask, dtype=torch.int64, device=device)


def decode(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def before_eos(ids: Sequence[int], eos: Sequence[int]) -> list[int]:
    """`ids` up to the first of `eos`."""
    end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
    return list(ids[:end])


def cut_at_stop(tokenizer: Any, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, int]:
    """The text of `ids` before the first stop string, and how many whole tokens it has.

    Stop strings are searched for in the text with special tokens; the returned text is without.
    """
    text = decode(tokenizer, ids)
    found = [at for at in map(text.find, stops) if at >= 0]
    if not found:
        return decode(tokenizer, ids, skip_special_tokens=True), len(ids)
    cut = min(found)
    kept = bisect_right(range(len(ids) + 1), cut, key=lambda n: len(decode(tokenizer, ids[:n]))) - 1
    rest = text[len(decode(tokenizer, ids[:kept])) : cut]
    return decode(tokenizer, ids[:kept], skip_special_tokens=True) + rest, kept


class StopStrings(StoppingCriteria):
    """Ends a sequence whose response, from column `start` on, holds one of `stops` before its first EOS."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], start: int, eos: Sequence[int]) -> None:
        self.tokenizer, self.stops, self.start, self.eos = tokenizer, stops, start, eos

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = [decode(self.tokenizer, before_eos(row, self.eos)) for row in input_ids[:, self.start :].tolist()]
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


def respond(
    model: LLaDAModelLM,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    config: DiffusionGenerationConfig,
    stops: Sequence[str] = (),
) -> list[Response]:
    """Decode one batch of prompts, given as token ids.

    With `config.stop_at_eos` a sequence also ends with the block that completes one of `stops`, which does not change
    its text. Without it every block is decoded, as in the published loops.
    """
    config = model.settled(config, {})
    eos, pad = config.eos_token_id, config.pad_token_id
    assert isinstance(eos, list) and pad is not None
    stops = [stop for stop in stops if stop]
    ids, mask = left_pad(prompts, pad, model.device)
    start = ids.shape[1]
    criteria = None
    if stops and config.stop_at_eos:
        criteria = StoppingCriteriaList([StopStrings(tokenizer, stops, start, eos)])
    started = time.perf_counter()
    out = model.generate(ids, mask, config, stopping_criteria=criteria)
    rows, nfe = out.sequences[:, start:].tolist(), out.nfe.tolist()
    seconds = (time.perf_counter() - started) / len(prompts)
    cut = [cut_at_stop(tokenizer, before_eos(row, eos), stops) for row in rows]
    return [Response(text, tokens, n, seconds) for (text, tokens), n in zip(cut, nfe, strict=True)]
