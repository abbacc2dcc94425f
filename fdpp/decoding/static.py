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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import nn

from fdpp.decoding.advance import Advance
from fdpp.decoding.arena import Arena, Bucket, Step, graph_size, switch
from fdpp.decoding.drafts import Room, spare_columns
from fdpp.decoding.graphs import graphs_on
from fdpp.decoding.head import slice_held
from fdpp.decoding.identity import identity
from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.settings import DiffusionGenerationConfig

logger = logging.getLogger(__name__)

LENGTH_BUCKET = 32
"""Sequences are padded to a multiple of it, so that prompts of other lengths find their steps captured. It is the
common block length: LLaDA's 800 + 256 columns need no padding. Only the full forward depends on the padding: it feeds
none of it, and so is captured once for every length."""

KEPT = 4
"""Length buckets (and settings) whose tensors and graphs are kept; the least recently used goes first."""


class StaticSteps:
    """A model's buckets. A copy of the model starts without any.

    Attributes:
        model: the model's `identity` when its steps were made; a change discards them.
        refused: why steps are not captured any more, None if they are.
    """

    def __init__(self) -> None:
        self.buckets: dict[Any, Bucket] = {}
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
        """Keep other threads from these steps until the end of a decode. False if this thread is already decoding on
        them, as within a streamer that calls `generate`."""
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
        kept = self.buckets.pop(key, None)
        if kept is None or not kept.sound or kept.capacity < capacity:
            kept = None  # its memory goes before there is another's
            kept = make(capacity)
        self.buckets[key] = kept  # behind the others
        while len(self.buckets) > KEPT:
            del self.buckets[next(iter(self.buckets))]
        return kept

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


def arenas_of(model: Any) -> list[Arena]:
    """The arenas that `model` keeps."""
    held = model.__dict__.get("_static_steps")
    # Of lists, each made in one operation: a decode of another thread may add to what is listed.
    buckets = [] if held is None else list(held.buckets.values())
    return [arena for bucket in buckets for arena in list(bucket.arenas.values())]


def steps_of(model: Any) -> list[Step]:
    """The steps that `model` keeps."""
    return [step for arena in arenas_of(model) for step in list(arena.steps.values())]


UNKEYED = (
    *("max_new_tokens", "block_length", "sub_block_length", "steps", "refresh"),
    *("seed", "engine", "return_dict_in_generate", "stop_strings"),
)
"""Settings that reach a step as tensors, as the width of its window, or not at all."""


def why_not_static(
    model: DiffusionModel, config: DiffusionGenerationConfig, device_type: str = "cuda", processor: Any = None
) -> str | None:
    """Why static steps cannot serve a decode, None if they can."""
    if processor is not None:
        return "logits_processor is code of the caller's, which is not captured"
    if config.rule.needs.attention:
        return f"rule={type(config.rule).__name__}(...) reads attention, at columns that its kernels take as numbers"
    if slice_held(model) is not None:
        return "the steps of a sharded model are exchanges between processes, which are not captured"
    modules = list(model.modules())
    held = (parameter for module in modules for parameter in module._parameters.values())
    if len({parameter.device for parameter in held if parameter is not None}) > 1:
        return "weights on several devices, or offloaded, are brought together by hooks, which are not captured"
    if torch.is_autocast_enabled(device_type):
        return "autocast keeps casts of weights that it lets go of when it ends, behind a capture's back"
    hooked = nn.modules.module
    if hooked._global_forward_hooks or hooked._global_forward_pre_hooks:
        return "a hook on all modules is code of the caller's, which a replay does not call"
    for module in modules:
        if module._forward_hooks or module._forward_pre_hooks:
            return f"the hook on a {type(module).__name__} is code of the caller's, which a replay does not call"
    return None


@contextmanager
def steps_for(
    model: DiffusionModel, config: DiffusionGenerationConfig, device: torch.device, processor: Any = None
) -> Iterator[StaticSteps | None]:
    """The static steps of `model`, for one decode alone; None if it is to run eagerly.

    Raises:
        ValueError: `engine="static"` and a decode that static steps cannot serve.
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
            assert isinstance(model, nn.Module)
            held.renew(model)
        yield held if mine and (asked or held.refused is None) else None


def hashable(value: Any) -> Any:
    """A setting with its lists as tuples."""
    return tuple(map(hashable, value)) if isinstance(value, (list, tuple)) else value


def bucket_for(
    held: StaticSteps, config: DiffusionGenerationConfig, room: Room, device: torch.device, B: int, length: int
) -> Bucket:
    """The bucket for `B` sequences of `length` columns under `config`. Its cache is this decode's from now on."""
    settings = (getattr(config, field.name) for field in fields(config) if field.name not in UNKEYED)
    key = (length, room.grid, spare_columns(config, room), *map(hashable, settings))
    bucket = held.bucket(key, graph_size(B), partial(Bucket, config, room, device))
    if bucket.cache is not None:
        bucket.cache.order = []
    return bucket
