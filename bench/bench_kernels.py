"""The fused head and the split attention against what they would replace, in the same run.

`python bench/bench_kernels.py --out FOLDER` writes `kernels-<device>.json`:

- head, by masked rows: the library's product and `select` against `project_select`;
- attention of a padded block over a cache: `scaled_dot_product_attention` with a mask against `block_attention`;
  without a mask, and so without padding, it is the bound;
- branches, drafts of one block over one cache: a copy of the cache for each (`BlockCache.attend_copies`) against
  `block_attention`.

On a GPU everything runs in CUDA graphs. On a CPU both ways are PyTorch's own operators, and the head saves memory. A
failure is a row that says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
import torch.nn.functional as F
from measure import DEVICE, ON_GPU
from torch import Tensor

import fdpp
from fdpp.attention import block_attention
from fdpp.attention.cache import BlockCache
from fdpp.models.linear import linear
from fdpp.step.project import project_select

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
RULE = fdpp.Frechet(0.25)


def timed(ways: dict[str, Callable[[], Any]], budget: float) -> dict[str, Any]:
    """Microseconds (a call's share of a graph of several) and extra memory of each way, or why it failed."""

    def one(call: Callable[[], Any]) -> dict[str, Any]:
        us = 1e6 * measure.graph_seconds([call] * measure.CALLS, budget)
        return {"us": us, "peak_mb": measure.peak_bytes(call) / 1e6}

    return {way: measure.attempt(partial(one, call)) for way, call in ways.items()}


def library_head(hidden: Tensor, weight: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    return fdpp.select(linear(hidden, weight), tokens, rule=RULE, mask_id=mask_id).tokens


def fused_head(hidden: Tensor, weight: Tensor, tokens: Tensor, mask_id: int) -> Tensor:
    return project_select(hidden, weight, tokens, rule=RULE, mask_id=mask_id).tokens


@torch.no_grad()
def head(B: int, T: int, masked: int, V: int, D: int, budget: float) -> dict[str, Any]:
    """`B` sequences of `T` positions, the last `masked` of each masked."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(B, T, D, device=DEVICE, dtype=DTYPE, generator=generator)
    weight = torch.randn(V, D, device=DEVICE, dtype=DTYPE, generator=generator) * (3 / D**0.5)
    tokens = torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
    tokens[:, -masked:] = V - 1
    ways = {
        "library": partial(library_head, hidden, weight, tokens, V - 1),
        "fused": partial(fused_head, hidden, weight, tokens, V - 1),
    }
    return {"weight_mb": weight.nbytes / 1e6, **timed(ways, budget)}


@torch.no_grad()
def attention(B: int, n: int, S: int, heads: int, head_size: int, budget: float) -> dict[str, Any]:
    """Blocks of `n` queries over `S` columns, of which sequence b's first b % 32 are padding."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(columns: int) -> Tensor:
        return torch.randn(B, heads, columns, head_size, device=DEVICE, dtype=DTYPE, generator=generator)

    q, k, v = random(n), random(S), random(S)
    left = torch.arange(B, device=DEVICE) % 32
    mask = (torch.arange(S, device=DEVICE) >= left[:, None])[:, None, None]
    ways = {
        "sdpa, mask": partial(F.scaled_dot_product_attention, q, k, v, mask),
        "sdpa, no mask": partial(F.scaled_dot_product_attention, q, k, v),
        "block_attention": partial(block_attention, q, k, v, left),
    }
    return {"kv_mb": 2 * k.nbytes / 1e6, **timed(ways, budget)}


def branch_ways(B: int, drafts: int, n: int, S: int, heads: int, head_size: int) -> dict[str, Callable[[], Tensor]]:
    """`drafts` branches of a block of `n` columns at the end of `S`; sequence b's first b % 32 columns are padding."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, heads, columns, head_size, device=DEVICE, dtype=DTYPE, generator=generator)

    cache = BlockCache()
    keys, values = cache.write(0, random(B, S), random(B, S), 0)
    cache.branches = drafts
    q, own_k, own_v = (random(B * drafts, n) for _ in range(3))
    left, columns = torch.arange(B, device=DEVICE) % 32, torch.arange(S - n, S, device=DEVICE)
    mask = (torch.arange(S, device=DEVICE) >= left[:, None])[:, None, None].repeat_interleave(drafts, dim=0)
    return {
        "copies": partial(cache.attend_copies, 0, q, own_k, own_v, mask, columns),
        "block_attention": partial(block_attention, q, keys, values, left, own=(own_k, own_v), column=columns),
    }


@torch.no_grad()
def branches(B: int, drafts: int, n: int, S: int, heads: int, head_size: int, budget: float) -> dict[str, Any]:
    return timed(branch_ways(B, drafts, n, S, heads, head_size), budget)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "local", help="folder of the result file")
    options = parser.parse_args(arguments)
    V, D, budget = (126464, 4096 if ON_GPU else 320, 0.5) if not options.smoke else (1000, 32, 0.02)
    sizes = [(1, 32, 1), (1, 32, 8), (1, 32, 32), (8, 32, 32), (32, 32, 32)] if ON_GPU else [(1, 32, 32), (8, 32, 32)]
    heads, head_size = (32, 128) if ON_GPU else (4, 32)
    results: dict[str, Any] = {"smoke": options.smoke, "head": [], "attention": [], "branches": []}

    def note(kind: str, about: dict[str, int], call: Callable[[], dict[str, Any]]) -> Path:
        results[kind].append(about | measure.attempt(call))
        print(kind, about, flush=True)
        return measure.write(options.out, "kernels", results)

    for B, T, masked in sizes:
        about = {"sequences": B, "positions": T, "rows": B * masked}
        written = note("head", about, partial(head, B, T, masked, V, D, budget))
    for B in (1, 8, 32) if ON_GPU else (1, 8):
        about = {"sequences": B, "queries": 32, "columns": 1056}
        written = note("attention", about, partial(attention, B, 32, 1056, heads, head_size, budget))
        about = {"sequences": B, "branches": 4, "queries": 32, "columns": 1056}
        written = note("branches", about, partial(branches, B, 4, 32, 1056, heads, head_size, budget))
    measure.close(written, results)


if __name__ == "__main__":
    main()
