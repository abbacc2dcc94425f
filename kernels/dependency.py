"""DAWN's dependency graph from queries and keys, and the independent set on it (Luo et al., arXiv 2602.06953).

The averaged attention A[i, j] is the mean of exp(s_ij - lse_i) over heads and layers. There are three passes; none of
them writes a value per query and key:

1. `lse_kernel`: every query's log-sum-exp, per layer and head.
2. `column_kernel`: the attention a key receives, summed over the fed queries, per layer and head; `[layers * H, S]` in
   float32, added up in a fixed order later, so a sequence's sinks do not depend on its batch.
3. `edges_kernel`: A of the block's queries alone, tile by tile in registers, reduced to one bit per key.

Scores are recomputed in every pass: the queries and keys of a few layers are small beside the model's weights. Layers
are separate tensors of equal strides, handed over as tuples, so no key is copied. Exponents are to base 2.
"""

from typing import NamedTuple

import triton
import triton.language as tl


class Inputs(NamedTuple):
    """What all passes read.

    Attributes:
        queries, own: the fed columns' queries and keys, per layer.
        shared: the keys of all columns, per layer; not read unless HAS_SHARED.
        mask: `[b, S]`, zero at padding; not read unless HAS_MASK.
    """

    queries: tuple[tl.tensor, ...]
    own: tuple[tl.tensor, ...]
    shared: tuple[tl.tensor, ...]
    mask: tl.tensor


class Strides(NamedTuple):
    """Strides of rows, heads and columns of the queries and keys, the same in every layer."""

    queries: tuple[tl.tensor, tl.tensor, tl.tensor]
    own: tuple[tl.tensor, tl.tensor, tl.tensor]
    shared: tuple[tl.tensor, tl.tensor, tl.tensor]


class Layout(NamedTuple):
    """Where the fed columns stand among all, `start..start+n` of `S`, and where their queries and keys lie."""

    strides: Strides
    start: tl.tensor
    n: tl.tensor
    S: tl.tensor


class Case(NamedTuple):
    """What all passes are compiled for.

    Attributes:
        H: heads.
        HD: channels of a head, rounded up to a power of two in BLOCK_D.
        GROUP: heads that share one head of keys.
        BRANCHES: rows that share the keys of one sequence.
        PRECISION: of products in float32.
    """

    H: int
    HD: int
    BLOCK_D: int
    GROUP: int
    BRANCHES: int
    LAYERS: int
    HAS_SHARED: bool
    HAS_MASK: bool
    PRECISION: str


@triton.jit
def pick(pointers, i, COUNT: tl.constexpr):
    """`pointers[i]` for an `i` that only the device knows; all of them are aligned to 16 bytes.

    As integers, since AMD's backend cannot select pointers.
    """
    chosen = pointers[0].to(tl.int64)
    for j in tl.static_range(1, COUNT):
        chosen = tl.where(i == j, pointers[j].to(tl.int64), chosen)
    return tl.multiple_of(chosen.to(pointers[0].dtype), 16)


