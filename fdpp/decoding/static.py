"""Steps on static tensors: captured as CUDA graphs on first use, replayed from then on.

Everything a step reads or writes stands at a fixed address: the state of the sequences, the rules' numbers, the columns
of the window and the key/value cache, allocated once per length bucket. Steps differ by batch size, by how many columns
are fed and by how many drafts are evaluated; each combination is captured once and kept with the model. On a CPU the
same steps run on the same tensors without a capture, so that tests there see all but the graph itself.

One decode at a time uses a model's static tensors: another thread waits for its end.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fdpp.cache import BlockCache
from fdpp.dawn import Dawn
from fdpp.decoding.advance import Advance, stop_ids
from fdpp.decoding.config import DiffusionGenerationConfig
from fdpp.decoding.drafts import cache_for, spare_columns
from fdpp.decoding.graphs import graphs_on
from fdpp.decoding.head import slice_held
from fdpp.decoding.identity import identity
from fdpp.decoding.state import BlockState, Outcome, Window

logger = logging.getLogger(__name__)

LENGTH_BUCKET = 32
"""Sequences are padded to a multiple of it, so that prompts of other lengths find their steps captured. It is the
common block length: LLaDA's 800 + 256 columns need no padding. Only the full forward depends on the padding: it feeds
none of it, and so is captured once for every length."""

KEPT = 4
"""Length buckets (and settings) whose tensors and graphs are kept; the one that was not used for longest goes first."""


def graph_size(b: int) -> int:
    """The batch size that `b` sequences run at: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., to keep the captures few."""
    size = 1
    while size < b:
        power = size & (size - 1) == 0
        size = 2 if size == 1 else size * 3 // 2 if power else size * 4 // 3
    return size


class Step:
    """One step of an arena: `drafts` states in a window of fixed widths. It knows nothing of the arena that holds it.

    Attributes:
        graph: what replays it, None if it runs operation by operation.
        outcome: what came of the last time; `captured` is where a replay leaves it.
        summary: that of the outcome, on the host.
    """

    outcome: Outcome
    captured: Outcome

    def __init__(self, window: Window, drafts: int, fresh: bool, device: torch.device) -> None:
        self.drafts, self.fresh, self.device = drafts, fresh, device

        def columns(count: int) -> Tensor:
            return torch.empty(count, dtype=torch.int64, device=device)

        block = columns(window.block_width())
        fed = window.fed if window.full else columns(window.width())
        inner = columns(window.block_width()) if window.full else slice(0, window.block_width())
        self.window = Window(fed, block, inner, -1, window.full, window.padding)
        self.summary = torch.empty(5, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        self.graph: Any = None

    def place(self, window: Window) -> None:
        """Move to the columns of `window`."""
        if self.window.first == window.first:
            return
        for name in ("fed", "block", "inner"):
            columns, at = getattr(self.window, name), getattr(window, name)
            if isinstance(columns, Tensor):
                torch.arange(at.start, at.stop, device=columns.device, out=columns)
        self.window = self.window._replace(first=window.first)

    def run(self, arena: Arena, advance: Advance) -> None:
        state = arena.state._replace(evidence=None) if self.fresh else arena.state
        window = self.window._replace(first=-1)
        after, self.outcome = advance(state, window, arena.schedule, arena.cache, self.drafts)
        arena.store(after)
        self.summary.copy_(self.outcome.summary, non_blocking=True)

    def warm_up(self, arena: Arena, advance: Advance) -> None:
        """Run all that a capture will, on the very tensors of the capture, and leave the state as it was.

        That compiles what is compiled on first use, lets libraries plan for these shapes and strides, and allocates the
        cache and the evidence outside of the graph's pool. The keys and values of what was fed stay written; a replay
        writes the same ones.
        """
        before = arena.state.each(torch.clone)
        self.run(arena, advance)
        arena.restore(before)

    def replay(self, arena: Arena, advance: Advance) -> list[int]:
        """Take the step; returns the outcome's summary."""
        if self.graph is None or not switch.on:
            self.run(arena, advance)
        else:
            self.graph.replay()
            self.outcome = self.captured
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return self.summary.tolist()


class Arena:
    """The static tensors of `b` sequences, and the steps on them."""

    def __init__(self, state: BlockState, schedule: Tensor, cache: BlockCache | None) -> None:
        self.cache, self.state, self.schedule = cache, state.each(torch.clone), schedule.clone()
        self.steps: dict[tuple[Any, ...], Step] = {}

    def step(self, window: Window, drafts: int, fresh: bool) -> tuple[Step, bool]:
        """The step, and whether it is new."""
        key = (window.width(), window.block_width(), window.full, window.padding, drafts, fresh)
        new = key not in self.steps
        step = Step(window, drafts, fresh, self.schedule.device) if new else self.steps[key]
        step.place(window)
        self.steps[key] = step
        return step, new

    def hold(self, state: BlockState) -> None:
        """Make room for the evidence of `state`, of which there is none before a decode's first forward."""
        if state.evidence is not None and (
            self.state.evidence is None or self.state.evidence.logits.shape != state.evidence.logits.shape
        ):
            self.state = self.state._replace(evidence=state.evidence.each(torch.empty_like))

    def store(self, state: BlockState) -> None:
        self.hold(state)
        self.restore(state)

    def restore(self, state: BlockState) -> None:
        for held, new in zip(self.state.tensors(), state.tensors(), strict=False):
            if held is not new:
                held.copy_(new)


