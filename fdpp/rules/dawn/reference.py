"""The specification of DAWN's operators: plain float64 PyTorch, as short as the formulas (see `fdpp.rules.dawn`)."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.rules.dawn.decide import ANCHOR
from fdpp.rules.dawn.edges import Thresholds


def attention(queries: list[Tensor], keys: list[Tensor], key_mask: Tensor | None = None) -> Tensor:
    """A `[b, n, S]`: softmax(q k^T / sqrt(hd)) averaged over the heads and layers of `queries` and `keys`.

    One `[b, H, n, hd]` and one `[b, kv_heads, S, hd]` per layer; keys where `key_mask` `[b, S]` is False get nothing.
    """
    maps = []
    for q, k in zip(queries, keys, strict=True):
        k = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q.double() @ k.transpose(2, 3) / q.shape[3] ** 0.5
        if key_mask is not None:
            scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
        maps.append(scores.softmax(-1).mean(1))
    return torch.stack(maps).mean(0)


def edges(A: Tensor, rule: Thresholds, start: int, first: int, T: int, key_mask: Tensor | None = None) -> Tensor:
    """E `[b, T, S]` bool from A `[b, n, S]`, whose queries stand in columns `start..start+n`; i <- j is E[i, j].

    E = A[i, j] >= tau_edge for the block's queries, columns `first..first+T`, without the diagonal and without sinks,
    columns whose mean over the n queries (padding left out) is above tau_sink.
    """
    n, S = A.shape[1:]
    real = torch.ones(A.shape[0], S, dtype=torch.bool, device=A.device) if key_mask is None else key_mask
    weight = real[:, start : start + n].double()
    sink = (A.double() * weight[:, :, None]).sum(1) / weight.sum(1, keepdim=True) > rule.tau_sink
    column = torch.arange(S, device=A.device)
    removed = sink[:, None] | ~real[:, None] | (column == column[first : first + T, None])
    return (A[:, first - start :][:, :T] >= rule.tau_edge) & ~removed


def commit(
    confidence: Tensor, candidate: Tensor, committed_confidence: Tensor, E: Tensor, rule: Thresholds, first: int
) -> Tensor:
    """The commit mask `[b, T]`, row by row; see `fdpp.rules.dawn.commit`, with the edges E `[b, T, S]` as bool."""
    committed = torch.zeros_like(candidate)
    for b in range(confidence.shape[0]):
        c, masked = confidence[b].double(), candidate[b]
        among = E[b, :, first : first + c.shape[0]]
        high = masked & (c >= rule.tau_high)
        anchored = (E[b] & (committed_confidence[b].double() >= ANCHOR)).any(1)
        induced = masked & anchored & (c >= rule.tau_induce)
        blocked = (among & high & induced).any(1)
        free = masked & (c >= rule.tau_low) & ~high & ~induced & ~blocked
        chosen: list[int] = []
        for i in sorted(free.nonzero().flatten().tolist(), key=lambda i: (-float(c[i]), i)):
            if not any(among[i, j] or among[j, i] for j in chosen):
                chosen.append(i)
        committed[b] = high | induced
        committed[b, chosen] = True
        if masked.any() and not committed[b].any():
            committed[b, int(torch.where(masked, c, -1.0).argmax())] = True
    return committed
