"""One denoising step at LLaDA's vocabulary: fused, in two launches, the published way and a plain softmax, in turn.

`python bench/bench_select.py --out FOLDER` writes `select-<device>.json`. On a GPU, for 1 to 4096 masked rows:
microseconds under CUDA graphs with warm and cold L2, launches, GB/s and their share of the copy bandwidth. On a CPU:
times alone; Triton does not compile there, so the two-launch selection needs its interpreter (`TRITON_INTERPRET=1`,
with `--smoke`). A size that fails is a row that says why. `--smoke` takes a GPU's path on a CPU as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measure
import published
import torch
import two_launch
from measure import DEVICE, ON_GPU
from torch import Tensor

import fdpp

VOCABULARY, MASK_ID = 126464, 126336
RULE, TAU = fdpp.Frechet(0.25), 0.9
SIZES = (
    [(1, 1, 1), (1, 8, 8), (1, 32, 32), (4, 32, 32), (8, 32, 32), (32, 32, 32), (128, 32, 32), (1, 1024, 32)]
    if ON_GPU
    else [(1, 1, 1), (1, 32, 32), (8, 32, 32), (1, 256, 32), (1, 1024, 32)]
)
"""Sequences, positions of each and how many of them are masked. 1024 positions are what a full forward feeds."""

SMOKE_SIZES = [(1, 1, 1), (1, 8, 8), (2, 32, 4)]

Problem = tuple[Tensor, Tensor]
"""Logits `[B, T, V]` in bfloat16 and tokens `[B, T]`."""


def make_problem(B: int, T: int, masked: int, V: int = VOCABULARY, mask_id: int = MASK_ID, seed: int = 0) -> Problem:
    """Random logits with confidences from 0 to 1; the last `masked` positions are masked."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    logits = torch.randn(B, T, V, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    peak = 4.0 + 24.0 * torch.rand(B, T, 1, device=DEVICE, generator=generator)
    winner = torch.randint(0, mask_id, (B, T, 1), device=DEVICE, generator=generator)
    logits.scatter_(2, winner, peak.bfloat16())
    tokens = torch.zeros(B, T, dtype=torch.int64, device=DEVICE)
    tokens[:, -masked:] = mask_id
    return logits, tokens


def ways(mask_id: int = MASK_ID) -> dict[str, Callable[[Tensor, Tensor], Any]]:
    """The implementations side by side, `(logits, tokens) -> new tokens`."""
    step = fdpp.DenoisingStep(RULE, mask_id).to(DEVICE)
    found: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "fdpp": lambda logits, tokens: step(logits, tokens).tokens,
        "published": lambda logits, tokens: published.select(logits, tokens, tokens == mask_id, RULE)[0],
        "plain": lambda logits, tokens: published.plain(logits, tokens, mask_id, TAU),
    }
    if ON_GPU or os.environ.get("TRITON_INTERPRET") == "1":
        found["two launches"] = lambda logits, tokens: two_launch.select(logits, tokens, mask_id, TAU)
    return found


def check(problem: Problem, implementations: dict[str, Callable[[Tensor, Tensor], Any]], mask_id: int) -> None:
    """All ways must take the same step. The plain and the two-launch selection know only the threshold rule."""
    tokens = implementations["fdpp"](*problem)
    if not tokens.equal(implementations["published"](*problem)):
        raise AssertionError("fdpp and the published selection commit differently")
    for way in implementations.keys() & {"plain", "two launches"}:
        wanted = fdpp.select(*problem, rule=fdpp.Threshold(TAU), mask_id=mask_id).tokens
        if not wanted.equal(implementations[way](*problem)):
            raise AssertionError(f"fdpp and the selection {way!r} commit differently")


def in_graphs(
    way: str, call: Callable[[Tensor, Tensor], Any], problem: Problem, nbytes: int, budget: float
) -> dict[str, Any]:
    """Launches, and times in CUDA graphs: warm with one problem repeated, cold with more problems than the L2 holds."""
    row: dict[str, Any] = {"launches": measure.launches(partial(call, *problem))}
    if way in ("published", "plain"):  # both wait for the device
        return row
    many = max(3, min(5 * measure.CALLS, int(2e9 / nbytes)))
    others = max(1, -(-4 * measure.l2_bytes() // nbytes))
    problems = [(problem[0].clone(), problem[1]) for _ in range(others)]
    row["us_warm"] = 1e6 * measure.graph_seconds([partial(call, *problem)] * many, budget)
    row["us_cold"] = 1e6 * measure.graph_seconds([partial(call, *other) for other in problems], budget)
    row["launches_in_graph"] = measure.launches(measure.captured([partial(call, *problem)]).replay)
    return row


def measured(
    size: tuple[int, int, int], bandwidth: float, V: int, mask_id: int, budget: float, graphs: bool
) -> dict[str, Any]:
    """Time and memory of every way on one size; with `graphs` also in CUDA graphs."""
    B, T, masked = size
    problem = make_problem(B, T, masked, V, mask_id)
    implementations = ways(mask_id)
    nbytes = B * masked * V * problem[0].element_size()
    row: dict[str, Any] = {"megabytes": nbytes / 1e6}
    try:
        check(problem, implementations, mask_id)
    except AssertionError as error:
        row["error"] = str(error)
    calls = {way: measure.Calls([partial(call, *problem)] * measure.CALLS) for way, call in implementations.items()}
    seconds = measure.in_turn({way: repeated.replay for way, repeated in calls.items()}, 5, len(calls) * budget)
    for way, call in implementations.items():
        once = partial(call, *problem)
        result = {
            "us": 1e6 * statistics.median(seconds[way]) / measure.CALLS,
            "peak_mb": measure.peak_bytes(once) / 1e6,
        }
        if graphs:
            result |= in_graphs(way, call, problem, nbytes, budget)
        best = result.get("us_cold", result["us"])
        result["gb_s"] = nbytes / best / 1e3
        result["copy_percent"] = 100 * result["gb_s"] * 1e9 / bandwidth
        row[way] = result
    ours = row["fdpp"]
    row["speedup"] = row["published"]["us"] / ours.get("us_warm", ours["us"])
    pairs = zip(seconds["plain"], seconds["fdpp"], strict=True)
    row["speedup_plain"] = statistics.median(theirs / mine for theirs, mine in pairs)
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a vocabulary of 1000 and few rows, to see that it runs")
    parser.add_argument("--out", type=Path, default=measure.RESULTS / "local", help="folder of the result file")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="Dream's: 152064 (default: %(default)s)")
    options = parser.parse_args(arguments)
    bandwidth = measure.copy_bandwidth(1 << (31 if ON_GPU else 20 if options.smoke else 28))
    sizes, V, mask_id, budget = (
        (SMOKE_SIZES, 1000, 999, 0.05) if options.smoke else (SIZES, options.vocabulary, MASK_ID, 0.5)
    )
    graphs = ON_GPU or options.smoke
    rows: list[dict[str, Any]] = []
    results = {"smoke": options.smoke, "vocabulary": V, "rule": str(RULE), "copy_gb_s": bandwidth / 1e9, "rows": rows}
    for size in sizes:
        found = measure.attempt(lambda size=size: measured(size, bandwidth, V, mask_id, budget, graphs))
        about = {"sequences": size[0], "positions": size[1], "rows": size[0] * size[2]}
        rows.append(about | found)
        print(about, found.get("error", f"{found.get('speedup', 0.0):.1f}x"), flush=True)
        written = measure.write(options.out, "select", results)
    measure.close(written, results)


if __name__ == "__main__":
    main()
