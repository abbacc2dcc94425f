"""The published way to decode LLaDA, written from the papers, on the weights of a model of ours: the yardstick.

What Fast-dLLM (arXiv 2505.22618) and Fast-dLLM++ (arXiv 2606.02955) run:

- an eager model with three projections for queries, keys and values;
- caches of keys without their rotary embedding, concatenated to the new ones (prefix cache) or overwritten sequence by
  sequence (dual cache); every layer of every step rotates all of them again;
- the head on every row that was fed, then the selection of `published.select`;
- one host synchronisation per step and, with the dual cache, some in every layer.

A causal mask that the published model builds and never uses is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import published
import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp import Rule

Past = list[tuple[Tensor, Tensor]]
"""Keys, not rotated, and values of every layer, `[B, kv_heads, S, head_size]`."""

Forward = Callable[[Tensor, Past | None, Tensor | None], tuple[Tensor, Past]]
"""`(tokens [B, n], past, replace [B, L] bool) -> (logits [B, n, V], keys and values)`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class PublishedModel:
    """LLaDA's forward, eager; the weights are those of `model`, not copies."""

    def __init__(self, model: Any) -> None:
        self.config, weights = model.config, model.state_dict()
        prefix = "model.transformer."
        self.embedding, self.norm = weights[f"{prefix}wte.weight"], weights[f"{prefix}ln_f.weight"]
        self.head = self.embedding if self.config.weight_tying else weights[f"{prefix}ff_out.weight"]
        names = ("attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out")
        self.layers = [
            {name: weights[f"{prefix}blocks.{layer}.{name}.weight"] for name in names}
            for layer in range(self.config.n_layers)
        ]
        half = torch.arange(0, self.head_size, 2, device=self.head.device, dtype=torch.float32) / self.head_size
        at = torch.arange(self.config.max_sequence_length, device=self.head.device, dtype=torch.float32)
        angles = torch.outer(at, 1.0 / self.config.rope_theta**half).repeat(1, 2)
        self.sin, self.cos = angles.sin()[None, None], angles.cos()[None, None]

    @property
    def head_size(self) -> int:
        return self.config.d_model // self.config.n_heads

    @torch.no_grad()
    def __call__(self, tokens: Tensor, past: Past | None = None, replace: Tensor | None = None) -> tuple[Tensor, Past]:
        """See `Forward`. Without `replace` the tokens follow what is in `past`; with it they stand where it is set."""
        x, present, eps = F.embedding(tokens, self.embedding), [], self.config.rms_norm_eps
        for layer, w in enumerate(self.layers):
            h = rms_norm(x, w["attn_norm"], eps)
            q, k, v = (F.linear(h, w[f"{name}_proj"]) for name in "qkv")
            h, kept = self.attention(q, k, v, None if past is None else past[layer], replace)
            present.append(kept)
            x = x + F.linear(h, w["attn_out"])
            h = rms_norm(x, w["ff_norm"], eps)
            x = x + F.linear(F.silu(F.linear(h, w["ff_proj"])) * F.linear(h, w["up_proj"]), w["ff_out"])
        return F.linear(rms_norm(x, self.norm, eps), self.head[: self.config.vocab_size]), present

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, replace: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, n, _ = q.shape
        q, k, v = (x.view(B, n, -1, self.head_size).transpose(1, 2) for x in (q, k, v))
        if past is not None and replace is None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        elif past is not None and replace is not None:
            for b in range(B):
                where = replace[b].nonzero(as_tuple=True)[0]
                past[0][b, :, where], past[1][b, :, where] = k[b], v[b]
            k, v = past
        present, S = (k, v), k.shape[2]
        stop = S if replace is None else replace.nonzero()[:, 1].max() + 1
        at = torch.arange(stop - n, stop, device=q.device)
        q = rotated(q, self.sin.index_select(2, at), self.cos.index_select(2, at))
        k = rotated(k, self.sin[:, :, :S], self.cos[:, :, :S])
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        h = F.scaled_dot_product_attention(q, k, v)
        return h.transpose(1, 2).reshape(B, n, -1), present


@torch.no_grad()
def decode(
    forward: Forward,
    prompt: Tensor,
    *,
    blocks: list[tuple[int, int]],
    rules: list[list[Rule]],
    cache: str,
    mask_id: int,
) -> tuple[Tensor, int]:
    """Sequences `[B, P + N]` and the number of forwards, until no block holds a mask.

    `blocks` are their bounds within the response, `rules` those of each block's successive steps (the last goes on);
    `cache` is "none", "prefix" or "dual". All sequences take part in every forward and nothing stops at EOS. Where the
    published code would loop for ever, because the mask is proposed, a `RuntimeError` is raised.
    """
    P = prompt.shape[1]
    x = torch.cat((prompt, prompt.new_full((prompt.shape[0], blocks[-1][1]), mask_id)), dim=1)
    nfe = 0
    for (start, stop), successive in zip(blocks, rules, strict=True):
        s, e = P + start, P + stop
        replace = torch.zeros_like(x, dtype=torch.bool)
        replace[:, s:e] = True
        past: Past | None = None
        for step in itertools.count():
            if step and not bool((x[:, s:e] == mask_id).any()):
                break
            if step > stop - start:
                raise RuntimeError(f"no end to the block at {start}: a mask's proposal is the mask itself")
            if step == 0 or cache == "none":
                fed = slice(0, x.shape[1])
                logits, past = forward(x, None, None)
                if cache == "prefix":
                    past = [(k[:, :, :s], v[:, :, :s]) for k, v in past]
            elif cache == "prefix":
                fed = slice(s, x.shape[1])
                logits, _ = forward(x[:, fed], past, None)
            else:
                fed = slice(s, e)
                logits, _ = forward(x[:, fed], past, replace)
            nfe += 1
            masked = (x[:, fed] == mask_id) & replace[:, fed]
            new, _ = published.select(logits, x[:, fed], masked, successive[min(step, len(successive) - 1)])
            x = torch.cat((x[:, : fed.start], new, x[:, fed.stop :]), dim=1)
    return x, nfe
