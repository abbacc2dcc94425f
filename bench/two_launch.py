"""A threshold step in two Triton launches, one program per row, then one per sequence: a yardstick for the fused one.

This is how serving engines select with Triton today; the rule is a threshold, which needs no sorted profile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V, NUM_WARPS = 4096, 8


@triton.jit
def propose_kernel(logits, tokens, out_proposal, out_confidence, V, stride_row, mask_id, BLOCK_V: tl.constexpr):
    """Argmax and softmax confidence of one masked row, in one pass with a running maximum per lane."""
    i_row = tl.program_id(0).to(tl.int64)
    if tl.load(tokens + i_row) == mask_id:
        o_lane = tl.arange(0, BLOCK_V)
        b_top = tl.full([BLOCK_V], -1e30, tl.float32)
        b_sum = tl.zeros([BLOCK_V], tl.float32)
        b_best = tl.zeros([BLOCK_V], tl.int32)
        for i_v in range(0, V, BLOCK_V):
            o_v = i_v + o_lane
            b_logit = tl.load(logits + i_row * stride_row + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
            b_new = tl.maximum(b_top, b_logit)
            b_sum = b_sum * tl.exp(b_top - b_new) + tl.exp(b_logit - b_new)
            b_best = tl.where(b_logit > b_top, o_v, b_best)
            b_top = b_new
        top = tl.max(b_top, 0)
        total = tl.sum(b_sum * tl.exp(b_top - top), 0)
        tl.store(out_proposal + i_row, tl.min(tl.where(b_top == top, b_best, V), 0))
        tl.store(out_confidence + i_row, 1.0 / total)


@triton.jit
def commit_kernel(tokens, proposal, confidence, out_tokens, T, mask_id, tau, BLOCK_T: tl.constexpr):
    """Commit what reaches the threshold in one sequence, and its most confident masked position."""
    o_t = tl.arange(0, BLOCK_T)
    m_t = o_t < T
    o_row = tl.program_id(0).to(tl.int64) * T + o_t
    b_token = tl.load(tokens + o_row, mask=m_t, other=-1)
    m_masked = m_t & (b_token == mask_id)
    b_confidence = tl.load(confidence + o_row, mask=m_masked, other=-1.0)
    b_proposal = tl.load(proposal + o_row, mask=m_masked, other=0)
    best = tl.min(tl.where(b_confidence == tl.max(b_confidence, 0), o_t, BLOCK_T), 0)
    m_commit = m_masked & ((b_confidence >= tau) | (o_t == best))
    tl.store(out_tokens + o_row, tl.where(m_commit, b_proposal, b_token), mask=m_t)


def select(logits: Tensor, tokens: Tensor, mask_id: int, tau: float) -> Tensor:
    """New tokens `[B, T]` of one step on `logits` `[B, T, V]`, contiguous."""
    B, T, V = logits.shape
    proposal, out_tokens = torch.empty_like(tokens), torch.empty_like(tokens)
    confidence = torch.empty(B, T, dtype=torch.float32, device=tokens.device)
    block_v = min(BLOCK_V, triton.next_power_of_2(V))
    propose_kernel[(B * T,)](
        logits, tokens, proposal, confidence, V, logits.stride(1), mask_id, BLOCK_V=block_v, num_warps=NUM_WARPS
    )
    commit_kernel[(B,)](
        tokens, proposal, confidence, out_tokens, T, mask_id, tau, BLOCK_T=max(triton.next_power_of_2(T), 2)
    )
    return out_tokens
