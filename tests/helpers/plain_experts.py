"""A mixture of experts in float64, row by row and by sorted lists, from `data/block/FORMAT.md`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.models.experts import Routing


def plain_route(x: Tensor, weight: Tensor, bias: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Experts and weights `[N, k]` of `x` `[N, d]`."""
    indices, weights = [], []
    for row in x.double():
        s = (weight.detach().double() @ row).sigmoid().tolist()
        r = [score + float(b) for score, b in zip(s, bias, strict=True)]
        size = len(r) // routing.groups
        score = [sum(sorted(r[g * size : (g + 1) * size])[-2:]) for g in range(routing.groups)]
        kept = sorted(range(routing.groups), key=lambda g: (-score[g], g))[: routing.kept]
        among = [e for e in range(len(r)) if e // size in kept]
        chosen = sorted(among, key=lambda e: (-r[e], e))[: routing.k]
        total = sum(s[e] for e in chosen) + 1e-20 if routing.k > 1 else 1.0
        indices.append(chosen)
        weights.append([s[e] / total * routing.scale for e in chosen])
    return torch.tensor(indices), torch.tensor(weights, dtype=torch.float64)


def plain_mlp(x: Tensor, mlp: Any) -> Tensor:
    gate, up, down = (getattr(mlp, f"{name}_proj").weight.detach().double() for name in ("gate", "up", "down"))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def plain_mixture(x: Tensor, moe: Any) -> Tensor:
    """What a block's `fdpp.models.experts.MoE` adds to `x` `[N, d]`."""
    index, weights = plain_route(x, moe.gate.weight, moe.gate.expert_bias, moe.routing)
    out = torch.zeros_like(x.double()) if moe.shared_experts is None else plain_mlp(x.double(), moe.shared_experts)
    for n, row in enumerate(x.double()):
        for e, weight in zip(index[n].tolist(), weights[n], strict=True):
            out[n] += weight * plain_mlp(row, moe.experts[e])
    return out
