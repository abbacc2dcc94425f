"""DAWN's dependency graph from queries and keys, and the independent set on it (Luo et al., arXiv 2602.06953).

The averaged attention A[i, j] is the mean of exp(s_ij - lse_i) over heads and layers. Three passes, of which none
writes a value per query and key:

1. `lse_kernel`: every query's log-sum-exp, per layer and head.
2. `column_kernel`: the attention a key receives, summed over the fed queries, per layer and head; `[layers * H, S]` in
   float32, added up in a fixed order later, so a sequence's sinks do not depend on its batch.
3. `edges_kernel`: for the block's queries alone, A in registers, tile by tile, and out of it one bit per key.

Scores are recomputed in every pass: the queries and keys of a few layers are small beside the model's weights. Layers
are separate tensors of equal strides, handed over as tuples, so no key is copied. Exponents are to base 2.
"""

import triton
import triton.language as tl


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
def load_queries(
    queries, strides, i_r, i_h, o_q, n, H: tl.constexpr, HD: tl.constexpr, BLOCK_D: tl.constexpr, LAYERS: tl.constexpr
):
    """Queries `[BLOCK_Q, BLOCK_D]` of row `i_r`, layer `i_h // H` and head `i_h % H`, zero outside."""
    o_d = tl.arange(0, BLOCK_D)
    query, i_h = pick(queries, i_h // H, LAYERS), i_h % H
    row = query + i_r.to(tl.int64) * strides[0] + i_h * strides[1] + o_q.to(tl.int64) * strides[2]
    return tl.load(row[:, None] + o_d[None, :], mask=(o_q < n)[:, None] & (o_d < HD)[None, :], other=0.0)


@triton.jit
def scores(
    b_q,
    own,
    shared,
    mask,
    strides,
    i_r,
    i_h,
    o_k,
    start,
    n,
    S,
    H: tl.constexpr,
    HD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BRANCHES: tl.constexpr,
    LAYERS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores `[BLOCK_Q, BLOCK_K]` of columns `o_k`, to base 2, -inf at padding and behind the end.

    A row's own keys stand in columns `start..start+n`; the others are those of its sequence, row // BRANCHES.
    """
    i_b = (i_r // BRANCHES).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_k = o_k < S
    m_d = o_d < HD
    m_own = (o_k >= start) & (o_k < start + n)
    i_kv = i_h % H // GROUP
    row = pick(own, i_h // H, LAYERS) + i_r.to(tl.int64) * strides[3] + i_kv * strides[4]
    row += (o_k - start).to(tl.int64) * strides[5]
    b_k = tl.load(row[None, :] + o_d[:, None], mask=m_own[None, :] & m_d[:, None], other=0.0)
    if HAS_SHARED:
        # Two masked loads, for the same reason as in `pick`.
        row = pick(shared, i_h // H, LAYERS) + i_b * strides[6] + i_kv * strides[7] + o_k.to(tl.int64) * strides[8]
        m_stored = m_k & (m_own == 0)
        b_k += tl.load(row[None, :] + o_d[:, None], mask=m_stored[None, :] & m_d[:, None], other=0.0)
    if HAS_MASK:
        m_k = m_k & (tl.load(mask + i_b * S + o_k, mask=m_k, other=0) != 0)
    b_score = tl.dot(b_q, b_k, input_precision=PRECISION) * (1.4426950408889634 / HD**0.5)
    return tl.where(m_k[None, :], b_score, float("-inf"))


@triton.jit(do_not_specialize=["start", "n", "S"])
def lse_kernel(
    queries,
    own,
    shared,
    mask,
    lse,
    strides,
    start,
    n,
    S,
    H: tl.constexpr,
    HD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BRANCHES: tl.constexpr,
    LAYERS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (query tiles, layers * H, rows): `lse` `[rows, layers * H, n]` float32, to base 2."""
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    o_q = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_q = load_queries(queries, strides, i_r, i_h, o_q, n, H, HD, BLOCK_D, LAYERS)
    b_top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_Q,), tl.float32)
    for i_k in range(0, S, BLOCK_K):
        o_k = i_k + tl.arange(0, BLOCK_K)
        b_score = scores(
            b_q, own, shared, mask, strides, i_r, i_h, o_k, start, n, S,
            H, HD, BLOCK_D, GROUP, BRANCHES, LAYERS, HAS_SHARED, HAS_MASK, PRECISION,
        )  # fmt: skip
        b_next = tl.maximum(b_top, tl.max(b_score, 1))
        # A tile may hold nothing but padding, before any key was seen.
        b_base = tl.where(b_next == float("-inf"), 0.0, b_next)
        b_sum = b_sum * tl.exp2(b_top - b_base) + tl.sum(tl.exp2(b_score - b_base[:, None]), 1)
        b_top = b_next
    plane = i_r.to(tl.int64) * LAYERS * H + i_h
    tl.store(lse + plane * n + o_q, b_top + tl.log2(b_sum), mask=o_q < n)


