"""What decodes would take on a GPU, predicted from the code's own counts. No figure here is a measurement.

`python bench/predict.py --device h100` counts the launches of captured steps of LLaDA-8B's shape, or with
`--model dream-7b` of Dream-7B's (`nodes.py`), gives each a time by the device's figures (`roofline.py`) and prints

- the parts of a block step and of a refresh (the full forward that begins a block), by batch size;
- tokens per second. Sequences need different numbers of forwards for a block, drawn as `draw` says. A sequence leaves
  the batch when its block is complete, and the rest runs at the next `graph_size`, as in the decoding loop.

`--before` prints the same for the counts in `predicted-before.json` beside it. `--against decode-<device>.json` prints
what `bench_decode.py` measured beside what is predicted for the same settings.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import bench_decode
import nodes
import torch
from nodes import Launch
from report import markdown, number
from roofline import Device, by_part, device
from transformers import PretrainedConfig

from fdpp.decoding.arena import graph_size

BEFORE = Path(__file__).parent / "predicted-before.json"
SEED = 0
MODELS = {"llada-8b": ("8b", "LLaDA-8B"), "dream-7b": ("dream-7b", "Dream-7B")}
"""The shape in `bench_decode.SHAPES` and the name of each `--model`."""

Counts = list[tuple[int, Launch]]
"""How many equal launches there are of each kind."""

Counted = Callable[[int, bool, int], Counts]
"""The launches of a step of so many sequences, of one that begins its block or of another, in the block of a number."""

Taken = Callable[[int, bool, int], float]
"""Seconds of the same."""


def counts(config: PretrainedConfig, **settings: Any) -> Counts:
    """`nodes.launches`, counted at three layers: what is between the first and the last is the same in each."""
    depth, shallow = config.num_hidden_layers, copy.deepcopy(config)
    shallow.num_hidden_layers = min(depth, 3)
    found: Counter[Launch] = Counter()
    for launch in nodes.launches(shallow, **settings):
        copies = depth - 2 if launch.where == "layer 1" and depth > 3 else 1
        where = "layers" if launch.where.startswith("layer ") else launch.where
        found[replace(launch, where=where)] += copies
    return [(count, launch) for launch, count in found.items()]


def counter(config: PretrainedConfig, **settings: Any) -> Counted:
    """The counts of today's code, each taken once.

    All blocks but the first begin as the second does, and steps depend on the block with a prefix cache alone.
    """

    @cache
    def taken(batch: int, full: bool, at: int) -> Counts:
        return counts(config, batch=batch, full=full, at=at, **settings)

    def counted(batch: int, full: bool, at: int) -> Counts:
        return taken(batch, full, min(at, 1) if full else at if settings["cache"] == "prefix" else 0)

    return counted


def stored(path: Path) -> tuple[Counted, dict[str, Any]]:
    """The counts in a file that `store` wrote, and its other entries."""
    found = json.loads(path.read_text())
    steps = {
        (step["batch"], step["full"]): [(count, Launch(*launch)) for count, *launch in step["launches"]]
        for step in found.pop("steps")
    }

    def counted(batch: int, full: bool, at: int) -> Counts:
        if (batch, full) not in steps:
            raise ValueError(f"{path}: expected one of {sorted({b for b, _ in steps})} sequences, got {batch}")
        return steps[batch, full]

    return counted, found


def store(path: Path, counted: Counted, batches: Sequence[int], facts: dict[str, Any]) -> None:
    """Write the counts of all steps that batches of these sizes run, a step a line, and which commit they are of.

    Raises:
        ValueError: the counts depend on the block.
    """
    lines = []
    for batch in sizes(batches):
        for full in (False, True):
            if counted(batch, full, 0) != counted(batch, full, 1):
                raise ValueError("store: expected steps that are the same in every block, as with a dual cache")
            listed = [[n, x.name, x.where, x.bytes, x.flops, x.rows, x.columns] for n, x in counted(batch, full, 0)]
            lines.append(json.dumps({"batch": batch, "full": full, "launches": listed}))
    log = ["git", "log", "-1", "--format=%h", "--", "fdpp", "kernels"]
    commit = subprocess.run(log, capture_output=True, text=True, check=True, cwd=BEFORE.parents[1]).stdout.strip()
    about = json.dumps({"commit": commit, **facts})[1:-1]
    path.write_text(f'{{{about}, "steps": [\n' + ",\n".join(lines) + "\n]}\n")


def sizes(batches: Sequence[int]) -> list[int]:
    """The batch sizes of all steps that decodes of `batches` sequences run."""
    return sorted({graph_size(b) for b in range(1, max(batches) + 1)})


def step_seconds(counted: Counted, on: Device) -> Taken:
    """Predicted seconds of a step, its host's share included."""

    @cache
    def taken(batch: int, full: bool, at: int) -> float:
        return sum(by_part(counted(graph_size(batch), full, at), on).values()) + on.host_us * 1e-6

    return taken


