"""Self-conditioning: what a canvas step tells the next forward, without a canvas of float32 logits or probabilities.

DiffusionGemma's decoder takes the processed logits x = l / t, rounded, and makes softmax(x) @ E of them. The step knows
log sum exp(x) already, so the product can be summed over slabs of the vocabulary as they are made: `soft_embeddings`
keeps no probabilities but a slab's and never rounds x.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from fdpp.kernels.conditioning import process_kernel, weights_kernel
from fdpp.kernels.launch import CONDITIONING_BLOCK_V, CONDITIONING_WARPS, conditioning_slab
from fdpp.selection import DTYPES, expect
from fdpp.step import cpu

DENSE = torch.contiguous_format

SLAB = 1024
"""Ids that the CPU multiplies at a time: their embeddings are 12 MB in float32 at DiffusionGemma's width and stay in
L3. From 512 to 4096 ids take as long; the product is 19 parts in 20 of it. One in bfloat16 takes half as long where the
CPU has instructions for it, but its sums come rounded to bfloat16: added up, they are no better than transformers'."""


def check(logits: Tensor, numbers: Tensor, softcap: float, finished: Tensor | None) -> None:
    """Raise `ValueError` that names the argument, what was expected and what came."""
    if logits.dim() != 3 or logits.dtype not in DTYPES or logits.shape[2] == 0:
        raise ValueError(
            f"logits: expected [B, T, V] in bfloat16, float16 or float32, got {list(logits.shape)} in {logits.dtype}"
        )
    if logits.device.type not in ("cpu", "cuda"):
        raise ValueError(f"logits: expected a CPU or CUDA tensor, got {logits.device}")
    B = logits.shape[0]
    expect("numbers", numbers, (1 if numbers.shape[:1] == (1,) else B, 2), torch.float64, logits.device)
    if not 0.0 <= softcap < float("inf"):
        raise ValueError(f"softcap: expected a finite number of at least 0, got {softcap!r}")
    if finished is not None:
        expect("finished", finished, (B,), torch.bool, logits.device)


def unfinished(B: int, finished: Tensor | None) -> list[int]:
    """The sequences that go on, where that may be asked without waiting for a device."""
    return list(range(B)) if finished is None else (~finished).nonzero().flatten().tolist()


def temper_(x: Tensor, softcap: float, temperature: float) -> Tensor:
    """x = l / t in place of a head's outputs `x`, float32, in the order of operations that transformers has."""
    if softcap:
        x.div_(softcap).tanh_().mul_(softcap)
    return x.div_(temperature)


