"""Which of a block's candidates commit, by confidence and edges."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fdpp.kernels.dependency import independent_kernel
from fdpp.rules.dawn.edges import WORD, Thresholds, unpack_bits
from fdpp.selection import MAX_POSITIONS, expect

ANCHOR = 0.9
"""A committed position induces those that attend to it if its own softmax maximum is at least this, as published."""


def single(x: float) -> float:
    """`x` rounded to the 24 bits of a float32 (Veltkamp's splitting); by arithmetic alone, which compiles."""
    wide = x * (2.0**29 + 1.0)
    return wide - (wide - x)


def at_least(tau: float) -> float:
    """The least float32 that is not below `tau`: a float32 confidence is >= tau exactly where it is >= that."""
    rounded = single(tau)
    # Half to one and a quarter of its last bit more is the next float32.
    return rounded if rounded >= tau else single(rounded * (1.0 + 1.25 * 2.0**-24))


def commit(
    confidence: Tensor, candidate: Tensor, committed_confidence: Tensor, edges: Tensor, *, rule: Thresholds, first: int
) -> Tensor:
    """Which of a block's candidates commit: bool `[b, T]`; the clauses are those of `Dawn`.

    Args:
        confidence: `[b, T]` float32, of the block's positions, columns `first..first+T`; 0 at unusable ones.
        candidate: `[b, T]` bool, the masked positions that may commit; no other ever does.
        committed_confidence: `[b, S]` float32, the softmax maximum at every committed column (prompts too), 0 at
            masked and at padding columns.
        edges: int32 `[b, T, ceil(S / 32)]`, as `dependency_edges` returns them.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    b, T = confidence.shape
    S = committed_confidence.shape[1]
    for name, value, shape, dtype in (
        ("confidence", confidence, (b, T), torch.float32),
        ("candidate", candidate, (b, T), torch.bool),
        ("committed_confidence", committed_confidence, (b, S), torch.float32),
        ("edges", edges, (b, T, -(-S // WORD)), torch.int32),
    ):
        expect(name, value, shape, dtype, confidence.device)
    if not 0 <= first <= first + T <= S or T > MAX_POSITIONS:
        raise ValueError(f"first: expected a block of at most {MAX_POSITIONS} of {S} columns, got {T} at {first}")
    high, induce, low = at_least(rule.tau_high), at_least(rule.tau_induce), at_least(rule.tau_low)
    arguments = (confidence, candidate, committed_confidence, edges, first, high, induce, low)
    if torch.compiler.is_compiling():
        return commit_op(*arguments)
    return (commit_cpu if confidence.device.type == "cpu" else commit_gpu)(*arguments)


def commit_cpu(
    confidence: Tensor,
    candidate: Tensor,
    committed_confidence: Tensor,
    edges: Tensor,
    first: int,
    high: float,
    induce: float,
    low: float,
) -> Tensor:
    """`commit` in PyTorch, all sequences at once; the thresholds are float32 numbers."""
    T, S = confidence.shape[1], committed_confidence.shape[1]
    E = unpack_bits(edges, S)
    among = E[:, :, first : first + T]
    sure = candidate & (confidence >= high)
    anchored = (E & (committed_confidence >= at_least(ANCHOR))[:, None]).any(2)
    induced = candidate & anchored & (confidence >= induce)
    blocked = (among & (sure & induced)[:, None]).any(2)
    committed = sure | induced
    free = candidate & (confidence >= low) & ~committed & ~blocked
    conflict = among | among.transpose(1, 2) | torch.eye(T, dtype=torch.bool, device=E.device)
    row = torch.arange(confidence.shape[0], device=E.device)
    while bool(free.any()):
        best = torch.where(free, confidence, -1.0).argmax(1)
        committed[row, best] |= free[row, best]
        free = free & ~(conflict[row, best] & free[row, best, None])
    best = torch.where(candidate, confidence, -1.0).argmax(1)
    committed[row, best] |= candidate[row, best] & ~committed.any(1)
    return committed


def commit_gpu(
    confidence: Tensor,
    candidate: Tensor,
    committed_confidence: Tensor,
    edges: Tensor,
    first: int,
    high: float,
    induce: float,
    low: float,
) -> Tensor:
    """`commit` in one launch, a program per sequence."""
    b, T = confidence.shape
    committed = torch.empty(b, T, dtype=torch.bool, device=confidence.device)
    if b == 0 or T == 0:
        return committed
    block_t = max(triton.next_power_of_2(T), 2)
    with torch.cuda.device_of(confidence):
        independent_kernel[(b,)](
            confidence.contiguous(),
            candidate.contiguous(),
            committed_confidence.contiguous(),
            edges.contiguous(),
            committed,
            committed_confidence.shape[1],
            T,
            edges.shape[2],
            first,
            high,
            induce,
            low,
            at_least(ANCHOR),
            BLOCK_T=block_t,
            # At most 4096 words of edges at a time, 16 a thread with 8 warps.
            BLOCK_W=min(16, max(4096 // block_t, 1)),
            # A short block's reductions then stay within one warp, without a barrier.
            num_warps=1 if block_t <= 32 else 4 if block_t <= 256 else 8,
            enable_fp_fusion=True,
        )
    return committed


@torch.library.custom_op("fdpp::dawn_commit", mutates_args=(), device_types="cpu")
def commit_op(
    confidence: Tensor,
    candidate: Tensor,
    committed_confidence: Tensor,
    edges: Tensor,
    first: int,
    high: float,
    induce: float,
    low: float,
) -> Tensor:
    """`fdpp::dawn_commit`, see `commit`; the thresholds are float32 numbers."""
    return commit_cpu(confidence, candidate, committed_confidence, edges, first, high, induce, low)


@commit_op.register_kernel("cuda")
def _(confidence, candidate, committed_confidence, edges, first, high, induce, low):  # type: ignore[no-untyped-def]
    return commit_gpu(confidence, candidate, committed_confidence, edges, first, high, induce, low)


@commit_op.register_fake
def _(confidence, candidate, committed_confidence, edges, first, high, induce, low):  # type: ignore[no-untyped-def]
    return candidate.new_empty(candidate.shape)
