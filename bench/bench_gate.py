"""What the gate compares: each group is one thing done two ways, ours and the published one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import bench_decode
import bench_select
import measure
import published_decode
from measure import CALLS, DEVICE, ON_GPU

from fdpp import tiny

ROWS = [1, 32] if ON_GPU else [1]
DECODES = [("8b", "dual", 64)] if ON_GPU else [("tiny", "dual", 128), ("tiny", "none", 128)]

Pair = tuple[Callable[[], Any], Callable[[], Any]]
"""Ours and the published way."""


def repeated(call: Callable[[], Any], in_graph: bool) -> Callable[[], None]:
    """`CALLS` calls; with `in_graph` in a CUDA graph if there is a GPU."""
    calls = [call] * CALLS
    return (measure.captured(calls) if in_graph else measure.Calls(calls)).replay


def select(B: int) -> Pair:
    """One step of `B` sequences of 32 masked positions."""
    problem = bench_select.make_problem(B, 32, 32)
    ways = bench_select.ways()
    ours, published = (repeated(partial(ways[way], *problem), way == "fdpp") for way in ("fdpp", "published"))
    return ours, published


def decode(name: str, kept: str, new: int) -> Pair:
    """A decode of `new` tokens, batch 1."""
    shape = bench_decode.SHAPES[name]()
    if shape.config is None:
        model, tokenizer = tiny.load()
        model = model.to(DEVICE)
        prompt = bench_decode.tiny_prompts(tokenizer, 1)
    else:
        model = bench_decode.random_model(shape.config)
        prompt = bench_decode.random_prompts(model, 1, shape.prompt)
    _, settings = bench_decode.settings_of(name, replace(shape, new=new), kept)[0]
    run = bench_decode.Run(model, prompt, settings)
    published = partial(run.published, published_decode.PublishedModel(model), run.settings)
    return partial(model.generate, prompt, generation_config=run.settings), published


def groups() -> dict[str, Callable[[], Pair]]:
    """What makes each group's two calls, by its name."""
    selections = {f"select, {B * 32} rows": partial(select, B) for B in ROWS}
    decodes = {f"decode, {name}, {kept} cache": partial(decode, name, kept, new) for name, kept, new in DECODES}
    return selections | decodes
