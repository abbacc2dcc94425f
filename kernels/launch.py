"""Launch configurations, frozen in one place, with the reason beside each number."""

from dataclasses import dataclass

import triton

COUNT_RANKS_UP_TO = 32
"""Positions up to which ranks are counted (all pairs); above, the keys are sorted.

At 128 positions counting spills up to 4 kB a thread on sm_90, at 64 it takes 248 registers; sorting takes no register
beyond those of the vocabulary loop at any length.
"""

MERGE_TILE = 2048
"""Most positions x splits the last program merges at once: 8 float32 a thread and plane with 8 warps."""

NUM_WARPS = 8
BLOCK_V = 2048
"""A tile is then 8 logits a thread, one 16-byte load in bfloat16, and two tiles are loaded at a time. With one sequence
of 32 positions the kernel takes 51 to 76 registers, so that an sm_90 multiprocessor holds three or four programs; with
tiles of 4096 it takes 112 and holds two. Sampling takes up to 114, and two fit; with tiles half as wide
twice as many threads make the noise of a group, and the loop has half as many instructions again. Only rows that do not
start on 16 bytes, where the ids of a group lie in two warps, have such tiles: 80 registers instead of 175."""

TILES_AT_ONCE = 2
"""Tiles a program loads together (see `vocab.summarize_row`): a split is a multiple of this many."""

PROGRAMS = 512
"""Derived, not measured. Four for each of an H200's 132 multiprocessors: all run at once, with 32 kB of logits on
their way to each, where 4.3 TB/s at some 700 ns of latency want 23 kB. A program's start and its reduction take as many
instructions as four of its tiles, so more programs cost more than they bring; half as many have 16 kB on their way."""


@dataclass(frozen=True)
class SelectLaunch:
    """How one select launch cuts its work. `splits` is a power of two; `split_len` a multiple of `block_v`."""

    block_t: int
    block_v: int
    splits: int
    split_len: int
    count_ranks: bool
    num_warps: int = NUM_WARPS