def process_cpu(
    logits: Tensor, numbers: Tensor, softcap: float, dtype: torch.dtype, finished: Tensor | None, before: Tensor | None
) -> Tensor:
    """`fdpp::processed_logits` in PyTorch, `cpu.CHUNK` logits at a time."""
    B, T, V = logits.shape
    out, active = torch.empty(B, T, V, dtype=dtype, device="cpu"), unfinished(B, finished)
    for b in set(range(B)).difference(active):
        out[b] = 0.0 if before is None else before[b]
    temperatures = numbers[:, 1].expand(B).tolist()
    at_once = max(cpu.CHUNK // V, 1)
    room = torch.empty(min(at_once, T), V, dtype=torch.float32, device="cpu")
    for b in active:
        for rows, kept in zip(logits[b].split(at_once), out[b].split(at_once), strict=True):
            kept.copy_(temper_(room[: len(rows)].copy_(rows), softcap, temperatures[b]))
    return out


def laid_out(logits: Tensor, numbers: Tensor, finished: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same as the kernels read them: ids and numbers side by side, `finished` contiguous."""
    logits, numbers = (x if x.stride(-1) == 1 else x.contiguous() for x in (logits, numbers))
    return logits, numbers, None if finished is None else finished.contiguous()


def process_gpu(
    logits: Tensor, numbers: Tensor, softcap: float, dtype: torch.dtype, finished: Tensor | None, before: Tensor | None
) -> Tensor:
    """`fdpp::processed_logits` in one launch, without a host synchronisation."""
    B, T, V = logits.shape
    logits, numbers, finished = laid_out(logits, numbers, finished)
    out = torch.empty(B, T, V, dtype=dtype, device=logits.device)
    if out.numel() == 0:
        return out
    with torch.cuda.device_of(logits):
        process_kernel[(B * T, triton.cdiv(V, CONDITIONING_BLOCK_V))](
            logits,
            numbers,
            finished,
            None if before is None or finished is None else before.contiguous(),
            out,
            T,
            V,
            logits.stride(0),
            logits.stride(1),
            numbers.stride(0) if numbers.shape[0] > 1 else 0,
            softcap,
            CAPPED=softcap > 0.0,
            BLOCK_V=CONDITIONING_BLOCK_V,
            num_warps=CONDITIONING_WARPS,
            enable_fp_fusion=True,
        )
    return out


def embed_cpu(
    logits: Tensor,
    lse: Tensor,
    numbers: Tensor,
    weight: Tensor,
    softcap: float,
    scale: float,
    finished: Tensor | None,
    before: Tensor | None,
) -> Tensor:
    """`fdpp::soft_embeddings` in PyTorch, `SLAB` ids at a time, products and sums in float32."""
    (B, T, V), D = logits.shape, weight.shape[1]
    out = weight.new_zeros(B, T, D) if before is None else before.clone(memory_format=DENSE)
    active, temperatures = unfinished(B, finished), numbers[:, 1].expand(B).tolist()
    totals = lse.new_zeros(len(active), T, D)
    room, wide = lse.new_empty(T, min(SLAB, V)), lse.new_empty(min(SLAB, V), D)
    for start in range(0, V if active else 0, SLAB):
        part = weight[start : start + SLAB]
        rows = part if part.dtype == torch.float32 else wide[: len(part)].copy_(part)
        for b, total in zip(active, totals, strict=True):
            x = temper_(room[:, : len(part)].copy_(logits[b, :, start : start + SLAB]), softcap, temperatures[b])
            total.addmm_(cpu.exp_(x.sub_(lse[b, :, None])), rows)
    for b, total in zip(active, totals, strict=True):
        out[b] = total.mul_(scale)
    return out


def slabs(
    logits: Tensor, lse: Tensor, numbers: Tensor, dtype: torch.dtype, softcap: float, finished: Tensor | None
) -> Iterator[tuple[Tensor, int]]:
    """exp(x - lse) `[B * T, n]` of slab after slab of n ids, in the same memory, and the slab's first id."""
    B, T, V = logits.shape
    size = conditioning_slab(B * T, V)
    room = torch.empty(B * T * size, dtype=dtype, device=logits.device)
    for start in range(0, V, size):
        part = logits[:, :, start : start + size]
        n = part.shape[2]
        weights = room[: B * T * n].view(B * T, n)
        weights_kernel[(B * T, triton.cdiv(n, CONDITIONING_BLOCK_V))](
            part,
            lse,
            numbers,
            finished,
            weights,
            T,
            n,
            part.stride(0),
            part.stride(1),
            numbers.stride(0) if numbers.shape[0] > 1 else 0,
            softcap,
            CAPPED=softcap > 0.0,
            BLOCK_V=CONDITIONING_BLOCK_V,
            num_warps=CONDITIONING_WARPS,
            enable_fp_fusion=True,
        )
        yield weights, start


def in_float32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in float32, summed in float32 whatever their dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    # A CPU has no such product, and Triton's interpreter leaves its slabs there.
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())


def embed_gpu(
    logits: Tensor,
    lse: Tensor,
    numbers: Tensor,
    weight: Tensor,
    softcap: float,
    scale: float,
    finished: Tensor | None,
    before: Tensor | None,
) -> Tensor:
    """`fdpp::soft_embeddings` in a launch and a library's product a slab, without a host synchronisation.

    Not by `addmm`, whose sum had to have the factors' dtype in earlier versions of PyTorch.
    """
    (B, T, _), D = logits.shape, weight.shape[1]
    logits, numbers, finished = laid_out(logits, numbers, finished)
    total = torch.zeros(B * T, D, dtype=torch.float32, device=logits.device)
    if total.numel() > 0:
        with torch.cuda.device_of(logits):
            for weights, start in slabs(logits, lse.contiguous(), numbers, weight.dtype, softcap, finished):
                total.add_(in_float32(weights, weight[start : start + weights.shape[1]]))
    out = total.mul_(scale).to(weight.dtype).view(B, T, D)
    return out if before is None or finished is None else torch.where(finished[:, None, None], before.contiguous(), out)


@torch.library.custom_op("fdpp::processed_logits", mutates_args=(), device_types="cpu")
def process_op(
    logits: Tensor, numbers: Tensor, softcap: float, dtype: torch.dtype, finished: Tensor | None, before: Tensor | None
) -> Tensor:
    return process_cpu(logits, numbers, softcap, dtype, finished, before)


@process_op.register_kernel("cuda")
def _(logits, numbers, softcap, dtype, finished, before):  # type: ignore[no-untyped-def]
    return process_gpu(logits, numbers, softcap, dtype, finished, before)


@process_op.register_fake
def _(logits, numbers, softcap, dtype, finished, before):  # type: ignore[no-untyped-def]
    return torch.empty(logits.shape, dtype=dtype, device=logits.device)


@torch.library.custom_op("fdpp::soft_embeddings", mutates_args=(), device_types="cpu")
def embed_op(
    logits: Tensor,
    lse: Tensor,
    numbers: Tensor,
    weight: Tensor,
    softcap: float,
    scale: float,
    finished: Tensor | None,
    before: Tensor | None,
) -> Tensor:
    return embed_cpu(logits, lse, numbers, weight, softcap, scale, finished, before)


@embed_op.register_kernel("cuda")
def _(logits, lse, numbers, weight, softcap, scale, finished, before):  # type: ignore[no-untyped-def]
    return embed_gpu(logits, lse, numbers, weight, softcap, scale, finished, before)


@embed_op.register_fake
def _(logits, lse, numbers, weight, softcap, scale, finished, before):  # type: ignore[no-untyped-def]
    return weight.new_empty((*logits.shape[:2], weight.shape[1]))


def processed_logits(
    logits: Tensor,
    numbers: Tensor,
    softcap: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    finished: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """x = l / t of a canvas step, which the next forward of DiffusionGemma is conditioned on, `[B, T, V]` in `dtype`.

    On a CPU bit for bit what transformers computes in float32 and rounds.

    Args:
        logits: `[B, T, V]` bfloat16, float16 or float32, rows of any stride.
        numbers: `[B or 1, 2]` float64 of any stride, (bound, temperature) as `fdpp::denoise_canvas` takes them; the
            bound is not read.
        softcap: c of l = c tanh(h / c), where `logits` are a head's outputs h; 0: they are l.
        finished: `[B]` bool, sequences whose logits are not read; None: no sequence.
        before: `[B, T, V]` in `dtype`, what finished sequences keep; None: they get 0. It is not written to.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a softcap that is out of range.
    """
    check(logits, numbers, softcap, finished)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")
    if before is not None:
        expect("before", before, tuple(logits.shape), dtype, logits.device)
        before = before.detach()
    logits = logits.detach()
    if torch.compiler.is_compiling():
        return process_op(logits, numbers, softcap, dtype, finished, before)
    implementation = process_cpu if logits.device.type == "cpu" else process_gpu
    return implementation(logits, numbers, softcap, dtype, finished, before)


def soft_embeddings(
    logits: Tensor,
    lse: Tensor,
    numbers: Tensor,
    weight: Tensor,
    softcap: float = 0.0,
    scale: float = 1.0,
    finished: Tensor | None = None,
    before: Tensor | None = None,
) -> Tensor:
    """`scale` * sum over v of exp(x_v - lse) E_v, `[B, T, D]` in the dtype of E: the expected embedding of a position.

    With the lse of a whole vocabulary those of its parts add up. On a GPU exp(x - lse) is rounded to the dtype of E, on
    a CPU it is not; sums are in float32. The lse is rounded to float32, by up to 4e-6 where it is 64. A position whose
    logits hold NaN or +inf, or nothing but -inf, gets NaN, as from a softmax, and no other position does. Its lse may
    be any of those.

    Args:
        logits, numbers, softcap, finished: as `processed_logits` takes them.
        lse: `[B, T]` float32, log sum exp(x), as `CanvasStep` has it; that of finished sequences does not matter.
        weight: E `[V, D]` bfloat16, float16 or float32, rows of any stride.
        scale: of the embeddings.
        before: `[B, T, D]` in the dtype of E, what finished sequences keep; None: they get 0. It is not written to.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a softcap that is out of range.
    """
    check(logits, numbers, softcap, finished)
    (B, T, V), device = logits.shape, logits.device
    expect("lse", lse, (B, T), torch.float32, device)
    if weight.dim() != 2 or weight.shape[0] != V or weight.dtype not in DTYPES or weight.device != device:
        raise ValueError(
            f"weight: expected [{V}, D] in bfloat16, float16 or float32 on {device}, "
            f"got {list(weight.shape)} {weight.dtype} on {weight.device}"
        )
    if before is not None:
        expect("before", before, (B, T, weight.shape[1]), weight.dtype, device)
        before = before.detach()
    logits, lse, weight = logits.detach(), lse.detach(), weight.detach()
    if torch.compiler.is_compiling():
        return embed_op(logits, lse, numbers, weight, softcap, scale, finished, before)
    implementation = embed_cpu if device.type == "cpu" else embed_gpu
    return implementation(logits, lse, numbers, weight, softcap, scale, finished, before)
