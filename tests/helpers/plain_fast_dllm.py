"""Fast-dLLM v2's published `generate` written plainly, from `data/block/FORMAT.md`, section 6: no code of fdpp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from plain_dream import Held, PlainDream
from torch import Tensor

MASK = 270


@dataclass
class PlainBlocks:
    """`sequence` and the call that decided each position `[L]` (-1: given); `calls` are the columns that each fed."""

    sequence: Tensor
    step_of: Tensor
    calls: list[int]


def longer(held: Held, columns: int) -> Held:
    """A copy with room for more columns."""
    return Held(*([F.pad(x, (0, 0, 0, columns)) for x in part] for part in (held.keys, held.values)))


def plain_blocks(
    model: PlainDream,
    prompt: Tensor,
    rounds: int,
    tau: float,
    *,
    block: int,
    sub: int,
    block_cache: bool,
    before: bool = False,
) -> PlainBlocks:
    """Decode `rounds` blocks after `prompt` `[n]`, and the first token of the block after them.

    Args:
        block_cache: feed a sub-block alone, whose keys take the place of those of the block's last whole call, unless
            its first token is a mask.
        before: feed the column before a sub-block with it, whose row predicts its first token. Then it is the first
            call of each sub-block that feeds the whole block.
    """
    n = len(prompt)
    x, step_of, calls = prompt, torch.full((n,), -1), []
    main = Held()
    known = n // block * block if n > block else 0
    raw = None
    for start in range(0, known, block):
        main = grown(model, main, start, block)
        raw = model(x[None, start : start + block], held=main, start=start)[0]
    if known:
        calls.append(known)
        if known == n:
            assert raw is not None
            x, step_of = torch.cat((x, raw[-1:].argmax(-1))), torch.cat((step_of, torch.tensor([0])))
    for _ in range(rounds):
        start = len(x) // block * block
        x = F.pad(x, (0, start + block - len(x)), value=MASK)
        step_of = F.pad(step_of, (0, len(x) - len(step_of)), value=-1)
        held, fresh = grown(model, main, start, block), False
        for s in range(start, start + block, sub):
            columns, fresh = slice(s, s + sub), fresh and not before
            while (x[columns] == MASK).any():
                alone = block_cache and fresh and (before or x[s] != MASK)
                begin = max(s - before, start) if alone else start
                end = s + sub if alone else start + block
                raw = model(x[None, begin:end], held=held, start=begin)[0].double()
                fresh = True
                p = raw[(torch.arange(s, s + sub) - 1 - begin).clamp(min=0)].softmax(-1)
                top, token = p.max(-1)
                masked = x[columns] == MASK
                committed = masked & ((top > tau) | (torch.arange(sub) == top.masked_fill(~masked, -1).argmax()))
                x[columns] = torch.where(committed, token, x[columns])
                step_of[columns][committed] = len(calls)
                calls.append(end - begin)
        main = grown(model, main, start, block)
        raw = model(x[None, start : start + block], held=main, start=start)[0]
        x, step_of = torch.cat((x, raw[-1:].argmax(-1))), torch.cat((step_of, torch.tensor([len(calls)])))
        calls.append(block)
    return PlainBlocks(x, step_of, calls)


def grown(model: PlainDream, held: Held, start: int, block: int) -> Held:
    """`held`, of `start` columns, with room for the block after them."""
    if not held.keys:
        layers, width = model.config["num_hidden_layers"], model.kv_heads * model.head_dim
        dtype = next(iter(model.weights.values())).dtype
        held = Held(*([torch.zeros(1, start, width, dtype=dtype)] * layers for _ in "kv"))
    return longer(held, block)
