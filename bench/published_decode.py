"""The published way to decode, written from the papers, on the weights of a model of ours: the yardstick.

What Fast-dLLM (arXiv 2505.22618) and Fast-dLLM++ (arXiv 2606.02955) run:

- an eager model with three projections for queries, keys and values;
- caches of keys without their rotary embedding, concatenated to the new ones (prefix cache) or overwritten sequence by
  sequence (dual cache); every layer of every step rotates all of them again;
- the head on every row that was fed, then the selection of `published.select`;
- one host synchronisation per step and, with the dual cache, some in every layer.

A causal mask that the published model builds and never uses is left out.

For Dream, whose rows predict the next token (`shift`), their programs differ:

- Cached steps feed the block alone, so that its first token is read off nothing new: it is always taken from the full
  forward that begins the block, which decides no other. That forward takes a softmax over everything.
- Later ones take it over the masked rows, in the logits' dtype. The rotation is in the weights' dtype, too.
- Without a cache the block's first token is one of all, as in DAWN's program (arXiv 2602.06953).
- Their dual cache takes one sequence. Here it takes several, row by row as in LLaDA's.

SDAR's `generate.py` (arXiv 2510.06303) for block-causal models: one forward over the prompt's whole blocks, with the
head on all of its rows, which it throws away; forwards over each block until it holds no mask, its keys concatenated
to the rotated ones that are stored; one more to store the block's own, after the last block, too. Every forward has
the head on all rows, and every step takes a softmax of the whole block in the logits' dtype and waits for the host.
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
from fdpp.attention.cache import block_causal_mask
from fdpp.models.block import Layers, RMSNorm, head_size_of

Past = list[tuple[Tensor, Tensor]]
"""Keys, not rotated, and values of every layer, `[B, kv_heads, S, head_size]`."""

Forward = Callable[[Tensor, Past | None, Tensor | None], tuple[Tensor, Past]]
"""`(tokens [B, n], past, replace [B, L] bool) -> (logits [B, n, V], keys and values)`."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    wide = x.to(sin.dtype)
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class PublishedModel:
    """LLaDA's or Dream's forward, eager; the weights are those of `model`, not copies."""

    def __init__(self, model: Any) -> None:
        self.config, head = model.config, model.get_output_embeddings()
        self.embedding, self.norm = model.get_input_embeddings().weight, model.model.final_norm.weight
        self.head = self.embedding if head is None else head.weight
        self.layers = [block.layers() for block in model.model.blocks]
        half = torch.arange(0, self.head_size, 2, device=self.head.device, dtype=torch.float32) / self.head_size
        at = torch.arange(self.config.max_position_embeddings, device=self.head.device, dtype=torch.float32)
        angles = torch.outer(at, 1.0 / self.config.rope_theta**half).repeat(1, 2)
        dtype = self.head.dtype if model.shift else torch.float32
        self.sin, self.cos = angles.sin()[None, None].to(dtype), angles.cos()[None, None].to(dtype)

    @property
    def head_size(self) -> int:
        return head_size_of(self.config)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, past: Past | None = None, replace: Tensor | None = None) -> tuple[Tensor, Past]:
        """See `Forward`. Without `replace` the tokens follow what is in `past`; with it they stand where it is set."""
        x, present, eps = F.embedding(tokens, self.embedding), [], self.config.rms_norm_eps
        for layer, w in enumerate(self.layers):
            h = rms_norm(x, w.norm.weight, eps)
            q, k, v = (F.linear(h, each.weight, each.bias) for each in (w.q, w.k, w.v))
            h, kept = self.attention(w, q, k, v, None if past is None else past[layer], replace)
            present.append(kept)
            x = x + F.linear(h, w.out.weight)
            h = rms_norm(x, w.ff_norm.weight, eps)
            x = x + F.linear(F.silu(F.linear(h, w.gate.weight)) * F.linear(h, w.up.weight), w.down.weight)
        return F.linear(rms_norm(x, self.norm, eps), self.head[: self.config.vocab_size]), present

    def attention(
        self, w: Layers, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, replace: Tensor | None
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


class PublishedBlockModel(PublishedModel):
    """SDAR's forward: norms of queries and keys, and keys that are stored rotated.

    A prompt sees no later one of its blocks of `block` tokens; what follows it is a block at a time, and sees all.
    """

    def __init__(self, model: Any, block: int) -> None:
        super().__init__(model)
        self.block = block

    def attention(
        self, w: Layers, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, replace: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        assert isinstance(w.q_norm, RMSNorm) and isinstance(w.k_norm, RMSNorm)
        B, n, _ = q.shape
        q, k, v = (x.view(B, n, -1, self.head_size) for x in (q, k, v))
        q, k = (rms_norm(x, norm.weight, norm.eps) for x, norm in ((q, w.q_norm), (k, w.k_norm)))
        start = 0 if past is None else past[0].shape[2]
        at = torch.arange(start, start + n, device=q.device)
        sin, cos = self.sin.index_select(2, at), self.cos.index_select(2, at)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q, k = rotated(q, sin, cos), rotated(k, sin, cos)
        mask = block_causal_mask(n, self.block, q.device) if past is None else None
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return h.transpose(1, 2).reshape(B, n, -1), (k, v)


@torch.no_grad()
def decode(
    forward: Forward,
    prompt: Tensor,
    *,
    blocks: list[tuple[int, int]],
    rules: list[list[Rule]],
    cache: str,
    mask_id: int,
    shift: int = 0,
) -> tuple[Tensor, int]:
    """Sequences `[B, P + N]` and the number of forwards, until no block holds a mask.

    `blocks` are their bounds within the response, `rules` those of each block's successive steps (the last goes on);
    `cache` is "none", "prefix" or "dual"; `shift` is the model's, 0 as LLaDA's or 1 as Dream's. All sequences take part
    in every forward and nothing stops at EOS. Where the published code would loop for ever, because the mask is
    proposed, a `RuntimeError` is raised.
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
            rule, masked = successive[min(step, len(successive) - 1)], x[:, fed] == mask_id
            if not shift:
                new, _ = published.select(logits, x[:, fed], masked & replace[:, fed], rule)
            else:
                logits = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
                if step == 0 and cache != "none":
                    new = x.clone()
                    new[:, s] = logits.softmax(dim=-1).max(dim=-1).indices[:, s]
                elif cache == "none":
                    new, _ = published.select_dream(logits, x, masked & replace, rule, x.shape[1])
                else:
                    new, _ = published.select_dream(logits, x[:, fed], masked, rule, e - s)
            x = torch.cat((x[:, : fed.start], new, x[:, fed.stop :]), dim=1)
    return x, nfe


@torch.no_grad()
def decode_blocks(
    forward: Forward, prompt: Tensor, *, new: int, block: int, rules: list[Rule], mask_id: int
) -> tuple[Tensor, int]:
    """As `decode`, of a block-causal model: sequences `[B, P + new]` and the number of forwards.

    `rules` are those of the successive steps of every block; the first block may begin with tokens of the prompt.
    """
    B, P = prompt.shape
    first = P // block * block
    length = first + -(-(P + new - first) // block) * block
    x = torch.cat((prompt, prompt.new_full((B, length - P), mask_id)), dim=1)
    past: Past | None = None
    nfe = 0
    if first:
        _, past = forward(x[:, :first], None, None)
        nfe += 1
    for s in range(first, length, block):
        columns = slice(s, s + block)
        for step in itertools.count():
            tokens = x[:, columns]
            masked = tokens == mask_id
            finished = not bool(masked.any())
            if step > block and not finished:
                raise RuntimeError(f"no end to the block at {s}: a mask's proposal is the mask itself")
            logits, present = forward(tokens, past, None)
            nfe += 1
            if finished:
                past = present
                break
            rule = rules[min(step, len(rules) - 1)]
            x[:, columns], _ = published.select(logits, tokens, masked, rule, logits.dtype)
    return x[:, : P + new], nfe
