"""Steps on static tensors: captured as CUDA graphs on first use, replayed from then on.

Everything a step reads or writes stands at a fixed address: the state of the sequences, the rules' numbers, the columns
of the window and the key/value cache, allocated once per length bucket. Steps differ by batch size, by how many columns
are fed and by how many drafts are evaluated; each combination is captured once and kept with the model. On a CPU the
same steps run on the same tensors without a capture, so that tests there see all but the graph itself.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fdpp.cache import BlockCache
from fdpp.dawn import Dawn
from fdpp.decoding.advance import Advance
from fdpp.decoding.config import DiffusionGenerationConfig
from fdpp.decoding.head import slice_held
from fdpp.decoding.state import BlockState, Outcome, Window

logger = logging.getLogger(__name__)

LENGTH_BUCKET = 32
"""Sequences are padded to a multiple of it, so that prompts of other lengths find their steps captured. It is the
common block length: LLaDA's 800 + 256 columns need no padding, and a full forward grows by 31 columns at most."""

KEPT = 4
"""Length buckets (and settings) whose tensors and graphs are kept; the one that was not used for longest goes first."""


def graph_size(b: int) -> int:
    """The batch size that `b` sequences run at: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., to keep the captures few."""
    size = 1
    while size < b:
        power = size & (size - 1) == 0
        size = 2 if size == 1 else size * 3 // 2 if power else size * 4 // 3
    return size


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device: PyTorch's own for all captures stays on the device that was current at the first of them."""
    return torch.cuda.Stream(device)


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Steps that were let go hold graphs and pinned memory in cycles, which must not be freed amid another capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class Step:
    """One captured step of an arena: `drafts` states in a window of fixed widths.

    Attributes:
        outcome: what the last replay left.
    """

    def __init__(self, arena: Arena, window: Window, drafts: int, fresh: bool) -> None:
        self.arena, self.drafts, self.fresh = arena, drafts, fresh
        device, T = arena.state.sequences.device, window.block_width()
        fed: slice | Tensor = window.fed
        inner: slice | Tensor = slice(0, T)
        block = torch.empty(T, dtype=torch.int64, device=device)
        if window.full:
            inner = block
        else:
            fed = torch.empty(window.width(), dtype=torch.int64, device=device)
        self.window = Window(fed, block, inner, -1, window.full)
        self.place(window)
        self.summary = torch.empty(5, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self.capture()

    def place(self, window: Window) -> None:
        """Move to the columns of `window`."""
        if self.window.first == window.first:
            return
        for columns, at in ((self.window.fed, window.fed), (self.window.block, window.block)):
            if isinstance(columns, Tensor):
                assert isinstance(at, slice)
                torch.arange(at.start, at.stop, out=columns)
        self.window = self.window._replace(first=window.first)

    def advance(self) -> tuple[BlockState, Outcome]:
        arena = self.arena
        state = arena.state._replace(evidence=None) if self.fresh else arena.state
        return arena.advance(state, self.window._replace(first=-1), arena.schedule, arena.cache, self.drafts)

    def run(self) -> None:
        after, self.outcome = self.advance()
        self.arena.store(after)
        self.summary.copy_(self.outcome.summary, non_blocking=True)

    def capture(self) -> None:
        (b, L), device = self.arena.state.sequences.shape, self.arena.state.sequences.device
        if not self.arena.steps:
            logger.warning(
                "capturing the steps of %d sequences of %d columns; `model.warmup` does it ahead of time", b, L
            )
        logger.info(
            "capturing a step: %d sequences of %d columns, %d fed, %d drafts",
            b,
            L,
            self.window.width(),
            self.drafts,
        )
        # Compiles what is compiled on first use and allocates the cache and the evidence, outside of the graph's pool.
        # A step changes nothing but the keys and values of what is fed, and writes the same ones when it is replayed.
        after, _ = self.advance()
        self.arena.hold(after)
        del after
        with torch.cuda.device(device), garbage_kept():
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.arena.pool, stream=capture_stream(device)):
                self.run()

    def replay(self) -> list[int]:
        """Take the step; returns the outcome's summary."""
        if self.graph is None:
            self.run()
        else:
            self.graph.replay()
            torch.cuda.current_stream(self.arena.state.sequences.device).synchronize()
        return self.summary.tolist()


class Arena:
    """The static tensors of `b` sequences, and the steps captured on them."""

    def __init__(self, advance: Advance, state: BlockState, schedule: Tensor, cache: BlockCache | None, pool: Any):
        self.advance, self.cache, self.pool = advance, cache, pool
        self.state, self.schedule = state.each(torch.clone), schedule.clone()
        self.steps: dict[tuple[int, ...], Step] = {}

    def step(self, window: Window, drafts: int, fresh: bool) -> Step:
        key = (window.width(), window.block_width(), drafts, fresh)
        if key not in self.steps:
            self.steps[key] = Step(self, window, drafts, fresh)
        step = self.steps[key]
        step.place(window)
        return step

    def hold(self, state: BlockState) -> None:
        """Make room for the evidence of `state`, of which there is none before a decode's first forward."""
        if state.evidence is not None and (
            self.state.evidence is None or self.state.evidence.logits.shape != state.evidence.logits.shape
        ):
            self.state = self.state._replace(evidence=state.evidence.each(torch.empty_like))

    def store(self, state: BlockState) -> None:
        self.hold(state)
        for held, new in zip(self.state.tensors(), state.tensors(), strict=False):
            if held is not new:
                held.copy_(new)


