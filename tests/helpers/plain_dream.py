"""Dream and its decodes written plainly, from `data/dream/FORMAT.md`: no code of fdpp, any float dtype."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

MASK = 500


@dataclass
class Held:
    """Keys and values of every layer, `[B, L, kv_heads * head_dim]`, as projected, before rotary."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class PlainDream:
    """The model of a folder with the published key names."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.weights = {name: weight.to(dtype) for name, weight in load_file(folder / "model.safetensors").items()}
        self.heads, self.kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self.head_dim = self.config["hidden_size"] // self.heads

    def norm(self, name: str, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * (wide.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return self.weights[f"{name}.weight"] * wide.to(x.dtype)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` `[B, H, n, hd]` with its halves turned by the angles of `positions` `[n]`."""
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        power = torch.arange(0, self.head_dim, 2, dtype=wide) / self.head_dim
        angles = positions[:, None].to(wide) * self.config["rope_theta"] ** -power
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        real: Tensor | None = None,
        held: Held | None = None,
        start: int = 0,
        states: list[Tensor] | None = None,
        attention: list[Tensor] | None = None,
    ) -> Tensor:
        """Raw logits `[B, n, V]` of columns `start..start+n`; row i - 1 predicts the token at column i.

        `real` `[B, L]` is False at padding, which nobody sees and which sees nothing. `held` keeps what columns it is
        given, and is attended to as a whole. `states` and `attention` receive every layer's input, the final norm's
        output last, and probabilities `[B, H, n, L]`.
        """
        n = x.shape[1]
        held = Held() if held is None else held
        hidden = self.weights["model.embed_tokens.weight"][x]
        for layer in range(self.config["num_hidden_layers"]):
            if states is not None:
                states.append(hidden)
            name = f"model.layers.{layer}"
            h = self.norm(f"{name}.input_layernorm", hidden)
            q, k, v = (self.linear(f"{name}.self_attn.{part}_proj", h) for part in "qkv")
            if layer == len(held.keys):
                held.keys.append(k.clone())
                held.values.append(v.clone())
            held.keys[layer][:, start : start + n] = k
            held.values[layer][:, start : start + n] = v
            L = held.keys[layer].shape[1]
            q, k, v = (
                part.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
                for part in (q, held.keys[layer], held.values[layer])
            )
            q, k = self.rotated(q, torch.arange(start, start + n)), self.rotated(k, torch.arange(L))
            k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
            scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim)
            if real is not None:
                sees = real[:, None, start : start + n, None] & real[:, None, None, :]
                scores = scores.masked_fill(~sees, -torch.inf)
            p = scores.softmax(-1).nan_to_num(0.0)
            if attention is not None:
                attention.append(p)
            hidden = hidden + self.linear(f"{name}.self_attn.o_proj", (p @ v).transpose(1, 2).flatten(2))
            h = self.norm(f"{name}.post_attention_layernorm", hidden)
            gated = F.silu(self.linear(f"{name}.mlp.gate_proj", h)) * self.linear(f"{name}.mlp.up_proj", h)
            hidden = hidden + self.linear(f"{name}.mlp.down_proj", gated)
        hidden = self.norm("model.norm", hidden)
        if states is not None:
            states.append(hidden)
        return self.linear("lm_head", hidden)


Choose = Callable[[Tensor, Tensor, int], Tensor]
"""`(p, masked, step)` to what commits, bool `[T]`: probabilities `[T, V]` of the block's positions, which of them are
masked `[T]`, and the number of the step in the block."""


def ranked(score: Tensor, masked: Tensor) -> list[int]:
    """The masked positions by falling score, the lower position first among equals."""
    return sorted(masked.nonzero().flatten().tolist(), key=lambda t: (-float(score[t]), t))


def longest(accepts: Callable[[list[float]], bool]) -> Choose:
    """The longest prefix of the sorted profile that `accepts`, and at least one position."""

    def choose(p: Tensor, masked: Tensor, step: int) -> Tensor:
        confidence = p.amax(-1)
        order = ranked(confidence, masked)
        profile = [float(confidence[t]) for t in order]
        n = max((n for n in range(1, len(profile) + 1) if n == 1 or accepts(profile[:n])), default=0)
        committed = torch.zeros_like(masked)
        committed[order[:n]] = True
        return committed

    return choose


def threshold(tau: float) -> Choose:
    return longest(lambda c: c[-1] >= tau)


def frechet(margin: float) -> Choose:
    return longest(lambda c: sum(c) - (len(c) - 1) - (1 - c[-1]) > margin)


def factor(f: float) -> Choose:
    return longest(lambda c: (len(c) + 1) * (1 - c[-1]) < f)


def one_per_step() -> Choose:
    return longest(lambda c: False)


@dataclass
class PlainDecode:
    """`sequence` and the forward that decided each of its positions `[L]` (-1: given); forwards, and columns fed."""

    sequence: Tensor
    step_of: Tensor
    forwards: int
    queries: int


def plain_decode(
    model: PlainDream,
    text: Tensor,
    start: int,
    choose: Choose,
    *,
    block: int,
    cache: str = "none",
    first: str = "rule",
    before: bool = True,
) -> PlainDecode:
    """Fill the masks of one `text` `[L]` from column `start` on, block by block.

    Args:
        first: what a block's full forward commits under a cache: "rule", what `choose` says; "alone", the block's first
            position, as published; "both" of them.
        before: whether the other forwards also feed the column before the block, whose row predicts its first position.
            If not, that position has its own row, as published.
    """
    x, L = text.clone(), len(text)
    step_of, forwards, queries = torch.full((L,), -1), 0, 0
    for s in range(start, L, block):
        e, held, step = min(s + block, L), Held(), 0
        while (x[s:e] == MASK).any():
            full = step == 0 or cache == "none"
            begin = 0 if full else max(s - before, 0)
            end = L if full or cache == "prefix" else e
            raw = model(x[None, begin:end], held=held, start=begin)[0].double()
            rows = (torch.arange(s, e) - 1 - begin).clamp(min=0)
            p, masked = raw[rows].softmax(-1), x[s:e] == MASK
            committed = torch.zeros_like(masked)
            if not (full and cache != "none" and first == "alone"):
                committed |= choose(p, masked, step)
            if full and cache != "none" and first != "rule":
                committed[0] = True
            committed &= masked
            x[s:e] = torch.where(committed, p.argmax(-1), x[s:e])
            step_of[s:e][committed] = forwards
            forwards, queries, step = forwards + 1, queries + end - begin, step + 1
    return PlainDecode(x, step_of, forwards, queries)
