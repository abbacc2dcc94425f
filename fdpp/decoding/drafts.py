"""Draft and verify (FreeDave, arXiv 2510.00294): several steps of a decode from one forward.

- Draft: the predictions for a state give the next state exactly. Applied again, to the positions that are then still
  masked, they give a guess of the state after it, and so on: a chain of states.
- Verify: one forward evaluates the whole chain. Where the step from a state, by its own predictions, leads to the next
  draft, that draft is right, and its predictions are already at hand.

The first state of a chain is always right, so a forward never does less than an undrafted one. The decode is the
undrafted one state by state, whatever the rule.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fdpp.attention import BlockCache
from fdpp.decoding.settings import MAX_DRAFTS, DiffusionGenerationConfig
from fdpp.decoding.state import ends
from fdpp.selection import Selection


class Chain:
    """Verifies the `states` `[b, D, T]` of one forward, given the step `chosen` from each of them.

    No step is taken from a state that ends its sequence (`state.ends`, with its `mask_id`, its `eos` and, `[b, T]`, its
    `allowed`) or its block. With a rule that `revokes` an EOS ends nothing before the block is finished, since it may
    be taken back.

    Attributes:
        accepted: `[b]` int64, how many of the states are right, at least 1: the first always is.
        right: `[b, D]` bool, which of them are, where D > 1; and `offered` `[b, D - 1]` bool, which of the drafts could
            have saved a step.
        tokens: `[b, T]`, the state after the last right one.
        remaining, nonfinite: `[b]`, of the steps from right states.
    """

    def __init__(
        self,
        states: Tensor,
        chosen: Selection,
        mask_id: int,
        eos: Tensor | None,
        revokes: bool,
        allowed: Tensor | None = None,
    ) -> None:
        self.states, self.chosen, self.mask_id, self.revokes = states, chosen, mask_id, revokes
        if states.shape[1] == 1:
            self.accepted = torch.ones(states.shape[:1], dtype=torch.int64, device=states.device)
            self.tokens, self.remaining, self.nonfinite = (
                value[:, 0] for value in (chosen.tokens, chosen.remaining, chosen.nonfinite)
            )
            return
        # A draft whose block or sequence has ended has no step left to save.
        if revokes:
            self.offered = (chosen.tokens != states)[:, 1:].any(2) & (chosen.remaining[:, :-1] > 0)
        else:
            allowed = None if allowed is None else allowed[:, None]
            self.offered = chosen.committed[:, 1:].any(2) & ~ends(states, mask_id, eos, allowed)[:, 1:]
        self.agrees = self.offered & (chosen.tokens[:, :-1] == states[:, 1:]).all(2)
        self.accepted = 1 + self.agrees.long().cumprod(1).sum(1)
        self.tokens = self.last(chosen.tokens)
        self.remaining = self.last(chosen.remaining)
        depth = torch.arange(states.shape[1], device=states.device)
        self.right = depth < self.accepted[:, None]
        self.nonfinite = chosen.nonfinite.masked_fill(~self.right, 0).sum(1)

    def last(self, value: Tensor) -> Tensor:
        """`value` `[b, D, ...]` at the last right state, `[b, ...]`."""
        if value.shape[1] == 1:
            return value[:, 0]
        return value[torch.arange(value.shape[0], device=value.device), self.accepted - 1]

    def last_state(self, value: Tensor) -> Tensor:
        """`last` with its dimension of states kept, `[b, 1, ...]`."""
        return self.last(value)[:, None]

    def at_commit(self, values: Tensor, before: Tensor, uncommitted: float) -> Tensor:
        """`before` `[b, T]`, updated by the steps from right states.

        Positions that they commit get the step's entry of `values` `[b, D, 1 or T]`; those that they take back get
        `uncommitted`.
        """
        if self.revokes:
            return self.last_event(values, before, uncommitted)
        if values.shape[1] == 1:
            return torch.where(self.chosen.committed[:, 0], values[:, 0], before)
        commits = self.chosen.committed & self.right[:, :, None]
        return torch.where(commits.any(1), (commits * values).sum(1), before)

    def last_event(self, values: Tensor, before: Tensor, uncommitted: float) -> Tensor:
        """`at_commit` for a rule that revokes: a position's last commit or revocation counts."""
        taken = (self.states != self.mask_id) & (self.chosen.tokens == self.mask_id)
        for depth in range(values.shape[1]):
            event = values[:, depth].masked_fill(taken[:, depth], uncommitted)
            changed = (self.chosen.committed | taken)[:, depth]
            if depth:
                changed = changed & self.right[:, depth, None]
            before = torch.where(changed, event, before)
        return before


def most_drafts(drafts: int | str) -> int:
    """The most states that a forward may evaluate under the setting `drafts`."""
    return MAX_DRAFTS if drafts == "auto" else int(drafts)


class Room(NamedTuple):
    """What a cache is made for.

    Attributes:
        shift: of the model. With 1 a draft has one column more, before its block.
        grid: the length of blocks that see no later one; None: every column sees all.
        rows, columns: sequences and their length, for a cache with a `grid`, whose first forward need not feed all.
    """

    shift: int
    grid: int | None = None
    rows: int | None = None
    columns: int | None = None


def spare_columns(config: DiffusionGenerationConfig, room: Room) -> int:
    """Columns that the cache holds for drafts in tree layout, or for rows beside the sequence."""
    if config.cache != "none" and config.rule.needs.rows:
        return config.rule.rows(torch.arange(config.per_block, dtype=torch.int64, device="cpu")).columns.shape[0]
    if config.drafts == 1 or config.branches == "batch" or config.cache == "none":
        return 0
    widest = config.max_new_tokens if config.cache == "prefix" and room.grid is None else config.per_block
    return (most_drafts(config.drafts) - 1) * (min(widest, config.max_new_tokens) + room.shift)


def cache_for(config: DiffusionGenerationConfig, room: Room) -> BlockCache | None:
    """The empty cache of a decode, with room for its drafts; None where it has none."""
    if config.cache == "none":
        return None
    return BlockCache(config.branches, spare_columns(config, room), config.passes, room.grid, room.rows, room.columns)


def depth_after(accepted: int, drafts: int | str) -> int:
    """How many states the next forward evaluates, given how many of the last one's longest chain were accepted.

    A fixed `drafts` is that many. "auto" takes twice what was accepted: 2 after a wrong draft, more while the drafts
    hold. No depth costs forwards, since the first state of every chain is right.
    """
    return min(2 * accepted, MAX_DRAFTS) if drafts == "auto" else int(drafts)