@triton.jit
def load_queries(inputs, layout, i_r, i_h, o_q, CASE: tl.constexpr):
    """Queries `[BLOCK_Q, BLOCK_D]` of row `i_r`, layer `i_h // H` and head `i_h % H`, zero outside."""
    o_d = tl.arange(0, CASE.BLOCK_D)
    query, i_h = pick(inputs.queries, i_h // CASE.H, CASE.LAYERS), i_h % CASE.H
    strides = layout.strides.queries
    row = query + i_r.to(tl.int64) * strides[0] + i_h * strides[1] + o_q.to(tl.int64) * strides[2]
    m_q, m_d = o_q < layout.n, o_d < CASE.HD
    return tl.load(row[:, None] + o_d[None, :], mask=m_q[:, None] & m_d[None, :], other=0.0)


@triton.jit
def scores(b_q, inputs, layout, i_r, i_h, o_k, CASE: tl.constexpr):
    """Scores `[BLOCK_Q, BLOCK_K]` of columns `o_k`, to base 2, -inf at padding and beyond the end.

    A row's own keys stand in columns `start..start+n`; the others are those of its sequence, row // BRANCHES.
    """
    i_b = (i_r // CASE.BRANCHES).to(tl.int64)
    o_d = tl.arange(0, CASE.BLOCK_D)
    m_k = o_k < layout.S
    m_d = o_d < CASE.HD
    m_own = (o_k >= layout.start) & (o_k < layout.start + layout.n)
    i_layer, i_kv = i_h // CASE.H, i_h % CASE.H // CASE.GROUP
    strides = layout.strides.own
    row = pick(inputs.own, i_layer, CASE.LAYERS) + i_r.to(tl.int64) * strides[0] + i_kv * strides[1]
    row += (o_k - layout.start).to(tl.int64) * strides[2]
    b_k = tl.load(row[None, :] + o_d[:, None], mask=m_own[None, :] & m_d[:, None], other=0.0)
    if CASE.HAS_SHARED:
        # Two masked loads, for the same reason as in `pick`.
        strides = layout.strides.shared
        row = pick(inputs.shared, i_layer, CASE.LAYERS) + i_b * strides[0] + i_kv * strides[1]
        row += o_k.to(tl.int64) * strides[2]
        m_stored = m_k & (m_own == 0)
        b_k += tl.load(row[None, :] + o_d[:, None], mask=m_stored[None, :] & m_d[:, None], other=0.0)
    if CASE.HAS_MASK:
        m_k = m_k & (tl.load(inputs.mask + i_b * layout.S + o_k, mask=m_k, other=0) != 0)
    b_score = tl.dot(b_q, b_k, input_precision=CASE.PRECISION) * (1.4426950408889634 / CASE.HD**0.5)
    return tl.where(m_k[None, :], b_score, float("-inf"))


# Triton specialises every element of a tuple. Numbers that must not be specialised are arguments of their own.
@triton.jit(do_not_specialize=["start", "n", "S"])
def lse_kernel(inputs, lse, strides, start, n, S, CASE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Grid (query tiles, layers * H, rows): `lse` `[rows, layers * H, n]` float32, to base 2."""
    layout = Layout(strides, start, n, S)
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    o_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = load_queries(inputs, layout, i_r, i_h, o_q, CASE)
    b_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_Q,), tl.float32)
    for i_k in range(0, S, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_score = scores(b_q, inputs, layout, i_r, i_h, o_k, CASE)
        b_next = tl.maximum(b_top, tl.max(b_score, 1))
        # A tile may hold nothing but padding, before any key was seen.
        b_base = tl.where(b_next == float("-inf"), 0.0, b_next)
        b_sum = b_sum * tl.exp2(b_top - b_base) + tl.sum(tl.exp2(b_score - b_base[:, None]), 1)
        b_top = b_next
    plane = i_r.to(tl.int64) * CASE.LAYERS * CASE.H + i_h
    tl.store(lse + plane * n + o_q, b_top + tl.log2(b_sum), mask=o_q < n)


@triton.jit(do_not_specialize=["start", "n", "S"])
def column_kernel(
    inputs, lse, column, strides, start, n, S, CASE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Grid (key tiles, layers * H, rows): `column` `[rows, layers * H, S]` float32, sums over the real queries."""
    layout = Layout(strides, start, n, S)
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    i_b = (i_r // CASE.BRANCHES).to(tl.int64)
    plane = i_r.to(tl.int64) * CASE.LAYERS * CASE.H + i_h
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_column = tl.zeros((BLOCK_K,), tl.float32)
    for i_q in range(0, n, BLOCK_Q):
        o_q = i_q + tl.arange(0, BLOCK_Q)
        m_q = o_q < n
        b_q = load_queries(inputs, layout, i_r, i_h, o_q, CASE)
        b_score = scores(b_q, inputs, layout, i_r, i_h, o_k, CASE)
        b_lse = tl.load(lse + plane * n + o_q, mask=m_q, other=0.0)
        if CASE.HAS_MASK:
            m_q = m_q & (tl.load(inputs.mask + i_b * S + start + o_q, mask=m_q, other=0) != 0)
        b_column += tl.sum(tl.where(m_q[:, None], tl.exp2(b_score - b_lse[:, None]), 0.0), 0)
    tl.store(column + plane * S + o_k, b_column, mask=o_k < S)


@triton.jit
def averaged_attention(inputs, lse, column, layout, i_r, o_q, o_k, CASE: tl.constexpr):
    """A `[BLOCK_Q, BLOCK_K]`, and the attention `[BLOCK_K]` its columns receive from all fed queries together."""
    b_mean = tl.zeros((o_q.shape[0], o_k.shape[0]), tl.float32)
    b_column = tl.zeros((o_k.shape[0],), tl.float32)
    for i_h in range(0, CASE.LAYERS * CASE.H):
        b_q = load_queries(inputs, layout, i_r, i_h, o_q, CASE)
        b_score = scores(b_q, inputs, layout, i_r, i_h, o_k, CASE)
        plane = i_r.to(tl.int64) * CASE.LAYERS * CASE.H + i_h
        b_lse = tl.load(lse + plane * layout.n + o_q, mask=o_q < layout.n, other=0.0)
        b_mean += tl.exp2(b_score - b_lse[:, None])
        b_column += tl.load(column + plane * layout.S + o_k, mask=o_k < layout.S, other=0.0)
    return b_mean / (CASE.LAYERS * CASE.H), b_column / (CASE.LAYERS * CASE.H)


@triton.jit(do_not_specialize=["start", "n", "S", "first", "T"])
def edges_kernel(
    inputs,
    lse,
    column,
    real_queries,
    bits,
    strides,
    start,
    n,
    S,
    first,
    T,
    tau_sink,
    tau_edge,
    CASE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (words, query tiles of the block, rows): `bits` `[rows, T, words]` int32; BLOCK_K is a word's 32 columns."""
    i_w, i_r = tl.program_id(0), tl.program_id(2)
    i_b = i_r // CASE.BRANCHES
    o_t, o_k = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q), i_w * BLOCK_K + tl.arange(0, BLOCK_K)
    # The last tile's spare rows are other queries or none; their bits are not stored.
    o_q = first - start + o_t
    b_mean, b_column = averaged_attention(inputs, lse, column, Layout(strides, start, n, S), i_r, o_q, o_k, CASE)
    m_k = o_k < S
    fed = n
    if CASE.HAS_MASK:
        fed = tl.load(real_queries + i_b)
        m_k = m_k & (tl.load(inputs.mask + i_b.to(tl.int64) * S + o_k, mask=m_k, other=0) != 0)
    m_k = m_k & (b_column <= tau_sink * fed)
    m_edge = (b_mean >= tau_edge) & m_k[None, :] & (o_k[None, :] != (first + o_t)[:, None])
    b_word = tl.sum(m_edge.to(tl.int32) << tl.arange(0, BLOCK_K)[None, :], 1)
    tl.store(bits + (i_r.to(tl.int64) * T + o_t) * tl.num_programs(0) + i_w, b_word, mask=o_t < T)


@triton.jit(do_not_specialize=["S", "T", "words", "first"])
def independent_kernel(
    confidence,
    candidate,
    committed_confidence,
    bits,
    committed,
    S,
    T,
    words,
    first,
    high,
    induce,
    low,
    anchor,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Grid (rows): all clauses of the rule and the greedy independent set of one sequence (see `fdpp.rules.dawn`).

    Each round adds the most confident free position, the lower one of equals, and drops its neighbours. Both directions
    of its edges are read from the bits, so the block's graph is never unpacked.
    """
    i_r = tl.program_id(0).to(tl.int64)
    o_t, o_bit = tl.arange(0, BLOCK_T), tl.arange(0, 32)
    m_t = o_t < T
    b_confidence = tl.load(confidence + i_r * T + o_t, mask=m_t, other=0.0)
    m_candidate = m_t & (tl.load(candidate + i_r * T + o_t, mask=m_t, other=0) != 0)
    rows = bits + (i_r * T + o_t) * words

    b_anchored = tl.zeros((BLOCK_T,), tl.int32)
    for i_w in range(0, words, BLOCK_W):
        o_w = i_w + tl.arange(0, BLOCK_W)
        o_s = o_w[:, None] * 32 + o_bit[None, :]
        b_known = tl.load(committed_confidence + i_r * S + o_s, mask=o_s < S, other=0.0)
        b_word = tl.sum((b_known >= anchor).to(tl.int32) << o_bit[None, :], 1)
        b_bits = tl.load(rows[:, None] + o_w[None, :], mask=m_t[:, None] & (o_w < words)[None, :], other=0)
        b_anchored |= tl.max(((b_bits & b_word[None, :]) != 0).to(tl.int32), 1)

    m_high = m_candidate & (b_confidence >= high)
    m_induced = m_candidate & (b_anchored != 0) & (b_confidence >= induce)
    b_blocked = tl.zeros((BLOCK_T,), tl.int32)
    for i_w in range(first // 32, (first + T - 1) // 32 + 1):
        o_in_word = first + o_t - i_w * 32
        m_sure = m_high & m_induced & (o_in_word >= 0) & (o_in_word < 32)
        word = tl.sum(m_sure.to(tl.int32) << (o_in_word & 31), 0)
        b_blocked |= tl.load(rows + i_w, mask=m_t, other=0) & word

    m_commit = m_high | m_induced
    m_free = m_candidate & (b_confidence >= low) & (m_commit == 0) & (b_blocked == 0)
    b_rank = tl.where(m_free, b_confidence, -1.0)
    best, i_best = tl.max(b_rank, 0, return_indices=True, return_indices_tie_break_left=True)
    o_column = first + o_t
    while best >= 0.0:
        b_out = tl.load(bits + (i_r * T + i_best) * words + o_column // 32, mask=m_t, other=0) >> (o_column & 31)
        b_in = tl.load(rows + (first + i_best) // 32, mask=m_t, other=0) >> ((first + i_best) & 31)
        m_commit = m_commit | (o_t == i_best)
        b_rank = tl.where((((b_out | b_in) & 1) != 0) | (o_t == i_best), -1.0, b_rank)
        best, i_best = tl.max(b_rank, 0, return_indices=True, return_indices_tie_break_left=True)

    b_rank = tl.where(m_candidate, b_confidence, -1.0)
    _, i_best = tl.max(b_rank, 0, return_indices=True, return_indices_tie_break_left=True)
    nothing = tl.max(m_commit.to(tl.int32), 0) == 0
    m_commit = m_commit | (m_candidate & nothing & (o_t == i_best))
    tl.store(committed + i_r * T + o_t, m_commit, mask=m_t)
