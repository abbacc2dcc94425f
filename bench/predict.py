"""What decodes would take on a GPU, predicted from the code's own counts. No figure here is a measurement.

`python bench/predict.py --device h100` counts the launches of captured steps of LLaDA-8B's shape, or with
`--model dream-7b` of another one's (`nodes.py`), gives each a time by the device's figures (`roofline.py`) and prints

- the parts of a block step and of a refresh (the full forward that begins a block), by batch size; of a block-causal
  model those of each kind of forward;
- tokens per second. Sequences need different numbers of forwards for a block, drawn as `draw` says. A sequence leaves
  the batch when its block is complete, and the rest runs at the next `graph_size`, as in the decoding loop.

`--before` prints the same for the counts in `predicted-before.json` beside it. `--against decode-<device>.json` prints
what `bench_decode.py` measured beside what is predicted for the same settings. `--canvas` prints what a step of
DiffusionGemma moves, holds and takes besides its forward (`canvas_traffic.py`).

No source gives the tokens per forward of block-causal models as they are counted here, without commits: 1, 2 and 4 are
assumed. Beside those of SDAR and LLaDA2 stand the tokens per second if every block were committed by a forward of its
own, as published, on the same kernels. Counts are those of a GPU of compute capability 9: on others the experts of
LLaDA2 run in another way.
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
from dataclasses import astuple, dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import bench_decode
import canvas_traffic
import nodes
import torch
from nodes import Launch
from report import SHAPES, markdown, number
from roofline import Device, by_part, device
from transformers import PretrainedConfig

from fdpp.decoding.arena import graph_size
from fdpp.decoding.block_causal import PIECE
from fdpp.models.families import families

BEFORE = Path(__file__).parent / "predicted-before.json"
SEED = 0
TITLES = {"8b": "LLaDA-8B"} | SHAPES
"""Names of shapes."""

MODELS = {"llada-8b": "8b"} | {name: name for name in ("dream-7b", "sdar-4b", "fast-dllm-v2-7b", "llada2-mini")}
"""The shape in `bench_decode.SHAPES` of each `--model`."""

ASSUMED = (1.0, 2.0, 4.0)
"""Tokens per forward of a block-causal model."""

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


def parts_of(config: PretrainedConfig, block: int, sub_block_length: int | None = None) -> list[int]:
    """How many tokens each part of a block has that is decided by itself, as `BlockCausalLoop.spans` has them."""
    kind = families()[config.model_type]
    part = sub_block_length or kind.default_sub_block_length or block
    found = [min(part, block - start) for start in range(0, block, part)]
    return [n for n in (1, found[0] - 1, *found[1:]) if n] if kind.anchored else found


def counter(config: PretrainedConfig, **settings: Any) -> Counted:
    """The counts of today's code, each taken once.

    All blocks but the first begin as the second does, and steps depend on the block with a prefix cache alone. In a
    block-causal model that is so with all caches, of what a block of the grid is divided into.
    """
    block_causal = families()[config.model_type].block_causal
    parts = len(parts_of(config, settings.get("block", 32), settings.get("sub_block_length")))

    @cache
    def taken(batch: int, full: bool, at: int) -> Counts:
        return counts(config, batch=batch, full=full, at=at, **settings)

    def counted(batch: int, full: bool, at: int) -> Counts:
        if block_causal:
            return taken(batch, full, at % parts + (parts if full and at >= parts else 0))
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
            listed = [[n, *astuple(launch)] for n, launch in counted(batch, full, 0)]
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


def drawn(B: int, widths: Sequence[int], rate: float, generator: torch.Generator) -> list[list[int]]:
    """Forwards of what each of B sequences decides together, so many tokens each, at `rate` tokens per forward."""
    of = {T: zip(*draw(B, widths.count(T), max(T / rate, 1.0), T, generator), strict=True) for T in sorted({*widths})}
    return [list(sequence) for sequence in zip(*(next(of[T]) for T in widths), strict=True)]


def tokens_per_second(B: int, widths: Sequence[int], new: int, rate: float, taken: Taken, ends: bool = False) -> float:
    """Predicted tokens per second of B sequences, from as many drawn decodes as give 128 sequences, or one.

    Args:
        widths: how many tokens are decided together, one after the other; `new` of them are wanted.
        rate: tokens per forward, of those that decide.
        taken: seconds of a step.
        ends: responses end after any number of `widths`, all equally likely, and their sequences leave the batch.
    """
    generator = torch.Generator().manual_seed(SEED)
    tokens, total = 0, 0.0
    for _ in range(max(128 // B, 1)):
        forwards = drawn(B, widths, rate, generator)
        if ends:
            kept = torch.randint(1, len(widths) + 1, (B,), generator=generator).tolist()
            forwards = [sequence[:n] for sequence, n in zip(forwards, kept, strict=True)]
        tokens += sum(min(sum(widths[: len(sequence)]), new) for sequence in forwards)
        total += decode_seconds(forwards, taken)
    return tokens / total


def share(counted: Counts, blocks: int) -> list[tuple[float, Launch]]:
    """One of `blocks` blocks' part in a mean step."""
    return [(count / blocks, launch) for count, launch in counted]


