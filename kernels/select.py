"""One denoising step in one launch: logits and tokens in, tokens with the committed proposals out."""

import triton
import triton.language as tl

from fdpp.kernels.decide import decide, store_partial
from fdpp.kernels.draw import inverse
from fdpp.kernels.ticket import is_last
from fdpp.kernels.vocab import summarize_row


# Tokens may be a slice of a longer row and so start anywhere; reads of single elements gain nothing from alignment.
@triton.jit(
    do_not_specialize=["B", "T", "stride_pb", "mask_id"],
    do_not_specialize_on_alignment=["tokens", "active", "numbers", "seeds"],
)
def select_kernel(
    logits,
    tokens,
    active,
    numbers,
    seeds,
    out,
    partial,
    ticket,
    B,
    T,
    V,
    stride_lb,
    stride_lt,
    stride_pb,
    split_len,
    mask_id,
    temperature,
    ACCEPTS: tl.constexpr,
    ORDER: tl.constexpr,
    SAMPLED: tl.constexpr,
    TEMPERED: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    COUNT_RANKS: tl.constexpr,
):
    """Grid (B * T * SPLITS): each program summarizes one split of one masked row; a sequence's last one decides.

    Nobody waits: every program writes its summary and takes a ticket, and the one that draws the last ticket of its
    sequence merges, ranks, applies the rule and writes all outputs. It also resets the ticket for the next launch.
    """
    scale = 1.0
    if TEMPERED:
        scale, temperature = inverse(temperature), 1.0
    i_s = tl.program_id(0) % SPLITS
    i_t = tl.program_id(0) // SPLITS % T
    i_b = tl.program_id(0) // SPLITS // T

    wanted = tl.load(tokens + i_b.to(tl.int64) * T + i_t) == mask_id
    if HAS_ACTIVE:
        wanted = wanted & (tl.load(active + i_b.to(tl.int64) * T + i_t) != 0)
    if wanted:
        seed = tl.load(seeds + i_b) if SAMPLED else 0
        row = logits + i_b.to(tl.int64) * stride_lb + i_t.to(tl.int64) * stride_lt
        start = i_s * split_len
        stop = tl.minimum(start + split_len, V)
        summary = summarize_row(row, start, stop, mask_id, seed, i_t, temperature, scale, SAMPLED, ORDER, BLOCK_V)
        i_bt = i_b.to(tl.int64) * T + i_t
        store_partial(partial, i_bt, i_s, None, summary, B, T, SAMPLED, ORDER, SPLITS)

    if is_last(ticket + i_b, T * SPLITS):
        decide(
            tokens,
            active,
            numbers,
            out,
            partial,
            logits + i_b.to(tl.int64) * stride_lb + mask_id,
            i_b,
            B,
            T,
            V,
            stride_lt,
            stride_pb,
            mask_id,
            scale,
            ACCEPTS,
            ORDER,
            SAMPLED,
            HAS_ACTIVE,
            SPLITS,
            BLOCK_T,
            COUNT_RANKS,
        )
