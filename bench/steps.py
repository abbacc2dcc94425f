"""Stands for what `fdpp.decoding.static` is about to have: delete this file then, and import from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fdpp.decoding import static

if hasattr(static, "steps_of"):
    steps_of, uncaptured = static.steps_of, static.uncaptured
else:

    def steps_of(model: Any) -> list[Any]:
        held = model.__dict__.get("_static_steps")
        arenas = [arena for bucket in held.buckets.values() for arena in bucket.arenas.values()] if held else []
        return [step for arena in arenas for step in arena.steps.values()]

    @contextmanager
    def uncaptured() -> Iterator[None]:
        capture = static.Step.capture
        static.Step.capture = lambda self: None  # type: ignore[method-assign]
        try:
            yield
        finally:
            static.Step.capture = capture  # type: ignore[method-assign]