@dataclass(frozen=True)
class Plan:
    """A decode's forwards.

    Attributes:
        widths: how many tokens are decided together, one after the other.
        new: tokens that are wanted.
        kinds: kinds of steps by their names, each by `full` and `at` of those it is the mean of.
        merged: whether a block's first forward also feeds the block before it.
    """

    widths: list[int]
    new: int
    kinds: dict[str, list[tuple[bool, int]]]
    merged: bool = False

    @classmethod
    def of(cls, config: PretrainedConfig, prompt: int, new: int, block: int, cache: str, **settings: Any) -> Plan:
        """`ValueError`: a decode of a block-causal model whose forwards are not the same in all blocks."""
        kind, blocks = families()[config.model_type], math.ceil(new / block)
        parts = parts_of(config, block, settings.get("sub_block_length"))
        if not kind.block_causal:
            titles = {"block step": False, "refresh": True}
            kinds = {title: [(full, at) for at in range(blocks)] for title, full in titles.items()}
            return cls([block] * blocks, new, kinds)
        if prompt % block or prompt > PIECE or cache == "none":
            raise ValueError(
                f"block-causal: expected a cache and a prompt of whole blocks, up to {PIECE} tokens, "
                f"got cache={cache}, prompt={prompt}, block={block}"
            )
        several = [at for at, n in enumerate(parts) if n > 1] or [0]
        kinds = {"block step": [(False, at) for at in several]}
        if cache == "dual" and len(parts) > 1:
            kinds["whole block"] = [(True, len(parts) + at) for at in several]
        kinds["the block before" if kind.anchored else "block and the one before"] = [(True, len(parts))]
        kinds["prefill" if kind.anchored else "prefill and a block"] = [(True, 0)]
        return cls(parts * blocks, new, kinds, not kind.anchored)


def separate(taken: Taken) -> Taken:
    """`taken` where every block is committed by a forward of its own, and a prefill decides nothing."""
    return lambda batch, full, at: taken(batch, False, at) + (taken(batch, full and at == 0, at) if full else 0.0)


