"""LLaDA's own decode, written plainly, and what tests of its options share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from small import EOS, MASK, PAD, exact_model, left_pad, prompts
from torch import Tensor
from transformers import LogitsProcessor

from fdpp import LLaDAModelLM

EOT = 60
"""In the tests' vocabulary; `prompts` may hold it."""
SIZES: dict[str, Any] = {"max_new_tokens": 20, "block_length": 8}
CACHES = ("none", "prefix", "dual")
LLADA_OPTIONS: list[dict[str, Any]] = [
    {"cfg_scale": 0.5},
    {"cfg_scale": 2.0},
    {"logits_eos_inf": True},
    {"confidence_eos_eot_inf": True},
    {"cfg_scale": 1.0, "logits_eos_inf": True, "confidence_eos_eot_inf": True},
]


def ragged() -> tuple[Tensor, Tensor]:
    """Four prompts of different lengths, one of them empty."""
    return left_pad([prompts(1, P, seed=P + 4)[0] for P in (3, 9, 0, 5)])


def model_with_ends(**config: Any) -> LLaDAModelLM:
    """Proposes EOS and EoT often."""
    model = exact_model(seed=3, eot_token_id=EOT, **config)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[EOS] *= 1.7
        weight[EOT] *= 1.7
    return model


@torch.no_grad()
def plain_llada(
    model: LLaDAModelLM,
    prompt: Tensor,
    *,
    steps: int,
    max_new_tokens: int = 24,
    block_length: int = 8,
    cfg_scale: float = 0.0,
    logits_eos_inf: bool = False,
    confidence_eos_eot_inf: bool = False,
    commit_step: Tensor | None = None,
    processors: list[Callable[..., Tensor]] | None = None,
) -> Tensor:
    """A prompt `[P]` with its response: one full forward per step, float64, a loop over positions.

    `commit_step` `[max_new_tokens]`, if given, sets the step in which each position commits, whatever its confidence.
    """
    P, per_block = len(prompt), steps // (max_new_tokens // block_length)
    x = torch.cat((prompt, torch.full((max_new_tokens,), MASK)))
    step = 0
    for start in range(P, P + max_new_tokens, block_length):
        for i in range(per_block):
            logits = model(x[None]).logits[0].double()
            if cfg_scale > 0.0:
                blank = x.clone()
                blank[:P] = MASK
                other = model(blank[None]).logits[0].double()
                logits = other + (cfg_scale + 1) * (logits - other)
            for processor in processors or ():
                stop = start + block_length
                logits[start:stop] = one_by_one(processor, x[:stop], logits[start:stop])
            if logits_eos_inf:
                logits[:, EOS] = -torch.inf
            proposable = logits.clone()
            proposable[:, MASK] = -torch.inf
            proposal = proposable.argmax(-1)
            if confidence_eos_eot_inf:
                logits[:, [EOS, EOT]] = -torch.inf
            p = logits.softmax(-1)
            block = range(start, start + block_length)
            confidence = {t: float(p[t, proposal[t]]) for t in block if x[t] == MASK}
            k = block_length // per_block + (i < block_length % per_block)
            best = sorted(confidence, key=lambda t: (-confidence[t], t))[:k]
            if commit_step is not None:
                best = [t for t in confidence if commit_step[t - P] == step]
            for t in best:
                x[t] = proposal[t]
            step += 1
    return x


def one_by_one(processor: Callable[..., Tensor], x: Tensor, rows: Tensor) -> Tensor:
    """The logits `[T, V]` of the last T positions of `x` after a processor, called for each with its own context."""
    start = len(x) - len(rows)
    if "cur_step" in inspect.signature(processor).parameters:
        return processor(x[None, :start], rows[None], cur_step=(x[start:] == MASK).sum().view(1, 1, 1))[0]
    before = [x[:t][x[:t] != MASK] for t in range(start, len(x))]
    return torch.cat([processor(ids[None], row[None]) for ids, row in zip(before, rows, strict=True)])


class Boost(LogitsProcessor):
    """Raises the token before the block, or 7, by the number of masks left, so that it depends on all it is given."""

    def __call__(self, input_ids: Tensor, scores: Tensor, cur_step: Tensor) -> Tensor:
        N, T, _ = scores.shape
        assert cur_step.shape == (N, 1, 1)
        before = F.pad(input_ids, (1, 0), value=PAD)[:, -1]
        raised = torch.where(before == PAD, 7, before)[:, None, None].expand(N, T, 1)
        return scores.scatter_add(2, raised, cur_step.expand(N, T, 1).to(scores.dtype))