def select_launch(B: int, T: int, V: int, sampled: bool = False) -> SelectLaunch:
    """The configuration for `B` sequences of `T` positions over `V` vocabulary entries."""
    block_t = max(triton.next_power_of_2(T), 2)
    widest = BLOCK_V // 2 if sampled and V % 16 else BLOCK_V
    block_v = min(widest, max(triton.next_power_of_2(V), 16))
    turns = triton.cdiv(V, block_v * TILES_AT_ONCE)
    # Rounded up: an empty split costs its programs little, twice the turns cost the others twice the time.
    wanted = triton.next_power_of_2(min(triton.cdiv(PROGRAMS, B * T), turns))
    splits = min(wanted, MERGE_TILE // block_t)
    return SelectLaunch(
        block_t=block_t,
        block_v=block_v,
        splits=splits,
        split_len=triton.cdiv(turns, splits) * TILES_AT_ONCE * block_v,
        count_ranks=block_t <= COUNT_RANKS_UP_TO,
    )


CANVAS_BLOCK_V, CANVAS_WARPS = 1024, 4
"""A tile is 8 logits a thread, one 16-byte load in bfloat16 and two in float32. The threads that share a group of 64
ids are then all in one warp, and its maximum and its sums take shuffles and no barrier."""

CANVAS_TILES = 64
"""Most tiles whose noise is made at once. It then lies over the threads as a tile of logits does, and no thread makes
what another one makes: eight numbers each. Made for one tile, it would be made by all eight that share a group."""

CANVAS_MERGE_TILE = 1024
"""Half of `MERGE_TILE`, with half of the warps."""

CANVAS_PROGRAMS = 1056
"""Eight for each of an H200's 132 multiprocessors, about as many as their registers let run at once. Derived, not
measured: the arithmetic takes longer than the reading, and 32 warps hide what either waits for."""


@dataclass(frozen=True)
class CanvasLaunch:
    """How a step of a canvas cuts its work. `splits` is a power of two; `split_len` a multiple of `block_v`."""

    block_t: int
    block_v: int
    tiles: int
    splits: int
    split_len: int
    num_warps: int = CANVAS_WARPS


def canvas_launch(B: int, T: int, V: int) -> CanvasLaunch:
    """The configuration for `B` canvases of `T` positions over `V` vocabulary entries."""
    block_t = max(triton.next_power_of_2(T), 2)
    block_v = min(CANVAS_BLOCK_V, max(triton.next_power_of_2(V), 64))
    turns = triton.cdiv(V, block_v)
    wanted = triton.next_power_of_2(min(triton.cdiv(CANVAS_PROGRAMS, B * T), turns))
    splits = max(min(wanted, CANVAS_MERGE_TILE // block_t), 1)
    return CanvasLaunch(
        block_t=block_t,
        block_v=block_v,
        tiles=min(triton.next_power_of_2(triton.cdiv(turns, splits)), CANVAS_TILES),
        splits=splits,
        split_len=triton.cdiv(turns, splits) * block_v,
    )


PROJECT_PROGRAMS = 264
"""Two programs for each of an H200's 132 multiprocessors, resident at once where tiles have up to 32 rows. Derived, not
measured: by Little's law 4.3 TB/s at some 700 ns of latency want 23 kB in flight a multiprocessor, and a program with
three stages has two tiles of weights, 32 kB, on their way."""

PROJECT_MERGE_TILE = 8192
"""Most positions x splits that `decide_kernel` merges at once: 16 float32 a thread and plane with 16 warps, without
spills. Sampling has five planes instead of three and would spill: it merges half as many."""

PROJECT_ROWS = 64
"""Most rows of a tile: what one matrix instruction of sm_90 takes. Derived, not measured: weights that stream at
4.3 TB/s let 32 rows do 138 TFLOP/s and 64 rows 275, well below the peak of 990; more tiles share them in L2."""

PROJECT_BLOCK_V, PROJECT_BLOCK_D = 128, 64
"""A tile of weights is then 16 kB in bfloat16, its rows whole lines of 128 bytes. When sampling, the noise of a tile
with 128 ids spills up to 1.9 kB a thread; with 64 ids it does not."""


@dataclass(frozen=True)
class ProjectLaunch:
    """How the fused head cuts its work. `splits` is a power of two; `split_len` a multiple of `block_v`."""

    block_r: int
    block_v: int
    block_d: int
    splits: int
    split_len: int
    block_t: int
    count_ranks: bool
    num_warps: int
    num_stages: int = 3
    decide_warps: int = 16

    def scratch_bytes(self, rows: int) -> int:
        """What a launch with `rows` positions allocates beside its outputs: the summaries' five float32 planes and
        tokens, the mask id's logits, the rows' order (int64) and candidates (bool), and their number."""
        return rows * (24 * self.splits + 4 + 8 + 1) + 8


def project_launch(B: int, T: int, V: int, exact: bool, sampled: bool) -> ProjectLaunch:
    """The configuration for `B` sequences of `T` positions; `exact`: in float32, whose tiles are half as deep."""
    block_t = max(triton.next_power_of_2(T), 2)
    block_r = min(max(triton.next_power_of_2(B * T), 16), PROJECT_ROWS)
    block_v = min(PROJECT_BLOCK_V // 2 if sampled else PROJECT_BLOCK_V, max(triton.next_power_of_2(V), 16))
    tiles = triton.cdiv(V, block_v)
    merged = (PROJECT_MERGE_TILE // 2 if sampled else PROJECT_MERGE_TILE) // block_t
    wanted = min(PROJECT_PROGRAMS // triton.cdiv(B * T, block_r), merged, tiles)
    splits = 1 << max(wanted.bit_length() - 1, 0)
    return ProjectLaunch(
        block_r=block_r,
        block_v=block_v,
        block_d=PROJECT_BLOCK_D // 2 if exact else PROJECT_BLOCK_D,
        splits=splits,
        split_len=triton.cdiv(tiles, splits) * block_v,
        block_t=block_t,
        count_ranks=block_t <= COUNT_RANKS_UP_TO,
        num_warps=8 if block_r == PROJECT_ROWS else 4,
    )


ATTEND_PROGRAMS = 132
"""One for each of an H200's 132 multiprocessors: with three stages of 16 kB each, 128 programs have some 4 MB of keys
and values on their way, and 4.3 TB/s at 700 ns of latency want 3. Twice as many would write and read twice the parts.
Derived, not measured. Launches with as many tiles or more are not split, so it is also the most tickets of one."""

ATTEND_KEYS = 128
"""Fewest keys of a split: its keys and values are then 64 kB a head at 128 channels in bfloat16, and its part of the
result, written and read once more in float32, is half of that for the 32 queries of a block. Derived, not measured."""

ATTEND_SPLITS = 64
"""Most splits: the last program of a tile holds the maxima and sums of all parts at once."""

ATTEND_ROWS, ATTEND_BLOCK_S = 64, 32
"""Most queries of a tile, what one matrix instruction of sm_90 takes, and keys of a tile: with 128 channels, three
stages of keys and values take 48 kB, which leaves room in the 64 kB of gfx942, and no target spills."""


@dataclass(frozen=True)
class AttendLaunch:
    """How attention cuts its work. `splits` is a power of two; `split_len` a multiple of `block_s`."""

    block_m: int
    block_s: int
    splits: int
    split_len: int
    num_warps: int
    num_stages: int = 3


def attend_launch(heads: int, rows: int, S: int, exact: bool) -> AttendLaunch:
    """The configuration for `heads` heads of `S` keys, those of all sequences together, with `rows` queries each.

    `exact`: in float32, whose tiles are half as wide and high and have twice the warps, or they spill.
    """
    part = 2 if exact else 1
    block_s = ATTEND_BLOCK_S // part
    block_m = min(max(triton.next_power_of_2(rows), 16), ATTEND_ROWS // part)
    programs = heads * triton.cdiv(rows, block_m)
    wanted = min(triton.cdiv(ATTEND_PROGRAMS, programs), S // ATTEND_KEYS, ATTEND_SPLITS)
    splits = 1 << max(wanted.bit_length() - 1, 0)
    return AttendLaunch(
        block_m=block_m,
        block_s=block_s,
        splits=splits,
        split_len=triton.cdiv(triton.cdiv(S, splits), block_s) * block_s,
        num_warps=8 if exact else 4,
    )


NORM_ELEMENTS = 16
"""Channels of a row that a thread of the norm holds: two 16-byte loads in bfloat16. 4,096 channels take 8 warps."""

SWIGLU_BLOCK = 1024
"""Channels of a tile of SwiGLU: 8 a thread with 4 warps, one 16-byte load of each input in bfloat16. The 32 positions
of a block with 12,288 hidden units are 384 programs, three for each of an H200's multiprocessors."""

ROTATE_PAIRS = 1024
"""Pairs of channels of a tile of the rotation: 8 a thread with 4 warps, one 16-byte load of each half in bfloat16. The
32 positions of a block of LLaDA, 96 heads of 64 pairs, are 192 programs."""

ROUTE_EXPERTS = 1024
"""Most experts, rounded up, that the router's kernel ranks: one warp holds them all, so that none of its sixteen or so
reductions waits at a barrier. LLaDA2.0's 256 are 8 a thread."""


def norm_warps(block_d: int) -> int:
    """Warps of the norm of rows of at most `block_d` channels."""
    return min(max(block_d // (32 * NORM_ELEMENTS), 1), 16)


PRODUCT_PROGRAMS = 264
"""Two for each of an H200's 132 multiprocessors, which together have 64 kB of weights on their way, with three stages;
gfx942 has room for no more. 4.3 TB/s at 700 ns of latency want 23 kB. Derived, not measured."""

PRODUCT_BLOCK_N, PRODUCT_BLOCK_K = 128, 128
"""A tile of weights is then 16 kB, its rows whole lines of 128 bytes. Every program reads all of its rows' inputs: with
128 rows of the weight these are half of what it reads at 32 positions, and come from L2."""

PRODUCT_DEPTH = 1024
"""Least depth of a split: its part, written and read once in float32, is then an eighth of its weights at 32 positions,
and comes from L2."""

PRODUCT_SPLITS = 8
"""Most splits: the last program of a tile asks for all parts at once, some at a time as registers allow."""

PRODUCT_ROWS = 256
"""Most rows that weights are widened for in the product itself: four tiles of 64, all but one find the weights in L2.
Multiplying then takes longer than reading. A library's product of widened weights moves five bytes for each weight in
place of one, and is predicted to be faster from some 400 rows on, if ours reach half of its rate. Not measured."""


@dataclass(frozen=True)
class ProductLaunch:
    """How a product with weights of one byte cuts its work. `splits` is a power of two."""

    block_m: int
    splits: int
    split_len: int
    tiles: int
    block_n: int = PRODUCT_BLOCK_N
    block_k: int = PRODUCT_BLOCK_K
    num_warps: int = 4
    num_stages: int = 3


def product_launch(M: int, N: int, K: int) -> ProductLaunch:
    """The configuration for `M` rows of `K` channels and a weight of `N` rows."""
    block_m = min(max(triton.next_power_of_2(M), 16), 64)
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, PRODUCT_BLOCK_N)
    wanted = min(triton.cdiv(PRODUCT_PROGRAMS, tiles), K // PRODUCT_DEPTH, PRODUCT_SPLITS)
    splits = 1 << max(wanted.bit_length() - 1, 0)
    return ProductLaunch(
        block_m=block_m,
        splits=splits,
        split_len=triton.cdiv(triton.cdiv(K, splits), PRODUCT_BLOCK_K) * PRODUCT_BLOCK_K,
        tiles=tiles,
    )


CONDITIONING_BLOCK_V, CONDITIONING_WARPS = 2048, 4
"""Ids of a tile of self-conditioning: 16 a thread, two 16-byte loads in bfloat16. A program asks for its logits only
once it knows that its sequence goes on, so it has more of them on their way than SwiGLU's. Derived, not measured."""

CONDITIONING_IN_L2 = 16 << 20
"""Bytes of a slab of probabilities that the product finds in L2 (50 MB on an H100 and an H200), beside embeddings that
stream through it. The 256 positions of one canvas then take 32,768 ids at a time, in eight launches and products."""

CONDITIONING_IDS = 8192
"""Fewest ids of a slab: a product is written, read and added to the sum, 16 bytes a channel. At 2,816 channels that is
5.5 bytes for each probability, which takes 4 itself. The 8,192 positions of 32 canvases then hold 134 MB of them."""


def conditioning_slab(rows: int, V: int) -> int:
    """Ids whose probabilities are held at once for `rows` positions; a power of two, but for a smaller vocabulary."""
    fits = CONDITIONING_IN_L2 // (2 * max(rows, 1))
    return min(max(1 << (max(fits, 1).bit_length() - 1), CONDITIONING_IDS), V)


def conditioning_bytes(rows: int, V: int, D: int, size: int) -> int:
    """Most that soft embeddings of `size` bytes a channel hold at once: a slab's probabilities, the sum in float32, and
    a slab's product, also in float32, or the output."""
    return rows * (conditioning_slab(rows, V) * size + 8 * D)