def decode_seconds(forwards: Sequence[Sequence[int]], taken: Taken) -> float:
    """Seconds of a decode, as `fdpp.decoding.loop` runs it.

    Args:
        forwards: of every sequence, how many forwards each of its blocks needs, at least 1. A sequence that ends early
            has fewer blocks, and takes part in no more of them.
        taken: seconds of a step.
    """
    total = 0.0
    for block in range(max(map(len, forwards))):
        needed = [sequence[block] for sequence in forwards if len(sequence) > block]
        for done in range(max(needed)):
            total += taken(sum(n > done for n in needed), done == 0, block)
    return total


def draw(B: int, blocks: int, mean: float, most: int, generator: torch.Generator) -> list[list[int]]:
    """Forwards of every block of B sequences: 1 and a binomial of `most - 1`, so that their mean is `mean`.

    With 32 tokens a block and 4.24 a forward the mean is 7.5, and four of five blocks need 5 to 10.
    """
    p = torch.full((B, blocks, most - 1), (mean - 1) / max(most - 1, 1))
    return (1 + torch.bernoulli(p, generator=generator).sum(2).long()).tolist()


def tokens_per_second(B: int, shape: argparse.Namespace, taken: Taken, ends: bool = False) -> float:
    """Predicted tokens per second of B sequences, from as many drawn decodes as give 128 sequences, or one.

    With `ends` responses end after any number of blocks, all equally likely, and their sequences leave the batch.
    """
    generator = torch.Generator().manual_seed(SEED)
    blocks, T = math.ceil(shape.new / shape.block), shape.block
    mean = max(T / shape.tokens_per_forward, 1.0)
    tokens, total = 0, 0.0
    for _ in range(max(128 // B, 1)):
        forwards = draw(B, blocks, mean, T, generator)
        if ends:
            kept = torch.randint(1, blocks + 1, (B,), generator=generator).tolist()
            forwards = [sequence[:n] for sequence, n in zip(forwards, kept, strict=True)]
        tokens += sum(min(T * len(sequence), shape.new) for sequence in forwards)
        total += decode_seconds(forwards, taken)
    return tokens / total


def share(counted: Counts, blocks: int) -> list[tuple[float, Launch]]:
    """One of `blocks` blocks' part in a mean step."""
    return [(count / blocks, launch) for count, launch in counted]


def table(counted: Counted, on: Device, shape: argparse.Namespace) -> str:
    """Parts of both steps and tokens per second, a column for each batch size. Steps are means over the blocks."""
    batches, blocks = shape.batch, math.ceil(shape.new / shape.block)
    rows = []
    for full, title in ((False, "block step"), (True, "refresh")):
        steps = [[share(counted(graph_size(b), full, at), blocks) for at in range(blocks)] for b in batches]
        parts = [by_part(chain(*step), on) for step in steps]
        rows.append([f"{title}: graph nodes", *(number(round(sum(n for n, _ in chain(*step)))) for step in steps)])
        rows += [[f"{title}: {name}, ms", *(number(1e3 * each[name]) for each in parts)] for name in parts[0]]
        rows.append([f"{title}: all, ms", *(number(1e3 * sum(each.values())) for each in parts)])
    taken = step_seconds(counted, on)
    rows.append(["tok/s", *(number(tokens_per_second(b, shape, taken)) for b in batches)])
    rows.append(["tok/s, responses that end", *(number(tokens_per_second(b, shape, taken, True)) for b in batches)])
    return markdown([f"predicted, {on.name}", *(f"batch {b}" for b in batches)], rows)


def measured(row: dict[str, Any], way: str = "fdpp") -> dict[str, float]:
    """What a row of `bench_decode.py` has of a step, of a refresh and of the decode."""
    found = row.get(way, {})
    return {"tok/s": found.get("tokens_per_second")} | {
        name: found.get("steps", {}).get(name) for name in ("ms_step", "ms_refresh")
    }


def predicted(row: dict[str, Any], on: Device) -> dict[str, float] | None:
    """The same, predicted; None for a model whose shape is not known. All sequences need as many forwards."""
    config, nfe = bench_decode.SHAPES[row["shape"]]().config, row.get("fdpp", {}).get("nfe")
    if config is None or nfe is None:
        return None
    blocks = range(math.ceil(row["new"] / row["block"]))
    counted = counter(config, **{key: row[key] for key in ("prompt", "new", "block", "cache")})
    refresh, step = (
        1e3 * statistics.mean(sum(by_part(counted(graph_size(row["batch"]), full, at), on).values()) for at in blocks)
        for full in (True, row["cache"] == "none")
    )
    total = len(blocks) * refresh + (nfe - len(blocks)) * step + nfe * on.host_us * 1e-3
    found = {"tok/s": 1e3 * row["batch"] * row["new"] / total, "ms_refresh": refresh}
    return found if row["cache"] == "none" else found | {"ms_step": step}


def against(path: Path, on: Device) -> str:
    """Measured beside predicted, setting by setting; their ratios if the device is the same."""
    results = json.loads(path.read_text())
    name = results["environment"]["device"]
    same = set(on.name.split()) & set(name.split()) - {"NVIDIA"}
    names = ("ms_step", "ms_refresh", "tok/s")
    header = [f"measured on {name}, predicted for {on.name}", "forwards"]
    header += [f"{name}, {kind}" for name in names for kind in ("predicted", "measured", "measured over predicted")]
    rows = []
    for row in results["rows"]:
        ours, told = measured(row), predicted(row, on)
        if told is None:
            continue
        line = [f"{row['shape']}, {row['cache']}, batch {row['batch']}, prompt {row['prompt']}"]
        line.append(number(row["fdpp"]["nfe"]))
        for name in names:
            both = told.get(name), ours[name]
            line += [*map(number, both), f"{both[1] / both[0]:.2f}" if same and None not in both else "-"]
        rows.append(line)
    if not rows:
        raise SystemExit(f"{path}: no decode of a model whose shape is known, nothing to compare")
    return markdown(header, rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="h100", help="a file of bench/devices by its name, or a path to one like it"
    )
    parser.add_argument("--model", choices=MODELS, default="llada-8b", help="default: %(default)s")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--tokens-per-forward", type=float, default=4.24, help="default: %(default)s, of Fast-dLLM++")
    parser.add_argument("--prompt", type=int, default=800)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--cache", choices=("dual", "prefix", "none"), default="dual")
    parser.add_argument("--weights", choices=("int8", "float8"), help="of the blocks' projections (default: bf16)")
    text = 'more settings of the decode, as JSON: \'{"head": "fused"}\''
    parser.add_argument("--settings", type=json.loads, default={}, help=text)
    parser.add_argument("--before", action="store_true", help="also what the stored counts give, and the ratios")
    parser.add_argument("--against", type=Path, metavar="JSON", help="compare with what bench_decode.py measured")
    parser.add_argument("--store", type=Path, metavar="JSON", help="write today's counts, as --before reads them")
    options = parser.parse_args(arguments)
    on = device(options.device)
    if options.against is not None:
        print(against(options.against, on))
        return
    names = ("prompt", "new", "block", "cache")
    shape, title = MODELS[options.model]
    facts: dict[str, Any] = {"shape": shape} | {name: getattr(options, name) for name in names}
    config = bench_decode.SHAPES[shape]().config
    assert config is not None
    now = counter(config, **{name: facts[name] for name in names}, weights=options.weights, **options.settings)
    if options.store is not None:
        store(options.store, now, options.batch, facts)
        print(f"written to {options.store}")
        return
    print(
        f"Predicted from counts, not measured. {title}'s shape in bf16, {options.cache} cache, {options.prompt} + "
        f"{options.new} tokens, blocks of {options.block}, {options.tokens_per_forward:g} tokens per forward"
        + "".join(f", {name}={value}" for name, value in options.settings.items())
        + (f", weights in {options.weights}" if options.weights else "")
        + "."
    )
    if options.before:
        before, about = stored(BEFORE)
        kept = {name: about[name] for name in facts}
        if kept != facts:
            raise SystemExit(f"{BEFORE}: expected the counts of {facts}, got those of {kept}")
        print(f"\nBefore, at {about['commit']}:\n\n{table(before, on, options)}\n\nNow:")
    print(f"\n{table(now, on, options)}")
    if options.before:
        ways = [step_seconds(counted, on) for counted in (before, now)]
        for b in options.batch:
            was, is_now = (tokens_per_second(b, options, taken) for taken in ways)
            print(f"predicted, batch {b}: {is_now / was:.2f} times as many tokens per second")


if __name__ == "__main__":
    main()
