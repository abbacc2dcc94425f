"""The static tensors of captured steps, and the steps on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fdpp.attention import BlockCache
from fdpp.decoding.advance import Advance, stop_ids
from fdpp.decoding.drafts import Room, cache_for
from fdpp.decoding.evidence import Evidence
from fdpp.decoding.filters import Filters
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.state import BlockState, Outcome, Window, count


def graph_size(b: int) -> int:
    """The batch size that `b` sequences run at: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., to keep the captures few."""
    size = 1
    while size < b:
        power = size & (size - 1) == 0
        size = 2 if size == 1 else size * 3 // 2 if power else size * 4 // 3
    return size


class Switch:
    """Whether steps are captured, and captured ones replayed."""

    on = True


switch = Switch()


@contextmanager
def uncaptured() -> Iterator[None]:
    """Run static steps operation by operation, in all threads: the reference for captured ones."""
    before, switch.on = switch.on, False
    try:
        yield
    finally:
        switch.on = before


class Step:
    """One step of an arena: `drafts` states in a window of fixed widths. It knows nothing of the arena that holds it.

    Attributes:
        graph: the CUDA graph that replays it, None if it runs operation by operation.
        outcome: that of the last run; `captured` is the one that a replay writes.
        counts: those of the outcome, on the host.
    """

    outcome: Outcome
    captured: Outcome

    def __init__(self, window: Window, b: int, drafts: int, fresh: bool, device: torch.device) -> None:
        self.drafts, self.fresh, self.device = drafts, fresh, device

        def columns(count: int) -> Tensor:
            return torch.empty(count, dtype=torch.int64, device=device)

        block = columns(window.block_width())
        fed = window.fed if window.full else columns(window.width())
        inner = columns(window.block_width()) if window.full else window.inner
        read = window.read
        if window.full:
            read = inner if window.read == window.inner else columns(count(window.read))
        self.window = Window(fed, block, inner, read, -1, window.full, window.padding, window.own)
        self.counts = torch.empty(4, b, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self.graph: Any = None

    def place(self, window: Window) -> None:
        """Move to the columns of `window`."""
        if self.window.block_start == window.block_start:
            return
        for name in ("fed", "block", "inner", "read"):
            columns, at = getattr(self.window, name), getattr(window, name)
            if isinstance(columns, Tensor):
                torch.arange(at.start, at.stop, device=columns.device, out=columns)
        self.window = self.window._replace(block_start=window.block_start)

    def run(self, arena: Arena, advance: Advance) -> None:
        state = arena.state._replace(evidence=None) if self.fresh else arena.state
        window = self.window._replace(block_start=-1)
        after, self.outcome = advance(state, window, arena.schedule, arena.cache, self.drafts)
        arena.store(after)
        self.counts.copy_(self.outcome.counts, non_blocking=True)

    def warm_up(self, arena: Arena, advance: Advance) -> None:
        """Run all that a capture will, on the very tensors of the capture, and leave the state as it was.

        That compiles what is compiled on first use, lets libraries plan for these shapes and strides, and allocates the
        cache and the evidence outside of the graph's pool. The keys and values of what was fed stay written; a replay
        writes the same ones.
        """
        before = arena.state.each(torch.clone)
        self.run(arena, advance)
        arena.restore(before)

    def replay(self, arena: Arena, advance: Advance) -> list[list[int]]:
        """Take the step; returns the outcome's counts."""
        if self.graph is None or not switch.on:
            self.run(arena, advance)
        else:
            self.graph.replay()
            self.outcome = self.captured
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return self.counts.tolist()


class Arena:
    """The static tensors of `b` sequences, and the steps on them."""

    def __init__(self, state: BlockState, schedule: Tensor, cache: BlockCache | None) -> None:
        self.cache, self.state, self.schedule = cache, state.each(torch.clone), schedule.clone()
        self.steps: dict[tuple[Any, ...], Step] = {}

    def step(self, window: Window, drafts: int, fresh: bool) -> tuple[Step, bool]:
        """The step, and whether it is new."""
        # A full window's block moves within it; of others the place is fixed, and tells a block's first from the rest.
        inner = None if window.full or isinstance(window.inner, Tensor) else window.inner.start
        first = window.fed.start if window.full and isinstance(window.fed, slice) else None
        key = (window.width(), window.block_width(), first, inner, window.padding, window.own, drafts, fresh)
        new = key not in self.steps
        step = Step(window, self.state.row.shape[0], drafts, fresh, self.schedule.device) if new else self.steps[key]
        step.place(window)
        self.steps[key] = step
        return step, new

    def make_room(self, state: BlockState) -> None:
        """Make room for the evidence of `state`, of which there is none before a decode's first forward."""
        if state.evidence is not None and (
            self.state.evidence is None or shapes(self.state.evidence) != shapes(state.evidence)
        ):
            self.state = self.state._replace(evidence=state.evidence.each(torch.empty_like))

    def store(self, state: BlockState) -> None:
        self.make_room(state)
        self.restore(state)

    def restore(self, state: BlockState) -> None:
        for held, new in zip(self.state.tensors(), state.tensors(), strict=False):
            if held is not new:
                held.copy_(new)


def shapes(evidence: Evidence) -> list[torch.Size]:
    return [tensor.shape for tensor in evidence.tensors()]


class Bucket:
    """Arenas of one length and setting; all use the front rows of one cache.

    They differ by batch size, by block length, by whether some tokens of the response are given, and by whether the
    prompts are embeddings.

    The first forward, which allocates the cache, must be one of `capacity` sequences.

    Attributes:
        sound: False while the cache is being allocated or a step made: a bucket interrupted then is not used again.
        eos, filters: the ids that end a sequence, and what filters read, at fixed addresses.
    """

    def __init__(self, config: DiffusionGenerationConfig, room: Room, device: torch.device, capacity: int) -> None:
        self.device, self.capacity = device, capacity
        self.cache = cache_for(config, room if room.rows is None else room._replace(rows=capacity))
        self.eos, self.filters = stop_ids(config, device), Filters(config, device)
        self.arenas: dict[tuple[int, int, bool, bool], Arena] = {}
        self.graphs: Any = None
        self.sound = False

    def arena(self, state: BlockState, schedule: Tensor) -> Arena:
        """The arena of the state's form, loaded with it."""
        key = (state.row.shape[0], schedule.shape[0], state.may_end is not None, state.embeds is not None)
        if key not in self.arenas:
            self.arenas[key] = Arena(state, schedule, None if self.cache is None else self.cache.front(key[0]))
        arena = self.arenas[key]
        arena.store(state)
        arena.schedule.copy_(schedule)
        return arena

    def release(self) -> None:
        """Let go of all graphs; the steps still run, operation by operation."""
        for arena in self.arenas.values():
            for step in arena.steps.values():
                step.graph = None
        self.graphs = None
