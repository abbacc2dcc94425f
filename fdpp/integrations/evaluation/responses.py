"""Prompts in, texts out: left padding, stop strings, and what a response cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.stops import StopStrings, before_eos, cut_at_stop
from fdpp.models.language_model import DiffusionLM


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


def respond(
    model: DiffusionLM,
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
    out = model.generate(ids, mask, config, stopping_criteria=criteria, tokenizer=tokenizer)
    rows, nfe = out.sequences[:, start:].tolist(), out.nfe.tolist()
    seconds = (time.perf_counter() - started) / len(prompts)
    cut = [cut_at_stop(tokenizer, before_eos(row, eos), stops) for row in rows]
    return [Response(text, tokens, n, seconds) for (text, tokens), n in zip(cut, nfe, strict=True)]