class Bucket:
    """Arenas of one length and setting, by batch size and block length; all stand on the front rows of one cache.

    The first forward, which allocates the cache, must be one of `capacity` sequences.

    Attributes:
        sound: False while the cache is allocated or a step made: what was interrupted there is not used again.
        eos: the ids that end a sequence, at a fixed address.
    """

    def __init__(self, config: DiffusionGenerationConfig, device: torch.device, capacity: int) -> None:
        self.device, self.capacity, self.cache = device, capacity, cache_for(config)
        self.eos = stop_ids(config, device)
        self.arenas: dict[tuple[int, int], Arena] = {}
        self.graphs: Any = None
        self.sound = False

    def arena(self, state: BlockState, schedule: Tensor) -> Arena:
        """The arena of the state's batch size, loaded with it."""
        key = (state.row.shape[0], schedule.shape[0])
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


class StaticSteps:
    """A model's buckets. A copy of the model starts without any.

    Attributes:
        model: what `identity` said of the model when its steps were made: none outlives a change.
        refused: why steps are not captured any more, None if they are.
    """

    def __init__(self) -> None:
        self.buckets: OrderedDict[Any, Bucket] = OrderedDict()
        self.model: Any = None
        self.refused: str | None = None
        self.lock = threading.Lock()
        self.owner: int | None = None

    def __deepcopy__(self, memo: Any) -> StaticSteps:
        return StaticSteps()

    def __reduce__(self) -> Any:
        return StaticSteps, ()

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Until the end of a decode no other thread has these steps. False where this one is decoding on them already,
        as a streamer may that generates."""
        if self.owner == threading.get_ident():
            yield False
            return
        with self.lock:
            self.owner = threading.get_ident()
            try:
                yield True
            finally:
                self.owner = None

    def renew(self, model: nn.Module) -> None:
        """Forget everything if `model` is not what it was."""
        now = identity(model)
        if now != self.model:
            self.buckets.clear()
            self.model, self.refused = now, None

    def bucket(self, key: Any, capacity: int, make: Callable[[int], Bucket]) -> Bucket:
        """The bucket `key`, made by `make(capacity)` if there is no sound one of that capacity."""
        kept = self.buckets.get(key)
        if kept is None or not kept.sound or kept.capacity < capacity:
            self.buckets.pop(key, None)
            self.buckets[key] = make(capacity)
        self.buckets.move_to_end(key)
        while len(self.buckets) > KEPT:
            self.buckets.popitem(last=False)
        return self.buckets[key]

    def capture(self, bucket: Bucket, arena: Arena, step: Step, advance: Advance) -> None:
        """Capture a new `step` where there are CUDA graphs. Where it fails, the decode goes on without: same tokens."""
        if self.refused is not None or not switch.on:
            return
        try:
            bucket.graphs = bucket.graphs or graphs_on(bucket.device)
        except RuntimeError as error:
            self.refuse(bucket, error)
        if bucket.graphs is None:
            return
        announce(arena, step)
        step.warm_up(arena, advance)
        try:
            step.graph = bucket.graphs.capture(partial(step.run, arena, advance))
            step.captured = step.outcome
        except Exception as error:
            self.refuse(bucket, error)

    def refuse(self, bucket: Bucket, error: Exception) -> None:
        self.refused = f"{type(error).__name__}: {error}"
        logger.warning(
            "no CUDA graphs, decodes go on without them until `model.forget_captures()`: capturing a step raised %s",
            self.refused,
        )
        bucket.release()


def announce(arena: Arena, step: Step) -> None:
    b, L = arena.state.sequences.shape
    if len(arena.steps) == 1:
        logger.warning("capturing the steps of %d sequences of %d columns; `model.warmup` does it ahead of time", b, L)
    width = step.window.width()
    logger.info("capturing a step: %d sequences of %d columns, %d fed, %d drafts", b, L, width, step.drafts)


class Switch:
    """Whether steps are captured, and captured ones replayed."""

    on = True


switch = Switch()


@contextmanager
def uncaptured() -> Iterator[None]:
    """Let static steps run operation by operation, in all threads: what a captured one is to be compared with."""
    before, switch.on = switch.on, False
    try:
        yield
    finally:
        switch.on = before


def arenas_of(model: Any) -> list[Arena]:
    """The arenas that `model` keeps."""
    held = model.__dict__.get("_static_steps")
    return [] if held is None else [arena for bucket in held.buckets.values() for arena in bucket.arenas.values()]


def steps_of(model: Any) -> list[Step]:
    """The steps that `model` keeps."""
    return [step for arena in arenas_of(model) for step in arena.steps.values()]


UNKEYED = ("max_new_tokens", "block_length", "steps", "seed", "engine", "return_dict_in_generate")
"""Settings that reach a step as tensors, as the width of its window, or not at all."""


def why_not_static(
    model: Any, config: DiffusionGenerationConfig, device_type: str = "cuda", processor: Any = None
) -> str | None:
    """What in a decode static tensors cannot serve, None if nothing."""
    if processor is not None:
        return "logits_processor is code of the caller's, which is not captured"
    if isinstance(config.rule, Dawn):
        return "rule=Dawn(...) reads attention at columns that its kernels take as numbers"
    if slice_held(model) is not None:
        return "the steps of a sharded model are exchanges between processes, which are not captured"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "weights on several devices, or offloaded, are brought together by hooks, which are not captured"
    if torch.is_autocast_enabled(device_type):
        return "autocast keeps casts of weights that it lets go of when it ends, behind a capture's back"
    hooked = nn.modules.module
    if hooked._global_forward_hooks or hooked._global_forward_pre_hooks:
        return "a hook on all modules is code of the caller's, which a replay does not call"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"the hook on a {type(module).__name__} is code of the caller's, which a replay does not call"
    return None


@contextmanager
def steps_for(
    model: Any, config: DiffusionGenerationConfig, device: torch.device, processor: Any = None
) -> Iterator[StaticSteps | None]:
    """The static steps of `model` for one decode alone; None where it is to run every operation as it comes.

    Raises:
        ValueError: `engine="static"`, and something that static tensors cannot serve.
    """
    asked = config.engine == "static"
    if not asked and (config.engine == "eager" or device.type != "cuda"):
        yield None
        return
    obstacle = why_not_static(model, config, device.type, processor)
    if obstacle is not None:
        if asked:
            raise ValueError(f"engine='static': {obstacle}")
        yield None
        return
    held: StaticSteps = model.__dict__.setdefault("_static_steps", StaticSteps())
    with held.claimed() as mine:
        if mine:
            if hasattr(model, "join_weights"):
                model.join_weights()
            held.renew(model)
        yield held if mine and (asked or held.refused is None) else None


def bucket_for(
    held: StaticSteps, config: DiffusionGenerationConfig, device: torch.device, B: int, length: int
) -> Bucket:
    """The bucket for `B` sequences of `length` columns under `config`; its cache is this decode's from now on."""
    settings = (getattr(config, field.name) for field in fields(config) if field.name not in UNKEYED)
    key = (length, spare_columns(config), *(tuple(value) if isinstance(value, list) else value for value in settings))
    bucket = held.bucket(key, graph_size(B), partial(Bucket, config, device))
    if bucket.cache is not None:
        bucket.cache.order = []
    return bucket


