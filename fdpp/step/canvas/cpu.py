"""`denoise_canvas` on the CPU: vectorised PyTorch over the rows of unfinished sequences alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fdpp.rules.entropy_bound import entropy_bound
from fdpp.step.canvas.outcome import CanvasStep
from fdpp.step.cpu import CHUNK, rows_of
from fdpp.step.draw import column, draw
from fdpp.step.noise import GROUP, group_gumbel, place, renoise

LOWEST = torch.finfo(torch.float32).min
LN_2, LOG2_E = math.log(2.0), math.log2(math.e)

NOISE = 8
"""Chunks whose noise is made at a time: 2^14 counters, so that an operator's overhead is small and its tensors, 128 kB
each, stay in the cache. Noise of one chunk at a time takes three times as long."""


def denoise_canvas(
    logits: Tensor,
    canvas: Tensor,
    argmax: Tensor,
    finished: Tensor | None,
    numbers: Tensor,
    seeds: Tensor,
    softcap: float,
) -> CanvasStep:
    """See `fdpp.step.canvas.operator.denoise_op`."""
    B, T, V = logits.shape
    running = torch.arange(B, device="cpu") if finished is None else (~finished).nonzero()[:, 0]
    positions = torch.arange(T, device="cpu")
    bound, temperature = numbers.expand(B, 2)[running].unbind(1)
    b, t = running.repeat_interleave(T), positions.repeat(len(running))
    sample, best, entropy, lse = summaries(logits, b, t, temperature.repeat_interleave(T), seeds[b], softcap)

    out_sample, out_argmax, out_canvas = canvas.clone(), argmax.clone(), canvas.clone()
    out_entropy, out_lse = (logits.new_zeros(B, T, dtype=torch.float32) for _ in range(2))
    out_accepted, mean = torch.zeros_like(canvas, dtype=torch.bool), out_entropy.new_zeros(B)
    if len(b):
        entropy, sample = entropy.view(-1, T), sample.view(-1, T)
        accepted = accept(entropy, bound)
        fresh = renoise(seeds[b], t, V).view(-1, T)
        out_sample[running], out_argmax[running] = sample, best.view(-1, T)
        out_canvas[running] = torch.where(accepted, sample, fresh)
        out_entropy[running], out_lse[running], out_accepted[running] = entropy, lse.view(-1, T), accepted
        mean[running] = entropy.double().mean(1).float()
    return CanvasStep(out_canvas, out_sample, out_argmax, out_entropy, out_lse, out_accepted, mean)


def accept(entropy: Tensor, bound: Tensor) -> Tensor:
    """The positions `[R, T]` that the `bound` `[R]` accepts, by their entropies `[R, T]`, +inf of unusable rows."""
    key, order = entropy.double().sort(dim=1, stable=True)
    within = getattr(entropy_bound, "fn", entropy_bound)
    n = torch.arange(1, key.shape[1] + 1, device="cpu")
    ok = within(n, key, key.cumsum(1), bound[:, None], 0.0) & (key < torch.inf)
    longest = (ok * n).amax(1, keepdim=True)
    return torch.empty_like(ok).scatter_(1, order, n <= longest)


def summaries(
    logits: Tensor, b: Tensor, t: Tensor, temperature: Tensor, seeds: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample, argmax, entropy and lse `[n]` of the positions `t` `[n]` in sequences `b` `[n]`."""
    n, V = b.shape[0], logits.shape[2]
    sample, argmax = b.new_empty(n), b.new_empty(n)
    entropy, lse = logits.new_empty(n, dtype=torch.float32), logits.new_empty(n, dtype=torch.float32)
    at_once = max(CHUNK // V, 1)
    for first in range(0, n, at_once * NOISE):
        of_noise = slice(first, min(first + at_once * NOISE, n))
        noise = group_gumbel(seeds[of_noise], t[of_noise], -(-V // GROUP)).mul_(LOG2_E)
        for start in range(first, of_noise.stop, at_once):
            at = slice(start, min(start + at_once, n))
            rows = processed(rows_of(logits, b[at], t[at]).float(), temperature[at], softcap, LOG2_E)
            noise_here = noise[start - first : at.stop - first]
            sample[at], argmax[at], entropy[at], lse[at] = summarize(rows, noise_here, seeds[at], t[at])
    awkward = ~entropy.isfinite()
    if awkward.any():
        b, t, seeds = b[awkward], t[awkward], seeds[awkward]
        rows = processed(rows_of(logits, b, t).float(), temperature[awkward], softcap)
        sample[awkward], argmax[awkward], entropy[awkward], lse[awkward] = summarize_any(rows, seeds, t)
    return sample, argmax, entropy, lse


def processed(outputs: Tensor, temperature: Tensor, softcap: float, scale: float = 1.0) -> Tensor:
    """`scale` * l / t `[n, V]` of a head's `outputs`, float32 and in place; the temperatures t are `[n]` float64."""
    factor = (scale / temperature).float()[:, None]
    if softcap:
        return outputs.div_(softcap).tanh_().mul_(factor * softcap)
    return outputs.mul_(factor)


def summarize(bits: Tensor, noise: Tensor, seeds: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample, argmax, entropy in nats and lse `[n]` of `bits` `[n, V]` = x log2(e), which are overwritten.

    Groups are exponentiated once, for their mass and their share of the entropy. `noise` `[n, groups]` is log2(e) times
    the groups'. The entropy is no finite number of rows with NaN or +inf, or with nothing above the lowest float32.
    """
    V = bits.shape[1]
    # Not -inf, since -inf - -inf would be NaN.
    bits = F.pad(bits.clamp_(min=LOWEST), (0, -V % GROUP), value=LOWEST)
    distance = bits.unflatten(1, (-1, GROUP))
    peak = distance.amax(2)
    distance.sub_(peak[..., None])
    mass = distance.exp2()
    rows = torch.arange(len(bits), device="cpu")
    # Sums of 64 by a matrix product, which reads them once.
    ones = bits.new_ones(GROUP)
    total = mass @ ones

    scores = peak + total.log2().add_(noise)
    group = scores.argmax(1)
    sample = group * GROUP + column(mass[rows, group], place(seeds, t, group))

    top, where = peak.max(1)
    inside = distance[rows, where].argmax(1)
    argmax = where * GROUP + inside
    # All but the largest: 1 + rest would lose what little a certain position leaves.
    own = mass[rows, where].scatter_(1, inside[:, None], 0.0).sum(1)
    moment = distance.mul_(mass) @ ones
    gap = (peak - top[:, None]).clamp_(min=-1e4)
    weight = gap.exp2()
    slope = -(weight * (moment + gap * total)).sum(1)
    rest = own + (weight * total).scatter_(1, where[:, None], 0.0).sum(1)
    log_rest = rest.log1p()
    entropy = (log_rest + LN_2 * slope / (1.0 + rest)).masked_fill_(top <= LOWEST, torch.nan)
    return sample, argmax, entropy, LN_2 * top + log_rest


def summarize_any(x: Tensor, seeds: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`summarize` of any `x` `[n, V]` float32, and slow."""
    clean = x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    log_p = clean.log_softmax(1)
    entropy = -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(1)
    unusable = x.isnan().any(1) | ~(x.amax(1).abs() < torch.inf)
    sample = torch.where(unusable, renoise(seeds, t, x.shape[1]), draw(x, seeds, t, 1.0)[1])
    entropy, lse = entropy.masked_fill(unusable, torch.inf), clean.logsumexp(1).masked_fill(unusable, torch.nan)
    return sample, clean.argmax(1), entropy, lse
