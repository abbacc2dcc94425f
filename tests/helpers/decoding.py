"""What tests of the block loop share: models, streamers and checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from small import EOS, MASK, PAD, V, prompts
from torch import Tensor

import fdpp
from fdpp import EntropyBound, Factor, Frechet, LLaDAConfig, LLaDAModelLM, Quota, Threshold
from fdpp.decoding.generate import DiffusionGenerationMixin

CACHES = ("none", "prefix", "dual")
RULES = (Quota(), Quota(3), Threshold(0.5), Factor(1.2), Frechet(0.1), EntropyBound(1.0))
SIZES = ((1, 1), (1, 32), (2, 3), (7, 7), (13, 5), (17, 1), (24, 64), (31, 32), (33, 32))
"""Response and block lengths: single positions, primes, a block longer than the response, a last block of one."""

EOS_SCRIPT = ([5, 6, 7, EOS, 8, 9, 10, 11], [0.6, 0.5, 0.7, 0.9, 0.8, 0.2, 0.3, 0.4])
"""Commits one at a time in the order 3 (EOS), 4, 2, 0, 1, 7, 6, 5: EOS counts after the fifth."""


@contextmanager
def forwards(model: LLaDAModelLM) -> Iterator[list[tuple[int, int]]]:
    """Batch size and length of every forward of the transformer."""
    seen: list[tuple[int, int]] = []
    inner = model.model.forward
    model.model.forward = lambda ids, **kwargs: seen.append(tuple(ids.shape)) or inner(ids, **kwargs)
    try:
        yield seen
    finally:
        del model.model.forward


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Tensor | None]] = []

    def put(self, value: Tensor) -> None:
        self.events.append(("put", value.clone()))

    def put_draft(self, value: Tensor) -> None:
        self.events.append(("draft", value.clone()))

    def end(self) -> None:
        self.events.append(("end", None))

    def blocks(self) -> list[list[Tensor]]:
        """The drafts of every block, its final tokens last."""
        blocks: list[list[Tensor]] = [[]]
        for name, value in self.events[1:-1]:
            blocks[-1].append(value)
            if name == "put":
                blocks.append([])
        return blocks[:-1]


class Scripted(DiffusionGenerationMixin):
    """A model that proposes `tokens[t]` with confidence `confidences[t]` at column t, whatever it is fed."""

    def __init__(self, tokens: list[int], confidences: list[float], prompt: int = 0) -> None:
        self.config = LLaDAConfig(
            vocab_size=V, d_model=V, n_heads=1, mask_token_id=MASK, eos_token_id=EOS, pad_token_id=PAD
        )
        c = torch.tensor([0.5] * prompt + confidences)[:, None]
        self.logits = ((1 - c) / (V - 1)).log().repeat(1, V)
        self.logits[torch.arange(len(c)), torch.tensor([0] * prompt + tokens)] = c.log().squeeze(1)
        self.fed: list[Tensor] = []

    def parameters(self) -> list[Tensor]:
        return [self.logits]

    def model(self, input_ids: Tensor, *, start: int, wanted: slice | None, **_: Any) -> Tensor:
        self.fed.append(input_ids.clone())
        logits = self.logits[start : start + input_ids.shape[1]].expand(len(input_ids), -1, -1)
        return logits if wanted is None else logits[:, wanted]

    def project(self, hidden: Tensor) -> Tensor:
        return hidden


def no_prompt(B: int = 1) -> Tensor:
    return torch.empty(B, 0, dtype=torch.int64)


def check(out: fdpp.DiffusionGenerationOutput, prompt: Tensor, new: int, block: int) -> None:
    """What holds of every decode."""
    P = prompt.shape[1]
    assert out.sequences.shape == (len(prompt), P + new)
    assert out.sequences.dtype == out.nfe.dtype == torch.int64
    assert torch.equal(out.sequences[:, :P], prompt)
    response = out.sequences[:, P:]
    assert not (response == MASK).any()
    assert bool(((response >= 0) & (response < V)).all())
    for row, nfe, rate in zip(response, out.nfe.tolist(), out.tokens_per_forward.tolist(), strict=True):
        ends = (row == EOS).nonzero().flatten().tolist()
        written = ends[0] if ends else new
        assert 1 <= nfe <= new
        assert rate == written / nfe


def ragged() -> list[Tensor]:
    return [prompts(1, P, seed=P + 4)[0] for P in (3, 9, 0, 5)]