class StaticRunner:
    """Runs a block's forwards on the arenas of a bucket; the interface of `EagerRunner`.

    Batches run at a `graph_size`: copies of the first sequence fill the rows that are left over (see
    `BlockState.fillers`), and their results are discarded.
    """

    def __init__(
        self, held: StaticSteps, bucket: Bucket, advance: Advance, state: BlockState, schedule: Tensor, T: int
    ) -> None:
        self.held, self.bucket, self.advance, self.fresh = held, bucket, advance, True
        last = torch.full((T,), schedule.shape[0] - 1, device=schedule.device)
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
        """The next step. More states are evaluated where that needs no capture of its own: it changes no token."""
        setting = self.advance.config.drafts
        if drafts > 1:
            drafts = setting if isinstance(setting, int) else 1 << (drafts - 1).bit_length()
        step, new = self.arena.step(window, drafts, self.fresh)
        if new:
            self.bucket.sound = False
            self.held.capture(self.bucket, self.arena, step, self.advance)
        return step

    def step(self, window: Window, drafts: int) -> tuple[Outcome, list[int]]:
        """A forward of all sequences: what came of it, and its summary on the host."""
        step = self.prepared(window, drafts)
        self.fresh = False
        summary = step.replay(self.arena, self.advance)
        self.bucket.sound = True
        return step.outcome.front(self.size), summary

    def keep(self, sequences: Tensor) -> None:
        """Go on with `sequences` `[c]`, in the order of the cache's rows."""
        if sequences.shape[0]:
            state = self.state
            self.load(state.take(state.places(sequences)))
        self.size = sequences.shape[0]
