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
"""A tile is then 8 logits a thread, one 16-byte load in bfloat16. The loop takes 80 registers (100 when it samples), so
that an sm_90 multiprocessor holds three programs; with tiles of 4096 it takes 128 and holds two."""

PROGRAMS = 1024
"""Enough to fill the 132 multiprocessors of an H200 more than twice over, also from the 32 rows of one block."""


@dataclass(frozen=True)
class SelectLaunch:
    """How one select launch cuts its work. `splits` is a power of two; `split_len` a multiple of `block_v`."""

    block_t: int
    block_v: int
    splits: int
    split_len: int
    count_ranks: bool
    num_warps: int = NUM_WARPS


def select_launch(B: int, T: int, V: int) -> SelectLaunch:
    """The configuration for `B` sequences of `T` positions over `V` vocabulary entries."""
    block_t = max(triton.next_power_of_2(T), 2)
    block_v = min(BLOCK_V, max(triton.next_power_of_2(V), 16))
    tiles = triton.cdiv(V, block_v)
    wanted = min(triton.cdiv(PROGRAMS, B * T), MERGE_TILE // block_t, tiles)
    splits = 1 << max(wanted.bit_length() - 1, 0)
    return SelectLaunch(
        block_t=block_t,
        block_v=block_v,
        splits=splits,
        split_len=triton.cdiv(tiles, splits) * block_v,
        count_ranks=block_t <= COUNT_RANKS_UP_TO,
    )
