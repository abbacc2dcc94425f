"""What the gate compares: `pytest bench/bench_gate.py --benchmark-json=FILE`, then `python bench/gate.py FILE`.

Each group times one thing two ways, ours and the published one, in the same process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import bench_decode
import bench_select
import measure
import published_decode
import pytest
from measure import CALLS, DEVICE, ON_GPU

from fdpp import tiny

pytest.importorskip("pytest_benchmark")

DECODES = [("8b", "dual", 64)] if ON_GPU else [("tiny", "dual", 128), ("tiny", "none", 128)]


def repeated(call: Callable[[], Any], in_graph: bool) -> Callable[[], None]:
    """`CALLS` calls, synchronised; with `in_graph` in a CUDA graph if there is a GPU."""
    calls = [call] * CALLS
    replay = (measure.captured(calls) if in_graph else measure.Calls(calls)).replay

    def run() -> None:
        replay()
        measure.synchronize()

    return run


@pytest.mark.parametrize("way", ["fdpp", "published"])
@pytest.mark.parametrize("B", [1, 32] if ON_GPU else [1])
def test_select(benchmark: Any, B: int, way: str) -> None:
    """One step of `B` sequences of 32 masked positions."""
    problem = bench_select.make_problem(B, 32, 32)
    call = partial(bench_select.ways()[way], *problem)
    benchmark.group = f"select, {B * 32} rows"
    benchmark.extra_info["way"] = way
    benchmark.pedantic(repeated(call, way == "fdpp"), rounds=20 if ON_GPU else 9, warmup_rounds=1)


@cache
def decoded(name: str) -> tuple[Any, Any, bench_decode.Shape]:
    """Model, prompt and shape."""
    shape = bench_decode.SHAPES[name]()
    if shape.config is None:
        model, tokenizer = tiny.load()
        model = model.to(DEVICE)
        return model, bench_decode.tiny_prompts(tokenizer, 1), shape
    model = bench_decode.random_model(shape.config)
    return model, bench_decode.random_prompts(model, 1, shape.prompt), shape


@pytest.mark.parametrize("way", ["fdpp", "published"])
@pytest.mark.parametrize(("name", "kept", "new"), DECODES)
def test_decode(benchmark: Any, name: str, kept: str, new: int, way: str) -> None:
    """A decode of `new` tokens, batch 1."""
    model, prompt, shape = decoded(name)
    _, settings = bench_decode.settings_of(name, replace(shape, new=new), kept)[0]
    run = bench_decode.Run(model, prompt, settings)
    ways = {
        "fdpp": lambda: model.generate(prompt, generation_config=run.settings),
        "published": partial(run.published, published_decode.PublishedModel(model), run.settings),
    }

    def call() -> None:
        ways[way]()
        measure.synchronize()

    benchmark.group = f"decode, {name}, {kept} cache"
    benchmark.extra_info["way"] = way
    benchmark.pedantic(call, rounds=9, warmup_rounds=1)