def table(counted: Counted, on: Device, plan: Plan, batches: Sequence[int], rates: Sequence[float]) -> str:
    """Parts of all kinds of steps and tokens per second, a column for each batch size."""
    rows = []
    for title, kind in plan.kinds.items():
        steps = [[share(counted(graph_size(b), *step), len(kind)) for step in kind] for b in batches]
        parts = [by_part(chain(*step), on) for step in steps]
        rows.append([f"{title}: graph nodes", *(number(round(sum(n for n, _ in chain(*step)))) for step in steps)])
        rows += [[f"{title}: {name}, ms", *(number(1e3 * each[name]) for each in parts)] for name in parts[0]]
        rows.append([f"{title}: all, ms", *(number(1e3 * sum(each.values())) for each in parts)])
    taken = step_seconds(counted, on)
    for rate in rates:
        at = "" if len(rates) == 1 else f", {rate:g} tokens per forward"
        ways = {"tok/s": (taken, False), "tok/s, responses that end": (taken, True)}
        if plan.merged:
            ways["tok/s, commits by themselves"] = (separate(taken), False)
        for title, (way, ends) in ways.items():
            found = (tokens_per_second(b, plan.widths, plan.new, rate, way, ends) for b in batches)
            rows.append([title + at, *map(number, found)])
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
    facts = {key: row[key] for key in ("prompt", "new", "block", "cache")}
    blocks, counted = range(len(Plan.of(config, **facts).widths)), counter(config, **facts)
    refresh, step = (
        1e3 * statistics.mean(sum(by_part(counted(graph_size(row["batch"]), full, at), on).values()) for at in blocks)
        for full in (True, row["cache"] == "none")
    )
    total = len(blocks) * refresh + (nfe - len(blocks)) * step + nfe * on.host_us * 1e-3
    found = {"tok/s": 1e3 * row["batch"] * row["new"] / total, "ms_refresh": refresh}
    if families()[config.model_type].block_causal:  # of whose first forwards few feed everything
        return {"tok/s": found["tok/s"]}
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
    text = "default: 4.24, of Fast-dLLM++; of a block-causal model 1, 2 and 4, assumed"
    parser.add_argument("--tokens-per-forward", nargs="+", type=float, help=text)
    parser.add_argument("--prompt", type=int, default=800)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--block", type=int, help="default: the model's")
    parser.add_argument("--cache", choices=("dual", "prefix", "none"), default="dual")
    parser.add_argument("--weights", choices=("int8", "float8"), help="of the blocks' projections (default: bf16)")
    text = 'more settings of the decode, as JSON: \'{"head": "fused"}\''
    parser.add_argument("--settings", type=json.loads, default={}, help=text)
    parser.add_argument("--before", action="store_true", help="also what the stored counts give, and the ratios")
    parser.add_argument("--against", type=Path, metavar="JSON", help="compare with what bench_decode.py measured")
    text = "a step of DiffusionGemma besides its forward, by transformers and by fdpp, in place of a decode"
    parser.add_argument("--canvas", action="store_true", help=text)
    parser.add_argument("--store", type=Path, metavar="JSON", help="write today's counts, as --before reads them")
    options = parser.parse_args(arguments)
    on = device(options.device)
    if options.against is not None:
        print(against(options.against, on))
        return
    if options.canvas:
        print("Predicted from counts, not measured. DiffusionGemma's shape, outputs and embeddings in bf16.")
        print(canvas_traffic.table(on, options.batch))
        return
    names = ("prompt", "new", "block", "cache")
    shape = MODELS[options.model]
    found, title = bench_decode.SHAPES[shape](), TITLES[shape]
    config = found.config
    assert config is not None
    options.block = options.block or found.block
    rates = options.tokens_per_forward or (ASSUMED if families()[config.model_type].block_causal else [4.24])
    facts: dict[str, Any] = {"shape": shape} | {name: getattr(options, name) for name in names}
    decode = {name: facts[name] for name in names}
    now = counter(config, **decode, weights=options.weights, **options.settings)
    if options.store is not None:
        store(options.store, now, options.batch, facts)
        print(f"written to {options.store}")
        return
    plan, told = Plan.of(config, **decode, **options.settings), ", ".join(f"{rate:g}" for rate in rates)
    print(
        f"Predicted from counts, not measured. {title}'s shape in bf16, {options.cache} cache, {options.prompt} + "
        f"{options.new} tokens, blocks of {options.block}, {told} tokens per forward"
        f"{' (assumed)' if rates is ASSUMED else ''}"
        + "".join(f", {name}={value}" for name, value in options.settings.items())
        + (f", weights in {options.weights}" if options.weights else "")
        + "."
    )
    if options.before:
        before, about = stored(BEFORE)
        kept = {name: about[name] for name in facts}
        if kept != facts:
            raise SystemExit(f"{BEFORE}: expected the counts of {facts}, got those of {kept}")
        print(f"\nBefore, at {about['commit']}:\n\n{table(before, on, plan, options.batch, rates)}\n\nNow:")
    print(f"\n{table(now, on, plan, options.batch, rates)}")
    if options.before:
        ways = [step_seconds(counted, on) for counted in (before, now)]
        for b in options.batch:
            was, is_now = (tokens_per_second(b, plan.widths, plan.new, rates[0], taken) for taken in ways)
            print(f"predicted, batch {b}: {is_now / was:.2f} times as many tokens per second")


if __name__ == "__main__":
    main()