@triton.jit(do_not_specialize=["start", "n", "S"])
def column_kernel(
    queries,
    own,
    shared,
    mask,
    lse,
    column,
    strides,
    start,
    n,
    S,
    H: tl.constexpr,
    HD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BRANCHES: tl.constexpr,
    LAYERS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (key tiles, layers * H, rows): `column` `[rows, layers * H, S]` float32, sums over the real queries."""
    i_h, i_r = tl.program_id(1), tl.program_id(2)
    i_b = (i_r // BRANCHES).to(tl.int64)
    plane = i_r.to(tl.int64) * LAYERS * H + i_h
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_column = tl.zeros((BLOCK_K,), tl.float32)
    for i_q in range(0, n, BLOCK_Q):
        o_q = i_q + tl.arange(0, BLOCK_Q)
        m_q = o_q < n
        b_q = load_queries(queries, strides, i_r, i_h, o_q, n, H, HD, BLOCK_D, LAYERS)
        b_score = scores(
            b_q, own, shared, mask, strides, i_r, i_h, o_k, start, n, S,
            H, HD, BLOCK_D, GROUP, BRANCHES, LAYERS, HAS_SHARED, HAS_MASK, PRECISION,
        )  # fmt: skip
        b_lse = tl.load(lse + plane * n + o_q, mask=m_q, other=0.0)
        if HAS_MASK:
            m_q = m_q & (tl.load(mask + i_b * S + start + o_q, mask=m_q, other=0) != 0)
        b_column += tl.sum(tl.where(m_q[:, None], tl.exp2(b_score - b_lse[:, None]), 0.0), 0)
    tl.store(column + plane * S + o_k, b_column, mask=o_k < S)


@triton.jit
def averaged_attention(
    queries,
    own,
    shared,
    mask,
    lse,
    column,
    strides,
    i_r,
    o_q,
    o_k,
    start,
    n,
    S,
    H: tl.constexpr,
    HD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BRANCHES: tl.constexpr,
    LAYERS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A `[BLOCK_Q, BLOCK_K]`, and the attention `[BLOCK_K]` its columns receive from all fed queries together."""
    b_mean = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    b_column = tl.zeros((BLOCK_K,), tl.float32)
    for i_h in range(0, LAYERS * H):
        b_q = load_queries(queries, strides, i_r, i_h, o_q, n, H, HD, BLOCK_D, LAYERS)
        b_score = scores(
            b_q, own, shared, mask, strides, i_r, i_h, o_k, start, n, S,
            H, HD, BLOCK_D, GROUP, BRANCHES, LAYERS, HAS_SHARED, HAS_MASK, PRECISION,
        )  # fmt: skip
        plane = i_r.to(tl.int64) * LAYERS * H + i_h
        b_lse = tl.load(lse + plane * n + o_q, mask=o_q < n, other=0.0)
        b_mean += tl.exp2(b_score - b_lse[:, None])
        b_column += tl.load(column + plane * S + o_k, mask=o_k < S, other=0.0)
    return b_mean / (LAYERS * H), b_column / (LAYERS * H)


@triton.jit(do_not_specialize=["start", "n", "S", "first", "T"])
def edges_kernel(
    queries,
    own,
    shared,
    mask,
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
    H: tl.constexpr,
    HD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    BRANCHES: tl.constexpr,
    LAYERS: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid (words, query tiles of the block, rows): `bits` `[rows, T, words]` int32; BLOCK_K is a word's 32 columns."""
    i_w, i_r = tl.program_id(0), tl.program_id(2)
    i_b = i_r // BRANCHES
    o_t, o_k = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q), i_w * BLOCK_K + tl.arange(0, BLOCK_K)
    # The last tile's spare rows are other queries or none; their bits are not stored.
    o_q = first - start + o_t
    b_mean, b_column = averaged_attention(
        queries, own, shared, mask, lse, column, strides, i_r, o_q, o_k, start, n, S,
        H, HD, BLOCK_D, GROUP, BRANCHES, LAYERS, HAS_SHARED, HAS_MASK, PRECISION, BLOCK_Q, BLOCK_K,
    )  # fmt: skip
    m_k = o_k < S
    fed = n
    if HAS_MASK:
        fed = tl.load(real_queries + i_b)
        m_k = m_k & (tl.load(mask + i_b.to(tl.int64) * S + o_k, mask=m_k, other=0) != 0)
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
    """Grid (rows): all clauses of the rule and the greedy independent set of one sequence (see `fdpp.dawn.commit`).

    The set grows by the most confident free position, the lower one of equals, whose neighbours then leave; both
    directions of its edges are read from the bits, so the block's graph is never unpacked.
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
