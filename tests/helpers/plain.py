"""A family's forward and LLaDA's own decode, written plainly, and what tests of its options share."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from plain_experts import plain_mixture
from small import EOS, MASK, PAD, exact, left_pad, prompts
from torch import Tensor
from transformers import LogitsProcessor

import fdpp
from fdpp.models.language_model import DiffusionLM
from fdpp.step import reference

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


def model_with_ends(family: str = "LLaDA", **config: Any) -> Any:
    """A model of a family in `SMALL` that proposes EOS and EoT often."""
    model = exact(family, seed=3, eot_token_id=EOT, **config)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight[EOS] *= 1.7
        weight[EOT] *= 1.7
    return model


Kept = list[tuple[Tensor, Tensor]]
"""Keys, after the rotary embedding, and values `[S, kv_heads, hd]` of every layer."""


@torch.no_grad()
def naive_forward(
    model: DiffusionLM, ids: Tensor, start: int = 0, kept: Kept | None = None, visible: Tensor | None = None
) -> tuple[Tensor, Tensor, Kept]:
    """A family's architecture in float64, head by head, for one row.

    Args:
        ids: `[T]`, at the columns from `start` on.
        kept: what these columns attend over in place of themselves alone, with their own keys and values written over.
        visible: `[S]` or `[T, S]` bool, the keys that all positions see, or that each of them sees.

    Returns:
        Logits `[T, V]`, attention `[layers, T, S]`, the mean over its heads, and the keys and values.
    """
    config, T, held, maps = model.config, len(ids), [], []
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    turning = getattr(config, "rotary_dim", None) or size
    shared = config.num_attention_heads // config.num_key_value_heads

    def norm(h: Tensor, layer: Any) -> Tensor:
        return h / (h.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * layer.weight.double()

    def product(h: Tensor, layer: Any) -> Tensor:
        bias = getattr(layer, "bias", None)
        return h @ layer.weight.double().T + (0.0 if bias is None else bias.double())

    def rope(h: Tensor) -> Tensor:
        """Pairs (j, j + turning / 2) as complex numbers, turned by position * theta^(-2j / turning)."""
        columns = torch.arange(start, start + T)[:, None, None]
        turns = columns * config.rope_theta ** (-torch.arange(0, turning, 2).double() / turning)
        first, second, passed = h.tensor_split((turning // 2, turning), -1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(turns), turns)
        return torch.cat((turned.real, turned.imag, passed), -1)

    h = model.get_input_embeddings().weight.double()[ids]
    for n, block in enumerate(model.model.blocks):
        layers = block.layers()
        a = norm(h, layers.norm)
        own = (layers.q,) if layers.k is layers.q else (layers.q, layers.k, layers.v)
        projected = torch.cat([product(a, layer) for layer in own], 1).unflatten(1, (-1, size))
        q, k, v = projected.split([config.num_attention_heads] + 2 * [config.num_key_value_heads], 1)
        if layers.q_norm is not None:
            q, k = norm(q, layers.q_norm), norm(k, layers.k_norm)
        q, k = rope(q), rope(k)
        if kept is not None:
            k, v = (
                old.index_copy(0, torch.arange(start, start + T), new) for old, new in zip(kept[n], (k, v), strict=True)
            )
        held.append((k, v))
        heads, weights = [], []
        for head in range(config.num_attention_heads):
            scores = q[:, head] @ k[:, head // shared].T / math.sqrt(size)
            if visible is not None:
                scores = scores.masked_fill(~visible, -torch.inf)
            weights.append(scores.softmax(-1))
            heads.append(weights[-1] @ v[:, head // shared])
        maps.append(torch.stack(weights).mean(0))
        h = h + product(torch.cat(heads, -1), layers.out)
        a = norm(h, layers.ff_norm)
        if layers.gate is None:
            h = h + plain_mixture(a, block.mlp)
        else:
            gate, up = product(a, layers.gate), product(a, layers.up)
            h = h + product(gate * gate.sigmoid() * up, layers.down)
    logits = product(norm(h, model.model.final_norm), model.get_output_embeddings() or model.get_input_embeddings())
    return logits, torch.stack(maps), held


def naive_logits(model: DiffusionLM, x: Tensor, visible: Tensor | None = None) -> Tensor:
    """`naive_forward`'s logits `[B, T, V]` of `x` `[B, T]`; `visible` `[B, T]` or `[B, T, T]`."""
    seen = [None] * len(x) if visible is None else visible
    return torch.stack([naive_forward(model, row, visible=sees)[0] for row, sees in zip(x, seen, strict=True)])


def predicting(shift: int, columns: slice) -> Tensor:
    """The columns whose rows predict the tokens in `columns`; a sequence's first token is predicted by its own row."""
    return (torch.arange(columns.start, columns.stop) - shift).clamp(min=0)


@torch.no_grad()
def plain_infill(model: DiffusionLM, text: Tensor, rule: fdpp.Rule, block_length: int) -> tuple[Tensor, Tensor, int]:
    """Tokens, commit steps and forwards: one full forward per step, the step as specified in float64."""
    x, step_of, step = text.clone(), torch.full_like(text, -1), 0
    first = next((t for t in range(len(x)) if x[t] == MASK), len(x))
    for start in range(first, len(x), block_length):
        block = slice(start, min(start + block_length, len(x)))
        while (x[block] == MASK).any():
            logits = model(x[None]).logits[:, predicting(model.shift, block)].double()
            chosen = reference.select(logits, x[None, block], rule, MASK)
            step_of[block][chosen.committed[0]] = step
            x[block] = chosen.tokens[0]
            step += 1
    return x, step_of, step


@torch.no_grad()
def plain_llada(
    model: DiffusionLM,
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
    """A prompt `[P]` with its response, of any family: one full forward per step, float64, a loop over positions.

    `commit_step` `[max_new_tokens]`, if given, sets the step in which each position commits, whatever its confidence.
    """
    P, per_block = len(prompt), steps // (max_new_tokens // block_length)
    x = torch.cat((prompt, torch.full((max_new_tokens,), MASK)))
    step = 0
    for start in range(P, P + max_new_tokens, block_length):
        for i in range(per_block):
            logits = model.aligned(model(x[None]).logits)[0].double()
            if cfg_scale > 0.0:
                blank = x.clone()
                blank[:P] = MASK
                other = model.aligned(model(blank[None]).logits)[0].double()
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
