"""Runners of a block's forwards: eager ones, or static steps that are captured once and replayed."""

from __future__ import annotations

import torch
from torch import Tensor

from fdpp.attention import BlockCache
from fdpp.decoding.advance import Advance
from fdpp.decoding.arena import Bucket, Step, graph_size
from fdpp.decoding.state import BlockState, Outcome, Window
from fdpp.decoding.static import StaticSteps


def summary(counts: list[list[int]]) -> tuple[int, int, int, int, int]:
    """Of `Outcome.counts`: positions unusable, sequences ended, blocks finished; most masks left, states accepted."""
    nonfinite, ended, remaining, accepted = counts
    return sum(nonfinite), sum(ended), remaining.count(0), max(remaining), max(accepted)


class EagerRunner:
    """Runs every operation as it comes: the readable reference, and the way on a CPU."""

    def __init__(self, advance: Advance, state: BlockState, schedule: Tensor, cache: BlockCache | None) -> None:
        self.advance, self.state, self.schedule, self.cache = advance, state, schedule, cache

    @property
    def size(self) -> int:
        """How many sequences take part."""
        return self.state.row.shape[0]

    def step(self, window: Window, drafts: int) -> tuple[Outcome, tuple[int, int, int, int, int]]:
        """A forward of all sequences: what came of it, and its summary on the host."""
        self.state, outcome = self.advance(self.state, window, self.schedule, self.cache, drafts)
        # The forward's only synchronisation: all that the host must know, in one transfer.
        return outcome, summary(outcome.counts.tolist())

    def feed(self, window: Window) -> None:
        """A forward of columns before the block, which only stores keys and values."""
        assert self.cache is not None
        self.state = self.advance.feed(self.state, window, self.cache)

    def go_on_with(self, sequences: Tensor) -> None:
        """Go on with `sequences` `[c]`, in the order of the cache's rows."""
        self.state = self.state.take(self.state.places(sequences))


class StaticRunner:
    """Runs a block's forwards on the arenas of a bucket; the interface of `EagerRunner`.

    Batches run at a `graph_size`: they are padded with copies of their first sequence, whose results are discarded (see
    `BlockState.fillers`).
    """

    def __init__(
        self, held: StaticSteps, bucket: Bucket, advance: Advance, state: BlockState, schedule: Tensor, T: int
    ) -> None:
        self.held, self.bucket, self.advance, self.fresh = held, bucket, advance, True
        last = torch.full((T,), schedule.shape[0] - 1, dtype=torch.int64, device=schedule.device)
        self.schedule = schedule[torch.minimum(torch.arange(T, device=schedule.device), last)]
        self.load(state)

    def load(self, state: BlockState) -> None:
        """Fill an arena with the sequences of `state`."""
        self.size = state.row.shape[0]
        size = graph_size(self.size)
        rows = torch.arange(size, device=state.row.device)
        fillers = rows >= self.size
        state = state._replace(fillers=None).take(rows.masked_fill(fillers, 0))
        if size > 1 and graph_size(size - 1) == size:  # then smaller batches run at it, too
            state = state._replace(fillers=fillers)
        self.arena = self.bucket.arena(state, self.schedule)

    @property
    def state(self) -> BlockState:
        return self.arena.state.each(lambda field: field[: self.size])

    def prepared(self, window: Window, drafts: int) -> Step:
        """The next step. The number of states is rounded up, so that fewer steps are captured: it changes no token."""
        setting = self.advance.config.drafts
        if drafts > 1:
            drafts = setting if isinstance(setting, int) else 1 << (drafts - 1).bit_length()
        step, new = self.arena.step(window, drafts, self.fresh)
        if new:
            self.bucket.sound = False
            self.held.capture(self.bucket, self.arena, step, self.advance)
        return step

    def step(self, window: Window, drafts: int) -> tuple[Outcome, tuple[int, int, int, int, int]]:
        """A forward of all sequences: what came of it, and its summary on the host."""
        step = self.prepared(window, drafts)
        self.fresh = False
        counts = step.replay(self.arena, self.advance)
        self.bucket.sound = True
        return step.outcome.front(self.size), summary([count[: self.size] for count in counts])

    def feed(self, window: Window) -> None:
        """A forward of columns before the block, which only stores keys and values. It is not captured: where prompts
        are long enough for one, its launches take a small part of its time."""
        assert self.arena.cache is not None
        self.arena.store(self.advance.feed(self.arena.state, window, self.arena.cache))

    def go_on_with(self, sequences: Tensor) -> None:
        """Go on with `sequences` `[c]`, in the order of the cache's rows."""
        if sequences.shape[0]:
            state = self.state
            self.load(state.take(state.places(sequences)))
        self.size = sequences.shape[0]