class Bucket:
    """Arenas of one length and setting, by batch size and block length; all stand on the front rows of one cache.

    The first forward, which allocates the cache, must be one of `capacity` sequences.
    """

    def __init__(self, advance: Advance, capacity: int, cache: BlockCache | None) -> None:
        self.advance, self.capacity, self.cache = advance, capacity, cache
        self.arenas: dict[tuple[int, int], Arena] = {}
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def arena(self, state: BlockState, schedule: Tensor) -> Arena:
        """The arena of the state's batch size, loaded with it."""
        b, T = state.row.shape[0], schedule.shape[0]
        if (b, T) not in self.arenas:
            cache = self.cache
            if cache is not None and cache.allocated:
                cache = cache.front(b)
            self.arenas[b, T] = Arena(self.advance, state, schedule, cache, self.pool)
        arena = self.arenas[b, T]
        arena.store(state)
        arena.schedule.copy_(schedule)
        return arena


class StaticSteps:
    """A model's buckets. A copy of the model starts without any."""

    def __init__(self) -> None:
        self.buckets: OrderedDict[Any, Bucket] = OrderedDict()
        self.weights: Any = None

    def __deepcopy__(self, memo: Any) -> StaticSteps:
        return StaticSteps()

    def __reduce__(self) -> Any:
        return StaticSteps, ()

    def bucket(self, key: Any, weights: Any, capacity: int, make: Callable[[int], Bucket]) -> Bucket:
        """The bucket `key`, made by `make(capacity)` if there is none of that capacity.

        `weights` identifies the storage of the model's weights: graphs hold addresses, so none outlives a move.
        """
        if weights != self.weights:
            self.buckets.clear()
            self.weights = weights
        if key not in self.buckets or self.buckets[key].capacity < capacity:
            self.buckets[key] = make(capacity)
        self.buckets.move_to_end(key)
        while len(self.buckets) > KEPT:
            self.buckets.popitem(last=False)
        return self.buckets[key]


UNKEYED = ("max_new_tokens", "block_length", "steps", "seed", "engine", "return_dict_in_generate")
"""Settings that reach a step as tensors, as the width of its window, or not at all."""


def why_not_static(model: Any, config: DiffusionGenerationConfig) -> str | None:
    """What in a decode static tensors cannot serve, None if nothing."""
    if isinstance(config.rule, Dawn):
        return "rule=Dawn(...) reads attention at columns that its kernels take as numbers"
    if slice_held(model) is not None:
        return "the steps of a sharded model are exchanges between processes, which are not captured"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "weights on several devices, or offloaded, are brought together by hooks, which are not captured"
    return None


def bucket_for(
    model: Any, config: DiffusionGenerationConfig, device: torch.device, B: int, length: int, padded: bool, spare: int
) -> Bucket:
    """The bucket of `model` for `B` sequences of `length` columns under `config`; `padded`: with an attention mask."""
    settings = (getattr(config, field.name) for field in fields(config) if field.name not in UNKEYED)
    key = (length, padded, spare, *(tuple(value) if isinstance(value, list) else value for value in settings))
    if hasattr(model, "join_weights"):
        model.join_weights()
    weights = tuple((p.device, p.dtype, p.data_ptr()) for p in model.parameters())
    held = model.__dict__.setdefault("_static_steps", StaticSteps())

    def make(capacity: int) -> Bucket:
        cache = None if config.cache == "none" else BlockCache(config.branches, spare, config.passes)
        return Bucket(Advance(model, config, device), capacity, cache)

    return held.bucket(key, weights, graph_size(B), make)


class StaticRunner:
    """Runs a block's forwards on the arenas of a bucket; the interface of `EagerRunner`.

    Batches run at a `graph_size`: the first sequence fills the rows that are left over, and what comes of those copies
    is dropped.
    """

    def __init__(self, bucket: Bucket, state: BlockState, schedule: Tensor, T: int) -> None:
        self.bucket, self.fresh = bucket, True
        last = torch.full((T,), schedule.shape[0] - 1, device=schedule.device)
        self.schedule = schedule[torch.minimum(torch.arange(T, device=schedule.device), last)]
        self.load(state, torch.arange(state.row.shape[0], device=state.row.device))

    def load(self, state: BlockState, rows: Tensor) -> Tensor:
        """Fill the arena with the sequences `rows` of `state`; returns the rows it was filled with."""
        self.size = rows.shape[0]
        rows = torch.cat((rows, rows[:1].expand(graph_size(self.size) - self.size)))
        self.arena = self.bucket.arena(state.take(rows), self.schedule)
        return rows

    @property
    def state(self) -> BlockState:
        return self.arena.state.each(lambda field: field[: self.size])

    def captured(self, window: Window, drafts: int) -> Step:
        """The next step. More states are evaluated where that needs no capture of its own: it changes no token."""
        setting = self.bucket.advance.config.drafts
        if drafts > 1:
            drafts = setting if isinstance(setting, int) else 1 << (drafts - 1).bit_length()
        return self.arena.step(window, drafts, self.fresh)

    def step(self, window: Window, drafts: int) -> tuple[Outcome, list[int]]:
        """A forward of all sequences: what came of it, and its summary on the host."""
        step = self.captured(window, drafts)
        self.fresh = False
        summary = step.replay()
        return step.outcome.front(self.size), summary

    def keep(self, rows: Tensor) -> None:
        """Go on with the sequences at `rows`, int64 indices `[c]`."""
        self.size = rows.shape[0]
        if self.size:
            cache = self.arena.cache
            rows = self.load(self.arena.state, rows)
            if cache is not None:
                cache.front(cache.size).keep(rows)
