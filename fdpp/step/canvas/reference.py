"""The specification: one step of a canvas in plain float64 PyTorch, position by position."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.step.canvas.outcome import CanvasStep
from fdpp.step.draw import draw
from fdpp.step.noise import renoise


def processed(logits: Tensor, temperature: Tensor, softcap: float) -> Tensor:
    """x = l / t `[B, T, V]` float64, t of every sequence `[B]`; a `softcap` of 0 is none."""
    x = logits.double()
    if softcap:
        x = softcap * (x / softcap).tanh()
    return x / temperature.double()[:, None, None]


def accepted(entropies: list[float], bound: float) -> set[int]:
    """The positions by ascending entropy, while the sum of those before is at most `bound`; no infinite ones."""
    total, found = 0.0, set()
    for h, t in sorted((h, t) for t, h in enumerate(entropies)):
        if not (total <= bound and h < float("inf")):
            break
        found.add(t)
        total += h
    return found


def denoise_canvas(
    logits: Tensor,
    canvas: Tensor,
    bound: Tensor,
    temperature: Tensor,
    seeds: Tensor,
    softcap: float,
    argmax: Tensor,
    finished: Tensor,
) -> CanvasStep:
    """`fdpp.denoise_canvas` with all numbers as tensors `[B]`; entropies and lse in float64."""
    B, T, V = logits.shape
    x = processed(logits, temperature, softcap)
    zero = x.new_zeros(B, T)
    out = CanvasStep(canvas.clone(), canvas.clone(), argmax.clone(), zero, zero.clone(), zero.bool(), x.new_zeros(B))
    positions = torch.arange(T, device=x.device)
    for b in range(B):
        if finished[b]:
            continue
        usable = ~x[b].isnan().any(1) & (x[b].amax(1).abs() < torch.inf)
        clean = x[b].nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        out.argmax[b] = clean.argmax(1)
        log_p = clean.log_softmax(1)
        out.entropy[b] = (-(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(1)).masked_fill(~usable, torch.inf)
        out.lse[b] = clean.logsumexp(1).masked_fill(~usable, torch.nan)
        out.mean_entropy[b] = out.entropy[b].mean()
        for t in accepted(out.entropy[b].tolist(), float(bound[b])):
            out.accepted[b, t] = True
        fresh = renoise(seeds[b].expand(T), positions, V)
        out.sample[b] = torch.where(usable, draw(x[b], seeds[b].expand(T), positions, 1.0)[1], fresh)
        out.canvas[b] = torch.where(out.accepted[b], out.sample[b], fresh)
    return out
